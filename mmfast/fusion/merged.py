"""Cross-attention to long sources by torch's own fused kernels, each source where it lies, merged exactly.

For long keys cuDNN and FlashAttention are within a few percent of the hardware; what they lack is several sources in
one softmax. Each source is attended to by itself, outputs and log-sum-exps are merged in one pass
(`triton_split.merge`), and in the
backward each source's own kernel is given the merged output and log-sum-exp in place of its own:

    P_j = exp(S_j − L),    dS_j = P_j ∘ (dO V_jᵀ − dO · O + dL)

The gradient through L needs one more feature: with values [V, 1], outputs [O, 0] and their gradient [dO, dL] the same
kernels give it. What each kernel makes of a row without keys, and how it lays out its log-sum-exp, is put right here:

    flash       (B, H, L)                       no masks; is_causal aligned at the end, so only where L = S
    flash       (H, B L), of lengths            +inf where an item has no keys; see `_cumulative`
    efficient   (B, H, L up to a multiple of 32), the rest +inf     any mask; no groups of heads
    cudnn       (B, H, L, 1)                    no groups of heads here; not deterministic in its backward
    cpu         (B, H, L)                       0 where there is nothing to attend to

None of them is given a scale of 0 or below (`positive_scale`).

As with scaled_dot_product_attention, whether flash and efficient add up dQ in a fixed order follows
`torch.use_deterministic_algorithms`; with ``warn_only`` they warn and do not.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfast.fusion import reference
from mmfast.fusion._inputs import Source, compute_dtype, positive_scale
from mmfast.fusion.recording import room, spoil

ENGINES = ("flash", "efficient", "cudnn", "cpu")
_aten = torch.ops.aten


def heads_inside(query: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """Empty, ``(B, H, L, D)`` with the strides of ``(B, L, H, D)``, as projections make it."""
    batch, heads, rows, dim = shape
    return room(query, (batch, rows, heads, dim), dtype).transpose(1, 2)


def pick(query: Tensor, source: Source, causal: bool, wish: str) -> str:
    """``wish`` if that kernel can do this source, else the one that can."""
    if query.device.type == "cpu":
        return "cpu"
    masked = source.mask is not None or source.bias is not None
    wide = max(query.shape[3], source.value.shape[3])
    square = query.shape[2] == source.key.shape[2]
    if query.dtype == torch.float32 or masked or (causal and not square) or wide > 248:
        return "efficient"
    if source.lengths is not None:
        return "efficient" if causal or wish == "efficient" else "flash"
    return "flash" if wish == "cudnn" and wide > 120 else wish if wish in ENGINES else "flash"


def forward(
    query: Tensor, sources: Sequence[Source], causal: bool, scale: float, batch: int, wish: str
) -> tuple[Tensor, Tensor]:
    """One softmax over all sources: output ``(B, H, L, D_v)`` and log-sum-exp ``(B, H, L)``."""
    spoil()
    query, scale, _ = positive_scale(_expand(query, batch), scale)
    parts = []
    for source in sources:
        if not source.key.shape[2]:
            continue
        engine = pick(query, source, causal, wish)
        if engine == "flash" and source.lengths is not None:
            parts.append(_ragged(query, source, scale))
            continue
        key, value, added = _plain(query, source, batch)
        parts.append(_one(engine, query, key, value, added, causal, scale))
    if len(parts) == 1:
        out, lse = parts[0]
    elif query.device.type == "cpu":
        out, lse = reference.merge(*zip(*parts, strict=True))
    else:
        from mmfast.fusion import triton_split

        return triton_split.merge(*zip(*parts, strict=True), query.dtype)
    return out.transpose(1, 2).contiguous().transpose(1, 2), lse.contiguous()


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    sources: Sequence[Source],
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
    wish: str,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Gradients of query, keys and values."""
    batch, shape = lse.shape[0], query.shape
    query, scale, factor = positive_scale(_expand(query, batch), scale)
    lse = torch.where(lse == -torch.inf, 0.0, lse)  # exp(−inf − 0) = 0
    of_query, grad_keys, grad_values = None, [], []
    for source in sources:
        if not source.key.shape[2]:
            grad_keys.append(torch.zeros_like(source.key))
            grad_values.append(torch.zeros_like(source.value))
            continue
        engine = pick(query, source, causal, wish)
        if engine == "flash" and source.lengths is not None:
            dq, dk, dv = _ragged_backward(grad_out, grad_lse, query, source, out, lse, scale)
        else:
            key, value, added = _plain(query, source, batch)
            dq, dk, dv = _one_backward(engine, grad_out, grad_lse, query, key, value, added, out, lse, causal, scale)
        of_query = dq if of_query is None else of_query.float().add_(dq)
        grad_keys.append(sum_batch(dk, source.key.shape, query.dtype))
        grad_values.append(sum_batch(dv, source.value.shape, query.dtype))
    if factor != 1.0:
        of_query = of_query * factor
    return sum_batch(of_query, shape, query.dtype), grad_keys, grad_values


# ---- One source in the form that the kernels take


def _expand(x: Tensor, batch: int) -> Tensor:
    return x.expand(batch, *x.shape[1:]) if x.shape[0] != batch else x


def _plain(query: Tensor, source: Source, batch: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys and values of the whole batch, and what is added to the scores."""
    added = None
    for part in (source.mask, source.bias):
        if part is not None and part.dtype != torch.bool:
            added = part.float() if added is None else added + part.float()
    may = reference.allowed(source, 0, False)
    if may is not None:
        zero = torch.zeros((), device=may.device)
        added = torch.where(may, zero if added is None else added, -torch.inf)
    key, value = (reference._existing(x, source.lengths) for x in (source.key, source.value))
    return _expand(key, batch), _expand(value, batch), added


def _wide(x: Tensor, width: int) -> Tensor:
    """With ``width`` features, which lie side by side."""
    if x.shape[3] < width:
        x = F.pad(x, (0, width - x.shape[3]))
    return x if x.stride(3) == 1 else x.contiguous()


def _bias(added: Tensor | None, query: Tensor, keys: int, engine: str) -> Tensor | None:
    """``added`` as (B, H, L, S) without a copy along what it is broadcast along, its rows aligned to 16 bytes."""
    if added is None:
        return None
    if engine == "cpu":
        return added.to(compute_dtype(query.dtype))
    added = F.pad(added.to(query.dtype).expand(-1, -1, -1, keys), (0, -keys % 8))[..., :keys]
    return added.expand(query.shape[0], query.shape[1], query.shape[2], keys)


def _dead(added: Tensor | None, queries: int, keys: int, causal: bool) -> Tensor | None:
    """Rows that may attend to nothing, or None where no mask says so."""
    if added is None:
        return None
    dead = added == -torch.inf
    if causal:
        index = torch.arange(keys, device=added.device)
        dead = dead | (index > torch.arange(queries, device=added.device)[:, None])
    return dead.all(3)


def _slices(query: Tensor, key: Tensor, engine: str) -> list[slice]:
    """Of the query's heads, such that those of a slice meet each key head once. Flash knows groups by itself."""
    size = 1 if engine == "flash" else query.shape[1] // key.shape[1]
    return [slice(g, None, size) for g in range(size)]


def _together(parts: list[Tensor]) -> Tensor:
    """The heads of `_slices` in their order again."""
    return parts[0] if len(parts) == 1 else torch.stack(parts, 2).flatten(1, 2)


def _width(query: Tensor, *dims: int, engine: str) -> int:
    return max(dims) if engine == "cpu" else -(-max(dims) // 8) * 8


def _one(engine, query, key, value, added, causal, scale) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp ``(B, H, L)`` of one source."""
    rows, keys, value_dim = query.shape[2], key.shape[2], value.shape[3]
    width = _width(query, query.shape[3], value_dim, engine=engine)
    q, k, v = _wide(query, width), _wide(key, width), _wide(value, width)
    bias = _bias(added, query, keys, engine)
    parts = []
    for heads in _slices(query, key, engine):
        b = bias if bias is None or bias.shape[1] == 1 else bias[:, heads]
        if engine == "flash":
            part = _aten._scaled_dot_product_flash_attention(q[:, heads], k, v, 0.0, causal, False, scale=scale)[:2]
        elif engine == "efficient":
            part = _aten._scaled_dot_product_efficient_attention(q[:, heads], k, v, b, True, 0.0, causal, scale=scale)[
                :2
            ]
        elif engine == "cudnn":
            part = _aten._scaled_dot_product_cudnn_attention(
                q[:, heads], k, v, b, True, 0.0, causal, False, scale=scale
            )[:2]
        else:
            part = _aten._scaled_dot_product_flash_attention_for_cpu(
                q[:, heads], k, v, 0.0, causal, attn_mask=b, scale=scale
            )
        parts.append((part[0][..., :value_dim], part[1].reshape(part[1].shape[:3])[..., :rows]))
    out, lse = (_together(list(x)) for x in zip(*parts, strict=True))
    dead = _dead(added, rows, keys, causal)
    if dead is not None:
        out, lse = out.masked_fill(dead[..., None], 0.0), lse.masked_fill(dead, -torch.inf)
    return out, lse


def _one_backward(engine, grad_out, grad_lse, query, key, value, added, out, lse, causal, scale):
    rows, keys, dim, value_dim = query.shape[2], key.shape[2], query.shape[3], value.shape[3]
    width = _width(query, dim, value_dim + (grad_lse is not None), engine=engine)
    q, k, v = _wide(query, width), _wide(key, width), _wide(value, width)
    o, do = _wide(out, width), _wide(grad_out.to(query.dtype), width)
    if grad_lse is not None:
        do, v = _with_lse(do, value, grad_lse, width)
    bias = _bias(added, query, keys, engine)
    parts = []
    for heads in _slices(query, key, engine):
        b = bias if bias is None or bias.shape[1] == 1 else bias[:, heads]
        args, own = (do[:, heads], q[:, heads], k, v), o[:, heads]
        if (
            engine == "efficient"
        ):  # its kernels for half precisions read the output by a stride of their own: (B, L, H, D)
            own = own.transpose(1, 2).contiguous().transpose(1, 2)
        parts.append(_call_backward(engine, args, b, own, lse[:, heads], rows, keys, causal, scale))
    dqs, dks, dvs = zip(*parts, strict=True)
    dk, dv = (x[0] if len(x) == 1 else torch.stack(x).sum(0, dtype=torch.float32) for x in (dks, dvs))
    return _together(list(dqs))[..., :dim], dk[..., :dim], dv[..., :value_dim]


def _call_backward(engine, args, bias, out, lse, rows, keys, causal, scale):
    do, q, k, v = args
    if engine == "cpu":
        return _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            do, q, k, v, out, lse, 0.0, causal, attn_mask=bias, scale=scale
        )
    seed = q.new_empty((2,), dtype=torch.int64)  # of the dropout that is not: nobody reads it
    if engine == "flash":
        return _aten._scaled_dot_product_flash_attention_backward(
            do,
            q,
            k,
            v,
            out,
            lse.contiguous(),
            None,
            None,
            rows,
            keys,
            0.0,
            causal,
            seed.view(torch.uint64),
            seed[0].view(torch.uint64),
            scale=scale,
        )
    if engine == "efficient":
        lse = F.pad(lse, (0, -rows % 32), value=torch.inf).contiguous()
        wanted = [True, True, True, False]
        return _aten._scaled_dot_product_efficient_attention_backward(
            do, q, k, v, bias, out, lse, seed[0], seed[1], 0.0, wanted, causal, scale=scale
        )[:3]
    return _aten._scaled_dot_product_cudnn_attention_backward(
        do, q, k, v, out, lse.contiguous()[..., None], seed[0], seed[1], bias, None, None, rows, keys, 0.0, causal,
        scale=scale,
    )  # fmt: skip


def _with_lse(do: Tensor, value: Tensor, grad_lse: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """One more column for the gradient through the log-sum-exp; ``do`` is a copy already, since it has room."""
    do[..., value.shape[3]] = grad_lse
    v = F.pad(value, (0, width - value.shape[3])).contiguous()
    v[..., value.shape[3]] = 1
    return do, v


# ---- Flash of keys with lengths


def _cumulative(lengths: Tensor, rows: int, keys: int) -> tuple[Tensor, Tensor]:
    """Where sequences of queries and of keys start, two for each item: the keys that exist, seen by all its queries,
    and the rest, seen by none.

    So keys stay where they lie, the kernels visit those that exist, and the backward, for which all that it is given
    belongs to a sequence, writes zeros for the rest. On the device: nobody waits for the lengths.
    """
    batch = lengths.shape[0]
    of_keys = torch.arange(0, batch * keys, keys, device=lengths.device)
    of_keys = torch.stack((of_keys, of_keys + lengths.clamp(0, keys)), 1).flatten()
    of_queries = torch.arange(1, 2 * batch + 2, device=lengths.device) // 2 * rows
    return of_queries.int(), F.pad(of_keys, (0, 1), value=batch * keys).int()


def _in_a_row(x: Tensor, batch: int, width: int) -> Tensor:
    """``(B, H, L, D)`` as ``(B L, H, D)``: a copy only where it does not lie like that."""
    return _wide(_expand(x, batch), width).transpose(1, 2).flatten(0, 1)


def _ragged(query: Tensor, source: Source, scale: float) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp ``(B, H, L)`` of a source with lengths, by the flash kernel."""
    (batch, heads, rows, dim), (keys, value_dim) = query.shape, source.value.shape[2:]
    width = _width(query, dim, value_dim, engine="flash")
    q, k, v = (_in_a_row(x, batch, width) for x in (query, source.key, source.value))
    # A longest sequence of one query would have the kernel count on one query for each sequence.
    sizes = (*_cumulative(source.lengths, rows, keys), max(rows, 2), keys)
    out, lse = _aten._flash_attention_forward(q, k, v, *sizes, 0.0, False, False, scale=scale)[:2]
    lse = lse.view(heads, batch, rows).transpose(0, 1)
    lse = torch.where((source.lengths > 0)[:, None, None], lse, -torch.inf)
    return out.view(batch, rows, heads, width).transpose(1, 2)[..., :value_dim], lse


def _ragged_backward(grad_out, grad_lse, query, source, out, lse, scale) -> tuple[Tensor, Tensor, Tensor]:
    (batch, heads, rows, dim), (key_heads, keys, value_dim) = query.shape, source.value.shape[1:]
    width = _width(query, dim, value_dim + (grad_lse is not None), engine="flash")
    do, value = _wide(grad_out.to(query.dtype), width), source.value
    if grad_lse is not None:
        do, value = _with_lse(do, value, grad_lse, width)
    do, q, k, v, o = (_in_a_row(x, batch, width) for x in (do, query, source.key, value, out))
    sizes = (*_cumulative(source.lengths, rows, keys), max(rows, 2), keys)
    seed = q.new_empty((2,), dtype=torch.int64).view(torch.uint64)  # of the dropout that is not
    lse = lse.transpose(0, 1).flatten(1).contiguous()
    dq, dk, dv = _aten._flash_attention_backward(
        do, q, k, v, o, lse, *sizes, 0.0, False, seed, seed[0], scale=scale
    )  # fmt: skip
    dq = dq.view(batch, rows, heads, width).transpose(1, 2)[..., :dim]
    dk, dv = (x.view(batch, keys, key_heads, width).transpose(1, 2) for x in (dk, dv))
    return dq, dk[..., :dim], dv[..., :value_dim]


def sum_batch(x: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Over the batch where that was broadcast; in the layout that operators here promise."""
    spoil()
    if x.shape[0] != shape[0]:
        x = x.sum(0, keepdim=True, dtype=torch.float32)
    return heads_inside(x, shape, dtype).copy_(x)
