"""The mean over the heads of the attention weights, from the log-sum-exps: the weights of each head are never written.

    W_bik = 1 / H Σ_h exp(S_bhik − L_bhi)

A program holds one tile of W in registers and takes head after head: it reads Q and K of each, writes the tile once.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from mmfast.fusion._inputs import Source
from mmfast.fusion.routes_cuda import power_of_two
from mmfast.fusion.triton_tiles import (
    LOG2E,
    aligned,
    dot_options,
    keys_there,
    load_keys,
    load_tile,
    refs,
    scores,
    start_of,
    strides,
)


@triton.jit
def _mean_weights(
    query, query_strides, sources, lse, lse_strides, out, row_limit, dim, row_blocks, scale2,
    HAS: tl.constexpr, CAUSAL: tl.constexpr, HEADS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    BY: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    b = (tl.program_id(0) // row_blocks).to(tl.int64)
    rows = tl.program_id(0) % row_blocks * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    src = sources[0]
    limit = keys_there(src, b, HAS)
    total = tl.zeros([BM, BN], tl.float32)
    for i in range(HEADS):
        h = tl.full([], 0, tl.int64) + i
        start = start_of(query, query_strides, b, h, BY)
        q = load_tile(start, rows, row_limit, query_strides[2], dim, query_strides[3], BD, DOT, BY)
        k = load_keys(src, b, h, columns, limit, dim, BD, DOT, BY)
        s = scores(q, k, src, b, h, rows, columns, row_limit, limit, scale2, HAS, CAUSAL, PRECISION)
        at = lse + b * lse_strides[0] + h * lse_strides[1]
        shift = tl.load(at + rows * lse_strides[2], mask=rows < row_limit, other=0.0) * LOG2E
        total += tl.exp2(s - tl.where(shift == float("-inf"), 0.0, shift)[:, None])
    keys = src.keys
    to = out + b * row_limit * keys + rows.to(tl.int64)[:, None] * keys + columns[None, :]
    tl.store(to, (total / HEADS).to(out.dtype.element_ty), mask=(rows < row_limit)[:, None] & (columns < keys)[None, :])


def mean_weights(
    query: Tensor, sources: Sequence[Source], lses: Sequence[Tensor], causal: bool, scale: float, batch: int
) -> list[Tensor]:
    """``(B, L, S_j)`` for each source; ``lses``: ``(B, H, L)``, one for each source."""
    _, heads, rows, dim = query.shape
    outs = []
    for source, lse in zip(sources, lses, strict=True):
        keys = source.key.shape[2]
        out = query.new_empty((batch, rows, keys))
        outs.append(out)
        if not keys:
            continue
        source_refs, has = refs(query, [source._replace(gate=None)])
        wide = power_of_two(dim)
        block, width = min(64, power_of_two(rows)), min(64, power_of_two(keys))
        row_blocks = triton.cdiv(rows, block)
        _mean_weights[(batch * row_blocks, triton.cdiv(keys, width))](
            query, strides(query), source_refs, lse, strides(lse), out, rows, dim, row_blocks, scale * LOG2E.value,
            HAS=has[0], CAUSAL=causal, HEADS=heads, BM=block, BN=width, BD=wide, BY=aligned(query, source.key),
            num_warps=4, num_stages=2, **dot_options(query.dtype),
        )  # fmt: skip
    return outs
