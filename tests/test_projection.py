"""Linear layers of half precision by way of float32."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmfast.fusion import projection
from mmfast.fusion.projection import linear, project
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
