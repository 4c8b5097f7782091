"""Fused kernels for multimodal learning in PyTorch."""

from mmfast import distributed, fusion, kernels, mel, mmd, nn
from mmfast.fusion import cross_attention
from mmfast.mmd import (
    cka,
    hsic,
    kernel_alignment,
    kernel_matmul,
    kernel_matrix,
    kernel_sum,
    kid,
    lmmd,
    mmd2,
    mmd2_power,
    mmd2_variance,
    two_sample_test,
    witness,
)
from mmfast.swapping import swap

__all__ = [
    "cka",
    "cross_attention",
    "distributed",
    "fusion",
    "hsic",
    "kernel_alignment",
    "kernel_matmul",
    "kernel_matrix",
    "kernel_sum",
    "kernels",
    "kid",
    "lmmd",
    "mel",
    "mmd",
    "mmd2",
    "mmd2_power",
    "mmd2_variance",
    "nn",
    "swap",
    "two_sample_test",
    "witness",
]
__version__ = "0.1.0"
