"""Attention with few checks around the native kernels.

A small attention takes less time than the checks, choices and operators around it. `attention`, one native call, takes
the calls that need the kernels alone, on the CPU any for which they are made, on the GPU those like one that went its
way before (`triton_direct`); everything else goes its way through `mmfast.fusion.attention`, with the same results.
"""

from __future__ import annotations

from mmfast import _backend


def _none(*arguments: object) -> None:
    """Without the extension."""


# Takes the arguments of `mmfast.cross_attention`, each by position: what it returns, or None where a check fails, for
# others to say why, and where there is more to do than to call the kernels.
attention = _none if _backend._C is None else _backend._C.fusion_attention
