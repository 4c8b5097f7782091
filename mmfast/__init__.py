"""Fused kernels for multimodal learning in PyTorch."""

from mmfast import mel

__all__ = ["mel"]
__version__ = "0.1.0"
