"""Kernels for `mmfast.mmd2` and its relatives, and the rules that find their bandwidths in the data."""

from mmfast.mmd.bandwidth import MeanDistance, MedianDistance
from mmfast.mmd.kernels import (
    Cosine,
    Energy,
    Gaussian,
    InverseMultiquadric,
    Kernel,
    Laplacian,
    Linear,
    Matern,
    MultiGaussian,
    Polynomial,
    Product,
    RationalQuadratic,
    Scaled,
    Sum,
)

__all__ = [
    "Cosine",
    "Energy",
    "Gaussian",
    "InverseMultiquadric",
    "Kernel",
    "Laplacian",
    "Linear",
    "Matern",
    "MeanDistance",
    "MedianDistance",
    "MultiGaussian",
    "Polynomial",
    "Product",
    "RationalQuadratic",
    "Scaled",
    "Sum",
]
