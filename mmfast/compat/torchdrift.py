"""TorchDrift's kernel two-sample test and drift detector, under its names (0.1), without the matrix of all distances.

The kernels are called on distances, as there, and are translated for everything else. TorchDrift departs from its own
documentation in two places, where by default the documented result is computed:

* it divides sums by n(n − 1) with the n ones of the diagonal still in them ("a bit sloppy", says a comment), which adds
  1/(n − 1) + 1/(m − 1) to the unbiased MMD². ``keep_diagonal=True`` does that too. No p-value depends on it;
* the p-value is the share of permutations with a larger statistic, which is 0 where none is: a test with that rejects
  too often. Here it is (1 + #{null ≥ statistic}) / (1 + n_perm). ``corrected=False`` gives TorchDrift's.

With the same random state the permutations are TorchDrift's. As there, nothing is differentiable; `mmfast.mmd2` is.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmfast import kernels
from mmfast.kernels import MedianDistance
from mmfast.mmd import kernel_matrix, mmd2, two_sample_test

__all__ = [
    "ExpKernel",
    "GaussianKernel",
    "Kernel",
    "KernelMMDDriftDetector",
    "RationalQuadraticKernel",
    "kernel_mmd",
]

# The lower median of all (n + m)² distances, those of points to themselves counted.
_MEDIAN = MedianDistance("pooled", diagonal=True, kind="lower")


class Kernel:
    """Base class of the kernels, which are called on a tensor of distances."""

    lengthscale: float | Tensor | None = None

    def kernel(self, lengthscale: float | Tensor | MedianDistance) -> kernels.Kernel:
        """The kernel of `mmfast.kernels`."""
        raise NotImplementedError

    def resolved(self) -> kernels.Kernel:
        """The same with this lengthscale, or the rule that finds it in the pooled sample."""
        return self.kernel(_MEDIAN if self.lengthscale is None else self.lengthscale)

    def __call__(self, dists: Tensor) -> Tensor:
        lengthscale = dists.median() if self.lengthscale is None else self.lengthscale
        # Distances are those of points on a line to its origin.
        points = dists.reshape(-1, 1)
        return kernel_matrix(points, points.new_zeros(1, 1), self.kernel(lengthscale)).view(dists.shape)


class GaussianKernel(Kernel):
    r"""k = exp(−|x − y|² / (2·lengthscale²)); without a lengthscale the median distance of the pooled sample."""

    def __init__(self, lengthscale: float | Tensor | None = None) -> None:
        super().__init__()
        self.lengthscale = lengthscale

    def kernel(self, lengthscale):
        return kernels.Gaussian(lengthscale)


class ExpKernel(Kernel):
    r"""k = exp(−|x − y| / lengthscale); without a lengthscale the median distance of the pooled sample."""

    def __init__(self, lengthscale: float | Tensor | None = None) -> None:
        super().__init__()
        self.lengthscale = lengthscale

    def kernel(self, lengthscale):
        return kernels.Laplacian(lengthscale)


class RationalQuadraticKernel(Kernel):
    r"""k = (1 + |x − y|² / (2·alpha·lengthscale²))^(−alpha); without a lengthscale the median distance."""

    def __init__(self, lengthscale: float | Tensor | None = None, alpha: float = 1.0) -> None:
        super().__init__()
        self.lengthscale, self.alpha = lengthscale, alpha

    def kernel(self, lengthscale):
        return kernels.RationalQuadratic(lengthscale, self.alpha)


def kernel_mmd(
    x: Tensor,
    y: Tensor,
    n_perm: int | None = 1000,
    kernel: Kernel | kernels.Kernel = GaussianKernel(),  # noqa: B008
    *,
    keep_diagonal: bool = False,
    corrected: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""The kernel MMD two-sample test (Gretton et al. 2012).

    Args:
        x, y: ``(n, d)`` and ``(m, d)``.
        n_perm: permutations for the p-value, or None for none.
        kernel: one of this module or of `mmfast.kernels`.
        keep_diagonal: TorchDrift's statistic, see above.
        corrected: False for TorchDrift's p-value, see above.

    Returns:
        MMD², and with ``n_perm`` a pair of it and the p-value; tensors without dimensions.
    """
    core = kernel.resolved() if isinstance(kernel, Kernel) else kernel
    if not isinstance(core, kernels.Kernel):
        raise TypeError(
            "kernel must be one of mmfast.compat.torchdrift or mmfast.kernels, which need no matrix of distances; "
            f"got {type(kernel).__name__}"
        )
    if keep_diagonal and core is kernel:
        raise ValueError("keep_diagonal is for the kernels of mmfast.compat.torchdrift, whose diagonal is 1")
    x, y = x.detach(), y.detach()
    if n_perm is None:
        mmd, p_value = mmd2(x, y, core, "unbiased"), None
    else:
        test = two_sample_test(x, y, core, permutations=_permutations(n_perm, len(x), len(x) + len(y), x.device))
        mmd = test.statistic.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
        p_value = test.p_value.float() if corrected else (test.null > test.statistic).float().mean()
    if keep_diagonal:
        mmd = mmd + (1 / (len(x) - 1) + 1 / (len(y) - 1))
    return mmd if n_perm is None else (mmd, p_value)


def _permutations(count: int, n: int, total: int, device: torch.device) -> Tensor:
    """Who takes the place of x: each permutation is one of the one before it."""
    members = torch.zeros(count, total, dtype=torch.bool, device=device)
    order = torch.arange(total, device=device)
    for row in members:
        order = order[torch.randperm(total, device=device)]
        row[order[:n]] = True
    return members


class KernelMMDDriftDetector(nn.Module):
    r"""A drift detector: ``fit`` takes a sample of features, and a call says how far another one is from it.

    Args:
        return_p_value: calls return the p-value instead of the MMD².
        n_perm, kernel, keep_diagonal, corrected: as in `kernel_mmd`.

    Example:
        >>> detector = KernelMMDDriftDetector(return_p_value=True)
        >>> reference = detector.fit(torch.randn(200, 16))
        >>> bool(detector(torch.randn(100, 16) + 1) < 0.01)
        True
    """

    def __init__(
        self,
        *,
        return_p_value: bool = False,
        n_perm: int = 1000,
        kernel: Kernel | kernels.Kernel = GaussianKernel(),  # noqa: B008
        keep_diagonal: bool = False,
        corrected: bool = True,
    ) -> None:
        super().__init__()
        self.register_buffer("base_outputs", None)
        self.return_p_value, self.n_perm, self.kernel = return_p_value, n_perm, kernel
        self.keep_diagonal, self.corrected = keep_diagonal, corrected

    def fit(self, x: Tensor) -> Tensor:
        """Record the reference sample ``(n, d)``; returns it."""
        self.base_outputs = x.detach()
        return x

    def predict_shift_from_features(
        self,
        base_outputs: Tensor,
        outputs: Tensor,
        compute_score: bool,
        compute_p_value: bool,
        individual_samples: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """MMD² and p-value (None if it is not to be computed) of ``outputs`` against ``base_outputs``."""
        if individual_samples:
            raise RuntimeError("the MMD detector compares samples, and has no score for each of their points")
        n_perm = self.n_perm if compute_p_value else None
        options = {"keep_diagonal": self.keep_diagonal, "corrected": self.corrected}
        found = kernel_mmd(outputs, base_outputs, n_perm, self.kernel, **options)
        return found if compute_p_value else (found, None)

    def compute_p_value(self, inputs: Tensor) -> Tensor:
        """The p-value of a sample ``(m, d)``."""
        return self._predict(inputs, True, False)[1]

    def forward(self, inputs: Tensor, individual_samples: bool = False) -> Tensor:
        """The MMD² of a sample ``(m, d)``, or its p-value."""
        mmd, p_value = self._predict(inputs, self.return_p_value, individual_samples)
        return p_value if self.return_p_value else mmd

    def _predict(self, inputs: Tensor, compute_p_value: bool, individual_samples: bool) -> tuple[Tensor, Tensor | None]:
        if self.base_outputs is None:
            raise RuntimeError("call fit with a reference sample first")
        return self.predict_shift_from_features(
            self.base_outputs, inputs, not compute_p_value, compute_p_value, individual_samples
        )
