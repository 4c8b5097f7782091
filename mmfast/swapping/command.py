"""``mmfast swap-check``."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from typing import Any

from torch import nn

from mmfast.extract import UsageError
from mmfast.swapping import swap, timing


def main(options: argparse.Namespace) -> int:
    """Runs the command; 1 if a swap disagreed.

    Raises:
        UsageError: nothing that could be swapped, or run, was found under the names given.
    """
    if options.rounds < 0:
        raise UsageError(f"--rounds must not be negative, got {options.rounds}")
    model, inputs = _model(options)
    before = None
    if inputs is not None and options.rounds and not options.dry_run:
        try:
            before = timing.seconds(model, inputs, options.rounds)
        except Exception as error:
            raise UsageError(f"the model does not run on its inputs: {type(error).__name__}: {error}") from error
    try:
        report = swap(
            model,
            only=options.only,
            skip=options.skip,
            dry_run=options.dry_run,
            check=inputs,
            tolerance=options.tolerance,
        )
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from error
    print(report)
    if inputs is None:
        print("note: no example inputs, so nothing was run; return (model, inputs) or give --inputs")
    if before is not None and report.swapped:
        print("\n" + timing.table(before, timing.seconds(model, inputs, options.rounds)))
    return 1 if report.undone else 0


def _model(options: argparse.Namespace) -> tuple[nn.Module, Any]:
    made = _made("FACTORY", options.factory)
    model, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"{options.factory} must return a torch.nn.Module, or a pair of it and inputs, got {type(model).__name__}"
        )
    if options.inputs is not None:
        inputs = _made("--inputs", options.inputs)
    return model, inputs


def _made(option: str, name: str) -> Any:
    """What ``module:attribute`` is, or returns."""
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute) or module.startswith("."):
        raise UsageError(f"{option} must be package.module:name, got {name!r}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `python -m` does
    try:
        found = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"{option} {name}: {error}") from error
    return found() if callable(found) and not isinstance(found, nn.Module) else found
