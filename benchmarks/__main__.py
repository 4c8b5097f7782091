"""``python -m benchmarks``: measure, compare, report. ``--help`` lists the options, results/README.md uses them."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path

_DEFAULT_OUT = Path(__file__).resolve().parent / "out"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m benchmarks", description="Benchmarks of mmfast beside its peers.")
    p.add_argument("slices", nargs="*", metavar="slice", help="mel, mmd, fusion; all without any")
    p.add_argument("--cases", metavar="GLOB", help="comma-separated patterns of case names")
    p.add_argument("--providers", metavar="A,B", help="comma-separated patterns of provider names")
    p.add_argument("--sweeps", action="store_true", help="sizes from small to large; with --cases beside those")
    p.add_argument("--stages", action="store_true", help="also where the time goes (stages.py); alone with --rounds 0")
    p.add_argument("--mode", choices=("forward", "backward", "both"), default="both", help="backward: with the forward")
    p.add_argument("--threads", type=int, metavar="N", help="threads of torch and the peers (default: torch's choice)")
    effort = p.add_mutually_exclusive_group()
    effort.add_argument("--quick", action="store_true", help="a few rounds; memory of three providers only")
    effort.add_argument("--full", action="store_true", help="the measurement that results/ holds (default)")
    p.add_argument("--rounds", type=int, help="rounds in place of those of --quick or --full")
    p.add_argument("--pause", type=float, metavar="S", help="seconds of sleep before each turn (default 0.15)")
    p.add_argument("--memory", metavar="A,B", help="providers whose peak memory is measured; '' for none")
    p.add_argument(
        "--prepare", type=int, metavar="N", help="first N processes at once call all that compiles (prepare.py)"
    )
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--thp", action="store_true", help="start again with THP_MEM_ALLOC_ENABLE=1: huge pages for tensors")
    p.add_argument("--out", type=Path, default=_DEFAULT_OUT, metavar="DIR", help="rows.jsonl, reports and plots")
    p.add_argument("--list", action="store_true", help="print cases and providers and stop")
    p.add_argument("--speech", action="store_true", help="real speech: check agreement, then time (readme_bench.py)")
    p.add_argument("--compare", nargs=2, metavar=("A", "B"), help="ratio of two rows.jsonl; exit 1 on a regression")
    p.add_argument("--tolerance", type=float, default=0.05, help="slow-down that is no regression (default 0.05)")
    p.add_argument("--aims", nargs="+", metavar="FILE", help="which aims (aims.py) each of these .jsonl files reaches")
    p.add_argument("--report", nargs="+", metavar="FILE", help="write the reports of existing .jsonl files to --out")
    return p


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line. Exit code: 0; 1 for a regression, a disagreement or a failed row; 2 for wrong usage."""
    arguments = sys.argv[1:] if arguments is None else arguments
    p = parser()
    args = p.parse_args(arguments)
    if args.threads is not None and args.threads < 1:
        p.error(f"--threads must be at least 1, got {args.threads}")
    if args.thp and os.environ.get("THP_MEM_ALLOC_ENABLE") != "1":
        # torch reads it once, at its first allocation.
        os.environ["THP_MEM_ALLOC_ENABLE"] = "1"
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks", *arguments])
    _set_threads(args.threads)  # before anything imports torch
    try:
        if args.compare:
            return _compare(args)
        if args.aims:
            return _aims(args)
        if args.report:
            return _report(args)
        if args.speech:
            from benchmarks import readme_bench

            return readme_bench.run(args.out, _settings(args))
        return _measure(args)
    except ValueError as error:
        p.error(str(error))


def _compare(args: argparse.Namespace) -> int:
    from benchmarks import compare

    found = compare.changes(compare.read(args.compare[0]), compare.read(args.compare[1]), args.providers or "*")
    if not found:
        raise ValueError("--compare: the two files have no row in common (case, mode, provider, device, threads)")
    print(compare.table(found, args.tolerance))
    slower = [change for change in found if change.regressed(args.tolerance)]
    print(f"\n{len(found)} rows compared, {len(slower)} slower by more than {args.tolerance:.0%}")
    return 1 if slower else 0


def _aims(args: argparse.Namespace) -> int:
    from benchmarks import aims, compare

    names = [_name(path) for path in args.aims]
    if len(set(names)) < len(names):
        names = args.aims
    runs = {name: aims.verdicts(compare.read(path)) for name, path in zip(names, args.aims, strict=True)}
    print(aims.comparison(runs) if len(runs) > 1 else aims.table(*runs.values()))
    return 0


def _name(path: str) -> str:
    """What a file of rows is called: its folder's name where it bears the usual one."""
    place = Path(path)
    return place.resolve().parent.name if place.name == "rows.jsonl" else place.stem


def _report(args: argparse.Namespace) -> int:
    from benchmarks import compare

    found = compare.read(*args.report)
    breakdowns = [row for row in found if "stages" in row]
    print("\n".join(map(str, _write([row for row in found if "stages" not in row], breakdowns, args.out))))
    return 0


def _write(rows: list[dict], breakdowns: list[dict], out: Path) -> list[Path]:
    from benchmarks import html, report

    return [*(report.write(rows, out) if rows else []), html.write(rows, out, breakdowns)]


def _set_threads(threads: int | None) -> None:
    """Threads of torch, and of the BLAS and OpenMP libraries of peers, which read the environment once."""
    if threads is None:
        return
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"):
        os.environ[name] = str(threads)
    import torch

    torch.set_num_threads(threads)


def _settings(args: argparse.Namespace, **other):
    """`suite.QUICK` or `suite.FULL` with what the command line changes; ``other`` in place of the command line."""
    from benchmarks import suite

    settings = suite.QUICK if args.quick else suite.FULL
    changes = {"device": args.device, "seed": args.seed}
    if args.mode != "both":
        changes["modes"] = (args.mode,)
    rounds = other.get("rounds", args.rounds)
    if rounds is not None:
        changes["rounds"] = rounds
    if args.pause is not None:
        changes["pause"] = args.pause
    if args.memory is not None:
        changes["memory"] = tuple(filter(None, args.memory.split(",")))
    return dataclasses.replace(settings, **changes)


def _measure(args: argparse.Namespace) -> int:
    from benchmarks import cases, prepare, providers, report, stages, suite, sweeps

    chosen = [] if args.sweeps and args.cases is None else cases.select(args.slices, args.cases, args.device)
    chosen += sweeps.select(args.slices) if args.sweeps else []
    available, missing = providers.select(args.providers, args.device)
    for name, reason in missing.items():
        print(f"skipped {name}: {reason}", file=sys.stderr)
    if args.list:
        for case in chosen:
            names = ", ".join(p.name for p in available if p.supports(case, "forward"))
            print(f"{case.name:24} {case.shape:36} {names}")
        return 0
    if not available:
        raise ValueError(f"--providers: none of {args.providers} can run here")
    settings = _settings(args)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.prepare and settings.rounds:
        prepare.ahead(chosen, available, settings.modes, settings.device, args.prepare)
    rows = _kept(suite.run(chosen, available, settings), args.out / "rows.jsonl") if settings.rounds else []
    if not rows and not args.stages:
        raise ValueError("no provider chosen computes any case chosen in this mode")
    breakdowns = []
    if args.stages:
        timed = settings if settings.rounds else _settings(args, rounds=None)
        breakdowns = _kept(stages.run(stages.select(args.slices, args.cases), timed), args.out / "stages.jsonl")
    if rows:
        print(report.tables(rows))
    print("\n".join(map(str, _write(rows, breakdowns, args.out))))
    return 1 if any("failed" in row for row in rows) else 0


def _kept(rows: Iterable[dict], path: Path) -> list[dict]:
    """All rows, each in the file as soon as it is there."""
    kept = []
    with open(path, "w") as file:
        for row in rows:
            kept.append(row)
            file.write(json.dumps(row) + "\n")
            file.flush()
    return kept


if __name__ == "__main__":
    sys.exit(main())
