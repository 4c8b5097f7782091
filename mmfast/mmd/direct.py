"""MMD² of two plain samples on the CPU by one call of the native kernels: bandwidth, value and both gradients.

A training step's batch takes less time than the operators around it. `mmd2` takes the common cases; everything else
goes through `mmfast.mmd.op`, with the same results, and so do second derivatives.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from mmfast import _backend
from mmfast.mmd import op
from mmfast.mmd.bandwidth import MeanDistance, least_length
from mmfast.mmd.kernels import Kernel, fixed_terms
from mmfast.mmd.terms import L2, METRIC, Terms

_POINTS = {"x": 1, "y": 2, "pooled": 3}
_MOST_TERMS = 64


def mmd2(x: Tensor, y: Tensor, kernel: Kernel, unbiased: bool, backend: str | None) -> Tensor | None:
    """`mmfast.mmd2` of ``(n, d)`` and ``(m, d)`` by its estimators ``"unbiased"`` and ``"biased"``, or None.

    None where a check fails, for others to say why, and for what is not a kernel of L2 distances between dense float32
    or float64 features on the CPU, whose parameters are numbers or follow from a mean distance.
    """
    if torch.compiler.is_compiling() or not (_is_dense(x) and _is_dense(y)) or x.dtype != y.dtype:
        return None
    (n, d), (m, other) = x.shape, y.shape
    if d != other or min(n, m) < 2 or not _backend.nobody_looks_on():
        return None
    if _backend.choose("mmd", x.device, backend)[0] != "cpu":
        return None
    terms = _terms(kernel, x, y)
    if terms is None:
        return None
    how = _how(n, m, unbiased, terms.families, terms.rule, x.dtype)
    if torch.is_grad_enabled() and (x.requires_grad or y.requires_grad):
        return _Direct.apply(x, y, terms.params, how)
    return _backend._C.mmd_direct(x, y, terms.params, how[0], False, False)[0]


def _is_dense(t: Tensor) -> bool:
    """Whether the native call takes these features: a matrix in its own precision, whose columns lie side by side."""
    return _backend.is_plain(t) and t.dim() == 2 and t.dtype in (torch.float32, torch.float64) and t.stride(1) == 1


def _terms(kernel: Kernel, x: Tensor, y: Tensor) -> Terms | None:
    terms = fixed_terms(kernel, x, y)
    if terms is None or (terms.rule is not None and terms.rule.points not in _POINTS):
        return None
    few = len(terms.families) <= _MOST_TERMS and METRIC[terms.families[0]] == L2 and not any(terms.layers)
    return terms if few and terms.params.is_cpu else None


@functools.lru_cache(maxsize=1024)
def _how(n: int, m: int, unbiased: bool, families: tuple[int, ...], rule: MeanDistance | None, dtype: torch.dtype):
    """What the native kernels are told, and what a second derivative needs of it."""
    coefs = (1 / (n * (n - 1)), 1 / (m * (m - 1)), -2 / (n * m)) if unbiased else (1 / n**2, 1 / m**2, -2 / (n * m))
    points, factor, least = 0, 0.0, 0.0
    if rule is not None:
        points = _POINTS[rule.points]
        count = (0, n, m, n + m)[points]
        # The sum over ordered pairs is 2 count times that of the squares about the mean.
        factor = 2.0 / (count if rule.diagonal else count - 1)
        least = least_length(dtype) / rule.scale  # the params are multiples that hold the scale
    return _backend._C.MmdDirect(coefs, families, points, factor, least, not unbiased), coefs, families


class _Direct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, params, how):
        native, *ctx.how = how
        value, *units = _backend._C.mmd_direct(x, y, params, native, x.requires_grad, y.requires_grad)
        ctx.save_for_backward(x, y, *units)
        ctx.set_materialize_grads(False)
        return value

    @staticmethod
    def backward(ctx, grad):
        if grad is None:
            return (None,) * 4
        x, y, unit_x, unit_y, params = ctx.saved_tensors
        need_x, need_y = ctx.needs_input_grad[:2]
        if not torch.is_grad_enabled():
            return unit_x * grad if need_x else None, unit_y * grad if need_y else None, None, None
        coefs, families = ctx.how
        coefs, nothing = torch.tensor(coefs, dtype=torch.float64, device="cpu"), params.new_empty(0)
        kernel = params, [x.shape[1]], families, [0] * len(families)
        need = [need_x, need_y, False, False, False, False]
        units = unit_x[None], unit_y[None], nothing, nothing, nothing
        by_x, by_y = op._ops.mmd_quadratic_backward.default(
            grad.double().reshape(1), x[None], y[None], None, None, coefs, *kernel, need, *units
        )[:2]
        return by_x[0] if need_x else None, by_y[0] if need_y else None, None, None
