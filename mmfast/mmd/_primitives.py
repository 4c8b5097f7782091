"""The primitives of a backend: `mmfast.mmd.reference` and `mmfast.mmd.op` export the same ones."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace

from mmfast.mmd import reference


def primitives(backend: str) -> ModuleType | SimpleNamespace:
    """What computes for a backend that `mmfast._backend.choose` has named."""
    if backend == "reference":
        return reference
    from mmfast.mmd import op  # only where there are kernels to call

    return op.triton if backend == "triton" else op
