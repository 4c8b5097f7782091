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

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmfast._launch import launch
from mmfast.mmd import triton_narrow, triton_narrow_launch, triton_settle
from mmfast.mmd.bandwidth import least_length
from mmfast.mmd.triton_points import (
    BY_DOT,
    BY_PRODUCTS,
    INTERPRETED,
    MAX_SCALE,
    Format,
    Layout,
    format_of,
    layout,
    padded,
    triton_type,
)
from mmfast.mmd.triton_settle import _prepared
from mmfast.mmd.triton_sweep import _inside
from mmfast.mmd.triton_terms import _not_negative, _terms

# From how many rows on: with gradients, and for values alone, which have to have that many features too.
LEAST_ROWS, LEAST_ROWS_OF_VALUES, LEAST_FEATURES_OF_VALUES = 4096, 16384, 512
_BYTES, _POINTS_SHARE = 2**29, 4  # of a panel: at least, and for each feature
# Of a panel at most, 16 tiles of cuBLAS high; terms of a sum; shares of columns that are multiplied at a time.
_ROWS, _SUMMED, _SHARES = (64, 64, 2) if INTERPRETED else (2048, 4096, 8)
_TILE_ROWS, _TILE_COLS, _STRIP = (16, 32, 2) if INTERPRETED else (32, 128, 8)
_REGISTERS = (None, None) if INTERPRETED else (128, 168)  # for values alone, so that four programs fit; with gradients
# Of preparation: rows and columns at a time, blocks of rows that are looked at, and these at a time.
_BLOCK, _CHUNK, _LEAST_CHUNK, _PARTS, _LANES = (16, 32, 16, 3, 16) if INTERPRETED else (32, 128, 64, 128, 32)
_COMBINE = {"LANES": 16, "num_warps": 8} if INTERPRETED else {"LANES": 4096, "num_warps": 16}
_LOW = tl.constexpr(4096.0)


@triton.jit
def evaluate(products, norms, numbers, table, coefs, scale, totals, most, hi, lo, row_sums, col_sums,
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
    factor = tl.load(numbers)
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
        z = z * (factor if DOT else -factor)
        if not DOT:
            z = _not_negative(z - (a_norms[:, None] + tl.load(norms + j)[None, :]), tl.float32)
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
def settle(sums, scale, weights, row_sums, col_sums, points, stacked, first, columns, width, stride, strips, row_tiles,
           STACK: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):  # fmt: skip
    """Rows before a panel: ``sums`` (rows, ``width``) in its scale. Of all up to its last row the ``weights``.

    `STACK`: of the panel's rows after the first, ``stacked`` (2 · rows, ``width``), what both parts of weights are to
    be multiplied with.
    """
    start = tl.program_id(0) * ROWS
    rows = start + tl.arange(0, ROWS)
    if start < first:
        change = tl.load(scale + 2)
        if change != 1:  # not the first panel, where it is 0
            d = tl.program_id(1) * COLS + tl.arange(0, COLS)
            at = sums + rows.to(tl.int64)[:, None] * width + d[None, :]
            there = (d < width)[None, :]
            tl.store(at, tl.load(at, mask=there, other=0) * change, mask=there)
    elif STACK & (first > 0):
        d = tl.program_id(1) * COLS + tl.arange(0, COLS)
        there = (d < width)[None, :]
        point = tl.load(points + rows.to(tl.int64)[:, None] * stride + d[None, :], mask=there, other=0)
        to = stacked + (rows - first).to(tl.int64)[:, None] * width + d[None, :]
        tl.store(to, (point.to(tl.float32) * (1 / _LOW)).to(point.dtype), mask=there)
        tl.store(to + tl.cast(columns - first, tl.int64) * width, point, mask=there)
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
def finish(sums, weights, scale, numbers, mean, by, x, y, grad_x, grad_y, n, m, x_item, x_stride, x_col, y_item,
           y_stride, y_col, second, rows, room, by_item, first_block, blocks,
           BY: tl.constexpr, DOT: tl.constexpr, CENTRED: tl.constexpr, SPLIT: tl.constexpr, DIM: tl.constexpr,
           WIDTH: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr, TYPE: tl.constexpr):  # fmt: skip
    """``grad_x`` (b, n, DIM) and ``grad_y`` (b, m, DIM) of Σ_j G_ij z_j, with `BY` times ``by`` (b).

    That sum itself, or with differences 2 Σ_j G_ij (z_i - z_j).
    """
    pid, chunk = tl.program_id(0) // CHUNKS, tl.program_id(0) % CHUNKS
    block, item = pid % blocks + first_block, (pid // blocks).to(tl.int64)
    at = block * BLOCK + tl.arange(0, BLOCK)
    k = chunk * WIDTH + tl.arange(0, WIDTH)
    of_y = block * BLOCK >= second
    source = at - tl.where(of_y, second, 0)
    there = source < tl.where(of_y, m, n)
    width: tl.constexpr = CHUNKS * WIDTH
    found = tl.load(sums + (item * rows + at)[:, None] * width + k[None, :]) * (1 / tl.load(scale + item * 4 + 1))
    if not DOT:
        scaled, head = _prepared(
            x, y, mean + item * width, tl.load(numbers + item * room + 3), of_y, item, source, there, k, n, m, x_item,
            x_stride, x_col, y_item, y_stride, y_col, CENTRED, DIM, TYPE,
        )  # fmt: skip
        point = head.to(tl.float32)
        if SPLIT == 2:
            point += (scaled - point).to(TYPE).to(tl.float32)
        found = 2 * (tl.load(weights + item * rows + at).to(tl.float32)[:, None] * point - found)
    factor = tl.load(numbers + item * room + 4)
    found = found * factor
    if BY:
        found = found * tl.load(by + item * by_item).to(tl.float32)
    mask = there[:, None] & (k < DIM)[None, :]
    to = source.to(tl.int64)
    if of_y:
        tl.store(grad_y + (item * m + to)[:, None] * DIM + k[None, :], found.to(grad_y.dtype.element_ty), mask=mask)
    else:
        tl.store(grad_x + (item * n + to)[:, None] * DIM + k[None, :], found.to(grad_x.dtype.element_ty), mask=mask)


def takes(plan: Layout, kind: Format, rows: int, gradient: bool) -> bool:
    """One layer, measured by products, of so many points that the launches do not matter."""
    if plan.layers != 1 or plan.how[0] not in (BY_PRODUCTS, BY_DOT) or kind.compute == torch.float64:
        return False
    if gradient:
        return rows >= LEAST_ROWS
    return kind.parts == 2 and rows >= LEAST_ROWS_OF_VALUES and plan.dims[0] >= LEAST_FEATURES_OF_VALUES


def is_refused(dtype: torch.dtype) -> bool:
    """True where PyTorch's settings have no such products of features of this dtype."""
    if dtype != torch.bfloat16 and torch.backends.cuda.matmul.allow_fp16_accumulation:
        return True  # PyTorch refuses products in float32 then
    # PyTorch refuses cuBLAS then, unless its workspace is settled before the process begins.
    return torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()


def _multiply(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> None:
    """``out`` = a b in float32, or added to it, of batches of matrices in half precision."""
    if out.device.type == "cuda":
        torch.baddbmm(out, a, b, torch.float32, beta=int(add), out=out)
    else:
        torch.baddbmm(out, a.float(), b.float(), beta=int(add), out=out)


def _share(tiles: int) -> int:
    """Tiles of columns in a share: such that shares are as long as each other where that is near the longest."""
    least = -(-tiles * _TILE_COLS // _SUMMED)
    even = next((s for s in range(least, 3 * least // 2 + 1) if tiles % s == 0), least)
    return -(-tiles // even)


# ---- What is done is found once for a shape


@dataclass(frozen=True, eq=False)
class _Launch:
    """A kernel, its ``tensors`` by name and from which element on, and its other arguments."""

    kernel: object
    grid: tuple[int, ...]
    tensors: tuple[tuple[str, int], ...]
    numbers: tuple[int, ...]
    constants: Mapping[str, object]
    key: int


@dataclass(frozen=True, eq=False)
class _Product:
    """Matrices as `torch.as_strided` takes them, each in its room."""

    a: tuple[tuple[int, ...], tuple[int, ...], int]
    b: tuple[tuple[int, ...], tuple[int, ...], int]
    out: tuple[tuple[int, ...], tuple[int, ...], int]
    in_kept: bool  # where ``out`` is
    add: bool


_keys: dict[tuple, int] = {}


def _key(constants: Mapping[str, object], numbers: Sequence[int], *more: object) -> int:
    """The same number for launches that are alike to Triton, see `mmfast._launch.launch`."""
    alike = tuple((v == 1, v % 16 == 0, v >= 2**31) for v in numbers)
    return _keys.setdefault((tuple(constants.items()), alike, more), len(_keys))


@dataclass(frozen=True, eq=False)
class _Piece:
    dtype: torch.dtype
    begin: int  # in bytes
    count: int  # of elements

    def of(self, room: Tensor, first: int = 0) -> Tensor:
        return room.view(self.dtype).as_strided((self.count - first,), (1,), self.begin // self.dtype.itemsize + first)


class _Room:
    """Pieces of one piece of memory, by name."""

    def __init__(self) -> None:
        self.pieces, self.end = {}, 0

    def add(self, name: str, dtype: torch.dtype, *shape: int) -> None:
        count = math.prod(shape)
        self.pieces[name] = _Piece(dtype, self.end, count)
        self.end += padded(max(count, 1) * dtype.itemsize, 256)


class Plan:
    """Of a batch: what is launched and multiplied one after the other, and the memory it takes.

    ``kept`` is what the gradient needs: ``table`` (b, T, 4) first, what `triton_settle` finds, the sums and the
    weights of all rows.
    """

    def __init__(
        self, shape: tuple[int, int, int, int], strides: tuple[int, ...], dtype: torch.dtype, families: tuple[int, ...],
        precision: str, counts: tuple[int, ...], gradient: bool, all_sums: bool, diagonal: bool,
    ) -> None:  # fmt: skip
        b, n, m, d = shape
        self.shape, self.strides, self.families = shape, strides, families
        self.all, self.gradient = all_sums, gradient
        self.layout = layout(((d,), families, (0,) * len(families)))
        self.kind = kind = format_of([dtype], precision)
        self.dtype, self.dot = dtype, self.layout.how[0] == BY_DOT
        self.width = padded(d, _LEAST_CHUNK)
        self.chunk = _CHUNK if self.width % _CHUNK == 0 else _LEAST_CHUNK
        self.chunks = self.width // self.chunk
        self.copies = 4 if kind.parts == 2 else 1  # left factors are the first three of them, right ones the last three
        self.stride = self.copies * self.width
        self.second = padded(n, _TILE_COLS)
        self.rows = self.second + padded(m, _TILE_COLS)
        self.split = self.second // _TILE_COLS
        self.first_strips = triton.cdiv(self.split, _STRIP)
        self.number_room = padded(triton_settle.FIRST_NUMBER.value, 16)  # those of terms are for ladders
        self.centred = not kind.raw and not self.dot
        self.scratch, self.kept, self.steps = _Room(), _Room(), []
        self._add_rooms()
        self._prepare(counts)
        for item in range(b):
            for first in range(0, self.rows, self.height):
                self._panel(item, first, min(self.height, self.rows - first))
        self._launch(
            triton_narrow.combine, (b,), ("totals", "totals", "coefs", "table", "sums", "value"),
            (
                n, m, self.rows // _TILE_ROWS, self.all_strips, self.second // _TILE_ROWS, self.first_strips,
                self.all_strips - self.first_strips, 0, 0,
            ),
            {"COUNT": len(families), "DIAGONAL": diagonal, "PAIRS": False, **_COMBINE},
        )  # fmt: skip

    def of_gradient(self, room: Tensor) -> tuple[Tensor]:
        """``table``."""
        return (self.kept.pieces["table"].of(room).view(self.shape[0], -1, 4),)

    def _add_rooms(self) -> None:
        kind, rows, width, floats = self.kind, self.rows, self.width, torch.float32
        b, n, m, _ = self.shape
        each = padded(triton.cdiv(n + m, max(1, _PARTS // b)), _BLOCK)
        self.blocks_x = triton.cdiv(n, each)
        self.blocks, self.each = self.blocks_x + triton.cdiv(m, each), each
        limit = max(_BYTES, _POINTS_SHARE * rows * width)
        pair = 4 + self.gradient * kind.kept_parts * kind.type.itemsize
        self.height = height = min(rows, max(1, min(_ROWS, limit // (pair * rows)) // _TILE_COLS) * _TILE_COLS)
        self.all_strips = self._strips(rows)
        kept, room = self.kept, self.scratch
        kept.add("table", torch.float64, b, len(self.families), 4)
        kept.add("numbers", floats, b, self.number_room)
        kept.add("mean", floats, b, width)
        kept.add("scale", floats, b, 4)
        room.add("columns", floats, b, self.blocks, 4, width)
        room.add("squares", torch.float64, b, self.blocks, self.chunks)
        room.add("lengths", torch.float64, b, self.chunks)
        room.add("tops", floats, b, self.chunks)
        room.add("points", kind.type, b, rows, self.stride)
        room.add("norms", floats, b, rows)
        room.add("totals", torch.float64, b, rows // _TILE_ROWS, self.all_strips)
        room.add("products", floats, height, rows)
        if self.gradient:
            tiles = height // _TILE_ROWS
            kept.add("weights", torch.float64, b, rows)
            kept.add("added", floats, b, rows, width)
            room.add("parts", kind.type, kind.kept_parts, height, rows)
            room.add("most", floats, tiles, self.all_strips)
            room.add("row_sums", floats, height, self.all_strips)
            room.add("col_sums", floats, tiles, rows)
            room.add("shares", floats, kind.kept_parts + kind.parts - 1, _SHARES, height, width)
            room.add("stacked", kind.type, 2, height, width)

    def _strips(self, columns: int) -> int:
        """Of the first columns."""
        tiles = columns // _TILE_COLS
        if tiles <= self.split:
            return triton.cdiv(tiles, _STRIP)
        return self.first_strips + triton.cdiv(tiles - self.split, _STRIP)

    def _launch(self, kernel, grid, tensors, numbers, constants) -> None:
        tensors = tuple((t, 0) if isinstance(t, str) else t for t in tensors)
        key = _key(constants, numbers, self.dtype, self.kind.type)
        self.steps.append(_Launch(kernel, grid, tensors, tuple(numbers), constants, key))

    def _prepare(self, counts: tuple[int, ...]) -> None:
        b, n, m, d = self.shape
        find, surveyed = counts[3] > 0, (n, m, self.blocks_x, self.blocks, self.each)
        width = {"DIM": d, "WIDTH": self.chunk, "CHUNKS": self.chunks}
        self._launch(
            triton_settle.survey, (self.blocks * self.chunks * b,), ("x", "y", "columns", "squares"),
            (n, m, *self.strides, self.blocks_x, self.blocks, self.each),
            {"FIND": find, **width, "BLOCK": _BLOCK, "num_warps": 4},
        )  # fmt: skip
        self._launch(
            triton_settle.settle_columns, (b * self.chunks,), ("columns", "squares", "mean", "lengths", "tops"),
            (*surveyed, *counts[:3]),
            {"FIND": find, "CENTRED": self.centred, **width, "LANES": _LANES, "num_warps": 8},
        )  # fmt: skip
        self._launch(
            triton_settle.settle_numbers, (b,), ("lengths", "tops", "given", "numbers", "table"),
            (self.number_room, counts[3]),
            {
                "FAMILIES": self.families, "DOT": self.dot, "FIND": find, "LEAST": least_length(torch.float32),
                "SCALED": self.kind.scaled, "MOST": MAX_SCALE, "DIM": d, "CHUNKS": self.chunks,
                "LANES": triton.next_power_of_2(self.chunks), "num_warps": 1,
            },
        )  # fmt: skip
        self._launch(
            triton_settle.arrange, (self.rows // _BLOCK * b,),
            ("x", "y", "mean", "numbers", "points", "points", "norms"),
            (n, m, *self.strides, self.second, self.rows, self.rows // _BLOCK, self.number_room),
            {
                "CENTRED": self.centred, "SPLIT": self.kind.parts, "OWN": self.kind.rounds, **width,
                "COPIES": self.copies, "BLOCK": _BLOCK, "TYPE": triton_type(self.kind.type), "num_warps": 4,
            },
        )  # fmt: skip

    def _matrix(self, name: str, shape: tuple[int, ...], strides: tuple[int, ...], first: int) -> tuple:
        piece = (self.kept if name == "added" else self.scratch).pieces[name]
        return shape, strides, piece.begin // piece.dtype.itemsize + first

    def _multiply(self, a: tuple, b: tuple, out: tuple, add: bool = False, in_kept: bool = False) -> None:
        self.steps.append(_Product(a, b, out, in_kept, add))

    def _points(self, item: int, first: int, rows: int, copy: int = 0) -> tuple:
        """A matrix of rows of the points' first parts, or of second ones, ``copy`` 1."""
        at = (item * self.rows + first) * self.stride + copy * self.width
        return self._matrix("points", (1, rows, self.width), (rows * self.stride, self.stride, 1), at)

    def _panel(self, item: int, first: int, rows: int) -> None:
        kind, columns, width, stride = self.kind, first + rows, self.width, self.stride
        _, n, m, _ = self.shape
        tiles, strips = rows // _TILE_ROWS, self._strips(columns)
        own, terms = item * self.rows, len(self.families)
        deep = (self.copies - 1 or 1) * width
        at, right = own * stride, own * stride + (width if self.copies > 1 else 0)
        self._multiply(
            self._matrix("points", (1, rows, deep), (rows * stride, stride, 1), at + first * stride),
            self._matrix("points", (1, deep, columns), (columns * stride, 1, stride), right),
            self._matrix("products", (1, rows, columns), (rows * columns, columns, 1), 0),
        )
        parts = kind.kept_parts
        names = ("most", "row_sums", "col_sums") if self.gradient else ("products",) * 3
        kept = "parts" if self.gradient else "products"
        of = {
            "FAMILIES": self.families, "LADDER": self.layout.ladders[0], "DOT": self.dot, "ALL": self.all,
            "ROWS": _TILE_ROWS, "COLS": _TILE_COLS, "OWN": kind.raw, "KEEP_SPLIT": parts,
            "TYPE": triton_type(kind.type), "num_warps": 4, "maxnreg": _REGISTERS[self.gradient],
        }  # fmt: skip
        scale = "scale", item * 4

        def evaluate_all(again: bool) -> None:
            self._launch(
                evaluate, (tiles * strips,),
                (
                    "products", ("norms", own), ("numbers", item * self.number_room), ("table", item * terms * 4),
                    "coefs", scale, ("totals", own // _TILE_ROWS * self.all_strips), names[0],
                    (kept, (parts - 1) * rows * columns * self.gradient), kept, *names[1:],
                ),
                (
                    n, self.second, m, first, tiles, columns, self.split, strips, self.first_strips, self.all_strips,
                    _STRIP,
                ),
                {"KEEP": self.gradient, "AGAIN": again, **of},
            )  # fmt: skip

        evaluate_all(False)
        if not self.gradient:
            return
        lanes = 16 if INTERPRETED else 1024
        self._launch(scale_of, (1,), ("most", scale), (tiles * strips,), {"LANES": lanes})
        evaluate_all(True)
        added, block = own * width, {"ROWS": _TILE_ROWS, "COLS": _TILE_COLS}
        self._launch(
            settle, (columns // _TILE_ROWS, triton.cdiv(width, _TILE_COLS) if first else 1),
            (("added", added), scale, ("weights", own), "row_sums", "col_sums", ("points", at), "stacked"),
            (first, columns, width, stride, strips, tiles),
            {"STACK": parts == 2, **block},
        )  # fmt: skip
        self._own_rows(item, first, rows)
        if not first:
            return
        before = self._matrix("added", (1, first, width), (first * width, width, 1), added)
        high = (parts - 1) * rows * columns
        if kind.parts == 2:
            self._multiply(
                self._matrix("parts", (1, first, rows), (rows * columns, 1, columns), high),
                self._points(item, first, rows, 1), before, True, True,
            )  # fmt: skip
        points = self._points(item, first, rows)
        if parts == 2:
            points = self._matrix("stacked", (1, 2 * rows, width), (2 * rows * width, width, 1), 0)
        weights = self._matrix("parts", (1, first, parts * rows), (parts * rows * columns, 1, columns), 0)
        self._multiply(weights, points, before, True, True)

    def _own_rows(self, item: int, first: int, rows: int) -> None:
        """The panel's rows of the sums: all its columns, in shares."""
        kind, columns, width, stride = self.kind, first + rows, self.width, self.stride
        share = _share(columns // _TILE_COLS) * _TILE_COLS
        parts = kind.kept_parts
        part = parts * _SHARES * rows * width
        # Rows of weights, where they begin, the points' part and where their products go.
        pairs = [(parts * rows, 0, 0, 0)]
        if kind.parts == 2:
            pairs.append((rows, (parts - 1) * rows * columns, 1, part))
        for begin in range(0, columns, _SHARES * share):
            end = min(columns, begin + _SHARES * share)
            whole, rest = divmod(end - begin, share)
            for count, each, start, slot in ((whole, share, begin, 0), (min(rest, 1), rest, end - rest, whole)):
                if not count:
                    continue
                for high, at, copy, to in pairs:
                    _, _, points = self._points(item, start, each, copy)
                    self._multiply(
                        self._matrix("parts", (count, high, each), (each, columns, 1), at + start),
                        ((count, each, width), (each * stride, stride, 1), points),
                        self._matrix(
                            "shares", (count, high, width), (high * width, width, 1), to + slot * high * width
                        ),
                    )  # fmt: skip
            self._launch(
                add_shares, (rows // _TILE_ROWS, triton.cdiv(width, _TILE_COLS)),
                ("shares", ("added", item * self.rows * width)), (whole + (rest > 0), part, first, rows, width),
                {
                    "ADD": begin > 0, "KEEP_SPLIT": parts, "SPLIT": kind.parts, "ROWS": _TILE_ROWS, "COLS": _TILE_COLS,
                },
            )  # fmt: skip


@functools.lru_cache(maxsize=16)
def plan(
    shape: tuple[int, int, int, int], strides: tuple[int, ...], dtype: torch.dtype, device: torch.device,
    families: tuple[int, ...], precision: str, counts: tuple[int, ...], keep: bool, all_sums: bool, diagonal: bool,
) -> Plan:  # fmt: skip
    """As `triton_narrow_launch.plan`."""
    return Plan(shape, strides, dtype, families, precision, counts, keep, all_sums, diagonal)


def forward(p: Plan, x: Tensor, y: Tensor, given: Tensor, coefs: Tensor, value: Tensor, sums: Tensor) -> Tensor:
    """Fills ``value`` and ``sums``; returns what the gradient needs, `Plan.of_gradient`."""
    room = torch.empty(p.scratch.end, dtype=torch.uint8, device=x.device)
    kept = torch.empty(p.kept.end, dtype=torch.uint8, device=x.device)
    named = {"x": x, "y": y, "given": given, "coefs": coefs, "value": value, "sums": sums}
    at = {name: t.data_ptr() for name, t in named.items()}
    sizes = {}
    for of, pieces in ((room, p.scratch.pieces), (kept, p.kept.pieces)):
        begin = of.data_ptr()
        for name, piece in pieces.items():
            at[name] = begin + piece.begin
            sizes[name] = piece.dtype.itemsize
    like = (value.dtype, *(at[name] & 15 for name in named))

    def tensor(name: str, first: int) -> Tensor:
        if name in named:
            return named[name]
        if name in p.kept.pieces:
            return p.kept.pieces[name].of(kept, first)
        return p.scratch.pieces[name].of(room, first)

    tensor("totals", 0).zero_()  # what lies above the diagonal stays 0
    tensor("scale", 0).zero_()
    halves, floats, in_kept = room.view(p.kind.type), room.view(torch.float32), kept.view(torch.float32)
    for step in p.steps:
        if type(step) is _Product:
            out = (in_kept if step.in_kept else floats).as_strided(*step.out)
            _multiply(halves.as_strided(*step.a), halves.as_strided(*step.b), out, step.add)
            continue
        placed = [at[name] + first * sizes[name] if first else at[name] for name, first in step.tensors]
        launch(
            step.kernel, step.grid, lambda of=step: (*(tensor(*t) for t in of.tensors), *of.numbers), step.constants,
            (step.key, like), (*placed, *step.numbers),
        )  # fmt: skip
    return kept


def backward(
    p: Plan, kept: Tensor, by: Tensor | None, like_x: Tensor, like_y: Tensor, need: Sequence[bool],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of (b, n, d) and (b, m, d), times ``by`` (b) where it is given; empty where not needed."""
    grad_x, grad_y = (
        torch.empty(like.shape if needed else (0,), dtype=dtype, device=like.device)
        for like, needed in ((like_x, need[0]), (like_y, need[1]))
    )
    b, n, m, d = p.shape
    first, last = 0 if need[0] else p.second // _BLOCK, (p.rows if need[1] else p.second) // _BLOCK
    by_item = 0 if by is None or not by.dim() else by.stride(0)
    numbers = n, m, *p.strides, p.second, p.rows, p.number_room, by_item, first, last - first
    pieces, names = p.kept.pieces, ("added", "weights", "scale", "numbers", "mean")
    begin, given = kept.data_ptr(), (kept if by is None else by, like_x, like_y, grad_x, grad_y)
    places = [t.data_ptr() for t in given]
    launch(
        finish, ((last - first) * p.chunks * b,),
        lambda: (*(pieces[name].of(kept) for name in names), *given, *numbers),
        {
            "BY": by is not None, "DOT": p.dot, "CENTRED": p.centred, "SPLIT": p.kind.parts, "DIM": d,
            "WIDTH": p.chunk, "CHUNKS": p.chunks, "BLOCK": _BLOCK, "TYPE": triton_type(p.kind.type), "num_warps": 4,
        },
        (p, need[0], need[1], dtype, given[0].dtype, by_item, *(place & 15 for place in places)),
        (*(begin + pieces[name].begin for name in names), *places, *numbers),
    )  # fmt: skip
    return grad_x, grad_y


def quadratic(
    x: Tensor, y: Tensor, coefs: Tensor, params: Tensor, families: Sequence[int], precision: str, need: Sequence[bool],
    all_sums: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Of batches: the value (b,), its sums (b, 3) over pairs with i != j, and its gradients, empty where not needed."""
    return triton_narrow_launch.quadratic(
        x, y, coefs, params, families, precision, need, all_sums, (plan, forward, backward)
    )
