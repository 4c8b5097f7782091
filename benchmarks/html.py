"""One self-contained HTML page of a run: tables and plots, for screens, dark ones too, and for paper."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import jinja2

from benchmarks import machine, plots, report, stages

_TEMPLATE = Path(__file__).with_name("report.html.jinja")


def page(rows: list[dict[str, Any]], breakdowns: list[dict[str, Any]] = ()) -> str:
    """The page of the ``rows`` of `suite.run` and the ``breakdowns`` of `stages.run`."""
    if not rows and not breakdowns:
        raise ValueError("rows must not be empty")
    plots._svg.count = 0  # the same rows give the same page
    against = report.baseline(rows)
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    return environment.from_string(_TEMPLATE.read_text()).render(
        notes=_notes([*rows, *breakdowns]),
        time=max((row.get("time", "") for row in rows), default=""),
        against=against,
        slices=[_slice(name, rows, against) for name in dict.fromkeys(row["slice"] for row in rows)],
        breakdowns=_breakdowns(breakdowns),
        method=_paragraphs((stages.__doc__ or "").split("\n\n", 1)[1]),
        failed=[row for row in rows if "failed" in row],
    )


def _slice(name: str, rows: list[dict[str, Any]], against: str) -> dict[str, Any]:
    own = [row for row in rows if row["slice"] == name]
    palette = plots.colours(row["provider"] for row in own)
    modes = []
    for mode in dict.fromkeys(row["mode"] for row in own):
        groups = report.groups([row for row in own if "sweep" not in row], mode)
        modes.append(
            {
                "title": report.TITLES[mode],
                "speed": plots.speed_ups(groups, against, palette),
                "memory": plots.values(
                    groups, _extra, "MB at the peak of a call, beside its results", "memory", palette, "{:.3g} MB"
                ),
                "error": plots.values(
                    groups,
                    _error,
                    "largest error against float64, over the largest value",
                    "accuracy",
                    palette,
                    "{:.1e}",
                ),
                "sweeps": _sweeps(own, mode, palette),
                "headers": report.headers(own),
                "lines": _lines(report.groups(own, mode), against),
            }
        )
    return {"name": name, "modes": modes, "summary": _summary(own, against)}


def _paragraphs(text: str) -> list[list[str]]:
    """Paragraphs, each a list: of one text, or of the items of a list."""
    parts = [" ".join(part.split()) for part in text.strip().split("\n\n")]
    return [[item for item in re.split(r"(?:^|\s)\* ", part) if item] for part in parts]


def _notes(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each machine and commit, with the range of the roofs that its runs measured."""
    roofs: dict[str, list[dict[str, float]]] = {}
    for row in rows:
        roofs.setdefault(machine.sentence(row["machine"]), []).append(row["roofline"])
    units = {"gflops": "GFLOP/s (float32 matrix product)", "gbytes": "GB/s (copy)"}

    def reached(found: list[dict[str, float]], key: str) -> str:
        low, high = (choose(roof[key] for roof in found) for choose in (min, max))
        return f"{low:g}" + (f" to {high:g}" if high > low else "") + f" {units[key]}"

    return [
        f"{sentence}. Measured roof: {', '.join(reached(found, key) for key in units)}."
        for sentence, found in roofs.items()
    ]


def _extra(row: dict[str, Any]) -> float | None:
    extra = (row.get("memory") or {}).get("extra")
    return None if extra is None else max(extra, 1e4) / 1e6  # what the kernel's counting cannot tell from nothing


def _error(row: dict[str, Any]) -> float | None:
    return (row.get("error") or {}).get("max_relative")


def _sweeps(rows: list[dict[str, Any]], mode: str, palette: dict[str, str]) -> list[dict[str, str]]:
    found: dict[str, list] = {}
    for row in rows:
        if row["mode"] == mode and "sweep" in row and "median" in row and "bytes" in row:
            found.setdefault(row["sweep"]["name"], []).append(row)
    return [
        {"name": name, "plot": plots.sweep(group, palette)}
        for name, group in found.items()
        if len({row["sweep"]["size"] for row in group}) > 1
    ]


def _lines(groups: list[list[dict[str, Any]]], against: str) -> list[dict[str, Any]]:
    lines = []
    for group in groups:
        base = next((row["median"] for row in group if row["provider"] == against), math.nan)
        for index, row in enumerate(group):
            cells = report.line(row, base, first=index == 0)
            lines.append({"cells": cells, "first": index == 0, "ours": row["provider"] == "mmfast"})
    return lines


def _summary(rows: list[dict[str, Any]], against: str) -> list[dict[str, Any]]:
    """For each case: how many times faster ``against`` is than the reference and than the best of the others."""
    cases: dict[str, dict[str, Any]] = {}
    for mode in dict.fromkeys(row["mode"] for row in rows):
        for group in report.groups([row for row in rows if "sweep" not in row], mode):
            base = next((row for row in group if row["provider"] == against), None)
            if base is None:
                continue
            others = [row for row in group if row["provider"] not in (against, "reference")]
            reference = next((row for row in group if row["provider"] == "reference" and row is not base), None)
            best = min(others, key=lambda row: row["median"], default=None)
            cases.setdefault(base["case"], {"shape": base["shape"], "modes": {}})["modes"][report.TITLES[mode]] = {
                "ms": f"{base['median'] * 1e3:.3g}",
                "reference": f"{reference['median'] / base['median']:.3g}×" if reference else "",
                "best": f"{best['median'] / base['median']:.3g}× ({best['provider']})" if best else "",
                "slower": bool(best) and best["median"] < base["median"],
                "roof": report.roof(base),
            }
    return [{"case": name, **found} for name, found in cases.items()]


def _breakdowns(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for name in dict.fromkeys(row["slice"] for row in rows):
        own = [row for row in rows if row["slice"] == name]
        lines = [
            {
                "case": row["case"] if first else "",
                "mode": report.TITLES[row["mode"]] if first else "",
                "backend": (row["backend"] + ("" if row["adds_up"] else ", does not add up")) if first else "",
                "stage": stage["stage"],
                "ms": f"{stage['seconds'] * 1e3:.3g}",
                "range": f"{stage['p20'] * 1e3:.3g} to {stage['p80'] * 1e3:.3g}",
                "share": f"{stage['seconds'] / row['total']:.0%}",
                "first": first,
            }
            for row in own
            for first, stage in ((index == 0, stage) for index, stage in enumerate(row["stages"]))
        ]
        found.append({"name": name, "plot": plots.stages(own), "lines": lines})
    return found


def write(rows: list[dict[str, Any]], folder: str | Path, breakdowns: list[dict[str, Any]] = ()) -> Path:
    """``report.html`` in ``folder``."""
    path = Path(folder) / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(rows, breakdowns))
    return path
