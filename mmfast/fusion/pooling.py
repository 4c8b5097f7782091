"""The mean of cross-attention over its queries, block by block."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mmfast.fusion import triton as fused
from mmfast.fusion._inputs import (
    Source,
    batch_of,
    check_lengths,
    check_options,
    check_tensor,
    compute_dtype,
    prepare,
)
from mmfast.fusion.attention import attend, choose_engine

_BLOCK = 512


def attention_pool(
    query: Tensor,
    sources,
    query_lengths: Tensor | None,
    backend: str | None,
    *,
    fusion: str = "joint",
    scale: float | None = None,
    is_causal: bool = False,
    dropout_p: float = 0.0,
    softcap: float | None = None,
) -> Tensor:
    """`mmfast.fusion.attention_pool`."""
    check_tensor("query", query, 4, "(B, H, L, D)")
    if query.shape[3] == 0:
        raise ValueError(f"query must have at least one feature, got {tuple(query.shape)}")
    scale, dropout_p, softcap = check_options(fusion, scale, dropout_p, softcap, query.shape[3])
    query, sources = prepare(query, sources, fusion)
    batch, rows, dtype = batch_of(query, sources), query.shape[2], compute_dtype(query.dtype)
    if query_lengths is not None:
        query_lengths = check_lengths("query_lengths", query_lengths, query.device, batch, rows)

    if choose_engine(query.device, backend) == "triton":
        total = fused.pool(query, sources, query_lengths, fusion, scale, bool(is_causal), dropout_p, softcap)
        if total is not None:
            return _mean(total, query_lengths, rows).to(query.dtype)

    def block(start: int, stop: int) -> Tensor:
        part = [_rows(s, start, stop, is_causal) for s in sources]
        causal = bool(is_causal) and start == 0
        rows_here, exists = query[:, :, start:stop], None
        if query_lengths is not None:
            exists = (torch.arange(start, stop, device=query.device) < query_lengths[:, None])[:, None, :, None]
            # Rows that nobody has are zero, whatever they hold: 0 · NaN is NaN.
            somewhere = exists if query.shape[0] == batch else exists.any(0, keepdim=True)
            rows_here = torch.where(somewhere, rows_here, 0.0)
        out = attend(rows_here, part, fusion, scale, causal, dropout_p, softcap, False, backend).out.to(dtype)
        return (out if exists is None else torch.where(exists, out, 0.0)).sum(2)

    if rows <= _BLOCK:
        total = block(0, rows)
    else:
        total = None
        for start in range(0, rows, _BLOCK):
            args = start, min(start + _BLOCK, rows)
            one = checkpoint(block, *args, use_reentrant=False) if torch.is_grad_enabled() else block(*args)
            total = one if total is None else total + one
    return _mean(total, query_lengths, rows).to(query.dtype)


def _mean(total: Tensor, lengths: Tensor | None, rows: int) -> Tensor:
    return total / (max(rows, 1) if lengths is None else lengths.clamp(min=1)[:, None, None])


def _rows(source: Source, start: int, stop: int, is_causal: bool) -> Source:
    """What the queries ``start`` … ``stop`` see of a source."""

    def cut(x):
        return x[:, :, start:stop] if isinstance(x, Tensor) and x.shape[2] != 1 else x

    mask, bias = cut(source.mask), cut(source.bias)
    if is_causal and start:
        keys = torch.arange(source.key.shape[2], device=source.key.device)
        before = (keys <= torch.arange(start, stop, device=keys.device)[:, None])[None, None]
        if mask is None:
            mask = before
        elif mask.dtype == torch.bool:
            mask = mask & before
        else:
            mask = torch.where(before, mask, -torch.inf)
    return source._replace(mask=mask, bias=bias, gate=cut(source.gate))
