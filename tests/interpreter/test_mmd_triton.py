"""The Triton kernels of the mmd slice against float64, with blocks of 16."""

from __future__ import annotations

import ctypes
import functools
import itertools
import math

import mmd_device as cases
import pytest
import torch

from mmfast import kernels as k
from mmfast import mmd
from mmfast.mmd import small, triton_gram, triton_launch, triton_narrow_launch, triton_prepare

BACKEND, DEVICE = "triton", "cpu"


@pytest.fixture(autouse=True)
def _any_size(monkeypatch):
    """Sizes of these tests stand for larger ones; `test_mmd_small.py` is about small batches."""
    monkeypatch.setattr(small, "MOST_ROWS", 0)
    monkeypatch.setattr(small, "_ways", {})  # what is found here is not for others


@pytest.mark.parametrize("name", cases.KERNELS)
def test_matches_gold(name):
    cases.check_kernel(name, BACKEND, DEVICE)


@pytest.mark.parametrize("name", ["dan", "poly", "energy", "matern52"])
def test_float64(name):
    cases.check_kernel(name, BACKEND, DEVICE, 17, 18, torch.float64, 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["dan", "poly"])
def test_half_precisions(name, dtype):
    # The products are exact, and not centred; gradients are rounded to the features' dtype.
    cases.check_kernel(name, BACKEND, DEVICE, 17, 18, dtype, 1e-5 if dtype == torch.float16 else 1e-4)


def test_one_sample_u():
    cases.check_kernel("gaussian", BACKEND, DEVICE, 18, 18, estimator="one_sample_u")


@pytest.mark.parametrize(
    "check",
    [
        cases.check_product,
        cases.check_weights,
        cases.check_parameters,
        cases.check_sums,
        cases.check_matmul,
        cases.check_lmmd,
        cases.check_pair,
        cases.check_permutations,
        cases.check_median,
        cases.check_far_and_near,
        cases.check_bad_row,
        cases.check_one_far_off,
        cases.check_precision,
        cases.check_edges,
        cases.check_double_backward,
    ],
    ids=lambda check: check.__name__,
)
def test_as_elsewhere(check):
    check(BACKEND, DEVICE)


def test_median_few_and_float64():
    cases.check_median(BACKEND, DEVICE, d=3)
    cases.check_median(BACKEND, DEVICE, d=18, dtype=torch.float64)


def test_matmul_of_half_precision():
    """K and what it multiplies are kept more exactly than the features are."""
    cases.check_matmul(BACKEND, DEVICE, torch.bfloat16, 1e-5)


def _wide(monkeypatch):
    """Few features as many: the sweep that keeps tiles, in place of the launch that keeps none."""
    monkeypatch.setattr(triton_narrow_launch, "MOST_FEATURES", 0)
    monkeypatch.setattr(small, "_find_way", lambda *args: None)


@pytest.mark.parametrize("name", ["gaussian", "dan", "no_ladder", "imq", "poly"])
def test_wide(name, monkeypatch):
    """What 128 features and fewer do not take, with tiles that are not masked."""
    _wide(monkeypatch)
    cases.check_kernel(name, BACKEND, DEVICE, 35, 34)


def test_one_far_off_in_many_features(monkeypatch):
    _wide(monkeypatch)
    cases.check_one_far_off(BACKEND, DEVICE, 35, 34)


def _watch(monkeypatch) -> list[str]:
    """Which launches there are."""
    names = []
    real = triton_narrow_launch.launch
    monkeypatch.setattr(
        triton_narrow_launch, "launch", lambda kernel, *args: names.append(kernel.__name__) or real(kernel, *args)
    )
    return names


VALUE = ["survey", "settle", "arrange", "narrow", "combine"]


@pytest.mark.parametrize("by", ["matrices", "operator"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["dan", "no_ladder", "imq", "poly"])
def test_narrow(name, dtype, by, monkeypatch):
    """Blocks with each pair, at the edge and on the diagonal, of several strips; values alone and with gradients."""
    if by == "operator":
        monkeypatch.setattr(small, "_is_matrix", lambda t: False)
    names = _watch(monkeypatch)
    floor = None if dtype == torch.float32 else 1e-4
    cases.check_kernel(name, BACKEND, DEVICE, 70, 75, dtype, floor, estimator="biased")
    assert names == [*VALUE, "finish"]
    x, y = (t.to(dtype) for t in cases.samples(70, 75, cases.KERNELS[name][1]))
    value = mmd.mmd2(x, y, cases.KERNELS[name][0], backend=BACKEND)
    assert names == [*VALUE, "finish", *VALUE]
    expected = mmd.mmd2(x.double(), y.double(), cases.KERNELS[name][0], backend="reference")
    torch.testing.assert_close(value.double(), expected, rtol=2e-5, atol=1e-6)


class _Counted(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("estimator", ["unbiased", "biased"])
def test_launches_of_matrices(estimator, monkeypatch):
    """The bandwidth and both gradients included: six launches, and of PyTorch room for what they leave."""
    names = _watch(monkeypatch)
    monkeypatch.setattr(mmd.small._backend, "nobody_looks_on", lambda: True)
    monkeypatch.setattr(triton_narrow_launch, "launch", lambda kernel, *args: names.append(kernel.__name__))
    x, y = (t.float().requires_grad_() for t in cases.samples(70, 75, 37))
    kernel = k.MultiGaussian()
    mmd.mmd2(x, y, kernel, estimator, backend=BACKEND)
    names.clear()
    with _Counted() as counted:
        value = mmd.mmd2(x, y, kernel, estimator, backend=BACKEND)
    assert names == VALUE
    assert set(counted.names) <= {"aten::empty.memory_format", "aten::empty_like"} and len(counted.names) <= 4
    torch.autograd.grad(value, (x, y))
    assert names == [*VALUE, "finish"]


@pytest.mark.parametrize(
    "rule", [mmd.bandwidth.MeanDistance(points, scale=0.7) for points in mmd.bandwidth.POINTS], ids=mmd.bandwidth.POINTS
)
def test_narrow_finds_lengths(rule):
    """The mean over each choice of pairs, of data far from the origin, against the rule itself."""
    x, y = cases.samples(70, 75, 37)
    y = y * torch.linspace(1, 2, 75)[:, None]  # not the same in each block of rows
    function = cases.with_gradients(lambda b, x, y: mmd.mmd2(x, y, k.Gaussian(rule), backend=b))
    cases.compare(function, (x + 30, y + 30), BACKEND, DEVICE, floor=1e-5)


def test_narrow_twice(monkeypatch):
    """Second derivatives of what six launches compute, with the length that they found."""
    x, y = cases.samples(35, 20, 20)
    names = _watch(monkeypatch)

    def function(b, x, y):
        x, y = x.requires_grad_(), y.requires_grad_()
        by_x, by_y = torch.autograd.grad(mmd.mmd2(x, y, k.MultiGaussian(), backend=b), (x, y), create_graph=True)
        return torch.autograd.grad(by_x.square().sum() + by_y.sin().sum(), (x, y))

    cases.compare(function, (x, y), BACKEND, DEVICE, floor=1e-5)
    assert names == [*VALUE, "finish"]


@pytest.mark.parametrize("shape", [(16, 32), (32, 32), (16, 16)])
@pytest.mark.parametrize("gradient", [False, True])
def test_narrow_tiles(shape, gradient, monkeypatch):
    """Tiles of other shapes, wide ones too, in more strips, long and short: what float64 gives, each pair once."""
    monkeypatch.setattr(triton_narrow_launch, "_LONGEST", 4)
    x, y = cases.samples(70, 211, 20)
    kernel = cases.KERNELS["dan"][0]
    sizes = triton_narrow_launch.Sizes(*shape, 4, 1, None, 2)
    triton_narrow_launch.use(*((None, sizes) if gradient else (sizes, None)))
    try:
        if gradient:
            function = cases.with_gradients(lambda b, x, y: mmd.mmd2(x, y, kernel, backend=b))
            cases.compare(function, (x, y), BACKEND, DEVICE, floor=1e-5)
        else:
            value = mmd.mmd2(x.float(), y.float(), kernel, backend=BACKEND)
            expected = mmd.mmd2(x, y, kernel, backend="reference")
            torch.testing.assert_close(value.double(), expected, rtol=2e-5, atol=1e-6)
    finally:
        triton_narrow_launch.use(None, None)


def _tiles_of_pairs(n: int, m: int, second: int):
    """What csrc/mmd/mmd_pairs.h has: rows, columns and which sum they count for."""
    for r in range(n // 192):
        yield slice(r * 192, (r + 1) * 192), slice(0, r * 192 // 128 * 128), 0
    for r in range(m // 192):
        rows = slice(second + r * 192, second + (r + 1) * 192)
        yield rows, slice(second, second + r * 192 // 128 * 128), 1
        yield rows, slice(0, n // 128 * 128), 2


def _at(address: int, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    size = math.prod(shape) * dtype.itemsize
    return torch.frombuffer((ctypes.c_char * size).from_address(address), dtype=dtype).view(shape)


def _pairs(calls, hi, lo, norms, numbers, table, coefs, sums, n, m, second, rows, room, terms, blocks, batch, all_sums):
    """In place of the kernel of CUDA C++: the same sums, of an item's first share."""
    assert (batch, all_sums) == (1, False)
    at = _at
    points = at(hi, torch.float16, rows, 64).double() + at(lo, torch.float16, rows, 64).double()
    norms, numbers = at(norms, torch.float32, rows).double(), at(numbers, torch.float32, room)
    found = at(sums, torch.float64, blocks, 3).zero_()
    calls.append(float(numbers[1]))
    if numbers[1] > 0:
        for i, j, which in _tiles_of_pairs(n, m, second):
            u = (points[i] @ points[j].T * numbers[0] + norms[i, None] + norms[None, j]).exp2()
            for t in range(terms):
                found[0, which] += numbers[7 + t].double() * (u**2 ** (terms - 1 - t)).sum()
        found *= at(table, torch.float64, terms, 4)[0, 0]


@pytest.mark.parametrize(("n", "m", "far"), [(390, 330, False), (130, 200, False), (192, 70, True)])
def test_narrow_beside_pairs(n, m, far, monkeypatch):
    """Between the two each pair is seen once; points too far apart for the short way are all left here."""
    calls = []
    monkeypatch.setattr(triton_narrow_launch, "has_pairs", lambda device: True)
    monkeypatch.setattr(triton_narrow_launch, "_PAIR_LEAST", 0)
    monkeypatch.setattr(triton_narrow_launch._backend._C, "mmd_pairs", functools.partial(_pairs, calls), raising=False)
    x, y = cases.samples(n, m, 50)
    if far:
        y[5] = 2000
    kernel = k.MultiGaussian(bandwidth=100.0)
    triton_narrow_launch.use_pairs(False)
    mmd.mmd2(x.float(), y.float(), k.MultiGaussian(bandwidth=100.0), backend=BACKEND)  # whose way is forgotten then
    triton_narrow_launch.use_pairs(True)
    try:
        value = mmd.mmd2(x.float(), y.float(), kernel, backend=BACKEND)
    finally:
        triton_narrow_launch.use_pairs(None)
    assert len(calls) == 1 and (calls[0] > 0) is not far
    expected = mmd.mmd2(x, y, kernel, backend="reference")
    torch.testing.assert_close(value.double(), expected, rtol=2e-5, atol=1e-6)


def _pulls(calls, hi, lo, norms, numbers, table, coefs, totals, grads, done, n, m, second, rows, room, terms, strips,
           strips_x, tiles, batch, all_sums):  # fmt: skip
    """In place of that with gradients: whole tiles of 128 × 128 but the diagonal's, of blocks that are whole; what it
    does not do it leaves as it is. Every third block is left as if its weights were too small."""
    assert (batch, all_sums, rows % 128) == (1, False, 0)
    row_tiles, split = rows // 128, second // 128
    points = _at(hi, torch.float16, rows, 64).double() + _at(lo, torch.float16, rows, 64).double()
    norms, numbers = _at(norms, torch.float32, rows).double(), _at(numbers, torch.float32, room).double()
    weights, coefs = _at(table, torch.float64, terms, 4), _at(coefs, torch.float64, 3)
    totals, done = _at(totals, torch.float64, row_tiles, strips), _at(done, torch.int32, row_tiles, strips).zero_()
    grads = _at(grads, torch.float32, strips, rows, 64)
    slopes, parts = numbers[7 + terms : 7 + 2 * terms], numbers[7 + 3 * terms : 7 + 4 * terms]
    for row, strip in itertools.product(range(row_tiles), range(strips)):
        of_y, with_y = row >= split, strip >= strips_x
        begin = split + (strip - strips_x) * tiles if with_y else strip * tiles
        end = min(begin + tiles, split + m // 128 if with_y else n // 128)
        columns = [t for t in range(begin, end) if t != row]
        whole = (row + 1) * 128 <= (second + m if of_y else n)
        scalar = coefs[2] if of_y != with_y else 2 * coefs[int(of_y)]
        if not (numbers[1] > 0 and whole and columns and scalar != 0) or (row + strip) % 3 == 2:
            continue
        i = slice(row * 128, (row + 1) * 128)
        done[row, strip], total, found = 1, 0, torch.zeros(128, 64, dtype=torch.float64)
        for t in columns:
            j = slice(t * 128, (t + 1) * 128)
            u = (points[i] @ points[j].T * numbers[0] + norms[i, None] + norms[None, j] + numbers[6]).exp2()
            powers = [u**2 ** (terms - 1 - t) for t in range(terms)]
            g = sum(s * p for s, p in zip(slopes.tolist(), powers, strict=True))
            found += g.sum(1, keepdim=True) * points[i] - g @ points[j]
            if t < row:
                total += sum(w * p.sum() for w, p in zip(parts.tolist(), powers, strict=True))
        totals[row, strip] = total * weights[0, 0]
        grads[strip, i] = (2 * numbers[5] * scalar * numbers[4] * found).float()
    calls.append(int(done.sum()))


@pytest.mark.parametrize(("n", "m", "far"), [(390, 330, False), (130, 300, False), (256, 70, True)])
def test_narrow_beside_gradients_of_pairs(n, m, far, monkeypatch):
    """Between the two each pair is seen from both sides; what is not done there is all done here."""
    calls = []
    monkeypatch.setattr(triton_narrow_launch, "has_pairs", lambda device: True)
    monkeypatch.setattr(triton_narrow_launch, "_PAIR_LEAST", 0)
    extension = triton_narrow_launch._backend._C
    monkeypatch.setattr(extension, "mmd_pairs_gradient", functools.partial(_pulls, calls), raising=False)
    x, y = cases.samples(n, m, 50)
    if far:
        y[5] = 2000
    kernel = k.MultiGaussian(bandwidth=100.0)
    function = cases.with_gradients(lambda b, x, y: mmd.mmd2(x, y, kernel, backend=b))
    triton_narrow_launch.use_pairs(None, True)
    try:
        cases.compare(function, (x, y), BACKEND, DEVICE, floor=1e-5)
    finally:
        triton_narrow_launch.use_pairs(None)
    assert len(calls) == 1 and (calls[0] > 0) is not far


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("strip", [1, 5, 16, 31, 128])
def test_strips(strip, gradient, monkeypatch):
    """Each column is in one strip, and where they are cut the last ones are short."""
    monkeypatch.setattr(triton_narrow_launch, "_CUT", 16)
    for tiles in ((256, 256), (512, 20), (4, 1), (40, 600), (1, 300)):
        long, short, longs, shorts = triton_narrow_launch._strips(tiles, strip, gradient)
        assert short <= long <= strip
        for count, of_long, of_short in zip(tiles, longs, shorts, strict=True):
            least = of_long * long + of_short * short
            assert count <= least < count + (short if of_short else long)
        if strip >= 16 and max(tiles) >= 4 * strip and not gradient:
            assert short < long and max(shorts) > 0
    assert triton_narrow_launch._strips((256, 256), 128, True) == (112, 32, (2, 2), (1, 1))


@pytest.mark.parametrize("weights", [[-0.5, 2.0, 0.25], [1e-7, 1.0, 1.0], [0.0, 1.0, -1.0]])
def test_narrow_weights(weights):
    """The first weight divides the others: of either sign, and too small for that."""
    x, y = cases.samples(70, 75, 20)
    kernel = k.MultiGaussian([10.0, 20.0, 40.0], weights)
    function = cases.with_gradients(lambda b, x, y: mmd.mmd2(x, y, kernel, backend=b))
    cases.compare(function, (x, y), BACKEND, DEVICE, floor=1e-5)


def test_narrow_bad_rows():
    """What is not finite is so in the length that is found in it, and a given one leaves the other rows alone."""
    x, y = (t.float() for t in cases.samples(70, 75, 37))
    for bad in (float("nan"), float("inf")):
        x[3, 5] = bad
        assert mmd.mmd2(x, y, k.MultiGaussian(), backend=BACKEND).isnan()
        leaves = x.clone().requires_grad_(), y.clone().requires_grad_()
        value = mmd.mmd2(*leaves, k.MultiGaussian([40.0, 80.0]), backend=BACKEND)
        assert value.isnan()
        by_x, by_y = torch.autograd.grad(value, leaves)
        assert by_x[3].isnan().all() and by_y.isnan().all()


def test_narrow_short_way():
    """Blocks whose weights are all far below the largest there can be take the long way, with all their digits."""
    x, y = cases.samples(64, 64, 20)
    function = cases.with_gradients(lambda b, x, y: mmd.mmd2(x, y, k.Gaussian(0.9), backend=b))
    out, eager, gold = cases.three_ways(function, (x, y), BACKEND, DEVICE)
    for a, e, g in zip(out[1:], eager[1:], gold[1:], strict=True):
        row = g.abs().amax(1, keepdim=True)
        assert row.max() < 1e-4  # of weights up to 1
        assert ((a - g).abs() / row).max() <= 4 * ((e - g).abs() / row).max() + 1e-5


@pytest.mark.parametrize("order", [1, -1])
def test_narrow_far(order):
    """A row's weights of many sizes, the largest first or last, and far below 1: each row's gradient has its digits."""
    x, y = cases.samples(33, 48, 20)
    y = y * torch.linspace(0.2, 2.5, 48, dtype=torch.float64)[:, None]
    y = y if order > 0 else y.flip(0)
    function = cases.with_gradients(lambda b, x, y: mmd.mmd2(x, y, k.Gaussian(0.5), backend=b))
    out, eager, gold = cases.three_ways(function, (x, y), BACKEND, DEVICE)
    for a, e, g in zip(out[1:], eager[1:], gold[1:], strict=True):
        row = g.abs().amax(1, keepdim=True)
        assert row.min() < 1e-9 * row.max()
        worst = ((e - g).abs() / row).max()
        assert ((a - g).abs() / row).max() <= 4 * worst + 1e-5


def test_powers():
    """Scales are those of `torch.frexp`, also of 0, of powers of two and of what is hardly a number."""
    most = torch.tensor([0, 1, 0.9999999, 2, 3, 1e-30, 1e-42, 3e38, 65504, 2.0**-75])[:, None].repeat(1, 35)
    most[:, :34] *= torch.rand(10, 34).sort(1).values
    found = torch.empty(3, 10)
    triton_prepare.powers[(10,)](most, *found, 35, MOST=60, LANES=16)
    power = (15 - torch.frexp(most.amax(1))[1]).clamp(-60, 60)
    for values, exponent in zip(found, (power, -power, -2 * power), strict=True):
        assert torch.equal(values, torch.ldexp(torch.ones(10), exponent))


def test_panels(monkeypatch):
    """A few rows of tiles at a time give what all of them at once do, and twice the same bits."""
    _wide(monkeypatch)
    x, y = (t.float() for t in cases.samples(35, 20, 20))

    def run():
        return cases.with_gradients(lambda b, x, y: mmd.mmd2(x, y, k.MultiGaussian(), backend=b))(BACKEND, x, y)

    whole = run()
    assert all(torch.equal(a, b) for a, b in zip(whole, run(), strict=True))
    monkeypatch.setattr(triton_launch, "_PANEL", 0)
    monkeypatch.setattr(triton_launch, "_POINTS_SHARE", 0)
    for a, b in zip(whole, run(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


@pytest.fixture
def by_library(monkeypatch):
    """Few points of few features as many of many: products by the library. How often, and whether with gradients."""
    _wide(monkeypatch)
    for name in ("LEAST_ROWS", "LEAST_ROWS_OF_VALUES", "LEAST_FEATURES_OF_VALUES"):
        monkeypatch.setattr(triton_gram, name, 0)
    calls, computed = [], triton_gram.forward
    monkeypatch.setattr(triton_gram, "forward", lambda *args: calls.append(args[0].gradient) or computed(*args))
    return calls


def test_one_far_off_by_library(by_library):
    cases.check_one_far_off(BACKEND, DEVICE, 70, 40, 40)
    assert by_library == [True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["dan", "no_ladder", "imq", "poly"])
def test_by_library(name, dtype, by_library):
    """Several panels and shares, tiles with each pair, at the edge and on the diagonal; values alone and gradients."""
    floor = None if dtype == torch.float32 else 1e-4
    cases.check_kernel(name, BACKEND, DEVICE, 70, 40, dtype, floor, estimator="biased")
    assert by_library == [True]
    x, y = (t.to(dtype) for t in cases.samples(70, 40, cases.KERNELS[name][1]))
    value = mmd.mmd2(x, y, cases.KERNELS[name][0], backend=BACKEND)
    assert by_library == ([True, False] if dtype == torch.float32 else [True])  # in one part the sweep is as fast
    expected = mmd.mmd2(x.double(), y.double(), cases.KERNELS[name][0], backend="reference")
    torch.testing.assert_close(value.double(), expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("estimator", ["unbiased", "one_sample_u"])
def test_by_library_of_batches(estimator, by_library):
    """Of three items with room for their own; what has no coefficient counts for nothing."""
    x, y = cases.samples(40, 40, 20, batch=(3,))
    function = cases.with_gradients(lambda b, x, y: mmd.mmd2(x, y, k.Gaussian(3.0), estimator, backend=b))
    cases.compare(function, (x, y), BACKEND, DEVICE)
    assert by_library == [True]


@pytest.mark.parametrize("estimator", ["unbiased", "biased"])
def test_by_library_of_matrices(estimator, monkeypatch):
    """Bandwidth and all, with columns in chunks of which the last one is not full; second derivatives too."""
    for name in ("LEAST_ROWS", "LEAST_ROWS_OF_VALUES", "LEAST_FEATURES_OF_VALUES"):
        monkeypatch.setattr(triton_gram, name, 0)
    monkeypatch.setattr(triton_narrow_launch, "MOST_FEATURES", 0)
    monkeypatch.setattr(small, "MOST_ROWS", 0)
    monkeypatch.setattr(small, "_ways", {})
    calls, computed = [], triton_gram.forward
    monkeypatch.setattr(triton_gram, "forward", lambda *args: calls.append(args[0].chunks) or computed(*args))
    x, y = (t + 3 for t in cases.samples(70, 40, 40))
    function = cases.with_gradients(lambda b, x, y: mmd.mmd2(x, y, k.MultiGaussian(), estimator, backend=b))
    cases.compare(function, (x, y), BACKEND, DEVICE)
    assert calls == [3]
    a, b = (t.float().requires_grad_() for t in (x, y))

    def second(backend):
        value = mmd.mmd2(a, b, k.MultiGaussian(), estimator, backend=backend)
        (grad,) = torch.autograd.grad(3 * value, a, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), (a, b))

    for found, expected in zip(second(BACKEND), second("reference"), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("order", [1, -1])
def test_by_library_far(order, by_library):
    """As `test_narrow_far`: weights that grow from panel to panel, or do not, have one scale."""
    x, y = cases.samples(100, 110, 20)
    x, y = (t * torch.linspace(0.2, 2.5, len(t), dtype=torch.float64)[:, None] for t in (x, y))
    if order < 0:
        x, y = x.flip(0), y.flip(0)
    function = cases.with_gradients(lambda b, x, y: mmd.mmd2(x, y, k.Gaussian(0.5), backend=b))
    out, eager, gold = cases.three_ways(function, (x, y), BACKEND, DEVICE)
    assert by_library == [True]
    for a, e, g in zip(out[1:], eager[1:], gold[1:], strict=True):
        row = g.abs().amax(1, keepdim=True)
        assert row.min() < 1e-9 * row.max()
        worst = ((e - g).abs() / row).max()
        assert ((a - g).abs() / row).max() <= 4 * worst + 1e-5


@pytest.mark.parametrize("dtype,taken", [(torch.float32, []), (torch.bfloat16, [True])])
def test_by_library_adds_up_in_float32(dtype, taken, by_library):
    """cuBLAS adds up float16 in float16 where PyTorch has been told so, and then the sweep multiplies."""
    settings = torch.backends.cuda.matmul
    settings.allow_fp16_accumulation = True
    try:
        cases.check_kernel("gaussian", BACKEND, DEVICE, 19, 20, dtype, None if dtype == torch.float32 else 1e-4)
    finally:
        settings.allow_fp16_accumulation = False
    assert by_library == taken


def test_by_library_where_it_is_refused(by_library):
    """PyTorch refuses cuBLAS in programs that ask for algorithms in a fixed order, unless its workspace is settled."""
    x, y = (t.float().requires_grad_() for t in cases.samples(19, 20, 20))
    before = torch.is_deterministic_algorithms_warn_only_enabled()
    for warns in (False, True):
        torch.use_deterministic_algorithms(True, warn_only=warns)
        try:
            mmd.mmd2(x, y, k.Gaussian(3.0), backend=BACKEND)
        finally:
            torch.use_deterministic_algorithms(True, warn_only=before)
        assert by_library == [True] * warns
