"""Launches the kernels of small batches: sizes of their grids, and room for what goes from one to the next."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from mmfast.mmd import triton_small
from mmfast.mmd.bandwidth import least_length
from mmfast.mmd.small import tiling
from mmfast.mmd.terms import DOT, GAUSSIAN, METRIC, ROOTS
from mmfast.mmd.triton_launch import NEAR
from mmfast.mmd.triton_points import FEW

_PROGRAMS = 132  # that should be at work at once: an H100's multiprocessors; more would but read more
_LEAST = least_length(torch.float32)


@dataclass(frozen=True)
class Plan:
    """Of a batch: rows of a tile, tiles of x and of both samples, pairs of tiles, and how features are taken."""

    size: int
    tiles_x: int
    tiles: int
    pairs: int
    few: bool
    step: int
    each: int
    shares: int
    warps: int


@functools.lru_cache(maxsize=256)  # this stands before every launch
def plan(b: int, n: int, m: int, d: int, dot: bool) -> Plan:
    size, tiles_x, tiles = tiling(n, m)
    small = size == 32
    pairs = tiles * (tiles + 1) // 2
    few = d <= FEW and not dot
    # With these steps and warps no registers spill.
    step, warps = min(64 if small else 32, max(16, 1 << (d - 1).bit_length())), 4 if small else 8
    # Each share of the features is one more matrix to write and read.
    shares = 1 if few else max(1, min(triton.cdiv(d, 2 * step), _PROGRAMS // (pairs * b), 16))
    each = triton.cdiv(triton.cdiv(d, shares), step) * step
    return Plan(size, tiles_x, tiles, pairs, few, step, each, triton.cdiv(d, each), warps)


def forward(
    x: Tensor, y: Tensor, coefs: Tensor, params: Tensor, families: Sequence[int], counts: Sequence[int],
    diagonal: bool, aligned: bool, keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Value (b,), weights (b, rows, rows) and length (b,), the latter two empty where not asked for."""
    x, y = _rows(x), _rows(y)
    (b, n, d), m, device = x.shape, y.shape[1], x.device
    dot, find = METRIC[families[0]] == DOT, counts[3] > 0
    p = plan(b, n, m, d, dot)

    def room(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    partial = room(b, p.shares, p.pairs, p.size * p.size)
    sums = room(b, p.shares + 1, p.pairs, dtype=torch.float64)  # of distances in each share; behind these the values'
    ticket = room(b, dtype=torch.int32)
    value, length = room(b), room(b if find else 0, dtype=torch.float64)
    side = p.tiles * p.size
    weights = room(b, side, side) if keep else room(0)
    triton_small.distances[(p.pairs, p.shares, b)](
        x, y, partial, sums, ticket, n, m, d, p.tiles_x, x.stride(0), x.stride(1), y.stride(0), y.stride(1), p.each,
        counts[0], counts[1], counts[2],
        DOT=dot, FEW=p.few, EXACT=any(f in ROOTS for f in families), SUMS=find, NEAR=NEAR, BLOCK=p.size, STEP=p.step,
        num_warps=p.warps, num_stages=3,
    )  # fmt: skip
    triton_small.values[(p.pairs, b)](
        partial, sums, ticket, params, coefs, value, length, weights, n, m, p.tiles_x, p.tiles, p.shares, counts[3],
        FAMILIES=tuple(families), LADDER=set(families) == {GAUSSIAN}, DOT=dot, FIND=find, LEAST=_LEAST,
        DIAGONAL=diagonal, ALIGNED=aligned, KEEP=keep, BLOCK=p.size, num_warps=p.warps,
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
    p = plan(b, n, m, d, dot)
    first, last = 0 if need[0] else p.tiles_x, p.tiles if need[1] else p.tiles_x
    cols = 16 if d <= 16 else 64 if (last - first) * triton.cdiv(d, 64) * b >= _PROGRAMS else 32
    triton_small.gradient[(last - first, triton.cdiv(d, cols), b)](
        grad, grad.stride(0), x, y, weights, grad_x, grad_y, n, m, d, p.tiles_x, p.tiles, first, x.stride(0),
        x.stride(1), y.stride(0), y.stride(1), DOT=dot, BLOCK=p.size, COLS=cols, num_warps=p.warps, num_stages=3,
    )  # fmt: skip
    return grad_x, grad_y


def _rows(t: Tensor) -> Tensor:
    """The features side by side."""
    t = t.detach()
    return t if t.stride(2) == 1 or t.shape[2] == 1 else t.contiguous()
