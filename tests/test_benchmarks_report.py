"""The benchmark suite's page, sweeps and stages."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import xml.etree.ElementTree

import pytest
import torch

pytest.importorskip("tabulate")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
pytest.importorskip("jinja2")

from benchmarks import __main__ as command
from benchmarks import cases, html, plots, providers, report, stages, suite, sweeps
from benchmarks.mmd_cases import MMDCase

ROOF = {"gflops": 100.0, "gbytes": 10.0}
QUICK = dataclasses.replace(suite.QUICK, rounds=2, calls=2, burst=0.01, pause=0.0, memory=())


def row(case="made-up", provider="mmfast", median=0.01, mode="forward", **more):
    return {
        "time": "2026-01-01T00:00:00+00:00",
        "slice": "mmd",
        "case": case,
        "mode": mode,
        "provider": provider,
        "device": "cpu",
        "dtype": "float32",
        "shape": "64 + 64 points × 8",
        "pairs": 8128,
        "median": median,
        "p20": 0.9 * median,
        "p80": 1.2 * median,
        "n": 9,
        "error": {"max_relative": 1e-7, "relative_l2": 1e-8},
        "memory": {"extra": 3e6, "kept": 1e6},
        "flops": 5e8,
        "bytes": 2e6,
        "gflops": 5e-1 / median,
        "roof_fraction": 5e-3 / median,
        "machine": {
            "cpu": "A <processor>", "isa": ["avx2"], "cpus": 2, "threads": 2, "memory_gib": 8, "python": "3",
            "torch": "2", "thp": False, "commit": "abc", "dirty": False,
        },
        "roofline": ROOF,
    } | more  # fmt: skip


def rows():
    found = [row(provider=name, median=t) for name, t in (("mmfast", 0.01), ("reference", 0.2), ("cdist", 0.05))]
    for size in (64, 256, 1024):
        place = {"name": "a sweep", "over": "points", "size": size}
        for name, factor in (("mmfast", 1), ("gram", 3)):
            found.append(
                row(f"sweep-{size}", name, factor * size * 1e-4, flops=1e4 * size**2, bytes=8.0 * size, sweep=place)
            )
    return found


def breakdown(adds_up=True):
    parts = [("products", 0.006), ("sums <all>", 0.004), ("none", -0.0001)]
    made = [{"stage": name, "seconds": t, "p20": t - 1e-3, "p80": t + 1e-3} for name, t in parts]
    return row() | {"backend": "cpu", "total": 0.01, "adds_up": adds_up, "stages": made}


def pictures(page):
    return [xml.etree.ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]


def words(picture):
    return " ".join(t for element in picture.iter() if element.tag.endswith("text") for t in element.itertext())


def test_page_has_every_part():
    page = html.page(rows(), [breakdown()])
    titles = [picture.get("aria-label") for picture in pictures(page)]
    assert titles == ["time against points", "speed-up over mmfast", "memory", "accuracy", "where the time goes"]
    curve, speed, memory, accuracy, where = map(words, pictures(page))
    assert "limit: arithmetic, 100 GFLOP/s" in curve and "limit: bandwidth, 10 GB/s" in curve and "gram" in curve
    assert "20×" in speed and "5×" in speed and "sweep-64" not in speed
    assert "3 MB" in memory and "1.0e-07" in accuracy and "60 %" in where and "40 %" in where
    assert "5× (cdist)" in page and "20×" in page and "50.0% FLOP" in page
    assert "sums &lt;all&gt;" in page and "<processor>" not in page


def test_page_is_self_contained_and_repeatable():
    page = html.page(rows(), [breakdown()])
    assert not re.search(r'(src|href)="(?!#|p\d)', page) and "<script" not in page and "@import" not in page
    links = [link for link in re.findall(r"https?://[^\"' ]+", page) if "w3.org" not in link]
    assert not links
    names = re.findall(r'\bid="([^"]+)"', page)
    assert len(names) == len(set(names))
    for name in re.findall(r'(?:url\(#|href="#)([^")]+)', page):
        assert name in names
    assert page == html.page(rows(), [breakdown()])


def test_page_follows_the_colour_scheme_and_the_paper():
    page = html.page(rows(), [breakdown()])
    assert "prefers-color-scheme: dark" in page and "@media print" in page
    for picture in pictures(page):
        drawn = xml.etree.ElementTree.tostring(picture, encoding="unicode")
        assert "var(--text)" in drawn and not re.search("#0[12345678]{5}", drawn)
        for element in picture.iter():
            if element.tag.endswith("text") and element.text != "60 %" and "%" not in "".join(element.itertext()):
                assert "var(--text)" in element.get("style", ""), "".join(element.itertext())

    def luminance(colour):
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return sum(a * b for a, b in zip(linear, (0.2126, 0.7152, 0.0722), strict=True))

    for colour in (plots.OURS, plots.REFERENCE, *plots._PEERS):
        for background in ("#ffffff", "#0d1117"):
            low, high = sorted((luminance(colour), luminance(background)))
            assert (high + 0.05) / (low + 0.05) >= 3, colour


def test_limits_are_drawn_where_they_are():
    """The times that the roof allows: 1e4 · size² operations at 100 GFLOP/s."""
    group = [r for r in rows() if "sweep" in r and r["provider"] == "mmfast"]
    assert [r["flops"] / ROOF["gflops"] / 1e6 for r in group] == pytest.approx([0.4096, 6.5536, 104.8576])
    drawn = plots.sweep(group, plots.colours(["mmfast"]))
    slow = copy.deepcopy(group)
    for r in slow:
        r["roofline"] = {"gflops": 50.0, "gbytes": 10.0}
    assert plots.sweep(slow, plots.colours(["mmfast"])) != drawn


def test_what_does_not_add_up_is_said_and_not_drawn():
    page = html.page(rows(), [breakdown(adds_up=False)])
    assert "does not add up" in page and "where the time goes" not in [p.get("aria-label") for p in pictures(page)]


def test_old_rows_and_lonely_providers_have_a_page():
    old = [row(provider="mmfast"), row(provider="torchaudio", failed="no")]
    for r in old:
        del r["bytes"], r["flops"]
    del old[1]["median"]
    page = html.page(old)
    assert "torchaudio: no" in page and "50.0%" in page
    assert html.page([], [breakdown()])
    with pytest.raises(ValueError, match="rows must not be empty"):
        html.page([])


def test_large_groups_are_cut_into_pages():
    groups = [[row(f"case {i}", f"p{j}") for j in range(10)] for i in range(9)]
    pages = list(plots._pages(groups))
    assert [len(page) for page in pages] == [3, 3, 3] and [group for page in pages for group in page] == groups
    assert list(plots._pages([])) == []


def test_roof_names_the_limit():
    assert report.roof(row()) == "50.0% FLOP"
    assert report.roof(row(bytes=1e9)) == "50.0% byte"
    half = row(dtype="bfloat16", bytes=3e7, roofline=ROOF | {"gflops_bfloat16": 400.0})
    assert report.roof(half).endswith("byte") and report.roof(half | {"dtype": "float32"}).endswith("FLOP")


def test_sweeps_grow_in_one_size_and_are_found():
    for sweep in sweeps.every():
        sizes = list(sweep.members)
        assert sizes == sorted(sizes) and len(sizes) >= 4
        for mode in cases.MODES:
            work = [case.work(mode)[0] for case in sweep.members.values()]
            assert work == sorted(work) and len(set(work)) == len(work)
        for size, case in sweep.members.items():
            assert sweeps.facts(case)["sweep"] == {"name": sweep.name, "over": sweep.over, "size": size}
            assert sweeps.find(case.name) == case and not case.default
            assert set(case.peers) <= set(providers.every())
    assert sweeps.facts(cases.CASES["logmel-1x1s"]) == {}
    assert sweeps.find("logmel-1x1s") is cases.CASES["logmel-1x1s"]
    assert {case.slice for case in sweeps.select(["mmd"])} == {"mmd"}


SMALL = {
    "mel": dataclasses.replace(cases.CASES["mfcc-db-32x10s"], batch=1, seconds=0.3),
    "whisper": dataclasses.replace(cases.CASES["whisper-8x30s"], batch=1, seconds=0.3),
    "mmd": MMDCase("small", 32, 8, ()),
    "fusion": dataclasses.replace(cases.CASES["fusion-sd-1024x77"], batch=1, heads=2, dim=16, rows=12, keys=(9,)),
}


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("mode", cases.MODES)
def test_stages_sum_to_the_whole(name, mode):
    case = SMALL[name]
    for backend in (*stages._backends(case, "cpu"), "reference") if name != "fusion" else ("reference", "plain"):
        parts = stages._MAKERS[type(case).__name__](case, mode, backend, QUICK)
        total = {}
        for weights in parts.stages.values():
            for variant, weight in weights.items():
                total[variant] = total.get(variant, 0.0) + weight
        assert {variant: weight for variant, weight in total.items() if abs(weight) > 1e-12} == {"all": 1.0}
        assert set(total) == set(parts.variants)


def test_stages_are_the_differences_of_their_variants(monkeypatch):
    """Variants that take known times: a transform of 4 ms, filters of 2 and the logarithm's 1."""
    clock = [0.0]
    monkeypatch.setattr(suite.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(stages.time, "sleep", lambda s: None)

    def takes(seconds):
        def call():
            clock[0] += seconds

        return call

    weights = {"FFT": {"a": 1.0}, "filters": {"b": 1.0, "a": -1.0}, "log": {"all": 1.0, "b": -1.0}}
    variants = {"a": takes(0.004), "b": takes(0.006), "all": takes(0.007)}
    found = stages.measure(stages.Breakdown(variants, weights), QUICK)
    assert found["total"] == pytest.approx(0.007) and found["adds_up"]
    assert [stage["seconds"] for stage in found["stages"]] == pytest.approx([0.004, 0.002, 0.001])
    variants["b"] = takes(0.009)
    assert not stages.measure(stages.Breakdown(variants, weights), QUICK)["adds_up"]


def test_mel_prefixes_compute_less_and_less():
    """The last variant is the case itself; the first has one value a frame."""
    parts = stages._MAKERS["MelCase"](SMALL["mel"], "forward", "reference", QUICK)
    shapes = {name: call()[0].shape[1] for name, call in parts.variants.items()}
    assert shapes == {"transform": 1, "filters": 128, "logarithm": 128, "top_db": 128, "all": 40}
    case = SMALL["mel"]
    x = case.inputs(QUICK.seed)
    torch.testing.assert_close(parts.variants["all"]()[0], case.compute(x, "reference"))


def test_command_end_to_end(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(stages, "_CASES", ("mmd-smoke-64x8",))
    arguments = "mmd --cases mmd-smoke-64x8 --quick --rounds 2 --pause 0 --providers reference,gram --memory= --stages"
    assert command.main([*arguments.split(), "--out", str(tmp_path)]) == 0
    kept = [json.loads(line) for line in (tmp_path / "stages.jsonl").read_text().splitlines()]
    assert {r["mode"] for r in kept} == {"forward", "backward"} and all(len(r["stages"]) == 3 for r in kept)
    page = (tmp_path / "report.html").read_text()
    assert "mmd-smoke-64x8" in page and "Where the time goes" in page
    (tmp_path / "again").mkdir()
    files = [str(tmp_path / name) for name in ("rows.jsonl", "stages.jsonl")]
    assert command.main(["--report", *files, "--out", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "report.html").read_text() == page
    capsys.readouterr()
    assert command.main(["mmd", "--sweeps", "--list"]) == 0
    listed = capsys.readouterr().out
    assert "sweep-mmd-64x64" in listed and "mmd-dan" not in listed
