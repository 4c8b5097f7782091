"""Joint attention to plain sources on the CPU with few checks around the native kernels.

A small attention takes less time than the checks, choices and operators around it. `attention` takes the common case,
keys and values without anything else, with gradients or without; everything else goes its way through
`mmfast.fusion.attention`, with the same results.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mmfast import _backend
from mmfast.fusion import op
from mmfast.fusion._inputs import Source

_PLAIN = (Tensor, torch.nn.Parameter)
_NOTHING = (None,) * 4  # mask, lengths, bias and gate


def attention(query: Tensor, sources: Sequence, scale: float | None, is_causal: bool) -> Tensor | None:
    """`mmfast.cross_attention` of these arguments alone, or None where a check fails, for others to say why, and where
    there is more to do than to call the kernels."""
    if _backend._C is None or torch.compiler.is_compiling() or not _backend.nobody_looks_on():
        return None
    if forward_ad._current_level >= 0 or torch.is_autocast_enabled("cpu") or type(query) not in _PLAIN:
        return None
    if type(is_causal) is not bool or not (scale is None or (type(scale) is float and math.isfinite(scale))):
        return None
    pairs = [sources] if type(sources) is Source or _is_pair(sources) else sources
    if type(pairs) not in (list, tuple):
        return None
    keys, values = [], []
    for pair in pairs:
        if not _is_pair(pair) and not (type(pair) is Source and pair[2:] == _NOTHING):
            return None
        key, value = pair[0], pair[1]
        if type(key) not in _PLAIN or type(value) not in _PLAIN:
            return None
        keys.append(key)
        values.append(value)
    taken, tracked = _backend._C.fusion_takes(query, keys, values)  # which sees to the rest, in a tenth of the time
    if not taken:
        return None
    if scale is None:
        scale = query.shape[3] ** -0.5
    arguments = query, keys, values, [], [], [0] * len(keys), False, is_causal, scale
    if tracked:
        return op.Direct.apply(arguments, query, *keys, *values)[0]
    none = [None] * len(keys)
    return _backend._C.fusion_forward(query, keys, values, none, none, none, none, False, is_causal, scale)[0]


def _is_pair(x: object) -> bool:
    return type(x) in (tuple, list) and len(x) == 2 and type(x[0]) in _PLAIN and type(x[1]) in _PLAIN
