"""Cross-attention of few queries to many keys: split over the keys, merged by a second small launch.

With one query, or thirty, a flash kernel has a program for each head and nothing to fill the device with: 32 heads on
132 multiprocessors. Here each program takes some tiles of keys of one source, for all the queries that share them: the
heads of a group, and the whole batch where keys have batch 1 (learned queries the other way round: their batch is 1 and
their stride 0). Bytes that no version can avoid: K + V once; the parts, NS (D_v + 1) floats a query, are small beside.

    L = log Σ_s exp L_s        O = Σ_s exp(L_s − L) O_s        over the splits s, in order: the same bits each time

Backward, in float32, each program reads its keys and values once and writes their gradients once; parts of the query's
gradient are added up over the splits, and over the batch if the query is shared, by a second small launch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmfast.fusion._inputs import Source, keys_and_values
from mmfast.fusion.merged import heads_inside
from mmfast.fusion.recording import launch, room
from mmfast.fusion.routes_cuda import folds, power_of_two
from mmfast.fusion.triton_tiles import (
    LOG2E,
    added,
    aligned,
    dot_options,
    few_values,
    keys_there,
    load_tile,
    masked,
    multiprocessors,
    refs,
    roomy,
    scores,
    softmax_end,
    softmax_step,
    start_of,
    store_tile,
    strides,
)

MOST_SPLITS = 256


@triton.jit
def _rows(row, b0, h0, length, folded, group):
    """Which of the rows exist, and their items, heads and queries.

    Queries that share keys are rows of one product: all of a head, all heads of a group, perhaps all of a batch.
    """
    there = row < folded * group * length
    i = tl.where(there, row % length, length)
    h = h0 * group + tl.where(there, row // length % group, 0)
    b = b0 + tl.where(there, row // length // group, 0)
    return there, b, h, i


@triton.jit
def _load_rows(pointer, strides, b, h, i, there, width, WIDTH: tl.constexpr, DOT: tl.constexpr):
    columns = tl.arange(0, WIDTH)
    at = (b * strides[0] + h * strides[1] + i * strides[2])[:, None] + columns.to(tl.int64)[None, :] * strides[3]
    return tl.load(pointer + at, mask=there[:, None] & (columns < width)[None, :], other=0.0).to(DOT)


@triton.jit
def _split(
    query, query_strides, sources, first, part, part_lse, batch, heads, length, dim, value_dim, folded, group,
    key_heads, row_blocks, scale2,
    HAS: tl.constexpr, CAUSAL: tl.constexpr, TILES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    BV: tl.constexpr, BY: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(1)
    item = (tl.program_id(0) // row_blocks).to(tl.int64)
    b0, h0 = item // key_heads, item % key_heads
    row = (tl.program_id(0) % row_blocks).to(tl.int64) * BM + tl.arange(0, BM)
    there, b, h, i = _rows(row, b0, h0, length, folded, group)
    q = _load_rows(query, query_strides, b, h, i, there, dim, BD, DOT)
    for j in tl.static_range(len(HAS)):
        if (split >= first[j]) & (split < first[j + 1]):
            src = sources[j]
            limit = keys_there(src, b0, HAS[j])
            kh = h0 * group // src.group
            key = start_of(src.key, src.key_strides, b0, kh, BY)
            value = start_of(src.value, src.value_strides, b0, kh, BY)
            top = tl.full([BM], float("-inf"), tl.float32)
            total = tl.zeros([BM], tl.float32)
            out = tl.zeros([BM, BV], tl.float32)
            begin = (split - first[j]).to(tl.int64) * (TILES * BN)
            # What lies beyond the keys, or the length, is no work.
            for t in range(tl.minimum(TILES, tl.cdiv(limit - begin, BN)).to(tl.int32)):
                columns = begin + t * BN + tl.arange(0, BN)
                k = load_tile(key, columns, limit, src.key_strides[2], dim, src.key_strides[3], BD, DOT, BY)
                v = load_tile(value, columns, limit, src.value_strides[2], value_dim, src.value_strides[3], BV, DOT, BY)
                s = scores(
                    q, k, src, b[:, None], h[:, None], i, columns, length, limit, scale2, HAS[j], CAUSAL, PRECISION
                )
                top, total, out = softmax_step(s, v, top, total, out, DOT, PRECISION)
            out, lse = softmax_end(top, total, out)
            to = ((split.to(tl.int64) * batch + b) * heads + h) * length + i
            wide = tl.arange(0, BV)
            tl.store(
                part + to[:, None] * value_dim + wide[None, :], out, mask=there[:, None] & (wide < value_dim)[None, :]
            )
            tl.store(part_lse + to, lse, mask=there)


class Part(NamedTuple):
    """Attention to some of the keys."""

    out: Tensor
    out_strides: tuple[int, int, int, int]
    lse: Tensor
    lse_strides: tuple[int, int, int]


@triton.jit
def _merge(
    parts, out, out_strides, lse, items, heads, length, value_dim, split_stride,
    SPLITS: tl.constexpr, BM: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Of ``parts``, or of the SPLITS parts that lie ``split_stride`` rows behind each other in a single one."""
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    there = row < items * length
    i, h, b = row % length, row // length % heads, row // length // heads
    wide = tl.arange(0, BV)
    inside = there[:, None] & (wide < value_dim)[None, :]
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    result = tl.zeros([BM, BV], tl.float32)
    for j in tl.static_range(len(parts)):
        part = parts[j]
        at = b * part.out_strides[0] + h * part.out_strides[1] + i * part.out_strides[2]
        at = at[:, None] + wide.to(tl.int64)[None, :] * part.out_strides[3]
        at_lse = b * part.lse_strides[0] + h * part.lse_strides[1] + i * part.lse_strides[2]
        for s in range(SPLITS):
            skip = tl.full([1], 0, tl.int64) + s * split_stride
            one = tl.load(part.lse + at_lse + skip, mask=there, other=float("-inf")).to(tl.float32) * LOG2E
            o = tl.load(part.out + at + skip[:, None] * value_dim, mask=inside, other=0.0).to(tl.float32)
            new = tl.maximum(top, one)
            shift = tl.where(new == float("-inf"), 0.0, new)
            weight, old = tl.exp2(one - shift), tl.exp2(top - shift)
            total = total * old + weight
            result = result * old[:, None] + weight[:, None] * tl.where(weight[:, None] == 0.0, 0.0, o)
            top = new
    result, merged = softmax_end(top, total, result)
    to = b * out_strides[0] + h * out_strides[1] + i * out_strides[2]
    to = to[:, None] + wide.to(tl.int64)[None, :] * out_strides[3]
    tl.store(out + to, result.to(out.dtype.element_ty), mask=inside)
    tl.store(lse + row, merged, mask=there)


def merge(outs: Sequence[Tensor], lses: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`mmfast.fusion.merge`, without gradients: outputs ``(B, H, L, D_v)`` of any strides, in one pass."""
    parts = tuple(Part(o, o.stride(), lse, lse.stride()) for o, lse in zip(outs, lses, strict=True))
    return _merged(parts, outs[0], outs[0].shape, dtype, 1, 0)


def _merged(parts, like, shape, dtype, splits, split_stride) -> tuple[Tensor, Tensor]:
    batch, heads, length, value_dim = shape
    out = heads_inside(like, shape, dtype)
    lse = room(like, (batch, heads, length), torch.float32)
    rows, wide = batch * heads * length, power_of_two(value_dim)
    block = min(max(1, 4096 // wide), power_of_two(triton.cdiv(rows, 2 * multiprocessors(like.device)), 1))
    launch(
        _merge, (triton.cdiv(rows, block),), parts, out, out.stride(), lse, batch * heads, heads, length, value_dim,
        split_stride, SPLITS=splits, BM=block, BV=wide, num_warps=4,
    )  # fmt: skip
    return out, lse


def forward(query: Tensor, sources: Sequence[Source], causal: bool, scale: float, batch: int) -> tuple[Tensor, Tensor]:
    """One softmax over all sources: output ``(B, H, L, D_v)`` and log-sum-exp ``(B, H, L)``."""
    _, heads, length, dim = query.shape
    value_dim = sources[0].value.shape[3]
    sources = [s for s in sources if s.key.shape[2]]
    source_refs, has = refs(query, sources)
    folded, group = folds(query, sources, batch)
    rows, items = folded * group * length, batch // folded * (heads // group)
    wide, wide_value = power_of_two(dim), power_of_two(value_dim)
    fit = 4 // query.element_size() * (2 if wide + wide_value <= 256 else 1)
    block, width = min(64, power_of_two(rows)), max(16, min(128, 16 * fit))
    tiles, first = _splits(query, sources, rows, block, items, width)
    splits = first[-1]
    part = room(query, (splits, batch, heads, length, value_dim), torch.float32)
    part_lse = room(query, (splits, batch, heads, length), torch.float32)
    row_blocks = triton.cdiv(rows, block)
    launch(
        _split, (items * row_blocks, splits), query, strides(query), source_refs, first, part, part_lse, batch,
        heads, length, dim, value_dim, folded, group, heads // group, row_blocks, scale * LOG2E.value, HAS=has,
        CAUSAL=causal, TILES=tiles, BM=block, BN=width, BD=wide, BV=wide_value, BY=aligned(*keys_and_values(sources)),
        num_warps=4, num_stages=3, **dot_options(query.dtype),
    )  # fmt: skip
    parts = (Part(part[0], part[0].stride(), part_lse[0], part_lse[0].stride()),)
    return _merged(parts, query, part.shape[1:], query.dtype, splits, batch * heads * length)


def _splits(query: Tensor, sources: Sequence[Source], rows: int, block: int, items: int, width: int):
    """Tiles to a split, the most that leave two programs for each multiprocessor; each source's first split, and how
    many there are."""
    tiles = 1
    while tiles < 64 and _programs(sources, rows, block, items, width, 2 * tiles) >= 2 * multiprocessors(query.device):
        tiles *= 2
    while sum(triton.cdiv(s.key.shape[2], width * tiles) for s in sources) > MOST_SPLITS:
        tiles *= 2
    # As many splits of the longest source with less difference between them: 24 tiles are 12 + 12, not 16 + 8.
    longest = triton.cdiv(max(s.key.shape[2] for s in sources), width)
    tiles = min(tiles, few_values(triton.cdiv(longest, triton.cdiv(longest, tiles))))
    first = [0]
    for source in sources:
        first.append(first[-1] + triton.cdiv(source.key.shape[2], width * tiles))
    return tiles, tuple(first)


def _programs(sources, rows, block, items, width, tiles) -> int:
    return triton.cdiv(rows, block) * items * sum(triton.cdiv(s.key.shape[2], width * tiles) for s in sources)


# ---- Backward


@triton.jit
def _parts(x):
    """What tf32 holds of ``x``, rounded, and the rest: three instructions an element, where tf32x3 has six."""
    large = ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return large, x - large


@triton.jit
def _product(a, b, total):
    """Of matrices in `_parts`, to the accuracy of float32."""
    total = tl.dot(a[1], b[0], total, input_precision="tf32")
    total = tl.dot(a[0], b[1], total, input_precision="tf32")
    return tl.dot(a[0], b[0], total, input_precision="tf32")


@triton.jit
def _split_backward(
    grad_out, grad_out_strides, grad_lse, query, query_strides, sources, first, out, out_strides, lse, part,
    part_strides, grads, heads, length, dim, value_dim, folded, group, key_heads, scale, scale2,
    HAS: tl.constexpr, CAUSAL: tl.constexpr, GRAD_LSE: tl.constexpr, TILES: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BY: tl.constexpr,
):  # fmt: skip
    """Gradients of the keys and values of a split, and its part of the query's. Keys are rows of all that is per key
    and query: there are more of them, and it is their gradients whose products are largest."""
    split = tl.program_id(1)
    item = tl.program_id(0).to(tl.int64)
    b0, h0 = item // key_heads, item % key_heads
    there, b, h, i = _rows(tl.arange(0, BM).to(tl.int64), b0, h0, length, folded, group)
    q = _load_rows(query, query_strides, b, h, i, there, dim, BD, tl.float32)
    do = _load_rows(grad_out, grad_out_strides, b, h, i, there, value_dim, BV, tl.float32)
    less = tl.sum(do * _load_rows(out, out_strides, b, h, i, there, value_dim, BV, tl.float32), 1)
    at = (b * heads + h) * length + i
    if GRAD_LSE:
        less -= tl.load(grad_lse + at, mask=there, other=0.0)
    shift = tl.load(lse + at, mask=there, other=0.0) * LOG2E
    shift = tl.where(shift == float("-inf"), 0.0, shift)
    dq = tl.zeros([BM, BD], tl.float32)
    for j in tl.static_range(len(HAS)):
        if (split >= first[j]) & (split < first[j + 1]):
            src, grad = sources[j], grads[j]
            limit = keys_there(src, b0, HAS[j])
            key = start_of(src.key, src.key_strides, b0, h0, BY)
            value = start_of(src.value, src.value_strides, b0, h0, BY)
            grad_key = start_of(grad.key, grad.key_strides, b0, h0, BY)
            grad_value = start_of(grad.value, grad.value_strides, b0, h0, BY)
            begin = (split - first[j]).to(tl.int64) * (TILES * BN)
            limit = tl.minimum(limit, begin + TILES * BN)
            # A tile is asked for before the one ahead of it is computed, by hand: what is used in parts, and by two
            # products in two layouts, the compiler does not fetch ahead.
            columns = begin + tl.arange(0, BN)
            next_k = load_tile(key, columns, limit, src.key_strides[2], dim, src.key_strides[3], BD, tl.float32, BY)
            next_v = load_tile(
                value, columns, limit, src.value_strides[2], value_dim, src.value_strides[3], BV, tl.float32, BY
            )
            for _ in range(tl.minimum(TILES, tl.cdiv(src.keys - begin, BN)).to(tl.int32)):
                k, v = next_k, next_v
                after = columns + BN
                next_k = load_tile(key, after, limit, src.key_strides[2], dim, src.key_strides[3], BD, tl.float32, BY)
                next_v = load_tile(
                    value, after, limit, src.value_strides[2], value_dim, src.value_strides[3], BV, tl.float32, BY
                )
                plus, may = added(
                    src, b[None, :], h[None, :], i[None, :], columns[:, None], length, limit, HAS[j], CAUSAL
                )
                s = _product(_parts(k), _parts(tl.trans(q)), tl.zeros([BN, BM], tl.float32)) * scale2
                s = masked(s, plus, may, HAS[j])
                p = tl.exp2(s - shift[None, :])
                dp = _product(_parts(v), _parts(tl.trans(do)), tl.zeros([BN, BM], tl.float32))
                dv = _product(_parts(p), _parts(do), tl.zeros([BN, BV], tl.float32))
                store_tile(grad_value, dv, columns, src.keys, grad.value_strides[2], value_dim, 1, BV, BY)
                ds = p * (dp - less[None, :])
                dk = _product(_parts(ds), _parts(q), tl.zeros([BN, BD], tl.float32)) * scale
                store_tile(grad_key, dk, columns, src.keys, grad.key_strides[2], dim, 1, BD, BY)
                dq = _product(_parts(tl.trans(ds)), _parts(k), dq)
                columns = after
    features = tl.arange(0, BD)
    to = split.to(tl.int64) * part_strides[0] + b * part_strides[1] + h * part_strides[2] + i * part_strides[3]
    inside = there[:, None] & (features < dim)[None, :]
    tl.store(part + to[:, None] + features[None, :], dq * scale, mask=inside)


@triton.jit
def _add_up(part, out, parts, size, BP: tl.constexpr, BS: tl.constexpr):
    """The sum of ``parts`` vectors of ``size``, which lie behind each other, in a fixed order."""
    at = tl.program_id(0).to(tl.int64) * BS + tl.arange(0, BS)
    total = tl.zeros([BS], tl.float32)
    for i in range(0, parts, BP):
        of = i + tl.arange(0, BP)
        inside = (of < parts)[:, None] & (at < size)[None, :]
        total += tl.sum(tl.load(part + of.to(tl.int64)[:, None] * size + at[None, :], mask=inside, other=0.0), 0)
    tl.store(out + at, total, mask=at < size)


def add_up(part: Tensor, out: Tensor, parts: int) -> None:
    """Sums of ``parts`` tensors like ``out``, which lie behind each other and in memory as ``out`` does."""
    size = out.numel()
    launch(_add_up, (triton.cdiv(size, 128),), part, out, parts, size, BP=32, BS=128, num_warps=4)


class Gradient(NamedTuple):
    """Of a source."""

    key: Tensor
    value: Tensor
    key_strides: tuple[int, int, int, int]
    value_strides: tuple[int, int, int, int]


def _backward_sizes(query: Tensor, sources: Sequence[Source], rows: int) -> tuple[int, int, int] | None:
    """Rows of a block, keys of a tile and warps; None where queries and gradients in parts leave no room on chip."""
    wide = power_of_two(query.shape[3]) + power_of_two(sources[0].value.shape[3])
    block = power_of_two(rows)
    if block <= 32 and wide <= 128:
        return (block, 32, 4) if roomy(query.device, 96) else None
    return (block, 16, 4) if block * wide <= 8192 and wide <= 256 and roomy(query.device) else None


def differentiates(query: Tensor, sources: Sequence[Source], batch: int) -> bool:
    """Whether `backward` can: all queries that share keys in one block, and no gradient a sum over programs."""
    folded, group = folds(query, sources, batch)
    items, rows = batch // folded, folded * group * query.shape[2]
    whole = all(x.shape[0] == items and x.shape[1] * group == query.shape[1] for s in sources for x in (s.key, s.value))
    return whole and query.dtype == torch.float32 and _backward_sizes(query, sources, rows) is not None


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    sources: Sequence[Source],
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Gradients of query, keys and values, of what `differentiates` allows."""
    lse = lse.contiguous()  # hooks for saved tensors may have changed its strides
    batch, heads, length = lse.shape
    dim, value_dim = query.shape[3], sources[0].value.shape[3]
    grad_keys = [heads_inside(s.key, s.key.shape) for s in sources]
    grad_values = [heads_inside(s.value, s.value.shape) for s in sources]
    folded, group = folds(query, sources, batch)
    rows, items = folded * group * length, batch // folded * (heads // group)
    grads = tuple(
        Gradient(k, v, k.stride(), v.stride())
        for s, k, v in zip(sources, grad_keys, grad_values, strict=True)
        if s.key.shape[2]
    )
    sources = [s for s in sources if s.key.shape[2]]
    source_refs, has = refs(query, sources)
    block, width, warps = _backward_sizes(query, sources, rows)
    tiles, first = _splits(query, sources, rows, block, items, width)
    parts = first[-1] * (batch // query.shape[0])
    grad_query = heads_inside(query, query.shape)
    part = grad_query if parts == 1 else room(query, (first[-1], batch, length, heads, dim)).transpose(2, 3)
    launch(
        _split_backward, (items, first[-1]), grad_out, grad_out.stride(),
        query if grad_lse is None else grad_lse.contiguous(), query, strides(query), source_refs, first, out,
        out.stride(), lse, part, (0, *part.stride()[:3]) if parts == 1 else part.stride()[:4], grads, heads, length,
        dim, value_dim, folded, group, heads // group, scale, scale * LOG2E.value, HAS=has, CAUSAL=causal,
        GRAD_LSE=grad_lse is not None, TILES=tiles, BM=block, BN=width, BD=power_of_two(dim),
        BV=power_of_two(value_dim), BY=aligned(*keys_and_values(sources)), num_warps=warps,
    )  # fmt: skip
    if parts > 1:
        add_up(part, grad_query, parts)
    return grad_query, grad_keys, grad_values
