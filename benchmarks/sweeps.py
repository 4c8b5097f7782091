"""Cases of one kind from small to large, for the plots of time against size."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from benchmarks import cases
from benchmarks.fusion_cases import AttentionCase
from benchmarks.mmd_cases import MMDCase

_AUDIO = ("torchaudio",)
_PAIRS = ("cdist", "gram", "blocked")
_ATTENTION = ("sdpa", "plain")


@dataclass(frozen=True)
class Sweep:
    """Cases that differ in one size.

    Args:
        name: what rows call it.
        over: what is counted by the sizes: the label of the axis.
        members: size → case.
    """

    name: str
    over: str
    members: dict[int, object]


@lru_cache(maxsize=1)
def every() -> tuple[Sweep, ...]:
    """All sweeps."""
    log_mel = cases.CASES["logmel-1x1s"].config
    clips = {n: cases.MelCase(f"sweep-mel-{n}x1s", n, 1, log_mel, _AUDIO, False) for n in (1, 4, 16, 64, 256)}
    seconds = {
        n: cases.MelCase(f"sweep-mel-clip-{n}s", 1, n, log_mel, _AUDIO, False) for n in (1, 4, 16, 64, 256)
    }  # fmt: skip
    points = {n: MMDCase(f"sweep-mmd-{n}x64", n, 64, _PAIRS, default=False) for n in (64, 256, 1024, 4096)}
    points[16384] = replace(points[4096], name="sweep-mmd-16384x64", n=16384, peers=(), reference=False, exact=False)
    features = {d: MMDCase(f"sweep-mmd-1024x{d}", 1024, d, _PAIRS, default=False) for d in (2, 8, 32, 128, 512)}
    keys = {
        n: AttentionCase(f"sweep-fusion-256x{n}", 2, 8, 64, 256, (n,), _ATTENTION, default=False)
        for n in (16, 64, 256, 1024, 4096)
    }
    queries = {
        n: AttentionCase(f"sweep-fusion-{n}x77", 2, 8, 64, n, (77,), _ATTENTION, default=False)
        for n in (1, 16, 256, 4096)
    }
    return (
        Sweep("log-mel, batches", "clips of 1 s", clips),
        Sweep("log-mel, one clip", "seconds", seconds),
        Sweep("MMD, DAN's kernels, 64 features", "points in each sample", points),
        Sweep("MMD, DAN's kernels, 1024 + 1024 points", "features", features),
        Sweep("attention, 256 queries", "keys", keys),
        Sweep("attention, 77 keys", "queries", queries),
    )


def select(slices: list[str] | None = None) -> list:
    """The cases of all sweeps of the ``slices``, all without any."""
    return [case for sweep in every() for case in sweep.members.values() if not slices or case.slice in slices]


@lru_cache(maxsize=1)
def _places() -> dict[str, dict[str, object]]:
    return {
        case.name: {"name": sweep.name, "over": sweep.over, "size": size}
        for sweep in every()
        for size, case in sweep.members.items()
    }


def facts(case) -> dict[str, object]:
    """What a row of ``case`` says of its sweep, if it is in one."""
    place = _places().get(case.name)
    return {"sweep": place} if place else {}


def find(name: str):
    """The case of this name, in a sweep or not.

    Raises:
        KeyError: there is none.
    """
    found = {case.name: case for case in select()}
    return cases.CASES[name] if name not in found else found[name]
