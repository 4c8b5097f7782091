"""The kernel inception distance over all samples, with its standard error."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mmfast import _backend
from mmfast.mmd._inputs import need_rows, resolver, two_samples
from mmfast.mmd.kernels import Polynomial
from mmfast.mmd.reference import compute_dtype
from mmfast.mmd.testing import all_sums, variance_of_sums


class KID(NamedTuple):
    """``value`` and ``standard_error``."""

    value: Tensor
    standard_error: Tensor


def kid(
    features_x: Tensor,
    features_y: Tensor,
    degree: int = 3,
    gamma: float | None = None,
    coef: float = 1.0,
    *,
    backend: str | None = None,
) -> KID:
    r"""The kernel inception distance of all samples at once, exactly, and its standard error (Bińkowski et al. 2018).

    The U-statistic of MMD² with k(x, y) = (gamma·⟨x, y⟩ + coef)^degree,

        KID = Σ_{i≠j} k(x_i, x_j) / (n(n−1)) + Σ_{i≠j} k(y_i, y_j) / (m(m−1)) − 2 Σ_ij k(x_i, y_j) / (nm),

    and the square root of an unbiased estimate of its variance (`mmfast.mmd2_variance`), both from row sums, column
    sums and sums of squares of one sweep: O((n + m)·d) memory. Metrics elsewhere take the mean over random subsets of
    1000 rows and the deviation over these, which is not the error of the mean: it does not shrink as rows are added.

    Args:
        features_x, features_y: ``(n, d)`` and ``(m, d)``, of Inception or any other network, n, m ≥ 4 and not
            necessarily equal; or batches ``(b, n, d)``, ``(b, m, d)``. float32, float64, float16 or bfloat16.
        degree, gamma, coef: of `mmfast.kernels.Polynomial`; gamma is 1 / d by default.
        backend: as in `mmfast.mmd2`.

    Returns:
        `KID` of tensors without dimensions, ``(b,)`` for batches; float64 for float64 features, else float32. The value
        is differentiable, and can be negative. The standard error is a constant (`mmfast.mmd2_variance` is not), and
        NaN where the estimate of the variance is negative, as happens with few samples.

    Example:
        >>> value, error = kid(torch.randn(5000, 64), torch.randn(4000, 64))
        >>> abs(value) < 5 * error
        tensor(True)
    """
    kernel = Polynomial(degree, gamma, coef)
    xs, ys, single = two_samples(features_x, features_y, 1, ("features_x", "features_y"))
    need_rows("features_x", xs, 4, "the standard error of a KID")
    need_rows("features_y", ys, 4, "the standard error of a KID")
    chosen, _ = _backend.choose("mmd", xs[0].device, backend)
    dtype = compute_dtype(xs[0].dtype)
    n, m = xs[0].shape[1], ys[0].shape[1]
    sums = all_sums(xs, ys, kernel.parts(xs, ys, resolver(backend)), chosen)
    rows_x, _, rows_y, _, rows, _, _ = sums
    value = rows_x.sum(1) / (n * (n - 1)) + rows_y.sum(1) / (m * (m - 1)) - 2 * rows.sum(1) / (n * m)
    with torch.no_grad():
        error = variance_of_sums(*sums).sqrt()
    return KID(*(t[0].to(dtype) if single else t.to(dtype) for t in (value, error)))
