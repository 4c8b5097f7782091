"""transformers: ``WhisperFeatureExtractor`` on a list of arrays, and the torch function inside it, without packing."""

from __future__ import annotations

import torch

from benchmarks.providers import Provider, Runner


def _extractor(case):
    from transformers import WhisperFeatureExtractor

    c = case.config
    return WhisperFeatureExtractor(
        feature_size=c.n_mels,
        sampling_rate=int(c.sample_rate),
        hop_length=c.hop_length,
        n_fft=c.n_fft,
    )


class Transformers(Provider):
    name, package, module = "transformers", "transformers", "transformers"
    differentiable = False

    def build(self, case, device):
        extractor = _extractor(case)

        def forward(clips):
            return extractor(
                clips,
                sampling_rate=extractor.sampling_rate,
                padding="longest",
                truncation=False,
                return_tensors="pt",
                device=device,
            )["input_features"]

        return Runner(forward, prepare=lambda x: list(x.cpu().numpy()), differentiable=False)


class TransformersCore(Provider):
    name, package, module = "transformers-core", "transformers", "transformers"
    differentiable = False

    def build(self, case, device):
        extractor = _extractor(case)

        def forward(clips):
            return torch.from_numpy(extractor._torch_extract_fbank_features(clips, device))

        return Runner(forward, prepare=lambda x: x.cpu().numpy(), differentiable=False)


PROVIDERS = [Transformers(), TransformersCore()]
