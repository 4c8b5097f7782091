"""The one native call of `mmfast.mmd.direct` beside the operators, and points of many dimensions."""

from __future__ import annotations

import pytest
import torch

from mmfast import kernels, mmd2
from mmfast.mmd import direct

KERNELS = {
    "dan": kernels.MultiGaussian(),
    "tllib": kernels.MultiGaussian(bandwidth="tllib", reduce="mean"),
    "of_x": kernels.Gaussian(kernels.MeanDistance("x", scale=0.7)),
    "of_y": kernels.InverseMultiquadric(kernels.MeanDistance("y", diagonal=True)),
    "root": kernels.Matern(kernels.MeanDistance(scale=2.0)) + 0.5 * kernels.Laplacian("mean", p=2),
    "fixed": kernels.Gaussian(2.0) + 0.3 * kernels.Energy(),
}


def samples(n: int, m: int, d: int, dtype=torch.float64, mean: float = 10.0):
    generator = torch.Generator().manual_seed(n + m + d)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64) + mean
    y = torch.randn(m, d, generator=generator, dtype=torch.float64) * 1.2 + mean
    return x.to(dtype).requires_grad_(), y.to(dtype).requires_grad_()


def of_operators(x, y, kernel, estimator):
    """A batch of one takes the way through the operators."""
    return mmd2(x[None], y[None], kernel, estimator)[0]


@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
@pytest.mark.parametrize("name", KERNELS)
def test_same_as_the_operators(name, estimator, mmd_native, monkeypatch):
    kernel = KERNELS[name]
    seen = []
    ours = direct._Direct.apply
    monkeypatch.setattr(direct._Direct, "apply", lambda *args: seen.append(1) or ours(*args))
    x, y = samples(21, 17, 20)
    value, expected = mmd2(x, y, kernel, estimator), of_operators(x, y, kernel, estimator)
    assert seen == [1]
    assert value.shape == () and value.dtype == torch.float64
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-14)
    first = torch.autograd.grad(value * 3, (x, y), create_graph=True)
    should = torch.autograd.grad(expected * 3, (x, y), create_graph=True)
    torch.testing.assert_close(first, should, rtol=1e-10, atol=1e-14)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), (x, y))
    should = torch.autograd.grad(sum(g.square().sum() for g in should), (x, y))
    torch.testing.assert_close(second, should, rtol=1e-9, atol=1e-13)
    with torch.no_grad():
        torch.testing.assert_close(mmd2(x, y, kernel, estimator), expected, rtol=1e-12, atol=1e-14)


def test_gradients_of_one_call(mmd_native):
    x, y = samples(9, 12, 30, torch.float32)
    value = mmd2(x, y)
    assert value.dtype == torch.float32
    (once,) = torch.autograd.grad(value, x, retain_graph=True)
    kept = once.clone()
    once.zero_()  # a caller's own
    torch.testing.assert_close(torch.autograd.grad(value, x)[0], kept, rtol=0, atol=0)
    only = mmd2(x, y.detach())
    (by_x,) = torch.autograd.grad(only, x, create_graph=True)
    torch.testing.assert_close(by_x, kept, rtol=1e-6, atol=1e-9)
    assert torch.autograd.grad(by_x.sum(), x)[0].isfinite().all()


def test_points_that_coincide(mmd_native):
    x = torch.ones(5, 12, requires_grad=True)
    value = mmd2(x, torch.ones(4, 12))
    value.backward()
    assert value == 0 and (x.grad == 0).all()
    assert mmd2(torch.full((5, 12), torch.nan), torch.ones(4, 12)).isnan()


def test_leaves_to_others(mmd_native):
    x, y = torch.randn(8, 12), torch.randn(8, 12)
    dan = kernels.MultiGaussian()
    assert direct.mmd2(x, y, dan, True, None) is not None
    for a, b, kernel in (
        (x.bfloat16(), y.bfloat16(), dan),
        (x.double(), y, dan),
        (x.T, y.T, dan),
        (x[None], y[None], dan),
        (x[:1], y, dan),
        (x, y[:, :3], dan),
        (x, y, kernels.Gaussian("median")),
        (x, y, kernels.Gaussian(kernels.MeanDistance("cross"))),
        (x, y, kernels.Gaussian(kernels.MeanDistance(detach=False))),
        (x, y, kernels.Gaussian(torch.tensor(1.0, requires_grad=True))),
        (x, y, kernels.Polynomial()),
        (x, y, kernels.Laplacian(p=1)),
        (x, y, kernels.Gaussian(1.0) + kernels.Linear()),
    ):
        assert direct.mmd2(a, b, kernel, True, None) is None
    assert direct.mmd2(x, y, dan, True, "reference") is None


def errors_of(n, m, d):
    """Root mean squares of the relative errors of native code and of differences in float32: a single draw may be off
    by three times as much, whatever computes it."""
    errors = torch.zeros(48, 2, dtype=torch.float64)
    for draw in errors:
        x, y = torch.randn(n, d), torch.randn(m, d) * 1.2
        expected = mmd2(x.double(), y.double(), backend="reference")
        draw[0] = mmd2(x, y) / expected - 1
        draw[1] = mmd2(x, y, backend="reference") / expected - 1
    return errors.square().mean(0).sqrt().tolist()


@pytest.mark.parametrize("shape", [(256, 256, 64), (300, 256, 128), (600, 600, 64)])
def test_accuracy(shape, mmd_native):
    native, reference = errors_of(*shape)
    assert native <= 2 * reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(600, 500, 400), (70, 130, 1290)])
def test_many_dimensions(shape, dtype, mmd_native):
    """Several blocks, slices of which the last is short or has more than the others, tiles that are not full."""
    x, y = samples(*shape, dtype)
    value = mmd2(x, y)
    gradients = torch.autograd.grad(value, (x, y))
    a, b = (t.detach().double().requires_grad_() for t in (x, y))
    expected = mmd2(a, b, backend="reference")
    should = torch.autograd.grad(expected, (a, b))
    exact = dtype == torch.float64
    if exact:
        torch.testing.assert_close(value, expected, rtol=1e-11, atol=0)
    else:
        assert errors_of(*shape)[0] < 2e-6
    for is_, to_be in zip(gradients, should, strict=True):
        worst = (is_ - to_be).abs().max() / to_be.abs().max()
        assert worst < (1e-12 if exact else 5e-6), worst
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3 - min(before, 2))
        again = torch.autograd.grad(mmd2(x, y), (x, y))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(p, q) for p, q in zip(gradients, again, strict=True))


@pytest.mark.parametrize("apart", [0.0, 9.0], ids=["together", "apart"])
@pytest.mark.parametrize("wanted", ["x", "y", "both"])
@pytest.mark.parametrize("shape", [(3, 200, 150, 40), (1, 700, 333, 72), (2, 130, 129, 300)], ids=str)
def test_batches_of_many_points(shape, wanted, apart, mmd_native):
    """Enough points for a matrix unit's sums, in tiles that end anywhere, of items with one centre or several."""
    b, n, m, d = shape
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(b, n, d, generator=generator, dtype=torch.float64) + 10
    y = torch.randn(b, m, d, generator=generator, dtype=torch.float64) * 1.2 + 10
    y[-1] += apart
    kernel = kernels.MultiGaussian([d * 0.5, d * 1.0, d * 2.0, d * 4.0, d * 8.0])

    def of(dtype, backend):
        xs, ys = (t.to(dtype).requires_grad_(wanted in (name, "both")) for t, name in ((x, "x"), (y, "y")))
        value = mmd2(xs, ys, kernel, "unbiased", backend=backend)
        leaves = [t for t in (xs, ys) if t.requires_grad]
        return value.detach(), *torch.autograd.grad((value * torch.arange(1, b + 1)).sum(), leaves)

    found, again, gold = of(torch.float32, None), of(torch.float32, None), of(torch.float64, "reference")
    for ours, twice, exact in zip(found, again, gold, strict=True):
        assert torch.equal(ours, twice)
        assert (ours - exact).abs().max() < (1e-6 if ours.dim() == 1 else 5e-6 * exact.abs().max())
