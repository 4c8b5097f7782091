"""`MelConfig`'s formulas and their derivative in numpy's long double, frames at once: the gold of float64 results.

The reference in float64 cannot be that: it rounds as often as what is judged by it. Needs numpy 2, whose FFT keeps long
double; where long double is no longer than double this gold is no better than the reference.
"""

from __future__ import annotations

import numpy as np
from definition import frame_count

from mmfast.mel import MelConfig

REAL = np.longdouble


def features_and_gradient(
    rows: np.ndarray,
    lengths: list[int],
    window: np.ndarray,
    filters: np.ndarray | None,
    dct: np.ndarray | None,
    group: int,
    config: MelConfig,
    upstream: np.ndarray,
) -> tuple[np.ndarray, np.ndarray | None]:
    """`definition.features` without dither, and the gradient of the sum of ``upstream`` times it; both long double.

    There is no gradient (None) with ``top_db``, where it depends on which value is the largest.
    """
    tables = [None if t is None else t.astype(REAL) for t in (window, filters, dct)]
    time_last = config.layout == "feature_time"
    upstream = upstream.swapaxes(1, 2) if time_last else upstream
    items = [_Item(row[:length].astype(REAL), *tables, config) for row, length in zip(rows, lengths, strict=True)]
    out = np.full((len(rows), config.frame_count(rows.shape[1]), config.n_features), config.fill, REAL)
    gradient = np.zeros(rows.shape, REAL)
    group = group or max(1, len(items))
    for b, item in enumerate(items):
        if not item.frames:
            continue
        first = b // group * group
        top = max(other.v.max() for other in items[first : first + group] if other.frames)
        out[b, : item.frames] = item.features(top)
        if config.top_db is None:
            gradient[b, : lengths[b]] = item.gradient(upstream[b, : item.frames].astype(REAL))
    out = out.swapaxes(1, 2) if time_last else out
    return out, gradient if config.top_db is None else None


class _Item:
    """One row: ``v`` before ``top_db``, ``(frames, bands)``, and what its derivative needs."""

    def __init__(self, x, window, filters, dct, config: MelConfig) -> None:
        self.config, self.window, self.filters, self.dct = config, window, filters, dct
        self.samples, self.frames = len(x), frame_count(len(x), config)
        if not self.frames:
            return
        self.source = self._sources()
        if config.preemphasis_scope == "signal":
            x = x - REAL(config.preemphasis) * np.concatenate(([REAL(0)], x[:-1]))
        s = np.where(self.source >= 0, np.append(x, REAL(0))[self.source], REAL(0)) * REAL(config.input_scale)
        if config.remove_dc:
            s = s - s.mean(1, keepdims=True)
        self.raw = s
        if config.preemphasis_scope == "frame":
            s = s - REAL(config.preemphasis) * np.concatenate((s[:, :1], s[:, :-1]), axis=1)
        self.windowed = s * window
        self.loud = self.raw if config.raw_energy else self.windowed
        self.sums = np.maximum((self.loud**2).sum(1, keepdims=True), REAL(2) ** -23)
        self.energy = np.log(self.sums)
        if config.energy_floor:
            self.energy = np.maximum(self.energy, np.log(REAL(config.energy_floor)))
        self.spectrum = np.fft.rfft(self.windowed, config.n_fft) / self._norm()
        self.square = self.spectrum.real**2 + self.spectrum.imag**2 + REAL(config.power_offset)
        power = self.square ** (REAL(config.power) / 2)
        self.m = power if filters is None else power @ filters
        self.v = self._log(self.m)

    def _norm(self) -> np.longdouble:
        if self.config.normalized == "window":
            return np.sqrt((self.window**2).sum())
        return np.sqrt(REAL(self.config.n_fft)) if self.config.normalized == "frame_length" else REAL(1)

    def _sources(self) -> np.ndarray:
        """The sample that each position of each frame reads, -1 for a zero; ``(frames, win_length)``."""
        config = self.config
        if config.framing == "kaldi":
            first = config.hop_length // 2 - config.win_length // 2
        else:
            first = -config.center_pad
            if config.window_position == "center":
                first += (config.n_fft - config.win_length) // 2
        t = first + np.arange(self.frames)[:, None] * config.hop_length + np.arange(config.win_length)
        n, mode = self.samples + 2 * config.pad, config.pad_mode
        if mode == "constant":
            t = np.where((t >= 0) & (t < n), t, -1)
        elif mode == "replicate":
            t = t.clip(0, n - 1)
        elif mode == "circular":
            t = t % n
        elif mode == "reflect":
            t = t % max(1, 2 * (n - 1))
            t = np.where(t < n, t, 2 * (n - 1) - t)
        else:
            t = t % (2 * n)
            t = np.where(t < n, t, 2 * n - 1 - t)
        t = np.where(t < 0, -1, t - config.pad)
        return np.where((t >= 0) & (t < self.samples), t, -1)

    def _log(self, m: np.ndarray) -> np.ndarray:
        config = self.config
        if config.log is None:
            return m
        m = np.maximum(m, REAL(config.log_floor)) + REAL(config.log_offset)
        if config.log == "ln":
            return np.log(m)
        if config.log == "log10":
            return np.log10(m)
        level = np.log10(REAL(max(config.log_floor, config.db_reference)))
        return REAL(config.db_multiplier) * (np.log10(m) - level)

    def features(self, top: np.longdouble) -> np.ndarray:
        config, v = self.config, self.v
        if config.top_db is not None:
            v = np.maximum(v, top - REAL(config.top_db))
        v = (v + REAL(config.output_offset)) * REAL(config.output_scale)
        v = v if self.dct is None else v @ self.dct
        parts = {
            None: (v,),
            "prepend": (self.energy, v),
            "append": (v, self.energy),
            "replace_first": (self.energy, v[:, 1:]),
            "replace_last": (v[:, :-1], self.energy),
        }
        return np.concatenate(parts[config.energy], axis=1)

    def gradient(self, upstream: np.ndarray) -> np.ndarray:
        """By the samples; each step of the constructor backwards."""
        config, u, by_energy = self.config, upstream, np.zeros((self.frames, 1), REAL)
        if config.energy:
            at = 0 if config.energy in ("prepend", "replace_first") else u.shape[1] - 1
            by_energy, u = u[:, at : at + 1], u.copy()
            if config.energy in ("prepend", "append"):
                u = np.delete(u, at, axis=1)
            else:
                u[:, at] = 0
        u = u if self.dct is None else u @ self.dct.T
        u = self._by_m(u * REAL(config.output_scale))
        u = u if self.filters is None else u @ self.filters.T
        zero = self.square == 0  # there the derivative of a root is taken as 0
        slope = np.where(zero, 1, self.square) ** (REAL(config.power) / 2 - 1) * (REAL(config.power) / 2)
        by_spectrum = np.where(zero, 0, u * slope * 2) * self.spectrum / self._norm()
        # The adjoint of rfft: bin k gives back Re(g_k e^(2 pi i k n / N)) once; irfft takes the inner ones twice.
        inner = by_spectrum.copy()
        inner[:, 1 : (config.n_fft + 1) // 2] /= 2
        s = (np.fft.irfft(inner, config.n_fft) * config.n_fft)[:, : config.win_length]
        by_loud = np.where(self._energy_counts(), 2 * by_energy / self.sums, 0) * self.loud
        s = (s if config.raw_energy else s + by_loud) * self.window
        if config.preemphasis_scope == "frame":
            p = REAL(config.preemphasis)
            later = np.concatenate((s[:, 1:], np.zeros_like(s[:, :1])), axis=1)
            later[:, 0] += s[:, 0]  # the first sample is its own predecessor
            s = s - p * later
        s = s + by_loud if config.raw_energy else s
        if config.remove_dc:
            s = s - s.mean(1, keepdims=True)
        x = np.zeros(self.samples + 1, REAL)
        np.add.at(x, self.source, s * REAL(config.input_scale))
        x = x[:-1]
        if config.preemphasis_scope == "signal":
            x = x - REAL(config.preemphasis) * np.append(x[1:], REAL(0))
        return x

    def _energy_counts(self) -> np.ndarray:
        floor = max(2.0**-23, self.config.energy_floor)
        return (self.loud**2).sum(1, keepdims=True) > floor

    def _by_m(self, u: np.ndarray) -> np.ndarray:
        config = self.config
        if config.log is None:
            return u
        m = np.maximum(self.m, REAL(config.log_floor)) + REAL(config.log_offset)
        scale = {"ln": REAL(1), "log10": 1 / np.log(REAL(10))}
        factor = scale[config.log] if config.log != "db" else REAL(config.db_multiplier) / np.log(REAL(10))
        return np.where(self.m > config.log_floor, u * factor / m, 0)
