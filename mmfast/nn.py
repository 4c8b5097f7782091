"""The modules of all slices: the one place that a model builder imports from."""

from mmfast.mel.modules import MelFrontend
from mmfast.mmd.modules import MMDLoss

__all__ = ["MMDLoss", "MelFrontend"]
