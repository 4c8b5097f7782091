"""CMMD, the MMD of CLIP embeddings of two sets of images, under the name of its code (Jayasumana et al. 2024).

``mmd`` stands in for ``distance.mmd`` of google-research's cmmd (JAX) and of cmmd-pytorch.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mmfast.kernels import Gaussian
from mmfast.mmd import mmd2

__all__ = ["mmd"]

_SIGMA = 10
_SCALE = 1000


def mmd(x: np.ndarray | Tensor, y: np.ndarray | Tensor) -> Tensor:
    r"""1000 times the biased MMD² with the kernel exp(−|x − y|² / (2·10²)), of embeddings ``(n, d)`` and ``(m, d)``.

    Despite the name the root is not taken, as there. Takes arrays, as cmmd-pytorch does, and tensors, with gradients.
    "Memory-efficient" here means O((n + m)·d): there each of the three matrices is formed whole. Distances there are
    differences of squared norms, which in float32 are wrong in the fourth digit where the embeddings' mean is large
    against their spread; here they are not.

    Returns:
        A tensor without dimensions, float64 for float64 embeddings, else float32.
    """
    x, y = (torch.from_numpy(a) if isinstance(a, np.ndarray) else a for a in (x, y))
    return _SCALE * mmd2(x, y, _KERNEL, "biased")


_KERNEL = Gaussian(_SIGMA)
