"""MMD² and the products of kernel matrices against their definitions, on every backend."""

from __future__ import annotations

import itertools
import math

import mmd_definition as definition
import numpy as np
import pytest
import torch
from mmd_definition import KERNELS, PRODUCTS
from numerics import peak_extra_bytes

import mmfast
from mmfast import kernels as k
from mmfast.mmd import reference
from mmfast.mmd._primitives import primitives
from mmfast.mmd.estimators import ESTIMATORS

EQUAL = ("one_sample_u", "linear", "linear_cyclic", "block")  # estimators that need n = m
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# One of each family, metric, transform and rule; a sum over metrics; small enough for finite differences.
SMOOTH = ("gaussian", "dan", "laplacian", "laplacian_l1", "rq", "matern32", "matern52", "poly", "cosine", "energy",
          "sum_of_metrics")  # fmt: skip


def samples(n: int = 13, m: int = 11, d: int = 5, dtype=torch.float64):
    x = torch.randn(n, d, dtype=torch.float64)
    y = 1.3 * torch.randn(m, d, dtype=torch.float64) + 0.4
    return x.to(dtype), y.to(dtype)


def numpy(*tensors):
    return [t.detach().double().numpy() for t in tensors]


def fixed(kernel: k.Kernel, x, y) -> k.Kernel:
    """DAN's ladder where a rule put it: finite differences must not see it move."""
    return k.MultiGaussian(bandwidth=k.MeanDistance()(x, y).item()) if kernel.data_dependent else kernel


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("name", KERNELS)
def test_matches_gold(name, estimator, mmd_backend):
    kernel = KERNELS[name][0]
    for n, m, d in ((13, 11, 5), (12, 12, 20)):
        x, y = samples(n, n if estimator in EQUAL else m, d)
        expected = definition.mmd2(*definition.matrices(name, *numpy(x, y)), estimator)
        size = max(abs(matrix).max() for matrix in definition.matrices(name, *numpy(x, y)))
        value = mmfast.mmd2(x, y, kernel, estimator, backend=mmd_backend)
        assert value.dtype == torch.float64 and value.shape == ()
        assert abs(value.item() - expected) <= 1e-12 * size
        single = mmfast.mmd2(x.float(), y.float(), kernel, estimator, backend=mmd_backend)
        assert single.dtype == torch.float32
        assert abs(single.item() - expected) <= 2e-6 * size


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
def test_dtypes(estimator, dtype, mmd_backend):
    """Half precisions are points like any other: what is computed from them is good to float32."""
    x, y = samples(40, 30, 64, dtype)
    for name in ("dan", "laplacian", "energy", "poly", "sum_of_metrics"):
        matrices = definition.matrices(name, *numpy(x, y))
        value = mmfast.mmd2(x, y, KERNELS[name][0], estimator, backend=mmd_backend)
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        tolerance = 1e-12 if dtype == torch.float64 else 2e-6
        assert abs(value.item() - definition.mmd2(*matrices, estimator)) <= tolerance * abs(matrices[0]).max()


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_layers(name, estimator, mmd_backend):
    """Joint MMD over two layers."""
    (x1, y1), (x2, y2) = samples(9, 9), samples(9, 9, 3)
    kernel, matrix = PRODUCTS[name]
    x, y = numpy(x1, x2), numpy(y1, y2)
    if name == "joint":  # its bandwidth is that of the pooled sample in all three matrices
        bandwidth = k.MeanDistance()(x1, y1).item()
        parts = (
            sum(np.exp(-definition.squares(a[0], b[0]) / (bandwidth / 4 * 2.0**i)) for i in range(5))
            * np.exp(-definition.squares(a[1], b[1]) / 1.68)
            for a, b in ((x, x), (y, y), (x, y))
        )
    else:
        parts = (matrix(x, x), matrix(y, y), matrix(x, y))
    value = mmfast.mmd2((x1, x2), [y1, y2], kernel, estimator, backend=mmd_backend)
    assert value.item() == pytest.approx(definition.mmd2(*parts, estimator), rel=1e-11, abs=1e-12)


@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
@pytest.mark.parametrize("name", ["dan", "laplacian_l1", "energy", "poly", "sum_of_metrics"])
def test_weights(name, estimator, mmd_backend):
    x, y = samples()
    a, b = torch.rand(13, dtype=torch.float64), torch.rand(11, dtype=torch.float64) * 7
    a[3] = 0
    matrices = definition.matrices(name, *numpy(x, y))
    kernel = KERNELS[name][0]
    for wx, wy in ((a, b), (a, None), (None, b)):
        one = [t.numpy() if t is not None else np.ones(n) for t, n in ((wx, 13), (wy, 11))]
        expected = definition.weighted_mmd2(*matrices, *one, estimator == "unbiased")
        value = mmfast.mmd2(x, y, kernel, estimator, weights_x=wx, weights_y=wy, backend=mmd_backend)
        assert value.item() == pytest.approx(expected, rel=1e-11, abs=1e-12)
    uniform = torch.ones(13), torch.ones(11)
    value = mmfast.mmd2(x, y, kernel, estimator, weights_x=uniform[0], weights_y=uniform[1], backend=mmd_backend)
    torch.testing.assert_close(value, mmfast.mmd2(x, y, kernel, estimator, backend=mmd_backend))


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("name", ["gaussian", "dan", "gaussian_median", "sum_of_metrics", "cosine"])
def test_batches(name, estimator, mmd_backend):
    """A batch is what its items are alone, also where a rule looks at the data."""
    n, m = (12, 12) if estimator in EQUAL else (12, 9)
    x, y = (
        torch.randn(3, n, 4, dtype=torch.float64) * torch.tensor([1.0, 5.0, 0.2])[:, None, None],
        torch.randn(3, m, 4),
    )
    y, kernel = y.double(), KERNELS[name][0]
    together = mmfast.mmd2(x, y, kernel, estimator, backend=mmd_backend)
    assert together.shape == (3,)
    alone = [mmfast.mmd2(a, b, kernel, estimator, backend=mmd_backend) for a, b in zip(x, y, strict=True)]
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-12, atol=1e-13)
    if estimator in ("biased", "unbiased"):
        w = torch.rand(3, n)
        together = mmfast.mmd2(x, y, kernel, estimator, weights_x=w, backend=mmd_backend)
        alone = [mmfast.mmd2(x[i], y[i], kernel, estimator, weights_x=w[i], backend=mmd_backend) for i in range(3)]
        torch.testing.assert_close(together, torch.stack(alone), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("block_size", [2, 3, 5, 12])
def test_blocks(block_size, mmd_backend):
    x, y = samples(12, 12)
    expected = definition.mmd2(*definition.matrices("gaussian", *numpy(x, y)), "block", block_size)
    value = mmfast.mmd2(x, y, KERNELS["gaussian"][0], "block", block_size=block_size, backend=mmd_backend)
    assert value.item() == pytest.approx(expected, rel=1e-12)


def test_dan_and_jan_as_published():
    """The loops of the code that the field copies: cyclic pairs in the kernel of the pooled sample."""
    (x, y), (p, q) = samples(8, 8), samples(8, 8, 3)

    def gaussian(a, b, mul, num, fix):
        total = torch.cat((a, b))
        s = ((total[None] - total[:, None]) ** 2).sum(2)
        bandwidth = (fix or s.sum() / (len(total) ** 2 - len(total))) / mul ** (num // 2)
        return sum(torch.exp(-s / (bandwidth * mul**i)) for i in range(num))

    def loop(kernels):
        loss = 0
        for i in range(8):
            s1, s2 = i, (i + 1) % 8
            t1, t2 = s1 + 8, s2 + 8
            loss += kernels[s1, s2] + kernels[t1, t2] - kernels[s1, t2] - kernels[s2, t1]
        return loss / 8

    torch.testing.assert_close(mmfast.mmd2(x, y, None, "linear_cyclic"), loop(gaussian(x, y, 2.0, 5, None)))
    joint = k.Product([k.MultiGaussian(), k.MultiGaussian(bandwidth=1.68, kernel_num=1)])
    expected = loop(gaussian(x, y, 2.0, 5, None) * gaussian(p, q, 2.0, 1, 1.68))
    torch.testing.assert_close(mmfast.mmd2((x, p), (y, q), joint, "linear_cyclic"), expected)


# ---- Gradients


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_gradcheck(name, estimator, mmd_backend):
    n = 6
    x, y = (t.requires_grad_() for t in samples(n, n if estimator in EQUAL else 5, 3))
    kernel = fixed(KERNELS[name][0], x, y)
    assert torch.autograd.gradcheck(lambda *t: mmfast.mmd2(*t, kernel, estimator, backend=mmd_backend), (x, y))
    if estimator in ("biased", "unbiased"):
        a, b = (torch.rand(len(t), dtype=torch.float64, requires_grad=True) for t in (x, y))

        def weighted(x, y, a, b):
            return mmfast.mmd2(x, y, kernel, estimator, weights_x=a, weights_y=b, backend=mmd_backend)

        assert torch.autograd.gradcheck(weighted, (x, y, a, b))


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("d", [3, 10])
def test_double_backward(name, d, mmd_backend):
    x, y = (t.requires_grad_() for t in samples(*((4, 3) if d < 8 else (2, 3)), d))
    kernel = fixed(KERNELS[name][0], x, y)
    for estimator in ("biased", "unbiased"):
        assert torch.autograd.gradgradcheck(
            lambda *t, e=estimator: mmfast.mmd2(*t, kernel, e, backend=mmd_backend), (x, y)
        )
    v = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    product = lambda *t: mmfast.kernel_matmul(*t, kernel, backend=mmd_backend)  # noqa: E731
    assert torch.autograd.gradcheck(product, (x, y, v))
    assert torch.autograd.gradgradcheck(product, (x, y, v))


@pytest.mark.parametrize("estimator", ["biased", "unbiased", "one_sample_u", "linear_cyclic"])
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("d", [4, 12])
def test_coincident_points(name, estimator, d, mmd_backend):
    """Equal rows within a sample, across samples, and a sample against itself: everything is finite."""
    for dtype in (torch.float64, torch.float32):
        points = torch.randn(6, d, dtype=dtype) + 3
        x = points[[0, 0, 1, 2, 3, 4]].clone().requires_grad_()
        y = points[[0, 1, 1, 5, 5, 2]].clone().requires_grad_()
        for other in (y, x.detach().clone().requires_grad_()):
            value = mmfast.mmd2(x, other, KERNELS[name][0], estimator, backend=mmd_backend)
            first = torch.autograd.grad(value, (x, other), create_graph=True)
            second = torch.autograd.grad(sum(g.square().sum() for g in first), (x, other))
            assert value.isfinite()
            assert all(g.isfinite().all() for g in (*first, *second))
            size = max(1.0, *(g.abs().max().item() for g in first))
            # Rows that are equal in everything have equal gradients.
            if estimator == "biased" and other is y:
                assert (first[0][0] - first[0][1]).abs().max() <= size * (1e-3 if dtype == torch.float32 else 1e-6)


@pytest.mark.parametrize("d", [2, 16])
def test_hessian_at_zero_distance(d, mmd_backend):
    """Where the limit exists it is taken: −f″ of the radial profile, on the diagonal."""
    # Among other points, so that rounding leaves something, of either sign, of the squared distance 0.
    x, others = torch.randn(8, d, dtype=torch.float64) + 2, torch.randn(5, d, dtype=torch.float64)
    y, own = torch.cat((x, others)), torch.cat((torch.eye(8), torch.zeros(5, 8))).double()
    for kernel, curvature in (
        (k.Gaussian(1.5), 1 / 1.5**2),
        (k.Matern(1.5, 1.5), 3 / 1.5**2),
        (k.Matern(1.5, 2.5), 5 / 3 / 1.5**2),
        (k.InverseMultiquadric(1.5), 1 / 1.5**2),
        (k.Laplacian(1.5), 0.0),
        (k.Energy(), 0.0),
    ):
        hessian = torch.autograd.functional.hessian(
            lambda t, kernel=kernel: (
                mmfast.kernel_matmul(t, y, own, kernel, backend=mmd_backend).diagonal().sum()  # Σ k(t_i, x_i)
            ),
            x.clone(),
        )
        expected = -curvature * torch.eye(8 * d, dtype=torch.float64)
        torch.testing.assert_close(hessian.reshape(8 * d, 8 * d), expected, rtol=1e-6, atol=1e-6)


def test_gradient_of_one_side(mmd_backend):
    for left, right in ((True, False), (False, True)):
        x, y = samples(dtype=torch.float32)
        x.requires_grad_(left), y.requires_grad_(right)
        both = [t.detach().clone().requires_grad_() for t in (x, y)]
        mmfast.mmd2(x, y, backend=mmd_backend).backward()
        mmfast.mmd2(*both, backend=mmd_backend).backward()
        for t, other, wanted in ((x, both[0], left), (y, both[1], right)):
            assert (t.grad is not None) == wanted
            if wanted:
                torch.testing.assert_close(t.grad, other.grad)


def test_float32_gradients(mmd_backend):
    """The gradient in float32 of data far from the origin is that of float64."""
    x, y = (t + 10 for t in samples(60, 50, 64))
    for name in ("dan", "matern32", "rq", "energy"):
        kernel, grads = KERNELS[name][0], []
        for dtype in (torch.float64, torch.float32):
            given = [t.to(torch.float32).to(dtype).requires_grad_() for t in (x, y)]
            mmfast.mmd2(*given, kernel, backend=mmd_backend if dtype == torch.float32 else "reference").backward()
            grads.append([t.grad.double() for t in given])
        for exact, single in zip(*grads, strict=True):
            assert (single - exact).norm() <= 2e-5 * exact.norm(), name


# ---- Products, sums, witness


@pytest.mark.parametrize("far", [1e5, 1e8, 1e15])
@pytest.mark.parametrize("d", [3, 16, 70])
def test_one_point_far_off(d, far, mmd_backend):
    """What rounds away with a centre that follows it are all the others."""
    x, y, v = torch.randn(90, d), torch.randn(80, d) + 0.1, torch.randn(80, 2)
    x[0, 0] = far
    results = []
    for dtype in (torch.float64, torch.float32):
        given = [t.to(dtype).requires_grad_() for t in (x, y, v)]
        value = mmfast.mmd2(*given[:2], k.Gaussian(d**0.5), backend=mmd_backend)
        product = mmfast.kernel_matmul(*given, k.Gaussian(d**0.5), backend=mmd_backend)
        results.append((value, product, *torch.autograd.grad(value + product.square().sum(), given)))
    for gold, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual.double(), gold.double(), rtol=1e-4, atol=2e-5 * gold.abs().max().item())


@pytest.mark.parametrize("name", KERNELS)
def test_kernel_matmul(name, mmd_backend):
    x, y = samples()
    v = torch.randn(11, 3, dtype=torch.float64)
    xy, kernel = definition.matrices(name, *numpy(x, y))[2], KERNELS[name][0]
    found = mmfast.kernel_matmul(x, y, v, kernel, backend=mmd_backend)
    np.testing.assert_allclose(found, xy @ v.numpy(), rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(
        mmfast.kernel_matmul(x, y, v[:, 0], kernel, backend=mmd_backend), xy @ v[:, 0].numpy(), rtol=1e-11, atol=1e-12
    )
    batch = mmfast.kernel_matmul(x[None], y[None], v[None], kernel, backend=mmd_backend)
    torch.testing.assert_close(batch, found[None])


@pytest.mark.parametrize("name", KERNELS)
def test_kernel_sum(name, mmd_backend):
    x, y = samples()
    kernel = KERNELS[name][0]
    cases = [(mmfast.kernel_sum(x, y, kernel, backend=mmd_backend), definition.matrices(name, *numpy(x, y))[2])]
    if not kernel.data_dependent:
        own = definition.matrices(name, *numpy(x, y))[0]
        cases.append((mmfast.kernel_sum(x, None, kernel, backend=mmd_backend), own))
        without = mmfast.kernel_sum(x, None, kernel, diagonal=False, backend=mmd_backend)
        cases.append((without, own - np.diag(np.diag(own))))
    for found, matrix in cases:
        close = {"rtol": 1e-11, "atol": 1e-11}
        np.testing.assert_allclose(found.total, matrix.sum(), **close)
        np.testing.assert_allclose(found.rows, matrix.sum(1), **close)
        np.testing.assert_allclose(found.cols, matrix.sum(0), **close)
        np.testing.assert_allclose(found.squares, (matrix**2).sum(), **close)
        assert all(t.dtype == torch.float64 for t in found)


def test_kernel_sum_gradients(mmd_backend):
    x, y = (t.requires_grad_() for t in samples(5, 4, 3))
    for kernel in (k.Gaussian(1.3), k.Matern(1.0, 1.5), k.Polynomial(2)):
        between = lambda x, y, k=kernel: tuple(mmfast.kernel_sum(x, y, k, backend=mmd_backend))  # noqa: E731
        within = lambda x, k=kernel: tuple(mmfast.kernel_sum(x, None, k, backend=mmd_backend))  # noqa: E731
        for function, given in ((between, (x, y)), (within, (x,))):
            assert torch.autograd.gradcheck(function, given)
            assert torch.autograd.gradgradcheck(function, given)


def test_witness(mmd_backend):
    x, y = samples()
    points = torch.randn(6, 5, dtype=torch.float64)
    pooled = np.concatenate(numpy(x, y))
    for name in ("dan", "gaussian_median", "laplacian_l1", "sum_of_metrics"):
        kernel, matrix = KERNELS[name]
        to_x, to_y = (matrix(points.numpy(), t, pooled) for t in numpy(x, y))
        found = mmfast.witness(points, x, y, kernel, backend=mmd_backend)
        np.testing.assert_allclose(found, to_x.mean(1) - to_y.mean(1), rtol=1e-11, atol=1e-13)
    a = torch.rand(13)
    found = mmfast.witness(points, x, y, kernel, weights_x=a, backend=mmd_backend)
    expected = to_x @ (a.double() / a.double().sum()).numpy() - to_y.mean(1)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    # Its mean over x less that over y is the biased MMD².
    difference = (
        mmfast.witness(x, x, y, KERNELS["gaussian"][0]).mean() - mmfast.witness(y, x, y, KERNELS["gaussian"][0]).mean()
    )
    torch.testing.assert_close(difference, mmfast.mmd2(x, y, KERNELS["gaussian"][0], "biased"))


@pytest.mark.parametrize("name", ["gaussian", "dan", "energy", "poly", "sum_of_metrics"])
def test_lmmd(name, mmd_backend):
    """Class by class, with explicit weights."""
    x, y = samples(14, 12)
    labels = torch.tensor([0, 0, 1, 1, 1, 3, 3, 0, 4, 4, 4, 4, 1, 0])  # no 2
    probabilities = (3 * torch.randn(12, 5, dtype=torch.float64)).softmax(1)
    kernel = KERNELS[name][0]
    matrices = definition.matrices(name, *numpy(x, y))
    common = sorted(set(labels.tolist()) & set(probabilities.argmax(1).tolist()))
    assert 0 < len(common) < 5
    per_class = []
    for c in common:
        a = (labels == c).double().numpy()
        per_class.append(definition.weighted_mmd2(*matrices, a, probabilities[:, c].numpy(), False))
    found = mmfast.lmmd(x, y, labels, probabilities, kernel, backend=mmd_backend)
    assert found.item() == pytest.approx(np.mean(per_class), rel=1e-10, abs=1e-12)
    one_hot = torch.nn.functional.one_hot(labels, 5).double()
    torch.testing.assert_close(mmfast.lmmd(x, y, one_hot, probabilities, kernel, backend=mmd_backend), found)
    nothing = mmfast.lmmd(x, y, labels * 0, torch.ones(12, dtype=torch.long), kernel, n_classes=5, backend=mmd_backend)
    assert nothing == 0
    x.requires_grad_(), y.requires_grad_(), probabilities.requires_grad_()
    kernel = fixed(kernel, x, y)
    assert torch.autograd.gradcheck(
        lambda x, y, p: mmfast.lmmd(x, y, labels, p, kernel, backend=mmd_backend), (x, y, probabilities)
    )


# ---- The primitives' own contract


def terms_of(kernel, x, y=None):
    ((transform, terms),) = kernel.parts(x, y)
    assert transform is None
    return terms


@pytest.mark.parametrize("name", ["gaussian", "multi", "laplacian", "laplacian_l1", "matern52", "poly2", "energy"])
@pytest.mark.parametrize("weighted", [False, True])
def test_quadratic(name, weighted, mmd_backend):
    x, y = torch.randn(2, 7, 4, dtype=torch.float64), torch.randn(2, 5, 4, dtype=torch.float64)
    wx, wy = (torch.randn(2, n, dtype=torch.float64) if weighted else None for n in (7, 5))
    kernel, matrix = KERNELS[name]
    terms, quadratic = terms_of(kernel, [x], [y]), primitives(mmd_backend).quadratic
    expected = []
    for i in range(2):
        a, b = (w[i].numpy() if weighted else np.ones(n) for w, n in ((wx, 7), (wy, 5)))
        p, q = numpy(x[i], y[i])
        own = [matrix(t, t, None) * (1 - np.eye(len(t))) for t in (p, q)]
        expected.append([a @ own[0] @ a, b @ own[1] @ b, a @ matrix(p, q, None) @ b])
    for coefs in ([1.0, -2.0, 0.5], [0.0, 1.0, 0.0], [0.0, 0.0, 3.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]):
        weights = torch.tensor(coefs, dtype=torch.float64)
        value, sums = quadratic([x], [y], wx, wy, weights, terms)
        assert value.dtype == sums.dtype == torch.float64 and sums.shape == (2, 3)
        for j, c in enumerate(coefs):
            if c:
                np.testing.assert_allclose(sums[:, j], np.array(expected)[:, j], rtol=1e-11, atol=1e-11)
        np.testing.assert_allclose(value, np.array(expected) @ coefs, rtol=1e-11, atol=1e-11)
    coefs = torch.tensor([0.0, 1.0, -1.0], dtype=torch.float64, requires_grad=True)
    value, sums = quadratic([x.requires_grad_()], [y], wx, wy, coefs, terms)
    assert not sums.requires_grad
    (gradient,) = torch.autograd.grad(value.sum(), coefs)  # a coefficient that learns needs its sum, be it 0 or not
    np.testing.assert_allclose(gradient, np.sum(expected, axis=0), rtol=1e-11, atol=1e-11)
    empty = [y.new_zeros(2, 0, 4)]
    value, sums = quadratic([x], empty, wx, None, torch.ones(3, dtype=torch.float64), terms)
    np.testing.assert_allclose(value.detach(), np.array(expected)[:, 0], rtol=1e-11, atol=1e-11)
    assert torch.equal(sums[:, 1:], torch.zeros(2, 2, dtype=torch.float64))


def test_matmul_without_diagonal(mmd_backend):
    x, v = torch.randn(2, 7, 4, dtype=torch.float64), torch.randn(2, 7, 3, dtype=torch.float64)
    for name in ("gaussian", "poly", "energy"):
        kernel, matrix = KERNELS[name]
        terms = terms_of(kernel, [x])
        found = primitives(mmd_backend).matmul([x], [x], v, terms, True)
        for i in range(2):
            own = matrix(x[i].numpy(), x[i].numpy(), None) * (1 - np.eye(7))
            np.testing.assert_allclose(found[i], own @ v[i].numpy(), rtol=1e-11, atol=1e-12)


def test_helpers():
    x, y = torch.randn(2, 7, 4, dtype=torch.float64), torch.randn(2, 7, 4, dtype=torch.float64)
    for name, (kernel, matrix) in KERNELS.items():
        if kernel.data_dependent or len(kernel.parts([x], [y])) > 1 or name == "cosine":
            continue
        terms = terms_of(kernel, [x], [y])
        for i in range(2):
            a, b = numpy(x[i], y[i])
            np.testing.assert_allclose(reference.diagonal([x], terms)[i], np.diag(matrix(a, a, None)), atol=1e-12)
            np.testing.assert_allclose(reference.aligned([x], [y], terms)[i], np.diag(matrix(a, b, None)), atol=1e-12)


# ---- Shapes, values, modes


@pytest.mark.parametrize("d", [0, 1, 2, 7, 8, 9, 31, 64, 65])
@pytest.mark.parametrize("sizes", [(2, 2), (1, 1), (3, 1), (17, 33)])
def test_edge_shapes(sizes, d, mmd_backend):
    x, y = samples(*sizes, d)
    for name in ("gaussian", "laplacian_l1", "energy", "linear"):
        kernel, matrices = KERNELS[name][0], definition.matrices(name, *numpy(x, y))
        value = mmfast.mmd2(x, y, kernel, "biased", backend=mmd_backend)
        assert value.item() == pytest.approx(definition.mmd2(*matrices, "biased"), rel=1e-11, abs=1e-12)
        if min(sizes) > 1:
            value = mmfast.mmd2(x, y, kernel, "unbiased", backend=mmd_backend)
            assert value.item() == pytest.approx(definition.mmd2(*matrices, "unbiased"), rel=1e-11, abs=1e-12)


def test_empty(mmd_backend):
    kernel = k.Gaussian(1.0)
    x, nothing = torch.randn(4, 3), torch.empty(0, 3)
    zeros = mmfast.kernel_matmul(x, nothing, torch.empty(0, 2), kernel, backend=mmd_backend)
    assert torch.equal(zeros, torch.zeros(4, 2))
    assert mmfast.kernel_matmul(nothing, x, torch.ones(4, 2), kernel, backend=mmd_backend).shape == (0, 2)
    assert mmfast.kernel_matmul(x, x, torch.ones(4, 0), kernel, backend=mmd_backend).shape == (4, 0)
    found = mmfast.kernel_sum(x, nothing, kernel, backend=mmd_backend)
    assert found.total == 0 and found.rows.shape == (4,) and found.cols.shape == (0,)
    assert mmfast.kernel_matrix(nothing, x, kernel).shape == (0, 4)
    assert mmfast.mmd2(x.expand(0, 4, 3), x.expand(0, 4, 3), kernel, backend=mmd_backend).shape == (0,)


def test_strides(mmd_backend):
    x, y = samples(10, 10, 6, torch.float32)
    expected = mmfast.mmd2(x, y, backend=mmd_backend)
    wide = torch.randn(10, 12)
    wide[:, ::2] = x
    long = torch.randn(20, 6)
    long[::2] = y
    for a, b in ((x.T.contiguous().T, y), (wide[:, ::2], y), (x, long[::2]), (x.flip(0), y.flip(0))):
        torch.testing.assert_close(mmfast.mmd2(a, b, backend=mmd_backend), expected, rtol=1e-5, atol=1e-7)
    row = x[:1].expand(10, 6)  # stride 0
    torch.testing.assert_close(
        mmfast.mmd2(row, y, k.Energy(), backend=mmd_backend),
        mmfast.mmd2(row.clone(), y, k.Energy(), backend=mmd_backend),
    )


def test_autocast(mmd_backend):
    """A loss is no place for half precision: autocast changes nothing."""
    x, y = samples(dtype=torch.float32, d=32)
    for kernel in (None, k.Polynomial(), k.Cosine(), k.Laplacian(2.0)):
        expected = mmfast.mmd2(x, y, kernel, backend=mmd_backend), mmfast.cka(x[:11], y, backend=mmd_backend)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = mmfast.mmd2(x, y, kernel, backend=mmd_backend), mmfast.cka(x[:11], y, backend=mmd_backend)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", ["dan", "matern52", "sum_of_metrics"])
def test_compile_fullgraph(name, mmd_backend):
    kernel = KERNELS[name][0]
    x, y = (t.requires_grad_() for t in samples(dtype=torch.float32))

    def step(x, y):
        return mmfast.mmd2(x, y, kernel, "biased", backend=mmd_backend) + mmfast.mmd2(x, y, kernel, backend=mmd_backend)

    expected = torch.autograd.grad(step(x, y), (x, y))
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, y), step(x, y))
    torch.testing.assert_close(torch.autograd.grad(compiled(x, y), (x, y)), expected)


def test_determinism(mmd_backend):
    x, y = (t.requires_grad_() for t in samples(150, 130, 40, torch.float32))
    results = []
    for _ in range(3):
        value = mmfast.mmd2(x, y, backend=mmd_backend)
        results.append((value, *torch.autograd.grad(value, (x, y))))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_u_statistics_can_be_negative(mmd_backend):
    values = []
    for _ in range(20):
        x, y = torch.randn(2, 20, 3).unbind()
        values.append(mmfast.mmd2(x, y, k.Gaussian(1.0), backend=mmd_backend).item())
    assert min(values) < 0 < max(values)


def test_large_sums(mmd_backend):
    """A small MMD² of large sums: float32 features, accumulated in float64."""
    x, y = torch.randn(800, 4), torch.randn(800, 4)
    for name in ("gaussian", "dan"):
        matrices = definition.matrices(name, *numpy(x, y))
        exact = [m.sum() - (np.trace(m) if i < 2 else 0) for i, m in enumerate(matrices)]
        exact = exact[0] / (800 * 799) + exact[1] / (800 * 799) - 2 * exact[2] / 800**2
        value = mmfast.mmd2(x, y, KERNELS[name][0], backend=mmd_backend).item()
        assert abs(value - exact) <= 1e-8 * matrices[0].max()


@pytest.mark.parametrize("sizes", [(512, 600, 64), (1000, 300, 256), (64, 90, 700)])
@pytest.mark.parametrize(
    "kernel",
    [k.Gaussian(1e4), k.Gaussian(100.0), k.Laplacian(1e5), k.Matern(3e3, 2.5)],
    ids=repr,
)
def test_nearly_constant_kernels(kernel, sizes, mmd_backend):
    """MMD² is the small difference of sums about 1: below what one value of float32 can say of it."""
    n, m, d = sizes
    x, y = torch.randn(n, d), 1.1 * torch.randn(m, d) + 0.1
    expected = mmfast.mmd2(x.double(), y.double(), kernel=kernel, backend="reference")
    error = float(mmfast.mmd2(x, y, kernel=kernel, backend=mmd_backend) - expected)
    assert abs(error) < (6e-9 if n < 100 else 2e-9)  # float32 rounds each value by up to 3e-8


def test_nan(mmd_backend):
    x, y = samples(dtype=torch.float32)
    x[2, 1] = math.nan
    assert mmfast.mmd2(x, y, k.Gaussian(1.0), backend=mmd_backend).isnan()
    for d in (5, 12):
        x, y = samples(dtype=torch.float32, d=d)
        x[2, 1] = math.nan
        for kernel in (k.Gaussian(1.0), k.Energy(), k.Laplacian(1.0, p=1), k.Polynomial()):
            product = mmfast.kernel_matmul(x, y, torch.ones(11), kernel, backend=mmd_backend)
            assert product.isnan().tolist() == [i == 2 for i in range(13)], kernel


MEASURES = {
    "mmd2": lambda x, y, how: mmfast.mmd2(x, y, **how),
    "weighted": lambda x, y, how: mmfast.mmd2(x, y, k.Matern(3.0), "biased", weights_x=torch.rand(len(x)), **how),
    "matmul": lambda x, y, how: mmfast.kernel_matmul(x, y, torch.ones(len(y), 2), k.Laplacian(3.0), **how).sum(),
    "sum": lambda x, y, how: mmfast.kernel_sum(x, y, k.Gaussian(2.0), **how).squares,
    "hsic": lambda x, y, how: mmfast.hsic(x, y, k.Gaussian(2.0), k.Energy(), **how),
    "variance": lambda x, y, how: mmfast.mmd2_variance(x, y, k.Gaussian(2.0), **how),
    "median": lambda x, y, how: k.MedianDistance()(x.detach(), y.detach(), **how),
    "permutations": lambda x, y, how: mmfast.two_sample_test(x, y, n_permutations=16, seed=0, **how).p_value,
}


@pytest.mark.parametrize("name", MEASURES)
def test_peak_memory(name, mmd_native):
    """Forward and backward of 8000 + 8000 points take less than an eighth of one 256 MB matrix."""
    x, y = torch.randn(8000, 16, requires_grad=True), torch.randn(8000, 16, requires_grad=True)

    def call(x, y):
        value = MEASURES[name](x, y, {"backend": mmd_native})
        return torch.autograd.grad(value, (x, y)) if value.requires_grad else value

    call(x[:50].detach().requires_grad_(), y[:50].detach().requires_grad_())  # what is loaded once is not counted
    assert peak_extra_bytes(lambda: call(x, y)) < 4 * 8000**2 / 8


def test_peak_memory_is_seen():
    """The measure does see the matrices of the reference."""
    x, y = torch.randn(800, 16), torch.randn(800, 16)
    assert peak_extra_bytes(lambda: mmfast.mmd2(x, y, backend="reference")) > 4 * 800**2


def test_module(mmd_backend):
    x, y = samples(16, 16, dtype=torch.float32)
    for estimator in ESTIMATORS:
        module = mmfast.nn.MMDLoss(k.Gaussian(2.0), estimator, backend=mmd_backend)
        assert torch.equal(module(x, y), mmfast.mmd2(x, y, k.Gaussian(2.0), estimator, backend=mmd_backend))
    assert torch.equal(mmfast.nn.MMDLoss(backend=mmd_backend)(x, y), mmfast.mmd2(x, y, backend=mmd_backend))
    assert "estimator='block'" in repr(module)


# ---- Errors

X, Y = torch.ones(5, 3), torch.ones(5, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mmfast.mmd2(X, torch.ones(5, 4)), "x and y must have the same number of features, got 3 and 4"),
        (lambda: mmfast.mmd2(X, [1.0]), "y must be a tensor, or a tuple of tensors, .* got list"),
        (lambda: mmfast.mmd2(3, Y), "x must be a tensor, or a tuple of tensors, .* got int"),
        (lambda: mmfast.mmd2(X[0], Y), r"x must be \(n, d\), or \(b, n, d\), got \(3,\)"),
        (lambda: mmfast.mmd2(X.int(), Y), "x must be float32, float64, float16 or bfloat16, got torch.int32"),
        (lambda: mmfast.mmd2(X, Y.double()), "x and y must have the same dtype, got torch.float32 and torch.float64"),
        (lambda: mmfast.mmd2(X, Y.to("meta")), "x and y must be on the same device, got cpu and meta"),
        (lambda: mmfast.mmd2(X, Y[None]), r"must both be \(n, d\), or \(b, n, d\) with the same b"),
        (
            lambda: mmfast.mmd2(X.expand(2, 5, 3), Y.expand(3, 5, 3)),
            r"with the same b, got \(2, 5, 3\) and \(3, 5, 3\)",
        ),
        (lambda: mmfast.mmd2(X[:1], Y), "x must have at least 2 rows for estimator='unbiased', got 1"),
        (lambda: mmfast.mmd2(X, Y[:1]), "y must have at least 2 rows for estimator='unbiased', got 1"),
        (lambda: mmfast.mmd2(X, Y[:0], None, "biased"), "y must have at least 1 row for estimator='biased', got 0"),
        (lambda: mmfast.mmd2(X, Y[:4], None, "linear"), "as many rows for estimator='linear', got 5 and 4"),
        (lambda: mmfast.mmd2(X[:1], Y[:1], None, "linear_cyclic"), "x must have at least 2 rows"),
        (lambda: mmfast.mmd2(X, Y, None, "v"), "estimator must be one of 'biased', .* got 'v'"),
        (lambda: mmfast.mmd2(X, Y, None, ["v"]), r"estimator must be one of 'biased', .* got \['v'\]"),
        (lambda: mmfast.mmd2(X, Y, "rbf"), "kernel must be a kernel of mmfast.kernels, got str"),
        (lambda: mmfast.mmd2(X, Y, block_size=2), "block_size is for estimator='block'"),
        (lambda: mmfast.mmd2(X, Y, None, "block", block_size=6), "block_size must be from 2 to the number of rows, 5"),
        (lambda: mmfast.mmd2(X, Y, None, "block", block_size=2.0), "block_size must be an integer, got float"),
        (lambda: mmfast.mmd2(X, Y, weights_x=torch.ones(4)), r"weights_x must be \(5,\), one for each row, got \(4,\)"),
        (lambda: mmfast.mmd2(X, Y, weights_y=torch.zeros(5)), "weights_y must have a positive, finite sum, got 0.0"),
        (lambda: mmfast.mmd2(X, Y, weights_y=[1.0] * 5), "weights_y must be a tensor, got list"),
        (lambda: mmfast.mmd2(X, Y, None, "linear", weights_x=torch.ones(5)), "weights are for the estimators"),
        (lambda: mmfast.mmd2((X, X), (Y, Y)), "x must have 1 feature layers for this kernel, got 2"),
        (
            lambda: mmfast.mmd2(X, Y, k.Product([k.Gaussian()] * 2)),
            "x must have 2 feature layers for this kernel, got 1",
        ),
        (
            lambda: mmfast.mmd2((X, X[:3]), (Y, Y), k.Product([k.Gaussian()] * 2)),
            "x must have as many rows in each layer",
        ),
        (
            lambda: mmfast.mmd2((X, X.double()), (Y, Y), k.Product([k.Gaussian()] * 2)),
            "layers of x must have the same dty",
        ),
        (lambda: mmfast.mmd2(X, Y, backend="fpga"), "backend must be one of"),
        (lambda: mmfast.kernel_matmul(X, Y, torch.ones(4)), r"v must be \(5\) or \(5, p\), got \(4,\)"),
        (lambda: mmfast.kernel_matmul(X, Y, torch.ones(5).int()), "v must be floating-point, got torch.int32"),
        (lambda: mmfast.kernel_matmul(X, Y, 3.0), "v must be a tensor, got float"),
        (lambda: mmfast.witness(X[:, :2], X, Y), "points and x must have the same number of features, got 2 and 3"),
        (lambda: mmfast.lmmd(X, Y, torch.zeros(5).long(), torch.zeros(5).long()), "n_classes must be given"),
        (lambda: mmfast.lmmd(X, Y, torch.zeros(5).long(), torch.ones(4, 2)), r"classes_y must be integer \(5,\) or"),
        (lambda: mmfast.lmmd(X, Y, torch.full((5,), 7), torch.ones(5, 2)), "classes_x must be from 0 to n_classes - 1"),
    ],
)
def test_rejects(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()


def test_every_estimator_is_tested():
    assert set(ESTIMATORS) == {"biased", "unbiased", *EQUAL}
    families = set(itertools.chain(*(terms_of_all(kernel) for kernel, _ in KERNELS.values())))
    assert families == set(range(8))


def terms_of_all(kernel):
    x = [torch.randn(1, 4, 3)]
    return [family for _, terms in kernel.parts(x, x) for family in terms.families]


def test_many_terms_and_layers(mmd_backend):
    """More than the native kernels have room for: the same results, from wherever."""
    x, y = torch.randn(9, 3, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64)
    bandwidths = [0.1 * (i + 1) for i in range(70)]
    value = mmfast.mmd2(x, y, kernel=k.MultiGaussian(bandwidths), estimator="biased", backend=mmd_backend)
    each = [mmfast.mmd2(x, y, kernel=k.MultiGaussian([b]), estimator="biased", backend="reference") for b in bandwidths]
    torch.testing.assert_close(value, torch.stack(each).sum())
    layers_x, layers_y = [x + i for i in range(9)], [y + i for i in range(9)]
    product = k.Product([k.Gaussian(2.0)] * 9)
    value = mmfast.mmd2(layers_x, layers_y, kernel=product, estimator="biased", backend=mmd_backend)
    single = mmfast.mmd2(x, y, kernel=k.Gaussian(2.0 / 3), estimator="biased", backend="reference")
    torch.testing.assert_close(value, single)
