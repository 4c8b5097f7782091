"""How close is close enough, and how much memory a call took."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch


def assert_no_worse_than_eager(
    out: torch.Tensor,
    eager: torch.Tensor,
    gold: torch.Tensor,
    factor: float = 2.0,
    floor: float | None = None,
    what: str = "result",
    rounding: torch.Tensor | None = None,
) -> None:
    """The error of ``out`` against ``gold`` (float64) is at most ``factor`` times that of ``eager``.

    In the mean, and in all but a hundredth of the elements. The single worst element of two equally good results
    differs by more than that where a logarithm has been taken of almost nothing; it is held to four times as much.

    ``floor`` is the error that is always allowed, relative to the same measure of ``gold``; by default 4 units
    in the last place of ``out``'s dtype, and 256 in float64, where ``gold`` is no better than ``out``. Where ``eager``
    is NaN or infinite, ``out`` is the same.

    ``rounding``, of the shape of ``out``, is what roundings leave that ``eager`` has not got, and is allowed beside.
    """
    assert out.shape == eager.shape == gold.shape, f"{what}: shapes {out.shape}, {eager.shape}, {gold.shape}"
    assert out.dtype == eager.dtype, f"{what}: {out.dtype}, but {eager.dtype} in eager mode"
    if floor is None:
        floor = (256 if out.dtype == torch.float64 else 4) * torch.finfo(out.dtype).eps
    finite = eager.isfinite() & gold.isfinite()
    out, eager, gold = out.detach().double(), eager.detach().double(), gold.detach()
    assert torch.equal(out.nan_to_num(7, 8, 9)[~finite], eager.nan_to_num(7, 8, 9)[~finite]), f"{what}: NaN or infinity"
    out, eager, gold = out[finite], eager[finite], gold[finite]
    rounding = None if rounding is None else rounding.detach().double()[finite]
    if not out.numel():
        return
    sizes = (("mean square", _root_mean_square, 1), ("99th percentile", _most, 1), ("largest", _largest, 4))
    for name, size, slack in sizes:
        error, baseline = size(out - gold), size(eager - gold)
        limit = slack * factor * baseline + floor * size(gold) + (0 if rounding is None else size(rounding))
        assert error <= limit, f"{what}: {name} error {error:.3g}, eager mode's {baseline:.3g}, limit {limit:.3g}"


def _root_mean_square(x: torch.Tensor) -> float:
    return x.square().mean().sqrt().item()


def _most(x: torch.Tensor) -> float:
    return x.abs().flatten().kthvalue(max(1, int(0.99 * x.numel()))).values.item()


def _largest(x: torch.Tensor) -> float:
    return x.abs().max().item()


def peak_extra_bytes(call: Callable[[], object]) -> int:
    """Bytes resident at the peak of ``call`` beyond what was before and what its result (a tensor or tuple) holds.

    Read from the kernel, so that memory which torch does not know of counts too; good to about 0.2 MB.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # else what was freed earlier could serve this call unseen
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("the kernel does not let this process reset its memory high-water mark")
    before = _status("VmRSS")
    result = call()
    peak = _status("VmHWM")
    held = sum(t.numel() * t.element_size() for t in (result if isinstance(result, tuple) else (result,)))
    return peak - before - held


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def assert_compiles_with_symbols(function, *inputs) -> None:
    """One graph, in which sizes are symbols and so are numbers that were read somewhere, as from a module."""
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="eager")
    torch.testing.assert_close(compiled(*inputs), function(*inputs))
