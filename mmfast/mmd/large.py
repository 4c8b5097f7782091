"""The MMD² of two large matrices with as little done on the host as there can be.

Of few features six launches, bandwidth and gradients included (`mmfast.mmd.triton_narrow`), and of many four before the
products by the library (`mmfast.mmd.triton_gram`), where the operators of `mmfast.mmd.op` and a rule of
`mmfast.mmd.bandwidth` need some thirty, each of which may take the host longer than the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmfast._backend import on_device_of
from mmfast.mmd.bandwidth import MeanDistance
from mmfast.mmd.estimators import coefficients, constant
from mmfast.mmd.kernels import Kernel, fixed_terms
from mmfast.mmd.terms import DOT, METRIC

_ESTIMATORS = ("unbiased", "biased")
_ops = torch.ops.mmfast


class Way:
    """How the MMD² of some shape is computed, as `mmfast.mmd.small.mmd2` uses it."""

    def __init__(
        self, like: tuple, params: Tensor, families: tuple[int, ...], rule: MeanDistance | None, launches
    ) -> None:
        from mmfast.mmd import small

        estimator, n, m, d, dtype, device, keep, precision = like
        self.launches, self.params, self.families, self.d = launches, params, families, d
        self.is_refused = getattr(launches, "is_refused", None)
        self.coefs = constant(coefficients(estimator, n, m), device)
        counts = tuple(small.counts(rule, n, m))
        strides = n * d, d, 1, m * d, d, 1
        diagonal = estimator == "biased"
        self.plan = launches.plan(
            (1, n, m, d), strides, dtype, device, families, precision, counts, keep, False, diagonal
        )
        self.like_value = torch.empty((), dtype=torch.float32, device=device)
        self.like_sums = torch.empty((1, 3), dtype=torch.float64, device=device)

    def compute(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The value, without dimensions, and what its gradient needs."""
        value, sums = torch.empty_like(self.like_value), torch.empty_like(self.like_sums)
        with on_device_of(x):
            return value, self.launches.forward(self.plan, x, y, self.params, self.coefs, value, sums)

    def differentiate(self, grad: Tensor, x: Tensor, y: Tensor, room: Tensor, need_x: bool, need_y: bool):
        with on_device_of(x):
            by_x, by_y = self.launches.backward(self.plan, room, grad, x, y, (need_x, need_y), x.dtype)
        return by_x if need_x else None, by_y if need_y else None

    def differentiate_twice(self, grad: Tensor, x: Tensor, y: Tensor, room: Tensor, need_x: bool, need_y: bool):
        """The gradients, by the operator that has derivatives itself."""
        with on_device_of(x):
            units = self.launches.backward(self.plan, room, None, x, y, (need_x, need_y), torch.float32)
        units = [unit[None] if needed else unit for unit, needed in zip(units, (need_x, need_y), strict=True)]
        params = self.plan.of_gradient(room)[0][0]
        nothing, none = params.new_empty(0), [0] * len(self.families)
        by_x, by_y, *_ = _ops.mmd_quadratic_backward.default(
            grad[None], x[None], y[None], None, None, self.coefs, params, [self.d], list(self.families), none,
            [need_x, need_y, False, False, False, False], *units, nothing, nothing, nothing,
        )  # fmt: skip
        return by_x[0] if need_x else None, by_y[0] if need_y else None


def find(x: Tensor, y: Tensor, kernel: Kernel, like: tuple) -> Way | None:
    """Of matrices whose shapes fit together; None for what others compute."""
    estimator, n, m, d, dtype, _, keep, precision = like
    if min(n, m) < 2 or estimator not in _ESTIMATORS:
        return None
    terms = fixed_terms(kernel, x, y)
    if terms is None or set(terms.layers) != {0} or terms.params.requires_grad:
        return None
    from mmfast.mmd import triton_gram, triton_narrow_launch
    from mmfast.mmd.triton_points import FEW, format_of, layout

    plan = layout(((d,), terms.families, terms.layers))
    kind, launches = format_of([dtype], precision), triton_narrow_launch
    if d <= FEW:
        return None
    if not triton_narrow_launch.takes(plan, kind):
        if not triton_gram.takes(plan, kind, n + m, keep):
            return None
        launches = triton_gram
    if estimator == "biased" and METRIC[terms.families[0]] == DOT:  # a point's product with itself is not a constant
        return None
    return Way(like, terms.params, terms.families, terms.rule, launches)
