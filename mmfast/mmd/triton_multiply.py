"""Triton kernels that multiply the tiles `mmfast.mmd.triton_sweep` has kept with points, or with differences' signs."""

from __future__ import annotations

import triton
import triton.language as tl


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
