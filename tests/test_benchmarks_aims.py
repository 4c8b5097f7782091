"""What the benchmarks were built to reach: the table of aims, and its verdicts."""

from __future__ import annotations

import itertools
import json
import re
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

pytest.importorskip("tabulate")

from benchmarks import __main__ as command
from benchmarks import aims, cases, compare, providers
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
    assert found == aims.Verdict(table[0], "a", "forward", "2×", "1.9×", met=False, fastest="quick-one")
    (met,) = aims.verdicts([*rows[:2], row("quick-one", 2.0)], table)
    assert met.met and met.fastest == "quick-one"
    assert aims.verdicts([row("mmfast", 1.0), row("other", 9.0)], table) == []  # no peer of these
    assert aims.verdicts([row("slow", 9.0)], table) == []  # nothing of ours
    failed = {"case": "a", "mode": "forward", "provider": "quick-one", "failed": "no memory"}
    assert aims.verdicts([*rows[:2], failed], table)[0].fastest == "slow"
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
    """One run as a table, several as columns: rows of one are never judged beside those of another."""
    for name, peer in (("one", 30.0), ("two", 1.0)):
        lines = [row("mmfast", 1.0, "else", "backward"), row("sdpa", 1.0, "else")]
        lines += [row("mmfast", 1.0, "fusion-pool-16384"), row("sdpa", peer, "fusion-pool-16384")]
        (tmp_path / name).mkdir()
        (tmp_path / name / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    files = [str(tmp_path / name / "rows.jsonl") for name in ("one", "two")]
    (tmp_path / "nothing.jsonl").write_text(json.dumps(row("mmfast", 1.0)))

    def cells(*arguments):
        assert command.main(["--aims", *arguments]) == 0
        printed = capsys.readouterr().out.splitlines()
        return [[cell.strip() for cell in line.split("|")[1:-1]] or line for line in printed if line]

    header, _, line, met = cells(files[0])
    assert header[-2:] == ["measured", "verdict"] and met == "1 of 1 met"
    assert line == ["fusion-pool-16384", "forward", "sdpa", "1.5×", "30×", "met"]
    header, _, line, met = cells(*files, str(tmp_path / "nothing.jsonl"))
    assert header == ["case", "mode", "peers", "aim", "one", "two", "nothing"]
    assert line == ["fusion-pool-16384", "forward", "sdpa*, plain, flex", "1.5×", "30×", "**1×**", ""]
    assert met[4:] == ["1 of 1 met", "0 of 1 met", "0 of 0 met"]
    alike = tmp_path / "else" / "two" / "rows.jsonl"
    alike.parent.mkdir(parents=True)
    alike.write_text((tmp_path / "one" / "rows.jsonl").read_text())
    header, _, line, _ = cells(files[1], str(alike))  # two runs of one name
    assert header[4:] == [files[1], str(alike)] and line[4:] == ["**1×**", "30×"]


def test_results_page_shows_where_the_aims_stand():
    """Its table is what the command prints of the rows that are kept."""
    folder = Path(aims.__file__).parent / "results"
    page = (folder / "README.md").read_text()
    for printed in re.findall(r"<!-- aims: begin -->\n(.*?)<!-- aims: end -->", page, re.DOTALL):
        names = [cell.strip() for cell in printed.splitlines()[0].split("|")[5:-1]]
        runs = {name: aims.verdicts(compare.read(folder / name / "rows.jsonl")) for name in names}
        assert printed.strip() == aims.comparison(runs)
    assert page.count("<!-- aims: begin -->") == 2
