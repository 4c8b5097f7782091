"""`mmfast.compat.tllib` against the definitions of its losses, pair by pair."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from pairwise import assert_same, matrix, samples, unbiased
from test_compat_xlearn import linear
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mmfast import kernels, mmd2
from mmfast.compat.tllib import (
    CorrelationAlignmentLoss,
    GaussianKernel,
    JointMultipleKernelMaximumMeanDiscrepancy,
    MultipleKernelMaximumMeanDiscrepancy,
)

DAN = [{"alpha": 2.0**k} for k in range(-3, 2)]
FIXED = [{"sigma": 0.92, "track_running_stats": False}]
MIXED = [{"alpha": 0.5}, {"sigma": 2.0, "track_running_stats": False}, {"sigma": 2.0}]


def gram(x, y, settings):
    """The sum of the kernels of all pairs of both samples."""
    z = torch.cat([x, y])
    square = matrix(lambda a, b: (a - b).square().sum(), z, z)
    total = 0
    for given in settings:
        if given.get("track_running_stats", True):
            sigma_square = given.get("alpha", 1.0) * sum(square.detach().flatten().tolist()) / len(z) ** 2
        else:
            sigma_square = torch.tensor(given["sigma"] ** 2).item()  # in single precision
        total = total + torch.exp(-square / (2 * sigma_square))
    return total


def build(settings):
    return [GaussianKernel(**given) for given in settings]


@pytest.mark.parametrize("settings", [DAN, FIXED, MIXED, [{}]], ids=["dan", "fixed", "mixed", "default"])
@pytest.mark.parametrize("is_linear,m", [(False, 6), (False, 4), (True, 6)])
def test_drop_in_mkmmd(settings, is_linear, m):
    (x,), (y,) = samples(6, m, 3)
    k = gram(x, y, settings)
    expected = (linear if is_linear else unbiased)(k, 6) + 1 / 5 + 1 / (m - 1)
    loss = MultipleKernelMaximumMeanDiscrepancy(build(settings), linear=is_linear)
    assert_same(loss(x, y), expected, (x, y))
    assert_same(loss(x, y), expected, (x, y))


@pytest.mark.parametrize("layers", [(DAN, FIXED), (MIXED, [{}], FIXED), (DAN,)], ids=["jan", "three", "one"])
@pytest.mark.parametrize("is_linear", [False, True])
def test_drop_in_jmmd(layers, is_linear):
    x, y = samples(6, 6, *(3, 2, 4)[: len(layers)])
    k = math.prod(gram(a, b, settings) for a, b, settings in zip(x, y, layers, strict=True))
    expected = (linear if is_linear else unbiased)(k, 6) + 2 / 5
    loss = JointMultipleKernelMaximumMeanDiscrepancy([build(s) for s in layers], linear=is_linear)
    assert_same(loss(tuple(x), tuple(y)), expected, (*x, *y))


def test_defaults():
    """The joint loss is linear by default, the other one is not."""
    x, y = samples(6, 6, 3, 2)
    joint, single = [build(DAN), build(FIXED)], build(DAN)
    expected = JointMultipleKernelMaximumMeanDiscrepancy(joint, linear=True)(x, y)
    assert JointMultipleKernelMaximumMeanDiscrepancy(joint)(x, y) == expected
    expected = MultipleKernelMaximumMeanDiscrepancy(single, linear=False)(x[0], y[0])
    assert MultipleKernelMaximumMeanDiscrepancy(single)(x[0], y[0]) == expected


def test_thetas_see_both_domains_at_once():
    x, y = samples(6, 6, 3, 2)
    thetas = [nn.BatchNorm1d(3).double(), nn.Identity()]
    loss = JointMultipleKernelMaximumMeanDiscrepancy([build(DAN), build(FIXED)], False, thetas)
    a, b = copy.deepcopy(thetas[0])(torch.cat([x[0], y[0]])).split(6)
    expected = unbiased(gram(a, b, DAN) * gram(x[1], y[1], FIXED), 6) + 2 / 5
    assert_same(loss(x, y), expected, (*x, *y), rtol=1e-9)


@pytest.mark.parametrize("settings", [*DAN[:1], *FIXED])
def test_drop_in_kernel(settings):
    (x,), _ = samples(5, 1, 3)
    kernel = GaussianKernel(**settings)
    values = kernel(x)
    assert_same(values, gram(x, x[:0], [settings]), (x,))
    assert_same(values.diagonal(), torch.ones(5, dtype=x.dtype) + 0 * x.sum(), (x,))


@pytest.mark.parametrize("m", [6, 4])
def test_drop_in_coral(m):
    (x,), (y,) = samples(6, m, 3)

    def covariance(z):
        rows = [row - sum(z) / len(z) for row in z]
        return sum(torch.outer(row, row) for row in rows) / (len(z) - 1)

    expected = (sum(x) / 6 - sum(y) / m).square().sum() / 3 + (covariance(x) - covariance(y)).square().sum() / 9
    assert_same(CorrelationAlignmentLoss()(x, y), expected, (x, y))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_coral_is_computed_in_float32(dtype):
    x, y = torch.randn(6, 3).to(dtype), torch.randn(5, 3).to(dtype)
    expected = CorrelationAlignmentLoss()(x.double(), y.double()).float()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(CorrelationAlignmentLoss()(x, y), expected)


def test_kernels_keep_what_they_found():
    (x,), (y,) = samples(6, 6, 3)
    used = build(DAN)
    MultipleKernelMaximumMeanDiscrepancy(used)(x, y)
    z = torch.cat([x, y]).detach()
    mean = 2 * z.var(0, unbiased=False).sum()
    for kernel, given in zip(used, DAN, strict=True):
        torch.testing.assert_close(kernel.sigma_square, given["alpha"] * mean)


def test_other_kernels_and_higher_dimensions():
    x, y = torch.randn(6, 3, 2), torch.randn(6, 3, 2)
    mixed = [kernels.Laplacian(2.0), GaussianKernel(), kernels.Gaussian(3.0)]
    parts = [kernels.Laplacian(2.0), kernels.Gaussian("tllib"), kernels.Gaussian(3.0)]
    expected = sum(mmd2(x.flatten(1), y.flatten(1), kernel) for kernel in parts) + 2 / 5
    torch.testing.assert_close(MultipleKernelMaximumMeanDiscrepancy(mixed)(x, y), expected)


def test_copies_are_independent():
    x, y = torch.randn(6, 3), torch.randn(6, 3)
    loss = MultipleKernelMaximumMeanDiscrepancy(nn.ModuleList(build(DAN)))
    other = copy.deepcopy(loss)
    other.kernels[0].alpha = 5.0
    assert loss(x, y) != other(x, y)
    loss.kernels[0].alpha = 5.0
    assert loss(x, y) == other(x, y)


def test_compile_fullgraph():
    (x,), (y,) = samples(6, 6, 3)
    loss = MultipleKernelMaximumMeanDiscrepancy(build(DAN))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert_same(compiled(x, y), loss(x, y), (x, y))


@pytest.mark.parametrize("kernel", [GaussianKernel(), GaussianKernel(sigma=2.0, track_running_stats=False)])
def test_what_tracers_and_transforms_make_is_not_kept(kernel):
    x, y = torch.randn(6, 3), torch.randn(6, 3)
    loss = MultipleKernelMaximumMeanDiscrepancy([kernel])
    expected, square = loss(x, y), kernel.sigma_square.clone()
    loss(x.to("meta"), y.to("meta"))
    torch.func.vmap(loss)(x.view(2, 3, 3), y.view(2, 3, 3))
    with FakeTensorMode() as mode:
        loss(mode.from_tensor(x), mode.from_tensor(y))
    assert type(kernel.sigma_square) is torch.Tensor
    assert not torch._C._functorch.is_functorch_wrapped_tensor(kernel.sigma_square)
    assert torch.equal(kernel.sigma_square, square) and torch.equal(loss(x, y), expected)


def test_rejects():
    x = torch.randn(4, 3)
    with pytest.raises(ValueError, match="sigma must be given"):
        GaussianKernel(track_running_stats=False)
    with pytest.raises(TypeError, match="got Linear"):
        MultipleKernelMaximumMeanDiscrepancy([nn.Linear(3, 3)])
    with pytest.raises(ValueError, match="at least one kernel"):
        MultipleKernelMaximumMeanDiscrepancy([])
    with pytest.raises(ValueError, match="as many rows"):
        MultipleKernelMaximumMeanDiscrepancy(build(DAN), linear=True)(x, x[:3])
    with pytest.raises(ValueError, match="at least 2 rows"):
        MultipleKernelMaximumMeanDiscrepancy(build(DAN))(x, x[:1])
    with pytest.raises(ValueError):
        JointMultipleKernelMaximumMeanDiscrepancy([build(DAN), build(FIXED)])((x,), (x,))
