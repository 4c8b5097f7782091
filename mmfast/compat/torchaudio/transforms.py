"""The transforms of ``torchaudio.transforms`` that lead from a waveform to mel or MFCC features.

Each is a module with torchaudio's sub-modules and buffers, and computes the whole chain in one pass with the values
that these hold: a loaded or edited buffer counts, a sub-module's changed attribute counts, and a sub-module that was
replaced, hooked or given another ``forward`` is called like any other, with the rest of the chain around it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from mmfast.compat.torchaudio import _fused
from mmfast.compat.torchaudio import functional as F
from mmfast.compat.torchaudio._fused import child, table, untouched

__all__ = ["LFCC", "MFCC", "AmplitudeToDB", "MelScale", "MelSpectrogram", "Spectrogram"]


class Spectrogram(nn.Module):
    r"""``|STFT| ** power``: ``(..., time)`` → ``(..., n_fft // 2 + 1, frames)``. See `functional.spectrogram`.

    Args:
        n_fft: length of the transform.
        win_length: length of the window; default ``n_fft``. A shorter window stands in the middle of the frame.
        hop_length: samples from one frame to the next; default ``win_length // 2``.
        pad: zeros added on both sides.
        window_fn: called with ``win_length`` and ``wkwargs``, gives the buffer ``window``.
        power: exponent of the magnitude, > 0.
        normalized: ``True`` or ``"window"`` divides by the l2 norm of the window, ``"frame_length"`` by
            ``sqrt(n_fft)``.
        wkwargs: keywords for ``window_fn``.
        center: pad ``n_fft // 2`` samples on both sides, so that frame ``t`` is centred on sample ``t * hop_length``.
        pad_mode: ``"reflect"``, ``"constant"``, ``"replicate"`` or ``"circular"``.
        onesided: ``False`` gives all ``n_fft`` bins.
        return_complex: deprecated, without effect.

    Raises:
        ValueError: ``power=None``; torchaudio returns the complex spectrum there.
    """

    __constants__ = ["n_fft", "win_length", "hop_length", "pad", "power", "normalized"]  # noqa: RUF012

    def __init__(
        self,
        n_fft: int = 400,
        win_length: int | None = None,
        hop_length: int | None = None,
        pad: int = 0,
        window_fn: Callable[..., Tensor] = torch.hann_window,
        power: float | None = 2.0,
        normalized: bool | str = False,
        wkwargs: dict | None = None,
        center: bool = True,
        pad_mode: str = "reflect",
        onesided: bool = True,
        return_complex: bool | None = None,
    ) -> None:
        super().__init__()
        if power is None:
            raise ValueError("power must be a positive number, got None: for the complex spectrum use torch.stft")
        if return_complex is not None:
            warnings.warn("return_complex is deprecated and has no effect", stacklevel=2)
        self.n_fft = n_fft
        self.win_length = n_fft if win_length is None else win_length
        self.hop_length = self.win_length // 2 if hop_length is None else hop_length
        self.register_buffer("window", window_fn(self.win_length, **(wkwargs or {})))
        self.pad = pad
        self.power = power
        self.normalized = normalized
        self.center = center
        self.pad_mode = pad_mode
        self.onesided = onesided

    def forward(self, waveform: Tensor) -> Tensor:
        """``(..., time)`` → ``(..., freq, frames)``."""
        return F.spectrogram(
            waveform,
            self.pad,
            self.window,
            self.n_fft,
            self.hop_length,
            self.win_length,
            self.power,
            self.normalized,
            self.center,
            self.pad_mode,
            self.onesided,
        )


class AmplitudeToDB(nn.Module):
    r"""Decibels: ``multiplier * log10 max(x, 1e-10)``, no lower than ``top_db`` below the maximum.

    The multiplier is 10 for ``stype="power"`` and 20 otherwise. The maximum is shared by all channels of an item, and
    by a whole batch that has no channel dimension, as in torchaudio: see `functional.amplitude_to_DB`.

    Raises:
        ValueError: a negative ``top_db``.
    """

    __constants__ = ["multiplier", "amin", "ref_value", "db_multiplier"]  # noqa: RUF012

    def __init__(self, stype: str = "power", top_db: float | None = None) -> None:
        super().__init__()
        if top_db is not None and top_db < 0:
            raise ValueError(f"top_db must not be negative, got {top_db}")
        self.stype = stype
        self.top_db = top_db
        self.multiplier = 10.0 if stype == "power" else 20.0
        self.amin = 1e-10
        self.ref_value = 1.0
        self.db_multiplier = math.log10(max(self.amin, self.ref_value))

    def forward(self, x: Tensor) -> Tensor:
        """Decibels of ``x``, in its shape."""
        return F.amplitude_to_DB(x, self.multiplier, self.amin, self.db_multiplier, self.top_db)


class MelScale(nn.Module):
    r"""Mel filters on a spectrogram: ``(..., n_stft, time)`` → ``(..., n_mels, time)``.

    The buffer ``fb`` is `functional.melscale_fbanks`; ``f_max=None`` is ``float(sample_rate // 2)``. Computed in
    float32, also for half precision and under autocast, where torchaudio's product is rounded to half precision.

    Raises:
        ValueError: ``f_min`` above ``f_max``, or an unknown ``norm`` or ``mel_scale``.
    """

    __constants__ = ["n_mels", "sample_rate", "f_min", "f_max", "n_stft"]  # noqa: RUF012

    def __init__(
        self,
        n_mels: int = 128,
        sample_rate: int = 16000,
        f_min: float = 0.0,
        f_max: float | None = None,
        n_stft: int = 201,
        norm: str | None = None,
        mel_scale: str = "htk",
    ) -> None:
        super().__init__()
        self.n_mels = n_mels
        self.sample_rate = sample_rate
        self.f_max = float(sample_rate // 2) if f_max is None else f_max
        self.f_min = f_min
        self.n_stft = n_stft
        self.norm = norm
        self.mel_scale = mel_scale
        if f_min > self.f_max:
            raise ValueError(f"f_min must be at most f_max = {self.f_max}, got {f_min}")
        bank = F.melscale_fbanks(n_stft, f_min, self.f_max, n_mels, sample_rate, norm, mel_scale)
        self.register_buffer("fb", bank)

    def forward(self, specgram: Tensor) -> Tensor:
        """``(..., freq, time)`` → ``(..., n_mels, time)``."""
        return _fused.project(specgram, self.fb)


class MelSpectrogram(nn.Module):
    r"""Mel spectrogram: ``(..., time)`` → ``(..., n_mels, frames)``; `Spectrogram` and `MelScale` in one pass.

    Args:
        sample_rate: samples a second.
        n_fft, win_length, hop_length, pad, window_fn, power, normalized, wkwargs, center, pad_mode: see `Spectrogram`.
        f_min, f_max, n_mels, norm, mel_scale: see `MelScale`.
        onesided: deprecated, without effect.

    The sub-modules are ``spectrogram`` and ``mel_scale``; the buffers ``spectrogram.window`` and ``mel_scale.fb``.
    Either may be a trainable parameter in its place: filters are differentiated by the fused kernels, windows by the
    reference.
    """

    __constants__ = ["sample_rate", "n_fft", "win_length", "hop_length", "pad", "n_mels", "f_min"]  # noqa: RUF012

    def __init__(
        self,
        sample_rate: int = 16000,
        n_fft: int = 400,
        win_length: int | None = None,
        hop_length: int | None = None,
        f_min: float = 0.0,
        f_max: float | None = None,
        pad: int = 0,
        n_mels: int = 128,
        window_fn: Callable[..., Tensor] = torch.hann_window,
        power: float = 2.0,
        normalized: bool = False,
        wkwargs: dict | None = None,
        center: bool = True,
        pad_mode: str = "reflect",
        onesided: bool | None = None,
        norm: str | None = None,
        mel_scale: str = "htk",
    ) -> None:
        super().__init__()
        if onesided is not None:
            warnings.warn("onesided is deprecated and has no effect", stacklevel=2)
        self.sample_rate = sample_rate
        self.n_fft = n_fft
        self.win_length = n_fft if win_length is None else win_length
        self.hop_length = self.win_length // 2 if hop_length is None else hop_length
        self.pad = pad
        self.power = power
        self.normalized = normalized
        self.n_mels = n_mels
        self.f_max = f_max
        self.f_min = f_min
        self.spectrogram = Spectrogram(
            n_fft=n_fft,
            win_length=self.win_length,
            hop_length=self.hop_length,
            pad=pad,
            window_fn=window_fn,
            power=power,
            normalized=normalized,
            wkwargs=wkwargs,
            center=center,
            pad_mode=pad_mode,
            onesided=True,
        )
        self.mel_scale = MelScale(n_mels, sample_rate, f_min, f_max, n_fft // 2 + 1, norm, mel_scale)

    def forward(self, waveform: Tensor) -> Tensor:
        """``(..., time)`` → ``(..., n_mels, frames)``."""
        spectrogram, mel_scale = child(self, "spectrogram"), child(self, "mel_scale")
        if not (_onesided(spectrogram) and untouched(mel_scale, MelScale)):
            return mel_scale(spectrogram(waveform))
        return _chain(waveform, spectrogram, table(mel_scale, "fb"))


class MFCC(nn.Module):
    r"""Mel-frequency cepstra: ``(..., time)`` → ``(..., n_mfcc, frames)``; `MelSpectrogram`, log, DCT-II in one pass.

    Args:
        sample_rate: samples a second.
        n_mfcc: number of cepstra, at most the number of mel filters.
        dct_type: 2.
        norm: ``"ortho"`` or ``None``.
        log_mels: take ``log(mel + 1e-6)`` in place of decibels.
        melkwargs: keywords for `MelSpectrogram`.

    Decibels are kept within 80 dB of the maximum, as in torchaudio, which offers no argument for it. Every value of a
    quiet clip may therefore depend on its loudest moment, and for a batch ``(batch, time)`` on the loudest item of the
    batch: the maximum is over all rows of the last leading dimension. Give clips as ``(batch, 1, time)`` to keep them
    apart, or set ``mfcc.amplitude_to_DB.top_db = None``.

    The sub-modules are ``MelSpectrogram`` and ``amplitude_to_DB``, the buffer of its own is ``dct_mat``.

    Raises:
        ValueError: another ``dct_type``, an unknown ``norm``, or more cepstra than filters.
    """

    __constants__ = ["sample_rate", "n_mfcc", "dct_type", "top_db", "log_mels"]  # noqa: RUF012

    def __init__(
        self,
        sample_rate: int = 16000,
        n_mfcc: int = 40,
        dct_type: int = 2,
        norm: str = "ortho",
        log_mels: bool = False,
        melkwargs: dict | None = None,
    ) -> None:
        super().__init__()
        if dct_type != 2:
            raise ValueError(f"dct_type must be 2, got {dct_type}")
        self.sample_rate = sample_rate
        self.n_mfcc = n_mfcc
        self.dct_type = dct_type
        self.norm = norm
        self.top_db = 80.0
        self.amplitude_to_DB = AmplitudeToDB("power", self.top_db)
        self.MelSpectrogram = MelSpectrogram(sample_rate=sample_rate, **(melkwargs or {}))
        if n_mfcc > self.MelSpectrogram.n_mels:
            raise ValueError(f"n_mfcc must be at most n_mels = {self.MelSpectrogram.n_mels}, got {n_mfcc}")
        self.register_buffer("dct_mat", F.create_dct(n_mfcc, self.MelSpectrogram.n_mels, norm))
        self.log_mels = log_mels

    def forward(self, waveform: Tensor) -> Tensor:
        """``(..., time)`` → ``(..., n_mfcc, frames)``."""
        mel, decibel, dct = child(self, "MelSpectrogram"), child(self, "amplitude_to_DB"), table(self, "dct_mat")
        if untouched(mel, MelSpectrogram) and (self.log_mels or _logarithm(decibel)):
            spectrogram, mel_scale = child(mel, "spectrogram"), child(mel, "mel_scale")
            if _onesided(spectrogram) and untouched(mel_scale, MelScale):
                return _chain(waveform, spectrogram, table(mel_scale, "fb"), None if self.log_mels else decibel, dct)
        features = mel(waveform)
        features = _fused.log(features) if self.log_mels else decibel(features)
        return _fused.project(features, dct)


class LFCC(nn.Module):
    r"""Linear-frequency cepstra: ``(..., time)`` → ``(..., n_lfcc, frames)``; all steps in one pass.

    Args:
        sample_rate: samples a second.
        n_filter: number of triangles, equally spaced from ``f_min`` to ``f_max`` (default ``sample_rate // 2``).
        n_lfcc: number of cepstra.
        dct_type: 2.
        norm: ``"ortho"`` or ``None``.
        log_lf: take ``log(filtered + 1e-6)`` in place of decibels, whose range of 80 dB is that of `MFCC`.
        speckwargs: keywords for `Spectrogram`.

    The sub-modules are ``Spectrogram`` and ``amplitude_to_DB``, the buffers of its own are ``filter_mat`` and
    ``dct_mat``.

    Raises:
        ValueError: another ``dct_type``, an unknown ``norm``, or more cepstra than ``n_fft`` (torchaudio's limit).
    """

    __constants__ = ["sample_rate", "n_filter", "n_lfcc", "dct_type", "top_db", "log_lf"]  # noqa: RUF012

    def __init__(
        self,
        sample_rate: int = 16000,
        n_filter: int = 128,
        f_min: float = 0.0,
        f_max: float | None = None,
        n_lfcc: int = 40,
        dct_type: int = 2,
        norm: str = "ortho",
        log_lf: bool = False,
        speckwargs: dict | None = None,
    ) -> None:
        super().__init__()
        if dct_type != 2:
            raise ValueError(f"dct_type must be 2, got {dct_type}")
        self.sample_rate = sample_rate
        self.f_min = f_min
        self.f_max = float(sample_rate // 2) if f_max is None else f_max
        self.n_filter = n_filter
        self.n_lfcc = n_lfcc
        self.dct_type = dct_type
        self.norm = norm
        self.top_db = 80.0
        self.amplitude_to_DB = AmplitudeToDB("power", self.top_db)
        self.Spectrogram = Spectrogram(**(speckwargs or {}))
        n_fft = self.Spectrogram.n_fft
        if n_lfcc > n_fft:
            raise ValueError(f"n_lfcc must be at most n_fft = {n_fft}, got {n_lfcc}")
        self.register_buffer("filter_mat", F.linear_fbanks(n_fft // 2 + 1, f_min, self.f_max, n_filter, sample_rate))
        self.register_buffer("dct_mat", F.create_dct(n_lfcc, n_filter, norm))
        self.log_lf = log_lf

    def forward(self, waveform: Tensor) -> Tensor:
        """``(..., time)`` → ``(..., n_lfcc, frames)``."""
        spectrogram, decibel = child(self, "Spectrogram"), child(self, "amplitude_to_DB")
        filters, dct = table(self, "filter_mat"), table(self, "dct_mat")
        fits = dct.shape[1] <= dct.shape[0]  # torchaudio lets there be more cepstra than filters
        if fits and _onesided(spectrogram) and (self.log_lf or _logarithm(decibel)):
            return _chain(waveform, spectrogram, filters, None if self.log_lf else decibel, dct)
        features = _fused.project(spectrogram(waveform), filters)
        features = _fused.log(features) if self.log_lf else decibel(features)
        return _fused.project(features, dct)


def _onesided(spectrogram: nn.Module) -> bool:
    return untouched(spectrogram, Spectrogram) and (spectrogram.onesided is None or bool(spectrogram.onesided))


def _logarithm(decibel: nn.Module) -> bool:
    """Whether the decibels are the configuration's: an edited ``db_multiplier`` may be no logarithm of a reference."""
    return untouched(decibel, AmplitudeToDB) and decibel.db_multiplier == math.log10(
        max(decibel.amin, decibel.ref_value)
    )


def _chain(
    waveform: Tensor,
    spectrogram: Spectrogram,
    filters: Tensor,
    decibel: AmplitudeToDB | None = None,
    dct: Tensor | None = None,
) -> Tensor:
    """Spectrogram, filters and, with ``dct``, logarithm (of decibels, else of the power) and cepstra in one call."""
    s = spectrogram
    described = _fused.describe(
        s.n_fft,
        s.win_length,
        s.hop_length,
        s.pad,
        s.power,
        s.normalized,
        s.center,
        s.pad_mode,
        filters.shape[1],
        None if decibel is None else (decibel.multiplier, decibel.amin, decibel.ref_value, decibel.top_db),
        _fused.LOG_OFFSET if dct is not None and decibel is None else None,
        None if dct is None else dct.shape[1],
    )
    return _fused.run(waveform, described, table(s, "window"), filters, dct)
