"""Cross-attention to a few hundred keys: those of all sources stay on chip, the queries pass by once.

A flash kernel is built for long keys: it pays for 128 or more of each source, a launch for each and, backward, for
an accumulator in memory for dQ. Here a program keeps the keys and values of every source, in tiles cut to
their number (`tiles_of`: 77 keys are 64 + 16), and takes block after block of queries. Bytes that no version can avoid:
Q + O forward, Q + dO + dQ (+ O if joint) backward; the sources, some kilobytes, come from the second level cache.

In the units of exp2, with P_j = exp(S_j − L_j), U_j = dO V_jᵀ and a factor g_j for each row,

    r_j = Σ_k P_jk U_jk (which is dO · O_j: the gradient of g_j)      dS_j = P_j ∘ (g_j (U_j − r_j) + dL_j)

so gates and the log-sum-exp's gradient cost nothing, and O_j is not saved. With one softmax for all sources r = dO · O.
A gate with a value for each feature is multiplied into dO instead, and costs one more product.

dQ is summed in registers. dK and dV are summed in registers over the blocks of one program, written once by each, and
added up by a second small kernel in a fixed order: the result is the same, bit for bit, each time.
"""

# Triton knows no unpacking, and no conditional expression that picks code:
# ruff: noqa: RUF005, SIM108
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmfast.fusion._inputs import Source, keys_and_values
from mmfast.fusion.merged import heads_inside, sum_batch
from mmfast.fusion.recording import launch, room, spoil
from mmfast.fusion.triton_short_sizes import (
    KEPT,
    backward_sizes,
    forward_sizes,
    grid_of,
    grid_of_sums,
    holds,
    lay_out,
    soonest,
    widths_together,
)
from mmfast.fusion.triton_tiles import (
    BIAS,
    GATE,
    GATE_WIDE,
    LOG2E,
    MASK,
    MASK_BOOL,
    aligned,
    dot_options,
    keys_there,
    load_keys,
    load_tile,
    load_values,
    refs,
    scores,
    softmax_end,
    softmax_step,
    softmax_sum,
    start_of,
    store_tile,
    strides,
)

# Numbers that differ from batch to batch where lengths do: compiled once, and not for 1, multiples of 16 and others.
_ANY = ("row_limit", "chunks", "blocks", "row_blocks")


# ---- Forward


@triton.jit
def _factor(src, b, h, rows, row_limit, HAS: tl.constexpr):
    """The gate of each row, where it does not differ from feature to feature."""
    if GATE & HAS:
        gate = src.gate + b * src.gate_strides[0] + h * src.gate_strides[1]
        return tl.load(gate + rows.to(tl.int64) * src.gate_strides[2], mask=rows < row_limit, other=0.0).to(tl.float32)
    else:
        return rows * 0.0 + src.factor


@triton.jit
def _factors(sources, b, h, rows, row_limit, HAS: tl.constexpr):
    factors = ()
    for j in tl.static_range(len(HAS)):
        if GATE_WIDE & HAS[j]:
            factors = factors + (rows * 0.0,)
        else:
            factors = factors + (_factor(sources[j], b, h, rows, row_limit, HAS[j]),)
    return factors


@triton.jit
def _gated(o, src, b, h, rows, row_limit, value_dim, BV: tl.constexpr, HAS: tl.constexpr):
    if GATE_WIDE & HAS:
        gate = src.gate + b * src.gate_strides[0] + h * src.gate_strides[1]
        return o * load_tile(gate, rows, row_limit, src.gate_strides[2], value_dim, src.gate_strides[3], BV, tl.float32)
    else:
        return o * _factor(src, b, h, rows, row_limit, HAS)[:, None]


@triton.jit
def _tile(
    ks, vs, src, b, h, columns, limit, dim, value_dim,
    T: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr, HOLD: tl.constexpr,
    BY: tl.constexpr,
):  # fmt: skip
    """Keys and values of tile T: those that are held, or read again."""
    if HOLD:
        return ks[T], vs[T]
    else:
        k = load_keys(src, b, h, columns, limit, dim, BD, DOT, BY)
        return k, load_values(src, b, h, columns, limit, value_dim, BV, DOT, BY)


@triton.jit(do_not_specialize=_ANY)
def _forward(
    query, query_strides, sources, out, out_strides, lse, lse_strides, row_lengths, heads, row_limit, dim, value_dim,
    chunks, blocks, scale2,
    HAS: tl.constexpr, OF: tl.constexpr, START: tl.constexpr, WIDE: tl.constexpr, FULL: tl.constexpr,
    FIRST: tl.constexpr, LAST: tl.constexpr, JOINT: tl.constexpr, CAUSAL: tl.constexpr, POOL: tl.constexpr,
    ROWS: tl.constexpr, KEEP: tl.constexpr, FOLD: tl.constexpr, ALONE: tl.constexpr, RAW: tl.constexpr,
    HOLD: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BY: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0) % chunks
    item = (tl.program_id(0) // chunks).to(tl.int64)
    b, h = item // heads, item % heads
    ks, vs, limits = (), (), ()
    for t in tl.static_range(len(OF)):
        limit = keys_there(sources[OF[t]], b, HAS[OF[t]])
        columns = START[t] + tl.arange(0, WIDE[t])
        if HOLD:
            ks = ks + (load_keys(sources[OF[t]], b, h, columns, limit, dim, BD, DOT, BY),)
            vs = vs + (load_values(sources[OF[t]], b, h, columns, limit, value_dim, BV, DOT, BY),)
        limits = limits + (limit,)
    query = start_of(query, query_strides, b, h, BY)
    pooled = tl.zeros([BV], tl.float32)
    if ROWS:
        counted = tl.load(row_lengths + b)
    else:
        counted = row_limit
    next_factors = ()
    if FOLD and not JOINT:
        next_factors = _factors(sources, b, h, chunk * blocks * BM + tl.arange(0, BM), row_limit, HAS)
    for i in range(blocks):
        rows = (chunk * blocks + i) * BM + tl.arange(0, BM)
        q = load_tile(query, rows, row_limit, query_strides[2], dim, query_strides[3], BD, DOT, BY)
        factors = next_factors
        if FOLD and not JOINT:  # of the next block: the compiler fetches ahead what products need, and nothing else
            next_factors = _factors(sources, b, h, rows + BM, row_limit, HAS)
        result = tl.zeros([BM, BV], tl.float32)
        top = tl.full([BM], float("-inf"), tl.float32)
        total = tl.zeros([BM], tl.float32)
        o = tl.zeros([BM, BV], tl.float32)
        for t in tl.static_range(len(OF)):
            if KEEP[t]:
                if FIRST[t] == t:  # all scores of the softmax at once: what it is divided by is known before a product
                    kept = ()
                    for u in tl.static_range(t, LAST[t] + 1):
                        columns = START[u] + tl.arange(0, WIDE[u])
                        k, _ = _tile(
                            ks, vs, sources[OF[u]], b, h, columns, limits[u], dim, value_dim, u, BD, BV, DOT, HOLD, BY
                        )  # fmt: skip
                        s = scores(
                            q, k, sources[OF[u]], b, h, rows, columns, row_limit, limits[u], scale2, HAS[OF[u]],
                            CAUSAL, PRECISION, FULL[u], RAW,
                        )  # fmt: skip
                        top = tl.maximum(top, tl.max(s, 1))
                        kept = kept + (s,)
                    if RAW:
                        top *= scale2
                    shift = tl.where(top == float("-inf"), 0.0, top)
                    weights = ()
                    for u in tl.static_range(t, LAST[t] + 1):
                        if RAW:
                            p = tl.exp2(kept[u - t] * scale2 - shift[:, None])
                        else:
                            p = tl.exp2(kept[u - t] - shift[:, None])
                        total += tl.sum(p, 1)
                        weights = weights + (p,)
                    factor, one = softmax_sum(top, total)
                    to = lse + b * lse_strides[1] + h * lse_strides[2]
                    if not JOINT:
                        to += OF[t] * lse_strides[0]
                        if FOLD:
                            factor *= factors[OF[t]]
                    tl.store(to + rows, one, mask=rows < row_limit)
                    for u in tl.static_range(t, LAST[t] + 1):
                        columns = START[u] + tl.arange(0, WIDE[u])
                        _, v = _tile(
                            ks, vs, sources[OF[u]], b, h, columns, limits[u], dim, value_dim, u, BD, BV, DOT, HOLD, BY
                        )  # fmt: skip
                        if ALONE:
                            p = weights[u - t].to(DOT)
                        else:
                            p = (weights[u - t] * factor[:, None]).to(DOT)
                        if JOINT or FOLD:
                            result = tl.dot(p, v, result, input_precision=PRECISION)
                        else:
                            o = tl.dot(p, v, o, input_precision=PRECISION)
                    if ALONE:
                        result *= factor[:, None]
                    if not (JOINT or FOLD):
                        result += _gated(o, sources[OF[t]], b, h, rows, row_limit, value_dim, BV, HAS[OF[t]])
            else:
                columns = START[t] + tl.arange(0, WIDE[t])
                k, v = _tile(ks, vs, sources[OF[t]], b, h, columns, limits[t], dim, value_dim, t, BD, BV, DOT, HOLD, BY)
                s = scores(
                    q, k, sources[OF[t]], b, h, rows, columns, row_limit, limits[t], scale2, HAS[OF[t]], CAUSAL,
                    PRECISION, FULL[t],
                )  # fmt: skip
                top, total, o = softmax_step(s, v, top, total, o, DOT, PRECISION)
                if LAST[t] == t:
                    o, one = softmax_end(top, total, o)
                    to = lse + b * lse_strides[1] + h * lse_strides[2]
                    if not JOINT:
                        o = _gated(o, sources[OF[t]], b, h, rows, row_limit, value_dim, BV, HAS[OF[t]])
                        to += OF[t] * lse_strides[0]
                    tl.store(to + rows, one, mask=rows < row_limit)
                    result += o
            if LAST[t] == t:
                top = tl.full([BM], float("-inf"), tl.float32)
                total = tl.zeros([BM], tl.float32)
                o = tl.zeros([BM, BV], tl.float32)
        if POOL:
            pooled += tl.sum(tl.where((rows < counted)[:, None], result, 0.0), 0)
        else:
            to = start_of(out, out_strides, b, h, BY)
            store_tile(to, result, rows, row_limit, out_strides[2], value_dim, out_strides[3], BV, BY)
    if POOL:
        columns = tl.arange(0, BV)
        to = out + b * out_strides[0] + h * out_strides[1] + chunk.to(tl.int64) * out_strides[2]
        tl.store(to + columns, pooled, mask=columns < value_dim)


def forward(
    query: Tensor,
    sources: Sequence[Source],
    joint: bool,
    causal: bool,
    scale: float,
    batch: int,
    pool: bool = False,
    row_lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Output ``(B, H, L, D_v)``, or its sum over the first ``row_lengths`` queries; log-sum-exps ``(N, B, H, L)``."""
    _, heads, rows, dim = query.shape
    value_dim = sources[0].value.shape[3]
    lse = room(query, (1 if joint else len(sources), batch, heads, rows), torch.float32)
    if any(not s.key.shape[2] for s in sources):
        spoil()
        lse.fill_(-torch.inf)
    source_refs, has = refs(query, sources)
    layout = lay_out(query, sources, joint)
    added = any(of & (MASK.value | MASK_BOOL.value | BIAS.value) for of in has)
    block, programs, warps, stages, registers = forward_sizes(query, layout, not added)
    if registers:  # all run at once: as many as there are places for, and keys and values are waited for once
        chunks, blocks = soonest(triton.cdiv(rows, block), batch * heads, programs, 1)
    else:
        chunks, blocks = grid_of(query, batch, block, programs)
    if pool:
        spoil()
        out = room(query, (batch, heads, chunks, value_dim), torch.float32)
    else:
        out = heads_inside(query, (batch, heads, rows, value_dim))
    keep = [
        width <= KEPT and not has[of] & GATE_WIDE.value
        for width, of in zip(widths_together(layout), layout["OF"], strict=True)
    ]
    # One softmax: divided by its sum, and multiplied by its gate, after the product, which need not wait for them.
    alone = all(keep) and len(set(layout["FIRST"])) == 1
    launch(
        _forward, (batch * heads * chunks,), query, strides(query), source_refs, out, out.stride(), lse, lse.stride(),
        query if row_lengths is None else row_lengths, heads, rows, dim, value_dim, chunks, blocks, scale * LOG2E.value,
        HAS=has, JOINT=joint, CAUSAL=causal, POOL=pool, ROWS=row_lengths is not None, KEEP=tuple(keep),
        FOLD=alone or query.dtype != torch.float16, ALONE=alone,
        RAW=scale > 0 and not any(of & (MASK.value | BIAS.value) for of in has),
        HOLD=holds(query, block), BM=block, BY=aligned(query, *keys_and_values(sources)), num_warps=warps,
        num_stages=stages, **({"maxnreg": registers} if registers else {}), **layout, **dot_options(query.dtype),
    )  # fmt: skip
    return (out.sum(2) if pool else out), lse


# ---- Backward


@triton.jit
def _zeros(ROWS: tl.constexpr, WIDTH: tl.constexpr):  # an element of a compile-time tuple is no shape until passed on
    return tl.zeros([ROWS, WIDTH], tl.float32)


@triton.jit
def _weights_and_gradient(
    q, do, k, v, src, b, h, rows, columns, row_limit, limit, scale2, shift,
    HAS: tl.constexpr, CAUSAL: tl.constexpr, PREC: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """P and U of a tile."""
    s = scores(q, k, src, b, h, rows, columns, row_limit, limit, scale2, HAS, CAUSAL, PREC, FULL)
    return tl.exp2(s - shift[:, None]), tl.dot(do, tl.trans(v), input_precision=PREC)


@triton.jit(do_not_specialize=_ANY)
def _backward(
    grad_out, grad_out_strides, grad_lse, query, query_strides, sources, out, out_strides, lse, lse_strides,
    grad_query, grad_query_strides, grad_gates, outs, partial, row_lengths, batch, heads, row_limit, dim, value_dim,
    chunks, blocks, scale, scale2,
    HAS: tl.constexpr, OF: tl.constexpr, START: tl.constexpr, WIDE: tl.constexpr, FULL: tl.constexpr,
    FIRST: tl.constexpr, LAST: tl.constexpr, JOINT: tl.constexpr, OUT: tl.constexpr, CAUSAL: tl.constexpr,
    GRAD_LSE: tl.constexpr, GRAD_GATE: tl.constexpr, ROWS: tl.constexpr, KEEP: tl.constexpr, HOLD: tl.constexpr,
    DIRECT: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BY: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, TOTAL: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0) % chunks
    item = (tl.program_id(0) // chunks).to(tl.int64)
    b, h = item // heads, item % heads
    ks, vs, limits, dks, dvs = (), (), (), (), ()
    for t in tl.static_range(len(OF)):
        limit = keys_there(sources[OF[t]], b, HAS[OF[t]])
        columns = START[t] + tl.arange(0, WIDE[t])
        if HOLD:
            ks = ks + (load_keys(sources[OF[t]], b, h, columns, limit, dim, BD, DOT, BY),)
            vs = vs + (load_values(sources[OF[t]], b, h, columns, limit, value_dim, BV, DOT, BY),)
        limits = limits + (limit,)
        dks = dks + (_zeros(WIDE[t], BD),)
        dvs = dvs + (_zeros(WIDE[t], BV),)
    query = start_of(query, query_strides, b, h, BY)
    grad_out = start_of(grad_out, grad_out_strides, b, h, BY)
    grad_query = start_of(grad_query, grad_query_strides, b, h, BY)
    if ROWS:
        counted = tl.minimum(tl.load(row_lengths + b), row_limit)
    else:
        counted = row_limit
    for i in range(blocks):
        rows = (chunk * blocks + i) * BM + tl.arange(0, BM)
        q = load_tile(query, rows, row_limit, query_strides[2], dim, query_strides[3], BD, DOT, BY)
        do = load_tile(grad_out, rows, counted, grad_out_strides[2], value_dim, grad_out_strides[3], BV, DOT, BY)
        dq = tl.zeros([BM, BD], tl.float32)
        new_dks, new_dvs = (), ()
        for t in tl.static_range(len(OF)):
            src = sources[OF[t]]
            columns = START[t] + tl.arange(0, WIDE[t])
            if FIRST[t] == t:
                at = b * lse_strides[1] + h * lse_strides[2] + rows
                if not JOINT:
                    at += OF[t] * lse_strides[0]
                shift = tl.load(lse + at, mask=rows < row_limit, other=0.0) * LOG2E
                shift = tl.where(shift == float("-inf"), 0.0, shift)
                g = tl.full([BM], 1.0, tl.float32)
                scaled = do
                if not JOINT:
                    gate = src.gate + b * src.gate_strides[0] + h * src.gate_strides[1]
                    if GATE_WIDE & HAS[OF[t]]:
                        wide = load_tile(
                            gate, rows, row_limit, src.gate_strides[2], value_dim, src.gate_strides[3], BV, tl.float32
                        )
                        scaled = (do.to(tl.float32) * wide).to(DOT)
                    elif GATE & HAS[OF[t]]:
                        g = tl.load(gate + rows.to(tl.int64) * src.gate_strides[2], mask=rows < row_limit, other=0.0)
                        g = g.to(tl.float32)
                    else:
                        g = g * src.factor
                if OUT:
                    o = load_tile(
                        start_of(out, out_strides, b, h, BY), rows, row_limit, out_strides[2], value_dim,
                        out_strides[3], BV, tl.float32, BY,
                    )  # fmt: skip
                    r = tl.sum(do.to(tl.float32) * o, 1)
                else:  # r is a sum over all tiles of the softmax: few stay in registers, many are computed twice
                    r = tl.zeros([BM], tl.float32)
                    kept = ()
                    for u in tl.static_range(t, LAST[t] + 1):
                        others = START[u] + tl.arange(0, WIDE[u])
                        k, v = _tile(
                            ks, vs, sources[OF[u]], b, h, others, limits[u], dim, value_dim, u, BD, BV, DOT, HOLD, BY
                        )  # fmt: skip
                        p, dp = _weights_and_gradient(
                            q, scaled, k, v, sources[OF[u]], b, h, rows, others, row_limit, limits[u], scale2, shift,
                            HAS[OF[u]], CAUSAL, PRECISION, FULL[u],
                        )  # fmt: skip
                        r += tl.sum(p * dp, 1)
                        kept = kept + (p, dp)
                less = -g * r
                if GRAD_LSE:
                    less += tl.load(grad_lse + at, mask=rows < row_limit, other=0.0)
                if GATE_WIDE & HAS[OF[t]]:
                    unscaled = tl.zeros([BM, BV], tl.float32)
            k, v = _tile(ks, vs, src, b, h, columns, limits[t], dim, value_dim, t, BD, BV, DOT, HOLD, BY)
            if KEEP[t]:
                p, dp = kept[2 * (t - FIRST[t])], kept[2 * (t - FIRST[t]) + 1]
            else:
                p, dp = _weights_and_gradient(
                    q, scaled, k, v, src, b, h, rows, columns, row_limit, limits[t], scale2, shift,
                    HAS[OF[t]], CAUSAL, PRECISION, FULL[t],
                )  # fmt: skip
            ds = (p * (g[:, None] * dp + less[:, None])).to(DOT)
            new_dks = new_dks + (tl.dot(tl.trans(ds), q, dks[t], input_precision=PRECISION),)
            weighted = (p * g[:, None]).to(DOT)
            new_dvs = new_dvs + (tl.dot(tl.trans(weighted), scaled, dvs[t], input_precision=PRECISION),)
            dq = tl.dot(ds, k, dq, input_precision=PRECISION)
            if GRAD_GATE[OF[t]]:
                to = grad_gates[OF[t]]
                if GATE_WIDE & HAS[OF[t]]:
                    unscaled = tl.dot(p.to(DOT), v, unscaled, input_precision=PRECISION)
                    if LAST[t] == t:
                        to += (b * heads + h) * row_limit * value_dim
                        store_tile(to, do.to(tl.float32) * unscaled, rows, row_limit, value_dim, value_dim, 1, BV)
                elif LAST[t] == t:
                    tl.store(to + (b * heads + h) * row_limit + rows, r, mask=rows < row_limit)
        dks, dvs = new_dks, new_dvs
        store_tile(grad_query, dq * scale, rows, row_limit, grad_query_strides[2], dim, grad_query_strides[3], BD, BY)
    # partial: (chunks, B, H, TOTAL, BD + BV)
    partial += (chunk.to(tl.int64) * batch * heads + item) * (TOTAL * (BD + BV))
    offset = 0
    for t in tl.static_range(len(OF)):
        if DIRECT:
            rows = START[t] + tl.arange(0, WIDE[t])
            to = outs[2 * OF[t]]
            start = start_of(to.tensor, to.strides, b, h, BY)
            store_tile(start, dks[t] * scale, rows, to.rows, to.strides[2], dim, to.strides[3], BD, BY)
            to = outs[2 * OF[t] + 1]
            start = start_of(to.tensor, to.strides, b, h, BY)
            store_tile(start, dvs[t], rows, to.rows, to.strides[2], value_dim, to.strides[3], BV, BY)
        else:
            rows = offset + tl.arange(0, WIDE[t])
            store_tile(partial, dks[t] * scale, rows, TOTAL, BD + BV, BD, 1, BD)
            store_tile(partial + BD, dvs[t], rows, TOTAL, BD + BV, BV, 1, BV)
            offset += WIDE[t]


@triton.jit(do_not_specialize=_ANY)
def _add_up(
    partial, outs, batch, heads, row_blocks, chunks,
    ROW: tl.constexpr, COLUMN: tl.constexpr, ITEMS: tl.constexpr, GROUP: tl.constexpr, TOTAL: tl.constexpr,
    PITCH: tl.constexpr, BS: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """Gradients of keys and values: sums over chunks, the heads that share a key and, if it is shared, the batch."""
    rows = tl.program_id(0) % row_blocks * BS + tl.arange(0, BS)
    for n in tl.static_range(len(ROW)):
        out = outs[n]
        if tl.program_id(1) == n:
            key_heads = heads // GROUP[n]
            item = (tl.program_id(0) // row_blocks).to(tl.int64)
            b, h = item // key_heads, item % key_heads
            if b < out.batch:
                total = tl.zeros([BS, BW], tl.float32)
                for i in range(chunks * (ITEMS[n] * GROUP[n])):
                    at = i % (ITEMS[n] * GROUP[n])
                    of = (
                        ((i // (ITEMS[n] * GROUP[n])) * batch + b + at // GROUP[n]) * heads
                        + h * GROUP[n]
                        + at % GROUP[n]
                    )
                    start = partial + of * (TOTAL * PITCH) + ROW[n] * PITCH + COLUMN[n]
                    total += load_tile(start, rows, out.rows, PITCH, out.width, 1, BW, tl.float32)
                to = out.tensor + b * out.strides[0] + h * out.strides[1]
                store_tile(to, total, rows, out.rows, out.strides[2], out.width, out.strides[3], BW)


class _Sum(NamedTuple):
    """A gradient to write, and its size."""

    tensor: Tensor
    batch: int
    rows: int
    width: int
    strides: tuple[int, int, int, int]


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    sources: Sequence[Source],
    out: Tensor | None,
    lse: Tensor,
    joint: bool,
    causal: bool,
    scale: float,
    gates: Sequence[bool],
    row_lengths: Tensor | None = None,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor | None]]:
    """Gradients of query, keys, values and the gates that ``gates`` asks for, before `reduced`. ``out`` saves work, if
    joint."""
    out = out if joint else None  # decoupled, it is a sum of what belongs to different softmaxes
    lse = lse.contiguous()  # hooks for saved tensors may have changed its strides
    _, batch, heads, rows = lse.shape
    dim, value_dim = query.shape[3], sources[0].value.shape[3]
    source_refs, has = refs(query, sources)
    layout = lay_out(query, sources, joint)
    block, programs, warps, stages, _ = backward_sizes(query, layout, out is not None)
    chunks, blocks = grid_of_sums(query, batch, block, programs)
    total, pitch = sum(layout["WIDE"]), layout["BD"] + layout["BV"]
    grad_keys = [heads_inside(s.key, s.key.shape) for s in sources]
    grad_values = [heads_inside(s.value, s.value.shape) for s in sources]
    outs = tuple(
        _Sum(x, x.shape[0], x.shape[2], x.shape[3], x.stride())
        for pair in zip(grad_keys, grad_values, strict=True)
        for x in pair
    )
    # Where one program has all queries of the only head and item that see a key, there is nothing to add up.
    direct = chunks == 1 and all(x.shape[:2] == (batch, heads) for x in (*grad_keys, *grad_values))
    shape = (0,) if direct else (chunks, batch, heads, total, pitch)
    partial = room(query, shape, torch.float32)
    shared = query.shape[0] != batch
    grad_query = heads_inside(query, (batch, heads, rows, dim), torch.float32 if shared else None)
    grad_gates = [
        _room_for(query, s.gate, (batch, heads, rows, value_dim if h & GATE_WIDE.value else 1)) if wanted else query
        for wanted, s, h in zip(gates, sources, has, strict=True)
    ]
    for grad, source, wanted in zip(grad_gates, sources, gates, strict=True):
        if wanted and not source.key.shape[2]:
            spoil()
            grad.zero_()
    saved = query if out is None else out
    launch(
        _backward, (batch * heads * chunks,), grad_out, grad_out.stride(),
        query if grad_lse is None else grad_lse.contiguous(), query, strides(query), source_refs, saved, strides(saved),
        lse, lse.stride(), grad_query, grad_query.stride(), tuple(grad_gates), outs, partial,
        query if row_lengths is None else row_lengths, batch, heads, rows, dim, value_dim, chunks, blocks, scale,
        scale * LOG2E.value, HAS=has, JOINT=joint, OUT=out is not None, CAUSAL=causal, GRAD_LSE=grad_lse is not None,
        GRAD_GATE=tuple(bool(g) for g in gates), ROWS=row_lengths is not None,
        KEEP=tuple(out is None and width <= KEPT for width in widths_together(layout)), HOLD=holds(query, block),
        DIRECT=direct, BM=block, BY=aligned(query, grad_out, saved, *keys_and_values(sources)), TOTAL=total,
        num_warps=warps, num_stages=stages, **layout, **dot_options(query.dtype),
    )  # fmt: skip
    if not direct:
        _sum_up(partial, outs, layout)
    return (
        grad_query,
        grad_keys,
        grad_values,
        [g if wanted else None for g, wanted in zip(grad_gates, gates, strict=True)],
    )


def _room_for(query: Tensor, gate: Tensor, full: tuple[int, ...]) -> Tensor:
    return room(query, full, gate.dtype if gate.shape == full else torch.float32)


def reduced(
    query: Tensor, gates: Sequence[Tensor], grad_query: Tensor, grad_gates: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Gradients of the query and of gates, if there are any, summed over what these were broadcast along."""
    if query.shape[0] != grad_query.shape[0]:
        grad_query = sum_batch(grad_query, query.shape, query.dtype)
    return grad_query, [_sum_to(g, gate) for g, gate in zip(grad_gates, gates, strict=False)]


def _sum_to(full: Tensor, gate: Tensor) -> Tensor:
    along = [d for d in range(4) if gate.shape[d] == 1 and full.shape[d] != 1]
    return (full.sum(along, keepdim=True) if along else full).to(gate.dtype)


def _sum_up(partial: Tensor, outs: tuple[_Sum, ...], layout: dict) -> None:
    chunks, batch, heads, total, pitch = partial.shape
    row, column = [], []
    for n in range(len(outs)):
        row.append(sum(w for w, of in zip(layout["WIDE"], layout["OF"], strict=True) if of < n // 2))
        column.append(n % 2 * layout["BD"])
    items = [batch if o.batch == 1 else 1 for o in outs]
    group = [heads // o.tensor.shape[1] for o in outs]
    rows = 16
    row_blocks = triton.cdiv(max(o.rows for o in outs), rows)
    grid = (row_blocks * max(o.batch * heads // g for o, g in zip(outs, group, strict=True)), len(outs))
    launch(
        _add_up, grid, partial, outs, batch, heads, row_blocks, chunks, ROW=tuple(row), COLUMN=tuple(column),
        ITEMS=tuple(items), GROUP=tuple(group), TOTAL=total, PITCH=pitch, BS=rows, BW=max(layout["BD"], layout["BV"]),
        num_warps=4,
    )  # fmt: skip
