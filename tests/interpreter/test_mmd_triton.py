"""The Triton kernels of the mmd slice against float64, with blocks of 16."""

from __future__ import annotations

import mmd_device as cases
import pytest
import torch

from mmfast import kernels as k
from mmfast import mmd
from mmfast.mmd import small, triton_launch

BACKEND, DEVICE = "triton", "cpu"


@pytest.fixture(autouse=True)
def _any_size(monkeypatch):
    """Sizes of these tests stand for larger ones; `test_mmd_small.py` is about small batches."""
    monkeypatch.setattr(small, "MOST_ROWS", 0)


@pytest.mark.parametrize("name", cases.KERNELS)
def test_matches_gold(name):
    cases.check_kernel(name, BACKEND, DEVICE)


@pytest.mark.parametrize("name", ["dan", "poly", "energy", "matern52"])
def test_float64(name):
    cases.check_kernel(name, BACKEND, DEVICE, 17, 18, torch.float64, 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["dan", "poly"])
def test_half_precisions(name, dtype):
    # The products are exact, and not centred; gradients are rounded to the features' dtype.
    cases.check_kernel(name, BACKEND, DEVICE, 17, 18, dtype, 1e-5 if dtype == torch.float16 else 1e-4)


def test_one_sample_u():
    cases.check_kernel("gaussian", BACKEND, DEVICE, 18, 18, estimator="one_sample_u")


@pytest.mark.parametrize(
    "check",
    [
        cases.check_product,
        cases.check_weights,
        cases.check_parameters,
        cases.check_sums,
        cases.check_matmul,
        cases.check_lmmd,
        cases.check_pair,
        cases.check_permutations,
        cases.check_median,
        cases.check_far_and_near,
        cases.check_bad_row,
        cases.check_precision,
        cases.check_edges,
        cases.check_double_backward,
    ],
    ids=lambda check: check.__name__,
)
def test_as_elsewhere(check):
    check(BACKEND, DEVICE)


def test_median_few_and_float64():
    cases.check_median(BACKEND, DEVICE, d=3)
    cases.check_median(BACKEND, DEVICE, d=18, dtype=torch.float64)


def test_matmul_of_half_precision():
    """K and what it multiplies are kept more exactly than the features are."""
    cases.check_matmul(BACKEND, DEVICE, torch.bfloat16, 1e-5)


def test_panels(monkeypatch):
    """A few rows of tiles at a time give what all of them at once do, and twice the same bits."""
    x, y = (t.float() for t in cases.samples(35, 20, 20))

    def run():
        return cases.with_gradients(lambda b, x, y: mmd.mmd2(x, y, k.MultiGaussian(), backend=b))(BACKEND, x, y)

    whole = run()
    assert all(torch.equal(a, b) for a, b in zip(whole, run(), strict=True))
    monkeypatch.setattr(triton_launch, "_PANEL", 0)
    monkeypatch.setattr(triton_launch, "_POINTS_SHARE", 0)
    for a, b in zip(whole, run(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)
