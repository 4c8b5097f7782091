"""Tests of the Triton kernels on CPU tensors, by Triton's interpreter: `make triton-test` runs them in two versions.

A test asks for ``backend="triton"`` and compares with a definition in float64, as on the GPU. Sizes and blocks are
small, since the interpreter runs one program of the grid after the other.
"""

from __future__ import annotations

import pytest

try:
    import triton
    from triton.runtime import interpreter
except ImportError as error:
    raise pytest.UsageError(f"tests/interpreter needs triton: {error}; make triton-test brings it") from error


def pytest_report_header() -> str:
    return f"triton {triton.__version__}, interpreted"


def _let_scalars_index(patch):
    """Triton 3.6 keeps a scalar as an array of one element, which NumPy 2.4 no longer takes for an int in `range`."""

    def wrapped(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    return wrapped


interpreter._patch_lang_tensor = _let_scalars_index(interpreter._patch_lang_tensor)
