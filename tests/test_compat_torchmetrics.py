"""`mmfast.compat.torchmetrics` against torchmetrics, and where that is wrong against double loops."""

from __future__ import annotations

import pickle

import pytest
import torch
from numerics import assert_compiles_with_symbols
from torch import nn

import mmfast
from mmfast.compat import torchmetrics as ours

kid = pytest.importorskip("torchmetrics.image.kid")
pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore:Metric .*will save all extracted features")]

OPTIONS = [{}, {"degree": 2, "gamma": 0.3, "coef": 0.7}]


def features(n: int = 30, m: int = 30, d: int = 12, dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(n, d, dtype=dtype), 1.1 * torch.randn(m, d, dtype=dtype) + 0.2


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", ["poly_kernel", "poly_mmd"])
def test_drop_in(name, options):
    inputs, results = features(), []
    for module in (ours, kid):
        x, y = (a.clone().requires_grad_() for a in inputs)
        value = getattr(module, name)(x, y, **options)
        results.append((value, *torch.autograd.grad(value.square().sum(), (x, y))))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    x, y = (a.float() for a in inputs)
    found, expected = getattr(ours, name)(x, y, **options), getattr(kid, name)(x, y, **options)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6)


def test_drop_in_from_matrices():
    x, y = features()
    matrices = [kid.poly_kernel(a, b).requires_grad_() for a, b in ((x, x), (x, y), (y, y))]
    found, expected = ours.maximum_mean_discrepancy(*matrices), kid.maximum_mean_discrepancy(*matrices)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    for a, b in zip(torch.autograd.grad(found, matrices), torch.autograd.grad(expected, matrices), strict=True):
        torch.testing.assert_close(a, b)


def test_samples_of_two_sizes():
    x, y = features(6, 9)

    def mean(a, b, same):
        values = [(float(p @ q) / 12 + 1) ** 3 for i, p in enumerate(a) for j, q in enumerate(b) if not same or i != j]
        return sum(values) / len(values)

    expected = mean(x, x, True) + mean(y, y, True) - 2 * mean(x, y, False)
    assert ours.poly_mmd(x, y).item() == pytest.approx(expected, rel=1e-10)
    matrices = ours.poly_kernel(x, x), ours.poly_kernel(x, y), ours.poly_kernel(y, y)
    assert ours.maximum_mean_discrepancy(*matrices).item() == pytest.approx(expected, rel=1e-10)


def updated(metric, real, fake, pieces: int = 3):
    for part in real.chunk(pieces):
        metric.update(part, real=True)
    for part in fake.chunk(pieces):
        metric.update(part, real=False)
    return metric


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_drop_in_metric(options):
    """The same subsets with the same random state, and so the same numbers."""
    real, fake = features(60, 50)
    options = {"feature": nn.Identity(), "subsets": 7, "subset_size": 20, **options}
    results = []
    for library in (ours, kid):
        metric = updated(library.KernelInceptionDistance(**options), real, fake)
        torch.manual_seed(3)
        results.append(metric.compute())
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_all_samples():
    real, fake = features(60, 50)
    metric = updated(ours.KernelInceptionDistance(feature=None, subsets=None), real, fake)
    value, error = metric.compute()
    expected = mmfast.kid(real, fake)
    assert torch.equal(value, expected.value)
    assert torch.equal(error, expected.standard_error)
    k = [kid.poly_kernel(a, b) for a, b in ((real, real), (fake, fake), (real, fake))]
    by_hand = (k[0].sum() - k[0].trace()) / (60 * 59) + (k[1].sum() - k[1].trace()) / (50 * 49) - 2 * k[2].mean()
    torch.testing.assert_close(value, by_hand)


def test_is_a_metric():
    metric = ours.KernelInceptionDistance(feature=None, subsets=None, reset_real_features=False)
    assert isinstance(metric, kid.KernelInceptionDistance)
    assert ours.KernelInceptionDistance is type(metric)
    real, fake = features()
    updated(metric, real, fake)
    copied = pickle.loads(pickle.dumps(metric))
    torch.testing.assert_close(copied.compute(), metric.compute())
    metric.reset()
    assert not metric.fake_features
    assert torch.equal(torch.cat(metric.real_features), real)


def test_rejects():
    real, fake = features(10, 10)
    metric = updated(ours.KernelInceptionDistance(feature=None), real, fake)
    with pytest.raises(ValueError, match="subset_size"):
        metric.compute()
    with pytest.raises(ValueError, match="subsets"):
        ours.KernelInceptionDistance(feature=None, subsets=0)
    with pytest.raises(ValueError, match="degree"):
        ours.KernelInceptionDistance(feature=None, degree=0)
    with pytest.raises(ValueError, match="k_yy must be"):
        ours.maximum_mean_discrepancy(torch.ones(3, 3), torch.ones(3, 4), torch.ones(3, 3))
    with pytest.raises(AttributeError, match="has no attribute 'other'"):
        _ = ours.other


def test_without_torchmetrics(run_without):
    """The functions work, and the class says what it needs."""
    names = run_without("torchmetrics", ours)
    names["poly_mmd"](torch.randn(5, 3), torch.randn(5, 3))
    with pytest.raises(ImportError, match="needs the package torchmetrics: pip install torchmetrics"):
        names["__getattr__"]("KernelInceptionDistance")


@pytest.mark.parametrize("name", ["poly_kernel", "poly_mmd"])
def test_compile_with_numbers_as_symbols(name):
    assert_compiles_with_symbols(getattr(ours, name), *features(6, 5, 3))
