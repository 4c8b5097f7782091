"""Launches the kernels of small batches: sizes of their grids, and room for what goes from one to the next.

A batch keeps the device busy for a few launches' time, so that the host has no more. All that does not depend on where
tensors are is found once for a shape, in a `Plan`, and what kernels hand on to each other is one piece of memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from mmfast._backend import on_device_of
from mmfast._launch import key_at, launch
from mmfast.mmd import triton_small
from mmfast.mmd.bandwidth import least_length
from mmfast.mmd.small import tiling
from mmfast.mmd.terms import DOT, GAUSSIAN, METRIC, ROOTS
from mmfast.mmd.triton_launch import NEAR
from mmfast.mmd.triton_points import FEW

_PROGRAMS = 132  # that should be at work at once: an H100's multiprocessors; more would but read more
_LEAST = least_length(torch.float32)


@dataclass(frozen=True, eq=False)
class Launch:
    """The grid, and what stands behind the tensors among a kernel's arguments."""

    grid: tuple[int, ...]
    numbers: tuple[int, ...]
    constants: Mapping[str, object]


@dataclass(frozen=True, eq=False)
class Plan:
    """Of a batch: both launches, and where in the room between them things begin, in bytes.

    ``partial`` (b, shares, pairs, size²) comes first; ``sums`` (b, shares + 1, pairs) are of distances in each share,
    and behind these the values'. What the gradient needs comes last: ``length`` (b,) and ``weights`` (b, side, side).
    """

    distances: Launch
    values: Launch
    sums: int
    ticket: int
    length: int
    weights: int
    end: int
    lengths: tuple[int, ...]
    matrices: tuple[int, ...]

    def scratch(self, room: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``partial``, ``sums`` and ``ticket``."""
        return (
            piece(room, torch.float32, 0, self.sums // 4),
            piece(room, torch.float64, self.sums, (self.ticket - self.sums) // 8),
            piece(room, torch.int32, self.ticket, (self.length - self.ticket) // 4),
        )

    def kept(self, room: Tensor) -> tuple[Tensor, Tensor]:
        """``length`` and ``weights``, which are empty where nothing is found or kept."""
        return (
            piece(room, torch.float64, self.length, *self.lengths),
            piece(room, torch.float32, self.weights, *self.matrices),
        )


def piece(room: Tensor, dtype: torch.dtype, begin: int, *shape: int) -> Tensor:
    strides = [1]
    for size in shape[:0:-1]:
        strides.insert(0, strides[0] * size)
    return room.view(dtype).as_strided(shape, strides, begin // dtype.itemsize)


@functools.lru_cache(maxsize=1024)
def plan(
    shape: tuple[int, int, int, int], strides: tuple[int, int, int, int], dtype: torch.dtype,
    families: tuple[int, ...], counts: tuple[int, ...], diagonal: bool, aligned: bool, keep: bool,
) -> Plan:  # fmt: skip
    """Of ``shape`` (b, n, m, d), and the strides of items and rows of both samples."""
    b, n, m, d = shape
    size, tiles_x, tiles = tiling(n, m)
    small, dot, find = size == 32, METRIC[families[0]] == DOT, counts[3] > 0
    pairs = tiles * (tiles + 1) // 2
    few = d <= FEW and not dot
    # With these steps and warps no registers spill.
    step, warps = min(64 if small else 32, max(16, 1 << (d - 1).bit_length())), _warps(size)
    # Each share of the features is one more matrix to write and read.
    shares = 1 if few else max(1, min(triton.cdiv(d, 2 * step), _PROGRAMS // (pairs * b), 16))
    each = triton.cdiv(triton.cdiv(d, shares), step) * step
    shares = triton.cdiv(d, each)
    distances = Launch(
        (pairs, shares, b),
        (n, m, d, tiles_x, *strides, each, *counts[:3]),
        {
            "DOT": dot, "FEW": few, "EXACT": any(f in ROOTS for f in families), "SUMS": find, "NEAR": NEAR,
            "BLOCK": size, "STEP": step, "num_warps": warps, "num_stages": 3,
        },
    )  # fmt: skip
    values = Launch(
        (pairs, b),
        (n, m, tiles_x, tiles, shares, counts[3]),
        {
            "FAMILIES": families, "LADDER": set(families) == {GAUSSIAN}, "DOT": dot, "FIND": find, "LEAST": _LEAST,
            "DIAGONAL": diagonal, "ALIGNED": aligned, "KEEP": keep, "BLOCK": size, "num_warps": warps,
        },
    )  # fmt: skip
    side = tiles * size
    ends = [0]
    for count in (4 * b * shares * pairs * size * size, 8 * b * (shares + 1) * pairs, 4 * b, 8 * b if find else 0):
        ends.append(ends[-1] + triton.cdiv(count, 16) * 16)  # each begins where Triton looks for it
    matrices = (b, side, side) if keep else (0,)
    end = ends[-1] + (4 * b * side * side if keep else 0)
    return Plan(distances, values, *ends[1:], end, (b if find else 0,), matrices)


def _warps(size: int) -> int:
    return 4 if size == 32 else 8


def forward(
    p: Plan, x: Tensor, y: Tensor, params: Tensor, coefs: Tensor, value: Tensor,
    kept: tuple[Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """Fills ``value``, and what the gradient needs: ``kept``, or where there is none the end of the room it returns."""
    room = torch.empty(p.end if kept is None else p.length, dtype=torch.uint8, device=x.device)
    begin, at_x, at_y = room.data_ptr(), x.data_ptr(), y.data_ptr()
    sums, ticket = begin + p.sums, begin + p.ticket
    if kept is None:
        length, weights = begin + p.length, begin + p.weights
    else:
        length, weights = kept[0].data_ptr(), kept[1].data_ptr()
    of, table, scalars = p.distances, params.data_ptr(), coefs.data_ptr()
    launch(
        triton_small.distances, of.grid, lambda: (x, y, *p.scratch(room), *of.numbers), of.constants,
        key_at(p, at_x, at_y), (at_x, at_y, begin, sums, ticket, *of.numbers),
    )  # fmt: skip
    to = p.values
    launch(
        triton_small.values, to.grid,
        lambda: (*p.scratch(room), params, coefs, value, *(kept or p.kept(room)), *to.numbers), to.constants,
        key_at(p, table, scalars),
        (begin, sums, ticket, table, scalars, value.data_ptr(), length, weights, *to.numbers),
    )  # fmt: skip
    return room


def of_batch(
    x: Tensor, y: Tensor, coefs: Tensor, params: Tensor, families: Sequence[int], counts: Sequence[int],
    diagonal: bool, aligned: bool, keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Value (b,), weights (b, rows, rows) and length (b,), the latter two empty where not asked for."""
    x, y = _rows(x), _rows(y)
    (b, n, d), m, device = x.shape, y.shape[1], x.device
    strides = x.stride(0), x.stride(1), y.stride(0), y.stride(1)
    p = plan((b, n, m, d), strides, x.dtype, tuple(families), tuple(counts), diagonal, aligned, keep)
    value = torch.empty(b, dtype=torch.float32, device=device)
    length = torch.empty(p.lengths, dtype=torch.float64, device=device)
    weights = torch.empty(p.matrices, dtype=torch.float32, device=device)
    with on_device_of(x):
        forward(p, x, y, params, coefs, value, (length, weights))
    return value, weights, length


# ---- Gradients


@functools.lru_cache(maxsize=1024)
def gradient_plan(
    shape: tuple[int, int, int, int], strides: tuple[int, int, int, int], dtype: torch.dtype, of_grad: tuple,
    dot: bool, need_x: bool, need_y: bool,
) -> Launch:  # fmt: skip
    """As `plan`; ``of_grad``: the dtype and the stride of the gradient that arrives."""
    b, n, m, d = shape
    size, tiles_x, tiles = tiling(n, m)
    first, last = 0 if need_x else tiles_x, tiles if need_y else tiles_x
    cols = 16 if d <= 16 else 64 if (last - first) * triton.cdiv(d, 64) * b >= _PROGRAMS else 32
    return Launch(
        (last - first, triton.cdiv(d, cols), b),
        (of_grad[1], n, m, d, tiles_x, tiles, first, *strides),
        {"DOT": dot, "BLOCK": size, "COLS": cols, "num_warps": _warps(size), "num_stages": 3},
    )


def backward(
    p: Launch, grad: Tensor, x: Tensor, y: Tensor, weights: int, matrices: Callable[[], Tensor], grad_x: Tensor,
    grad_y: Tensor,
) -> None:  # fmt: skip
    """Fills the gradients; in place of one that is not needed stands any tensor of that dtype.

    ``weights`` is where they begin, and ``matrices()`` gives them.
    """
    at_grad, at_x, at_y = grad.data_ptr(), x.data_ptr(), y.data_ptr()
    launch(
        triton_small.gradient, p.grid, lambda: (grad, x, y, matrices(), grad_x, grad_y, *p.numbers), p.constants,
        key_at(p, at_grad, at_x, at_y, weights),
        (at_grad, at_x, at_y, weights, grad_x.data_ptr(), grad_y.data_ptr(), *p.numbers),
    )  # fmt: skip


def backward_of_batch(
    grad: Tensor, x: Tensor, y: Tensor, weights: Tensor, dot: bool, need: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    """Gradients (b, n, d) and (b, m, d) in the features' dtype, empty where not needed."""
    grad_x = torch.empty(x.shape if need[0] else (0,), dtype=x.dtype, device=x.device)
    grad_y = torch.empty(y.shape if need[1] else (0,), dtype=y.dtype, device=y.device)
    x, y = _rows(x), _rows(y)
    (b, n, d), m = x.shape, y.shape[1]
    strides = x.stride(0), x.stride(1), y.stride(0), y.stride(1)
    p = gradient_plan((b, n, m, d), strides, x.dtype, (grad.dtype, grad.stride(0)), dot, *need)
    with on_device_of(x):
        backward(p, grad, x, y, weights.data_ptr(), lambda: weights, grad_x, grad_y)
    return grad_x, grad_y


def _rows(t: Tensor) -> Tensor:
    """The features side by side."""
    t = t.detach()
    return t if t.stride(2) == 1 or t.shape[2] == 1 else t.contiguous()
