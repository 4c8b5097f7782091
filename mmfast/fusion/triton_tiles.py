"""What the Triton kernels of the fusion slice share: how they are given sources, how they read tiles and scores.

Loads are converted at once, to the dtype of the products: on the device that is the dtype they have, in Triton's
interpreter float32, since it knows no bfloat16. Indices are 64-bit before they are multiplied by a stride.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmfast.fusion._inputs import Source

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_INTERPRETED = tl.constexpr(INTERPRETED)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

# What a source has, as bits.
MASK, MASK_BOOL, BIAS, LENGTHS = tl.constexpr(1), tl.constexpr(2), tl.constexpr(4), tl.constexpr(8)
GATE, GATE_WIDE = (
    tl.constexpr(16),
    tl.constexpr(32),
)  # a gate that is a tensor; one that differs from feature to feature


class Ref(NamedTuple):
    """One source as the kernels get it: pointers, sizes and strides (0 where broadcast); what it lacks is not read."""

    key: Tensor
    value: Tensor
    mask: Tensor
    bias: Tensor
    lengths: Tensor
    gate: Tensor
    factor: float  # the gate that is a number
    keys: int
    group: int  # query heads for each key head
    key_strides: tuple[int, int, int, int]
    value_strides: tuple[int, int, int, int]
    mask_strides: tuple[int, int, int, int]
    bias_strides: tuple[int, int, int, int]
    gate_strides: tuple[int, int, int, int]


_NONE = (0, 0, 0, 0)


def strides(x: Tensor | None) -> tuple[int, ...]:
    """Of a tensor that is broadcast along its dimensions of size 1."""
    return (
        _NONE
        if x is None
        else tuple(0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True))
    )


def refs(query: Tensor, sources: Sequence[Source]) -> tuple[tuple[Ref, ...], tuple[int, ...]]:
    """The sources for a kernel, and what each of them has."""
    made, has = [], []
    for key, value, mask, lengths, bias, gate in sources:
        bits = 0
        if mask is not None:
            boolean = mask.dtype == torch.bool
            bits |= MASK_BOOL.value if boolean else MASK.value
            mask = mask.view(torch.uint8) if boolean else mask
        bits |= BIAS.value * (bias is not None) | LENGTHS.value * (lengths is not None)
        tensor = isinstance(gate, Tensor)
        if tensor:
            bits |= GATE.value | GATE_WIDE.value * (gate.shape[3] != 1)
        made.append(
            Ref(
                key,
                value,
                *(query if x is None else x for x in (mask, bias, lengths)),
                gate if tensor else query,
                1.0 if tensor or gate is None else float(gate),
                key.shape[2],
                query.shape[1] // key.shape[1],
                *(strides(x) for x in (key, value, mask, bias, gate if tensor else None)),
            )
        )
        has.append(bits)
    return tuple(made), tuple(has)


def few_values(n: int) -> int:
    """``n`` rounded up to 1, 2, 3, 4, 6, 8, 12, ...: what is compiled into a kernel takes few values."""
    power = 1 << max(n - 1, 0).bit_length()
    return power * 3 // 4 if power >= 4 and n <= power * 3 // 4 else power


def aligned(*tensors: Tensor) -> int:
    """How many features, up to 16 bytes, certainly lie side by side from any multiple of their number on.

    The compiler finds that out by itself for strides that 16 divides, which is not so of heads of 40 or 72 features,
    and loads two bytes at a time what may be loaded by 16.
    """
    by = 16 // tensors[0].element_size()
    for x in tensors:
        *others, last = strides(x)
        by = math.gcd(by, x.shape[3], *others) if last == 1 else 1
    return by


def dot_options(dtype: torch.dtype) -> dict:
    """Float32 as three products of tf32: the accuracy of float32, at a third of the tensor cores' rate."""
    of = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
    return {
        "DOT": tl.float32 if INTERPRETED else of[dtype],
        "PRECISION": "tf32x3" if dtype == torch.float32 else "tf32",
    }


@cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@cache
def capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes that a program may have: 163 KB on sm_80, 227 KB on sm_90 and sm_100, 99 KB on the others."""
    if device.type != "cuda":
        return 227 * 1024
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def roomy(device: torch.device, kilobytes: int = 200) -> bool:
    """Whether a program may have that much shared memory: 200 as on Hopper and Blackwell's data centre GPUs."""
    return shared_memory(device) >= kilobytes * 1024


# ---- In the kernels


@triton.jit
def start_of(pointer, strides, b, h, BY: tl.constexpr):
    """Of item ``b`` and head ``h``; BY, as everywhere here, is what divides all strides and widths (`aligned`)."""
    return pointer + b * (strides[0] // BY * BY) + h * (strides[1] // BY * BY)


@triton.jit
def load_tile(
    pointer, rows, limit, row_stride, width, column_stride, WIDTH: tl.constexpr, DOT: tl.constexpr, BY: tl.constexpr = 1
):
    """``rows`` × WIDTH, zero from row ``limit`` and column ``width`` on."""
    columns = tl.arange(0, WIDTH)
    offsets = rows.to(tl.int64)[:, None] * (row_stride // BY * BY) + columns.to(tl.int64)[None, :] * column_stride
    there = (rows[:, None] < limit) & (columns[None, :] < width // BY * BY)
    return tl.load(pointer + offsets, mask=there, other=0.0).to(DOT)


@triton.jit
def store_tile(pointer, tile, rows, limit, row_stride, width, column_stride, WIDTH: tl.constexpr, BY: tl.constexpr = 1):
    columns = tl.arange(0, WIDTH)
    offsets = rows.to(tl.int64)[:, None] * (row_stride // BY * BY) + columns.to(tl.int64)[None, :] * column_stride
    there = (rows[:, None] < limit) & (columns[None, :] < width // BY * BY)
    tl.store(pointer + offsets, tile.to(pointer.dtype.element_ty), mask=there)


@triton.jit
def keys_there(src, b, HAS: tl.constexpr):
    """How many keys of the source item ``b`` has. A length on the device, which nobody checks, may say more."""
    if LENGTHS & HAS:
        return tl.minimum(tl.load(src.lengths + b), src.keys)
    else:
        return src.keys


@triton.jit
def load_keys(src, b, h, columns, limit, width, WIDTH: tl.constexpr, DOT: tl.constexpr, BY: tl.constexpr):
    start = start_of(src.key, src.key_strides, b, h // src.group, BY)
    return load_tile(start, columns, limit, src.key_strides[2], width, src.key_strides[3], WIDTH, DOT, BY)


@triton.jit
def load_values(src, b, h, columns, limit, width, WIDTH: tl.constexpr, DOT: tl.constexpr, BY: tl.constexpr):
    start = start_of(src.value, src.value_strides, b, h // src.group, BY)
    return load_tile(start, columns, limit, src.value_strides[2], width, src.value_strides[3], WIDTH, DOT, BY)


@triton.jit
def added(src, b, h, rows, columns, row_limit, limit, HAS: tl.constexpr, CAUSAL: tl.constexpr):
    """What is added to scores, in units of exp2, and where a query may attend; ``rows`` and ``columns`` stand across.

    To be asked for before the product: where two layouts meet Triton keeps the one that it came upon last, and goes
    through softmax and products in that of the loads, with three times the instructions.
    """
    may = columns < limit
    if CAUSAL:
        may = may & (columns <= rows)
    there = (rows < row_limit) & (columns < src.keys)
    plus = 0.0
    if MASK & HAS:
        plus = _load_added(src.mask, src.mask_strides, b, h, rows, columns, there).to(tl.float32) * LOG2E
    if MASK_BOOL & HAS:
        may = may & (_load_added(src.mask, src.mask_strides, b, h, rows, columns, there) != 0)
    if BIAS & HAS:
        plus += _load_added(src.bias, src.bias_strides, b, h, rows, columns, there).to(tl.float32) * LOG2E
    return plus, may


@triton.jit
def _load_added(pointer, strides, b, h, rows, columns, there):
    start = pointer + b * strides[0] + h * strides[1]
    return tl.load(start + rows.to(tl.int64) * strides[2] + columns.to(tl.int64) * strides[3], mask=there, other=0)


@triton.jit
def masked(s, plus, may, HAS: tl.constexpr):
    """Scores ``s`` with what `added` gives."""
    if (MASK | BIAS) & HAS:
        s += plus
    return tl.where(may, s, float("-inf"))


@triton.jit
def scores(
    q,
    k,
    src,
    b,
    h,
    rows,
    columns,
    row_limit,
    limit,
    scale2,
    HAS: tl.constexpr,
    CAUSAL: tl.constexpr,
    PREC: tl.constexpr,
    FULL: tl.constexpr = False,
    RAW: tl.constexpr = False,
):
    """Of a tile, in units of exp2: −inf where a query may not attend. ``b`` and ``h`` may differ from row to row.

    FULL: all keys of the tile exist. RAW: nothing is added to scores, and who asks multiplies them by ``scale2``.
    """
    plus, may = added(src, b, h, rows[:, None], columns[None, :], row_limit, limit, HAS, CAUSAL)
    s = tl.dot(q, tl.trans(k), input_precision=PREC)
    if not RAW:
        s *= scale2
    if FULL and not CAUSAL and not (MASK_BOOL & HAS):
        if (MASK | BIAS) & HAS:
            s += plus
        return s
    else:
        return masked(s, plus, may, HAS)


@triton.jit
def softmax_step(s, v, top, total, out, DOT: tl.constexpr, PREC: tl.constexpr):
    """One tile more: the largest score so far, the sum of exp2 and the product with the values, relative to it."""
    new = tl.maximum(top, tl.max(s, 1))
    shift = tl.where(new == float("-inf"), 0.0, new)
    p = tl.exp2(s - shift[:, None])
    old = tl.exp2(top - shift)
    total = total * old + tl.sum(p, 1)
    out = tl.dot(p.to(DOT), v, out * old[:, None], input_precision=PREC)
    return new, total, out


@triton.jit
def scaled_step(s, v, top, total, out, scale2, POSITIVE: tl.constexpr, DOT: tl.constexpr, PREC: tl.constexpr):
    """`softmax_step` of ``s`` times ``scale2``, which is multiplied in where the largest score is subtracted."""
    new = tl.maximum(top, (tl.max(s, 1) if POSITIVE else tl.min(s, 1)) * scale2)
    shift = tl.where(new == float("-inf"), 0.0, new)
    p = tl.exp2(s * scale2 - shift[:, None])
    old = tl.exp2(top - shift)
    total = total * old + tl.sum(p, 1)
    out = tl.dot(p.to(DOT), v, out * old[:, None], input_precision=PREC)
    return new, total, out


@triton.jit
def inverse(x):
    """1 / x to a unit in the last place, of a sum of exponentials: one instruction, where a division is nine."""
    if _INTERPRETED:
        return 1.0 / x
    else:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)


@triton.jit
def log2(x):
    """To 2⁻²² of a sum of exponentials, of which one is 1: one instruction, where the exact one is some twenty-five."""
    if _INTERPRETED:
        return tl.log2(x)
    else:
        return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)


@triton.jit
def softmax_sum(top, total):
    """What the output is to be multiplied by, and the natural log-sum-exp; see `softmax_end`."""
    nothing = total == 0.0
    lse = tl.where(nothing, float("-inf"), (top + log2(total)) * LN2)
    return tl.where(nothing, 0.0, inverse(total)), lse


@triton.jit
def softmax_end(top, total, out):
    """Normalised, and the natural log-sum-exp; 0 and −inf where there was nothing to attend to."""
    factor, lse = softmax_sum(top, total)
    return out * factor[:, None], lse
