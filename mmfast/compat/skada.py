"""``dan_loss`` of skada (0.6, ``skada.deep.losses``)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmfast import _backend
from mmfast.kernels import Kernel, MedianDistance
from mmfast.mmd import mmd2
from mmfast.mmd.terms import LAPLACIAN, Terms

__all__ = ["dan_loss"]

_MEDIAN = MedianDistance("x", diagonal=True, kind="lower", detach=False)


def dan_loss(
    features_s: Tensor, features_t: Tensor, sigmas: Sequence[float] | Tensor | None = None, eps: float = 1e-7
) -> Tensor:
    r"""The biased MMD² (V-statistic) with the kernel Σ_i exp(−|x − y| / σ_i), ``(n, d)`` and ``(m, d)`` → ``()``.

    skada names DAN's Gaussian kernels as its source, but does not square the distance: these are Laplacian kernels, and
    are here. For Gaussian ones see `mmfast.mmd2` or `mmfast.compat.xlearn.DAN`.

    Args:
        sigmas: numbers, or a tensor of one dimension, > 0. By default (median + ``eps``) · 2^(−8 + i/2), i = 0 … 32,
            with the median of all n² distances of ``features_s``: with each point's zero distance to itself, the lower
            one of two in the middle. As in skada the gradient flows through it.
        eps: added to the median.

    Where this departs from skada: every dtype works (skada mixes float32 into float64 features and stops), the distance
    of a point to itself is exactly zero, and ``sigmas`` may be a tensor that requires a gradient.
    """
    if sigmas is None:
        kernel = _Laplacians(None, eps)
    elif isinstance(sigmas, Tensor):
        kernel = _Laplacians(sigmas.double(), eps)
    else:
        kernel = _laplacians(tuple(map(float, sigmas)))
    return mmd2(features_s, features_t, kernel, "biased")


@_backend.kept(maxsize=16)
def _laplacians(sigmas: tuple[float, ...]) -> Kernel:
    return _Laplacians(torch.tensor(sigmas, dtype=torch.float64), 0.0)


class _Laplacians(Kernel):
    """Σ_i exp(−|x − y| / σ_i)."""

    def __init__(self, sigmas: Tensor | None, eps: float) -> None:
        super().__init__()
        if sigmas is not None and (sigmas.dim() != 1 or not len(sigmas)):
            raise ValueError(f"sigmas must have one dimension and a value, got shape {tuple(sigmas.shape)}")
        if sigmas is not None and _backend.may_look(sigmas) and not bool((sigmas > 0).all()):
            raise ValueError(f"sigmas must be positive, got {sigmas.tolist()}")
        self.sigmas, self.eps = sigmas, eps

    @property
    def data_dependent(self) -> bool:
        return self.sigmas is None

    @property
    def constant(self) -> bool:
        return False

    def parts(self, x, y=None, resolve=None):
        sigmas = self.sigmas
        if sigmas is None:
            steps = torch.arange(-16, 17, dtype=torch.float64, device=x[0].device) / 2
            sigmas = steps.exp2() * (resolve(_MEDIAN, x, y).sqrt() + self.eps)
        gamma = 1 / sigmas.to(x[0].device)
        nothing = torch.zeros_like(gamma)
        params = torch.stack((nothing + 1, gamma, nothing, nothing), 1)
        return [(None, Terms((LAPLACIAN,) * len(gamma), (0,) * len(gamma), params))]
