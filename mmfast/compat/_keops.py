"""The formulas of `mmfast.compat.keops`: what they are made of, and which of them are kernels."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from mmfast.kernels import Kernel
from mmfast.mmd.terms import (
    DOT,
    ENERGY,
    GAUSSIAN,
    L1,
    L2,
    LAPLACIAN,
    LAPLACIAN_L1,
    MATERN32,
    MATERN52,
    METRIC,
    POLYNOMIAL,
    POWER,
    Terms,
)

Number = float | Tensor

_TINY = 1e-12  # under a root, where only NaN is meant to be kept away


@dataclass(frozen=True)
class Points:
    """``(..., n, d)``; axis 0 is i, 1 is j, and 2 a parameter ``(..., 1, d)``."""

    values: Tensor
    axis: int


@dataclass(frozen=True)
class Vectors:
    """A vector for each pair: its ``how`` is "difference", "absolute", "square" or "product"."""

    x: Tensor
    y: Tensor
    how: str
    factor: Number = 1  # of the sum


@dataclass(frozen=True)
class Formula:
    """(c₀ + c₁ r + c₂ r²) · exp(−g₁ r − g₂ r²), with the metric's r: d, d₁ or p."""

    x: Tensor
    y: Tensor
    metric: str
    c: tuple[Number, Number, Number]
    g: tuple[Number, Number] = (0, 0)


@dataclass(frozen=True)
class Powered:
    """weight · (c₀ + c₂ s)^exponent."""

    x: Tensor
    y: Tensor
    c: tuple[Number, Number]
    exponent: Number
    weight: Number = 1


class Row(NamedTuple):
    """A term of `mmfast.mmd.terms.Terms`."""

    family: int
    weight: Number
    gamma: Number
    offset: Number
    exponent: Number


@dataclass(frozen=True)
class Sum:
    """Σ of kernels, each with its points: ``(x, y, rows)``."""

    groups: tuple[tuple[Tensor, Tensor, tuple[Row, ...]], ...]


class Rows(Kernel):
    def __init__(self, rows: Sequence[Row]) -> None:
        super().__init__()
        self.rows = rows

    @property
    def constant(self) -> bool:
        return False

    def parts(self, x, y=None, resolve=None):
        device = x[0].device
        numbers = [value for row in self.rows for value in row[1:]]
        if any(isinstance(value, Tensor) for value in numbers):
            params = torch.stack([torch.as_tensor(v, dtype=torch.float64, device=device) for v in numbers])
        else:
            params = torch.tensor(numbers, dtype=torch.float64, device=device)
        families = tuple(row.family for row in self.rows)
        return [(None, Terms(families, (0,) * len(families), params.view(-1, 4)))]


# ---- From what is written to nodes and numbers


def is_number(value) -> bool:
    return (isinstance(value, numbers.Real) and not isinstance(value, bool)) or (
        isinstance(value, Tensor) and value.dim() == 0
    )


def is_variable(node) -> bool:
    return isinstance(node, Points) and node.axis != 2


def is_kernel(node) -> bool:
    return isinstance(node, (Formula, Powered, Sum))


def _is_zero(value: Number) -> bool:
    return not isinstance(value, Tensor) and value == 0


def _close(a: Number, b: Number) -> bool:
    """Equal as far as single precision tells."""
    return math.isclose(float(a), float(b), rel_tol=1e-5)


def unknown(what: str) -> NotImplementedError:
    return NotImplementedError(
        f"{what} is not a formula that mmfast recognises; `mmfast.compat.keops` lists those that are, pykeops has all"
    )


def _alike(a, b) -> bool:
    """Whether both are formulas of the same distances."""
    if not (isinstance(a, Formula) and isinstance(b, Formula) and a.metric == b.metric):
        return False
    return _same(a.x, b.x) and _same(a.y, b.y)


def _same(a: Tensor, b: Tensor) -> bool:
    """The same tensor, or the same view of one."""
    if a is b:
        return True
    about = [(t.data_ptr(), t.shape, t.stride(), t.dtype, t.device, t.requires_grad) for t in (a, b)]
    return a.numel() > 0 and about[0] == about[1]


# ---- Operations on nodes


def add(a, b):
    if is_number(a) or is_number(b):
        formula, number = (b, a) if is_number(a) else (a, b)
        if isinstance(formula, Formula) and _is_zero(formula.g[0]) and _is_zero(formula.g[1]):
            return replace(formula, c=(formula.c[0] + number, *formula.c[1:]))
        raise unknown("a number added to anything but a distance or a scalar product")
    if _alike(a, b) and a.g == b.g and not any(isinstance(g, Tensor) for g in a.g):
        return replace(a, c=tuple(p + q for p, q in zip(a.c, b.c, strict=True)))
    if is_variable(b):
        a, b = b, a
    if is_variable(a) and isinstance(b, Points) and b.axis == 2:
        return replace(a, values=a.values + b.values.to(a.values))
    if is_kernel(a) and is_kernel(b):
        return Sum(groups(a) + groups(b))
    raise unknown("this sum")


def subtract(a, b):
    if is_variable(a) and is_variable(b) and a.axis != b.axis:
        x, y = (a, b) if a.axis == 0 else (b, a)  # what comes of it is even
        if a.values.shape[-1] != b.values.shape[-1]:
            raise ValueError(f"x_i and y_j must have as many features, got {x.values.shape[-1]}, {y.values.shape[-1]}")
        return Vectors(x.values, y.values, "difference")
    return add(a, -b if is_number(b) else multiply(b, -1))


def multiply(a, b):
    if is_number(a):
        a, b = b, a
    if is_number(b):
        return _scale(a, b)
    if isinstance(a, Points) and a.axis == 2:
        a, b = b, a
    if isinstance(b, Points) and b.axis == 2:  # a vector of parameters
        b = b.values
        if isinstance(a, Points):
            return replace(a, values=a.values * b.to(a.values))
        if isinstance(a, Vectors):
            b = b.to(a.x)
            b = b.sqrt() if a.how == "square" else b
            return replace(a, x=a.x * b, y=a.y if a.how == "product" else a.y * b)
        raise unknown("a vector times anything but points, their differences and their products")
    if is_variable(a) and is_variable(b) and a.axis != b.axis:
        x, y = (a, b) if a.axis == 0 else (b, a)
        return Vectors(x.values, y.values, "product")
    if isinstance(a, Vectors) and a is b and a.how == "difference":
        return power(a, 2)
    if _alike(a, b):
        return _product(a, b)
    raise unknown("this product")


def _scale(node, factor: Number):
    if isinstance(node, Points):
        return replace(node, values=node.values * factor)
    if isinstance(node, Vectors):
        if node.how == "difference":
            return replace(node, x=node.x * factor, y=node.y * factor)
        return replace(node, factor=node.factor * factor)
    if isinstance(node, Formula):
        return replace(node, c=tuple(c if _is_zero(c) else c * factor for c in node.c))
    if isinstance(node, Powered):
        return replace(node, weight=node.weight * factor)
    return Sum(
        tuple((x, y, tuple(row._replace(weight=row.weight * factor) for row in rows)) for x, y, rows in node.groups)
    )


def _product(a: Formula, b: Formula) -> Formula:
    c: list[Number] = [0] * 5
    for i, p in enumerate(a.c):
        for j, q in enumerate(b.c):
            if not (_is_zero(p) or _is_zero(q)):
                c[i + j] = c[i + j] + p * q
    if not (_is_zero(c[3]) and _is_zero(c[4])):
        raise unknown("a power of distances above the second")
    return replace(a, c=tuple(c[:3]), g=tuple(p + q for p, q in zip(a.g, b.g, strict=True)))


def reciprocal(node):
    if is_number(node):
        return 1 / node
    if isinstance(node, Points) and node.axis == 2:
        return replace(node, values=1 / node.values)
    return power(node, -1)


def power(node, exponent):
    if not is_number(exponent):
        raise unknown("a power that is not a number")
    if isinstance(node, Powered):
        return replace(node, exponent=node.exponent * exponent, weight=node.weight**exponent)
    whole = not isinstance(exponent, Tensor) and exponent == int(exponent) and exponent >= 1
    if isinstance(node, Vectors) and node.how == "difference" and whole and exponent == 2:
        return replace(node, how="square")
    if not isinstance(node, Formula):
        raise unknown("this power")
    plain = _is_zero(node.g[0]) and _is_zero(node.g[1])
    if node.metric == DOT:
        if whole and plain and _is_zero(node.c[2]):
            row = Row(POLYNOMIAL, 1, node.c[1], node.c[0], float(exponent))
            return Sum(((node.x, node.y, (row,)),))
    elif whole and exponent == 2:
        return _product(node, node)
    elif node.metric == L2 and plain and _is_zero(node.c[1]):
        small = not isinstance(node.c[0], Tensor) and 0 <= node.c[0] <= _TINY
        if small and not isinstance(exponent, Tensor) and exponent == 0.5:
            return replace(node, c=(0, node.c[2] ** 0.5, 0))
        if isinstance(node.c[0], Tensor) or node.c[0] > _TINY:
            return Powered(node.x, node.y, (node.c[0], node.c[2]), exponent)
    raise unknown("this power")


def exp(node) -> Formula:
    if isinstance(node, Formula) and node.metric != DOT and _is_zero(node.g[0]) and _is_zero(node.g[1]):
        c0, c1, c2 = node.c
        weight = c0.exp() if isinstance(c0, Tensor) else math.exp(c0)
        return replace(node, c=(weight, 0, 0), g=(-c1, -c2))
    raise unknown("the exponential of anything but distances")


def sum_features(node):
    if is_kernel(node):
        return node
    if not isinstance(node, Vectors) or node.how == "difference":
        raise unknown("this sum over the features")
    metric = {"square": L2, "absolute": L1, "product": DOT}[node.how]
    return Formula(node.x, node.y, metric, (0, 0, node.factor) if node.how == "square" else (0, node.factor, 0))


# ---- From nodes to terms


def groups(node) -> tuple[tuple[Tensor, Tensor, tuple[Row, ...]], ...]:
    if isinstance(node, Sum):
        return node.groups
    if isinstance(node, Powered):
        if not isinstance(node.exponent, Tensor) and node.exponent >= 0:
            raise unknown("a power of distances that is not negative")
        row = Row(POWER, node.weight * node.c[0] ** node.exponent, node.c[1] / node.c[0], 0, -node.exponent)
        return ((node.x, node.y, (row,)),)
    if isinstance(node, Formula):
        return ((node.x, node.y, (_row(node),)),)
    raise unknown("a reduction over i or j of anything but a kernel: sum over the features first")


def merged(groups):
    """Those of the same points and metric together: one sweep over the pairs."""
    found: list[tuple[Tensor, Tensor, tuple[Row, ...]]] = []
    for x, y, rows in groups:
        for i, (a, b, others) in enumerate(found):
            if METRIC[others[0].family] == METRIC[rows[0].family] and _same(a, x) and _same(b, y):
                found[i] = (a, b, others + rows)
                break
        else:
            found.append((x, y, rows))
    return found


def _row(node: Formula) -> Row:
    (c0, c1, c2), (g1, g2) = node.c, node.g
    if any(not isinstance(g, Tensor) and g < 0 for g in node.g):
        raise unknown("a function that grows with the distance exponentially")
    no_c1, no_c2, no_g1, no_g2 = (_is_zero(value) for value in (c1, c2, g1, g2))
    if node.metric == DOT and no_c2:
        return Row(POLYNOMIAL, 1, c1, c0, 1.0)
    if node.metric == L1 and no_c1 and no_c2 and no_g2 and not no_g1:
        return Row(LAPLACIAN_L1, c0, g1, 0, 0)
    if node.metric == L2 and no_g1 and no_c1 and no_c2 and not no_g2:
        return Row(GAUSSIAN, c0, g2, 0, 0)
    if node.metric == L2 and no_g2 and not no_g1:
        if no_c1 and no_c2:
            return Row(LAPLACIAN, c0, g1, 0, 0)
        if _close(c1, c0 * g1) and no_c2:
            return Row(MATERN32, c0, g1, 0, 0)
        if _close(c1, c0 * g1) and _close(c2, c0 * g1 * g1 / 3):
            return Row(MATERN52, c0, g1, 0, 0)
    if node.metric == L2 and no_g1 and no_g2 and _is_zero(c0) and no_c2 and not no_c1:
        return Row(ENERGY, -c1, 0, 0, 0)
    raise unknown("this function of the distance")
