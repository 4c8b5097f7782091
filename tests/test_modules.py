"""`MelFrontend`: extraction as a layer of a model."""

from __future__ import annotations

import copy
import io

import pytest
import torch

import mmfast.nn
from mmfast.mel import MelConfig, extract
from mmfast.nn import MelFrontend

CONFIGS = {
    "mel": MelConfig(n_fft=64, n_mels=8),
    "spectrum": MelConfig(n_fft=50, filters=None, power=1.0),
    "mfcc": MelConfig(n_fft=64, n_mels=8, n_mfcc=5, log="db", log_floor=1e-10, top_db=80.0, lifter=22.0),
    "kaldi": MelConfig(
        n_fft=64,
        win_length=50,
        framing="kaldi",
        pad_mode="mirror",
        window="povey",
        window_periodic=False,
        window_position="start",
        mel_scale="kaldi",
        n_mels=6,
        log="ln",
        log_floor=1e-7,
        energy="prepend",
        layout="time_feature",
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_equals_extract(name, dtype):
    config = CONFIGS[name]
    frontend = MelFrontend(config, dtype=torch.float64 if dtype == torch.float64 else None)
    x = torch.randn(3, 2, 700).to(dtype)
    assert torch.equal(frontend(x), extract(x, config))
    lengths = torch.tensor([[700, 300], [100, 699], [0, 33]])
    for out, expected in zip(frontend(x, lengths), extract(x, config, lengths=lengths), strict=True):
        assert torch.equal(out, expected)


def test_state():
    frontend = MelFrontend(CONFIGS["mfcc"])
    assert {k: tuple(v.shape) for k, v in frontend.state_dict().items()} == {
        "window": (64,),
        "filters": (33, 8),
        "dct": (8, 5),
    }
    assert not list(frontend.parameters())
    assert MelFrontend(CONFIGS["spectrum"]).state_dict().keys() == {"window"}
    trainable = MelFrontend(CONFIGS["mfcc"], trainable_filters=True)
    assert [n for n, _ in trainable.named_parameters()] == ["filters"]
    trainable.load_state_dict(frontend.state_dict())  # a frozen front end may go on to be trained
    frontend.load_state_dict(trainable.state_dict())


def test_loaded_tables_are_used():
    config = CONFIGS["mfcc"]
    x, other = torch.randn(2, 700), MelFrontend(config)
    state = {k: v * (1 + 0.3 * torch.rand(v.shape)) for k, v in other.state_dict().items()}
    other.load_state_dict(state)
    file = io.BytesIO()
    torch.save(other.state_dict(), file)
    file.seek(0)
    frontend = MelFrontend(config)
    before = frontend(x)
    frontend.load_state_dict(torch.load(file))
    assert torch.equal(frontend(x), extract(x, config, **state))
    assert not torch.allclose(frontend(x), before)
    frontend.filters.zero_()
    assert torch.equal(copy.deepcopy(frontend)(x), frontend(x))
    # The tables of another front end of this configuration are its own.
    assert torch.equal(MelFrontend(config)(x), before)


def test_trainable_filters():
    """The gradient is the right one, and a step along it changes what is computed."""
    config = CONFIGS["mfcc"].replace(n_fft=16, win_length=16, hop_length=8, center_pad=8)
    frontend = MelFrontend(config, trainable_filters=True, dtype=torch.float64)
    x = torch.randn(2, 50, dtype=torch.float64)

    def features(filters):
        return torch.func.functional_call(frontend, {"filters": filters}, (x,))

    assert torch.autograd.gradcheck(features, (frontend.filters.detach() + 0.1).requires_grad_())
    linear = MelFrontend(config.replace(n_mfcc=None, lifter=0.0, log=None, top_db=None), trainable_filters=True)
    first = linear(x).square().mean()
    first.backward()
    with torch.no_grad():
        linear.filters -= 1e-6 * linear.filters.grad
    assert linear(x).square().mean() < first


def test_trainable_window_has_a_gradient():
    frontend = MelFrontend(CONFIGS["mel"], dtype=torch.float64)
    x = torch.randn(1, 150, dtype=torch.float64)
    window = frontend.window.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda w: torch.func.functional_call(frontend, {"window": w}, (x,)), window)


@pytest.mark.parametrize("trainable", [False, True])
def test_autocast_changes_nothing(trainable):
    frontend, x = MelFrontend(CONFIGS["mfcc"], trainable), torch.randn(2, 700)
    with torch.autocast("cpu", torch.bfloat16):
        out = frontend(x)
    assert torch.equal(out, frontend(x))


def test_compile_fullgraph():
    torch._dynamo.reset()
    frontend, x, lengths = MelFrontend(CONFIGS["mfcc"]), torch.randn(2, 700), torch.tensor([700, 300])
    compiled = torch.compile(frontend, fullgraph=True, backend="aot_eager")
    for out, expected in zip(compiled(x, lengths), frontend(x, lengths), strict=True):
        torch.testing.assert_close(out, expected)


def test_repr_names_what_differs():
    text = repr(MelFrontend(CONFIGS["mfcc"], trainable_filters=True))
    assert "n_mels=8" in text and "log='db'" in text and "trainable_filters=True" in text and "sample_rate" not in text
    assert repr(MelFrontend(MelConfig())) == "MelFrontend()"


def test_rejects():
    with pytest.raises(TypeError, match="config"):
        MelFrontend({"n_mels": 8})
    with pytest.raises(ValueError, match="trainable_filters"):
        MelFrontend(CONFIGS["spectrum"], trainable_filters=True)


def test_public_name():
    assert "MelFrontend" in mmfast.nn.__all__
