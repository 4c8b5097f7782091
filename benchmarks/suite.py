"""Runs cases × providers interleaved in one process and yields one row for each."""

from __future__ import annotations

import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime, timezone
from fnmatch import fnmatchcase
from itertools import groupby, pairwise
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from benchmarks import machine, memory, roofline, sweeps
from benchmarks.providers import Provider


@dataclass(frozen=True)
class Settings:
    """How much to measure.

    Args:
        rounds: times that every provider gets its turn.
        calls: most timed calls of one turn.
        burst: seconds after which a turn ends.
        budget: seconds that one provider may take for a case and mode; it still gets ``least_rounds`` turns.
        pause: seconds of sleep before each turn, in which other libraries' idle threads stop spinning; not on a GPU.
        memory: patterns of the providers whose memory is measured, on a CPU each in a process of its own.
    """

    rounds: int = 15
    calls: int = 30
    burst: float = 0.3
    budget: float = 20.0
    least_rounds: int = 3
    pause: float = 0.15
    memory: tuple[str, ...] = ("*",)
    modes: tuple[str, ...] = ("forward", "backward")
    device: str = "cpu"
    seed: int = 0


FULL = Settings()
QUICK = Settings(rounds=5, calls=10, burst=0.15, budget=2.0, memory=("mmfast", "reference", "torchaudio"))


@dataclass
class _Turn:
    """A provider ready to be timed, and its times: one list a round."""

    provider: Provider
    call: Callable[[], tuple[torch.Tensor, ...]]
    error: dict[str, float] | None
    first_call: float
    kept: int = 0  # bytes on the GPU after the first call
    again: float = 0.0
    rounds: list[list[float]] = field(default_factory=list)
    spent: float = 0.0
    cpu: list[np.ndarray] = field(default_factory=list)


def run(
    cases, providers: list[Provider], settings: Settings, progress: bool = True, roof: dict | None = None
) -> Iterator[dict[str, Any]]:
    """One row for every case, mode and provider that computes it, as soon as the case and mode are done.

    The ``roof`` is measured unless it is given. A provider that fails gives a row with ``failed`` in words and costs
    the others nothing.
    """
    jobs = [(case, mode) for case in cases for mode in settings.modes if mode in case.modes]
    common = {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": settings.device,
        "dtype": "float32",
        "seed": settings.seed,
        "machine": machine.describe(settings.device),
        "roofline": roof or roofline.measure(settings.device, dtypes=[_dtype(case) for case in cases]),
    }
    with tqdm(total=len(jobs), disable=not progress, unit="case", file=sys.stderr) as bar:
        for case, of_case in groupby(jobs, key=itemgetter(0)):
            inputs = case.inputs(settings.seed, settings.device)  # long signals take seconds to invent
            for _, mode in of_case:
                bar.set_description(f"{case.name} {mode}")
                chosen = [p for p in providers if p.supports(case, mode) and p.runs(case, settings.device)]
                yield from _rows(case, mode, inputs, chosen, settings, common, bar)
                bar.update()


def _rows(case, mode: str, inputs, providers: list[Provider], settings: Settings, common, bar) -> Iterator[dict]:
    head = {
        **common,
        "slice": case.slice,
        "case": case.name,
        "mode": mode,
        "shape": case.shape,
        **case.facts(),
        **sweeps.facts(case),
    }
    turns, failures = _make_ready(case, mode, inputs, providers, settings)
    _interleave(turns, settings, case, mode, bar)
    peaks = _memory(case, mode, turns, settings, bar)
    for turn in turns:
        yield head | _row(turn, case, mode, common["roofline"], peaks.get(turn.provider.name))
    for provider, reason in failures:
        yield head | {"provider": provider.name, "version": provider.version(), "failed": reason}


def _make_ready(case, mode: str, inputs, providers: list[Provider], settings: Settings) -> tuple[list[_Turn], list]:
    """Builds every provider, calls it once (libraries load, compilers compile) and compares with float64."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()  # a fresh set of compiled graphs for each case: no recompilation limit is met
    upstream = case.upstream(settings.seed, settings.device)
    gold = case.gold(inputs, upstream if mode == "backward" else None)
    turns, failures = [], []
    for provider in providers:
        try:
            start = time.perf_counter()
            call = provider.build(case, settings.device).call(mode, inputs, upstream)
            before = memory.allocated(settings.device)
            results = call()
            _wait(settings.device)
            first = time.perf_counter() - start
            kept = memory.allocated(settings.device) - before - memory.size(results)
            error = (
                None if gold is None else errors(results[: len(gold)] if isinstance(gold, tuple) else results[0], gold)
            )
            del results  # else the next one's memory is counted from here
            turns.append(_Turn(provider, call, error, first, kept, again=first))
        except Exception as error:  # a peer may fail in any way; the row says how
            failures.append((provider, f"{type(error).__name__}: {error}".splitlines()[0]))
    return turns, failures


def _interleave(turns: list[_Turn], settings: Settings, case, mode: str, bar) -> None:
    order = random.Random(f"{settings.seed}/{case.name}/{mode}")
    for index in range(settings.rounds):
        order.shuffle(turns)
        bar.set_postfix_str(f"round {index + 1}/{settings.rounds}")
        for turn in turns:
            if turn.spent > settings.budget and index >= settings.least_rounds:
                continue
            if settings.device == "cpu":
                time.sleep(settings.pause)
            begin, cpu = time.perf_counter(), machine.cpu_seconds()
            if turn.again < 5 * settings.burst:  # a longer call brings its own data into the caches
                turn.call()
                _wait(settings.device)
            turn.rounds.append(_burst(turn.call, settings))
            turn.again = turn.rounds[-1][-1]
            turn.spent += time.perf_counter() - begin
            if cpu is not None:
                turn.cpu.append(machine.cpu_seconds() - cpu)


def _burst(call: Callable, settings: Settings) -> list[float]:
    """Times of single calls, until the burst is over."""
    if settings.device.startswith("cuda"):
        return _burst_on_gpu(call, settings)
    times: list[float] = []
    end = time.perf_counter() + settings.burst
    while len(times) < settings.calls:
        start = time.perf_counter()
        call()
        stop = time.perf_counter()
        times.append(stop - start)
        if stop > end:
            break
    return times


def _burst_on_gpu(call: Callable, settings: Settings) -> list[float]:
    """Times between the ends of calls in a queue, as a model makes them: the device's, or a slower host's."""
    end = time.perf_counter() + settings.burst
    ends = [torch.cuda.Event(enable_timing=True)]
    ends[0].record()
    while len(ends) <= settings.calls:
        call()
        ends.append(torch.cuda.Event(enable_timing=True))
        ends[-1].record()
        if time.perf_counter() > end:
            break
    torch.cuda.synchronize()
    return [start.elapsed_time(stop) / 1e3 for start, stop in pairwise(ends)]


def _dtype(case) -> str:
    return case.facts().get("dtype", "float32")


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def _memory(case, mode: str, turns: list[_Turn], settings: Settings, bar) -> dict[str, dict]:
    """Peak memory by provider. On a GPU its allocator counts; on a CPU each has a process of its own: nothing is being
    timed, so they run beside each other."""
    wanted = [t for t in turns if any(fnmatchcase(t.provider.name, g) for g in settings.memory)]
    bar.set_postfix_str("memory")
    if settings.device.startswith("cuda"):
        return {t.provider.name: memory.of_call(t.call, t.kept) for t in wanted}
    names = [t.provider.name for t in wanted]
    threads = torch.get_num_threads()
    stored = case.same_shapes_as or case.name  # what a fresh process finds
    with ThreadPoolExecutor(max(1, min(4, (os.cpu_count() or 1) // threads, len(names)))) as pool:
        measure = lambda name: memory.in_fresh_process(stored, name, mode, threads, settings.seed)  # noqa: E731
        return dict(zip(names, pool.map(measure, names), strict=True))


def errors(
    result: torch.Tensor | tuple[torch.Tensor, ...], gold: torch.Tensor | tuple[torch.Tensor, ...]
) -> dict[str, float]:
    """``max_relative`` = max |result - gold| / max |gold| and ``relative_l2`` = ‖result - gold‖ / ‖gold‖.

    Of tuples, with the entries of all their tensors together.

    Raises:
        ValueError: the shapes differ.
    """
    if isinstance(gold, tuple):
        for one, other in zip(result, gold, strict=True):
            if one.shape != other.shape:
                raise ValueError(f"the result must have the shape {tuple(other.shape)}, got {tuple(one.shape)}")
        result, gold = (torch.cat([t.flatten() for t in tensors]) for tensors in (result, gold))
    if result.shape != gold.shape:
        raise ValueError(f"the result must have the shape {tuple(gold.shape)}, got {tuple(result.shape)}")
    difference = result.detach().double() - gold
    return {
        "max_relative": float(difference.abs().max() / gold.abs().max()),
        "relative_l2": float(difference.norm() / gold.norm()),
    }


def _row(turn: _Turn, case, mode: str, roof: dict, peak: dict | None) -> dict[str, Any]:
    times = np.concatenate(turn.rounds)
    median, low, high = (float(np.quantile(times, q)) for q in (0.5, 0.2, 0.8))
    flops, moved = case.work(mode)
    return {
        "provider": turn.provider.name,
        "version": turn.provider.version(),
        "median": median,
        "p20": low,
        "p80": high,
        "n": len(times),
        "first_call": turn.first_call,
        "error": turn.error,
        "memory": peak,
        "others_cpu": machine.share_of_others(turn.cpu),
        "flops": flops,
        "bytes": moved,
        "gflops": flops / median / 1e9,
        "roof_fraction": roofline.fraction(median, flops, moved, roof, _dtype(case)),
        "rounds": turn.rounds,
    }
