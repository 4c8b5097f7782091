"""MMD² in PyTorch, blocked by hand: tiles of 512 rows that stay in the cache, symmetric halves once.

``blocked`` lets autograd keep the tiles. ``blocked-sweep`` is an autograd function that finds the gradient in the same
sweep by its closed form, in buffers that are used again: the most that eager PyTorch allows. ``blocked-compile`` is the
same with the tile compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.peers.mmd_torch import centred, exponents, ladder, left, right, widest
from benchmarks.providers import Provider, Runner

BLOCK = 512
Tile = Callable[[Tensor, Tensor, bool], Tensor]


def _blocks(case, n: int, m: int) -> Iterator[tuple[slice, slice, float, bool]]:
    """Rows of the pooled sample on either side, the coefficient of their kernel's sum, and whether they are the same.

    Tiles below the diagonal are counted by the ones above it.
    """
    xs = [slice(i, min(i + BLOCK, n)) for i in range(0, n, BLOCK)]
    ys = [slice(n + i, n + min(i + BLOCK, m)) for i in range(0, m, BLOCK)]
    for rows, count in ((xs, n), (ys, m)):
        scale = 1 / count**2 if case.estimator == "biased" else 1 / (count * (count - 1))
        for i, a in enumerate(rows):
            yield a, a, scale, True
            for b in rows[i + 1 :]:
                yield a, b, 2 * scale, False
    for a in xs:
        for b in ys:
            yield a, b, -2 / (n * m), False


def _constant(case, n: int, m: int) -> float:
    """What the points' kernels with themselves, left out of the tiles, add."""
    return case.rungs * (1 / n + 1 / m) if case.estimator == "biased" else 0.0


def blocked(case, x: Tensor, y: Tensor) -> Tensor:
    n, m = len(x), len(y)
    x, y = centred(x, y)
    gamma = widest(case, x, y)
    z = torch.cat((x, y))
    total = 0.0
    for a, b, scale, same in _blocks(case, n, m):
        value = ladder(exponents(z[a], z[b], gamma), case.rungs).sum()
        total = total + scale * (value - case.rungs * (a.stop - a.start) if same else value)
    return total + _constant(case, n, m)


class _Sweep(torch.autograd.Function):
    """The value; if a gradient will be wanted, the gradient too, in the same pass over the tiles."""

    @staticmethod
    def forward(ctx, x, y, case, forward_tile, gradient_tile):
        n, m = len(x), len(y)
        wanted = x.requires_grad or y.requires_grad
        x, y = centred(x, y)
        gamma = widest(case, x, y)
        z = torch.cat((x, y))
        a_side, b_side = left(z, gamma), right(z, gamma)
        total = 0.0
        if wanted:
            weighted = torch.zeros(n + m, b_side.shape[1])
        for a, b, scale, same in _blocks(case, n, m):
            if wanted:
                value, of_a, of_b = gradient_tile(a_side[a], b_side[a], b_side[b], case.rungs, same)
                weighted[a].add_(of_a, alpha=scale)
                weighted[b].add_(of_b, alpha=scale)
            else:
                value = forward_tile(a_side[a], b_side[b], case.rungs, same)
            total = total + scale * value
        if wanted:
            # Σ_j w_ij (z_i − z_j), and dk/dd² = −γ w
            d = z.shape[1]
            gradient = (z * weighted[:, d : d + 1] - weighted[:, :d]) * (-2 * gamma)
            ctx.save_for_backward(gradient[:n], gradient[n:])
        return total + _constant(case, n, m)

    @staticmethod
    def backward(ctx, upstream):
        of_x, of_y = ctx.saved_tensors
        return of_x * upstream, of_y * upstream, None, None, None


class _Buffers:
    """Tiles in place, in memory that is kept."""

    def __init__(self) -> None:
        self._space = torch.empty(3, BLOCK * BLOCK)

    def _tile(self, index: int, a: Tensor, b: Tensor) -> Tensor:
        return self._space[index, : len(a) * len(b)].view(len(a), len(b))

    def forward(self, a: Tensor, b: Tensor, rungs: int, same: bool) -> Tensor:
        power = torch.mm(a, b.T, out=self._tile(0, a, b))
        if same:
            power.fill_diagonal_(-torch.inf)
        power.exp_()
        if rungs == 1:
            return power.sum()
        total = self._tile(1, a, b).copy_(power)
        for _ in range(rungs - 1):
            total += power.square_()
        return total.sum()

    def gradient(self, a: Tensor, own: Tensor, b: Tensor, rungs: int, same: bool) -> tuple[Tensor, Tensor, Tensor]:
        power = torch.mm(a, b.T, out=self._tile(0, a, b))
        if same:
            power.fill_diagonal_(-torch.inf)
        power.exp_()
        if rungs == 1:
            return power.sum(), power @ b, power.T @ own
        total, slope = self._tile(1, a, b).copy_(power), self._tile(2, a, b).copy_(power)
        for rung in range(1, rungs):
            total += power.square_()
            slope.add_(power, alpha=2.0**rung)
        return total.sum(), slope @ b, slope.T @ own


def _forward_tile(a: Tensor, b: Tensor, rungs: int, same: bool) -> Tensor:
    exponent = a @ b.T
    if same:
        exponent = exponent.masked_fill(torch.eye(len(a), dtype=torch.bool), -torch.inf)
    return ladder(exponent, rungs).sum()


def _gradient_tile(a: Tensor, own: Tensor, b: Tensor, rungs: int, same: bool) -> tuple[Tensor, Tensor, Tensor]:
    exponent = a @ b.T
    if same:
        exponent = exponent.masked_fill(torch.eye(len(a), dtype=torch.bool), -torch.inf)
    power = exponent.exp()
    total = slope = power
    for rung in range(1, rungs):
        power = power * power
        total, slope = total + power, slope + 2.0**rung * power
    return total.sum(), slope @ b, slope.T @ own


class Blocked(Provider):
    name, package, module = "blocked", "torch", "torch"

    def build(self, case, device):
        return Runner(lambda inputs: blocked(case, *inputs))


class BlockedSweep(Provider):
    name, package, module = "blocked-sweep", "torch", "torch"
    devices = ("cpu",)

    def build(self, case, device):
        buffers = _Buffers()
        return Runner(lambda inputs: _Sweep.apply(*inputs, case, buffers.forward, buffers.gradient))


class BlockedCompile(Provider):
    name, package, module = "blocked-compile", "torch", "torch"
    devices = ("cpu",)

    def build(self, case, device):
        forward = torch.compile(_forward_tile, dynamic=False, fullgraph=True)
        gradient = torch.compile(_gradient_tile, dynamic=False, fullgraph=True)
        return Runner(lambda inputs: _Sweep.apply(*inputs, case, forward, gradient))


PROVIDERS = [Blocked(), BlockedSweep(), BlockedCompile()]
