"""What the primitives take of a kernel."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

# Families: with s = |x - y|², d = |x - y|, d1 = |x - y|_1 and p = <x, y>, and the four columns of `Terms.params`:
GAUSSIAN = 0  # w exp(-γ s)
LAPLACIAN = 1  # w exp(-γ d)
POWER = 2  # w (1 + γ s) ** -exponent
MATERN32 = 3  # w (1 + γ d) exp(-γ d)
MATERN52 = 4  # w (1 + γ d + γ² s / 3) exp(-γ d)
ENERGY = 5  # -w d
LAPLACIAN_L1 = 6  # w exp(-γ d1)
POLYNOMIAL = 7  # w (γ p + offset) ** exponent

L2, L1, DOT = "l2", "l1", "dot"
METRIC = (L2, L2, L2, L2, L2, L2, L1, DOT)


@dataclass(frozen=True)
class Terms:
    """K = Π over layers (Σ over that layer's terms), the form in which the primitives take a kernel.

    ``params`` is ``(T, 4)`` float64 with the columns weight, gamma, offset, exponent; what a family does not use is 0.
    It may require a gradient. All terms of one layer share their metric.
    """

    families: tuple[int, ...]
    layers: tuple[int, ...]
    params: Tensor
