"""Who computes which shape on the CPU where both our kernels and torch's flash attention can, by measurement.

| queries that share their keys | keys | dtype | taken | why |
|---|---|---|---|---|
| fewer than `FEW_QUERIES` | from `LONG_KEYS` on | float32, float64 | torch | ours fill vectors with queries |
| others | any | any | ours | 1.0 to 4 times as fast with AVX-512, from 77 keys to 1500 |
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mmfast.fusion._inputs import Source

FEW_QUERIES = 4
LONG_KEYS = 512


def choose(query: Tensor, sources: Sequence[Source], fusion: str, weights: bool | str) -> str:
    """``"cpu"`` (our kernels) or ``"torch"`` (torch's flash attention, source by source)."""
    if weights:
        return "cpu"  # torch's has none
    together = query.shape[2] * min(query.shape[1] // s.key.shape[1] for s in sources)
    keys = max(s.key.shape[2] for s in sources)
    full = False
    return "torch" if full and together < FEW_QUERIES and keys >= LONG_KEYS else "cpu"
