"""The benchmark cases of the mmd slice: MMD², the permutation test, and kernel CKA."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

import mmfast
from mmfast.kernels import Gaussian, Kernel, MultiGaussian, Polynomial

_EXACT = 512  # rows of a float64 tile


@dataclass(frozen=True)
class _TwoSamples:
    """Two samples of ``n`` points with ``d`` features each.

    Args:
        peers: names of the providers, besides mmfast's own, that compute the same numbers; the tests check it.
        modes: of `benchmarks.cases.MODES`, those that say something.
        default: part of a run that names no case.
        gpu: of a GPU's size: part of such a run on one, and only there.
        reference: small enough for the reference.
    """

    name: str
    n: int
    d: int
    peers: tuple[str, ...]
    modes: tuple[str, ...] = ("forward", "backward")
    default: bool = True
    gpu: bool = False
    reference: bool = True
    same_shapes_as: str | None = None
    slice = "mmd"

    def _generator(self, seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(zlib.crc32(f"{self.name}/{seed}".encode()))

    def inputs(self, seed: int, device: str = "cpu") -> tuple[Tensor, ...]:
        """x and y, ``(n, d)`` float32: far from the origin, which a form that cancels would show."""
        generator = self._generator(seed)
        x = torch.randn(self.n, self.d, generator=generator) + 1
        y = torch.randn(self.n, self.d, generator=generator) * 1.1 + 1.1
        return x.to(device), y.to(device)

    def upstream(self, seed: int, device: str = "cpu") -> Tensor:
        """The gradient that arrives at the value."""
        return torch.ones((), device=device)

    @property
    def pairs(self) -> int:
        """Different pairs of points whose kernel is needed."""
        return self.n * (2 * self.n - 1)

    def facts(self) -> dict[str, object]:
        """What a row says of the size."""
        return {"x": [self.n, self.d], "y": [self.n, self.d], "pairs": self.pairs}

    def small(self):
        """The same on few points, for tests."""
        return replace(self, n=min(self.n, 96))


@dataclass(frozen=True)
class MMDCase(_TwoSamples):
    """MMD² and the gradients of both samples.

    Args:
        sigma: of a single Gaussian kernel; without it DAN's five kernels.
        exact: whether the float64 result can be had in reasonable time.
    """

    sigma: float | None = None
    estimator: str = "unbiased"
    exact: bool = True

    @property
    def shape(self) -> str:
        """What a table prints."""
        return f"{self.n} + {self.n} points × {self.d}, {'5 Gaussians' if self.sigma is None else '1 Gaussian'}"

    @property
    def rungs(self) -> int:
        """Kernels in the sum, each the square of the one before."""
        return 5 if self.sigma is None else 1

    @cached_property
    def kernel(self) -> Kernel:
        return MultiGaussian(bandwidth="dan") if self.sigma is None else Gaussian(self.sigma)

    def compute(self, inputs: tuple[Tensor, Tensor], backend: str | None = None) -> Tensor:
        """MMD² from mmfast."""
        return mmfast.mmd2(*inputs, self.kernel, self.estimator, backend=backend)

    def prepare(self, inputs):
        """The inputs as mmfast takes them."""
        return inputs

    def gold(self, inputs: tuple[Tensor, Tensor], upstream: Tensor | None = None):
        """The float64 value, or with ``upstream`` the float64 gradients of x and y, tile by tile; or ``None``."""
        if not self.exact:
            return None
        x, y = (t.detach().double() for t in inputs)
        n, points = len(x), torch.cat((x, y))
        bandwidth = 2 * points.var(0).sum() if self.sigma is None else None
        widths = [2 * self.sigma**2] if bandwidth is None else [bandwidth * 2.0**k for k in range(-2, 3)]
        within = 1 / n**2 if self.estimator == "biased" else 1 / (n * (n - 1))
        value = points.new_tensor(0.0 if self.estimator == "unbiased" else 2 * len(widths) / n)
        gradients = torch.zeros_like(points)
        points = points - points.mean(0)
        for a, b in _tiles(2 * n):
            same, inside = a == b, (a.start < n) == (b.start < n)
            p, q = points[a].requires_grad_(upstream is not None), points[b].requires_grad_(upstream is not None)
            square = p.square().sum(1)[:, None] + q.square().sum(1) - 2 * p @ q.T
            kernel = sum(torch.exp(-square / width) for width in widths)
            total = kernel.sum() - (kernel.diagonal().sum() if same else 0)
            total = total * (within if inside else -1 / n**2) * (1 if same else 2)
            value += total.detach()
            if upstream is not None:
                for rows, gradient in zip((a, b), torch.autograd.grad(total, (p, q)), strict=True):
                    gradients[rows] += gradient * upstream.double()
        return value if upstream is None else (gradients[:n], gradients[n:])

    def work(self, mode: str) -> tuple[float, float]:
        """Floating point operations and bytes that the fused op needs for one call.

        A pair of different points takes ``2 d`` operations for its distance and 2 for each kernel after the first; the
        exponential is not counted. Loss and gradient in one sweep multiply the weights of the pairs with the points of
        either side, ``4 d``. The samples are read, the gradients written.
        """
        backward = mode == "backward"
        flops = (6 * self.d if backward else 2 * self.d) + 2 * (self.rungs - 1)
        return float(flops * self.pairs), 4.0 * 2 * self.n * self.d * (2 if backward else 1)


def _tiles(count: int) -> Iterator[tuple[slice, slice]]:
    """Tiles of the upper triangle of a matrix of pairs whose halves, of either sample, no tile straddles."""
    half = count // 2
    cuts = [*range(0, half, _EXACT), *range(half, count, _EXACT), count]
    blocks = [slice(a, b) for a, b in pairwise(cuts)]
    return ((a, b) for i, a in enumerate(blocks) for b in blocks[i:])


@dataclass(frozen=True)
class PermutationCase(_TwoSamples):
    """The permutation test on given permutations: the statistic and its null sample, ``(1 + permutations,)``."""

    modes: tuple[str, ...] = ("forward",)
    permutations: int = 1000

    @property
    def shape(self) -> str:
        """What a table prints."""
        return f"{self.n} + {self.n} points × {self.d}, {self.permutations} permutations"

    def facts(self):
        return super().facts() | {"permutations": self.permutations}

    def inputs(self, seed, device="cpu"):
        """x, y and the permutations ``(B, 2 n)`` int64; rows like those under the null hypothesis, nearly."""
        generator = self._generator(seed)
        z = torch.randn(2 * self.n, self.d, generator=generator) + 1
        z[self.n :, 0] += 0.05
        order = torch.rand(self.permutations, 2 * self.n, generator=generator).to(device).argsort(1)
        return z[: self.n].to(device), z[self.n :].to(device), order

    def small(self):
        return replace(self, n=min(self.n, 96), permutations=50)

    @cached_property
    def kernel(self) -> Kernel:
        return MultiGaussian(bandwidth="dan")

    def prepare(self, inputs):
        """x, y and who belongs to x in each permutation."""
        x, y, order = inputs
        members = torch.zeros(order.shape, dtype=torch.bool, device=order.device)
        return x, y, members.scatter_(1, order[:, : len(x)], True)

    def compute(self, inputs, backend=None):
        """Statistics from mmfast."""
        x, y, members = inputs
        test = mmfast.two_sample_test(x, y, self.kernel, permutations=members, backend=backend)
        return torch.cat((test.statistic[None], test.null))

    def gold(self, inputs, upstream=None):
        """The float64 statistics, or ``None`` where the reference would not fit."""
        if not self.reference:
            return None
        x, y, members = self.prepare(inputs)
        return self.compute((x.double(), y.double(), members), "reference")

    def p_value(self, statistics: Tensor) -> float:
        """(1 + #{null ≥ statistic}) / (1 + B)."""
        return float((1 + (statistics[1:] >= statistics[0]).sum()) / len(statistics))

    def work(self, mode):
        """As of `MMDCase`, and a multiplication and an addition for every pair and permutation."""
        flops = 2 * self.d + 8 + 2 * (1 + self.permutations)
        return float(flops * self.pairs), 8.0 * self.n * self.d + 2.0 * self.n * self.permutations


@dataclass(frozen=True)
class KIDCase(_TwoSamples):
    """KID of all samples: unbiased MMD² with the cubic kernel (x·y / d + 1)³."""

    modes: tuple[str, ...] = ("forward",)

    @property
    def shape(self) -> str:
        """What a table prints."""
        return f"{self.n} + {self.n} points × {self.d}, cubic"

    def compute(self, inputs, backend=None):
        """KID from mmfast."""
        return mmfast.mmd2(*inputs, Polynomial(3, None, 1.0), "unbiased", backend=backend)

    def gold(self, inputs, upstream=None):
        """The float64 value, of blocks of rows."""
        x, y = (t.double() for t in inputs)

        def total(a: Tensor, b: Tensor) -> Tensor:
            return sum((rows @ b.T / self.d + 1).pow(3).sum() for rows in a.split(8 * _EXACT))

        within = sum(total(z, z) - (z.square().sum(1) / self.d + 1).pow(3).sum() for z in (x, y))
        return within / (self.n * (self.n - 1)) - 2 * total(x, y) / self.n**2

    def work(self, mode):
        """A product and the cube of its sum for each pair."""
        return float((2 * self.d + 4) * self.pairs), 8.0 * self.n * self.d


@dataclass(frozen=True)
class CKACase(_TwoSamples):
    """Biased CKA of two representations of the same ``n`` points, with a Gaussian kernel each."""

    modes: tuple[str, ...] = ("forward",)
    d_y: int = 32

    @property
    def shape(self) -> str:
        """What a table prints."""
        return f"{self.n} points × {self.d} and {self.d_y}, 1 Gaussian each"

    @property
    def pairs(self) -> int:
        return self.n * (self.n - 1) // 2

    def facts(self):
        return {"x": [self.n, self.d], "y": [self.n, self.d_y], "pairs": self.pairs}

    def inputs(self, seed, device="cpu"):
        """x ``(n, d)`` and y ``(n, d_y)``, a noisy nonlinear image of x."""
        generator = self._generator(seed)
        x = torch.randn(self.n, self.d, generator=generator)
        mix = torch.randn(self.d, self.d_y, generator=generator) / self.d**0.5
        y = torch.tanh(x @ mix) + 0.5 * torch.randn(self.n, self.d_y, generator=generator)
        return (x + 1).to(device), (y + 1).to(device)

    @property
    def sigmas(self) -> tuple[float, float]:
        """About half the typical distance: kernel matrices that are neither constant nor diagonal."""
        return (self.d / 2) ** 0.5, (self.d_y / 3) ** 0.5

    @cached_property
    def kernels(self) -> tuple[Kernel, Kernel]:
        return Gaussian(self.sigmas[0]), Gaussian(self.sigmas[1])

    def prepare(self, inputs):
        """The inputs as mmfast takes them."""
        return inputs

    def compute(self, inputs, backend=None):
        """CKA from mmfast."""
        return mmfast.cka(*inputs, *self.kernels, backend=backend)

    def gold(self, inputs, upstream=None):
        """The float64 value, of blocks of rows."""
        points = [t.double() - t.double().mean(0) for t in inputs]

        def rows(i: int) -> list[Tensor]:
            return [
                torch.exp(-(torch.cdist(z[i : i + _EXACT], z).square()) / (2 * sigma**2))
                for z, sigma in zip(points, self.sigmas, strict=True)
            ]

        starts = range(0, len(points[0]), _EXACT)
        means = [torch.cat(of_one) for of_one in zip(*([k.mean(1) for k in rows(i)] for i in starts), strict=True)]
        sums = torch.zeros(3, dtype=torch.float64)
        for i in starts:
            k, other = (
                matrix - mean[i : i + _EXACT, None] - mean + mean.mean()
                for matrix, mean in zip(rows(i), means, strict=True)
            )
            sums += torch.stack([(a * b).sum() for a, b in ((k, other), (k, k), (other, other))])
        return sums[0] / (sums[1] * sums[2]).sqrt()

    def work(self, mode):
        """Distances of both sides, and three products of kernels with their sums, for each pair."""
        return float((2 * (self.d + self.d_y) + 8) * self.pairs), 4.0 * self.n * (self.d + self.d_y)


_MATRIX = ("cdist", "gram", "three-blocks", "three-blocks-compile")
_BLOCKED = ("blocked", "blocked-sweep", "blocked-compile")

MMD_CASES = (
    MMDCase("mmd-dan-4096x256", 4096, 256, (*_MATRIX, *_BLOCKED)),
    MMDCase("mmd-dan-4096x64", 4096, 64, (*_MATRIX, *_BLOCKED, "pykeops")),
    MMDCase("mmd-dan-1024x64", 1024, 64, ("broadcast", *_MATRIX, *_BLOCKED, "pykeops")),
    MMDCase(
        "mmd-gauss-4096x2",
        4096,
        2,
        ("broadcast", *_MATRIX, *_BLOCKED, "pykeops", "geomloss-tensorized", "geomloss-online"),
        sigma=1.0,
        estimator="biased",
    ),
    MMDCase("mmd-dan-1024x768", 1024, 768, (*_MATRIX, *_BLOCKED, "pykeops")),
    MMDCase("mmd-dan-64x256", 64, 256, ("broadcast", *_MATRIX, *_BLOCKED)),
    MMDCase("mmd-dan-65536x256", 65536, 256, (), modes=("backward",), reference=False, exact=False),
    PermutationCase("mmd-test-2048x64", 2048, 64, ("permutation-gather",)),
    CKACase("mmd-cka-8192", 8192, 64, ("cka-products", "cka-elementwise")),
    MMDCase("gpu-dan-16384x64", 16384, 64, (*_MATRIX, "pykeops"), gpu=True),
    MMDCase("gpu-dan-16384x768", 16384, 768, (*_MATRIX, "pykeops"), gpu=True),
    MMDCase("gpu-gauss-16384x2", 16384, 2, (*_MATRIX, "pykeops", "geomloss-online"), sigma=1.0, gpu=True),
    *(MMDCase(f"gpu-dan-{n}x{d}", n, d, _MATRIX, gpu=True) for n in (64, 256) for d in (256, 2048)),
    MMDCase("gpu-dan-4096x256", 4096, 256, _MATRIX, gpu=True),
    MMDCase("gpu-dan-65536x2048", 65536, 2048, (), gpu=True, modes=("backward",), reference=False, exact=False),
    PermutationCase("gpu-test-16384x64", 16384, 64, (), gpu=True, reference=False),
    KIDCase("gpu-kid-50000x2048", 50000, 2048, (), gpu=True, reference=False),
    MMDCase("mmd-smoke-64x8", 64, 8, ("gram", "blocked"), default=False),
)
