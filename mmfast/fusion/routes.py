"""Who computes which shape on the CPU, by measurement."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mmfast.fusion._inputs import Source


def choose(query: Tensor, sources: Sequence[Source], fusion: str, weights: bool | str) -> str:
    """``"cpu"`` (our kernels) or ``"torch"`` (torch's flash attention, source by source)."""
    return "cpu"
