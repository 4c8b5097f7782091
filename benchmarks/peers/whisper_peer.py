"""openai-whisper: ``log_mel_spectrogram`` on the whole batch, which then shares one maximum."""

from __future__ import annotations

from functools import partial

from benchmarks.providers import Provider, Runner


class Whisper(Provider):
    name, package, module = "openai-whisper", "openai-whisper", "whisper"

    def build(self, case, device):
        from whisper.audio import log_mel_spectrogram

        return Runner(partial(log_mel_spectrogram, n_mels=case.config.n_mels))


PROVIDERS = [Whisper()]
