"""nnAudio: ``MelSpectrogram``, a DFT as a convolution, and the logarithm that a user writes after it."""

from __future__ import annotations

from benchmarks.providers import Provider, Runner


class NnAudio(Provider):
    name, package, module = "nnaudio", "nnaudio", "nnAudio"

    def build(self, case, device):
        from nnAudio.features.mel import MelSpectrogram

        c = case.config
        mel = MelSpectrogram(
            sr=int(c.sample_rate),
            n_fft=c.n_fft,
            win_length=c.win_length,
            n_mels=c.n_mels,
            hop_length=c.hop_length,
            pad_mode=c.pad_mode,
            power=c.power,
            htk=c.mel_scale == "htk",
            fmin=c.f_min,
            fmax=c.f_max,
            norm=1 if c.mel_norm == "slaney" else None,
            verbose=False,
        ).to(device)
        return Runner(mel if c.log is None else lambda x: (mel(x) + c.log_offset).log())


PROVIDERS = [NnAudio()]
