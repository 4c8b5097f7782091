"""torchaudio: the transforms, on the whole batch, and ``compliance.kaldi``, which takes one clip at a time."""

from __future__ import annotations

import torch

from benchmarks.providers import Provider, Runner


def pipeline(config) -> torch.nn.Module:
    """The module for ``config``: (..., T) → (..., C, frames)."""
    import torchaudio.transforms as T

    mel = {
        "n_fft": config.n_fft,
        "win_length": config.win_length,
        "hop_length": config.hop_length,
        "n_mels": config.n_mels,
        "f_min": config.f_min,
        "f_max": config.f_max,
        "norm": config.mel_norm,
        "mel_scale": config.mel_scale,
        "power": config.power,
        "pad_mode": config.pad_mode,
    }
    rate = int(config.sample_rate)
    if config.n_mfcc:
        return T.MFCC(rate, config.n_mfcc, norm=config.dct_norm, log_mels=config.log == "ln", melkwargs=mel)
    transform = T.MelSpectrogram(rate, **mel)
    return transform if config.log is None else LogMel(transform, config)


class LogMel(torch.nn.Module):
    """``MelSpectrogram`` and the torch operations that a user writes after it."""

    def __init__(self, transform, config):
        super().__init__()
        self.transform = transform
        self.config = config

    def forward(self, x):
        c = self.config
        y = self.transform(x)
        if c.drop_last:
            y = y[..., :-1]
        y = y.clamp(min=c.log_floor) if c.log_floor else y + c.log_offset
        y = y.log10() if c.log == "log10" else y.log()
        if c.top_db is not None:
            top = y.amax((-2, -1), keepdim=True) if c.top_db_scope == "item" else y.max()
            y = torch.maximum(y, top - c.top_db)
        return (y + c.output_offset) * c.output_scale if c.output_scale != 1 else y


class Torchaudio(Provider):
    name, package, module = "torchaudio", "torchaudio", "torchaudio"

    def build(self, case, device):
        config = case.config
        return Runner(_kaldi(config) if config.mel_scale == "kaldi" else pipeline(config).to(device))


def _kaldi(config):
    import torchaudio.compliance.kaldi as kaldi

    options = {
        "num_mel_bins": config.n_mels,
        "sample_frequency": config.sample_rate,
        "low_freq": config.f_min,
        "dither": 0.0,
    }
    if config.n_mfcc:
        one = kaldi.mfcc
        options |= {"num_ceps": config.n_mfcc, "cepstral_lifter": config.lifter}
    else:
        one = kaldi.fbank
    return lambda x: torch.stack([one(clip[None], **options) for clip in x])


PROVIDERS = [Torchaudio()]
