"""Bandwidth rules: a squared length from the data, by name or as an object with the variants that libraries use."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mmfast import _backend
from mmfast.mmd._primitives import primitives

POINTS = ("pooled", "x", "y", "cross")


@dataclass(frozen=True)
class Rule:
    """Called with features ``(n, d)`` and ``(m, d)`` (or ``None``), gives a squared length: a float64 scalar tensor.

    Attributes:
        points: the pairs that count: of the pooled sample (``"pooled"``), of one sample (``"x"``, ``"y"``), or one
            point of each (``"cross"``). Without ``y`` all but ``"cross"`` mean the pairs of ``x``.
        diagonal: count the zero distance of each point to itself too (it means nothing for ``"cross"``).
        scale: factor of the result.
        detach: take the result for a constant, as most libraries do; else the gradient flows through it.
    """

    points: str = "pooled"
    diagonal: bool = False
    scale: float = 1.0
    detach: bool = True

    def __post_init__(self) -> None:
        if self.points not in POINTS:
            raise ValueError(f"points must be one of {', '.join(map(repr, POINTS))}, got {self.points!r}")
        if not self.scale > 0:
            raise ValueError(f"scale must be positive, got {self.scale}")

    def __call__(self, x: Tensor, y: Tensor | None = None, backend: str | None = None) -> Tensor:
        if x.dim() != 2 or (y is not None and (y.dim() != 2 or y.shape[1] != x.shape[1])):
            shapes = " and ".join(str(tuple(t.shape)) for t in (x, y) if t is not None)
            raise ValueError(f"x and y must be (n, d) and (m, d) for a bandwidth rule, got {shapes}")
        if self.points == "x" or (self.points == "y" and y is None):
            y = None
        elif self.points == "y":
            x, y = y, None
        elif self.points == "cross" and y is None:
            raise ValueError("the rule's points='cross' needs two samples")
        if self.detach:
            x, y = x.detach(), None if y is None else y.detach()
        return self.finish(self._measure(x, y, self.points == "cross", backend), x)

    def finish(self, found: Tensor, x: Tensor) -> Tensor:
        """The squared length from what was measured in features like ``x``."""
        if self.scale != 1:
            found = found * self.scale
        return found.clamp(min=least_length(_compute(x)))

    def _measure(self, x: Tensor, y: Tensor | None, cross: bool, backend: str | None) -> Tensor:
        raise NotImplementedError

    def _need_pairs(self, count: int, pairs: int) -> None:
        if pairs == 0:
            raise ValueError(f"{type(self).__name__} finds no pair of points in a sample of {count}")


def least_length(dtype: torch.dtype) -> float:
    """Of points that all coincide and have no squared length: with any other than 0 the kernel is 1 everywhere."""
    return torch.finfo(dtype).tiny * 2.0**20


@dataclass(frozen=True)
class MeanDistance(Rule):
    r"""The mean of the squared L2 distances, in O((n + m)·d): Σ_ij |z_i − z_j|² = 2N Σ_i |z_i − z̄|².

    ``"mean"`` and ``"dan"`` are this rule (Xlearn's and DeepDA's ``guassian_kernel``), ``"tllib"`` is it with
    ``diagonal=True``: the mean over all N² entries.
    """

    def _measure(self, x, y, cross, backend):
        if cross:
            self._need_pairs(0, x.shape[0] * y.shape[0])
            a, b = x.mean(0, dtype=_compute(x)), y.mean(0, dtype=_compute(y))
            spread = _squares(x, a) / x.shape[0] + _squares(y, b) / y.shape[0]
            return spread + (a - b).square().sum(dtype=torch.float64)
        return mean_of_pairs(*sums_about(x, y, centre(x, y)), self.diagonal, self._need_pairs)


def mean_of_pairs(count: int, squares: Tensor, diagonal: bool, need_pairs=None) -> Tensor:
    """The mean squared distance of ``count`` points with the sum ``squares`` of squared distances to their mean."""
    pairs = count * count if diagonal else count * (count - 1)
    if need_pairs is not None:
        need_pairs(count, pairs)
    return squares * (2.0 * count / max(pairs, 1))


def centre(x: Tensor, y: Tensor | None) -> Tensor:
    if y is None:
        return x.mean(0, dtype=_compute(x))
    return (x.sum(0, dtype=_compute(x)) + y.sum(0, dtype=_compute(y))) / max(x.shape[0] + y.shape[0], 1)


def sums_about(x: Tensor, y: Tensor | None, mean: Tensor) -> tuple[int, Tensor]:
    """Number of points, and the float64 sum of their squared distances to ``mean``."""
    if y is None:
        return x.shape[0], _squares(x, mean)
    return x.shape[0] + y.shape[0], _squares(x, mean) + _squares(y, mean)


def _squares(x: Tensor, mean: Tensor) -> Tensor:
    difference = x - mean
    if difference.requires_grad:
        return difference.square().sum(dtype=torch.float64)
    return torch.linalg.vector_norm(difference, dtype=torch.float64).square()  # no second copy


@dataclass(frozen=True)
class MedianDistance(Rule):
    r"""The exact median of the squared L2 distances, streamed: no matrix of distances.

    Attributes:
        kind: of an even number of pairs, ``"average"`` (numpy) takes the mean of the middle two squared distances,
            ``"lower"`` (``torch.median``) the lower one, ``"upper"`` the upper one.

    ``"median"`` is this rule. Libraries differ: alibi-detect's is ``MedianDistance("x", kind="lower", scale=0.5)``,
    pytorch-adapt's ``MedianDistance("x", diagonal=True, kind="lower")``, ignite's HSIC
    ``MedianDistance("x", diagonal=True)``, hyppo's the default.
    """

    kind: str = "average"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind not in ("average", "lower", "upper"):
            raise ValueError(f"kind must be 'average', 'lower' or 'upper', got {self.kind!r}")

    def _measure(self, x, y, cross, backend):
        if not cross and y is not None:
            x, y = torch.cat((x, y)), None
        n = x.shape[0]
        pairs = n * y.shape[0] if cross else n * n if self.diagonal else n * (n - 1)
        self._need_pairs(n, pairs)
        lower, upper = (pairs - 1) // 2, pairs // 2
        ranks = {"lower": [lower], "upper": [upper], "average": [lower, upper]}[self.kind]
        zeros = 0
        if not cross:
            # The N distances of points to themselves come first, then each pair of points twice.
            # In the middle of all n² pairs is one of them for n <= 2, or n <= 1 where the upper one is meant.
            last = {"lower": [2], "upper": [1], "average": [2, 1]}[self.kind]
            zeros = sum(n <= most for most in last) if self.diagonal else 0
            ranks = [(rank - (n if self.diagonal else 0)) // 2 for rank in ranks[zeros:]]
        found = squared_distances_at(x, y, ranks, skip_diagonal=not cross, lower_triangle=not cross, backend=backend)
        return found.sum() / (len(found) + zeros)


def squared_distances_at(
    x: Tensor,
    y: Tensor | None,
    ranks: list[int],
    skip_diagonal: bool = False,
    lower_triangle: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Order statistics of the squared L2 distances between the rows of ``x`` and ``y`` (or ``x``), exact, float64.

    ``ranks`` count from 0 in ascending order of all pairs, of those that are not a point with itself, or of those with
    i > j. The distances carry the gradient of the pairs that were found.
    """
    if not ranks:
        return x.new_zeros(0, dtype=torch.float64)
    chosen, _ = _backend.choose("mmd", x.device, backend)
    wanted = torch.tensor(ranks, dtype=torch.int64, device="cpu")  # the host needs them: no device is waited for
    with torch.no_grad():
        values, index = primitives(chosen).select(x, y, wanted, skip_diagonal, lower_triangle)
    other = x if y is None else y
    if not (torch.is_grad_enabled() and (x.requires_grad or other.requires_grad)):
        return values.double()
    return (x[index[:, 0]].double() - other[index[:, 1]].double()).square().sum(1)


def _compute(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


RULES = {
    "mean": MeanDistance(),
    "dan": MeanDistance(),
    "tllib": MeanDistance(diagonal=True),
    "median": MedianDistance(),
}


def as_rule(value: object, name: str) -> Rule | None:
    """The rule that ``value`` is or names; ``None`` where it is a number."""
    if isinstance(value, str):
        if value not in RULES:
            raise ValueError(f"{name} must be positive, a rule, or one of {', '.join(map(repr, RULES))}, got {value!r}")
        return RULES[value]
    return replace(value) if isinstance(value, Rule) else None
