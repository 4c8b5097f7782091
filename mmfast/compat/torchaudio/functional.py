"""The functions of ``torchaudio.functional`` that lead from a waveform to mel or MFCC features."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from mmfast.compat.torchaudio import _fused
from mmfast.mel import post, tables

__all__ = [
    "amplitude_to_DB",
    "compute_deltas",
    "create_dct",
    "linear_fbanks",
    "melscale_fbanks",
    "sliding_window_cmn",
    "spectrogram",
]


def spectrogram(
    waveform: Tensor,
    pad: int,
    window: Tensor,
    n_fft: int,
    hop_length: int,
    win_length: int,
    power: float | None,
    normalized: bool | str,
    center: bool = True,
    pad_mode: str = "reflect",
    onesided: bool = True,
    return_complex: bool | None = None,
) -> Tensor:
    r"""``|STFT(waveform)| ** power`` in one pass: ``(..., time)`` → ``(..., n_fft // 2 + 1, frames)``.

    Arguments as in ``torchaudio.functional.spectrogram``: ``pad`` zeros on both sides, then, with ``center``,
    ``n_fft // 2`` samples of ``pad_mode``; ``normalized`` ``True`` or ``"window"`` divides by the l2 norm of the
    window, ``"frame_length"`` by ``sqrt(n_fft)``. ``onesided=False`` gives all ``n_fft`` bins. The result has the dtype
    of the waveform; half precision is computed in float32; a float64 window makes a float32 waveform float64.

    Raises:
        ValueError: ``power=None`` (the complex spectrum), or a waveform shorter than the padding or the frame need,
            among the other values that do not fit.
    """
    if return_complex is not None:
        warnings.warn("return_complex is deprecated and has no effect", stacklevel=2)
    described = _fused.describe(n_fft, win_length, hop_length, pad, power, normalized, center, pad_mode)
    spectrum = _fused.run(waveform, described, window)
    if onesided is None or onesided:
        return spectrum
    mirrored = spectrum[..., 1 : (n_fft + 1) // 2, :].flip(-2)  # a real signal's spectrum is symmetric
    return torch.cat((spectrum, mirrored), dim=-2)


def amplitude_to_DB(
    x: Tensor, multiplier: float, amin: float, db_multiplier: float, top_db: float | None = None
) -> Tensor:
    r"""Decibels: ``multiplier * (log10 max(x, amin) - db_multiplier)``, no lower than ``top_db`` below the maximum.

    The maximum is torchaudio's: over everything for ``(freq, time)`` and ``(channel, freq, time)``, and for
    ``(..., batch, channel, freq, time)`` over each item's channels together. A batch of mono spectrograms without its
    channel dimension, ``(batch, freq, time)``, therefore shares one maximum, and an item's values depend on its
    neighbours.

    Half precision is computed in float32. Returns the shape and dtype of ``x``, floating point for integers.
    """
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    decibel = multiplier * torch.log10(wide.clamp(min=amin)) - multiplier * db_multiplier
    if top_db is not None and decibel.numel():
        over = tuple(range(-min(decibel.dim(), 3), 0))
        decibel = torch.maximum(decibel, decibel.amax(over, keepdim=True) - top_db)
    return decibel.to(x.dtype) if x.is_floating_point() else decibel


def melscale_fbanks(
    n_freqs: int,
    f_min: float,
    f_max: float,
    n_mels: int,
    sample_rate: int,
    norm: str | None = None,
    mel_scale: str = "htk",
) -> Tensor:
    r"""Triangles spaced in mel and linear in hertz, float32 ``(n_freqs, n_mels)``; the numbers are torchaudio's.

    The last bin stands for ``sample_rate // 2`` Hz. ``norm="slaney"`` multiplies each filter by 2 / its width in Hz.
    Warns of filters that meet no bin; they stay in the result, as zeros.

    Raises:
        ValueError: an unknown ``norm`` or ``mel_scale``.
    """
    if norm is not None and norm != "slaney":
        raise ValueError(f"norm must be None or 'slaney', got {norm!r}")
    if mel_scale not in ("htk", "slaney"):
        raise ValueError(f"mel_scale must be 'htk' or 'slaney', got {mel_scale!r}")
    bank = tables.mel_filters(n_freqs, f_min, f_max, n_mels, sample_rate, norm, mel_scale, dtype=torch.float32)
    if not bank.is_meta and (bank.max(dim=0).values == 0).any():
        warnings.warn(
            f"At least one mel filterbank has all zero values: n_mels ({n_mels}) may be too high, "
            f"or n_freqs ({n_freqs}) too low.",
            stacklevel=2,
        )
    return bank


def linear_fbanks(n_freqs: int, f_min: float, f_max: float, n_filter: int, sample_rate: int) -> Tensor:
    r"""Triangles equally spaced in hertz, float32 ``(n_freqs, n_filter)``; the numbers are torchaudio's."""
    return tables.linear_filters(n_freqs, f_min, f_max, n_filter, sample_rate, dtype=torch.float32)


def create_dct(n_mfcc: int, n_mels: int, norm: str | None) -> Tensor:
    r"""DCT-II, to multiply from the right: float32 ``(n_mels, n_mfcc)``; ``norm`` is ``"ortho"`` or ``None``.

    Raises:
        ValueError: another ``norm``.
    """
    if norm is not None and norm != "ortho":
        raise ValueError(f"norm must be 'ortho' or None, got {norm!r}")
    return tables.dct_matrix(n_mfcc, n_mels, norm, dtype=torch.float32)


def compute_deltas(specgram: Tensor, win_length: int = 5, mode: str = "replicate") -> Tensor:
    r"""Deltas: ``d[t] = sum_n n (c[t+n] - c[t-n]) / (2 sum_n n²)``, ``n`` from 1 to ``(win_length - 1) // 2``.

    Shape ``(..., freq, time)``, kept. ``mode`` says what lies beyond the ends, as in ``torch.nn.functional.pad``.

    Raises:
        ValueError: ``win_length`` below 3.
    """
    return post.deltas(specgram, win_length, mode)


def sliding_window_cmn(
    specgram: Tensor,
    cmn_window: int = 600,
    min_cmn_window: int = 100,
    center: bool = False,
    norm_vars: bool = False,
) -> Tensor:
    r"""Subtract the mean over a sliding window of frames, and with ``norm_vars`` divide by the deviation (Kaldi).

    Shape ``(..., time, freq)``, kept. The window holds ``cmn_window`` frames around the current one (``center``), or
    those up to it, at least ``min_cmn_window``. All frames at once, where torchaudio loops over them.
    """
    return post.sliding_normalize(specgram, cmn_window, min_cmn_window, center, norm_vars, dim=-2)
