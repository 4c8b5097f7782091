"""Linear layers of half precision: by way of float32, or by units for it. Of float32: by oneDNN."""

import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmfast import _backend
from mmfast.fusion import projection
from mmfast.fusion.projection import linear, linear_parts, project
from mmfast.nn import CrossAttentionFusion, MultiheadAttention

HALF = (torch.bfloat16, torch.float16)


@pytest.fixture(params=[False, True], ids=["without", "with"])
def units(request, monkeypatch):
    monkeypatch.setattr(projection, "HAS_UNITS", dict.fromkeys(HALF, request.param))
    return request.param


def _inputs(dtype, bias=True):
    torch.manual_seed(0)
    shapes = [(3, 5, 24), (7, 24)] + [(7,)] * bias
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def _bound(dtype):
    return {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}[dtype]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", HALF)
def test_values_and_gradients(units, dtype, bias):
    inputs = _inputs(dtype, bias)
    out = linear(*inputs)
    upstream = torch.randn_like(out)
    grads = torch.autograd.grad(out, inputs, upstream)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    gold = F.linear(*exact)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), gold, rtol=_bound(dtype), atol=_bound(dtype))
    for x, got, expected in zip(inputs, grads, torch.autograd.grad(gold, exact, upstream.double()), strict=True):
        assert got.dtype == dtype and got.shape == x.shape
        torch.testing.assert_close(got.double(), expected, rtol=_bound(dtype), atol=4 * _bound(dtype))


@pytest.mark.parametrize("dtype", HALF)
def test_computed_in_float32_without_units(units, dtype, monkeypatch):
    seen = []
    monkeypatch.setattr(F, "linear", lambda x, *rest: seen.append(x.dtype) or torch._C._nn.linear(x, *rest))
    linear(*_inputs(dtype))
    linear(*_inputs(torch.float32))
    linear(*_inputs(torch.float64))
    assert seen == [dtype if units else torch.float32, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", HALF)
def test_under_autocast(units, dtype):
    inputs = _inputs(torch.float32)
    with torch.autocast("cpu", dtype):
        out = linear(*inputs)
        double = linear(*_inputs(torch.float64))
    assert out.dtype == dtype and double.dtype == torch.float64
    torch.testing.assert_close(out.float(), F.linear(*inputs), rtol=4 * _bound(dtype), atol=4 * _bound(dtype))


def test_mixed_dtypes_fail_as_in_torch(units):
    x, weight, bias = _inputs(torch.float32)
    with pytest.raises(RuntimeError, match="dtype"):
        linear(x.bfloat16(), weight, bias)


def test_hooks_and_other_layers_are_called(units):
    layer, x = nn.Linear(24, 7, dtype=torch.bfloat16), _inputs(torch.bfloat16)[0]
    assert torch.equal(project(layer, x), linear(x, layer.weight, layer.bias))
    handle = layer.register_forward_hook(lambda module, args, out: out + 1)
    assert torch.equal(project(layer, x), layer(x))
    handle.remove()
    handle = layer.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    assert torch.equal(project(layer, x), layer(x))
    handle.remove()
    other = nn.Sequential(layer, nn.ReLU())
    assert torch.equal(project(other, x), other(x))
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.append(module))
    try:
        project(layer, x)
    finally:
        handle.remove()
    assert seen == [layer]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", HALF)
def test_modules(units, dtype, compiled):
    torch.manual_seed(0)
    attention = MultiheadAttention(32, 4, batch_first=True, dtype=dtype)
    fusion = CrossAttentionFusion(32, 4, [24], gate="sigmoid", dtype=dtype)
    query, key, other = (torch.randn(2, n, e, dtype=dtype) for n, e in ((5, 32), (9, 32), (9, 24)))

    def run(query, key, other):
        return attention(query, key, key)[0] + fusion(query, [other])

    out = (torch.compile(run, fullgraph=True, backend="aot_eager") if compiled else run)(query, key, other)
    out.sum().backward()
    assert out.dtype == dtype and all(p.grad.isfinite().all() for p in [*attention.parameters(), *fusion.parameters()])
    attention.double(), fusion.double()
    expected = run(query.double(), key.double(), other.double())
    torch.testing.assert_close(out.double(), expected, rtol=8 * _bound(dtype), atol=8 * _bound(dtype))


# ---- Our own kernels, where the CPU has AMX or AVX512_BF16, and oneDNN


def _projects():
    return _backend._C is not None and _backend._C.fusion_projects()


def _has_onednn():
    return _backend._C is not None and hasattr(torch.ops.mkldnn, "_linear_pointwise")


needs_units = pytest.mark.skipif("not _projects()", reason="needs a CPU with AMX or AVX512_BF16")


@pytest.fixture(params=[torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def kind(request, monkeypatch):
    """What is multiplied, where it can be; oneDNN on every processor that torch has it for."""
    if request.param == torch.bfloat16 and not _projects():
        pytest.skip("needs a CPU with AMX or AVX512_BF16")
    if request.param == torch.float32:
        if not _has_onednn():
            pytest.skip("needs the extension, and oneDNN in torch")
        monkeypatch.setattr(projection, "prefers_onednn", lambda: True)
    return request.param


@pytest.fixture
def calls(monkeypatch):
    """How often our kernels were asked and took it; torch's product counts as a refusal."""
    seen = []
    if _backend._C is not None:
        ours = _backend._C.fusion_linear

        def ask(*args):
            result = ours(*args)
            seen.append(result is not None)
            return result

        monkeypatch.setattr(_backend._C, "fusion_linear", ask)
    return seen


def _large(rows=(2, 600), features=160, out=192, bias=True, seed=0, dtype=torch.bfloat16):
    """Enough multiply-adds to be worth our kernels, or oneDNN's."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(*rows, features), (out, features)] + [(out,)] * bias
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    tensors[1] *= features**-0.5
    return [x.to(dtype).requires_grad_() for x in tensors]


def _error(got, exact):
    got, exact = got.detach().double(), exact.detach()
    return float((got - exact).square().mean().sqrt() / exact.square().mean().sqrt())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("rows", [(1500,), (3, 511), (5, 7, 19)])
def test_as_exact_as_torch(calls, kind, rows, parts, bias):
    features, out = 288 if len(rows) == 3 else 128, 192
    inputs = _large(rows, features, out, bias, dtype=kind)
    got = linear_parts(*inputs, *(() if bias else (None,)), parts)
    assert calls == [True] and len(got) == parts
    upstream = [torch.randn_like(y) for y in got]
    grads = torch.autograd.grad(got, inputs, upstream)
    theirs = F.linear(*inputs)
    their_grads = torch.autograd.grad(theirs, inputs, torch.cat(upstream, -1))
    exact = [x.detach().double().requires_grad_() for x in inputs]
    gold = F.linear(*exact)
    gold_grads = torch.autograd.grad(gold, exact, torch.cat(upstream, -1).double())
    ours = [torch.cat(got, -1), *grads]
    for mine, other, truth in zip(ours, [theirs, *their_grads], [gold, *gold_grads], strict=True):
        assert mine.shape == truth.shape and mine.dtype == kind and mine.is_contiguous()
        # Of float32 the order of sums is the libraries' own.
        factor, most = {torch.bfloat16: (1.1, 2.0**-7), torch.float32: (2, 1e-6)}[kind]
        assert _error(mine, truth) <= factor * _error(other, truth) < most


def test_strided_inputs_and_gradients(calls, kind):
    def equal(got, expected):  # how rows of a weight lie may decide on the order of oneDNN's sums
        if kind == torch.bfloat16:
            assert torch.equal(got, expected)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6 * float(expected.detach().abs().max()))

    x, weight, bias = _large((600, 2), dtype=kind)
    plain = linear(x.transpose(0, 1).contiguous(), weight, bias)
    equal(linear(x.transpose(0, 1), weight, bias), plain)
    wide = torch.cat([x, x], -1)[..., :160]
    equal(linear(wide.transpose(0, 1), weight, bias), plain)
    inner = torch.cat([weight, weight], -1)[:, 160:]
    equal(linear(x.transpose(0, 1), inner, bias), plain)
    expected = torch.autograd.grad(plain, (x, weight, bias), torch.ones_like(plain), retain_graph=True)
    for given in (plain.sum(), None):
        upstream = torch.ones(192, dtype=kind).expand_as(plain) if given is None else None
        got = torch.autograd.grad(plain if given is None else given, (x, weight, bias), upstream, retain_graph=True)
        for mine, other in zip(got, expected, strict=True):
            equal(mine, other)
    assert all(calls) and len(calls) == 4


def test_gradients_of_some(calls, kind):
    x, weight, bias = _large(dtype=kind)
    k, v = linear_parts(x, weight, bias, 2)
    upstream = torch.randn_like(k)
    everything = torch.autograd.grad((k, v), (x, weight, bias), (upstream, torch.zeros_like(v)), retain_graph=True)
    for wanted in ([0], [1], [2], [0, 2], [1, 2]):
        inputs = [(x, weight, bias)[i] for i in wanted]
        got = torch.autograd.grad(k, inputs, upstream, retain_graph=True)
        assert all(torch.equal(a, everything[i]) for a, i in zip(got, wanted, strict=True))
    with torch.no_grad():
        assert torch.equal(linear_parts(x, weight, bias, 2)[1], v)
    frozen = linear(x.detach(), weight, bias.detach())
    frozen.backward(torch.cat([upstream, torch.zeros_like(v)], -1))
    assert torch.equal(weight.grad, everything[1]) and x.grad is None and bias.grad is None
    assert all(calls)


def test_gradients_of_gradients(calls, kind):
    inputs = _large(dtype=kind)
    off = {torch.bfloat16: 0.02, torch.float32: 1e-6}[kind]

    def second(function):
        (gradient,) = torch.autograd.grad(function(*inputs).square().sum(), inputs[:1], create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), inputs[1:])

    for got, expected in zip(second(linear), second(F.linear), strict=True):
        torch.testing.assert_close(got, expected, rtol=2.5 * off, atol=off * float(expected.abs().max()))
    x, weight, bias = inputs
    out = linear(x, weight, bias)
    upstream = torch.randn(3, *out.shape, dtype=out.dtype)
    batched = torch.autograd.grad(out, inputs, upstream, is_grads_batched=True, retain_graph=True)
    for i, one in enumerate(upstream):
        for got, expected in zip(batched, torch.autograd.grad(out, inputs, one, retain_graph=True), strict=True):
            torch.testing.assert_close(got[i], expected, rtol=off, atol=off * float(expected.abs().max()))
    assert calls == [True, True]


@needs_units
def test_the_number_of_threads_changes_nothing(calls):
    inputs = _large((4, 333), 224, 640)
    upstream = torch.randn(4, 333, 640).bfloat16()

    def run():
        out = linear(*inputs)
        return [out, *torch.autograd.grad(out, inputs, upstream)]

    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(run())
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))
    assert calls == [True] * 3


@needs_units
def test_autocast_and_what_is_left_to_torch(calls, monkeypatch):
    monkeypatch.setattr(projection, "prefers_onednn", lambda: False)
    inputs = _large()
    numbers = [x.detach().float().requires_grad_() for x in inputs]
    with torch.autocast("cpu", torch.bfloat16):
        out = linear(*numbers)
        mixed = linear(inputs[0], *numbers[1:])
    assert calls == [True, True] and torch.equal(out, linear(*inputs)) and torch.equal(mixed, out)
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(out.sum(), numbers))
    del calls[:]
    with torch.autocast("cpu", torch.float16):
        linear(*numbers)
    linear(*numbers)
    linear(*inputs, backend="reference")
    monkeypatch.setenv("MMFAST_BACKEND", "reference")
    linear(*inputs)
    monkeypatch.delenv("MMFAST_BACKEND")
    torch.func.grad(lambda x: linear(x, *inputs[1:]).sum())(inputs[0])
    torch.compile(linear, fullgraph=True, backend="eager")(*inputs)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(inputs[0], torch.ones_like(inputs[0]))
        assert torch.autograd.forward_ad.unpack_dual(linear(dual, *inputs[1:])).tangent is not None
    assert not calls
    for small in (_large((1, 511)), _large(features=161), _large(out=200), _large(features=32, out=32)):
        assert torch.equal(linear(*small), F.linear(*small))
    wide = _large(features=800)
    with torch.no_grad():
        assert torch.equal(linear(*wide), F.linear(*wide))
    assert calls == [False] * 5
    linear(*wide)
    assert calls[5:] == [True]
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        linear(inputs[0][..., :128], *inputs[1:])


@needs_units
def test_modules_use_them(calls):
    torch.manual_seed(0)
    attention = MultiheadAttention(256, 4, batch_first=True, dtype=torch.bfloat16)
    fusion = CrossAttentionFusion(256, 4, [96], dtype=torch.bfloat16)
    query, key, other = (torch.randn(2, n, e).bfloat16() for n, e in ((290, 256), (350, 256), (350, 96)))
    out = attention(query, key, key)[0], fusion(query, [other])
    assert calls == [True] * 6  # the query, keys and values at once, the output
    sum(x.sum() for x in out).backward()
    for module, got, args in ((attention, out[0], (query, key, key)), (fusion, out[1], (query, [other]))):
        module.backend = "reference"
        expected = module(*args)
        torch.testing.assert_close(got, expected[0] if module is attention else expected, rtol=0.05, atol=0.05)
        grads = [p.grad.clone() for p in module.parameters()]
        module.zero_grad()
        (expected[0] if module is attention else expected).sum().backward()
        for mine, theirs in zip(grads, module.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs.grad, rtol=0.05, atol=0.02 * float(theirs.grad.abs().max()))
    assert len(calls) == 6


@pytest.mark.skipif("not _has_onednn()", reason="needs the extension, and oneDNN in torch")
def test_what_oneDNN_is_not_asked(calls, monkeypatch):
    inputs = _large(dtype=torch.float32)
    monkeypatch.setattr(projection, "prefers_onednn", lambda: False)
    linear(*inputs)
    monkeypatch.setattr(projection, "prefers_onednn", lambda: True)
    linear(*inputs, backend="reference")
    with torch.autocast("cpu", torch.float16):
        linear(*inputs)
    torch.func.grad(lambda x: linear(x, *inputs[1:]).sum())(inputs[0])
    torch.compile(linear, fullgraph=True, backend="eager")(*inputs)
    linear(*(x.double() for x in inputs))
    assert not calls
    with torch.backends.mkldnn.flags(enabled=False):
        assert torch.equal(linear(*inputs), F.linear(*inputs))
    for small in (_large((2, 300), dtype=torch.float32), _large((1, 1), dtype=torch.float32)):
        assert torch.equal(linear(*small), F.linear(*small))
    assert calls == [False, False, False]
    linear(*inputs)
    assert calls[3:] == [True]


@pytest.mark.native
@pytest.mark.skipif("not Path('/proc/cpuinfo').exists()", reason="reads /proc/cpuinfo")
def test_oneDNN_is_preferred_on_processors_of_AMD():
    flags = Path("/proc/cpuinfo").read_text()
    of_amd = "AuthenticAMD" in flags and {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512cd"} <= set(
        flags.split()
    )
    expected = of_amd and torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    assert _backend._C.fusion_prefers_onednn() == (
        expected and os.environ.get("MMFAST_CPU_ISA", "amx")[:6] in ("avx512", "amx")
    )
