"""Triton kernels that prepare points: padded, centred, and split into parts that the tensor cores multiply.

Rows are padded with zeros to whole tiles, each layer's columns to whole steps, and float32 becomes the sum of two
float16 parts of 11 bits, scaled by a power of two to the top of float16's range. The three products hi·hi + hi·lo +
lo·hi are then good to 22 bits, the same as float32 within a bit, in three passes of the tensor cores; two bfloat16
parts would give 16 bits for the same work, and three TF32 products 22 bits for twice as much.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def extents(x, mean, out, n, stride_b, stride_n, stride_d, blocks, first, out_blocks,
            DIMS: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """The largest finite |x - mean| of a block of rows, for each layer: ``out`` (b, layers, …) from ``first`` on."""
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
        tl.store(out + (item * len(DIMS) + layer) * out_blocks + first + block, tl.max(most, 0))
        start += DIMS[layer]


@triton.jit
def powers(most, scales, inverses, factors, blocks, MOST: tl.constexpr, LANES: tl.constexpr):
    """The power of two that takes the largest of ``blocks`` below 2^15, its inverse and the inverse's square.

    A program does what is one of ``most`` (b · layers, blocks), not negative and finite. No power is beyond 2^±MOST.
    """
    pid = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, LANES)
    top = tl.zeros((LANES,), tl.float32)
    for first in range(0, blocks, LANES):
        found = tl.load(most + pid * blocks + first + lanes, mask=first + lanes < blocks, other=0)
        top = tl.maximum(top, found)
    top = tl.max(top, 0)
    exponent = ((top.to(tl.int32, bitcast=True) >> 23) & 0xFF) - 126
    power = 15 - tl.where(top > 0, exponent, 0)
    power = tl.minimum(tl.maximum(power, -MOST), MOST)
    tl.store(scales + pid, ((127 + power) << 23).to(tl.float32, bitcast=True))
    tl.store(inverses + pid, ((127 - power) << 23).to(tl.float32, bitcast=True))
    tl.store(factors + pid, ((127 - 2 * power) << 23).to(tl.float32, bitcast=True))


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
