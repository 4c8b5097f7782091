"""Attention on the CPU with few checks around the native kernels.

A small attention takes less time than the checks, choices and operators around it. `attention` takes the calls that
need the kernels alone, with gradients or without, by one native call; everything else goes its way through
`mmfast.fusion.attention`, with the same results.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mmfast import _backend
from mmfast.fusion._inputs import FUSIONS, Source
from mmfast.fusion.reference import Attention


def attention(
    query: Tensor,
    sources: Sequence,
    fusion: str,
    scale: float | None,
    is_causal: bool,
    lse: bool = False,
    weights: bool | str = False,
) -> Attention | None:
    """`mmfast.cross_attention` of these arguments, the lses only if asked for. None where a check fails, for others to
    say why, and where there is more to do than to call the kernels."""
    if _backend._C is None or torch.compiler.is_compiling() or fusion not in FUSIONS:
        return None
    if forward_ad._current_level >= 0 or torch.is_autocast_enabled("cpu"):
        return None
    decoupled, mean = fusion == "decoupled", weights == "mean"
    result = _backend._C.fusion_direct(Source, query, sources, decoupled, is_causal, scale, bool(weights), mean)
    if result is None:
        return None
    out, each, *parts = result
    return Attention(out, each.unbind() if lse else (), tuple(parts[0]) if parts else None)
