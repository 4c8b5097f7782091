"""The kernel losses of jindongwang/transferlearning: DeepDA's ``MMDLoss`` and ``LMMDLoss``, and ``MMD_loss``.

The kernel is that of `mmfast.compat.xlearn`: Σ_i exp(−|x − y|² / b_i), b_i = bandwidth · kernel_mul^(i − kernel_num //
2), with the mean squared distance between different points of both batches for a bandwidth, or ``fix_sigma`` as it is.

Where this departs from the library:

* ``fix_sigma`` is used (the library's classes drop it), and a tensor given for it is not changed;
* NaN features give NaN (the library's ``LMMDLoss`` returns 0 without a gradient and skips its scheduler's step);
* ``LMMDLoss`` runs on the features' device (the library calls ``.cuda()``) and takes batches of different sizes;
* ``MMD_loss`` has a gradient (in some copies the library computes it under ``torch.no_grad``);
* float64 features stay float64 with ``kernel_type="linear"``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mmfast.compat import xlearn
from mmfast.mmd import lmmd, mmd2

__all__ = ["LMMDLoss", "MMDLoss", "MMD_loss"]


class MMDLoss(nn.Module):
    r"""The biased MMD² (V-statistic) of ``source`` ``(n, d)`` and ``target`` ``(m, d)``.

    Args:
        kernel_type: ``"rbf"``, or ``"linear"``: the squared distance of the means.
        kernel_mul, kernel_num, fix_sigma: of the kernel, see the module.
        kwargs: ignored, as in the library.
    """

    def __init__(
        self,
        kernel_type: str = "rbf",
        kernel_mul: float = 2.0,
        kernel_num: int = 5,
        fix_sigma: float | Tensor | None = None,
        **kwargs,
    ) -> None:
        super().__init__()
        if kernel_type not in ("rbf", "linear"):
            raise ValueError(f"kernel_type must be 'rbf' or 'linear', got {kernel_type!r}")
        self.kernel_num = kernel_num
        self.kernel_mul = kernel_mul
        self.fix_sigma = fix_sigma
        self.kernel_type = kernel_type

    def guassian_kernel(
        self,
        source: Tensor,
        target: Tensor,
        kernel_mul: float = 2.0,
        kernel_num: int = 5,
        fix_sigma: float | Tensor | None = None,
    ) -> Tensor:
        """The kernel matrix ``(n + m, n + m)``, for those who want it; the loss does without."""
        return xlearn.guassian_kernel(source, target, kernel_mul, kernel_num, fix_sigma)

    def linear_mmd2(self, f_of_X: Tensor, f_of_Y: Tensor) -> Tensor:
        """|mean(X) − mean(Y)|²."""
        dtype = torch.promote_types(f_of_X.dtype, torch.float32)
        delta = f_of_X.mean(0, dtype=dtype) - f_of_Y.mean(0, dtype=dtype)
        return delta.dot(delta)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        if self.kernel_type == "linear":
            return self.linear_mmd2(source, target)
        return mmd2(source, target, self._kernel(), "biased")

    def _kernel(self):
        return xlearn.gaussians(self.kernel_mul, self.kernel_num, self.fix_sigma)


class MMD_loss(MMDLoss):
    """`MMDLoss` under the name and arguments of ``code/distance/mmd_pytorch.py``."""

    def __init__(self, kernel_type: str = "rbf", kernel_mul: float = 2.0, kernel_num: int = 5) -> None:
        super().__init__(kernel_type, kernel_mul, kernel_num)


class LMMDLoss(MMDLoss):
    r"""Local MMD between classes (DSAN, Zhu et al. 2020): `mmfast.lmmd`, times a factor that grows with each call.

    The factor is 2 / (1 + exp(−gamma·t / max_iter)) − 1 after t ≤ max_iter calls: 0 at the first.

    Args:
        num_class: number of classes C.
        kernel_type: ``"rbf"``; with ``"linear"`` calls raise NotImplementedError.
        kernel_mul, kernel_num, fix_sigma: of the kernel, see the module.
        gamma, max_iter: of the factor.
        kwargs: ignored, as in the library.

    Shapes: source ``(n, d)``, target ``(m, d)``, source_label ``(n,)`` integers, target_logits ``(m, C)``, which must
    be probabilities in spite of their name and are constants for the gradient → ``(1,)``, as in the library.
    """

    def __init__(
        self,
        num_class: int,
        kernel_type: str = "rbf",
        kernel_mul: float = 2.0,
        kernel_num: int = 5,
        fix_sigma: float | Tensor | None = None,
        gamma: float = 1.0,
        max_iter: int = 1000,
        **kwargs,
    ) -> None:
        super().__init__(kernel_type, kernel_mul, kernel_num, fix_sigma, **kwargs)
        self.num_class = num_class
        self.gamma = gamma
        self.max_iter = max_iter
        self.curr_iter = 0

    def lamb(self) -> float:
        """The factor of the next call."""
        return 2.0 / (1.0 + math.exp(-self.gamma * self.curr_iter / self.max_iter)) - 1.0

    def step(self) -> None:
        """Counts a call."""
        self.curr_iter = min(self.curr_iter + 1, self.max_iter)

    def forward(self, source: Tensor, target: Tensor, source_label: Tensor, target_logits: Tensor) -> Tensor:
        if self.kernel_type == "linear":
            raise NotImplementedError("kernel_type='linear' is not supported by LMMDLoss, in the library neither")
        loss = lmmd(
            source, target, source_label.long(), target_logits.detach(), self._kernel(), n_classes=self.num_class
        )
        loss = loss * self.lamb()
        self.step()
        return loss[None]
