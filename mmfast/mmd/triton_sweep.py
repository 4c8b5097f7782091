"""Triton kernels that pass over the tiles of a kernel matrix: reduced, kept for a product, or counted for a quantile.

Points come from `mmfast.mmd.triton_prepare`. A tile of the gradient's weights is kept as two parts in the same way,
scaled by the largest of its entries, and multiplied with the points by `mmfast.mmd.triton_multiply`.

Loads are upcast at once where `UPCAST` says that Triton interprets: its bfloat16 is an integer there.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mmfast.mmd.triton_terms import _not_negative, _parameter_sums, _terms, _total

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
def _inside(first, BLOCK: tl.constexpr, n, second, m):
    """True where each row of a block, from row ``first`` on, is a point of one sample or of the other."""
    return (first + BLOCK <= n) | ((first >= second) & (first + BLOCK <= second + m))


@triton.jit
def _seen(i, j, n_x, second_x, m_x, n_y, second_y, m_y, SYMMETRIC: tl.constexpr):
    """The pairs of a tile that count."""
    i_there = (i < n_x) | ((i >= second_x) & (i < second_x + m_x))
    j_there = (j < n_y) | ((j >= second_y) & (j < second_y + m_y))
    seen = i_there[:, None] & j_there[None, :]
    if SYMMETRIC:
        seen = seen & (i[:, None] > j[None, :])
    return seen


@triton.jit
def _measure(x_hi, x_lo, x_norms, x_cols, y_hi, y_lo, y_norms, y_cols, factors, i, j, n_x, second_x, m_x, n_y, second_y,
             m_y, rows_x, rows_y, width, SYMMETRIC: tl.constexpr,
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
                near = z < norm * NEAR
                if tl.max(tl.max(near.to(tl.int32), 1), 0) > 0:
                    near = near & _seen(i, j, n_x, second_x, m_x, n_y, second_y, m_y, SYMMETRIC)
                    if tl.max(tl.max(near.to(tl.int32), 1), 0) > 0:
                        exact = _differences(x_cols, y_cols, i, j, rows_x, rows_y, column, DIMS[LAYER], True, BLOCK,
                                             ACC)  # fmt: skip
                        z = tl.where(near, exact, z)
            z = _not_negative(z, ACC)
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
        most = tl.max(tl.max(size, 1), 0)
        if (most < float("inf")) == 0:  # the largest that is finite
            most = tl.max(tl.max(tl.where(size < float("inf"), size, 0), 1), 0)
        most = tl.where(most < 1e-30, 1e-30, most)
        scaled = value * (16384.0 / most)
        head = scaled.to(TYPE)
        tl.store(hi + at, head)
        if SPLIT == 2:
            tl.store(lo + at, (scaled - head.to(ACC)).to(TYPE))
        tl.store(scales + scale_at, most / 16384.0)


@triton.jit
def sweep(x_hi, x_lo, x_norms, x_cols, y_hi, y_lo, y_norms, y_cols, factors, table,
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
    row_whole = _inside(row.to(tl.int64) * BLOCK, BLOCK, n_x, second_x, m_x)
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
        # Nearly all tiles have every pair: only the others are masked, since that takes as long as five exponentials.
        whole = row_whole & _inside(tl.cast(tile, tl.int64) * BLOCK, BLOCK, n_y, second_y, m_y)
        if SYMMETRIC:
            whole = whole & (tile < row)
        k = tl.full((BLOCK, BLOCK), 1.0, ACC)
        k_2 = tl.full((BLOCK, BLOCK), 1.0, ACC)
        for layer in tl.static_range(layers):
            z = _measure(x_hi, x_lo, x_norms, x_cols, y_hi, y_lo, y_norms, y_cols, factors, i, j, n_x, second_x, m_x,
                         n_y, second_y, m_y, rows_x, rows_y, width, SYMMETRIC, layer, DIMS, WIDTHS, HOW, NEAR, SPLIT,
                         BLOCK, STEP, UPCAST, ACC)  # fmt: skip
            v, h = _terms(z, table, FAMILIES, BEGINS[layer], BEGINS[layer + 1] - BEGINS[layer], LADDERS[layer], ACC)
            if layer < SECOND:
                k = k * v
            else:
                k_2 = k_2 * v
        if WEIGHTED:
            b = tl.load(y_weights + item * rows_y + j)
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
            if layers == 1:
                g = u * h
                if PARAMS > 1:
                    u = tl.zeros((BLOCK, BLOCK), ACC) + u
        if not whole:  # of one layer everything at once: the compiler computes a second mask for all tiles
            seen = _seen(i, j, n_x, second_x, m_x, n_y, second_y, m_y, SYMMETRIC)
            k = tl.where(seen, k, 0)
            if layers > SECOND:
                k_2 = tl.where(seen, k_2, 0)
            if layers == 1:
                if KEEP == "gradient":
                    g = tl.where(seen, g, 0)
                if PARAMS > 1:
                    u = tl.where(seen, u, 0)
                    z = tl.where(seen, z, 0)

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
            for layer in tl.static_range(layers):
                w = u
                if layer >= SECOND:
                    w = u_2
                if layers > 1:
                    # The other layers of the product, once more: keeping their tiles would leave no registers.
                    for other in tl.static_range(layers):
                        if other != layer and (other < SECOND) == (layer < SECOND):
                            z = _measure(x_hi, x_lo, x_norms, x_cols, y_hi, y_lo, y_norms, y_cols, factors, i, j,
                                         n_x, second_x, m_x, n_y, second_y, m_y, rows_x, rows_y, width, SYMMETRIC,
                                         other, DIMS, WIDTHS, HOW, NEAR, SPLIT, BLOCK, STEP, UPCAST, ACC)  # fmt: skip
                            v, h = _terms(z, table, FAMILIES, BEGINS[other], BEGINS[other + 1] - BEGINS[other],
                                          LADDERS[other], ACC)  # fmt: skip
                            w = w * v
                    z = _measure(x_hi, x_lo, x_norms, x_cols, y_hi, y_lo, y_norms, y_cols, factors, i, j, n_x,
                                 second_x, m_x, n_y, second_y, m_y, rows_x, rows_y, width, SYMMETRIC, layer, DIMS,
                                 WIDTHS, HOW, NEAR, SPLIT, BLOCK, STEP, UPCAST, ACC)  # fmt: skip
                    v, h = _terms(z, table, FAMILIES, BEGINS[layer], BEGINS[layer + 1] - BEGINS[layer],
                                  LADDERS[layer], ACC)  # fmt: skip
                    g = w * h
                    if not whole:
                        seen = _seen(i, j, n_x, second_x, m_x, n_y, second_y, m_y, SYMMETRIC)
                        g = tl.where(seen, g, 0)
                        if PARAMS > 1:
                            w = tl.where(seen, w, 0)
                            z = tl.where(seen, z, 0)
                if PARAMS > 1:
                    for t in tl.static_range(len(FAMILIES)):
                        if t >= BEGINS[layer] and t < BEGINS[layer + 1]:
                            param_sums += _parameter_sums(z, w, table, place, t, FAMILIES[t], ACC)
                if KEEP == "gradient":
                    _split(g, kept_hi, kept_lo, kept_scales, (item * layers + layer) * panel + inside,
                           (item * layers + layer) * tile_count + tile_at, KEEP_SPLIT, TYPE, ACC)  # fmt: skip

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
        s = _measure(x_hi, x_lo, x_norms, x_cols, y_hi, y_lo, y_norms, y_cols, factors, i, j, n_x, rows_x, 0, n_y,
                     rows_y, 0, rows_x, rows_y, width, SYMMETRIC, 0, DIMS, WIDTHS, HOW, NEAR, SPLIT, BLOCK, STEP,
                     UPCAST, ACC)  # fmt: skip
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
