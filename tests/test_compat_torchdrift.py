"""`mmfast.compat.torchdrift` against TorchDrift, and against its documentation in loops."""

from __future__ import annotations

import functools
import math

import pytest
import torch

from mmfast import kernels
from mmfast.compat import torchdrift as ours

KERNELS = {
    "gaussian": ("GaussianKernel", {}, lambda d, s: math.exp(-d * d / (2 * s * s))),
    "gaussian_fixed": ("GaussianKernel", {"lengthscale": 1.7}, lambda d, s: math.exp(-d * d / (2 * s * s))),
    "exp": ("ExpKernel", {}, lambda d, s: math.exp(-d / s)),
    "exp_fixed": ("ExpKernel", {"lengthscale": 3}, lambda d, s: math.exp(-d / s)),
    "rq": ("RationalQuadraticKernel", {"alpha": 0.7}, lambda d, s: (1 + d * d / (1.4 * s * s)) ** -0.7),
    "rq_fixed": ("RationalQuadraticKernel", {"lengthscale": 2.0}, lambda d, s: 1 / (1 + d * d / (2 * s * s))),
}


@pytest.fixture
def theirs(monkeypatch):
    module = pytest.importorskip("torchdrift.detectors.mmd", exc_type=ImportError)
    # By default cdist multiplies matrices from 25 rows on, and points are then up to 1e-3 away from themselves.
    exact = functools.partial(torch.cdist, compute_mode="donot_use_mm_for_euclid_dist")
    monkeypatch.setattr(torch, "cdist", exact)
    return module


def samples(n: int = 20, m: int = 15, d: int = 4, shift: float = 0.4, dtype=torch.float64):
    return torch.randn(n, d, dtype=dtype), torch.randn(m, d, dtype=dtype) + shift


def definition(x, y, value, lengthscale, order=None) -> float:
    """The unbiased MMD² of the first n and the rest of the pooled sample in some order."""
    z, n, m = torch.cat((x, y)), len(x), len(y)
    if lengthscale is None:
        every = sorted(math.dist(p, q) for p in z.tolist() for q in z.tolist())
        lengthscale = every[(len(every) - 1) // 2]
    z = (z if order is None else z[order]).tolist()
    k = [[value(math.dist(p, q), lengthscale) for q in z] for p in z]
    within_x = sum(k[i][j] for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    within_y = sum(k[i][j] for i in range(n, n + m) for j in range(n, n + m) if i != j) / (m * (m - 1))
    return within_x + within_y - 2 * sum(k[i][j] for i in range(n) for j in range(n, n + m)) / (n * m)


@pytest.mark.parametrize("name", KERNELS)
def test_matches_definition(name):
    x, y = samples()
    kernel, options, value = KERNELS[name]
    found = ours.kernel_mmd(x, y, n_perm=None, kernel=getattr(ours, kernel)(**options))
    assert found.item() == pytest.approx(definition(x, y, value, options.get("lengthscale")), rel=1e-10)
    assert not ours.kernel_mmd(x.requires_grad_(), y, n_perm=None).requires_grad


def test_p_value():
    """All permutations one after the other, from the same random numbers."""
    x, y = samples(7, 6, 2)
    value = KERNELS["gaussian"][2]
    torch.manual_seed(1)
    order, null = torch.arange(13), []
    for _ in range(60):
        order = order[torch.randperm(13)]
        null.append(definition(x, y, value, None, order))
    statistic = definition(x, y, value, None)
    larger = sum(one >= statistic for one in null)
    assert 0 < larger < 60
    for corrected, expected in ((True, (1 + larger) / 61), (False, larger / 60)):
        torch.manual_seed(1)
        mmd, p_value = ours.kernel_mmd(x, y, n_perm=60, corrected=corrected)
        assert mmd.item() == pytest.approx(statistic)
        assert p_value.item() == pytest.approx(expected)


def test_p_value_is_never_zero():
    x, y = samples(shift=10)
    assert ours.kernel_mmd(x, y, n_perm=50)[1].item() == pytest.approx(1 / 51)
    assert ours.kernel_mmd(x, y, n_perm=50, corrected=False)[1] == 0


@pytest.mark.peer
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", KERNELS)
def test_drop_in(name, dtype, theirs):
    x, y = samples(40, 30, 6, 0.12, dtype)
    kernel, options, _ = KERNELS[name]
    mine, other = (getattr(library, kernel)(**options) for library in (ours, theirs))
    tolerance = {"rtol": 1e-9, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 2e-6}
    torch.testing.assert_close(
        ours.kernel_mmd(x, y, None, mine, keep_diagonal=True), theirs.kernel_mmd(x, y, None, other), **tolerance
    )
    results = []
    for call in (
        lambda: ours.kernel_mmd(x, y, 99, mine, keep_diagonal=True, corrected=False),
        lambda: theirs.kernel_mmd(x, y, 99, other),
    ):
        torch.manual_seed(7)
        results.append(call())
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, **tolerance)
    assert 0 < results[0][1] < 1
    dists = torch.cdist(x, y)
    torch.testing.assert_close(mine(dists), other(dists), **tolerance)


@pytest.mark.peer
def test_drop_in_detector(theirs):
    x, y = samples(40, 30, 6, 0.15, torch.float32)
    for options in ({}, {"return_p_value": True, "n_perm": 50}):
        mine = ours.KernelMMDDriftDetector(keep_diagonal=True, corrected=False, **options)
        other = theirs.KernelMMDDriftDetector(**options)
        assert mine.fit(x) is other.fit(x) is x
        for method in ("__call__", "compute_p_value"):
            values = []
            for detector in (mine, other):
                torch.manual_seed(2)
                values.append(getattr(detector, method)(y))
            torch.testing.assert_close(*values, rtol=1e-5, atol=2e-6)
        assert list(mine.state_dict()) == list(other.state_dict()) == ["base_outputs"]


def test_detector():
    detector = ours.KernelMMDDriftDetector(kernel=kernels.MultiGaussian(), n_perm=200)
    x, y = samples(60, 50)
    with pytest.raises(RuntimeError, match="call fit"):
        detector(y)
    detector.fit(x)
    assert detector(y + 1) > 0.05 > detector.compute_p_value(y + 1)
    with pytest.raises(RuntimeError, match="no score for each"):
        detector(y, individual_samples=True)


def test_rejects():
    x, y = samples()
    with pytest.raises(ValueError, match="same number of features"):
        ours.kernel_mmd(x, y[:, :2])
    with pytest.raises(
        TypeError, match=r"kernel must be one of mmfast.compat.torchdrift or mmfast.kernels.* got function"
    ):
        ours.kernel_mmd(x, y, kernel=lambda dists: dists)
    with pytest.raises(ValueError, match="keep_diagonal is for"):
        ours.kernel_mmd(x, y, kernel=kernels.Polynomial(), keep_diagonal=True)
    with pytest.raises(ValueError, match="sigma must be positive"):
        ours.kernel_mmd(x, y, kernel=ours.GaussianKernel(-1.0))
