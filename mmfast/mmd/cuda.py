"""Quadratic forms by CUDA C++ where features are few: differences one by one, exact in the features' own type.

One launch gives each row's sums and gradient; what is left here is their combination.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmfast import _backend
from mmfast.mmd.reference import compute_dtype

MOST_FEATURES, MOST_TERMS = 16, 64


def fits(x, y, wx, wy, coefs, params, dims, families, layers, need) -> bool:
    """True for one layer of few features whose parameters need no gradient, where the extension has the kernel."""
    few = len(dims) == 1 and dims[0] <= MOST_FEATURES and len(families) <= MOST_TERMS
    return few and not need[4] and hasattr(_backend._C, "mmd_quadratic_few")


def quadratic_forward(x, y, wx, wy, coefs, params, dims, families, layers, need) -> tuple[Tensor, ...]:
    """The operator ``mmd_quadratic``."""
    compute, n = compute_dtype(x.dtype), x.shape[1]

    def ready(t: Tensor | None, dtype: torch.dtype = compute) -> Tensor | None:
        return None if t is None else t.detach().to(x.device, dtype).contiguous()

    coefs = ready(coefs, torch.float64)
    gradient = need[0] or need[1]
    sums, grad = _backend._C.mmd_quadratic_few(
        ready(x), ready(y), ready(wx), ready(wy), coefs, ready(params, torch.float64), families, gradient, need[5]
    )
    sums = sums.sum(1) if sums.shape[1] > 1 else sums[:, 0]  # (b, 2, n + m): over the columns of x, and of y
    xx, xy, yx, yy = sums[:, 0, :n], sums[:, 1, :n], sums[:, 0, n:], sums[:, 1, n:]

    def weighted(weights: Tensor | None, rows: Tensor) -> Tensor:
        return rows.sum(1) if weights is None else (weights.detach().to(compute).double() * rows).sum(1)

    found = torch.stack((weighted(wx, xx), weighted(wy, yy), weighted(wx, xy)), 1)
    if gradient:
        grad = grad.sum(1) if grad.shape[1] > 1 else grad[:, 0]

    def wanted(need: bool, dtype: torch.dtype, result) -> Tensor:
        return result().contiguous() if need else torch.empty(0, dtype=dtype, device=x.device)

    return (
        torch.mv(found, coefs),
        found,
        wanted(need[0], compute, lambda: grad[:, :n]),
        wanted(need[1], compute, lambda: grad[:, n:]),
        wanted(need[2], torch.float64, lambda: 2 * coefs[0] * xx + coefs[2] * xy),
        wanted(need[3], torch.float64, lambda: 2 * coefs[1] * yy + coefs[2] * yx),
        torch.empty(0, dtype=torch.float64, device=params.device),
    )
