"""`mmfast.compat.nemo` against its definition in torch.stft, and against transformers' Parakeet extractor."""

from __future__ import annotations

import math
import os
import random
from collections import UserDict

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
import torch
from numerics import assert_compiles_with_symbols

from mmfast.compat.nemo import FilterbankFeatures

librosa = pytest.importorskip("librosa")
pytestmark = pytest.mark.peer

LENGTHS = (8000, 5121, 1, 3200, 0)
SMALL = {"n_window_size": 64, "n_window_stride": 32, "nfilt": 8, "sample_rate": 4000}


def batch(lengths=LENGTHS, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Waveforms with noise past their ends too, which must not count."""
    x = np.random.default_rng(seed).standard_normal((len(lengths), max(lengths)))
    return torch.from_numpy(x * np.geomspace(0.01, 1, len(lengths))[:, None]), torch.tensor(lengths)


def definition(x, seq_len, *, linear_spec=False, narrow=(), **given):
    """NeMo's steps one after the other, an item at a time, in the dtype of ``x``."""
    o = {
        "sample_rate": 16000, "n_window_size": 320, "n_window_stride": 160, "window": "hann",
        "normalize": "per_feature", "n_fft": None, "preemph": 0.97, "nfilt": 64, "lowfreq": 0, "highfreq": None,
        "log": True, "log_zero_guard_type": "add", "log_zero_guard_value": 2**-24, "pad_to": 16, "frame_splicing": 1,
        "exact_pad": False,
        "pad_value": 0, "mag_power": 2.0, "use_grads": False, "mel_norm": "slaney", "nb_max_freq": 4000,
    } | given  # fmt: skip
    win, hop, rate = o["n_window_size"], o["n_window_stride"], o["sample_rate"]
    n_fft = o["n_fft"] or 2 ** math.ceil(math.log2(win))
    window = torch.ones(win) if o["window"] == "none" else getattr(torch, f"{o['window']}_window")(win, periodic=False)
    bank = torch.from_numpy(
        librosa.filters.mel(
            sr=rate,
            n_fft=n_fft,
            n_mels=o["nfilt"],
            fmin=o["lowfreq"],
            fmax=o["highfreq"] or rate / 2,
            norm=o["mel_norm"],
        )
    ).to(x.dtype)
    guard = {"tiny": 2.0**-126, "eps": 2.0**-23}.get(o["log_zero_guard_value"], o["log_zero_guard_value"])
    time, items, counts = x.shape[1], [], []
    width = 1 + (time + 2 * (n_fft // 2) - n_fft) // hop
    if o["exact_pad"]:
        width = time // hop
    total = -(-width // o["pad_to"]) * o["pad_to"] if o["pad_to"] else width
    for i, (row, n) in enumerate(zip(x, seq_len.tolist(), strict=True)):
        if o["preemph"] is not None:
            row = torch.cat((row[:1], row[1:] - o["preemph"] * row[:-1]))
        row = torch.where(torch.arange(time) < n, row, 0)
        if o["exact_pad"]:
            row = torch.nn.functional.pad(row, ((n_fft - hop) // 2,) * 2)
        spectrum = torch.view_as_real(
            torch.stft(
                row,
                n_fft,
                hop,
                win,
                window.to(x.dtype),
                center=not o["exact_pad"],
                pad_mode="constant",
                return_complex=True,
            )
        )
        v = (spectrum.square().sum(-1) + (1e-5 if o["use_grads"] else 0)).sqrt() ** o["mag_power"]
        if i in narrow:
            v[int(o["nb_max_freq"] / rate * n_fft) :] = 0
        count = n // hop if o["exact_pad"] else max(0, (n + 2 * (n_fft // 2) - n_fft) // hop)
        counts.append(count)
        if linear_spec:
            items.append(v)
            continue
        v = bank @ v
        if o["log"]:
            v = (v + guard if o["log_zero_guard_type"] == "add" else v.clamp(min=guard)).log()
        v = torch.cat([v] * o["frame_splicing"])
        valid = v[:, :count]
        if o["normalize"] == "per_feature":
            valid = (valid - valid.mean(1, keepdim=True)) / ((valid.std(1, keepdim=True) if count > 1 else 0.0) + 1e-5)
        elif o["normalize"] == "all_features" and count:
            valid = (valid - valid.mean()) / (valid.std() + 1e-5)
        elif isinstance(o["normalize"], UserDict):
            mean, std = (torch.as_tensor(o["normalize"][k]).to(x.dtype) for k in ("fixed_mean", "fixed_std"))
            valid = (valid - mean[:, None]) / std[:, None]
        items.append(torch.nn.functional.pad(valid, (0, total - count), value=float(o["pad_value"])))
    return torch.stack(items), torch.tensor(counts)


OPTIONS = [
    {},
    {"nfilt": 80, "n_window_size": 400},
    {"n_window_size": 400, "n_fft": 400, "n_window_stride": 100},
    {"n_fft": 401, "pad_to": 0},
    {"window": "hamming", "normalize": "all_features"},
    {"window": "blackman", "normalize": None},
    {"window": "bartlett", "normalize": "none of these"},
    {"window": "none", "pad_to": 0},
    {"preemph": None, "normalize": None},
    {"preemph": 0.0, "pad_to": 7},
    {"lowfreq": 100, "highfreq": 7000, "mel_norm": None},
    {"log": False, "normalize": None, "pad_value": -3.5},
    {"log_zero_guard_type": "clamp", "log_zero_guard_value": 1.0, "normalize": None},
    {"log_zero_guard_type": "clamp", "log_zero_guard_value": "eps"},
    {"log_zero_guard_value": "tiny"},
    {"mag_power": 1.0, "normalize": None},
    {"mag_power": 1.5, "use_grads": True},
    {"exact_pad": True},
    {"exact_pad": True, "preemph": None, "pad_to": 0, "normalize": None, "pad_value": 1},
    {"frame_splicing": 3, "normalize": "all_features", "pad_value": 2.0},
    {"normalize": UserDict(fixed_mean=np.linspace(-3, 3, 64), fixed_std=np.linspace(1, 2, 64))},
    {"sample_rate": 8000, "n_window_size": 200, "n_window_stride": 80},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_matches_definition(options):
    x, lengths = batch()
    features, frames = FilterbankFeatures(**options).eval()(x, lengths)
    expected, counts = definition(x, lengths, **options)
    assert torch.equal(frames, counts)
    # Window and filters are float32 buffers on both sides, everything else float64.
    torch.testing.assert_close(features, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("options", OPTIONS[:4], ids=str)
def test_float32(options):
    x, lengths = batch()
    features, _ = FilterbankFeatures(**options).eval()(x.float(), lengths)
    assert features.dtype == torch.float32
    torch.testing.assert_close(features, definition(x, lengths, **options)[0].float(), rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("options", [{}, {"exact_pad": True}, {"mag_power": 1.0, "n_fft": 401}], ids=str)
def test_linear_spectrum(options):
    x, lengths = batch((8000, 5121, 3200))
    spectrum, frames = FilterbankFeatures(**options).eval()(x, lengths, linear_spec=True)
    expected, counts = definition(x, lengths, linear_spec=True, **options)
    assert spectrum.shape == expected.shape and torch.equal(frames, counts)
    for a, e, n in zip(spectrum, expected, counts.tolist(), strict=True):
        torch.testing.assert_close(a[:, :n], e[:, :n], rtol=1e-9, atol=1e-9)


def test_items_do_not_depend_on_each_other():
    x, lengths = batch()
    module = FilterbankFeatures(pad_to=0).eval()
    features, frames = module(x, lengths)
    for row, n, m, feature in zip(x, lengths.tolist(), frames.tolist(), features, strict=True):
        alone, count = module(row[None, : max(n, 1)], torch.tensor([n]))
        assert count == m
        torch.testing.assert_close(feature[:, :m], alone[0, :, :m], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.int32, torch.float32])
def test_lengths_of_other_types(dtype):
    x, lengths = batch()
    module = FilterbankFeatures().eval()
    expected, actual = module(x, lengths), module(x, lengths.to(dtype))
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    assert torch.equal(module.get_seq_len(lengths.to(dtype)), expected[1])


def test_pad_to_max():
    module = FilterbankFeatures(pad_to="max", max_duration=1.0, pad_value=5.0).eval()
    features, frames = module(*batch())
    assert features.shape[-1] == module.max_length == 100
    assert (features[..., 51:] == 5).all() and frames.max() == 50


def test_dither_in_training_only():
    x, lengths = batch()
    kept = x.clone()
    module = FilterbankFeatures(dither=0.1)
    torch.manual_seed(3)
    noisy, _ = module.train()(x, lengths)
    assert torch.equal(x, kept)
    torch.manual_seed(3)
    torch.testing.assert_close(noisy, definition(x + 0.1 * torch.randn_like(x), lengths)[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(module.eval()(x, lengths)[0], definition(x, lengths)[0], rtol=1e-6, atol=1e-6)


def test_narrowband_augmentation():
    x, lengths = batch((8000, 5121, 4000, 3200))
    options = {"dither": 0.0, "nb_augmentation_prob": 0.5, "nb_max_freq": 3000, "normalize": None}
    draw = random.Random(1)
    narrow = {i for i in range(4) if draw.random() < 0.5}
    assert 0 < len(narrow) < 4
    options |= {"rng": random.Random(1)}
    module = FilterbankFeatures(**options)
    expected = definition(x, lengths, narrow=narrow, normalize=None, nb_max_freq=3000)[0]
    torch.testing.assert_close(module.train()(x, lengths)[0], expected, rtol=1e-6, atol=1e-6)
    module._rng.seed(1)
    bins = int(3000 / 16000 * 512)
    spectrum, _ = module(x, lengths, linear_spec=True)
    assert [bool((s[bins:] == 0).all()) for s in spectrum] == [i in narrow for i in range(4)]
    plain = definition(x, lengths, normalize=None)[0]
    torch.testing.assert_close(module.eval()(x, lengths)[0], plain, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("normalize", ["per_feature", "all_features", None])
@pytest.mark.parametrize("mag_power", [1.0, 2.0])
def test_gradient(mag_power, normalize):
    x, lengths = batch()
    options = {"use_grads": True, "mag_power": mag_power, "normalize": normalize}
    x.requires_grad_()
    features, _ = FilterbankFeatures(**options).eval()(x, lengths)
    expected, _ = definition(x, lengths, **options)
    cotangent = torch.randn_like(expected)
    # A deviation of exactly 0, that of a single frame, has no gradient in torch: leave those items out.
    cotangent[2] = cotangent[4] = 0
    (actual,), (wanted,) = (torch.autograd.grad(v, x, cotangent) for v in (features, expected))
    rows = [0, 1, 3]
    torch.testing.assert_close(actual[rows], wanted[rows], rtol=1e-5, atol=1e-6 * float(wanted[rows].abs().max()))
    assert actual.isfinite().all()


def test_no_gradient_unless_asked():
    x, lengths = batch()
    assert not FilterbankFeatures()(x.requires_grad_(), lengths)[0].requires_grad


def test_double_backward():
    x, lengths = batch((96, 70))
    module = FilterbankFeatures(use_grads=True, **SMALL).eval()
    assert torch.autograd.gradgradcheck(lambda t: module(t, lengths)[0], x.requires_grad_())


def test_checkpoint():
    """Buffers have NeMo's names and shapes; what a checkpoint holds is used."""
    module = FilterbankFeatures().eval()
    state = module.state_dict()
    assert {k: tuple(v.shape) for k, v in state.items()} == {"window": (320,), "fb": (1, 64, 257)}
    assert torch.equal(module.filter_banks, module.fb)
    x, lengths = batch((4000, 3200))
    before = module(x, lengths)[0]
    other = FilterbankFeatures(window="hamming", lowfreq=200).eval()
    module.load_state_dict(other.state_dict())
    assert not torch.allclose(module(x, lengths)[0], before, atol=1e-2)
    torch.testing.assert_close(module(x, lengths)[0], other(x, lengths)[0], rtol=0, atol=0)


def test_attributes_changed_after_construction_count():
    x, lengths = batch()
    module = FilterbankFeatures()
    module.dither, module.pad_to, module.preemph, module.normalize = 0.0, 0, 0.5, None
    expected = definition(x, lengths, pad_to=0, preemph=0.5, normalize=None)[0]
    torch.testing.assert_close(module(x, lengths)[0], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"n_window_size": 0}, ValueError, "n_window_size"),
        ({"n_window_stride": 10.0}, ValueError, "n_window_stride"),
        ({"window": "kaiser"}, ValueError, "window"),
        ({"log_zero_guard_type": "none"}, ValueError, "log_zero_guard_type"),
        ({"log_zero_guard_value": "huge"}, ValueError, "log_zero_guard_value"),
        ({"pad_to": -1}, ValueError, "pad_to"),
        ({"exact_pad": True, "n_window_stride": 161}, NotImplementedError, "n_window_stride"),
        ({"stft_conv": True}, ValueError, "stft_conv"),
        ({"highfreq": 9000}, ValueError, "f_max"),
    ],
)
def test_rejects(options, error, message):
    with pytest.raises(error, match=message):
        FilterbankFeatures(**options)


def test_rejects_lengths_out_of_range():
    x, lengths = batch()
    with pytest.raises(ValueError, match="lengths"):
        FilterbankFeatures()(x, lengths + 1)


@pytest.mark.parametrize("feature_size", [80, 128])
def test_parakeet(feature_size):
    """transformers' Parakeet extractor is NeMo's front end with n_fft 512 and a window of 400."""
    transformers = pytest.importorskip("transformers")
    lengths = (16000, 9999, 4321)
    x, seq_len = batch(lengths)
    x = x.float()
    clips = [row[:n].numpy() for row, n in zip(x, lengths, strict=True)]
    extractor = transformers.ParakeetFeatureExtractor(feature_size=feature_size)
    theirs = extractor(clips, sampling_rate=16000, return_tensors="pt")
    module = FilterbankFeatures(n_window_size=400, nfilt=feature_size, pad_to=0).eval()
    features, frames = module(x, seq_len)
    assert torch.equal(frames, theirs.attention_mask.sum(1))
    torch.testing.assert_close(features.transpose(1, 2), theirs.input_features, rtol=1e-4, atol=2e-4)


def test_compile_with_numbers_as_symbols():
    assert_compiles_with_symbols(FilterbankFeatures(**SMALL).eval(), *batch((800, 500)))
