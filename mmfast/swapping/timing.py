"""What a swap gained on example inputs."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import nn

from mmfast.swapping.check import _call, _tensors


def seconds(model: nn.Module, inputs: Any, rounds: int) -> dict[str, list[float]]:
    """Times of ``rounds`` calls after a first one: ``"forward"``, without gradients, and ``"forward + backward"``."""
    times: dict[str, list[float]] = {"forward": [], "forward + backward": []}
    for _ in range(rounds + 1):
        with torch.no_grad():
            times["forward"].append(_timed(lambda: _call(model, inputs)))
        times["forward + backward"].append(_timed(lambda: _forward_backward(model, inputs)))
    return {mode: values[1:] for mode, values in times.items()}


def table(before: dict[str, list[float]], after: dict[str, list[float]]) -> str:
    """Medians and ranges, and how many times as fast it became."""
    from tabulate import tabulate

    def cell(values: list[float]) -> str:
        low, middle, high = min(values), statistics.median(values), max(values)
        return f"{1e3 * middle:.2f} ({1e3 * low:.2f} to {1e3 * high:.2f})"

    rows = [
        [
            mode,
            cell(before[mode]),
            cell(after[mode]),
            f"{statistics.median(before[mode]) / statistics.median(after[mode]):.2f}",
        ]
        for mode in before
    ]
    return tabulate(
        rows, ["ms, median (range)", "before", "after", "times as fast"], disable_numparse=True, stralign="right"
    )


def _forward_backward(model: nn.Module, inputs: Any) -> None:
    outputs = [x for _, x in _tensors(_call(model, inputs), "") if x.requires_grad and x.is_floating_point()]
    parameters = [p for p in model.parameters() if p.requires_grad]
    if outputs and parameters:
        torch.autograd.grad([x.sum() for x in outputs], parameters, allow_unused=True)


def _timed(call) -> float:
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start
