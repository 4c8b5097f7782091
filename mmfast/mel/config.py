"""`MelConfig`: everything that decides the numbers of one acoustic front end, in one hashable value."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from mmfast import _backend

_CHOICES: dict[str, tuple] = {
    "framing": ("center", "valid", "kaldi"),
    "pad_mode": ("reflect", "constant", "replicate", "circular", "mirror"),
    "window_position": ("center", "start"),
    "preemphasis_scope": ("frame", "signal"),
    "energy": (None, "prepend", "append", "replace_first", "replace_last"),
    "normalized": (False, "window", "frame_length"),
    "filters": ("mel", "linear", None),
    "mel_scale": ("htk", "slaney", "kaldi"),
    "log": (None, "ln", "log10", "db"),
    "top_db_scope": ("item", "channels", "batch"),
    "dct_norm": ("ortho", None),
    "lifter_kind": ("kaldi", "librosa"),
    "cepstra_order": ("c0_first", "htk"),
    "layout": ("feature_time", "time_feature"),
}
_WINDOWS = ("hann", "hamming", "blackman", "povey", "rectangular")


@dataclass(frozen=True, kw_only=True)
class MelConfig:
    r"""Description of an acoustic front end: waveform → frames → spectrum → filters → log → cepstra.

    For a waveform ``x`` of ``T`` samples, frame ``f`` holds ``win_length`` samples beginning at
    ``f * hop_length + first_sample``; samples outside the signal come from ``pad`` and ``pad_mode``. Each frame passes,
    in this order, through

    ====================  =============================================================================================
    step                  formula
    ====================  =============================================================================================
    scale                 ``s = input_scale * x`` (before it, with ``preemphasis_scope="signal"``: ``x[t] - c x[t-1]``)
    dither                ``s += dither * N(0, 1)``, independent for each frame
    DC removal            ``s -= mean(s)``
    energy                ``ln max(sum s², 2⁻²³)``, here if ``raw_energy``, else after the window; ≥ ``ln energy_floor``
    pre-emphasis          ``s[n] -= preemphasis * s[max(n-1, 0)]``
    window, spectrum      ``X = rfft(s * w, n_fft)``; ``P = (|X|² + power_offset) ** (power / 2)``
    filters               ``m = P @ F``, ``F`` of shape ``(n_fft // 2 + 1, n_filters)``
    log                   ``v = log(max(m, log_floor) + log_offset)``
                          "db": ``v = db_multiplier * (log10(…) - log10 max(log_floor, db_reference))``
    top_db                ``v = max(v, max(v over the scope) - top_db)``
    affine                ``v = (v + output_offset) * output_scale``
    cepstra               ``c = lifter * DCT-II(v)[:n_mfcc]``
    ====================  =============================================================================================

    The defaults are torchaudio's ``MelSpectrogram``. Conventions of other libraries are spelled with the same fields,
    see ``mmfast.compat``.

    Args:
        sample_rate: samples a second, in Hz; only the filter bank depends on it.
        n_fft: length of the transform, any integer ≥ 1.
        win_length: length of the window in samples, ≤ ``n_fft``; default ``n_fft``.
        hop_length: samples from one frame to the next; default ``win_length // 2`` (at least 1).
        framing: ``"center"`` pads ``center_pad`` samples on both sides (torch.stft), ``"valid"`` takes only whole
            frames inside the signal (a signal shorter than a frame has none), ``"kaldi"`` is Kaldi's
            ``snip_edges=False``: ``(T + hop // 2) // hop`` frames, number ``f`` about sample ``f * hop + hop // 2``.
        center_pad: samples added on both sides for ``"center"``; default half the frame, ``n_fft // 2`` or, with
            ``window_position="start"``, ``win_length // 2``.
        pad: zeros added on both sides before everything else.
        pad_mode: what ``"center"`` and ``"kaldi"`` framing read outside the signal: ``"reflect"`` (edge not repeated;
            the signal must be longer than ``center_pad``), ``"constant"`` (zeros), ``"replicate"``, ``"circular"``,
            ``"mirror"`` (reflection with the edge repeated, Kaldi).
        drop_last: leave out the last frame (Whisper).
        window: name (``"hann"``, ``"hamming"``, ``"blackman"``, ``"povey"``, ``"rectangular"``) or the values, a tuple
            of ``win_length``.
        window_periodic: the named window is periodic (torch, librosa) rather than symmetric (Kaldi, NeMo).
        window_position: a window shorter than ``n_fft`` stands in the ``"center"`` of a frame of ``n_fft`` samples
            (torch) or at the ``"start"``, the frame being ``win_length`` samples and then zeros (Kaldi, transformers).
        blackman_coeff: Kaldi's parameter of the Blackman window.
        normalized: divide the spectrum by ``sqrt(sum w²)`` (``"window"``) or ``sqrt(n_fft)`` (``"frame_length"``).
        input_scale, dither, remove_dc, preemphasis, preemphasis_scope: see the table.
        energy: add the log energy as a feature (``"prepend"``, ``"append"``), or put it in place of the first or last
            one.
        raw_energy, energy_floor: see the table; a floor of 0 is no floor.
        power: exponent of the magnitude, > 0; 2 is the power spectrum.
        power_offset: added to ``|X|²``.
        filters: ``"mel"`` triangles, ``"linear"`` triangles, or ``None`` for the bare spectrum.
        n_mels: number of filters (mel or linear).
        f_min, f_max: first and last frequency in Hz; ``f_max=None`` is half the sample rate.
        mel_scale: ``"htk"`` and ``"slaney"`` triangles are linear in hertz; ``"kaldi"`` ones in
            mel, 1127 ln(1 + f/700).
        mel_norm: ``None``, ``"slaney"`` (each filter times 2 / its width in Hz), or a number p: each filter divided by
            its l_p norm.
        vtln_warp, vtln_low, vtln_high: Kaldi's vocal tract length warp of the ``"kaldi"`` filters.
        log, log_floor, log_offset, db_multiplier, db_reference: see the table.
        top_db: range kept below the maximum, in the unit of ``log``; ``None`` keeps everything.
        top_db_scope: the maximum is over one waveform row (``"item"``), over the rows of the last leading dimension
            (``"channels"``, torchaudio), or over all of them (``"batch"``).
        output_offset, output_scale: see the table.
        n_mfcc: number of cepstra, or ``None`` for no DCT.
        dct_norm: ``"ortho"`` or ``None`` (then 2 Σ, as scipy).
        lifter, lifter_kind: cepstrum ``i`` is multiplied by ``1 + lifter / 2 * sin(pi * i / lifter)`` (``"kaldi"``;
            ``i + 1`` for ``"librosa"``); 0 is none.
        cepstra_order: ``"htk"`` moves C0 to the end, times √2 unless the energy stands in its place.
        layout: ``"feature_time"`` gives ``(..., features, frames)``, ``"time_feature"`` ``(..., frames, features)``.
        fill: value of frames past an item's length.

    Raises:
        ValueError, TypeError: naming the field, its value and what is allowed.
    """

    sample_rate: float = 16000
    n_fft: int = 400
    win_length: int | None = None
    hop_length: int | None = None
    framing: str = "center"
    center_pad: int | None = None
    pad: int = 0
    pad_mode: str = "reflect"
    drop_last: bool = False
    window: str | tuple[float, ...] = "hann"
    window_periodic: bool = True
    window_position: str = "center"
    blackman_coeff: float = 0.42
    normalized: bool | str = False
    input_scale: float = 1.0
    dither: float = 0.0
    remove_dc: bool = False
    preemphasis: float = 0.0
    preemphasis_scope: str = "frame"
    energy: str | None = None
    raw_energy: bool = True
    energy_floor: float = 0.0
    power: float = 2.0
    power_offset: float = 0.0
    filters: str | None = "mel"
    n_mels: int = 128
    f_min: float = 0.0
    f_max: float | None = None
    mel_scale: str = "htk"
    mel_norm: str | float | None = None
    vtln_warp: float = 1.0
    vtln_low: float = 100.0
    vtln_high: float = -500.0
    log: str | None = None
    log_floor: float = 0.0
    log_offset: float = 0.0
    db_multiplier: float = 10.0
    db_reference: float = 1.0
    top_db: float | None = None
    top_db_scope: str = "item"
    output_offset: float = 0.0
    output_scale: float = 1.0
    n_mfcc: int | None = None
    dct_norm: str | None = "ortho"
    lifter: float = 0.0
    lifter_kind: str = "kaldi"
    cepstra_order: str = "c0_first"
    layout: str = "feature_time"
    fill: float = 0.0

    def __post_init__(self) -> None:
        put = lambda name, value: object.__setattr__(self, name, value)  # noqa: E731  (frozen dataclass)
        put("n_fft", _integer("n_fft", self.n_fft, 1))
        put("win_length", self.n_fft if self.win_length is None else _integer("win_length", self.win_length, 1))
        if self.win_length > self.n_fft:
            raise ValueError(f"win_length must be at most n_fft = {self.n_fft}, got {self.win_length}")
        default_hop = max(1, self.win_length // 2)
        put("hop_length", default_hop if self.hop_length is None else _integer("hop_length", self.hop_length, 1))
        if self.normalized is True:
            put("normalized", "window")
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {getattr(self, name)!r}")
        if self.center_pad is None:
            put("center_pad", self.frame_length // 2 if self.framing == "center" else 0)
        put("center_pad", _integer("center_pad", self.center_pad, 0))
        if self.framing != "center" and self.center_pad:
            raise ValueError(f"center_pad needs framing='center', got framing={self.framing!r}")
        put("pad", _integer("pad", self.pad, 0))
        for name in ("drop_last", "window_periodic", "remove_dc", "raw_energy"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be a bool, got {getattr(self, name)!r}")
        for name in _FLOATS:
            put(name, _real(name, getattr(self, name)))
        if self.sample_rate <= 0:
            raise ValueError(f"sample_rate must be positive, got {self.sample_rate}")
        for name in ("dither", "power_offset", "log_floor", "log_offset", "energy_floor", "lifter"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("power", "db_multiplier", "db_reference", "output_scale", "vtln_warp"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        self._check_window()
        self._check_features(put)
        # Wanted several times a call, and while torch.compile traces. Short, since the operators carry the text: what
        # is as in MelConfig() is left out.
        parts = [f'"{n}": {_json(getattr(self, n))}' for n, default in _DEFAULTS if getattr(self, n) != default]
        put("_key", "{" + ", ".join(parts) + "}")
        put("_min_length", self._find_min_length())

    def _check_window(self) -> None:
        if isinstance(self.window, str):
            if self.window not in _WINDOWS:
                raise ValueError(
                    f"window must be one of {', '.join(map(repr, _WINDOWS))} or a tuple, got {self.window!r}"
                )
        else:
            if not hasattr(self.window, "__iter__"):
                raise TypeError(f"window must be a name or a tuple of values, got {self.window!r}")
            object.__setattr__(self, "window", tuple(_real("window", v) for v in self.window))
            if len(self.window) != self.win_length:
                raise ValueError(f"window must have win_length = {self.win_length} values, got {len(self.window)}")

    def _check_features(self, put) -> None:
        nyquist = self.sample_rate / 2
        put("n_mels", _integer("n_mels", self.n_mels, 1))
        if self.f_max is not None:
            put("f_max", _real("f_max", self.f_max))
        if not (self.mel_norm is None or isinstance(self.mel_norm, str)):
            put("mel_norm", _number("mel_norm", self.mel_norm))  # infinity is a norm
        if self.filters is None:
            if self.n_mfcc is not None:
                raise ValueError("n_mfcc needs filters, got filters=None")
        else:
            put("f_max", nyquist if self.f_max is None else self.f_max)
            # torchaudio's default of sample_rate // 2 lies below Nyquist for odd rates; a hair above is rounding.
            if not 0 <= self.f_min < self.f_max <= nyquist * (1 + 1e-6):
                raise ValueError(
                    f"f_min and f_max must satisfy 0 <= f_min < f_max <= sample_rate / 2 = {nyquist:g}, "
                    f"got f_min={self.f_min:g}, f_max={self.f_max:g}"
                )
            if isinstance(self.mel_norm, str):
                if self.mel_norm != "slaney":
                    raise ValueError(f"mel_norm must be None, 'slaney' or a number, got {self.mel_norm!r}")
            elif self.mel_norm is not None and not self.mel_norm > 0:
                raise ValueError(f"mel_norm must be positive, got {self.mel_norm}")
        if self.top_db is not None:
            put("top_db", _real("top_db", self.top_db))
            if self.log is None:
                raise ValueError("top_db needs a log scale, got log=None")
            if self.top_db < 0:
                raise ValueError(f"top_db must not be negative, got {self.top_db}")
        if self.n_mfcc is not None:
            put("n_mfcc", _integer("n_mfcc", self.n_mfcc, 1))
            if self.n_mfcc > self.n_mels:
                raise ValueError(f"n_mfcc must be at most n_mels = {self.n_mels}, got {self.n_mfcc}")
        elif self.lifter or self.cepstra_order != "c0_first":
            raise ValueError("lifter and cepstra_order need n_mfcc")

    # Derived quantities. The native kernels see only these.

    @property
    def frame_length(self) -> int:
        """Samples that framing counts as one frame."""
        return self.n_fft if self.window_position == "center" else self.win_length

    @property
    def n_freqs(self) -> int:
        """Bins of the one-sided spectrum."""
        return self.n_fft // 2 + 1

    @property
    def n_features(self) -> int:
        """Features of a frame."""
        n = self.n_mfcc or (self.n_mels if self.filters else self.n_freqs)
        return n + (self.energy in ("prepend", "append"))

    @property
    def first_sample(self) -> int:
        """Position of the first windowed sample of frame 0, relative to the first sample of the waveform."""
        if self.framing == "kaldi":
            return self.hop_length // 2 - self.win_length // 2 - self.pad
        shift = (self.n_fft - self.win_length) // 2 if self.window_position == "center" else 0
        return shift - self.pad - self.center_pad

    @property
    def count_offset(self) -> int:
        """``a`` in frames = max(0, floor((T + a) / hop_length)) for a waveform of T ≥ `min_length` samples."""
        padded = 2 * (self.pad + self.center_pad)
        a = (
            self.hop_length // 2 + 2 * self.pad
            if self.framing == "kaldi"
            else padded - self.frame_length + self.hop_length
        )
        return a - self.hop_length * self.drop_last

    @property
    def min_length(self) -> int:
        """Fewest samples for which the padding is defined."""
        return self._min_length

    def _find_min_length(self) -> int:
        need = {"reflect": self.center_pad + 1, "circular": self.center_pad, "replicate": 1, "mirror": 1, "constant": 0}
        if self.framing == "valid" or (self.framing == "center" and self.center_pad == 0):
            return 0
        if self.framing == "kaldi" and self.pad_mode == "reflect":
            return max(0, self.win_length - 2 * self.pad)
        return max(0, need[self.pad_mode] - 2 * self.pad)

    def frame_count(self, length: int) -> int:
        """Number of frames of a waveform of ``length`` samples (0 below `min_length`)."""
        return 0 if length < self.min_length else max(0, (length + self.count_offset) // self.hop_length)

    @property
    def key(self) -> str:
        """Canonical text, the fields unlike the defaults in JSON: what operators carry. `from_key` is its inverse."""
        return self._key

    @staticmethod
    @lru_cache(maxsize=1024)
    def from_key(key: str) -> MelConfig:
        """Configuration of a `key` (also the metadata that `mmfast extract` writes)."""
        fields = json.loads(key)
        if isinstance(fields.get("window"), list):
            fields["window"] = tuple(fields["window"])
        return MelConfig(**fields)

    def __eq__(self, other: object) -> bool:
        return self._key == other._key if type(other) is type(self) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._key)  # which a text keeps

    def replace(self, **changes: Any) -> MelConfig:
        """Copy with fields changed; sizes that followed from a changed field by default must be given anew."""
        return dataclasses.replace(self, **changes)


_FLOATS = (
    *("sample_rate", "blackman_coeff", "input_scale", "dither", "preemphasis", "energy_floor", "power", "power_offset"),
    *("f_min", "vtln_warp", "vtln_low", "vtln_high", "log_floor", "log_offset", "db_multiplier", "db_reference"),
    *("output_offset", "output_scale", "lifter", "fill"),
)


_DEFAULTS = tuple(sorted((field.name, field.default) for field in dataclasses.fields(MelConfig)))


def _json(value: Any) -> str:
    """As json.dumps, which torch.compile cannot look into, for what a field may hold."""
    if isinstance(value, tuple):
        return "[" + ", ".join([_json(v) for v in value]) + "]"
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if value != value else "Infinity" if value > 0 else "-Infinity"
    if value is None:
        return "null"
    return repr(value).lower() if isinstance(value, bool) else repr(value)


def _integer(name: str, value: Any, least: int) -> int:
    value = _backend.plain(value)
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    value = value.__index__()
    if not least <= value < 2**31:
        raise ValueError(f"{name} must be in [{least}, 2**31), got {value}")
    return value


def _real(name: str, value: Any) -> float:
    value = _number(name, value)
    if not math.isfinite(value) and name != "fill":
        raise ValueError(f"{name} must be finite, got {value}")
    return value


def _number(name: str, value: Any) -> float:
    value = _backend.plain(value)
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        raise TypeError(f"{name} must be a number, got {value!r}")
    return float(value)
