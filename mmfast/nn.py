"""The modules of all slices: the one place that a model builder imports from."""

from mmfast.fusion.modules import CrossAttentionFusion, MultiheadAttention, TemporalPooling, WeightedFusion
from mmfast.mel.modules import MelFrontend
from mmfast.mmd.modules import MMDLoss

__all__ = [
    "CrossAttentionFusion",
    "MMDLoss",
    "MelFrontend",
    "MultiheadAttention",
    "TemporalPooling",
    "WeightedFusion",
]
