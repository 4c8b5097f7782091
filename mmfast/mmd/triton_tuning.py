"""Sizes of tiles and numbers of warps and stages: a small table, and what `mmfast tune mmd` has measured instead."""

from __future__ import annotations

import functools
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_PAIRS = {False: "/pairs", True: "/pairs with gradients"}
WIDTHS = (64, 256, 1024)  # a choice holds up to such a number of features, the last one beyond too


@dataclass(frozen=True)
class Sizes:
    """Of one choice.

    Attributes:
        block: rows and columns of a tile of K.
        step: features to multiply at a time.
        warps, stages: of the sweep.
        strip: tiles that one program takes one after the other.
        group: rows of tiles that are at work at the same time.
        cols: features that one program of the gradient's product takes.
        product_warps, product_stages: of that product.
    """

    block: int = 128
    step: int = 64
    warps: int = 8
    stages: int = 3
    strip: int = 8
    group: int = 16
    cols: int = 128
    product_warps: int = 8
    product_stages: int = 2


_INTERPRETER = Sizes(16, 16, 4, 1, 2, 2, 16, 4, 1)
# (architecture, dtype, parts) → for each of WIDTHS. Chosen by what fits in shared memory (164 KiB on sm_80, 227 KiB on
# sm_90 and sm_100) and registers without spills, not measured.
_HALF_1 = (Sizes(step=64, stages=3), Sizes(step=64, stages=4), Sizes(step=64, stages=4))
_HALF_2 = (Sizes(step=32, stages=3), Sizes(step=64, stages=2), Sizes(step=64, stages=2))
_SMALL_2 = (Sizes(step=32, stages=3, cols=64), Sizes(step=32, stages=4, cols=64), Sizes(step=32, stages=4, cols=64))
_DOUBLE = (Sizes(64, 16, 4, 2, 8, 16, 32, 4, 2),) * 3
_TABLE = {
    ("sm_80", "half", 1): (Sizes(step=64, stages=3, cols=64),) * 3,
    ("sm_80", "half", 2): _SMALL_2,
    ("sm_90", "half", 1): _HALF_1,
    ("sm_90", "half", 2): _HALF_2,
    ("sm_100", "half", 1): _HALF_1,
    ("sm_100", "half", 2): _HALF_2,
}


def cache_file() -> Path:
    """``mmfast/tune-mmd.json`` in the user's cache directory; ``MMFAST_TUNE_CACHE`` names another file."""
    named = os.environ.get("MMFAST_TUNE_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmfast" / "tune-mmd.json"


def architecture(device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def key(device_name: str, width: int, dtype: torch.dtype, parts: int) -> str:
    """The name of a measured choice: of one kind of GPU, number of features and precision."""
    bucket = next((w for w in WIDTHS if width <= w), WIDTHS[-1])
    return f"{device_name}/{bucket}/{str(dtype).removeprefix('torch.')}x{parts}"


@functools.cache
def _read(path: str) -> dict[str, dict]:
    """The cache file; nothing where there is none."""
    try:
        found = json.loads(Path(path).read_text())
        return {name: of for name, of in found.items() if isinstance(of, dict)}
    except (OSError, ValueError, AttributeError):
        return {}


@functools.cache
def measured(path: str) -> dict[str, Sizes]:
    """What the cache file holds of sizes; nothing where it was written by another version."""
    try:
        others = tuple(_PAIRS.values())
        return {name: Sizes(**sizes) for name, sizes in _read(path).items() if not name.endswith(others)}
    except TypeError:
        return {}


@functools.cache
def _pairs(device: torch.device, gradient: bool, path: str) -> bool:
    return _read(path).get(torch.cuda.get_device_name(device) + _PAIRS[gradient], {}).get("faster") is True


def pairs(device: torch.device, gradient: bool) -> bool:
    """Whether csrc/mmd/mmd_pairs.h, or mmd_pairs_gradient.h, was measured to be faster on such a GPU, with the same
    results."""
    return _pairs(device, gradient, str(cache_file()))


def save(found: dict[str, Sizes]) -> Path:
    """Adds measured choices to the cache file."""
    return _add({name: asdict(sizes) for name, sizes in found.items()})


def save_pairs(device_name: str, gradient: bool, faster: bool) -> Path:
    """Adds what `pairs` says from now on."""
    return _add({device_name + _PAIRS[gradient]: {"faster": faster}})


def _add(found: dict[str, dict]) -> Path:
    path = cache_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    both = _read(str(path)) | found
    part = path.with_suffix(".part")
    part.write_text(json.dumps(dict(sorted(both.items())), indent=1))
    part.replace(path)
    for cached in (_read, measured, _pairs, _sizes):
        cached.cache_clear()
    return path


def default(arch: str, width: int, dtype: torch.dtype, parts: int) -> Sizes:
    """The table's choice for an architecture, ``"sm_90"`` say; the nearest older one where it is not listed."""
    bucket = next((i for i, w in enumerate(WIDTHS) if width <= w), len(WIDTHS) - 1)
    if dtype == torch.float64:
        return _DOUBLE[bucket]
    listed = sorted({name for name, _, _ in _TABLE}, key=_number)
    older = [name for name in listed if _number(name) <= _number(arch)]
    return _TABLE[(older or listed)[-1] if older else listed[0], "half", parts][bucket]


def _number(arch: str) -> int:
    return int(arch.removeprefix("sm_"))


@functools.cache
def _sizes(device: torch.device, width: int, dtype: torch.dtype, parts: int, path: str) -> Sizes:
    name = key(torch.cuda.get_device_name(device), width, dtype, parts)
    return measured(path).get(name) or default(architecture(device), width, dtype, parts)


def sizes(device: torch.device, width: int, dtype: torch.dtype, parts: int) -> Sizes:
    """The choice for features in ``parts`` parts of ``dtype``, ``width`` of them, on a device."""
    if device.type != "cuda":
        return _INTERPRETER
    return _sizes(device, width, dtype, parts, str(cache_file()))
