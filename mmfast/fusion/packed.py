"""Cross-attention of sequences of different lengths that lie one after the other, and of `torch.nested` tensors."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mmfast.fusion._inputs import Source, as_sources, check_options, check_tensor, prepare
from mmfast.fusion.attention import attend, choose_engine


class PackedSource(NamedTuple):
    """The keys and values of all items, one after the other.

    Args:
        key: ``(S, H_kv, D)``.
        value: ``(S, H_kv, D_v)``.
        cu_seqlens: ``(B + 1,)`` int32 or int64: item b has the rows ``cu_seqlens[b]`` … ``cu_seqlens[b + 1] - 1``.
        gate: as in `Source`, a number or a tensor ``()`` or ``(H,)``.
    """

    key: Tensor
    value: Tensor
    cu_seqlens: Tensor
    gate: Tensor | float | None = None


def packed_attention(
    query: Tensor,
    cu_seqlens: Tensor,
    sources: Sequence[PackedSource] | PackedSource,
    *,
    fusion: str = "joint",
    scale: float | None = None,
    is_causal: bool = False,
    dropout_p: float = 0.0,
    softcap: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple:
    r"""`mmfast.cross_attention` of items of different lengths, without padding.

    The queries of item b attend to the keys of item b of each source. Items may be empty; a query without keys gives
    zero. On the CPU items are computed one by one; elsewhere, and in a compiled graph, where reading ``cu_seqlens``
    would wait for the device, all at once under a mask of ``(T, S)``.

    Args:
        query: ``(T, H, D)``.
        cu_seqlens: ``(B + 1,)`` int32 or int64, from 0 to T, ascending: item b has the rows ``cu_seqlens[b]`` …
            ``cu_seqlens[b + 1] - 1``.
        sources: `PackedSource`, or a list of them.
        fusion, scale, is_causal, dropout_p, softcap, return_lse, backend: as in `mmfast.cross_attention`; positions are
            counted within the item.

    Returns:
        ``(T, H, D_v)``; with ``return_lse`` a pair of it and ``(T, H)``, or a tuple of those if decoupled.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.
    """
    check_tensor("query", query, 3, "(T, H, D)")
    if query.shape[2] == 0:
        raise ValueError(f"query must have at least one feature, got {tuple(query.shape)}")
    scale, dropout_p, softcap = check_options(fusion, scale, dropout_p, softcap, query.shape[2])
    sources = [sources] if isinstance(sources, PackedSource) else list(sources)
    for i, source in enumerate(sources):
        if not isinstance(source, PackedSource):
            raise TypeError(f"sources[{i}] must be a PackedSource, got {type(source).__name__}")
        check_tensor(f"key of sources[{i}]", source.key, 3, "(S, H_kv, D)")
        check_tensor(f"value of sources[{i}]", source.value, 3, "(S, H_kv, D_v)")
        if isinstance(source.gate, Tensor) and source.gate.dim() > 1:
            raise ValueError(f"gate of sources[{i}] must be () or (H,), got {tuple(source.gate.shape)}")
    _check_offsets("cu_seqlens", cu_seqlens, query, None)
    for i, source in enumerate(sources):
        _check_offsets(f"cu_seqlens of sources[{i}]", source.cu_seqlens, source.key, cu_seqlens)
    # As one item: everything else is checked there.
    query4, sources4 = prepare(_heads_first(query), [_whole(s) for s in sources], fusion)
    options = (fusion, scale, bool(is_causal), dropout_p, softcap, backend)
    offsets = [s.cu_seqlens for s in sources]
    looped = query.device.type == "cpu" and not torch.compiler.is_compiling()
    if looped and choose_engine(query.device, backend) != "reference":
        out, lses = _item_by_item(query4, cu_seqlens, sources4, offsets, *options)
    else:
        out, lses = _all_at_once(query4, cu_seqlens, sources4, offsets, *options)
    out = out[0].transpose(0, 1)
    if not return_lse:
        return out
    lses = tuple(lse[0].transpose(0, 1) for lse in lses)
    return out, (lses[0] if fusion == "joint" else lses)


def _heads_first(x: Tensor) -> Tensor:
    return x.transpose(0, 1).unsqueeze(0)


def _whole(source: PackedSource) -> Source:
    return Source(_heads_first(source.key), _heads_first(source.value), gate=source.gate)


def _check_offsets(name: str, offsets: object, rows: Tensor, other: Tensor | None) -> None:
    if not isinstance(offsets, Tensor) or offsets.dtype not in (torch.int64, torch.int32):
        kind = getattr(offsets, "dtype", type(offsets).__name__)
        raise TypeError(f"{name} must be an int64 or int32 tensor, got {kind}")
    if offsets.dim() != 1 or offsets.shape[0] < 1 or (other is not None and offsets.shape != other.shape):
        expected = "(B + 1,)" if other is None else f"{tuple(other.shape)} as for the query"
        raise ValueError(f"{name} must be {expected}, got {tuple(offsets.shape)}")
    if offsets.device != rows.device:
        raise ValueError(f"{name} must be on the device of its rows {rows.device}, got {offsets.device}")
    if offsets.device.type == "cpu" and not torch.compiler.is_compiling():
        values = offsets.tolist()
        if values[0] != 0 or values[-1] != rows.shape[0] or any(a > b for a, b in itertools.pairwise(values)):
            raise ValueError(f"{name} must ascend from 0 to {rows.shape[0]}, got {values}")


def _item_by_item(query, cu_seqlens, sources, offsets, fusion, scale, is_causal, dropout_p, softcap, backend):
    # Split, not sliced: the gradient of a slice is as large as the whole, once for each item.
    rows = query.split(cu_seqlens.diff().tolist(), 2)
    keys, values = ([getattr(s, name).split(o.diff().tolist(), 2) for s, o in zip(sources, offsets, strict=True)]
                    for name in ("key", "value"))  # fmt: skip
    outs, lses = [], []
    for b, item_rows in enumerate(rows):
        item = [s._replace(key=k[b], value=v[b]) for s, k, v in zip(sources, keys, values, strict=True)]
        result = attend(item_rows, item, fusion, scale, is_causal, dropout_p, softcap, False, backend)
        outs.append(result.out)
        lses.append(result.lses)
    if not outs:
        result = attend(query, sources, fusion, scale, is_causal, dropout_p, softcap, False, backend)
        return result.out, result.lses
    return torch.cat(outs, 2), tuple(torch.cat(parts, 2) for parts in zip(*lses, strict=True))


def _all_at_once(query, cu_seqlens, sources, offsets, fusion, scale, is_causal, dropout_p, softcap, backend):
    item, position = _items(cu_seqlens, query.shape[2])
    masked = []
    for source, of_source in zip(sources, offsets, strict=True):
        key_item, key_position = _items(of_source, source.key.shape[2])
        mask = item[:, None] == key_item
        if is_causal:
            mask = mask & (key_position <= position[:, None])
        masked.append(source._replace(mask=mask[None, None]))
    result = attend(query, masked, fusion, scale, False, dropout_p, softcap, False, backend)
    return result.out, result.lses


def _items(offsets: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Which item each row belongs to, and its place there."""
    index = torch.arange(rows, device=offsets.device)
    offsets = offsets.to(torch.int64)
    item = torch.searchsorted(offsets, index, right=True) - 1
    return item, index - offsets[item]


def nested_attention(query, sources, *, return_lse, **options):
    """`mmfast.cross_attention` where query or sources are nested, of the jagged layout and ``(B, H, ragged, D)``."""
    sources = as_sources(sources)
    rows, offsets = _unnested("query", query)
    flat = []
    for i, source in enumerate(sources):
        for name, given in zip(Source._fields[2:5], source[2:5], strict=True):
            if given is not None:
                raise ValueError(f"{name} of sources[{i}] must be None with nested tensors, whose lengths they have")
        key, key_offsets = _unnested(f"key of sources[{i}]", source.key)
        value, value_offsets = _unnested(f"value of sources[{i}]", source.value)
        if key_offsets.shape != value_offsets.shape or not torch.equal(key_offsets, value_offsets):
            raise ValueError(f"value of sources[{i}] must have the lengths of its key, and has others")
        flat.append(PackedSource(key, value, key_offsets, source.gate))
    result = packed_attention(rows, offsets, flat, return_lse=return_lse, **options)

    def shaped(x: Tensor) -> Tensor:
        if query.is_nested:
            return torch.nested.nested_tensor_from_jagged(x, offsets).transpose(1, 2)
        return x.unflatten(0, (query.shape[0], query.shape[2])).transpose(1, 2)

    if not return_lse:
        return shaped(result)
    out, lse = result
    return shaped(out), tuple(map(shaped, lse)) if isinstance(lse, tuple) else shaped(lse)


def _unnested(name: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """``(T, H, D)`` and the offsets."""
    if not x.is_nested:
        check_tensor(name, x, 4, "(B, H, L, D)")
        offsets = torch.arange(x.shape[0] + 1, device=x.device) * x.shape[2]
        return x.transpose(1, 2).flatten(0, 1), offsets
    if x.layout != torch.jagged or x.dim() != 4:
        raise ValueError(f"{name} must be nested in the jagged layout with 4 dimensions (B, H, ragged, D)")
    x = x.transpose(1, 2)
    if x._ragged_idx != 1:
        raise ValueError(f"{name} must be (B, H, ragged, D): the third dimension ragged")
    if x.lengths() is not None:
        x = x.contiguous()  # rows that belong to no item go
    return x.values(), x.offsets()


__all__ = ["PackedSource", "packed_attention"]
