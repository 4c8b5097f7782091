"""`MelConfig`'s table of formulas once more, sample by sample in numpy, independent of the reference."""

from __future__ import annotations

import math

import numpy as np

from mmfast.mel import MelConfig


def features(
    rows: np.ndarray,
    lengths: list[int],
    window: np.ndarray,
    filters: np.ndarray | None,
    dct: np.ndarray | None,
    group: int,
    seed: int,
    config: MelConfig,
) -> tuple[np.ndarray, list[int]]:
    """As `mmfast.mel.reference.mel_reference`, in float64."""
    items = [
        _item(row[:length], b, window, filters, seed, config)
        for b, (row, length) in enumerate(zip(rows, lengths, strict=True))
    ]
    counts = [len(v) for v, _ in items]
    group = group or max(1, len(items))
    shape = (len(items), config.frame_count(rows.shape[1]), config.n_features)
    out = np.full(shape, config.fill)
    for b, (v, energy) in enumerate(items):
        if config.top_db is not None and len(v):
            first = b // group * group
            top = max(u.max() for u, _ in items[first : first + group] if len(u))
            v = np.maximum(v, top - config.top_db)
        v = (v + config.output_offset) * config.output_scale
        if dct is not None:
            v = v @ dct
        if config.energy == "prepend":
            v = np.concatenate((energy, v), axis=1)
        elif config.energy == "append":
            v = np.concatenate((v, energy), axis=1)
        elif config.energy == "replace_first":
            v = np.concatenate((energy, v[:, 1:]), axis=1)
        elif config.energy == "replace_last":
            v = np.concatenate((v[:, :-1], energy), axis=1)
        out[b, : len(v)] = v
    return (out.swapaxes(1, 2) if config.layout == "feature_time" else out), counts


def _item(x, row, window, filters, seed, config) -> tuple[np.ndarray, np.ndarray]:
    """Values before ``top_db`` and energies: ``(frames, bins)`` and ``(frames, 1)``."""
    x = list(x)
    if config.preemphasis_scope == "signal":
        x = [s - config.preemphasis * (x[t - 1] if t else 0.0) for t, s in enumerate(x)]
    out, energies = [], []
    for f in range(frame_count(len(x), config)):
        s = np.array([_sample(x, t, config) for t in _positions(f, config)]) * config.input_scale
        if config.dither:
            s = s + config.dither * np.array([noise(seed, row, f, n) for n in range(len(s))])
        if config.remove_dc:
            s = s - s.mean()
        raw = s
        if config.preemphasis_scope == "frame":
            s = s - config.preemphasis * np.concatenate((s[:1], s[:-1]))
        s = s * window
        sum_of_squares = ((raw if config.raw_energy else s) ** 2).sum()
        energy = math.log(max(sum_of_squares, 2.0**-23))
        energies.append([max(energy, math.log(config.energy_floor)) if config.energy_floor else energy])
        spectrum = np.fft.rfft(s, config.n_fft)
        if config.normalized == "window":
            spectrum = spectrum / math.sqrt((window**2).sum())
        elif config.normalized == "frame_length":
            spectrum = spectrum / math.sqrt(config.n_fft)
        power = (np.abs(spectrum) ** 2 + config.power_offset) ** (config.power / 2)
        out.append(_log(power if filters is None else power @ filters, config))
    bins = config.n_freqs if filters is None else filters.shape[1]
    return np.array(out).reshape(-1, bins), np.array(energies).reshape(-1, 1)


def frame_count(samples: int, config: MelConfig) -> int:
    """Frames counted by walking along the signal."""
    if samples < config.min_length:
        return 0
    total, f = samples + 2 * config.pad, 0
    if config.framing == "kaldi":  # as many as there are centres, to the nearest hop
        f = (total + config.hop_length // 2) // config.hop_length
    else:
        while f * config.hop_length + config.frame_length <= total + 2 * config.center_pad:
            f += 1
    return max(0, f - config.drop_last)


def _positions(f: int, config: MelConfig) -> range:
    """Positions of the frame's samples in the signal with its ``pad`` zeros."""
    if config.framing == "kaldi":
        first = f * config.hop_length + config.hop_length // 2 - config.win_length // 2
    else:
        first = f * config.hop_length - config.center_pad
        if config.window_position == "center":
            first += (config.n_fft - config.win_length) // 2
    return range(first, first + config.win_length)


def _sample(x: list[float], t: int, config: MelConfig) -> float:
    length = len(x) + 2 * config.pad
    while not 0 <= t < length:
        if config.pad_mode == "constant":
            return 0.0
        if config.pad_mode == "replicate":
            t = min(max(t, 0), length - 1)
        elif config.pad_mode == "circular":
            t += length if t < 0 else -length
        elif config.pad_mode == "reflect":
            t = 0 if length == 1 else -t if t < 0 else 2 * (length - 1) - t
        else:
            t = -1 - t if t < 0 else 2 * length - 1 - t
    t -= config.pad
    return x[t] if 0 <= t < len(x) else 0.0


def _log(m: np.ndarray, config: MelConfig) -> np.ndarray:
    if config.log is None:
        return m
    m = np.maximum(m, config.log_floor) + config.log_offset
    with np.errstate(divide="ignore"):
        if config.log == "ln":
            return np.log(m)
        v = np.log10(m)
    if config.log == "log10":
        return v
    return config.db_multiplier * (v - math.log10(max(config.log_floor, config.db_reference)))


def noise(seed: int, row: int, frame: int, sample: int) -> float:
    """The dither noise of one sample, in Python integers."""

    def mix(x: int) -> int:
        x &= 0xFFFFFFFF
        x = (x ^ (x >> 16)) * 0x7FEB352D & 0xFFFFFFFF
        x = (x ^ (x >> 15)) * 0x846CA68B & 0xFFFFFFFF
        return x ^ (x >> 16)

    key = mix(mix(mix(seed) + row) + frame)
    a, b = mix(key + 2 * sample), mix(key + 2 * sample + 1)
    return math.sqrt(-2 * math.log(((a >> 8) + 1) / 2**24)) * math.cos(2 * math.pi * (b >> 8) / 2**24)
