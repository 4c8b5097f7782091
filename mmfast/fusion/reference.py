"""The fusion slice in plain PyTorch: fallback, oracle and baseline in one. It writes the scores that the others avoid.

All of it is computed in float32, or float64 for float64. Ordinary autograd: first and second derivatives of everything.
A query that may attend to nothing gives zero, a zero gradient and a log-sum-exp of −inf.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mmfast.fusion._inputs import Source, batch_of, compute_dtype


class Attention(NamedTuple):
    """``out`` ``(B, H, L, D_v)`` and the softmaxes' log-sum-exps ``(B, H, L)``: one, or one a source if decoupled.

    ``weights``, where asked for: ``(B, H, L, S)`` for each source, or their means over the heads, ``(B, L, S)``.
    """

    out: Tensor
    lses: tuple[Tensor, ...]
    weights: tuple[Tensor, ...] | None


def attention(
    query: Tensor,
    sources: Sequence[Source],
    *,
    fusion: str,
    scale: float,
    is_causal: bool = False,
    dropout_p: float = 0.0,
    softcap: float | None = None,
    weights: bool | str = False,
) -> Attention:
    """`mmfast.cross_attention` of checked arguments: masks, biases and gates have 4 dimensions, lengths are int64."""
    options = (scale, is_causal, dropout_p, softcap, bool(weights))
    batch = batch_of(query, list(sources))
    if fusion == "joint":
        out, lse, parts = _softmax(query, sources, *options)
        lses = (lse,)
    else:
        out, lses, parts = None, (), []
        for source in sources:
            one, lse, part = _softmax(query, [source], *options)
            if source.gate is not None:
                one = one * (source.gate.to(one.dtype) if isinstance(source.gate, Tensor) else source.gate)
            out = one if out is None else out + one
            lses += (lse,)
            parts += part
    if weights == "mean":
        parts = [part.mean(1) for part in parts]
    return Attention(
        _expand(out, batch).to(query.dtype),
        tuple(_expand(lse, batch) for lse in lses),
        tuple(_expand(part, batch).to(query.dtype) for part in parts) if weights else None,
    )


def _expand(x: Tensor, batch: int) -> Tensor:
    return x.expand(batch, *x.shape[1:]) if x.shape[0] == 1 and batch != 1 else x


def _softmax(query, sources, scale, is_causal, dropout_p, softcap, weights):
    """One softmax over all sources, in the compute dtype: output, log-sum-exp, weights after dropout."""
    all_scores = [scores(query, source, scale, is_causal, softcap) for source in sources]
    with torch.no_grad():  # the shift cancels
        shift = None
        for s in all_scores:
            if s.shape[3]:
                largest = s.amax(3)
                shift = largest if shift is None else torch.maximum(shift, largest)
        if shift is None:
            shift = torch.full_like(all_scores[0][..., :1].sum(3), -torch.inf)
        shift = torch.where(shift == -torch.inf, 0.0, shift)
    exps = [(s - shift[..., None]).exp() for s in all_scores]
    total = exps[0].sum(3)
    for e in exps[1:]:
        total = total + e.sum(3)
    empty = total == 0
    total = torch.where(empty, 1.0, total)
    lse = torch.where(empty, -torch.inf, shift + total.log())
    if dropout_p:
        exps = [torch.nn.functional.dropout(e, dropout_p) for e in exps]
    out = _times_values(exps[0], sources[0])
    for e, source in zip(exps[1:], sources[1:], strict=True):
        out = out + _times_values(e, source)
    return out / total[..., None], lse, [e / total[..., None] for e in exps] if weights else []


def scores(
    query: Tensor, source: Source, scale: float, is_causal: bool = False, softcap: float | None = None
) -> Tensor:
    """What the softmax is taken of, ``(B, H, L, S)``: −inf where a query may not attend."""
    dtype = compute_dtype(query.dtype)
    key = _existing(source.key, source.lengths).to(dtype)
    batch, heads, rows, dim = query.shape
    groups = heads // key.shape[1]
    # Heads that share a key are more rows of one product.
    folded = (query.to(dtype) * scale).reshape(batch, key.shape[1], groups * rows, dim)
    s = folded @ key.transpose(2, 3)
    s = s.reshape(s.shape[0], heads, rows, key.shape[2])
    if softcap is not None:
        s = softcap * (s / softcap).tanh()
    for added in (source.mask, source.bias):
        if added is not None and added.dtype != torch.bool:
            s = s + added.to(dtype)
    may = allowed(source, rows, is_causal)
    return s if may is None else torch.where(may, s, -torch.inf)


def allowed(source: Source, rows: int, is_causal: bool) -> Tensor | None:
    """Where a query may attend, by boolean mask, lengths and causality; None where it always may."""
    may = source.mask if source.mask is not None and source.mask.dtype == torch.bool else None
    if source.lengths is None and not is_causal:
        return may
    index = torch.arange(source.key.shape[2], device=source.key.device)
    if source.lengths is not None:
        exists = index < source.lengths[:, None, None, None]
        may = exists if may is None else may & exists
    if is_causal:
        before = index <= torch.arange(rows, device=index.device)[:, None]
        may = before if may is None else may & before
    return may


def _existing(x: Tensor, lengths: Tensor | None) -> Tensor:
    """Zero beyond the lengths: 0 · NaN is NaN."""
    if lengths is None:
        return x
    beyond = torch.arange(x.shape[2], device=x.device)[:, None] >= lengths[:, None, None, None]
    return torch.where(beyond, 0.0, x)


def _times_values(exps: Tensor, source: Source) -> Tensor:
    value = _existing(source.value, source.lengths).to(exps.dtype)
    batch, heads, rows, keys = exps.shape
    out = exps.reshape(batch, value.shape[1], heads // value.shape[1] * rows, keys) @ value
    return out.reshape(out.shape[0], heads, rows, value.shape[3])


def merge(outputs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """`mmfast.fusion.merge` of checked arguments."""
    dtype = compute_dtype(outputs[0].dtype)
    stacked = [lse.to(dtype) for lse in lses]
    with torch.no_grad():
        shift = stacked[0]
        for lse in stacked[1:]:
            shift = torch.maximum(shift, lse)
        shift = torch.where(shift == -torch.inf, 0.0, shift)
    exps = [(lse - shift).exp() for lse in stacked]
    total = sum(exps[1:], exps[0])
    empty = total == 0
    total = torch.where(empty, 1.0, total)
    parts = [e[..., None] * out.to(dtype) for e, out in zip(exps, outputs, strict=True)]
    out = sum(parts[1:], parts[0]) / total[..., None]
    return out.to(outputs[0].dtype), torch.where(empty, -torch.inf, shift + total.log())
