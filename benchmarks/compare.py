"""Two result files: the ratio of each row with its confidence interval, and whether one is a regression."""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

_KEY = ("slice", "case", "mode", "provider", "device", "threads")


def read(*paths: str | Path) -> list[dict[str, Any]]:
    """The rows of JSON-lines files.

    Raises:
        ValueError: a line that is not JSON, by file and number.
    """
    rows = []
    for path in paths:
        for number, line in enumerate(Path(path).read_text().splitlines(), 1):
            if line.strip():
                try:
                    rows.append(json.loads(line))
                except json.JSONDecodeError as error:
                    raise ValueError(f"{path}:{number}: not JSON: {error}") from None
    return rows


@dataclass(frozen=True)
class Change:
    """Time of the second run over that of the first, with the bounds of its interval."""

    key: tuple
    ratio: float
    low: float
    high: float
    first: float
    second: float

    def regressed(self, tolerance: float) -> bool:
        """Slower by more than ``tolerance``, with the whole interval."""
        return self.low > 1 + tolerance


def changes(
    first: list[dict], second: list[dict], providers: str = "*", confidence: float = 0.95, resamples: int = 2000
) -> list[Change]:
    """The rows that both runs have, in the first one's order.

    The interval is a percentile bootstrap of the ratio of medians that draws whole rounds, since the calls of one round
    share what else the machine did.
    """
    later = {_key(row): row for row in second if "rounds" in row}
    result = []
    for row in first:
        other = later.get(_key(row))
        wanted = any(fnmatchcase(row["provider"], pattern) for pattern in providers.split(","))
        if other is None or "rounds" not in row or not wanted:
            continue
        generator = np.random.default_rng(zlib.crc32(repr(_key(row)).encode()))
        drawn = _medians(other["rounds"], generator, resamples) / _medians(row["rounds"], generator, resamples)
        low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
        result.append(
            Change(_key(row), other["median"] / row["median"], float(low), float(high), row["median"], other["median"])
        )
    return result


def table(found: list[Change], tolerance: float) -> str:
    """The changes as a Markdown table."""
    lines = [
        (
            *change.key[1:4],
            f"{change.first * 1e3:.4g}",
            f"{change.second * 1e3:.4g}",
            f"{change.ratio:.3f}",
            f"{change.low:.3f} to {change.high:.3f}",
            "slower" if change.regressed(tolerance) else "faster" if change.high < 1 - tolerance else "",
        )
        for change in found
    ]
    headers = ("case", "mode", "provider", "first, ms", "second, ms", "ratio", "95 % interval", "verdict")
    return tabulate(lines, headers, tablefmt="pipe", disable_numparse=True)


def _key(row: dict) -> tuple:
    flat = row | {"threads": row["machine"]["threads"]}
    return tuple(flat[name] for name in _KEY)


def _medians(rounds: list[list[float]], generator: np.random.Generator, resamples: int) -> np.ndarray:
    medians = np.empty(resamples)
    for i in range(resamples):
        picked = generator.integers(len(rounds), size=len(rounds))
        medians[i] = np.median(np.concatenate([rounds[j] for j in picked]))
    return medians
