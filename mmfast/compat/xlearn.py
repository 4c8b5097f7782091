"""The losses of thuml/Xlearn (``pytorch/src/loss.py``), the reference code of DAN and JAN (Long et al. 2015, 2017).

The kernel of a layer is Σ_i exp(−|x − y|² / b_i) with b_i = bandwidth · kernel_mul^(i − kernel_num // 2), and the
bandwidth is the mean squared distance between different points of the pooled batch, a constant for the gradient.
``fix_sigma`` takes that mean's place: it divides squared distances as it is (it is no σ).

Where this departs from the reference code:

* a tensor given as ``fix_sigma`` is left as it is (the reference code divides it in place, at every call);
* the quadratic losses take batches of different sizes (the reference code ignores the surplus of the target, or fails);
* fewer than two rows raise ValueError (the reference code divides by zero);
* ``RTN`` does nothing there and is left out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmfast import _backend
from mmfast.kernels import MultiGaussian, Product
from mmfast.mmd import kernel_matrix, mmd2

__all__ = ["DAN", "JAN", "DAN_Linear", "JAN_Linear", "guassian_kernel", "loss_dict"]


def gaussians(kernel_mul: float, kernel_num: int, fix_sigma: float | Tensor | None) -> MultiGaussian:
    """The kernel of one layer; built once where all arguments are numbers."""
    if isinstance(fix_sigma, Tensor):
        return MultiGaussian(bandwidth=fix_sigma, kernel_mul=kernel_mul, kernel_num=kernel_num)
    return _gaussians(kernel_mul, kernel_num, fix_sigma or None)


@_backend.kept(maxsize=64)
def _gaussians(kernel_mul: float, kernel_num: int, fix_sigma: float | None) -> MultiGaussian:
    return MultiGaussian(bandwidth=fix_sigma or "dan", kernel_mul=kernel_mul, kernel_num=kernel_num)


def guassian_kernel(
    source: Tensor,
    target: Tensor,
    kernel_mul: float = 2.0,
    kernel_num: int = 5,
    fix_sigma: float | Tensor | None = None,
) -> Tensor:
    """The kernel matrix ``(n + m, n + m)`` of both batches, for those who want it; the losses do without."""
    return kernel_matrix(torch.cat([source, target]), kernel=gaussians(kernel_mul, kernel_num, fix_sigma))


def DAN(
    source: Tensor,
    target: Tensor,
    kernel_mul: float = 2.0,
    kernel_num: int = 5,
    fix_sigma: float | Tensor | None = None,
) -> Tensor:
    """The unbiased MMD² (U-statistic) of ``(n, d)`` and ``(m, d)``: ``mmd2(source, target)`` of mmfast."""
    return mmd2(source, target, gaussians(kernel_mul, kernel_num, fix_sigma))


def DAN_Linear(
    source: Tensor,
    target: Tensor,
    kernel_mul: float = 2.0,
    kernel_num: int = 5,
    fix_sigma: float | Tensor | None = None,
) -> Tensor:
    """The mean over the cyclic pairs (i, i + 1 mod n), ``estimator="linear_cyclic"``; batches of the same size."""
    return mmd2(source, target, gaussians(kernel_mul, kernel_num, fix_sigma), "linear_cyclic")


def JAN(
    source_list: Sequence[Tensor],
    target_list: Sequence[Tensor],
    kernel_muls: Sequence[float] = (2.0, 2.0),
    kernel_nums: Sequence[int] = (5, 1),
    fix_sigma_list: Sequence[float | Tensor | None] = (None, 1.68),
) -> Tensor:
    """The unbiased joint MMD²: `DAN` with the product of the layers' kernels; lists have an entry for each layer."""
    kernel = _product(source_list, kernel_muls, kernel_nums, fix_sigma_list)
    return mmd2(list(source_list), list(target_list), kernel)


def JAN_Linear(
    source_list: Sequence[Tensor],
    target_list: Sequence[Tensor],
    kernel_muls: Sequence[float] = (2.0, 2.0),
    kernel_nums: Sequence[int] = (5, 1),
    fix_sigma_list: Sequence[float | Tensor | None] = (None, 1.68),
) -> Tensor:
    """`JAN` over the cyclic pairs of `DAN_Linear`."""
    kernel = _product(source_list, kernel_muls, kernel_nums, fix_sigma_list)
    return mmd2(list(source_list), list(target_list), kernel, "linear_cyclic")


def _product(layers, kernel_muls, kernel_nums, fix_sigma_list) -> Product:
    count = len(layers)
    for name, values in zip(
        ("kernel_muls", "kernel_nums", "fix_sigma_list"), (kernel_muls, kernel_nums, fix_sigma_list), strict=True
    ):
        if len(values) < count:
            raise ValueError(f"{name} must have an entry for each of the {count} layers, got {len(values)}")
    settings = tuple(zip(kernel_muls[:count], kernel_nums[:count], fix_sigma_list[:count], strict=True))
    if any(isinstance(sigma, Tensor) for _, _, sigma in settings):
        return Product([gaussians(*setting) for setting in settings])
    return _cached_product(settings)


@_backend.kept(maxsize=64)
def _cached_product(settings: tuple) -> Product:
    return Product([gaussians(*setting) for setting in settings])


loss_dict = {"DAN": DAN, "DAN_Linear": DAN_Linear, "JAN": JAN, "JAN_Linear": JAN_Linear}
