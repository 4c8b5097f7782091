"""torch.func.vmap over the native ops: the same numbers and gradients as a loop."""

from __future__ import annotations

import pytest
import torch

import mmfast
from mmfast.fusion import Source
from mmfast.mel import MelConfig, extract

CONFIGS = {
    "log_mel": MelConfig(n_fft=64, hop_length=20, n_mels=10, log="ln", log_offset=1e-3),
    "whisper": MelConfig(
        n_fft=64, hop_length=20, n_mels=10, log="log10", log_floor=1e-10, top_db=1.0, top_db_scope="batch"
    ),
    "mfcc": MelConfig(
        n_fft=64, hop_length=20, n_mels=10, log="db", log_floor=1e-10, top_db=9.0, top_db_scope="channels", n_mfcc=5
    ),
}


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_vmap_is_a_loop(config, dim, backend):
    x = torch.randn(3, 2, 700).movedim(0, dim)
    run = lambda t: extract(t, config, backend=backend)  # noqa: E731
    expected = torch.stack([run(t) for t in x.unbind(dim)])
    torch.testing.assert_close(torch.func.vmap(run, in_dims=dim)(x), expected)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_batched_gradients(config, backend):
    """Several upstream gradients at once, as a vectorised Jacobian takes them."""
    x = torch.randn(2, 700, requires_grad=True)
    out = extract(x, config, backend=backend)
    upstream = torch.randn(3, *out.shape)
    expected = [torch.autograd.grad(out, x, g, retain_graph=True)[0] for g in upstream]
    (actual,) = torch.autograd.grad(out, x, upstream, is_grads_batched=True)
    torch.testing.assert_close(actual, torch.stack(expected), rtol=1e-4, atol=1e-3)


def test_lengths_of_each_sample(backend):
    config = CONFIGS["log_mel"]
    x, lengths = torch.randn(3, 700), torch.tensor([700, 20, 400])
    run = torch.func.vmap(lambda x, n: extract(x, config, lengths=n, backend=backend))
    for actual, expected in zip(run(x, lengths), extract(x, config, lengths=lengths, backend=backend), strict=True):
        torch.testing.assert_close(actual, expected)
    with pytest.raises(ValueError, match=r"lengths must lie in \[0, 700\], got values from 21 to 701"):
        run(x, lengths + 1)


def test_tables_of_each_sample_are_refused(native):
    config = CONFIGS["log_mel"]
    with pytest.raises(ValueError, match="filters"):
        torch.func.vmap(lambda f: extract(torch.ones(700), config, filters=f, backend=native))(torch.rand(2, 33, 10))


def test_lazy_negation_and_zeros():
    """Tensors whose memory does not hold their values: the views of a conjugate and the zeros of autograd."""
    config = MelConfig(n_fft=64, hop_length=16, n_mels=8, log="db", log_floor=1e-10)
    pair = torch.complex(*torch.randn(2, 3, 400))
    lazy = pair.conj().imag
    assert lazy.is_neg()
    torch.testing.assert_close(extract(lazy, config), extract(lazy.clone().resolve_neg(), config), rtol=0, atol=0)
    window = torch.complex(torch.ones(64), torch.linspace(0.1, 1, 64)).conj().imag
    given = extract(pair.real, config.replace(remove_dc=True), window=window)
    torch.testing.assert_close(
        given, extract(pair.real, config.replace(remove_dc=True), window=window.resolve_neg().clone()), rtol=0, atol=0
    )
    zeros = torch._efficientzerotensor((1, 400))
    torch.testing.assert_close(extract(zeros, config), extract(torch.zeros(1, 400), config), rtol=0, atol=0)


def test_modes_see_the_operator():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    seen = []
    x = torch.randn(2, 400)
    with Names():
        extract(x, MelConfig(n_fft=64, hop_length=16, n_mels=8))
    assert "mmfast.mel_forward.default" in seen


@pytest.mark.parametrize("shape", [(3, 10), (3, 2, 10)])
def test_no_frames(shape, backend):
    config = MelConfig(n_fft=64, hop_length=20, n_mels=10, framing="valid")
    x = torch.randn(shape, requires_grad=True)
    out = torch.func.vmap(lambda t: extract(t, config, backend=backend))(x)
    assert out.shape == (*shape[:-1], 10, 0)
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert not gradient.any()


def test_dither(backend):
    """One noise for all samples, and the same again for a batch of gradients."""
    config = MelConfig(n_fft=64, hop_length=20, n_mels=10, log="ln", log_offset=1e-3, dither=1.0)
    x = torch.randn(2, 700, requires_grad=True)
    run = lambda t: extract(t, config, backend=backend)  # noqa: E731
    torch.manual_seed(0)
    out = run(x)
    torch.manual_seed(0)
    samples = torch.func.vmap(run, randomness="same")(x.detach().expand(3, 2, 700))
    torch.testing.assert_close(samples, out.detach().expand(3, *out.shape))
    upstream = torch.randn(3, *out.shape)
    expected = torch.stack([torch.autograd.grad(out, x, g, retain_graph=True)[0] for g in upstream])
    (actual,) = torch.autograd.grad(out, x, upstream, is_grads_batched=True)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-3)
    with pytest.raises(ValueError, match="randomness must be 'same'"):
        torch.func.vmap(run, randomness="different")(x.detach())


def _other(tensor: torch.Tensor) -> torch.Tensor:
    return torch.linspace(-1, 1, tensor.numel()).view(tensor.shape).sin()


_POINTS = _other(torch.empty(9, 4))
_HEADS = _other(torch.empty(2, 4, 5, 8))
TRACKED = {
    "mel": ((300,), lambda t: extract(t, CONFIGS["log_mel"])),
    "lengths": ((300,), lambda t: extract(t, CONFIGS["log_mel"], lengths=torch.tensor(200))[0]),
    "mmd2": ((9, 4), lambda t: mmfast.mmd2(t, _POINTS)),
    "one_sample_u": ((9, 4), lambda t: mmfast.mmd2(_POINTS, t, estimator="one_sample_u")),
    "weights": ((9,), lambda t: mmfast.mmd2(_POINTS, _POINTS.exp(), weights_x=t.exp())),
    "bandwidth": ((), lambda t: mmfast.mmd2(_POINTS, _POINTS.exp(), mmfast.kernels.Gaussian(t.exp()))),
    "mmd2_power": ((9, 4), lambda t: mmfast.mmd2_power(t, _POINTS)),
    "kernel_matmul": ((9, 4), lambda t: mmfast.kernel_matmul(_POINTS, t, _POINTS)),
    "query": ((2, 4, 5, 8), lambda t: mmfast.cross_attention(t, [(_HEADS, _HEADS)])),
    "mask": ((5, 5), lambda t: mmfast.cross_attention(_HEADS, [Source(_HEADS, _HEADS, mask=t)])),
    "bias": ((5, 5), lambda t: mmfast.cross_attention(_HEADS, [Source(_HEADS, _HEADS, bias=t)])),
}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("shape, run", TRACKED.values(), ids=TRACKED)
def test_autograd_sees_through(shape, run, compiled):
    """Gradients of what was made under vmap, for autograd outside it: a tensor in there denies that it has one."""
    x = torch.randn(3, *shape, requires_grad=True)
    mapped = torch.func.vmap(run)
    if compiled:
        torch._dynamo.reset()
        mapped = torch.compile(mapped, fullgraph=True, backend="aot_eager")
    out, expected = mapped(x), torch.stack([run(t) for t in x])
    torch.testing.assert_close(out, expected)
    upstream = torch.randn_like(expected)
    (actual,), (gold,) = (torch.autograd.grad(o, x, upstream) for o in (out, expected))
    torch.testing.assert_close(actual, gold, rtol=1e-4, atol=1e-5)
