"""The operator ``mmfast::mmd_small``: the MMD² of a training step's batch, where launches take longer than arithmetic.

Two launches of Triton's kernels give the value, with the bandwidth that a rule finds in the data; one more gives both
gradients (`mmfast.mmd.triton_small`). Second derivatives are those of the reference. `takes` says what comes here;
everything else goes to the operators of `mmfast.mmd.op`, which take any number of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from mmfast import _backend
from mmfast.mmd import _precision, large, op, reference
from mmfast.mmd.bandwidth import MeanDistance
from mmfast.mmd.estimators import coefficients, constant
from mmfast.mmd.kernels import Kernel, fixed_terms
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
    pairs = counts(terms.rule, x.shape[1], y.shape[1])
    inputs = x, y, coefs, terms.params, list(terms.families), pairs, diagonal, aligned
    keep = torch.is_grad_enabled() and (x.requires_grad or y.requires_grad)
    if keep and not torch.compiler.is_compiling() and type(x) is type(y) is Tensor:
        return _Small.apply(*inputs)
    return _ops.mmd_small.default(*inputs, keep)[0]


def counts(rule: MeanDistance | None, n: int, m: int) -> list[int]:
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

    return triton_small_launch.of_batch(x, y, coefs, params, families, counts, diagonal, aligned, keep)


def _backward(grad, x, y, weights, length, coefs, params, families, counts, diagonal, aligned, need):
    from mmfast.mmd import triton_small_launch

    return triton_small_launch.backward_of_batch(grad, x, y, weights, METRIC[families[0]] == DOT, need)


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
    backward = _backward if _is_alone(grad) else _ops.mmd_small_backward.default
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


def _is_alone(grad: Tensor) -> bool:
    """True where only the values of a gradient count: no second derivative, no batch of them, no compilation."""
    return (
        not torch.is_grad_enabled()
        and type(grad) is Tensor
        and not torch.compiler.is_compiling()
        and torch._C._functorch.peek_interpreter_stack() is None
        and not _backend.is_batch_of_gradients(grad)
    )


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


# ---- Two matrices

_ESTIMATORS = ("unbiased", "biased", "one_sample_u")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MOST_KEPT = 512
# Of kernels that each step builds anew; the others remember their own. False: there is none.
_ways: dict[tuple, _Way | large.Way | Literal[False]] = {}


def mmd2(x: Tensor, y: Tensor, kernel: Kernel, estimator: str, backend: str | None) -> Tensor | None:
    """`mmfast.mmd2` of ``(n, d)`` and ``(m, d)`` with as little done on the host as there can be, or None.

    None where a check fails, for others to say why, for what neither `takes` nor `mmfast.mmd.large` would, for what is
    not dense, and where anything but autograd looks on.
    """
    if torch.compiler.is_compiling() or not (_is_matrix(x) and _is_matrix(y)) or not _backend.nobody_looks_on():
        return None
    (n, d), (m, other) = x.shape, y.shape
    dtype, device = x.dtype, x.device
    if other != d or y.dtype != dtype or y.device != device:
        return None
    if _backend.choose("mmd", device, backend)[0] not in ("cuda", "triton"):
        return None
    keep = torch.is_grad_enabled() and (x.requires_grad or y.requires_grad)
    # What a batch is like: how it is computed is found once.
    like = estimator, n, m, d, dtype, device, keep, _precision.current()
    way = kernel._cache.get(like)
    if way is None:
        numbers = kernel.numbers
        way = None if numbers is None else _ways.get((numbers, like))
        if way is None:
            way = _find_way(x, y, kernel, like) or False
            if numbers is not None and len(_ways) < _MOST_KEPT:
                _ways[numbers, like] = way
        if len(kernel._cache) < _MOST_KEPT:
            kernel._cache[like] = way
    if not way or (way.is_refused is not None and way.is_refused(dtype)):
        return None
    if keep:
        return _Matrices.apply(x, y, way)
    return way.compute(x, y)[0]


def forget() -> None:
    """What was found for kernels that no longer are: where other ways are measured."""
    _ways.clear()


def _is_matrix(t: Tensor) -> bool:
    return (
        type(t) in (Tensor, torch.nn.Parameter)
        and t.dim() == 2
        and t.dtype in _DTYPES
        and t.layout is torch.strided
        and t.is_contiguous()
        and not t.is_neg()
        and not t._is_zerotensor()
        and not _backend.is_batch_of_gradients(t)
    )


class _Way:
    """How the MMD² of some shape is computed: its launches, and the constants that they read."""

    is_refused = None  # by PyTorch's settings, of a dtype

    def __init__(self, like: tuple, params: Tensor, families: tuple[int, ...], rule: MeanDistance | None) -> None:
        from mmfast.mmd import triton_small_launch

        estimator, n, m, d, self.dtype, self.device, keep, _ = like
        self.shape, self.strides = (1, n, m, d), (n * d, d, m * d, d)
        self.launches, self.params = triton_small_launch, params
        self.coefs = constant(coefficients(estimator, n, m), self.device)
        self.dot = METRIC[families[0]] == DOT
        self.problem = families, tuple(counts(rule, n, m)), estimator == "biased", estimator == "one_sample_u"
        self.plan = triton_small_launch.plan(self.shape, self.strides, self.dtype, *self.problem, keep)
        self.gradients = {}
        self.like_value = torch.empty((), dtype=torch.float32, device=self.device)

    def compute(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The value, without dimensions, and the room where what the gradient needs lies."""
        value = torch.empty_like(self.like_value)  # half of what it takes to say dtype and device
        with self.launches.on_device_of(x):
            return value, self.launches.forward(self.plan, x, y, self.params, self.coefs, value)

    def differentiate(self, grad: Tensor, x: Tensor, y: Tensor, room: Tensor, need_x: bool, need_y: bool):
        p = self.gradients.get((need_x, need_y))
        if p is None:
            like = self.shape, self.strides, self.dtype, (torch.float32, 0), self.dot
            p = self.gradients[need_x, need_y] = self.launches.gradient_plan(*like, need_x, need_y)
        by_x, by_y = torch.empty_like(x) if need_x else x, torch.empty_like(y) if need_y else y
        weights = room.data_ptr() + self.plan.weights
        with self.launches.on_device_of(x):
            self.launches.backward(p, grad, x, y, weights, lambda: self.plan.kept(room)[1], by_x, by_y)
        return by_x if need_x else None, by_y if need_y else None

    def differentiate_twice(self, grad: Tensor, x: Tensor, y: Tensor, room: Tensor, need_x: bool, need_y: bool):
        """The gradients, by the operator that has derivatives itself."""
        length, weights = self.plan.kept(room)
        families, counts, *pairs = self.problem
        problem = self.coefs, self.params, list(families), list(counts), *pairs, [need_x, need_y]
        by_x, by_y = _ops.mmd_small_backward.default(grad[None], x[None], y[None], weights, length, *problem)
        return by_x[0] if need_x else None, by_y[0] if need_y else None


def _find_way(x: Tensor, y: Tensor, kernel: Kernel, like: tuple) -> _Way | large.Way | None:
    estimator, n, m = like[:3]
    if n > MOST_ROWS or m > MOST_ROWS:
        return large.find(x, y, kernel, like)
    if min(n, m) < 2 or estimator not in _ESTIMATORS or (estimator == "one_sample_u" and n != m):
        return None
    terms = fixed_terms(kernel, x, y)
    if terms is None or not takes([x[None]], [y[None]], terms):
        return None
    return _Way(like, terms.params, terms.families, terms.rule)


class _Matrices(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, way):
        value, room = way.compute(x, y)
        ctx.save_for_backward(x, y, room)
        ctx.way = way
        ctx.set_materialize_grads(False)
        return value

    @staticmethod
    def backward(ctx, grad):
        if grad is None:
            return None, None, None
        differentiate = ctx.way.differentiate if _is_alone(grad) else ctx.way.differentiate_twice
        return *differentiate(grad, *ctx.saved_tensors, *ctx.needs_input_grad[:2]), None


torch.library.register_autograd("mmfast::mmd_small", _differentiate, setup_context=_save)
torch.library.register_autograd("mmfast::mmd_small_backward", _differentiate_twice, setup_context=_save_backward)
