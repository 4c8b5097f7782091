"""Cross-attention on the CPU by torch's flash attention, source by source: no scores, no concatenated copy.

The operators ``mmfast::fusion_streamed_forward`` and ``_backward``. One softmax over sources j merges exactly,

    L = log Σ_j exp L_j,    O = Σ_j exp(L_j − L) O_j,

and the gradient of source j is the ordinary backward of flash attention, given O and L in place of O_j and L_j. The
gradient through the log-sum-exp needs one more column: with values [v, 1], outputs [O, 0] and their gradient [dO, dL]
the same backward gives dS = P (dP + dL − δ).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfast import _backend
from mmfast.fusion import reference
from mmfast.fusion._derivatives import alias, of_batch
from mmfast.fusion._inputs import Source, batch_of, compute_dtype, is_eager, positive_scale
from mmfast.fusion.reference import Attention

# Bit i of ``masked`` says that source i has a mask: autograd has no lists with None in them.
_INPUTS = "Tensor query, Tensor[] keys, Tensor[] values, Tensor[] masks, int masked"
torch.library.define(
    "mmfast::fusion_streamed_forward", f"({_INPUTS}, bool is_causal, float scale) -> (Tensor out, Tensor lse)"
)
torch.library.define(
    "mmfast::fusion_streamed_backward",
    f"(Tensor grad_out, Tensor? grad_lse, {_INPUTS}, Tensor out, Tensor lse, bool is_causal, float scale)"
    " -> (Tensor grad_query, Tensor[] grad_keys, Tensor[] grad_values)",
)

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def can(query: Tensor, sources: Sequence[Source], dropout_p: float, softcap: float | None, weights: bool) -> str | None:
    """Why `attention` cannot do this, or None if it can."""
    if query.device.type != "cpu":
        return f"tensors on {query.device}"
    if dropout_p:
        return "dropout"
    if softcap is not None:
        return "a softcap"
    if weights:
        return "weights"
    if any(_backend.is_tracked(x) for s in sources for x in (s.mask, s.bias)):
        return "the gradient of a mask or bias"
    return None


def attention(
    query: Tensor, sources: Sequence[Source], *, fusion: str, scale: float, is_causal: bool = False
) -> Attention:
    """`mmfast.fusion.reference.attention` of what `can` allows."""
    query, scale, _ = positive_scale(query, scale)
    batch = batch_of(query, list(sources))
    used = [s for s in sources if s.key.shape[2]]
    if not used or not query.shape[1] * query.shape[2] * batch:
        return reference.attention(query, sources, fusion=fusion, scale=scale, is_causal=is_causal)
    if fusion == "joint":
        out, lse = _run(query, used, is_causal, scale)
        return Attention(out, (lse,), None)
    dtype, out, lses = compute_dtype(query.dtype), None, []
    nothing = None
    for source in sources:
        if not source.key.shape[2]:
            if nothing is None:
                nothing = torch.full((batch, *query.shape[1:3]), -torch.inf, dtype=dtype, device=query.device)
            lses.append(nothing)
            continue
        one, lse = _run(query, [source], is_causal, scale)
        lses.append(lse)
        if len(sources) > 1 or source.gate is not None:
            one = one.to(dtype)
        if source.gate is not None:
            one = one * (source.gate.to(dtype) if isinstance(source.gate, Tensor) else source.gate)
        out = one if out is None else out + one
    return Attention(_expand(out, batch).to(query.dtype), tuple(_expand(lse, batch) for lse in lses), None)


def _expand(x: Tensor, batch: int) -> Tensor:
    return x.expand(batch, *x.shape[1:]) if x.shape[0] == 1 and batch != 1 else x


def _run(query: Tensor, sources: Sequence[Source], is_causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    if len(sources) == 1 and (result := _as_it_is(query, sources[0], is_causal, scale)) is not None:
        return result
    keys = [reference._existing(s.key, s.lengths) for s in sources]
    values = [reference._existing(s.value, s.lengths) for s in sources]
    added = [_additive(s, compute_dtype(query.dtype)) for s in sources]
    masks = [m for m in added if m is not None]
    masked = sum(1 << i for i, m in enumerate(added) if m is not None)
    call = query, keys, values, masks, masked, is_causal, scale
    if is_eager((query, *keys, *values, *masks)):
        return _forward(*call)
    return torch.ops.mmfast.fusion_streamed_forward.default(*call)


def _as_it_is(query: Tensor, source: Source, is_causal: bool, scale: float) -> tuple[Tensor, Tensor] | None:
    """Flash attention alone, where that is all there is to do: a few queries take no longer than the rest of `_run`."""
    key, value, mask, lengths, bias, _ = source
    if mask is not None or bias is not None or lengths is not None or key.shape != value.shape:
        return None
    if query.shape[:2] != key.shape[:2] or any(x.stride(3) != 1 for x in (query, key, value)):
        return None
    if not is_eager((query, key, value)):
        return None
    out, lse = _flash(query, key, value, 0.0, is_causal, scale=scale)
    return (out, lse) if lse.all() else None


def _additive(source: Source, dtype: torch.dtype) -> Tensor | None:
    """Mask, bias and lengths as one tensor to add to the scores; causality stays a flag."""
    if source.mask is None and source.bias is None and source.lengths is None:
        return None
    added = None
    for part in (source.mask, source.bias):
        if part is not None and part.dtype != torch.bool:
            added = part.to(dtype) if added is None else added + part.to(dtype)
    may = reference.allowed(source, 0, False)
    if may is not None:
        zero = torch.zeros((), dtype=dtype, device=may.device)
        added = torch.where(may, zero if added is None else added, -torch.inf)
    return added


# ---- The operators


def _for_each(keys: Sequence[Tensor], masks: Sequence[Tensor], masked: int) -> list[Tensor | None]:
    rest = iter(masks)
    return [next(rest) if masked >> i & 1 else None for i in range(len(keys))]


def _forward(query, keys, values, masks, masked, is_causal, scale):
    batch = _batch(query, keys, values, masks)
    query = _expand(query, batch)
    each = zip(keys, values, _for_each(keys, masks, masked), strict=True)
    parts = [_one(query, k, v, m, is_causal, scale) for k, v, m in each]
    out, lse = parts[0] if len(parts) == 1 else reference.merge(*zip(*parts, strict=True))
    return _heads_inside(out), lse.contiguous()


def _batch(query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], masks: Sequence[Tensor]) -> int:
    return next((x.shape[0] for x in (query, *keys, *values, *masks) if x.shape[0] != 1), 1)


def _heads_inside(x: Tensor) -> Tensor:
    """``(B, H, L, D)`` with the strides of ``(B, L, H, D)``, as flash attention has it."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _wide(x: Tensor, width: int) -> Tensor:
    """With ``width`` features, which lie side by side."""
    if x.shape[3] < width:
        x = F.pad(x, (0, width - x.shape[3]))  # which keeps channels last where they are
    return x if x.stride(3) == 1 else x.contiguous()


def _groups(query: Tensor, key: Tensor, mask: Tensor | None) -> list[tuple[slice, Tensor | None]]:
    """Slices of the query's heads that meet each key head once, and their masks: views, nothing is repeated."""
    size = query.shape[1] // key.shape[1]
    heads = [slice(g, None, size) for g in range(size)]
    return [(h, mask if mask is None or mask.shape[1] == 1 else mask[:, h]) for h in heads]


def _one(query, key, value, mask, is_causal, scale):
    """Output and log-sum-exp of one source."""
    width = max(key.shape[3], value.shape[3])
    q, k, v = _wide(query, width), _wide(key, width), _wide(value, width)
    k, v = _expand(k, q.shape[0]), _expand(v, q.shape[0])
    parts = [
        _flash(q[:, heads], k, v, 0.0, is_causal, attn_mask=m, scale=scale) for heads, m in _groups(query, key, mask)
    ]
    if len(parts) == 1:
        out, lse = parts[0]
    else:
        out = torch.stack([out.transpose(1, 2) for out, _ in parts], 3).flatten(2, 3).transpose(1, 2)
        lse = torch.stack([lse for _, lse in parts], 2).flatten(1, 2)
    out = out[..., : value.shape[3]]
    if lse.all():
        return out, lse
    zero = lse == 0
    # Where the maximum found nothing, be it that all is masked or that all is NaN, flash attention has 0 and 0.
    dead = lse.new_zeros((), dtype=torch.bool)
    if mask is not None:
        dead = mask == -torch.inf
        if is_causal:
            after = torch.arange(k.shape[2], device=k.device) > torch.arange(q.shape[2], device=k.device)[:, None]
            dead = dead | after
        dead = dead.all(3)
    nan = query.isnan().any(3) | key.isnan().flatten(2).any(2).repeat_interleave(len(parts), 1)[..., None]
    nan = nan & zero & ~dead
    return torch.where(nan[..., None], torch.nan, out), lse.masked_fill(dead & zero, -torch.inf).masked_fill(
        nan, torch.nan
    )


def _backward(grad_out, grad_lse, query, keys, values, masks, masked, out, lse, is_causal, scale):
    batch, dim, value_dim = out.shape[0], query.shape[3], out.shape[3]
    width = max(dim, value_dim + (grad_lse is not None))
    q, out = _wide(_expand(query, batch), width), _wide(out, width)
    grad = _wide(grad_out, width)
    if grad_lse is not None:
        grad[..., value_dim] = grad_lse  # `_wide` has made copies: there is room for one more column
    lse = torch.where(lse == -torch.inf, 0.0, lse)  # exp(−inf − 0) = 0
    grad_query, grad_keys, grad_values = [], [], []
    for key, value, mask in zip(keys, values, _for_each(keys, masks, masked), strict=True):
        k, v = _expand(_wide(key, width), batch), _wide(value, width)
        if grad_lse is not None:
            v[..., value_dim] = 1
        v = _expand(v, batch)
        heads_of, dq, dk, dv = _groups(query, key, mask), [], [], []
        for heads, m in heads_of:
            gradients = _flash_backward(
                grad[:, heads],
                q[:, heads],
                k,
                v,
                out[:, heads],
                lse[:, heads],
                0.0,
                is_causal,
                attn_mask=m,
                scale=scale,
            )
            for parts, gradient in zip((dq, dk, dv), gradients, strict=True):
                parts.append(gradient)
        grad_query.append(dq[0] if len(dq) == 1 else torch.stack(dq, 2).flatten(1, 2))
        grad_keys.append(_summed(dk, key.shape))
        grad_values.append(_summed(dv, value.shape))
    return _summed(grad_query, query.shape), grad_keys, grad_values


def _summed(parts: list[Tensor], shape: torch.Size) -> Tensor:
    """Σ parts without padding, over the batch too where it was broadcast; not rounded before the end."""
    dtype, full = parts[0].dtype, compute_dtype(parts[0].dtype)
    total = parts[0]
    for part in parts[1:]:
        total = total.to(full) + part.to(full)
    if total.shape[0] != shape[0]:
        total = total.sum(0, keepdim=True, dtype=full)
    return _heads_inside(total[..., : shape[3]].to(dtype))


torch.library.impl("mmfast::fusion_streamed_forward", "cpu", _forward)
torch.library.impl("mmfast::fusion_streamed_backward", "cpu", _backward)


@torch.library.register_fake("mmfast::fusion_streamed_forward")
def _(query, keys, values, masks, masked, is_causal, scale):
    batch, (_, heads, rows, _) = _batch(query, keys, values, masks), query.shape
    out = query.new_empty((batch, rows, heads, values[0].shape[3])).transpose(1, 2)
    return out, query.new_empty((batch, heads, rows), dtype=compute_dtype(query.dtype))


@torch.library.register_fake("mmfast::fusion_streamed_backward")
def _(grad_out, grad_lse, query, keys, values, masks, masked, out, lse, is_causal, scale):
    def like(x):
        return x.new_empty((x.shape[0], x.shape[2], x.shape[1], x.shape[3])).transpose(1, 2)

    return like(query), [like(k) for k in keys], [like(v) for v in values]


def _save_forward(ctx, inputs, output):
    query, keys, values, masks, ctx.masked, ctx.is_causal, ctx.scale = inputs
    ctx.counts = len(keys), len(masks)
    ctx.save_for_backward(query, *keys, *values, *masks, *output)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad_out, grad_lse):
    query, *rest = ctx.saved_tensors
    n, m = ctx.counts
    keys, values, masks, (out, lse) = rest[:n], rest[n : 2 * n], rest[2 * n : 2 * n + m], rest[2 * n + m :]
    if grad_out is None and grad_lse is None:
        return None, [None] * n, [None] * n, [None] * m, None, None, None
    if any(map(_backend.is_batch_of_gradients, (grad_out, grad_lse))):
        return _differentiate_batch(ctx, grad_out, grad_lse, query, keys, values, masks)
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    grad_query, grad_keys, grad_values = torch.ops.mmfast.fusion_streamed_backward(
        grad_out, grad_lse, query, keys, values, masks, ctx.masked, out, lse, ctx.is_causal, ctx.scale
    )
    return grad_query, grad_keys, grad_values, [None] * m, None, None, None


def _differentiate_batch(ctx, grad_out, grad_lse, query, keys, values, masks):
    n, m = ctx.counts
    with torch.enable_grad():
        inputs = [alias(x) for x in (query, *keys, *values)]
        of = zip(inputs[1 : 1 + n], inputs[1 + n :], _for_each(keys, masks, ctx.masked), strict=True)
        result = reference.attention(
            inputs[0], [Source(*parts) for parts in of], fusion="joint", scale=ctx.scale, is_causal=ctx.is_causal
        )
    by_query, *by = of_batch((result.out, result.lses[0]), (grad_out, grad_lse), inputs)
    return by_query, by[:n], by[n:], [None] * m, None, None, None


torch.library.register_autograd("mmfast::fusion_streamed_forward", _differentiate, setup_context=_save_forward)


def _save_backward(ctx, inputs, output):
    grad_out, grad_lse, query, keys, values, masks, ctx.masked, _, _, ctx.is_causal, ctx.scale = inputs
    ctx.counts = len(keys), len(masks)
    ctx.save_for_backward(grad_out, grad_lse, query, *keys, *values, *masks)
    ctx.set_materialize_grads(False)


def _differentiate_twice(ctx, grad_query, grad_keys, grad_values):
    """Second derivatives, by the reference: rare, and then its memory is the price.

    Output and log-sum-exp are functions of the others: what flows through them is in the others' derivatives.
    """
    n, m = ctx.counts
    onward = torch.is_grad_enabled()
    with torch.enable_grad():
        saved = [alias(x) for x in ctx.saved_tensors[: 3 + 2 * n]]
        grad_out, grad_lse, *inputs = saved
        query, keys, values = inputs[0], inputs[1 : 1 + n], inputs[1 + n :]
        masks = _for_each(keys, ctx.saved_tensors[3 + 2 * n :], ctx.masked)
        sources = [Source(*parts) for parts in zip(keys, values, masks, strict=True)]
        result = reference.attention(query, sources, fusion="joint", scale=ctx.scale, is_causal=ctx.is_causal)
        outputs = [(result.out, grad_out)] + ([] if grad_lse is None else [(result.lses[0], grad_lse)])
        incoming = [grad_query, *(grad_keys or [None] * n), *(grad_values or [None] * n)]
        wanted = [(x, g) for x, g in zip(inputs, incoming, strict=True) if g is not None]
        if not wanted:
            return None, None, None, [None] * n, [None] * n, [None] * m, *(None,) * 5
        first = torch.autograd.grad(
            [x for x, _ in outputs], [x for x, _ in wanted], [g for _, g in outputs], create_graph=True
        )
        of = [grad_out, *([] if grad_lse is None else [grad_lse]), *inputs]
        second = list(torch.autograd.grad(first, of, [g for _, g in wanted], allow_unused=True, create_graph=onward))
    grad_lse_second = None if grad_lse is None else second.pop(1)
    # grad_out, grad_lse, query, keys, values, masks, then masked … scale
    return second[0], grad_lse_second, second[1], second[2 : 2 + n], second[2 + n :], [None] * m, *(None,) * 5


torch.library.register_autograd("mmfast::fusion_streamed_backward", _differentiate_twice, setup_context=_save_backward)
