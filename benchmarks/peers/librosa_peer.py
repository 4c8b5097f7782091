"""librosa: ``feature.melspectrogram`` on the whole batch, with scipy's FFT on as many threads as torch has."""

from __future__ import annotations

import torch

from benchmarks.providers import Provider, Runner


class Librosa(Provider):
    name, package, module = "librosa", "librosa", "librosa"
    differentiable = False
    devices = ("cpu",)

    def build(self, case, device):
        import librosa
        import numpy as np
        import scipy.fft

        c = case.config
        log = {None: lambda y: y, "ln": lambda y: np.log(y + np.float32(c.log_offset))}[c.log]

        def forward(y):
            with scipy.fft.set_workers(torch.get_num_threads()):
                mel = librosa.feature.melspectrogram(
                    y=y,
                    sr=c.sample_rate,
                    n_fft=c.n_fft,
                    hop_length=c.hop_length,
                    win_length=c.win_length,
                    pad_mode=c.pad_mode,
                    power=c.power,
                    n_mels=c.n_mels,
                    fmin=c.f_min,
                    fmax=c.f_max,
                    htk=c.mel_scale == "htk",
                    norm=c.mel_norm,
                )
            return torch.from_numpy(log(mel))

        return Runner(forward, prepare=lambda x: x.numpy(), differentiable=False)


PROVIDERS = [Librosa()]
