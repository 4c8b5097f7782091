"""What this machine can do at most: multiply-add and copy rates, measured with torch."""

from __future__ import annotations

import time
from collections.abc import Collection

import torch


def measure(
    device: str = "cpu", size: int = 2048, megabytes: int = 256, repeats: int = 5, dtypes: Collection[str] = ()
) -> dict[str, float]:
    """Peak rates of this process on ``device`` with its current number of threads.

    ``gflops`` is a float32 matrix product of ``size``³ (2 size³ operations), ``gflops_bfloat16`` and so on that of the
    other ``dtypes``, ``gbytes`` a copy of ``megabytes`` MB counted as read and written; the best of ``repeats`` each,
    since a roof is what can be reached. A GPU needs products and copies several times as large to come near it.
    """
    if device.startswith("cuda"):
        size, megabytes = 4 * size, 8 * megabytes
    products = {}
    for name in dict.fromkeys(("float32", *dtypes)):
        a, b = torch.randn(2, size, size, device=device).to(getattr(torch, name))
        out = torch.empty_like(a)
        seconds = _best(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), device, repeats)
        products["gflops" if name == "float32" else f"gflops_{name}"] = round(2 * size**3 / seconds / 1e9, 1)
    source = torch.ones(megabytes * 250_000, device=device)
    target = torch.ones_like(source)
    copy = _best(lambda: target.copy_(source), device, repeats)
    return products | {"gbytes": round(2 * source.numel() * 4 / copy / 1e9, 2)}


def fraction(seconds: float, flops: float, moved: float, roof: dict[str, float], dtype: str = "float32") -> float:
    """The time that the roof allows for ``flops`` and ``moved`` bytes, over the time taken.

    Tensors of another ``dtype`` may be computed in float32, where the machine has no faster product of their own.
    """
    gflops = max(roof["gflops"], roof.get(f"gflops_{dtype}", 0.0))
    return max(flops / (gflops * 1e9), moved / (roof["gbytes"] * 1e9)) / seconds


def _best(function, device: str, repeats: int) -> float:
    best = float("inf")
    for _ in range(repeats + 1):
        start = time.perf_counter()
        function()
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best
