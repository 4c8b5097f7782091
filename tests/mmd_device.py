"""Cases of the mmd slice that hold on any backend: in Triton's interpreter on the CPU, and on the GPU.

Each function takes the backend and the device its tensors are to be on, computes in that backend, in the reference in
the same dtype and in the reference in float64, and compares.
"""

from __future__ import annotations

import torch
from numerics import assert_no_worse_than_eager

import mmfast
from mmfast import kernels as k
from mmfast import mmd

# name → (kernel, number of features): products of tiles from 17 features on, single differences below.
KERNELS = {
    "gaussian": (k.Gaussian(3.0), 20),
    "dan": (k.MultiGaussian(), 37),
    "dan_few": (k.MultiGaussian(), 5),
    "no_ladder": (k.MultiGaussian([5.0, 13.0, 60.0], weights=[1.0, 0.2, 2.0]), 20),
    "laplacian": (k.Laplacian(4.0), 20),
    "laplacian_l1": (k.Laplacian(9.0, p=1), 18),
    "imq": (k.InverseMultiquadric(3.0), 20),
    "matern32": (k.Matern(5.0, 1.5), 20),
    "matern52": (k.Matern(5.0, 2.5), 3),
    "poly": (k.Polynomial(), 20),
    "linear": (k.Linear(), 7),
    "energy": (k.Energy(), 33),
    "sum": (2.0 * k.Gaussian(3.0) + k.Matern(4.0, 1.5) + 0.1 * k.Energy(), 17),
    "sum_of_metrics": (k.Gaussian(2.0) + 0.3 * k.Laplacian(9.0, p=1) + k.Cosine(), 18),
}


def samples(
    n: int, m: int, d: int, shift: float = 0.5, batch: tuple[int, ...] = ()
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(n * 1000 + m * 10 + d)
    x = torch.randn(*batch, n, d, generator=generator, dtype=torch.float64)
    return x, 1.2 * torch.randn(*batch, m, d, generator=generator, dtype=torch.float64) + shift


def three_ways(function, inputs, backend: str, device, dtype=torch.float32):
    """``function(backend, *inputs)`` → tensors, by the backend, the reference, and the reference in float64."""

    def at(t, kind, where):
        if isinstance(t, (tuple, list)):
            return type(t)(at(part, kind, where) for part in t)
        return t.to(where, kind) if t.is_floating_point() else t.to(where)

    rounded = [at(t, dtype, "cpu") for t in inputs]
    out = function(backend, *(at(t, dtype, device) for t in rounded))
    eager = function("reference", *rounded)
    gold = function("reference", *(at(t, torch.float64, "cpu") for t in rounded))
    return [tuple(t.cpu() for t in results) for results in (out, eager, gold)]


def compare(function, inputs, backend, device, dtype=torch.float32, floor=None, what=""):
    results = three_ways(function, inputs, backend, device, dtype)
    for i, (out, eager, gold) in enumerate(zip(*results, strict=True)):
        assert_no_worse_than_eager(out, eager, gold.double(), floor=floor, what=f"{what} result {i}")
    return results


def with_gradients(function):
    """``function(backend, *inputs)`` → its value and the gradients of all inputs."""

    def both(backend, *inputs):
        leaves = [t.clone().requires_grad_() for t in inputs]
        out = function(backend, *leaves)
        outs = out if isinstance(out, tuple) else (out,)
        total = sum((o.double() * torch.linspace(0.5, 1.5, o.numel(), device=o.device).view_as(o)).sum() for o in outs)
        return *(o.detach() for o in outs), *torch.autograd.grad(total, leaves)

    return both


def check_kernel(name, backend, device, n=19, m=20, dtype=torch.float32, floor=None, estimator="unbiased"):
    kernel, d = KERNELS[name]
    function = with_gradients(lambda b, x, y: mmd.mmd2(x, y, kernel, estimator, backend=b))
    # Values and gradients are small differences of sums, and squarings from one exponential double its error each time.
    compare(function, samples(n, m, d), backend, device, dtype, 3e-6 if floor is None else floor, name)


def check_product(backend, device, batch=(2,)):
    kernel = k.Product([k.MultiGaussian([8.0, 16.0]), k.Gaussian(2.0) + 0.1 * k.Linear(), k.Laplacian(6.0, p=1)])
    (x0, y0), (x1, y1), (x2, y2) = (samples(10, 18, d, batch=batch) for d in (20, 3, 4))

    def function(b, *layers):
        return mmd.mmd2(layers[:3], layers[3:], kernel, "biased", backend=b)

    compare(with_gradients(function), (x0, x1, x2, y0, y1, y2), backend, device, floor=2e-6)


def check_weights(backend, device):
    x, y = samples(20, 13, 18, batch=(2,))
    wx, wy = torch.rand(2, 20).double() + 0.1, torch.rand(2, 13).double()
    for estimator in ("biased", "unbiased"):

        def function(b, x, y, wx, wy, estimator=estimator):
            return mmd.mmd2(x, y, k.Gaussian(3.0), estimator, weights_x=wx, weights_y=wy, backend=b)

        compare(with_gradients(function), (x, y, wx, wy), backend, device, floor=2e-6)


def check_parameters(backend, device):
    """Gradients of each parameter of each family, and of the bandwidths of a sum."""
    x, y = samples(18, 20, 18)
    values = torch.tensor([2.5, 0.7, 1.3, 3.0, 5.0]).double()

    def function(b, x, y, p):
        total = (
            p[0] * k.Gaussian(p[3])
            + k.RationalQuadratic(p[3], p[1])
            + k.InverseMultiquadric(p[4], p[2])
            + p[1] * k.Polynomial(3, gamma=p[2] / 18, coef=p[0])
            + k.Matern(p[4], 1.5)
            + k.Matern(p[4], 2.5)
            + k.Laplacian(p[3])
            + k.Laplacian(4 * p[3], p=1)
            + p[2] * k.Energy()
        )
        return mmd.mmd2(x, y, total, backend=b)

    compare(with_gradients(function), (x, y, values), backend, device, floor=4e-6)


def check_sums(backend, device):
    kernel = k.MultiGaussian([20.0, 40.0])
    x, y = samples(19, 36, 18)

    def rectangle(b, x, y):
        return tuple(t.float() for t in mmd.kernel_sum(x, y, kernel, backend=b))

    def triangle(b, x):
        return tuple(t.float() for t in mmd.kernel_sum(x, None, kernel, diagonal=False, backend=b))

    compare(with_gradients(rectangle), (x, y), backend, device, floor=1e-6)
    compare(with_gradients(triangle), (x,), backend, device, floor=1e-6)
    variance = with_gradients(lambda b, x, y: mmd.mmd2_variance(x, y, kernel, backend=b))
    compare(variance, (x, y), backend, device, floor=1e-4)  # a difference of nearly equal moments


def check_matmul(backend, device, dtype=torch.float32, floor=1e-6):
    x, y = samples(19, 36, 18, batch=(2,))
    v = torch.randn(2, 36, 3).double()
    function = with_gradients(lambda b, x, y, v: mmd.kernel_matmul(x, y, v, k.Gaussian(3.0), backend=b))
    compare(function, (x, y, v), backend, device, dtype, floor)


def check_lmmd(backend, device):
    x, y = samples(19, 20, 18)
    one, two = torch.rand(19, 3).double(), torch.rand(20, 3).double()
    function = with_gradients(lambda b, x, y, p, q: mmd.lmmd(x, y, p, q, k.Gaussian(3.0), backend=b))
    compare(function, (x, y, one, two), backend, device, floor=4e-6)


def check_pair(backend, device):
    x, _ = samples(19, 5, 18)
    y, _ = samples(19, 6, 4)

    def function(b, x, y):
        return mmd.hsic(x, y, k.Gaussian(3.0), k.Laplacian(2.0), backend=b)

    compare(with_gradients(function), (x, y), backend, device, floor=4e-6)


def check_permutations(backend, device, n=20, m=15, d=18, dtype=torch.float32):
    x, y = samples(n, m, d)
    members = torch.stack([torch.randperm(n + m, generator=torch.Generator().manual_seed(i)) for i in range(7)])
    for estimator in ("unbiased", "biased"):

        def function(b, x, y, members, estimator=estimator):
            found = mmd.two_sample_test(x, y, k.MultiGaussian(), estimator=estimator, permutations=members, backend=b)
            return found.statistic, found.p_value, found.null

        out, _, gold = three_ways(function, (x, y, members), backend, device, dtype)
        # Sums of kernels of up to 5 nearly cancel, and on tensor cores a distance is good to 2^-22 of the norms.
        least = 5 * 2.0**-22 if device == "cuda" else 5e-7
        torch.testing.assert_close(out[0], gold[0], rtol=1e-5, atol=least)
        torch.testing.assert_close(out[2], gold[2], rtol=1e-5, atol=least)
        assert out[1] == gold[1]


def check_median(backend, device, d=18, dtype=torch.float32):
    x, y = samples(17, 12, d)
    x[3] = x[5]
    x, y = x.to(dtype), y.to(dtype)
    rules = [
        mmd.bandwidth.MedianDistance(),
        mmd.bandwidth.MedianDistance("x", diagonal=True, kind="lower"),
        mmd.bandwidth.MedianDistance("cross", kind="upper"),
    ]
    for rule in rules:
        found = rule(x.to(device), y.to(device), backend)
        torch.testing.assert_close(found.cpu(), rule(x.double(), y.double(), "reference"), rtol=1e-6, atol=0)


def check_far_and_near(backend, device):
    """Data far from the origin, of any scale, and points of the two samples that coincide."""
    x, y = samples(19, 20, 24)
    y[:5] = x[:5]
    for scale, offset in ((1.0, 10.0), (1e-9, 0.0), (1e9, 0.0)):
        a, b = scale * (x + offset), scale * (y + offset)
        for kernel in (k.Gaussian(4.0 * scale), k.Laplacian(4.0 * scale)):
            function = with_gradients(lambda who, a, b, kernel=kernel: mmd.mmd2(a, b, kernel, backend=who))
            compare(function, (a, b), backend, device, floor=4e-6, what=f"{scale} {offset} {kernel}")


def check_bad_row(backend, device):
    """NaN and infinity in one row stay with that row."""
    x, y = samples(19, 36, 20)
    for value in (float("nan"), float("inf")):
        x[3, 2] = value
        out, eager, _ = three_ways(
            lambda b, x, y: mmd.kernel_sum(x, y, k.Gaussian(3.0), backend=b)[1:2], (x, y), backend, device
        )
        assert torch.equal(out[0].isfinite(), eager[0].isfinite())
        torch.testing.assert_close(out[0], eager[0], rtol=1e-5, atol=1e-6, equal_nan=True)


def check_one_far_off(backend, device, n=60, m=50, d=20):
    """One finite point far off: with a centre that follows it all others would be rounded to nothing."""
    x, y = samples(n, m, d)
    x[1, 0] = 1e5  # float16 parts still tell the others apart
    results = []
    for dtype, where in ((torch.float64, "reference"), (torch.float32, backend)):
        a, b = (t.to(device, dtype).requires_grad_() for t in (x, y))
        value = mmd.mmd2(a, b, k.Gaussian(d**0.5), backend=where)
        product = mmd.kernel_matmul(a, b, torch.ones_like(b), k.Gaussian(d**0.5), backend=where)
        results.append((value, product, *torch.autograd.grad(value + product.square().sum(), (a, b))))
    for gold, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual.double(), gold.double(), rtol=1e-4, atol=1e-4 * gold.abs().max().item())


def check_precision(backend, device):
    """The names say how exact; equal rows are at distance 0 in each."""
    x, y = samples(17, 16, 40)
    errors = {}
    gold = mmd.mmd2(x, y, k.Gaussian(4.0), backend="reference")
    for name in ("float32", "tf32", "bfloat16"):
        with mmd.precision(name):
            a = x.float().to(device).requires_grad_()
            value = mmd.mmd2(a, y.float().to(device), k.Gaussian(4.0), backend=backend)
            twin = mmd.mmd2(a.detach(), a.detach().flip(0), k.Laplacian(4.0), "biased", backend=backend)
        value.backward()
        assert a.grad.isfinite().all()
        assert abs(twin.item()) < 2e-7, name
        errors[name] = abs(value.item() - gold.item()) / abs(gold.item())
    assert errors["float32"] < 2e-6 < errors["tf32"] < 2e-3
    assert errors["tf32"] < errors["bfloat16"] < 2e-2


def check_edges(backend, device):
    for n, m, d in ((2, 2, 1), (2, 17, 17), (16, 32, 16), (33, 2, 32)):
        function = with_gradients(lambda b, x, y: mmd.mmd2(x, y, k.Gaussian(3.0), backend=b))
        compare(function, samples(n, m, d), backend, device, floor=4e-6, what=f"{n} {m} {d}")
    x, y = (t.float().to(device) for t in samples(5, 4, 20))
    nothing = mmd.kernel_sum(x[:0], y, k.Gaussian(3.0), backend=backend)
    assert (
        nothing.total == 0 and nothing.rows.shape == (0,) and torch.equal(nothing.cols.cpu(), torch.zeros(4).double())
    )
    assert torch.equal(
        mmd.kernel_matmul(x, y[:0], y[:0, :2], k.Gaussian(3.0), backend=backend).cpu(), torch.zeros(5, 2)
    )


def check_double_backward(backend, device):
    x, y = samples(6, 5, 18)

    def function(b, x, y):
        x = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(mmd.mmd2(x, y, k.Gaussian(3.0), backend=b), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), x)

    compare(function, (x, y), backend, device, floor=1e-5)


__all__ = [name for name in dir() if name.startswith("check_")] + ["KERNELS", "mmfast"]
