"""What surrounds a call and must not change its result: defaults of the process, tracing, vmap, views, odd numbers."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

import mmfast
from mmfast import kernels as k
from mmfast.nn import MMDLoss

pytestmark = pytest.mark.native

X = torch.randn(20, 6, generator=torch.Generator().manual_seed(1))
Y = torch.randn(15, 6, generator=torch.Generator().manual_seed(2)) + 0.5


@pytest.fixture
def default_device():
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_default_device(backend, request):
    """The ranks of a median are needed on the host, wherever new tensors go."""
    kernel = k.Gaussian("median")
    expected = mmfast.mmd2(X, Y, kernel, backend=backend), mmfast.hsic(X, X[:, :3], backend=backend)
    request.getfixturevalue("default_device")
    assert torch.equal(mmfast.mmd2(X, Y, kernel, backend=backend), expected[0])
    assert torch.equal(mmfast.hsic(X, X[:, :3], backend=backend), expected[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_default_dtype(dtype):
    """A permutation is drawn by sorting random numbers: of bfloat16 there are too few, and many would be equal."""
    expected = mmfast.two_sample_test(X, Y, n_permutations=50, seed=3)
    torch.set_default_dtype(dtype)
    try:
        found = mmfast.two_sample_test(X, Y, n_permutations=50, seed=3)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found.null, expected.null)


@pytest.mark.parametrize("kernel", [None, k.Gaussian(1.0), k.Gaussian("median"), k.Laplacian(2.0, p=1)])
@pytest.mark.parametrize("tracked", [False, True])
def test_jit_trace(kernel, tracked):
    """What is recorded is the computation, not the memory that held its result."""
    loss, (x, y) = MMDLoss(kernel), (X * 2, Y - 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(loss, (X.clone().requires_grad_(tracked), Y), check_trace=False)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    found, expected = traced(a, y), loss(b, y)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(*(torch.autograd.grad(v, t)[0] for v, t in ((found, a), (expected, b))))


def test_negative_view():
    """A view that is still to be negated, as the imaginary part of a conjugate is."""
    x = torch.complex(torch.zeros_like(X), -X).conj().imag
    assert x.is_neg() and torch.equal(x, X)
    weights = torch.complex(torch.zeros(20), -torch.rand(20) - 0.1).conj().imag
    y, other = Y.clone().requires_grad_(), Y.clone().requires_grad_()
    for options in ({}, {"weights_x": weights}):
        plain = {name: value.resolve_neg() for name, value in options.items()}
        found, expected = mmfast.mmd2(x, y, k.Gaussian(1.0), **options), mmfast.mmd2(X, other, k.Gaussian(1.0), **plain)
        assert torch.equal(found, expected)
        assert torch.equal(torch.autograd.grad(found, y)[0], torch.autograd.grad(expected, other)[0])


def test_vmap_over_weights_labels_and_parameters():
    """Values that are looked at to check them cannot be there."""
    x, y = torch.randn(3, 9, 4), torch.randn(3, 7, 4)
    weights, lengths = torch.rand(3, 9), torch.tensor([0.5, 1.0, 2.0])
    found = torch.vmap(lambda a, b, w: mmfast.mmd2(a, b, weights_x=w))(x, y, weights)
    torch.testing.assert_close(found, mmfast.mmd2(x, y, weights_x=weights))
    found = torch.vmap(lambda s: mmfast.mmd2(x[0], y[0], k.Gaussian(s) + s * k.Laplacian(s)))(lengths)
    each = [mmfast.mmd2(x[0], y[0], k.Gaussian(s) + s * k.Laplacian(s)) for s in lengths]
    torch.testing.assert_close(found, torch.stack(each))
    found = torch.vmap(lambda b: mmfast.mmd2(x[0], y[0], k.MultiGaussian(b)))(lengths[:, None] * torch.ones(2))
    torch.testing.assert_close(found, torch.stack([mmfast.mmd2(x[0], y[0], k.MultiGaussian([s, s])) for s in lengths]))
    labels, other = torch.arange(27).view(3, 9) % 3, torch.arange(7) % 3
    found = torch.vmap(lambda a, c: mmfast.lmmd(a, y[0], c, other, n_classes=3))(x, labels)
    each = [mmfast.lmmd(a, y[0], c, other, n_classes=3) for a, c in zip(x, labels, strict=True)]
    torch.testing.assert_close(found, torch.stack(each))


def test_median_of_a_symbolic_number_of_points():
    rules = ["median", k.MedianDistance("x", diagonal=True), k.MedianDistance("cross", kind="upper")]
    for rule in rules:
        torch._dynamo.reset()
        kernel, shapes = k.Gaussian(rule), []
        compiled = torch.compile(
            lambda x, y, kernel=kernel: mmfast.mmd2(x, y, kernel),
            fullgraph=True,
            dynamic=True,
            backend=lambda graph, inputs, shapes=shapes: shapes.append(1) or graph,
        )
        for n, m in ((20, 15), (9, 12), (7, 7)):
            x, y = torch.randn(n, 3), torch.randn(m, 3)
            torch.testing.assert_close(compiled(x, y), mmfast.mmd2(x, y, kernel))
        assert len(shapes) == 1


def test_blocks_of_a_symbolic_number_of_points():
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, y: mmfast.mmd2(x, y, estimator="block"), fullgraph=True, dynamic=True, backend="eager"
    )
    for n in (20, 25, 30):
        x, y = torch.randn(n, 3), torch.randn(n, 3)
        torch.testing.assert_close(compiled(x, y), mmfast.mmd2(x, y, estimator="block"))


@pytest.mark.parametrize("rows", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["lower", "upper", "average"])
def test_median_of_all_pairs_of_a_few_points(rows, kind):
    x = torch.randn(rows, 3, dtype=torch.float64)
    ordered, middle = torch.cdist(x, x).square().flatten().sort().values, (rows * rows - 1) // 2
    lower, upper = ordered[middle], ordered[rows * rows // 2]
    expected = {"lower": lower, "upper": upper, "average": (lower + upper) / 2}[kind]
    found = k.MedianDistance("x", diagonal=True, kind=kind)(x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_meta_tensors():
    x, y = X.to("meta"), Y.to("meta")
    assert mmfast.mmd2(x, y).shape == () and mmfast.mmd2(x, y).is_meta
    assert mmfast.kernel_matmul(x, y, y, k.Matern()).shape == (20, 6)
    assert mmfast.mmd2(x, y, k.Gaussian("median")).is_meta
    leaf = x.detach().requires_grad_()
    mmfast.mmd2(leaf, y, k.Gaussian(k.MedianDistance("x", detach=False))).backward()
    assert leaf.grad.shape == x.shape
    assert mmfast.cka(x, x[:, :2]).dtype == torch.float32


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_p_value_of_no_number(backend, bad):
    """No comparison holds for NaN, which is no evidence of a difference."""
    x = X.clone()
    x[3, 2] = bad
    test = mmfast.two_sample_test(x, Y, k.Energy(), 20, backend=backend)
    assert test.statistic.isnan() and test.p_value.isnan()


@pytest.mark.parametrize("scale", [1e-15, 1e15])
@pytest.mark.parametrize("rows", [50, 6])  # by features, and by points
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_alignment_does_not_depend_on_the_scale(scale, rows, backend):
    """Fourth powers of the features would leave the range of float32."""
    x, y = torch.randn(rows, 8), torch.randn(rows, 5)
    y = y + x[:, :5]
    for estimator in ("biased", "unbiased"):
        a, b = x.clone().requires_grad_(), (x * scale).requires_grad_()
        expected = mmfast.cka(a, y, estimator=estimator, backend=backend)
        found = mmfast.cka(b, y * scale, estimator=estimator, backend=backend)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        by_a, by_b = (torch.autograd.grad(v, t)[0] for v, t in ((expected, a), (found, b)))
        torch.testing.assert_close(by_b * scale, by_a, rtol=1e-3, atol=1e-4)
    # The scale is a constant for derivatives of forms that depend on it.
    x64, y64 = x[:6, :5].double().requires_grad_(), y[:6, :2].double()
    torch.autograd.gradcheck(lambda a: mmfast.hsic(a, y64, k.Linear(), k.Linear(), backend=backend), x64)


@pytest.mark.parametrize("scale", [1e-30, 1e-42, 1e30])
def test_cosine_does_not_depend_on_the_scale(scale):
    a, b = X.clone().requires_grad_(), X.clone()
    b[:5] *= scale
    b.requires_grad_()
    expected, found = mmfast.kernel_matrix(a, Y, k.Cosine()), mmfast.kernel_matrix(b, Y, k.Cosine())
    rounded = 1e-2 if scale == 1e-42 else 1e-5  # of denormal numbers
    torch.testing.assert_close(found, expected, rtol=rounded, atol=rounded)
    assert mmfast.kernel_matrix(torch.zeros(2, 3), torch.ones(2, 3), k.Cosine()).eq(0).all()
    assert mmfast.kernel_matrix(torch.zeros(2, 0), torch.zeros(2, 0), k.Cosine()).eq(0).all()


def test_numbers_of_numpy():
    for kernel, same in (
        (k.Gaussian(np.float32(0.1)), k.Gaussian(float(np.float32(0.1)))),
        (k.Laplacian(np.int64(2)), k.Laplacian(2.0)),
        (k.RationalQuadratic(1.0, np.float32(0.7)), k.RationalQuadratic(1.0, float(np.float32(0.7)))),
        (k.Polynomial(np.int64(2), np.float16(0.5), np.int32(1)), k.Polynomial(2, 0.5, 1.0)),
        (
            k.MultiGaussian(kernel_mul=np.float32(3), kernel_num=np.int64(2)),
            k.MultiGaussian(None, None, "sum", None, 3, 2),
        ),
        (k.Gaussian(1.0) * np.float32(0.5), 0.5 * k.Gaussian(1.0)),
    ):
        assert torch.equal(mmfast.mmd2(X, Y, kernel), mmfast.mmd2(X, Y, same))
    found = mmfast.mmd2(X[:15], Y, None, "block", block_size=np.int64(4))
    assert torch.equal(found, mmfast.mmd2(X[:15], Y, None, "block", block_size=4))
    found = mmfast.two_sample_test(X, Y, n_permutations=np.int64(9), seed=np.int32(5))
    assert torch.equal(found.null, mmfast.two_sample_test(X, Y, n_permutations=9, seed=5).null)
    with pytest.raises(TypeError, match="sigma must be a number or a tensor, got bool"):
        k.Gaussian(np.bool_(True))
    with pytest.raises(TypeError, match="n_permutations must be an integer, got float"):
        mmfast.two_sample_test(X, Y, n_permutations=10.0)


def test_rules_reject_what_is_no_sample():
    for shapes in ((X[None], None), (X, Y[None]), (X, Y[:, :1])):
        with pytest.raises(ValueError, match=r"x and y must be \(n, d\) and \(m, d\) for a bandwidth rule"):
            k.MeanDistance()(*shapes)
