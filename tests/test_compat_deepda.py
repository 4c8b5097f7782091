"""`mmfast.compat.deepda` against the definitions of its losses, pair by pair."""

from __future__ import annotations

import math

import pytest
import torch
from numerics import assert_compiles_with_symbols
from pairwise import assert_same, biased, gaussian_ladder, samples

from mmfast.compat.deepda import LMMDLoss, MMD_loss, MMDLoss


def local(k, labels, probabilities, classes):
    """The mean over the classes that both sides have, a class at a time."""
    n, values = len(labels), []
    guesses = probabilities.argmax(1).tolist()
    for c in range(classes):
        if c in labels and c in guesses:
            a = [(label == c) / labels.count(c) for label in labels]
            b = (probabilities[:, c] / probabilities[:, c].sum()).tolist()
            values.append(biased(k, n, a, b))
    return sum(values) / len(values) if values else None


@pytest.mark.parametrize("mul,num,sigma", [(2.0, 5, None), (1.5, 4, None), (2.0, 5, 3.0)])
@pytest.mark.parametrize("m", [6, 4])
def test_drop_in_mmd_loss(mul, num, sigma, m):
    (x,), (y,) = samples(6, m, 3)
    loss = MMDLoss(kernel_mul=mul, kernel_num=num, fix_sigma=sigma, max_iter=7)
    assert_same(loss(x, y), biased(gaussian_ladder(x, y, mul, num, sigma), 6), (x, y))
    torch.testing.assert_close(loss.guassian_kernel(x, y, mul, num, sigma), gaussian_ladder(x, y, mul, num, sigma))
    if sigma is None:
        assert_same(MMD_loss("rbf", mul, num)(x, y), loss(x, y), (x, y))


def test_drop_in_linear():
    (x,), (y,) = samples(6, 4, 3)
    expected = sum((x[:, d].sum() / 6 - y[:, d].sum() / 4) ** 2 for d in range(3))
    assert_same(MMDLoss("linear")(x, y), expected, (x, y))
    assert MMDLoss("linear")(x.half(), y.half()).dtype == torch.float32


@pytest.mark.parametrize("sigma", [None, 2.5])
@pytest.mark.parametrize("n,m,classes,missing", [(8, 8, 3, None), (8, 8, 5, 1), (7, 4, 3, None), (5, 5, 2, 0)], ids=str)
def test_drop_in_lmmd_loss(n, m, classes, missing, sigma):
    (x,), (y,) = samples(n, m, 3)
    labels = (torch.arange(n) % classes).tolist()
    logits = torch.randn(m, classes, dtype=torch.float64)
    if missing is not None:
        logits[:, missing] -= 20  # nobody's most probable class
    probabilities = logits.softmax(1).requires_grad_()
    loss = LMMDLoss(classes, fix_sigma=sigma, gamma=10.0, max_iter=3)
    expected = local(gaussian_ladder(x, y, 2.0, 5, sigma), labels, probabilities.detach(), classes)
    for t in (0, 1, 2, 3, 3):
        value = loss(x, y, torch.tensor(labels), probabilities)
        assert value.shape == (1,)
        factor = 2 / (1 + math.exp(-10 * t / 3)) - 1
        assert_same(value[0], expected * factor, (x, y))
        assert torch.autograd.grad(value.sum(), probabilities, allow_unused=True) == (None,)


def test_lmmd_without_a_common_class():
    (x,), (y,) = samples(4, 4, 3)
    loss = LMMDLoss(2, gamma=1.0)
    loss.step()
    value = loss(x, y, torch.zeros(4, dtype=torch.int64), torch.tensor([[0.1, 0.9]] * 4))
    assert value.tolist() == [0.0]
    value.backward()
    assert x.grad.count_nonzero() == 0


def test_rejects():
    x = torch.randn(4, 3)
    with pytest.raises(ValueError, match="'rbf' or 'linear', got 'poly'"):
        MMDLoss("poly")
    with pytest.raises(NotImplementedError, match="linear"):
        LMMDLoss(3, "linear")(x, x, torch.zeros(4, dtype=torch.int64), x.softmax(1))
    with pytest.raises(ValueError, match="classes_y must be"):
        LMMDLoss(5)(x, x, torch.zeros(4, dtype=torch.int64), x.softmax(1))


@pytest.mark.parametrize("options", [{}, {"fix_sigma": 3.0}])
def test_compile_with_numbers_as_symbols(options):
    assert_compiles_with_symbols(MMDLoss(**options), torch.randn(6, 3), torch.randn(5, 3))
