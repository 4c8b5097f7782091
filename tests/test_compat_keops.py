"""`mmfast.compat.keops`: each formula against itself written in dense tensors, and some against pykeops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numerics import assert_compiles_with_symbols
from pairwise import assert_same

from mmfast.compat import keops
from mmfast.compat.keops import LazyTensor, Pm, Vi, Vj


class Dense:
    """What the formulas need of LazyTensor, with tensors ``(..., M, N, D)``; summed features keep a dimension of 1."""

    def __init__(self, values):
        self.values = values

    def _apply(self, function, *others):
        return Dense(function(self.values, *(o.values if isinstance(o, Dense) else o for o in others)))

    def __add__(self, other):
        return self._apply(lambda a, b: a + b, other)

    __radd__ = __add__

    def __mul__(self, other):
        return self._apply(torch.mul, other)

    __rmul__ = __mul__

    def __sub__(self, other):
        return self + (-1 * other if not isinstance(other, Dense) else other * -1)

    def __rsub__(self, other):
        return self * -1 + other

    def __neg__(self):
        return self * -1

    def __truediv__(self, other):
        return self._apply(torch.div, other)

    def __rtruediv__(self, other):
        return other * self**-1

    def __pow__(self, other):
        return self._apply(torch.pow, other)

    def __abs__(self):
        return self._apply(torch.abs)

    def __or__(self, other):
        return (self * other).sum(-1)

    def exp(self):
        return self._apply(torch.exp)

    def sqrt(self):
        return Dense(torch.where(self.values > 0, self.values, 1).sqrt() * (self.values > 0))

    def rsqrt(self):
        return self._apply(torch.rsqrt)

    def square(self):
        return self**2

    def norm2(self):
        return self.square().sum(-1).sqrt()

    def sqdist(self, other):
        return (self - other).square().sum(-1)

    def sum(self, axis):
        assert axis == -1
        return self._apply(lambda v: v.sum(-1, keepdim=True))


SCALES = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)


def matern52(x, y):
    square = ((x - y) ** 2).sum(-1)
    distance = (square + 1e-20).sqrt()
    return (math.sqrt(5) * distance + (1 + 5.0 / 3.0 * square)) * (-math.sqrt(5) * distance).exp()


def matern32(x, y):
    distance = math.sqrt(3) * (x - y).norm2() / 1.3
    return (1 + distance) * (-distance).exp()


def mixture(x, y):
    square = x.sqdist(y)
    return sum(w * (-square / b).exp() for w, b in ((1.0, 0.5), (2.0, 1.0), (0.5, 4.0)))


FORMULAS = {
    "gaussian": lambda x, y: (-((x - y) ** 2).sum(-1) / (2 * 0.7**2)).exp(),
    "gaussian, the other way round": lambda x, y: (-(y - x).square().sum(-1) * 0.3).exp(),
    "gaussian of scaled points": lambda x, y: (-0.5 * ((x / 0.7 - y / 0.7) ** 2).sum(-1)).exp(),
    "gaussian, divided before the sum": lambda x, y: (-((x - y) ** 2 / 3.0).sum(-1)).exp(),
    "gaussian of a scale for each feature": lambda x, y: (-(((x - y) / SCALES) ** 2).sum(-1)).exp(),
    "gaussian of weighted features": lambda x, y: (-((x - y) ** 2 * SCALES).sum(-1)).exp(),
    "gaussian of shifted points": lambda x, y: (-((x * 2 + SCALES) - (y - SCALES)).square().sum(-1) / 9).exp(),
    "gaussian with a constant": lambda x, y: 3 * (0.5 - x.sqdist(y)).exp(),
    "product of gaussians": lambda x, y: (-x.sqdist(y)).exp() * (-x.sqdist(y) / 3).exp(),
    "square of a laplacian": lambda x, y: (-(x - y).norm2()).exp() ** 2,
    "laplacian": lambda x, y: (-((x - y) ** 2).sum(-1).sqrt() / 1.3).exp(),
    "laplacian in L1": lambda x, y: (-abs(x - y).sum(-1) / 1.3).exp(),
    "matern32": matern32,
    "matern52": matern52,
    "cauchy": lambda x, y: 1 / (1 + x.sqdist(y) / 2.0),
    "inverse multiquadric": lambda x, y: 1 / (1.7**2 + x.sqdist(y)).sqrt(),
    "inverse multiquadric by rsqrt": lambda x, y: 2 * (1.7**2 + x.sqdist(y)).rsqrt(),
    "half an inverse multiquadric": lambda x, y: 1 / (2 * (1.7**2 + x.sqdist(y)).sqrt()),
    "rational quadratic": lambda x, y: (1 + x.sqdist(y) / (2 * 0.8 * 1.1**2)) ** -0.8,
    "linear": lambda x, y: (x * y).sum(-1),
    "linear, written x | y": lambda x, y: 0.5 * (x | y),
    "polynomial": lambda x, y: ((x | y) / 3 + 1.0) ** 3,
    "energy": lambda x, y: -(x - y).norm2(),
    "mixture": mixture,
    "several scales": lambda x, y: (-x.sqdist(y)).exp() + 0.5 * (-(x / 2 - y / 2).norm2()).exp() - (x | y),
}


def points(m, n, d=3, batch_x=(), batch_y=()):
    x = torch.randn(*batch_x, m, d, dtype=torch.float64, requires_grad=True)
    y = torch.randn(*batch_y, n, d, dtype=torch.float64, requires_grad=True)
    return x, y


def both(formula, x, y):
    """The lazy kernel, and the dense one ``(..., M, N)``."""
    lazy = formula(LazyTensor(x[..., :, None, :]), LazyTensor(y[..., None, :, :]))
    return lazy, formula(Dense(x[..., :, None, :]), Dense(y[..., None, :, :])).values[..., 0]


@pytest.mark.parametrize("name", FORMULAS)
def test_formula(name):
    x, y = points(7, 5)
    b = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    lazy, dense = both(FORMULAS[name], x, y)
    assert lazy.shape == (7, 5) and lazy.dim() == 3 and lazy.dtype == torch.float64
    assert_same(lazy @ b, dense @ b, (x, y, b), rtol=1e-9)
    assert_same(lazy @ b[:, 0], dense @ b[:, 0], (x, y, b), rtol=1e-9)
    assert_same(lazy.sum(1), dense.sum(1, keepdim=True), (x, y), rtol=1e-9, atol=1e-12)
    assert_same(lazy.sum(dim=0), dense.sum(0)[:, None], (x, y), rtol=1e-9, atol=1e-12)


def test_transpose_and_vectors():
    x, y = points(7, 5)
    lazy, dense = both(FORMULAS["mixture"], x, y)
    a, b = torch.randn(7, 2, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    assert lazy.t().shape == (5, 7)
    assert_same(lazy.T @ a, dense.T @ a, (x, y))
    assert_same(lazy.matvec(b), dense @ b, (x, y))
    assert_same(lazy.rmatvec(a[:, 0]), dense.T @ a[:, 0], (x, y))
    weighted = lazy * Vj(b)
    assert weighted.shape == (7, 5, 3)
    assert_same(weighted.sum(1), dense @ b, (x, y))
    assert_same((Vj(b) * lazy).sum_reduction(dim=1), dense @ b, (x, y))
    assert_same((2 * weighted).sum(0), 2 * dense.sum(0)[:, None] * b, (x, y))
    assert_same((lazy * Vi(a)).sum(axis=0), dense.T @ a, (x, y))


@pytest.mark.parametrize("batch_x,batch_y,batch_v", [((3,), (3,), (3,)), ((2, 3), (3,), ()), ((), (2,), (2,))], ids=str)
def test_batches(batch_x, batch_y, batch_v):
    x, y = points(6, 4, 3, batch_x, batch_y)
    b = torch.randn(*batch_v, 4, 2, dtype=torch.float64)
    lazy, dense = both(FORMULAS["gaussian"], x, y)
    assert lazy.shape == dense.shape
    assert_same(lazy @ b, dense @ b, (x, y))
    assert_same(lazy.sum(lazy.dim() - 2), dense.sum(-1, keepdim=True), (x, y))


def test_parameters_have_gradients():
    x, y = points(6, 4)
    sigma, weight = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.7, 1.5))
    scales = SCALES.clone().requires_grad_()
    b = torch.randn(4, 2, dtype=torch.float64)

    def formula(x, y, parameter):
        return weight * (-((x / parameter(scales) - y / parameter(scales)) ** 2).sum(-1) / (2 * sigma**2)).exp()

    lazy = formula(Vi(x), Vj(y), Pm)
    dense = formula(Dense(x[:, None]), Dense(y[None]), lambda s: s).values[..., 0]
    assert_same(lazy @ b, dense @ b, (x, y, sigma, weight, scales))
    learned = both(lambda x, y: (weight + x.sqdist(y)) ** -sigma, x, y)
    assert_same(learned[0] @ b, learned[1] @ b, (x, y, sigma, weight))


def test_same_points_twice_are_one_sweep(monkeypatch):
    x, y = points(6, 4)
    calls = []
    monkeypatch.setattr(keops, "kernel_matmul", lambda *args: calls.append(args) or torch.ones(6, 1))
    square = [LazyTensor(x[:, None, :]).sqdist(LazyTensor(y[None, :, :])) for _ in range(5)]
    sum((-s / (i + 1)).exp() for i, s in enumerate(square)).sum(1)
    assert len(calls) == 1
    sum((-s.sqrt() / (i + 1)).exp() for i, s in enumerate(square)).sum(1)
    assert len(calls) == 2
    (square[0].sqrt() + (Vi(x.detach()) | Vj(y))).sum(1)
    assert len(calls) == 4


def test_detached_points_are_others():
    x, y = points(5, 4)
    first, second = Vi(x).sqdist(Vj(y)), Vi(x.detach()).sqdist(Vj(y))
    with pytest.raises(NotImplementedError):
        (-first).exp() * (-second).exp()


def test_coincident_points_are_finite():
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    for name in ("laplacian", "matern52", "energy"):
        lazy, _ = both(FORMULAS[name], x, x)
        (gradient,) = torch.autograd.grad(lazy.sum(1).sum(), x)
        assert gradient.isfinite().all()


def test_rejects():
    x, y = points(4, 5)
    i, j = Vi(x), Vj(y)
    square = i.sqdist(j)
    for formula in (
        lambda: (i | j).exp(),
        lambda: square @ torch.ones(5),
        lambda: square.exp() @ torch.ones(5),
        lambda: (1 + square.sqrt()) @ torch.ones(5),
        lambda: ((1 + 2 * square.sqrt()) * (-square.sqrt()).exp()) @ torch.ones(5),
        lambda: ((1 + square) * (-square).exp()) @ torch.ones(5),
        lambda: (1 + square).sqrt() @ torch.ones(5),
        lambda: (-square).exp() + 1.0,
        lambda: (-square - square.sqrt()).exp() @ torch.ones(5),
        lambda: square * square,
        lambda: 1 / square,
        lambda: (i - j).sum(-1),
        lambda: (i - j).exp(),
        lambda: i - i,
        lambda: (i - j) @ torch.ones(5),
        lambda: (-square).exp() * j * j,
        lambda: Vi(0, 3),
        lambda: abs(square),
    ):
        with pytest.raises(NotImplementedError, match=r"is not a formula that mmfast recognises"):
            formula()
    with pytest.raises(ValueError, match="as many features"):
        i - Vj(y[:, :2])
    with pytest.raises(ValueError, match="or axis be given"):
        LazyTensor(x)
    with pytest.raises(ValueError, match="axis must be 0 for i, 1 for j or -1, got 3"):
        (-square).exp().sum(3)
    with pytest.raises(TypeError, match="x must be a tensor"):
        LazyTensor("x")
    with pytest.raises(ValueError, match="v must be"):
        (-square).exp() @ torch.ones(4, dtype=torch.float64)


@pytest.mark.peer
@pytest.mark.slow
def test_drop_in():
    """Values only: pykeops compiles each formula and each gradient, which takes some ten seconds the first time.

    One test for all: two processes that compile the same at once are in each other's way.
    """
    theirs = pytest.importorskip("pykeops.torch")
    x, y = (t.detach() for t in points(7, 5))
    b = torch.randn(5, 2, dtype=torch.float64)
    for name in ("gaussian of scaled points", "matern52"):
        ours, expected = (FORMULAS[name](module.Vi(x), module.Vj(y)) for module in (keops, theirs))
        assert ours.shape == expected.shape and ours.dim() == expected.dim()
        torch.testing.assert_close(ours @ b, expected @ b, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close((ours * Vj(b)).sum(axis=1), expected @ b, rtol=1e-9, atol=1e-12)


def test_compile_fullgraph():
    def smoothed(x, y):
        return (-((Vi(x) - Vj(y)) ** 2).sum(-1) / 2).exp().sum(1)

    assert_compiles_with_symbols(smoothed, torch.randn(6, 3), torch.randn(5, 3))


def test_numbers_of_numpy():
    x, y = points(7, 5)
    square = ((Vi(x) - Vj(y)) ** 2).sum(-1)
    b = torch.randn(5, 2, dtype=torch.float64)
    for number in (np.float32(2), np.int64(2)):
        assert torch.equal((-square / number).exp() @ b, (-square / 2.0).exp() @ b)
