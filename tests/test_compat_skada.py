"""`mmfast.compat.skada` against its definition, and against skada where it is installed."""

from __future__ import annotations

import pytest
import torch
from numerics import assert_compiles_with_symbols
from pairwise import assert_same, biased, samples

from mmfast.compat.skada import dan_loss


def definition(x, y, sigmas=None, eps=1e-7):
    z = torch.cat([x, y])
    square = (z[:, None] - z[None]).square().sum(2)
    distance = (square + torch.eye(len(z))).sqrt() * (1 - torch.eye(len(z)))
    if sigmas is None:
        values = distance[: len(x), : len(x)].flatten().sort().values
        sigmas = [2.0 ** (-8 + i / 2) * (values[(len(values) - 1) // 2] + eps) for i in range(33)]
    return biased(sum(torch.exp(-distance / sigma) for sigma in sigmas), len(x))


@pytest.mark.parametrize("options", [{}, {"eps": 0.5}, {"sigmas": [0.5, 1.0, 3.0]}], ids=str)
@pytest.mark.parametrize("n,m", [(7, 7), (6, 9), (9, 4)])
def test_definition(n, m, options):
    (x,), (y,) = samples(n, m, 3)
    assert_same(dan_loss(x, y, **options), definition(x, y, **options), (x, y), rtol=1e-9)


@pytest.mark.peer
@pytest.mark.parametrize("options", [{}, {"eps": 0.5}, {"sigmas": [0.5, 1.0, 3.0]}], ids=str)
@pytest.mark.parametrize("n,m,d", [(7, 7, 3), (6, 9, 1), (40, 30, 20)])
def test_drop_in(n, m, d, options):
    theirs = pytest.importorskip("skada.deep.losses")
    (x,), (y,) = samples(n, m, d)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # skada works in the default dtype only
    try:
        expected = theirs.dan_loss(x, y, **options)
    finally:
        torch.set_default_dtype(default)
    # Of many points skada's distances come from a Gram matrix: zero ones are off by 1e-7.
    assert_same(dan_loss(x, y, **options), expected, (x, y), rtol=1e-9 if n < 25 else 1e-4, atol=1e-7)


def test_sigmas_may_be_a_tensor():
    (x,), (y,) = samples(6, 5, 3)
    sigmas = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64, requires_grad=True)
    assert_same(dan_loss(x, y, sigmas), definition(x, y, sigmas), (x, y, sigmas))


def test_coincident_points_are_finite():
    x = torch.ones(4, 3, requires_grad=True)
    loss = dan_loss(x, torch.zeros(4, 3))
    loss.backward()
    assert loss.isfinite() and x.grad.isfinite().all()


def test_rejects():
    x = torch.randn(4, 3)
    with pytest.raises(ValueError, match="sigmas must be positive"):
        dan_loss(x, x, [1.0, 0.0])
    with pytest.raises(ValueError, match="sigmas must have one dimension"):
        dan_loss(x, x, [])


def test_compile_with_given_sigmas():
    assert_compiles_with_symbols(lambda x, y: dan_loss(x, y, [0.5, 2.0]), torch.randn(6, 3), torch.randn(5, 3))
