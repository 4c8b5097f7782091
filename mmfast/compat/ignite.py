"""pytorch-ignite's metrics of samples and of dependence, ``MaximumMeanDiscrepancy`` and ``HSIC`` (0.5.2 and later).

Each is a subclass of the class of this name in ``ignite.metrics`` and is used in its place: engines, output transforms,
reductions over processes, state dicts (in both directions) are theirs. Only what a batch adds is computed by mmfast,
with no matrix, without a gradient as there, and from centred differences where ignite's squared norms cancel. Both are
means over batches, on several processes too, and not the values of all samples together, which `mmfast.mmd2` and
`mmfast.hsic` give.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mmfast.kernels import Gaussian, MedianDistance
from mmfast.mmd import hsic, mmd2

try:
    import ignite.metrics
    from ignite.metrics.metric import reinit__is_reduced
except ImportError as error:
    raise ImportError("mmfast.compat.ignite needs the package pytorch-ignite: pip install pytorch-ignite") from error

__all__ = ["HSIC", "MaximumMeanDiscrepancy"]


class MaximumMeanDiscrepancy(ignite.metrics.MaximumMeanDiscrepancy):
    r"""√max(0, mean over batches of the unbiased MMD²), with the kernel exp(−|x − y|² / (2·var)).

    Args:
        var: σ² of the kernel.
        output_transform, device, skip_unrolling: as in ignite.

    ``update`` takes (x, y) of the same shape ``(B, ...)``, B ≥ 2. The accumulators are float32, as in ignite, but hold
    the difference of the three means instead of each of them, so that a small one is not lost.
    """

    def __init__(
        self,
        var: float = 1.0,
        output_transform: Callable = lambda x: x,
        device: torch.device = torch.device("cpu"),  # noqa: B008
        skip_unrolling: bool = False,
    ) -> None:
        super().__init__(var, output_transform, device, skip_unrolling)

    @reinit__is_reduced
    def update(self, output: Sequence[Tensor]) -> None:
        x, y = output[0].detach(), output[1].detach()
        if x.shape != y.shape:
            raise ValueError(f"x and y must be in the same shape, got {x.shape} != {y.shape}.")
        if x.dim() < 2:
            raise ValueError(f"x must be in the shape of (B, ...), got {x.shape}.")
        value = mmd2(x.flatten(1), y.flatten(1), Gaussian(float(self.var) ** 0.5), "unbiased")
        self._xx_sum += value.to(self._device)
        self._num_batches += 1


class HSIC(ignite.metrics.HSIC):
    r"""The mean over batches of max(0, unbiased HSIC), with the kernels exp(−|x − x'|² / (2·sigma²)).

    Args:
        sigma_x, sigma_y: of the kernels; a negative one means σ² = the median of the squared distances, those of points
            to themselves counted, the mean of the middle two.
        ignore_invalid_batch: skip batches of fewer than four samples instead of raising ValueError.
        output_transform, device, skip_unrolling: as in ignite.

    The values of batches are clamped at 0 before their mean is taken, as in ignite: for independent features the metric
    is therefore not 0 on average. Any batch size works; ignite's median stops at 4096 samples.
    """

    def __init__(
        self,
        sigma_x: float = -1,
        sigma_y: float = -1,
        ignore_invalid_batch: bool = True,
        output_transform: Callable = lambda x: x,
        device: str | torch.device = torch.device("cpu"),  # noqa: B008
        skip_unrolling: bool = False,
    ) -> None:
        super().__init__(sigma_x, sigma_y, ignore_invalid_batch, output_transform, device, skip_unrolling)

    @reinit__is_reduced
    def update(self, output: Sequence[Tensor]) -> None:
        x, y = output[0].detach().flatten(1), output[1].detach().flatten(1)
        if len(x) <= 3:
            if self.ignore_invalid_batch:
                return
            raise ValueError(f"A batch must contain at least four samples, got only {len(x)} samples.")
        value = hsic(x, y, _gaussian(self.sigma_x), _gaussian(self.sigma_y), "unbiased")
        self._sum_of_hsic += value.clamp(min=0).to(self._device)
        self._num_batches += 1


def _gaussian(sigma: float) -> Gaussian:
    return Gaussian(MedianDistance("x", diagonal=True) if sigma < 0 else float(sigma))
