"""Triton kernels of small batches: an MMD² of some hundred rows in two launches, its gradient in a third.

Note: [Three launches for a training step]
  With P rows of both samples and D features a step reads 4 P D bytes or more and writes as many: 8 MB at P = 512 and
  D = 2048, 2 µs at 4 TB/s. There its products, 3 P² D multiplications with three for each, are 5 GFLOP, 10 µs for an
  H100's tensor cores with TF32. At P = 128, D = 256 both are far below the 2 to 3 µs that any launch takes. So the
  number of launches is what counts, then that each has work for all multiprocessors:

  1. `distances`: tiles of |z_i - z_j|² over a share of the features each. A tile takes off the middle of three of its
     rows: distances do not change by that, and no launch has to find the mean of all rows first. The sum of a tile's
     distances is all that a rule for the bandwidth needs.
  2. `values`: adds up the shares and the sums, evaluates each pair of points once, and leaves ∂value/∂distance as a
     matrix (P, P) of float32, at most 1 MB, which stays in the cache. The program that finishes last adds up the
     tiles' totals, in their order: a counter of whole numbers says which one that is, and no result depends on it.
  3. `gradient`, in the backward pass: (Σ G) z - G z, times the gradient that arrives, without an exponential.

  Lengths that are found in the data scale the distances, so that the kernel's parameters can be constants. Products are
  three of TF32 parts (22 bits): float32's range needs no scaling, thus no pass to find one.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mmfast.mmd.triton_points import INTERPRETED
from mmfast.mmd.triton_terms import _median, _not_negative, _terms, _total

_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def _pair(t):
    """Tile ``t`` of the lower triangle, row by row: row and column."""
    # Between whole numbers the root stays 4 / (2 row + 3) below the next one: 0.001 is more than it can be wrong by.
    row = ((tl.sqrt((8 * t + 1).to(tl.float32)) - 0.999) * 0.5).to(tl.int32)
    return row, t - row * (row + 1) // 2


@triton.jit
def _rows(x, y, tile, tiles_x, n, m, x_stride, y_stride, BLOCK: tl.constexpr):
    """Of a tile: is it of y, its rows within the sample, which of these there are, and where they begin."""
    of_y = tile >= tiles_x
    rows = (tile - tl.where(of_y, tiles_x, 0)) * BLOCK + tl.arange(0, BLOCK)
    begins = tl.where(of_y, y, x) + rows.to(tl.int64) * tl.where(of_y, y_stride, x_stride)
    return of_y, rows, rows < tl.where(of_y, m, n), begins


@triton.jit
def _read(begins, there, columns, inside):
    """Rows as float32, 0 where there is nothing."""
    return tl.load(begins[:, None] + columns[None, :], mask=there[:, None] & inside[None, :], other=0).to(tl.float32)


@triton.jit
def _square(x):
    """Rounded. Lanes of a warp add up the squares of a row in pairs, all of them the same sum, and all store it: a lane
    that adds its own square to the other's rounded one in one instruction has another last bit than the other."""
    if _INTERPRETED:
        return x * x
    else:
        return tl.inline_asm_elementwise("mul.rn.f32 $0, $1, $1;", "=f,f", [x], tl.float32, True, 1)


@triton.jit
def _centre(total, x, y, tile, tiles_x, n, m, x_stride, y_stride, columns, inside, BLOCK: tl.constexpr):
    """The median of three rows of a tile, where the sum ``total`` over all rows in question is finite.

    One row far off, or a bad one, must not spoil the others, as it would with their mean.
    """
    of_y = tile >= tiles_x
    first = (tile - tl.where(of_y, tiles_x, 0)) * BLOCK
    count = tl.minimum(tl.where(of_y, m, n) - first, BLOCK)
    stride = tl.where(of_y, y_stride, x_stride).to(tl.int64)
    begin = tl.where(of_y, y, x) + first * stride
    a = tl.load(begin + columns, mask=inside, other=0).to(tl.float32)
    b = tl.load(begin + count // 3 * stride + columns, mask=inside, other=0).to(tl.float32)
    c = tl.load(begin + 2 * count // 3 * stride + columns, mask=inside, other=0).to(tl.float32)
    return tl.where(tl.abs(total) < float("inf"), _median(a, b, c), 0)


@triton.jit
def _apart(a_begins, a_there, b_begins, b_there, begin, end, BLOCK: tl.constexpr):
    """Σ (a - b)² over features, difference by difference: exact near 0."""
    z = tl.zeros((BLOCK, BLOCK), tl.float32)
    for c in range(begin, end):
        a = tl.load(a_begins + c, mask=a_there, other=0).to(tl.float32)
        b = tl.load(b_begins + c, mask=b_there, other=0).to(tl.float32)
        d = a[:, None] - b[None, :]
        z += d * d
    return z


@triton.jit
def distances(x, y, partial, sums, ticket, n, m, width, tiles_x, x_item, x_stride, y_item, y_stride, each,
              count_xx, count_yy, count_xy,
              DOT: tl.constexpr, FEW: tl.constexpr, EXACT: tl.constexpr, SUMS: tl.constexpr, NEAR: tl.constexpr,
              BLOCK: tl.constexpr, STEP: tl.constexpr):  # fmt: skip
    """Tiles of squared distances, or with `DOT` of products, over ``each`` features: ``partial`` (b, shares, pairs, …).

    With `FEW` difference by difference; with `EXACT` so too where they are small beside the squared norms. ``sums``
    (b, shares, pairs): of the distances in tiles whose pairs count.
    """
    t, share, item = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    pairs = tl.num_programs(0)
    row, col = _pair(t)
    x += item * x_item
    y += item * y_item
    a_of_y, a_rows, a_there, a_begins = _rows(x, y, row, tiles_x, n, m, x_stride, y_stride, BLOCK)
    b_of_y, b_rows, b_there, b_begins = _rows(x, y, col, tiles_x, n, m, x_stride, y_stride, BLOCK)
    begin, end = share * each, tl.minimum(share * each + each, width)
    if FEW:
        z = _apart(a_begins, a_there, b_begins, b_there, begin, end, BLOCK)
    else:
        z = tl.zeros((BLOCK, BLOCK), tl.float32)
        a_norms = tl.zeros((BLOCK,), tl.float32)
        b_norms = tl.zeros((BLOCK,), tl.float32)
        for c in range(begin, end, STEP):
            columns = c + tl.arange(0, STEP)
            a = _read(a_begins, a_there, columns, columns < end)
            b = _read(b_begins, b_there, columns, columns < end)
            if not DOT:
                centre = _centre(
                    tl.sum(a, 0) + tl.sum(b, 0), x, y, row, tiles_x, n, m, x_stride, y_stride, columns, columns < end,
                    BLOCK,
                )  # fmt: skip
                a = tl.where(a_there[:, None], a - centre[None, :], 0)
                b = tl.where(b_there[:, None], b - centre[None, :], 0)
                a_norms += tl.sum(_square(a), 1)
                b_norms += tl.sum(_square(b), 1)
            z = tl.dot(a, tl.trans(b), z, input_precision="tf32x3")
        if not DOT:
            norms = a_norms[:, None] + b_norms[None, :]
            z = norms - 2 * z
            if EXACT:
                near = (z < norms * NEAR) & a_there[:, None] & b_there[None, :]
                near = near & ((row != col) | (a_rows[:, None] != b_rows[None, :]))
                if tl.max(tl.max(near.to(tl.int32), 1), 0) > 0:
                    exact = _apart(a_begins, a_there, b_begins, b_there, begin, end, BLOCK)
                    z = tl.where(near, exact, z)
            z = _not_negative(z, tl.float32)
    place = (item * tl.num_programs(1) + share) * pairs + t
    at = tl.arange(0, BLOCK)
    tl.store(partial + place * (BLOCK * BLOCK) + at[:, None] * BLOCK + at[None, :], z)
    if SUMS:
        counts = tl.where(a_of_y, tl.where(b_of_y, count_yy, count_xy), count_xx)
        seen = a_there[:, None] & b_there[None, :] & ((row != col) | (a_rows[:, None] > b_rows[None, :]))
        tl.store(sums + place, _total(tl.where(seen & (counts > 0), z, 0)))
    if (t == 0) & (share == 0):
        tl.store(ticket + item, 0)


@triton.jit
def values(partial, sums, ticket, table, coefs, value, length, weights, n, m, tiles_x, tiles, shares, divisor,
           FAMILIES: tl.constexpr, LADDER: tl.constexpr, DOT: tl.constexpr, FIND: tl.constexpr, LEAST: tl.constexpr,
           DIAGONAL: tl.constexpr, ALIGNED: tl.constexpr, KEEP: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """``value`` (b), and with `KEEP` its derivatives by the measures, ``weights`` (b, rows, rows).

    With `FIND` the distances are divided by their mean, 2 Σ sums / ``divisor``, which goes to ``length`` (b).
    `DIAGONAL` counts a point's kernel with itself too, `ALIGNED` leaves out that of x_i with y_i. Behind ``sums`` there
    is room for the tiles' totals.
    """
    t, item = tl.program_id(0), tl.program_id(1).to(tl.int64)
    pairs = tl.num_programs(0)
    row, col = _pair(t)
    a_of_y, a_rows, a_there, _ = _rows(partial, partial, row, tiles_x, n, m, 0, 0, BLOCK)
    b_of_y, b_rows, b_there, _ = _rows(partial, partial, col, tiles_x, n, m, 0, 0, BLOCK)
    at = tl.arange(0, BLOCK)
    z = tl.zeros((BLOCK, BLOCK), tl.float32)
    for share in range(0, shares):
        place = (item * shares + share) * pairs + t
        z += tl.load(partial + place * (BLOCK * BLOCK) + at[:, None] * BLOCK + at[None, :])
    own = (row == col) & (a_rows[:, None] == b_rows[None, :])
    if not DOT:
        z = tl.where(own, 0, z)
    inverse = tl.full((), 1.0, tl.float32)
    if FIND:
        found = tl.full((), 0.0, tl.float64)
        lanes = tl.arange(0, 256)
        count = shares * pairs
        for first in range(0, count, 256):
            found += tl.sum(tl.load(sums + item * count + first + lanes, mask=first + lanes < count, other=0), 0)
        found = 2 * found / divisor
        found = tl.where(found < LEAST, LEAST, found)
        if t == 0:
            tl.store(length + item, found)
        inverse = (1 / found).to(tl.float32)
    v, h = _terms(z * inverse, table, FAMILIES, 0, len(FAMILIES), LADDER, tl.float32)

    c_xx, c_yy, c_xy = tl.load(coefs), tl.load(coefs + 1), tl.load(coefs + 2)
    scalar = tl.where(a_of_y, tl.where(b_of_y, 2 * c_yy, c_xy), 2 * c_xx)
    seen = a_there[:, None] & b_there[None, :]
    if ALIGNED:
        seen = seen & ((a_of_y == b_of_y) | (a_rows[:, None] != b_rows[None, :]))
    once = seen & ((row != col) | (a_rows[:, None] > b_rows[None, :]))
    total = _total(tl.where(once, v, 0)) * scalar
    if DIAGONAL:
        total += _total(tl.where(seen & own, v, 0)) * (0.5 * scalar)
    if KEEP:
        if not (DOT and DIAGONAL):
            seen = seen & (own == 0)
        g = tl.where(seen, h * (scalar.to(tl.float32) * inverse), 0)
        side = tiles * BLOCK
        i, j = row * BLOCK + at, col * BLOCK + at
        weights += item * side * side
        tl.store(weights + i[:, None] * side + j[None, :], g)
        if row != col:
            tl.store(weights + j[:, None] * side + i[None, :], tl.trans(g))

    totals = sums + (tl.num_programs(1) * shares + item) * pairs
    tl.store(totals + t, total)
    tl.debug_barrier()
    if tl.atomic_add(ticket + item, 1, sem="acq_rel") == pairs - 1:
        total = tl.full((), 0.0, tl.float64)
        lanes = tl.arange(0, 256)
        for first in range(0, pairs, 256):
            there = first + lanes < pairs
            total += tl.sum(tl.load(totals + first + lanes, mask=there, other=0, cache_modifier=".cg"), 0)
        tl.store(value + item, total.to(tl.float32))


@triton.jit
def gradient(grad, x, y, weights, grad_x, grad_y, grad_item, n, m, width, tiles_x, tiles, first_tile, x_item, x_stride,
             y_item, y_stride, DOT: tl.constexpr, BLOCK: tl.constexpr, COLS: tl.constexpr):  # fmt: skip
    """Rows of ``grad_x`` (b, n, width) and ``grad_y`` (b, m, width) from tile ``first_tile`` on: a program a tile."""
    tile, item = tl.program_id(0) + first_tile, tl.program_id(2).to(tl.int64)
    columns = tl.program_id(1) * COLS + tl.arange(0, COLS)
    inside = columns < width
    x += item * x_item
    y += item * y_item
    of_y, rows, there, begins = _rows(x, y, tile, tiles_x, n, m, x_stride, y_stride, BLOCK)
    own = _read(begins, there, columns, inside)
    centre = tl.zeros((COLS,), tl.float32)
    if not DOT:
        centre = _centre(
            tl.sum(own, 0), x, y, tile, tiles_x, n, m, x_stride, y_stride, columns, inside, BLOCK
        )  # fmt: skip
    side = tiles * BLOCK
    at = tl.arange(0, BLOCK)
    weights += item * side * side + (tile * BLOCK + at)[:, None] * side + at[None, :]
    acc = tl.zeros((BLOCK, COLS), tl.float32)
    weight = tl.zeros((BLOCK,), tl.float32)
    for other in range(0, tiles):
        _, _, z_there, z_begins = _rows(x, y, other, tiles_x, n, m, x_stride, y_stride, BLOCK)
        g = tl.load(weights + other * BLOCK)
        z = _read(z_begins, z_there, columns, inside)
        z = tl.where(z_there[:, None], z - centre[None, :], 0)
        acc = tl.dot(g, z, acc, input_precision="tf32x3")
        if not DOT:
            weight += tl.sum(g, 1)
    if not DOT:
        acc = 2 * (weight[:, None] * (own - centre[None, :]) - acc)
    acc = acc * tl.load(grad + item * grad_item).to(tl.float32)
    to = rows.to(tl.int64)[:, None] * width + columns[None, :]
    mask = there[:, None] & inside[None, :]
    if of_y:
        tl.store(grad_y + item * m * width + to, acc.to(grad_y.dtype.element_ty), mask=mask)
    else:
        tl.store(grad_x + item * n * width + to, acc.to(grad_x.dtype.element_ty), mask=mask)
