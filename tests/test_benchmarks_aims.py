"""What the benchmarks were built to reach: the table of aims, and its verdicts."""

from __future__ import annotations

import itertools
import json
from fnmatch import fnmatchcase

import pytest

pytest.importorskip("tabulate")

from benchmarks import __main__ as command
from benchmarks import aims, cases, providers
from benchmarks.aims import Aim


def row(provider, median, case="a", mode="forward", **more):
    return {"case": case, "mode": mode, "provider": provider, "median": median} | more


def test_aims_can_be_judged():
    """Patterns of each find cases of the device, providers, and among these one that computes the case in that mode."""
    known = providers.every()
    for device, table in (("cpu", aims.CPU), ("cuda", aims.GPU)):
        for aim in table:
            matching = [case for case in cases.CASES.values() if fnmatchcase(case.name, aim.cases)]
            assert matching and all(case.gpu == (device == "cuda") for case in matching), aim
            peers = [[p for name, p in known.items() if fnmatchcase(name, pattern)] for pattern in aim.peers]
            assert all(peers), aim
            judges = [p for found in peers for p in found if p.name != "mmfast" and device in p.devices]
            for case, mode in itertools.product(matching, aim.modes):
                assert mode in case.modes, aim
                assert aim.least is None or any(p.supports(case, mode) for p in judges), (aim, case.name, mode)


def test_a_ratio_is_to_the_fastest_of_the_peers():
    table = [Aim("a*", ("forward", "backward"), 2.0, ("slow", "quick-*"))]
    rows = [row("mmfast", 1.0), row("slow", 9.0), row("quick-one", 1.9), row("other", 0.1)]
    (found,) = aims.verdicts(rows, table)
    assert (found.case, found.mode, found.beside, found.wanted, found.found) == (
        "a",
        "forward",
        "quick-one",
        "2×",
        "1.9×",
    )
    assert not found.met
    (met,) = aims.verdicts([*rows[:2], row("quick-one", 2.0)], table)
    assert met.met and met.beside == "quick-one"
    assert aims.verdicts([row("mmfast", 1.0), row("other", 9.0)], table) == []  # no peer of these
    assert aims.verdicts([row("slow", 9.0)], table) == []  # nothing of ours
    failed = {"case": "a", "mode": "forward", "provider": "quick-one", "failed": "no memory"}
    assert aims.verdicts([*rows[:2], failed], table)[0].beside == "slow"
    assert aims.verdicts([row("mmfast", 1.0, "b"), row("slow", 9.0, "b")], table) == []


def test_limits_are_of_our_own_row():
    seconds, extra = Aim("a", ("forward",), seconds=0.02), Aim("a", ("forward",), extra=3e6)
    ours = row("mmfast", 0.02, memory={"extra": 3.1e6, "kept": 0})
    time, memory = aims.verdicts([ours, row("other", 0.001)], [seconds, extra])
    assert (time.wanted, time.found, time.met) == ("20 ms", "20 ms", True)
    assert (memory.wanted, memory.found, memory.met) == ("3 MB", "3.1 MB", False)
    for nothing in (None, {"failed": "no"}):  # was not measured, could not be
        assert aims.verdicts([row("mmfast", 0.02, memory=nothing)], [extra]) == []
    assert not aims.verdicts([row("mmfast", 0.021)], [seconds])[0].met


@pytest.mark.parametrize(
    "figures", [{}, {"least": 2.0}, {"seconds": 1.0, "peers": ("a",)}, {"seconds": 1.0, "extra": 2.0}]
)
def test_an_aim_is_one_figure(figures):
    with pytest.raises(ValueError, match="one of least"):
        Aim("a", ("forward",), **figures)


def test_command(tmp_path, capsys):
    """A table a file: rows of one run are never judged beside those of another."""
    for name, peer in (("one", 30.0), ("two", 3.0)):
        lines = [
            row("mmfast", 1.0, "fusion-pool-16384"),
            row("sdpa", peer, "fusion-pool-16384"),
            row("sdpa", 1, "else"),
        ]
        lines[1:1] = [row("mmfast", 1.0, "else", "backward")]
        (tmp_path / name).write_text("\n".join(map(json.dumps, lines)))
    assert command.main(["--aims", str(tmp_path / "one"), str(tmp_path / "two")]) == 0
    first, second = capsys.readouterr().out.split("### ")[1:]
    assert first.startswith(str(tmp_path / "one")) and "| 30×" in first and "1 of 1 aims met" in first
    assert "| 3×" in second and "| met" in second
    (tmp_path / "two").write_text(json.dumps(row("mmfast", 1.0)))
    assert command.main(["--aims", str(tmp_path / "two")]) == 0
    assert "0 of 0 aims" in capsys.readouterr().out
