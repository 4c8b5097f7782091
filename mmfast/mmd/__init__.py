"""Reductions of kernel matrices between samples (MMD and its relatives) that never build the matrix."""

from mmfast.mmd import reference
from mmfast.mmd._precision import precision
from mmfast.mmd.dependence import cka, hsic, kernel_alignment
from mmfast.mmd.estimators import lmmd, mmd2, witness
from mmfast.mmd.kid import KID, kid
from mmfast.mmd.products import KernelSums, kernel_matmul, kernel_matrix, kernel_sum
from mmfast.mmd.testing import TwoSampleTest, mmd2_power, mmd2_variance, two_sample_test

__all__ = [
    "KID",
    "KernelSums",
    "TwoSampleTest",
    "cka",
    "hsic",
    "kernel_alignment",
    "kernel_matmul",
    "kernel_matrix",
    "kernel_sum",
    "kid",
    "lmmd",
    "mmd2",
    "mmd2_power",
    "mmd2_variance",
    "precision",
    "reference",
    "two_sample_test",
    "witness",
]
