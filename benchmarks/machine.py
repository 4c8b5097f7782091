"""The machine, the versions and the commit that a row was measured with."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmfast import _backend

ROOT = Path(__file__).resolve().parent.parent
_ISA = ("sse4_2", "avx", "f16c", "fma", "avx2", "avx_vnni", "avx512", "amx", "asimd", "sve")
_PACKAGES = (
    "numpy",
    "torchaudio",
    "librosa",
    "scipy",
    "kaldi_native_fbank",
    "openai-whisper",
    "transformers",
    "nnaudio",
    "triton",
    "pykeops",
    "geomloss",
    "diffusers",
)


def describe(device: str = "cpu") -> dict[str, Any]:
    """A JSON-ready description: processor, instruction sets, threads, memory, versions, commit; the GPU for "cuda"."""
    cpu, flags = _processor()
    result: dict[str, Any] = {
        "cpu": cpu,
        "isa": flags,
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": _memory_gib(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "load_average": round(os.getloadavg()[0], 2),
        "thp": os.environ.get("THP_MEM_ALLOC_ENABLE") == "1",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "packages": {name: v for name in _PACKAGES if (v := _version(name))},
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain")),
        "mmfast_build": _backend._C.build_info() if _backend._C is not None else None,
    }
    if device.startswith("cuda"):
        result["gpu"] = torch.cuda.get_device_name(device)
        result["cuda"] = torch.version.cuda
    return result


def cpu_seconds() -> np.ndarray | None:
    """Seconds passed on all CPUs, busy on all CPUs, and busy with this process; ``None`` where that is not known."""
    try:
        first = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    except OSError:
        return None
    ticks = np.array([int(value) for value in first[:8]])  # what guests take is in the first two already
    passed, idle = ticks.sum(), ticks[3] + ticks[4]
    own = os.times()
    second = os.sysconf("SC_CLK_TCK")
    return np.array([passed / second, (passed - idle) / second, own.user + own.system])


def share_of_others(spans: list[np.ndarray]) -> float | None:
    """Of the CPUs' time in ``spans``, differences of `cpu_seconds`, the share that went to other processes."""
    passed, busy, own = np.sum(spans, axis=0) if spans else (0.0, 0.0, 0.0)
    return round(float(np.clip((busy - own) / passed, 0, 1)), 3) if passed > 0 else None


def sentence(machine: dict[str, Any]) -> str:
    """One line of `describe`'s result for a report."""
    isa = next((name for name in ("avx512f", "avx2", "asimd") if name in machine["isa"]), "no vector unit known")
    commit = (machine["commit"] or "unknown")[:10] + (" with local changes" if machine["dirty"] else "")
    parts = [
        machine.get("gpu") or machine["cpu"],
        f"{machine['cpus']} CPUs, {machine['threads']} used, {isa}",
        f"{machine['memory_gib']:g} GiB",
        f"Python {machine['python']}, torch {machine['torch']}",
        f"THP_MEM_ALLOC_ENABLE {'on' if machine['thp'] else 'off'}",
        f"commit {commit}",
    ]
    return " · ".join(parts)


def _processor() -> tuple[str, list[str]]:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine(), []
    fields = {}
    for line in info.read_text().splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    flags = (fields.get("flags") or fields.get("Features") or "").split()
    return fields.get("model name", platform.machine()), [f for f in flags if f.startswith(_ISA)]


def _memory_gib() -> float:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    try:
        command = ["git", "-C", str(ROOT), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
