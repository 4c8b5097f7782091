"""Cross-attention from one modality to one or several others, each read in place."""

from mmfast.fusion import reference
from mmfast.fusion._inputs import Source
from mmfast.fusion.attention import attention_pool, cross_attention, merge
from mmfast.fusion.epilogue import gated_residual
from mmfast.fusion.packed import PackedSource, packed_attention

__all__ = [
    "PackedSource",
    "Source",
    "attention_pool",
    "cross_attention",
    "gated_residual",
    "merge",
    "packed_attention",
    "reference",
]
