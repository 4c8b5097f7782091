"""`mmfast.compat.transformers` against the feature extractors of transformers."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
import torch

theirs = pytest.importorskip("transformers")

from mmfast.compat import transformers as ours  # noqa: E402
from mmfast.compat import whisper  # noqa: E402

pytestmark = pytest.mark.peer

# Features of 1 are 40 dB. Both sides are float32, and the weakest bands, 80 dB down, hold some of its rounding.
ATOL = 5e-5
LENGTHS = (30000, 12345, 16000, 700)


def clips(lengths=LENGTHS, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [
        (rng.standard_normal(n) * np.geomspace(1e-4, 0.5, n) * 4.0**-i).astype(np.float32)
        for i, n in enumerate(lengths)
    ]


def assert_same(actual, expected, atol: float):
    assert set(actual) == set(expected)
    for key in expected:
        a, e = actual[key], expected[key]
        assert type(a) is type(e) and a.dtype == e.dtype, key
        np.testing.assert_allclose(np.asarray(a), np.asarray(e), rtol=0, atol=atol, err_msg=key)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"feature_size": 128},
        {"n_fft": 512, "hop_length": 128},
        {"n_fft": 401},
        {"chunk_length": 1},
        {"padding_value": 0.01},
        {"sampling_rate": 44100},
        {"sampling_rate": 8000},
        {"sampling_rate": 22051},
    ],
    ids=str,
)
def test_whisper_constructor(options):
    options = {"chunk_length": 2} | options
    call = {"sampling_rate": options.get("sampling_rate", 16000), "return_attention_mask": True}
    expected = theirs.WhisperFeatureExtractor(**options)(clips(), **call)
    assert_same(ours.WhisperFeatureExtractor(**options)(clips(), **call), expected, ATOL)


@pytest.mark.parametrize(
    "call",
    [
        {"return_tensors": "pt"},
        {"return_tensors": "np", "return_attention_mask": True},
        {"padding": "longest"},
        {"padding": "longest", "pad_to_multiple_of": 4000, "return_attention_mask": True},
        {"max_length": 20000},
        {"truncation": False, "padding": "longest", "return_attention_mask": True},
        {"do_normalize": True, "return_attention_mask": True},
        {"device": "cpu"},
    ],
    ids=str,
)
def test_whisper_call(call):
    expected = theirs.WhisperFeatureExtractor(chunk_length=2)(clips(), sampling_rate=16000, **call)
    assert_same(ours.WhisperFeatureExtractor(chunk_length=2)(clips(), sampling_rate=16000, **call), expected, ATOL)


@pytest.mark.parametrize(
    "speech", [clips()[0], clips()[0].astype(np.float64), clips()[3].tolist(), np.stack([clips()[0]] * 2)]
)
def test_whisper_inputs(speech):
    expected = theirs.WhisperFeatureExtractor()(speech, sampling_rate=16000)
    assert_same(ours.WhisperFeatureExtractor()(speech, sampling_rate=16000), expected, ATOL)


@pytest.mark.parametrize("feature_size", [80, 128])
def test_whisper_float64(feature_size):
    """Against Hugging Face's numpy path, which is float64 inside and ends in float32."""
    batch = np.stack([whisper.pad_or_trim(c, 32000) for c in clips()]).astype(np.float64)
    options = {"feature_size": feature_size, "chunk_length": 2}
    expected = theirs.WhisperFeatureExtractor(**options)._np_extract_fbank_features(batch, "cpu")
    actual = ours.WhisperFeatureExtractor(**options).extract(torch.from_numpy(batch))
    assert actual.dtype == torch.float64
    np.testing.assert_allclose(actual, expected, rtol=0, atol=3e-7)


def test_whisper_dither_draws_the_same_noise():
    options = {"dither": 1e-3, "chunk_length": 2}
    torch.manual_seed(7)
    expected = theirs.WhisperFeatureExtractor(**options)(clips(), sampling_rate=16000)
    torch.manual_seed(7)
    assert_same(ours.WhisperFeatureExtractor(**options)(clips(), sampling_rate=16000), expected, ATOL)


def test_whisper_rejects_other_rates():
    with pytest.raises(ValueError, match="sampling rate"):
        ours.WhisperFeatureExtractor()(clips(), sampling_rate=8000)


@pytest.mark.parametrize("name", ["WhisperFeatureExtractor", "SeamlessM4TFeatureExtractor", "ASTFeatureExtractor"])
def test_saved_configuration_is_theirs(name, tmp_path):
    made = getattr(ours, name)(feature_size=96, padding_value=0.5)
    assert isinstance(made, getattr(theirs, name))
    made.save_pretrained(tmp_path)
    back = getattr(theirs, name).from_pretrained(tmp_path)
    assert type(back) is getattr(theirs, name) and back.to_dict() == made.to_dict()
    again = getattr(ours, name).from_pretrained(tmp_path)
    assert type(again) is type(made) and again.to_dict() == made.to_dict()


def padded(lengths=LENGTHS) -> tuple[torch.Tensor, torch.Tensor]:
    """The clips as one tensor, with values beyond their ends that must not count."""
    batch = torch.full((len(lengths), max(lengths)), 3.0)
    for row, clip in zip(batch, clips(lengths), strict=True):
        row[: len(clip)] = torch.from_numpy(clip)
    return batch, torch.tensor(lengths)


@pytest.mark.parametrize("padding", ["max_length", "longest"])
@pytest.mark.parametrize("chunk_length", [1, 3])
def test_whisper_extract_is_the_call(chunk_length, padding):
    extractor = ours.WhisperFeatureExtractor(chunk_length=chunk_length)
    expected = theirs.WhisperFeatureExtractor(chunk_length=chunk_length)(
        clips(), sampling_rate=16000, padding=padding, return_tensors="pt", return_attention_mask=True
    )
    features, frames = extractor.extract(*padded(), padding=padding)
    torch.testing.assert_close(features, expected.input_features, rtol=0, atol=ATOL)
    assert torch.equal(frames, expected.attention_mask.sum(1).to(torch.int64))


def test_whisper_extract_stays_in_torch(monkeypatch):
    batch, lengths = padded()
    extractor = ours.WhisperFeatureExtractor(chunk_length=2)
    expected = extractor.extract(batch, lengths)
    monkeypatch.setattr(torch.Tensor, "numpy", lambda *_: pytest.fail("a tensor became an array"))
    monkeypatch.setattr(torch, "from_numpy", lambda *_: pytest.fail("an array became a tensor"))
    actual = extractor.extract(batch, lengths)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_whisper_extract_shapes_dtypes_and_items():
    batch = torch.from_numpy(np.stack([clips()[0], clips()[0] * 1e-4]))
    extractor = ours.WhisperFeatureExtractor(chunk_length=2)
    together = extractor.extract(batch)
    assert together.shape == (2, 80, 200)
    assert torch.equal(together[1], extractor.extract(batch[1]))
    assert torch.equal(extractor.extract(batch.view(1, 2, -1))[0], together)
    assert extractor.extract(batch.bfloat16()).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="padding"):
        extractor.extract(batch, padding="do_not_pad")
    with pytest.raises(ValueError, match="lengths"):
        extractor.extract(batch, torch.tensor([1, 2, 3]))


def test_whisper_extract_gradient():
    """Of one item alone, openai-whisper's gradient (Hugging Face has none)."""
    reference = pytest.importorskip("whisper.audio")
    x, cotangent = torch.from_numpy(clips()[0]), torch.randn(80, 200)

    def gradient(function):
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(function(leaf), leaf, cotangent)[0]

    expected = gradient(lambda leaf: reference.log_mel_spectrogram(whisper.pad_or_trim(leaf, 32000)))
    actual = gradient(ours.WhisperFeatureExtractor(chunk_length=2).extract)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=2e-5 * float(expected.abs().max()))


@pytest.mark.parametrize(
    "options", [{}, {"num_mel_bins": 40, "feature_size": 40}, {"stride": 1}, {"sampling_rate": 8000}], ids=str
)
@pytest.mark.parametrize("call", [{}, {"do_normalize_per_mel_bins": False}, {"return_tensors": "pt"}], ids=str)
def test_seamless(options, call):
    call = {"sampling_rate": options.get("sampling_rate", 16000)} | call
    expected = theirs.SeamlessM4TFeatureExtractor(**options)(clips(), **call)
    # Theirs is float64 inside; features of up to 30, and the quietest bands hold rounding noise.
    assert_same(ours.SeamlessM4TFeatureExtractor(**options)(clips(), **call), expected, 1e-3)


def test_seamless_takes_the_first_channel():
    stereo = [np.stack([c, -2 * c[::-1]]) for c in clips()]
    expected = theirs.SeamlessM4TFeatureExtractor()(stereo, sampling_rate=16000)
    assert_same(ours.SeamlessM4TFeatureExtractor()(stereo, sampling_rate=16000), expected, 1e-3)


def test_seamless_extract_ragged():
    extractor = ours.SeamlessM4TFeatureExtractor()
    features, frames = extractor.extract(*padded())
    for row, count, clip in zip(features, frames, clips(), strict=True):
        expected = theirs.SeamlessM4TFeatureExtractor()._extract_fbank_features(clip)
        assert count == len(expected)
        np.testing.assert_allclose(row[:count], expected, rtol=0, atol=1e-3)
        assert not row[count:].any()


@pytest.mark.parametrize(
    "options", [{}, {"num_mel_bins": 64}, {"max_length": 50}, {"do_normalize": False}, {"sampling_rate": 8000}], ids=str
)
def test_ast(options):
    call = {"sampling_rate": options.get("sampling_rate", 16000), "return_tensors": "np"}
    expected = theirs.ASTFeatureExtractor(**options)(clips(), **call)
    assert_same(ours.ASTFeatureExtractor(**options)(clips(), **call), expected, 1e-3)
