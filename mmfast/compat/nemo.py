"""NeMo's ``FilterbankFeatures``, the front end of its speech recognisers, in one fused call."""

from __future__ import annotations

import random
from collections.abc import Mapping
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import nn

from mmfast.compat import librosa
from mmfast.mel import MelConfig, extract, post

__all__ = ["FilterbankFeatures"]

_CONSTANT = 1e-5  # NeMo's guard under the square root, and its guard of the deviation
_WINDOWS = {
    "hann": torch.hann_window,
    "hamming": torch.hamming_window,
    "blackman": torch.blackman_window,
    "bartlett": torch.bartlett_window,
    "none": lambda n, periodic: torch.ones(n),
}


class FilterbankFeatures(nn.Module):
    r"""Log-mel filter bank of a ragged batch, normalised: NeMo's class of this name (2.x), under its arguments.

    For an item of ``len`` samples, ``x[t] - preemph * x[t-1]`` (zero past ``len``), centred frames with zeros outside
    the signal, ``(|X|² + guard) ** (mag_power / 2)``, Slaney filters, logarithm, normalisation over the item's frames,
    then ``pad_value`` in the frames past the item's end. The buffers ``window`` and ``fb`` (of shape
    ``(1, nfilt, n_fft // 2 + 1)``) have NeMo's names: a checkpoint loads, and what it holds is used.

    Args:
        sample_rate: in Hz.
        n_window_size, n_window_stride: window and hop in samples.
        window: ``"hann"``, ``"hamming"``, ``"blackman"``, ``"bartlett"`` (all symmetric) or ``"none"``.
        normalize: ``"per_feature"`` (mean and deviation of each filter over the item's frames), ``"all_features"`` (of
            the whole item), a mapping of ``fixed_mean`` and ``fixed_std``, each ``(nfilt,)`` or ``(batch, nfilt)``;
            anything else is no normalisation. Deviations are unbiased, plus 1e-5; that of a single frame counts as 0.
        n_fft: default the next power of two.
        preemph: coefficient, or None.
        nfilt, lowfreq, highfreq, mel_norm: the filters, see `mmfast.compat.librosa.mel`.
        log: take the logarithm, of ``m + log_zero_guard_value`` (``log_zero_guard_type="add"``) or
            ``max(m, log_zero_guard_value)`` (``"clamp"``); the value is a number, ``"tiny"`` or ``"eps"`` (float32's).
        dither: in training only: noise of this deviation is added to the waveform (a copy; NeMo changes its argument).
        pad_to: the number of frames returned is rounded up to a multiple of it (0: it is not); ``"max"`` gives
            ``max_length`` frames.
        max_duration: seconds, for ``max_length``.
        frame_splicing: how often the features are repeated along their dimension (which is what NeMo computes: its
            "stacked" frames are not shifted).
        exact_pad: pad ``(n_fft - n_window_stride) // 2`` zeros instead of centring, so that there are
            ``len // n_window_stride`` frames.
        pad_value: of the frames past an item's end.
        mag_power: exponent of the magnitude, > 0.
        use_grads: let gradients through, with a guard of 1e-5 added to ``|X|²``; otherwise under ``no_grad``.
        rng, nb_augmentation_prob, nb_max_freq: in training, the probability that an item loses everything above
            ``nb_max_freq`` Hz, drawn from ``rng`` (a `random.Random`).
        stft_exact_pad, stft_conv: obsolete, must be False.

    Where NeMo departs from its own documentation, the documented behaviour is computed:

    * with ``exact_pad``, ``num_frames = audio_length // hop_length`` as documented, all of them valid; NeMo 2.x
      declares the last one padding, and with ``preemph`` also silences the last ``(n_fft - hop) // 2`` samples;
    * samples past an item's length are ignored without ``preemph`` too, where NeMo lets them into the last frames;
    * ``window="none"``, ``pad_to="max"`` and ``nb_augmentation_prob`` with ``n_fft=None`` work; NeMo raises.

    Example:
        >>> features, lengths = FilterbankFeatures(nfilt=80).eval()(torch.randn(2, 16000), torch.tensor([16000, 9000]))
        >>> features.shape, lengths
        (torch.Size([2, 80, 112]), tensor([100,  56]))
    """

    def __init__(
        self,
        sample_rate: int = 16000,
        n_window_size: int = 320,
        n_window_stride: int = 160,
        window: str = "hann",
        normalize: str | Mapping | None = "per_feature",
        n_fft: int | None = None,
        preemph: float | None = 0.97,
        nfilt: int = 64,
        lowfreq: float = 0,
        highfreq: float | None = None,
        log: bool = True,
        log_zero_guard_type: str = "add",
        log_zero_guard_value: float | str = 2**-24,
        dither: float = _CONSTANT,
        pad_to: int | str = 16,
        max_duration: float = 16.7,
        frame_splicing: int = 1,
        exact_pad: bool = False,
        pad_value: float = 0,
        mag_power: float = 2.0,
        use_grads: bool = False,
        rng: random.Random | None = None,
        nb_augmentation_prob: float = 0.0,
        nb_max_freq: float = 4000,
        mel_norm: str | float | None = "slaney",
        stft_exact_pad: bool = False,
        stft_conv: bool = False,
    ) -> None:
        super().__init__()
        for name, size in (("n_window_size", n_window_size), ("n_window_stride", n_window_stride)):
            if not isinstance(size, int) or size <= 0:
                raise ValueError(f"{name} must be a positive integer, got {size!r}")
        if window not in _WINDOWS:
            raise ValueError(f"window must be one of {', '.join(map(repr, _WINDOWS))}, got {window!r}")
        if log_zero_guard_type not in ("add", "clamp"):
            raise ValueError(f"log_zero_guard_type must be 'add' or 'clamp', got {log_zero_guard_type!r}")
        if pad_to != "max" and (not isinstance(pad_to, int) or pad_to < 0):
            raise ValueError(f"pad_to must be a non-negative integer or 'max', got {pad_to!r}")
        if exact_pad and n_window_stride % 2:
            raise NotImplementedError(f"exact_pad needs an even n_window_stride, got {n_window_stride}")
        if stft_exact_pad or stft_conv:
            raise ValueError("stft_exact_pad and stft_conv were removed from NeMo; use exact_pad")
        self.sample_rate = sample_rate
        self.win_length = n_window_size
        self.hop_length = n_window_stride
        self.n_fft = n_fft or 1 << (n_window_size - 1).bit_length()
        self.exact_pad = exact_pad
        self.stft_pad_amount = (self.n_fft - n_window_stride) // 2 if exact_pad else None
        self.normalize = normalize
        self.log = log
        self.log_zero_guard_type = log_zero_guard_type
        self.log_zero_guard_value = log_zero_guard_value
        self.dither = dither
        self.frame_splicing = frame_splicing
        self.nfilt = nfilt
        self.preemph = preemph
        self.pad_to = pad_to
        self.pad_value = pad_value
        self.mag_power = mag_power
        self.use_grads = use_grads
        self.nb_augmentation_prob = nb_augmentation_prob if nb_max_freq < sample_rate / 2 else 0.0
        self._rng = random.Random() if rng is None else rng
        self._nb_max_fft_bin = int(nb_max_freq / sample_rate * self.n_fft)
        self.register_buffer("window", _WINDOWS[window](n_window_size, periodic=False))
        bank = librosa.mel(
            sr=sample_rate,
            n_fft=self.n_fft,
            n_mels=nfilt,
            fmin=lowfreq,
            fmax=highfreq or sample_rate / 2,
            norm=mel_norm,
        )
        self.register_buffer("fb", torch.from_numpy(bank).unsqueeze(0))
        longest = self._config().frame_count(int(max_duration * sample_rate))
        self.max_length = longest + (pad_to - longest % pad_to if isinstance(pad_to, int) and pad_to else 0)

    @property
    def filter_banks(self) -> torch.Tensor:
        """The buffer ``fb``."""
        return self.fb

    def get_seq_len(self, seq_len: torch.Tensor) -> torch.Tensor:
        """Frames of items of ``seq_len`` samples: ``floor((len + padding - n_fft) / hop)`` (exact_pad: one more)."""
        frames = torch.div(seq_len + self._config().count_offset, self.hop_length, rounding_mode="floor")
        return frames.clamp(min=0).to(torch.int64)

    def forward(
        self, x: torch.Tensor, seq_len: torch.Tensor, linear_spec: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Features ``(batch, nfilt * frame_splicing, frames)`` of waveforms ``(batch, time)``, and each item's frames.

        Args:
            x: float waveforms.
            seq_len: ``(batch,)``: valid samples of each item, of any integer or float dtype.
            linear_spec: return the spectrogram, ``(batch, n_fft // 2 + 1, 1 + time // hop)``, before the filters.
                Frames that lie past an item's end hold 0.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.use_grads):
            lengths = seq_len.to(torch.int64)
            frames = self.get_seq_len(lengths)
            if self.training and self.dither > 0:
                x = x + self.dither * torch.randn_like(x)
            narrow = self._narrowband(x)
            if linear_spec:
                spectrum, _ = extract(x, self._config(linear=True), lengths=lengths, window=self.window)
                if len(narrow):
                    spectrum[narrow, self._nb_max_fft_bin :] = 0
                return spectrum, frames
            features = self._features(x, lengths, self.fb[0])
            if len(narrow):
                bank = self.fb[0].clone()
                bank[:, self._nb_max_fft_bin :] = 0
                features = features.index_copy(0, narrow, self._features(x[narrow], lengths[narrow], bank))
            if self.frame_splicing > 1:
                features = features.repeat(1, self.frame_splicing, 1)
            features = self._normalized(features, frames)
            beyond = torch.arange(features.shape[-1], device=x.device) >= frames[:, None]
            features = features.masked_fill(beyond[:, None], self.pad_value)
            return F.pad(features, (0, self._width(x.shape[-1]) - features.shape[-1]), value=self.pad_value), frames

    def _features(self, x: torch.Tensor, lengths: torch.Tensor, bank: torch.Tensor) -> torch.Tensor:
        return extract(x, self._config(), lengths=lengths, window=self.window, filters=bank.T)[0]

    def _narrowband(self, x: torch.Tensor) -> torch.Tensor:
        """Numbers of the items that lose their high frequencies this time."""
        if not self.training or self.nb_augmentation_prob <= 0:
            return torch.empty(0, dtype=torch.int64)
        drawn = [i for i in range(x.shape[0]) if self._rng.random() < self.nb_augmentation_prob]
        return torch.tensor(drawn, dtype=torch.int64, device=x.device)

    def _normalized(self, features: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
        kind = self.normalize
        if isinstance(kind, Mapping) and "fixed_mean" in kind and "fixed_std" in kind:
            mean, std = (
                torch.as_tensor(kind[name], dtype=features.dtype, device=features.device).reshape(-1, self.nfilt, 1)
                for name in ("fixed_mean", "fixed_std")
            )
            return (features - mean) / std
        if kind == "per_feature":
            return post.normalize(features, lengths=frames, eps=_CONSTANT, ddof=1)
        if kind == "all_features":
            values = features.transpose(1, 2)
            row = values.reshape(values.shape[0], 1, -1)  # frame after frame, so that the valid values come first
            row = post.normalize(row, lengths=frames * features.shape[1], eps=_CONSTANT, ddof=1)
            return row.view(values.shape).transpose(1, 2)
        return features

    def _width(self, samples: int) -> int:
        """Frames returned for a batch of so many samples."""
        if self.pad_to == "max":
            return self.max_length
        width = self._config(linear=True).frame_count(samples)
        return width + -width % self.pad_to if self.pad_to else width

    def _config(self, linear: bool = False) -> MelConfig:
        value = self.log_zero_guard_value
        if isinstance(value, str):
            if value not in ("tiny", "eps"):
                raise ValueError(f"log_zero_guard_value must be a number, 'tiny' or 'eps', got {value!r}")
            value = getattr(torch.finfo(torch.float32), value)
        guard = ("log_offset" if self.log_zero_guard_type == "add" else "log_floor", value)
        return _config(
            self.win_length,
            self.hop_length,
            self.n_fft,
            self.stft_pad_amount,
            self.preemph or 0.0,
            self.mag_power,
            _CONSTANT if self.use_grads else 0.0,
            None if linear else self.nfilt,
            guard if self.log and not linear else None,
        )


@lru_cache(maxsize=64)
def _config(win_length, hop_length, n_fft, center_pad, preemph, power, power_offset, nfilt, guard) -> MelConfig:
    """Window and filters are buffers of the module, so their fields keep neutral values."""
    return MelConfig(
        n_fft=n_fft,
        win_length=win_length,
        hop_length=hop_length,
        center_pad=center_pad,
        pad_mode="constant",
        # NeMo counts one frame less than the centred transform has.
        drop_last=center_pad is None and nfilt is not None,
        window="rectangular",
        preemphasis=preemph,
        preemphasis_scope="signal",
        power=power,
        power_offset=power_offset,
        filters=None if nfilt is None else "mel",
        n_mels=nfilt or 128,
        log=None if guard is None else "ln",
        **({} if guard is None else dict([guard])),
    )
