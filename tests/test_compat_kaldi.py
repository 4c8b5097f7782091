"""Kaldi features against torchaudio and kaldi-native-fbank, and batches against their clips."""

from __future__ import annotations

import contextlib
import inspect
import random

import pytest
import torch
from numerics import assert_compiles_with_symbols

from mmfast.compat.torchaudio.compliance import kaldi as ours

FUNCTIONS = ("spectrogram", "fbank", "mfcc")


def clips(shape, seed=0, dtype=torch.float64):
    """Noise under an envelope, an offset, and some silence, in the range of 16 bits."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    x = 3000 * x * 10 ** (-3 * torch.linspace(0, 1, shape[-1], dtype=torch.float64)) + 20
    x[..., shape[-1] // 2 : shape[-1] * 2 // 3] = 0
    return x.to(dtype)


def options(name, rng):
    kwargs = {
        "blackman_coeff": rng.choice((0.42, 0.4)),
        "energy_floor": rng.choice((1.0, 0.0, 1e5)),
        "frame_length": rng.choice((25.0, 20.0, 4.0, 3.3)),
        "frame_shift": rng.choice((10.0, 5.0, 2.1, 12.5)),
        "preemphasis_coefficient": rng.choice((0.97, 0.0, 1.0)),
        "raw_energy": rng.choice((True, False)),
        "remove_dc_offset": rng.choice((True, False)),
        "round_to_power_of_two": rng.choice((True, True, False)),
        "sample_frequency": rng.choice((16000.0, 8000.0, 10000.0)),
        "snip_edges": rng.choice((True, False)),
        "subtract_mean": rng.choice((True, False)),
        "window_type": rng.choice(("povey", "hanning", "hamming", "rectangular", "blackman")),
    }
    if int(kwargs["sample_frequency"] * kwargs["frame_length"] * 0.001) % 2:
        kwargs["round_to_power_of_two"] = True
    if name == "spectrogram":
        return kwargs
    kwargs |= {
        "high_freq": rng.choice((0.0, -400.0, 3700.0)),
        "htk_compat": rng.choice((True, False)),
        "low_freq": rng.choice((20.0, 0.0, 80.0)),
        "num_mel_bins": rng.choice((23, 5, 40)),
        "use_energy": rng.choice((True, False)),
        "vtln_warp": rng.choice((1.0, 1.0, 0.9, 1.15)),
        "vtln_low": rng.choice((100.0, 120.0)),
        "vtln_high": rng.choice((-500.0, 3000.0)),
    }
    if kwargs["high_freq"] > 0:
        kwargs["vtln_high"] = 3000.0  # the warp must end below
    if name == "fbank":
        return kwargs | {"use_log_fbank": rng.choice((True, True, False)), "use_power": rng.choice((True, False))}
    return kwargs | {"cepstral_lifter": rng.choice((22.0, 0.0, 10.0, -22.0)), "num_ceps": rng.choice((5, 1, 4))}


@contextlib.contextmanager
def double_precision():
    """torchaudio builds its filters and DCT in the default dtype; in float64 the two sides can be compared closely."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.fixture
def theirs():
    return pytest.importorskip("torchaudio").compliance.kaldi


def value_and_gradient(function, x):
    x = x.clone().requires_grad_()
    out = function(x)
    weight = torch.sin(torch.arange(out.numel(), dtype=torch.float64)).view_as(out)
    return out.detach(), torch.autograd.grad((out * weight).sum(), x)[0]


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("seed", range(40))
def test_drop_in(name, seed, theirs):
    """Values and gradients over the option space, in float64."""
    rng = random.Random(f"{name}{seed}")
    kwargs = options(name, rng) | {"channel": rng.choice((-1, 0, 1))}
    x = clips((2, rng.choice((1000, 1999))), seed)
    with double_precision():
        expected, expected_gradient = value_and_gradient(lambda x: getattr(theirs, name)(x, **kwargs), x)
    out, gradient = value_and_gradient(lambda x: getattr(ours, name)(x, **kwargs), x)
    torch.testing.assert_close(out, expected, rtol=1e-8, atol=1e-8)
    scale = expected_gradient.abs().max().item()
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-6, atol=1e-9 * scale)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_float32_matches_gold(name, theirs):
    x = clips((1, 8000), dtype=torch.float32)
    with double_precision():
        gold = getattr(theirs, name)(x.double())
    error, their_error = ((getattr(k, name)(x).double() - gold).abs().max() for k in (ours, theirs))
    assert error <= 2 * their_error + 1e-5


@pytest.mark.parametrize("name", FUNCTIONS)
def test_signature(name, theirs):
    """torchaudio's, and `lengths` by keyword."""

    def parameters(function):
        return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]

    *mine, extra = parameters(getattr(ours, name))
    assert mine == parameters(getattr(theirs, name))
    assert extra == ("lengths", inspect.Parameter.KEYWORD_ONLY, None)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_positional_arguments_in_torchaudios_order(name, theirs):
    defaults = [p.default for p in inspect.signature(getattr(theirs, name)).parameters.values()][1:]
    x = clips((1, 1000))
    torch.testing.assert_close(getattr(ours, name)(x, *defaults), getattr(ours, name)(x), rtol=0, atol=0)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("seed", range(12))
def test_batch_equals_its_clips(name, seed):
    """With lengths, each item has the frames that it has alone and zeros beyond, whatever stands in the padding."""
    rng = random.Random(f"batch{name}{seed}")
    kwargs = options(name, rng) | {"channel": rng.choice((-1, 1))}
    function = getattr(ours, name)
    x = clips((4, 2, 1600), seed)
    lengths = torch.tensor([1600, 903, 640, 1201])
    for i, n in enumerate(lengths):
        x[i, :, n:] = torch.nan
    features, counts = function(x, lengths=lengths, **kwargs)
    assert features.shape[1] == function(x[0], **kwargs).shape[0] == counts[0] and counts.dtype == torch.int64
    for i, n in enumerate(lengths):
        alone = function(x[i, :, :n], **kwargs)
        assert counts[i] == alone.shape[0]
        torch.testing.assert_close(features[i, : counts[i]], alone, rtol=1e-9, atol=1e-9)
        assert (features[i, counts[i] :] == 0).all()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_batch_without_lengths(name):
    function, x = getattr(ours, name), clips((3, 2, 1600))
    out = function(x, channel=1, subtract_mean=True)
    torch.testing.assert_close(out, torch.stack([function(clip, channel=1, subtract_mean=True) for clip in x]))


def test_short_items_of_a_batch():
    x = clips((4, 1, 1600))
    lengths = torch.tensor([1600, 399, 0, 400])
    assert ours.fbank(x, lengths=lengths)[1].tolist() == [8, 0, 0, 1]
    assert ours.fbank(x, lengths=lengths, snip_edges=False)[1].tolist() == [10, 2, 0, 3]
    features, counts = ours.mfcc(x, lengths=lengths, subtract_mean=True)
    assert counts.tolist() == [8, 0, 0, 1] and features.isfinite().all()
    # A frame alone is its own mean.
    assert (features[1:] == 0).all() and (features[0].abs().amax() > 1)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_min_duration(name, theirs):
    function, x = getattr(ours, name), clips((1, 1600))
    assert function(x, min_duration=0.2).shape == (0,)
    if name != "mfcc":  # there: a product of shapes that do not fit
        assert getattr(theirs, name)(x, min_duration=0.2).shape == (0,)
    torch.testing.assert_close(function(x, min_duration=0.1), function(x))
    bins = function(x).shape[1]
    assert function(x.expand(3, 1, -1), min_duration=0.2).shape == (3, 0, bins)
    lengths = torch.tensor([1600, 1599, 800])
    assert function(x.expand(3, 1, -1), min_duration=0.1, lengths=lengths)[1].tolist() == [8, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int16])
def test_half_and_integer_samples(dtype):
    x = clips((2, 1, 1600), dtype=torch.float32).to(dtype)
    for name in FUNCTIONS:
        function = getattr(ours, name)
        out = function(x)
        expected = torch.float32 if dtype == torch.int16 else dtype
        assert out.dtype == expected
        torch.testing.assert_close(out, function(x.float()).to(expected), rtol=0, atol=0)
        assert function(x[0], min_duration=9.0).dtype == expected


def test_dither():
    """Follows torch's generator, is drawn anew for each frame, and has the deviation asked for."""
    silence = torch.zeros(1, 16000)
    arguments = {"dither": 3.0, "remove_dc_offset": False, "use_energy": True}
    torch.manual_seed(0)
    first = ours.fbank(silence, **arguments)
    assert not torch.equal(ours.fbank(silence, **arguments), first)
    torch.manual_seed(0)
    assert torch.equal(ours.fbank(silence, **arguments), first)
    assert first[:, 0].exp().mean().item() / 400 == pytest.approx(9.0, rel=0.03)
    assert first.std(dim=0).min() > 0.01


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradcheck(name):
    x = torch.randn(2, 1, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    kwargs = {"sample_frequency": 1000.0, "frame_length": 8.0, "frame_shift": 5.0, "energy_floor": 0.0}
    if name != "spectrogram":
        kwargs |= {"num_mel_bins": 4, "use_energy": True, "vtln_high": 400.0}
    if name == "mfcc":
        kwargs |= {"num_ceps": 3}
    lengths = torch.tensor([24, 17])
    for more in ({"snip_edges": True}, {"snip_edges": False, "raw_energy": False, "subtract_mean": True}):

        def function(x, more=more):
            return getattr(ours, name)(x, **kwargs, **more, lengths=lengths)[0]

        assert torch.autograd.gradcheck(function, x)
        assert torch.autograd.gradgradcheck(function, x)


BAD = [
    ({"channel": 2}, "channel"),
    ({"frame_length": 200.0}, "waveform"),
    ({"frame_length": 0.05}, "frame_length"),
    ({"frame_shift": 0.01}, "frame_shift"),
    ({"frame_length": 25.07, "round_to_power_of_two": False}, "frame_length"),
    ({"preemphasis_coefficient": 1.1}, "preemphasis_coefficient"),
    ({"sample_frequency": -1.0}, "sample_frequency"),
    ({"window_type": "triangle"}, "window_type"),
]
BAD_FILTERS = [
    ({"num_mel_bins": 3}, "num_mel_bins"),
    ({"low_freq": 9000.0}, "low_freq"),
    ({"high_freq": 9000.0}, "high_freq"),
    ({"vtln_warp": 0.9, "vtln_low": 10.0}, "vtln_low"),
    ({"vtln_warp": 0.9, "vtln_high": 50.0}, "vtln_high"),
]


@pytest.mark.parametrize(
    ("name", "kwargs", "argument"),
    [(name, *case) for name in FUNCTIONS for case in BAD + BAD_FILTERS * (name != "spectrogram")]
    + [("mfcc", {"num_ceps": 24}, "num_ceps")],
)
def test_rejects(name, kwargs, argument, theirs):
    x = clips((2, 1600))
    with pytest.raises(Exception, match=r"."):
        getattr(theirs, name)(x, **kwargs)
    with pytest.raises(ValueError, match=argument):
        getattr(ours, name)(x, **kwargs)


def test_rejects_shapes():
    for wrong in (torch.zeros(1600), torch.zeros(1, 1, 1, 1600)):
        with pytest.raises(ValueError, match="waveform"):
            ours.fbank(wrong)
    with pytest.raises(ValueError, match="lengths"):
        ours.fbank(torch.zeros(1, 1600), lengths=torch.tensor([1600]))
    with pytest.raises(ValueError, match="lengths"):
        ours.fbank(torch.zeros(2, 1, 1600), lengths=torch.tensor([1600]))
    with pytest.raises(TypeError, match="waveform"):
        ours.fbank([[0.0] * 1600])
    with pytest.raises(ValueError, match="waveform must be at least as long as a frame"):
        ours.fbank(torch.zeros(1, 399), snip_edges=False)


NATIVE = [
    {},
    {"snip_edges": False},
    {"window_type": "hamming", "preemphasis_coefficient": 0.9},
    {"num_mel_bins": 40, "use_energy": True, "energy_floor": 0.0},
    {"sample_frequency": 8000.0, "high_freq": -200.0, "low_freq": 40.0, "raw_energy": False, "use_energy": True},
    {"frame_length": 20.0, "frame_shift": 5.0, "remove_dc_offset": False},
]


@pytest.mark.parametrize("kwargs", NATIVE)
@pytest.mark.parametrize("name", ["fbank", "mfcc"])
def test_against_kaldi_native_fbank(name, kwargs):
    knf = pytest.importorskip("kaldi_native_fbank")
    opts = knf.FbankOptions() if name == "fbank" else knf.MfccOptions()
    arguments = {
        "energy_floor": 1.0,
        "frame_length": 25.0,
        "frame_shift": 10.0,
        "high_freq": 0.0,
        "low_freq": 20.0,
        "num_mel_bins": 23,
        "preemphasis_coefficient": 0.97,
        "raw_energy": True,
        "remove_dc_offset": True,
        "sample_frequency": 16000.0,
        "snip_edges": True,
        "use_energy": False,
        "window_type": "povey",
    } | kwargs
    frame, mel = opts.frame_opts, opts.mel_opts
    frame.dither, frame.samp_freq = 0.0, arguments["sample_frequency"]
    frame.frame_length_ms, frame.frame_shift_ms = arguments["frame_length"], arguments["frame_shift"]
    frame.preemph_coeff, frame.remove_dc_offset = arguments["preemphasis_coefficient"], arguments["remove_dc_offset"]
    frame.snip_edges, frame.window_type = arguments["snip_edges"], arguments["window_type"]
    mel.num_bins, mel.low_freq, mel.high_freq = (arguments[k] for k in ("num_mel_bins", "low_freq", "high_freq"))
    opts.use_energy, opts.raw_energy = arguments["use_energy"], arguments["raw_energy"]
    opts.energy_floor = arguments["energy_floor"]
    native = knf.OnlineFbank(opts) if name == "fbank" else knf.OnlineMfcc(opts)
    x = torch.randn(1, 6000, generator=torch.Generator().manual_seed(0)) * 1000
    native.accept_waveform(arguments["sample_frequency"], x[0].tolist())
    native.input_finished()
    expected = torch.stack([torch.as_tensor(native.get_frame(i)) for i in range(native.num_frames_ready)])
    torch.testing.assert_close(getattr(ours, name)(x, **arguments), expected, rtol=1e-4, atol=5e-4)


def test_compile_fullgraph():
    torch._dynamo.reset()
    x, lengths = clips((2, 1, 900), dtype=torch.float32), torch.tensor([900, 500])

    def features(x, lengths):
        return ours.mfcc(x, use_energy=True, subtract_mean=True, lengths=lengths)

    compiled = torch.compile(features, fullgraph=True, backend="aot_eager")(x, lengths)
    for out, expected in zip(compiled, features(x, lengths), strict=True):
        torch.testing.assert_close(out, expected)


def test_configurations_are_built_once():
    ours._fbank_config.cache_clear()
    x = clips((1, 800))
    for _ in range(3):
        ours.fbank(x, num_mel_bins=30)
    assert ours._fbank_config.cache_info().misses == 1


@pytest.mark.parametrize("name", ["spectrogram", "fbank", "mfcc"])
def test_compile_with_numbers_as_symbols(name):
    rate = {"sample_frequency": 8000.0}
    assert_compiles_with_symbols(lambda x: getattr(ours, name)(x, **rate), clips((2, 900), dtype=torch.float32))
