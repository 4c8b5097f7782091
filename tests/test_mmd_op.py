"""The operators of the mmd slice: the rules that torch has for them, and its compile, export, vmap and threads."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import mmfast
from mmfast import kernels as k
from mmfast.mmd import op
from mmfast.mmd.terms import GAUSSIAN, LAPLACIAN, POLYNOMIAL

_ops = torch.ops.mmfast
# name → (families, layers, rows of params, widths of the layers)
TERMS = {
    "gaussians": ((GAUSSIAN, GAUSSIAN), (0, 0), [[1.0, 0.1, 0, 0], [0.5, 0.2, 0, 0]], [11]),
    "two layers": ((LAPLACIAN, POLYNOMIAL), (0, 1), [[1.0, 0.3, 0, 0], [1.0, 0.1, 1.0, 2.0]], [8, 3]),
}


def _features(n: int, d: int = 11, dtype=torch.float32, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, n, d, dtype=dtype).requires_grad_()


def _terms(name: str) -> tuple:
    families, layers, rows, dims = TERMS[name]
    return torch.tensor(rows, dtype=torch.float64, requires_grad=True), dims, families, layers


def _arguments(name: str, terms: str, dtype) -> list[tuple]:
    """Calls of ``mmd_<name>``: all of it, and with what can be left out left out."""
    x, y, kernel = _features(9, dtype=dtype), _features(7, dtype=dtype), _terms(terms)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    wx, wy = (torch.rand(2, n, dtype=compute, requires_grad=True) for n in (9, 7))
    coefs = torch.tensor([0.2, 0.3, -1.0], dtype=torch.float64, requires_grad=True)
    if name == "quadratic":
        needs = [[True] * 6, [True, False, False, False, False, False], [False] * 6]
        weights = (wx, wy), (None, None), (wx, None)
        return [(x, y, *w, coefs, *kernel, need) for w, need in zip(weights, needs, strict=True)]
    if name == "sums":
        return [(x, y, *kernel), (x, None, *kernel)]
    if name == "matmul":
        v, own = (torch.randn(2, n, 3, dtype=compute, requires_grad=True) for n in (7, 9))
        return [(x, y, v, *kernel), (x, None, own, *kernel)]
    if name == "pair":
        return [(x, *kernel, _features(9, dtype=dtype), *_terms(terms))]
    if name == "permutations":
        return [(x.detach()[:1], kernel[0].detach(), *kernel[1:], torch.rand(5, 9) < 0.5)]
    if name == "select":
        a, b, ranks = x.detach()[0], y.detach()[0], torch.tensor([0, 5, 30])
        return [(a, b, ranks, False, False), (a, None, ranks, True, True), (a, None, ranks, False, False)]
    if name == "quadratic_backward":
        calls = []
        for args in _arguments("quadratic", terms, dtype)[:2]:
            value, _, *units = _ops.mmd_quadratic(*args)
            calls.append((torch.randn_like(value).requires_grad_(), *args, *(u.detach() for u in units)))
        return calls
    forward = name.removesuffix("_backward")
    calls = []
    for args, wanted in itertools.product(_arguments(forward, terms, dtype), (True, False)):
        out = getattr(_ops, f"mmd_{forward}")(*args)
        grads = [torch.randn_like(t).requires_grad_() for t in (out if isinstance(out, tuple) else (out,))]
        needs = [True, wanted, wanted, wanted][: 4 if name == "pair_backward" else 3]
        calls.append((*grads, *args, needs))
    return calls


_RULES = "test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"


@pytest.mark.parametrize("name", op._SCHEMAS)
def test_opcheck(name, mmd_native):
    """The registered operators keep torch's rules: schema, fake tensors, autograd, tracing with any sizes."""
    checked = getattr(_ops, f"mmd_{name}").default
    traced = False
    for terms, dtype in (("gaussians", torch.float32), ("two layers", torch.float32), ("gaussians", torch.bfloat16)):
        for args in _arguments(name, terms, dtype):
            # Tracing takes seconds. Derivatives of backward operators are the reference's, which adds in other orders.
            rules = _RULES[:3] if traced else _RULES
            torch.library.opcheck(checked, args, test_utils=rules, rtol=1e-4, atol=1e-4)
            traced = True


def test_every_operator_is_checked():
    """What is registered is what the parametrization above goes through."""
    names = torch._C._dispatch_get_all_op_names()
    assert {n.removeprefix("mmfast::mmd_") for n in names if n.startswith("mmfast::mmd_")} == set(op._SCHEMAS)


def _losses(x, y):
    """All that is differentiated, in one graph."""
    v, labels = torch.linspace(-1, 1, 2 * len(y)).view(-1, 2), torch.arange(len(x)) % 3
    layers_x, layers_y = (x, x[:, :3]), (y, y[:, :3])
    product = k.Product([k.MultiGaussian(), k.Laplacian(2.0)])
    return (
        mmfast.mmd2(x, y),
        mmfast.mmd2(x, y, k.Gaussian("median"), "biased"),
        mmfast.mmd2(x, y, k.Polynomial() + k.Laplacian(3.0, p=1), weights_x=torch.linspace(1, 2, len(x))),
        mmfast.mmd2(x, y, estimator="block", block_size=5),
        mmfast.mmd2(x, y, estimator="linear"),
        mmfast.mmd2(layers_x, layers_y, product),
        mmfast.kernel_matmul(x, y, v, k.Gaussian(3.0)).square().sum(),
        mmfast.kernel_sum(x, y, k.Matern(2.0)).squares,
        mmfast.cka(x, y, k.Gaussian(3.0), k.Gaussian(4.0)),
        mmfast.cka(x, y),
        mmfast.hsic(x, y, estimator="unbiased"),
        mmfast.mmd2_power(x, y),
        mmfast.mmd2_variance(x, y),
        mmfast.kid(x, y)[0],
        mmfast.lmmd(x, y, labels, labels, n_classes=3),
        mmfast.witness(x, x, y).square().sum(),
    )


def _weighted_sum(values) -> torch.Tensor:
    """One number that depends on each."""
    return sum((i + 1) * v.double() for i, v in enumerate(values))


def test_compile_fullgraph(mmd_native):
    """No graph break, equal values and gradients."""
    torch.compiler.reset()
    compiled = torch.compile(_losses, fullgraph=True, backend="aot_eager")
    x, y = (torch.randn(20, 6, requires_grad=True) for _ in range(2))
    expected, found = _losses(x, y), compiled(x, y)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad(_weighted_sum(found), (x, y)), torch.autograd.grad(_weighted_sum(expected), (x, y))
    )


def test_compile_inductor(mmd_native):
    """The default backend of torch.compile, around a loss whose features a layer makes."""
    layer, x, y = torch.nn.Linear(6, 5), torch.randn(30, 6), torch.randn(21, 6)

    def step(x, y):
        return mmfast.mmd2(layer(x).relu(), layer(y).relu())

    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(step, fullgraph=True)(x, y), step(x, y))
    expected = torch.autograd.grad(step(x, y), tuple(layer.parameters()))
    found = torch.autograd.grad(torch.compile(step, fullgraph=True)(x, y), tuple(layer.parameters()))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_compile_test(mmd_native):
    """A permutation test in a graph, its permutations given."""
    x, y, members = torch.randn(20, 6), torch.randn(20, 6), torch.stack([torch.randperm(40) for _ in range(9)]) < 20

    def test(x, y):
        return mmfast.two_sample_test(x, y, k.Gaussian("median"), permutations=members)

    torch.compiler.reset()
    torch.testing.assert_close(tuple(torch.compile(test, backend="aot_eager")(x, y)), tuple(test(x, y)))


class _Loss(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kernel = k.MultiGaussian()

    def forward(self, x, y):
        return mmfast.mmd2(x, y, self.kernel), mmfast.kernel_sum(x, y, k.Gaussian(2.0)).rows


def test_export(mmd_native):
    """The operators stand in the exported graph, for any number of rows."""
    rows = {"x": {0: torch.export.Dim("n", min=2)}, "y": {0: torch.export.Dim("m", min=2)}}
    program = torch.export.export(_Loss(), (torch.randn(9, 4), torch.randn(7, 4)), dynamic_shapes=rows)
    names = {str(node.target) for node in program.graph.nodes}
    assert {"mmfast.mmd_quadratic.default", "mmfast.mmd_sums.default"} <= names, names
    x, y = torch.randn(33, 4), torch.randn(12, 4)
    torch.testing.assert_close(program.module()(x, y), _Loss()(x, y))


def test_autocast(mmd_native):
    """Under autocast values and gradients are those without; half-precision features are computed in float32."""
    layer, x, y = torch.nn.Linear(12, 12), torch.randn(20, 12), torch.randn(20, 12)

    def grads(x, y, autocast):
        x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            total = _weighted_sum(_losses(x, y))
        return [total, *torch.autograd.grad(total, (x, y))]

    assert all(torch.equal(a, b) for a, b in zip(grads(x, y, True), grads(x, y, False), strict=True))
    with torch.autocast("cpu", torch.bfloat16):
        a, b = layer(x), layer(y)
        assert a.dtype == torch.bfloat16
        loss = mmfast.mmd2(a, b)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, mmfast.mmd2(a.float(), b.float()))
    loss.backward()
    assert layer.weight.grad.isfinite().all()


# ---- Function transforms

_TO_MAP = {
    "dan": lambda x, y: mmfast.mmd2(x, y),  # a bandwidth of its own for each sample
    "gaussian": lambda x, y: mmfast.mmd2(x, y, k.Gaussian(1.5)),
    "median": lambda x, y: mmfast.mmd2(x, y, k.Gaussian("median")),
    "matmul": lambda x, y: mmfast.kernel_matmul(x, y, y[:, :2], k.Laplacian(2.0)),
    "sums": lambda x, y: mmfast.kernel_sum(x, y, k.Gaussian(2.0)).cols,
    "cka": lambda x, y: mmfast.cka(x, y, k.Gaussian(2.0), k.Gaussian(1.0)),
}


@pytest.mark.filterwarnings("error")  # no fallback that torch warns of
@pytest.mark.parametrize("dims", [(0, 0), (2, None)])
@pytest.mark.parametrize("name", _TO_MAP)
def test_vmap_is_a_loop(name, dims, mmd_native):
    function = _TO_MAP[name]
    x = torch.randn(3, 8, 5).movedim(0, dims[0])
    y = torch.randn(8, 5) if dims[1] is None else torch.randn(3, 8, 5)
    pairs = zip(x.unbind(dims[0]), [y] * 3 if dims[1] is None else y, strict=True)
    expected = torch.stack([function(a, b) for a, b in pairs])
    torch.testing.assert_close(torch.func.vmap(function, in_dims=dims)(x, y), expected)


@pytest.mark.parametrize("name", _TO_MAP)
def test_batched_gradients(name, mmd_native):
    """Several upstream gradients at once, as a vectorised Jacobian takes them."""
    x, y = torch.randn(8, 5, requires_grad=True), torch.randn(8, 5)
    out = _TO_MAP[name](x, y)
    upstream = torch.randn(3, *out.shape, dtype=out.dtype)
    expected = torch.stack([torch.autograd.grad(out, x, g, retain_graph=True)[0] for g in upstream])
    torch.testing.assert_close(torch.autograd.grad(out, x, upstream, is_grads_batched=True)[0], expected)


def test_function_transforms(mmd_native):
    """grad, per-sample gradients, forward mode and the Hessian of torch.func: equal to those of autograd."""
    x, y = torch.randn(3, 6, 4, dtype=torch.float64), torch.randn(3, 6, 4, dtype=torch.float64)

    def loss(x, y):
        return mmfast.mmd2(x, y, k.MultiGaussian([2.0, 5.0]))

    def by_autograd(x, y):
        x = x.clone().requires_grad_()
        return torch.autograd.grad(loss(x, y), x)[0]

    expected = torch.stack([by_autograd(a, b) for a, b in zip(x, y, strict=True)])
    torch.testing.assert_close(torch.func.grad(loss)(x[0], y[0]), expected[0])
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(x, y), expected)
    direction = torch.randn_like(x[0])
    _, tangent = torch.func.jvp(lambda x: loss(x, y[0]), (x[0],), (direction,))
    torch.testing.assert_close(tangent, (expected[0] * direction).sum())
    hessian = torch.autograd.functional.hessian(lambda x: loss(x, y[0]), x[0])
    torch.testing.assert_close(torch.func.hessian(lambda x: loss(x, y[0]))(x[0]), hessian)


# ---- Threads


def _work(seed: int, n: int = 70, gradients: bool = True) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(n, 6, generator=generator).requires_grad_() for _ in range(2))
    values = _losses(x, y)
    test = mmfast.two_sample_test(x.detach(), y.detach(), n_permutations=20, generator=generator)
    found = torch.autograd.grad(_weighted_sum(values), (x, y)) if gradients else ()
    return [*values, *found, *test]


def _equal(a, b) -> bool:
    return all(torch.equal(s, t) for s, t in zip(a, b, strict=True))


def test_bits_do_not_depend_on_threads(mmd_native):
    """One thread, two threads, again: the same bits; enough points for several tasks at once."""
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 2, 1):
            torch.set_num_threads(count)
            results.append(_work(3, 300))
    finally:
        torch.set_num_threads(threads)
    # Bandwidths and sums over points are torch's own, whose order may depend on the threads for large tensors only.
    assert all(_equal(results[0], other) for other in results[1:])


def test_several_threads_call_at_once(mmd_native):
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(_work, range(12)))
    assert all(_equal(found, _work(seed)) for seed, found in enumerate(together))


class _Losses(Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> torch.Tensor:
        # Where torch has CUDA its autograd refuses to work in a process that was forked after it was used.
        return torch.cat([t.detach().double().flatten() for t in _work(index, gradients=torch.version.cuda is None)])


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork")
def test_fork(mmd_native):
    """Worker processes forked after a call with threads compute what their parent does."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        expected = [_Losses()[i] for i in range(4)]
        loader = DataLoader(_Losses(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60)
        for found, wanted in zip(loader, expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    finally:
        torch.set_num_threads(threads)
