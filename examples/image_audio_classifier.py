"""Raw image and audio classifier: a digit from a noisy image and a noisy voice, fused in one of three ways.

    python examples/image_audio_classifier.py --compare

Three streams of tokens: the image, the voice's mel spectrum, and its bare waveform. The mel front end is the first
layer of the model, and its filters learn with the rest.

    parallel      the image attends to spectrum and waveform at once, by one softmax over both
    sequential    the image attends to the spectrum, and what comes out to the waveform
    tree          the spectrum attends to the waveform, and the image to what comes out

Writers are held out, and some of the speakers. `image_audio_classifier.md` says what came out.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import numpy as np
from data import Pairs, held_out_pairs, noisy_pairs, spoken_digits, written_digits
from encoders import DigitTokens, VoiceTokens, WaveTokens
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from training import Run, System, confusion, main, save, shares
from training import Settings as Common

from mmfast.nn import CrossAttentionFusion, TemporalPooling


@dataclass(frozen=True)
class Settings(Common):
    """``image_snr`` and ``voice_snr``: signal over noise, in dB."""

    steps: int = 150
    batch: int = 96
    dim: int = 64
    copies: int = 24
    image_snr: float = 0.0
    voice_snr: float = 0.0


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
        self.written, self.spoken = written_digits()[0], spoken_digits(settings.copies)[0]
        self.pairs = held_out_pairs((settings.image_snr, settings.voice_snr))
        self.model = Model(variant, settings.dim)
        self.chance = dict.fromkeys(self.pairs, 0.1)

    def loss(self, step: int) -> Tensor:
        chosen, rows = self.settings, self.rows(len(self.written.labels))
        ratios = chosen.image_snr, chosen.voice_snr
        images, waves, voices = noisy_pairs(self.written, self.spoken, rows, chosen.copies, ratios, self.generator)
        scores = self.model(images, waves, self.spoken.lengths[voices])
        return cross_entropy(scores, self.written.labels[rows], label_smoothing=0.1)

    def found(self, pairs: Pairs) -> Tensor:
        return self.model(pairs.noisy, pairs.waves, pairs.lengths).argmax(1)

    def evaluate(self) -> dict[str, float]:
        return {name: (self.found(p) == p.labels).float().mean().item() for name, p in self.pairs.items()}

    def picture(self) -> dict[str, np.ndarray]:
        return {name: shares(pairs.labels, self.found(pairs), 10) for name, pairs in self.pairs.items()}

    @staticmethod
    def draw(runs: list[Run], path) -> None:
        """The confusion matrices of each fusion, with known and with new speakers."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(2.8 * len(runs), 5.6), layout="constrained")
        digits = [str(digit) for digit in range(10)]
        for column, run in zip(figure.subplots(2, len(runs), squeeze=False).T, runs, strict=True):
            for axis, (name, matrix) in zip(column, run.picture.items(), strict=True):
                title = f"{run.variant}, {name}: {100 * run.quality[name]:.1f} %"
                confusion(axis, matrix, digits, digits, title)
        save(figure, path)


if __name__ == "__main__":
    sys.exit(main(Classifier, Settings, __doc__))
