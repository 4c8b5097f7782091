"""The operators ``mmfast::mmd_*`` by Triton: on CUDA tensors, and on the CPU in Triton's interpreter.

A sweep over tiles gives sums; gradients and products keep the tiles of a panel of rows, no more than the points take,
and multiply them with the points. Quadratic forms of one kernel have faster ways: see `_route`. Nothing here looks at
what the device has computed, and each sum has its order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from mmfast._launch import launch_as_given
from mmfast.mmd import triton_gram, triton_narrow_launch, triton_sweep
from mmfast.mmd.triton_launch import NEAR, Panel, Problem, Upstream, add_gradients, add_product, sweep
from mmfast.mmd.triton_points import (
    BY_DIFFERENCES,
    BY_DOT,
    FEW,
    INTERPRETED,
    NEAR_EXACT,
    Format,
    Points,
    Scales,
    allocate,
    fill,
    format_of,
    layout,
    padded,
    scales_of,
    sizes_for,
    triton_type,
)


def _problem(x: Tensor, y: Tensor | None, kernel: Sequence, precision: str, pooled: bool = False) -> Problem:
    """Pairs of x with y; without ``y``, or of both samples ``pooled``, each pair of points once."""
    params, dims, families, layers = kernel
    plan = layout((dims, families, layers))
    kind = format_of([x.dtype], precision)
    sizes = sizes_for(x, max(dims, default=1), kind)
    samples = [x] if y is None else [x, y]
    scales = scales_of(samples, plan.dims, plan.how, kind, sizes)
    b, n = x.shape[:2]
    first = allocate(b, n, y.shape[1] if pooled else 0, plan.dims, plan.how, kind, sizes, x.device)
    fill(first, x, 0, scales, plan.dims, kind, sizes)
    second = first
    if pooled:
        fill(first, y, first.second, scales, plan.dims, kind, sizes)
    elif y is not None:
        second = allocate(b, y.shape[1], 0, plan.dims, plan.how, kind, sizes, x.device)
        fill(second, y, 0, scales, plan.dims, kind, sizes)
    ordered = _ordered(params, plan.order)
    return Problem(plan, ordered, kind, sizes, scales, first, second, second is first, kind)


def _ordered(params: Tensor, order: tuple[int, ...]) -> Tensor:
    params = params.detach().double()
    if order != tuple(range(len(order))):
        params = torch.stack([params[t] for t in order])
    return params.contiguous()


def _params_of(found: Tensor | None, problem: Problem, b: int) -> Tensor:
    """(b, T, 4), in the order they were given in."""
    order = problem.layout.order
    if found is None:
        return torch.zeros(b, len(order), 4, dtype=torch.float64, device=problem.x.hi.device)
    found = found[:, : 4 * len(order)].reshape(b, len(order), 4)
    if order != tuple(range(len(order))):
        found = torch.stack([found[:, order.index(t)] for t in range(len(order))], 1)
    return found.contiguous()


def _added(total: Tensor | None, more: Tensor) -> Tensor:
    return more if total is None else total + more


def _padded(values: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    out = torch.zeros(values.shape[0], rows, dtype=dtype, device=values.device)
    out[:, : values.shape[1]] = values
    return out


def _zeros(problem: Problem, points: Points) -> Tensor:
    shape = problem.items, points.rows, sum(problem.layout.dims)
    return torch.zeros(shape, dtype=problem.kind.compute, device=points.hi.device)


def _nothing(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(0, dtype=dtype or like.dtype, device=like.device)


def _apart(part: Tensor) -> Tensor:
    """A copy: no two results of an operator may share memory."""
    return part.clone(memory_format=torch.contiguous_format)


# ---- Quadratic forms


def quadratic_forward(x, y, wx, wy, coefs, params, dims, families, layers, need, precision="float32"):
    b, n, m = x.shape[0], x.shape[1], y.shape[1]
    coefs = coefs.detach().to(x.device, torch.float64).contiguous()
    double = torch.float64
    plain = wx is None and wy is None and not need[4] and b * n * m > 0
    plan = layout((dims, families, layers))
    kind = format_of([x.dtype], precision)
    ways = None
    if plain and triton_narrow_launch.takes(plan, kind):
        ways = triton_narrow_launch
    elif plain and triton_gram.takes(plan, kind, n + m, need[0] or need[1]) and not triton_gram.is_refused(kind.type):
        ways = triton_gram
    if ways is not None:
        given = params.detach().to(x.device, double).contiguous()
        found = ways.quadratic(x, y, coefs, given, families, precision, need, need[5])
        return *found, _nothing(x, double), _nothing(x, double), _nothing(params, double)
    problem = _problem(x, y, (params, dims, families, layers), precision, pooled=True)
    z, block = problem.x, problem.sizes.block
    weights = None
    if wx is not None or wy is not None:
        both = torch.zeros(b, z.rows, dtype=problem.kind.compute, device=x.device)
        both[:, :n] = 1 if wx is None else wx
        both[:, z.second : z.second + m] = 1 if wy is None else wy
        weights = both, both

    def of(found: Tensor | None, first: int, count: int, wanted: bool, dtype: torch.dtype) -> Tensor:
        if not wanted:
            return _nothing(x, dtype)
        part = found[:, first : first + count]
        return _apart(part) if first else part.contiguous()  # of one item the first is a view of both

    upstream = Upstream("quadratic", coefs=coefs, all_sums=need[5])
    grad = _zeros(problem, z) if need[0] or need[1] else None
    by_weights = torch.zeros(b, z.rows, dtype=torch.float64, device=x.device) if need[2] or need[3] else None
    by_params, sums = None, torch.zeros(3, b, dtype=torch.float64, device=x.device)
    split = z.second // block
    panels = sweep(
        problem, upstream, totals=True, sums=by_weights is not None, cols=by_weights is not None,
        keep="none" if grad is None else "gradient", params=need[4], weights=weights,
    )  # fmt: skip
    for panel in panels:
        of_x = max(0, min(split - panel.first, panel.tiles))
        found, strips = panel.totals[..., 0], panel.first_strips
        sums[0] += 2 * found[:, :of_x, :strips].sum((1, 2))
        sums[1] += 2 * found[:, of_x:, strips:].sum((1, 2))
        sums[2] += found[:, of_x:, :strips].sum((1, 2))
        if grad is not None:
            add_gradients(problem, panel, grad, None)
        if by_weights is not None:
            _add_sums(by_weights, by_weights, panel, block, 0)
        if need[4]:
            by_params = _added(by_params, panel.params.sum((1, 2)))
    sums = sums.t().contiguous()
    compute = problem.kind.compute
    return (
        torch.mv(sums, coefs),
        sums,
        of(grad, 0, n, need[0], compute),
        of(grad, z.second, m, need[1], compute),
        of(by_weights, 0, n, need[2], double),
        of(by_weights, z.second, m, need[3], double),
        _params_of(by_params, problem, b) if need[4] else _nothing(params, double),
    )


def _add_sums(rows: Tensor, cols: Tensor, panel: Panel, block: int, kernel: int) -> None:
    """Adds a panel's sums of rows and of columns to (b, rows) float64."""
    b = rows.shape[0]
    found = panel.rows[kernel].sum(2).view(b, panel.tiles * block)
    rows[:, panel.first * block : (panel.first + panel.tiles) * block] += found
    cols += panel.cols[kernel].sum(1, dtype=torch.float64)


# ---- Sums


def sums_forward(x, y, params, dims, families, layers, precision="float32"):
    problem = _problem(x, y, (params, dims, families, layers), precision)
    return tuple(t.contiguous() for t in _sums(problem, x.shape[1], 0 if y is None else y.shape[1]))


def _sums(problem: Problem, n: int, m: int) -> tuple[Tensor, Tensor, Tensor]:
    b, device = problem.items, problem.x.hi.device
    rows = torch.zeros(b, problem.x.rows, dtype=torch.float64, device=device)
    cols = rows if problem.symmetric else torch.zeros(b, problem.y.rows, dtype=torch.float64, device=device)
    squares = torch.zeros(b, dtype=torch.float64, device=device)
    for panel in sweep(problem, Upstream(), totals=True, sums=True, cols=True):
        _add_sums(rows, cols, panel, problem.sizes.block, 0)
        squares += panel.totals[..., 1].sum((1, 2)) * (2 if problem.symmetric else 1)
    return rows[:, :n], cols[:, : 0 if problem.symmetric else m], squares


def _gradients(problem: Problem, upstream: Upstream, need) -> tuple[Tensor | None, ...]:
    """Gradients of x, y and the parameters, rows padded; ``need`` says which."""
    grad_x = _zeros(problem, problem.x) if need[0] else None
    grad_y = _zeros(problem, problem.y) if need[1] and not problem.symmetric else None
    keep = "none" if grad_x is None and grad_y is None else "gradient"
    by_params = None
    if keep != "none" or need[2]:
        for panel in sweep(problem, upstream, keep=keep, params=need[2]):
            if keep != "none":
                add_gradients(problem, panel, grad_x, grad_y)
            if need[2]:
                by_params = _added(by_params, panel.params.sum((1, 2)))
    return grad_x, grad_y, _params_of(by_params, problem, problem.items).sum(0) if need[2] else None


def _results(x: Tensor, y: Tensor | None, params: Tensor, found, compute: torch.dtype) -> tuple[Tensor, ...]:
    """As the operators return them: in the dtypes of their inputs, empty where not wanted."""
    by_x, by_y, by_params = found

    def of(grad: Tensor | None, t: Tensor) -> Tensor:
        return _nothing(x, t.dtype) if grad is None else grad[:, : t.shape[1]].to(t.dtype).contiguous()

    return (
        of(by_x, x),
        _nothing(x, compute) if y is None else of(by_y, y),
        _nothing(params) if by_params is None else by_params.to(params.dtype),
    )


def sums_backward(rows, cols, squares, x, y, params, dims, families, layers, need, precision="float32"):
    problem = _problem(x, y, (params, dims, families, layers), precision)
    compute = problem.kind.compute
    by_rows = _padded(rows, problem.x.rows, compute)
    by_cols = by_rows if y is None else _padded(cols, problem.y.rows, compute)
    upstream = Upstream("sums", rows=by_rows, cols=by_cols, products=squares.double().contiguous())
    return _results(x, y, params, _gradients(problem, upstream, need), compute)


# ---- Products


def _for_values(problem: Problem) -> Format:
    """What K and the vectors it is multiplied with are kept in: never in bfloat16 because the points are."""
    if problem.kind.raw:
        return Format(torch.float16, 2, 2, torch.float32, scaled=True)
    return problem.kind


def _vectors(v: Tensor, rows: int, problem: Problem) -> tuple[Points, Scales]:
    kept, width = problem.kept, v.shape[2]
    scales = scales_of([v], (width,), (BY_DOT,), kept, problem.sizes)
    points = allocate(v.shape[0], v.shape[1], 0, (width,), (BY_DOT,), kept, problem.sizes, v.device)
    assert points.rows == rows
    fill(points, v, 0, scales, (width,), kept, problem.sizes)
    return points, scales


def matmul_forward(x, y, v, params, dims, families, layers, precision="float32"):
    problem = _problem(x, y, (params, dims, families, layers), precision)
    problem.kept = _for_values(problem)
    compute, width = problem.kind.compute, v.shape[2]
    out = torch.zeros(x.shape[0], problem.x.rows, width, dtype=compute, device=x.device)
    if out.numel():
        vectors, scales = _vectors(v, problem.y.rows, problem)
        for panel in sweep(problem, Upstream(), keep="kernel"):
            add_product(problem, panel, 0, vectors, 0, width, scales.inverses, out, 0)
            if problem.symmetric:
                add_product(problem, panel, 0, vectors, 0, width, scales.inverses, out, 0, transposed=True)
    return out[:, : x.shape[1]].contiguous()


def matmul_backward(grad, x, y, v, params, dims, families, layers, need, precision="float32"):
    problem = _problem(x, y, (params, dims, families, layers), precision)
    problem.kept = _for_values(problem)
    compute, width = problem.kind.compute, v.shape[2]
    by_v = torch.zeros(v.shape[0], problem.y.rows, width, dtype=compute, device=x.device)
    found = _no_gradients(problem, need)
    if width and x.numel() and by_v.numel():
        u, of_u = _vectors(grad, problem.x.rows, problem)
        for panel in sweep(problem, Upstream(), keep="kernel"):
            add_product(problem, panel, 0, u, 0, width, of_u.inverses, by_v, 0, transposed=True)
            if problem.symmetric:
                add_product(problem, panel, 0, u, 0, width, of_u.inverses, by_v, 0)
        if any(need):
            vectors, of_v = _vectors(v, problem.y.rows, problem)
            factor = (of_u.inverses * of_v.inverses).reshape(-1)
            upstream = Upstream("matmul", u=u, v=vectors, factor=factor, parts=problem.kept.parts)
            problem.kept = problem.kind
            found = _gradients(problem, upstream, need)
    return by_v[:, : v.shape[1]].to(v.dtype).contiguous(), *_results(x, y, params, found, compute)


def _no_gradients(problem: Problem, need) -> tuple[Tensor | None, ...]:
    return (
        _zeros(problem, problem.x) if need[0] else None,
        _zeros(problem, problem.y) if need[1] and not problem.symmetric else None,
        torch.zeros_like(problem.params) if need[2] else None,
    )


# ---- Pairs of kernels


def _pair_problem(x, kernel_x, y, kernel_y, precision) -> Problem:
    params, *of_x = kernel_x
    params_y, *of_y = kernel_y
    plan = layout(tuple(of_x), tuple(of_y))
    kind = format_of([x.dtype, y.dtype], precision)
    sizes = sizes_for(x, max(plan.dims, default=1), kind)
    count = plan.second
    points = allocate(x.shape[0], x.shape[1], 0, plan.dims, plan.how, kind, sizes, x.device)
    parts = []
    for t, layers, column in ((x, slice(0, count), 0), (y, slice(count, None), sum(plan.dims[:count]))):
        dims, how = plan.dims[layers], plan.how[layers]
        scales = scales_of([t], dims, how, kind, sizes)
        fill(points, t, 0, scales, dims, kind, sizes, (layers.start, column))
        parts.append(scales)
    joined = Scales(
        *(torch.cat([getattr(p, f) for p in parts], 1) for f in ("mean", "scales", "inverses", "factors")), ()
    )
    both = _ordered(torch.cat((params.detach().double(), params_y.detach().double().to(params.device))), plan.order)
    return Problem(plan, both, kind, sizes, joined, points, points, True, kind)


def pair_forward(x, params, dims, families, layers, y, params_y, dims_y, families_y, layers_y, precision="float32"):
    kernels = (params, dims, families, layers), (params_y, dims_y, families_y, layers_y)
    problem = _pair_problem(x, kernels[0], y, kernels[1], precision)
    n = x.shape[1]
    rows = torch.zeros(2, x.shape[0], problem.x.rows, dtype=torch.float64, device=x.device)
    products = torch.zeros(x.shape[0], 3, dtype=torch.float64, device=x.device)
    for panel in sweep(problem, Upstream(), totals=True, sums=True, cols=True):
        for kernel in range(2):
            _add_sums(rows[kernel], rows[kernel], panel, problem.sizes.block, kernel)
        products += 2 * panel.totals.sum((1, 2))
    return rows[0, :, :n].contiguous(), _apart(rows[1, :, :n]), products


def pair_backward(
    rows_x, rows_y, products, x, params, dims, families, layers, y, params_y, dims_y, families_y, layers_y, need,
    precision="float32",
):  # fmt: skip
    kernels = (params, dims, families, layers), (params_y, dims_y, families_y, layers_y)
    problem = _pair_problem(x, kernels[0], y, kernels[1], precision)
    compute, n = problem.kind.compute, x.shape[1]
    upstream = Upstream(
        "pair",
        rows=_padded(rows_x, problem.x.rows, compute),
        cols=_padded(rows_y, problem.x.rows, compute),
        products=products.double().contiguous(),
    )
    wanted = need[0] or need[1], False, need[2] or need[3]
    grad, _, by_params = _gradients(problem, upstream, wanted)
    first, terms = sum(dims), len(families)

    def of(wanted: bool, columns: slice, t: Tensor) -> Tensor:
        return grad[:, :n, columns].to(t.dtype).contiguous() if wanted else _nothing(t)

    return (
        of(need[0], slice(0, first), x),
        by_params[:terms].to(params.dtype).contiguous() if need[2] else _nothing(params),
        of(need[1], slice(first, None), y),
        by_params[terms:].to(params_y.dtype).contiguous() if need[3] else _nothing(params_y),
    )


# ---- Permutations

_GROUPS = 1024  # groups at a time
_MEMBERS = 2**29  # bytes up to which all groups are kept as numbers


def permutations(z: Tensor, kernel: Sequence, members: Tensor, precision: str = "float32") -> tuple[Tensor, Tensor]:
    """`mmfast.mmd.reference.permutations`: the lower triangle of K times members, of which only column sums stay."""
    problem = _problem(z, None, kernel, precision)
    problem.kept = _for_values(problem)
    kept, block, n = problem.kept, problem.sizes.block, z.shape[1]
    rows = torch.zeros(1, problem.x.rows, dtype=torch.float64, device=z.device)
    inside = torch.zeros(members.shape[0], dtype=torch.float64, device=z.device)
    one = torch.ones(1, 1, dtype=kept.compute, device=z.device)

    def numbers(groups: Tensor) -> Points:
        count = padded(groups.shape[0], 16)  # so that a row begins where 16 bytes do
        vectors = torch.zeros(1, problem.x.rows, count, dtype=kept.type, device=z.device)
        vectors[0, :n, : groups.shape[0]] = groups.t()
        return Points(vectors, vectors, one, one, problem.x.rows, count, n, problem.x.rows, 0, (count,))

    starts = range(0, members.shape[0], _GROUPS)
    few = members.shape[0] * problem.x.rows * kept.type.itemsize <= _MEMBERS
    all_numbers = [numbers(members[start : start + _GROUPS]) for start in starts] if few else None
    for panel in sweep(problem, Upstream(), keep="kernel", sums=True, cols=True):
        _add_sums(rows, rows, panel, block, 0)
        first = panel.first * block
        last = min(n, first + panel.tiles * block)
        for part, start in enumerate(starts):
            groups = members[start : start + _GROUPS]
            points = numbers(groups) if all_numbers is None else all_numbers[part]
            out = torch.zeros(1, panel.tiles * block, points.width, dtype=kept.compute, device=z.device)
            add_product(problem, panel, 0, points, 0, points.width, one, out, 0, local=True, parts=1)
            chosen = out[0, : last - first, : groups.shape[0]] * groups[:, first:last].t()
            inside[start : start + _GROUPS] += 2 * chosen.sum(0, dtype=torch.float64)
    return inside, rows[0, :n].contiguous()


# ---- Order statistics

_DIGIT = 11  # bits that a sweep counts


def select(x: Tensor, y: Tensor | None, places: Sequence[int]) -> Tensor:
    """Pairs (R, 2) with the squared distances at ``places`` among those of all pairs of x and y, or of x with i > j.

    A radix selection on the bits of the distances: each sweep counts the next 11 of those that agree so far, a last one
    finds the pair. Whole numbers are counted, so that the order of programs does not matter.
    """
    dims = (x.shape[1],)
    x = x[None]
    y = None if y is None else y[None]
    kind = format_of([x.dtype], "float32")
    sizes = sizes_for(x, dims[0], kind)
    how = (BY_DIFFERENCES if dims[0] <= FEW else NEAR_EXACT,)
    samples = [x] if y is None else [x, y]
    scales = scales_of(samples, dims, how, kind, sizes)
    points = []
    for sample in samples:
        points.append(allocate(1, sample.shape[1], 0, dims, how, kind, sizes, x.device))
        fill(points[-1], sample, 0, scales, dims, kind, sizes)
    a, b = points[0], points[-1]
    ranks, col_tiles = len(places), b.rows // sizes.block
    strips = triton.cdiv(col_tiles, sizes.strip)
    double = kind.compute == torch.float64
    bits, bins = 64 if double else 32, 2**_DIGIT
    prefixes = torch.zeros(ranks, dtype=torch.int64 if double else torch.int32, device=x.device)
    left = torch.stack([torch.full((), place, dtype=torch.int64, device=x.device) for place in places])
    found = torch.full((ranks,), torch.iinfo(torch.int64).max, dtype=torch.int64, device=x.device)

    def look(counts: Tensor, shift: int, digit: int, find: bool) -> None:
        launch_as_given(
            triton_sweep.count_digits, (a.rows // sizes.block * strips,),
            (
                a.hi, a.lo, a.norms, a.cols, b.hi, b.lo, b.norms, b.cols, scales.factors, prefixes, counts, found,
                a.rows, b.rows, a.width, a.n, b.n, col_tiles, strips, shift, digit, ranks,
            ),
            dict(
                DIMS=dims, WIDTHS=a.widths, HOW=how, SYMMETRIC=y is None, FIND=find, BINS=bins, STRIP=sizes.strip,
                NEAR=NEAR, SPLIT=kind.parts, BLOCK=sizes.block, STEP=sizes.step, UPCAST=INTERPRETED,
                INT=triton.language.int64 if double else triton.language.int32, ACC=triton_type(kind.compute),
                num_warps=sizes.warps, num_stages=sizes.stages,
            ),
        )  # fmt: skip

    shift = bits
    while shift:
        digit = min(_DIGIT, shift)
        shift -= digit
        counts = torch.zeros(ranks, bins, dtype=torch.int64, device=x.device)
        look(counts, shift, digit, False)
        below = counts.cumsum(1)
        chosen = (below <= left[:, None]).sum(1, keepdim=True).clamp(max=bins - 1)
        left = left - (below - counts).gather(1, chosen)[:, 0]
        prefixes = (prefixes << digit) | chosen[:, 0].to(prefixes.dtype)
    look(found, 0, 0, True)
    pairs = torch.stack((found // b.rows, found % b.rows), 1)
    return pairs
