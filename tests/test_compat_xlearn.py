"""`mmfast.compat.xlearn` against DAN's and JAN's definitions, pair by pair."""

from __future__ import annotations

import math

import pytest
import torch
from numerics import assert_compiles_with_symbols
from pairwise import assert_same, gaussian_ladder, samples, unbiased

from mmfast.compat import xlearn


def linear(k, n):
    pairs = [(i, (i + 1) % n) for i in range(n)]
    return sum(k[i, j] + k[n + i, n + j] - k[i, n + j] - k[j, n + i] for i, j in pairs) / n


@pytest.mark.parametrize("mul,num,sigma", [(2.0, 5, None), (2.0, 5, 3.0), (1.5, 4, None), (3.0, 1, 1.68), (2, 2, 0)])
@pytest.mark.parametrize("name,m", [("DAN", 7), ("DAN", 5), ("DAN_Linear", 7)])
def test_drop_in_dan(name, m, mul, num, sigma):
    (x,), (y,) = samples(7, m, 3)
    expected = (unbiased if name == "DAN" else linear)(gaussian_ladder(x, y, mul, num, sigma), 7)
    assert_same(xlearn.loss_dict[name](x, y, mul, num, sigma), expected, (x, y))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kernel_muls": [2.0, 1.5], "kernel_nums": [3, 2], "fix_sigma_list": [None, None]},
        {"fix_sigma_list": [2, 5.0]},
    ],
)
@pytest.mark.parametrize("name", ["JAN", "JAN_Linear"])
def test_drop_in_jan(name, options):
    x, y = samples(6, 6, 3, 2)
    settings = {"kernel_muls": [2.0, 2.0], "kernel_nums": [5, 1], "fix_sigma_list": [None, 1.68]} | options
    kernels = [gaussian_ladder(*layer) for layer in zip(x, y, *settings.values(), strict=True)]
    expected = (unbiased if name == "JAN" else linear)(math.prod(kernels), 6)
    assert_same(xlearn.loss_dict[name](x, y, **options), expected, (*x, *y))


def test_one_layer_of_jan_is_dan():
    x, y = samples(6, 6, 3)
    torch.testing.assert_close(xlearn.JAN(x, y), xlearn.DAN(x[0], y[0]))
    with pytest.raises(ValueError, match="kernel_nums must have an entry for each of the 2 layers, got 1"):
        xlearn.JAN([x[0]] * 2, [y[0]] * 2, kernel_nums=[5])


def test_kernel_matrix():
    (x,), (y,) = samples(4, 3, 2)
    torch.testing.assert_close(xlearn.guassian_kernel(x, y), gaussian_ladder(x, y, 2.0, 5, None), rtol=1e-12, atol=0)


def test_given_tensor_is_left_as_it_is():
    (x,), (y,) = samples(5, 5, 3)
    sigma = torch.tensor(2.0, dtype=torch.float64)
    first, second = xlearn.DAN(x, y, fix_sigma=sigma), xlearn.DAN(x, y, fix_sigma=sigma)
    assert sigma.item() == 2.0 and torch.equal(first, second)
    torch.testing.assert_close(first, xlearn.DAN(x, y, fix_sigma=2.0), rtol=1e-12, atol=0)
    (layers,) = (xlearn.JAN([x, x], [y, y], fix_sigma_list=[None, sigma]),)
    torch.testing.assert_close(layers, xlearn.JAN([x, x], [y, y], fix_sigma_list=[None, 2.0]), rtol=1e-12, atol=0)


def test_rejects():
    x = torch.randn(4, 3)
    with pytest.raises(ValueError, match="as many rows"):
        xlearn.DAN_Linear(x, x[:3])
    with pytest.raises(ValueError, match="at least 2 rows"):
        xlearn.DAN(x[:1], x)
    with pytest.raises(ValueError, match="same number of features"):
        xlearn.DAN(x, x[:, :2])


@pytest.mark.parametrize("name", ["DAN", "DAN_Linear", "JAN", "JAN_Linear"])
def test_compile_with_numbers_as_symbols(name):
    x, y = ([torch.randn(6, 3)] * (2 if "JAN" in name else 1) for _ in range(2))
    assert_compiles_with_symbols(xlearn.loss_dict[name], *((x, y) if "JAN" in name else (*x, *y)))
