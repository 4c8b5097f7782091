"""Raw image and audio classifier: a digit from a noisy image and a noisy voice, fused in one of three ways.

    python examples/image_audio_classifier.py --compare

Three streams of tokens: the image, the voice's mel spectrum, and its bare waveform. The mel front end is the first
layer of the model, and its filters learn with the rest.

    parallel      the image attends to spectrum and waveform at once, by one softmax over both
    sequential    the image attends to the spectrum, and what comes out to the waveform
    tree          the spectrum attends to the waveform, and the image to what comes out

Writers and speakers are held out. `image_audio_classifier.md` says what came out.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import numpy as np
import torch
from data import add_noise, spoken_digits, written_digits
from encoders import DigitTokens, VoiceTokens, WaveTokens
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from training import Run, System, confusion, main, save, shares
from training import Settings as Common

from mmfast.nn import CrossAttentionFusion, TemporalPooling


@dataclass(frozen=True)
class Settings(Common):
    """``image_snr`` and ``voice_snr``: signal over noise, in dB."""

    steps: int = 300
    batch: int = 128
    dim: int = 64
    copies: int = 24
    image_snr: float = -2.0
    voice_snr: float = 10.0


class Model(nn.Module):
    """Images and voices → digits; ``fusion`` as in `Classifier.variants`."""

    def __init__(self, fusion: str, dim: int) -> None:
        super().__init__()
        self.fusion = fusion
        self.see, self.hear, self.sense = DigitTokens(dim), VoiceTokens(dim, trainable_filters=True), WaveTokens(dim)
        sources = {"parallel": [[dim, dim]], "sequential": [[dim], [dim]], "tree": [[dim], [dim]]}
        self.attend = nn.ModuleList(CrossAttentionFusion(dim, 4, dims) for dims in sources.get(fusion, []))
        self.pool = TemporalPooling(("mean", "max"))
        self.classify = nn.Sequential(nn.LayerNorm(2 * dim), nn.Dropout(0.2), nn.Linear(2 * dim, 10))

    def forward(self, images: Tensor, waves: Tensor, lengths: Tensor) -> Tensor:
        if self.fusion == "image":
            return self.classify(self.pool(self.see(images)))
        spectrum, count = self.hear(waves, lengths)
        if self.fusion == "voice":
            return self.classify(self.pool(spectrum, count))
        wave, wave_count = self.sense(waves, lengths)
        x = self.see(images)
        if self.fusion == "parallel":
            x = self.attend[0](x, [spectrum, wave], lengths=[count, wave_count])
        elif self.fusion == "sequential":
            x = self.attend[0](x, [spectrum], lengths=[count])
            x = self.attend[1](x, [wave], lengths=[wave_count])
        else:
            heard = self.attend[0](spectrum, [wave], lengths=[wave_count])
            x = self.attend[1](x, [heard], lengths=[count])
        return self.classify(self.pool(x))


class Classifier(System):
    """A written and a spoken digit of one value, both under noise, as one of ten."""

    option = "fusion"
    variants = ("parallel", "sequential", "tree", "image", "voice")
    defaults = variants

    def __init__(self, settings: Settings, variant: str) -> None:
        super().__init__(settings, variant)
        (self.written, unseen), (self.spoken, unheard) = written_digits(), spoken_digits(settings.copies)
        self.model = Model(variant, settings.dim)
        self.chance = {"accuracy": 0.1}
        # Each image held out with one of the three voices held out that say it, each equally often; noise once for all.
        fixed = torch.Generator().manual_seed(0)
        voices = unseen.labels + 10 * (torch.arange(len(unseen.labels)) % 3)
        self.labels, self.lengths = unseen.labels, unheard.lengths[voices]
        self.images = add_noise(unseen.images, settings.image_snr, fixed)
        self.waves = add_noise(unheard.waves[voices], settings.voice_snr, fixed)
        assert (unheard.labels[voices] == unseen.labels).all()

    def loss(self, step: int) -> Tensor:
        rows = self.rows(len(self.written.labels))
        labels = self.written.labels[rows]
        # The copies of recordings go language by language, digit by digit.
        languages, copy = torch.randint(5, rows.shape, generator=self.generator), self.settings.copies
        take = torch.randint(copy, rows.shape, generator=self.generator)
        voices = (languages * 10 + labels) * copy + take
        images = add_noise(self.written.images[rows], self.settings.image_snr, self.generator)
        waves = add_noise(self.spoken.waves[voices], self.settings.voice_snr, self.generator)
        return cross_entropy(self.model(images, waves, self.spoken.lengths[voices]), labels, label_smoothing=0.1)

    def found(self) -> Tensor:
        return self.model(self.images, self.waves, self.lengths).argmax(1)

    def evaluate(self) -> dict[str, float]:
        return {"accuracy": (self.found() == self.labels).float().mean().item()}

    def picture(self) -> dict[str, np.ndarray]:
        return {"confusion": shares(self.labels, self.found(), 10)}

    @staticmethod
    def draw(runs: list[Run], path) -> None:
        """The confusion matrix of each fusion."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(3 * len(runs), 3.2), layout="constrained")
        digits = [str(digit) for digit in range(10)]
        for axis, run in zip(figure.subplots(1, len(runs), squeeze=False)[0], runs, strict=True):
            confusion(axis, run.picture["confusion"], digits, digits, f"{run.name}: {100 * run.curve[-1]:.1f} %")
        save(figure, path)


if __name__ == "__main__":
    sys.exit(main(Classifier, Settings, __doc__))
