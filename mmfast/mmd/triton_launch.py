"""Drives the Triton kernels: panels of rows of the kernel matrix, reduced or kept and multiplied, in a fixed order."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from mmfast._launch import launch_as_given
from mmfast.mmd import triton_multiply, triton_sweep
from mmfast.mmd.triton_points import (
    BY_DOT,
    BY_L1,
    INTERPRETED,
    Format,
    Layout,
    Points,
    Scales,
    triton_type,
)
from mmfast.mmd.triton_tuning import Sizes

NEAR = 2.0**-8  # squared distances below this share of the squared norms are summed again, difference by difference
_PANEL, _POINTS_SHARE = 2**28, 4  # bytes of kept tiles at a time: at least, and for each feature
_PROGRAMS = 8  # of a sweep on each multiprocessor, at least, where its tiles are so many


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors; an H100's for what is no GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def shares_of(programs: int, most: int, device: torch.device) -> int:
    """Into how many shares to divide the work of ``programs``, of which one is at work on a multiprocessor.

    The fewest rounds for the size of a share; what a share leaves to be added up counts for a hundredth of the work.
    """
    many = processors(device)
    return min(range(1, max(1, min(most, 32)) + 1), key=lambda s: (-(-programs * s // many) / s + 0.01 * s, s))


@dataclass
class Problem:
    """Pairs of prepared points: x with y, or with ``symmetric`` those of x, each once."""

    layout: Layout
    params: Tensor
    kind: Format
    sizes: Sizes
    scales: Scales
    x: Points
    y: Points
    symmetric: bool
    kept: Format

    @property
    def items(self) -> int:
        return self.x.norms.shape[0]


@dataclass
class Upstream:
    """What the derivative by a pair's kernel is made of; see `triton_sweep.sweep`."""

    mode: str = "none"
    coefs: Tensor | None = None
    rows: Tensor | None = None
    cols: Tensor | None = None
    products: Tensor | None = None
    u: Points | None = None
    v: Points | None = None
    factor: Tensor | None = None
    parts: int = 1
    all_sums: bool = True


@dataclass
class Panel:
    """Some rows of tiles, what a sweep has found there, and the kept tiles."""

    first: int
    tiles: int
    totals: Tensor | None
    rows: Tensor | None
    cols: Tensor | None
    params: Tensor | None
    hi: Tensor | None
    lo: Tensor | None
    scales: Tensor | None
    kept_layers: int
    first_strips: int  # strips of columns of the first sample, before those of the second


def sweep(
    problem: Problem,
    upstream: Upstream,
    *,
    totals: bool = False,
    sums: bool = False,
    cols: bool = False,
    keep: str = "none",
    params: bool = False,
    weights: tuple[Tensor, Tensor] | None = None,
) -> Iterator[Panel]:
    """The panels one after the other; kept tiles hold until the next one."""
    x, y, sizes, kind, kept = problem.x, problem.y, problem.sizes, problem.kind, problem.kept
    b, device, block = problem.items, x.hi.device, sizes.block
    row_tiles, col_tiles = x.rows // block, y.rows // block
    if not row_tiles or not col_tiles or not b:
        return
    layers = problem.layout.layers
    # Each loop over features has its own stages in shared memory: each layer's, and those of u and v in both roles.
    loops = layers + ((1 + problem.symmetric) if upstream.mode == "matmul" else 0)
    stages = max(1, sizes.stages // loops)
    kernels = 1 + (problem.layout.second < layers)
    kept_layers = {"none": 0, "kernel": 1, "gradient": layers}[keep]
    # Kept tiles take no more than the points do, or a fixed size where these are few.
    row_bytes = y.rows * b * (kept_layers * kept.kept_parts * kept.type.itemsize + cols * kind.compute.itemsize)
    limit = max(_PANEL, _POINTS_SHARE * b * (x.rows + y.rows) * x.width)
    each = row_tiles
    if keep != "none" or cols:
        each = max(1, min(row_tiles, limit // (row_bytes * (block if keep != "none" else 1))))

    split, strip = y.second // block, sizes.strip
    if not INTERPRETED:
        strip = max(1, min(strip, b * each * col_tiles // (_PROGRAMS * processors(device))))
    first_strips = triton.cdiv(split, strip)
    strips = first_strips + triton.cdiv(col_tiles - split, strip)

    def empty(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    count = triton.next_power_of_2(4 * problem.params.shape[0]) if params else 1
    nothing = x.hi
    hi = lo = scales = nothing
    if kept_layers:
        hi = empty(b, kept_layers, each * block, y.rows, dtype=kept.type)
        lo = torch.empty_like(hi) if kept.kept_parts == 2 else hi
    w_x, w_y = weights or (nothing, nothing)
    up = upstream

    def given(t: Tensor | None) -> Tensor:
        return nothing if t is None else t

    u, v = up.u, up.v
    for first in range(0, row_tiles, each):
        tiles = min(each, row_tiles - first)
        if kept_layers:
            scales = empty(b, kept_layers, tiles, col_tiles, dtype=kind.compute)
        out_totals = empty(b, tiles, strips, 3) if totals else None
        out_rows = empty(kernels, b, tiles, strips, block) if sums else None
        out_params = empty(b, tiles, strips, count) if params else None
        out_cols = None
        if cols:
            make = torch.zeros if problem.symmetric else torch.empty  # tiles above the diagonal are not written
            out_cols = make((kernels, b, tiles, y.rows), dtype=kind.compute, device=device)
        launch_as_given(
            triton_sweep.sweep, (tiles * strips * b,),
            (
                x.hi, x.lo, x.norms, x.cols, y.hi, y.lo, y.norms, y.cols, problem.scales.factors, problem.params,
                given(up.coefs), w_x, w_y, given(up.rows), given(up.cols), given(up.products),
                *((nothing,) * 4 if u is None else (u.hi, u.lo, v.hi, v.lo)), given(up.factor),
                given(out_totals), given(out_rows), given(out_cols), given(out_params), hi, lo, scales,
                x.rows, y.rows, x.width, 0 if u is None else u.width, *x.segments, *y.segments,
                first, tiles, col_tiles, split, strips, first_strips, b, each * block,
            ),
            dict(
                DIMS=problem.layout.dims, WIDTHS=x.widths, HOW=problem.layout.how, LADDERS=problem.layout.ladders,
                FAMILIES=problem.layout.families, BEGINS=problem.layout.begins, SECOND=problem.layout.second,
                SYMMETRIC=problem.symmetric, MODE=up.mode, TOTALS=totals, SUMS=sums, COLS=cols,
                WEIGHTED=weights is not None, KEEP=keep, PARAMS=count, ALL=up.all_sums,
                U_WIDTH=16 if u is None else u.width, STRIP=strip, GROUP=sizes.group, NEAR=NEAR, SPLIT=kind.parts,
                KEEP_SPLIT=kept.kept_parts, U_SPLIT=up.parts, BLOCK=block, STEP=sizes.step, TYPE=triton_type(kept.type),
                UPCAST=INTERPRETED, ACC=triton_type(kind.compute), num_warps=sizes.warps, num_stages=stages,
            ),
        )  # fmt: skip
        yield Panel(first, tiles, out_totals, out_rows, out_cols, out_params, hi, lo, scales, kept_layers, first_strips)


def add_product(
    problem: Problem,
    panel: Panel,
    layer: int,
    z: Points,
    column: int,
    dim: int,
    inverses: Tensor,
    out: Tensor,
    out_column: int,
    *,
    own: Points | None = None,
    transposed: bool = False,
    alpha: float = 1.0,
    local: bool = False,
    parts: int | None = None,
) -> None:
    """Adds ``alpha`` · G z, or Gᵀ z, of kept tiles to ``out`` (b, rows, D); with ``own`` Σ_j G_ij (own_i − z_j).

    ``inverses`` (b, L) turns z back to its own scale; ``column`` is where its columns begin, ``parts`` how many it has.
    ``local``: the rows of ``out`` are the panel's only.
    """
    kept, sizes = problem.kept, problem.sizes
    b, block = problem.items, sizes.block
    col_tiles = problem.y.rows // block
    out_tiles = col_tiles if transposed else panel.tiles
    if transposed and problem.symmetric:
        out_tiles = min(col_tiles, panel.first + panel.tiles)
    cols = min(sizes.cols, max(16, triton.next_power_of_2(dim)))
    columns = triton.cdiv(dim, cols)
    # Where few programs would be at work the sum is shared out, and the shares added up in their order.
    shares = 1
    depth = panel.tiles if transposed else col_tiles
    if not INTERPRETED:
        shares = shares_of(out_tiles * columns * b, depth // 4, out.device)
    first_out = 0 if transposed or local else panel.first * block
    target, width, rows, to, first = out, out.shape[2], out.shape[1], out_column, first_out
    if shares > 1:
        target = torch.empty(shares, b, out_tiles * block, dim, dtype=out.dtype, device=out.device)
        width, rows, to, first = dim, out_tiles * block, 0, 0
    of = own or z
    launch_as_given(
        triton_multiply.multiply, (out_tiles * b, columns, shares),
        (
            panel.hi, panel.lo, panel.scales, z.hi, z.lo, of.hi, of.lo, inverses, target,
            panel.hi.shape[2], panel.hi.shape[3], z.width, column, column, dim, rows, width, to, first,
            panel.tiles, col_tiles, panel.first, out_tiles, panel.kept_layers, layer, panel.hi.stride(0), z.rows,
            of.rows, shares,
        ),
        dict(
            TRANSPOSED=transposed, SYMMETRIC=problem.symmetric, DIFFERENCES=own is not None, ALPHA=alpha,
            KEEP_SPLIT=kept.kept_parts, SPLIT=parts or kept.parts, ADD=shares == 1, BLOCK=block, COLS=cols,
            UPCAST=INTERPRETED, ACC=triton_type(kept.compute), num_warps=sizes.product_warps,
            num_stages=sizes.product_stages,
        ),
    )  # fmt: skip
    if shares > 1:
        out[:, first_out : first_out + out_tiles * block, out_column : out_column + dim] += target.sum(0)


def _add_signs(
    problem: Problem, panel: Panel, layer: int, column: int, dim: int, z: Points, own: Points, out, transposed
):
    block, b = problem.sizes.block, problem.items
    col_tiles = problem.y.rows // block
    out_tiles = col_tiles if transposed else panel.tiles
    if transposed and problem.symmetric:
        out_tiles = min(col_tiles, panel.first + panel.tiles)
    launch_as_given(
        triton_multiply.signs, (out_tiles * b, dim),
        (
            panel.hi, panel.lo, panel.scales, own.cols, z.cols, out,
            panel.hi.shape[2], panel.hi.shape[3], column, dim, out.shape[1], out.shape[2], column,
            0 if transposed else panel.first * block, own.rows, z.rows, own.cols.shape[1],
            panel.tiles, col_tiles, panel.first, out_tiles, panel.kept_layers, layer, panel.hi.stride(0),
        ),
        dict(
            TRANSPOSED=transposed, SYMMETRIC=problem.symmetric, KEEP_SPLIT=problem.kept.kept_parts, BLOCK=block,
            UPCAST=INTERPRETED, ACC=triton_type(problem.kind.compute),
        ),
    )  # fmt: skip


def add_gradients(problem: Problem, panel: Panel, grad_x: Tensor | None, grad_y: Tensor | None) -> None:
    """Adds what a panel of U ∂K/∂measure gives the rows of x and y; where symmetric both are ``grad_x``."""
    layout, x, y = problem.layout, problem.x, problem.y
    sides = [(grad_x, y, x, False), (grad_x if problem.symmetric else grad_y, x, y, True)]
    column = start = 0
    for layer, how in enumerate(layout.how):
        dim = layout.dims[layer]
        for out, z, own, transposed in sides:
            if out is None or not dim:
                continue
            if how == BY_L1:
                _add_signs(problem, panel, layer, column, dim, z, own, out, transposed)
                continue
            add_product(
                problem, panel, layer, z, start, dim, problem.scales.inverses, out, column,
                own=None if how == BY_DOT else own, transposed=transposed, alpha=1.0 if how == BY_DOT else 2.0,
            )  # fmt: skip
        column += dim
        start += x.widths[layer]
