"""Cross-attention of few queries to many keys: split over the keys, merged by a second small launch.

With one query, or thirty, a flash kernel has a program for each head and nothing to fill the device with: 32 heads on
132 multiprocessors. Here each program takes some tiles of keys of one source, for all the queries that share them: the
heads of a group, and the whole batch where keys have batch 1 (learned queries the other way round: their batch is 1 and
their stride 0). Bytes that no version can avoid: K + V once; the parts, NS (D_v + 1) floats a query, are small beside.

    L = log Σ_s exp L_s        O = Σ_s exp(L_s − L) O_s        over the splits s, in order: the same bits each time
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
    aligned,
    dot_options,
    few_values,
    keys_there,
    load_tile,
    multiprocessors,
    refs,
    scores,
    softmax_end,
    softmax_step,
    start_of,
    strides,
)

MOST_SPLITS = 256


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
    # Queries that share keys are rows of one product: all of a head, all heads of a group, perhaps all of a batch.
    row = (tl.program_id(0) % row_blocks).to(tl.int64) * BM + tl.arange(0, BM)
    there = row < folded * group * length
    i = tl.where(there, row % length, length)
    h = h0 * group + tl.where(there, row // length % group, 0)
    b = b0 + tl.where(there, row // length // group, 0)
    features = tl.arange(0, BD)
    at = b * query_strides[0] + h * query_strides[1] + i * query_strides[2]
    q = tl.load(
        query + at[:, None] + features.to(tl.int64)[None, :] * query_strides[3],
        mask=there[:, None] & (features < dim)[None, :],
        other=0.0,
    ).to(DOT)
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
    # Tiles to a split: the most that leave two programs for each multiprocessor.
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
    splits = first[-1]
    part = room(query, (splits, batch, heads, length, value_dim), torch.float32)
    part_lse = room(query, (splits, batch, heads, length), torch.float32)
    row_blocks = triton.cdiv(rows, block)
    launch(
        _split, (items * row_blocks, splits), query, strides(query), source_refs, tuple(first), part, part_lse, batch,
        heads, length, dim, value_dim, folded, group, heads // group, row_blocks, scale * LOG2E.value, HAS=has,
        CAUSAL=causal, TILES=tiles, BM=block, BN=width, BD=wide, BV=wide_value, BY=aligned(*keys_and_values(sources)),
        num_warps=4, num_stages=3, **dot_options(query.dtype),
    )  # fmt: skip
    parts = (Part(part[0], part[0].stride(), part_lse[0], part_lse[0].stride()),)
    return _merged(parts, query, part.shape[1:], query.dtype, splits, batch * heads * length)


def _programs(sources, rows, block, items, width, tiles) -> int:
    return triton.cdiv(rows, block) * items * sum(triton.cdiv(s.key.shape[2], width * tiles) for s in sources)
