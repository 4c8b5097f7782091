"""HSIC, CKA and kernel alignment against their definitions."""

from __future__ import annotations

import mmd_definition as definition
import numpy as np
import pytest
import torch
from mmd_definition import KERNELS

import mmfast
from mmfast import kernels as k

PAIRS = [
    ("gaussian", "gaussian"), ("gaussian_median", "gaussian_tllib"), ("dan", "laplacian"), ("laplacian_l1", "matern32"),
    ("poly", "rq"), ("cosine", "gaussian"), ("linear", "linear"), ("linear", "energy"), ("sum_of_metrics", "gaussian"),
]  # fmt: skip
SIZES = [(9, 4, 3), (12, 20, 15), (30, 3, 4), (6, 50, 2)]


def samples(n: int, dx: int, dy: int, dtype=torch.float64):
    x = torch.randn(n, dx, dtype=torch.float64)
    y = torch.randn(n, dy, dtype=torch.float64) + x[:, :1] ** 2 + 1.5
    return x.to(dtype), y.to(dtype)


def matrices(names, x, y):
    return [KERNELS[name][1](t, t, t) for name, t in zip(names, (x.numpy(), y.numpy()), strict=True)]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
@pytest.mark.parametrize("names", PAIRS, ids="-".join)
def test_matches_gold(names, estimator, sizes, mmd_backend):
    x, y = samples(*sizes)
    own = matrices(names, x, y)
    kernels = [KERNELS[name][0] for name in names]
    expected = definition.hsic(*own, estimator)
    size = definition.hsic(own[0], own[0], "biased") ** 0.5 * definition.hsic(own[1], own[1], "biased") ** 0.5
    found = mmfast.hsic(x, y, *kernels, estimator, backend=mmd_backend)
    assert found.dtype == torch.float64 and abs(found.item() - expected) <= 1e-11 * size
    single = mmfast.hsic(x.float(), y.float(), *kernels, estimator, backend=mmd_backend)
    assert single.dtype == torch.float32 and abs(single.item() - expected) <= 1e-5 * size
    three = [definition.hsic(*pair, estimator) for pair in ((own[0], own[1]), (own[0], own[0]), (own[1], own[1]))]
    found = mmfast.cka(x, y, *kernels, estimator, backend=mmd_backend)
    np.testing.assert_allclose(found, three[0] / np.sqrt(three[1] * three[2]), rtol=1e-9, atol=1e-11)
    aligned = (own[0] * own[1]).sum() / np.sqrt((own[0] ** 2).sum() * (own[1] ** 2).sum())
    np.testing.assert_allclose(mmfast.kernel_alignment(x, y, *kernels, backend=mmd_backend), aligned, rtol=1e-9)


def test_defaults(mmd_backend):
    x, y = samples(10, 3, 4)
    gaussian, linear = k.Gaussian("median"), k.Linear()
    assert torch.equal(
        mmfast.hsic(x, y, backend=mmd_backend), mmfast.hsic(x, y, gaussian, gaussian, backend=mmd_backend)
    )
    assert torch.equal(mmfast.cka(x, y, backend=mmd_backend), mmfast.cka(x, y, linear, linear, backend=mmd_backend))


def test_linear_is_invariant(mmd_backend):
    """To rotation, scale and translation, also in float32 far from the origin."""
    x, y = samples(200, 16, 8)
    rotation = torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64))[0]
    expected = mmfast.cka(x, y, backend=mmd_backend).item()
    assert mmfast.cka(x @ rotation * 3 + 5, y, backend=mmd_backend).item() == pytest.approx(expected, rel=1e-10)
    for estimator in ("biased", "unbiased"):
        expected = mmfast.cka(x, y, estimator=estimator, backend=mmd_backend).item()
        far = mmfast.cka((x + 100).float(), (y - 50).float(), estimator=estimator, backend=mmd_backend).item()
        assert far == pytest.approx(expected, rel=1e-4)
    assert mmfast.cka(x, x * 2, backend=mmd_backend).item() == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
@pytest.mark.parametrize("names", [("gaussian", "matern32"), ("linear", "linear"), ("cosine", "rq")], ids="-".join)
def test_gradcheck(names, estimator, mmd_backend):
    x, y = (t.requires_grad_() for t in samples(6, 3, 2))
    kernels = [KERNELS[name][0] for name in names]
    for measure in (mmfast.hsic, mmfast.cka):

        def value(x, y, measure=measure):
            return measure(x, y, *kernels, estimator, backend=mmd_backend)

        assert torch.autograd.gradcheck(value, (x, y))
        assert torch.autograd.gradgradcheck(value, (x, y))


@pytest.mark.parametrize(
    "names", [("gaussian", "matern32"), ("linear", "linear"), ("gaussian_median", "dan")], ids="-".join
)
def test_batches(names, mmd_backend):
    x, y = torch.randn(3, 8, 4, dtype=torch.float64), torch.randn(3, 8, 2, dtype=torch.float64)
    kernels = [KERNELS[name][0] for name in names]
    for measure in (mmfast.hsic, mmfast.cka, mmfast.kernel_alignment):
        together = measure(x, y, *kernels, backend=mmd_backend)
        alone = [measure(a, b, *kernels, backend=mmd_backend) for a, b in zip(x, y, strict=True)]
        torch.testing.assert_close(together, torch.stack(alone), rtol=1e-10, atol=1e-12)


def test_independence(mmd_backend):
    """Near zero without dependence, far from it with one that no correlation sees."""
    x = torch.randn(300, 1)
    values = [mmfast.hsic(x, y, estimator="unbiased", backend=mmd_backend) for y in (torch.randn(300, 1), x**2)]
    assert abs(values[0]) < 1e-3 and values[1] > 1e-2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: mmfast.hsic(x, x[:4]), r"x and y must be features of the same points, got \(5, 3\) and \(4, 3\)"),
        (lambda x: mmfast.hsic(x, x[None]), "x and y must be features of the same points"),
        (lambda x: mmfast.hsic(x[:3], x[:3], estimator="unbiased"), "x must have at least 4 rows"),
        (lambda x: mmfast.cka(x[:1], x[:1]), "x must have at least 2 rows"),
        (lambda x: mmfast.cka(x, x.double()), "x and y must have the same dtype"),
        (lambda x: mmfast.cka(x, x, estimator="u"), "estimator must be one of 'biased', 'unbiased', got 'u'"),
        (lambda x: mmfast.cka(x, x, "rbf"), "kernel must be a kernel of mmfast.kernels, got str"),
        (lambda x: mmfast.hsic(x, x.to("meta")), "x and y must be on the same device"),
    ],
)
def test_rejects(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call(torch.ones(5, 3))


@pytest.mark.parametrize("n", [200, 700])
@pytest.mark.parametrize("kernel", [k.Gaussian(100.0), k.Laplacian(1e3)], ids=repr)
def test_wide_kernels(kernel, n, mmd_native):
    """Small differences of large sums: rows, products and squares of values near 1 are added up in float64."""
    x = torch.randn(n, 64)
    y = 0.5 * x[:, :32] + torch.randn(n, 32)
    calls = [
        lambda x, y, by: mmfast.hsic(x, y, kernel, kernel, backend=by),
        lambda x, y, by: mmfast.hsic(x, y, kernel, kernel, "unbiased", backend=by),
        lambda x, y, by: mmfast.cka(x, y, kernel, kernel, backend=by),
        lambda x, y, by: mmfast.mmd2_variance(x[:, :32], y, kernel, backend=by),
    ]
    for call, allowed in zip(calls, (3e-6, 3e-6, 1e-6, 3e-4), strict=True):
        expected = call(x.double(), y.double(), "reference")
        torch.testing.assert_close(call(x, y, mmd_native).double(), expected.double(), rtol=allowed, atol=0)
