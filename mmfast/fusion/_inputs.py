"""What the public functions of the fusion slice are given: `Source`, its checks, and the form that engines take."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mmfast import _backend

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
FUSIONS = ("joint", "decoupled")


class Source(NamedTuple):
    """Keys and values that queries attend to, and who may attend to what.

    Args:
        key: ``(B, H_kv, S, D)``; batch 1 is shared by the whole batch, without a copy. ``H_kv`` divides the heads of
            the query: head h reads key head ``h // (H / H_kv)``.
        value: ``(B, H_kv, S, D_v)``, of the key's heads and length; the batch may differ.
        mask: 2 to 4 dimensions that broadcast to ``(B, H, L, S)``. Boolean: True where a query may attend. Floating
            point: added to the scores; −inf excludes. ``(B, 1, L, 1)`` says which rows see this source at all.
        lengths: ``(B,)`` int64 or int32: only the first ``lengths`` keys of an item exist. What lies beyond is not
            used, whatever it holds.
        bias: as a floating point mask, added to it.
        gate: factor of this source's attention in decoupled fusion: a number, or a floating point tensor ``()``,
            ``(H,)`` (one a head) or of 4 dimensions that broadcast to ``(B, H, L, D_v)``.
    """

    key: Tensor
    value: Tensor
    mask: Tensor | None = None
    lengths: Tensor | None = None
    bias: Tensor | None = None
    gate: Tensor | float | None = None


if _backend._C is not None:  # by no code in Python: 1.5 µs of a call that takes 16
    _backend._C.fusion_make_sources(Source)

Sources = Sequence["Source | tuple[Tensor, Tensor]"]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What attention of tensors of ``dtype`` is computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def is_plain(tensors: Sequence[Tensor]) -> bool:
    """Whether an operator's kernel may be called itself (`_backend.nobody_looks_on`), on these tensors."""
    if torch.compiler.is_compiling() or not _backend.nobody_looks_on():
        return False
    return all(map(_backend.is_plain, tensors))


def is_tracked(tensors: Sequence[Tensor]) -> bool:
    """Whether autograd follows what is done with them."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def is_eager(tensors: Sequence[Tensor]) -> bool:
    """Plain tensors, none tracked."""
    return is_plain(tensors) and not is_tracked(tensors)


def as_sources(sources: Sources | Source | tuple[Tensor, Tensor]) -> list[Source]:
    """A list of `Source`, of which there is at least one."""
    if isinstance(sources, Source):
        sources = [sources]
    if not isinstance(sources, (list, tuple)):
        raise TypeError(f"sources must be a list of Source or of (key, value), got {type(sources).__name__}")
    if len(sources) == 2 and isinstance(sources[0], Tensor) and isinstance(sources[1], Tensor):
        sources = [sources]
    if not sources:
        raise ValueError("sources must hold at least one source, got none")
    result = []
    for i, source in enumerate(sources):
        if not isinstance(source, Source):
            if not isinstance(source, (tuple, list)) or len(source) != 2:
                kind = f"{len(source)} items" if isinstance(source, (tuple, list)) else type(source).__name__
                raise TypeError(f"sources[{i}] must be a Source or a pair (key, value), got {kind}")
            source = Source(*source)
        result.append(source)
    return result


def check_tensor(name: str, x: object, dims: int, layout: str) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, float64, float16 or bfloat16, got {x.dtype}")
    _backend.check_dense(name, x)
    if x.dim() != dims:
        raise ValueError(f"{name} must be {layout}, got {tuple(x.shape)}")


def check_options(
    fusion: str, scale: float | None, dropout_p: float, softcap: float | None, head_dim: int
) -> tuple[float, float, float | None]:
    """The options, with the scale that ``None`` stands for."""
    check_choice("fusion", fusion, FUSIONS)
    scale = head_dim**-0.5 if scale is None else check_number("scale", scale)
    dropout_p = check_number("dropout_p", dropout_p)
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"dropout_p must lie in [0, 1], got {dropout_p}")
    if softcap is not None:
        softcap = check_number("softcap", softcap)
        if softcap <= 0:
            raise ValueError(f"softcap must be positive, or None, got {softcap}")
    return scale, dropout_p, softcap


def positive_scale(query: Tensor, scale: float) -> tuple[Tensor, float, float]:
    """Query and scale of the same scores with a scale above 0, and the factor of the gradient of such a query.

    For PyTorch's fused kernels: flash takes the maximum of the scores before they are scaled, where a negative scale
    makes it the minimum and the exponentials overflow; and they scale the −inf of what is excluded, to +inf or NaN.
    """
    if scale > 0:
        return query, scale, 1.0
    factor = -1.0 if scale else 0.0
    return query * factor, -scale or 1.0, factor


def check_number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, numbers.Real)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not abs(value) < math.inf:
        raise ValueError(f"{name} must be finite, got {value}")
    return float(value)


def check_positive(name: str, value: object, otherwise: str = "") -> int:
    """``value``, of numpy's integers too, as Python's."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise ValueError(f"{name} must be a positive integer{otherwise}, got {value!r}")
    return int(value)


def check_choice(name: str, value: object, allowed: Sequence[object]) -> None:
    if not any(value is choice or value == choice for choice in allowed):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def under_autocast(query: Tensor, sources: list[Source]) -> tuple[Tensor, list[Source]]:
    """As scaled_dot_product_attention: under autocast in its dtype, but for float64."""
    kind = query.device.type
    if not _backend.is_autocast(kind):
        return query, sources
    dtype = torch.get_autocast_dtype(kind)

    def cast(x: Tensor) -> Tensor:
        return x.to(dtype) if x.dtype in (torch.float32, torch.float16, torch.bfloat16) else x

    return cast(query), [s._replace(key=cast(s.key), value=cast(s.value)) for s in sources]


def prepare(query: Tensor, sources: Sources, fusion: str) -> tuple[Tensor, list[Source]]:
    """Checks shapes, dtypes and devices; masks, biases and gates in 4 dimensions, lengths in int64."""
    check_tensor("query", query, 4, "(B, H, L, D)")
    sources = as_sources(sources)
    for i, source in enumerate(sources):
        check_tensor(f"key of sources[{i}]", source.key, 4, "(B, H_kv, S, D)")
        check_tensor(f"value of sources[{i}]", source.value, 4, "(B, H_kv, S, D_v)")
    query, sources = under_autocast(query, sources)
    batch = batch_of(query, sources)
    for i, source in enumerate(sources):
        _check_shapes(f"sources[{i}]", query, source, batch, sources[0].value.shape[3])
    return query, [_prepare(f"sources[{i}]", query, s, batch, fusion) for i, s in enumerate(sources)]


def keys_and_values(sources: Sequence[Source]) -> list[Tensor]:
    return [x for s in sources for x in (s.key, s.value)]


def batch_of(query: Tensor, sources: list[Source]) -> int:
    """What query, keys and values broadcast to: the one size that is not 1."""
    sizes = [query.shape[0], *(x.shape[0] for x in keys_and_values(sources))]
    return next((size for size in sizes if size != 1), 1)


def _check_shapes(name: str, query: Tensor, source: Source, batch: int, value_dim: int) -> None:
    key, value = source.key, source.value
    if query.shape[0] != 1 and query.shape[0] != batch:
        raise ValueError(f"query must have batch 1 or {batch}, got {query.shape[0]}")
    for what, x in (("key", key), ("value", value)):
        if x.device != query.device:
            raise ValueError(f"{what} of {name} must be on the query's device {query.device}, got {x.device}")
        if x.dtype != query.dtype:
            raise TypeError(f"{what} of {name} must have the query's dtype {query.dtype}, got {x.dtype}")
        if x.shape[0] != 1 and x.shape[0] != batch:
            raise ValueError(f"{what} of {name} must have batch 1 or {batch}, got {x.shape[0]}")
        if x.shape[3] == 0:
            raise ValueError(f"{what} of {name} must have at least one feature, got {tuple(x.shape)}")
    if key.shape[3] != query.shape[3]:
        raise ValueError(f"key of {name} must have the query's head dim {query.shape[3]}, got {key.shape[3]}")
    if value.shape[1:3] != key.shape[1:3]:
        raise ValueError(
            f"value of {name} must have the key's heads and length {tuple(key.shape[1:3])}, "
            f"got {tuple(value.shape[1:3])}"
        )
    if value.shape[3] != value_dim:
        raise ValueError(f"value of {name} must have the head dim of sources[0], {value_dim}, got {value.shape[3]}")
    if key.shape[1] == 0 or query.shape[1] % key.shape[1]:
        raise ValueError(
            f"key of {name} must have a number of heads that divides the query's {query.shape[1]}, got {key.shape[1]}"
        )


def _prepare(name: str, query: Tensor, source: Source, batch: int, fusion: str) -> Source:
    key, value, mask, lengths, bias, gate = source
    heads, rows = query.shape[1:3]
    shape = (batch, heads, rows, key.shape[2])
    if mask is not None:
        mask = _broadcasts(f"mask of {name}", mask, query, shape, boolean=True)
    if bias is not None:
        bias = _broadcasts(f"bias of {name}", bias, query, shape, boolean=False)
    if lengths is not None:
        lengths = check_lengths(f"lengths of {name}", lengths, query.device, batch, key.shape[2])
    if gate is not None:
        if fusion == "joint":
            raise ValueError(f"gate of {name} needs fusion='decoupled': one softmax over all sources has no gates")
        if isinstance(gate, Tensor):
            if gate.dim() == 1 and gate.shape[0] == heads:
                gate = gate[None, :, None, None]
            elif gate.dim() == 0:
                gate = gate[None, None, None, None]
            elif gate.dim() != 4:
                full = (batch, heads, rows, value.shape[3])
                raise ValueError(
                    f"gate of {name} must be (), ({heads},) or broadcast to {full}, got {tuple(gate.shape)}"
                )
            gate = _broadcasts(f"gate of {name}", gate, query, (batch, heads, rows, value.shape[3]), boolean=False)
        else:
            gate = check_number(f"gate of {name}", gate)
    return Source(key, value, mask, lengths, bias, gate)


def _broadcasts(name: str, x: object, query: Tensor, shape: tuple[int, ...], boolean: bool) -> Tensor:
    """``x`` in 4 dimensions."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.dtype not in DTYPES and not (boolean and x.dtype == torch.bool):
        raise TypeError(f"{name} must be {'boolean or ' if boolean else ''}floating point, got {x.dtype}")
    if x.device != query.device:
        raise ValueError(f"{name} must be on the query's device {query.device}, got {x.device}")
    if not 2 <= x.dim() <= 4:
        raise ValueError(f"{name} must have 2 to 4 dimensions that broadcast to {shape}, got {tuple(x.shape)}")
    given = x
    for _ in range(4 - x.dim()):
        x = x.unsqueeze(0)
    # Not `in`: a compiler compares symbolic sizes only by ==.
    if any(size != 1 and size != full for size, full in zip(x.shape, shape, strict=True)):
        raise ValueError(f"{name} must broadcast to {shape}, got {tuple(given.shape)}")
    return x


def check_lengths(name: str, lengths: object, device: torch.device, batch: int, longest: int) -> Tensor:
    if not isinstance(lengths, Tensor) or lengths.dtype not in (torch.int64, torch.int32):
        kind = getattr(lengths, "dtype", type(lengths).__name__)
        raise TypeError(f"{name} must be an int64 or int32 tensor, got {kind}")
    if lengths.shape != (batch,):
        raise ValueError(f"{name} must be ({batch},), one for each item, got {tuple(lengths.shape)}")
    if lengths.device != device:
        raise ValueError(f"{name} must be on the query's device {device}, got {lengths.device}")
    _backend.check_within(name, lengths, longest)
    return lengths.to(torch.int64)
