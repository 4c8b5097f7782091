"""Measures of samples that are spread over the ranks of a torch.distributed group."""

from mmfast.mmd.distributed import mmd2

__all__ = ["mmd2"]
