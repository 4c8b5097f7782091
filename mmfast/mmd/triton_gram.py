"""Quadratic forms of many points of many features, and their gradients, with matrix products by the vendor's library.

Note: [Products by the library]
  `mmfast.mmd.triton_sweep` multiplies and evaluates in one kernel. From some hundred features on products are nearly
  all of it, and cuBLAS makes them 1.5 times as fast as tiles of a Triton kernel do, which more than pays for a panel of
  products that is written and read once. A panel is some rows of the matrix with all columns up to its last row:

  1. cuBLAS: x_i · y_j in float32; of points in two parts one product of three times as many features.
  2. `evaluate`: sums, the gradient's weights in two parts, and these weights' sums by row and by column.
  3. `scale_of`, and `evaluate` again where a weight was too large for the scale of the panels before.
  4. cuBLAS: weights times points for the panel's own rows, in shares of columns, and transposed for the rows before.

  What is multiplied has one scale, so that cuBLAS can add it up; where a later panel needs another one `settle` brings
  what is there to it. Second parts are kept 2^12 times as large and lie before the first ones, so that one product
  takes both: weights down to 2^-26 of the largest have all their digits. Tensor cores cut sums off where others round,
  so that no sum is longer than `_SUMMED` terms before it is added to others in float32.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmfast._launch import launch_as_given
from mmfast.mmd import triton_narrow
from mmfast.mmd.triton_launch import Problem
from mmfast.mmd.triton_points import BY_DOT, BY_PRODUCTS, INTERPRETED, Format, Layout, triton_type
from mmfast.mmd.triton_sweep import _inside
from mmfast.mmd.triton_terms import _not_negative, _terms
from mmfast.mmd.triton_tuning import Sizes

# From how many rows on: with gradients, and for values alone, which have to have that many features too.
LEAST_ROWS, LEAST_ROWS_OF_VALUES, LEAST_FEATURES_OF_VALUES = 4096, 16384, 512
_BYTES, _POINTS_SHARE = 2**29, 4  # of a panel: at least, and for each feature
# Of a panel at most, 16 tiles of cuBLAS high; terms of a sum; shares of columns that are multiplied at a time.
_ROWS, _SUMMED, _SHARES = (64, 64, 2) if INTERPRETED else (2048, 4096, 8)
_TILE_ROWS, _TILE_COLS, _STRIP = (16, 32, 2) if INTERPRETED else (32, 128, 8)
_LOW = tl.constexpr(4096.0)


@triton.jit
def evaluate(products, norms, factors, table, coefs, scale, totals, most, hi, lo, row_sums, col_sums,
             n, second, m, first, row_tiles, columns, split_tiles, strips, first_strips, all_strips, STRIP,
             FAMILIES: tl.constexpr, LADDER: tl.constexpr, DOT: tl.constexpr, ALL: tl.constexpr, KEEP: tl.constexpr,
             AGAIN: tl.constexpr, KEEP_SPLIT: tl.constexpr, OWN: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
             TYPE: tl.constexpr):  # fmt: skip
    """A block of rows of a panel of ``products`` (rows, ``columns``) with ``STRIP`` tiles of columns of one sample.

    ``totals`` (rows of tiles of all panels, ``all_strips``): of pairs i > j. With `KEEP`, of pairs i != j, the weights
    in parts, the largest of them ``most`` (tiles, strips), and their sums ``row_sums`` (rows, strips) and ``col_sums``
    (tiles, ``columns``). `AGAIN`: only where `scale_of` says so, and only what depends on the scale.
    """
    local, strip = tl.program_id(0) % row_tiles, tl.program_id(0) // row_tiles
    begin = strip * STRIP
    end = tl.minimum(begin + STRIP, split_tiles)
    if strip >= first_strips:
        begin = split_tiles + (strip - first_strips) * STRIP
        end = begin + STRIP
    start = first + local * ROWS
    end = tl.minimum(end, tl.cdiv(columns if KEEP else start + ROWS, COLS))
    of_y, with_y = start >= second, strip >= first_strips
    c_xx, c_yy, c_xy = tl.load(coefs), tl.load(coefs + 1), tl.load(coefs + 2)
    scalar = tl.where(of_y == with_y, tl.where(of_y, 2 * c_yy, 2 * c_xx), c_xy)
    counts = tl.where(scalar != 0, 1, 1 if ALL else 0) > 0  # what a coefficient leaves out may even be NaN
    unit = tl.load(scale + 1)
    writes = True
    if not KEEP:
        end = tl.where(counts, end, begin)
    if AGAIN:
        writes = tl.load(scale + 2) != 1
        end = tl.where(writes, end, begin)

    i = start + tl.arange(0, ROWS)
    at = tl.arange(0, COLS)
    row_whole = _inside(start, ROWS, n, second, m)
    factor = tl.load(factors)
    a_norms = tl.load(norms + i)
    here = local.to(tl.int64) * ROWS * columns + tl.arange(0, ROWS)[:, None] * columns + at[None, :]
    total = tl.full((), 0.0, tl.float64)
    top = tl.full((), 0.0, tl.float32)
    by_row = tl.zeros((ROWS,), tl.float32)
    weight = scalar.to(tl.float32) * unit
    back = 1 / tl.maximum(unit, 1e-37)
    for tile in tl.range(begin, end, num_stages=2):
        j = tile * COLS + at
        z = tl.load(products + here + tile * COLS)
        z = z * (factor if DOT else -2 * factor)
        if not DOT:
            z = _not_negative((a_norms[:, None] + tl.load(norms + j)[None, :]) + z, tl.float32)
        v, h = _terms(z, table, FAMILIES, 0, len(FAMILIES), LADDER, tl.float32)
        below = tile * COLS + COLS <= start
        whole = row_whole & counts & _inside(tile * COLS, COLS, n, second, m)
        whole = whole & (below | (KEEP & (tile * COLS >= start + ROWS)))
        if not whole:
            seen = ((i < n) | ((i >= second) & (i < second + m)))[:, None]
            seen = seen & ((j < n) | ((j >= second) & (j < second + m)))[None, :] & counts
            v = tl.where(seen & (i[:, None] > j[None, :]), v, 0)
            h = tl.where(seen & (i[:, None] != j[None, :]), h, 0)
        if not AGAIN:
            found = tl.sum(tl.sum(v, 0).to(tl.float64), 0)
            total += tl.where(tile * COLS < start + ROWS, found, 0)
        if KEEP:
            if not AGAIN:
                size = tl.abs(h)
                top = tl.maximum(top, tl.max(tl.where(size < float("inf"), size, 0)))
            g = h * weight
            head = g.to(TYPE)
            tl.store(hi + here + tile * COLS, head)
            if KEEP_SPLIT == 2:
                low = ((g - head.to(tl.float32)) * _LOW).to(TYPE)
                tl.store(lo + here + tile * COLS, low)
            if OWN:
                g = head.to(tl.float32)
                if KEEP_SPLIT == 2:
                    g += low.to(tl.float32) * (1 / _LOW)
            by_row += tl.sum(g, 1)
            tl.store(col_sums + local.to(tl.int64) * columns + j, tl.sum(g, 0) * back)
    if not AGAIN:
        tl.store(totals + (first // ROWS + local) * all_strips + strip, total)
    if KEEP:
        if not AGAIN:
            tl.store(most + local * strips + strip, top * tl.abs(scalar.to(tl.float32)))
        if writes:
            rows = local * ROWS + tl.arange(0, ROWS)
            tl.store(row_sums + rows * strips + strip, by_row * back)


@triton.jit
def scale_of(most, scale, count, LANES: tl.constexpr):
    """``scale``: the largest weight so far, the power of two that weights are kept by, and its change: 1 where none is.

    It takes the largest below 2^12, and is left alone until one does not fit below 2^15.
    """
    lanes = tl.arange(0, LANES)
    top = tl.zeros((LANES,), tl.float32)
    for first in range(0, count, LANES):
        top = tl.maximum(top, tl.load(most + first + lanes, mask=first + lanes < count, other=0))
    top = tl.maximum(tl.maximum(tl.max(top, 0), tl.load(scale)), 1e-30)
    tl.store(scale, top)
    before = tl.load(scale + 1)
    fits = (before > 0) & (top * before < 32768)
    exponent = ((top.to(tl.int32, bitcast=True) >> 23) & 0xFF) - 126
    unit = tl.where(fits, before, ((127 + 12 - exponent) << 23).to(tl.float32, bitcast=True))
    tl.store(scale + 1, unit)
    tl.store(scale + 2, tl.where(before > 0, unit / tl.where(before > 0, before, 1), 0))


@triton.jit
def settle(sums, scale, weights, row_sums, col_sums, first, columns, width, strips, row_tiles,
           ROWS: tl.constexpr, COLS: tl.constexpr):  # fmt: skip
    """Rows before a panel: ``sums`` (rows, ``width``) in its scale. Of all up to its last row the ``weights``."""
    start = tl.program_id(0) * ROWS
    rows = start + tl.arange(0, ROWS)
    if start < first:
        change = tl.load(scale + 2)
        if change != 1:  # not the first panel, where it is 0
            d = tl.program_id(1) * COLS + tl.arange(0, COLS)
            at = sums + rows.to(tl.int64)[:, None] * width + d[None, :]
            there = (d < width)[None, :]
            tl.store(at, tl.load(at, mask=there, other=0) * change, mask=there)
    if tl.program_id(1) == 0:
        found = tl.zeros((ROWS,), tl.float64)
        k = tl.arange(0, 32)
        if start < first:
            found += tl.load(weights + rows)
            for t in range(0, row_tiles, 32):
                at = col_sums + (t + k).to(tl.int64)[:, None] * columns + rows[None, :]
                found += tl.sum(tl.load(at, mask=(t + k < row_tiles)[:, None], other=0).to(tl.float64), 0)
        else:
            for s in range(0, strips, 32):
                at = row_sums + (rows - first)[:, None] * strips + (s + k)[None, :]
                found += tl.sum(tl.load(at, mask=(s + k < strips)[None, :], other=0).to(tl.float64), 1)
        tl.store(weights + rows, found)


@triton.jit
def add_shares(shares, sums, count, part, first, rows, width, ADD: tl.constexpr, KEEP_SPLIT: tl.constexpr,
               SPLIT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):  # fmt: skip
    """A panel's rows of ``sums``, or added to them, from ``shares``.

    Those are (``count``, parts · rows, width) of the points' first parts, and from ``part`` on of the second ones.
    """
    r = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    d = tl.program_id(1) * COLS + tl.arange(0, COLS)
    there = (d < width)[None, :]
    at = r[:, None] * width + d[None, :]
    total = tl.zeros((ROWS, COLS), tl.float32)
    each = tl.cast(rows, tl.int64) * width
    for s in range(0, count):
        place = shares + s * KEEP_SPLIT * each + at
        if KEEP_SPLIT == 2:
            total += tl.load(place, mask=there, other=0) * (1 / _LOW)
            place += each
        total += tl.load(place, mask=there, other=0)
        if SPLIT == 2:
            total += tl.load(shares + part + s * each + at, mask=there, other=0)
    to = sums + first * tl.cast(width, tl.int64) + at
    if ADD:
        total += tl.load(to, mask=there, other=0)
    tl.store(to, total, mask=there)


@triton.jit
def finish(sums, weights, scale, inverses, hi, lo, width, DOT: tl.constexpr, SPLIT: tl.constexpr,
           ROWS: tl.constexpr, COLS: tl.constexpr):  # fmt: skip
    """The gradient in place of Σ_j G_ij z_j: that, or with differences 2 Σ_j G_ij (z_i - z_j)."""
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(1) * COLS + tl.arange(0, COLS)
    there = (d < width)[None, :]
    at = r.to(tl.int64)[:, None] * width + d[None, :]
    found = tl.load(sums + at, mask=there, other=0) * (1 / tl.load(scale + 1))
    if not DOT:
        point = tl.load(hi + at, mask=there, other=0).to(tl.float32)
        if SPLIT == 2:
            point += tl.load(lo + at, mask=there, other=0).to(tl.float32)
        found = 2 * (tl.load(weights + r).to(tl.float32)[:, None] * point - found)
    tl.store(sums + at, found * tl.load(inverses), mask=there)


def takes(plan: Layout, kind: Format, rows: int, gradient: bool) -> bool:
    """One layer, measured by products, of so many points that the launches do not matter."""
    if plan.layers != 1 or plan.how[0] not in (BY_PRODUCTS, BY_DOT) or kind.compute == torch.float64:
        return False
    if kind.type == torch.float16 and torch.backends.cuda.matmul.allow_fp16_accumulation:
        return False  # PyTorch refuses products in float32 then
    if torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled():
        return False  # PyTorch refuses cuBLAS then, unless its workspace is settled before the process begins
    if gradient:
        return rows >= LEAST_ROWS
    return kind.parts == 2 and rows >= LEAST_ROWS_OF_VALUES and plan.dims[0] >= LEAST_FEATURES_OF_VALUES


def sizes(found: Sizes) -> Sizes:
    """Samples begin where tiles do."""
    return dataclasses.replace(found, block=_TILE_COLS)


def _multiply(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> None:
    """``out`` = a b in float32, or added to it, of batches of matrices in half precision."""
    if out.device.type == "cuda":
        torch.baddbmm(out, a, b, torch.float32, beta=int(add), out=out)
    else:
        torch.baddbmm(out, a.float(), b.float(), beta=int(add), out=out)


def _apart(a: Tensor, b: Tensor, share: int) -> tuple[Tensor, Tensor]:
    """Batches whose products add up to a b: a share of a's columns and of b's rows each."""
    return a.unflatten(1, (-1, share)).transpose(0, 1), b.unflatten(0, (-1, share))


def _share(tiles: int) -> int:
    """Tiles of columns in a share: such that shares are as long as each other where that is near the longest."""
    least = -(-tiles * _TILE_COLS // _SUMMED)
    even = next((s for s in range(least, 3 * least // 2 + 1) if tiles % s == 0), least)
    return -(-tiles // even)


class _Item:
    """The sums of one item, panel by panel."""

    def __init__(self, problem: Problem, item: int, coefs: Tensor, gradient: bool, all_sums: bool) -> None:
        z, kind, plan = problem.x, problem.kind, problem.layout
        self.points, self.kind, self.coefs = z, kind, coefs
        self.hi, self.lo, self.norms = z.hi[item], z.lo[item], z.norms[item]
        self.factors, self.inverses = problem.scales.factors[item], problem.scales.inverses[item]
        self.table, self.gradient, self.device = problem.params, gradient, z.hi.device
        self.terms = dict(
            FAMILIES=plan.families, LADDER=plan.ladders[0], DOT=plan.how[0] == BY_DOT, ALL=all_sums, ROWS=_TILE_ROWS,
            COLS=_TILE_COLS, OWN=kind.raw, KEEP_SPLIT=kind.kept_parts, TYPE=triton_type(kind.type), num_warps=4,
            maxnreg=None if INTERPRETED else 168,
        )  # fmt: skip
        self.left, self.right = self.hi, self.hi
        if kind.parts == 2:  # the small products first
            width = z.width
            both = torch.cat((self.hi, self.lo, self.hi, self.hi), 1)
            self.left, self.right = both[:, : 3 * width], both[:, width:]
        self.split = z.second // _TILE_COLS
        self.first_strips = triton.cdiv(self.split, _STRIP)

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def strips(self, columns: int) -> int:
        """Of the first columns."""
        tiles = columns // _TILE_COLS
        if tiles <= self.split:
            return triton.cdiv(tiles, _STRIP)
        return self.first_strips + triton.cdiv(tiles - self.split, _STRIP)

    def compute(self, totals: Tensor) -> Tensor | None:
        """Fills ``totals``; the gradient (rows, width)."""
        z, kind = self.points, self.kind
        limit = max(_BYTES, _POINTS_SHARE * z.rows * z.width)
        pair = 4 + self.gradient * kind.kept_parts * kind.type.itemsize
        rows = max(1, min(_ROWS, limit // (pair * z.rows)) // _TILE_COLS) * _TILE_COLS
        # Each panel is a matrix of its own in this room.
        self.products = self.empty(min(rows, z.rows) * z.rows)
        self.scale = torch.zeros(3, device=self.device)
        if self.gradient:
            self.kept = self.empty(kind.kept_parts * self.products.numel(), dtype=kind.type)
            self.sums = self.empty(z.rows, z.width)
            self.weights = self.empty(z.rows, dtype=torch.float64)
            self.shares = self.empty((kind.kept_parts + kind.parts - 1) * _SHARES * min(rows, z.rows) * z.width)
        for first in range(0, z.rows, rows):
            self.panel(first, min(rows, z.rows - first), totals)
        if not self.gradient:
            return None
        block = dict(ROWS=_TILE_ROWS, COLS=_TILE_COLS)
        launch_as_given(
            finish, (z.rows // _TILE_ROWS, triton.cdiv(z.width, _TILE_COLS)),
            (self.sums, self.weights, self.scale, self.inverses, self.hi, self.lo, z.width),
            dict(DOT=self.terms["DOT"], SPLIT=kind.parts, **block),
        )  # fmt: skip
        return self.sums

    def panel(self, first: int, rows: int, totals: Tensor) -> None:
        z, columns = self.points, first + rows
        tiles, strips = rows // _TILE_ROWS, self.strips(columns)
        products = self.products[: rows * columns].view(rows, columns)
        _multiply(self.left[None, first:columns], self.right[:columns].t()[None], products[None])
        most = row_sums = col_sums = hi = lo = self.products
        if self.gradient:
            most = self.empty(tiles * strips)
            row_sums, col_sums = self.empty(rows, strips), self.empty(tiles, columns)
            kept = self.kept[: self.kind.kept_parts * rows * columns].view(-1, columns)
            lo, hi = kept[:rows], kept[-rows:]

        def evaluate_all(again: bool) -> None:
            launch_as_given(
                evaluate, (tiles * strips,),
                (
                    products, self.norms, self.factors, self.table, self.coefs, self.scale, totals, most, hi, lo,
                    row_sums, col_sums, z.n, z.second, z.m, first, tiles, columns, self.split, strips,
                    self.first_strips, totals.shape[1], _STRIP,
                ),
                dict(KEEP=self.gradient, AGAIN=again, **self.terms),
            )  # fmt: skip

        evaluate_all(False)
        if not self.gradient:
            return
        launch_as_given(scale_of, (1,), (most, self.scale, tiles * strips), dict(LANES=16 if INTERPRETED else 1024))
        evaluate_all(True)
        launch_as_given(
            settle, (columns // _TILE_ROWS, triton.cdiv(z.width, _TILE_COLS) if first else 1),
            (self.sums, self.scale, self.weights, row_sums, col_sums, first, columns, z.width, strips, tiles),
            dict(ROWS=_TILE_ROWS, COLS=_TILE_COLS),
        )  # fmt: skip
        self.own_rows(first, rows, kept)
        if not first:
            return
        before, points, low = self.sums[None, :first], self.hi[first:columns], self.lo[first:columns]
        if self.kind.parts == 2:
            _multiply(hi[:, :first].t()[None], low[None], before, add=True)
        if self.kind.kept_parts == 2:
            points = torch.cat((points * (1 / _LOW.value), points))
        _multiply(kept[:, :first].t()[None], points[None], before, add=True)

    def own_rows(self, first: int, rows: int, kept: Tensor) -> None:
        """The panel's rows of the sums: all its columns, in shares."""
        z, kind, columns = self.points, self.kind, first + rows
        share = _share(columns // _TILE_COLS) * _TILE_COLS
        part = kind.kept_parts * _SHARES * rows * z.width
        pairs = [(kept, self.hi, self.shares[:part].view(_SHARES, -1, z.width))]
        if kind.parts == 2:
            of_low = self.shares[part:][: _SHARES * rows * z.width].view(_SHARES, rows, z.width)
            pairs.append((kept[-rows:], self.lo, of_low))
        for begin in range(0, columns, _SHARES * share):
            end = min(columns, begin + _SHARES * share)
            whole, rest = divmod(end - begin, share)
            middle = begin + whole * share
            for weights, points, out in pairs:
                if whole:
                    _multiply(*_apart(weights[:, begin:middle], points[begin:middle], share), out[:whole])
                if rest:
                    _multiply(weights[None, :, middle:end], points[None, middle:end], out[whole : whole + 1])
            launch_as_given(
                add_shares, (rows // _TILE_ROWS, triton.cdiv(z.width, _TILE_COLS)),
                (self.shares, self.sums, whole + (rest > 0), part, first, rows, z.width),
                dict(
                    ADD=begin > 0, KEEP_SPLIT=kind.kept_parts, SPLIT=kind.parts, ROWS=_TILE_ROWS, COLS=_TILE_COLS,
                ),
            )  # fmt: skip


def quadratic(problem: Problem, coefs: Tensor, gradient: bool, all_sums: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Sums (b, 3) over pairs with i != j of x, of y and of both, after their combination; its gradient (b, rows, D)."""
    z, b, device = problem.x, problem.items, problem.x.hi.device
    grads, totals = [], None
    for item in range(b):
        one = _Item(problem, item, coefs, gradient, all_sums)
        if totals is None:  # what lies above the diagonal stays 0
            shape = b, z.rows // _TILE_ROWS, one.strips(z.rows)
            totals = torch.zeros(shape, dtype=torch.float64, device=device)
        grads.append(one.compute(totals[item]))
    sums = torch.empty(b, 3, dtype=torch.float64, device=device)
    value = torch.empty(b, dtype=torch.float64, device=device)
    launch_as_given(
        triton_narrow.combine, (b,),
        (
            totals, coefs, problem.params, sums, value, z.n, z.m, *totals.shape[1:], z.second // _TILE_ROWS,
            one.first_strips, totals.shape[2] - one.first_strips, 0,
        ),
        dict(COUNT=len(problem.layout.families), DIAGONAL=False, LANES=16 if INTERPRETED else 1024, num_warps=8),
    )  # fmt: skip
    if not gradient:
        return value, sums, None
    found = torch.stack(grads) if b > 1 else grads[0][None]
    return value, sums, found[..., : problem.layout.dims[0]]
