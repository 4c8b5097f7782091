"""`mmfast.compat.whisper` against openai-whisper."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from numerics import assert_no_worse_than_eager

from mmfast.compat import whisper as ours

theirs = pytest.importorskip("whisper.audio", reason="openai-whisper is not installed")
pytestmark = pytest.mark.peer


def speechlike(*shape: int, seed: int = 0) -> np.ndarray:
    """Noise whose level changes from item to item and along time, with a stretch of silence."""
    x = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    x *= np.geomspace(1e-3, 0.3, shape[-1], dtype=np.float32)
    if len(shape) > 1:
        x *= np.geomspace(1e-4, 1.0, shape[0], dtype=np.float32)[:, None]
    x[..., 3000:5000] = 0
    return x


@pytest.mark.parametrize("n_mels", [80, 128])
@pytest.mark.parametrize("padding", [0, 1, 4800])
@pytest.mark.parametrize("shape", [(16000,), (15999,), (201,), (3, 9000)])
def test_values(shape, padding, n_mels):
    x = speechlike(*shape)
    expected = theirs.log_mel_spectrogram(x, n_mels, padding)
    actual = ours.log_mel_spectrogram(x, n_mels, padding)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)
    # Bands near the rounding of float32 differ more than the others: which of the two is nearer to the truth decides.
    exact = ours.log_mel_spectrogram(torch.from_numpy(x).double(), n_mels, padding)
    assert_no_worse_than_eager(actual, expected, exact)
    torch.testing.assert_close(ours.log_mel_spectrogram(torch.from_numpy(x), n_mels, padding), actual, rtol=0, atol=0)


def test_maximum_is_shared_by_the_batch():
    x = torch.from_numpy(speechlike(2, 8000))
    together = ours.log_mel_spectrogram(x)
    assert not torch.allclose(together[0], ours.log_mel_spectrogram(x[0]), atol=1e-2)
    torch.testing.assert_close(together, theirs.log_mel_spectrogram(x), rtol=0, atol=1e-5)


def test_silence():
    x = torch.zeros(2, 4000)
    assert torch.equal(ours.log_mel_spectrogram(x), theirs.log_mel_spectrogram(x))


def test_gradient():
    x = torch.from_numpy(speechlike(2, 6000)).mul(10)
    cotangent = torch.randn(2, 80, 37)

    def gradient(function):
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(function(leaf), leaf, cotangent)[0]

    expected = gradient(theirs.log_mel_spectrogram)
    assert expected.abs().max() > 0
    actual = gradient(ours.log_mel_spectrogram)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=2e-5 * float(expected.abs().max()))


def test_more_dimensions_and_float64():
    x = torch.from_numpy(speechlike(4, 5000)).double()
    expected = ours.log_mel_spectrogram(x)
    assert expected.dtype == torch.float64
    torch.testing.assert_close(ours.log_mel_spectrogram(x.view(2, 2, 5000)).view_as(expected), expected, rtol=0, atol=0)
    torch.testing.assert_close(expected.float(), theirs.log_mel_spectrogram(x.float()), rtol=0, atol=1e-5)


def test_device_argument():
    x = speechlike(4000)
    torch.testing.assert_close(ours.log_mel_spectrogram(x, device="cpu"), theirs.log_mel_spectrogram(x, device="cpu"))


@pytest.mark.parametrize("n_mels", [80, 128])
def test_filters(n_mels):
    torch.testing.assert_close(ours.mel_filters("cpu", n_mels), theirs.mel_filters("cpu", n_mels), rtol=2e-6, atol=1e-9)


@pytest.mark.parametrize("axis", [-1, 0])
@pytest.mark.parametrize("length", [3, 5, 9])
@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
def test_pad_or_trim(kind, length, axis):
    x = kind(np.arange(25, dtype=np.float32).reshape(5, 5))
    expected = theirs.pad_or_trim(x, length, axis=axis)
    actual = ours.pad_or_trim(x, length, axis=axis)
    assert type(actual) is type(expected)
    np.testing.assert_array_equal(actual, expected)


def test_what_is_trimmed_is_a_copy():
    """Changing it leaves the recording as it was."""
    recording = torch.ones(9)
    ours.pad_or_trim(recording, 4).zero_()
    assert recording.sum() == 9


def test_pad_or_trim_default():
    assert ours.pad_or_trim(torch.ones(2, 100)).shape == (2, theirs.N_SAMPLES)


def test_constants():
    names = [n for n in vars(theirs) if n.isupper()]
    assert len(names) > 5
    assert {n: getattr(ours, n) for n in names} == {n: getattr(theirs, n) for n in names}


def test_file(tmp_path):
    soundfile = pytest.importorskip("soundfile")
    x = speechlike(2, 12000, seed=1) * 0.9
    path = tmp_path / "stereo.wav"
    soundfile.write(path, x.T, 16000, subtype="FLOAT")
    np.testing.assert_allclose(ours.load_audio(path), x.mean(axis=0), rtol=0, atol=1e-7)
    expected = theirs.log_mel_spectrogram(x.mean(axis=0))
    torch.testing.assert_close(ours.log_mel_spectrogram(str(path)), expected, rtol=0, atol=1e-4)


def test_file_is_resampled(tmp_path):
    soundfile = pytest.importorskip("soundfile")
    pytest.importorskip("soxr")
    tone = lambda rate: np.sin(2 * np.pi * 440 * np.arange(rate) / rate).astype(np.float32) * 0.5  # noqa: E731
    soundfile.write(tmp_path / "tone.wav", tone(44100), 44100, subtype="FLOAT")
    loaded = ours.load_audio(str(tmp_path / "tone.wav"))
    assert loaded.dtype == np.float32 and loaded.shape == (16000,)
    np.testing.assert_allclose(loaded[500:-500], tone(16000)[500:-500], atol=1e-3)


def test_file_errors(tmp_path, monkeypatch):
    pytest.importorskip("soundfile")
    (tmp_path / "broken.wav").write_bytes(b"RIFF nothing here")
    with pytest.raises(RuntimeError, match="Failed to load audio"):
        ours.load_audio(tmp_path / "broken.wav")
    with pytest.raises(RuntimeError, match="Failed to load audio"):
        ours.log_mel_spectrogram(str(tmp_path / "absent.wav"))
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(ImportError, match=r"mmfast\[audio\]"):
        ours.load_audio(tmp_path / "broken.wav")


def test_rejects():
    with pytest.raises(TypeError, match="floating point"):
        ours.log_mel_spectrogram(np.zeros(4000, dtype=np.int16))
    with pytest.raises(ValueError, match="201"):
        ours.log_mel_spectrogram(torch.zeros(200))
