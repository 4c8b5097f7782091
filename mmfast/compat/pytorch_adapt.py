"""``MMDLoss``, ``MMDBatchedLoss`` and ``get_kernel_scales`` of pytorch-adapt (0.0.83, ``pytorch_adapt.layers``).

The kernel is the mean over u of exp(−kernel_scales[u] · |x − y|² / bandwidth), and the bandwidth the median of all n²
squared distances of the first batch: with each point's zero distance to itself, the lower one of two in the middle, and
constant for the gradient. Of several layers each has its own, and their kernels are multiplied.

Where this departs from pytorch-adapt:

* ``dist_func`` may only be the squared L2 distance, its default;
* where the median is zero the kernel is that of a very small bandwidth (pytorch-adapt: NaN);
* ``mmd_type="linear"`` with less than two rows raises ValueError (pytorch-adapt: NaN).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from mmfast import _backend
from mmfast.kernels import Kernel, MedianDistance, Product
from mmfast.mmd import mmd2
from mmfast.mmd.terms import GAUSSIAN, Terms

__all__ = ["MMDBatchedLoss", "MMDLoss", "get_kernel_scales"]


def get_kernel_scales(low: float = -8, high: float = 8, num_kernels: int = 33, base: float = 2.0) -> Tensor:
    """``num_kernels`` powers of ``base``, with exponents evenly spaced from ``low`` to ``high``; float64."""
    return torch.from_numpy(np.logspace(low, high, num=num_kernels, base=base))


class MMDLoss(nn.Module):
    r"""MMD² of two batches, or joint MMD² of two lists with a batch for each layer (DAN, JAN; Long et al. 2015, 2017).

    Args:
        kernel_scales: factor of 1 / bandwidth, or a tensor of several (`get_kernel_scales`).
        mmd_type: ``"linear"``, over the disjoint pairs of rows (0, 1), (2, 3), …, or ``"quadratic"``, the U-statistic.
        dist_func: None, or pytorch-metric-learning's ``LpDistance(normalize_embeddings=False, p=2, power=2)``.
        bandwidth: a number in place of the median.

    Shapes: x ``(n, d)``, y ``(m, d)`` → ``()``; n = m with ``"linear"``.
    """

    def __init__(
        self,
        kernel_scales: float | Tensor = 1,
        mmd_type: str = "linear",
        dist_func: nn.Module | None = None,
        bandwidth: float | None = None,
    ) -> None:
        super().__init__()
        if mmd_type not in ("linear", "quadratic"):
            raise ValueError(f"mmd_type must be 'linear' or 'quadratic', got {mmd_type!r}")
        if isinstance(kernel_scales, Tensor) and kernel_scales.dim() > 1:
            raise ValueError(
                f"kernel_scales must be a number or a tensor of one dimension, got {tuple(kernel_scales.shape)}"
            )
        if bandwidth is not None and not bandwidth > 0:
            raise ValueError(f"bandwidth must be positive, got {bandwidth}")
        _check_distance(dist_func)
        self.kernel_scales = kernel_scales
        self.dist_func = dist_func
        self.bandwidth = bandwidth
        self.mmd_type = mmd_type
        self._kernel = _Gaussians(self)
        self._products: dict[int, Product] = {}

    def forward(self, x: Tensor | Sequence[Tensor], y: Tensor | Sequence[Tensor]) -> Tensor:
        if self.mmd_type == "linear" and _shapes(x) != _shapes(y):
            raise ValueError(
                f"x and y must have the same shape for mmd_type='linear', got {_shapes(x)} and {_shapes(y)}"
            )
        estimator = "linear" if self.mmd_type == "linear" else "unbiased"
        if isinstance(x, Tensor):
            return mmd2(x, y, self._kernel, estimator)
        if len(x) not in self._products:
            self._products[len(x)] = Product([self._kernel] * len(x))
        return mmd2(x, y, self._products[len(x)], estimator)

    def _rule(self) -> MedianDistance:
        return MedianDistance("x", diagonal=True, kind="lower")

    def extra_repr(self) -> str:
        return f"mmd_type={self.mmd_type}, kernel_scales={self.kernel_scales}"


class MMDBatchedLoss(MMDLoss):
    r"""`MMDLoss` with ``mmd_type="quadratic"`` of two batches, no lists.

    Memory does not depend on ``batch_size``, but the bandwidth does, as in pytorch-adapt: with more rows than that it
    is the lower median of the lower medians of the distances of ``batch_size`` consecutive rows to all rows.

    Args:
        batch_size: rows in a block.
        kwargs: as in `MMDLoss`; ``mmd_type="quadratic"`` must be among them, as in the library.
    """

    def __init__(self, batch_size: int = 1024, **kwargs) -> None:
        super().__init__(**kwargs)
        if self.mmd_type != "quadratic":
            raise ValueError(f"mmd_type must be 'quadratic', got {self.mmd_type!r}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be positive, got {batch_size}")
        self.batch_size = batch_size

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if not isinstance(x, Tensor) or not isinstance(y, Tensor):
            raise TypeError("x and y must be tensors: MMDBatchedLoss takes no lists of features")
        return super().forward(x, y)

    def _rule(self) -> MedianDistance:
        return _MedianOfMedians("x", batch_size=self.batch_size)


@dataclass(frozen=True)
class _MedianOfMedians(MedianDistance):
    batch_size: int = 1024

    def _measure(self, x, y, cross, backend):
        median = MedianDistance("cross", kind="lower")
        return torch.stack([median(block, x, backend) for block in x.split(self.batch_size)]).median()


class _Gaussians(Kernel):
    """The kernel of one layer, with the settings that the loss has when it is called."""

    def __init__(self, loss: MMDLoss) -> None:
        super().__init__()
        self._loss = [loss]  # in a list: no module of this one

    @property
    def data_dependent(self) -> bool:
        return self._loss[0].bandwidth is None

    @property
    def constant(self) -> bool:
        return False

    def parts(self, x, y=None, resolve=None):
        loss, device = self._loss[0], x[0].device
        scales = loss.kernel_scales
        if isinstance(scales, Tensor):
            scales = _backend.moved(loss, "kernel_scales", device)
        scales = torch.as_tensor(scales, dtype=torch.float64, device=device).reshape(-1)
        gamma = scales / (loss.bandwidth or resolve(loss._rule(), x, y))
        nothing = torch.zeros_like(gamma)
        params = torch.stack((nothing + 1 / len(gamma), gamma, nothing, nothing), 1)
        return [(None, Terms((GAUSSIAN,) * len(gamma), (0,) * len(gamma), params))]


def _check_distance(dist_func: object) -> None:
    if dist_func is None:
        return
    wanted = {"p": 2, "power": 2, "normalize_embeddings": False, "is_inverted": False}
    found = {name: getattr(dist_func, name, None) for name in wanted}
    if type(dist_func).__name__ != "LpDistance" or found != wanted:
        raise ValueError(
            "dist_func must be None or LpDistance(normalize_embeddings=False, p=2, power=2), "
            f"got {type(dist_func).__name__} with {found}"
        )


def _shapes(x: Tensor | Sequence[Tensor]) -> list[tuple[int, ...]]:
    return [tuple(layer.shape) for layer in ([x] if isinstance(x, Tensor) else x)]
