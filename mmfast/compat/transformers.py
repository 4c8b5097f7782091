"""Hugging Face feature extractors that compute with mmfast.

Each class here is a subclass of the one of the same name in ``transformers`` and is used in its place:
``from_pretrained``, ``save_pretrained``, processors, padding, attention masks and ``return_tensors`` are all theirs.
Only the features are computed by `mmfast.mel.extract`. Compared with transformers 5.23.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F

from mmfast.compat import whisper
from mmfast.mel import MelConfig, extract

try:
    import transformers
except ImportError as error:
    raise ImportError("mmfast.compat.transformers needs the package transformers: pip install transformers") from error

__all__ = ["ASTFeatureExtractor", "SeamlessM4TFeatureExtractor", "WhisperFeatureExtractor"]


class WhisperFeatureExtractor(transformers.WhisperFeatureExtractor):
    """``transformers.WhisperFeatureExtractor``: the same arguments, the same outputs.

    The maximum that limits the dynamic range is taken over each item by itself. `extract` is the same computation on
    tensors, for those who have the waveforms on a device already.

    Hugging Face's filters end at 8000 Hz whatever the rate, and halve odd rates downwards; for rates where that makes a
    difference their very filters are used.
    """

    def extract(
        self,
        waveform: torch.Tensor,
        lengths: torch.Tensor | None = None,
        *,
        padding: str = "max_length",
        truncation: bool = True,
        max_length: int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Features of a batch of waveforms; stays on its device, never passes through numpy, differentiable.

        Args:
            waveform: samples ``(..., T)`` at ``self.sampling_rate``, on any device.
            lengths: int tensor of the leading shape: the valid samples of each item. What lies beyond is replaced by
                ``self.padding_value``, so that an item gives what it gives alone.
            padding: ``"max_length"`` fills up to ``max_length`` samples, ``"longest"`` leaves ``T`` as it is.
            truncation: cut to ``max_length``.
            max_length: in samples; default ``self.n_samples``, 30 seconds.

        Returns:
            Features ``(..., feature_size, samples // hop_length)`` in the dtype of ``waveform``; with ``lengths`` a
            pair of them and the number of valid frames of each item, int64: the sum of Hugging Face's attention mask.
        """
        if padding not in ("max_length", "longest"):
            raise ValueError(f"padding must be 'max_length' or 'longest', got {padding!r}")
        size = max_length or self.n_samples
        if truncation:
            waveform = waveform[..., :size]
        total = waveform.shape[-1]
        if lengths is not None:
            if lengths.shape != waveform.shape[:-1]:
                raise ValueError(f"lengths must have shape {tuple(waveform.shape[:-1])}, got {tuple(lengths.shape)}")
            beyond = torch.arange(total, device=waveform.device) >= lengths.unsqueeze(-1)
            waveform = waveform.masked_fill(beyond, self.padding_value)
        if padding == "max_length" and total < size:
            waveform = F.pad(waveform, (0, size - total), value=self.padding_value)
        features = self._features(waveform)
        if lengths is None:
            return features
        frames = (lengths.to(torch.int64).clamp(max=total) + self.hop_length - 1) // self.hop_length
        return features, frames.clamp(max=features.shape[-1])

    def _features(self, waveform: torch.Tensor) -> torch.Tensor:
        if self.dither != 0.0:
            noise = torch.randn(waveform.shape, dtype=waveform.dtype, device=waveform.device)
            waveform = waveform + self.dither * noise
        rate = self.sampling_rate
        config = whisper.config(
            self.feature_size, top_db_scope="item", sample_rate=rate, n_fft=self.n_fft, hop_length=self.hop_length
        )
        filters = None
        if rate < 16000 or rate % 2:
            filters = torch.from_numpy(self.mel_filters).to(waveform.device, torch.float32)
        return extract(waveform, config, filters=filters)

    def _torch_extract_fbank_features(self, waveform: np.ndarray, device: str = "cpu") -> np.ndarray:
        with torch.no_grad():
            return self._features(torch.from_numpy(waveform).to(device, torch.float32)).cpu().numpy()


@lru_cache(maxsize=64)
def _kaldi(n_mels: int, sample_rate: int, window: str, input_scale: float, frame: int, hop: int) -> MelConfig:
    """Kaldi's filter bank as Hugging Face's extractors use it: natural logarithm, no energy."""
    return MelConfig(
        sample_rate=sample_rate,
        n_fft=1 << (frame - 1).bit_length(),
        win_length=frame,
        hop_length=hop,
        framing="valid",
        window=window,
        window_periodic=False,
        window_position="start",
        input_scale=input_scale,
        remove_dc=True,
        preemphasis=0.97,
        n_mels=n_mels,
        f_min=20.0,
        f_max=sample_rate // 2,
        mel_scale="kaldi",
        log="ln",
        log_floor=float(np.finfo(np.float32).eps),
        layout="time_feature",
    )


class SeamlessM4TFeatureExtractor(transformers.SeamlessM4TFeatureExtractor):
    """``transformers.SeamlessM4TFeatureExtractor`` (also Wav2Vec2-BERT): the same arguments, the same outputs."""

    def extract(self, waveform: torch.Tensor, lengths: torch.Tensor | None = None):
        """Log-mel filter bank ``(..., frames, num_mel_bins)`` of waveforms ``(..., T)`` in [-1, 1], on any device.

        This is the step before the normalisation per bin and the stacking of frames. With ``lengths`` a pair of the
        features (0 past an item's end) and the number of frames of each item.
        """
        return extract(
            waveform, _kaldi(self.num_mel_bins, self.sampling_rate, "povey", 2.0**15, 400, 160), lengths=lengths
        )

    def _extract_fbank_features(self, waveform: np.ndarray) -> np.ndarray:
        # Of several channels Hugging Face takes the first.
        mono = waveform[0] if waveform.ndim == 2 else np.squeeze(waveform)
        with torch.no_grad():
            return self.extract(torch.from_numpy(np.ascontiguousarray(mono))).numpy()


class ASTFeatureExtractor(transformers.ASTFeatureExtractor):
    """``transformers.ASTFeatureExtractor``: the same arguments, the same outputs, with or without torchaudio.

    Hugging Face computes with ``torchaudio.compliance.kaldi.fbank`` where torchaudio is installed, with frames of 25 ms
    every 10 ms as here, and otherwise with 400 and 160 samples whatever the rate: the same at 16 kHz.
    """

    def extract(self, waveform: torch.Tensor, lengths: torch.Tensor | None = None):
        """Log-mel filter bank ``(..., frames, num_mel_bins)`` of waveforms ``(..., T)``, on any device.

        Neither padded to ``max_length`` nor normalised. With ``lengths`` a pair of the features (0 past an item's end)
        and the number of frames of each item.
        """
        rate = self.sampling_rate
        config = _kaldi(self.num_mel_bins, rate, "hann", 1.0, int(rate * 0.025), int(rate * 0.01))
        return extract(waveform, config, lengths=lengths)

    def _extract_fbank_features(self, waveform: np.ndarray, max_length: int) -> np.ndarray:
        with torch.no_grad():
            features = self.extract(torch.from_numpy(np.ascontiguousarray(np.squeeze(waveform))))
        return whisper.pad_or_trim(features, max_length, axis=0).numpy()
