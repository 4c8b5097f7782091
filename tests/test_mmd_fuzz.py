"""Kernels, estimators, shapes, strides and dtypes that nobody thought of, against differences in float64."""

from __future__ import annotations

import mmd_definition as definition
import numpy as np
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import mmfast
from mmfast import kernels as k
from mmfast.mmd.bandwidth import squared_distances_at

QUICK = {
    "max_examples": 120,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    "deadline": None,
}
DTYPES = (torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)
COUNTS = st.one_of(st.integers(2, 9), st.sampled_from([15, 16, 17, 31, 33, 63, 64, 65, 100]))
WIDTHS = st.one_of(st.integers(1, 10), st.sampled_from([15, 16, 17, 31, 32, 33, 64, 100]))
LENGTHS = st.sampled_from([0.3, 1.0, 2.7])  # in units of a typical distance


@st.composite
def kernels(draw):
    """A kernel, and its matrix from squared L2 distances, L1 distances and products."""
    kind = draw(st.sampled_from(
        ("gaussian", "multi", "laplacian", "l1", "imq", "rq", "matern", "poly", "linear", "energy", "sum")
    ))  # fmt: skip
    length = draw(LENGTHS)
    if kind == "gaussian":
        return lambda u: (k.Gaussian(length * u), lambda s, d, p: np.exp(-s / (2 * (length * u) ** 2)))
    if kind == "multi":
        steps = draw(st.lists(st.sampled_from([0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 7.0]), min_size=1, max_size=6))
        weights = draw(st.lists(st.sampled_from([1.0, 0.5, 2.0]), min_size=len(steps), max_size=len(steps)))

        def multi(u):
            bandwidths = [step * u * u for step in steps]
            pairs = list(zip(weights, bandwidths, strict=True))
            return k.MultiGaussian(bandwidths, weights), lambda s, d, p: sum(w * np.exp(-s / b) for w, b in pairs)

        return multi
    if kind == "laplacian":
        return lambda u: (k.Laplacian(length * u), lambda s, d, p: np.exp(-np.sqrt(s) / (length * u)))
    if kind == "l1":
        return lambda u: (k.Laplacian(length * u * 3, p=1), lambda s, d, p: np.exp(-d / (length * u * 3)))
    if kind in ("imq", "rq"):
        power = draw(st.sampled_from([0.5, 1.0, 2.5]))
        if kind == "imq":
            return lambda u: (
                k.InverseMultiquadric(length * u, power), lambda s, d, p: (1 + s / (length * u) ** 2) ** -power
            )  # fmt: skip
        return lambda u: (
            k.RationalQuadratic(length * u, power),
            lambda s, d, p: (1 + s / (2 * power * (length * u) ** 2)) ** -power,
        )
    if kind == "matern":
        nu = draw(st.sampled_from([0.5, 1.5, 2.5]))

        def matern(s, u):
            r = np.sqrt(2 * nu * s) / (length * u)
            return {0.5: 1, 1.5: 1 + r, 2.5: 1 + r + r**2 / 3}[nu] * np.exp(-r)

        return lambda u: (k.Matern(length * u, nu), lambda s, d, p: matern(s, u))
    if kind == "poly":
        degree, coef = draw(st.integers(1, 4)), draw(st.sampled_from([0.0, 1.0, -0.5]))
        return lambda u: (
            k.Polynomial(degree, 1 / (u * u), coef), lambda s, d, p: (p / (u * u) + coef) ** degree
        )  # fmt: skip
    if kind == "linear":
        return lambda u: (k.Linear(), lambda s, d, p: p)
    if kind == "energy":
        return lambda u: (k.Energy(), lambda s, d, p: -np.sqrt(s))
    a, b, weight = draw(kernels()), draw(kernels()), draw(st.sampled_from([0.5, 3.0]))

    def both(u):
        (one, first), (two, second) = a(u), b(u)
        return one + weight * two, lambda s, d, p: first(s, d, p) + weight * second(s, d, p)

    return both


@st.composite
def points(draw, count, width, dtype, mean, spread, seed):
    """Rows in any memory layout, some of them twice."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, width, generator=generator) * spread + mean
    if draw(st.integers(0, 3)) == 0:
        x[torch.randint(count, (2,), generator=generator)] = x[0].clone()
    x = x.to(dtype)
    layout = draw(st.sampled_from(["plain", "plain", "columns", "every_other_row", "every_other_column", "flipped"]))
    if layout == "columns":
        return x.T.contiguous().T
    if layout == "every_other_row":
        return torch.stack((x, torch.full_like(x, 7)), 1).view(2 * count, width)[::2]
    if layout == "every_other_column":
        return torch.stack((x, torch.full_like(x, 7)), 2).view(count, 2 * width)[:, ::2]
    return x.flip(0).contiguous().flip(0) if layout == "flipped" else x


@st.composite
def problems(draw):
    dtype, width = draw(st.sampled_from(DTYPES)), draw(WIDTHS)
    mean = draw(st.sampled_from([0.0, 0.0, 3.0, -10.0]))
    spread = draw(st.sampled_from([1.0, 0.05, 20.0]))
    mean *= spread
    n, m = draw(COUNTS), draw(COUNTS)
    seed = draw(st.integers(0, 2**31))
    x = draw(points(n, width, dtype, mean, spread, seed))
    y = draw(points(m, width, dtype, mean + 0.3 * spread, spread, seed + 1))
    kernel, matrix = draw(kernels())(spread * width**0.5)
    return x, y, kernel, matrix


def gold(matrix, x, y):
    a, b = x.detach().double().numpy(), y.detach().double().numpy()
    return matrix(definition.squares(a, b), np.abs(a[:, None] - b[None]).sum(-1), a @ b.T)


def size_of(x, y, kernel, *matrices) -> float:
    """What rounding is relative to: the kernel's values, and those of products before they cancel."""
    largest = max(np.abs(matrix).max() for matrix in matrices)
    bounds = [mmfast.kernel_matrix(t.detach().double().abs(), None, kernel).abs().max().item() for t in (x, y)]
    return (
        max(largest, *bounds)
        if any(f == 7 for _, t in kernel.parts([x[None]], [y[None]]) for f in t.families)
        else largest
    )


@settings(**QUICK)
@given(
    problem=problems(),
    estimator=st.sampled_from(["biased", "unbiased", "one_sample_u", "linear", "linear_cyclic", "block"]),
)
def test_mmd2(problem, estimator, mmd_backend):
    x, y, kernel, matrix = problem
    if estimator not in ("biased", "unbiased"):
        x, y = x[: len(y)], y[: len(x)]
    matrices = gold(matrix, x, x), gold(matrix, y, y), gold(matrix, x, y)
    expected = definition.mmd2(*matrices, estimator)
    value = mmfast.mmd2(x, y, kernel, estimator, backend=mmd_backend)
    assert value.dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32)
    tolerance = 1e-11 if x.dtype == torch.float64 else 5e-6
    assert abs(value.item() - expected) <= tolerance * size_of(x, y, kernel, *matrices)


@settings(**QUICK)
@given(problem=problems(), width=st.integers(1, 20))
def test_products(problem, width, mmd_backend):
    x, y, kernel, matrix = problem
    v = torch.randn(len(y), width, generator=torch.Generator().manual_seed(width), dtype=torch.float64)
    expected = gold(matrix, x, y)
    tolerance = (1e-11 if x.dtype == torch.float64 else 5e-6) * size_of(x, y, kernel, expected)
    found = mmfast.kernel_matmul(x, y, v, kernel, backend=mmd_backend).double().numpy()
    assert np.abs(found - expected @ v.numpy()).max() <= tolerance * v.abs().sum(0).max().item()
    sums = mmfast.kernel_sum(x, y, kernel, backend=mmd_backend)
    assert np.abs(sums.rows.numpy() - expected.sum(1)).max() <= tolerance * len(y)
    assert np.abs(sums.cols.numpy() - expected.sum(0)).max() <= tolerance * len(x)
    assert abs(sums.squares.item() - (expected**2).sum()) <= 2 * tolerance * np.abs(expected).sum()


@settings(**{**QUICK, "max_examples": 60})
@given(problem=problems(), estimator=st.sampled_from(["biased", "unbiased"]), weighted=st.booleans())
def test_gradients(problem, estimator, weighted, mmd_backend):
    """Gradients of features and weights against the derivative of the difference form in float64."""
    x, y, kernel, _ = problem
    x, y = x.float() if x.dtype != torch.float64 else x, y.float() if y.dtype != torch.float64 else y
    weights = [torch.rand(len(t), generator=torch.Generator().manual_seed(i)) + 0.1 if weighted else None
               for i, t in enumerate((x, y))]  # fmt: skip
    results = []
    for dtype, backend in ((torch.float64, "reference"), (x.dtype, mmd_backend)):
        given_ = [t.to(dtype).detach().requires_grad_() for t in (x, y)]
        value = mmfast.mmd2(*given_, kernel, estimator, weights_x=weights[0], weights_y=weights[1], backend=backend)
        results.append([g.double() for g in torch.autograd.grad(value, given_)])
    # Two ulps of the coordinates move the distances that the gradient of close points hangs on.
    tolerance = 1e-9 if x.dtype == torch.float64 else 1e-3
    scale = max(g.norm().item() for g in results[0])
    for exact, found in zip(*results, strict=True):
        assert (exact - found).norm() <= tolerance * scale + 1e-30


@settings(**QUICK)
@given(
    count=st.integers(1, 60), width=WIDTHS, seed=st.integers(0, 2**31), coarse=st.booleans(), two=st.booleans(),
    skip=st.booleans(), lower=st.booleans(),
)  # fmt: skip
@example(count=1, width=3, seed=0, coarse=False, two=False, skip=False, lower=True)
def test_order_statistics(count, width, seed, coarse, two, skip, lower, mmd_backend):
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(count, width, generator=generator), torch.randn(count + 3, width, generator=generator)
    if coarse:  # many distances are equal
        x, y = x.round(), y.round()
    skip, lower = skip and not two, lower and not two
    s = definition.squares(x.double().numpy(), (y if two else x).double().numpy())
    keep = np.ones_like(s, dtype=bool)
    if lower:
        keep = np.tril(keep)
    if skip:
        keep &= ~np.eye(len(s), dtype=bool)
    values = np.sort(s[keep])
    if not len(values):
        return
    ranks = sorted({0, len(values) // 3, (len(values) - 1) // 2, len(values) // 2, len(values) - 1})
    found = squared_distances_at(x, y if two else None, ranks, skip, lower, mmd_backend)
    np.testing.assert_allclose(found, values[ranks], rtol=2e-6, atol=1e-12)
