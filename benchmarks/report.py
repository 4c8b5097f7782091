"""Rows to a Markdown table and SVG plots."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tabulate import tabulate

from benchmarks import aims, machine

# The plots are transparent: a grey with the same contrast, 4 : 1, on white pages and on near-black ones.
_TEXT = "#7a8189"
_OURS, _REFERENCE, _PEER = "#e5731c", "#8a8f98", "#4c8dc4"
TITLES = {"forward": "forward", "backward": "forward + backward"}
_HEADERS = (
    "case",
    "provider",
    "median, ms",
    "p20 to p80, ms",
    "calls",
    "time ratio",
    "{items}/s",
    "GFLOP/s",
    "GB/s",
    "of roof",
    "error, max",
    "error, L2",
    "extra MB",
    "kept MB",
)


def baseline(rows: Iterable[dict[str, Any]]) -> str:
    """What ratios are taken against: mmfast where it ran, else the reference."""
    return "mmfast" if any(row["provider"] == "mmfast" and "median" in row for row in rows) else "reference"


def tables(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown: the machine, a table a mode, cases as they ran, the fastest first, and the aims."""
    if not rows:
        raise ValueError("rows must not be empty")
    against = baseline(rows)
    parts = [f"{note}\n" for note in dict.fromkeys(note(row) for row in rows)]
    parts.append(f"“time ratio” is the provider's median over that of {against}.\n")
    for mode in dict.fromkeys(row["mode"] for row in rows):
        lines = []
        for case in groups(rows, mode):
            base = next((row["median"] for row in case if row["provider"] == against), math.nan)
            lines += [line(row, base, first=index == 0) for index, row in enumerate(case)]
        table = tabulate(lines, headers(rows), tablefmt="pipe", disable_numparse=True)
        parts.append(f"### {TITLES[mode]}\n\n{table}\n")
    failed = [row for row in rows if "failed" in row]
    if failed:
        lines = [f"- {row['case']} {row['mode']} {row['provider']}: {row['failed']}" for row in failed]
        parts.append("Failed:\n\n" + "\n".join(lines) + "\n")
    found = aims.verdicts(rows)
    if found:
        parts.append(f"### Aims\n\n{aims.table(found)}\n")
    return "\n".join(parts)


def plots(rows: list[dict[str, Any]], folder: str | Path) -> list[Path]:
    """One SVG a mode in ``folder``: a bar a provider, from zero, with the 20th to 80th percentile."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    against = baseline(rows)
    paths = []
    for mode in dict.fromkeys(row["mode"] for row in rows):
        cases = groups([row for row in rows if "sweep" not in row] or rows, mode)
        if not cases:
            continue
        heights = [len(group) for group in cases]
        options = {"svg.hashsalt": "mmfast", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9}
        with mpl.rc_context(options):
            figure = Figure(figsize=(8, 0.24 * sum(heights) + 0.62 * len(cases) + 0.3), layout="constrained")
            ratios = [height + 0.8 for height in heights]
            axes = figure.subplots(len(cases), 1, squeeze=False, gridspec_kw={"height_ratios": ratios})
            for axis, group in zip(axes[:, 0], cases, strict=True):
                _bars(axis, group, against)
            axes[-1, 0].set_xlabel(f"ms a call, {TITLES[mode]}", color=_TEXT)
            path = folder / f"{mode}.svg"
            figure.savefig(path, transparent=True, metadata={"Date": None})
        paths.append(path)
    return paths


def write(rows: list[dict[str, Any]], folder: str | Path) -> list[Path]:
    """``report.md`` and the plots in ``folder``."""
    paths = plots(rows, folder)
    report = Path(folder) / "report.md"
    images = "\n".join(f"![{TITLES[path.stem]}]({path.name})" for path in paths)
    report.write_text(f"{tables(rows)}\n{images}\n")
    return [report, *paths]


def groups(rows: list[dict[str, Any]], mode: str) -> list[list[dict[str, Any]]]:
    """The measured rows of each case, fastest first."""
    cases: dict[str, list] = {}
    for row in rows:
        if row["mode"] == mode and "median" in row:
            cases.setdefault(row["case"], []).append(row)
    return [sorted(group, key=lambda row: row["median"]) for group in cases.values()]


def _bars(axis, group: list[dict[str, Any]], against: str) -> None:
    base = next((row["median"] for row in group if row["provider"] == against), None)
    names = [row["provider"] for row in group]
    milliseconds = [row["median"] * 1e3 for row in group]
    spread = [[(r["median"] - r["p20"]) * 1e3 for r in group], [(r["p80"] - r["median"]) * 1e3 for r in group]]
    colours = [{"mmfast": _OURS, "reference": _REFERENCE}.get(name, _PEER) for name in names]
    axis.barh(names, milliseconds, xerr=spread, color=colours, height=0.72, error_kw={"ecolor": _TEXT, "elinewidth": 1})
    axis.invert_yaxis()
    axis.set_xlim(0, 1.25 * max(row["p80"] * 1e3 for row in group))  # room for the words beside the longest bar
    for y, row in enumerate(group):
        ratio = "" if base is None or row["provider"] == against else f"  ({row['median'] / base:.3g}×)"
        axis.annotate(
            f"{row['median'] * 1e3:.3g}{ratio}",
            (max(row["p80"], row["median"]) * 1e3, y),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            color=_TEXT,
        )
    axis.set_title(f"{group[0]['case']}  ({group[0]['shape']})", loc="left", color=_TEXT, fontsize=9, fontweight="bold")
    axis.tick_params(colors=_TEXT, labelsize=8)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.spines["bottom"].set_color(_TEXT)


def note(row: dict[str, Any]) -> str:
    """What the row was measured on."""
    roof = row["roofline"]
    return (
        f"{machine.sentence(row['machine'])}. Measured roof: {roof['gflops']:g} GFLOP/s (float32 matrix product), "
        f"{roof['gbytes']:g} GB/s (copy)."
    )


def headers(rows: list[dict[str, Any]]) -> list[str]:
    """The names of the columns."""
    items = " or ".join(dict.fromkeys(filter(None, map(_items, rows)))) or "items"
    return [header.format(items=items) for header in _HEADERS]


def _items(row: dict[str, Any]) -> str | None:
    """What is counted by the second: frames of features, or pairs of points, or of queries and keys."""
    return next((name for name in ("frames", "pairs") if name in row), None)


def roof(row: dict[str, Any]) -> str:
    """How much of what the machine can do at most, and of which of its limits."""
    if "bytes" not in row:
        return f"{row['roof_fraction']:.1%}"
    gflops = row["roofline"].get(f"gflops_{row.get('dtype')}", row["roofline"]["gflops"])
    arithmetic = row["flops"] / gflops > row["bytes"] / row["roofline"]["gbytes"]
    return f"{row['roof_fraction']:.1%} {'FLOP' if arithmetic else 'byte'}"


def line(row: dict[str, Any], base: float, first: bool) -> tuple[str, ...]:
    """The cells of a row under `headers`."""
    memory = row.get("memory") or {}
    error = row["error"] or {}
    return (
        row["case"] if first else "",
        row["provider"],
        f"{row['median'] * 1e3:.4g}",
        f"{row['p20'] * 1e3:.4g} to {row['p80'] * 1e3:.4g}",
        str(row["n"]),
        "" if math.isnan(base) else f"{row['median'] / base:.3g}",
        f"{row[_items(row)] / row['median']:.3g}" if _items(row) else "",
        f"{row['gflops']:.3g}",
        f"{row['bytes'] / row['median'] / 1e9:.3g}" if "bytes" in row else "",
        roof(row),
        f"{error['max_relative']:.1e}" if error else "",
        f"{error['relative_l2']:.1e}" if error else "",
        f"{memory['extra'] / 1e6:.1f}" if "extra" in memory else "",
        f"{memory['kept'] / 1e6:.1f}" if "kept" in memory else "",
    )
