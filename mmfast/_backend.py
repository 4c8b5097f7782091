"""Loads the native extension and chooses who computes: `reference`, `cpu`, `cuda` or `triton`."""

from __future__ import annotations

import os

import torch

BACKENDS = ("reference", "cpu", "cuda", "triton")

# Which backends each operator has besides the reference, for the device the tensors are on.
OPS: dict[str, dict[str, str]] = {"mel": {"cpu": "cpu"}}

try:
    from mmfast import _C
except ImportError as error:  # kept: `mmfast info` and a request for backend="cpu" show it
    _C = None
    LOAD_ERROR: ImportError | None = error
else:
    LOAD_ERROR = None


def choose(op: str, device: torch.device, requested: str | None = None) -> tuple[str, str]:
    """Backend for ``op`` on tensors of ``device``, and the reason in words.

    ``requested`` (the ``backend=`` argument) wins over the environment variable ``MMFAST_BACKEND``; without either the
    native kernels are taken where they exist, else the reference.

    Raises:
        ValueError: unknown name, or one that cannot run ``op`` on ``device``.
        ImportError: a native backend was asked for and the extension did not load; the cause is chained.
    """
    origin = "backend=" if requested is not None else "MMFAST_BACKEND"
    requested = requested or os.environ.get("MMFAST_BACKEND") or None
    native = OPS[op].get(device.type)
    if requested == "reference":
        return "reference", f"asked for by {origin}"
    if requested is not None and requested not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, got {requested!r} from {origin}")
    if requested is not None and requested != native:
        raise ValueError(f"backend {requested!r} (from {origin}) has no {op} kernels for tensors on {device}")
    if native is None:
        return "reference", f"no native {op} kernels for {device.type} tensors"
    if _C is None:
        if requested is not None:
            raise ImportError(f"backend {requested!r} needs the native extension mmfast._C, which did not load") from LOAD_ERROR
        return "reference", f"the native extension did not load: {LOAD_ERROR}"
    return native, f"native kernels for {device.type} tensors"
