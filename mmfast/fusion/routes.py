"""Who computes which shape on the CPU where both our kernels and torch's flash attention can, by measurement.

| queries that share their keys | keys | dtype | softmax | taken | why |
|---|---|---|---|---|---|
| 2 to `FEW_QUERIES`; 1 with gradients | from `LONG_KEYS` | float32, float64 | (a) | torch | ours: queries in lanes |
| others | any | any | any | ours | 1.0 to 7 times as fast with AVX-512, from 77 keys to 65 536 |

(a) one a source, or one of sources with different numbers of heads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmfast.fusion._inputs import Source, keys_and_values

FEW_QUERIES = 8
LONG_KEYS = 512


def choose(query: Tensor, sources: Sequence[Source], fusion: str, weights: bool | str) -> str:
    """``"cpu"`` (our kernels) or ``"torch"`` (torch's flash attention, source by source)."""
    if weights:
        return "cpu"  # torch's has none
    if fusion == "joint" and all(s.key.shape[1] == sources[0].key.shape[1] for s in sources):
        return "cpu"
    together = query.shape[2] * min(query.shape[1] // s.key.shape[1] for s in sources)
    keys = max(s.key.shape[2] for s in sources)
    full = query.dtype.itemsize >= 4
    tensors = (query, *keys_and_values(sources))
    gradients = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    fewest = 1 if gradients else 2  # of one query ours is faster forward
    return "torch" if full and fewest <= together <= FEW_QUERIES and keys >= LONG_KEYS else "cpu"
