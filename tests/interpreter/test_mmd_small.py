"""Small batches, which take a launch or two, against the reference in float64, in Triton's interpreter."""

from __future__ import annotations

import mmd_device as cases
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime import interpreter

from mmfast import kernels as k
from mmfast import mmd
from mmfast.mmd import small, triton_small_launch

BACKEND, DEVICE = "triton", "cpu"


@pytest.fixture(autouse=True)
def forms(monkeypatch):
    """How often a batch has come here: each test says how often it should."""
    seen = []
    forward = triton_small_launch.forward
    monkeypatch.setattr(triton_small_launch, "forward", lambda *inputs: seen.append(inputs) or forward(*inputs))
    return seen


@pytest.fixture
def launches(monkeypatch):
    """Names of the kernels that were launched; what the interpreter does for them is nobody's business."""
    seen = []
    launch = interpreter.GridExecutor.__call__

    def counted(self, *args, **kwargs):
        seen.append(self.fn.__name__)
        with _disable_current_modes():
            return launch(self, *args, **kwargs)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", counted)
    return seen


def check(kernel, x, y, estimator="unbiased", dtype=torch.float32, floor=3e-6, **options):
    function = cases.with_gradients(lambda b, x, y: mmd.mmd2(x, y, kernel, estimator, backend=b, **options))
    cases.compare(function, (x, y), BACKEND, DEVICE, dtype, floor, f"{kernel} {estimator}")


KERNELS = {
    "dan": (k.MultiGaussian(), 37),
    "tllib": (k.MultiGaussian(bandwidth="tllib", reduce="mean"), 17),
    "few": (k.MultiGaussian(), 3),
    "of_x": (k.Gaussian(k.MeanDistance("x", scale=0.5)), 16),
    "cross": (k.RationalQuadratic(k.MeanDistance("cross"), 2.0), 20),
    "laplacian": (k.Laplacian("mean"), 33),
    "matern32": (k.Matern(k.MeanDistance("y", diagonal=True), 1.5), 20),
    "matern52": (k.Matern(5.0, 2.5), 18),
    "no_ladder": (k.MultiGaussian([5.0, 13.0, 60.0], weights=[1.0, 0.2, 2.0]), 20),
    "median": (k.Gaussian("median"), 20),
    "poly": (k.Polynomial(), 20),
    "energy": (k.Energy(), 70),
    "sum_of_means": (k.MultiGaussian() + 0.5 * k.Laplacian("dan"), 18),
    "sum_of_metrics": (2.0 * k.Gaussian(3.0) + k.Cosine(), 18),
}


@pytest.mark.parametrize("name", KERNELS)
def test_kernels(name, forms):
    kernel, d = KERNELS[name]
    check(kernel, *cases.samples(7, 40 if name in ("dan", "poly", "laplacian") else 11, d, shift=1.0))
    assert len(forms) == (2 if name == "sum_of_metrics" else 1)


@pytest.mark.parametrize(
    "estimator,name",
    [*((e, n) for e in ("biased", "one_sample_u") for n in ("dan", "poly", "laplacian")), ("block", "dan")],
)
def test_estimators(estimator, name, forms):
    kernel, d = KERNELS[name]
    check(kernel, *cases.samples(5, 5, d), estimator)
    assert len(forms) == 1


@pytest.mark.parametrize("n,m,d", [(3, 2, 333), (150, 110, 24), (1, 1, 17)])
def test_sizes(n, m, d, forms):
    """Features shared out among programs, larger tiles, and the least there can be."""
    check(k.MultiGaussian(), *cases.samples(n, m, d, shift=1.0), "biased" if n == 1 else "unbiased")
    assert len(forms) == 1


def test_many_features(forms):
    x, y = cases.samples(5, 6, 2048)

    def function(b, x, y):
        y = y.clone().requires_grad_()
        value = mmd.mmd2(x, y, backend=b)
        return value.detach(), *torch.autograd.grad(value, y)

    cases.compare(function, (x, y), BACKEND, DEVICE, floor=3e-6)
    assert len(forms) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precisions(dtype, forms):
    check(k.MultiGaussian(), *cases.samples(17, 18, 37), dtype=dtype, floor=1e-5 if dtype == torch.float16 else 1e-4)
    assert len(forms) == 1


def test_batches_find_their_own_lengths(forms):
    x, y = cases.samples(6, 7, 20, batch=(3,))
    x[1] *= 5
    check(k.MultiGaussian(), x, y, "biased")
    assert len(forms) == 1


def test_strides(forms):
    x, y = cases.samples(12, 40, 20)
    function = cases.with_gradients(lambda b, x, y: mmd.mmd2(x[::2], y.t(), k.Gaussian(3.0), backend=b))
    cases.compare(function, (x, y[:20].t().contiguous()), BACKEND, DEVICE, floor=3e-6)
    assert len(forms) == 1


@pytest.mark.parametrize("kernel", [k.Gaussian(4.0), k.Laplacian(4.0), k.Energy()], ids=str)
def test_far_and_near(kernel, forms):
    """Data far from the origin, and points that coincide, of the two samples and of one.

    Sixteen draws: the gradients of points that coincide are what rounding leaves of nothing, a few hundred numbers of a
    draw, and how much that is in one draw depends on the order in which a machine's matrix product adds.
    """
    x, y = (t + 100 for t in cases.samples(9, 10, 150, shift=1.0, batch=(16,)))
    y[:, :5], y[:, 9] = x[:, :5], y[:, 8]
    check(kernel, x, y)
    assert len(forms) == 1


def test_points_that_all_coincide(forms):
    x = torch.ones(4, 20)
    step = cases.with_gradients(lambda b, x, y: mmd.mmd2(x, y, k.MultiGaussian(), "biased", backend=b))
    value, by_x, by_y = step(BACKEND, x, x[:3])
    assert abs(value) < 1e-14
    assert not by_x.any()
    assert not by_y.any()
    assert len(forms) == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_row(bad, forms):
    x, y = cases.samples(5, 6, 20)
    x[3, 2] = bad
    for kernel in (k.Gaussian(3.0), k.MultiGaussian()):
        ours, eager, _ = cases.three_ways(
            cases.with_gradients(lambda b, x, y, kernel=kernel: mmd.mmd2(x, y, kernel, backend=b)),
            (x, y), BACKEND, DEVICE,
        )  # fmt: skip
        for a, b in zip(ours, eager, strict=True):
            assert torch.equal(a.isnan(), b.isnan())
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, equal_nan=True)
    assert len(forms) == 2


@pytest.mark.parametrize("kernel", [k.MultiGaussian(), k.Polynomial(2)], ids=["dan", "poly"])
def test_one_sided(kernel, forms):
    x, y = (t.float() for t in cases.samples(7, 9, 20))
    a, b = x.clone().requires_grad_(), y.clone().requires_grad_()
    both = torch.autograd.grad(mmd.mmd2(a, b, kernel, backend=BACKEND), (a, b))
    (of_x,) = torch.autograd.grad(mmd.mmd2(a, y, kernel, backend=BACKEND), a)
    (of_y,) = torch.autograd.grad(mmd.mmd2(x, b, kernel, backend=BACKEND), b)
    assert torch.equal(of_x, both[0])
    assert torch.equal(of_y, both[1])
    assert len(forms) == 3


@pytest.mark.parametrize("d", [18, 40])
def test_one_far_off(d):
    cases.check_one_far_off(BACKEND, DEVICE, d=d)


def test_double_backward(forms):
    x, y = cases.samples(6, 5, 18, batch=(2,))

    def function(b, x, y):
        x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
        kernel = k.MultiGaussian() + 0.5 * k.Matern("mean", 2.5)
        value = mmd.mmd2(x, y, kernel, "biased", backend=b)
        by_x, by_y = torch.autograd.grad((value * value).sum(), (x, y), create_graph=True)
        return torch.autograd.grad(by_x.square().sum() + by_y.pow(3).sum(), (x, y))

    cases.compare(function, (x, y), BACKEND, DEVICE, floor=1e-5)
    cases.check_double_backward(BACKEND, DEVICE)
    assert len(forms) == 2


class _Operators(TorchDispatchMode):
    """Names of the operators that run something on the device."""

    quiet = ("empty", "view", "unsqueeze", "squeeze", "detach", "alias", "as_strided")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        if not name.startswith(self.quiet) and not name.endswith(("view", "squeeze")):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("estimator", ["biased", "unbiased", "one_sample_u"])
def test_three_launches_and_nothing_else(estimator, launches):
    x, y = (t.float().requires_grad_() for t in cases.samples(7, 7, 20))
    mmd.mmd2(x, y, None, estimator, backend=BACKEND)  # constants are uploaded
    launches.clear()
    one = torch.ones(())
    torch.use_deterministic_algorithms(False)  # or new memory is filled
    with _Operators() as operators:
        value = mmd.mmd2(x, y, None, estimator, backend=BACKEND)
        assert launches == ["distances", "values"]
        torch.autograd.grad(value, (x, y), one)
    assert launches == ["distances", "values", "gradient"]
    assert operators.seen == []


def test_what_comes_here(forms):
    def takes(n=4, m=5, d=18, dtype=torch.float32, b=1, layers=1):
        return small.takes_points([torch.empty(b, n, d, dtype=dtype)] * layers, [torch.empty(b, m, d)] * layers)

    assert takes()
    assert takes(256, 256)
    assert takes(dtype=torch.float16)
    assert not any((takes(n=257), takes(m=257), takes(m=0), takes(d=0), takes(dtype=torch.float64), takes(layers=2)))
    assert not takes(256, 256, b=65)  # matrices that would not stay in the cache, nor be little
    with mmd.precision("tf32"):
        assert not takes()
        assert takes(dtype=torch.bfloat16)

    x, y = (t.float() for t in cases.samples(2, 3, 5))
    scale = torch.tensor(3.0, requires_grad=True)
    mmd.mmd2(x, y, k.Laplacian(3.0, p=1), backend=BACKEND)
    mmd.mmd2(x, y, k.Gaussian(scale), backend=BACKEND)
    torch.func.vmap(lambda a: mmd.mmd2(a, y, k.Gaussian(3.0), backend=BACKEND))(x[None])
    mmd.mmd2(x, y, backend="reference")
    assert forms == []
    with torch.no_grad():
        mmd.mmd2(x, y, k.Gaussian(scale), backend=BACKEND)
    assert len(forms) == 1


def test_compiled():
    x, y = (t.float().requires_grad_() for t in cases.samples(4, 5, 18))

    def step(x, y):
        return mmd.mmd2(x, y, kernel, backend=BACKEND)

    kernel = k.MultiGaussian() + 0.5 * k.Laplacian("dan")
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    ours, plain = (torch.autograd.grad(f(x, y), (x, y)) for f in (compiled, step))
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


def test_opcheck():
    x, y = (t.float()[None].requires_grad_() for t in cases.samples(4, 5, 18))
    terms = k.MultiGaussian().in_means([x])
    coefs = torch.tensor([0.1, 0.2, -0.3], dtype=torch.float64)
    problem = coefs, terms.params, list(terms.families), [1, 1, 1, 72], True, False
    checks = "test_schema", "test_autograd_registration", "test_faketensor"
    torch.library.opcheck(torch.ops.mmfast.mmd_small.default, (x, y, *problem, True), test_utils=checks)
    _, weights, length = torch.ops.mmfast.mmd_small.default(x, y, *problem, True)
    backward = torch.ones(1), x, y, weights, length, *problem, [True, False]
    torch.library.opcheck(torch.ops.mmfast.mmd_small_backward.default, backward, test_utils=checks)
