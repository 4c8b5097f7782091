"""`mmfast.compat.geomloss` against geomloss, and where that is wrong against the definition."""

from __future__ import annotations

import inspect

import pytest
import torch
from numerics import assert_compiles_with_symbols
from pairwise import assert_same, biased, matrix, samples

from mmfast import kernels
from mmfast.compat.geomloss import SamplesLoss

LOSSES = [("gaussian", 0.7), ("gaussian", 2.0), ("laplacian", 0.7), ("energy", 0.05)]


def gram(x, y, loss, blur):
    def kernel(p, q):
        square = (p - q).square().sum()
        distance = square.sqrt() if square > 0 else square * 0
        return {
            "gaussian": (-square / (2 * blur**2)).exp(),
            "laplacian": (-distance / blur).exp(),
            "energy": -distance,
        }[loss]

    z = torch.cat([x, y])
    return matrix(kernel, z, z)


def measures(n, m, d=3, batch=(), kind="positive"):
    """Weights and points of two measures; those of ``kind`` ``"signed"`` sum to anything."""
    x, y = torch.randn(*batch, n, d), torch.randn(*batch, m, d) + 0.5
    a, b = torch.rand(*batch, n), torch.rand(*batch, m)
    if kind == "signed":
        a, b = a - 0.7, b + 0.3
    elif kind == "positive":
        a, b = a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)
    return [t.double().requires_grad_() for t in (a, x, b, y)]


@pytest.mark.parametrize("loss,blur", LOSSES)
@pytest.mark.parametrize("n,m", [(5, 5), (6, 4)])
@pytest.mark.parametrize("kind", ["positive", "signed"])
def test_definition(loss, blur, n, m, kind):
    a, x, b, y = measures(n, m, kind=kind)
    k = gram(x, y, loss, blur)
    criterion = SamplesLoss(loss, blur=blur)
    assert_same(criterion(a, x, b, y), 0.5 * biased(k, n, a, b), (a, x, b, y))
    assert_same(criterion(x, y), 0.5 * biased(k, n), (x, y))
    w = torch.cat([a, -b])
    f, g = SamplesLoss(loss, blur=blur, potentials=True)(a, x, b, y)
    assert_same(f, (k @ w)[:n], (a, x, b, y))
    assert_same(g, -(k @ w)[n:], (a, x, b, y))


@pytest.mark.peer
@pytest.mark.parametrize("loss,blur", LOSSES)
@pytest.mark.parametrize("batch", [(), (3,), (1,)], ids=str)
@pytest.mark.parametrize("n,m,d", [(7, 7, 3), (20, 13, 1), (9, 30, 16)])
@pytest.mark.parametrize("kind", ["none", "positive", "signed"])
def test_drop_in(loss, blur, batch, n, m, d, kind):
    theirs = pytest.importorskip("geomloss").SamplesLoss(loss, blur=blur, backend="tensorized")
    a, x, b, y = measures(n, m, d, batch, kind)
    given = (x, y) if kind == "none" else (a, x, b, y)
    # Its distances come from a Gram matrix and end at 1e-4: what is smaller is off by as much.
    rough = {"rtol": 1e-3, "atol": 3e-4 * abs(a.sum().item()) * abs(b.sum().item())} if loss != "gaussian" else {}
    assert_same(SamplesLoss(loss, blur=blur)(*given), theirs(*given), given, **{"rtol": 1e-9} | rough)
    if kind == "positive" and not batch:
        columns = (a[:, None], x, b[:, None], y)
        assert_same(SamplesLoss(loss, blur=blur)(*columns), theirs(*columns), given, **{"rtol": 1e-9} | rough)


@pytest.mark.peer
@pytest.mark.parametrize("batch", [(), (3,)], ids=str)
def test_drop_in_potentials(batch):
    theirs = pytest.importorskip("geomloss").SamplesLoss("gaussian", blur=0.7, potentials=True, backend="tensorized")
    given = measures(7, 5, 3, batch)
    for actual, expected in zip(
        SamplesLoss("gaussian", blur=0.7, potentials=True)(*given), theirs(*given), strict=True
    ):
        torch.testing.assert_close(actual, expected if batch else expected[0])


@pytest.mark.peer
def test_drop_in_signature():
    theirs = pytest.importorskip("geomloss").SamplesLoss
    ours, expected = (inspect.signature(c).parameters.values() for c in (SamplesLoss, theirs))
    assert [(p.name, p.default) for p in ours] == [(p.name, p.default) for p in expected]


@pytest.mark.parametrize("loss,blur", LOSSES)
def test_double_backward(loss, blur):
    a, x, b, y = measures(4, 3)
    assert torch.autograd.gradgradcheck(SamplesLoss(loss, blur=blur), (a, x, b, y))


def test_blur_changes_and_has_a_gradient():
    (x,), (y,) = samples(5, 4, 3)
    criterion = SamplesLoss("gaussian", blur=1.0)
    first = criterion(x, y)
    criterion.blur = 2.0
    assert criterion(x, y) != first
    blur = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    assert_same(SamplesLoss("gaussian", blur=blur)(x, y), 0.5 * biased(gram(x, y, "gaussian", blur), 5), (x, y, blur))


def test_other_kernel_labels_and_backends():
    a, x, b, y = measures(5, 4)
    matern = SamplesLoss("gaussian", kernel=kernels.Matern(0.7, 0.5))
    expected = SamplesLoss("laplacian", blur=0.7)(a, x, b, y)
    torch.testing.assert_close(matern(a, x, b, y), expected)
    labels = torch.zeros(5, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
    for backend in ("auto", "multiscale"):
        criterion = SamplesLoss("laplacian", blur=0.7, backend=backend)
        assert criterion(labels[0], a, x, labels[1], b, y) == expected
    assert SamplesLoss("energy")(x.half(), y.half()).dtype == torch.float32


def test_coincident_points_are_finite():
    x = torch.zeros(4, 3, requires_grad=True)
    loss = SamplesLoss("energy")(x, torch.zeros(2, 3))
    loss.backward()
    assert loss == 0 and x.grad.count_nonzero() == 0


def test_six_arguments_without_labels():
    a, x, b, y = measures(5, 4)
    criterion = SamplesLoss("gaussian", backend="tensorized")
    assert criterion(None, a, x, None, b, y) == criterion(a, x, b, y)


@pytest.mark.parametrize("loss,blur", LOSSES)
def test_potentials_of_an_empty_measure(loss, blur):
    _, x, _, y = measures(5, 4)
    f, g = SamplesLoss(loss, blur=blur, potentials=True)(x[:0], y)
    assert f.shape == (0,)
    torch.testing.assert_close(g, gram(y, y[:0], loss, blur).mean(1))


def test_rejects():
    a, x, b, y = measures(5, 4)
    for name in ("sinkhorn", "hausdorff"):
        with pytest.raises(ValueError, match=f"got '{name}': optimal transport is not offered"):
            SamplesLoss(name)
    with pytest.raises(ValueError, match="'gaussian', 'laplacian', 'energy', got 'sinkhorn'"):
        SamplesLoss()
    with pytest.raises(TypeError, match=r"kernel must be a kernel of mmfast\.kernels, got function"):
        SamplesLoss("gaussian", kernel=lambda x, y, **_: x @ y.T)
    with pytest.raises(ValueError, match="backend must be"):
        SamplesLoss("gaussian", backend="cuda")
    criterion = SamplesLoss("gaussian", backend="online")
    with pytest.raises(ValueError, match="got 3 arguments"):
        criterion(a, x, y)
    with pytest.raises(ValueError, match="labels are for"):
        criterion(torch.zeros(5), a, x, None, b, y)
    with pytest.raises(ValueError, match=r"blur must be positive and finite, got 0\.0"):
        SamplesLoss("laplacian", blur=0.0)(x, y)
    with pytest.raises(ValueError, match=r"b must be a tensor \(4,\) or \(4, 1\), got \(5,\)"):
        criterion(a, x, a, y)
    with pytest.raises(ValueError, match="same number of features"):
        criterion(x, y[:, :2])


@pytest.mark.parametrize("potentials", [False, True])
@pytest.mark.parametrize("loss,blur", LOSSES)
def test_compile_with_numbers_as_symbols(loss, blur, potentials):
    criterion = SamplesLoss(loss, blur=blur, potentials=potentials)
    assert_compiles_with_symbols(criterion, torch.randn(6, 3), torch.randn(5, 3))
