"""Cross-encoder: image and voice read each other by a similarity matrix, and the outcome is fed back to their encoders.

    python examples/cross_encoder.py --compare

The tokens of a noisy image and of a noisy voice are compared, each with each; the softmax of that similarity matrix
over its rows weights the voice for each part of the image, and over its columns the image for each part of the voice.
Both are pooled and fused with learned weights, and the fused vector conditions both encoders in the next round. From
it two decoders make the clean image and the clean spectrum, and a classifier the digit. One round is a cross-encoder
without feedback. `cross_encoder.md` says what came out.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import numpy as np
import torch
from data import held_out_pairs, noisy_pairs, spoken_digits, written_digits
from encoders import LOG_MEL, DigitTokens, VoiceTokens
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool1d, cross_entropy, mse_loss
from training import Run, System, main, save
from training import Settings as Common

import mmfast
from mmfast.fusion import Source
from mmfast.mel import extract
from mmfast.nn import TemporalPooling, WeightedFusion


@dataclass(frozen=True)
class Settings(Common):
    """``weight`` of the reconstruction; ``image_snr`` and ``voice_snr``: signal over noise, in dB."""

    steps: int = 150
    batch: int = 96
    dim: int = 64
    copies: int = 24
    weight: float = 1.0
    image_snr: float = 0.0
    voice_snr: float = 0.0


class Similarity(nn.Module):
    """Two sequences of tokens read each other: S = Q Kᵀ / √C of projected tokens, softmax over its rows and columns.

    ``x`` gets softmax(S) V_y, ``y`` gets softmax(Sᵀ) V_x; both are `mmfast.cross_attention`, with one S between them.
    """

    def __init__(self, dim: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.keys, self.values, self.out = (nn.ModuleList(nn.Linear(dim, dim) for _ in range(2)) for _ in range(3))
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2))

    def forward(self, x: Tensor, y: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        x_n, y_n = self.norms[0](x), self.norms[1](y)
        k_x, k_y, v_x, v_y = (
            layer(z).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for layer, z in zip((*self.keys, *self.values), (x_n, y_n, x_n, y_n), strict=True)
        )
        to_x = mmfast.cross_attention(k_x, [Source(k_y, v_y, lengths=count)])
        to_y = mmfast.cross_attention(k_y, [(k_x, v_x)])
        to_x, to_y = (out(a.transpose(1, 2).flatten(2)) for out, a in zip(self.out, (to_x, to_y), strict=True))
        return x + to_x, y + to_y


class Model(nn.Module):
    """Noisy image and voice → scores, clean image, clean spectrum."""

    def __init__(self, rounds: int, dim: int) -> None:
        super().__init__()
        self.rounds = rounds
        self.see, self.hear = DigitTokens(dim), VoiceTokens(dim)
        self.feedback = nn.ModuleList(nn.Linear(dim, 2 * dim) for _ in range(2))
        self.refine = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
            for _ in range(2)
        )
        self.compare = Similarity(dim)
        self.pool = TemporalPooling(("mean", "max"))
        self.project = nn.ModuleList(nn.Sequential(nn.Linear(2 * dim, dim), nn.LayerNorm(dim)) for _ in range(2))
        self.fuse = WeightedFusion(2, dim)
        self.classify = nn.Linear(dim, 10)
        self.to_image = nn.Sequential(nn.Linear(dim, 128), nn.ReLU(), nn.Linear(128, 64), nn.Sigmoid())
        self.to_spectrum = nn.Sequential(nn.Linear(dim, 128), nn.ReLU(), nn.Linear(128, LOG_MEL.n_mels * 12))

    def forward(self, images: Tensor, waves: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        image = self.see(images)
        voice, count = self.hear(waves, lengths)
        fused = torch.zeros(len(images), image.shape[2])
        for _ in range(self.rounds):
            image, voice = (
                x + refine(x * (1 + scale) + shift)
                for x, refine, (scale, shift) in zip(
                    (image, voice),
                    self.refine,
                    (layer(fused)[:, None].chunk(2, 2) for layer in self.feedback),
                    strict=True,
                )
            )
            image, voice = self.compare(image, voice, count)
            pooled = self.pool(image), self.pool(voice, count)
            fused = self.fuse([project(x) for project, x in zip(self.project, pooled, strict=True)])
        spectrum = self.to_spectrum(fused).view(-1, LOG_MEL.n_mels, 12)
        return self.classify(fused), self.to_image(fused).view(-1, 1, 8, 8), spectrum


class CrossEncoder(System):
    """A written and a spoken digit of one value, both under noise, as one of ten and without the noise."""

    option = "rounds"
    variants = ("1", "2", "3")
    defaults = ("1", "2")

    def __init__(self, settings: Settings, variant: str) -> None:
        super().__init__(settings, variant)
        self.written, self.spoken = written_digits()[0], spoken_digits(settings.copies)[0]
        self.spectra = spectra(self.spoken.waves, self.spoken.lengths)
        self.pairs = held_out_pairs((settings.image_snr, settings.voice_snr))
        self.rebuilt = {name: spectra(pairs.clean, pairs.lengths) for name, pairs in self.pairs.items()}
        self.model = Model(int(variant), settings.dim)
        self.chance = dict.fromkeys(self.pairs, 0.1)
        for name, pairs in self.pairs.items():  # a guess of what to rebuild: the mean
            image, spectrum = self.written.images.mean(0), self.spectra.mean(0)
            self.chance[f"image error, {name}"] = (pairs.images - image).square().mean().item()
            self.chance[f"spectrum error, {name}"] = (self.rebuilt[name] - spectrum).square().mean().item()

    def loss(self, step: int) -> Tensor:
        chosen, rows = self.settings, self.rows(len(self.written.labels))
        ratios = chosen.image_snr, chosen.voice_snr
        images, waves, voices = noisy_pairs(self.written, self.spoken, rows, chosen.copies, ratios, self.generator)
        scores, image, spectrum = self.model(images, waves, self.spoken.lengths[voices])
        rebuilt = 10 * mse_loss(image, self.written.images[rows]) + mse_loss(spectrum, self.spectra[voices])
        return cross_entropy(scores, self.written.labels[rows], label_smoothing=0.1) + self.settings.weight * rebuilt

    def evaluate(self) -> dict[str, float]:
        accuracies, errors = {}, {}
        for name, pairs in self.pairs.items():
            scores, image, spectrum = self.model(pairs.noisy, pairs.waves, pairs.lengths)
            accuracies[name] = (scores.argmax(1) == pairs.labels).float().mean().item()
            errors[f"image error, {name}"] = mse_loss(image, pairs.images).item()
            errors[f"spectrum error, {name}"] = mse_loss(spectrum, self.rebuilt[name]).item()
        return {**accuracies, **errors}

    def picture(self) -> dict[str, np.ndarray]:
        pairs = self.pairs["new speakers"]
        some = torch.stack([(pairs.labels == digit).nonzero()[digit % 3, 0] for digit in range(10)])
        _, image, spectrum = self.model(pairs.noisy[some], pairs.waves[some], pairs.lengths[some])
        noisy, clean = (spectra(waves[some], pairs.lengths[some]) for waves in (pairs.waves, pairs.clean))
        parts = (pairs.noisy[some, 0], image[:, 0], pairs.images[some, 0], noisy, spectrum, clean)
        names = ("noisy image", "rebuilt image", "clean image", "noisy voice", "rebuilt voice", "clean voice")
        return {name: part.numpy() for name, part in zip(names, parts, strict=True)}

    @staticmethod
    def draw(runs: list[Run], path) -> None:
        """Noisy, rebuilt and clean images and spectra of ten pairs that were held out, of the last run."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(10, 6.5), layout="constrained")
        axes = figure.subplots(len(runs[-1].picture), 10)
        for row, (name, pictures) in zip(axes, runs[-1].picture.items(), strict=True):
            image = pictures.shape[1] == 8
            limits = {"cmap": "gray_r", "vmin": 0, "vmax": 1} if image else {"vmin": -2, "vmax": 2, "origin": "lower"}
            for axis, picture in zip(row, pictures, strict=True):
                axis.imshow(picture, aspect="equal" if image else "auto", **limits)
                axis.set(xticks=[], yticks=[])
            row[0].set_ylabel(name, fontsize=8)
        figure.suptitle(f"other writers, new speakers ({runs[-1].variant} rounds)", fontsize=9)
        save(figure, path)


def spectra(waves: Tensor, lengths: Tensor) -> Tensor:
    """``(n, 40, 12)``: log mel spectra at twelve times of each clip, each clip with mean 0 and variance 1."""
    features, frames = extract(waves, LOG_MEL, lengths=lengths)
    x = torch.stack([adaptive_avg_pool1d(x[:, :n], 12) for x, n in zip(features, frames.tolist(), strict=True)])
    return (x - x.mean((1, 2), keepdim=True)) / x.std((1, 2), keepdim=True)


if __name__ == "__main__":
    sys.exit(main(CrossEncoder, Settings, __doc__))
