"""What the primitives take of a kernel, and how its parameters get there."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mmfast import _backend

if TYPE_CHECKING:
    from mmfast.mmd.bandwidth import MeanDistance

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
ROOTS = (LAPLACIAN, MATERN32, MATERN52, ENERGY)  # of the distance itself, which magnifies errors near 0


@dataclass(frozen=True)
class Terms:
    """K = Π over layers (Σ over that layer's terms), the form in which the primitives take a kernel.

    ``params`` is ``(T, 4)`` float64 with the columns weight, gamma, offset, exponent; what a family does not use is 0.
    It may require a gradient. All terms of one layer share their metric. With a ``rule`` (a mean of squared distances)
    the lengths are multiples of what it finds: the form that `mmfast.mmd.small` takes, and nothing else.
    """

    families: tuple[int, ...]
    layers: tuple[int, ...]
    params: Tensor
    rule: MeanDistance | None = None


def check_scalar(name: str, value: object, positive: bool = True) -> None:
    """Raises unless ``value`` is a finite (and positive) number or such a tensor without dimensions."""
    if isinstance(value, Tensor):
        if value.dim() or not value.dtype.is_floating_point:
            raise ValueError(
                f"{name} must be a number or a floating-point tensor without dimensions, "
                f"got shape {tuple(value.shape)}, {value.dtype}"
            )
        if not _backend.may_look(value):
            return
        number = value.item()
    elif isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number or a tensor, got {type(value).__name__}")
    else:
        number = _backend.plain(value)
    if not math.isfinite(number) or (positive and number <= 0):
        raise ValueError(f"{name} must be {'positive and ' if positive else ''}finite, got {number}")


def table(rows: Sequence[Sequence[float | Tensor]], device: torch.device) -> Tensor:
    """``(T, 4)`` float64 from numbers and tensors without dimensions."""
    if not any(isinstance(value, Tensor) for row in rows for value in row):
        return _numbers(tuple(map(tuple, rows)), device)

    def column(value: float | Tensor) -> Tensor:
        if isinstance(value, Tensor):
            return value.to(device, torch.float64)
        return torch.full((), value, dtype=torch.float64, device=device)  # a copy from the host would wait for it

    return torch.stack([torch.stack([column(value) for value in row]) for row in rows])


@_backend.kept(maxsize=1024)  # a copy from the host would wait for the device, where each step builds its kernel anew
def _numbers(rows: tuple[tuple[float, ...], ...], device: torch.device) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64, device=device)


def vector(name: str, values: Sequence[float] | Tensor, positive: bool = False) -> list[float] | Tensor:
    """Finite (and positive) numbers as a list; a tensor as it is."""
    if isinstance(values, Tensor):
        if values.dim() != 1 or not len(values) or not values.dtype.is_floating_point:
            raise ValueError(
                f"{name} must be numbers or a floating-point tensor of one dimension, "
                f"got shape {tuple(values.shape)}, {values.dtype}"
            )
        if _backend.may_look(values):
            for value in values.tolist():
                check_scalar(name, value, positive)
        return values
    if isinstance(values, (str, int, float)) or not len(values):
        raise ValueError(f"{name} must be one or more numbers, got {values!r}")
    for value in values:
        check_scalar(name, value.item() if hasattr(value, "item") else value, positive)
    return [float(value) for value in values]
