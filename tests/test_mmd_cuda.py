"""The mmd slice on a GPU: the same cases as in Triton's interpreter, and what only a device can show."""

from __future__ import annotations

import mmd_device as cases
import pytest
import torch

from mmfast import kernels as k
from mmfast import mmd

pytestmark = pytest.mark.cuda
BACKENDS = ["cuda", "triton"]
DEVICE = "cuda"
CHECKS = [getattr(cases, name) for name in dir(cases) if name.startswith("check_") and name != "check_kernel"]


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.mark.parametrize("n,m", [(19, 20), (300, 150)])
@pytest.mark.parametrize("name", cases.KERNELS)
def test_matches_gold(name, n, m, backend):
    cases.check_kernel(name, backend, DEVICE, n, m)


@pytest.mark.parametrize("name", cases.KERNELS)
def test_float64(name, backend):
    cases.check_kernel(name, backend, DEVICE, 70, 80, torch.float64, 1e-11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["dan", "dan_few", "poly", "laplacian"])
def test_half_precisions(name, dtype, backend):
    cases.check_kernel(name, backend, DEVICE, 140, 150, dtype, 1e-5 if dtype == torch.float16 else 1e-4)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_as_elsewhere(check, backend):
    check(backend, DEVICE)


def step(x, y, kernel=None):
    """A training step's value and gradients."""
    a, b = x.clone().requires_grad_(), y.clone().requires_grad_()
    value = mmd.mmd2(a, b, kernel)
    return value.detach(), *torch.autograd.grad(value, (a, b))


# The last one multiplies by cuBLAS, in three panels.
SIZES = [(64, 64, 256), (256, 200, 700), (1500, 1100, 64), (1000, 900, 768), (500, 500, 3), (2500, 1700, 200)]


@pytest.mark.parametrize("n,m,d", SIZES)
def test_sizes(n, m, d):
    """Sizes of use, with every width of the table of tiles, against the reference in float64 on the device."""
    x, y = (t.cuda() for t in cases.samples(n, m, d))
    found = step(x.float(), y.float())
    a, b = x.requires_grad_(), y.requires_grad_()
    gold = mmd.mmd2(a, b, backend="reference")
    for out, expected in zip(found, (gold, *torch.autograd.grad(gold, (a, b))), strict=True):
        assert (out - expected).norm() <= 1e-5 * expected.norm()


def test_values_of_many():
    """Without gradients cuBLAS multiplies from 16 384 points of 512 features on."""
    x, y = (t.cuda() for t in cases.samples(9000, 8000, 520))
    found = mmd.mmd2(x.float(), y.float())
    with torch.no_grad():
        gold = mmd.mmd2(x, y)
    assert abs(found - gold) <= 1e-5 * abs(gold)


@pytest.mark.parametrize("n,m,d", SIZES)
def test_same_bits_every_time(n, m, d):
    x, y = (t.float().cuda() for t in cases.samples(n, m, d))
    first = step(x, y)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, step(x, y), strict=True))


@pytest.mark.parametrize("kernel", [None, k.Gaussian("median"), k.Laplacian(4.0), k.Energy()], ids=str)
def test_nothing_waits_for_the_device(kernel):
    x, y = (t.float().cuda() for t in cases.samples(200, 150, 40))
    step(x, y, kernel)  # constants are uploaded, kernels compiled
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(x, y, kernel)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("n,m,d", SIZES)
def test_graph(n, m, d):
    """Captured once, replayed on other samples."""
    x, y = (t.float().cuda() for t in cases.samples(n, m, d))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(x, y)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(x, y)
    x.copy_(x.flip(0) * 0.5)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, step(x, y), strict=True))


def test_streams():
    x, y = (t.float().cuda() for t in cases.samples(700, 600, 100))
    expected = step(x, y)
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    results = []
    for stream in streams * 3:
        with torch.cuda.stream(stream):
            results.append(step(x, y))
    torch.cuda.synchronize()
    for result in results:
        assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


def test_compile_fullgraph():
    x, y = (t.float().cuda() for t in cases.samples(100, 90, 40))
    compiled = torch.compile(lambda x, y: mmd.mmd2(x, y, k.Gaussian(3.0)), fullgraph=True)
    torch.testing.assert_close(compiled(x, y), mmd.mmd2(x, y, k.Gaussian(3.0)), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["dan", "dan_few", "poly", "laplacian"])
@pytest.mark.parametrize("estimator", ["biased", "unbiased", "one_sample_u"])
@pytest.mark.parametrize("n", [19, 256])
def test_small_batches(name, estimator, n):
    """Three launches for a step, and what the kernels for any number of rows give."""
    kernel, d = cases.KERNELS[name]
    cases.check_kernel(name, "triton", DEVICE, n, n, estimator=estimator)
    x, y = (t.float().cuda() for t in cases.samples(n, n, d))
    mmd.mmd2(x, y, kernel, estimator)
    torch.utils.deterministic.fill_uninitialized_memory = False  # that is a launch for each piece of memory
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        mmd.mmd2(x, y, kernel, estimator)
    on_device = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert sorted(on_device) == ["distances", "values"]


@pytest.mark.parametrize("name", ["dan", "no_ladder", "imq"])
@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
def test_large_batches_of_few_features(name, estimator):
    """Five launches for a value and one for gradients, on tiles with and without masks."""
    kernel, d = cases.KERNELS[name]
    cases.check_kernel(name, "triton", DEVICE, 700, 1500, estimator=estimator)
    x, y = (t.float().cuda().requires_grad_() for t in cases.samples(700, 1500, d))
    mmd.mmd2(x, y, kernel, estimator)
    torch.utils.deterministic.fill_uninitialized_memory = False  # that is a launch for each piece of memory
    one = torch.ones((), device=DEVICE)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        torch.autograd.grad(mmd.mmd2(x, y, kernel, estimator), (x, y), one)
    on_device = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert on_device == ["survey", "settle", "arrange", "narrow", "combine", "finish"]


@pytest.mark.parametrize(("n", "m", "d"), [(4000, 5000, 64), (190, 6000, 33), (9000, 300, 50), (20000, 16384, 64)])
@pytest.mark.parametrize("kernel", ["dan", "two"])
@pytest.mark.parametrize("gradient", [False, True])
def test_pairs_by_warpgroups(n, m, d, kernel, gradient):
    """The same value as without them, and gradients, and twice the same bits."""
    from mmfast.mmd import triton_narrow_launch

    if not triton_narrow_launch.has_pairs(torch.device(DEVICE)):
        pytest.skip("not in this build, or not for this GPU")
    x, y = (t.float().cuda().requires_grad_(gradient) for t in cases.samples(n, m, d))
    found = []
    try:
        for way in (True, True, False):
            triton_narrow_launch.use_pairs(way, way)
            value = mmd.mmd2(x, y, k.MultiGaussian() if kernel == "dan" else k.MultiGaussian([90.0, 180.0]))
            found.append((value, *torch.autograd.grad(value, (x, y))) if gradient else (value,))
    finally:
        triton_narrow_launch.use_pairs(None)
    for ours, again, expected in zip(*found, strict=True):
        assert torch.equal(ours, again)
        if ours.dim():
            assert (ours - expected).norm() <= 3e-5 * expected.norm()
        else:
            torch.testing.assert_close(ours, expected, rtol=2e-5, atol=1e-6)


def test_gradients_by_warpgroups_in_a_graph():
    """One more launch than without them, which a graph captures, and replays on other points."""
    from mmfast.mmd import triton_narrow_launch

    if not triton_narrow_launch.has_pairs(torch.device(DEVICE)):
        pytest.skip("not in this build, or not for this GPU")
    x, y = (t.float().cuda().requires_grad_() for t in cases.samples(4000, 5000, 64))
    kernel = k.MultiGaussian()

    def gradients() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(mmd.mmd2(x, y, kernel), (x, y))

    try:
        triton_narrow_launch.use_pairs(True, True)
        gradients()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = gradients()
        with torch.no_grad():
            x += y[:4000]
        graph.replay()
        for found, expected in zip(captured, gradients(), strict=True):
            assert torch.equal(found, expected)
    finally:
        triton_narrow_launch.use_pairs(None)


@pytest.mark.parametrize("d", [5, 40, 2048])
def test_small_batches_in_features(d):
    x, y = (t.cuda() for t in cases.samples(64, 50, d))
    ours = step(x.float(), y.float())
    a, b = x.requires_grad_(), y.requires_grad_()
    gold = mmd.mmd2(a, b, backend="reference")
    for out, expected in zip(ours, (gold, *torch.autograd.grad(gold, (a, b))), strict=True):
        assert (out - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("name", ["dan", "laplacian"])
def test_opcheck(name):
    kernel, d = cases.KERNELS[name]
    x, y = (t.float().cuda() for t in cases.samples(40, 30, d))
    ((_, terms),) = kernel.parts([x[None]], [y[None]])
    table = terms.params, [d], list(terms.families), list(terms.layers)
    coefs = torch.tensor([0.1, 0.2, -0.3], dtype=torch.float64, device="cuda")
    leaves = x[None].requires_grad_(), y[None].requires_grad_()
    arguments = *leaves, None, None, coefs, *table, [True, True, False, False, False, False]
    torch.library.opcheck(torch.ops.mmfast.mmd_quadratic.default, arguments)
    torch.library.opcheck(torch.ops.mmfast.mmd_sums.default, (*leaves, *table))


def test_peak_memory():
    """65 536 points of 2048 features: room for the points a few times over, not for the matrix of 17 GB."""
    if torch.cuda.get_device_properties(0).total_memory < 30e9:
        pytest.skip("needs 30 GB")
    n, d = 65536, 2048
    x = torch.randn(n, d, device="cuda")
    y = torch.randn(n, d, device="cuda") + 0.1
    a, b = x.requires_grad_(), y.requires_grad_()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    value = mmd.mmd2(a, b, k.Gaussian(60.0))
    grads = torch.autograd.grad(value, (a, b))
    peak = torch.cuda.max_memory_allocated() - before
    assert value.isfinite() and all(g.isfinite().all() for g in grads)
    assert peak < 7 * (x.numel() + y.numel()) * 4
