"""Kernels against their formulas, their parameters, and the rules that find bandwidths."""

from __future__ import annotations

import copy
import pickle

import mmd_definition as definition
import numpy as np
import pytest
import torch

import mmfast
from mmfast import kernels as k
from mmfast.mmd.bandwidth import squared_distances_at


def samples(n: int = 9, m: int = 7, d: int = 5, dtype=torch.float64, mean: float = 0.0):
    x, y = torch.randn(n, d, dtype=torch.float64) + mean, 1.3 * torch.randn(m, d, dtype=torch.float64) + 0.4 + mean
    return x.to(dtype), y.to(dtype)


@pytest.mark.parametrize("d", [1, 5, 33])
@pytest.mark.parametrize("name", definition.KERNELS)
def test_matches_definition(name, d):
    x, y = samples(d=d)
    kernel, _ = definition.KERNELS[name]
    xx, _, xy = definition.matrices(name, x.numpy(), y.numpy())
    np.testing.assert_allclose(mmfast.kernel_matrix(x, y, kernel), xy, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(kernel(x, y), xy, rtol=1e-12, atol=1e-13)
    if not kernel.data_dependent:
        np.testing.assert_allclose(kernel(x), xx, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", definition.PRODUCTS)
def test_products(name):
    x, y = zip(samples(), samples(d=3), strict=True)
    kernel, matrix = definition.PRODUCTS[name]
    expected = matrix([t.numpy() for t in x], [t.numpy() for t in y])
    np.testing.assert_allclose(kernel(x, y), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("d", [64, 768])
@pytest.mark.parametrize("kernel", ["dan", "gaussian_median", "matern32", "laplacian", "imq", "rq", "matern52"])
def test_accuracy_far_from_the_origin(kernel, d, mmd_backend):
    """Mean 10, unit variance: products of features that are not centred lose four digits here."""
    x, y = (torch.randn(n, d) + 10 for n in (96, 80))
    pooled = np.concatenate((x.double(), y.double()))
    scale = float(np.sqrt(definition.squares(pooled, pooled).mean()))
    kernel, formula = {
        "dan": definition.KERNELS["dan"],
        "gaussian_median": definition.KERNELS["gaussian_median"],
        "matern32": (k.Matern(scale), lambda x, y, z: (1 + r(x, y, 3)) * np.exp(-r(x, y, 3))),
        "matern52": (k.Matern(scale, 2.5), lambda x, y, z: matern52(r(x, y, 5))),
        "laplacian": (k.Laplacian(scale), lambda x, y, z: np.exp(-r(x, y, 1))),
        "imq": (k.InverseMultiquadric(scale), lambda x, y, z: (1 + r(x, y, 1) ** 2) ** -0.5),
        "rq": (k.RationalQuadratic(scale, 2.0), lambda x, y, z: (1 + r(x, y, 1) ** 2 / 4) ** -2.0),
    }[kernel]  # fmt: skip

    def matern52(r):
        return (1 + r + r**2 / 3) * np.exp(-r)

    def r(x, y, factor):
        return np.sqrt(factor) * definition.distances(x, y) / scale

    exact = formula(x.double().numpy(), y.double().numpy(), pooled)
    for found in (
        mmfast.kernel_matrix(x, y, kernel, backend=mmd_backend),
        # Column by column is the matrix again; with a rule in both cases from the same two samples.
        mmfast.kernel_matmul(x, y, torch.eye(len(y)), kernel, backend=mmd_backend),
    ):
        assert found.dtype == torch.float32
        assert np.max(np.abs(found.double().numpy() / exact - 1)) <= 3e-6


@pytest.mark.parametrize("d", [3, 20])
def test_own_matrix(d):
    """A point's distance to itself is zero, whatever rounding says."""
    x, _ = samples(d=d, dtype=torch.float32, mean=100.0)
    for kernel in (k.Gaussian(1e-3), k.Laplacian(1e-3), k.Energy(), k.Matern(1e-3, 2.5)):
        own = kernel(x).diagonal()
        assert torch.equal(own, torch.zeros_like(own) if isinstance(kernel, k.Energy) else torch.ones_like(own))


def test_learned_parameters(mmd_backend):
    """Gradients of every parameter that may be a tensor, by finite differences."""
    x, y = samples()
    made = {
        "gaussian": (k.Gaussian, [1.3]),
        "laplacian": (k.Laplacian, [1.3]),
        "laplacian_l1": (lambda s: k.Laplacian(s, p=1), [1.3]),
        "imq": (k.InverseMultiquadric, [1.3, 0.6]),
        "rq": (k.RationalQuadratic, [1.3, 0.6]),
        "matern12": (lambda s: k.Matern(s, 0.5), [1.3]),
        "matern32": (k.Matern, [1.3]),
        "matern52": (lambda s: k.Matern(s, 2.5), [1.3]),
        "poly": (lambda g, c: k.Polynomial(2, g, c), [0.4, 0.7]),
        "multi": (lambda b, w: k.MultiGaussian(b, w), [[0.7, 2.0, 5.0], [0.2, 1.0, 0.5]]),
        "multi_mean": (lambda w: k.MultiGaussian(weights=w, reduce="mean", kernel_num=3), [[0.2, 1.0, 0.5]]),
        "ladder": (lambda b: k.MultiGaussian(bandwidth=b), [1.9]),
        "weights": (lambda a, b: a * k.Gaussian(1.0) + b * k.Energy(), [0.3, 0.4]),
    }
    for make, values in made.values():
        values = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in values]

        def value(*given, make=make):
            return mmfast.mmd2(x, y, make(*given), backend=mmd_backend)

        assert torch.autograd.gradcheck(value, values)
        assert torch.autograd.gradgradcheck(value, values)


def test_parameters_are_registered():
    sigma = torch.nn.Parameter(torch.tensor(0.5))
    loss = mmfast.nn.MMDLoss(k.Gaussian(sigma) + 0.5 * k.Laplacian(2.0))
    assert [p is sigma for p in loss.parameters()] == [True]
    x, y = samples(dtype=torch.float32)
    loss(x, y).backward()
    assert sigma.grad is not None and sigma.grad != 0
    before = loss(x, y).item()
    with torch.no_grad():
        sigma.mul_(2)
    assert loss(x, y).item() != before  # nothing of it was kept


def test_copies():
    x, y = samples()
    kernel = 2.0 * k.Gaussian(1.5) + k.MultiGaussian()
    value = mmfast.mmd2(x, y, kernel)
    for other in (copy.deepcopy(kernel), pickle.loads(pickle.dumps(kernel))):
        assert torch.equal(mmfast.mmd2(x, y, other), value)
    assert "sigma=1.5" in repr(kernel) and "dan" in repr(kernel)
    assert torch.equal(
        mmfast.mmd2(x, y, sum([k.Gaussian(1.0), k.Energy()])), mmfast.mmd2(x, y, k.Gaussian() + k.Energy())
    )


def test_terms_made_under_inference_mode():
    """What was kept from an evaluation has to serve a training step."""
    x, y = samples()
    kernel = k.Gaussian(1.5) + 0.5 * k.Matern(1.0)
    with torch.inference_mode():
        value = mmfast.mmd2(x.clone(), y.clone(), kernel, "biased")
    x = x.clone().requires_grad_()
    mmfast.mmd2(x, y, kernel, "biased").backward()
    assert x.grad.abs().sum() > 0 and value == mmfast.mmd2(x, y, kernel, "biased")


# ---- Rules


def off_diagonal(s):
    return s[~np.eye(len(s), dtype=bool)]


def middle(values, kind):
    values = np.sort(values.ravel())
    lower, upper = values[(len(values) - 1) // 2], values[len(values) // 2]
    return {"lower": lower, "upper": upper, "average": (lower + upper) / 2}[kind]


@pytest.mark.parametrize("points", ["pooled", "x", "y", "cross"])
@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("sizes", [(9, 7), (4, 5), (2, 2), (2, 3), (1, 4)])
def test_rules(points, diagonal, sizes, mmd_backend):
    x, y = samples(*sizes, mean=3.0)
    pairs = {
        "pooled": (torch.cat((x, y)),) * 2, "x": (x, x), "y": (y, y), "cross": (x, y),
    }[points]  # fmt: skip
    s = definition.squares(*(t.numpy() for t in pairs))
    s = s if diagonal or points == "cross" else off_diagonal(s)
    if not s.size:
        with pytest.raises(ValueError, match="no pair of points in a sample of 1"):
            k.MeanDistance(points, diagonal)(x, y)
        with pytest.raises(ValueError, match="no pair of points in a sample of 1"):
            k.MedianDistance(points, diagonal)(x, y)
        return
    tiny = 1e-300  # where all that counts is zero
    mean = k.MeanDistance(points, diagonal, scale=0.5)(x, y)
    assert mean.dtype == torch.float64 and mean.shape == ()
    assert mean.item() == pytest.approx(0.5 * s.mean(), rel=1e-12, abs=tiny)
    for kind in ("lower", "upper", "average"):
        found = k.MedianDistance(points, diagonal, scale=3.0, kind=kind)(x, y, mmd_backend)
        assert found.item() == pytest.approx(3 * middle(s, kind), rel=1e-12, abs=tiny), kind


def test_rules_of_libraries():
    """Their own way to the number, with all N² distances."""
    x, y = samples(8, 8, dtype=torch.float32, mean=2.0)
    z = torch.cat((x, y))
    s = ((z[:, None] - z[None]) ** 2).sum(2)
    n = len(z)
    dan = s.sum() / (n**2 - n)
    torch.testing.assert_close(k.MeanDistance()(x, y).float(), dan)
    torch.testing.assert_close(k.MeanDistance(diagonal=True)(x, y).float(), s.mean())
    torch.testing.assert_close(k.MedianDistance(diagonal=True, kind="lower")(x, y).float(), s.median())
    own = s[:8, :8]
    alibi = (0.5 * own.flatten().sort().values[8 + (64 - 8) // 2 - 1]) ** 0.5
    torch.testing.assert_close(k.MedianDistance("x", kind="lower", scale=0.5)(x, y).float().sqrt(), alibi)
    torch.testing.assert_close(k.MedianDistance("x", True)(x, y).float(), own.flatten().quantile(0.5))


def test_rules_are_exact_far_from_the_origin():
    x, y = samples(40, 30, 16, dtype=torch.float32, mean=1000.0)
    s = definition.squares(*[np.concatenate((x.double(), y.double()))] * 2)
    assert k.MeanDistance()(x, y).item() == pytest.approx(off_diagonal(s).mean(), rel=1e-6)
    assert k.MedianDistance()(x, y).item() == pytest.approx(np.median(off_diagonal(s)), rel=1e-12)


def test_rule_gradients():
    x, y = samples(6, 5)
    x.requires_grad_()
    for rule in (k.MeanDistance, k.MedianDistance):
        for points in ("pooled", "x", "cross"):
            assert not rule(points)(x, y).requires_grad
            assert torch.autograd.gradcheck(lambda x, r=rule, p=points: r(p, detach=False)(x, y), x)
    assert torch.autograd.gradcheck(
        lambda x: mmfast.mmd2(x, y, k.Gaussian(k.MedianDistance(detach=False)), "biased"), x
    )
    bandwidth = k.MeanDistance()(x, y).item()
    fixed = torch.autograd.grad(mmfast.mmd2(x, y, k.MultiGaussian(bandwidth=bandwidth)), x)
    torch.testing.assert_close(torch.autograd.grad(mmfast.mmd2(x, y), x), fixed)


def test_coincident_points_have_no_length():
    x = torch.ones(6, 3)
    for kernel in (k.MultiGaussian(), k.Gaussian("median"), k.Matern("mean"), k.InverseMultiquadric("median")):
        points = x.clone().requires_grad_()
        value = mmfast.mmd2(points, x, kernel, "biased")
        value.backward()
        assert abs(value) < 1e-12 and torch.equal(points.grad, torch.zeros_like(x))


@pytest.mark.parametrize("skip_diagonal", [False, True])
@pytest.mark.parametrize("lower_triangle", [False, True])
def test_order_statistics(skip_diagonal, lower_triangle, mmd_backend):
    x, _ = samples(12, 1, 3, torch.float32)
    s = definition.squares(*[x.double().numpy()] * 2)
    keep = np.tril(np.ones_like(s, dtype=bool), -1 if skip_diagonal else 0) if lower_triangle else None
    values = s[keep] if lower_triangle else off_diagonal(s) if skip_diagonal else s.ravel()
    found = squared_distances_at(x, None, list(range(len(values))), skip_diagonal, lower_triangle, mmd_backend)
    np.testing.assert_allclose(found, np.sort(values), rtol=1e-6)


# ---- Errors


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: k.Gaussian(-1.0), "sigma must be positive and finite, got -1.0"),
        (lambda: k.Gaussian(0), "sigma must be positive and finite, got 0"),
        (lambda: k.Gaussian(float("nan")), "sigma must be positive"),
        (lambda: k.Gaussian(torch.tensor(-2.0)), "sigma must be positive and finite, got -2.0"),
        (lambda: k.Gaussian(torch.ones(2)), "sigma must be a number or a floating-point tensor without dimensions"),
        (lambda: k.Gaussian("medium"), "sigma must be positive, a rule, or one of 'mean', .*got 'medium'"),
        (lambda: k.Gaussian(None), "sigma must be a number or a tensor, got NoneType"),
        (lambda: k.Laplacian(1.0, p=3), "p must be 1 or 2, got 3"),
        (lambda: k.Laplacian("median", p=1), "scale must be a number: rules measure L2 distances"),
        (lambda: k.Matern(1.0, nu=1.0), "nu must be 0.5, 1.5 or 2.5, got 1.0"),
        (lambda: k.Polynomial(0), "degree must be an integer >= 1, got 0"),
        (lambda: k.Polynomial(2.5), "degree must be an integer >= 1, got 2.5"),
        (lambda: k.RationalQuadratic(1.0, alpha=-1.0), "alpha must be positive"),
        (lambda: k.InverseMultiquadric(1.0, exponent=0.0), "exponent must be positive"),
        (lambda: k.MultiGaussian([]), "bandwidths must be one or more numbers"),
        (lambda: k.MultiGaussian([1.0, -2.0]), "bandwidths must be positive and finite, got -2.0"),
        (lambda: k.MultiGaussian([1.0], weights=[1.0, 2.0]), "weights must be 1, one for each bandwidth, got 2"),
        (lambda: k.MultiGaussian([1.0], bandwidth=2.0), "either bandwidths or bandwidth"),
        (lambda: k.MultiGaussian(bandwidth=-2.0), "bandwidth must be positive"),
        (lambda: k.MultiGaussian(kernel_num=0), "kernel_num must be an integer >= 1, got 0"),
        (lambda: k.MultiGaussian(kernel_mul=-1.0), "kernel_mul must be positive"),
        (lambda: k.MultiGaussian(reduce="max"), "reduce must be 'sum' or 'mean', got 'max'"),
        (lambda: k.Product([]), "kernels must be one or more kernels"),
        (lambda: k.Product([k.Gaussian(), 3]), r"kernels must be one or more kernels of mmfast.kernels, got \['int'\]"),
        (lambda: k.Product([k.Product([k.Gaussian()] * 2)]), "kernels of a product must take one layer each"),
        (lambda: k.Gaussian() + k.Product([k.Gaussian()] * 2), "kernels of a sum must take as many layers"),
        (lambda: k.Gaussian() * k.Gaussian(), "unsupported operand"),
        (lambda: float("inf") * k.Gaussian(), "weight must be finite, got inf"),
        (lambda: k.MeanDistance("z"), "points must be one of 'pooled', .*got 'z'"),
        (lambda: k.MedianDistance(kind="mode"), "kind must be 'average', 'lower' or 'upper', got 'mode'"),
        (lambda: k.MedianDistance(scale=-1), "scale must be positive, got -1"),
        (lambda: k.MeanDistance("cross")(torch.ones(3, 2)), "points='cross' needs two samples"),
    ],
)
def test_rejects(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()
