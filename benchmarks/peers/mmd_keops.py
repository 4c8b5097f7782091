"""pykeops and geomloss: sums of kernels without the matrix, by code that KeOps compiles for each formula."""

from __future__ import annotations

import importlib.util

from benchmarks.peers.mmd_torch import centred, widest
from benchmarks.providers import Provider, Runner


def _quiet_keops() -> None:
    import pykeops

    pykeops.set_verbose(False)


class KeOps(Provider):
    name, package, module = "pykeops", "pykeops", "pykeops"

    def build(self, case, device):
        _quiet_keops()
        from pykeops.torch import LazyTensor

        def kernel_sum(a, b, gamma):
            exponent = ((LazyTensor(a[:, None]) - LazyTensor(b[None])) ** 2).sum(-1) * -gamma
            total = exponent.exp()
            # KeOps evaluates every power of its own: five exponentials cost it less than the products of the ladder.
            for rung in range(1, case.rungs):
                total = total + (exponent * 2.0**rung).exp()
            return total.sum(1).sum()

        def forward(inputs):
            n, m = map(len, inputs)
            x, y = centred(*inputs)
            gamma = float(widest(case, x, y))
            xx, yy, xy = (kernel_sum(a, b, gamma) for a, b in ((x, x), (y, y), (x, y)))
            if case.estimator == "biased":
                return xx / n**2 + yy / m**2 - 2 * xy / (n * m)
            own = case.rungs
            return (xx - n * own) / (n * (n - 1)) + (yy - m * own) / (m * (m - 1)) - 2 * xy / (n * m)

        return Runner(forward)


class GeomLoss(Provider):
    """``SamplesLoss("gaussian")``, which is half of the biased MMD²."""

    package, module = "geomloss", "geomloss"

    def __init__(self, backend: str) -> None:
        self.name, self.backend = f"geomloss-{backend}", backend

    def missing(self, device):
        reason = super().missing(device)
        if reason is None and self.backend == "online" and importlib.util.find_spec("pykeops") is None:
            return "geomloss' online backend needs pykeops, which is not installed"
        return reason

    def build(self, case, device):
        if self.backend == "online":
            _quiet_keops()
        from geomloss import SamplesLoss

        loss = SamplesLoss("gaussian", blur=case.sigma, backend=self.backend)
        return Runner(lambda inputs: 2 * loss(*inputs))


PROVIDERS = [KeOps(), GeomLoss("tensorized"), GeomLoss("online")]
