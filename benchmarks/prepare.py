"""Compiles ahead, several cases at once: what torch.compile and Triton keep on disk is there when times are taken.

``python -m benchmarks.prepare DEVICE MODES PROVIDERS CASE`` calls each of the providers once in each of the modes, all
but the case separated by commas. On a GPU most of a run would otherwise be one compiler after the other.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


def ahead(cases: Sequence, providers: Sequence, modes: Sequence[str], device: str, jobs: int) -> None:
    """Runs `one` for every case, ``jobs`` processes at a time."""
    names = ",".join(p.name for p in providers)
    command = [sys.executable, "-m", "benchmarks.prepare", device, ",".join(modes), names]
    root = Path(__file__).resolve().parent.parent
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    env = {"OMP_NUM_THREADS": threads, "TORCHINDUCTOR_COMPILE_THREADS": threads} | os.environ

    def run(case) -> None:
        done = subprocess.run([*command, case.name], cwd=root, env=env, capture_output=True, text=True)
        if done.returncode:
            print(f"{case.name}: not prepared: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(run, cases))


def one(device: str, modes: str, names: str, case_name: str) -> None:
    """Calls each provider of a case once in each mode. One that fails fails again, and says so, when it is timed."""
    from benchmarks import providers, sweeps

    case, every = sweeps.find(case_name), providers.every()
    inputs, upstream = case.inputs(0, device), case.upstream(0, device)
    for mode in modes.split(","):
        for name in names.split(","):
            if mode in case.modes and every[name].supports(case, mode) and every[name].runs(case, device):
                with contextlib.suppress(Exception):
                    every[name].build(case, device).call(mode, inputs, upstream)()


if __name__ == "__main__":
    one(*sys.argv[1:])
