"""Triton kernels for what comes before the pairs of `mmfast.mmd.triton_narrow` and of `mmfast.mmd.triton_gram`: the
points' centre and scale, numbers that are the same for every pair, and the points as the kernels of pairs take them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mmfast.mmd.triton_terms import LOG2E, _median

FIRST_NUMBER = tl.constexpr(7)  # of those that a kernel's terms have, see `settle`


@triton.jit
def _points(x, y, of_y, item, rows, there, k, n, m, x_item, x_stride, x_col, y_item, y_stride, y_col,
            DIM: tl.constexpr):  # fmt: skip
    """Rows of one sample as float32, of columns ``k``, 0 where there is nothing."""
    begin = tl.where(of_y, y + item * y_item, x + item * x_item)
    stride = tl.where(of_y, y_stride, x_stride).to(tl.int64)
    col = tl.where(of_y, y_col, x_col).to(tl.int64)
    at = rows.to(tl.int64)[:, None] * stride + k[None, :] * col
    return tl.load(begin + at, mask=there[:, None] & (k < DIM)[None, :], other=0).to(tl.float32)


@triton.jit
def survey(x, y, columns, squares, n, m, x_item, x_stride, x_col, y_item, y_stride, y_col, blocks_x, blocks, each,
           FIND: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr,
           BLOCK: tl.constexpr):  # fmt: skip
    """Of ``each`` rows of a sample, ``WIDTH`` of their columns: ``columns`` (b, blocks, 4, CHUNKS · WIDTH), of what is
    finite there the mean, what was lost in rounding it (the sum of the differences), the least and the largest; with
    `FIND` the sum of the squared differences from that mean, ``squares`` (b, blocks, CHUNKS)."""
    pid, chunk = tl.program_id(0) // CHUNKS, tl.program_id(0) % CHUNKS
    block, item = pid % blocks, (pid // blocks).to(tl.int64)
    of_y = block >= blocks_x
    first = (block - tl.where(of_y, blocks_x, 0)) * each
    count = tl.where(of_y, m, n)
    last = tl.minimum(first + each, count)
    k = chunk * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros((WIDTH,), tl.float32)
    least, most = tl.full((WIDTH,), float("inf"), tl.float32), tl.full((WIDTH,), -float("inf"), tl.float32)
    for begin in range(first, last, BLOCK):
        rows = begin + tl.arange(0, BLOCK)
        there = rows < last
        v = _points(x, y, of_y, item, rows, there, k, n, m, x_item, x_stride, x_col, y_item, y_stride, y_col, DIM)
        fine = there[:, None] & (tl.abs(v) < float("inf"))
        total += tl.sum(tl.where(fine, v, 0), 0)
        least = tl.minimum(least, tl.min(tl.where(fine, v, float("inf")), 0))
        most = tl.maximum(most, tl.max(tl.where(fine, v, -float("inf")), 0))
    mean = total / (last - first).to(tl.float32)
    mean = tl.where(tl.abs(mean) < float("inf"), mean, 0)
    rest = tl.zeros((WIDTH,), tl.float32)
    square = tl.full((), 0.0, tl.float64)
    for begin in range(first, last, BLOCK):
        rows = begin + tl.arange(0, BLOCK)
        there = rows < last
        v = _points(x, y, of_y, item, rows, there, k, n, m, x_item, x_stride, x_col, y_item, y_stride, y_col, DIM)
        v = tl.where(there[:, None] & (k < DIM)[None, :], v - mean[None, :], 0)
        rest += tl.sum(tl.where(tl.abs(v) < float("inf"), v, 0), 0)
        if FIND:
            square += tl.sum(tl.sum(v.to(tl.float64) * v.to(tl.float64), 1), 0)
    place = item * blocks + block
    every: tl.constexpr = CHUNKS * WIDTH
    to = columns + place * (4 * every) + k
    tl.store(to, mean)
    tl.store(to + every, rest)
    tl.store(to + 2 * every, least)
    tl.store(to + 3 * every, most)
    if FIND:
        tl.store(squares + place * CHUNKS + chunk, square)


@triton.jit
def _surveyed(columns, first, n, m, blocks_x, blocks, each, k, EVERY: tl.constexpr, LANES: tl.constexpr):
    """Of some blocks: where they stand, which there are and which are of y, their rows, and their sums in float64."""
    at = first + tl.arange(0, LANES)
    there, of_y = at < blocks, at >= blocks_x
    begin = tl.where(of_y, at - blocks_x, at) * each
    size = tl.minimum(each, tl.where(of_y, m, n) - begin).to(tl.float64)
    place = columns + at[:, None] * (4 * EVERY) + k[None, :]
    mean = tl.load(place, mask=there[:, None], other=0).to(tl.float64)
    rest = tl.load(place + EVERY, mask=there[:, None], other=0).to(tl.float64)
    return at, place, there, of_y, tl.where(there, size, 1.0), mean, rest


@triton.jit
def _mean_or(total, rows, whole, every_row):
    """Of some rows, or of all where there are none of them."""
    return tl.where(rows > 0, total, whole) / tl.where(rows > 0, rows, every_row)


@triton.jit
def _settle_columns(columns, squares, mean, chunk, n, m, blocks_x, blocks, each, count_xx, count_yy, count_xy,
                    FIND: tl.constexpr, CENTRED: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
                    CHUNKS: tl.constexpr, LANES: tl.constexpr):  # fmt: skip
    """What ``WIDTH`` columns add to the sum of squared distances, and the largest that is left of them."""
    k = chunk * WIDTH + tl.arange(0, WIDTH)
    every: tl.constexpr = CHUNKS * WIDTH
    sum_x, sum_y = tl.zeros((WIDTH,), tl.float64), tl.zeros((WIDTH,), tl.float64)
    first_sum, second_sum = tl.zeros((WIDTH,), tl.float64), tl.zeros((WIDTH,), tl.float64)
    first_rows, second_rows = tl.full((), 0.0, tl.float64), tl.full((), 0.0, tl.float64)
    least, most = tl.full((WIDTH,), float("inf"), tl.float32), tl.full((WIDTH,), -float("inf"), tl.float32)
    for first in range(0, blocks, LANES):
        at, place, there, of_y, size, own, rest = _surveyed(
            columns, first, n, m, blocks_x, blocks, each, k, every, LANES
        )  # fmt: skip
        total = own * size[:, None] + rest
        sum_x += tl.sum(tl.where(of_y[:, None], 0, total), 0)
        sum_y += tl.sum(tl.where(of_y[:, None], total, 0), 0)
        third = at % 3
        first_sum += tl.sum(tl.where((third == 0)[:, None], total, 0), 0)
        second_sum += tl.sum(tl.where((third == 1)[:, None], total, 0), 0)
        rows = tl.where(there, size, 0)
        first_rows += tl.sum(tl.where(third == 0, rows, 0), 0)
        second_rows += tl.sum(tl.where(third == 1, rows, 0), 0)
        least = tl.minimum(least, tl.min(tl.load(place + 2 * every, mask=there[:, None], other=float("inf")), 0))
        most = tl.maximum(most, tl.max(tl.load(place + 3 * every, mask=there[:, None], other=-float("inf")), 0))
    n_x, n_y = tl.cast(n, tl.float64), tl.cast(m, tl.float64)
    centre = tl.zeros((WIDTH,), tl.float32)
    if CENTRED:
        # The median of the means of three thirds of the blocks: one point far off must not be followed, or all others
        # are rounded to nothing.
        whole, every_row = sum_x + sum_y, n_x + n_y
        third_sum, third_rows = whole - first_sum - second_sum, every_row - first_rows - second_rows
        centre = _median(
            _mean_or(first_sum, first_rows, whole, every_row), _mean_or(second_sum, second_rows, whole, every_row),
            _mean_or(third_sum, third_rows, whole, every_row),
        ).to(tl.float32)  # fmt: skip
    tl.store(mean + k, centre)

    length = tl.full((), 0.0, tl.float64)
    if FIND:
        mean_x, mean_y = sum_x / n_x, sum_y / n_y
        square_x, square_y = tl.full((), 0.0, tl.float64), tl.full((), 0.0, tl.float64)
        for first in range(0, blocks, LANES):
            at, place, there, of_y, size, own, rest = _surveyed(
                columns, first, n, m, blocks_x, blocks, each, k, every, LANES
            )  # fmt: skip
            off = rest * (1 / size)[:, None]
            apart = own + off - tl.where(of_y[:, None], mean_y[None, :], mean_x[None, :])
            found = tl.load(squares + at * CHUNKS + chunk, mask=there, other=0)
            found += size * tl.sum(tl.where((k < DIM)[None, :], apart * apart - off * off, 0), 1)
            found = tl.where(there, found, 0)
            square_x += tl.sum(tl.where(of_y, 0, found), 0)
            square_y += tl.sum(tl.where(of_y, found, 0), 0)
        between = tl.sum((mean_x - mean_y) * (mean_x - mean_y), 0)
        between = n_x * square_y + n_y * square_x + n_x * n_y * between
        length = count_xx * (n_x * square_x) + count_yy * (n_y * square_y) + count_xy * between

    top = tl.max(tl.where(k < DIM, tl.maximum(most - centre, centre - least), 0), 0)
    return length, top


@triton.jit
def _settle_numbers(given, numbers, table, length, top, divisor,
                    FAMILIES: tl.constexpr, LADDER: tl.constexpr, DOT: tl.constexpr, FIND: tl.constexpr,
                    LEAST: tl.constexpr, SCALED: tl.constexpr, MOST: tl.constexpr, DIM: tl.constexpr):  # fmt: skip
    """Of one item all that `settle` finds but the mean."""
    count: tl.constexpr = len(FAMILIES)
    terms = ()
    for t in tl.static_range(count):  # asked for before anything is written
        term = given + t * 4
        terms = terms + ((tl.load(term), tl.load(term + 1), tl.load(term + 2), tl.load(term + 3)),)  # noqa: RUF005
    if FIND:
        length = 2 * length / divisor
        length = tl.where(length < LEAST, LEAST, length)
        length = tl.where(length < float("inf"), length, float("nan"))
        by_length = 1 / length
    top = tl.where((top > 0) & (top < float("inf")), top, 0)
    power = tl.full((), 0, tl.int32)
    if SCALED:
        exponent = ((top.to(tl.int32, bitcast=True) >> 23) & 0xFF) - 126
        power = 15 - tl.where(top > 0, exponent, 0)
        power = tl.minimum(tl.maximum(power, -MOST), MOST)
    scale = ((127 + power) << 23).to(tl.float32, bitcast=True)
    inverse = ((127 - power) << 23).to(tl.float32, bitcast=True)

    # Of distances a length divides the squares.
    doubles = tl.full((), 1, tl.int1)
    before = tl.full((), 0.0, tl.float32)
    rates = ()
    for t in tl.static_range(count):
        g = terms[t][1]
        if FIND:
            g = g * by_length
        rates = rates + (g,)  # noqa: RUF005
        if t > 0:
            doubles = doubles & (before == 2 * g.to(tl.float32))
        before = g.to(tl.float32)
    for t in tl.static_range(count):
        to = table + t * 4
        tl.store(to, terms[t][0])
        tl.store(to + 1, rates[t])
        tl.store(to + 2, terms[t][2])
        tl.store(to + 3, terms[t][3])
    unit = tl.full((), 1.0, tl.float32)
    if LADDER:
        rate = rates[count - 1] * LOG2E
        usable = (rate > 1e-30) & (rate < 1e30)
        largest = rate * top * top * DIM  # no squared norm is larger, in the unit
        unit = tl.where(usable & (largest < 1e35), rate.to(tl.float32), 1.0)
        by_unit = LOG2E / unit.to(tl.float64)
        first = terms[0][0]
        tiny = tl.abs(first * rates[0]) < 1e-30
        share = 1 / tl.where(tiny, 1.0, first)
        weights, slopes = tl.full((), 0.0, tl.float64), tl.full((), 0.0, tl.float64)
        for t in tl.static_range(count):
            weights += tl.abs(terms[t][0] * share)
            slopes += tl.abs(terms[t][0] * share) * 0.5**t
        # Rounding may leave distances of -2^-21 of the norms: so little that no power of u is above 2^(1/2).
        fast = doubles & usable & (largest * 2 ** (count - 1) < 2**20) & (tiny == 0)
        fast = fast & (weights < 2**14) & (slopes < 2**14) & (tl.abs(first * rates[0]) < 1e30)
        tl.store(numbers + 1, tl.where(fast, 1.0, 0.0))
        # 2^above is the power of two that takes the sum of the slopes' sizes below 2^15.
        sizes = tl.where(fast, slopes, 1.0).to(tl.float32)
        above = (15 + 126 - ((sizes.to(tl.int32, bitcast=True) >> 23) & 0xFF)).to(tl.float32)
        leading = tl.where(fast, -first * rates[0], 1.0).to(tl.float32)
        tl.store(numbers + 5, leading / tl.exp2(above))
        tl.store(numbers + 6, above / 2 ** (count - 1))
        for t in tl.static_range(count):
            part = terms[t][0] * share
            of_slope = (part / 2**t).to(tl.float32)
            tl.store(numbers + FIRST_NUMBER + t, part.to(tl.float32))
            tl.store(numbers + FIRST_NUMBER + count + t, of_slope * tl.exp2(above - above / 2**t))
            tl.store(numbers + FIRST_NUMBER + 2 * count + t, (rates[t] * by_unit).to(tl.float32))
            tl.store(numbers + FIRST_NUMBER + 3 * count + t, part.to(tl.float32) * tl.exp2(-above / 2**t))
    else:
        tl.store(numbers + 1, 0.0)
    factor = inverse * inverse * ((1 if DOT else 2) * unit)
    tl.store(numbers, factor)
    tl.store(numbers + 2, -0.5 * factor)
    tl.store(numbers + 3, scale)
    tl.store(numbers + 4, inverse)


@triton.jit
def settle(columns, squares, given, mean, numbers, table, n, m, blocks_x, blocks, each, room, count_xx, count_yy,
           count_xy, divisor,
           FAMILIES: tl.constexpr, LADDER: tl.constexpr, DOT: tl.constexpr, FIND: tl.constexpr, LEAST: tl.constexpr,
           CENTRED: tl.constexpr, SCALED: tl.constexpr, MOST: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
           LANES: tl.constexpr):  # fmt: skip
    """All numbers that are the same for every pair of an item, from what `survey` has found.

    ``mean`` (b, WIDTH): what is taken from the points. ``table`` (b, T, 4): the terms ``given``, with `FIND` in units
    of the mean squared distance, 2 Σ over the pairs that count / ``divisor``. ``numbers`` (b, ``room``):

    0. what a product of scaled points is multiplied with: twice their factor in distances, whose unit is for
       Gaussians such that the last term's kernel is 2^-measure
    1. 1 where `narrow` may take its short way
    2. what squared norms of scaled points are multiplied with, half of 0. and negative
    3. the points' scale, a power of two that takes the largest below 2^15, or 1 (any smaller one would cost the second
       part of a point its last bits)
    4. its inverse
    5. what the derivatives by 7 + T are to be multiplied with, of either sign
    6. with gradients, what is added to the exponent: log2 λ of u's factor λ, see [What a tile costs]
    7. w / w_0 of each term; from 7 + T on -γw / (-γ_0 w_0) for powers of λu, times a power of two that leaves their sum
       below 2^15; from 7 + 2 T on γ log2 e in that unit; from 7 + 3 T on w / w_0 for powers of λu
    """
    item = tl.program_id(0).to(tl.int64)
    length, top = _settle_columns(
        columns + item * blocks * (4 * WIDTH), squares + item * blocks, mean + item * WIDTH, 0, n, m, blocks_x, blocks,
        each, count_xx, count_yy, count_xy, FIND, CENTRED, DIM, WIDTH, 1, LANES,
    )  # fmt: skip
    _settle_numbers(
        given, numbers + item * room, table + item * (4 * len(FAMILIES)), length, top, divisor, FAMILIES, LADDER, DOT,
        FIND, LEAST, SCALED, MOST, DIM,
    )  # fmt: skip


@triton.jit
def settle_columns(columns, squares, mean, lengths, tops, n, m, blocks_x, blocks, each, count_xx, count_yy, count_xy,
                   FIND: tl.constexpr, CENTRED: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
                   CHUNKS: tl.constexpr, LANES: tl.constexpr):  # fmt: skip
    """The same of many columns, in two launches: here ``mean`` (b, CHUNKS · WIDTH), and of each chunk of columns what
    it adds to the length and its largest, ``lengths`` and ``tops`` (b, CHUNKS)."""
    item, chunk = (tl.program_id(0) // CHUNKS).to(tl.int64), tl.program_id(0) % CHUNKS
    length, top = _settle_columns(
        columns + item * blocks * (4 * CHUNKS * WIDTH), squares + item * blocks * CHUNKS,
        mean + item * (CHUNKS * WIDTH), chunk, n, m, blocks_x, blocks, each, count_xx, count_yy, count_xy, FIND,
        CENTRED, DIM, WIDTH, CHUNKS, LANES,
    )  # fmt: skip
    tl.store(lengths + tl.program_id(0), length)
    tl.store(tops + tl.program_id(0), top)


@triton.jit
def settle_numbers(lengths, tops, given, numbers, table, room, divisor,
                   FAMILIES: tl.constexpr, DOT: tl.constexpr, FIND: tl.constexpr, LEAST: tl.constexpr,
                   SCALED: tl.constexpr, MOST: tl.constexpr, DIM: tl.constexpr, CHUNKS: tl.constexpr,
                   LANES: tl.constexpr):  # fmt: skip
    """And here ``numbers``, in no unit, and ``table``."""
    item = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, LANES)
    there = lanes < CHUNKS
    length = tl.sum(tl.load(lengths + item * CHUNKS + lanes, mask=there, other=0), 0)
    top = tl.max(tl.load(tops + item * CHUNKS + lanes, mask=there, other=0), 0)
    _settle_numbers(
        given, numbers + item * room, table + item * (4 * len(FAMILIES)), length, top, divisor, FAMILIES, False, DOT,
        FIND, LEAST, SCALED, MOST, DIM,
    )  # fmt: skip


@triton.jit
def _prepared(x, y, mean, scale, of_y, item, source, there, k, n, m, x_item, x_stride, x_col, y_item, y_stride, y_col,
              CENTRED: tl.constexpr, DIM: tl.constexpr, TYPE: tl.constexpr):  # fmt: skip
    """Points less the ``mean``, scaled, and their first part."""
    v = _points(x, y, of_y, item, source, there, k, n, m, x_item, x_stride, x_col, y_item, y_stride, y_col, DIM)
    if CENTRED:
        v = tl.where(there[:, None] & (k < DIM)[None, :], v - tl.load(mean + k)[None, :], 0)
    scaled = v * scale
    return scaled, scaled.to(TYPE)


@triton.jit
def arrange(x, y, mean, numbers, hi, lo, norms, n, m, x_item, x_stride, x_col, y_item, y_stride, y_col, second, rows,
            blocks, room,
            CENTRED: tl.constexpr, SPLIT: tl.constexpr, OWN: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
            CHUNKS: tl.constexpr, COPIES: tl.constexpr, BLOCK: tl.constexpr, TYPE: tl.constexpr):  # fmt: skip
    """Points of both samples, y from row ``second`` on, and zeros after each: ``hi`` and ``lo`` (b, rows, width).

    Or with `COPIES` all that `mmfast.mmd.triton_gram` multiplies, ``hi`` (b, rows, COPIES · width): first parts, second
    ones, and first ones again. ``norms`` (b, rows): their squared norms, of the rounded points with `OWN`, times the
    factor that `settle` gives.
    """
    block, item = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)
    to = block * BLOCK + tl.arange(0, BLOCK)
    of_y = block * BLOCK >= second
    source = to - tl.where(of_y, second, 0)
    there = source < tl.where(of_y, m, n)
    factor, scale = tl.load(numbers + item * room + 2), tl.load(numbers + item * room + 3)
    width: tl.constexpr = CHUNKS * WIDTH
    stride: tl.constexpr = width * COPIES if COPIES else width
    norm = tl.zeros((BLOCK,), tl.float64)
    for chunk in range(0, CHUNKS):
        k = chunk * WIDTH + tl.arange(0, WIDTH)
        scaled, head = _prepared(
            x, y, mean + item * width, scale, of_y, item, source, there, k, n, m, x_item, x_stride, x_col, y_item,
            y_stride, y_col, CENTRED, DIM, TYPE,
        )  # fmt: skip
        place = (item * rows + to.to(tl.int64))[:, None] * stride + k[None, :]
        tl.store(hi + place, head)
        if SPLIT == 2:
            low = (scaled - head.to(tl.float32)).to(TYPE)
            if COPIES:
                tl.store(hi + place + width, low)
                for copy in tl.static_range(2, COPIES):
                    tl.store(hi + place + copy * width, head)
            else:
                tl.store(lo + place, low)
        if OWN:
            scaled = head.to(tl.float32)
        norm += tl.sum(scaled * scaled, 1).to(tl.float64)
    tl.store(norms + item * rows + to, norm.to(tl.float32) * factor)
