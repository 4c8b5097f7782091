"""Peak extra memory of one call, on a CPU in a process of its own.

``python -m benchmarks.memory CASE PROVIDER MODE THREADS SEED`` prints the JSON of `measure`. The process calls
once to load libraries and compile, gives all free memory back, resets the kernel's high-water mark and calls again.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def in_fresh_process(case: str, provider: str, mode: str, threads: int, seed: int) -> dict[str, Any]:
    """`measure` in a new interpreter; ``{"error": ...}`` when that fails.

    The allocator gives every block of 128 KiB or more back when it is freed: no call hides in what another left.
    """
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
    command = [sys.executable, "-m", "benchmarks.memory", case, provider, mode, str(threads), str(seed)]
    root = Path(__file__).resolve().parent.parent
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=env, cwd=root)
    except subprocess.TimeoutExpired:
        return {"error": "timed out"}
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def measure(case_name: str, provider_name: str, mode: str, threads: int, seed: int) -> dict[str, Any]:
    """Bytes: ``extra`` at the peak above what was resident before, without the results; ``output`` of the results;
    ``kept`` after the first call and its clean-up (tables, plans, scratch, libraries); and the ``method``.

    The kernel counts pages in batches a thread, so ``extra`` is good to about 0.1 MB.
    """
    import torch

    from benchmarks import providers, sweeps

    torch.set_num_threads(threads)
    case, provider = sweeps.find(case_name), providers.every()[provider_name]
    upstream = case.upstream(seed)
    run = provider.build(case, "cpu").call(mode, case.inputs(seed), upstream)
    del upstream
    _settle()
    before = _status("RssAnon")
    run()
    _settle()
    kept = _status("RssAnon") - before
    method = "VmHWM" if _reset_peak() else "ru_maxrss, a lower bound"
    start = _status("VmRSS") if method == "VmHWM" else _max_rss()
    results = run()
    peak = _status("VmHWM") if method == "VmHWM" else _max_rss()
    output = size(results)
    return {"extra": max(0, peak - start - output), "output": output, "kept": max(0, kept), "method": method}


def allocated(device: str) -> int:
    """Bytes of torch's allocator on a GPU, 0 on a CPU."""
    import torch

    return torch.cuda.memory_allocated(device) if device.startswith("cuda") else 0


def of_call(run, kept: int) -> dict[str, Any]:
    """The same as `measure` of a call on the current GPU that was made before, and left ``kept`` bytes there."""
    import torch

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    output = size(run())
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - start - output
    return {"extra": max(0, extra), "output": output, "kept": max(0, kept), "method": "max_memory_allocated"}


def size(results) -> int:
    """Bytes of tensors."""
    return sum(t.numel() * t.element_size() for t in results)


def _settle() -> None:
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _reset_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status(field: str) -> int:
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    return 0


def _max_rss() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    *names, thread_count, seed_text = sys.argv[1:]
    print(json.dumps(measure(*names, int(thread_count), int(seed_text))))
