"""Measures of dependence and of alignment between two sets of features of the same points: HSIC and CKA."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmfast import _backend
from mmfast.mmd import reference
from mmfast.mmd._inputs import as_layers, by_item, check_choice, check_kernel, need_rows, resolver
from mmfast.mmd._primitives import primitives
from mmfast.mmd.kernels import Gaussian, Kernel, Linear, apply
from mmfast.mmd.reference import compute_dtype, diagonal

_MEDIAN = Gaussian("median")
_LINEAR = Linear()


def hsic(
    x: Tensor | Sequence[Tensor],
    y: Tensor | Sequence[Tensor],
    kernel_x: Kernel | None = None,
    kernel_y: Kernel | None = None,
    estimator: str = "biased",
    *,
    backend: str | None = None,
) -> Tensor:
    r"""The Hilbert-Schmidt independence criterion of paired samples.

    With K = k_x(x, x), L = k_y(y, y), H = I − 11ᵀ/n, and K̃, L̃ without their diagonals:

        biased:    tr(K H L H) / (n − 1)²                                                     (Gretton et al. 2005)
        unbiased:  [ΣK̃∘L̃ + (1ᵀK̃1)(1ᵀL̃1) / ((n−1)(n−2)) − 2/(n−2) 1ᵀK̃L̃1] / (n(n − 3))         (Song et al. 2012)

    O(n²·d) time and O(n) memory on the native backends (kernels of several metrics: by the reference, O(n²)).

    Args:
        x, y: ``(n, d_x)`` and ``(n, d_y)``, or batches ``(b, n, ·)``, or tuples of layers.
        kernel_x, kernel_y: by default ``Gaussian("median")``.
        estimator: ``"biased"`` (n ≥ 2) or ``"unbiased"`` (n ≥ 4; may be negative).

    Returns:
        A tensor without dimensions, ``(b,)`` for batches; float64 for float64 features, else float32. Differentiable.
    """
    check_choice("estimator", estimator, ("biased", "unbiased"))
    kernels = (_MEDIAN if kernel_x is None else kernel_x, _MEDIAN if kernel_y is None else kernel_y)
    values, n, dtype, single = _moments(x, y, *kernels, estimator == "unbiased", False, backend, True)
    scale = 1 / (n * (n - 3)) if estimator == "unbiased" else 1 / (n - 1) ** 2
    value = (values[:, 0] * scale).to(dtype)
    return value[0] if single else value


def cka(
    x: Tensor | Sequence[Tensor],
    y: Tensor | Sequence[Tensor],
    kernel_x: Kernel | None = None,
    kernel_y: Kernel | None = None,
    estimator: str = "biased",
    *,
    backend: str | None = None,
) -> Tensor:
    r"""Centred kernel alignment: HSIC(K, L) / √(HSIC(K, K)·HSIC(L, L)) (Kornblith et al. 2019).

    Args:
        x, y: features of the same ``n`` points, as in `hsic`.
        kernel_x, kernel_y: by default `mmfast.kernels.Linear`. Of two linear kernels no Gram matrix is formed:
            ‖YᵀX‖²_F / (‖XᵀX‖_F·‖YᵀY‖_F) of centred features, or, where there are more features than points, the same
            streamed sums as for other kernels.
        estimator: of the three HSIC; ``"unbiased"`` is the debiased CKA (Nguyen et al. 2021).

    Returns:
        As `hsic`. NaN where features do not vary.
    """
    check_choice("estimator", estimator, ("biased", "unbiased"))
    kernels = (_LINEAR if kernel_x is None else kernel_x, _LINEAR if kernel_y is None else kernel_y)
    return _alignment(x, y, kernels, estimator == "unbiased", True, backend)


def kernel_alignment(
    x: Tensor | Sequence[Tensor],
    y: Tensor | Sequence[Tensor],
    kernel_x: Kernel | None = None,
    kernel_y: Kernel | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    r"""Kernel alignment without centring: ⟨K, L⟩ / (‖K‖_F·‖L‖_F) (Cristianini et al. 2001). Arguments as in `cka`."""
    kernels = (_LINEAR if kernel_x is None else kernel_x, _LINEAR if kernel_y is None else kernel_y)
    return _alignment(x, y, kernels, False, False, backend)


def _alignment(x, y, kernels, unbiased: bool, centred: bool, backend: str | None) -> Tensor:
    values, _, dtype, single = _moments(x, y, *kernels, unbiased, True, backend, centred)
    # Root by root: the product of two tiny ones would vanish.
    value = (values[:, 0] / (values[:, 1].sqrt() * values[:, 2].sqrt())).to(dtype)
    return value[0] if single else value


def _moments(
    x, y, kernel_x: Kernel, kernel_y: Kernel, unbiased: bool, all_three: bool, backend: str | None, centred: bool
) -> tuple[Tensor, int, torch.dtype, bool]:
    """Unscaled HSIC of (K, L), (K, K), (L, L), ``(b, 3)``, or their ⟨·, ·⟩_F, uncentred. Also n, dtype, single."""
    kernel_x, kernel_y = check_kernel(kernel_x), check_kernel(kernel_y)
    xs, single = as_layers("x", x, kernel_x.n_layers)
    ys, other = as_layers("y", y, kernel_y.n_layers)
    n, m, dtype = xs[0].shape[1], ys[0].shape[1], xs[0].dtype
    if n != m or single != other or xs[0].shape[0] != ys[0].shape[0]:
        shapes = f"{tuple(xs[0].shape[single:])} and {tuple(ys[0].shape[other:])}"
        raise ValueError(f"x and y must be features of the same points, got {shapes}")
    if ys[0].device != xs[0].device:
        raise ValueError(f"x and y must be on the same device, got {xs[0].device} and {ys[0].device}")
    if ys[0].dtype != dtype:
        raise TypeError(f"x and y must have the same dtype, got {dtype} and {ys[0].dtype}")
    need_rows("x", xs, 4 if unbiased else 2, f"estimator={'unbiased' if unbiased else 'biased'!r}")
    chosen, _ = _backend.choose("mmd", xs[0].device, backend)
    if type(kernel_x) is Linear and type(kernel_y) is Linear:
        value = _linear_moments(xs[0], ys[0], kernel_x, kernel_y, unbiased, all_three, centred, chosen)
    else:
        rule = kernel_x if kernel_x.data_dependent else kernel_y
        value = by_item(
            rule, lambda a, b: _streamed(a, b, kernel_x, kernel_y, unbiased, centred, chosen, backend), xs, ys
        )
    return value, n, compute_dtype(dtype), single


def _streamed(xs, ys, kernel_x, kernel_y, unbiased, centred, chosen, backend) -> Tensor:
    parts_x = [(apply(t, xs), terms) for t, terms in kernel_x.parts(xs, None, resolver(backend))]
    parts_y = [(apply(t, ys), terms) for t, terms in kernel_y.parts(ys, None, resolver(backend))]
    if len(parts_x) == len(parts_y) == 1:
        rows_x, rows_y, products = primitives(chosen).pair(*parts_x[0], *parts_y[0])
    else:
        matrices = [sum(reference.off_diagonal(a, terms) for a, terms in parts) for parts in (parts_x, parts_y)]
        rows_x, rows_y, products = reference.pair_of_matrices(*matrices)
    if unbiased:
        return _unbiased(rows_x, rows_y, products)
    own_x = sum(diagonal(a, terms) for a, terms in parts_x)
    own_y = sum(diagonal(a, terms) for a, terms in parts_y)
    owns = torch.stack([(a * b).sum(1) for a, b in ((own_x, own_y), (own_x, own_x), (own_y, own_y))], dim=1)
    products = products + owns
    return _biased(rows_x + own_x, rows_y + own_y, products) if centred else products


def _biased(rows_x: Tensor, rows_y: Tensor, products: Tensor) -> Tensor:
    """tr(KHLH), from the sums of the whole matrices: Σ KL − 2/n Σ r_K r_L + S_K S_L / n²."""
    n = rows_x.shape[1]
    values = []
    for (a, b), product in zip(((rows_x, rows_y), (rows_x, rows_x), (rows_y, rows_y)), products.unbind(1), strict=True):
        # About their means the rows' product is small where K is nearly constant.
        mean_a, mean_b = a.mean(1, keepdim=True), b.mean(1, keepdim=True)
        about = ((a - mean_a) * (b - mean_b)).sum(1)
        values.append(product - (2 / n) * about - (mean_a * mean_b)[:, 0])
    return torch.stack(values, dim=1)


def _unbiased(rows_x: Tensor, rows_y: Tensor, products: Tensor) -> Tensor:
    n = rows_x.shape[1]
    values = []
    for (a, b), product in zip(((rows_x, rows_y), (rows_x, rows_x), (rows_y, rows_y)), products.unbind(1), strict=True):
        totals = a.sum(1) * b.sum(1)
        values.append(product + totals / ((n - 1) * (n - 2)) - 2 / (n - 2) * (a * b).sum(1))
    return torch.stack(values, dim=1)


def _power_of_two(x: Tensor) -> Tensor:
    """Near the largest entry of each item, ``(b, 1, 1)``, a constant; 1 where there is no such number."""
    if not x.shape[2]:
        return x.new_ones(x.shape[0], 1, 1)
    largest = x.detach().abs().amax((1, 2), keepdim=True)
    return largest.log2().floor().exp2().masked_fill(~((largest > 0) & largest.isfinite()), 1)


def _linear_moments(x, y, kernel_x, kernel_y, unbiased, all_three, centred, chosen) -> Tensor:
    """Of linear kernels: what translates the features leaves every centred form as it is, so they are centred first."""
    dtype = compute_dtype(x.dtype)
    x, y = x.to(dtype), y.to(dtype)
    if centred:
        x, y = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
    n, dx, dy = x.shape[1], x.shape[2], y.shape[2]
    by_features = dx * dy + (dx * dx + dy * dy if all_three else 0)
    if by_features > n * (dx + dy):
        a, b = _power_of_two(x), _power_of_two(y)  # products of products leave the range of float32
        values = _streamed([x / a], [y / b], kernel_x, kernel_y, unbiased, centred, chosen, None)
        a, b = a.flatten().double(), b.flatten().double()
        return values * torch.stack((a * b, a * a, b * b), dim=1).square()
    pairs = ((x, y), (x, x), (y, y)) if all_three else ((x, y),)
    with _backend.without_autocast(x.device.type):
        values = [(a.transpose(1, 2) @ b).double().square().sum((1, 2)) for a, b in pairs]
    if unbiased:
        own = {id(t): t.double().square().sum(2) for t in (x, y)}
        for i, (a, b) in enumerate(pairs):
            p, q = own[id(a)], own[id(b)]  # the row sums of K̃ are −|x_i|², since those of K are 0
            product = (p * q).sum(1)
            values[i] = values[i] - product + p.sum(1) * q.sum(1) / ((n - 1) * (n - 2)) - 2 / (n - 2) * product
    return torch.stack(values, dim=1)
