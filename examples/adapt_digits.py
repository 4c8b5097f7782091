"""Domain adaptation on handwritten digits: the DAN loss by its reference and by the fused op, side by side.

    python examples/adapt_digits.py --out adapt_digits

The source domain is scikit-learn's digits (1797 images of 8 × 8, after Alpaydin and Kaynak, from the UCI repository);
the target domain is the same set's other half turned, blurred and paler. A small network
learns the digits from the source's labels alone, while the MMD² between the features of both domains (Long et al. 2015,
"Learning transferable features with deep adaptation networks") makes them alike. Each backend trains from the same
start on the same batches, in a process of its own. Prints a table and writes ``adapt_digits.png``.

Needs scikit-learn, matplotlib and tabulate: ``pip install 'mmfast[examples]'``.
"""

from __future__ import annotations

import argparse
import gc
import math
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from training import LEAST, at_least, resident

import mmfast
from mmfast.kernels import MultiGaussian

NAMES = {None: "no adaptation", "reference": "reference", "auto": "fused"}
COLOURS = {None: "#8a8f98", "reference": "#4c8dc4", "auto": "#e5731c"}


@dataclass(frozen=True)
class Settings:
    """Of a training run: ``weight`` of the MMD at its full strength; the target's ``angle`` in degrees, ``blur`` in
    pixels and ``contrast`` about grey; ``threads`` of torch, 0 for its own choice.
    """

    steps: int = 120
    batch: int = 768
    features: int = 64
    weight: float = 1.0
    angle: float = 25.0
    blur: float = 0.5
    contrast: float = 0.8
    threads: int = 0


@dataclass(frozen=True)
class Result:
    """Of one run: first loss, accuracies by step, seconds of a step, and bytes that the training took at its peak."""

    backend: str | None
    seed: int
    first_loss: float
    first_mmd: float
    steps: list[int]
    accuracy: list[float]
    source_accuracy: float
    seconds: list[float]
    peak: int


class Network(nn.Module):
    """Images → features → classes."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.extract = nn.Sequential(
            nn.Flatten(),
            nn.Linear(64, 256),
            nn.ReLU(),
            nn.Linear(256, features),
            nn.ReLU(),
        )
        self.classify = nn.Linear(features, 10)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.extract(images)
        return features, self.classify(features)


def domains(settings: Settings) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images ``(n, 1, 8, 8)`` from 0 to 1 and labels of the source, and those of the target."""
    from scipy.ndimage import gaussian_filter, rotate
    from sklearn.datasets import load_digits

    digits = load_digits()
    images, labels = digits.images.astype(np.float32) / 16, torch.from_numpy(digits.target)
    order = np.random.default_rng(0).permutation(len(images))
    source, target = order[::2], order[1::2]
    turned = rotate(images[target], settings.angle, axes=(1, 2), reshape=False, order=1)
    blurred = gaussian_filter(turned, (0, settings.blur, settings.blur))
    distorted = np.clip(0.5 + settings.contrast * (blurred - 0.5), 0, 1)
    as_images = lambda a: torch.from_numpy(np.ascontiguousarray(a))[:, None].float()  # noqa: E731
    return as_images(images[source]), labels[source], as_images(distorted), labels[target]


def train(backend: str | None, seed: int, settings: Settings) -> Result:
    """One run; ``backend`` is ``None`` (no adaptation), ``"reference"`` or ``"auto"`` (the fastest that is there)."""
    if settings.threads:
        torch.set_num_threads(settings.threads)
    source, labels, target, target_labels = domains(settings)
    _load_libraries(backend)
    torch.manual_seed(seed)
    network = Network(settings.features)
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    kernel = MultiGaussian(bandwidth="dan")
    names = {"backend": None if backend == "auto" else backend}
    batches = torch.Generator().manual_seed(seed)
    result = Result(backend, seed, math.nan, math.nan, [], [], math.nan, [], 0)
    changes: dict[str, float] = {}

    def step(number: int) -> tuple[float, float]:
        network.train()
        rows = torch.randperm(len(source), generator=batches)[: settings.batch]
        others = torch.randperm(len(target), generator=batches)[: settings.batch]
        features, scores = network(source[rows])
        loss, mmd = nn.functional.cross_entropy(scores, labels[rows]), torch.zeros(())
        if backend is not None:
            strength = settings.weight * math.tanh(5 * (number + 1) / settings.steps)  # DAN's schedule
            mmd = mmfast.mmd2(features, network(target[others])[0], kernel, "unbiased", **names)
            loss = loss + strength * mmd
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item(), mmd.item()

    gc.collect()
    before = resident(reset=True)
    for number in range(settings.steps):
        start = time.perf_counter()
        loss, mmd = step(number)
        result.seconds.append(time.perf_counter() - start)
        if number == 0:
            changes = {"first_loss": loss, "first_mmd": mmd}
        if number % 10 == 9 or number == settings.steps - 1:
            result.steps.append(number + 1)
            result.accuracy.append(accuracy(network, target, target_labels))
    changes["peak"] = max(0, resident(peak=True) - before)
    changes["source_accuracy"] = accuracy(network, source, labels)
    return Result(**{**asdict(result), **changes})


def _load_libraries(backend: str | None) -> None:
    """One step on next to nothing, so that the peak is that of the training and not that of what it imports."""
    network = Network(8)
    optimizer = torch.optim.Adam(network.parameters())
    features, scores = network(torch.zeros(8, 1, 8, 8))
    loss = nn.functional.cross_entropy(scores, torch.zeros(8, dtype=torch.long))
    if backend is not None:
        loss = loss + mmfast.mmd2(features, features + 1, backend=None if backend == "auto" else backend)
    loss.backward()
    optimizer.step()


@torch.no_grad()
def accuracy(network: Network, images: Tensor, labels: Tensor) -> float:
    """The share of images whose class is found."""
    network.eval()
    return (network(images)[1].argmax(1) == labels).double().mean().item()


def compare(settings: Settings, seeds: int) -> list[Result]:
    """Every backend from each seed; each run alone in a fresh process, so that its memory is its own."""
    jobs = [(backend, seed) for seed in range(seeds) for backend in NAMES]
    results = []
    for number, (backend, seed) in enumerate(jobs):
        print(f"\r{number + 1}/{len(jobs)}  {NAMES[backend]}, seed {seed}          ", end="", file=sys.stderr)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            results.append(pool.submit(train, backend, seed, settings).result())
    print(file=sys.stderr)
    return results


def table(results: list[Result]) -> str:
    """Mean and standard deviation over seeds of each backend's accuracy, and the median time of its steps."""
    from tabulate import tabulate

    lines = []
    for backend, name in NAMES.items():
        runs = [r for r in results if r.backend == backend]
        final = np.array([100 * r.accuracy[-1] for r in runs])
        lines.append(
            (
                name,
                f"{final.mean():.1f} ± {final.std():.1f}",
                f"{100 * np.mean([r.source_accuracy for r in runs]):.1f}",
                f"{runs[0].first_loss:.6f}",
                f"{1e3 * np.median([s for r in runs for s in r.seconds]):.1f}",
                f"{np.mean([sum(r.seconds) for r in runs]):.1f}",
                f"{np.mean([r.peak for r in runs]) / 1e6:.0f}" if any(r.peak for r in runs) else "",
            )
        )
    headers = ("", "target accuracy, %", "source, %", "first loss", "ms a step", "s a run", "peak memory, MB")
    return tabulate(lines, headers, tablefmt="pipe", disable_numparse=True)


def plot(results: list[Result], path: Path) -> None:
    """Accuracy over steps and over time, and the peak memory, of each backend."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4), layout="constrained")
    by_step, by_time, memory = figure.subplots(1, 3, gridspec_kw={"width_ratios": [3, 3, 2]})
    for backend, name in NAMES.items():
        runs = [r for r in results if r.backend == backend]
        accuracies = 100 * np.array([r.accuracy for r in runs])
        steps = np.array(runs[0].steps)
        seconds = np.mean([np.cumsum(r.seconds)[steps - 1] for r in runs], axis=0)
        for axis, positions in ((by_step, steps), (by_time, seconds)):
            axis.plot(positions, accuracies.mean(0), color=COLOURS[backend], label=name)
            axis.fill_between(positions, accuracies.min(0), accuracies.max(0), color=COLOURS[backend], alpha=0.2)
        memory.bar(name, np.mean([r.peak for r in runs]) / 1e6, color=COLOURS[backend])
    by_step.set(xlabel="step", ylabel="accuracy in the target domain, %")
    by_time.set(xlabel="seconds of training")
    memory.set(ylabel="peak memory, MB")
    by_step.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    defaults = Settings()
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    least = {name: at_least(value) for name, value in LEAST.items()}
    p.add_argument("--steps", type=least["steps"], default=defaults.steps)
    p.add_argument(
        "--batch", type=least["batch"], default=defaults.batch, help="images of each domain in a step (at most 898)"
    )
    p.add_argument("--seeds", type=at_least(1), default=3)
    p.add_argument("--threads", type=least["threads"], default=0, help="of torch (default: its choice)")
    p.add_argument("--out", type=Path, default=Path("adapt_digits"), metavar="DIR", help="where the plot goes")
    args = p.parse_args(arguments)
    settings = Settings(steps=args.steps, batch=args.batch, threads=args.threads)
    results = compare(settings, args.seeds)
    print(table(results))
    plot(results, args.out / "adapt_digits.png")
    print(args.out / "adapt_digits.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
