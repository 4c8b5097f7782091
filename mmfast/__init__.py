"""Fused kernels for multimodal learning in PyTorch."""

from mmfast import mel, nn

__all__ = ["mel", "nn"]
__version__ = "0.1.0"
