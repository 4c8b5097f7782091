"""Two-sample tests: permutation p-values, the variance of the MMD estimate, and the ratio that test power follows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mmfast import _backend
from mmfast.mmd._inputs import as_integer, by_item, check_choice, check_kernel, need_rows, resolver, two_samples
from mmfast.mmd._primitives import primitives
from mmfast.mmd.estimators import mmd2
from mmfast.mmd.kernels import Kernel, Layers, apply
from mmfast.mmd.products import sums_of_parts
from mmfast.mmd.reference import compute_dtype, diagonal

_CHUNK = 2**22  # random numbers to draw at a time


class TwoSampleTest(NamedTuple):
    """``statistic``, ``p_value`` and ``null`` (the statistic of each permutation), float64 tensors."""

    statistic: Tensor
    p_value: Tensor
    null: Tensor


def two_sample_test(
    x: Tensor | Sequence[Tensor],
    y: Tensor | Sequence[Tensor],
    kernel: Kernel | None = None,
    n_permutations: int = 1000,
    estimator: str = "unbiased",
    *,
    permutations: Tensor | None = None,
    generator: torch.Generator | None = None,
    seed: int | None = None,
    backend: str | None = None,
) -> TwoSampleTest:
    r"""The permutation test of equal distributions with MMD² as its statistic.

    With z = [x; y], membership a ∈ {0, 1}^N and K = k(z, z) without its diagonal, all permutations follow from one
    streamed product: with A = aᵀKa, p = aᵀK1 and S = 1ᵀK1,

        MMD²_u = A / (n(n−1)) + (S − 2p + A) / (m(m−1)) − 2(p − A) / (nm).

    The p-value is (1 + #{null ≥ statistic}) / (1 + n_permutations), which is valid at any level (Phipson and Smyth
    2010).

    Args:
        x, y: ``(n, d)`` and ``(m, d)``, or tuples of layers.
        kernel: as in `mmfast.mmd2`; by default DAN's. A rule looks at the pooled sample or at ``x``/``y`` as they are,
            once; for a test that is exact it should not depend on which points are x (``points="pooled"``).
        n_permutations: B ≥ 1.
        estimator: ``"unbiased"`` (n, m ≥ 2) or ``"biased"``.
        permutations: in place of random ones, ``(B, n + m)``: integer permutations of 0 … n + m − 1, whose first n
            entries are the rows of the pooled sample that take the place of x; or boolean membership with n of each
            row true.
        generator: of random numbers, on the CPU or the features' device; torch's global one by default.
        seed: in place of a generator.

    Returns:
        `TwoSampleTest`. Nothing is differentiable.
    """
    kernel = check_kernel(kernel)
    check_choice("estimator", estimator, ("biased", "unbiased"))
    xs, ys, single = two_samples(x, y, kernel.n_layers)
    if not single:
        raise ValueError(f"x must be (n, d) for a two-sample test, got {tuple(xs[0].shape)}")
    least = 2 if estimator == "unbiased" else 1
    need_rows("x", xs, least, f"estimator={estimator!r}")
    need_rows("y", ys, least, f"estimator={estimator!r}")
    n, m, device = xs[0].shape[1], ys[0].shape[1], xs[0].device
    members = torch.zeros(1, n + m, dtype=torch.bool, device=device)
    members[:, :n] = True
    if permutations is None:
        if as_integer("n_permutations", n_permutations) < 1:
            raise ValueError(f"n_permutations must be an integer >= 1, got {n_permutations!r}")
        drawn = _draw(int(n_permutations), n, n + m, device, generator, seed)
    else:
        drawn = _given(permutations, n, n + m, device)
    members = torch.cat((members, drawn))  # the observed statistic is computed like the others: ties are ties
    chosen, _ = _backend.choose("mmd", device, backend)
    with torch.no_grad():
        statistics = _statistics(xs, ys, members, kernel, estimator == "biased", chosen, backend)
    null = statistics[1:]
    p_value = (1 + (null >= statistics[0]).sum(dtype=torch.float64)) / (1 + len(null))
    p_value = p_value.masked_fill(statistics[0].isnan(), float("nan"))  # which no comparison holds for
    return TwoSampleTest(statistics[0], p_value, null)


def _draw(b: int, n: int, total: int, device, generator: torch.Generator | None, seed: int | None) -> Tensor:
    """``(b, total)`` bool, each row with ``n`` at random."""
    if seed is not None:
        if generator is not None:
            raise ValueError("give either generator or seed, not both")
        generator = torch.Generator(device).manual_seed(as_integer("seed", seed))
    elif generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
    source = device if generator is None else generator.device
    members = torch.zeros(b, total, dtype=torch.bool, device=source)
    few = min(n, total - n)
    step = max(1, _CHUNK // total)
    for start in range(0, b, step):
        rows = members[start : start + step]
        keys = torch.rand(rows.shape, dtype=torch.float32, generator=generator, device=source)  # whatever the default
        rows.scatter_(1, keys.topk(few, dim=1, sorted=False).indices, True)  # to sort all takes five times as long
    return (members if few == n else ~members).to(device)


def _given(permutations: Tensor, n: int, total: int, device: torch.device) -> Tensor:
    if not isinstance(permutations, Tensor):
        raise TypeError(f"permutations must be a tensor, got {type(permutations).__name__}")
    if permutations.dim() != 2 or permutations.shape[1] != total or not len(permutations):
        raise ValueError(f"permutations must be (B, {total}) with B >= 1, got {tuple(permutations.shape)}")
    if permutations.dtype == torch.bool:
        members = permutations
        if (members.sum(1) != n).any():
            raise ValueError(f"permutations must have {n} true entries in each row")
    else:
        if permutations.is_floating_point() or permutations.is_complex():
            raise TypeError(f"permutations must be boolean or integer, got {permutations.dtype}")
        expected = torch.arange(total, device=permutations.device)
        if not torch.equal(permutations.long().sort(dim=1).values, expected.expand_as(permutations)):
            raise ValueError(f"permutations must hold each of 0 ... {total - 1} once in each row")
        members = torch.zeros(permutations.shape, dtype=torch.bool, device=permutations.device)
        members.scatter_(1, permutations[:, :n].long(), True)
    return members.to(device)


def _statistics(xs, ys, members: Tensor, kernel, biased: bool, chosen: str, backend: str | None) -> Tensor:
    n, m = xs[0].shape[1], ys[0].shape[1]
    inside, rows, own = 0.0, 0.0, 0.0
    for transform, terms in kernel.parts(xs, ys, resolver(backend)):
        z = [torch.cat(both, dim=1) for both in zip(apply(transform, xs), apply(transform, ys), strict=True)]
        part = primitives(chosen).permutations(z, terms, members)
        inside, rows, own = inside + part[0], rows + part[1], own + diagonal(z, terms)[0]
    both = torch.stack((rows, own), dim=1)
    of_x, own_x = _group_sums(members, both).unbind(1)  # Σ over the group of the row sums, and of the diagonal
    cross = of_x - inside
    rest = rows.sum() - of_x - cross
    if not biased:
        return inside / (n * (n - 1)) + rest / (m * (m - 1)) - 2 * cross / (n * m)
    return (inside + own_x) / n**2 + (rest + own.sum() - own_x) / m**2 - 2 * cross / (n * m)


def _group_sums(members: Tensor, values: Tensor) -> Tensor:
    step = max(1, _CHUNK // members.shape[1])
    return torch.cat([rows.double() @ values for rows in members.split(step)])


# ---- Variance and power


def mmd2_variance(
    x: Tensor | Sequence[Tensor],
    y: Tensor | Sequence[Tensor],
    kernel: Kernel | None = None,
    method: str = "unbiased",
    *,
    backend: str | None = None,
) -> Tensor:
    r"""An estimate of the variance of the MMD² estimate, from row sums, column sums and sums of squares only.

    ``"unbiased"``
        An unbiased estimate of Var[MMD²_u] for the U-statistic of `mmfast.mmd2`, all of its terms included, for any n
        and m ≥ 4 (the approach of Sutherland et al. 2017 and Sutherland and Deka 2019, from unbiased estimates of
        each moment). It can be negative.
    ``"h1"``
        The variance under the alternative of Liu et al. 2020, times n as there:
        4/n³ Σ_i (Σ_j H_ij)² − 4/n⁴ (Σ_ij H_ij)², with H_ij = k(x_i,x_j) + k(y_i,y_j) − k(x_i,y_j) − k(x_j,y_i); n = m.
        Never negative.

    Args:
        x, y: ``(n, d)`` and ``(m, d)``, or batches, or tuples of layers.
        kernel: as in `mmfast.mmd2`.

    Returns:
        A tensor without dimensions, ``(b,)`` for batches; float64 for float64 features, else float32. Differentiable.
    """
    kernel = check_kernel(kernel)
    check_choice("method", method, ("unbiased", "h1"))
    xs, ys, single = two_samples(x, y, kernel.n_layers)
    n, m = xs[0].shape[1], ys[0].shape[1]
    if method == "h1":
        if n != m:
            raise ValueError(f"x and y must have as many rows for method='h1', got {n} and {m}")
        need_rows("x", xs, 1, "method='h1'")
    else:
        need_rows("x", xs, 4, "method='unbiased'")
        need_rows("y", ys, 4, "method='unbiased'")
    chosen, _ = _backend.choose("mmd", xs[0].device, backend)
    compute = _variance_h1 if method == "h1" else _variance_unbiased
    value = by_item(kernel, lambda a, b: compute(a, b, kernel, chosen, backend), xs, ys)
    value = value.to(compute_dtype(xs[0].dtype))
    return value[0] if single else value


def all_sums(xs: Layers, ys: Layers, parts, chosen: str) -> tuple[Tensor, ...]:
    """Row sums and sum of squares of K(x, x) and K(y, y) without diagonals; rows, columns and squares of K(x, y)."""
    of_x = sums_of_parts(xs, None, parts, chosen)
    of_y = sums_of_parts(ys, None, parts, chosen)
    return of_x[0], of_x[2], of_y[0], of_y[2], *sums_of_parts(xs, ys, parts, chosen)


def _variance_h1(xs, ys, kernel, chosen, backend) -> Tensor:
    parts, n = kernel.parts(xs, ys, resolver(backend)), xs[0].shape[1]
    rows_x, _, rows_y, _, rows, cols, _ = all_sums(xs, ys, parts, chosen)
    own = sum(diagonal(apply(t, xs), terms) + diagonal(apply(t, ys), terms) for t, terms in parts)
    h = rows_x + rows_y + own - rows - cols
    h = h / n
    return 4 * (h - h.mean(1, keepdim=True)).square().mean(1)


def _variance_unbiased(xs, ys, kernel, chosen, backend) -> Tensor:
    return variance_of_sums(*all_sums(xs, ys, kernel.parts(xs, ys, resolver(backend)), chosen))


def variance_of_sums(
    rows_x: Tensor, squares_x: Tensor, rows_y: Tensor, squares_y: Tensor, rows: Tensor, cols: Tensor, squares: Tensor
) -> Tensor:
    """The unbiased estimate of the variance, ``(b,)``, from what `all_sums` finds."""
    n, m = rows.shape[1], cols.shape[1]
    # Entries about their common mean: the variance is the same, the moments are smaller.
    total_x, total_y, total = rows_x.sum(1), rows_y.sum(1), rows.sum(1)
    shift = ((total_x + total_y + total) / (n * (n - 1) + m * (m - 1) + n * m)).detach()
    squares_x = squares_x - 2 * shift * total_x + n * (n - 1) * shift**2
    squares_y = squares_y - 2 * shift * total_y + m * (m - 1) * shift**2
    squares = squares - 2 * shift * total + n * m * shift**2
    each = shift[:, None]
    rows_x, rows_y = rows_x - (n - 1) * each, rows_y - (m - 1) * each
    rows, cols = rows - m * each, cols - n * each

    within = _variance_within(rows_x, squares_x, n) + _variance_within(rows_y, squares_y, m)
    total = rows.sum(1)
    by_rows, by_cols = rows.square().sum(1), cols.square().sum(1)
    square_mean = (total.square() - by_rows - by_cols + squares) / (n * (n - 1) * m * (m - 1))
    between = (
        squares / (n * m)
        + (by_rows - squares) / (n * m)  # (m − 1)·E k(x,y)k(x,y')
        + (by_cols - squares) / (n * m)
        - (n + m - 1) * square_mean
    ) / (n * m)
    both = _covariance(rows_x, rows, n, m) + _covariance(rows_y, cols, m, n)
    return within + 4 * between - 4 * both


def _variance_within(rows: Tensor, squares: Tensor, n: int) -> Tensor:
    """Of the mean of k(x_i, x_j), i ≠ j: its variance without bias."""
    total, by_rows = rows.sum(1), rows.square().sum(1)
    square = squares / (n * (n - 1))
    shared = (by_rows - squares) / (n * (n - 1) * (n - 2))
    square_mean = (total.square() - 4 * by_rows + 2 * squares) / (n * (n - 1) * (n - 2) * (n - 3))
    return (4 * (n - 2) * (shared - square_mean) + 2 * (square - square_mean)) / (n * (n - 1))


def _covariance(rows: Tensor, cross: Tensor, n: int, m: int) -> Tensor:
    """Of the mean of k(x_i, x_j), i ≠ j, and the mean of k(x_i, y_j), from the row sums of both."""
    product = (rows * cross).sum(1)
    shared = product / (n * (n - 1) * m)
    apart = (rows.sum(1) * cross.sum(1) - 2 * product) / (n * (n - 1) * (n - 2) * m)
    return 2 / n * (shared - apart)


def mmd2_power(
    x: Tensor | Sequence[Tensor],
    y: Tensor | Sequence[Tensor],
    kernel: Kernel | None = None,
    method: str = "h1",
    regularization: float = 1e-8,
    *,
    backend: str | None = None,
) -> Tensor:
    r"""The ratio that the power of an MMD test grows with: maximise it to learn a kernel or features.

    ``"h1"``: MMD²_1u / √(σ² + regularization), the one-sample U-statistic over the ``"h1"`` variance (Liu et al. 2020,
    n = m). ``"unbiased"``: MMD²_u / √(max(σ², regularization)) with the ``"unbiased"`` variance (Sutherland et al.
    2017). Arguments and result as in `mmd2_variance`.
    """
    check_choice("method", method, ("unbiased", "h1"))
    if not regularization >= 0:
        raise ValueError(f"regularization must not be negative, got {regularization}")
    variance = mmd2_variance(x, y, kernel, method, backend=backend)
    if method == "h1":
        return mmd2(x, y, kernel, "one_sample_u", backend=backend) / (variance + regularization).sqrt()
    return mmd2(x, y, kernel, "unbiased", backend=backend) / variance.clamp(min=regularization).sqrt()
