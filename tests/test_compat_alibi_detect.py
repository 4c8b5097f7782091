"""`mmfast.compat.alibi_detect` against its definition in loops, and against alibi-detect where it is installed."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch

import mmfast
from mmfast import kernels
from mmfast.compat import alibi_detect as ours


@pytest.fixture
def theirs():
    """alibi_detect.utils.pytorch, with the classes of the other modules."""
    for name in ("distance", "kernels"):
        module = pytest.importorskip(f"alibi_detect.utils.pytorch.{name}", exc_type=ImportError)
        for attribute in ("squared_pairwise_distance", "mmd2", "mmd2_from_kernel_matrix", "sigma_median"):
            if hasattr(module, attribute):
                setattr(Theirs, attribute, staticmethod(getattr(module, attribute)))
    Theirs.GaussianRBF = module.GaussianRBF
    Theirs.MMDDrift = pytest.importorskip("alibi_detect.cd", exc_type=ImportError).MMDDrift
    return Theirs


class Theirs:
    pass


def samples(n: int = 14, m: int = 11, d: int = 5, shift: float = 0.5, dtype=torch.float64):
    return torch.randn(n, d, dtype=dtype), 1.2 * torch.randn(m, d, dtype=dtype) + shift


def squares(x, y) -> list[list[float]]:
    return [[math.dist(p, q) ** 2 for q in y.tolist()] for p in x.tolist()]


def sigma_of(x, y, same: bool) -> float:
    values = sorted(value for row in squares(x, y) for value in row)
    own = len(x) if same else 0
    return math.sqrt(values[own + (len(values) - own) // 2 - 1] / 2)


def mmd2_of(x, y, sigmas) -> float:
    def mean(a, b, same):
        values = [
            math.exp(-square / (2 * sigma**2))
            for i, row in enumerate(squares(a, b))
            for j, square in enumerate(row)
            for sigma in sigmas
            if not same or i != j
        ]
        return sum(values) / len(values)

    return mean(x, x, True) + mean(y, y, True) - 2 * mean(x, y, False)


# ---- Against the definition


def test_mmd2():
    x, y = samples()
    sigmas = torch.tensor([0.7, 2.0], dtype=torch.float64)
    assert ours.mmd2(x, y, ours.GaussianRBF(sigmas)).item() == pytest.approx(mmd2_of(x, y, [0.7, 2.0]), rel=1e-10)
    # A kernel without sigma finds it in x, in float32 as its parameter is.
    kernel = ours.GaussianRBF()
    assert ours.mmd2(x, y, kernel).item() == pytest.approx(mmd2_of(x, y, [sigma_of(x, x, True)]), rel=1e-6)
    assert not kernel.init_required
    # Any callable is asked for matrices.
    found = ours.mmd2(x, y, lambda a, b: torch.exp(-torch.cdist(a, b).square() / 2))
    assert found.item() == pytest.approx(mmd2_of(x, y, [1.0]), rel=1e-8)


@pytest.mark.parametrize("sizes", [(14, 14), (13, 13), (14, 11), (13, 11), (1, 1), (2, 2)])
@pytest.mark.parametrize("same", [False, True])
def test_sigma(sizes, same):
    x, y = samples(*sizes)
    y = x.clone() if same else y
    if (*sizes, same) == (1, 1, False):
        expected = math.sqrt(squares(x, y)[0][0] / 2)  # the only one
    else:
        expected = max(sigma_of(x, y, same), math.sqrt(0.5e-30))
    dist = ours.squared_pairwise_distance(x, y)
    assert ours.sigma_median(x, y, dist).shape == (1,)
    assert ours.sigma_median(x, y, dist).item() == pytest.approx(expected, rel=1e-9)
    kernel = ours.GaussianRBF()
    kernel(x, y)
    assert kernel.sigma.item() == pytest.approx(expected, rel=1e-5)
    custom = ours.GaussianRBF(init_sigma_fn=lambda a, b, d: d.mean()[None])
    custom(x + 1, y)
    assert custom.sigma.item() == pytest.approx(np.mean(squares(x + 1, y)), rel=1e-6)


def test_kernel():
    x, y = samples()
    x, y = x.view(14, 5, 1), y.view(11, 5, 1)
    kernel = ours.GaussianRBF(torch.tensor([0.7, 2.0], dtype=torch.float64), trainable=True)
    expected = [
        [np.mean([math.exp(-v / 0.98), math.exp(-v / 8)]) for v in row] for row in squares(x[..., 0], y[..., 0])
    ]
    np.testing.assert_allclose(kernel(x, y.numpy()).detach(), expected, rtol=1e-10)
    with pytest.raises(ValueError, match="inferred sigma"):
        kernel(x, y, infer_sigma=True)
    # It is a kernel like the others, with a gradient for its sigma.
    assert mmfast.mmd2(x[..., 0], y[..., 0], kernel).item() == pytest.approx(mmd2_of(x[..., 0], y[..., 0], [0.7, 2.0]))
    torch.autograd.gradcheck(
        lambda log_sigma: torch.func.functional_call(Mmd2(kernel), {"kernel.log_sigma": log_sigma}, (x, y)),
        kernel.log_sigma.detach().clone().requires_grad_(),
    )
    with pytest.raises(ValueError, match="no sigma yet"):
        mmfast.mmd2(torch.randn(2, 5, 3), torch.randn(2, 5, 3), ours.GaussianRBF())


class Mmd2(torch.nn.Module):
    def __init__(self, kernel):
        super().__init__()
        self.kernel = kernel

    def forward(self, x, y):
        return ours.mmd2(x, y, self.kernel)


def test_from_kernel_matrix():
    x, y = samples()
    z = torch.cat((x, y))
    matrix = ours.GaussianRBF(torch.tensor(1.5, dtype=torch.float64))(z, z)
    expected = mmd2_of(x, y, [1.5])
    assert ours.mmd2_from_kernel_matrix(matrix, 11).item() == pytest.approx(expected, rel=1e-10)
    without = matrix - torch.diag(matrix.diag())
    assert ours.mmd2_from_kernel_matrix(without, 11, zero_diag=False).item() == pytest.approx(expected, rel=1e-10)
    torch.manual_seed(4)
    found = ours.mmd2_from_kernel_matrix(matrix, 11, permute=True)
    torch.manual_seed(4)
    order = torch.randperm(25)
    assert found.item() == pytest.approx(mmd2_of(z[order][:14], z[order][14:], [1.5]), rel=1e-10)
    with pytest.raises(ValueError, match="kernel_mat must be"):
        ours.mmd2_from_kernel_matrix(matrix, 24)


def score_of(x_ref, x, sigmas, count: int, seed: int) -> tuple[float, list[float]]:
    """MMD² and the null sample that torch's random state gives."""
    z = torch.cat((x_ref, x))
    torch.manual_seed(seed)
    null = []
    for _ in range(count):
        order = torch.randperm(len(z))
        null.append(mmd2_of(z[order][: len(x_ref)], z[order][len(x_ref) :], sigmas))
    return mmd2_of(x_ref, x, sigmas), null


@pytest.mark.parametrize("backend", ["PyTorch", "keops"])
@pytest.mark.parametrize("configure", [True, False])
def test_score(backend, configure):
    x_ref, x = torch.randn(17, 3, dtype=torch.float64).split((9, 8))
    detector = ours.MMDDrift(
        x_ref.numpy(), backend=backend, n_permutations=40, configure_kernel_from_x_ref=configure, p_val=0.2
    )
    if backend == "PyTorch":
        sigma = sigma_of(x_ref, x_ref, True) if configure else sigma_of(x_ref, x, False)
    elif configure:
        sigma = math.sqrt(sum(map(sum, squares(x_ref, x_ref))) / (9 * 8) / 2)
    else:
        sigma = math.sqrt(np.mean(squares(x_ref, x)) / 2)
    expected, null = score_of(x_ref, x, [sigma], 40, 3)
    larger = sum(value >= expected for value in null)
    assert 0 < larger < 40
    torch.manual_seed(3)
    p_value, distance, threshold = detector.score(x.numpy())
    assert distance == pytest.approx(expected, rel=1e-5)
    assert p_value == pytest.approx((1 + larger) / 41)
    assert (distance > threshold) == (p_value < 0.2)
    assert any(threshold == pytest.approx(value, rel=1e-5) for value in null)
    detector.corrected = False
    torch.manual_seed(3)
    p_value, distance, threshold = detector.score(x.numpy())
    assert p_value == pytest.approx(larger / 40)
    assert threshold == pytest.approx(sorted(null, reverse=True)[8], rel=1e-5)


def test_threshold_is_where_drift_begins():
    """Drift is flagged exactly above the threshold, whatever the data."""
    flagged = []
    for seed in range(40):
        torch.manual_seed(seed)
        x_ref, x = samples(9, 8, 2, 0.7)
        for count in (19, 40):
            detector = ours.MMDDrift(x_ref.numpy(), n_permutations=count, p_val=0.1)
            data = detector.predict(x.numpy())["data"]
            assert data["is_drift"] == (data["distance"] > data["distance_threshold"])
            flagged.append(data["is_drift"])
    assert 0 < sum(flagged) < len(flagged)
    few = ours.MMDDrift(x_ref.numpy(), n_permutations=9, p_val=0.1).predict(x.numpy() + 100)["data"]
    assert (few["is_drift"], few["p_val"], few["distance_threshold"]) == (0, 0.1, math.inf)


def test_predict():
    x_ref, x = (a.float().numpy() for a in samples(60, 50, 4, 3.0))
    detector = ours.MMDDrift(x_ref, backend="pytorch", data_type="tabular")
    found = detector.predict(x)
    assert found["meta"] == {
        "name": "MMDDrift",
        "online": False,
        "data_type": "tabular",
        "version": mmfast.__version__,
        "detector_type": "drift",
        "backend": "pytorch",
    }
    data = found["data"]
    assert (data["is_drift"], data["threshold"]) == (1, 0.05)
    assert data["p_val"] == pytest.approx(1 / 101)
    assert data["distance"] > data["distance_threshold"]
    short = detector.predict(x, return_p_val=False, return_distance=False)["data"]
    assert short == {"is_drift": 1, "distance": None, "p_val": None, "threshold": None}
    assert detector.predict(x_ref[::2])["data"]["is_drift"] == 0
    assert detector.input_shape == (4,)


@pytest.mark.parametrize("sigma", [1.5, np.array([1.5]), np.array([1, 2]), torch.tensor(1.5)], ids=str)
def test_sigma_is_used(sigma):
    x_ref, x = samples()
    detector = ours.MMDDrift(x_ref.numpy(), sigma=sigma)
    values = np.atleast_1d(np.asarray(sigma)).tolist()
    assert detector.score(x.numpy())[1] == pytest.approx(mmd2_of(x_ref, x, values), rel=1e-5)


def test_kernels():
    x_ref, x = samples()
    laplacian = ours.MMDDrift(x_ref.numpy(), kernel=kernels.Laplacian("median"))
    assert laplacian.score(x.numpy())[1] == pytest.approx(mmfast.mmd2(x_ref, x, kernels.Laplacian("median")).item())
    given = torch.tensor([9.0])
    expected = {False: {True: sigma_of(x_ref, x_ref, True), False: 9.0}, True: {True: 9.0, False: 9.0}}
    for trainable, configure in ((False, True), (False, False), (True, True), (True, False)):
        kernel = ours.GaussianRBF(given, trainable=trainable)
        ours.MMDDrift(x_ref.numpy(), kernel=kernel, configure_kernel_from_x_ref=configure).score(x.numpy())
        assert kernel.sigma.item() == pytest.approx(expected[trainable][configure])
    with pytest.raises(TypeError, match="kernel must be a GaussianRBF or a kernel of mmfast"):
        ours.MMDDrift(x_ref.numpy(), kernel=lambda a, b: a @ b.T)


def test_preprocessing():
    x_ref, x = (a.numpy() for a in samples())
    calls = []

    def double(a):
        calls.append(len(a))
        return 2 * a

    for options, counts in (
        ({}, [14, 11]),
        ({"preprocess_at_init": False}, [11, 14]),
        ({"x_ref_preprocessed": True}, [11]),
    ):
        calls.clear()
        ready = options.get("x_ref_preprocessed", False)
        detector = ours.MMDDrift(2 * x_ref if ready else x_ref, preprocess_fn=double, sigma=1.0, **options)
        found = detector.score(x)[1]
        assert found == pytest.approx(mmd2_of(torch.from_numpy(2 * x_ref), torch.from_numpy(2 * x), [1.0]), rel=1e-6)
        assert sorted(calls) == sorted(counts)


def test_update_last():
    x_ref, x = (a.numpy() for a in samples())
    detector = ours.MMDDrift(x_ref, update_x_ref={"last": 16})
    detector.predict(x)
    np.testing.assert_array_equal(detector.x_ref, np.concatenate((x_ref, x))[-16:])
    assert detector.n == 25


def test_update_reservoir():
    """Every point seen stays with the same probability."""
    kept = np.zeros(20)
    points = np.arange(20.0)[:, None]
    detector = ours.MMDDrift(points[:4], update_x_ref={"reservoir_sampling": 6}, sigma=1.0)
    for _ in range(2000):
        detector.x_ref, detector.n = points[:4], 4
        for part in (points[4:5], points[5:9], points[9:]):
            detector.x_ref = detector._updated(part)
            detector.n += len(part)
        kept[detector.x_ref[:, 0].astype(int)] += 1
        assert len(detector.x_ref) == 6
    assert kept.sum() == 12000
    assert np.abs(kept / 2000 - 0.3).max() < 5 * math.sqrt(0.21 / 2000)


def test_rejects():
    x = np.zeros((5, 2))
    for options, message in (
        ({"backend": "jax"}, "backend must be 'tensorflow', 'pytorch' or 'keops', got 'jax'"),
        ({"p_val": 1.5}, "p_val must be between 0 and 1, got 1.5"),
        ({"update_x_ref": {"first": 3}}, "update_x_ref must be"),
        ({"preprocess_fn": 3}, "not a valid Callable"),
        ({"sigma": -1.0}, "positive"),
    ):
        with pytest.raises(ValueError, match=message):
            ours.MMDDrift(x, **options).score(x)
    with pytest.raises(ValueError, match="same number of features"):
        ours.MMDDrift(x, sigma=1.0).score(np.zeros((5, 3)))


# ---- Against alibi-detect


@pytest.mark.peer
def test_drop_in_functions(theirs):
    x, y = samples()
    z = torch.cat((x, y))
    sigma = torch.tensor([0.8, 2.5], dtype=torch.float64)
    results = []
    for library in (ours, theirs):
        a, b = (t.clone().requires_grad_() for t in (x, y))
        kernel = library.GaussianRBF(sigma, trainable=True)
        value = library.mmd2(a, b, kernel)
        dist = library.squared_pairwise_distance(a, b)
        median = library.sigma_median(a, b, dist)
        values = [value, *torch.autograd.grad(value, (a, b, kernel.log_sigma)), dist, median]
        values += [*torch.autograd.grad(dist.square().sum() + median.sum(), (a, b)), kernel(a, b)]
        values += [library.mmd2_from_kernel_matrix(kernel(z, z), 11)]
        torch.manual_seed(5)
        values += [library.mmd2_from_kernel_matrix(kernel(z, z), 11, permute=True)]
        inferred = library.GaussianRBF()
        values += [library.mmd2(x, y, inferred), inferred.sigma, inferred(x, y, infer_sigma=True), inferred.sigma]
        results.append(values)
        assert list(kernel.state_dict()) == ["log_sigma"]
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.peer
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"configure_kernel_from_x_ref": False},
        {"sigma": np.array([0.9, 2.0], dtype=np.float32)},
        {"update_x_ref": {"last": 30}},
        {"update_x_ref": {"reservoir_sampling": 45}},
        {"preprocess_fn": lambda x: x[:, :2] ** 2},
    ],
    ids=lambda options: " ".join(options),
)
def test_drop_in_detector(options, dtype, theirs):
    x_ref, x = (a.numpy() for a in samples(40, 30, 4, 0.15, dtype))
    results = []
    for detector in (
        ours.MMDDrift(x_ref, backend="pytorch", corrected=False, **options),
        theirs.MMDDrift(x_ref, backend="pytorch", **options),
    ):
        torch.manual_seed(11)
        random.seed(11)
        results.append([detector.predict(batch) for batch in (x, x[::-1] + 0.3, x_ref)])
    for found, expected in zip(*results, strict=True):
        assert found["data"] == pytest.approx(expected["data"], rel=1e-5, abs=2e-6)
        assert set(found["meta"]) == set(expected["meta"])
