"""torchmetrics' kernel inception distance and the functions that it is made of, under their names (1.9).

Polynomial kernels of features, k(x, y) = (gamma·⟨x, y⟩ + coef)^degree, with gamma = 1 / d by default. The functions do
without torchmetrics; ``KernelInceptionDistance``, a subclass of the class of this name there, is made when it is asked
for, and needs it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmfast.kernels import Polynomial
from mmfast.mmd import kernel_matrix, kid, mmd2

__all__ = ["maximum_mean_discrepancy", "poly_kernel", "poly_mmd"]


def maximum_mean_discrepancy(k_xx: Tensor, k_xy: Tensor, k_yy: Tensor) -> Tensor:
    """The unbiased MMD² from its matrices ``(n, n)``, ``(n, m)`` and ``(m, m)``.

    torchmetrics divides everything by the size of the first matrix, which is wrong where n ≠ m; here each sum is
    divided by the number of its entries.
    """
    n, m = k_xy.shape
    for name, matrix, size in (("k_xx", k_xx, n), ("k_yy", k_yy, m)):
        if matrix.shape != (size, size) or size < 2:
            raise ValueError(f"{name} must be (n, n), n >= 2, and fit k_xy {(n, m)}, got {tuple(matrix.shape)}")
    within = [(k.sum() - k.diagonal().sum()) / (size * (size - 1)) for k, size in ((k_xx, n), (k_yy, m))]
    return within[0] + within[1] - 2 * k_xy.mean()


def poly_kernel(f1: Tensor, f2: Tensor, degree: int = 3, gamma: float | None = None, coef: float = 1.0) -> Tensor:
    """(gamma·f1 f2ᵀ + coef)^degree, ``(n, m)`` of ``(n, d)`` and ``(m, d)``."""
    return kernel_matrix(f1, f2, Polynomial(degree, gamma, coef))


def poly_mmd(f_real: Tensor, f_fake: Tensor, degree: int = 3, gamma: float | None = None, coef: float = 1.0) -> Tensor:
    """The unbiased MMD² of features ``(n, d)`` and ``(m, d)``, without their matrices.

    Right for n ≠ m too, where torchmetrics divides by the wrong numbers (see `maximum_mean_discrepancy`).
    """
    return mmd2(f_real, f_fake, Polynomial(degree, gamma, coef), "unbiased")


def _metric() -> type:
    try:
        from torchmetrics.image.kid import KernelInceptionDistance as Base
        from torchmetrics.utilities.data import dim_zero_cat
    except ImportError as error:
        raise ImportError("KernelInceptionDistance needs the package torchmetrics: pip install torchmetrics") from error

    class KernelInceptionDistance(Base):
        r"""``torchmetrics.image.kid.KernelInceptionDistance``: the same arguments, states, synchronisation and plots.

        With the same random state it draws the same subsets. Two things are added:

        * ``feature=None``: `update` takes features ``(n, d)``, of whatever network, instead of images;
        * ``subsets=None``: `compute` returns the KID of all samples, exactly, and its standard error (`mmfast.kid`),
          with the same result each time and for any numbers of real and fake samples from 4 on.

        The deviation that it returns with subsets is that of the values of single subsets, as in torchmetrics: neither
        it nor it divided by √subsets is the error of their mean.

        Args:
            feature: a layer of Inception (64, 192, 768, 2048 or ``"logits_unbiased"``; torchmetrics then asks for
                torch-fidelity), a module that makes features ``(n, d)`` of what `update` is given, or None.
            subsets, subset_size: number and size of the random subsets; ``subsets=None`` for all samples.
            degree, gamma, coef: of the kernel.
            reset_real_features, normalize, kwargs: as in torchmetrics.

        Example:
            >>> metric = KernelInceptionDistance(feature=None, subsets=None)
            >>> metric.update(torch.randn(300, 64), real=True)
            >>> metric.update(torch.randn(200, 64) + 0.5, real=False)
            >>> value, standard_error = metric.compute()
        """

        def __init__(
            self,
            feature: str | int | nn.Module | None = 2048,
            subsets: int | None = 100,
            subset_size: int = 1000,
            degree: int = 3,
            gamma: float | None = None,
            coef: float = 1.0,
            reset_real_features: bool = True,
            normalize: bool = False,
            **kwargs,
        ) -> None:
            super().__init__(
                nn.Identity() if feature is None else feature,
                1 if subsets is None else subsets,
                subset_size,
                degree,
                gamma,
                coef,
                reset_real_features,
                normalize,
                **kwargs,
            )
            self.subsets = subsets

        def compute(self) -> tuple[Tensor, Tensor]:
            """Mean and deviation over the subsets, or with ``subsets=None`` the value and its standard error."""
            real, fake = dim_zero_cat(self.real_features), dim_zero_cat(self.fake_features)
            if self.subsets is None:
                return tuple(kid(real, fake, self.degree, self.gamma, self.coef))
            if min(len(real), len(fake)) < self.subset_size:
                raise ValueError("Argument `subset_size` should be smaller than the number of samples")
            values = []
            for _ in range(self.subsets):
                chosen = [features[torch.randperm(len(features))[: self.subset_size]] for features in (real, fake)]
                values.append(poly_mmd(*chosen, self.degree, self.gamma, self.coef))
            values = torch.stack(values)
            return values.mean(), values.std(unbiased=False)

    KernelInceptionDistance.__qualname__ = "KernelInceptionDistance"
    return KernelInceptionDistance


def __getattr__(name: str):
    if name != "KernelInceptionDistance":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return globals().setdefault(name, _metric())
