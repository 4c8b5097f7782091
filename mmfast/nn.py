"""The modules of all slices: the one place that a model builder imports from."""

from mmfast.mel.modules import MelFrontend

__all__ = ["MelFrontend"]
