"""Cross-attention to long keys of which masks and lengths leave a part: only tiles of keys that somebody may attend to.

A flash kernel that is given a mask visits every key and reads the mask for every head. Here a first launch looks at the
mask once, tile by tile, a second lists for each block of queries the tiles that it visits, and the third attends to
those: first to the tiles where nothing is masked, without reading the mask, then to the others. Images padded to a
common number of tiles, padded batches, several images in one prompt cost what exists of them, and nobody waits: which
tiles these are only the device knows.

A tile is left out if it is excluded for all queries of the block: by lengths, by causality, by a mask that is False or
−inf; and by one that is at most half the lowest number of its dtype, as models write "excluded", if each of these
queries has a key with more than a quarter of it: beside that the weight is exp(−16000) or less.
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
from mmfast.fusion.routes_cuda import power_of_two
from mmfast.fusion.triton_tiles import (
    BIAS,
    LOG2E,
    MASK,
    MASK_BOOL,
    aligned,
    dot_options,
    keys_there,
    load_tile,
    refs,
    roomy,
    scaled_step,
    scores,
    softmax_end,
    softmax_step,
    start_of,
    store_tile,
    strides,
)

NOTHING, FREE, MIXED, FAR = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)


@triton.jit
def _survey(
    sources, states, near, row_limit, heads, row_blocks, lowest,
    HAS: tl.constexpr, CAUSAL: tl.constexpr, NEAR: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """What the mask says of one tile, and in ``near`` which rows have a key there that excludes those far below."""
    src = sources[0]
    block = tl.program_id(0) % row_blocks
    item = (tl.program_id(0) // row_blocks).to(tl.int64)
    b, h = item // heads, item % heads
    rows = block * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    limit = keys_there(src, b, HAS)
    exists = (rows < row_limit)[:, None] & (columns < limit)[None, :]
    first = tl.program_id(1) * BN
    some = first < limit
    free = first + BN <= limit
    far = False
    to = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    if (MASK | MASK_BOOL) & HAS:
        start = src.mask + b * src.mask_strides[0] + h * src.mask_strides[1]
        offsets = rows.to(tl.int64)[:, None] * src.mask_strides[2] + columns.to(tl.int64)[None, :] * src.mask_strides[3]
        x = tl.load(start + offsets, mask=exists, other=0).to(tl.float32)
        if MASK_BOOL & HAS:
            some = tl.max(tl.where(exists & (x != 0.0), 1, 0)) == 1
            free = free & (tl.max(tl.where(exists & (x == 0.0), 1, 0)) == 0)
        else:  # what is not a number counts as neither excluded nor free
            some = tl.max(tl.where(exists & (x != float("-inf")), 1, 0)) == 1
            free = free & (tl.max(tl.where(exists & (x != 0.0), 1, 0)) == 0)
            if NEAR:
                far = tl.max(tl.where(exists & (x != x) | exists & (x > lowest / 2), 1, 0)) == 0
                is_near = tl.max(tl.where(exists & (x > lowest / 4), 1, 0), 1)
                is_near = tl.where(rows < row_limit, is_near, 1)
                tl.store(near + to * BM + tl.arange(0, BM), is_near.to(tl.int8))
    if BIAS & HAS:
        free = False
    if CAUSAL:
        some = some & (first <= tl.minimum(block * BM + BM, row_limit) - 1)
        free = free & (first + BN - 1 <= block * BM)
    state = tl.where(some, tl.where(free, FREE, tl.where(far, FAR, MIXED)), NOTHING)
    tl.store(states + to, state.to(tl.int8))


@triton.jit
def _list(
    states, near, tiles, counts, key_blocks, NEAR: tl.constexpr, BLOCKS: tl.constexpr, BM: tl.constexpr
):  # fmt: skip
    """The tiles that a block of queries visits, in order: where nothing is masked, and the others."""
    item = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BLOCKS)
    state = tl.load(states + item * key_blocks + n, mask=n < key_blocks, other=NOTHING).to(tl.int32)
    if NEAR:
        rows = tl.zeros([BM], tl.int8)
        for i in range(key_blocks):
            rows = tl.maximum(rows, tl.load(near + (item * key_blocks + i) * BM + tl.arange(0, BM)))
        excluded = tl.min(rows.to(tl.int32)) == 1
        state = tl.where(state == FAR, tl.where(excluded, NOTHING, MIXED), state)
    free, mixed = (state == FREE).to(tl.int32), (state == MIXED).to(tl.int32)
    to = tiles + item * 2 * key_blocks
    tl.store(to + tl.cumsum(free, 0) - 1, n, mask=free == 1)
    tl.store(to + key_blocks + tl.cumsum(mixed, 0) - 1, n, mask=mixed == 1)
    tl.store(counts + 2 * item, tl.sum(free))
    tl.store(counts + 2 * item + 1, tl.sum(mixed))


class Lists(NamedTuple):
    """Of one source: numbers of tiles, how many, and how to find those of an item, a head and a block of queries."""

    tiles: Tensor
    counts: Tensor
    key_blocks: int
    strides: tuple[int, int, int]


@triton.jit
def _attend(
    query, query_strides, sources, lists, out, out_strides, lse, heads, row_limit, dim, value_dim, row_blocks, scale2,
    HAS: tl.constexpr, CAUSAL: tl.constexpr, POSITIVE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BD: tl.constexpr, BV: tl.constexpr, BY: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0) % row_blocks
    item = (tl.program_id(0) // row_blocks).to(tl.int64)
    b, h = item // heads, item % heads
    rows = block * BM + tl.arange(0, BM)
    start = start_of(query, query_strides, b, h, BY)
    q = load_tile(start, rows, row_limit, query_strides[2], dim, query_strides[3], BD, DOT, BY)
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    o = tl.zeros([BM, BV], tl.float32)
    for j in tl.static_range(len(HAS)):
        src, of = sources[j], lists[j]
        limit = keys_there(src, b, HAS[j])
        at = b * of.strides[0] + h * of.strides[1] + block * of.strides[2]
        tiles = of.tiles + at * 2 * of.key_blocks
        key = start_of(src.key, src.key_strides, b, h // src.group, BY)
        value = start_of(src.value, src.value_strides, b, h // src.group, BY)
        columns = tl.arange(0, BN)
        for i in range(tl.load(of.counts + 2 * at)):
            first = tl.load(tiles + i).to(tl.int64) * BN
            at_key = key + first * (src.key_strides[2] // BY * BY)
            at_value = value + first * (src.value_strides[2] // BY * BY)
            k = load_tile(at_key, columns, BN, src.key_strides[2], dim, src.key_strides[3], BD, DOT, BY)
            v = load_tile(at_value, columns, BN, src.value_strides[2], value_dim, src.value_strides[3], BV, DOT, BY)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            top, total, o = scaled_step(s, v, top, total, o, scale2, POSITIVE, DOT, PRECISION)
        for i in range(tl.load(of.counts + 2 * at + 1)):
            there = tl.load(tiles + of.key_blocks + i) * BN + columns
            k = load_tile(key, there, limit, src.key_strides[2], dim, src.key_strides[3], BD, DOT, BY)
            v = load_tile(value, there, limit, src.value_strides[2], value_dim, src.value_strides[3], BV, DOT, BY)
            s = scores(q, k, src, b, h, rows, there, row_limit, limit, scale2, HAS[j], CAUSAL, PRECISION)
            top, total, o = softmax_step(s, v, top, total, o, DOT, PRECISION)
    o, one = softmax_end(top, total, o)
    tl.store(lse + item * row_limit + rows, one, mask=rows < row_limit)
    to = start_of(out, out_strides, b, h, BY)
    store_tile(to, o, rows, row_limit, out_strides[2], value_dim, out_strides[3], BV, BY)


def forward(query: Tensor, sources: Sequence[Source], causal: bool, scale: float, batch: int) -> tuple[Tensor, Tensor]:
    """One softmax over all sources: output ``(B, H, L, D_v)`` and log-sum-exp ``(B, H, L)``."""
    _, heads, rows, dim = query.shape
    value_dim = sources[0].value.shape[3]
    sources = [s for s in sources if s.key.shape[2]]
    source_refs, has = refs(query, sources)
    wide, wide_value = power_of_two(dim), power_of_two(value_dim)
    half = query.dtype != torch.float32
    large = half and wide + wide_value <= 256 and roomy(query.device)
    block, width = min(128 if large else 64, power_of_two(rows)), 128 if large else 64 if half else 32
    lists = tuple(_lists(query, s, causal, batch, block, width) for s in sources)
    out = heads_inside(query, (batch, heads, rows, value_dim))
    lse = room(query, (batch, heads, rows), torch.float32)
    row_blocks = triton.cdiv(rows, block)
    launch(
        _attend, (batch * heads * row_blocks,), query, strides(query), source_refs, lists, out, out.stride(), lse,
        heads, rows, dim, value_dim, row_blocks, scale * LOG2E.value, HAS=has, CAUSAL=causal, POSITIVE=scale > 0,
        BM=block, BN=width, BD=wide, BV=wide_value, BY=aligned(query, *keys_and_values(sources)), num_warps=8 if block
        == 128 else 4, num_stages=2, **dot_options(query.dtype),
    )  # fmt: skip
    return out, lse


def _lists(query: Tensor, source: Source, causal: bool, batch: int, block: int, width: int) -> Lists:
    """As few as differ: one for all heads, say, that share a mask."""
    (ref,), (has,) = refs(query, [source])
    rows, mask = query.shape[2], source.mask
    shape = [1, 1, 1] if mask is None else list(mask.shape[:3])
    if source.lengths is not None:
        shape[0] = batch
    if causal:
        shape[2] = rows
    items, heads, rows = shape
    row_blocks, key_blocks = triton.cdiv(rows, block), triton.cdiv(source.key.shape[2], width)
    # A key that others are excluded by must be one that the query may attend to, by as much as the mask says.
    near = bool(has & MASK.value) and not has & BIAS.value and not causal
    count = items * heads * row_blocks
    states = room(query, (count, key_blocks), torch.int8)
    rows_near = room(query, (count, key_blocks, block) if near else (1,), torch.int8)
    tiles = room(query, (count, 2, key_blocks), torch.int32)
    counts = room(query, (count, 2), torch.int32)
    launch(
        _survey, (count, key_blocks), (ref,), states, rows_near, rows, heads, row_blocks, torch.finfo(mask.dtype).min if
        near else 0.0, HAS=has, CAUSAL=causal, NEAR=near, BM=block, BN=width, num_warps=4,
    )  # fmt: skip
    launch(
        _list, (count,), states, rows_near, tiles, counts, key_blocks, NEAR=near, BLOCKS=power_of_two(key_blocks),
        BM=block, num_warps=4,
    )  # fmt: skip
    of = (heads * row_blocks if items > 1 else 0, row_blocks if heads > 1 else 0, 1 if row_blocks > 1 else 0)
    return Lists(tiles, counts, key_blocks, of)
