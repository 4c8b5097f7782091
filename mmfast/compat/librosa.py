"""librosa's mel features on arrays and tensors, under librosa's names (0.11).

An array in gives an array out, a tensor gives a tensor, with gradients, on its device. ``feature`` and ``filters``
group the functions as librosa does::

    import mmfast.compat.librosa as librosa
    librosa.feature.mfcc(y=y, sr=16000, n_mfcc=13)

Results have the dtype of the input. Errors are ValueError and TypeError. Samples that are NaN or infinite are not
looked for (librosa raises); they give NaN in the frames they fall into.

``top_db`` is where librosa's versions differ: up to 0.11 the maximum is taken over the whole array, from 1.0 on over
each channel. ``top_db_scope="batch"`` is the former and the default, ``"item"`` the latter.
"""

from __future__ import annotations

import importlib
import warnings
from functools import lru_cache
from types import SimpleNamespace

import numpy as np
import torch

from mmfast import _backend
from mmfast.mel import MelConfig, extract, tables

__all__ = ["amplitude_to_db", "feature", "filters", "mel", "melspectrogram", "mfcc", "power_to_db"]

_PAD_MODES = {"constant": "constant", "reflect": "reflect", "edge": "replicate", "symmetric": "mirror"}
_WINDOWS = {"hann": "hann", "hamming": "hamming", "blackman": "blackman"}
_WINDOWS |= dict.fromkeys(("boxcar", "box", "ones", "rect", "rectangular"), "rectangular")
_SCOPES = {"batch": 0, "channels": 3, "item": 2}  # how many last dimensions; 0 is all
_REDUCTIONS = {np.max: torch.amax, np.min: torch.amin, np.mean: torch.mean}


def melspectrogram(
    *,
    y=None,
    sr: float = 22050,
    S=None,
    n_fft: int = 2048,
    hop_length: int | None = 512,
    win_length: int | None = None,
    window="hann",
    center: bool = True,
    pad_mode: str = "constant",
    power: float = 2.0,
    **kwargs,
):
    r"""Mel spectrogram, as ``librosa.feature.melspectrogram``: ``|STFT(y)| ** power @ mel``.

    Args:
        y: samples ``(..., T)``, floating point.
        sr: samples a second.
        S: spectrogram ``(..., 1 + n_fft / 2, frames)`` in place of ``y``; only the filters are applied.
        n_fft, hop_length, win_length, center, power: as `MelConfig`; ``hop_length=None`` is ``win_length // 4``.
        window: name, tuple or number that ``scipy.signal.get_window`` knows, a function of the length, or the values.
        pad_mode: ``"constant"``, ``"reflect"``, ``"edge"`` or ``"symmetric"``. (In the last frame librosa 0.11
            reflects only half a frame of signal: a sample is wrong if ``hop_length >= n_fft / 2`` divides the length.)
        kwargs: of `mel`.

    Returns:
        ``(..., n_mels, frames)``.
    """
    if S is not None:
        spectrogram = _spectrum(S)
        bins = spectrogram.shape[-2]
        n_fft = n_fft if n_fft is not None and n_fft // 2 + 1 == bins else 2 * (bins - 1)
        bank = _filters(_config(sr, n_fft, **kwargs), _wide(spectrogram), spectrogram.device)
        return _like(S, _project(bank, spectrogram))
    return _from_samples(y, sr, n_fft, hop_length, win_length, window, center, pad_mode, power=power, **kwargs)


def mfcc(
    *,
    y=None,
    sr: float = 22050,
    S=None,
    n_mfcc: int = 20,
    dct_type: int = 2,
    norm: str | None = "ortho",
    lifter: float = 0,
    mel_norm: str | float | None = "slaney",
    top_db_scope: str = "batch",
    n_fft: int = 2048,
    hop_length: int | None = 512,
    win_length: int | None = None,
    window="hann",
    center: bool = True,
    pad_mode: str = "constant",
    power: float = 2.0,
    n_mels: int = 128,
    **kwargs,
):
    r"""Mel-frequency cepstral coefficients, as ``librosa.feature.mfcc``.

    ``DCT(power_to_db(melspectrogram(y)))[:n_mfcc]``; with ``lifter > 0`` coefficient ``n`` (from 0) is multiplied by
    ``1 + lifter / 2 * sin(pi * (n + 1) / lifter)``. From ``y`` everything is one fused call.

    Args:
        y: samples ``(..., T)``, floating point.
        S: log-power mel spectrogram ``(..., n_mels, frames)`` in place of ``y``.
        dct_type: 1, 2 or 3; other types than 2 need scipy.
        norm: of the DCT, ``"ortho"`` or None; that of the filters is ``mel_norm``.
        top_db_scope: what the maximum of the 80 dB range is taken over: ``"batch"`` the whole array (librosa 0.11),
            ``"item"`` each channel by itself (librosa 1.0), ``"channels"`` the last leading dimension.
        others: of `melspectrogram` and `mel`.

    Returns:
        ``(..., n_mfcc, frames)``; at most ``n_mels`` coefficients, as in librosa.
    """
    if lifter < 0:
        raise ValueError(f"lifter must be a non-negative number, got {lifter}")
    if S is not None:
        values = _spectrum(S)
        bands = values.shape[-2]
        dct = _dct(bands, min(n_mfcc, bands), dct_type, norm, lifter, _wide(values), values.device)
        return _like(S, _project(dct, values))
    cepstra = {"n_mfcc": min(n_mfcc, n_mels), "dct_norm": norm, "lifter": lifter}
    return _from_samples(
        y,
        sr,
        n_fft,
        hop_length,
        win_length,
        window,
        center,
        pad_mode,
        dct_type,
        power=power,
        n_mels=n_mels,
        norm=mel_norm,
        db_scope=top_db_scope,
        **cepstra,
        **kwargs,
    )


def mel(
    *,
    sr: float,
    n_fft: int,
    n_mels: int = 128,
    fmin: float = 0.0,
    fmax: float | None = None,
    htk: bool = False,
    norm: str | float | None = "slaney",
    dtype=np.float32,
) -> np.ndarray:
    """Mel filter bank ``(n_mels, 1 + n_fft // 2)``, as ``librosa.filters.mel``.

    Triangles in Hz between points evenly spaced on the mel scale (Slaney's, or HTK's with ``htk``); ``norm="slaney"``
    gives them equal area, a number p divides each by its l_p norm. ``fmax`` may not exceed ``sr / 2``; empty filters
    are kept without a warning.
    """
    config = _config(sr, n_fft, n_mels=n_mels, fmin=fmin, fmax=fmax, htk=htk, norm=norm)
    return _filters(config, torch.float64, torch.device("cpu")).T.numpy().astype(dtype)


def power_to_db(S, *, ref=1.0, amin: float = 1e-10, top_db: float | None = 80.0, top_db_scope: str = "batch"):
    """Power in decibels, as ``librosa.power_to_db``: ``10 log10(max(S, amin)) - 10 log10(max(|ref|, amin))``.

    Args:
        S: power, array, tensor or number. Of complex values the magnitude is taken, with a warning.
        ref: number, or a function of the magnitudes such as ``np.max``. For tensors it is called with the tensor
            (``np.max``, ``np.min`` and ``np.mean`` become torch's).
        amin: > 0.
        top_db: ≥ 0: values further below the maximum are raised to ``maximum - top_db``; None keeps everything.
        top_db_scope: the maximum is over the whole array (``"batch"``, librosa 0.11), over the last two dimensions
            (``"item"``, librosa 1.0), or the last three (``"channels"``).
    """
    values = _spectrum(S)
    if values.is_complex():
        warnings.warn("power_to_db was given complex values and discards their phase; pass abs(S) ** 2", stacklevel=2)
        values = values.abs()
    return _like(S, _db(values, _reference(ref, S, values), amin, top_db, top_db_scope))


def amplitude_to_db(S, *, ref=1.0, amin: float = 1e-5, top_db: float | None = 80.0, top_db_scope: str = "batch"):
    """Amplitude in decibels, as ``librosa.amplitude_to_db``: ``power_to_db(|S|², ref=ref², amin=amin²)``.

    Arguments as `power_to_db`. Unlike librosa the input is never changed.
    """
    values = _spectrum(S)
    if values.is_complex():
        warnings.warn("amplitude_to_db was given complex values and discards their phase; pass abs(S)", stacklevel=2)
    values = values.abs()
    return _like(S, _db(values.square(), _reference(ref, S, values) ** 2, amin**2, top_db, top_db_scope))


feature = SimpleNamespace(melspectrogram=melspectrogram, mfcc=mfcc)
filters = SimpleNamespace(mel=mel)


@lru_cache(maxsize=256)
def _config(
    sr,
    n_fft,
    hop_length=512,
    win_length=None,
    window="hann",
    center=True,
    pad_mode="constant",
    *,
    power=2.0,
    n_mels=128,
    fmin=0.0,
    fmax=None,
    htk=False,
    norm="slaney",
    dtype=None,  # librosa's precision of the filters: here that of the samples
    db_scope=None,
    n_mfcc=None,
    dct_norm=None,
    lifter=0,
) -> MelConfig:
    if n_fft is None:
        raise ValueError("n_fft must be an integer, got None")
    win_length = n_fft if win_length is None else win_length
    if pad_mode not in _PAD_MODES:
        raise ValueError(f"pad_mode must be one of {', '.join(map(repr, _PAD_MODES))}, got {pad_mode!r}")
    log = {} if db_scope is None else {"log": "db", "log_floor": 1e-10, "top_db": 80.0, "top_db_scope": db_scope}
    return MelConfig(
        sample_rate=sr,
        n_fft=n_fft,
        win_length=win_length,
        hop_length=win_length // 4 if hop_length is None else hop_length,
        framing="center" if center else "valid",
        pad_mode=_PAD_MODES[pad_mode],
        window=window,
        power=power,
        n_mels=n_mels,
        f_min=fmin,
        f_max=fmax,
        mel_scale="htk" if htk else "slaney",
        mel_norm=norm,
        n_mfcc=n_mfcc,
        dct_norm=dct_norm,
        lifter=lifter,
        lifter_kind="librosa",
        **log,
    )


def _from_samples(y, sr, n_fft, hop_length, win_length, window, center, pad_mode, dct_type=2, **options):
    if y is None:
        raise ValueError("y, the samples, or S must be given")
    x = _tensor("y", y)
    if not x.dtype.is_floating_point:
        raise TypeError(f"y must be floating point, got {x.dtype}")
    length = x.shape[-1] if x.dim() else 0
    if center and pad_mode == "reflect" and n_fft and 0 < length <= n_fft // 2:
        # numpy reflects a short signal again and again; torch and MelConfig refuse.
        period = max(2 * (length - 1), 1)
        index = torch.arange(-(n_fft // 2), length + n_fft // 2, device=x.device) % period
        x, center = x[..., torch.minimum(index, period - index)], False
    elif not center and n_fft and length < n_fft:
        raise ValueError(f"n_fft={n_fft} is too large for center=False and {length} samples")
    named = _WINDOWS.get(window) if isinstance(window, str) else None
    config = _config(sr, n_fft, hop_length, win_length, named or "hann", bool(center), pad_mode, **options)
    given = {} if named else {"window": _window(window, config.win_length, x.device)}
    if config.n_fft % 2:
        given["filters"] = _filters(config, torch.float64, x.device)
    if config.n_mfcc is not None and dct_type != 2:
        given["dct"] = _dct(config.n_mels, config.n_mfcc, dct_type, config.dct_norm, config.lifter, x.dtype, x.device)
    return _like(y, extract(x, config, **given))


@_backend.kept(maxsize=64)
def _filters(config: MelConfig, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """librosa's filter bank ``(n_freqs, n_mels)``: the last bin of an odd transform lies below half the sample rate."""
    c = config
    last = c.n_fft // 2 * c.sample_rate / c.n_fft
    bank = tables.mel_filters(
        c.n_freqs, c.f_min, c.f_max, c.n_mels, c.sample_rate, c.mel_norm, c.mel_scale, torch.float64, nyquist=last
    )
    return bank.to(dtype).contiguous().to(device)


@_backend.kept(maxsize=64)
def _dct(n_mels, n_mfcc, dct_type, norm, lifter, dtype, device) -> torch.Tensor:
    """DCT matrix ``(n_mels, n_mfcc)`` with the lifter in it."""
    if norm not in ("ortho", None):
        raise ValueError(f"norm must be 'ortho' or None, got {norm!r}")
    if dct_type == 2:
        matrix = tables.dct_matrix(n_mfcc, n_mels, norm, torch.float64)
    else:
        matrix = torch.from_numpy(_scipy("fft").dct(np.eye(n_mels), type=dct_type, norm=norm))[:, :n_mfcc]
    if lifter:
        matrix = matrix * tables.lifter(n_mfcc, lifter, "librosa", torch.float64)
    return matrix.to(dtype).contiguous().to(device)


def _wide(values: torch.Tensor) -> torch.dtype:
    return torch.promote_types(values.dtype, torch.float32)


def _project(matrix: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """``(..., n, time)`` → ``(..., m, time)`` by a matrix (n, m), in the dtype of the matrix."""
    with _backend.without_autocast(values.device.type):
        return (matrix.T @ values.to(matrix.dtype)).to(values.dtype)


def _window(spec, length: int, device: torch.device) -> torch.Tensor:
    if isinstance(spec, (str, tuple)) or np.isscalar(spec):
        return _scipy_window(spec, length, device)
    values = torch.as_tensor(spec(length) if callable(spec) else spec, dtype=torch.float64)
    if values.shape != (length,):
        raise ValueError(f"window must have win_length = {length} values, got shape {tuple(values.shape)}")
    return values.to(device)


@_backend.kept(maxsize=64)
def _scipy_window(spec, length: int, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(_scipy("signal").get_window(spec, length, fftbins=True)).to(device)


def _scipy(module: str):
    try:
        return importlib.import_module(f"scipy.{module}")
    except ImportError as error:
        raise ImportError(f"this option needs scipy.{module}: pip install scipy") from error


def _db(power: torch.Tensor, reference, amin: float, top_db: float | None, scope: str) -> torch.Tensor:
    if amin <= 0:
        raise ValueError(f"amin must be strictly positive, got {amin}")
    if top_db is not None and top_db < 0:
        raise ValueError(f"top_db must be non-negative, got {top_db}")
    if scope not in _SCOPES:
        raise ValueError(f"top_db_scope must be one of {', '.join(map(repr, _SCOPES))}, got {scope!r}")
    wide = power.to(_wide(power))  # half precision cannot hold amin
    reference = torch.as_tensor(reference, dtype=wide.dtype, device=wide.device)
    decibels = 10.0 * wide.clamp(min=amin).log10() - 10.0 * reference.clamp(min=amin).log10()
    if top_db is not None and decibels.numel():
        over = tuple(range(decibels.dim()))[-_SCOPES[scope] :]
        decibels = torch.maximum(decibels, decibels.amax(over, keepdim=True) - top_db)
    return decibels.to(power.dtype)


def _reference(ref, S, values: torch.Tensor):
    if not callable(ref):
        return abs(ref)
    if isinstance(S, torch.Tensor):
        return _REDUCTIONS.get(ref, ref)(values)
    return torch.as_tensor(ref(values.numpy()))


def _tensor(name: str, value) -> torch.Tensor:
    """Tensor that shares the memory of an array where torch allows it."""
    if isinstance(value, torch.Tensor):
        return value
    array = np.asarray(value)
    if array.dtype.kind not in "fiubc":
        raise TypeError(f"{name} must be a numeric array or a tensor, got dtype {array.dtype}")
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    if not array.flags.writeable or any(s < 0 for s in array.strides):
        array = array.copy()  # torch takes neither
    return torch.from_numpy(array)


def _spectrum(S) -> torch.Tensor:
    """As `_tensor`; integers become float64, as in numpy's arithmetic."""
    values = _tensor("S", S)
    return values if values.is_floating_point() or values.is_complex() else values.double()


def _like(given, result: torch.Tensor):
    """A tensor for a tensor, an array for an array, a scalar for a scalar."""
    return result if isinstance(given, torch.Tensor) else result.numpy()[()]
