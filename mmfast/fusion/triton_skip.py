"""Cross-attention to long keys, all sources in one pass, and only to tiles of keys that somebody may attend to.

A flash kernel that is given a mask visits every key and reads the mask for every head. Here a first launch looks at the
mask once, tile by tile, a second lists for each block of queries the tiles that it visits, and the third attends to
those: to the tiles where nothing is masked, without reading the mask; to those where keys are either excluded or not,
of which the first launch left bits, for queries and, where gradients are wanted, for keys; and to the others by the
mask. Images padded to a common number of tiles, padded batches, several images in one prompt cost what exists of them,
and nobody waits: which tiles these are only the device knows. A source without masks needs no list: its keys are
visited up to their number.

Excluded is a key by lengths, by causality, by a mask that is False or −inf; and by one that is at most half the lowest
number of its dtype, as models write "excluded", if each query of the block has a key with more than a quarter of it:
beside that the weight is exp(−16000) or less.

Backward, with the merged output O and log-sum-exp L of all sources,

    P = exp(S − L)      dS = P ∘ (dO Vᵀ − δ),  δ = dO · O − dL      dQ = Σ dS K      dK = dSᵀ Q      dV = Pᵀ dO

by two kernels: one has a block of queries and goes over the tiles of its list, and leaves L and δ for the other, which
has a tile of keys and goes over the blocks of queries, of all heads that share the key, by a list the other way round.
Scores and dO Vᵀ are computed in both: seven products, where a kernel that adds up dQ in memory has five. But those
additions are atomic, in any order, and here every sum has its own: the same bits each time.
"""

# Triton knows no conditional expression that picks code:
# ruff: noqa: SIM108
from __future__ import annotations

import math
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
from mmfast.fusion.triton_split import Gradient, add_up
from mmfast.fusion.triton_tiles import (
    BIAS,
    LOG2E,
    MASK,
    MASK_BOOL,
    added,
    aligned,
    dot_options,
    keys_there,
    load_tile,
    masked,
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

# What a tile is to a block of queries: left out; nothing is masked; bits tell what is; the mask is to be added; and the
# first or the third if each of the queries has a key that excludes those far below.
NOTHING, FREE, TOLD, MIXED, FAR, FAR_TOLD = (tl.constexpr(i) for i in range(6))
KINDS = tl.constexpr(3)  # that are listed, from FREE on


@triton.jit
def _survey(
    sources, states, near, words, words_by_key, row_limit, heads, row_blocks, lowest,
    HAS: tl.constexpr, CAUSAL: tl.constexpr, NEAR: tl.constexpr, BY_KEY: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """What a tile is, its bits, and in ``near`` which rows have a key there that excludes those far below."""
    src = sources[0]
    block = tl.program_id(0) % row_blocks
    item = (tl.program_id(0) // row_blocks).to(tl.int64)
    b, h = item // heads, item % heads
    row, column = tl.arange(0, BM), tl.arange(0, BN)
    rows, columns = block * BM + row, tl.program_id(1) * BN + column
    limit = keys_there(src, b, HAS)
    exists = (rows < row_limit)[:, None] & (columns < limit)[None, :]
    if CAUSAL:
        exists = exists & (columns[None, :] <= rows[:, None])
    may = exists
    to = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    beside = 0  # of what exists and is neither free nor −inf, 1: all is far below; 2: not all, or not a number
    if (MASK | MASK_BOOL) & HAS:
        start = src.mask + b * src.mask_strides[0] + h * src.mask_strides[1]
        offsets = rows.to(tl.int64)[:, None] * src.mask_strides[2] + columns.to(tl.int64)[None, :] * src.mask_strides[3]
        x = tl.load(start + offsets, mask=exists, other=0).to(tl.float32)
        if MASK_BOOL & HAS:
            may = exists & (x != 0.0)
        else:
            may = exists & (x == 0.0)
            below = tl.where(x == float("-inf"), 0, tl.where(x <= lowest / 2, 1, 2))
            beside = tl.max(tl.where(exists & (x != 0.0), below, 0))
            if NEAR:
                is_near = tl.max(tl.where(exists & (x > lowest / 4), 1, 0), 1)
                is_near = tl.where(rows < row_limit, is_near, 1)
                tl.store(near + to * BM + row, is_near.to(tl.int8))
    bits = tl.where(may, 1 << (column % 32)[None, :], 0)
    word = tl.sum(tl.reshape(bits, (BM, BN // 32, 32)), 2)
    of_row = tl.arange(0, BN // 32)[None, :] * BM + row[:, None]
    tl.store(words + to * (BN // 32 * BM) + of_row, word)
    if BY_KEY:
        PACKS: tl.constexpr = (BM + 31) // 32
        bits = tl.where(may, 1 << (row % 32)[:, None], 0)
        by_key = tl.sum(tl.reshape(bits, (PACKS, BM // PACKS, BN)), 1)
        of_key = tl.arange(0, PACKS)[:, None] * BN + column[None, :]
        tl.store(words_by_key + to * (PACKS * BN) + of_key, by_key)
    some = tl.max((word != 0).to(tl.int32)) == 1
    whole = tl.max(((word != -1) & (rows < row_limit)[:, None]).to(tl.int32)) == 0
    if BIAS & HAS:
        state = tl.where(some | (beside != 0), MIXED, NOTHING)
    else:
        state = tl.where(some, tl.where(whole, FREE, TOLD), NOTHING)
        state = tl.where(beside == 1, tl.where(some, FAR_TOLD, FAR), tl.where(beside == 2, MIXED, state))
    tl.store(states + to, state.to(tl.int8))


@triton.jit
def _list(
    states, near, tiles, counts, key_blocks, NEAR: tl.constexpr, BLOCKS: tl.constexpr, BM: tl.constexpr
):  # fmt: skip
    """The tiles that a block of queries visits, in order, of each kind."""
    item = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BLOCKS)
    state = tl.load(states + item * key_blocks + n, mask=n < key_blocks, other=NOTHING).to(tl.int32)
    if NEAR:
        rows = tl.zeros([BM], tl.int8)
        for i in range(key_blocks):
            rows = tl.maximum(rows, tl.load(near + (item * key_blocks + i) * BM + tl.arange(0, BM)))
        excluded = tl.min(rows.to(tl.int32)) == 1
        state = tl.where(state == FAR, tl.where(excluded, NOTHING, MIXED), state)
        state = tl.where(state == FAR_TOLD, tl.where(excluded, TOLD, MIXED), state)
        tl.store(states + item * key_blocks + n, state.to(tl.int8), mask=n < key_blocks)  # for `_list_by_keys`
    _write_list(state, n, tiles, counts, item, key_blocks)


@triton.jit
def _list_by_keys(
    states, tiles, counts, state_strides, key_blocks, wide_blocks, key_heads, group, row_blocks,
    BLOCKS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """For the gradients of WIDE tiles of keys: what blocks of queries visit one, of all heads of a group in a row."""
    tile = tl.program_id(0) % wide_blocks * WIDE
    item = (tl.program_id(0) // wide_blocks).to(tl.int64)
    b, h0 = item // key_heads, item % key_heads * group
    n = tl.arange(0, BLOCKS)
    many = group * row_blocks
    at = b * state_strides[0] + (h0 + n // row_blocks) * state_strides[1] + n % row_blocks * state_strides[2]
    state = tl.load(states + at * key_blocks + tile, mask=n < many, other=NOTHING).to(tl.int32)
    for i in tl.static_range(1, WIDE):
        beside = n < tl.where(tile + i < key_blocks, many, 0)
        other = tl.where(beside, tl.load(states + at * key_blocks + tile + i, mask=beside, other=NOTHING), state)
        state = tl.where(state == other, state, tl.maximum(tl.maximum(state, other), TOLD))
    _write_list(state, n, tiles, counts, tl.program_id(0).to(tl.int64), many)


@triton.jit
def _write_list(state, n, tiles, counts, item, room):
    for i in tl.static_range(KINDS):
        of_kind = (state == FREE + i).to(tl.int32)
        tl.store(tiles + (item * KINDS + i) * room + tl.cumsum(of_kind, 0) - 1, n, mask=of_kind == 1)
        tl.store(counts + item * KINDS + i, tl.sum(of_kind))


class Lists(NamedTuple):
    """Of one source: numbers of tiles, room for how many of a kind, how many there are, and how to find those of an
    item, a head and a block of queries; or, of blocks of queries, those of an item, a key head and a tile of keys. Bits
    of tiles, ``key_blocks`` for each block of queries, which is found by ``word_strides``."""

    tiles: Tensor
    room: int
    counts: Tensor
    strides: tuple[int, int, int]
    words: Tensor
    key_blocks: int
    word_strides: tuple[int, int, int]


@triton.jit
def _steps(of, at, limit, KIND: tl.constexpr, LISTED: tl.constexpr, BN: tl.constexpr):
    """How many tiles of a kind there are. Without a list all ``limit`` keys are visited, and only the end of them may
    be no whole tile."""
    if LISTED:
        return tl.load(of.counts + at * KINDS + KIND - FREE)
    elif KIND == FREE:
        return limit // BN
    else:
        return tl.cdiv(limit, BN) - limit // BN


@triton.jit
def _tile(
    src, of, at, i, b, h, limit, dim, value_dim, KIND: tl.constexpr, LISTED: tl.constexpr, BN: tl.constexpr,
    BD: tl.constexpr, BV: tl.constexpr, BY: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """The ``i``-th tile of a kind: its number, its keys and values."""
    if LISTED:
        tile = tl.load(of.tiles + (at * KINDS + KIND - FREE) * of.room + i).to(tl.int64)
    elif KIND == FREE:
        tile = tl.cast(i, tl.int64)
    else:
        tile = tl.cast(limit // BN, tl.int64)
    if KIND == FREE:  # all keys exist
        left = BN
    else:
        left = tl.minimum(limit - tile * BN, BN).to(tl.int32)
    local = tl.arange(0, BN)
    key = start_of(src.key, src.key_strides, b, h // src.group, BY) + tile * BN * (src.key_strides[2] // BY * BY)
    value = start_of(src.value, src.value_strides, b, h // src.group, BY) + tile * BN * (
        src.value_strides[2] // BY * BY
    )
    k = load_tile(key, local, left, src.key_strides[2], dim, src.key_strides[3], BD, DOT, BY)
    v = load_tile(value, local, left, src.value_strides[2], value_dim, src.value_strides[3], BV, DOT, BY)
    return tile, k, v


@triton.jit
def _allowed(words, at, there, NEXT: tl.constexpr, COLUMNS: tl.constexpr):
    """What the words of each row say of the columns: a word of 32 ``NEXT`` behind that of those before.

    In the layout of products a thread has columns that are 8 apart: once shifted by what is below 8 the rest is a
    test with a constant.
    """
    column = tl.arange(0, COLUMNS)[None, :]
    word = tl.load(words + at, mask=there, other=0)[:, None]
    for i in tl.static_range(1, COLUMNS // 32):
        word = tl.where(column < i * 32, word, tl.load(words + at + i * NEXT, mask=there, other=0)[:, None])
    return ((word >> column % 8) & (1 << column % 32 // 8 * 8)) != 0


@triton.jit
def _attend(
    query, query_strides, sources, lists, out, out_strides, lse, heads, row_limit, dim, value_dim, row_blocks, scale2,
    HAS: tl.constexpr, LISTED: tl.constexpr, OF: tl.constexpr, STAGES: tl.constexpr, CAUSAL: tl.constexpr,
    POSITIVE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BY: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0) % row_blocks
    item = (tl.program_id(0) // row_blocks).to(tl.int64)
    b, h = item // heads, item % heads
    row = tl.arange(0, BM)
    rows = block * BM + row
    start = start_of(query, query_strides, b, h, BY)
    q = load_tile(start, rows, row_limit, query_strides[2], dim, query_strides[3], BD, DOT, BY)
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    o = tl.zeros([BM, BV], tl.float32)
    for j in tl.static_range(len(HAS)):
        src, of = sources[j], lists[j]
        limit = keys_there(src, b, HAS[j])
        at = b * of.strides[0] + h * of.strides[1] + block * of.strides[2]
        for KIND in tl.static_range(FREE, FREE + KINDS):
            if OF[j] >> KIND & 1:
                for i in tl.range(
                    _steps(of, at, limit, KIND, LISTED[j], BN), num_stages=1 if KIND == MIXED else STAGES[j]
                ):  # fmt: skip
                    tile, k, v = _tile(
                        src, of, at, i, b, h, limit, dim, value_dim, KIND, LISTED[j], BN, BD, BV, BY, DOT
                    )  # fmt: skip
                    if KIND == MIXED:
                        columns = tile * BN + tl.arange(0, BN)
                        s = scores(q, k, src, b, h, rows, columns, row_limit, limit, scale2, HAS[j], CAUSAL, PRECISION)
                    elif KIND == TOLD:
                        words = of.words + (at * of.key_blocks + tile) * (BN // 32 * BM)
                        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale2
                        s = tl.where(_allowed(words, row, row < BM, BM, BN), s, float("-inf"))
                    if KIND == FREE:
                        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
                        top, total, o = scaled_step(s, v, top, total, o, scale2, POSITIVE, DOT, PRECISION)
                    else:
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
    of = sizes(query, value_dim)
    row_blocks = triton.cdiv(rows, of.block)
    listed = _listed(sources, causal)
    lists = tuple(
        _lists(query, s, causal, batch, of)[0] if one else _no_lists(query)
        for s, one in zip(sources, listed, strict=True)
    )
    out = heads_inside(query, (batch, heads, rows, value_dim))
    lse = room(query, (batch, heads, rows), torch.float32)
    launch(
        _attend, (batch * heads * row_blocks,), query, strides(query), source_refs, lists, out, out.stride(), lse,
        heads, rows, dim, value_dim, row_blocks, scale * LOG2E.value, HAS=has, LISTED=listed, OF=_kinds(listed, has),
        CAUSAL=causal, POSITIVE=scale > 0, BM=of.block, BN=of.width, BD=power_of_two(dim), BV=power_of_two(value_dim),
        BY=aligned(query, *keys_and_values(sources)), num_warps=of.warps, STAGES=_stages(listed, of.stages),
        **of.registers, **dot_options(query.dtype),
    )  # fmt: skip
    return out, lse


class Sizes(NamedTuple):
    """Of the kernels' tiles.

    On Hopper a program of 128 rows has two groups of four warps. With three stages a tile is asked for two tiles ahead:
    with two, after the products of the one before it, and then waited for. Up to 64 features the forward pass and dQ
    are given 128 registers, which leaves room for two programs on a multiprocessor: one computes exponentials while the
    other multiplies.
    """

    block: int  # queries, of which lists are made
    width: int  # keys, of which lists are made
    keys: int  # whose gradients a program has
    step: int  # queries that it reads at once
    warps: int
    stages: int
    registers: dict  # of the forward pass and of dQ


def sizes(query: Tensor, value_dim: int) -> Sizes:
    wide = power_of_two(query.shape[3]) + power_of_two(value_dim)
    half = query.dtype != torch.float32
    large = half and wide <= 256 and roomy(query.device)
    block = min(128 if large else 64, power_of_two(query.shape[2]))
    warps = 8 if block == 128 else 4
    registers = {"maxnreg": 128} if block == 128 and wide <= 128 else {}
    return Sizes(block, 64 if half else 32, 128 if large else 64 if half else 32, min(block, 64), warps,
                 3 if large else 2, registers)  # fmt: skip


def _listed(sources: Sequence[Source], causal: bool) -> tuple[bool, ...]:
    """Whether of a source there is more to know than how many keys an item has."""
    return tuple(causal or s.mask is not None or s.bias is not None for s in sources)


def _kinds(listed: Sequence[bool], has: Sequence[int]) -> tuple[int, ...]:
    """Of each source, as bits, the kinds that its tiles may be of."""
    free, told, mixed = (1 << kind.value for kind in (FREE, TOLD, MIXED))
    return tuple(
        free | (told if one and not its & BIAS.value else 0) | (mixed if not one or its & (MASK | BIAS).value else 0)
        for one, its in zip(listed, has, strict=True)
    )


def _stages(listed: Sequence[bool], stages: int) -> tuple[int, ...]:
    """Of the loop over each source: what a list says where to find is asked for as long before as the list itself."""
    return tuple(2 * stages - 1 if one else stages for one in listed)


def _no_lists(query: Tensor) -> Lists:
    return Lists(query, 0, query, (0, 0, 0), query, 0, (0, 0, 0))


def _lists(
    query: Tensor, source: Source, causal: bool, batch: int, of: Sizes, by_keys: bool = False
) -> tuple[Lists, Lists | None]:
    """As few as differ: one for all heads, say, that share a mask. And ``by_keys`` those of tiles of keys."""
    (ref,), (has,) = refs(query, [source])
    rows, mask = query.shape[2], source.mask
    shape = [1, 1, 1] if mask is None else list(mask.shape[:3])
    if source.lengths is not None:
        shape[0] = batch
    if causal:
        shape[2] = rows
    items, heads, rows = shape  # one row stands for a block of them
    block, width = of.block, of.width
    row_blocks, key_blocks = triton.cdiv(rows, block), triton.cdiv(source.key.shape[2], width)
    # A key that others are excluded by must be one that the query may attend to, by as much as the mask says.
    near = bool(has & MASK.value) and not has & BIAS.value and not causal
    count = items * heads * row_blocks
    states = room(query, (count, key_blocks), torch.int8)
    rows_near = room(query, (count, key_blocks, block) if near else (1,), torch.int8)
    tiles = room(query, (count, KINDS.value, key_blocks), torch.int32)
    counts = room(query, (count, KINDS.value), torch.int32)
    words = room(query, (count, key_blocks, width // 32, block), torch.int32)
    by_key = room(query, (count, key_blocks, triton.cdiv(block, 32), width) if by_keys else (1,), torch.int32)
    launch(
        _survey, (count, key_blocks), (ref,), states, rows_near, words, by_key, block if rows == 1 else rows, heads,
        row_blocks,
        torch.finfo(mask.dtype).min if near else -math.inf, HAS=has, CAUSAL=causal, NEAR=near, BY_KEY=by_keys, BM=block,
        BN=width, num_warps=4,
    )  # fmt: skip
    launch(
        _list, (count,), states, rows_near, tiles, counts, key_blocks, NEAR=near, BLOCKS=power_of_two(key_blocks),
        BM=block, num_warps=4,
    )  # fmt: skip
    along = (heads * row_blocks if items > 1 else 0, row_blocks if heads > 1 else 0, 1 if row_blocks > 1 else 0)
    by_rows = Lists(tiles, key_blocks, counts, along, words, key_blocks, along)
    if not by_keys:
        return by_rows, None
    group, row_blocks = query.shape[1] // source.key.shape[1], triton.cdiv(query.shape[2], block)
    key_heads = source.key.shape[1] if heads > 1 else 1
    many, wide_blocks = group * row_blocks, triton.cdiv(source.key.shape[2], of.keys)
    count = items * key_heads * wide_blocks
    tiles = room(query, (count, KINDS.value, many), torch.int32)
    counts = room(query, (count, KINDS.value), torch.int32)
    launch(
        _list_by_keys, (count,), states, tiles, counts, along, key_blocks, wide_blocks, key_heads, group, row_blocks,
        BLOCKS=power_of_two(many), WIDE=of.keys // width, num_warps=4,
    )  # fmt: skip
    of_keys = (key_heads * wide_blocks if items > 1 else 0, wide_blocks if heads > 1 else 0, 1)
    return by_rows, Lists(tiles, many, counts, of_keys, by_key, key_blocks, along)


# ---- Backward


@triton.jit
def _query_gradient(
    grad_out, grad_out_strides, grad_lse, query, query_strides, sources, lists, out, out_strides, lse, shifts, deltas,
    grad, grad_strides, heads, row_limit, dim, value_dim, row_blocks, scale, scale2,
    HAS: tl.constexpr, LISTED: tl.constexpr, OF: tl.constexpr, STAGES: tl.constexpr, CAUSAL: tl.constexpr,
    GRAD_LSE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BY: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ of a block of queries, and of each row, for `_key_gradients`, what is subtracted from scores and from dP."""
    block = tl.program_id(0) % row_blocks
    item = (tl.program_id(0) // row_blocks).to(tl.int64)
    b, h = item // heads, item % heads
    row = tl.arange(0, BM)
    rows = block * BM + row
    start = start_of(grad_out, grad_out_strides, b, h, BY)
    do = load_tile(start, rows, row_limit, grad_out_strides[2], value_dim, grad_out_strides[3], BV, DOT, BY)
    start = start_of(out, out_strides, b, h, BY)
    o = load_tile(start, rows, row_limit, out_strides[2], value_dim, out_strides[3], BV, DOT, BY)
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    at_rows = item * row_limit + rows
    if GRAD_LSE:
        delta -= tl.load(grad_lse + at_rows, mask=rows < row_limit, other=0.0)
    shift = tl.load(lse + at_rows, mask=rows < row_limit, other=float("inf")) * LOG2E
    shift = tl.where(shift == float("-inf"), float("inf"), shift)  # exp2(s - inf) = 0: such a row has no weights
    tl.store(shifts + at_rows, shift, mask=rows < row_limit)
    tl.store(deltas + at_rows, delta, mask=rows < row_limit)
    start = start_of(query, query_strides, b, h, BY)
    q = load_tile(start, rows, row_limit, query_strides[2], dim, query_strides[3], BD, DOT, BY)
    dq = tl.zeros([BM, BD], tl.float32)
    for j in tl.static_range(len(HAS)):
        src, of = sources[j], lists[j]
        limit = keys_there(src, b, HAS[j])
        at = b * of.strides[0] + h * of.strides[1] + block * of.strides[2]
        for KIND in tl.static_range(FREE, FREE + KINDS):
            if OF[j] >> KIND & 1:
                # In 128 registers tiles with bits are not fetched ahead: products would wait for each other.
                for i in tl.range(
                    _steps(of, at, limit, KIND, LISTED[j], BN),
                    num_stages=STAGES[j] if KIND == FREE or (KIND == TOLD and BD + BV > 128) else 1,
                ):  # fmt: skip
                    tile, k, v = _tile(
                        src, of, at, i, b, h, limit, dim, value_dim, KIND, LISTED[j], BN, BD, BV, BY, DOT
                    )  # fmt: skip
                    if KIND == MIXED:
                        columns = tile * BN + tl.arange(0, BN)
                        s = scores(q, k, src, b, h, rows, columns, row_limit, limit, scale2, HAS[j], CAUSAL, PRECISION)
                    else:
                        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale2
                    p = tl.exp2(s - shift[:, None])
                    if KIND == TOLD:
                        words = of.words + (at * of.key_blocks + tile) * (BN // 32 * BM)
                        p = tl.where(_allowed(words, row, row < BM, BM, BN), p, 0.0)
                    ds = p * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - delta[:, None])
                    dq = tl.dot(ds.to(DOT), k, dq, input_precision=PRECISION)
    to = start_of(grad, grad_strides, b, h, BY)
    store_tile(to, dq * scale, rows, row_limit, grad_strides[2], dim, grad_strides[3], BD, BY)


@triton.jit
def _rows_of(blocks, i, row_blocks, h0, LISTED: tl.constexpr, PARTS: tl.constexpr, STEP: tl.constexpr):
    """Head and first query of step ``i``."""
    if LISTED:
        at = tl.load(blocks + i // PARTS)
    else:
        at = i // PARTS
    return h0 + at // row_blocks, (at % row_blocks * PARTS + i % PARTS) * STEP


@triton.jit
def _load_rows(
    query, query_strides, grad_out, grad_out_strides, shifts, deltas, b, h, first, heads, row_limit, dim, value_dim,
    WHOLE: tl.constexpr, STEP: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BY: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Queries, gradients of their outputs, and what is subtracted from their scores and from dP. WHOLE: all exist."""
    local = tl.arange(0, STEP)
    if WHOLE:  # bounds of rows are a fifth of the instructions of `_key_gradients`
        left = STEP
    else:
        left = row_limit - first
    start = start_of(query, query_strides, b, h, BY) + tl.cast(first, tl.int64) * (query_strides[2] // BY * BY)
    q = load_tile(start, local, left, query_strides[2], dim, query_strides[3], BD, DOT, BY)
    start = start_of(grad_out, grad_out_strides, b, h, BY) + tl.cast(first, tl.int64) * (grad_out_strides[2] // BY * BY)
    do = load_tile(start, local, left, grad_out_strides[2], value_dim, grad_out_strides[3], BV, DOT, BY)
    at = (b * heads + h) * row_limit + first
    shift = tl.load(shifts + at + local, mask=local < left, other=float("inf"))
    return q, do, shift, tl.load(deltas + at + local, mask=local < left, other=0.0)


@triton.jit
def _key_gradients(
    grad_out, grad_out_strides, query, query_strides, sources, lists, grads, first, shifts, deltas, heads, row_limit,
    dim, value_dim, row_blocks, scale, scale2,
    HAS: tl.constexpr, LISTED: tl.constexpr, OF: tl.constexpr, STAGES: tl.constexpr, CAUSAL: tl.constexpr,
    WHOLE: tl.constexpr, BN: tl.constexpr, TILE: tl.constexpr, PARTS: tl.constexpr, STEP: tl.constexpr,
    BD: tl.constexpr, BV: tl.constexpr, BY: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dK and dV of a tile of keys, over the queries of all heads of its group. Keys are rows of all that is per key and
    query: weights and their gradients go from registers into the products that use them up."""
    program = tl.program_id(0)
    for j in tl.static_range(len(HAS)):
        if (program >= first[j]) & (program < first[j + 1]):
            src, of, grad = sources[j], lists[j], grads[j]
            key_blocks = tl.cdiv(src.keys, BN)
            tile = (program - first[j]) % key_blocks
            item = ((program - first[j]) // key_blocks).to(tl.int64)
            b, kh = item // (heads // src.group), item % (heads // src.group)
            limit = keys_there(src, b, HAS[j])
            local = tl.arange(0, BN)
            columns = tile.to(tl.int64) * BN + local
            start = start_of(src.key, src.key_strides, b, kh, BY)
            k = load_tile(start, columns, limit, src.key_strides[2], dim, src.key_strides[3], BD, DOT, BY)
            start = start_of(src.value, src.value_strides, b, kh, BY)
            v = load_tile(start, columns, limit, src.value_strides[2], value_dim, src.value_strides[3], BV, DOT, BY)
            dk = tl.zeros([BN, BD], tl.float32)
            dv = tl.zeros([BN, BV], tl.float32)
            at = b * of.strides[0] + kh * of.strides[1] + tile * of.strides[2]
            PACKS: tl.constexpr = (PARTS * STEP + 31) // 32
            of_key = local // TILE * (PACKS * TILE) + local % TILE  # where the word of a key is
            for KIND in tl.static_range(FREE, FREE + KINDS):
                if OF[j] >> KIND & 1 and (LISTED[j] or KIND == FREE):
                    blocks = of.tiles + (at * KINDS + KIND - FREE) * of.room
                    if LISTED[j]:
                        many = tl.load(of.counts + at * KINDS + KIND - FREE)
                    else:  # what does not exist of the keys is in rows of its own
                        many = tl.where(tile * BN < limit, src.group * row_blocks, 0)
                    for i in tl.range(many * PARTS, num_stages=1 if KIND == MIXED else STAGES[j]):
                        h, row = _rows_of(blocks, i, row_blocks, kh * src.group, LISTED[j], PARTS, STEP)
                        q, do, shift, delta = _load_rows(
                            query, query_strides, grad_out, grad_out_strides, shifts, deltas, b, h, row, heads,
                            row_limit, dim, value_dim, WHOLE, STEP, BD, BV, BY, DOT,
                        )  # fmt: skip
                        if KIND == MIXED:
                            rows = row + tl.arange(0, STEP)
                            plus, may = added(
                                src, b, h, rows[None, :], columns[:, None], row_limit, limit, HAS[j], CAUSAL
                            )  # fmt: skip
                        s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale2
                        if KIND == MIXED:
                            s = masked(s, plus, may, HAS[j])
                        p = tl.exp2(s - shift[None, :])
                        if KIND == TOLD:
                            block = row // (PARTS * STEP)
                            its = b * of.word_strides[0] + h * of.word_strides[1] + block * of.word_strides[2]
                            words = of.words + (its * of.key_blocks + tile * (BN // TILE)) * (PACKS * TILE)
                            words += row % (PARTS * STEP) // 32 * TILE
                            p = tl.where(_allowed(words, of_key, columns < of.key_blocks * TILE, TILE, STEP), p, 0.0)
                        dv = tl.dot(p.to(DOT), do, dv, input_precision=PRECISION)
                        ds = p * (tl.dot(v, tl.trans(do), input_precision=PRECISION) - delta[None, :])
                        dk = tl.dot(ds.to(DOT), q, dk, input_precision=PRECISION)
            there = (columns < limit)[:, None]
            to = start_of(grad.key, grad.key_strides, b, kh, BY)
            dk = tl.where(there, dk * scale, 0.0)
            store_tile(to, dk, columns, src.keys, grad.key_strides[2], dim, grad.key_strides[3], BD, BY)
            to = start_of(grad.value, grad.value_strides, b, kh, BY)
            dv = tl.where(there, dv, 0.0)
            store_tile(to, dv, columns, src.keys, grad.value_strides[2], value_dim, grad.value_strides[3], BV, BY)


def differentiates(query: Tensor, sources: Sequence[Source]) -> bool:
    """Whether `backward` can: in float32, of three products, "efficient" is no slower, and two sums of 256 features for
    each key find no room in the registers."""
    wide = power_of_two(query.shape[3]) + power_of_two(sources[0].value.shape[3])
    return query.dtype != torch.float32 and wide <= 256 and roomy(query.device, 96)


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
    batch, heads, rows = lse.shape
    dim, value_dim = query.shape[3], sources[0].value.shape[3]
    grad_query, of_query = _room_for(query, query, batch)
    grad_keys, of_keys = zip(*(_room_for(query, s.key, batch) for s in sources), strict=True)
    grad_values, of_values = zip(*(_room_for(query, s.value, batch) for s in sources), strict=True)
    grads = tuple(
        Gradient(k, v, k.stride(), v.stride())
        for s, k, v in zip(sources, of_keys, of_values, strict=True)
        if s.key.shape[2]
    )
    sources = [s for s in sources if s.key.shape[2]]
    source_refs, has = refs(query, sources)
    listed = _listed(sources, causal)
    of = sizes(query, value_dim)
    row_blocks = triton.cdiv(rows, of.block)
    by_rows, by_keys = zip(
        *(
            _lists(query, s, causal, batch, of, by_keys=True) if one else (_no_lists(query),) * 2
            for s, one in zip(sources, listed, strict=True)
        ),
        strict=True,
    )
    shifts, deltas = (room(query, (batch, heads, rows), torch.float32) for _ in range(2))
    options = dict(
        HAS=has, LISTED=listed, OF=_kinds(listed, has), STAGES=_stages(listed, of.stages), CAUSAL=causal,
        BD=power_of_two(dim),
        BV=power_of_two(value_dim), BY=aligned(query, grad_out, out, *keys_and_values(sources)),
        **dot_options(query.dtype),
    )  # fmt: skip
    launch(
        _query_gradient, (batch * heads * row_blocks,), grad_out, grad_out.stride(),
        query if grad_lse is None else grad_lse.contiguous(), query, strides(query), source_refs, by_rows, out,
        out.stride(), lse, shifts, deltas, of_query, of_query.stride(), heads, rows, dim, value_dim, row_blocks, scale,
        scale * LOG2E.value, GRAD_LSE=grad_lse is not None, BM=of.block, BN=of.width, num_warps=of.warps,
        **of.registers, **options,
    )  # fmt: skip
    first = [0]
    for s in sources:
        first.append(first[-1] + batch * s.key.shape[1] * triton.cdiv(s.key.shape[2], of.keys))
    launch(
        _key_gradients, (first[-1],), grad_out, grad_out.stride(), query, strides(query), source_refs, by_keys, grads,
        tuple(first), shifts, deltas, heads, rows, dim, value_dim, row_blocks, scale, scale * LOG2E.value, BN=of.keys,
        TILE=of.width, WHOLE=rows % of.block == 0, PARTS=of.block // of.step, STEP=of.step,
        num_warps=8 if of.keys == 128 else 4, **options,
    )  # fmt: skip
    for whole, part in zip((grad_query, *grad_keys, *grad_values), (of_query, *of_keys, *of_values), strict=True):
        if part is not whole:
            add_up(part, whole, batch)
    return grad_query, list(grad_keys), list(grad_values)


def _room_for(query: Tensor, x: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    """The gradient of ``x``, and what kernels write: the same, or where the batch shares ``x`` those of each item."""
    grad = heads_inside(query, x.shape)
    if x.shape[0] == batch or not x.shape[2]:
        return grad, grad
    return grad, heads_inside(query, (batch, *x.shape[1:]), torch.float32)
