"""torch.func.vmap over the native mel op: the same numbers as a loop."""

from __future__ import annotations

import pytest
import torch

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
