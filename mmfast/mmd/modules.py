"""The mmd slice as modules."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from mmfast.mmd._inputs import check_choice, check_kernel
from mmfast.mmd.estimators import ESTIMATORS, mmd2
from mmfast.mmd.kernels import Kernel


class MMDLoss(nn.Module):
    r"""`mmfast.mmd2` as a loss: ``MMDLoss(kernel)(x, y)``.

    Args:
        kernel: of `mmfast.kernels`, by default DAN's; its tensors are parameters or buffers of this module.
        estimator, block_size, backend: as in `mmfast.mmd2`.

    Shapes: x ``(n, d)``, y ``(m, d)`` → ``()``; batches ``(b, n, d)`` → ``(b,)``; tuples of layers for a
    `mmfast.kernels.Product`.

    Example:
        >>> loss = MMDLoss()(torch.randn(32, 256), torch.randn(32, 256))
    """

    def __init__(
        self,
        kernel: Kernel | None = None,
        estimator: str = "unbiased",
        block_size: int | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_choice("estimator", estimator, ESTIMATORS)
        self.kernel = check_kernel(kernel)
        self.estimator, self.block_size, self.backend = estimator, block_size, backend

    def forward(
        self,
        x: Tensor | Sequence[Tensor],
        y: Tensor | Sequence[Tensor],
        weights_x: Tensor | None = None,
        weights_y: Tensor | None = None,
    ) -> Tensor:
        return mmd2(
            x,
            y,
            self.kernel,
            self.estimator,
            weights_x=weights_x,
            weights_y=weights_y,
            block_size=self.block_size,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return f"estimator={self.estimator!r}"
