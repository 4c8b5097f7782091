"""openai-whisper's audio front end (``whisper.audio``) under its own names.

``from mmfast.compat.whisper import log_mel_spectrogram, pad_or_trim`` takes the place of the same import from
``whisper.audio``; values, shapes and defaults are those of openai-whisper 20250625. Differences, all of them additions:
any ``n_mels`` (openai's file has 80 and 128 only), any number of leading dimensions, gradients to ``audio``, float64,
and decoding by libsndfile instead of an ``ffmpeg`` process.
"""

from __future__ import annotations

import os
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F

from mmfast import _backend
from mmfast.mel import MelConfig, extract, tables

__all__ = ["config", "load_audio", "log_mel_spectrogram", "mel_filters", "pad_or_trim"]

SAMPLE_RATE = 16000
N_FFT = 400
HOP_LENGTH = 160
CHUNK_LENGTH = 30
N_SAMPLES = CHUNK_LENGTH * SAMPLE_RATE
N_FRAMES = N_SAMPLES // HOP_LENGTH
N_SAMPLES_PER_TOKEN = HOP_LENGTH * 2
FRAMES_PER_SECOND = SAMPLE_RATE // HOP_LENGTH
TOKENS_PER_SECOND = SAMPLE_RATE // N_SAMPLES_PER_TOKEN


@lru_cache(maxsize=64)
def config(
    n_mels: int = 80,
    *,
    top_db_scope: str = "batch",
    sample_rate: float = SAMPLE_RATE,
    n_fft: int = N_FFT,
    hop_length: int = HOP_LENGTH,
) -> MelConfig:
    r"""Whisper's log-mel features as a `MelConfig`.

    ``v = log10 max(P @ F, 1e-10)``, ``v = max(v, max(v) - 8)``, ``(v + 4) / 4``: Hann window, reflected edges, the last
    frame left out, Slaney filters. ``top_db_scope`` says what the maximum is taken over: openai-whisper takes the whole
    ``"batch"``, Hugging Face each ``"item"``.
    """
    return MelConfig(
        sample_rate=sample_rate,
        n_fft=n_fft,
        hop_length=hop_length,
        drop_last=True,
        n_mels=n_mels,
        f_max=min(8000.0, sample_rate / 2),
        mel_scale="slaney",
        mel_norm="slaney",
        log="log10",
        log_floor=1e-10,
        top_db=8.0,  # in the unit of the logarithm: 80 dB
        top_db_scope=top_db_scope,
        output_offset=4.0,
        output_scale=0.25,
    )


def load_audio(file: str | os.PathLike, sr: int = SAMPLE_RATE) -> np.ndarray:
    """Samples of an audio file: mono (mean of the channels), float32 in [-1, 1], resampled to ``sr`` Hz.

    openai-whisper asks the ``ffmpeg`` program and rounds to 16 bits; here libsndfile decodes and soxr resamples (high
    quality), so values of files at another rate differ slightly.

    Raises:
        ImportError: soundfile, or for another sample rate soxr, is not installed.
        RuntimeError: the file cannot be decoded (as openai-whisper).
    """
    soundfile = _optional("soundfile")
    try:
        samples, rate = soundfile.read(file, dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, OSError) as error:
        raise RuntimeError(f"Failed to load audio: {error}") from error
    mono = samples[:, 0] if samples.shape[1] == 1 else samples.mean(axis=1)
    return np.ascontiguousarray(mono if rate == sr else _optional("soxr").resample(mono, rate, sr))


def pad_or_trim(array, length: int = N_SAMPLES, *, axis: int = -1):
    """Array or tensor with exactly ``length`` entries along ``axis``: cut, or filled up with zeros at the end."""
    size = array.shape[axis]
    if size > length:
        return array.narrow(axis, 0, length).clone() if torch.is_tensor(array) else array.take(range(length), axis=axis)
    if size == length:
        return array
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, length - size)
    if torch.is_tensor(array):
        return F.pad(array, [w for pair in reversed(widths) for w in pair])
    return np.pad(array, widths)


@_backend.kept(maxsize=64)
def mel_filters(device: str | torch.device, n_mels: int) -> torch.Tensor:
    """Filter bank ``(n_mels, 201)``, float32: Slaney triangles with area normalisation, 0 to 8000 Hz.

    openai-whisper reads the same numbers from a file that librosa wrote.
    """
    return tables.filters(config(n_mels)).T.to(torch.float32).contiguous().to(device)


def log_mel_spectrogram(
    audio: str | os.PathLike | np.ndarray | torch.Tensor,
    n_mels: int = 80,
    padding: int = 0,
    device: str | torch.device | None = None,
) -> torch.Tensor:
    """Whisper's log-mel spectrogram, as ``whisper.log_mel_spectrogram``.

    The maximum that limits the range is taken over the whole tensor, so that in a batch the items depend on each other
    (openai's behaviour; `mmfast.compat.transformers.WhisperFeatureExtractor` treats each item by itself).

    Args:
        audio: path of an audio file, or samples ``(..., T)`` at 16 kHz in [-1, 1], float.
        n_mels: number of filters; Whisper models use 80, large-v3 128.
        padding: zeros added at the end.
        device: where to compute; default where ``audio`` is.

    Returns:
        ``(..., n_mels, (T + padding) // 160)``, in the dtype of ``audio`` (float32 for files).

    Raises:
        TypeError: samples are not floating point. ValueError: fewer than 201 samples.
    """
    if not torch.is_tensor(audio):
        audio = torch.from_numpy(load_audio(audio) if isinstance(audio, (str, os.PathLike)) else np.asarray(audio))
    if not audio.dtype.is_floating_point:
        raise TypeError(
            f"audio must be floating point samples in [-1, 1], got {audio.dtype}; divide int16 samples by 32768"
        )
    if device is not None:
        audio = audio.to(device)
    if padding > 0:
        audio = F.pad(audio, (0, padding))
    return extract(audio, config(n_mels))


def _optional(name: str):
    try:
        return __import__(name)
    except ImportError as error:
        raise ImportError(
            f"reading audio files needs {name}: pip install 'mmfast[audio]' (or pip install {name})"
        ) from error
