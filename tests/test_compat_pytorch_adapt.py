"""`mmfast.compat.pytorch_adapt` against pytorch-adapt, and its bandwidth against the definition."""

from __future__ import annotations

import copy

import pytest
import torch
from pairwise import assert_same, samples, unbiased

from mmfast.compat import pytorch_adapt as ours

SCALES = [1, 0.3, torch.tensor([0.5, 2.0, 7.0]), torch.tensor(2.0), ours.get_kernel_scales()]


def gram(x, y, scales, bandwidth=None):
    z = torch.cat([x, y])
    square = (z[:, None] - z[None]).square().sum(2)
    if bandwidth is None:
        values = square[: len(x), : len(x)].detach().flatten().sort().values
        bandwidth = values[(len(values) - 1) // 2]
    scales = torch.as_tensor(scales, dtype=torch.float64).reshape(-1).tolist()
    return sum(torch.exp(-square * scale / bandwidth) for scale in scales) / len(scales)


def disjoint(k, n):
    pairs = [(i, i + 1) for i in range(0, n - 1, 2)]
    return sum(k[i, j] + k[n + i, n + j] - k[i, n + j] - k[j, n + i] for i, j in pairs) / len(pairs)


@pytest.mark.parametrize("bandwidth", [None, 2.5])
@pytest.mark.parametrize("scales", SCALES, ids=["1", "0.3", "three", "tensor", "all"])
@pytest.mark.parametrize("kind,n,m", [("linear", 7, 7), ("quadratic", 7, 7), ("quadratic", 6, 9)])
def test_definition(kind, n, m, scales, bandwidth):
    (x,), (y,) = samples(n, m, 3)
    k = gram(x, y, scales, bandwidth)
    expected = disjoint(k, n) if kind == "linear" else unbiased(k, n)
    assert_same(ours.MMDLoss(scales, kind, bandwidth=bandwidth)(x, y), expected, (x, y))


@pytest.mark.peer
@pytest.mark.parametrize("bandwidth", [None, 2.5])
@pytest.mark.parametrize("scales", SCALES, ids=["1", "0.3", "three", "tensor", "all"])
@pytest.mark.parametrize("widths", [(3,), (3, 2), (30, 4, 2)], ids=str)
@pytest.mark.parametrize("kind,n,m", [("linear", 8, 8), ("linear", 7, 7), ("quadratic", 7, 7), ("quadratic", 6, 9)])
def test_drop_in(kind, n, m, widths, scales, bandwidth):
    theirs = pytest.importorskip("pytorch_adapt.layers")
    x, y = samples(n, m, *widths)
    given = (x, y) if len(widths) > 1 else (x[0], y[0])
    expected = theirs.MMDLoss(scales, kind, bandwidth=bandwidth)(*given)
    actual = ours.MMDLoss(scales, kind, bandwidth=bandwidth)(*given)
    inputs = [*given[0], *given[1]] if len(widths) > 1 else given
    assert_same(actual, expected.reshape(()), inputs, rtol=1e-9)


@pytest.mark.peer
@pytest.mark.parametrize("batch_size", [1024, 5, 4])
@pytest.mark.parametrize("bandwidth", [None, 2.5])
@pytest.mark.parametrize("scales", SCALES[1:3], ids=["0.3", "three"])
def test_drop_in_batched(scales, bandwidth, batch_size):
    theirs = pytest.importorskip("pytorch_adapt.layers")
    (x,), (y,) = samples(13, 10, 3)
    options = {"kernel_scales": scales, "mmd_type": "quadratic", "bandwidth": bandwidth, "batch_size": batch_size}
    assert_same(ours.MMDBatchedLoss(**options)(x, y), theirs.MMDBatchedLoss(**options)(x, y), (x, y), rtol=1e-9)


@pytest.mark.peer
def test_drop_in_names():
    theirs = pytest.importorskip("pytorch_adapt.layers.utils")
    for options in ({}, {"low": -2, "high": 1, "num_kernels": 5, "base": 10.0}):
        assert torch.equal(ours.get_kernel_scales(**options), theirs.get_kernel_scales(**options))
    distances = pytest.importorskip("pytorch_metric_learning.distances")
    x, y = torch.randn(6, 3), torch.randn(6, 3)
    same = distances.LpDistance(normalize_embeddings=False, p=2, power=2)
    assert ours.MMDLoss(dist_func=same)(x, y) == ours.MMDLoss()(x, y)
    for other in (distances.LpDistance(), distances.LpDistance(p=1, power=2, normalize_embeddings=False)):
        with pytest.raises(ValueError, match="dist_func must be None or LpDistance"):
            ours.MMDLoss(dist_func=other)


def test_batched_bandwidth_is_a_median_of_medians():
    (x,), (y,) = samples(11, 6, 3)
    square = (x[:, None] - x[None]).square().sum(2).detach()
    medians = [block.flatten().sort().values[(block.numel() - 1) // 2] for block in square.split(4)]
    bandwidth = sorted(medians)[1]
    actual = ours.MMDBatchedLoss(4, kernel_scales=0.3, mmd_type="quadratic")(x, y)
    assert_same(actual, unbiased(gram(x, y, 0.3, bandwidth), 11), (x, y))


def test_copies_are_independent():
    x, y = torch.randn(6, 3), torch.randn(6, 3)
    loss = ours.MMDLoss(torch.tensor([1.0, 2.0]))
    other = copy.deepcopy(loss)
    other.bandwidth = 3.0
    assert loss(x, y) != other(x, y)
    assert "mmd_type=linear, kernel_scales=tensor([1., 2.])" in repr(loss)


def test_scales_survive_a_call_on_meta():
    x, y = torch.randn(6, 3), torch.randn(6, 3)
    loss = ours.MMDLoss(torch.tensor([1.0, 2.0]))
    expected = loss(x, y)
    loss(x.to("meta"), y.to("meta"))
    assert torch.equal(loss(x, y), expected)


def test_rejects():
    x = torch.randn(4, 3)
    with pytest.raises(ValueError, match="'linear' or 'quadratic', got 'cubic'"):
        ours.MMDLoss(mmd_type="cubic")
    with pytest.raises(ValueError, match="mmd_type must be 'quadratic'"):
        ours.MMDBatchedLoss()
    with pytest.raises(ValueError, match="same shape"):
        ours.MMDLoss()(x, x[:3])
    with pytest.raises(ValueError, match="at least 2 rows"):
        ours.MMDLoss()(x[:1], x[:1])
    with pytest.raises(TypeError, match="no lists"):
        ours.MMDBatchedLoss(mmd_type="quadratic")([x], [x])
    with pytest.raises(ValueError, match="bandwidth must be positive"):
        ours.MMDLoss(bandwidth=0)
    with pytest.raises(ValueError, match="kernel_scales"):
        ours.MMDLoss(torch.ones(2, 2))
