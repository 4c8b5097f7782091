"""Image–text matching: emoji find their names and back, with aligned features, weighted fusion and several tasks.

    python examples/picture_text_matching.py --compare --aux both

Pictures and names become unit vectors of one space, where those that belong together are to be nearer than the rest
of the batch. A classifier of their weighted fusion is the second task. The loss is task + λ · auxiliary; what the
auxiliary part is made of is compared:

    mmd, cka    features of the two modalities get the same distribution, or the same geometry
    transfer    what both modalities know together teaches each of them alone (distillation)
    both        mmd and transfer

Whole families of emoji are held out. `picture_text_matching.md` says what came out.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import numpy as np
import torch
from data import emoji
from encoders import PictureTokens, WordTokens, augmented
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, normalize
from training import Run, System, main, save
from training import Settings as Common

import mmfast
from mmfast.kernels import MultiGaussian
from mmfast.nn import MMDLoss, TemporalPooling, WeightedFusion


@dataclass(frozen=True)
class Settings(Common):
    """``weight`` λ of the auxiliary loss; ``heat`` of the teacher's scores."""

    steps: int = 200
    batch: int = 192
    dim: int = 64
    weight: float = 0.5
    heat: float = 2.0


class Model(nn.Module):
    """Pictures and names → unit vectors of one space; their weighted fusion → groups."""

    def __init__(self, groups: int, dim: int) -> None:
        super().__init__()
        self.see, self.read = PictureTokens(dim), WordTokens(dim)
        self.pool = TemporalPooling(("mean", "max"))
        self.picture_out, self.text_out = (
            nn.Sequential(nn.LayerNorm(2 * dim), nn.Dropout(0.2), nn.Linear(2 * dim, dim)) for _ in range(2)
        )
        self.fuse = WeightedFusion(2, dim)
        self.classifier = nn.Linear(dim, groups)
        self.heat = nn.Parameter(torch.tensor(2.3))  # log of the scale of the cosines

    def picture(self, pictures: Tensor) -> Tensor:
        return normalize(self.picture_out(self.pool(self.see(pictures))), dim=1)

    def text(self, words: Tensor, lengths: Tensor) -> Tensor:
        return normalize(self.text_out(self.pool(self.read(words, lengths), lengths)), dim=1)

    def classify(self, picture: Tensor, text: Tensor, there: tuple[bool, bool] = (True, True)) -> Tensor:
        """Scores of the groups from both modalities or from one, by the same weights."""
        present = torch.tensor(there).expand(len(picture), 2)
        return self.classifier(10 * self.fuse([picture, text], present))


class Matching(System):
    """Emoji and their names."""

    option = "aux"
    variants = ("none", "mmd", "cka", "transfer", "both")
    defaults = variants

    def __init__(self, settings: Settings, variant: str) -> None:
        super().__init__(settings, variant)
        self.known, self.unknown = emoji()
        self.model = Model(len(self.known.group_names), settings.dim)
        self.mmd = MMDLoss(MultiGaussian(bandwidth="dan"))
        count, most = len(self.unknown.names), self.known.groups.bincount().argmax()
        majority = (self.unknown.groups == most).float().mean().item()
        self.chance = {
            **dict.fromkeys(("picture → name R@5", "name → picture R@5"), 5 / count),
            "median rank": (count + 1) / 2,
            **dict.fromkeys(("group of both", "of picture alone", "of name alone"), majority),
        }

    def loss(self, step: int) -> Tensor:
        model, weight = self.model, self.settings.weight
        some = self.known[torch.randperm(len(self.known.names), generator=self.generator)[: self.settings.batch]]
        picture = model.picture(augmented(some.images, self.generator))
        text = model.text(some.words, some.lengths)
        scores = model.heat.exp() * picture @ text.mT
        pairs = torch.arange(len(scores))
        task = 0.5 * (cross_entropy(scores, pairs) + cross_entropy(scores.mT, pairs))
        both, alone = model.classify(picture, text), self.alone(picture, text)
        task = task + sum(cross_entropy(x, some.groups, label_smoothing=0.1) for x in (both, *alone)) / 3
        if self.variant in ("mmd", "both"):
            task = task + weight * self.mmd(picture, text) / 5  # the mean of five kernels
        if self.variant == "cka":
            task = task + weight * (1 - mmfast.cka(picture, text))
        if self.variant in ("transfer", "both"):
            heat = self.settings.heat
            teacher = (both.detach() / heat).log_softmax(1)
            for student in alone:
                task = task + weight * heat**2 * kl_div(
                    (student / heat).log_softmax(1), teacher, log_target=True, reduction="batchmean"
                )
        return task

    def alone(self, picture: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(self.model.classify(picture, text, there) for there in ((True, False), (False, True)))

    def embeddings(self) -> tuple[Tensor, Tensor]:
        return self.model.picture(self.unknown.images), self.model.text(self.unknown.words, self.unknown.lengths)

    def evaluate(self) -> dict[str, float]:
        picture, text = self.embeddings()
        cosine = picture @ text.mT
        ranks = [1 + (c > c.diagonal()[:, None]).sum(1) for c in (cosine, cosine.mT)]
        right = [
            (x.argmax(1) == self.unknown.groups).float().mean().item()
            for x in (self.model.classify(picture, text), *self.alone(picture, text))
        ]
        return {
            "picture → name R@5": (ranks[0] <= 5).float().mean().item(),
            "name → picture R@5": (ranks[1] <= 5).float().mean().item(),
            "median rank": torch.cat(ranks).float().median().item(),
            "group of both": right[0],
            "of picture alone": right[1],
            "of name alone": right[2],
        }

    def picture(self) -> dict[str, np.ndarray]:
        picture, text = self.embeddings()
        some = torch.randperm(len(text), generator=torch.Generator().manual_seed(1))[:12]
        best = (text[some] @ picture.mT).argsort(1, descending=True)[:, :6]
        images = self.unknown.images.permute(0, 2, 3, 1)
        names = np.array([self.unknown.names[i] for i in some.tolist()])
        return {"names": names, "best": images[best].numpy(), "right": (best == some[:, None]).numpy()}

    @staticmethod
    def draw(runs: list[Run], path) -> None:
        """The six pictures nearest to each of twelve names, all held out, of the last run; the right one is framed."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(11, 6), layout="constrained")
        picture = runs[-1].picture
        axes = figure.subplots(6, 14, gridspec_kw={"width_ratios": [2.5, *[1] * 6] * 2})
        for number, name in enumerate(picture["names"]):
            row = axes[number % 6, 7 * (number // 6) :][:7]
            row[0].text(1, 0.5, name, ha="right", va="center", fontsize=8, wrap=True)
            for axis, image, right in zip(row[1:], picture["best"][number], picture["right"][number], strict=True):
                axis.imshow(image)
                for side in axis.spines.values():
                    side.set(visible=bool(right), color="#2a9d3f", linewidth=3)
            for axis in row:
                axis.set(xticks=[], yticks=[])
            row[0].axis("off")
        figure.suptitle(f"nearest pictures to names, both held out ({runs[-1].name})", fontsize=9)
        save(figure, path)


if __name__ == "__main__":
    sys.exit(main(Matching, Settings, __doc__))
