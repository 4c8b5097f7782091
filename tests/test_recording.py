"""What records calls instead of computing them: torch.jit.trace, other tracers, tensors without values."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import mmfast
from mmfast.mel import MelConfig, extract

pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit.trace:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]

CONFIG = MelConfig(n_fft=64, hop_length=16, n_mels=8, log="ln", log_offset=1e-3)


class _SelfAttention(mmfast.nn.MultiheadAttention):
    def forward(self, x):
        return super().forward(x, x[:7], x[:7])[0]


CALLS = {
    "extract": (lambda x: extract(x, CONFIG), (2, 400)),
    "frontend": (mmfast.nn.MelFrontend(CONFIG), (2, 400)),
    "trainable": (mmfast.nn.MelFrontend(CONFIG, trainable_filters=True), (2, 400)),
    "double": (lambda x: extract(x.double(), CONFIG), (400,)),
    "cross_attention": (lambda x: mmfast.cross_attention(x, (x * 2, x)), (2, 4, 10, 16)),
    "attention_module": (_SelfAttention(16, 4), (10, 2, 16)),
}


@pytest.mark.parametrize("tracked", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_jit_trace(name, tracked):
    call, shape = CALLS[name]
    traced = torch.jit.trace(call, (torch.randn(shape, requires_grad=tracked),), check_trace=False)
    x = torch.randn(shape)
    torch.testing.assert_close(traced(x), call(x))


def test_jit_trace_of_another_length():
    traced = torch.jit.trace(CALLS["extract"][0], (torch.randn(2, 400),), check_trace=False)
    x = torch.randn(3, 900, requires_grad=True)
    (actual,) = torch.autograd.grad(traced(x).sum(), x)
    torch.testing.assert_close(traced(x), extract(x, CONFIG))
    torch.testing.assert_close(actual, torch.autograd.grad(extract(x, CONFIG).sum(), x)[0])


@pytest.mark.parametrize("mode", ["real", "fake"])
def test_make_fx_with_lengths(mode):
    def run(x, lengths):
        return extract(x, CONFIG, lengths=lengths)[0]

    x, lengths = torch.randn(2, 400), torch.tensor([400, 300])
    graph = make_fx(run, tracing_mode=mode)(x, torch.tensor([10, 20]))
    torch.testing.assert_close(graph(x, lengths), run(x, lengths))


META = {
    "extract": lambda x: extract(x[0], CONFIG),
    "lengths": lambda x: extract(x[0], CONFIG, lengths=torch.zeros(x.shape[1], dtype=torch.int64, device="meta"))[0],
    "dither": lambda x: extract(x[0], CONFIG.replace(dither=1.0)),
    "mmd2": lambda x: mmfast.mmd2(*x[:2]),
    "cka": lambda x: mmfast.cka(*x[:2]),
    "cross_attention": lambda x: mmfast.cross_attention(x[None], (x[None], x[None])),
}


@pytest.mark.parametrize("name", META)
def test_meta(name):
    """Shapes without values, also where meta is the default device."""
    with torch.device("meta"):
        found = META[name](torch.empty(2, 6, 70))
    x = torch.randn(2, 6, 70)
    expected = META[name](x) if name != "lengths" else META["extract"](x)
    assert found.is_meta
    assert found.shape == expected.shape and found.dtype == expected.dtype


def test_default_device_leaves_other_tensors_alone():
    with torch.device("meta"):
        found = extract(torch.ones(2, 400, device="cpu"), CONFIG.replace(dither=1.0))
    assert found.device.type == "cpu"


@pytest.mark.filterwarnings("ignore:Dynamo detected a call")
def test_compiled_dither_differs_from_call_to_call():
    x = torch.randn(2, 400)
    config = CONFIG.replace(dither=1.0)
    torch.compiler.reset()
    compiled = torch.compile(lambda x: extract(x, config), fullgraph=True, backend="aot_eager")
    torch.manual_seed(0)
    first, second = compiled(x), compiled(x)
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    torch.testing.assert_close(first, extract(x, config))


@pytest.mark.parametrize("shape", [(2, 400), (2, 1, 400), (2, 3, 400)])
@pytest.mark.parametrize("scope", ["item", "channels", "batch"])
def test_export_for_any_batch(shape, scope):
    """The maximum of several rows ties no graph to the number of rows."""
    config = MelConfig(n_fft=64, hop_length=16, n_mels=8, log="db", log_floor=1e-10, top_db=5.0, top_db_scope=scope)

    class Model(torch.nn.Module):
        def forward(self, x):
            return extract(x, config)

    exported = torch.export.export(Model(), (torch.randn(shape),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    x = torch.randn(5, *shape[1:])
    torch.testing.assert_close(exported.module()(x), extract(x, config))
