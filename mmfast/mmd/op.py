"""Operators ``mmfast::mmd_*``: the primitives of `mmfast.mmd.reference` by the native kernels, or by Triton on the GPU.

Each primitive is a forward and a backward operator. Layers of features are columns of one tensor, whose widths are
``dims``; without ``y`` the pairs are those of x, each point's with itself left out. Second derivatives are those of the
reference. ``precision`` is a name of `mmfast.mmd.precision`, behind ``triton:`` where Triton's kernels are asked for,
which are interpreted for CPU tensors.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import torch
from torch import Tensor

from mmfast import _backend
from mmfast.mmd import _precision, _vmap, cuda, reference
from mmfast.mmd.reference import aligned, compute_dtype, diagonal, matrix
from mmfast.mmd.terms import Terms

__all__ = ["aligned", "diagonal", "matmul", "matrix", "pair", "permutations", "quadratic", "select", "sums", "triton"]

_KERNEL = "Tensor params, int[] dims, int[] families, int[] layers"
_KERNEL_Y = "Tensor params_y, int[] dims_y, int[] families_y, int[] layers_y"
_PRECISION = "str precision='float32'"
_SCHEMAS = {
    "quadratic": f"(Tensor x, Tensor y, Tensor? wx, Tensor? wy, Tensor coefs, {_KERNEL}, bool[] need, {_PRECISION})"
    " -> (Tensor value, Tensor sums, Tensor unit_x, Tensor unit_y, Tensor unit_wx, Tensor unit_wy, Tensor unit_params)",
    "quadratic_backward": f"(Tensor grad, Tensor x, Tensor y, Tensor? wx, Tensor? wy, Tensor coefs, {_KERNEL},"
    " bool[] need, Tensor unit_x, Tensor unit_y, Tensor unit_wx, Tensor unit_wy, Tensor unit_params)"
    " -> (Tensor grad_x, Tensor grad_y, Tensor grad_wx, Tensor grad_wy, Tensor grad_params)",
    "sums": f"(Tensor x, Tensor? y, {_KERNEL}, {_PRECISION}) -> (Tensor rows, Tensor cols, Tensor squares)",
    "sums_backward": f"(Tensor grad_rows, Tensor grad_cols, Tensor grad_squares, Tensor x, Tensor? y, {_KERNEL},"
    f" bool[] need, {_PRECISION}) -> (Tensor grad_x, Tensor grad_y, Tensor grad_params)",
    "matmul": f"(Tensor x, Tensor? y, Tensor v, {_KERNEL}, {_PRECISION}) -> Tensor",
    "matmul_backward": f"(Tensor grad, Tensor x, Tensor? y, Tensor v, {_KERNEL}, bool[] need, {_PRECISION})"
    " -> (Tensor grad_v, Tensor grad_x, Tensor grad_y, Tensor grad_params)",
    "pair": f"(Tensor x, {_KERNEL}, Tensor y, {_KERNEL_Y}, {_PRECISION})"
    " -> (Tensor rows_x, Tensor rows_y, Tensor products)",
    "pair_backward": "(Tensor grad_rows_x, Tensor grad_rows_y, Tensor grad_products,"
    f" Tensor x, {_KERNEL}, Tensor y, {_KERNEL_Y}, bool[] need, {_PRECISION})"
    " -> (Tensor grad_x, Tensor grad_params, Tensor grad_y, Tensor grad_params_y)",
    "permutations": f"(Tensor z, {_KERNEL}, Tensor members) -> (Tensor inside, Tensor rows)",
    "select": "(Tensor x, Tensor? y, Tensor ranks, bool skip_diagonal, bool lower_triangle)"
    " -> (Tensor values, Tensor pairs)",
}
for _name, _schema in _SCHEMAS.items():
    torch.library.define(f"mmfast::mmd_{_name}", _schema)
_ops = torch.ops.mmfast


# ---- The primitives


def _joined(layers: Sequence[Tensor]) -> Tensor:
    return layers[0] if len(layers) == 1 else torch.cat(tuple(layers), 2)


def _kernel(x: Sequence[Tensor], terms: Terms) -> tuple:
    return terms.params, [t.shape[2] for t in x], terms.families, terms.layers


def _fits(*kernels: Terms) -> bool:
    """False where the reference serves: beyond 8 layers of 64 terms each."""
    return all(
        max(t.layers, default=0) < 8 and all(t.layers.count(layer) <= 64 for layer in set(t.layers)) for t in kernels
    )


_TRITON = "triton:"  # before the precision: Triton's kernels, which on CPU tensors are interpreted


def quadratic(x, y, wx, wy, coefs: Tensor, terms: Terms, by: str = "") -> tuple[Tensor, Tensor]:
    """`reference.quadratic`; the gradients are computed along with the value where one will be asked for."""
    if not _fits(terms) or torch._C._get_tracing_state() is not None:  # `torch.jit.trace` records no list of bool
        return reference.quadratic(x, y, wx, wy, coefs, terms)
    kernel, name = _kernel(x, terms), by + _precision.current()
    x, y = _joined(x), _joined(y)
    # Gradients of x, y, wx, wy, params; the sums that coefs leave out.
    need = [_backend.is_tracked(t) for t in (x, y, wx, wy, terms.params, coefs)]
    if any(need) and _is_plain(x, y, wx, wy):
        return _Quadratic.apply(x, y, wx, wy, coefs, *kernel, need, name)
    if any(need) or torch.compiler.is_compiling():
        return _ops.mmd_quadratic.default(x, y, wx, wy, coefs, *kernel, need, name)[:2]
    with torch._C._AutoDispatchBelowAutograd():  # its look through the arguments takes as long as a small batch
        return _ops.mmd_quadratic.default(x, y, wx, wy, coefs, *kernel, need, name)[:2]


def _is_plain(*tensors: Tensor | None) -> bool:
    """True where nothing but autograd looks on: no compilation, no function transform, no mode, and plain tensors."""
    return (
        not torch.compiler.is_compiling()
        and _backend.nobody_looks_on()
        and all(t is None or _backend.is_plain(t) for t in tensors)
    )


def sums(x, y, terms: Terms, by: str = "") -> tuple[Tensor, Tensor, Tensor]:
    if not _fits(terms):
        return reference.sums(x, y, terms)
    name = by + _precision.current()
    return _ops.mmd_sums.default(_joined(x), None if y is None else _joined(y), *_kernel(x, terms), name)


def matmul(x, y, v: Tensor, terms: Terms, skip_diagonal: bool = False, by: str = "") -> Tensor:
    if not _fits(terms):
        return reference.matmul(x, y, v, terms, skip_diagonal)
    name = by + _precision.current()
    return _ops.mmd_matmul.default(_joined(x), None if skip_diagonal else _joined(y), v, *_kernel(x, terms), name)


def pair(x, terms_x: Terms, y, terms_y: Terms, by: str = "") -> tuple[Tensor, Tensor, Tensor]:
    if not _fits(terms_x, terms_y):
        return reference.pair(x, terms_x, y, terms_y)
    name = by + _precision.current()
    return _ops.mmd_pair.default(_joined(x), *_kernel(x, terms_x), _joined(y), *_kernel(y, terms_y), name)


@torch.no_grad()
def permutations(z, terms: Terms, members: Tensor, by: str = "") -> tuple[Tensor, Tensor]:
    if not _fits(terms):
        return reference.permutations(z, terms, members)
    if by:
        return _triton().permutations(_joined(z), _kernel(z, terms), members, _precision.current())
    return _ops.mmd_permutations.default(_joined(z), *_kernel(z, terms), members)


@torch.no_grad()
def select(x, y, ranks: Tensor, skip_diagonal: bool, lower_triangle: bool, by: str = "") -> tuple[Tensor, Tensor]:
    if y is not None and (lower_triangle or skip_diagonal):
        return reference.select(x, y, ranks, skip_diagonal, lower_triangle)  # rare: two samples, but matched
    if by:
        return _select(x, y, ranks, skip_diagonal, lower_triangle, _find_triton)
    return _ops.mmd_select.default(x, y, ranks, skip_diagonal, lower_triangle)


def _select(x, y, ranks, skip_diagonal, lower_triangle, find) -> tuple[Tensor, Tensor]:
    """`reference.select`; the pairs of one sample are looked at once, i < j, and the others follow from these."""
    if y is not None:
        pairs = find(x, y, ranks.tolist())
    else:
        # The diagonal comes before all others, or among those at distance 0.
        zeros, each = 0 if skip_diagonal else x.shape[0], 1 if lower_triangle else 2
        places = [(rank - zeros) // each for rank in ranks.tolist()]
        asked = sorted({p for p in places if p >= 0})
        between = find(x, None, asked) if asked else None
        pairs = [
            between[asked.index(p)] if p >= 0 else torch.full((2,), rank, dtype=torch.int64, device=x.device)
            for p, rank in zip(places, ranks.tolist(), strict=True)
        ]
        pairs = torch.stack(pairs) if pairs else torch.empty(0, 2, dtype=torch.int64, device=x.device)
    # Chosen by what the kernels see, which is rounded once more than the points.
    other = x if y is None else y
    return (x[pairs[:, 0]].double() - other[pairs[:, 1]].double()).square().sum(1), pairs


def _find_cpu(x: Tensor, y: Tensor | None, places: list[int]) -> Tensor:
    if y is not None:
        return _backend._C.mmd_select(x[None], y[None], places)[1]
    return _backend._C.mmd_select(x[None], None, places)[1].flip(1)


def _find_triton(x: Tensor, y: Tensor | None, places: list[int]) -> Tensor:
    return _triton().select(x, y, places)


def _triton():
    from mmfast.mmd import triton  # where it is asked for: it may not be installed

    return triton


# The primitives of the backend "triton".
triton = SimpleNamespace(
    aligned=aligned,
    diagonal=diagonal,
    matrix=matrix,
    **{f.__name__: functools.partial(f, by=_TRITON) for f in (quadratic, sums, matmul, pair, permutations, select)},
)


# ---- Implementations


def _native(params: Tensor, dims: Sequence[int], families: Sequence[int], layers: Sequence[int]):
    return _backend._C.MmdTerms(dims, families, layers, params)


def _named(args: tuple) -> tuple[tuple, str]:
    """The arguments and the name of the precision, which the dispatcher leaves away where it is the default."""
    return (args[:-1], args[-1]) if isinstance(args[-1], str) else (args, "float32")


def _by_triton(function: Callable) -> Callable:
    """An operator on CPU tensors, which Triton computes where the name of the precision says so."""
    of_triton = function.__name__.removeprefix("_").removesuffix("_cpu")
    of_triton = of_triton if of_triton.endswith("_backward") else f"{of_triton}_forward"

    @functools.wraps(function)
    def chosen(*args):
        args, name = _named(args)
        if name.startswith(_TRITON):
            return getattr(_triton(), of_triton)(*args, name.removeprefix(_TRITON))
        return function(*args)

    return chosen


def _on_cuda(of_triton: str) -> Callable:
    def compute(*args):
        args, name = _named(args)
        if of_triton == "quadratic_forward" and not name.startswith(_TRITON) and cuda.fits(*args):
            return cuda.quadratic_forward(*args)
        return getattr(_triton(), of_triton)(*args, name.removeprefix(_TRITON))

    return compute


@_by_triton
def _quadratic_cpu(x, y, wx, wy, coefs, params, dims, families, layers, need):
    sums, *units = _backend._C.mmd_quadratic(x, y, wx, wy, coefs, _native(params, dims, families, layers), need)
    return torch.mv(sums, coefs.detach()), sums, *units


def _quadratic_backward(
    grad, x, y, wx, wy, coefs, params, dims, families, layers, need, unit_x, unit_y, unit_wx, unit_wy, unit_params
):
    """The gradients of the value of each item of the batch, which were computed along with it, times its gradient."""

    factors = {}

    def scaled(unit, like):
        if not unit.numel():
            return unit.new_empty(unit.shape)  # a result of an operator is not one of its arguments
        key = unit.dtype, unit.dim()
        if key not in factors:
            factors[key] = grad.to(unit.dtype).view(-1, *[1] * (unit.dim() - 1))
        return (unit * factors[key]).to(like.dtype)

    by_params = scaled(unit_params, params)
    by_params = by_params.sum(0) if need[4] else by_params
    return scaled(unit_x, x), scaled(unit_y, y), scaled(unit_wx, wx), scaled(unit_wy, wy), by_params


def _of_batch(x, y, by_x, by_y, by_params) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients in the dtypes of what they belong to; those of the parameters come one for each item of the batch."""
    by_params = by_params.sum(0) if by_params.dim() == 3 else by_params
    return by_x.to(x.dtype), by_y if y is None else by_y.to(y.dtype), by_params


@_by_triton
def _sums_cpu(x, y, *kernel):
    return _backend._C.mmd_sums(x, y, _native(*kernel))


@_by_triton
def _sums_backward_cpu(rows, cols, squares, x, y, params, dims, families, layers, need):
    terms = _native(params, dims, families, layers)
    return _of_batch(x, y, *_backend._C.mmd_sums_backward(rows, cols, squares, x, y, terms, need))


@_by_triton
def _matmul_cpu(x, y, v, *kernel):
    return _backend._C.mmd_matmul(x, y, v, _native(*kernel))


@_by_triton
def _matmul_backward_cpu(grad, x, y, v, params, dims, families, layers, need):
    terms = _native(params, dims, families, layers)
    by_v, *others = _backend._C.mmd_matmul_backward(grad, x, y, v, terms, need)
    return by_v.to(v.dtype), *_of_batch(x, y, *others)


@_by_triton
def _pair_cpu(x, params, dims, families, layers, y, *kernel_y):
    return _backend._C.mmd_pair(x, _native(params, dims, families, layers), y, _native(*kernel_y))


@_by_triton
def _pair_backward_cpu(
    rows_x, rows_y, products, x, params, dims, families, layers, y, params_y, dims_y, families_y, layers_y, need
):
    by_x, by_params, by_y, by_params_y = _backend._C.mmd_pair_backward(
        rows_x,
        rows_y,
        products,
        x,
        _native(params, dims, families, layers),
        y,
        _native(params_y, dims_y, families_y, layers_y),
        need,
    )
    by_x, _, by_params = _of_batch(x, None, by_x, None, by_params)
    by_y, _, by_params_y = _of_batch(y, None, by_y, None, by_params_y)
    return by_x, by_params, by_y, by_params_y


def _permutations_cpu(z, params, dims, families, layers, members):
    return _backend._C.mmd_permutations(z, _native(params, dims, families, layers), members)


def _permutations_cuda(z, params, dims, families, layers, members):
    return _triton().permutations(z, (params, dims, families, layers), members, _precision.current())


for _name, _function in (
    ("quadratic", _quadratic_cpu),
    ("sums", _sums_cpu),
    ("sums_backward", _sums_backward_cpu),
    ("matmul", _matmul_cpu),
    ("matmul_backward", _matmul_backward_cpu),
    ("pair", _pair_cpu),
    ("pair_backward", _pair_backward_cpu),
):
    torch.library.impl(f"mmfast::mmd_{_name}", "cpu", _function)
    _of_triton = _name if _name.endswith("_backward") else f"{_name}_forward"
    torch.library.impl(f"mmfast::mmd_{_name}", "cuda", _on_cuda(_of_triton))
torch.library.impl("mmfast::mmd_quadratic_backward", ("cpu", "cuda"), _quadratic_backward)
torch.library.impl("mmfast::mmd_permutations", "cpu", _permutations_cpu)
torch.library.impl("mmfast::mmd_permutations", "cuda", _permutations_cuda)
torch.library.impl("mmfast::mmd_select", "cpu", functools.partial(_select, find=_find_cpu))
torch.library.impl("mmfast::mmd_select", "cuda", functools.partial(_select, find=_find_triton))


# ---- Shapes


def _double(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.float64)


def _like(t: Tensor | None, wanted: bool, other: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """As the kernels return a gradient: contiguous, and empty if it is not wanted."""
    if t is None or not wanted:
        return other.new_empty((0,), dtype=dtype or other.dtype)
    return t.new_empty(t.shape, dtype=dtype or t.dtype)


@torch.library.register_fake("mmfast::mmd_quadratic")
def _(x, y, wx, wy, coefs, params, dims, families, layers, need, name="float32"):
    batch, dtype, double = x.shape[0], compute_dtype(x.dtype), torch.float64
    return (
        _double(x, batch),
        _double(x, batch, 3),
        _like(x, need[0], x, dtype),
        _like(y, need[1], x, dtype),
        _like(wx, need[2], x, double),
        _like(wy, need[3], x, double),
        _double(params, batch, *params.shape) if need[4] else _double(params, 0),
    )


@torch.library.register_fake("mmfast::mmd_quadratic_backward")
def _(grad, x, y, wx, wy, coefs, params, dims, families, layers, need, unit_x, unit_y, unit_wx, unit_wy, unit_params):
    inputs, units = (x, y, wx, wy, params), (unit_x, unit_y, unit_wx, unit_wy, unit_params)
    return tuple(_like(t, n, u) for t, u, n in zip(inputs, units, need[:5], strict=True))


@torch.library.register_fake("mmfast::mmd_sums")
def _(x, y, params, dims, families, layers, name="float32"):
    batch, n = x.shape[:2]
    return _double(x, batch, n), _double(x, batch, 0 if y is None else y.shape[1]), _double(x, batch)


def _of_batch_fake(x, y, params, need) -> tuple[Tensor, Tensor, Tensor]:
    by_y = _like(y, need[1], x, None if y is None else y.dtype)
    return (
        _like(x, need[0], x),
        by_y if y is not None else _like(None, False, x, compute_dtype(x.dtype)),
        _like(params, need[2], params),
    )


@torch.library.register_fake("mmfast::mmd_sums_backward")
def _(rows, cols, squares, x, y, params, dims, families, layers, need, name="float32"):
    return _of_batch_fake(x, y, params, need)


@torch.library.register_fake("mmfast::mmd_matmul")
def _(x, y, v, params, dims, families, layers, name="float32"):
    return x.new_empty((*x.shape[:2], v.shape[2]), dtype=compute_dtype(x.dtype))


@torch.library.register_fake("mmfast::mmd_matmul_backward")
def _(grad, x, y, v, params, dims, families, layers, need, name="float32"):
    return v.new_empty(v.shape), *_of_batch_fake(x, y, params, need)


@torch.library.register_fake("mmfast::mmd_pair")
def _(x, params, dims, families, layers, y, params_y, dims_y, families_y, layers_y, name="float32"):
    batch, n = x.shape[:2]
    return _double(x, batch, n), _double(x, batch, n), _double(x, batch, 3)


@torch.library.register_fake("mmfast::mmd_pair_backward")
def _(
    rows_x, rows_y, products, x, params, dims, families, layers, y, params_y, dims_y, families_y, layers_y, need,
    name="float32",
):  # fmt: skip
    return (
        _like(x, need[0], x),
        _like(params, need[2], params),
        _like(y, need[1], y),
        _like(params_y, need[3], params_y),
    )


@torch.library.register_fake("mmfast::mmd_permutations")
def _(z, params, dims, families, layers, members):
    return _double(z, members.shape[0]), _double(z, z.shape[1])


@torch.library.register_fake("mmfast::mmd_select")
def _(x, y, ranks, skip_diagonal, lower_triangle):
    return _double(x, ranks.shape[0]), x.new_empty((ranks.shape[0], 2), dtype=torch.int64)


# ---- Gradients


def _second(forward: Callable, upstream: Sequence, inputs: Sequence, wanted: Sequence[bool], grads: Sequence):
    """Derivatives of a backward operator by ``upstream`` and by ``inputs``, through the reference.

    ``forward(*inputs)`` is the primitive; ``wanted`` says which inputs the operator gave a gradient for, and ``grads``
    are the gradients of these, in the order of the inputs.
    """

    def tracked(t):
        if t is None:
            return None
        # An alias, so that differentiation stops here and not where the caller's graph began.
        return t.view_as(t) if t.requires_grad else t.detach().requires_grad_()

    onward = torch.is_grad_enabled()
    with torch.enable_grad():
        upstream, inputs = [tracked(t) for t in upstream], [tracked(t) for t in inputs]
        out = forward(*inputs)
        out = out if isinstance(out, tuple) else (out,)
        used = [(o, u) for o, u in zip(out, upstream, strict=True) if u is not None and o.requires_grad]
        sources = [t for t, w in zip(inputs, wanted, strict=True) if w]
        first = torch.autograd.grad(
            [o for o, _ in used], sources, [u for _, u in used], create_graph=True, allow_unused=True
        )
        pairs = [
            (f, g) for f, g in zip(first, grads, strict=True) if f is not None and g is not None and f.requires_grad
        ]
        everything = [t for t in (*upstream, *inputs) if t is not None]
        second = [None] * len(everything)
        if pairs:
            second = torch.autograd.grad(
                [f for f, _ in pairs], everything, [g for _, g in pairs], allow_unused=True, create_graph=onward
            )
    found = iter(second)
    return [None if t is None else next(found) for t in upstream], [None if t is None else next(found) for t in inputs]


def _layers(x: Tensor | None, dims: Sequence[int]) -> list[Tensor] | None:
    if x is None:
        return None
    return [x] if len(dims) == 1 else list(x.split(list(dims), 2))


def _terms(params: Tensor, dims, families, layers) -> Terms:
    return Terms(tuple(families), tuple(layers), params)


def _kept(results: Sequence[Tensor], need: Sequence[bool]) -> list[Tensor | None]:
    return [r if n else None for r, n in zip(results, need, strict=True)]


def _full(grads, like) -> list[Tensor]:
    """Zeros in place of the gradients of results that nothing depends on."""
    return [
        torch.zeros(s, dtype=torch.float64, device=d) if g is None else g for g, (s, d) in zip(grads, like, strict=True)
    ]


def _save_quadratic(ctx, inputs, output):
    *tensors, params, ctx.dims, ctx.families, ctx.layers, ctx.need, ctx.name = inputs
    ctx.save_for_backward(*tensors, params, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _differentiate_quadratic(ctx, grad, *_):
    if grad is None:
        return (None,) * 11
    x, y, wx, wy, coefs, params, sums, *units = ctx.saved_tensors
    kernel = params, ctx.dims, ctx.families, ctx.layers
    backward = _ops.mmd_quadratic_backward.default
    if not torch.is_grad_enabled() and _is_plain(x, y, grad):
        backward = _quadratic_backward
    by = backward(grad, x, y, wx, wy, coefs, *kernel, ctx.need, *units)
    *by, by_params = _kept(by, ctx.need[:5])
    by_coefs = None
    if coefs.requires_grad and torch.is_grad_enabled():  # a second derivative may follow: the sums depend on the points
        need, units = ctx.need, torch.eye(3, dtype=torch.float64, device=x.device)
        values = [_ops.mmd_quadratic.default(x, y, wx, wy, unit, *kernel, need, ctx.name)[0] for unit in units]
        by_coefs = torch.stack([(v * grad).sum() for v in values])
    elif coefs.requires_grad:
        by_coefs = (grad[:, None] * sums).sum(0)
    return *by, by_coefs, by_params, *(None,) * 5


class _Quadratic(torch.autograd.Function):
    """``mmfast::mmd_quadratic`` without the dispatcher, which takes longer than a small batch, where it has no say."""

    @staticmethod
    def forward(ctx, *inputs):
        output = _quadratic_cpu(*inputs)
        *tensors, params, ctx.dims, ctx.families, ctx.layers, ctx.need, ctx.name = inputs
        ctx.save_for_backward(*tensors, params, *output[1:])
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        return output[0], output[1]

    @staticmethod
    def backward(ctx, *grads):
        return _differentiate_quadratic(ctx, *grads)


def _save_quadratic_backward(ctx, inputs, output):
    grad, *tensors, params, ctx.dims, ctx.families, ctx.layers, ctx.need = inputs[:11]
    ctx.save_for_backward(grad, *tensors, params)
    ctx.set_materialize_grads(False)


def _differentiate_quadratic_twice(ctx, *grads):
    grad, *inputs = ctx.saved_tensors

    def forward(x, y, wx, wy, coefs, params):
        terms = _terms(params, ctx.dims, ctx.families, ctx.layers)
        return reference.quadratic(_layers(x, ctx.dims), _layers(y, ctx.dims), wx, wy, coefs, terms)[0]

    need = ctx.need
    wanted = [*need[:4], False, need[4]]
    (by_grad,), by = _second(forward, [grad], inputs, wanted, [g for g, n in zip(grads, need[:5], strict=True) if n])
    return by_grad, *by, *(None,) * 9


def _save_sums(ctx, inputs, output):
    x, y, params, ctx.dims, ctx.families, ctx.layers, ctx.name = inputs
    ctx.like = [(o.shape, o.device) for o in output]
    ctx.save_for_backward(x, y, params)
    ctx.set_materialize_grads(False)


def _differentiate_sums(ctx, *grads):
    x, y, params = ctx.saved_tensors
    need = [ctx.needs_input_grad[i] for i in range(3)]
    kernel = params, ctx.dims, ctx.families, ctx.layers
    by = _ops.mmd_sums_backward.default(*_full(grads, ctx.like), x, y, *kernel, need, ctx.name)
    return *_kept(by, need), *(None,) * 4


def _save_sums_backward(ctx, inputs, output):
    *tensors, ctx.dims, ctx.families, ctx.layers, ctx.need, _ = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _differentiate_sums_twice(ctx, *grads):
    *upstream, x, y, params = ctx.saved_tensors

    def forward(x, y, params):
        terms = _terms(params, ctx.dims, ctx.families, ctx.layers)
        return reference.sums(_layers(x, ctx.dims), _layers(y, ctx.dims), terms)

    grads = [g for g, n in zip(grads, ctx.need, strict=True) if n]
    by_upstream, by = _second(forward, upstream, [x, y, params], ctx.need, grads)
    return *by_upstream, *by, *(None,) * 5


def _save_matmul(ctx, inputs, output):
    x, y, v, params, ctx.dims, ctx.families, ctx.layers, ctx.name = inputs
    ctx.save_for_backward(x, y, v, params)
    ctx.set_materialize_grads(False)


def _differentiate_matmul(ctx, grad):
    if grad is None:
        return (None,) * 8
    x, y, v, params = ctx.saved_tensors
    need = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
    kernel = params, ctx.dims, ctx.families, ctx.layers
    by_v, *by = _ops.mmd_matmul_backward.default(grad, x, y, v, *kernel, need, ctx.name)
    by_x, by_y, by_params = _kept(by, need)
    return by_x, by_y, by_v if ctx.needs_input_grad[2] else None, by_params, *(None,) * 4


def _save_matmul_backward(ctx, inputs, output):
    *tensors, ctx.dims, ctx.families, ctx.layers, ctx.need, _ = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _differentiate_matmul_twice(ctx, *grads):
    grad, x, y, v, params = ctx.saved_tensors

    def forward(v, x, y, params):
        terms = _terms(params, ctx.dims, ctx.families, ctx.layers)
        return reference.matmul(_layers(x, ctx.dims), _layers(x if y is None else y, ctx.dims), v, terms, y is None)

    need = [True, *ctx.need]
    grads = [g for g, n in zip(grads, need, strict=True) if n]
    (by_grad,), (by_v, by_x, by_y, by_params) = _second(forward, [grad], [v, x, y, params], need, grads)
    return by_grad, by_x, by_y, by_v, by_params, *(None,) * 5


def _save_pair(ctx, inputs, output):
    x, params, *ctx.kernel, y, params_y, dims_y, families_y, layers_y, ctx.name = inputs
    ctx.kernel_y = dims_y, families_y, layers_y
    ctx.like = [(o.shape, o.device) for o in output]
    ctx.save_for_backward(x, params, y, params_y)
    ctx.set_materialize_grads(False)


def _differentiate_pair(ctx, *grads):
    x, params, y, params_y = ctx.saved_tensors
    need = [ctx.needs_input_grad[i] for i in (0, 5, 1, 6)]  # x, y, params, params_y
    by_x, by_params, by_y, by_params_y = _ops.mmd_pair_backward.default(
        *_full(grads, ctx.like), x, params, *ctx.kernel, y, params_y, *ctx.kernel_y, need, ctx.name
    )
    by_x, by_y, by_params, by_params_y = _kept((by_x, by_y, by_params, by_params_y), need)
    return by_x, by_params, None, None, None, by_y, by_params_y, *(None,) * 4


def _save_pair_backward(ctx, inputs, output):
    rows_x, rows_y, products, x, params, *ctx.kernel = inputs[:8]
    y, params_y, *ctx.kernel_y, ctx.need, _ = inputs[8:]
    ctx.save_for_backward(rows_x, rows_y, products, x, params, y, params_y)
    ctx.set_materialize_grads(False)


def _differentiate_pair_twice(ctx, *grads):
    *upstream, x, params, y, params_y = ctx.saved_tensors

    def forward(x, params, y, params_y):
        terms, terms_y = _terms(params, *ctx.kernel), _terms(params_y, *ctx.kernel_y)
        return reference.pair(_layers(x, ctx.kernel[0]), terms, _layers(y, ctx.kernel_y[0]), terms_y)

    wanted = [ctx.need[i] for i in (0, 2, 1, 3)]
    grads = [g for g, n in zip(grads, wanted, strict=True) if n]
    by_upstream, (by_x, by_params, by_y, by_params_y) = _second(
        forward, upstream, [x, params, y, params_y], wanted, grads
    )
    return *by_upstream, by_x, by_params, None, None, None, by_y, by_params_y, *(None,) * 5


for _name, _backward, _save in (
    ("quadratic", _differentiate_quadratic, _save_quadratic),
    ("quadratic_backward", _differentiate_quadratic_twice, _save_quadratic_backward),
    ("sums", _differentiate_sums, _save_sums),
    ("sums_backward", _differentiate_sums_twice, _save_sums_backward),
    ("matmul", _differentiate_matmul, _save_matmul),
    ("matmul_backward", _differentiate_matmul_twice, _save_matmul_backward),
    ("pair", _differentiate_pair, _save_pair),
    ("pair_backward", _differentiate_pair_twice, _save_pair_backward),
):
    torch.library.register_autograd(f"mmfast::mmd_{_name}", _backward, setup_context=_save)

for _name in _SCHEMAS:
    _vmap.register(_name)
