"""Cross-attention of sequences of different lengths that lie one after the other, and of `torch.nested` tensors."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mmfast import _backend
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
    zero. On the CPU short items of similar lengths are computed together, as a batch of the longest of them, and long
    ones one by one; elsewhere, and in a compiled graph, where reading ``cu_seqlens`` would wait for the device, all at
    once under a mask of ``(T, S)``.

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
    sources = [sources] if isinstance(sources, PackedSource) else sources
    if not isinstance(sources, (list, tuple)):
        raise TypeError(f"sources must be a PackedSource or a list of them, got {type(sources).__name__}")
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
    looped = all(_known(o) is not None for o in (cu_seqlens, *offsets))
    if looped and choose_engine(query.device, backend) != "reference":
        out, lses = _by_groups(query4, cu_seqlens, sources4, offsets, *options)
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
    values = _known(offsets)
    if values is not None:
        values = values.tolist()
        if values[0] != 0 or values[-1] != rows.shape[0] or any(a > b for a, b in itertools.pairwise(values)):
            raise ValueError(f"{name} must ascend from 0 to {rows.shape[0]}, got {values}")


def _known(offsets: Tensor) -> Tensor | None:
    """The offsets, if there is no device to wait for and nothing is traced; not those of a vmap, which differ."""
    values = _backend.values_of(offsets)
    return values if values is not None and values.dim() == 1 else None


# What a call costs beside its work, and a number that is copied, in multiplications and additions of the kernels: about
# 0.1 ms and 2 ns, where the kernels do 10 in a nanosecond.
_CALL, _COPY = 1_000_000, 20


def _by_groups(query, cu_seqlens, sources, offsets, fusion, scale, is_causal, dropout_p, softcap, backend):
    """Items of similar lengths as one batch of the longest; long ones, and those that have no like, alone in place."""
    # Split, not sliced: the gradient of a slice is as large as the whole, once for each item.
    sizes = [_known(o).diff().tolist() for o in (cu_seqlens, *offsets)]
    counts = list(zip(*sizes, strict=True))
    rows = _split(query, sizes[0])
    pairs = [(_split(s.key, n), _split(s.value, n)) for s, n in zip(sources, sizes[1:], strict=True)]
    widths = (
        query.shape[1] * (query.shape[3] + sources[0].value.shape[3]),
        *(s.key.shape[1] * (s.key.shape[3] + s.value.shape[3]) for s in sources),
    )
    outs: dict[int, Tensor] = {}
    lses: dict[int, tuple[Tensor, ...]] = {}
    for group in _groups(counts, widths):
        longest = [max(given) for given in zip(*(counts[b] for b in group), strict=True)]
        some = []
        for i, (source, both) in enumerate(zip(sources, pairs, strict=True), 1):
            key, value = (_stack([parts[b] for b in group], longest[i]) for parts in both)
            given = [counts[b][i] for b in group]
            lengths = None if min(given) == longest[i] else torch.tensor(given, dtype=torch.int64, device=query.device)
            some.append(source._replace(key=key, value=value, lengths=lengths))
        stacked = _stack([rows[b] for b in group], longest[0])
        result = attend(stacked, some, fusion, scale, is_causal, dropout_p, softcap, False, backend)
        for b, out, *of_item in zip(group, result.out.unbind(), *(lse.unbind() for lse in result.lses), strict=True):
            outs[b] = out[:, : counts[b][0]]
            lses[b] = tuple(lse[:, : counts[b][0]] for lse in of_item)
    if not outs:
        result = attend(query, sources, fusion, scale, is_causal, dropout_p, softcap, False, backend)
        return result.out, result.lses
    order = sorted(outs)
    parts = zip(*(lses[b] for b in order), strict=True)
    return torch.cat([outs[b] for b in order], 1)[None], tuple(torch.cat(part, 1)[None] for part in parts)


def _split(x: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
    """``(rows, H, D)`` of each item."""
    return x[0].transpose(0, 1).split(sizes)


def _groups(counts: list[tuple[int, ...]], widths: tuple[int, ...]) -> list[list[int]]:
    """The items that have queries, in groups: each joins that of its predecessor in length where a call costs more.

    ``counts`` has the rows of each item, of the query and of each source, ``widths`` the numbers in a row of each.
    """
    groups: list[list[int]] = []
    so_far, longest = 0, ()
    for b in sorted((b for b, count in enumerate(counts) if count[0]), key=lambda b: counts[b]):
        joined = tuple(map(max, counts[b], longest)) if groups else counts[b]
        size = len(groups[-1]) + 1 if groups else 1
        together = size * _cost(joined, widths, copied=True)
        if groups and together <= so_far + _cost(counts[b], widths, copied=False) + _CALL:
            groups[-1].append(b)
            so_far, longest = together, joined
        else:
            groups.append([b])
            so_far, longest = _cost(counts[b], widths, copied=False), counts[b]
    return groups


def _cost(count: tuple[int, ...], widths: tuple[int, ...], copied: bool) -> int:
    work = count[0] * sum(count[1:]) * widths[0]
    return work + _COPY * sum(n * width for n, width in zip(count, widths, strict=True)) if copied else work


def _stack(items: list[Tensor], longest: int) -> Tensor:
    """``(n, H, longest, D)`` of items ``(rows, H, D)``; one item in place.

    Short items go on with copies of their first row, so that what a row beyond the end makes NaN is NaN already. The
    gradient of such a row of the query is zero, and keys beyond the end do not exist.
    """
    if len(items) == 1:
        return items[0].transpose(0, 1)[None]
    pieces = []
    for x in items:
        pieces.append(x)
        if missing := longest - x.shape[0]:
            first = x[:1].detach() if x.shape[0] else x.new_zeros(1, *x.shape[1:])
            pieces.append(first.expand(missing, -1, -1))
    return torch.cat(pieces).unflatten(0, (len(items), longest)).transpose(1, 2)


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
        if not _are_equal(key_offsets, value_offsets):
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


def _are_equal(one: Tensor, other: Tensor) -> bool:
    if one is other:
        return True
    if one.shape != other.shape:
        return False
    known = _known(one), _known(other)
    return any(x is None for x in known) or torch.equal(*known)


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
