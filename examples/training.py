"""What the examples share: a training run that is measured, runs side by side, tables and plots.

An example defines its ``Settings``, a dataclass, and a `System`; `main` makes a command line of them.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

BACKENDS = {"reference": "reference", "auto": "fused"}
LEAST = {"steps": 1, "batch": 2, "seed": 0, "threads": 0, "copies": 1}  # of settings; one row has no unbiased MMD
COLOURS = ("#e5731c", "#4c8dc4", "#5aa469", "#9467bd", "#c44c6a", "#8a8f98")


@dataclass(frozen=True)
class Settings:
    """Of a training run; ``threads`` of torch, 0 for its own choice."""

    steps: int = 300
    batch: int = 256
    lr: float = 2e-3
    seed: int = 0
    threads: int = 0


class System:
    """A model with its data. A subclass sets ``model`` and defines `loss`, `evaluate` and `draw`.

    ``option`` is the name of what its ``variants`` differ in; ``defaults`` are those trained unless others are asked
    for. ``chance`` has the entries of `evaluate` that a guess would reach.
    """

    option = "variant"
    variants: tuple[str, ...] = ("",)
    defaults: tuple[str, ...] = ("",)
    model: nn.Module

    def __init__(self, settings: Settings, variant: str) -> None:
        self.settings, self.variant = settings, variant
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.chance: dict[str, float] = {}

    def rows(self, count: int) -> Tensor:
        """A batch out of ``count``."""
        return torch.randint(count, (self.settings.batch,), generator=self.generator)

    def loss(self, step: int) -> Tensor:
        """Of a new batch."""
        raise NotImplementedError

    def evaluate(self) -> dict[str, float]:
        """Quality on what was held out; the first entry is drawn over time."""
        raise NotImplementedError

    def picture(self) -> dict[str, np.ndarray]:
        """What `draw` needs."""
        return {}

    @staticmethod
    def draw(runs: list[Run], path: Path) -> None:
        """The picture of the example, of one run for each variant."""
        raise NotImplementedError


@dataclass
class Run:
    """Of one training run: losses and seconds of each step, bytes it took at its peak, and its quality in between."""

    variant: str
    backend: str
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    curve: list[float] = field(default_factory=list)
    quality: dict[str, float] = field(default_factory=dict)
    chance: dict[str, float] = field(default_factory=dict)
    picture: dict[str, np.ndarray] = field(default_factory=dict)
    peak: int = 0

    @property
    def name(self) -> str:
        return " ".join(filter(None, (self.variant, BACKENDS[self.backend])))

    @property
    def milliseconds(self) -> float:
        """The median step."""
        return 1e3 * float(np.median(self.seconds))


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """All ops of mmfast by ``"reference"``, or with ``"auto"`` by the fastest that is there."""
    before = os.environ.pop("MMFAST_BACKEND", None)
    if name != "auto":
        os.environ["MMFAST_BACKEND"] = name
    try:
        yield
    finally:
        os.environ.pop("MMFAST_BACKEND", None)
        if before is not None:
            os.environ["MMFAST_BACKEND"] = before


def train(system: type[System], settings: Settings, variant: str = "", name: str = "auto") -> Run:
    """One run, from the settings' seed; ``name`` of the backend."""
    if settings.threads:
        torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    with backend(name):
        made = system(settings, variant)
        run = Run(variant, name, chance=made.chance)
        optimizer = torch.optim.Adam(made.model.parameters(), settings.lr)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step / settings.steps))
        _load_libraries(made)
        gc.collect()
        before, run.peak = resident(reset=True), 0
        bar = tqdm(range(settings.steps), desc=run.name, unit="step", leave=False, mininterval=0.5)
        for step in bar:
            made.model.train()
            start = time.perf_counter()
            loss = made.loss(step)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.losses.append(loss.item())
            run.seconds.append(time.perf_counter() - start)
            schedule.step()
            if step % max(10, settings.steps // 10) == 0 or step == settings.steps - 1:
                run.peak = max(run.peak, resident(peak=True) - before)
                run.quality = _evaluate(made)
                run.steps.append(step + 1)
                run.curve.append(next(iter(run.quality.values())))
                bar.set_postfix(loss=f"{loss.item():.3f}", quality=f"{run.curve[-1]:.3f}")
                resident(reset=True)
        made.model.eval()
        with torch.no_grad():
            run.picture = made.picture()
    return run


def _rate(done: float) -> float:
    """The learning rate's share of its largest: up in a tenth of the steps, down by a cosine."""
    return min(1.0, 0.02 + 10 * done) * (0.5 + 0.5 * math.cos(math.pi * done))


@torch.no_grad()
def _evaluate(made: System) -> dict[str, float]:
    made.model.eval()
    return made.evaluate()


def _load_libraries(made: System) -> None:
    """A step on next to nothing that changes nothing, so that the peak is that of training, not of what it imports."""
    settings, states = made.settings, (torch.get_rng_state(), made.generator.get_state())
    buffers = {name: buffer.clone() for name, buffer in made.model.named_buffers()}
    made.settings = dataclasses.replace(settings, batch=16)
    made.loss(0).backward()
    made.settings = settings
    made.model.zero_grad()
    for name, buffer in made.model.named_buffers():
        buffer.copy_(buffers[name])
    torch.set_rng_state(states[0])
    made.generator.set_state(states[1])


def resident(peak: bool = False, reset: bool = False) -> int:
    """Bytes in memory now, or at the peak since the last reset; 0 where the system does not say."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    wanted = "VmHWM:" if peak else "VmRSS:"
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(wanted)), 0)


def train_each(system: type[System], settings: Settings, variants: list[str], backends: list[str]) -> list[Run]:
    """Each run alone in a fresh process, so that its memory is its own."""
    runs = []
    for variant in variants:
        for name in backends:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                runs.append(pool.submit(train, system, settings, variant, name).result())
    return runs


def table(runs: list[Run]) -> str:
    """Quality, time and memory of each run, and how much faster a fused one is than its reference."""
    from tabulate import tabulate

    slow = {run.variant: run for run in runs if run.backend == "reference"}
    lines = [
        (
            run.name,
            *(f"{value:.3f}" for value in run.quality.values()),
            f"{run.losses[0]:.4f}",
            f"{run.losses[-1]:.4f}",
            f"{run.milliseconds:.1f}",
            f"{slow[run.variant].milliseconds / run.milliseconds:.2f}×" if run.variant in slow else "",
            f"{run.peak / 1e6:.0f}" if run.peak else "",
        )
        for run in runs
    ]
    if runs[0].chance:
        lines.append(("chance", *(f"{runs[0].chance[k]:.3f}" if k in runs[0].chance else "" for k in runs[0].quality)))
    headers = ("", *runs[0].quality, "first loss", "last loss", "ms a step", "gain", "peak memory, MB")
    lines = [(*line, *[""] * (len(headers) - len(line))) for line in lines]
    return tabulate(lines, headers, tablefmt="pipe", disable_numparse=True)


def gains(runs: list[Run]) -> str:
    """Each reference run beside its fused one, as a table in Markdown; `NaN` where the system does not tell memory."""
    from tabulate import tabulate

    lines = []
    for slow in (run for run in runs if run.backend == "reference"):
        fast = next(run for run in runs if run.backend != "reference" and run.variant == slow.variant)
        lines.append(
            (
                slow.variant or "all",
                f"{slow.milliseconds:.0f}",
                f"{fast.milliseconds:.0f}",
                f"{slow.milliseconds / fast.milliseconds:.2f}×",
                *(f"{run.peak / 1e6:.0f}" if run.peak else "NaN" for run in (slow, fast)),
                f"{slow.losses[-1]:.4f}",
                f"{fast.losses[-1] - slow.losses[-1]:+.1e}",
            )
        )
    headers = ("", "ms a step, reference", "fused", "ratio", "peak extra memory, MB, reference", "fused")
    headers += (f"loss at step {len(runs[0].losses)}, reference", "fused − reference")
    return tabulate(lines, headers, tablefmt="pipe", disable_numparse=True)


def plot_curves(runs: list[Run], path: Path) -> None:
    """Loss and quality over steps, quality over time; the reference dashed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.2), layout="constrained")
    losses, by_step, by_time = figure.subplots(1, 3)
    colours = dict(zip(dict.fromkeys(run.variant for run in runs), COLOURS * 3, strict=False))
    for run in runs:
        style = {"color": colours[run.variant], "linestyle": "--" if run.backend == "reference" else "-", "lw": 1.4}
        window = max(1, len(run.losses) // 50)
        smooth = np.convolve(run.losses, np.ones(window) / window, "valid")
        losses.plot(np.arange(len(smooth)) + window, smooth, **style)
        by_step.plot(run.steps, run.curve, label=run.name, **style)
        by_time.plot(np.cumsum(run.seconds)[np.array(run.steps) - 1], run.curve, **style)
    measure = next(iter(runs[0].quality))
    losses.set(xlabel="step", ylabel="loss")
    by_step.set(xlabel="step", ylabel=f"{measure}, held out")
    by_time.set(xlabel="seconds of training")
    by_step.legend(frameon=False, fontsize=8)
    save(figure, path)


def save(figure, path: Path) -> None:
    """Write a figure, and say where it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    print(path)


def confusion(axis, matrix: np.ndarray, rows: list[str], columns: list[str], label: str = "") -> None:
    """A matrix of shares as a picture with its numbers."""
    axis.imshow(matrix, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axis.set_xticks(range(len(columns)), columns, fontsize=7, rotation=90 if max(map(len, columns)) > 3 else 0)
    axis.set_yticks(range(len(rows)), rows, fontsize=7)
    if matrix.size <= 144:
        for (i, j), value in np.ndenumerate(matrix):
            if value >= 0.005:
                colour = "white" if value > 0.6 else "black"
                axis.text(j, i, f"{100 * value:.0f}", ha="center", va="center", fontsize=6, color=colour)
    axis.set_title(label, fontsize=9)


def shares(labels: Tensor, found: Tensor, count: int) -> np.ndarray:
    """``(count, count)``: of each class, the share that was found to be of each."""
    matrix = torch.zeros(count, count).index_put_((labels, found), torch.ones(len(labels)), accumulate=True)
    return (matrix / matrix.sum(1, keepdim=True).clamp(min=1)).numpy()


def at_least(least: int) -> Callable[[str], int]:
    """What argparse makes an integer of, and refuses a smaller one."""

    def integer(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {value}")
        return value

    return integer


def options(system: type[System], settings: type[Settings], about: str = "") -> argparse.ArgumentParser:
    """The command line of an example: its settings, its variants, and which backends."""
    name = Path(sys.modules[system.__module__].__file__).stem
    p = argparse.ArgumentParser(description=(about.splitlines() or [""])[0])
    for entry in dataclasses.fields(settings):
        kind = at_least(LEAST[entry.name]) if entry.name in LEAST else type(entry.default)
        p.add_argument(f"--{entry.name}", type=kind, default=entry.default, help=f"default: {entry.default}")
    if len(system.variants) > 1:
        p.add_argument(f"--{system.option}", nargs="+", choices=system.variants, default=list(system.defaults))
    p.add_argument("--backend", choices=list(BACKENDS), default="auto")
    p.add_argument("--compare", action="store_true", help="both backends, side by side")
    p.add_argument("--out", type=Path, default=Path(name), metavar="DIR", help="where the pictures go")
    return p


def train_asked(system: type[System], settings: type[Settings], args: argparse.Namespace) -> list[Run]:
    """The runs that a command line asks for."""
    chosen = settings(**{entry.name: getattr(args, entry.name) for entry in dataclasses.fields(settings)})
    variants = getattr(args, system.option) if len(system.variants) > 1 else list(system.variants)
    return train_each(system, chosen, variants, list(BACKENDS) if args.compare else [args.backend])


def main(system: type[System], settings: type[Settings], about: str, arguments: list[str] | None = None) -> int:
    """Runs an example from its command line."""
    from data import Unavailable

    args = options(system, settings, about).parse_args(arguments)
    try:
        runs = train_asked(system, settings, args)
    except (Unavailable, OSError) as error:
        name = Path(sys.modules[system.__module__].__file__).stem
        print(f"{name} needs data that cannot be had: {error}", file=sys.stderr)
        return 1
    print(table(runs))
    if args.compare:
        print(f"\n{gains(runs)}\n")
    plot_curves(runs, args.out / "curves.png")
    system.draw([run for run in runs if run.backend == runs[-1].backend], args.out / "picture.png")
    return 0
