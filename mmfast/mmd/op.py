"""Operators ``mmfast::mmd_*``: the primitives of `mmfast.mmd.reference` by the native kernels.

Each primitive is a forward and a backward operator. A kernel is ``families``, ``layers`` and ``params``, as in `Terms`.
Second derivatives are those of the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mmfast import _backend
from mmfast.mmd import reference
from mmfast.mmd.reference import aligned, compute_dtype, diagonal, matrix
from mmfast.mmd.terms import Terms

__all__ = ["aligned", "diagonal", "matmul", "matrix", "pair", "permutations", "quadratic", "select", "sums"]

_KERNEL = "Tensor params, int[] families, int[] layers"
_define = torch.library.define
_define(
    "mmfast::mmd_quadratic",
    f"(Tensor[] x, Tensor[] y, Tensor? wx, Tensor? wy, Tensor coefs, {_KERNEL}, bool[] need)"
    " -> (Tensor value, Tensor sums, Tensor[] gradients)",
)
_define(
    "mmfast::mmd_quadratic_backward",
    f"(Tensor grad, Tensor[] x, Tensor[] y, Tensor? wx, Tensor? wy, Tensor coefs, {_KERNEL}, bool[] need,"
    " Tensor[] gradients) -> Tensor[]",
)
_define(
    "mmfast::mmd_sums",
    f"(Tensor[] x, Tensor[] y, {_KERNEL}, bool symmetric) -> (Tensor rows, Tensor cols, Tensor squares)",
)
_define(
    "mmfast::mmd_sums_backward",
    "(Tensor grad_rows, Tensor grad_cols, Tensor grad_squares, Tensor[] x, Tensor[] y, "
    f"{_KERNEL}, bool symmetric, bool[] need) -> Tensor[]",
)
_define("mmfast::mmd_matmul", f"(Tensor[] x, Tensor[] y, Tensor v, {_KERNEL}, bool symmetric) -> Tensor")
_define(
    "mmfast::mmd_matmul_backward",
    f"(Tensor grad, Tensor[] x, Tensor[] y, Tensor v, {_KERNEL}, bool symmetric, bool[] need) -> Tensor[]",
)
_define(
    "mmfast::mmd_pair",
    "(Tensor[] x, Tensor params_x, int[] families_x, int[] layers_x,"
    " Tensor[] y, Tensor params_y, int[] families_y, int[] layers_y)"
    " -> (Tensor rows_x, Tensor rows_y, Tensor products)",
)
_define(
    "mmfast::mmd_pair_backward",
    "(Tensor grad_x, Tensor grad_y, Tensor grad_products, Tensor[] x, Tensor params_x, int[] families_x,"
    " int[] layers_x, Tensor[] y, Tensor params_y, int[] families_y, int[] layers_y, bool[] need) -> Tensor[]",
)
_ops = torch.ops.mmfast


# ---- The primitives


def _wants(*tensors: Tensor | None) -> bool:
    return any(t is not None and t.requires_grad for t in tensors)


def quadratic(x, y, wx, wy, coefs: Tensor, terms: Terms) -> tuple[Tensor, Tensor]:
    """`reference.quadratic`; the gradients are computed along with the value where one will be asked for."""
    need = [False] * 5
    if torch.is_grad_enabled():
        need = [_wants(*x), _wants(*y), _wants(wx), _wants(wy), _wants(terms.params)]
        if any(need) or coefs.requires_grad:
            out = _ops.mmd_quadratic(x, y, wx, wy, coefs, terms.params, terms.families, terms.layers, need)
            return out[0], out[1]
    return _ops.mmd_quadratic(x, y, wx, wy, coefs, terms.params, terms.families, terms.layers, need)[:2]


def sums(x, y, terms: Terms) -> tuple[Tensor, Tensor, Tensor]:
    return _ops.mmd_sums(x, [] if y is None else y, terms.params, terms.families, terms.layers, y is None)


def matmul(x, y, v: Tensor, terms: Terms, skip_diagonal: bool = False) -> Tensor:
    y = [] if skip_diagonal else y
    return _ops.mmd_matmul(x, y, v, terms.params, terms.families, terms.layers, skip_diagonal)


def pair(x, terms_x: Terms, y, terms_y: Terms) -> tuple[Tensor, Tensor, Tensor]:
    return _ops.mmd_pair(
        x, terms_x.params, terms_x.families, terms_x.layers, y, terms_y.params, terms_y.families, terms_y.layers
    )


@torch.no_grad()
def permutations(z, terms: Terms, members: Tensor) -> tuple[Tensor, Tensor]:
    return _backend._C.mmd_permutations(z, _native(terms.params, terms.families, terms.layers), members)


@torch.no_grad()
def select(x, y, ranks: Tensor, skip_diagonal: bool, lower_triangle: bool) -> tuple[Tensor, Tensor]:
    """`reference.select`; pairs of one sample are looked at once, i < j, and what is known of the others is put back."""
    if y is not None:
        if lower_triangle or skip_diagonal:
            return reference.select(x, y, ranks, skip_diagonal, lower_triangle)  # rare: x and y apart, but matched
        values, pairs = _backend._C.mmd_select(x[None], y[None], ranks.tolist())
        return values.double(), pairs
    zeros = 0 if skip_diagonal else x.shape[0]  # the diagonal: before all others, or among those at distance 0
    each = 1 if lower_triangle else 2
    places = [(rank - zeros) // each for rank in ranks.tolist()]
    asked = sorted({p for p in places if p >= 0})
    values, pairs = _backend._C.mmd_select(x[None], None, asked) if asked else (x.new_empty(0), ranks.new_empty(0, 2))
    found = {p: i for i, p in enumerate(asked)}
    value = torch.tensor([values[found[p]].item() if p >= 0 else 0.0 for p in places], dtype=torch.float64)
    index = [
        pairs[found[p]].flip(0).tolist() if p >= 0 else [rank] * 2
        for p, rank in zip(places, ranks.tolist(), strict=True)
    ]
    return value, torch.tensor(index, dtype=torch.int64).reshape(-1, 2)


# ---- Implementations


def _native(params: Tensor, families: Sequence[int], layers: Sequence[int]):
    return _backend._C.MmdTerms(families, layers, params)


def _quadratic_cpu(x, y, wx, wy, coefs, params, families, layers, need):
    sums, gradients = _backend._C.mmd_quadratic(x, y, wx, wy, coefs, _native(params, families, layers), need)
    return (sums * coefs).sum(1), sums, gradients


def _quadratic_backward_cpu(grad, x, y, wx, wy, coefs, params, families, layers, need, gradients):
    """What was computed along with the value, times its gradient: for the inputs that ``need`` names, in its order."""
    inputs = _needed(x, y, wx, wy, params, need)
    if grad.numel() == 1:
        scaled = [g * grad.to(g.dtype) for g in gradients]
    else:
        scaled = [g * grad.to(g.dtype).view(-1, *[1] * (g.dim() - 1)) for g in gradients]
    if need[4]:
        scaled[-1] = scaled[-1].sum(0)
    return [g.to(t.dtype) for g, t in zip(scaled, inputs, strict=True)]


def _needed(x, y, wx, wy, params, need) -> list[Tensor]:
    kept = [*(x if need[0] else ()), *(y if need[1] else ())]
    return kept + [t for t, n in zip((wx, wy, params), need[2:], strict=True) if n]


def _sums_cpu(x, y, params, families, layers, symmetric):
    return _backend._C.mmd_sums(x, y, _native(params, families, layers), symmetric)


def _sums_backward_cpu(rows, cols, squares, x, y, params, families, layers, symmetric, need):
    terms = _native(params, families, layers)
    return _like(_backend._C.mmd_sums_backward(rows, cols, squares, x, y, terms, symmetric, need), x, y, params, need)


def _like(gradients, x, y, params, need) -> list[Tensor]:
    """Gradients in the dtypes of what they belong to; those of the parameters come one for each item of the batch."""
    inputs = [*(x if need[0] else ()), *(y if need[1] else ())]
    result = [g.to(t.dtype) for g, t in zip(gradients, inputs, strict=False)]
    if need[2]:
        result.append(gradients[-1].sum(0))
    return result


def _matmul_cpu(x, y, v, params, families, layers, symmetric):
    return _backend._C.mmd_matmul(x, y, v, _native(params, families, layers), symmetric)


def _matmul_backward_cpu(grad, x, y, v, params, families, layers, symmetric, need):
    terms = _native(params, families, layers)
    grad_v, *others = _backend._C.mmd_matmul_backward(grad, x, y, v, terms, symmetric, need)
    return [grad_v.to(v.dtype), *_like(others, x, y, params, need)]


def _pair_cpu(x, params_x, families_x, layers_x, y, params_y, families_y, layers_y):
    return _backend._C.mmd_pair(
        x, _native(params_x, families_x, layers_x), y, _native(params_y, families_y, layers_y)
    )


def _pair_backward_cpu(
    grad_x, grad_y, grad_products, x, params_x, families_x, layers_x, y, params_y, families_y, layers_y, need
):
    of_x, of_y = _backend._C.mmd_pair_backward(
        grad_x,
        grad_y,
        grad_products,
        x,
        _native(params_x, families_x, layers_x),
        y,
        _native(params_y, families_y, layers_y),
        need,
    )
    return [
        *_like(of_x, x, (), params_x, (need[0], False, need[2])),
        *_like(of_y, y, (), params_y, (need[1], False, need[3])),
    ]


for _name, _function in (
    ("quadratic", _quadratic_cpu),
    ("quadratic_backward", _quadratic_backward_cpu),
    ("sums", _sums_cpu),
    ("sums_backward", _sums_backward_cpu),
    ("matmul", _matmul_cpu),
    ("matmul_backward", _matmul_backward_cpu),
    ("pair", _pair_cpu),
    ("pair_backward", _pair_backward_cpu),
):
    torch.library.impl(f"mmfast::mmd_{_name}", "cpu", _function)


# ---- Shapes


def _empty(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.float64)


@torch.library.register_fake("mmfast::mmd_quadratic")
def _(x, y, wx, wy, coefs, params, families, layers, need):
    batch = x[0].shape[0]
    gradients = [t.new_empty(t.shape, dtype=compute_dtype(t.dtype)) for t in _needed(x, y, None, None, None, need[:2])]
    gradients += [_empty(w, *w.shape) for w, n in ((wx, need[2]), (wy, need[3])) if n]
    if need[4]:
        gradients.append(_empty(params, batch, *params.shape))
    return _empty(x[0], batch), _empty(x[0], batch, 3), gradients


@torch.library.register_fake("mmfast::mmd_quadratic_backward")
def _(grad, x, y, wx, wy, coefs, params, families, layers, need, gradients):
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in _needed(x, y, wx, wy, params, need)]


@torch.library.register_fake("mmfast::mmd_sums")
def _(x, y, params, families, layers, symmetric):
    batch, n = x[0].shape[:2]
    return _empty(x[0], batch, n), _empty(x[0], batch, 0 if symmetric else y[0].shape[1]), _empty(x[0], batch)


@torch.library.register_fake("mmfast::mmd_sums_backward")
def _(rows, cols, squares, x, y, params, families, layers, symmetric, need):
    return _like_fake(x, y, params, need)


def _like_fake(x, y, params, need) -> list[Tensor]:
    inputs = [*(x if need[0] else ()), *(y if need[1] else ()), *((params,) if need[2] else ())]
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in inputs]


@torch.library.register_fake("mmfast::mmd_matmul")
def _(x, y, v, params, families, layers, symmetric):
    return x[0].new_empty((*x[0].shape[:2], v.shape[2]), dtype=compute_dtype(x[0].dtype))


@torch.library.register_fake("mmfast::mmd_matmul_backward")
def _(grad, x, y, v, params, families, layers, symmetric, need):
    return [torch.empty_like(v, memory_format=torch.contiguous_format), *_like_fake(x, y, params, need)]


@torch.library.register_fake("mmfast::mmd_pair")
def _(x, params_x, families_x, layers_x, y, params_y, families_y, layers_y):
    batch, n = x[0].shape[:2]
    return _empty(x[0], batch, n), _empty(x[0], batch, n), _empty(x[0], batch, 3)


@torch.library.register_fake("mmfast::mmd_pair_backward")
def _(grad_x, grad_y, grad_products, x, params_x, families_x, layers_x, y, params_y, families_y, layers_y, need):
    return [
        *_like_fake(x, (), params_x, (need[0], False, need[2])),
        *_like_fake(y, (), params_y, (need[1], False, need[3])),
    ]


# ---- Gradients


def _second(ctx, forward: Callable, upstream: Sequence[Tensor], inputs: Sequence, wanted: Sequence[bool], grads):
    """Derivatives of a backward operator by ``upstream`` and ``inputs``, through the reference.

    ``forward(*inputs)`` is the primitive on these inputs (tensors, lists of tensors, None), ``wanted`` says which of
    them have a gradient among the operator's results, in order, and ``grads`` are the gradients of those results.
    """

    def tracked(t):
        if t is None:
            return None
        if isinstance(t, (list, tuple)):
            return [tracked(i) for i in t]
        # An alias, so that differentiation stops here and not where the caller's graph began.
        return t.view_as(t) if t.requires_grad else t.detach().requires_grad_(t.is_floating_point())

    def flat(values):
        return [i for v in values for i in (v if isinstance(v, (list, tuple)) else [v])]

    onward = torch.is_grad_enabled()
    with torch.enable_grad():
        upstream, inputs = tracked(list(upstream)), tracked(list(inputs))
        out = forward(*inputs)
        out = out if isinstance(out, tuple) else (out,)
        used = [(o, u) for o, u in zip(out, upstream, strict=True) if u is not None and o.requires_grad]
        sources = flat([i for i, w in zip(inputs, wanted, strict=True) if w])
        first = torch.autograd.grad(
            [o for o, _ in used], sources, [u for _, u in used], create_graph=True, allow_unused=True
        )
        pairs = [(f, g) for f, g in zip(first, grads, strict=True) if f is not None and g is not None and f.requires_grad]
        everything = [t for t in flat([*upstream, *inputs]) if t is not None]
        second = [None] * len(everything)
        if pairs:
            second = torch.autograd.grad(
                [f for f, _ in pairs], everything, [g for _, g in pairs], allow_unused=True, create_graph=onward
            )
    found = iter(second)

    def put(t):
        if t is None:
            return None
        return [put(i) for i in t] if isinstance(t, list) else next(found)

    return [put(t) for t in upstream], [put(t) for t in inputs]


def _split(results: list[Tensor], *groups: tuple[Sequence | Tensor | None, bool]) -> list:
    """The results of a backward operator as the inputs they belong to: a list for a list, None where none is wanted."""
    found, out = iter(results), []
    for group, wanted in groups:
        if isinstance(group, (list, tuple)):
            out.append([next(found) for _ in group] if wanted else [None] * len(group))
        else:
            out.append(next(found) if wanted else None)
    return out


def _save_quadratic(ctx, inputs, output):
    x, y, wx, wy, coefs, params, ctx.families, ctx.layers, ctx.need = inputs
    _, sums, gradients = output
    ctx.counts = len(x), len(y)
    ctx.save_for_backward(*x, *y, wx, wy, coefs, params, sums, *gradients)
    ctx.mark_non_differentiable(sums, *gradients)
    ctx.set_materialize_grads(False)


def _saved(ctx):
    nx, ny = ctx.counts
    t = ctx.saved_tensors
    return list(t[:nx]), list(t[nx : nx + ny]), *t[nx + ny :]


def _differentiate_quadratic(ctx, grad, _sums, _gradients):
    x, y, wx, wy, coefs, params, sums, *gradients = _saved(ctx)
    need = ctx.need
    if grad is None:
        return [None] * len(x), [None] * len(y), *[None] * 7
    results = _ops.mmd_quadratic_backward(
        grad, x, y, wx, wy, coefs, params, ctx.families, ctx.layers, need, gradients
    )
    by = _split(results, (x, need[0]), (y, need[1]), (wx, need[2]), (wy, need[3]), (params, need[4]))
    by_coefs = None
    if coefs.requires_grad:
        if torch.is_grad_enabled():  # a second derivative may follow: the sums depend on the points
            by_coefs = _differentiable_sums(x, y, wx, wy, params, ctx.families, ctx.layers, grad)
        else:
            by_coefs = (grad[:, None] * sums).sum(0).to(coefs.dtype)
    return *by[:4], by_coefs, by[4], None, None, None


def _differentiable_sums(x, y, wx, wy, params, families, layers, grad):
    units = torch.eye(3, dtype=torch.float64)
    terms = Terms(tuple(families), tuple(layers), params)
    return torch.stack([(quadratic(x, y, wx, wy, unit, terms)[0] * grad).sum() for unit in units])


torch.library.register_autograd("mmfast::mmd_quadratic", _differentiate_quadratic, setup_context=_save_quadratic)


def _save_quadratic_backward(ctx, inputs, output):
    grad, x, y, wx, wy, coefs, params, ctx.families, ctx.layers, ctx.need, gradients = inputs
    ctx.counts = len(x), len(y)
    ctx.unused = len(gradients)
    ctx.save_for_backward(*x, *y, wx, wy, coefs, params, grad)
    ctx.set_materialize_grads(False)


def _differentiate_quadratic_twice(ctx, grads):
    x, y, wx, wy, coefs, params, grad = _saved(ctx)
    need = ctx.need

    def forward(x, y, wx, wy, coefs, params):
        return reference.quadratic(x, y, wx, wy, coefs, Terms(tuple(ctx.families), tuple(ctx.layers), params))[0]

    wanted = [need[0], need[1], need[2], need[3], False, need[4]]
    (by_grad,), by = _second(ctx, forward, [grad], [x, y, wx, wy, coefs, params], wanted, grads)
    return by_grad, *by, None, None, None, [None] * ctx.unused


torch.library.register_autograd(
    "mmfast::mmd_quadratic_backward", _differentiate_quadratic_twice, setup_context=_save_quadratic_backward
)


def _save_sums(ctx, inputs, output):
    x, y, params, ctx.families, ctx.layers, ctx.symmetric = inputs
    ctx.counts = len(x), len(y)
    ctx.shapes = [(o.shape, o.device) for o in output]
    ctx.save_for_backward(*x, *y, params)
    ctx.set_materialize_grads(False)


def _full(grads, shapes) -> list[Tensor]:
    return [
        torch.zeros(shape, dtype=torch.float64, device=device) if g is None else g
        for g, (shape, device) in zip(grads, shapes, strict=True)
    ]


def _differentiate_sums(ctx, *grads):
    x, y, params = _saved(ctx)
    need = [_wants(*x), _wants(*y), params.requires_grad]
    results = _ops.mmd_sums_backward(
        *_full(grads, ctx.shapes), x, y, params, ctx.families, ctx.layers, ctx.symmetric, need
    )
    return *_split(results, (x, need[0]), (y, need[1]), (params, need[2])), None, None, None


torch.library.register_autograd("mmfast::mmd_sums", _differentiate_sums, setup_context=_save_sums)


def _save_sums_backward(ctx, inputs, output):
    rows, cols, squares, x, y, params, ctx.families, ctx.layers, ctx.symmetric, ctx.need = inputs
    ctx.counts = len(x), len(y)
    ctx.save_for_backward(*x, *y, params, rows, cols, squares)
    ctx.set_materialize_grads(False)


def _differentiate_sums_twice(ctx, grads):
    x, y, params, *upstream = _saved(ctx)

    def forward(x, y, params):
        return reference.sums(
            x, None if ctx.symmetric else y, Terms(tuple(ctx.families), tuple(ctx.layers), params)
        )

    by_upstream, by = _second(ctx, forward, upstream, [x, y, params], ctx.need, grads)
    return *by_upstream, *by, None, None, None, None


torch.library.register_autograd(
    "mmfast::mmd_sums_backward", _differentiate_sums_twice, setup_context=_save_sums_backward
)


def _save_matmul(ctx, inputs, output):
    x, y, v, params, ctx.families, ctx.layers, ctx.symmetric = inputs
    ctx.counts = len(x), len(y)
    ctx.save_for_backward(*x, *y, v, params)
    ctx.set_materialize_grads(False)


def _differentiate_matmul(ctx, grad):
    x, y, v, params = _saved(ctx)
    if grad is None:
        return [None] * len(x), [None] * len(y), *[None] * 5
    need = [_wants(*x), _wants(*y), params.requires_grad]
    by_v, *results = _ops.mmd_matmul_backward(
        grad, x, y, v, params, ctx.families, ctx.layers, ctx.symmetric, need
    )
    by_x, by_y, by_params = _split(results, (x, need[0]), (y, need[1]), (params, need[2]))
    return by_x, by_y, by_v if v.requires_grad else None, by_params, None, None, None


torch.library.register_autograd("mmfast::mmd_matmul", _differentiate_matmul, setup_context=_save_matmul)


def _save_matmul_backward(ctx, inputs, output):
    grad, x, y, v, params, ctx.families, ctx.layers, ctx.symmetric, ctx.need = inputs
    ctx.counts = len(x), len(y)
    ctx.save_for_backward(*x, *y, v, params, grad)
    ctx.set_materialize_grads(False)


def _differentiate_matmul_twice(ctx, grads):
    x, y, v, params, grad = _saved(ctx)

    def forward(v, x, y, params):
        terms = Terms(tuple(ctx.families), tuple(ctx.layers), params)
        return reference.matmul(x, x if ctx.symmetric else y, v, terms, ctx.symmetric)

    (by_grad,), (by_v, by_x, by_y, by_params) = _second(
        ctx, forward, [grad], [v, x, y, params], [True, *ctx.need], grads
    )
    return by_grad, by_x, by_y, by_v, by_params, None, None, None, None


torch.library.register_autograd(
    "mmfast::mmd_matmul_backward", _differentiate_matmul_twice, setup_context=_save_matmul_backward
)


def _save_pair(ctx, inputs, output):
    x, params_x, *ctx.kernel_x, y, params_y, ctx.families_y, ctx.layers_y = inputs
    ctx.counts = len(x), len(y)
    ctx.shapes = [(o.shape, o.device) for o in output]
    ctx.save_for_backward(*x, *y, params_x, params_y)
    ctx.set_materialize_grads(False)


def _differentiate_pair(ctx, *grads):
    x, y, params_x, params_y = _saved(ctx)
    need = [_wants(*x), _wants(*y), params_x.requires_grad, params_y.requires_grad]
    results = _ops.mmd_pair_backward(
        *_full(grads, ctx.shapes), x, params_x, *ctx.kernel_x, y, params_y, ctx.families_y, ctx.layers_y, need
    )
    by_x, by_params_x, by_y, by_params_y = _split(
        results, (x, need[0]), (params_x, need[2]), (y, need[1]), (params_y, need[3])
    )
    return by_x, by_params_x, None, None, by_y, by_params_y, None, None


torch.library.register_autograd("mmfast::mmd_pair", _differentiate_pair, setup_context=_save_pair)


def _save_pair_backward(ctx, inputs, output):
    rows_x, rows_y, products, x, params_x, *ctx.kernel_x, y, params_y, families_y, layers_y, ctx.need = inputs
    ctx.kernel_y = families_y, layers_y
    ctx.counts = len(x), len(y)
    ctx.save_for_backward(*x, *y, params_x, params_y, rows_x, rows_y, products)
    ctx.set_materialize_grads(False)


def _differentiate_pair_twice(ctx, grads):
    x, y, params_x, params_y, *upstream = _saved(ctx)

    def forward(x, params_x, y, params_y):
        terms_x, terms_y = (
            Terms(*map(tuple, kernel), params) for kernel, params in ((ctx.kernel_x, params_x), (ctx.kernel_y, params_y))
        )
        return reference.pair(x, terms_x, y, terms_y)

    need = ctx.need
    by_upstream, by = _second(
        ctx, forward, upstream, [x, params_x, y, params_y], [need[0], need[2], need[1], need[3]], grads
    )
    return *by_upstream, by[0], by[1], None, None, by[2], by[3], None, None, None


torch.library.register_autograd(
    "mmfast::mmd_pair_backward", _differentiate_pair_twice, setup_context=_save_pair_backward
)
