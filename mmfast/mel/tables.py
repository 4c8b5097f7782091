"""Windows, filter banks and DCT matrices of a `MelConfig`.

`window`, `filters` and `dct` follow a configuration in float64. The functions below them take plain arguments and a
dtype; in float32 they take the same steps in the same order as torchaudio, so that a filter bank built here and one
loaded from a torchaudio checkpoint are the same numbers.
"""

from __future__ import annotations

import math

import torch

from mmfast import _backend
from mmfast.mel.config import MelConfig


def resolve(config, dtype, device, window, filters, dct) -> tuple:
    """Window, filters and DCT in ``dtype``: those given, and those of ``config``, cached, in place of ``None``."""
    have_filters = filters is not None or config.filters is None
    if window is not None and have_filters and (dct is not None or config.n_mfcc is None):
        return window, filters, dct
    own = _configured(config, dtype, device)
    if window is None and filters is None and dct is None:
        return own
    return tuple(ours if given is None else given for given, ours in zip((window, filters, dct), own, strict=True))


@_backend.kept(maxsize=256)
def _configured(config: MelConfig, dtype: torch.dtype, device: torch.device) -> tuple:
    tables = window(config), filters(config), dct(config)
    # Complete before the copy, which waits for its end: other streams may use them at once.
    return tuple(None if table is None else table.to(dtype).contiguous().to(device) for table in tables)


def window(config: MelConfig) -> torch.Tensor:
    r"""The ``(win_length,)`` window of ``config`` in float64.

    With ``a = 2 pi n / N``, ``N = win_length`` for a periodic window and ``win_length - 1`` for a symmetric one: hann
    ``.5 - .5 cos a``, hamming ``.54 - .46 cos a``, blackman ``c - .5 cos a + (.5 - c) cos 2a`` with ``c =
    blackman_coeff``, povey ``hann ** 0.85`` (Kaldi). A window of one sample is 1, as in torch and scipy.
    """
    if isinstance(config.window, tuple):
        return torch.tensor(config.window, dtype=torch.float64)
    n = config.win_length
    if n == 1 or config.window == "rectangular":
        return torch.ones(n, dtype=torch.float64)
    angle = torch.arange(n, dtype=torch.float64) * (2 * math.pi / (n if config.window_periodic else n - 1))
    if config.window == "hamming":
        return 0.54 - 0.46 * angle.cos()
    if config.window == "blackman":
        c = config.blackman_coeff
        return c - 0.5 * angle.cos() + (0.5 - c) * (2 * angle).cos()
    hann = 0.5 - 0.5 * angle.cos()
    return hann if config.window == "hann" else hann.pow(0.85)


def filters(config: MelConfig) -> torch.Tensor | None:
    r"""The ``(n_fft // 2 + 1, n_mels)`` filter bank of ``config`` in float64; ``None`` for the bare spectrum.

    Raises:
        ValueError: a VTLN warp whose cut-offs do not fit between ``f_min`` and ``f_max``.
    """
    if config.filters is None:
        return None
    nyquist = config.sample_rate / 2
    if config.filters == "linear":
        return linear_filters(
            config.n_freqs,
            config.f_min,
            config.f_max,
            config.n_mels,
            config.sample_rate,
            config.mel_norm,
            torch.float64,
            nyquist=nyquist,
        )
    if config.mel_scale == "kaldi":
        return kaldi_filters(
            config.n_fft,
            config.f_min,
            config.f_max,
            config.n_mels,
            config.sample_rate,
            config.vtln_warp,
            config.vtln_low,
            config.vtln_high,
            config.mel_norm,
            torch.float64,
        )
    return mel_filters(
        config.n_freqs,
        config.f_min,
        config.f_max,
        config.n_mels,
        config.sample_rate,
        config.mel_norm,
        config.mel_scale,
        torch.float64,
        nyquist=nyquist,
    )


def dct(config: MelConfig) -> torch.Tensor | None:
    r"""The ``(n_mels, n_mfcc)`` matrix ``D`` of ``config`` in float64, such that the cepstra are ``v @ D``.

    Liftering and HTK's order (C0 last, times √2) are part of the matrix. ``None`` without cepstra.
    """
    if config.n_mfcc is None:
        return None
    matrix = dct_matrix(config.n_mfcc, config.n_mels, config.dct_norm, torch.float64)
    if config.lifter:
        matrix = matrix * lifter(config.n_mfcc, config.lifter, config.lifter_kind, torch.float64)
    if config.cepstra_order == "htk":
        c0 = matrix[:, :1] * (1.0 if config.energy == "replace_last" else math.sqrt(2.0))
        matrix = torch.cat((matrix[:, 1:], c0), dim=1)
    return matrix


def mel_filters(
    n_freqs: int,
    f_min: float,
    f_max: float,
    n_filters: int,
    sample_rate: float,
    norm: str | float | None = None,
    scale: str = "htk",
    dtype: torch.dtype = torch.float32,
    *,
    nyquist: float | None = None,
) -> torch.Tensor:
    r"""Triangles between points equally spaced in mel, linear in hertz: ``(n_freqs, n_filters)``.

    ``"htk"`` is ``2595 log10(1 + f / 700)``; ``"slaney"`` (Auditory Toolbox) is linear below 1 kHz, ``3 f / 200``, and
    logarithmic above, 27 steps to a factor of 6.4. ``nyquist`` is the frequency of the last bin; the default,
    ``sample_rate // 2``, is torchaudio's and half a hertz low for odd rates. A filter that meets no bin stays, as
    zeros.
    """
    low, high = (_mel(f, scale) for f in (f_min, f_max))
    points = torch.linspace(low, high, n_filters + 2, dtype=dtype)
    if scale == "htk":
        points = 700.0 * (10.0 ** (points / 2595.0) - 1.0)
    else:
        logarithmic = 1000.0 * torch.exp(_SLANEY_STEP * (points - _SLANEY_KNEE))
        points = torch.where(points >= _SLANEY_KNEE, logarithmic, points * (200.0 / 3))
    return _triangles(_bins(n_freqs, sample_rate, nyquist, dtype), points, norm)


def linear_filters(
    n_freqs: int,
    f_min: float,
    f_max: float,
    n_filters: int,
    sample_rate: float,
    norm: str | float | None = None,
    dtype: torch.dtype = torch.float32,
    *,
    nyquist: float | None = None,
) -> torch.Tensor:
    """Triangles between points equally spaced in hertz: ``(n_freqs, n_filters)``; otherwise as `mel_filters`."""
    points = torch.linspace(f_min, f_max, n_filters + 2, dtype=dtype)
    return _triangles(_bins(n_freqs, sample_rate, nyquist, dtype), points, norm)


def kaldi_filters(
    n_fft: int,
    f_min: float,
    f_max: float,
    n_filters: int,
    sample_rate: float,
    vtln_warp: float = 1.0,
    vtln_low: float = 100.0,
    vtln_high: float = -500.0,
    norm: str | float | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    r"""Kaldi's triangles, linear in ``mel = 1127 ln(1 + f / 700)``: ``(n_fft // 2 + 1, n_filters)``.

    Only the first ``n_fft // 2`` bins carry weight: the last bin of an even transform, at half the sample rate, has
    none. With ``vtln_warp`` ≠ 1 the corners of the triangles pass through Kaldi's piecewise linear warp of the
    frequency axis; a negative ``vtln_high`` counts from half the sample rate.

    Raises:
        ValueError: a warp whose cut-offs do not satisfy ``f_min < vtln_low < vtln_high < f_max``.
    """
    low, high = (1127.0 * math.log(1.0 + f / 700.0) for f in (f_min, f_max))
    step = (high - low) / (n_filters + 1)
    number = torch.arange(n_filters, dtype=dtype)
    corners = [low + (number + k) * step for k in range(3)]
    if vtln_warp != 1.0:
        vtln_high = vtln_high + sample_rate / 2 if vtln_high < 0 else vtln_high
        corners = [_hz_to_kaldi(_warp(_kaldi_to_hz(c), f_min, f_max, vtln_low, vtln_high, vtln_warp)) for c in corners]
    left, center, right = corners
    mel = _hz_to_kaldi(sample_rate / n_fft * torch.arange(n_fft // 2, dtype=dtype))[:, None]
    up, down = (mel - left) / (center - left), (right - mel) / (right - center)
    if vtln_warp == 1.0:
        weights = torch.minimum(up, down).clamp(min=0)
    else:  # the warp may change the order of the corners
        rising, falling = (left < mel) & (mel <= center), (center < mel) & (mel < right)
        weights = torch.where(rising, up, torch.where(falling, down, torch.zeros_like(up)))
    weights = torch.nn.functional.pad(weights, (0, 0, 0, 1))
    return _normalized(weights, norm, _kaldi_to_hz(right) - _kaldi_to_hz(left))


def dct_matrix(
    n_mfcc: int, n_mels: int, norm: str | None = "ortho", dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    r"""``D[m, k] = s cos(pi / n_mels (m + 1/2) k)``: ``(n_mels, n_mfcc)``.

    ``s`` is ``sqrt(2 / n_mels)``, for ``k = 0`` ``sqrt(1 / n_mels)``, with ``norm="ortho"``, and 2 with ``None``
    (scipy).
    """
    m, k = torch.arange(n_mels, dtype=dtype), torch.arange(n_mfcc, dtype=dtype)
    matrix = torch.cos(math.pi / n_mels * (m + 0.5) * k[:, None])
    if norm is None:
        matrix *= 2.0
    else:
        matrix[0] *= 1.0 / math.sqrt(2.0)
        matrix *= math.sqrt(2.0 / n_mels)
    return matrix.t()


def lifter(n_mfcc: int, coefficient: float, kind: str = "kaldi", dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """``1 + L / 2 sin(pi i / L)`` for ``i`` = 0, 1, … (``"kaldi"``) or 1, 2, … (``"librosa"``): ``(n_mfcc,)``."""
    i = torch.arange(n_mfcc, dtype=dtype) + (kind == "librosa")
    return 1.0 + 0.5 * coefficient * torch.sin(math.pi * i / coefficient)


_SLANEY_KNEE = 15.0  # 1000 Hz in Slaney's mel
_SLANEY_STEP = math.log(6.4) / 27.0


def _mel(hertz: float, scale: str) -> float:
    if scale == "htk":
        return 2595.0 * math.log10(1.0 + hertz / 700.0)
    return _SLANEY_KNEE + math.log(hertz / 1000.0) / _SLANEY_STEP if hertz >= 1000.0 else hertz / (200.0 / 3)


def _bins(n_freqs: int, sample_rate: float, nyquist: float | None, dtype: torch.dtype) -> torch.Tensor:
    return torch.linspace(0, sample_rate // 2 if nyquist is None else nyquist, n_freqs, dtype=dtype)


def _triangles(bins: torch.Tensor, points: torch.Tensor, norm: str | float | None) -> torch.Tensor:
    """Filter ``m`` rises from ``points[m]`` to 1 at ``points[m + 1]`` and falls to 0 at ``points[m + 2]``."""
    width = points[1:] - points[:-1]
    distance = points - bins[:, None]
    up, down = -distance[:, :-2] / width[:-1], distance[:, 2:] / width[1:]
    return _normalized(torch.minimum(up, down).clamp(min=0), norm, points[2:] - points[:-2])


def _normalized(weights: torch.Tensor, norm: str | float | None, width: torch.Tensor) -> torch.Tensor:
    weights = weights.nan_to_num(0.0, 0.0, 0.0)  # corners so close that they coincide: an empty filter
    if norm is None:
        return weights
    if norm == "slaney":
        return (weights * (2.0 / width)).nan_to_num(0.0, 0.0, 0.0)
    length = torch.linalg.vector_norm(weights, ord=norm, dim=0)
    return weights / torch.where(length > 0, length, torch.ones_like(length))


def _hz_to_kaldi(hertz: torch.Tensor) -> torch.Tensor:
    return 1127.0 * (1.0 + hertz / 700.0).log()


def _kaldi_to_hz(mel: torch.Tensor) -> torch.Tensor:
    return 700.0 * ((mel / 1127.0).exp() - 1.0)


def _warp(hertz: torch.Tensor, f_min: float, f_max: float, low: float, high: float, warp: float) -> torch.Tensor:
    """Kaldi's VTLN: ``f / warp`` in the middle, bent at both ends so that ``f_min`` and ``f_max`` stay."""
    if not f_min < low < high < f_max:
        raise ValueError(
            f"vtln_low and vtln_high must satisfy f_min < vtln_low < vtln_high < f_max, "
            f"got {low} and {high} between {f_min} and {f_max}"
        )
    first, last = low * max(1.0, warp), high * min(1.0, warp)
    if not f_min < first < last < f_max:
        raise ValueError(
            f"vtln_warp = {warp} moves its cut-offs to {first} and {last}, out of order or outside [{f_min}, {f_max}]"
        )
    scale = 1.0 / warp
    below = f_min + (scale * first - f_min) / (first - f_min) * (hertz - f_min)
    above = f_max + (f_max - scale * last) / (f_max - last) * (hertz - f_max)
    warped = torch.where(hertz < first, below, torch.where(hertz < last, scale * hertz, above))
    return torch.where((hertz < f_min) | (hertz > f_max), hertz, warped)
