"""The operator ``mmfast::mmd_small``: the MMD² of a training step's batch, where launches take longer than arithmetic.

Two launches of Triton's kernels give the value, with the bandwidth that a rule finds in the data; one more gives both
gradients (`mmfast.mmd.triton_small`). Second derivatives are those of the reference. `takes` says what comes here;
everything else goes to the operators of `mmfast.mmd.op`, which take any number of rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmfast.mmd import _precision, op, reference
from mmfast.mmd.bandwidth import MeanDistance
from mmfast.mmd.terms import DOT, L1, METRIC, ROOTS, Terms

MOST_ROWS = 256  # of each sample
_MOST_BYTES = 2**26  # of the kernel matrices of a batch, which are kept for the gradient
_MOST_TERMS = 64


# ---- What comes here


def takes_points(x: Sequence[Tensor], y: Sequence[Tensor]) -> bool:
    """One layer of a few rows, float32 to the accuracy of that name or half precision, seen by nothing but autograd."""
    b, n, d = x[0].shape
    m = y[0].shape[1]
    return (
        len(x) == 1
        and min(b, n, m, d) > 0
        and max(n, m) <= MOST_ROWS
        and 4 * b * (n + m) ** 2 <= _MOST_BYTES
        and x[0].dtype != torch.float64
        and (x[0].dtype != torch.float32 or _precision.current() == "float32")
        and (torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is None)
    )


def takes(x: Sequence[Tensor], y: Sequence[Tensor], terms: Terms) -> bool:
    """`takes_points`, and a kernel of L2 distances or products whose parameters are constants."""
    return (
        set(terms.layers) == {0}
        and METRIC[terms.families[0]] != L1
        and len(terms.families) <= _MOST_TERMS
        and not (terms.params.requires_grad and torch.is_grad_enabled())
        and takes_points(x, y)
    )


# ---- The operator

_PROBLEM = "Tensor coefs, Tensor params, int[] families, int[] counts, bool diagonal, bool aligned"
torch.library.define(
    "mmfast::mmd_small",
    f"(Tensor x, Tensor y, {_PROBLEM}, bool keep) -> (Tensor value, Tensor weights, Tensor length)",
)
torch.library.define(
    "mmfast::mmd_small_backward",
    f"(Tensor grad, Tensor x, Tensor y, Tensor weights, Tensor length, {_PROBLEM}, bool[] need)"
    " -> (Tensor grad_x, Tensor grad_y)",
)
_ops = torch.ops.mmfast


def form(x: Tensor, y: Tensor, coefs: Tensor, terms: Terms, diagonal: bool = False, aligned: bool = False) -> Tensor:
    """Σ c_0 k(x_i, x_j) + Σ c_1 k(y_i, y_j) + Σ c_2 k(x_i, y_j), ``(b,)`` float32, summed in float64.

    Without i = j in the first two sums, or with them where ``diagonal``; without i = j in the third where ``aligned``.
    With ``terms.rule`` the terms' lengths are multiples of what it finds.
    """
    counts = _counts(terms.rule, x.shape[1], y.shape[1])
    inputs = x, y, coefs, terms.params, list(terms.families), counts, diagonal, aligned
    keep = torch.is_grad_enabled() and (x.requires_grad or y.requires_grad)
    if keep and not torch.compiler.is_compiling() and type(x) is type(y) is Tensor:
        return _Small.apply(*inputs)
    return _ops.mmd_small.default(*inputs, keep)[0]


def _counts(rule: MeanDistance | None, n: int, m: int) -> list[int]:
    """Do pairs of x, of y and of both count in a rule's mean, and what twice their sum is divided by (or 0)."""
    if rule is None:
        return [0, 0, 0, 0]
    if rule.points == "cross":
        return [0, 0, 1, 2 * n * m]
    which, count = {"pooled": ([1, 1, 1], n + m), "x": ([1, 0, 0], n), "y": ([0, 1, 0], m)}[rule.points]
    pairs = count * (count if rule.diagonal else count - 1)
    rule._need_pairs(count, pairs)
    return [*which, pairs]


def _forward(x, y, coefs, params, families, counts, diagonal, aligned, keep):
    from mmfast.mmd import triton_small_launch  # where it is asked for: Triton may not be installed

    return triton_small_launch.forward(x, y, coefs, params, families, counts, diagonal, aligned, keep)


def _backward(grad, x, y, weights, length, coefs, params, families, counts, diagonal, aligned, need):
    from mmfast.mmd import triton_small_launch

    return triton_small_launch.backward(grad, x, y, weights, METRIC[families[0]] == DOT, need)


torch.library.impl("mmfast::mmd_small", ("cpu", "cuda"), _forward)
torch.library.impl("mmfast::mmd_small_backward", ("cpu", "cuda"), _backward)


@torch.library.register_fake("mmfast::mmd_small")
def _(x, y, coefs, params, families, counts, diagonal, aligned, keep):
    size, _, tiles = tiling(x.shape[1], y.shape[1])
    b, side = x.shape[0], tiles * size
    return (
        x.new_empty((b,), dtype=torch.float32),
        x.new_empty((b, side, side) if keep else (0,), dtype=torch.float32),
        x.new_empty((b,) if counts[3] else (0,), dtype=torch.float64),
    )


def tiling(n: int, m: int) -> tuple[int, int, int]:
    """Rows of a tile, tiles of x, and tiles of both: enough for the multiprocessors, no more traffic than they need."""
    size = 32 if n + m <= 256 else 64
    tiles_x = -(-n // size)
    return size, tiles_x, tiles_x - (-m // size)


@torch.library.register_fake("mmfast::mmd_small_backward")
def _(grad, x, y, weights, length, coefs, params, families, counts, diagonal, aligned, need):
    return x.new_empty(x.shape if need[0] else (0,)), y.new_empty(y.shape if need[1] else (0,))


# ---- Gradients


def _save(ctx, inputs, output):
    x, y, coefs, params, *ctx.problem = inputs[:8]
    ctx.save_for_backward(x, y, output[1], output[2], coefs, params)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad, *_):
    if grad is None:
        return (None,) * 9
    need = [ctx.needs_input_grad[0], ctx.needs_input_grad[1]]
    backward = _ops.mmd_small_backward.default
    if not torch.is_grad_enabled() and type(grad) is Tensor and not torch.compiler.is_compiling():
        backward = _backward
    by = backward(grad, *ctx.saved_tensors, *ctx.problem, need)
    return *(g if n else None for g, n in zip(by, need, strict=True)), *(None,) * 7


class _Small(torch.autograd.Function):
    """``mmfast::mmd_small`` without the dispatcher, which takes longer than the launches."""

    @staticmethod
    def forward(ctx, *inputs):
        output = _forward(*inputs, True)
        _save(ctx, inputs, output)
        return output[0]

    @staticmethod
    def backward(ctx, grad):
        return _differentiate(ctx, grad)[:8]


def _save_backward(ctx, inputs, output):
    grad, x, y, _, length, coefs, params, *ctx.problem, ctx.need = inputs
    ctx.save_for_backward(grad, x, y, length, coefs, params)
    ctx.set_materialize_grads(False)


def _differentiate_twice(ctx, *grads):
    grad, x, y, length, coefs, params = ctx.saved_tensors
    families, _, diagonal, aligned = ctx.problem

    def forward(x, y):
        return _definition(x, y, length, coefs, params, families, diagonal, aligned).to(grad.dtype)

    grads = [g for g, n in zip(grads, ctx.need, strict=True) if n]
    (by_grad,), (by_x, by_y) = op._second(forward, [grad], [x, y], ctx.need, grads)
    return by_grad, by_x, by_y, *(None,) * 9


def _definition(x, y, length, coefs, params, families, diagonal, aligned) -> Tensor:
    """`form` by the reference, with the lengths that were found."""
    values = []
    for i in range(x.shape[0]):
        table = params
        if length.numel():
            # A squared length divides the squares, its root the distances.
            gammas = [params[t, 1] * length[i] ** (-0.5 if f in ROOTS else -1.0) for t, f in enumerate(families)]
            table = torch.cat((params[:, :1], torch.stack(gammas)[:, None], params[:, 2:]), 1)
        terms, a, b = Terms(tuple(families), (0,) * len(families), table), [x[i : i + 1]], [y[i : i + 1]]
        value = reference.quadratic(a, b, None, None, coefs, terms)[0]
        if diagonal:
            value = value + reference.diagonal(a, terms).sum(1) * coefs[0]
            value = value + reference.diagonal(b, terms).sum(1) * coefs[1]
        if aligned:
            value = value - reference.aligned(a, b, terms).sum(1, dtype=torch.float64) * coefs[2]
        values.append(value)
    return torch.cat(values)


torch.library.register_autograd("mmfast::mmd_small", _differentiate, setup_context=_save)
torch.library.register_autograd("mmfast::mmd_small_backward", _differentiate_twice, setup_context=_save_backward)
