"""What this machine can do at most: float32 multiply-add and copy rates, measured with torch."""

from __future__ import annotations

import time

import torch


def measure(device: str = "cpu", size: int = 2048, megabytes: int = 256, repeats: int = 5) -> dict[str, float]:
    """Peak rates of this process on ``device`` with its current number of threads.

    ``gflops`` is a float32 matrix product of ``size``³ (2 size³ operations), ``gbytes`` a copy of ``megabytes`` MB
    counted as read and written; the best of ``repeats`` each, since a roof is what can be reached.
    """
    a, b = torch.randn(2, size, size, device=device)
    out = torch.empty_like(a)
    source = torch.ones(megabytes * 250_000, device=device)
    target = torch.ones_like(source)
    product = _best(lambda: torch.mm(a, b, out=out), device, repeats)
    copy = _best(lambda: target.copy_(source), device, repeats)
    return {
        "gflops": round(2 * size**3 / product / 1e9, 1),
        "gbytes": round(2 * source.numel() * 4 / copy / 1e9, 2),
    }


def fraction(seconds: float, flops: float, moved: float, roof: dict[str, float]) -> float:
    """The time that the roof allows for ``flops`` and ``moved`` bytes, over the time taken."""
    return max(flops / (roof["gflops"] * 1e9), moved / (roof["gbytes"] * 1e9)) / seconds


def _best(function, device: str, repeats: int) -> float:
    best = float("inf")
    for _ in range(repeats + 1):
        start = time.perf_counter()
        function()
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best
