"""Image and voice matching: written digits find the spoken ones that name them, in any of five languages, and back.

    python examples/image_voice_matching.py --compare --align mmd

A CNN reads the image; MFCC, a small network and temporal pooling read the voice. Both end as unit vectors of one space,
where a cosine says how well they match. They are trained together by a triplet loss, a classifier that both share, and
one of several losses that make the two spaces alike. `image_voice_matching.md` says what came out.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

import numpy as np
import torch
from data import add_noise, spoken_digits, written_digits
from encoders import LOG_MEL, DigitTokens, VoiceTokens, thirds
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize, relu
from training import Run, System, confusion, main, save
from training import Settings as Common

import mmfast
from mmfast.kernels import MultiGaussian
from mmfast.nn import TemporalPooling, WeightedFusion

POOLS = ("mean", "std", "attentive")


@dataclass(frozen=True)
class Settings(Common):
    """``weight`` of the alignment; ``margin`` of the triplet loss; ``copies`` made of each recording."""

    steps: int = 150
    batch: int = 192
    weight: float = 0.5
    margin: float = 0.3
    dim: int = 64
    copies: int = 24


class Model(nn.Module):
    """Images and voices → unit vectors of one space, and a classifier for both."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.see = DigitTokens(dim)
        self.look = nn.Linear(16 * dim, dim)
        self.hear = VoiceTokens(dim, replace(LOG_MEL, n_mfcc=20))
        self.pools = nn.ModuleList(TemporalPooling(name, 3 * dim) for name in POOLS)
        self.project = nn.ModuleList(nn.Linear(3 * dim, dim) for _ in POOLS)
        self.fuse = WeightedFusion(len(POOLS), dim)
        self.classify = nn.Linear(dim, 10)

    def image(self, images: Tensor) -> Tensor:
        return normalize(self.look(self.see(images).flatten(1)), dim=1)

    def voice(self, waves: Tensor, lengths: Tensor) -> Tensor:
        tokens, count = self.hear(waves, lengths)
        tokens = (tokens[..., None] * thirds(count, tokens.shape[1])[:, :, None]).flatten(2)  # each third by itself
        pooled = [p(pool(tokens, count)) for p, pool in zip(self.project, self.pools, strict=True)]
        return normalize(self.fuse(pooled), dim=1)


def alignment(kind: str, image: Tensor, voice: Tensor, model: Model) -> Tensor:
    """How unlike the two spaces are, by one of several measures."""
    if kind == "mmd":  # of distributions, pairs or not (Gretton et al. 2012); the mean of five kernels
        return mmfast.mmd2(image, voice, MultiGaussian(bandwidth="dan"), "unbiased") / 5
    if kind == "cka":  # of the geometry among the items of a batch
        return 1 - mmfast.cka(image, voice)
    if kind == "feature":  # of mean and spread of each feature (Salimans et al. 2016)
        return (image.mean(0) - voice.mean(0)).square().sum() + (image.std(0) - voice.std(0)).square().sum()
    if kind == "js":  # Jensen–Shannon, of what the classifier makes of the two of a pair
        p, q = (model.classify(10 * x).log_softmax(1) for x in (image, voice))
        m = torch.logaddexp(p, q) - np.log(2)
        return 0.5 * ((p.exp() * (p - m)).sum(1) + (q.exp() * (q - m)).sum(1)).mean()
    return image.new_zeros(())


def triplet(anchor: Tensor, other: Tensor, labels: Tensor, margin: float) -> Tensor:
    """Each pair is to be closer, by a margin, than its first is to what has another label; mean over what is not."""
    cosine = anchor @ other.mT
    short = relu(margin + cosine - cosine.diagonal()[:, None]) * (labels[:, None] != labels)
    return short.sum() / (short > 0).sum().clamp(min=1)


class Matching(System):
    """Pairs of a written and a spoken digit of the same value."""

    option = "align"
    variants = ("mmd", "cka", "feature", "js", "none")
    defaults = variants

    def __init__(self, settings: Settings, variant: str) -> None:
        super().__init__(settings, variant)
        (self.written, self.unseen), (self.spoken, self.unheard) = written_digits(), spoken_digits(settings.copies)
        self.plain, _ = spoken_digits(1)
        self.of_label = [(self.written.labels == digit).nonzero()[:, 0] for digit in range(10)]
        self.model = Model(settings.dim)
        same = self.unseen.labels[:, None] == self.unheard.labels
        self.chance = dict(
            zip(("image → voice R@1", "voice → image R@1"), (same.float().mean().item(),) * 2, strict=True)
        )

    def loss(self, step: int) -> Tensor:
        rows = self.rows(len(self.spoken.labels))
        labels = self.spoken.labels[rows]
        draws = torch.rand(len(rows), generator=self.generator)
        pick = [
            self.of_label[d][int(r * len(self.of_label[d]))]
            for d, r in zip(labels.tolist(), draws.tolist(), strict=True)
        ]
        image = self.model.image(add_noise(self.written.images[torch.stack(pick)], 10.0, self.generator))
        voice = self.model.voice(self.spoken.waves[rows], self.spoken.lengths[rows])
        margin = self.settings.margin
        task = triplet(image, voice, labels, margin) + triplet(voice, image, labels, margin)
        for x in (image, voice):
            task = task + 0.5 * cross_entropy(self.model.classify(10 * x), labels)
        return task + self.settings.weight * alignment(self.variant, image, voice, self.model)

    def cosines(self) -> Tensor:
        """``(540, 30)``: of the images and the voices held out."""
        image, voice = self.model.image(self.unseen.images), self.model.voice(self.unheard.waves, self.unheard.lengths)
        return image @ voice.mT

    def evaluate(self) -> dict[str, float]:
        cosine, same = self.cosines(), self.unseen.labels[:, None] == self.unheard.labels
        known = self.model.image(self.unseen.images) @ self.model.voice(self.plain.waves, self.plain.lengths).mT
        return {
            "image → voice R@1": first(cosine, same),
            "voice → image R@1": first(cosine.mT, same.mT),
            "image → voice mAP": mean_average_precision(cosine, same),
            "voice → image mAP": mean_average_precision(cosine.mT, same.mT),
            "image → known voice R@1": first(known, self.unseen.labels[:, None] == self.plain.labels),
        }

    def picture(self) -> dict[str, np.ndarray]:
        cosine = self.cosines()
        means = torch.stack([cosine[self.unseen.labels == digit].mean(0) for digit in range(10)])
        best = self.unseen.images[cosine.argsort(0, descending=True)[:5].mT, 0]  # (30, 5, 8, 8)
        return {
            "means": means.numpy(),
            "best": best.numpy(),
            "names": np.array(
                [
                    f"{language} {digit}"
                    for language, digit in zip(self.unheard.languages, self.unheard.labels.tolist(), strict=True)
                ]
            ),
        }

    @staticmethod
    def draw(runs: list[Run], path) -> None:
        """Cosines of digits and voices, and the five images nearest to each voice, of the first run."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(11, 6.2), layout="constrained")
        top, bottom = figure.subfigures(2, 1, height_ratios=[2, 3])
        picture = runs[0].picture
        axis = top.subplots()
        confusion(axis, picture["means"].clip(0, 1), [str(d) for d in range(10)], picture["names"].tolist())
        axis.set_ylabel("written")
        axis.set_title(f"mean cosine with each voice held out ({runs[0].name})", fontsize=9)
        axes = bottom.subplots(5, 30)
        for number, (name, images) in enumerate(zip(picture["names"], picture["best"], strict=True)):
            axes[0, number].set_title(name, fontsize=7)
            for place, image in enumerate(images):
                axes[place, number].imshow(image, cmap="gray_r")
                axes[place, number].axis("off")
        bottom.suptitle("the five images held out that are nearest to each voice", fontsize=9)
        save(figure, path)


def first(scores: Tensor, same: Tensor) -> float:
    """The share of rows whose highest score is a match."""
    return same.gather(1, scores.argmax(1, keepdim=True)).float().mean().item()


def mean_average_precision(scores: Tensor, same: Tensor) -> float:
    """Over the rows: the mean precision at the places of their matches."""
    matches = same.gather(1, scores.argsort(1, descending=True)).float()
    precision = matches.cumsum(1) / torch.arange(1, matches.shape[1] + 1)
    return ((precision * matches).sum(1) / matches.sum(1)).mean().item()


if __name__ == "__main__":
    sys.exit(main(Matching, Settings, __doc__))
