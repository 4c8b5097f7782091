"""Triton kernels of the mmd slice: tiles of a kernel matrix that are reduced, or kept for a product that follows.

Points come prepared (`prepare`): rows padded with zeros to whole tiles, each layer's columns to whole steps, and
float32 as the sum of two float16 parts of 11 bits, scaled by a power of two to the top of float16's range. The three
products hi·hi + hi·lo + lo·hi are then good to 22 bits, the same as float32 within a bit, in three passes of the tensor
cores; two bfloat16 parts would give 16 bits for the same work, and three TF32 products 22 bits for twice as much.

A tile of the gradient's weights is kept as two parts in the same way, scaled by the largest of its entries, and
multiplied with the points by `multiply`.

Loads are upcast at once where `UPCAST` says that Triton interprets: its bfloat16 is an integer there.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


# ---- Preparation


@triton.jit
def extents(x, mean, out, n, stride_b, stride_n, stride_d, blocks,
            DIMS: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """The largest finite |x - mean| of a block of rows, for each layer: ``out`` (b, layers, blocks)."""
    pid = tl.program_id(0).to(tl.int64)
    block, item = pid % blocks, pid // blocks
    rows = block * BLOCK + tl.arange(0, BLOCK)
    k = tl.arange(0, STEP)
    start = 0
    total = 0
    for layer in tl.static_range(len(DIMS)):
        total += DIMS[layer]
    for layer in tl.static_range(len(DIMS)):
        most = tl.zeros((BLOCK,), ACC)
        for c in range(0, DIMS[layer], STEP):
            there = (rows < n)[:, None] & (c + k < DIMS[layer])[None, :]
            at = rows[:, None] * stride_n + (start + c + k).to(tl.int64)[None, :] * stride_d
            v = tl.load(x + item * stride_b + at, mask=there, other=0).to(ACC)
            m = tl.load(mean + item * total + start + c + k, mask=c + k < DIMS[layer], other=0).to(ACC)
            v = tl.where(there, tl.abs(v - m[None, :]), 0)
            most = tl.maximum(most, tl.max(tl.where(v < float("inf"), v, 0), 1))
        tl.store(out + (item * len(DIMS) + layer) * blocks + block, tl.max(most, 0))
        start += DIMS[layer]


@triton.jit
def prepare(x, mean, scales, hi, lo, norms, cols, n, stride_b, stride_n, stride_d, first, rows_out, width, column,
            total_cols, first_col, layers_out, first_layer, blocks,
            DIMS: tl.constexpr, WIDTHS: tl.constexpr, CENTRED: tl.constexpr, SPLIT: tl.constexpr, OWN: tl.constexpr,
            COLS: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, TYPE: tl.constexpr,
            ACC: tl.constexpr):  # fmt: skip
    """Rows of points, from row ``first`` of the prepared ones on, and the zeros after them.

    ``hi``, ``lo`` (b, rows, width) from ``column`` on; ``norms`` (b, layers, rows), the squared norms, of the rounded
    points with `OWN`; ``cols`` (b, columns, rows), the points as they are, column by column, with `COLS`.
    """
    pid = tl.program_id(0).to(tl.int64)
    block, item = pid % blocks, pid // blocks
    rows = block * BLOCK + tl.arange(0, BLOCK)
    k = tl.arange(0, STEP)
    source, target = 0, column
    total = 0
    for layer in tl.static_range(len(DIMS)):
        total += DIMS[layer]
    to = item * rows_out + first + rows
    for layer in tl.static_range(len(DIMS)):
        scale = tl.load(scales + item * len(DIMS) + layer).to(ACC)
        norm = tl.zeros((BLOCK,), tl.float64)
        for c in range(0, WIDTHS[layer], STEP):
            inside = c + k < DIMS[layer]
            there = (rows < n)[:, None] & inside[None, :]
            at = rows[:, None] * stride_n + (source + c + k).to(tl.int64)[None, :] * stride_d
            v = tl.load(x + item * stride_b + at, mask=there, other=0).to(ACC)
            if COLS:
                place = (item * total_cols + first_col + source + c + k).to(tl.int64)[None, :] * rows_out
                tl.store(cols + place + (first + rows)[:, None], v, mask=inside[None, :])
            if CENTRED[layer]:
                m = tl.load(mean + item * total + source + c + k, mask=inside, other=0).to(ACC)
                v = tl.where(there, v - m[None, :], 0)
            scaled = v * scale
            head = scaled.to(TYPE)
            if OWN:
                v = head.to(ACC) / scale
            norm += tl.sum((v * v), 1).to(tl.float64)
            place = to[:, None] * width + (target + c + k)[None, :]
            tl.store(hi + place, head)
            if SPLIT == 2:
                tl.store(lo + place, (scaled - head.to(ACC)).to(TYPE))
        tl.store(norms + (item * layers_out + first_layer + layer) * rows_out + first + rows, norm.to(ACC))
        source += DIMS[layer]
        target += WIDTHS[layer]


# ---- The kernel's value at a tile


@triton.jit
def _rate(at, ACC: tl.constexpr):
    """-γ log2 e of a term, rounded once: an error here is the same for all pairs, and no sum averages it out."""
    return (tl.load(at + 1) * -LOG2E).to(ACC)


@triton.jit
def _gaussians(z, params, FIRST: tl.constexpr, COUNT: tl.constexpr, ACC: tl.constexpr):
    """Σ w exp(-γ z) and its derivative: one exponential and squarings where each γ is twice the next one's."""
    last = params + (FIRST + COUNT - 1) * 4
    w, g = tl.load(last).to(ACC), tl.load(last + 1).to(ACC)
    u = tl.exp2(z * _rate(last, ACC))
    v = w * u
    h = (-g * w) * u
    if COUNT > 1:
        doubles = g == g
        for t in tl.static_range(COUNT - 1):
            at = params + (FIRST + t) * 4 + 1
            doubles = doubles & (tl.load(at).to(ACC) == 2 * tl.load(at + 4).to(ACC))
        if doubles:
            for i in tl.static_range(COUNT - 1):
                at = params + (FIRST + COUNT - 2 - i) * 4
                w, g = tl.load(at).to(ACC), tl.load(at + 1).to(ACC)
                u = u * u
                v += w * u
                h += (-g * w) * u
        else:
            for i in tl.static_range(COUNT - 1):
                at = params + (FIRST + i) * 4
                w, g = tl.load(at).to(ACC), tl.load(at + 1).to(ACC)
                u = tl.exp2(z * _rate(at, ACC))
                v += w * u
                h += (-g * w) * u
    return v, h


@triton.jit
def _lower(base, exponent):
    """base ** (exponent - 1), for a whole exponent >= 1."""
    power = base * 0 + 1
    e = exponent.to(tl.int32)
    while e > 1:
        power = power * base
        e -= 1
    return power


@triton.jit
def _term(z, at, FAMILY: tl.constexpr, ACC: tl.constexpr):
    """One term at the measure ``z`` and its derivative; see `mmfast.mmd.terms` for the families."""
    w, g = tl.load(at).to(ACC), tl.load(at + 1).to(ACC)
    if FAMILY == 0 or FAMILY == 6:
        v = w * tl.exp2(z * _rate(at, ACC))
        h = -g * v
    elif FAMILY == 2:
        e = tl.load(at + 3).to(ACC)
        u = 1 + g * z
        v = w * tl.exp2(-e * tl.log2(u))
        h = -e * g * v / u
    elif FAMILY == 7:
        e = tl.load(at + 3).to(ACC)
        b = g * z + tl.load(at + 2).to(ACC)
        low = _lower(b, e)
        v = w * low * b
        h = w * e * g * low
    else:
        d = tl.sqrt(z)
        apart = tl.where(d == 0, 0, 1 / tl.where(d == 0, 1, d))  # where points coincide the derivative is taken as 0
        if FAMILY == 5:
            v = -w * d
            h = -0.5 * w * apart
        else:
            a = g * d
            e = w * tl.exp2(d * _rate(at, ACC))
            if FAMILY == 1:
                v = e
                h = -0.5 * g * e * apart
            elif FAMILY == 3:
                v = (1 + a) * e
                h = -0.5 * g * g * e
            else:
                v = (1 + a + a * a * (1.0 / 3)) * e
                h = (-1.0 / 6) * g * g * (1 + a) * e
    return v, h


@triton.jit
def _terms(z, params, FAMILIES: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr, LADDER: tl.constexpr,
           ACC: tl.constexpr):  # fmt: skip
    """Σ of a layer's terms, and its derivative by the measure."""
    if LADDER:
        v, h = _gaussians(z, params, FIRST, COUNT, ACC)
    else:
        v, h = _term(z, params + FIRST * 4, FAMILIES[FIRST], ACC)
        for t in tl.static_range(1, COUNT):
            more, by = _term(z, params + (FIRST + t) * 4, FAMILIES[FIRST + t], ACC)
            v += more
            h += by
    return v, h


@triton.jit
def _total(x):
    """Σ of a tile: rows in its own precision, their sums in float64."""
    return tl.sum(tl.sum(x, 1).to(tl.float64), 0)


@triton.jit
def _parameter_sums(z, u, params, place, T, FAMILY: tl.constexpr, ACC: tl.constexpr):
    """Σ u · (derivatives of term ``T`` by weight, γ, offset and exponent) where those stand in ``place``, else 0."""
    at = params + T * 4
    w, g = tl.load(at).to(ACC), tl.load(at + 1).to(ACC)
    found = tl.zeros_like(place).to(tl.float64)
    if FAMILY == 0 or FAMILY == 6:
        k = tl.exp2(z * _rate(at, ACC))
        by = -w * z * k
    elif FAMILY == 2:
        e = tl.load(at + 3).to(ACC)
        t = 1 + g * z
        log = tl.log2(t)
        k = tl.exp2(-e * log)
        by = -w * e * z * k / t
        found += tl.where(place == T * 4 + 3, _total(u * (-w / LOG2E) * log * k), 0)
    elif FAMILY == 7:
        e = tl.load(at + 3).to(ACC)
        b = g * z + tl.load(at + 2).to(ACC)
        low = _lower(b, e)
        k = low * b
        by = w * e * low * z
        found += tl.where(place == T * 4 + 2, _total(u * (w * e) * low), 0)
    else:
        d = tl.sqrt(z)
        a = g * d
        e = tl.exp2(d * _rate(at, ACC))
        if FAMILY == 5:
            k = -d
            by = d * 0
        elif FAMILY == 1:
            k = e
            by = -w * d * e
        elif FAMILY == 3:
            k = (1 + a) * e
            by = -w * g * z * e
        else:
            k = (1 + a + a * a * (1.0 / 3)) * e
            by = (-1.0 / 3) * w * g * z * (1 + a) * e
    found += tl.where(place == T * 4, _total(u * k), 0)
    return found + tl.where(place == T * 4 + 1, _total(u * by), 0)


# ---- Measures of a tile


@triton.jit
def _dots(x_hi, x_lo, y_hi, y_lo, i, j, width, START, WIDTH: tl.constexpr, SPLIT: tl.constexpr,
          BLOCK: tl.constexpr, STEP: tl.constexpr, UPCAST: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """x_i · y_j of a tile, over ``WIDTH`` columns from ``START`` on."""
    acc = tl.zeros((BLOCK, BLOCK), ACC)
    k = tl.arange(0, STEP)
    x_at = i[:, None] * width + (START + k)[None, :]
    y_at = j[None, :] * width + (START + k)[:, None]
    for c in range(0, WIDTH, STEP):
        a = tl.load(x_hi + x_at + c)
        b = tl.load(y_hi + y_at + c)
        if UPCAST:
            a, b = a.to(ACC), b.to(ACC)
        acc = tl.dot(a, b, acc, out_dtype=ACC)
        if SPLIT == 2:
            a_lo = tl.load(x_lo + x_at + c)
            b_lo = tl.load(y_lo + y_at + c)
            if UPCAST:
                a_lo, b_lo = a_lo.to(ACC), b_lo.to(ACC)
            acc = tl.dot(a, b_lo, acc, out_dtype=ACC)
            acc = tl.dot(a_lo, b, acc, out_dtype=ACC)
    return acc


@triton.jit
def _differences(x_cols, y_cols, i, j, rows_x, rows_y, START, DIM: tl.constexpr, SQUARE: tl.constexpr,
                 BLOCK: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """Σ |x - y| or Σ |x - y|² over columns, difference by difference: exact near 0."""
    acc = tl.zeros((BLOCK, BLOCK), ACC)
    for c in range(START, START + DIM):
        d = tl.load(x_cols + c * rows_x + i)[:, None] - tl.load(y_cols + c * rows_y + j)[None, :]
        if SQUARE:
            acc += d * d
        else:
            acc += tl.abs(d)
    return acc


@triton.jit
def _measure(x_hi, x_lo, x_norms, x_cols, y_hi, y_lo, y_norms, y_cols, factors, i, j, seen, rows_x, rows_y, width,
             LAYER: tl.constexpr, DIMS: tl.constexpr, WIDTHS: tl.constexpr, HOW: tl.constexpr, NEAR: tl.constexpr,
             SPLIT: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, UPCAST: tl.constexpr,
             ACC: tl.constexpr):  # fmt: skip
    """s, d1 or p of a layer. ``HOW``: 0 s by products, 1 the same but exact near 0, 2 by differences, 3 d1, 4 p."""
    start, column = 0, 0
    for layer in tl.static_range(LAYER):
        start += WIDTHS[layer]
        column += DIMS[layer]
    how: tl.constexpr = HOW[LAYER]
    if how == 2 or how == 3:
        z = _differences(x_cols, y_cols, i, j, rows_x, rows_y, column, DIMS[LAYER], how == 2, BLOCK, ACC)
    else:
        z = _dots(x_hi, x_lo, y_hi, y_lo, i, j, width, start, WIDTHS[LAYER], SPLIT, BLOCK, STEP, UPCAST, ACC)
        factor = tl.load(factors + LAYER).to(ACC)
        if how == 4:
            z = z * factor
        else:
            norm = tl.load(x_norms + LAYER * rows_x + i)[:, None] + tl.load(y_norms + LAYER * rows_y + j)[None, :]
            z = norm - z * (2 * factor)
            if how == 1:
                near = seen & (z < norm * NEAR)
                if tl.max(tl.max(near.to(tl.int32), 1), 0) > 0:
                    exact = _differences(x_cols, y_cols, i, j, rows_x, rows_y, column, DIMS[LAYER], True, BLOCK, ACC)
                    z = tl.where(near, exact, z)
            z = tl.where(z < 0, 0, z)  # and NaN stays
    return z


# ---- The sweep over tiles


@triton.jit
def _split(value, hi, lo, scales, at, scale_at, SPLIT: tl.constexpr, TYPE: tl.constexpr, ACC: tl.constexpr):
    """Keeps a tile as one or two parts in `TYPE`, about the largest of its entries; float64 as it is."""
    if tl.float64 == TYPE:
        tl.store(hi + at, value)
        tl.store(scales + scale_at, 1.0)
    else:
        size = tl.abs(value)
        most = tl.max(tl.max(tl.where(size < float("inf"), size, 0), 1), 0)
        most = tl.where(most < 1e-30, 1e-30, most)
        scaled = value * (16384.0 / most)
        head = scaled.to(TYPE)
        tl.store(hi + at, head)
        if SPLIT == 2:
            tl.store(lo + at, (scaled - head.to(ACC)).to(TYPE))
        tl.store(scales + scale_at, most / 16384.0)


@triton.jit
def sweep(x_hi, x_lo, x_norms, x_cols, y_hi, y_lo, y_norms, y_cols, factors, params,
          coefs, x_weights, y_weights, up_rows, up_cols, up_products, u_hi, u_lo, v_hi, v_lo, u_factor,
          totals, row_sums, col_sums, by_params, kept_hi, kept_lo, kept_scales,
          rows_x, rows_y, width, u_width, n_x, second_x, m_x, n_y, second_y, m_y,
          first_row, row_tiles, col_tiles, split_tiles, strips, first_strips, items, kept_rows,
          DIMS: tl.constexpr, WIDTHS: tl.constexpr, HOW: tl.constexpr, LADDERS: tl.constexpr, FAMILIES: tl.constexpr,
          BEGINS: tl.constexpr, SECOND: tl.constexpr, SYMMETRIC: tl.constexpr, MODE: tl.constexpr,
          TOTALS: tl.constexpr, SUMS: tl.constexpr, COLS: tl.constexpr, WEIGHTED: tl.constexpr, KEEP: tl.constexpr,
          PARAMS: tl.constexpr, ALL: tl.constexpr, U_WIDTH: tl.constexpr, STRIP: tl.constexpr, GROUP: tl.constexpr,
          NEAR: tl.constexpr, SPLIT: tl.constexpr, KEEP_SPLIT: tl.constexpr, U_SPLIT: tl.constexpr,
          BLOCK: tl.constexpr, STEP: tl.constexpr, TYPE: tl.constexpr, UPCAST: tl.constexpr,
          ACC: tl.constexpr):  # fmt: skip
    """Tiles (row, column) of K, of which each program takes `STRIP` columns of one row.

    With `SYMMETRIC` y is x and only pairs i > j count. `MODE` is the derivative U_ij of the result by such a pair's
    kernel: ``"quadratic"`` c a_i b_j, ``"sums"`` r_i + c_j + 2 q K_ij (with both roles of each point where symmetric),
    ``"matmul"`` u_i · v_j, ``"pair"`` (layers from `SECOND` on are the second kernel's), or ``"none"``.
    `TOTALS`: Σ w w K and ΣK², or for a pair ΣKL, ΣKK, ΣLL. `SUMS`: row sums, of c b_j K_ij where weighted, and with
    `COLS` column sums. `KEEP`: ``"kernel"`` or ``"gradient"``, U ∂K/∂measure for each layer.
    """
    pid = tl.program_id(0) % (row_tiles * strips)
    item = (tl.program_id(0) // (row_tiles * strips)).to(tl.int64)
    # Programs that run at once share a square of tiles: what they read stays in the cache.
    group = pid // (GROUP * strips)
    here = tl.minimum(GROUP, row_tiles - group * GROUP)
    local = group * GROUP + (pid % (GROUP * strips)) % here
    strip = (pid % (GROUP * strips)) // here
    row = first_row + local
    begin = strip * STRIP
    end = tl.minimum(begin + STRIP, split_tiles)
    if strip >= first_strips:
        begin = split_tiles + (strip - first_strips) * STRIP
        end = tl.minimum(begin + STRIP, col_tiles)
    if SYMMETRIC:
        end = tl.minimum(end, row + 1)

    layers: tl.constexpr = len(DIMS)
    i = row.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    i_there = (i < n_x) | ((i >= second_x) & (i < second_x + m_x))
    x_hi += item * rows_x * width
    x_lo += item * rows_x * width
    y_hi += item * rows_y * width
    y_lo += item * rows_y * width
    x_norms += item * rows_x * layers
    y_norms += item * rows_y * layers
    total_dim = 0
    for layer in tl.static_range(layers):
        total_dim += DIMS[layer]
    x_cols += item * rows_x * total_dim
    y_cols += item * rows_y * total_dim
    factors += item * layers

    scalar = tl.full((), 1.0, ACC)
    if MODE == "quadratic":
        c_xx, c_yy, c_xy = tl.load(coefs).to(ACC), tl.load(coefs + 1).to(ACC), tl.load(coefs + 2).to(ACC)
        in_y = row.to(tl.int64) * BLOCK >= second_x
        scalar = tl.where(in_y, tl.where(strip >= first_strips, 2 * c_yy, c_xy), 2 * c_xx)
        last = end
        if not ALL:
            end = tl.where(scalar == 0, begin, end)  # what a coefficient leaves out may even be NaN
    if WEIGHTED:
        a = tl.load(x_weights + item * rows_x + i)
    if MODE == "sums":
        by_row = tl.load(up_rows + item * rows_x + i).to(ACC)
        by_square = 2 * tl.load(up_products + item).to(ACC)
    if MODE == "pair":
        by_row = tl.load(up_rows + item * rows_x + i).to(ACC)
        by_row_2 = tl.load(up_cols + item * rows_x + i).to(ACC)
        by_kl = 2 * tl.load(up_products + item * 3).to(ACC)
        by_kk = 4 * tl.load(up_products + item * 3 + 1).to(ACC)
        by_ll = 4 * tl.load(up_products + item * 3 + 2).to(ACC)
    total, squares, cross = tl.full((), 0.0, tl.float64), tl.full((), 0.0, tl.float64), tl.full((), 0.0, tl.float64)
    rows_sum = tl.zeros((BLOCK,), tl.float64)
    rows_sum_2 = tl.zeros((BLOCK,), tl.float64)
    place = tl.arange(0, PARAMS)
    param_sums = tl.zeros((PARAMS,), tl.float64)

    at = tl.arange(0, BLOCK)
    if MODE == "quadratic" and KEEP == "gradient" and not ALL:
        for tile in range(end, last):
            nothing = tl.zeros((BLOCK, BLOCK), ACC)
            inside = (local.to(tl.int64) * BLOCK + at)[:, None] * rows_y + (tile * BLOCK + at)[None, :]
            for layer in tl.static_range(layers):
                _split(nothing, kept_hi, kept_lo, kept_scales,
                       (item * layers + layer) * kept_rows * rows_y + inside,
                       (item * layers + layer) * row_tiles * col_tiles + local * col_tiles + tile, KEEP_SPLIT, TYPE,
                       ACC)  # fmt: skip
    for tile in range(begin, end):
        j = tile * BLOCK + at.to(tl.int64)
        j_there = (j < n_y) | ((j >= second_y) & (j < second_y + m_y))
        seen = i_there[:, None] & j_there[None, :]
        if SYMMETRIC:
            seen = seen & (((row - tile) * BLOCK + at)[:, None] > at[None, :])
        k = tl.full((BLOCK, BLOCK), 1.0, ACC)
        k_2 = tl.full((BLOCK, BLOCK), 1.0, ACC)
        for layer in tl.static_range(layers):
            z = _measure(x_hi, x_lo, x_norms, x_cols, y_hi, y_lo, y_norms, y_cols, factors, i, j, seen, rows_x, rows_y,
                         width, layer, DIMS, WIDTHS, HOW, NEAR, SPLIT, BLOCK, STEP, UPCAST, ACC)  # fmt: skip
            v, h = _terms(z, params, FAMILIES, BEGINS[layer], BEGINS[layer + 1] - BEGINS[layer], LADDERS[layer], ACC)
            if layer < SECOND:
                k = k * v
            else:
                k_2 = k_2 * v
        k = tl.where(seen, k, 0)
        if layers > SECOND:
            k_2 = tl.where(seen, k_2, 0)
        if WEIGHTED:
            b = tl.load(y_weights + item * rows_y + j)

        if TOTALS:
            if MODE == "pair" or layers > SECOND:
                total += _total(k * k_2)
                squares += _total(k * k)
                cross += _total(k_2 * k_2)
            elif WEIGHTED:
                total += tl.sum(tl.sum(k * b[None, :], 1).to(tl.float64) * a.to(tl.float64), 0)
            else:
                total += _total(k)
                if MODE != "quadratic":
                    squares += _total(k * k)
        if SUMS:
            part = k
            if WEIGHTED:
                part = k * b[None, :]
            rows_sum += tl.sum(part, 1).to(tl.float64) * scalar.to(tl.float64)
            if layers > SECOND:
                rows_sum_2 += tl.sum(k_2, 1).to(tl.float64)
        if COLS:
            part = k
            if WEIGHTED:
                part = k * a[:, None]
            to = (item * row_tiles + local) * rows_y + j
            tl.store(col_sums + to, tl.sum(part, 0) * scalar)
            if layers > SECOND:
                tl.store(col_sums + to + tl.cast(items, tl.int64) * row_tiles * rows_y, tl.sum(k_2, 0))
        inside = (local.to(tl.int64) * BLOCK + tl.arange(0, BLOCK))[:, None] * rows_y + j[None, :]
        panel = tl.cast(kept_rows, tl.int64) * rows_y
        tile_at = local.to(tl.int64) * col_tiles + tile
        tile_count = tl.cast(row_tiles, tl.int64) * col_tiles
        if KEEP == "kernel":
            _split(k, kept_hi, kept_lo, kept_scales, item * panel + inside, item * tile_count + tile_at, KEEP_SPLIT,
                   TYPE, ACC)  # fmt: skip
        if KEEP == "gradient" or PARAMS > 1:
            u = scalar
            u_2 = scalar
            if MODE == "sums":
                by_col = tl.load(up_cols + item * rows_y + j).to(ACC)
                u = by_row[:, None] + by_col[None, :] + (2 if SYMMETRIC else 1) * by_square * k
            elif MODE == "pair":
                u = by_row[:, None] + tl.load(up_rows + item * rows_y + j).to(ACC)[None, :] + by_kl * k_2 + by_kk * k
                u_2 = by_row_2[:, None] + tl.load(up_cols + item * rows_y + j).to(ACC)[None, :]
                u_2 += by_kl * k + by_ll * k_2
            elif MODE == "matmul":
                ux, vy = item * rows_x * u_width, item * rows_y * u_width
                u = _dots(u_hi + ux, u_lo + ux, v_hi + vy, v_lo + vy, i, j, u_width, 0, U_WIDTH, U_SPLIT, BLOCK, STEP,
                          UPCAST, ACC)  # fmt: skip
                if SYMMETRIC:
                    u += _dots(v_hi + vy, v_lo + vy, u_hi + ux, u_lo + ux, i, j, u_width, 0, U_WIDTH, U_SPLIT, BLOCK,
                               STEP, UPCAST, ACC)  # fmt: skip
                u = u * tl.load(u_factor + item).to(ACC)
            if WEIGHTED:
                u = u * (a[:, None] * b[None, :])
            for layer in tl.static_range(layers):
                w = u
                if layer >= SECOND:
                    w = u_2
                if layers > 1:
                    # The other layers of the product, once more: keeping their tiles would leave no registers.
                    for other in tl.static_range(layers):
                        if other != layer and (other < SECOND) == (layer < SECOND):
                            z = _measure(x_hi, x_lo, x_norms, x_cols, y_hi, y_lo, y_norms, y_cols, factors, i, j, seen,
                                         rows_x, rows_y, width, other, DIMS, WIDTHS, HOW, NEAR, SPLIT, BLOCK, STEP,
                                         UPCAST, ACC)  # fmt: skip
                            v, h = _terms(z, params, FAMILIES, BEGINS[other], BEGINS[other + 1] - BEGINS[other],
                                          LADDERS[other], ACC)  # fmt: skip
                            w = w * v
                    z = _measure(x_hi, x_lo, x_norms, x_cols, y_hi, y_lo, y_norms, y_cols, factors, i, j, seen, rows_x,
                                 rows_y, width, layer, DIMS, WIDTHS, HOW, NEAR, SPLIT, BLOCK, STEP, UPCAST,
                                 ACC)  # fmt: skip
                    v, h = _terms(z, params, FAMILIES, BEGINS[layer], BEGINS[layer + 1] - BEGINS[layer],
                                  LADDERS[layer], ACC)  # fmt: skip
                if PARAMS > 1:
                    masked = tl.where(seen, w, 0)
                    z_seen = tl.where(seen, z, 0)
                    for t in tl.static_range(len(FAMILIES)):
                        if t >= BEGINS[layer] and t < BEGINS[layer + 1]:
                            param_sums += _parameter_sums(z_seen, masked, params, place, t, FAMILIES[t], ACC)
                if KEEP == "gradient":
                    _split(tl.where(seen, w * h, 0), kept_hi, kept_lo, kept_scales,
                           (item * layers + layer) * panel + inside, (item * layers + layer) * tile_count + tile_at,
                           KEEP_SPLIT, TYPE, ACC)  # fmt: skip

    out = (item * row_tiles + local) * strips + strip
    if TOTALS:
        tl.store(totals + out * 3, total)
        tl.store(totals + out * 3 + 1, squares)
        tl.store(totals + out * 3 + 2, cross)
    if SUMS:
        to = ((item * row_tiles + local) * strips + strip) * BLOCK + at
        tl.store(row_sums + to, rows_sum)
        if layers > SECOND:
            tl.store(row_sums + to + tl.cast(items, tl.int64) * row_tiles * strips * BLOCK, rows_sum_2)
    if PARAMS > 1:
        tl.store(by_params + out * PARAMS + place, param_sums)


# ---- Products of what the sweep has kept


@triton.jit
def multiply(kept_hi, kept_lo, kept_scales, z_hi, z_lo, own_hi, own_lo, inverses, out,
             panel_rows, panel_cols, width, column, own_column, dim, out_rows, out_width, out_column, out_first,
             row_tiles, col_tiles, first_row, out_tiles, layers, layer, kept_stride, z_rows, own_rows, splits,
             TRANSPOSED: tl.constexpr, SYMMETRIC: tl.constexpr, DIFFERENCES: tl.constexpr, ALPHA: tl.constexpr,
             KEEP_SPLIT: tl.constexpr, SPLIT: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr,
             COLS: tl.constexpr, UPCAST: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """out += ALPHA · G z, or Gᵀ z with `TRANSPOSED`; with `DIFFERENCES` ALPHA · Σ_j G_ij (own_i - z_j).

    G is a panel (panel_rows, panel_cols) of tiles with their scales; its rows begin at tile ``first_row`` of all. Each
    program adds up tiles in their order, in one of ``splits`` shares.
    """
    tile, item = tl.program_id(0) % out_tiles, (tl.program_id(0) // out_tiles).to(tl.int64)
    d = tl.program_id(1) * COLS + tl.arange(0, COLS)
    share = tl.program_id(2)
    if TRANSPOSED:
        begin, end = 0, row_tiles
        if SYMMETRIC:
            begin = tl.maximum(tile - first_row, 0)
    else:
        begin, end = 0, col_tiles
        if SYMMETRIC:
            end = tl.minimum(first_row + tile + 1, col_tiles)
    each = tl.cdiv(end - begin, splits)
    begin = begin + share * each
    end = tl.minimum(begin + each, end)

    inside = d < dim
    b = tl.arange(0, BLOCK)
    r = tile.to(tl.int64) * BLOCK + b
    acc = tl.zeros((BLOCK, COLS), ACC)
    weight = tl.zeros((BLOCK,), ACC)
    base = item * kept_stride + tl.cast(layer, tl.int64) * panel_rows * panel_cols
    scale_base = (item * layers + layer) * row_tiles * col_tiles
    for k in range(begin, end):
        q = k * BLOCK + b.to(tl.int64)
        if TRANSPOSED:
            at = base + q[None, :] * panel_cols + r[:, None]
            scale = tl.load(kept_scales + scale_base + k * col_tiles + tile)
            source = tl.cast(first_row, tl.int64) * BLOCK + q
        else:
            at = base + r[:, None] * panel_cols + q[None, :]
            scale = tl.load(kept_scales + scale_base + tile * col_tiles + k)
            source = q
        from_z = (item * z_rows + source)[:, None] * width + (column + d)[None, :]
        g = tl.load(kept_hi + at)
        z = tl.load(z_hi + from_z, mask=inside[None, :], other=0)
        if UPCAST:
            g, z = g.to(ACC), z.to(ACC)
        part = tl.dot(g, z, out_dtype=ACC)
        if DIFFERENCES:
            weight += tl.sum(g.to(ACC), 1) * scale
        if KEEP_SPLIT == 2:
            low = tl.load(kept_lo + at)
            if UPCAST:
                low = low.to(ACC)
            part = tl.dot(low, z, part, out_dtype=ACC)
            if DIFFERENCES:
                weight += tl.sum(low.to(ACC), 1) * scale
        if SPLIT == 2:
            z_low = tl.load(z_lo + from_z, mask=inside[None, :], other=0)
            if UPCAST:
                z_low = z_low.to(ACC)
            part = tl.dot(g, z_low, part, out_dtype=ACC)
        acc += part * scale

    if DIFFERENCES:
        own = r if TRANSPOSED else tl.cast(first_row, tl.int64) * BLOCK + r
        at = (item * own_rows + own)[:, None] * width + (own_column + d)[None, :]
        point = tl.load(own_hi + at, mask=inside[None, :], other=0).to(ACC)
        if SPLIT == 2:
            point += tl.load(own_lo + at, mask=inside[None, :], other=0).to(ACC)
        acc = weight[:, None] * point - acc
    acc = acc * (tl.load(inverses + item * layers + layer).to(ACC) * ALPHA)
    to = ((share * (tl.num_programs(0) // out_tiles) + item) * out_rows + out_first + r)[:, None] * out_width
    to = to + (out_column + d)[None, :]
    if ADD:
        acc += tl.load(out + to, mask=inside[None, :], other=0)
    tl.store(out + to, acc, mask=inside[None, :])


@triton.jit
def signs(kept_hi, kept_lo, kept_scales, own_cols, z_cols, out,
          panel_rows, panel_cols, column, dim, out_rows, out_width, out_column, out_first, own_rows, z_rows, total_cols,
          row_tiles, col_tiles, first_row, out_tiles, layers, layer, kept_stride,
          TRANSPOSED: tl.constexpr, SYMMETRIC: tl.constexpr, KEEP_SPLIT: tl.constexpr, BLOCK: tl.constexpr,
          UPCAST: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """out += Σ_j G_ij sign(own_i - z_j) of one column: the gradient of L1 distances."""
    tile, c = tl.program_id(0) % out_tiles, tl.program_id(1)
    item = (tl.program_id(0) // out_tiles).to(tl.int64)
    if TRANSPOSED:
        begin, end = 0, row_tiles
        if SYMMETRIC:
            begin = tl.maximum(tile - first_row, 0)
    else:
        begin, end = 0, col_tiles
        if SYMMETRIC:
            end = tl.minimum(first_row + tile + 1, col_tiles)
    b = tl.arange(0, BLOCK)
    r = tile.to(tl.int64) * BLOCK + b
    base = item * kept_stride + tl.cast(layer, tl.int64) * panel_rows * panel_cols
    scale_base = (item * layers + layer) * row_tiles * col_tiles
    own = r if TRANSPOSED else tl.cast(first_row, tl.int64) * BLOCK + r
    x = tl.load(own_cols + (item * total_cols + column + c) * own_rows + own)
    acc = tl.zeros((BLOCK,), ACC)
    for k in range(begin, end):
        q = k * BLOCK + b.to(tl.int64)
        if TRANSPOSED:
            at = base + q[None, :] * panel_cols + r[:, None]
            scale = tl.load(kept_scales + scale_base + k * col_tiles + tile)
            source = tl.cast(first_row, tl.int64) * BLOCK + q
        else:
            at = base + r[:, None] * panel_cols + q[None, :]
            scale = tl.load(kept_scales + scale_base + tile * col_tiles + k)
            source = q
        g = tl.load(kept_hi + at).to(ACC)
        if KEEP_SPLIT == 2:
            g += tl.load(kept_lo + at).to(ACC)
        z = tl.load(z_cols + (item * total_cols + column + c) * z_rows + source)
        d = x[:, None] - z[None, :]
        acc += tl.sum(tl.where(d > 0, g, tl.where(d < 0, -g, d * g)), 1) * scale
    at = (item * out_rows + out_first + r) * out_width + out_column + c
    tl.store(out + at, tl.load(out + at) + acc)


# ---- Order statistics


@triton.jit
def _bits(s, INT: tl.constexpr):
    """Squared distances as whole numbers in the same order; NaN after infinity."""
    return tl.where(s == s, s, float("nan")).to(INT, bitcast=True)


@triton.jit
def count_digits(x_hi, x_lo, x_norms, x_cols, y_hi, y_lo, y_norms, y_cols, factors, prefixes, counts, found,
                 rows_x, rows_y, width, n_x, n_y, col_tiles, strips, shift, digit_bits, ranks,
                 DIMS: tl.constexpr, WIDTHS: tl.constexpr, HOW: tl.constexpr, SYMMETRIC: tl.constexpr,
                 FIND: tl.constexpr, BINS: tl.constexpr, STRIP: tl.constexpr, NEAR: tl.constexpr, SPLIT: tl.constexpr,
                 BLOCK: tl.constexpr, STEP: tl.constexpr, UPCAST: tl.constexpr, INT: tl.constexpr,
                 ACC: tl.constexpr):  # fmt: skip
    """Counts the next digit of the squared distances whose leading digits are ``prefixes`` (one for each rank).

    With `FIND` the first pair whose distance is the prefix: ``found`` takes the least i · rows_y + j.
    """
    pid = tl.program_id(0)
    row, strip = (pid // strips).to(tl.int64), pid % strips
    i = row * BLOCK + tl.arange(0, BLOCK)
    end = tl.minimum((strip + 1) * STRIP, col_tiles)
    if SYMMETRIC:
        end = tl.minimum(end, row.to(tl.int32) + 1)
    bins = tl.arange(0, BINS)
    for tile in range(strip * STRIP, end):
        j = tile * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
        seen = (i < n_x)[:, None] & (j < n_y)[None, :]
        if SYMMETRIC:
            seen = seen & (i[:, None] > j[None, :])
        s = _measure(x_hi, x_lo, x_norms, x_cols, y_hi, y_lo, y_norms, y_cols, factors, i, j, seen, rows_x, rows_y,
                     width, 0, DIMS, WIDTHS, HOW, NEAR, SPLIT, BLOCK, STEP, UPCAST, ACC)  # fmt: skip
        bits = _bits(s, INT)
        for r in range(0, ranks):
            prefix = tl.load(prefixes + r)
            if FIND:
                at = i[:, None] * rows_y + j[None, :]
                at = tl.where(seen & (bits == prefix), at, 0x7FFFFFFFFFFFFFFF)
                tl.atomic_min(found + r, tl.min(tl.min(at, 1), 0))
            else:
                # In two steps, since a shift by all bits is not defined.
                match = seen & ((bits >> shift >> digit_bits) == prefix)
                digit = ((bits >> shift) & ((1 << digit_bits) - 1)).to(tl.int32)
                flat = tl.reshape(tl.where(match, digit, BINS - 1), (BLOCK * BLOCK,))
                many = tl.histogram(flat, BINS)
                missing = BLOCK * BLOCK - tl.sum(tl.sum(match.to(tl.int32), 1), 0)
                many = many - tl.where(bins == BINS - 1, missing, 0)
                tl.atomic_add(counts + r * BINS + bins, many.to(tl.int64), mask=many > 0)
