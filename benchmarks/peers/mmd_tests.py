"""The permutation test and kernel CKA in PyTorch, as libraries write them and as well as that can be done."""

from __future__ import annotations

import torch

from benchmarks.peers.mmd_torch import centred, exponents, ladder, widest
from benchmarks.providers import Provider, Runner


class PermutationGather(Provider):
    """The pooled matrix once, then its rows and columns gathered for every permutation (alibi-detect, TorchDrift).

    Two blocks are gathered; the third follows from the sum of all entries, which does not change.
    """

    name, package, module = "permutation-gather", "torch", "torch"
    differentiable = False

    def build(self, case, device):
        def forward(inputs):
            x, y, order = inputs
            n, m = len(x), len(y)
            a, b = centred(x, y)
            z = torch.cat((a, b))
            kernel = ladder(exponents(z, z, widest(_DAN, a, b)), _DAN.rungs).fill_diagonal_(0)
            everything = kernel.sum(dtype=torch.float64)

            def statistic(rows):
                xx, yy = (kernel[part][:, part].sum(dtype=torch.float64) for part in (rows[:n], rows[n:]))
                return xx / (n * (n - 1)) + yy / (m * (m - 1)) - (everything - xx - yy) / (n * m)

            own = torch.arange(n + m, device=order.device)
            return torch.stack([statistic(own), *map(statistic, order)])

        return Runner(forward)


class _DAN:
    sigma, rungs = None, 5


class CKA(Provider):
    """CKA of centred kernel matrices, their inner products by the trace of a matrix product or entry by entry."""

    package, module = "torch", "torch"
    differentiable = False

    def __init__(self, name: str, inner) -> None:
        self.name, self.inner = name, inner

    def build(self, case, device):
        def matrix(x, sigma):
            x = x - x.mean(0)
            kernel = exponents(x, x, 0.5 / sigma**2).exp_()
            mean = kernel.mean(1)
            # H K H by its means: the products with H would cost as much as those that follow.
            return kernel.sub_(mean[:, None]).sub_(mean - mean.mean())

        def forward(inputs):
            k, other = (matrix(x, sigma) for x, sigma in zip(inputs, case.sigmas, strict=True))
            return self.inner(k, other) / (self.inner(k, k) * self.inner(other, other)).sqrt()

        return Runner(forward)


PROVIDERS = [
    PermutationGather(),
    CKA("cka-products", lambda k, other: (k @ other).trace()),
    CKA("cka-elementwise", lambda k, other: torch.dot(k.flatten(), other.flatten())),
]
