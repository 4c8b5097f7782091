"""The alignment losses of thuml/Transfer-Learning-Library (tllib): DAN's and JAN's kernels, and CORAL.

    from mmfast.compat.tllib import GaussianKernel, MultipleKernelMaximumMeanDiscrepancy

    mkmmd_loss = MultipleKernelMaximumMeanDiscrepancy([GaussianKernel(alpha=2**k) for k in range(-3, 2)])

Losses keep tllib's values to the last constant: to the estimate of MMD² they add 2 / (n − 1), whatever the number of
kernels and in the linear version too. It is there "to make up for the value on the diagonal" and does so for one kernel
only; gradients do not know of it. `mmfast.mmd2` is the estimate alone.

Where this departs from tllib:

* the quadratic losses take batches of different sizes n and m, and add 1 / (n − 1) + 1 / (m − 1);
* in batches of two the linear version counts each cross term as it does in larger ones (tllib counts them half);
* kernels are `GaussianKernel` of this module or of tllib, or any of `mmfast.kernels`, never other functions of the
  features: the losses build no matrix that such a function could give;
* where all points coincide the matrix is 1 (tllib: NaN).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmfast import _backend
from mmfast.kernels import Kernel, MeanDistance, Product, Sum
from mmfast.mmd import kernel_matrix, mmd2
from mmfast.mmd.terms import GAUSSIAN, Terms

__all__ = [
    "CorrelationAlignmentLoss",
    "GaussianKernel",
    "JointMultipleKernelMaximumMeanDiscrepancy",
    "MultipleKernelMaximumMeanDiscrepancy",
]

_MEAN = MeanDistance(diagonal=True)


class GaussianKernel(nn.Module):
    r"""``forward(X)``: the matrix exp(−|x_i − x_j|² / (2σ²)) of the rows of ``X`` ``(n, d)``, ``(n, n)``.

    With ``track_running_stats`` σ² is ``alpha`` times the mean of the batch's n² squared distances (each point's zero
    distance to itself counts), a constant for the gradient: of each batch by itself, not a running mean. It is kept in
    ``sigma_square``.

    Args:
        sigma: σ of a fixed kernel, used with ``track_running_stats=False`` only.
        track_running_stats: find σ in the batch.
        alpha: factor of σ².
    """

    def __init__(
        self, sigma: float | None = None, track_running_stats: bool | None = True, alpha: float | None = 1.0
    ) -> None:
        super().__init__()
        if not track_running_stats and sigma is None:
            raise ValueError("sigma must be given where track_running_stats is False")
        self.sigma_square = torch.tensor(sigma * sigma) if sigma is not None else None
        self.track_running_stats = track_running_stats
        self.alpha = alpha

    def forward(self, X: Tensor) -> Tensor:
        return kernel_matrix(X, kernel=_Gaussians([self]))


class MultipleKernelMaximumMeanDiscrepancy(nn.Module):
    r"""DAN's loss (Long et al. 2015): MMD² of the sum of the kernels, plus a constant (see the module).

    Args:
        kernels: `GaussianKernel`, or kernels of `mmfast.kernels`.
        linear: estimate over the pairs (i, i + 1 mod n) only, else the U-statistic.

    Shapes: z_s ``(n, *)`` and z_t ``(m, *)``, with n = m in the linear version → ``()``.
    """

    def __init__(self, kernels: Sequence[nn.Module], linear: bool | None = False) -> None:
        super().__init__()
        self.kernels = kernels
        self.linear = linear
        self._sum = _sum(kernels)

    def forward(self, z_s: Tensor, z_t: Tensor) -> Tensor:
        estimate = mmd2(z_s.flatten(1), z_t.flatten(1), self._sum, _estimator(self.linear))
        return estimate + _constant(z_s, z_t)


class JointMultipleKernelMaximumMeanDiscrepancy(nn.Module):
    r"""JAN's loss (Long et al. 2017): MMD² of the product of the layers' kernels, plus a constant (see the module).

    Args:
        kernels: for each layer, the kernels that are summed.
        linear: as above; the default is True.
        thetas: for each layer a module that its features of both domains, one batch, go through first (adversarial
            JAN).

    Shapes: z_s and z_t tuples of a tensor ``(n, *)`` or ``(m, *)`` for each layer → ``()``.
    """

    def __init__(
        self,
        kernels: Sequence[Sequence[nn.Module]],
        linear: bool | None = True,
        thetas: Sequence[nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.kernels = kernels
        self.linear = linear
        self.thetas = thetas if thetas else [nn.Identity() for _ in kernels]
        self._product = Product([_sum(layer) for layer in kernels])

    def forward(self, z_s: Sequence[Tensor], z_t: Sequence[Tensor]) -> Tensor:
        layers = [
            _through(theta, s.flatten(1), t.flatten(1)) for s, t, theta in zip(z_s, z_t, self.thetas, strict=True)
        ]
        xs, ys = zip(*layers, strict=True)
        return mmd2(xs, ys, self._product, _estimator(self.linear)) + _constant(xs[0], ys[0])


class CorrelationAlignmentLoss(nn.Module):
    r"""Deep CORAL's loss (Sun and Saenko 2016) as tllib computes it.

    The mean of the squared differences of the means, plus the mean of those of the unbiased covariances:

        1/d · |mean(f_s) − mean(f_t)|² + 1/d² · |C_s − C_t|²_F.

    tllib's documentation and the paper have no first term and ¼ in front of the second.

    Shapes: f_s ``(n, d)``, f_t ``(m, d)`` → ``()``.
    """

    def forward(self, f_s: Tensor, f_t: Tensor) -> Tensor:
        (mean_s, cov_s), (mean_t, cov_t) = _moments(f_s), _moments(f_t)
        return (mean_s - mean_t).square().mean() + (cov_s - cov_t).square().mean()


class _Gaussians(Kernel):
    """Σ of `GaussianKernel`, read when it is used; those that look at the batch share one look."""

    def __init__(self, members: Sequence[Any]) -> None:
        super().__init__()
        self._members = list(members)  # they are the caller's modules, not this one's
        self._families, self._layers = (GAUSSIAN,) * len(self._members), (0,) * len(self._members)

    @property
    def data_dependent(self) -> bool:
        return any(member.track_running_stats for member in self._members)

    @property
    def constant(self) -> bool:
        return False

    def parts(self, x, y=None, resolve=None):
        mean = resolve(_MEAN, x, y) if self.data_dependent else None
        squares = [_square(member, mean, x[0].device) for member in self._members]
        gamma = 0.5 / torch.stack([square.double() for square in squares])
        nothing = torch.zeros_like(gamma)
        return [(None, Terms(self._families, self._layers, torch.stack((nothing + 1, gamma, nothing, nothing), 1)))]


def _square(member: Any, mean: Tensor | None, device: torch.device) -> Tensor:
    """σ² of a `GaussianKernel`; one that was measured is left in it, unless it has no value or is a tracer's."""
    if not member.track_running_stats:
        return _backend.moved(member, "sigma_square", device)
    square = member.alpha * mean
    if not square.is_meta and (torch.compiler.is_dynamo_compiling() or _backend.keeps()):
        member.sigma_square = square
    return square


def _sum(kernels: Sequence[nn.Module]) -> Kernel:
    gaussians, others = [], []
    for kernel in kernels:
        if isinstance(kernel, Kernel):
            others.append(kernel)
        elif isinstance(kernel, nn.Module) and all(
            hasattr(kernel, name) for name in ("sigma_square", "track_running_stats", "alpha")
        ):
            gaussians.append(kernel)
        else:
            raise TypeError(f"kernels must be GaussianKernel or kernels of mmfast.kernels, got {type(kernel).__name__}")
    if not gaussians and not others:
        raise ValueError("kernels must have at least one kernel, got none")
    together = [_Gaussians(gaussians), *others] if gaussians else others
    return together[0] if len(together) == 1 else Sum(together)


def _estimator(linear: bool | None) -> str:
    return "linear_cyclic" if linear else "unbiased"


def _constant(z_s: Tensor, z_t: Tensor) -> float:
    return 1.0 / (len(z_s) - 1) + 1.0 / (len(z_t) - 1)


def _through(theta: nn.Module, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    if type(theta) is nn.Identity:
        return s, t
    s, t = theta(torch.cat((s, t))).split((len(s), len(t)))
    return s, t


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    mean = features.mean(0)
    centred = features - mean
    with _backend.without_autocast(features.device.type):
        return mean, centred.T @ centred / (len(features) - 1)
