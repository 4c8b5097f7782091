"""What follows attention: the gated residual and its norm, by PyTorch or in one pass."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfast import _backend
from mmfast._backend import on_device_of
from mmfast.fusion._inputs import DTYPES, check_choice, check_number, compute_dtype

_INPUTS = "Tensor x, Tensor y, Tensor? gate, Tensor? weight, Tensor? bias, float eps, str norm, str activation"
torch.library.define("mmfast::fusion_residual_forward", f"({_INPUTS}) -> (Tensor total, Tensor normed)")
torch.library.define(
    "mmfast::fusion_residual_backward",
    f"(Tensor? grad_total, Tensor? grad_normed, {_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


def gated_residual(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None = None,
    *,
    activation: str | None = None,
    norm: str | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""The residual of a cross-attention, and the norm that the next layer begins with.

        s = x + a(gate) · y        n = norm(s) · weight + bias

    Args:
        x, y: ``(..., E)``, of one shape and dtype.
        gate: a tensor of one element, or None for 1; Flamingo's (Alayrac et al. 2022) with ``activation="tanh"``.
        activation: a: ``None`` (the identity), ``"tanh"`` or ``"sigmoid"``.
        norm: ``None``, ``"layer"`` or ``"rms"`` over the features.
        weight, bias: ``(E,)``; bias only with ``"layer"``.
        eps: added to the variance, or to the mean square.
        backend: ``"reference"``, plain PyTorch, or ``"triton"``, one pass over the rows: by default on the GPU, where
            E ≤ 16384.

    Returns:
        s in the dtype of ``x``, or with a norm (s, n). Computed in float32, or float64 for float64. Differentiable;
        second derivatives by the reference only, else a `RuntimeError`.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.
    """
    check_choice("activation", activation, (None, "tanh", "sigmoid"))
    check_choice("norm", norm, (None, "layer", "rms"))
    for name, tensor in (("x", x), ("y", y), ("gate", gate), ("weight", weight), ("bias", bias)):
        needed = name in ("x", "y")
        if not isinstance(tensor, Tensor) and (needed or tensor is not None):
            kind = type(tensor).__name__
            raise TypeError(f"{name} must be a tensor{'' if needed else ', or None'}, got {kind}")
    eps = check_number("eps", eps)
    if x.dim() == 0:
        raise ValueError("x must have features, (..., E), got ()")
    for name, tensor, shape in (("y", y, x.shape), ("weight", weight, x.shape[-1:]), ("bias", bias, x.shape[-1:])):
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} must be {tuple(shape)}, got {tuple(tensor.shape)}")
    if x.dtype not in DTYPES or y.dtype != x.dtype:
        raise TypeError(f"x and y must have one floating point dtype, got {x.dtype} and {y.dtype}")
    if gate is not None and gate.numel() != 1:
        raise ValueError(f"gate must have one element, got {tuple(gate.shape)}")
    if norm is None and (weight is not None or bias is not None):
        raise ValueError("weight and bias must be None without a norm")
    if norm == "rms" and bias is not None:
        raise ValueError("bias must be None with norm='rms'")
    chosen = _backend.choose("fusion", x.device, backend)[0]
    if chosen == "triton" and x.dtype != torch.float64 and x.numel() and x.shape[-1] <= 16384:
        total, normed = torch.ops.mmfast.fusion_residual_forward(
            x, y, gate, weight, bias, eps, norm or "", activation or ""
        )
    else:
        total, normed = reference(x, y, gate, weight, bias, eps, norm or "", activation or "")
    return total if norm is None else (total, normed)


def reference(x, y, gate, weight, bias, eps, norm, activation) -> tuple[Tensor, Tensor | None]:
    """`gated_residual` of checked arguments, in plain PyTorch."""
    dtype = compute_dtype(x.dtype)
    s = y.to(dtype)
    if gate is not None:
        g = gate.reshape(()).to(dtype)
        s = s * (g.tanh() if activation == "tanh" else g.sigmoid() if activation == "sigmoid" else g)
    s = x.to(dtype) + s
    if not norm:
        return s.to(x.dtype), None
    weight, bias = (None if p is None else p.to(dtype) for p in (weight, bias))
    shape = x.shape[-1:]
    n = F.layer_norm(s, shape, weight, bias, eps) if norm == "layer" else F.rms_norm(s, shape, weight, eps)
    return s.to(x.dtype), n.to(x.dtype)


def _forward(x, y, gate, weight, bias, eps, norm, activation):
    from mmfast.fusion import triton_epilogue

    with on_device_of(x):
        return triton_epilogue.forward(x.contiguous(), y.contiguous(), gate, weight, bias, eps, norm, activation)


def _backward(grad_total, grad_normed, x, y, gate, weight, bias, eps, norm, activation):
    from mmfast.fusion import triton_epilogue

    of = (None if g is None else g.contiguous() for g in (grad_total, grad_normed))
    given = x.contiguous(), y.contiguous(), gate, weight, bias, eps, norm, activation
    with on_device_of(x):
        grads = triton_epilogue.backward(*of, *given)
    return (*grads[:2], grads[2] if gate is None else grads[2].reshape(gate.shape), *grads[3:])


for _device in ("cuda", "cpu"):  # on the CPU by Triton's interpreter
    torch.library.impl("mmfast::fusion_residual_forward", _device, _forward)
    torch.library.impl("mmfast::fusion_residual_backward", _device, _backward)


def _like(x: Tensor | None, of: Tensor) -> Tensor:
    return of.new_empty((0,)) if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.register_fake("mmfast::fusion_residual_forward")
def _(x, y, gate, weight, bias, eps, norm, activation):
    return _like(x, x), _like(x if norm else None, x)


@torch.library.register_fake("mmfast::fusion_residual_backward")
def _(grad_total, grad_normed, x, y, gate, weight, bias, eps, norm, activation):
    return tuple(_like(t, x) for t in (x, y, gate, weight, bias))


def _save(ctx, inputs, output):
    x, y, gate, weight, bias, *ctx.options = inputs
    ctx.save_for_backward(x, y, gate, weight, bias)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad_total, grad_normed):
    nothing = (None,) * 3
    if not ctx.options[1]:
        grad_normed = None
    if grad_total is None and grad_normed is None:
        return (None,) * 8
    saved = ctx.saved_tensors
    grads = torch.ops.mmfast.fusion_residual_backward(grad_total, grad_normed, *saved, *ctx.options)
    return (*(None if x is None else g for x, g in zip(saved, grads, strict=True)), *nothing)


def _no_second(ctx, *grads):
    raise RuntimeError("gated_residual has second derivatives only with backend='reference'")


torch.library.register_autograd("mmfast::fusion_residual_forward", _differentiate, setup_context=_save)
torch.library.register_autograd("mmfast::fusion_residual_backward", _no_second)
