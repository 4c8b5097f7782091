"""Launches the kernels of small batches: sizes of their grids, and room for what goes from one to the next."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from mmfast.mmd import triton_small
from mmfast.mmd.small import block
from mmfast.mmd.terms import DOT, GAUSSIAN, METRIC, ROOTS
from mmfast.mmd.triton_launch import NEAR
from mmfast.mmd.triton_points import FEW

_PROGRAMS = 132  # that should be at work at once: an H100's multiprocessors; more would but read more
_LEAST = 2.0**-106  # the shortest squared length, `mmfast.mmd.bandwidth.Rule.finish`


def forward(
    x: Tensor, y: Tensor, coefs: Tensor, params: Tensor, families: Sequence[int], counts: Sequence[int],
    diagonal: bool, aligned: bool, keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Value (b,), weights (b, rows, rows) and length (b,), the latter two empty where not asked for."""
    x, y = _rows(x), _rows(y)
    (b, n, d), m, device = x.shape, y.shape[1], x.device
    size = block(n, m)
    tiles_x = triton.cdiv(n, size)
    tiles = tiles_x + triton.cdiv(m, size)
    pairs = tiles * (tiles + 1) // 2
    few, dot = d <= FEW and METRIC[families[0]] != DOT, METRIC[families[0]] == DOT
    step = min(64 if size == 32 else 32, max(16, triton.next_power_of_2(d)))
    # Each share of the features is a matrix more to write and read.
    shares = 1 if few else max(1, min(triton.cdiv(d, 2 * step), _PROGRAMS // (pairs * b), 16))
    each = triton.cdiv(triton.cdiv(d, shares), step) * step
    shares = triton.cdiv(d, each)
    find = counts[3] > 0

    def room(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    partial = room(b, shares, pairs, size * size)
    sums = room(b, shares + 1, pairs, dtype=torch.float64)  # of distances in each share; behind these the values'
    ticket = room(b, dtype=torch.int32)
    value, length = room(b), room(b if find else 0, dtype=torch.float64)
    side = tiles * size
    weights = room(b, side, side) if keep else room(0)
    triton_small.distances[(pairs, shares, b)](
        x, y, partial, sums, ticket, n, m, d, tiles_x, x.stride(0), x.stride(1), y.stride(0), y.stride(1), each,
        counts[0], counts[1], counts[2],
        DOT=dot, FEW=few, EXACT=any(f in ROOTS for f in families), SUMS=find, NEAR=NEAR, BLOCK=size, STEP=step,
        num_warps=_warps(size), num_stages=3,
    )  # fmt: skip
    triton_small.values[(pairs, b)](
        partial, sums, ticket, params, coefs, value, length, weights, n, m, tiles_x, tiles, shares, counts[3],
        FAMILIES=tuple(families), LADDER=set(families) == {GAUSSIAN}, DOT=dot, FIND=find, LEAST=_LEAST,
        DIAGONAL=diagonal, ALIGNED=aligned, KEEP=keep, BLOCK=size, num_warps=_warps(size),
    )  # fmt: skip
    return value, weights, length


def backward(
    grad: Tensor, x: Tensor, y: Tensor, weights: Tensor, dot: bool, need: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    """Gradients (b, n, d) and (b, m, d) in the features' dtype, empty where not needed."""
    grad_x = torch.empty(x.shape if need[0] else (0,), dtype=x.dtype, device=x.device)
    grad_y = torch.empty(y.shape if need[1] else (0,), dtype=y.dtype, device=y.device)
    x, y = _rows(x), _rows(y)
    (b, n, d), m = x.shape, y.shape[1]
    size = block(n, m)
    tiles_x, tiles_y = triton.cdiv(n, size), triton.cdiv(m, size)
    first, last = 0 if need[0] else tiles_x, tiles_x + (tiles_y if need[1] else 0)
    cols = 16 if d <= 16 else 64 if (last - first) * triton.cdiv(d, 64) * b >= _PROGRAMS else 32
    triton_small.gradient[(last - first, triton.cdiv(d, cols), b)](
        grad, grad.stride(0), x, y, weights, grad_x, grad_y, n, m, d, tiles_x, tiles_x + tiles_y, first, x.stride(0),
        x.stride(1), y.stride(0), y.stride(1), DOT=dot, BLOCK=size, COLS=cols, num_warps=_warps(size), num_stages=3,
    )  # fmt: skip
    return grad_x, grad_y


def _warps(size: int) -> int:
    return 4 if size == 32 else 8  # with these, and the steps above, no registers spill


def _rows(t: Tensor) -> Tensor:
    """The features side by side."""
    t = t.detach()
    return t if t.stride(2) == 1 or t.shape[2] == 1 else t.contiguous()
