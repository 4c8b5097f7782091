"""`mmfast.compat.torchaudio` against torchaudio: values, gradients, state, signatures, errors."""

from __future__ import annotations

import copy
import inspect
import pickle
import random
import warnings

import pytest
import torch
from numerics import assert_compiles_with_symbols

torchaudio = pytest.importorskip("torchaudio")

import torchaudio.functional as theirs_F  # noqa: E402
import torchaudio.transforms as theirs  # noqa: E402

import mmfast.compat.torchaudio.functional as ours_F  # noqa: E402
import mmfast.compat.torchaudio.transforms as ours  # noqa: E402
from mmfast.compat.torchaudio import _fused  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:At least one mel filterbank")

MODULES = ("Spectrogram", "MelSpectrogram", "MFCC", "LFCC")
SHAPES = ((700,), (3, 700), (2, 2, 700), (2, 1, 2, 700), (1, 700))


def speech_like(shape, seed=0, dtype=torch.float64):
    """Noise and a tone under an envelope of 120 dB, with some silence: the range of decibels is at work."""
    generator = torch.Generator().manual_seed(seed)
    time = torch.arange(shape[-1], dtype=torch.float64)
    envelope = 10 ** (-6 * time / shape[-1])
    x = (torch.randn(shape, generator=generator, dtype=torch.float64) + torch.sin(0.7 * time)) * envelope
    x[..., : shape[-1] // 6] = 0
    return x.to(dtype)


def spectrogram_options(rng):
    n_fft = rng.choice((16, 64, 97, 100, 128, 200))
    win_length = rng.choice((None, n_fft, n_fft - 1, n_fft // 2, n_fft * 2 // 3))
    window_fn, wkwargs = rng.choice(
        (
            (torch.hann_window, None),
            (torch.hann_window, {"periodic": False}),
            (torch.hamming_window, {"periodic": True, "alpha": 0.6}),
            (torch.kaiser_window, {"periodic": True, "beta": 9.0}),
            (lambda n: torch.linspace(0.2, 1.1, n), None),
        )
    )
    return {
        "n_fft": n_fft,
        "win_length": win_length,
        "hop_length": rng.choice((None, 13, 40, 160)),
        "pad": rng.choice((0, 0, 1, 30)),
        "window_fn": window_fn,
        "wkwargs": wkwargs,
        "power": rng.choice((2.0, 2, 1.0, 3.0, 0.7)),
        "normalized": rng.choice((False, True, "window", "frame_length")),
        "center": rng.choice((True, True, False)),
        "pad_mode": rng.choice(("reflect", "constant", "replicate", "circular")),
    }


def options(name, rng):
    spectrum = spectrogram_options(rng)
    if name == "Spectrogram":
        return spectrum | {"onesided": rng.choice((True, False))}
    rate = rng.choice((16000, 8000, 11025))
    f_min, f_max = rng.choice(((0.0, None), (60.0, 3800.0), (20.0, None)))
    if name == "LFCC":
        limits = {"f_min": f_min, "f_max": f_max, "n_filter": rng.choice((10, 23)), "n_lfcc": rng.choice((8, 13))}
        cepstra = {"norm": rng.choice(("ortho", None)), "log_lf": rng.choice((True, False))}
        return {"sample_rate": rate, "speckwargs": spectrum} | limits | cepstra
    n_mels = rng.choice((5, 23, 40))
    mel = spectrum | {"f_min": f_min, "f_max": f_max, "n_mels": n_mels}
    mel |= {"norm": rng.choice((None, "slaney")), "mel_scale": rng.choice(("htk", "slaney"))}
    if name == "MelSpectrogram":
        return {"sample_rate": rate} | mel
    return {
        "sample_rate": rate,
        "n_mfcc": rng.choice((3, 5, n_mels)),
        "norm": rng.choice(("ortho", None)),
        "log_mels": rng.choice((True, False)),
        "melkwargs": mel,
    }


def pair(name, **kwargs):
    return getattr(theirs, name)(**kwargs), getattr(ours, name)(**kwargs)


def value_and_gradient(module, x, seed=1):
    x = x.clone().requires_grad_()
    out = module(x)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return out.detach(), torch.autograd.grad((out.double() * weight).sum(), x)[0]


def agree(theirs_module, ours_module, x, rtol=1e-9, gradient=True):
    if not gradient:
        torch.testing.assert_close(ours_module(x), theirs_module(x), rtol=rtol, atol=rtol)
        return
    expected, expected_gradient = value_and_gradient(theirs_module, x)
    out, out_gradient = value_and_gradient(ours_module, x)
    torch.testing.assert_close(out, expected, rtol=rtol, atol=rtol * expected.abs().max().item())
    scale = expected_gradient.abs().max().item()
    torch.testing.assert_close(out_gradient, expected_gradient, rtol=1e-6, atol=1e-9 * scale)


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("seed", range(30))
def test_drop_in(name, seed):
    """Values and gradients over the option space, in float64; buffers are the same float32 numbers, cast."""
    rng = random.Random(f"{name}{seed}")
    arguments = options(name, rng)
    reference, module = pair(name, **arguments)
    x = speech_like(rng.choice(SHAPES), seed)
    if arguments.get("melkwargs", arguments.get("speckwargs", arguments))["power"] < 1:
        x += 1e-3 * torch.randn_like(x)  # torchaudio's gradient of silence is NaN there
    agree(reference.double(), module.double(), x)


@pytest.mark.parametrize("name", MODULES)
def test_default_arguments(name):
    reference, module = pair(name)
    x = speech_like((2, 4000), dtype=torch.float32)
    out, expected = module(x), reference(x)
    assert out.dtype == expected.dtype == torch.float32
    exact = copy.deepcopy(reference).double()(x.double())
    error, their_error = ((y - exact).abs().max() for y in (out, expected))
    assert error <= 2 * their_error + 1e-6 * exact.abs().max()


@pytest.mark.parametrize("name", MODULES)
def test_float32_matches_gold(name):
    reference, module = pair(name)
    x = speech_like((3, 2, 4000), dtype=torch.float32)
    gold = copy.deepcopy(reference).double()(x.double())
    error = (module(x) - gold).abs().max()
    assert error <= 2 * (reference(x) - gold).abs().max() + 1e-6 * gold.abs().max()


@pytest.mark.parametrize("name", [*MODULES, "MelScale", "AmplitudeToDB"])
def test_signature(name):
    for method in ("__init__", "forward"):
        assert parameters(getattr(getattr(ours, name), method)) == parameters(getattr(getattr(theirs, name), method))
    assert getattr(ours, name).__constants__ == getattr(theirs, name).__constants__


@pytest.mark.parametrize("name", ours_F.__all__)
def test_functional_signature(name):
    assert parameters(getattr(ours_F, name)) == parameters(getattr(theirs_F, name))


def parameters(function):
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]


@pytest.mark.parametrize("name", [*MODULES, "MelScale", "AmplitudeToDB"])
def test_attributes_and_state(name):
    reference, module = pair(name)
    public = {k: v for k, v in vars(reference).items() if not k.startswith("_")}
    assert {k: vars(module)[k] for k in public} == public
    assert {n for n, _ in module.named_modules()} == {n for n, _ in reference.named_modules()}
    state, expected = module.state_dict(), reference.state_dict()
    assert state.keys() == expected.keys()
    for key in expected:
        assert torch.equal(state[key], expected[key]) and state[key].dtype == expected[key].dtype


@pytest.mark.parametrize("name", MODULES)
def test_checkpoint_loads_both_ways(name):
    """What was loaded is what is used."""
    reference, module = (m.double() for m in pair(name))
    generator = torch.Generator().manual_seed(0)
    changed = {k: v * (1 + 0.3 * torch.rand(v.shape, generator=generator)) for k, v in reference.state_dict().items()}
    x = speech_like((2, 1500))
    before = module(x)
    module.load_state_dict(changed)
    reference.load_state_dict(module.state_dict())
    assert not torch.allclose(before, module(x), rtol=1e-3)
    agree(reference, module, x)


def count_calls(monkeypatch):
    calls = []
    extract = _fused.extract
    monkeypatch.setattr(_fused, "extract", lambda *a, **k: calls.append(1) or extract(*a, **k))
    return calls


@pytest.mark.parametrize("name", MODULES)
def test_one_fused_call(name, monkeypatch):
    module = getattr(ours, name)()
    monkeypatch.setattr(_fused, "project", lambda *a: pytest.fail("the matrix product was left to torch"))
    calls = count_calls(monkeypatch)
    module(torch.randn(2, 2000))
    assert len(calls) == 1


HOOKS = {
    "forward": lambda m, seen: m.register_forward_hook(lambda *a: seen.append(m)),
    "forward_pre": lambda m, seen: m.register_forward_pre_hook(lambda *a: seen.append(m)),
    "backward": lambda m, seen: m.register_full_backward_hook(lambda *a: seen.append(m)),
    "instance": lambda m, seen: setattr(m, "forward", lambda x, f=m.forward: seen.append(m) or f(x)),
}


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("MelSpectrogram", "spectrogram"),
        ("MelSpectrogram", "mel_scale"),
        ("MFCC", "MelSpectrogram"),
        ("MFCC", "MelSpectrogram.spectrogram"),
        ("MFCC", "MelSpectrogram.mel_scale"),
        ("MFCC", "amplitude_to_DB"),
        ("LFCC", "Spectrogram"),
        ("LFCC", "amplitude_to_DB"),
    ],
)
def test_hooked_submodule_is_called(name, path, kind):
    reference, module = (m.double() for m in pair(name))
    seen = []
    HOOKS[kind](module.get_submodule(path), seen)
    agree(reference, module, speech_like((2, 1500)))
    assert len(seen) == 1


def test_hook_may_change_the_result():
    reference, module = (m.double() for m in pair("MFCC"))
    for m in (reference, module):
        m.MelSpectrogram.spectrogram.register_forward_hook(lambda _m, _i, out: out + 0.5)
    agree(reference, module, speech_like((2, 1500)))


def test_replaced_submodules():
    class Louder(torch.nn.Module):
        def forward(self, x):
            return 3 * x.clamp(min=1e-3).log()

    x = speech_like((2, 1500))
    reference, module = (m.double() for m in pair("MFCC", melkwargs={"n_mels": 40}))
    reference.amplitude_to_DB, module.amplitude_to_DB = Louder(), Louder()
    agree(reference, module, x)
    reference.MelSpectrogram.mel_scale = module.MelSpectrogram.mel_scale = theirs.MelScale(40, norm="slaney").double()
    agree(reference, module, x)
    reference, module = (m.double() for m in pair("MFCC"))
    reference.MelSpectrogram = module.MelSpectrogram = torch.nn.Sequential(theirs.MelSpectrogram(n_fft=256)).double()
    agree(reference, module, x)


def test_edited_submodules():
    """A changed attribute of a sub-module counts, as in torchaudio, also after a first call."""
    x = speech_like((2, 1500))
    reference, module = (m.double() for m in pair("MFCC"))
    agree(reference, module, x)
    for m in (reference, module):
        m.MelSpectrogram.spectrogram.hop_length = 77
        m.MelSpectrogram.spectrogram.pad_mode = "constant"
    agree(reference, module, x)
    for m in (reference, module):
        m.amplitude_to_DB.top_db = None
    agree(reference, module, x)
    for m in (reference, module):
        m.amplitude_to_DB.amin = 1e-4
        m.amplitude_to_DB.multiplier = 20.0
        m.amplitude_to_DB.top_db = 30.0
    agree(reference, module, x)
    for m in (reference, module):
        m.amplitude_to_DB.db_multiplier = 2.0
    agree(reference, module, x)
    for m in (reference, module):
        m.log_mels = True
    agree(reference, module, x)


def test_lfcc_with_more_cepstra_than_filters():
    reference, module = (m.double() for m in pair("LFCC", n_filter=10, n_lfcc=20))
    agree(reference, module, speech_like((2, 1500)))


@pytest.mark.parametrize("name", ["MFCC", "LFCC"])
@pytest.mark.parametrize("shape", SHAPES)
def test_top_db_shares_the_maximum_of_channels(name, shape):
    reference, module = (m.double() for m in pair(name))
    x = speech_like(shape)
    x *= torch.logspace(0, -5, x.shape[:-1].numel(), dtype=x.dtype).view(*x.shape[:-1], 1)
    agree(reference, module, x)
    limited = module(x)
    module.amplitude_to_DB.top_db = None
    assert not torch.allclose(module(x), limited)


def test_top_db_scope_is_the_documented_one():
    mfcc = ours.MFCC()
    quiet, loud = speech_like((1, 3000), dtype=torch.float32) * 1e-4, torch.randn(1, 3000)
    alone = mfcc(quiet)
    assert not torch.allclose(mfcc(torch.cat((quiet, loud)))[:1], alone)
    torch.testing.assert_close(mfcc(torch.stack((quiet, loud)))[0], alone)
    mfcc.amplitude_to_DB.top_db = None
    torch.testing.assert_close(mfcc(torch.cat((quiet, loud)))[:1], mfcc(quiet))


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_is_computed_in_float32(name, dtype):
    module = getattr(ours, name)()
    x = (0.1 * speech_like((2, 2000))).to(dtype)
    out = module(x)
    assert out.dtype == dtype
    torch.testing.assert_close(out, module(x.float()).to(dtype), rtol=0, atol=0)
    rounded = getattr(ours, name)().to(dtype)
    assert rounded(x).dtype == dtype and rounded(x).isfinite().all()
    # The sub-modules alone, as a hook would have them called.
    seen = getattr(ours, name)()
    for m in seen.modules():
        m.register_forward_hook(lambda *a: None)
    assert seen(x).dtype == dtype


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("hooked", [False, True])
def test_autocast_changes_nothing(name, hooked):
    module = getattr(ours, name)()
    if hooked:
        for m in module.modules():
            m.register_forward_hook(lambda *a: None)
    x = torch.randn(2, 2000)
    with torch.autocast("cpu", torch.bfloat16):
        out = module(x)
    assert torch.equal(out, module(x))
    torch.testing.assert_close(out, getattr(ours, name)()(x), rtol=1e-4, atol=1e-3)


def test_double_module_answers_in_double():
    for name in MODULES:
        reference, module = (m.double() for m in pair(name))
        x = torch.randn(2, 2000)
        assert module(x).dtype == reference(x).dtype == torch.float64
    assert ours.Spectrogram()(x.double()).dtype == theirs.Spectrogram()(x.double()).dtype == torch.float64


SMALL = {"n_fft": 12, "hop_length": 5}


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("Spectrogram", {**SMALL, "power": 1.0}),
        ("Spectrogram", {**SMALL, "onesided": False}),
        ("Spectrogram", {"n_fft": 9, "hop_length": 5, "power": 3.0, "normalized": True, "pad_mode": "replicate"}),
        ("MelSpectrogram", {**SMALL, "n_mels": 3, "power": 0.7}),
        ("MFCC", {"n_mfcc": 3, "melkwargs": {**SMALL, "n_mels": 4}}),
        ("MFCC", {"n_mfcc": 3, "log_mels": True, "melkwargs": {**SMALL, "n_mels": 4, "center": False}}),
        ("LFCC", {"n_lfcc": 3, "n_filter": 4, "speckwargs": SMALL}),
    ],
)
def test_gradcheck_and_double_backward(name, kwargs):
    x = torch.randn(2, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    module = getattr(ours, name)(**kwargs).double()
    assert torch.autograd.gradcheck(module, x)
    assert torch.autograd.gradgradcheck(module, x)


@pytest.mark.parametrize("path", ["MelSpectrogram.mel_scale.fb", "MelSpectrogram.spectrogram.window", "dct_mat"])
def test_trainable_tables(path):
    reference, module = (m.double() for m in pair("MFCC"))
    x = speech_like((2, 1500))
    grads = []
    for m in (reference, module):
        *owner, name = path.split(".")
        owner = m.get_submodule(".".join(owner))
        value = getattr(owner, name)
        delattr(owner, name)
        setattr(owner, name, torch.nn.Parameter(value))
        out = m(x)
        (out * torch.sin(torch.arange(out.numel()).view_as(out))).sum().backward()
        grads.append(getattr(owner, name).grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-6, atol=1e-9 * grads[0].abs().max().item())


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0, 3.0])
@pytest.mark.parametrize("name", ["Spectrogram", "MFCC"])
def test_silence_has_finite_gradients(name, power):
    arguments = {"power": power}
    reference, module = pair(name, **(arguments if name == "Spectrogram" else {"melkwargs": arguments}))
    x = torch.zeros(1, 1000)
    value, gradient = value_and_gradient(module, x)
    assert value.isfinite().all() and (gradient == 0).all()
    if power >= 1:  # torchaudio has NaN below
        agree(reference, module, x, rtol=1e-6)


def test_strides_copies_and_empty_batches():
    reference, module = pair("MFCC")
    x = torch.randn(900, 3, 2).permute(2, 1, 0)
    torch.testing.assert_close(module(x), reference(x), rtol=1e-4, atol=1e-3)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(x), module(x))
    assert module(torch.empty(0, 2, 900)).shape == (0, 2, 40, 5)


def test_any_frame_of_odd_size():
    """The numbers of frames of torch.stft, also for odd transforms and signals that just fit."""
    for n_fft in (1, 2, 5, 8):
        for length in range(n_fft, 30):
            for center in (True, False):
                reference, module = pair("Spectrogram", n_fft=n_fft, hop_length=3, center=center)
                x = torch.randn(length)
                torch.testing.assert_close(module(x), reference(x))


@pytest.mark.parametrize(
    ("kwargs", "length"),
    [
        ({}, 200),  # reflection needs more samples than it takes
        ({"center": False}, 399),
        ({"center": False, "pad": 10}, 379),
        ({"pad_mode": "circular"}, 199),
        ({"n_fft": 401, "pad_mode": "constant"}, 0),
    ],
)
def test_signals_too_short_are_refused(kwargs, length):
    reference, module = pair("Spectrogram", **kwargs)
    with pytest.raises((RuntimeError, ValueError)):
        reference(torch.randn(1, length))
    for m in (module, ours.MFCC(melkwargs=kwargs)):
        with pytest.raises(ValueError, match="waveform must have at least"):
            m(torch.randn(1, length))
    assert module(torch.randn(1, length + 1)).shape == reference(torch.randn(1, length + 1)).shape


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (lambda: ours.Spectrogram(power=None), "power"),
        (lambda: ours.MelSpectrogram(power=None), "power"),
        (lambda: ours_F.spectrogram(torch.ones(99), 0, torch.ones(8), 8, 4, 8, None, False), "power"),
        (lambda: ours.Spectrogram(power=0.0)(torch.ones(999)), "power"),
        (lambda: ours.Spectrogram(normalized="l1")(torch.ones(999)), "normalized"),
        (lambda: ours.Spectrogram(win_length=500)(torch.ones(999)), "win_length"),
        (lambda: ours.Spectrogram(pad_mode="wrap")(torch.ones(999)), "pad_mode"),
        (lambda: ours.Spectrogram(hop_length=0)(torch.ones(999)), "hop_length"),
        (lambda: ours.Spectrogram(window_fn=lambda n: torch.ones(n + 1))(torch.ones(999)), "window"),
        (lambda: ours.MelScale(f_min=9000.0), "f_min"),
        (lambda: ours.MelScale(norm="l1"), "norm"),
        (lambda: ours.MelScale(mel_scale="bark"), "mel_scale"),
        (lambda: ours.AmplitudeToDB(top_db=-1.0), "top_db"),
        (lambda: ours.MFCC(dct_type=3), "dct_type"),
        (lambda: ours.MFCC(norm="l2"), "norm"),
        (lambda: ours.MFCC(n_mfcc=200), "n_mfcc"),
        (lambda: ours.LFCC(dct_type=1), "dct_type"),
        (lambda: ours.LFCC(n_lfcc=500), "n_lfcc"),
        (lambda: ours_F.compute_deltas(torch.ones(2, 9), win_length=2), "win_length"),
        (lambda: ours.MelScale()(torch.ones(3, 200, 4)), r"specgram must be \(\.\.\., 201, time\), got \(3, 200, 4\)"),
        (lambda: ours.MelScale()(torch.ones(201)), "specgram"),
        (lambda: ours.LFCC(speckwargs={"onesided": False})(torch.ones(999)), "specgram"),
    ],
)
def test_rejects(make, argument):
    with pytest.raises(ValueError, match=argument):
        make()


def test_rejects_what_is_no_waveform():
    for wrong in (torch.zeros(900, dtype=torch.complex64), torch.zeros(900, dtype=torch.int64), [0.0] * 900):
        with pytest.raises(TypeError, match="waveform"):
            ours.MFCC()(wrong)
    with pytest.raises(ValueError, match="waveform"):
        ours.MFCC()(torch.tensor(1.0))
    with pytest.raises(TypeError, match="specgram must be floating point"):
        ours.MelScale()(torch.ones(201, 4, dtype=torch.int64))


def test_deprecated_arguments_warn():
    for make in (
        lambda module: module.Spectrogram(return_complex=True),
        lambda module: module.MelSpectrogram(onesided=True),
    ):
        for module in (theirs, ours):
            with pytest.warns(UserWarning):
                make(module)


@pytest.mark.parametrize("name", MODULES)
def test_compile_with_numbers_as_symbols(name):
    assert_compiles_with_symbols(getattr(ours, name)(), torch.randn(2, 2000))


def test_compile_after_another_power():
    """What changed from one module to the next is a symbol for the second."""
    torch._dynamo.reset()
    x = torch.randn(2, 2000)
    for power in (2.0, 1.0, 3.0):
        module = ours.Spectrogram(power=power)
        torch.testing.assert_close(torch.compile(module, fullgraph=True, backend="eager")(x), module(x))


@pytest.mark.parametrize("name", MODULES)
def test_compile_fullgraph(name):
    torch._dynamo.reset()
    module, x = getattr(ours, name)(), torch.randn(2, 2000)
    torch.testing.assert_close(torch.compile(module, fullgraph=True, backend="aot_eager")(x), module(x))


# Functions


def test_filter_banks_are_the_same_numbers():
    for n_freqs, rate, n_mels in (
        (201, 16000, 128),
        (257, 16000, 80),
        (1025, 22050, 128),
        (129, 11025, 20),
        (3, 8000, 4),
    ):
        for norm in (None, "slaney"):
            for scale in ("htk", "slaney"):
                for f_min, f_max in ((0.0, rate / 2), (20.0, rate / 2 - 100), (133.3, 3000.0)):
                    arguments = (n_freqs, f_min, f_max, n_mels, rate, norm, scale)
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")
                        assert torch.equal(ours_F.melscale_fbanks(*arguments), theirs_F.melscale_fbanks(*arguments))
        assert torch.equal(
            ours_F.linear_fbanks(n_freqs, 10.0, rate / 2, n_mels, rate),
            theirs_F.linear_fbanks(n_freqs, 10.0, rate / 2, n_mels, rate),
        )
        for norm in ("ortho", None):
            assert torch.equal(ours_F.create_dct(13, n_mels, norm), theirs_F.create_dct(13, n_mels, norm))


@pytest.mark.filterwarnings("default:At least one mel filterbank")
def test_empty_filters_warn_and_stay():
    with pytest.warns(UserWarning, match="all zero"):
        bank = ours_F.melscale_fbanks(201, 0.0, 8000.0, 128, 16000)
    assert bank.shape == (201, 128) and (bank.sum(0) == 0).any()


@pytest.mark.parametrize("shape", [(5, 7), (2, 5, 7), (3, 2, 5, 7), (2, 3, 2, 5, 7)])
@pytest.mark.parametrize("top_db", [None, 30.0])
def test_amplitude_to_db(shape, top_db):
    x = torch.rand(shape, dtype=torch.float64) * torch.logspace(0, -12, shape[0], dtype=torch.float64).view(
        -1, *[1] * (len(shape) - 1)
    )
    for stype in ("power", "magnitude"):
        agree(*pair("AmplitudeToDB", stype=stype, top_db=top_db), x)
    arguments = (20.0, 1e-5, 1.5, top_db)
    torch.testing.assert_close(ours_F.amplitude_to_DB(x, *arguments), theirs_F.amplitude_to_DB(x, *arguments))
    half = ours_F.amplitude_to_DB(x.half(), 10.0, 1e-10, 0.0, top_db)
    assert half.dtype == torch.float16 and half.isfinite().all()


@pytest.mark.parametrize("top_db", [None, 10.0])
def test_amplitude_to_db_of_integers(top_db):
    x = torch.arange(24, dtype=torch.int32).reshape(2, 3, 4)
    torch.testing.assert_close(ours.AmplitudeToDB(top_db=top_db)(x), theirs.AmplitudeToDB(top_db=top_db)(x))


@pytest.mark.parametrize("win_length", [3, 4, 5, 9])
@pytest.mark.parametrize("mode", ["replicate", "reflect", "constant", "circular"])
def test_compute_deltas(win_length, mode):
    x = torch.randn(2, 3, 4, 11, dtype=torch.float64)
    agree(
        lambda x: theirs_F.compute_deltas(x, win_length, mode), lambda x: ours_F.compute_deltas(x, win_length, mode), x
    )


@pytest.mark.parametrize("seed", range(40))
def test_sliding_window_cmn(seed):
    rng = random.Random(seed)
    x = torch.randn(*rng.choice(((1,), (2, 3), ())), rng.choice((1, 2, 7, 30)), 3, dtype=torch.float64)
    arguments = {
        "cmn_window": rng.choice((1, 2, 5, 6, 600)),
        "min_cmn_window": rng.choice((1, 3, 4, 100)),
        "center": rng.choice((True, False)),
        "norm_vars": rng.choice((True, False)),
    }
    expected = theirs_F.sliding_window_cmn(x, **arguments).view(x.shape)  # which loses a time axis of 1
    out = ours_F.sliding_window_cmn(x, **arguments)
    known = expected.isfinite() & (expected.abs() < 1e4)  # there: the rounding of a variance of nothing
    torch.testing.assert_close(out[known], expected[known], rtol=1e-7, atol=1e-7)
    assert out.shape == x.shape and out.isfinite().all()


@pytest.mark.parametrize("shape", [(201, 9), (2, 201, 9), (2, 3, 201, 9)])
def test_mel_scale(shape):
    reference, module = pair("MelScale", n_mels=40, norm="slaney")
    agree(reference.double(), module.double(), torch.rand(shape, dtype=torch.float64))


def test_functional_spectrogram():
    x = speech_like((2, 900))
    window = torch.hann_window(50, dtype=torch.float64)
    for onesided in (True, False):
        for n_fft in (50, 51):
            arguments = (3, window, n_fft, 20, 50, 2.0, "window", True, "reflect", onesided)
            agree(
                lambda x, a=arguments: theirs_F.spectrogram(x, *a), lambda x, a=arguments: ours_F.spectrogram(x, *a), x
            )


def test_made_on_meta():
    with torch.device("meta"):
        made = ours.MFCC()
    loaded = made.to_empty(device="cpu")
    loaded.load_state_dict(ours.MFCC().state_dict())
    x = torch.randn(2, 4000)
    torch.testing.assert_close(loaded(x), ours.MFCC()(x))
