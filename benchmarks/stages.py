"""Where the time goes: the stages of one op, from the times of the op with a stage left out or made smaller.

A fused op has no seams to put a clock at, and a clock in its loops would change what it measures. So the whole op is
timed beside variants of itself in the same rounds, and a stage is a difference:

* mel: prefixes of the chain. "transform" has a single filter of one bin and no logarithm, and writes one value a frame;
  then come all filters, the logarithm, the range of ``top_db``, and DCT, scale and offset. A stage is the time that it
  adds, with what it has to write.
* mmd: products of points are linear in the number of features, and nothing else is. Half of the features leave out
  half of the products: their time is twice the difference. The other kernels of a sum are what a single one saves.
* fusion: likewise the scores are linear in the features of queries and keys and the output in those of the values,
  which are halved one at a time; the softmax, with the fixed cost of the call, is what is left. Plain attention, which
  has the matrices, is cut after the scores and after the softmax.

What overlaps in a processor that does several things at once counts where it is waited for, so a stage says what
leaving it out would save, and a stage that hides behind others may take nothing. Differences of two noisy times have
the noise of both: each stage comes with the 20th and 80th percentile over the rounds. Where a stage takes less than
nothing in most rounds, the variants were not computed in the same way, and the row does not add up.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from benchmarks import cases, machine, roofline, suite
from benchmarks.providers import Runner
from mmfast import _backend
from mmfast.mel import tables

_CASES = (
    "whisper-8x30s",
    "mfcc-db-32x10s",
    "mel2048-4x30s",
    "mmd-dan-4096x256",
    "mmd-dan-1024x64",
    "fusion-sd-1024x77",
    "fusion-whisper-448x1500",
)
_NEUTRAL = {"top_db": None, "top_db_scope": "item", "output_offset": 0.0, "output_scale": 1.0}
_NO_LOG = {"log": None, "log_floor": 0.0, "log_offset": 0.0, "db_multiplier": 10.0, "db_reference": 1.0}


@dataclass(frozen=True)
class Breakdown:
    """How stages come from the times of variants.

    Args:
        variants: name → the op, made ready.
        stages: name → weight of each variant's time; together they are the time of the variant ``"all"``.
    """

    variants: dict[str, Callable[[], Any]]
    stages: dict[str, dict[str, float]]


def select(slices: list[str] | None, glob: str | None) -> list:
    """The cases to break down: those of ``glob``, or else some of each slice."""
    if glob is not None:
        return [case for case in cases.select(slices, glob) if type(case).__name__ in _MAKERS]
    return [cases.CASES[name] for name in _CASES if not slices or cases.CASES[name].slice in slices]


def run(chosen: list, settings: suite.Settings, progress: bool = True) -> Iterator[dict[str, Any]]:
    """A row for each case, mode and backend."""
    common = {
        "device": settings.device,
        "machine": machine.describe(settings.device),
        "roofline": roofline.measure(settings.device),
    }
    jobs = [
        (case, mode, backend)
        for case in chosen
        for mode in settings.modes
        if mode in case.modes
        for backend in _backends(case, settings.device)
    ]
    for case, mode, backend in tqdm(jobs, disable=not progress, unit="case", file=sys.stderr, desc="stages"):
        parts = _MAKERS[type(case).__name__](case, mode, backend, settings)
        yield {
            **common,
            "slice": case.slice,
            "case": case.name,
            "shape": case.shape,
            "mode": mode,
            "backend": backend,
            **measure(parts, settings),
        }


def measure(parts: Breakdown, settings: suite.Settings) -> dict[str, Any]:
    """``total`` and ``stages`` in seconds: medians over the rounds, with the 20th and 80th percentile.

    ``adds_up`` is false where a stage is below zero by more than its noise, and by a fiftieth of the whole.
    """
    order, rounds = random.Random(settings.seed), []
    names = list(parts.variants)
    for call in parts.variants.values():
        call()
    for _ in range(settings.rounds):
        order.shuffle(names)
        times = {}
        for name in names:
            time.sleep(settings.pause / 3)
            parts.variants[name]()
            suite._wait(settings.device)
            times[name] = float(np.median(suite._burst(parts.variants[name], settings)))
        rounds.append(times)
    stages = []
    for name, weights in parts.stages.items():
        values = [sum(weight * times[variant] for variant, weight in weights.items()) for times in rounds]
        low, middle, high = (float(np.quantile(values, q)) for q in (0.2, 0.5, 0.8))
        stages.append({"stage": name, "seconds": middle, "p20": low, "p80": high})
    total = float(np.median([times["all"] for times in rounds]))
    adds_up = all(stage["p80"] > -0.02 * total for stage in stages)
    return {"total": total, "adds_up": adds_up, "stages": stages}


def _backends(case, device: str) -> list[str]:
    chosen = _backend.choose(case.slice, torch.device(device))[0]
    if case.slice == "fusion":
        plain = ["plain"] if len(case.keys) == 1 and case.mask is None and case.kv_heads is None else []
        return ([] if chosen == "reference" else [chosen]) + plain
    return list(dict.fromkeys((chosen, "reference"))) if case.reference else [chosen]


def _call(case, mode: str, backend: str, settings: suite.Settings, **given) -> Callable:
    inputs, upstream = case.inputs(settings.seed, settings.device), case.upstream(settings.seed, settings.device)
    runner = Runner(partial(case.compute, backend=backend, **given), getattr(case, "prepare", lambda x: x))
    return runner.call(mode, inputs, upstream)


def _mel(case: cases.MelCase, mode: str, backend: str, settings: suite.Settings) -> Breakdown:
    whole = case.config
    bare = whole.replace(n_mfcc=None, lifter=0.0, **_NEUTRAL)
    chain = {"filters": bare.replace(**_NO_LOG)}
    if whole.log is not None:
        chain["logarithm"] = bare
    if whole.top_db is not None:
        chain["top_db"] = bare.replace(top_db=whole.top_db, top_db_scope=whole.top_db_scope)
    if whole.n_mfcc is not None:
        chain["DCT"] = whole.replace(output_offset=0.0, output_scale=1.0)
    if (whole.output_offset, whole.output_scale) != (0.0, 1.0):
        chain["scale"] = whole
    one = chain["filters"].replace(n_mels=1)
    bin_only = torch.zeros_like(tables.filters(one), dtype=torch.float32, device=settings.device)
    bin_only.view(-1)[bin_only.numel() // 8] = 1.0
    variants = {"transform": _call(replace(case, config=one), mode, backend, settings, filters=bin_only)}
    stages = {"frames, window, FFT, power": {"transform": 1.0}}
    before = "transform"
    for name, config in chain.items():
        last = name == list(chain)[-1]
        key = "all" if last else name
        variants[key] = _call(replace(case, config=config), mode, backend, settings)
        stages[name] = {key: 1.0, before: -1.0}
        before = key
    return Breakdown(variants, stages)


def _mmd(case, mode: str, backend: str, settings: suite.Settings) -> Breakdown:
    variants = {"all": case, "half": replace(case, d=case.d // 2)}
    products = {"all": 2.0, "half": -2.0}
    stages = {"products of points": products}
    rest = {"half": 2.0, "all": -1.0}
    if case.rungs > 1:
        variants["one kernel"] = replace(case, sigma=float(case.d) ** 0.5)
        stages[f"{case.rungs - 1} more kernels and their bandwidth"] = {"all": 1.0, "one kernel": -1.0}
        rest = {"half": 2.0, "all": -2.0, "one kernel": 1.0}
    stages["first kernel, sums, fixed cost"] = rest
    return Breakdown({k: _call(v, mode, backend, settings) for k, v in variants.items()}, stages)


def _fusion(case, mode: str, backend: str, settings: suite.Settings) -> Breakdown:
    if backend == "plain":
        return _plain(case, mode, settings)
    value_dim = case.value_dim or case.dim
    variants = {
        "all": case,
        "half keys": replace(case, dim=case.dim // 2, value_dim=value_dim),
        "half values": replace(case, value_dim=value_dim // 2),
    }
    stages = {
        "scores": {"all": 2.0, "half keys": -2.0},
        "softmax, fixed cost": {"half keys": 2.0, "half values": 2.0, "all": -3.0},
        "values": {"all": 2.0, "half values": -2.0},
    }
    return Breakdown({k: _call(v, mode, backend, settings) for k, v in variants.items()}, stages)


def _plain(case, mode: str, settings: suite.Settings) -> Breakdown:
    inputs = [x.detach().requires_grad_(mode == "backward") for x in case.inputs(settings.seed, settings.device)]

    def until(last: str) -> None:
        query, ((key, value),), _ = case.parts(inputs)
        with torch.set_grad_enabled(mode == "backward"):
            out = query @ key.transpose(2, 3) * case.dim**-0.5
            out = out if last == "scores" else out.softmax(3)
            out = out @ value if last == "all" else out
        if mode == "backward":
            torch.autograd.grad(out, inputs, torch.ones_like(out), allow_unused=True)

    variants = {last: partial(until, last) for last in ("scores", "softmax", "all")}
    stages = {"scores": {"scores": 1.0}, "softmax": {"softmax": 1.0, "scores": -1.0}}
    return Breakdown(variants, stages | {"values": {"all": 1.0, "softmax": -1.0}})


_MAKERS = {"MelCase": _mel, "MMDCase": _mmd, "AttentionCase": _fusion}
