"""Triton kernels of quadratic forms of points of few features: no tile of the matrix is kept, and launches are few.

Note: [Rows that own their gradient]
  `mmfast.mmd.triton_sweep` looks at each pair once and keeps the gradient's weights in memory, to multiply them with
  the points of both sides: 3 products of D features for a pair, and 4 bytes written once and read twice. With up to 128
  features the bytes and the launches take longer than products do. Here a program holds a block of rows, their points
  and their gradient, and passes over columns: each pair is seen from both sides, which is 4 products instead of 3 and
  its kernel twice, and nothing but the result is written.

Note: [What a tile costs]
  Beside its products a tile of 128 rows and 64 columns has 8192 pairs, of which each instruction of a warp does 32.
  So all that is the same for every pair is found before, by `settle` (`mmfast.mmd.triton_settle`): points and norms
  are scaled such that a product and its norms are the exponent of 2, terms whose γ double are one exponential and a
  polynomial of it, and nothing is masked but in tiles at the diagonal and at the end of a sample (which `narrow`
  leaves to its last loop, as it does kernels of any other form, and points so far apart that rounding may leave
  negative distances of any size). The weights of a tile are two parts, as the points are. For Gaussians no weight is
  above Σ|γw|, which takes the place of each row's largest one; where the rows of a block turn out to be far below
  that, and would lose digits, the last loop goes through all tiles again, about the largest weight of each row so
  far.

  The polynomial's first factor is 1, which is one product less: w_0 multiplies sums at the end, and the power of two
  by which weights use float16's range comes with u itself, whose exponent log2 λ is added to: λ to the largest power
  is that power of two. A first weight far below the others leaves all tiles to the last loop.

  A block of columns is half as wide as the rows are many, so that registers hold everything for two programs on a
  multiprocessor, of which one multiplies while the other evaluates kernels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mmfast.mmd.triton_settle import FIRST_NUMBER
from mmfast.mmd.triton_sweep import _inside
from mmfast.mmd.triton_terms import _not_negative, _terms

MOST_POWERS = tl.constexpr(8)  # terms of a polynomial: more would not fit in registers


# ---- The pairs


@triton.jit
def _counting(t, whole, i, j, n, second, m):
    """0 where a pair does not count: nearly all tiles are ``whole``."""
    if not whole:
        i_there = (i < n) | ((i >= second) & (i < second + m))
        j_there = (j < n) | ((j >= second) & (j < second + m))
        seen = i_there[:, None] & j_there[None, :] & (i[:, None] != j[None, :])
        t = tl.where(seen, t, 0)
    return t


@triton.jit
def _gaussian_rows(s, numbers, table, whole, i, j, n, second, m, COUNT: tl.constexpr):
    """Rows' sums of Σ w exp(-γ z), and its derivative by z, of the measure ``s`` in its unit.

    Each term is added up by itself: a tile of values beside that of derivatives would take too many registers.
    """
    w, g = tl.load(table).to(tl.float32), tl.load(table + 1).to(tl.float32)
    rates = numbers + FIRST_NUMBER + 2 * COUNT
    u = _counting(tl.exp2(s * tl.load(rates)), whole, i, j, n, second, m)
    sums = w * tl.sum(u, 1)
    h = (-g * w) * u
    for t in tl.static_range(1, COUNT):
        w, g = tl.load(table + t * 4).to(tl.float32), tl.load(table + t * 4 + 1).to(tl.float32)
        u = _counting(tl.exp2(s * tl.load(rates + t)), whole, i, j, n, second, m)
        sums += w * tl.sum(u, 1)
        h += (-g * w) * u
    return sums, h


@triton.jit
def _polynomial(powers, factors, LEADS: tl.constexpr, COUNT: tl.constexpr):
    """Σ factors_t u^(2^(COUNT - 1 - t)), over u, from the powers u, u^2, u^4 and so on.

    Without `LEADS` the first factor is taken for 1, and the last power is not needed.
    """
    if COUNT == 1:
        found = factors[0] if LEADS else 1.0
    elif LEADS:
        found = factors[0] * powers[COUNT - 2] + factors[1]
    elif COUNT == 2:
        found = powers[0] + factors[1]
    else:
        found = powers[COUNT - 3] * powers[COUNT - 3] + factors[1]
    for t in tl.static_range(2, COUNT):
        found = found * powers[COUNT - 1 - t] + factors[t]
    return found


@triton.jit
def _columns(hi, lo, start, at, SPLIT: tl.constexpr, UPCAST: tl.constexpr):
    """Points of a block of columns."""
    WIDTH: tl.constexpr = at.shape[1]
    b = tl.load(hi + start * WIDTH + at)
    b_lo = b
    if SPLIT == 2:
        b_lo = tl.load(lo + start * WIDTH + at)
    if UPCAST:
        b, b_lo = b.to(tl.float32), b_lo.to(tl.float32)
    return b, b_lo


@triton.jit
def _products(a, a_lo, b, b_lo, SPLIT: tl.constexpr):
    z = tl.dot(a, tl.trans(b), out_dtype=tl.float32)
    if SPLIT == 2:
        z = tl.dot(a, tl.trans(b_lo), z, out_dtype=tl.float32)
        z = tl.dot(a_lo, tl.trans(b), z, out_dtype=tl.float32)
    return z


@triton.jit
def _pulled(acc, weight, g, b, b_lo, SPLIT: tl.constexpr, KEEP_SPLIT: tl.constexpr, OWN: tl.constexpr,
            TYPE: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """Adds a tile of weights, and their products with the points of its columns.

    With `OWN` what is added up are the weights' parts: points that are not centred need it.
    """
    head = g.to(TYPE)
    rounded = head.to(tl.float32)
    low = (g - rounded).to(TYPE)
    if UPCAST:
        head, low = rounded, low.to(tl.float32)
    if not OWN:
        weight += tl.sum(g, 1)
    else:
        weight += tl.sum(rounded, 1)
        if KEEP_SPLIT == 2:
            weight += tl.sum(low.to(tl.float32), 1)
    acc = tl.dot(head, b, acc, out_dtype=tl.float32)
    if KEEP_SPLIT == 2:
        acc = tl.dot(low, b, acc, out_dtype=tl.float32)
    if SPLIT == 2:
        acc = tl.dot(head, b_lo, acc, out_dtype=tl.float32)
    return acc, weight


@triton.jit
def narrow(hi, lo, norms, numbers, table, coefs, totals, grads, done,
           rows, n, second, m, row_tiles, col_tiles, split_tiles, strips, long_x, long_y, short_x, items, long, short,
           room, FAMILIES: tl.constexpr, LADDER: tl.constexpr, DOT: tl.constexpr, GRAD: tl.constexpr, ALL: tl.constexpr,
           OWN: tl.constexpr, SPLIT: tl.constexpr, KEEP_SPLIT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
           WIDTH: tl.constexpr, TYPE: tl.constexpr, UPCAST: tl.constexpr, TALL: tl.constexpr,
           WIDE: tl.constexpr):  # fmt: skip
    """A block of `ROWS` rows with a strip of blocks of `COLS` columns of one sample: their part of the sums.

    Strips of ``long`` blocks come first, ``long_x`` of x and ``long_y`` of y, and then those of ``short`` blocks, of
    which ``short_x`` are of x: what is left at the end is little for each multiprocessor.

    ``totals`` (b, row_tiles, strips): of pairs i > j. ``grads`` (strips, b, rows, WIDTH): what these columns add to the
    gradient. Without `ALL` sums are left out whose coefficient is 0.

    With `TALL` the short way's tiles are left to csrc/mmd/mmd_pairs.h, where one is that many of these high, and `WIDE`
    of these wide. With `GRAD` too csrc/mmd/mmd_pairs_gradient.h has left its sum and gradient where those of these
    strips are, as far as ``done`` (b, row_tiles, strips) says; what is found here is added.
    """
    pid = tl.program_id(0) % (row_tiles * strips)
    item = (tl.program_id(0) // (row_tiles * strips)).to(tl.int64)
    row, strip = pid % row_tiles, pid // row_tiles
    count: tl.constexpr = len(FAMILIES)
    is_short = strip >= long_x + long_y
    place = strip - tl.where(is_short, long_x + long_y, 0)
    of_x = tl.where(is_short, short_x, long_x)
    with_y = place >= of_x
    place -= tl.where(with_y, of_x, 0)
    behind_long = tl.where(with_y, long_y, long_x) * long
    begin = tl.where(is_short, behind_long + place * short, place * long) + tl.where(with_y, split_tiles, 0)
    end = tl.minimum(begin + tl.where(is_short, short, long), tl.where(with_y, col_tiles, split_tiles))
    diagonal = row * ROWS // COLS
    behind = diagonal + (ROWS // COLS if ROWS > COLS else 1)
    if not GRAD:
        end = tl.minimum(end, behind)
    first = row.to(tl.int64) * ROWS
    of_y = first >= second
    c_xx, c_yy, c_xy = tl.load(coefs), tl.load(coefs + 1), tl.load(coefs + 2)
    scalar = tl.where(of_y == with_y, tl.where(of_y, 2 * c_yy, 2 * c_xx), c_xy)
    if not ALL:
        end = tl.where(scalar == 0, begin, end)  # what a coefficient leaves out may even be NaN
    end = tl.maximum(begin, end)
    if not GRAD:  # noqa: SIM102
        if begin == end:
            tl.store(totals + (item * row_tiles + row) * strips + strip, 0.0)
            return

    hi += item * rows * WIDTH
    lo += item * rows * WIDTH
    norms += item * rows
    numbers += item * room
    table += item * (4 * count)
    row_whole = _inside(first, ROWS, n, second, m)

    # The short way's tiles: from begin to ``below``, those left of the diagonal, and with `GRAD` from ``above`` to
    # ``last``, whose pairs the rows of others count.
    below, above, last = begin, begin, begin
    if LADDER and count <= MOST_POWERS:
        short = tl.load(numbers + 1) > 0
        if TALL and GRAD:
            short = tl.load(done + (item * row_tiles + row) * strips + strip) > 0
        if TALL:
            owner = row // TALL
            short = short & _inside(owner.to(tl.int64) * (TALL * ROWS), TALL * ROWS, n, second, m)
            whole_end = tl.where(with_y, split_tiles + m // (WIDE * COLS) * WIDE, n // (WIDE * COLS) * WIDE)
            left = owner * (TALL * ROWS) // (WIDE * COLS) * WIDE
        else:
            short = short & row_whole
            whole_end = tl.where(with_y, split_tiles + m // COLS, n // COLS)
            left = diagonal
        last = tl.where(short, tl.maximum(begin, tl.minimum(end, whole_end)), begin)
        below = tl.minimum(last, tl.maximum(begin, left))
        above = tl.minimum(last, tl.maximum(begin, behind))
    if TALL and GRAD:  # noqa: SIM102
        if (below == above) & (last > begin) & (last == end):
            return

    i = first + tl.arange(0, ROWS)
    d = tl.arange(0, WIDTH)
    columns = tl.arange(0, COLS)
    at = columns[:, None] * WIDTH + d[None, :]
    factor = tl.load(numbers)
    a_norms = tl.load(norms + i)
    a = tl.load(hi + i[:, None] * WIDTH + d[None, :])
    a_lo = a
    if SPLIT == 2:
        a_lo = tl.load(lo + i[:, None] * WIDTH + d[None, :])
    if UPCAST:
        a, a_lo = a.to(tl.float32), a_lo.to(tl.float32)
    total = tl.zeros((ROWS,), tl.float64)
    most = tl.full((ROWS,), 1e-30, tl.float32)
    weight = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, WIDTH), tl.float32)

    if LADDER and count <= MOST_POWERS and not TALL:
        weights, slopes = (), ()
        raised = a_norms
        if GRAD:
            raised += tl.load(numbers + 6)
        for t in tl.static_range(count):
            weights = weights + (tl.load(numbers + FIRST_NUMBER + (3 * count if GRAD else 0) + t),)  # noqa: RUF005
            slopes = slopes + (tl.load(numbers + FIRST_NUMBER + count + t),)  # noqa: RUF005
        ahead = tl.load(norms + begin.to(tl.int64) * COLS + columns)
        for part in tl.static_range(2 if GRAD else 1):
            for tile in range(begin if part == 0 else above, below if part == 0 else last):
                start = tl.cast(tile, tl.int64) * COLS
                b, b_lo = _columns(hi, lo, start, at, SPLIT, UPCAST)
                b_norms = ahead
                if GRAD:  # no registers are left for norms that come ahead: they come with the points
                    b_norms = tl.load(norms + start + columns)
                else:
                    ahead = tl.load(norms + tl.cast(tl.minimum(tile + 1, below - 1), tl.int64) * COLS + columns)
                z = _products(a, a_lo, b, b_lo, SPLIT)
                u = tl.exp2(z * factor + (raised[:, None] + b_norms[None, :]))
                powers = (u,)
                for t in tl.static_range(count - 2):
                    powers = powers + (powers[t] * powers[t],)  # noqa: RUF005
                if part == 0:
                    total += tl.sum(u * _polynomial(powers, weights, GRAD, count), 1).to(tl.float64)
                if GRAD:
                    g = u * _polynomial(powers, slopes, False, count)
                    acc, weight = _pulled(acc, weight, g, b, b_lo, SPLIT, KEEP_SPLIT, OWN, TYPE, UPCAST)
        if GRAD:
            # Weights are good to 2^-25, of up to 2^15: enough where they are 2^-4 in the mean.
            pairs = ((below - begin + last - above) * COLS).to(tl.float32)
            fine = tl.min((tl.abs(weight) * 16 >= pairs).to(tl.int32), 0) > 0
            leading = tl.load(numbers + 5)
            sign = tl.where(fine, tl.where(leading < 0, -1.0, 1.0), 0)
            acc = tl.where(fine, acc * sign, 0)
            weight, total = tl.where(fine, weight * sign, 0), tl.where(fine, total, 0)
            most = tl.where(fine & (pairs > 0), tl.abs(leading) * 16384.0, most)
            below, above = tl.where(fine, below, begin), tl.where(fine, above, begin)
            last = tl.where(fine, last, begin)
        total *= tl.where(last > begin, tl.load(table), 1.0)

    for t in range(0, (above - below) + (end - last)):
        tile = below + t
        if tile >= above:
            tile = last + (tile - above)
        start = tl.cast(tile, tl.int64) * COLS
        j = start + columns
        b, b_lo = _columns(hi, lo, start, at, SPLIT, UPCAST)
        z = _products(a, a_lo, b, b_lo, SPLIT) * factor
        whole = row_whole & _inside(start, COLS, n, second, m) & ((tile < diagonal) | (tile >= behind))
        if LADDER:
            s = tl.minimum(z + (a_norms[:, None] + tl.load(norms + j)[None, :]), 0.0, propagate_nan=tl.PropagateNan.ALL)
            sums, h = _gaussian_rows(s, numbers, table, whole, i, j, n, second, m, count)
        else:
            if not DOT:
                z = _not_negative(-(z + (a_norms[:, None] + tl.load(norms + j)[None, :])), tl.float32)
            v, h = _terms(z, table, FAMILIES, 0, count, False, tl.float32)
            h = _counting(h, whole, i, j, n, second, m)
            sums = tl.sum(_counting(v, whole, i, j, n, second, m), 1)
        # Each pair of the diagonal's square is there twice.
        total += tl.where(tile < diagonal, sums, tl.where(tile < behind, 0.5 * sums, 0)).to(tl.float64)
        if GRAD:
            size = tl.max(tl.abs(h), 1)
            now = tl.maximum(most, tl.where(size < float("inf"), size, 0))
            shrink = most / now
            most = now
            acc, weight = _pulled(acc * shrink[:, None], weight * shrink, h * (16384.0 / now)[:, None], b, b_lo, SPLIT,
                                  KEEP_SPLIT, OWN, TYPE, UPCAST)  # fmt: skip

    found = tl.sum(total, 0)
    place = (item * row_tiles + row) * strips + strip
    if TALL and GRAD:
        found += tl.load(totals + place, mask=short, other=0)
    tl.store(totals + place, found)
    if GRAD:
        if not DOT:
            own = tl.load(hi + i[:, None] * WIDTH + d[None, :]).to(tl.float32)
            if SPLIT == 2:
                own += tl.load(lo + i[:, None] * WIDTH + d[None, :]).to(tl.float32)
            acc = 2 * (weight[:, None] * own - acc)
        acc = acc * (most * (scalar.to(tl.float32) * tl.load(numbers + 4) / 16384.0))[:, None]
        to = grads + ((strip.to(tl.int64) * items + item) * rows + i)[:, None] * WIDTH + d[None, :]
        if TALL:  # noqa: SIM102
            if short:
                acc += tl.load(to)
        tl.store(to, acc)


# ---- After them


@triton.jit
def combine(totals, pairs, coefs, table, sums, value, n, m, row_tiles, strips, of_x, long_x, long_y, short_x, blocks,
            COUNT: tl.constexpr, DIAGONAL: tl.constexpr, PAIRS: tl.constexpr, LANES: tl.constexpr):  # fmt: skip
    """``sums`` (b, 3) over i != j from what programs have found, and their combination ``value`` (b).

    With `PAIRS` also of ``pairs`` (b, blocks, 3), in the order of ``sums``.
    `DIAGONAL` adds each point's kernel with itself, Σw, for kernels of distances.
    """
    item = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, LANES)
    xx, yy, xy = tl.zeros((LANES,), tl.float64), tl.zeros((LANES,), tl.float64), tl.zeros((LANES,), tl.float64)
    for first in range(0, row_tiles * strips, LANES):
        at = first + lanes
        found = tl.load(totals + item * row_tiles * strips + at, mask=at < row_tiles * strips, other=0)
        strip = at % strips
        is_short = strip >= long_x + long_y
        of_y, with_y = at // strips >= of_x, strip >= tl.where(is_short, long_x + long_y + short_x, long_x)
        xx += tl.where(of_y | with_y, 0, found)
        yy += tl.where(of_y & with_y, found, 0)
        xy += tl.where(of_y & (with_y == 0), found, 0)
    if PAIRS:
        for first in range(0, blocks, LANES):
            at = first + lanes
            there = at < blocks
            at = pairs + (item * blocks + at) * 3
            xx += tl.load(at, mask=there, other=0)
            yy += tl.load(at + 1, mask=there, other=0)
            xy += tl.load(at + 2, mask=there, other=0)
    s_xx, s_yy, s_xy = 2 * tl.sum(xx, 0), 2 * tl.sum(yy, 0), tl.sum(xy, 0)
    tl.store(sums + item * 3, s_xx)
    tl.store(sums + item * 3 + 1, s_yy)
    tl.store(sums + item * 3 + 2, s_xy)
    c_xx, c_yy = tl.load(coefs), tl.load(coefs + 1)
    found = s_xx * c_xx + s_yy * c_yy + s_xy * tl.load(coefs + 2)
    if DIAGONAL:
        own = tl.full((), 0.0, tl.float64)
        for t in tl.static_range(COUNT):
            own += tl.load(table + item * (4 * COUNT) + t * 4)
        found += own * (c_xx * n + c_yy * m)
    tl.store(value + item, found.to(value.dtype.element_ty))


@triton.jit
def finish(grads, by, grad_x, grad_y, n, m, second, rows, strips, items, by_item, first_block, blocks,
           BY: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """``grad_x`` (b, n, DIM) and ``grad_y`` (b, m, DIM): the sums over strips, with `BY` times ``by`` (b)."""
    block, item = tl.program_id(0) % blocks + first_block, (tl.program_id(0) // blocks).to(tl.int64)
    at = block * BLOCK + tl.arange(0, BLOCK)
    k = tl.arange(0, WIDTH)
    found = tl.zeros((BLOCK, WIDTH), tl.float32)
    for strip in range(0, strips):
        place = (tl.cast(strip, tl.int64) * items + item) * rows + at
        found += tl.load(grads + place[:, None] * WIDTH + k[None, :])
    if BY:
        found = found * tl.load(by + item * by_item).to(tl.float32)
    of_y = block * BLOCK >= second
    to = (at - tl.where(of_y, second, 0)).to(tl.int64)
    mask = (to < tl.where(of_y, m, n))[:, None] & (k < DIM)[None, :]
    if of_y:
        tl.store(grad_y + (item * m + to)[:, None] * DIM + k[None, :], found.to(grad_y.dtype.element_ty), mask=mask)
    else:
        tl.store(grad_x + (item * n + to)[:, None] * DIM + k[None, :], found.to(grad_x.dtype.element_ty), mask=mask)
