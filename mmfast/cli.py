"""The command ``mmfast``: ``info``, ``extract``, ``swap-check`` and ``tune``."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence

import mmfast
from mmfast import _backend, extract


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line; returns the exit code.

    0 fine, 1 some files failed, 2 wrong usage, 130 interrupted, 141 nobody reads the output any more.
    """
    for stream in (sys.stdout, sys.stderr):
        if getattr(stream, "errors", None) in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")  # names of files and modules need not fit its encoding
    options = _parser().parse_args(argv)
    try:
        code = options.run(options)
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except extract.UsageError as error:
        print(f"mmfast {options.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"mmfast {options.command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # as `mmfast info | head -1`; the interpreter flushes once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


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

    check = commands.add_parser(
        "swap-check",
        help="what mmfast.swap does to a model, whether it agrees, and what it gains",
        description="Makes the model that FACTORY returns, or the pair of it and example inputs, and swaps mmfast's "
        "kernels into it. With inputs (a tensor, a tuple of arguments or a dictionary of keywords) the model is run "
        "before and after, forward and backward: differences and times are printed, and a swap that disagrees is "
        "undone and named. Nothing is written.",
        epilog="Exit code: 0 fine, 1 a swap disagreed, 2 wrong usage, 130 interrupted.",
    )
    check.add_argument("factory", metavar="MODULE:FACTORY", help="a function without arguments, or a module")
    check.add_argument("--inputs", metavar="MODULE:NAME", help="example inputs, or a function that returns them")
    check.add_argument("--only", action="append", metavar="GLOB", help="paths to swap; repeatable")
    check.add_argument("--skip", action="append", metavar="GLOB", help="paths to leave alone; repeatable")
    check.add_argument("--dry-run", action="store_true", help="only print what would be swapped")
    check.add_argument("--tolerance", type=float, metavar="X", help="relative difference that is none")
    check.add_argument(
        "--rounds", type=int, default=5, metavar="N", help="timed calls before and after (5); 0 for none"
    )
    check.set_defaults(run=_swap_check)

    tune = commands.add_parser(
        "tune",
        help="measure on this machine's GPU what the kernels have tables of, and keep the fastest",
        description="mmd: a training step for several sizes of tiles, widths and precisions. fusion: every engine on "
        "the shapes that stand for its kinds of calls. What is fastest on the current GPU is kept in the user's cache "
        "directory and taken from then on; delete the file to return to the built-in table.",
        epilog="Exit code: 0 measured, 1 there is no GPU or no Triton, 2 wrong usage.",
    )
    tune.add_argument("slice", choices=["mmd", "fusion"], help="whose kernels")
    tune.add_argument("--quick", action="store_true", help="mmd: small samples, a minute instead of several")
    tune.set_defaults(run=_tune)
    return parser


def _info(options) -> int:
    print(_backend.format_info(_backend.info()))
    return 0


def _tune(options) -> int:
    from mmfast.fusion import routes_cuda
    from mmfast.mmd import tune

    try:
        written = tune.tune(options.quick) if options.slice == "mmd" else routes_cuda.tune_here()
    except RuntimeError as error:
        print(f"mmfast tune: {error}", file=sys.stderr)
        return 1
    print(f"written to {written}")
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


def _swap_check(options) -> int:
    from mmfast.swapping import command

    return command.main(options)
