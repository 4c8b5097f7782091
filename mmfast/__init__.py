"""Fused kernels for multimodal learning in PyTorch."""

from mmfast import distributed, kernels, mel, mmd, nn
from mmfast.mmd import (
    cka,
    hsic,
    kernel_alignment,
    kernel_matmul,
    kernel_matrix,
    kernel_sum,
    lmmd,
    mmd2,
    mmd2_power,
    mmd2_variance,
    two_sample_test,
    witness,
)

__all__ = [
    "cka",
    "distributed",
    "hsic",
    "kernel_alignment",
    "kernel_matmul",
    "kernel_matrix",
    "kernel_sum",
    "kernels",
    "lmmd",
    "mel",
    "mmd",
    "mmd2",
    "mmd2_power",
    "mmd2_variance",
    "nn",
    "two_sample_test",
    "witness",
]
__version__ = "0.1.0"
