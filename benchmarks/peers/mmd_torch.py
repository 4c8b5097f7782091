"""MMD² in eager PyTorch that builds the kernel matrix, the ways that it is written, each as fast as it can be so.

All are centred, take DAN's bandwidth by its closed form, and of five doubling bandwidths one exponential and four
squarings, in place where no gradient is wanted. Distances come from differences (``broadcast``, DAN's own form), from
``torch.cdist``, or from one matrix product (``gram``, of the pooled sample; ``three-blocks``, without the fourth block
that is another's transpose).
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.providers import Provider, Runner


def centred(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Both about the pooled mean, a constant."""
    with torch.no_grad():
        mean = (x.sum(0) + y.sum(0)) / (len(x) + len(y))
    return x - mean, y - mean


def widest(case, x: Tensor, y: Tensor) -> Tensor | float:
    """γ of the widest kernel exp(−γ d²), from centred samples: DAN's bandwidth is the mean squared distance."""
    if case.sigma is not None:
        return 0.5 / case.sigma**2
    with torch.no_grad():
        bandwidth = 2 * (x.square().sum() + y.square().sum()) / (len(x) + len(y) - 1)
        return 0.25 / bandwidth


def exponents(x: Tensor, y: Tensor, gamma: Tensor | float) -> Tensor:
    """−γ d², all of it by one matrix product."""
    return left(x, gamma) @ right(y, gamma).T


def left(x: Tensor, gamma: Tensor | float) -> Tensor:
    """The first factor of `exponents`."""
    norms = x.square().sum(1, keepdim=True)
    return torch.cat((x * (2 * gamma), norms * -gamma, torch.ones_like(norms)), 1)


def right(y: Tensor, gamma: Tensor | float) -> Tensor:
    """The second factor of `exponents`."""
    norms = y.square().sum(1, keepdim=True)
    return torch.cat((y, torch.ones_like(norms), norms * -gamma), 1)


def ladder(exponent: Tensor, rungs: int) -> Tensor:
    """Σ_r exp(exponent)^(2^r)."""
    if exponent.requires_grad or torch.compiler.is_compiling():
        power = exponent.exp()
        total = power
        for _ in range(rungs - 1):
            power = power * power
            total = total + power
        return total
    power = exponent.exp_()
    if rungs == 1:
        return power
    total = power.clone()
    for _ in range(rungs - 1):
        total += power.square_()
    return total


def combine(case, xx: Tensor, yy: Tensor, xy: Tensor) -> Tensor:
    """The estimate from the blocks of the kernel matrix."""
    n, m = xy.shape
    if case.estimator == "biased":
        return xx.sum() / n**2 + yy.sum() / m**2 - 2 * xy.sum() / (n * m)
    # A point's kernel with itself is known: no diagonal has to be read.
    return (
        (xx.sum() - n * case.rungs) / (n * (n - 1))
        + (yy.sum() - m * case.rungs) / (m * (m - 1))
        - 2 * xy.sum() / (n * m)
    )


def _pooled(case, kernel: Tensor, n: int) -> Tensor:
    return combine(case, kernel[:n, :n], kernel[n:, n:], kernel[:n, n:])


def broadcast(case, x: Tensor, y: Tensor) -> Tensor:
    x, y = centred(x, y)
    gamma = widest(case, x, y)
    z = torch.cat((x, y))
    square = (z[:, None] - z).square().sum(-1)
    return _pooled(case, ladder(square * -gamma, case.rungs), len(x))


def gram(case, x: Tensor, y: Tensor) -> Tensor:
    x, y = centred(x, y)
    gamma = widest(case, x, y)
    z = torch.cat((x, y))
    return _pooled(case, ladder(exponents(z, z, gamma), case.rungs), len(x))


def cdist(case, x: Tensor, y: Tensor) -> Tensor:
    x, y = centred(x, y)
    gamma = widest(case, x, y)

    def block(a: Tensor, b: Tensor) -> Tensor:
        distance = torch.cdist(a, b)
        square = distance.square() if distance.requires_grad else distance.square_()
        return ladder(square * -gamma if square.requires_grad else square.mul_(-gamma), case.rungs)

    return combine(case, block(x, x), block(y, y), block(x, y))


def three_blocks(case, x: Tensor, y: Tensor) -> Tensor:
    x, y = centred(x, y)
    gamma = widest(case, x, y)
    blocks = (ladder(exponents(a, b, gamma), case.rungs) for a, b in ((x, x), (y, y), (x, y)))
    return combine(case, *blocks)


class Eager(Provider):
    package, module = "torch", "torch"

    def __init__(self, name: str, function) -> None:
        self.name, self.function = name, function

    def build(self, case, device):
        return Runner(lambda inputs: self.function(case, *inputs))


class Compiled(Eager):
    def build(self, case, device):
        compiled = torch.compile(lambda x, y: self.function(case, x, y), dynamic=False, fullgraph=True)
        return Runner(lambda inputs: compiled(*inputs))


PROVIDERS = [
    Eager("broadcast", broadcast),
    Eager("cdist", cdist),
    Eager("gram", gram),
    Eager("three-blocks", three_blocks),
    Compiled("three-blocks-compile", three_blocks),
]
