"""`mmfast.compat.ignite` against ignite."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("ignite.metrics")

import ignite.metrics as theirs
from ignite.engine import Engine
from ignite.exceptions import NotComputableError

from mmfast.compat import ignite as ours

pytestmark = pytest.mark.peer


def batches(shape=(6,), sizes=(20, 20, 13), shift: float = 0.5, dtype=torch.float64):
    return [(torch.randn(n, *shape, dtype=dtype), torch.randn(n, *shape, dtype=dtype) + shift) for n in sizes]


def dependent(sizes=(20, 20, 13), dtype=torch.float64):
    pairs = []
    for n in sizes:
        x = torch.randn(n, 4, dtype=dtype)
        pairs.append((x, torch.cat((x.sin(), torch.randn(n, 2, dtype=dtype)), dim=1)))
    return pairs


def computed(metric, pairs) -> float:
    for pair in pairs:
        metric.update(pair)
    return metric.compute()


@pytest.mark.parametrize("shape", [(6,), (2, 3), (2, 2, 2)], ids=str)
@pytest.mark.parametrize("options", [{}, {"var": 7.5}, {"var": 3}], ids=str)
def test_drop_in_mmd(options, shape):
    pairs = batches(shape)
    found = computed(ours.MaximumMeanDiscrepancy(**options), pairs)
    expected = computed(theirs.MaximumMeanDiscrepancy(**options), pairs)
    assert isinstance(found, float)
    assert found > 0.05
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("options", [{}, {"sigma_x": 1.3}, {"sigma_x": 2, "sigma_y": 0.7}], ids=str)
@pytest.mark.parametrize("sizes", [(20, 20, 13), (5, 3, 4)], ids=str)
def test_drop_in_hsic(options, sizes):
    pairs = dependent(sizes)
    found = computed(ours.HSIC(**options), pairs)
    assert isinstance(found, float)
    assert found > 1e-3
    assert found == pytest.approx(computed(theirs.HSIC(**options), pairs), rel=2e-6)


def test_documented_hsic():
    """The example of ignite's documentation."""
    x = torch.arange(50.0).view(10, 5)
    y = torch.sin(x * torch.pi * 2 / 50)
    assert computed(ours.HSIC(), [(x, y)]) == pytest.approx(0.09226646274328232, rel=1e-5)


@pytest.mark.parametrize("name", ["MaximumMeanDiscrepancy", "HSIC"])
def test_clamped(name):
    """Equal samples: a negative MMD² and, of many independent batches, a positive mean."""
    generator = torch.Generator().manual_seed(5)
    pairs = [(torch.randn(8, 3, generator=generator), torch.randn(8, 3, generator=generator)) for _ in range(5)]
    found, expected = computed(getattr(ours, name)(), pairs), computed(getattr(theirs, name)(), pairs)
    assert found == pytest.approx(expected, rel=1e-4)
    same = torch.randn(10, 2)
    assert computed(ours.MaximumMeanDiscrepancy(), [(same, same)]) == 0


@pytest.mark.parametrize("name", ["MaximumMeanDiscrepancy", "HSIC"])
def test_in_an_engine(name):
    engine, values = Engine(lambda _, batch: {"out": batch}), {}
    getattr(ours, name)(output_transform=lambda output: output["out"]).attach(engine, "found")
    getattr(theirs, name)(output_transform=lambda output: output["out"]).attach(engine, "expected")
    values = engine.run(dependent() if name == "HSIC" else batches()).metrics
    assert values["found"] == pytest.approx(values["expected"], rel=2e-6)


@pytest.mark.parametrize("name", ["MaximumMeanDiscrepancy", "HSIC"])
def test_state_dict_both_ways(name):
    pairs = dependent() if name == "HSIC" else batches()
    results = []
    for first, second in ((ours, theirs), (theirs, ours)):
        half, rest = getattr(first, name)(), getattr(second, name)()
        half.update(pairs[0])
        rest.load_state_dict(half.state_dict())
        results.append(computed(rest, pairs[1:]))
    expected = computed(getattr(theirs, name)(), pairs)
    assert results == pytest.approx([expected, expected], rel=2e-6)


def test_far_from_the_origin():
    """A mean of 100 leaves nothing of ignite's float32 distances."""
    pairs = batches(dtype=torch.float32, shift=1.0)
    far = [(x + 100, y + 100) for x, y in pairs]
    assert computed(ours.MaximumMeanDiscrepancy(), far) == pytest.approx(
        computed(ours.MaximumMeanDiscrepancy(), pairs), rel=1e-4
    )


def test_rejects():
    mmd = ours.MaximumMeanDiscrepancy()
    with pytest.raises(NotComputableError):
        mmd.compute()
    with pytest.raises(ValueError, match="same shape"):
        mmd.update((torch.randn(4, 3), torch.randn(5, 3)))
    with pytest.raises(ValueError, match="in the shape of"):
        mmd.update((torch.randn(4), torch.randn(4)))
    with pytest.raises(ValueError, match="at least 2 rows"):
        mmd.update((torch.randn(1, 3), torch.randn(1, 3)))
    with pytest.raises(ValueError, match="at least four samples, got only 3"):
        ours.HSIC(ignore_invalid_batch=False).update((torch.randn(3, 2), torch.randn(3, 2)))


def test_without_ignite(run_without):
    with pytest.raises(ImportError, match=r"ignite needs the package pytorch-ignite: pip install pytorch-ignite$"):
        run_without("ignite", ours)
