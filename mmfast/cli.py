"""The command ``mmfast``: ``info``, ``extract`` and ``tune``."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence

import mmfast
from mmfast import _backend, extract


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line; returns the exit code: 0 fine, 1 some files failed, 2 wrong usage, 130 interrupted."""
    options = _parser().parse_args(argv)
    try:
        return options.run(options)
    except extract.UsageError as error:
        print(f"mmfast {options.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"mmfast {options.command}: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mmfast", description=mmfast.__doc__)
    parser.add_argument("--version", action="version", version=f"mmfast {mmfast.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    info = commands.add_parser("info", help="what was built, what this machine has, which backend each op will use")
    info.set_defaults(run=_info)

    take = commands.add_parser(
        "extract",
        help="audio files and folders to features, one safetensors file each",
        description="Writes the features of each audio file under PATH to DIR, as the tensor 'features' of a "
        "safetensors file whose metadata holds the configuration. Files already there with the same configuration are "
        "left as they are, so the same command resumes an interrupted run. The processes of torchrun share the files.",
        epilog="Exit code: 0 all files have features, 1 some failed (listed at the end), 2 wrong usage, "
        "130 interrupted.",
    )
    take.add_argument("paths", nargs="+", metavar="PATH", help="audio files, or folders to search")
    take.add_argument("--features", required=True, choices=list(extract.PRESETS), help="what to compute")
    take.add_argument("--out", required=True, metavar="DIR", help="where to write; mirrors the paths below each PATH")
    take.add_argument("--sample-rate", type=float, metavar="HZ", help="resample to this rate (default: 16000)")
    take.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change a MelConfig field; repeatable"
    )
    take.add_argument("--batch-seconds", type=float, default=240.0, metavar="S", help="sound computed at once (240 s)")
    workers = min(4, os.cpu_count() or 1)
    take.add_argument("--num-workers", type=int, default=workers, metavar="N", help=f"threads that decode ({workers})")
    take.add_argument("--overwrite", action="store_true", help="do again what is already there")
    take.add_argument("--backend", choices=_backend.BACKENDS, help="who computes (default: the fastest that can)")
    take.set_defaults(run=_extract)

    tune = commands.add_parser(
        "tune",
        help="measures which engine is fastest for which shape on this GPU, and keeps it",
        description="Times every engine of an operator on the shapes that stand for its kinds of calls, on the current "
        "GPU, and keeps the table in the user's cache for this GPU, torch and Triton, from where it is read.",
        epilog="Exit code: 0 measured, 2 no GPU or wrong usage.",
    )
    tune.add_argument("op", choices=["fusion"], help="the operator")
    tune.set_defaults(run=_tune)
    return parser


def _info(options) -> int:
    print(_backend.format_info(_backend.info()))
    return 0


def _tune(options) -> int:
    from mmfast.fusion import routes_cuda

    try:
        print(f"wrote {routes_cuda.tune_here()}")
    except RuntimeError as error:
        print(f"mmfast tune: error: {error}", file=sys.stderr)
        return 2
    return 0


def _extract(options) -> int:
    def interrupt(*_):
        raise KeyboardInterrupt

    # torchrun and schedulers end a process with SIGTERM: clean up as for Ctrl-C.
    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        return extract.main(options)
    finally:
        signal.signal(signal.SIGTERM, previous)
