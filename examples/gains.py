"""What the fused ops gain in each example, measured, and written into the section of its page that is marked for it.

python examples/gains.py                             # all, 10 steps each; on a machine that does nothing else
python examples/gains.py cross_encoder --steps 2 --dry-run
"""

from __future__ import annotations

import argparse
import importlib
import platform
import re
import sys
from pathlib import Path

import torch
from data import Unavailable
from training import LEAST, Settings, System, at_least, gains, options, train_asked

FOLDER = Path(__file__).resolve().parent
# Of the variants, the one that uses most of mmfast's ops; few copies, as the clips are prepared anew in each process.
EXAMPLES = {
    "image_voice_matching": ["--align", "mmd", "--copies", "4"],
    "picture_text_classifier": ["--fusion", "attention"],
    "image_audio_classifier": ["--fusion", "parallel", "--copies", "4"],
    "cross_encoder": ["--rounds", "2", "--copies", "4"],
    "picture_text_matching": ["--aux", "both"],
}
MARKED = re.compile(r"(<!-- gain: begin -->\n).*(<!-- gain: end -->\n)", re.DOTALL)


def measured(name: str, arguments: list[str]) -> str:
    """The section's text: the command, the table, and where it was measured."""
    module = importlib.import_module(name)
    system = next(c for c in vars(module).values() if _is_defined(c, System, name))
    settings = next(c for c in vars(module).values() if _is_defined(c, Settings, name))
    args = options(system, settings).parse_args([*arguments, "--compare"])
    table = gains(train_asked(system, settings, args))
    where = f"{platform.machine()} with {torch.backends.cpu.get_cpu_capability()}"
    threads = args.threads or torch.get_num_threads()
    return (
        f"`python examples/{name}.py {' '.join(arguments)} --compare`, batches of {args.batch}:\n"
        "the median of whole steps, and the memory that training takes beyond what the process had before.\n"
        f"torch {torch.__version__}, {threads} threads, {where}.\n\n{table}\n"
    )


def _is_defined(thing: object, base: type, module: str) -> bool:
    return isinstance(thing, type) and issubclass(thing, base) and thing.__module__ == module


def written(page: str, text: str) -> str:
    """``page`` with ``text`` between its two marks.

    Raises:
        ValueError: it has none.
    """
    found, count = MARKED.subn(lambda match: f"{match[1]}{text}{match[2]}", page)
    if count != 1:
        raise ValueError("the page must have one section between <!-- gain: begin --> and <!-- gain: end -->")
    return found


def main(arguments: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("names", nargs="*", metavar="EXAMPLE", help=f"of {', '.join(EXAMPLES)}; default: all")
    p.add_argument("--steps", type=at_least(LEAST["steps"]), default=10, help="default: 10")
    p.add_argument("--threads", type=at_least(LEAST["threads"]), default=0, help="of torch; default: its own choice")
    p.add_argument("--dry-run", action="store_true", help="print only")
    args = p.parse_args(arguments)
    if unknown := set(args.names) - set(EXAMPLES):
        p.error(f"no example {', '.join(sorted(unknown))}; there are {', '.join(EXAMPLES)}")
    for name in args.names or EXAMPLES:
        given = [*EXAMPLES[name], "--steps", str(args.steps)] + ["--threads", str(args.threads)] * bool(args.threads)
        try:
            text = measured(name, given)
        except (Unavailable, OSError) as error:
            print(f"{name} needs data that cannot be had: {error}", file=sys.stderr)
            return 1
        print(f"{name}\n\n{text}")
        if not args.dry_run:
            page = FOLDER / f"{name}.md"
            page.write_text(written(page.read_text(), text))
    return 0


if __name__ == "__main__":
    sys.exit(main())
