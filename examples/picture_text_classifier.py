"""Report-and-image classifier: the group of an emoji from its picture and its name, by three ways of fusing the two.

    python examples/picture_text_classifier.py

A small CNN reads the picture, words made of letter n-grams read the name. Their features are concatenated, added with
learned weights, or first attend to each other, the words to the parts of the picture and the parts to the words; each
modality alone is shown beside.
Whole families of emoji are held out. `picture_text_classifier.md` says what came out.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import numpy as np
import torch
from data import Emoji, emoji
from encoders import PictureTokens, WordTokens, augmented
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from training import Run, System, confusion, main, save, shares
from training import Settings as Common

from mmfast.nn import CrossAttentionFusion, TemporalPooling, WeightedFusion


@dataclass(frozen=True)
class Settings(Common):
    """``dim`` features of each token."""

    steps: int = 200
    batch: int = 96
    dim: int = 64


class Model(nn.Module):
    """Pictures and names → groups; ``fusion`` as in `Classifier.variants`."""

    def __init__(self, fusion: str, groups: int, dim: int) -> None:
        super().__init__()
        self.fusion = fusion
        self.see, self.read = PictureTokens(dim), WordTokens(dim)
        self.pool = TemporalPooling(("mean", "max"))
        self.picture, self.text = (nn.Sequential(nn.Linear(2 * dim, dim), nn.LayerNorm(dim)) for _ in range(2))
        if fusion in ("weighted", "attention"):
            self.weigh = WeightedFusion(2, dim)
        if fusion == "attention":
            self.attend = nn.ModuleList(CrossAttentionFusion(dim, 4, [dim]) for _ in range(2))
        self.classify = nn.Sequential(nn.Dropout(0.3), nn.Linear((2 if fusion == "concat" else 1) * dim, groups))

    def forward(self, pictures: Tensor, words: Tensor, lengths: Tensor) -> Tensor:
        seen, read = self.see(pictures), self.read(words, lengths)
        if self.fusion == "attention":
            seen, read = self.attend[0](seen, [read], lengths=[lengths]), self.attend[1](read, [seen])
        picture, text = self.picture(self.pool(seen)), self.text(self.pool(read, lengths))
        if self.fusion == "concat":
            return self.classify(torch.cat([picture, text], 1))
        if self.fusion in ("weighted", "attention"):
            return self.classify(self.weigh([picture, text]))
        return self.classify(picture if self.fusion == "picture" else text)


class Classifier(System):
    """The eight groups of emoji."""

    option = "fusion"
    variants = ("concat", "weighted", "attention", "picture", "text")
    defaults = variants

    def __init__(self, settings: Settings, variant: str) -> None:
        super().__init__(settings, variant)
        self.known, self.unknown = emoji()
        self.groups = self.known.group_names
        self.model = Model(variant, len(self.groups), settings.dim)
        most = self.known.groups.bincount().argmax()
        self.chance = {
            "accuracy": (self.unknown.groups == most).float().mean().item(),
            "mean over groups": 1 / len(self.groups),
        }

    def scores(self, some: Emoji, pictures: Tensor) -> Tensor:
        return self.model(pictures, some.words, some.lengths)

    def loss(self, step: int) -> Tensor:
        some = self.known[self.rows(len(self.known.names))]
        pictures = augmented(some.images, self.generator)
        return cross_entropy(self.scores(some, pictures), some.groups, label_smoothing=0.1)

    def evaluate(self) -> dict[str, float]:
        matrix = self.picture()["confusion"]
        counts = self.unknown.groups.bincount(minlength=len(self.groups)).numpy()
        right = matrix.diagonal()
        return {"accuracy": float((right * counts).sum() / counts.sum()), "mean over groups": float(right.mean())}

    def picture(self) -> dict[str, np.ndarray]:
        found = self.scores(self.unknown, self.unknown.images).argmax(1)
        matrix = shares(self.unknown.groups, found, len(self.groups))
        return {"confusion": matrix, "names": np.array(self.groups)}

    @staticmethod
    def draw(runs: list[Run], path) -> None:
        """The confusion matrix of each fusion."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(3.2 * len(runs) + 1, 4.2), layout="constrained")
        for axis, run in zip(figure.subplots(1, len(runs), squeeze=False, sharey=True)[0], runs, strict=True):
            names = run.picture["names"].tolist()
            title = f"{run.name}: {100 * run.quality['accuracy']:.1f} %"
            confusion(axis, run.picture["confusion"], names, names, title)
        save(figure, path)


if __name__ == "__main__":
    sys.exit(main(Classifier, Settings, __doc__))
