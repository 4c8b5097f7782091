"""Quadratic forms of points of few features, and their gradients, in one launch that keeps no tile of the matrix.

Note: [Rows that own their gradient]
  `mmfast.mmd.triton_sweep` looks at each pair once and keeps the gradient's weights in memory, to multiply them with
  the points of both sides: 3 products of D features for a pair, and 4 bytes written once and read twice. With up to 128
  features the bytes and the launches take longer than products do. Here a program holds a block of rows, their points
  and their gradient, and passes over columns: each pair is seen from both sides, which is 4 products instead of 3 and
  its kernel twice, and nothing but the result is written.

  The weights of a tile are two parts, as the points are, about the largest of their row so far: what has been added up
  is rescaled when a larger one comes. A block of columns is half as wide as the rows are many, so that registers hold
  everything for two programs on a multiprocessor, of which one multiplies while the other evaluates kernels.
"""

from __future__ import annotations

import dataclasses
import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmfast._launch import launch_as_given
from mmfast.mmd.triton_launch import Problem, processors
from mmfast.mmd.triton_points import BY_DOT, BY_PRODUCTS, INTERPRETED, Format, Layout, triton_type
from mmfast.mmd.triton_sweep import _inside
from mmfast.mmd.triton_terms import _doubles, _not_negative, _rate, _terms
from mmfast.mmd.triton_tuning import Sizes

MOST_FEATURES = 128


@triton.jit
def _counting(t, whole, i, j, n, second, m, GRAD: tl.constexpr):
    """0 where a pair does not count: nearly all tiles are ``whole``."""
    if not whole:
        i_there = (i < n) | ((i >= second) & (i < second + m))
        j_there = (j < n) | ((j >= second) & (j < second + m))
        seen = i_there[:, None] & j_there[None, :]
        seen = seen & ((i[:, None] != j[None, :]) if GRAD else (i[:, None] > j[None, :]))
        t = tl.where(seen, t, 0)
    return t


@triton.jit
def _gaussian_rows(z, table, whole, i, j, n, second, m, COUNT: tl.constexpr, GRAD: tl.constexpr):
    """Rows' sums of Σ w exp(-γ z), and its derivative; see `mmfast.mmd.triton_terms`.

    Each term is added up by itself: a tile of values beside that of derivatives would take too many registers.
    """
    if _doubles(table, 0, COUNT, tl.float32):
        last = table + (COUNT - 1) * 4
        w, g = tl.load(last).to(tl.float32), tl.load(last + 1).to(tl.float32)
        u = _counting(tl.exp2(z * _rate(last, tl.float32)), whole, i, j, n, second, m, GRAD)
        sums = w * tl.sum(u, 1)
        h = (-g * w) * u
        for t in tl.static_range(COUNT - 1):
            at = table + (COUNT - 2 - t) * 4
            w, g = tl.load(at).to(tl.float32), tl.load(at + 1).to(tl.float32)
            u = u * u
            sums += w * tl.sum(u, 1)
            h += (-g * w) * u
    else:
        w, g = tl.load(table).to(tl.float32), tl.load(table + 1).to(tl.float32)
        u = _counting(tl.exp2(z * _rate(table, tl.float32)), whole, i, j, n, second, m, GRAD)
        sums = w * tl.sum(u, 1)
        h = (-g * w) * u
        for t in tl.static_range(1, COUNT):
            at = table + t * 4
            w, g = tl.load(at).to(tl.float32), tl.load(at + 1).to(tl.float32)
            u = _counting(tl.exp2(z * _rate(at, tl.float32)), whole, i, j, n, second, m, GRAD)
            sums += w * tl.sum(u, 1)
            h += (-g * w) * u
    return sums, h


@triton.jit
def narrow(hi, lo, norms, factors, table, coefs, inverses, totals, grads,
           rows, n, second, m, row_tiles, col_tiles, split_tiles, strips, first_strips, items, STRIP,
           FAMILIES: tl.constexpr, LADDER: tl.constexpr, DOT: tl.constexpr, GRAD: tl.constexpr, ALL: tl.constexpr,
           OWN: tl.constexpr, SPLIT: tl.constexpr, KEEP_SPLIT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
           WIDTH: tl.constexpr, TYPE: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """A block of `ROWS` rows with ``STRIP`` blocks of `COLS` columns of one sample: their part of the sums.

    ``totals`` (b, row_tiles, strips): of pairs i > j, or with `GRAD` of all with i != j. ``grads`` (strips, b, rows,
    WIDTH): what these columns add to the gradient. With `OWN` the weights' sum is that of their parts: points that are
    not centred need it.
    """
    pid = tl.program_id(0) % (row_tiles * strips)
    item = (tl.program_id(0) // (row_tiles * strips)).to(tl.int64)
    row, strip = pid % row_tiles, pid // row_tiles
    begin = strip * STRIP
    end = tl.minimum(begin + STRIP, split_tiles)
    if strip >= first_strips:
        begin = split_tiles + (strip - first_strips) * STRIP
        end = tl.minimum(begin + STRIP, col_tiles)
    if not GRAD:
        end = tl.minimum(end, (row + 1) * (ROWS // COLS))
    first = row.to(tl.int64) * ROWS
    of_y, with_y = first >= second, strip >= first_strips
    c_xx, c_yy, c_xy = tl.load(coefs), tl.load(coefs + 1), tl.load(coefs + 2)
    scalar = tl.where(of_y == with_y, tl.where(of_y, 2 * c_yy, 2 * c_xx), c_xy)
    if not ALL:
        end = tl.where(scalar == 0, begin, end)  # what a coefficient leaves out may even be NaN

    hi += item * rows * WIDTH
    lo += item * rows * WIDTH
    norms += item * rows
    i = first + tl.arange(0, ROWS)
    d = tl.arange(0, WIDTH)
    at = tl.arange(0, COLS)
    row_whole = _inside(first, ROWS, n, second, m)
    factor = tl.load(factors + item)
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
    for tile in range(begin, end):
        start = tl.cast(tile, tl.int64) * COLS
        j = start + at
        b = tl.load(hi + j[:, None] * WIDTH + d[None, :])
        b_lo = b
        b_norms = tl.load(norms + j)
        if SPLIT == 2:
            b_lo = tl.load(lo + j[:, None] * WIDTH + d[None, :])
        if UPCAST:
            b, b_lo = b.to(tl.float32), b_lo.to(tl.float32)
        z = tl.dot(a, tl.trans(b), out_dtype=tl.float32)
        if SPLIT == 2:
            z = tl.dot(a, tl.trans(b_lo), z, out_dtype=tl.float32)
            z = tl.dot(a_lo, tl.trans(b), z, out_dtype=tl.float32)
        z = z * (factor if DOT else -2 * factor)
        if not DOT:
            z = _not_negative((a_norms[:, None] + b_norms[None, :]) + z, tl.float32)
        whole = row_whole & _inside(start, COLS, n, second, m)
        whole = whole & ((start + COLS <= first) | (GRAD & (start >= first + ROWS)))
        if LADDER:
            sums, h = _gaussian_rows(z, table, whole, i, j, n, second, m, len(FAMILIES), GRAD)
        else:
            v, h = _terms(z, table, FAMILIES, 0, len(FAMILIES), False, tl.float32)
            h = _counting(h, whole, i, j, n, second, m, GRAD)
            sums = tl.sum(_counting(v, whole, i, j, n, second, m, GRAD), 1)
        total += sums.to(tl.float64)
        if GRAD:
            size = tl.max(tl.abs(h), 1)
            now = tl.maximum(most, tl.where(size < float("inf"), size, 0))
            shrink = most / now
            most = now
            g = h * (16384.0 / now)[:, None]
            head = g.to(TYPE)
            if UPCAST:
                head = head.to(tl.float32)
            weight = weight * shrink
            if not OWN:
                weight += tl.sum(g, 1)
            else:
                weight += tl.sum(head.to(tl.float32), 1)
            acc = tl.dot(head, b, acc * shrink[:, None], out_dtype=tl.float32)
            if KEEP_SPLIT == 2:
                low = (g - head.to(tl.float32)).to(TYPE)
                if UPCAST:
                    low = low.to(tl.float32)
                if OWN:
                    weight += tl.sum(low.to(tl.float32), 1)
                acc = tl.dot(low, b, acc, out_dtype=tl.float32)
            if SPLIT == 2:
                acc = tl.dot(head, b_lo, acc, out_dtype=tl.float32)

    tl.store(totals + (item * row_tiles + row) * strips + strip, tl.sum(total, 0))
    if GRAD:
        if not DOT:
            own = tl.load(hi + i[:, None] * WIDTH + d[None, :]).to(tl.float32)
            if SPLIT == 2:
                own += tl.load(lo + i[:, None] * WIDTH + d[None, :]).to(tl.float32)
            acc = 2 * (weight[:, None] * own - acc)
        acc = acc * (most * (scalar.to(tl.float32) * tl.load(inverses + item) / 16384.0))[:, None]
        to = (strip.to(tl.int64) * items + item) * rows + i
        tl.store(grads + to[:, None] * WIDTH + d[None, :], acc)


@triton.jit
def combine(totals, coefs, sums, value, row_tiles, strips, of_x, first_strips, TWICE: tl.constexpr,
            LANES: tl.constexpr):  # fmt: skip
    """``sums`` (b, 3) from what programs have found, and their combination ``value`` (b)."""
    item = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, LANES)
    xx, yy, xy = tl.zeros((LANES,), tl.float64), tl.zeros((LANES,), tl.float64), tl.zeros((LANES,), tl.float64)
    for first in range(0, row_tiles * strips, LANES):
        at = first + lanes
        found = tl.load(totals + item * row_tiles * strips + at, mask=at < row_tiles * strips, other=0)
        of_y, with_y = at // strips >= of_x, at % strips >= first_strips
        xx += tl.where(of_y | with_y, 0, found)
        yy += tl.where(of_y & with_y, found, 0)
        xy += tl.where(of_y & (with_y == 0), found, 0)
    s_xx, s_yy, s_xy = tl.sum(xx, 0) * TWICE, tl.sum(yy, 0) * TWICE, tl.sum(xy, 0)
    tl.store(sums + item * 3, s_xx)
    tl.store(sums + item * 3 + 1, s_yy)
    tl.store(sums + item * 3 + 2, s_xy)
    tl.store(value + item, s_xx * tl.load(coefs) + s_yy * tl.load(coefs + 1) + s_xy * tl.load(coefs + 2))


def takes(plan: Layout, kind: Format) -> bool:
    """One layer of few features, whose pairs are measured by products on tensor cores."""
    return (
        plan.layers == 1
        and plan.how[0] in (BY_PRODUCTS, BY_DOT)
        and plan.dims[0] <= MOST_FEATURES
        and kind.compute != torch.float64
    )


def _shape(width: int, gradient: bool, old: bool) -> tuple[int, int, int, int | None]:
    """Rows and columns of a program's tiles, warps, and registers: two programs share a multiprocessor.

    ``old``: before sm_90, where tensor cores take their operands from registers.
    """
    if INTERPRETED:
        return 32, 16, 4, None
    return (128, 64, 8, 128) if width <= 64 and not (old and gradient) else (64, 64, 4, None)


@functools.cache
def _old(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0)


def sizes(found: Sizes, dim: int) -> Sizes:
    """All features in one step."""
    block = 32 if INTERPRETED else 128
    return dataclasses.replace(found, block=block, step=max(16, triton.next_power_of_2(dim)))


def quadratic(problem: Problem, coefs: Tensor, gradient: bool, all_sums: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Sums (b, 3) over pairs with i != j of x, of y and of both, after their combination; its gradient (b, rows, D)."""
    z, kind, plan = problem.x, problem.kind, problem.layout
    b, device = problem.items, z.hi.device
    rows, cols, warps, registers = _shape(z.width, gradient, _old(device))
    row_tiles, col_tiles, split = z.rows // rows, z.rows // cols, z.second // cols
    # Enough programs to keep everyone at work, of which some end early where each pair is seen once.
    wanted = 2 if INTERPRETED else -(-(8 if gradient else 32) * processors(device) // max(1, b * row_tiles))
    strip = max(1, -(-col_tiles // wanted))
    first_strips = triton.cdiv(split, strip)
    strips = first_strips + triton.cdiv(col_tiles - split, strip)
    totals = torch.empty(b, row_tiles, strips, dtype=torch.float64, device=device)
    grads = torch.empty(strips if gradient else 0, b, z.rows, z.width, dtype=torch.float32, device=device)
    launch_as_given(
        narrow, (row_tiles * strips * b,),
        (
            z.hi, z.lo, z.norms, problem.scales.factors, problem.params, coefs, problem.scales.inverses, totals, grads,
            z.rows, z.n, z.second, z.m, row_tiles, col_tiles, split, strips, first_strips, b, strip,
        ),
        dict(
            FAMILIES=plan.families, LADDER=plan.ladders[0], DOT=plan.how[0] == BY_DOT, GRAD=gradient, ALL=all_sums,
            OWN=kind.raw, SPLIT=kind.parts, KEEP_SPLIT=kind.kept_parts, ROWS=rows, COLS=cols, WIDTH=z.width,
            TYPE=triton_type(kind.type), UPCAST=INTERPRETED, num_warps=warps, num_stages=2, maxnreg=registers,
        ),
    )  # fmt: skip
    sums = torch.empty(b, 3, dtype=torch.float64, device=device)
    value = torch.empty(b, dtype=torch.float64, device=device)
    launch_as_given(
        combine, (b,),
        (totals, coefs, sums, value, row_tiles, strips, z.second // rows, first_strips),
        dict(TWICE=1 if gradient else 2, LANES=16 if INTERPRETED else 1024, num_warps=8),
    )  # fmt: skip
    return value, sums, grads.sum(0)[..., : plan.dims[0]] if gradient else None
