r"""``torchaudio.compliance.kaldi``: Kaldi's spectrogram, filter bank and MFCC features, for a clip or for a batch.

The functions take one clip, a waveform ``(c, n)`` of ``c`` channels of which ``channel`` is used, and give
``(m, bins)``, as torchaudio does; and they take a batch ``(b, c, n)`` and give ``(b, m, bins)``. With ``lengths``, an
integer tensor ``(b,)`` of valid samples, they give a pair: the features, in which each item has exactly the frames that
it has alone and zeros beyond, and the number of frames of each item, ``(b,)`` int64.

Each frame passes, in this order, through: dither, removal of the mean, energy (if ``raw_energy``), pre-emphasis
``s[n] -= p s[max(n-1, 0)]``, window, energy (if not ``raw_energy``), zeros to the length of the transform, power
spectrum, triangles in ``mel = 1127 ln(1 + f / 700)``, ``ln max(m, 2**-23)``, DCT-II, lifter. Arguments in common:

* ``blackman_coeff``: parameter of the Blackman window.
* ``channel``: which one; -1 is the first.
* ``dither``: standard deviation of noise added to each sample of a frame; it follows torch's CPU generator, with
  numbers other than torchaudio's.
* ``energy_floor``: least energy of a frame, before the logarithm; 0 is no floor beyond 2**-23.
* ``frame_length``, ``frame_shift``: milliseconds; samples are ``int(sample_frequency * ms * 0.001)``.
* ``min_duration``: seconds; a shorter clip has no frames (torchaudio's ``mfcc`` fails there). A clip gives an empty
  tensor of one dimension, as in torchaudio, a batch ``(b, 0, bins)``, an item of a ragged batch 0 frames.
* ``preemphasis_coefficient``: ``p``, in [0, 1].
* ``raw_energy``, ``remove_dc_offset``: see above.
* ``round_to_power_of_two``: length of the transform, the next power of two or the frame itself, which must then be
  even.
* ``sample_frequency``: Hz.
* ``snip_edges``: only frames that lie inside the clip, ``1 + (n - length) // shift``; otherwise
  ``(n + shift // 2) // shift``, centred, with the clip mirrored at its ends.
* ``subtract_mean``: subtract from each feature its mean over the frames of the clip.
* ``window_type``: ``"povey"`` (hann ** 0.85), ``"hanning"``, ``"hamming"``, ``"blackman"`` or ``"rectangular"``;
  symmetric.
* ``high_freq``, ``low_freq``: Hz; a ``high_freq`` ≤ 0 counts from half the sample frequency.
* ``num_mel_bins``: number of triangles, at least 4.
* ``use_energy``: the log energy as a feature: in ``fbank`` one more, the first (with ``htk_compat`` the last), in
  ``mfcc`` in place of C0.
* ``htk_compat``: energy or C0 last, C0 times √2.
* ``vtln_warp``, ``vtln_low``, ``vtln_high``: vocal tract length warp of the triangles; a negative ``vtln_high`` counts
  from half the sample frequency.

A clip shorter than a frame is an error, as in torchaudio; an item of a ragged batch then has no frames (``snip_edges``)
or those that Kaldi gives it. Features have the dtype of the waveform; half precision and int16 are computed in float32,
int16 gives float32. Differentiable with respect to the waveform. Arguments that do not fit raise ``ValueError``, where
torchaudio has assertions.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from mmfast import _backend
from mmfast.mel import MelConfig, extract, post

__all__ = ["fbank", "mfcc", "spectrogram"]

_EPSILON = 2.0**-23  # least value under a logarithm: float32's epsilon
_WINDOWS = {name: name for name in ("hamming", "povey", "rectangular", "blackman")} | {"hanning": "hann"}


def spectrogram(
    waveform: Tensor,
    blackman_coeff: float = 0.42,
    channel: int = -1,
    dither: float = 0.0,
    energy_floor: float = 1.0,
    frame_length: float = 25.0,
    frame_shift: float = 10.0,
    min_duration: float = 0.0,
    preemphasis_coefficient: float = 0.97,
    raw_energy: bool = True,
    remove_dc_offset: bool = True,
    round_to_power_of_two: bool = True,
    sample_frequency: float = 16000.0,
    snip_edges: bool = True,
    subtract_mean: bool = False,
    window_type: str = "povey",
    *,
    lengths: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Log power spectrum, ``ln max(|X|², 2**-23)``, with the log energy in place of bin 0.

    Shapes: ``(c, n)`` → ``(m, n_fft // 2 + 1)``; ``(b, c, n)`` → ``(b, m, n_fft // 2 + 1)``, with ``lengths`` a pair
    with the numbers of frames. Arguments, errors and differences from torchaudio: see the module.
    """
    config = _spectrogram_config(
        blackman_coeff,
        dither,
        energy_floor,
        frame_length,
        frame_shift,
        preemphasis_coefficient,
        raw_energy,
        remove_dc_offset,
        round_to_power_of_two,
        sample_frequency,
        snip_edges,
        window_type,
    )
    return _features(waveform, channel, lengths, config, min_duration * sample_frequency, subtract_mean)


def fbank(
    waveform: Tensor,
    blackman_coeff: float = 0.42,
    channel: int = -1,
    dither: float = 0.0,
    energy_floor: float = 1.0,
    frame_length: float = 25.0,
    frame_shift: float = 10.0,
    high_freq: float = 0.0,
    htk_compat: bool = False,
    low_freq: float = 20.0,
    min_duration: float = 0.0,
    num_mel_bins: int = 23,
    preemphasis_coefficient: float = 0.97,
    raw_energy: bool = True,
    remove_dc_offset: bool = True,
    round_to_power_of_two: bool = True,
    sample_frequency: float = 16000.0,
    snip_edges: bool = True,
    subtract_mean: bool = False,
    use_energy: bool = False,
    use_log_fbank: bool = True,
    use_power: bool = True,
    vtln_high: float = -500.0,
    vtln_low: float = 100.0,
    vtln_warp: float = 1.0,
    window_type: str = "povey",
    *,
    lengths: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Log mel filter bank; linear without ``use_log_fbank``, of the magnitude without ``use_power``.

    Shapes: ``(c, n)`` → ``(m, num_mel_bins + use_energy)``; ``(b, c, n)`` → ``(b, m, ...)``, with ``lengths`` a pair
    with the numbers of frames. Arguments, errors and differences from torchaudio: see the module.
    """
    config = _fbank_config(
        blackman_coeff,
        dither,
        energy_floor,
        frame_length,
        frame_shift,
        preemphasis_coefficient,
        raw_energy,
        remove_dc_offset,
        round_to_power_of_two,
        sample_frequency,
        snip_edges,
        window_type,
        high_freq,
        htk_compat,
        low_freq,
        num_mel_bins,
        use_energy,
        use_log_fbank,
        use_power,
        vtln_high,
        vtln_low,
        vtln_warp,
    )
    return _features(waveform, channel, lengths, config, min_duration * sample_frequency, subtract_mean)


def mfcc(
    waveform: Tensor,
    blackman_coeff: float = 0.42,
    cepstral_lifter: float = 22.0,
    channel: int = -1,
    dither: float = 0.0,
    energy_floor: float = 1.0,
    frame_length: float = 25.0,
    frame_shift: float = 10.0,
    high_freq: float = 0.0,
    htk_compat: bool = False,
    low_freq: float = 20.0,
    num_ceps: int = 13,
    min_duration: float = 0.0,
    num_mel_bins: int = 23,
    preemphasis_coefficient: float = 0.97,
    raw_energy: bool = True,
    remove_dc_offset: bool = True,
    round_to_power_of_two: bool = True,
    sample_frequency: float = 16000.0,
    snip_edges: bool = True,
    subtract_mean: bool = False,
    use_energy: bool = False,
    vtln_high: float = -500.0,
    vtln_low: float = 100.0,
    vtln_warp: float = 1.0,
    window_type: str = "povey",
    *,
    lengths: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Mel-frequency cepstra: orthonormal DCT-II of the log mel filter bank, times ``1 + Q/2 sin(pi i / Q)``.

    ``Q = cepstral_lifter``, 0 for none; ``num_ceps`` cepstra, C0 among them, at most ``num_mel_bins``. The defaults are
    torchaudio's; Kaldi itself has ``use_energy=True``, ``energy_floor=0.0`` and ``dither=1.0``.

    Shapes: ``(c, n)`` → ``(m, num_ceps)``; ``(b, c, n)`` → ``(b, m, num_ceps)``, with ``lengths`` a pair with the
    numbers of frames. Arguments, errors and differences from torchaudio: see the module.
    """
    config = _mfcc_config(
        blackman_coeff,
        dither,
        energy_floor,
        frame_length,
        frame_shift,
        preemphasis_coefficient,
        raw_energy,
        remove_dc_offset,
        round_to_power_of_two,
        sample_frequency,
        snip_edges,
        window_type,
        high_freq,
        htk_compat,
        low_freq,
        num_mel_bins,
        use_energy,
        vtln_high,
        vtln_low,
        vtln_warp,
        num_ceps,
        cepstral_lifter,
    )
    return _features(waveform, channel, lengths, config, min_duration * sample_frequency, subtract_mean)


def _features(
    waveform: Tensor,
    channel: int,
    lengths: Tensor | None,
    config: MelConfig,
    min_samples: float,
    subtract_mean: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    if not isinstance(waveform, Tensor):
        raise TypeError(f"waveform must be a tensor, got {type(waveform).__name__}")
    dims = waveform.dim()
    if dims != 2 and dims != 3:
        raise ValueError(
            f"waveform must be (channels, samples) or (batch, channels, samples), got {tuple(waveform.shape)}"
        )
    channel = max(channel, 0)
    if channel >= waveform.shape[-2]:
        raise ValueError(f"channel must be below {waveform.shape[-2]}, the channels of the waveform, got {channel}")
    waveform = waveform.select(-2, channel)
    n = waveform.shape[-1]
    if lengths is None:
        if n < config.win_length:
            raise ValueError(f"waveform must be at least as long as a frame, {config.win_length} samples, got {n}")
        if n < min_samples:
            empty = (0,) if dims == 2 else (waveform.shape[0], 0, config.n_features)
            return waveform.new_empty(empty, dtype=torch.float32 if waveform.dtype is torch.int16 else None)
        features = extract(waveform, config)
        return _centred(features) if subtract_mean else features
    if dims == 2:
        raise ValueError(f"lengths needs a batch (batch, channels, samples), got a clip {tuple(waveform.shape)}")
    if min_samples > 0 and isinstance(lengths, Tensor):
        lengths = lengths * (lengths >= min_samples)
    features, counts = extract(waveform, config, lengths=lengths)
    return (_centred(features, counts) if subtract_mean else features), counts


def _centred(features: Tensor, counts: Tensor | None = None) -> Tensor:
    return post.normalize(features, lengths=counts, variance=False, dim=-2)


def _frame_fields(
    blackman_coeff: float,
    dither: float,
    energy_floor: float,
    frame_length: float,
    frame_shift: float,
    preemphasis_coefficient: float,
    raw_energy: bool,
    remove_dc_offset: bool,
    round_to_power_of_two: bool,
    sample_frequency: float,
    snip_edges: bool,
    window_type: str,
) -> dict:
    """Fields of `MelConfig` up to the spectrum."""
    if sample_frequency <= 0:
        raise ValueError(f"sample_frequency must be positive, got {sample_frequency}")
    size, shift = (int(sample_frequency * ms * 0.001) for ms in (frame_length, frame_shift))
    if size < 2:
        raise ValueError(f"frame_length must be at least 2 samples, got {frame_length} ms = {size} samples")
    if shift < 1:
        raise ValueError(f"frame_shift must be at least 1 sample, got {frame_shift} ms = {shift} samples")
    padded = 1 << (size - 1).bit_length() if round_to_power_of_two else size
    if padded % 2:
        raise ValueError(f"frame_length must be an even number of samples without round_to_power_of_two, got {size}")
    if not 0 <= preemphasis_coefficient <= 1:
        raise ValueError(f"preemphasis_coefficient must be in [0, 1], got {preemphasis_coefficient}")
    if window_type not in _WINDOWS:
        raise ValueError(f"window_type must be one of {', '.join(map(repr, _WINDOWS))}, got {window_type!r}")
    return {
        "sample_rate": sample_frequency,
        "n_fft": padded,
        "win_length": size,
        "hop_length": shift,
        "framing": "valid" if snip_edges else "kaldi",
        "pad_mode": "mirror",
        "window": _WINDOWS[window_type],
        "window_periodic": False,
        "window_position": "start",
        "blackman_coeff": blackman_coeff,
        "dither": abs(dither),
        "remove_dc": bool(remove_dc_offset),
        "preemphasis": preemphasis_coefficient,
        "raw_energy": bool(raw_energy),
        "energy_floor": energy_floor,
        "layout": "time_feature",
    }


def _filter_fields(
    sample_frequency: float,
    high_freq: float,
    low_freq: float,
    num_mel_bins: int,
    vtln_high: float,
    vtln_low: float,
    vtln_warp: float,
) -> dict:
    nyquist = 0.5 * sample_frequency
    high = high_freq + nyquist if high_freq <= 0 else high_freq
    if num_mel_bins <= 3:
        raise ValueError(f"num_mel_bins must be at least 4, got {num_mel_bins}")
    if not 0 <= low_freq < high <= nyquist:
        raise ValueError(
            f"low_freq and high_freq must satisfy 0 <= low_freq < high_freq <= {nyquist:g} Hz, "
            f"got low_freq={low_freq:g}, high_freq={high_freq:g}"
        )
    fields = {"filters": "mel", "n_mels": num_mel_bins, "f_min": low_freq, "f_max": high, "mel_scale": "kaldi"}
    if vtln_warp != 1:
        top = vtln_high + nyquist if vtln_high < 0 else vtln_high
        if not low_freq < vtln_low < top < high:
            raise ValueError(
                f"vtln_low and vtln_high must satisfy {low_freq:g} < vtln_low < vtln_high < {high:g} Hz, "
                f"got vtln_low={vtln_low:g}, vtln_high={vtln_high:g} (that is, {top:g})"
            )
        fields |= {"vtln_warp": vtln_warp, "vtln_low": vtln_low, "vtln_high": top}
    return fields


# A clip of a second takes some 20 microseconds; building its configuration takes longer, hence the caches.


@lru_cache(maxsize=256)
def _spectrogram_config(*arguments: float | bool | str) -> MelConfig:
    frame = map(_backend.plain, arguments)
    return MelConfig(**_frame_fields(*frame), filters=None, log="ln", log_floor=_EPSILON, energy="replace_first")


@lru_cache(maxsize=256)
def _fbank_config(*arguments: float | bool | str) -> MelConfig:
    arguments = tuple(map(_backend.plain, arguments))
    frame, (high_freq, htk_compat, low_freq, num_mel_bins) = arguments[:12], arguments[12:16]
    use_energy, use_log_fbank, use_power, *vtln = arguments[16:]
    fields = _frame_fields(*frame)
    fields |= _filter_fields(fields["sample_rate"], high_freq, low_freq, num_mel_bins, *vtln)
    if use_log_fbank:
        fields |= {"log": "ln", "log_floor": _EPSILON}
    if use_energy:
        fields["energy"] = "append" if htk_compat else "prepend"
    return MelConfig(**fields, power=2.0 if use_power else 1.0)


@lru_cache(maxsize=256)
def _mfcc_config(*arguments: float | bool | str) -> MelConfig:
    arguments = tuple(map(_backend.plain, arguments))
    frame, (high_freq, htk_compat, low_freq, num_mel_bins) = arguments[:12], arguments[12:16]
    use_energy, *vtln, num_ceps, cepstral_lifter = arguments[16:]
    if num_ceps > num_mel_bins:
        raise ValueError(f"num_ceps must be at most num_mel_bins = {num_mel_bins}, got {num_ceps}")
    fields = _frame_fields(*frame)
    fields |= _filter_fields(fields["sample_rate"], high_freq, low_freq, num_mel_bins, *vtln)
    if use_energy:
        fields["energy"] = "replace_last" if htk_compat else "replace_first"
    return MelConfig(
        **fields,
        log="ln",
        log_floor=_EPSILON,
        n_mfcc=num_ceps,
        lifter=abs(cepstral_lifter),  # the lifter is even in its coefficient
        cepstra_order="htk" if htk_compat else "c0_first",
    )
