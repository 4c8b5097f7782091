"""`mmfast.compat.cmmd` against the formula, in double loops."""

from __future__ import annotations

import math

import pytest
import torch

from mmfast.compat import cmmd


def definition(x: torch.Tensor, y: torch.Tensor) -> float:
    def mean(a, b):
        return sum(math.exp(-float((p - q).square().sum()) / 200) for p in a for q in b) / (len(a) * len(b))

    return 1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y))


def embeddings(n: int = 12, m: int = 9, d: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = torch.randn(n, d, dtype=torch.float64), torch.randn(m, d, dtype=torch.float64) + 0.2
    return 3 * x, 3 * y


def test_drop_in():
    x, y = embeddings()
    for found in (cmmd.mmd(x, y), cmmd.mmd(x.numpy(), y.numpy())):
        assert found.dtype == torch.float64
        assert found.item() == pytest.approx(definition(x, y), rel=1e-10)
    found = cmmd.mmd(x.float().numpy(), y.float().numpy())
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(definition(x, y), rel=1e-4)


def test_gradient():
    x, y = (t.requires_grad_() for t in embeddings(5, 4, 3))
    torch.autograd.gradcheck(cmmd.mmd, (x, y))


def test_far_from_the_origin():
    x, y = (t.float() + 10 for t in embeddings(60, 50, 64))
    assert cmmd.mmd(x, y).item() == pytest.approx(definition(x.double(), y.double()), rel=1e-5)


def test_rejects():
    x, y = embeddings()
    with pytest.raises(ValueError, match="same number of features"):
        cmmd.mmd(x, y[:, :3])
