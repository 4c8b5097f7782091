"""Permutation tests, variance and power against their definitions."""

from __future__ import annotations

import itertools

import mmd_definition as definition
import numpy as np
import pytest
import torch
from mmd_definition import KERNELS

import mmfast
from mmfast import kernels as k
from mmfast.mmd._primitives import primitives

NAMES = ("gaussian", "dan", "laplacian_l1", "poly", "energy", "sum_of_metrics")


def samples(n: int = 9, m: int = 7, d: int = 4, shift: float = 0.4):
    return torch.randn(n, d, dtype=torch.float64), torch.randn(m, d, dtype=torch.float64) + shift


def kernel_of_pooled(name, x, y):
    """The kernel with its bandwidth as the first call finds it, and the matrix of the pooled sample."""
    z = np.concatenate([x.numpy(), y.numpy()])
    return KERNELS[name][0], KERNELS[name][1](z, z, z)


@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
@pytest.mark.parametrize("name", NAMES)
def test_matches_gold(name, estimator, mmd_backend):
    """Permutation by permutation, with the permuted matrix."""
    x, y = samples()
    kernel, matrix = kernel_of_pooled(name, x, y)
    order = torch.stack([torch.randperm(16) for _ in range(30)])

    def statistic(p):
        own = matrix[np.ix_(p, p)]
        return definition.mmd2(own[:9, :9], own[9:, 9:], own[:9, 9:], estimator)

    null = np.array([statistic(p) for p in order.numpy()])
    observed = statistic(np.arange(16))
    found = mmfast.two_sample_test(x, y, kernel, estimator=estimator, permutations=order, backend=mmd_backend)
    np.testing.assert_allclose(found.null, null, rtol=1e-10, atol=1e-11)
    assert found.statistic.item() == pytest.approx(observed, rel=1e-10)
    assert found.p_value.item() == (1 + (null >= observed - 1e-12).sum()) / 31
    torch.testing.assert_close(found.statistic, mmfast.mmd2(x, y, kernel, estimator, backend=mmd_backend))
    members = torch.zeros(30, 16, dtype=torch.bool).scatter(1, order[:, :9], True)
    again = mmfast.two_sample_test(x, y, kernel, estimator=estimator, permutations=members, backend=mmd_backend)
    assert torch.equal(found.null, again.null)


def test_layers(mmd_backend):
    (x1, y1), (x2, y2) = samples(), samples(d=2)
    kernel = k.Product([k.Gaussian(1.0), k.Laplacian(2.0)])
    found = mmfast.two_sample_test((x1, x2), (y1, y2), kernel, 20, seed=0, backend=mmd_backend)
    torch.testing.assert_close(found.statistic, mmfast.mmd2((x1, x2), (y1, y2), kernel, backend=mmd_backend))


def test_random_permutations(mmd_backend):
    x, y = samples(20, 12)
    run = lambda **how: mmfast.two_sample_test(x, y, k.Gaussian(1.0), 200, backend=mmd_backend, **how)  # noqa: E731
    assert torch.equal(run(seed=3).null, run(seed=3).null)
    assert not torch.equal(run(seed=3).null, run(seed=4).null)
    assert torch.equal(run(seed=3).null, run(generator=torch.Generator().manual_seed(3)).null)
    torch.manual_seed(5)
    first = run().null
    torch.manual_seed(5)
    assert torch.equal(first, run().null)
    assert first.shape == (200,) and first.unique().numel() > 190


def test_membership_is_uniform():
    """Every subset as often as any other."""
    from mmfast.mmd import testing

    members = testing._draw(20000, 2, 5, torch.device("cpu"), None, 1)
    assert (members.sum(1) == 2).all()
    codes = (members.long() * 2 ** torch.arange(5)).sum(1).bincount(minlength=32)
    counts = codes[codes > 0]
    assert len(counts) == 10 and counts.min() > 1800 and counts.max() < 2200
    testing_chunk = testing._CHUNK
    try:
        testing._CHUNK = 7
        assert (testing._draw(33, 3, 5, torch.device("cpu"), None, 1).sum(1) == 3).all()
    finally:
        testing._CHUNK = testing_chunk


def test_level_and_power(mmd_backend):
    """Rejects a tenth of the time where nothing differs, and always where much does."""
    p_values = [
        mmfast.two_sample_test(*samples(15, 10, 2, 0.0), n_permutations=49, seed=i, backend=mmd_backend).p_value.item()
        for i in range(150)
    ]
    assert 0.04 <= np.mean(np.array(p_values) <= 0.1) <= 0.17
    assert 0.4 <= np.mean(p_values) <= 0.6
    found = mmfast.two_sample_test(*samples(30, 30, 2, 2.0), n_permutations=99, seed=0, backend=mmd_backend)
    assert found.p_value == 0.01
    same = torch.ones(5, 2)  # all statistics are equal
    assert mmfast.two_sample_test(same, same, k.Gaussian(1.0), 19, seed=0, backend=mmd_backend).p_value == 1


def test_permutations_primitive(mmd_backend):
    z = torch.randn(1, 12, 3)
    ((_, terms),) = k.Gaussian(1.0).parts([z])
    members = torch.rand(6, 12) < 0.5
    members[0], members[1] = True, False
    own = KERNELS["gaussian"][1](*[z[0].double().numpy()] * 2, None)
    own = np.exp(-definition.squares(*[z[0].double().numpy()] * 2) / 2) * (1 - np.eye(12))
    inside, rows = primitives(mmd_backend).permutations([z], terms, members)
    assert inside.dtype == rows.dtype == torch.float64
    expected = [own[np.ix_(m, m)].sum() for m in members.numpy()]
    np.testing.assert_allclose(inside, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(rows, own.sum(1), rtol=1e-5)


# ---- Variance and power


@pytest.mark.parametrize(("n", "m"), [(4, 4), (4, 5), (5, 4)])
def test_variance_is_unbiased(n, m):
    """Over all samples of two small distributions its mean is exactly the variance of the U-statistic."""
    support_x = torch.tensor([[0.0, 0.3], [1.1, -0.4]], dtype=torch.float64)
    support_y = torch.tensor([[0.2, 0.0], [1.5, 1.0]], dtype=torch.float64)
    weights_x, weights_y = np.array([0.3, 0.7]), np.array([0.6, 0.4])
    indices = list(itertools.product(range(2), repeat=n + m))
    probability = np.array([np.prod(weights_x[list(i[:n])]) * np.prod(weights_y[list(i[n:])]) for i in indices])
    index = torch.tensor(indices)
    x, y = support_x[index[:, :n]], support_y[index[:, n:]]
    for kernel in (k.Gaussian(0.8), k.Linear(), k.Gaussian(1.0) + k.Energy() + k.Polynomial(2)):
        u = mmfast.mmd2(x, y, kernel).numpy()
        mean = (probability * u).sum()
        variance = (probability * (u - mean) ** 2).sum()
        estimate = (probability * mmfast.mmd2_variance(x, y, kernel).numpy()).sum()
        assert estimate == pytest.approx(variance, rel=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_h1_variance(name, mmd_backend):
    x, y = samples(8, 8)
    xx, yy, xy = definition.matrices(name, x.numpy(), y.numpy())
    h = xx + yy - xy - xy.T
    expected = 4 / 8**3 * (h.sum(1) ** 2).sum() - 4 / 8**4 * h.sum() ** 2
    kernel = KERNELS[name][0]
    found = mmfast.mmd2_variance(x, y, kernel, "h1", backend=mmd_backend)
    assert found.item() == pytest.approx(expected, rel=1e-9)
    one_sample = definition.mmd2(xx, yy, xy, "one_sample_u")
    power = mmfast.mmd2_power(x, y, kernel, backend=mmd_backend)
    assert power.item() == pytest.approx(one_sample / (expected + 1e-8) ** 0.5, rel=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_unbiased_power(name, mmd_backend):
    x, y = samples(8, 6)
    kernel = KERNELS[name][0]
    variance = mmfast.mmd2_variance(x, y, kernel, backend=mmd_backend).item()
    expected = mmfast.mmd2(x, y, kernel).item() / max(variance, 1e-3) ** 0.5
    found = mmfast.mmd2_power(x, y, kernel, "unbiased", 1e-3, backend=mmd_backend)
    assert found.item() == pytest.approx(expected, rel=1e-9)


def test_power_gradients(mmd_backend):
    """What learns a kernel: gradients of features and of the bandwidth."""
    x, y = (t.requires_grad_() for t in samples(5, 5, 3, 1.0))
    sigma = torch.tensor(1.2, dtype=torch.float64, requires_grad=True)
    for method in ("h1", "unbiased"):

        def power(x, y, sigma, method=method):
            return mmfast.mmd2_power(x, y, k.Gaussian(sigma), method, backend=mmd_backend)

        assert torch.autograd.gradcheck(power, (x, y, sigma))


def test_batches(mmd_backend):
    x, y = torch.randn(3, 6, 4, dtype=torch.float64), torch.randn(3, 6, 4, dtype=torch.float64)
    for call in (
        lambda *t: mmfast.mmd2_variance(*t, backend=mmd_backend),
        lambda *t: mmfast.mmd2_variance(*t, k.Gaussian(1.0), "h1", backend=mmd_backend),
        lambda *t: mmfast.mmd2_power(*t, k.Gaussian(1.0), backend=mmd_backend),
    ):
        alone = torch.stack([call(a, b) for a, b in zip(x, y, strict=True)])
        torch.testing.assert_close(call(x, y), alone, rtol=1e-11, atol=1e-12)


X, Y = torch.ones(5, 3), torch.ones(4, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mmfast.two_sample_test(X[:1], Y), "x must have at least 2 rows for estimator='unbiased', got 1"),
        (lambda: mmfast.two_sample_test(X[None], Y[None]), r"x must be \(n, d\) for a two-sample test"),
        (lambda: mmfast.two_sample_test(X, Y, n_permutations=0), "n_permutations must be an integer >= 1, got 0"),
        (lambda: mmfast.two_sample_test(X, Y, estimator="linear"), "estimator must be one of 'biased', 'unbiased'"),
        (lambda: mmfast.two_sample_test(X, Y, seed=1, generator=torch.Generator()), "either generator or seed"),
        (lambda: mmfast.two_sample_test(X, Y, generator=3), "generator must be a torch.Generator, got int"),
        (lambda: mmfast.two_sample_test(X, Y, permutations=torch.zeros(3, 8).long()), r"permutations must be \(B, 9\)"),
        (lambda: mmfast.two_sample_test(X, Y, permutations=torch.zeros(3, 9).long()), "each of 0 ... 8 once"),
        (lambda: mmfast.two_sample_test(X, Y, permutations=torch.ones(3, 9).bool()), "5 true entries in each row"),
        (lambda: mmfast.two_sample_test(X, Y, permutations=torch.ones(3, 9)), "boolean or integer, got torch.float32"),
        (lambda: mmfast.mmd2_variance(X, Y[:3]), "y must have at least 4 rows for method='unbiased', got 3"),
        (lambda: mmfast.mmd2_variance(X, Y, method="h1"), "as many rows for method='h1', got 5 and 4"),
        (lambda: mmfast.mmd2_variance(X, Y, method="h0"), "method must be one of 'unbiased', 'h1', got 'h0'"),
        (lambda: mmfast.mmd2_power(X, X, regularization=-1.0), "regularization must not be negative, got -1.0"),
    ],
)
def test_rejects(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()
