"""Plots of the HTML report: SVG by matplotlib, whose text and lines take their colours from the page."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

# Stand-ins that become variables of the page: what must change between paper and a dark screen.
_TEXT, _FAINT, _PAGE = "#010203", "#040506", "#070809"
_VARIABLES = {_TEXT: "var(--text)", _FAINT: "var(--faint)", _PAGE: "var(--page)"}
# Tones in the middle, with a contrast of 3 : 1 on white and on near-black; markers and order tell them apart too.
OURS, REFERENCE = "#d9651a", "#80868f"
_PEERS = (
    "#3f87c6",
    "#1f9467",
    "#a35fd0",
    "#cf4f6b",
    "#17909b",
    "#8c8420",
    "#7a6cd8",
    "#b5702a",
    "#5f8f3a",
    "#c253a8",
    "#4f7a8c",
    "#a8524a",
)
_MARKERS = "osD^vP*Xhd<>"
_STAGES = ("#3f87c6", "#d9651a", "#1f9467", "#a35fd0", "#8c8420", "#17909b")


def colours(providers: Iterable[str]) -> dict[str, str]:
    """A colour for each provider, the same in every plot of a report."""
    peers = [p for p in dict.fromkeys(providers) if p not in ("mmfast", "reference")]
    found = {name: _PEERS[i % len(_PEERS)] for i, name in enumerate(peers)}
    return {"mmfast": OURS, "reference": REFERENCE, **found}


def speed_ups(groups: list[list[dict[str, Any]]], against: str, palette: dict[str, str]) -> list[str]:
    """For each case a bar for each provider: its time over that of ``against``, on a logarithmic axis around 1."""
    groups = [g for g in groups if len(g) > 1 and any(row["provider"] == against for row in g)]
    return [_speed_ups(some, against, palette) for some in _pages(groups)]


def _speed_ups(groups: list[list[dict[str, Any]]], against: str, palette: dict[str, str]) -> str:
    figure, axis, lines = _bars([len(g) - 1 for g in groups])
    y = 0.0
    for group in groups:
        base = next(row for row in group if row["provider"] == against)
        _heading(axis, y, f"{base['case']}  ({base['shape']})")
        for row in group:
            if row is base:
                continue
            y += 1
            ratio = row["median"] / base["median"]
            bounds = [row["p20"] / base["p80"], row["p80"] / base["p20"]]
            axis.barh(y, ratio - 1, left=1, color=palette[row["provider"]], height=0.7)
            axis.plot(bounds, [y, y], color=_TEXT, linewidth=0.8)
            _label(axis, y, row["provider"], max(ratio, bounds[1], 1), f"{ratio:.3g}×")
        y += 1.6
    _finish(axis, lines, f"time over that of {against}: right of 1 {against} is faster")
    axis.axvline(1, color=_TEXT, linewidth=0.8)
    return _svg(figure, f"speed-up over {against}")


def values(
    groups: list[list[dict[str, Any]]], pick, label: str, title: str, palette: dict[str, str], form: str
) -> list[str]:
    """For each case a dot for each provider at ``pick(row)``, on a logarithmic axis; rows without one are left out."""
    groups = [sorted((row for row in g if (pick(row) or 0) > 0), key=pick) for g in groups]
    return [_values(some, pick, label, title, palette, form) for some in _pages([g for g in groups if g])]


def _pages(groups: list[list], lines: int = 42) -> Iterable[list[list]]:
    """Groups together that fit on a page."""
    page: list[list] = []
    for group in groups:
        if page and sum(len(g) + 1.6 for g in page) + len(group) > lines:
            yield page
            page = []
        page.append(group)
    if page:
        yield page


def _values(
    groups: list[list[dict[str, Any]]], pick, label: str, title: str, palette: dict[str, str], form: str
) -> str:
    figure, axis, lines = _bars([len(g) for g in groups])
    y = 0.0
    for group in groups:
        _heading(axis, y, f"{group[0]['case']}  ({group[0]['shape']})")
        for row in group:
            y += 1
            axis.plot(pick(row), y, "o", color=palette[row["provider"]], markersize=7)
            _label(axis, y, row["provider"], pick(row), form.format(pick(row)))
        y += 1.6
    _finish(axis, lines, label)
    return _svg(figure, title)


def sweep(rows: list[dict[str, Any]], palette: dict[str, str]) -> str:
    """Time against size, a line for each provider, with the times that arithmetic and bandwidth allow at best."""
    figure = _figure(8, 4.4)
    axis = figure.subplots()
    by_size = {row["sweep"]["size"]: row for row in rows}
    sizes = sorted(by_size)
    roof = rows[0]["roofline"]
    gflops = roof.get(f"gflops_{rows[0]['dtype']}", roof["gflops"])
    limits = {
        f"arithmetic, {gflops:g} GFLOP/s": [by_size[n]["flops"] / gflops / 1e6 for n in sizes],
        f"bandwidth, {roof['gbytes']:g} GB/s": [by_size[n]["bytes"] / roof["gbytes"] / 1e6 for n in sizes],
    }
    floor = [max(pair) for pair in zip(*limits.values(), strict=True)]
    lowest = min(row["p20"] * 1e3 for row in rows)
    for (name, times), style in zip(limits.items(), ("--", ":"), strict=True):
        axis.plot(sizes, times, style, color=_TEXT, linewidth=1.2, label=f"limit: {name}")
    axis.fill_between(sizes, floor, [1e-12] * len(sizes), color=_FAINT, alpha=0.35, linewidth=0)
    order = sorted({row["provider"] for row in rows}, key=list(palette).index)
    for index, name in enumerate(order):
        line = sorted((r for r in rows if r["provider"] == name), key=lambda r: r["sweep"]["size"])
        x = [row["sweep"]["size"] for row in line]
        axis.plot(
            x,
            [row["median"] * 1e3 for row in line],
            marker=_MARKERS[index % len(_MARKERS)],
            color=palette[name],
            label=name,
            linewidth=2.2 if name == "mmfast" else 1.4,
            markersize=6,
        )
        axis.fill_between(
            x, [r["p20"] * 1e3 for r in line], [r["p80"] * 1e3 for r in line], color=palette[name], alpha=0.2
        )
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axis.set_xticks(sizes, [f"{n:g}" for n in sizes])
    axis.set_ylim(bottom=min(lowest, max(min(floor), lowest / 300)) / 2)
    axis.set_xlabel(rows[0]["sweep"]["over"])
    axis.set_ylabel("ms a call")
    axis.grid(True, color=_FAINT, linewidth=0.5)
    figure.legend(loc="outside right upper", frameon=False, labelcolor=_TEXT, fontsize=8)
    _paint(axis)
    return _svg(figure, f"time against {rows[0]['sweep']['over']}")


def stages(rows: list[dict[str, Any]]) -> str:
    """A bar for each row that adds up, cut into its stages; what the noise makes negative is left out."""
    rows = [row for row in rows if row["adds_up"]]
    if not rows:
        return ""
    figure = _figure(8, 0.62 * len(rows) + 0.5)
    axis = figure.subplots()
    names = list(dict.fromkeys(stage["stage"] for row in rows for stage in row["stages"]))
    for y, row in enumerate(rows):
        left, drawn = 0.0, [stage for stage in row["stages"] if stage["seconds"] > 0]
        total = sum(stage["seconds"] for stage in drawn)
        for stage in drawn:
            share = stage["seconds"] / total * 100
            colour = _STAGES[names.index(stage["stage"]) % len(_STAGES)]
            label = stage["stage"] if y == next(i for i, r in enumerate(rows) if stage["stage"] in _names(r)) else None
            axis.barh(y, share, left=left, color=colour, height=0.6, label=label)
            if share > 7:
                axis.text(left + share / 2, y, f"{share:.0f} %", ha="center", va="center", color="#ffffff", fontsize=8)
            left += share
    mode = {"forward": "forward", "backward": "both ways"}
    axis.set_yticks(
        range(len(rows)), [f"{r['case']}, {mode[r['mode']]}\n{r['backend']}, {r['total'] * 1e3:.3g} ms" for r in rows]
    )
    axis.invert_yaxis()
    axis.set_xlim(0, 100)
    axis.set_xlabel("% of the time")
    figure.legend(loc="outside upper center", ncols=3, frameon=False, labelcolor=_TEXT, fontsize=8)
    _paint(axis)
    return _svg(figure, "where the time goes")


def _names(row: dict[str, Any]) -> list[str]:
    return [stage["stage"] for stage in row["stages"] if stage["seconds"] > 0]


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


def _bars(counts: list[int]):
    """A figure for groups of so many bars, each under a heading; and the number of lines."""
    lines = sum(counts) + 1.6 * len(counts)
    figure = _figure(8, 0.215 * lines + 0.55)
    return figure, figure.subplots(), lines


def _heading(axis, y: float, text: str) -> None:
    axis.annotate(
        text, (0, y), xycoords=("axes fraction", "data"), va="center", ha="left", fontsize=9, fontweight="bold",
        color=_TEXT, bbox={"facecolor": _PAGE, "edgecolor": "none", "pad": 1}, zorder=3,
    )  # fmt: skip


def _label(axis, y: float, name: str, end: float, text: str) -> None:
    axis.annotate(
        name, (0, y), xycoords=("axes fraction", "data"), xytext=(-6, 0), textcoords="offset points", va="center",
        ha="right", fontsize=8, color=_TEXT, fontweight="bold" if name == "mmfast" else "normal", annotation_clip=False,
    )  # fmt: skip
    axis.annotate(
        text, (end, y), xytext=(6, 0), textcoords="offset points", va="center", fontsize=8, color=_TEXT
    )  # fmt: skip


def _finish(axis, lines: float, label: str) -> None:
    axis.set_xscale("log")
    low, high = axis.get_xlim()
    axis.set_xlim(low / 1.15, high * (high / low) ** 0.12)  # room for the numbers
    axis.set_ylim(lines - 0.9, -0.8)
    axis.set_yticks([])
    decades = math.log10(high / low)
    plain = FuncFormatter(lambda x, _: f"{x:g}")
    axis.xaxis.set_major_formatter(plain)
    if decades < 5:
        axis.xaxis.set_minor_formatter(plain if decades < 1 else NullFormatter())
    axis.set_xlabel(label)
    axis.grid(True, axis="x", color=_FAINT, linewidth=0.5)
    _paint(axis)


def _paint(axis) -> None:
    axis.set_axisbelow(True)
    axis.tick_params(which="both", colors=_TEXT, labelsize=8)
    axis.xaxis.label.set_color(_TEXT)
    axis.yaxis.label.set_color(_TEXT)
    for name, spine in axis.spines.items():
        spine.set_visible(name in ("left", "bottom"))
        spine.set_color(_FAINT)


def _svg(figure: Figure, title: str) -> str:
    """The figure as an element of a page: scaled to it, coloured by it, with names that no other plot has."""
    file = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": title, "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    _svg.count += 1
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>p{_svg.count}-", text)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    for stand_in, variable in _VARIABLES.items():
        text = text.replace(stand_in, variable)
    return re.sub(r'<svg (.*?)width="[^"]*"', rf'<svg role="img" aria-label="{title}" \1width="100%"', text, count=1)


_svg.count = 0
