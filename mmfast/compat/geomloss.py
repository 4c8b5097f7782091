"""``SamplesLoss`` of geomloss (0.3) for the kernel norms ``"gaussian"``, ``"laplacian"`` and ``"energy"``.

    from mmfast.compat.geomloss import SamplesLoss

    loss = SamplesLoss("energy")(x, y)

Optimal transport (``"sinkhorn"``, geomloss' default, and ``"hausdorff"``) is not offered, and says so.

Where this departs from geomloss:

* second derivatives are right (geomloss detaches one side of each kernel and drops the mixed ones without a word), and
  so are gradients of potentials;
* all ``backend=`` names do the same: exact sums without the kernel matrix. ``"multiscale"`` does not truncate kernels,
  and cluster labels change nothing;
* potentials of measures without a batch have the shape of the weights, as geomloss documents (it gives ``(1, N)``);
* points that coincide give a zero gradient and no NaN;
* ``kernel`` is one of `mmfast.kernels`, not a function that builds a matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmfast import _backend
from mmfast.kernels import Energy, Gaussian, Kernel, Laplacian
from mmfast.mmd import kernel_matmul
from mmfast.mmd._inputs import by_item, two_samples
from mmfast.mmd.estimators import weighted
from mmfast.mmd.reference import compute_dtype
from mmfast.mmd.terms import check_scalar

__all__ = ["SamplesLoss"]

_LOSSES = ("gaussian", "laplacian", "energy")
_BACKENDS = ("auto", "tensorized", "online", "multiscale")


class SamplesLoss(nn.Module):
    r"""Half the squared kernel norm of α − β for the measures α = Σ_i a_i δ(x_i) and β = Σ_j b_j δ(y_j):

        ½ Σ_ij a_i a_j k(x_i, x_j) + ½ Σ_ij b_i b_j k(y_i, y_j) − Σ_ij a_i b_j k(x_i, y_j),

    which is half the biased `mmfast.mmd2` for weights that sum to 1. They need not, and may be negative.

    Args:
        loss: ``"gaussian"``: k = exp(−|x − y|² / (2·blur²)); ``"laplacian"``: k = exp(−|x − y| / blur); ``"energy"``:
            k = −|x − y|. The default is geomloss', which is not offered: name one.
        blur: σ, a number or a tensor without dimensions; the energy distance has none.
        kernel: of `mmfast.kernels`, in place of the loss' own; ``blur`` is then not looked at.
        potentials: return F(x_i) = Σ_j a_j k(x_i, x_j) − Σ_j b_j k(x_i, y_j) and G(y_j) = Σ_i b_i k(y_j, y_i) −
            Σ_i a_i k(y_j, x_i) instead.
        backend: ``"auto"``, ``"tensorized"``, ``"online"`` or ``"multiscale"``; see the module.
        others: of optimal transport or of clusters; without effect here, as on geomloss' kernel norms.

    Call it with ``(x, y)``, ``(a, x, b, y)`` or ``(labels_x, a, x, labels_y, b, y)``: x ``(N, D)``, y ``(M, D)``, a
    ``(N,)`` or ``(N, 1)``, b likewise, 1/N and 1/M by default → ``()``; or all of them with a batch dimension first →
    ``(B,)``. Potentials have the shapes ``(N,)`` and ``(M,)``, or ``(B, N)`` and ``(B, M)``.
    """

    def __init__(
        self,
        loss="sinkhorn",
        p=2,
        blur=0.05,
        reach=None,
        diameter=None,
        scaling=0.5,
        truncate=5,
        cost=None,
        kernel=None,
        cluster_scale=None,
        debias=True,
        potentials=False,
        verbose=False,
        backend="auto",
    ) -> None:
        super().__init__()
        if loss not in _LOSSES:
            missing = "optimal transport is not offered; " if loss in ("sinkhorn", "hausdorff") else ""
            raise ValueError(
                f"loss must be one of {', '.join(map(repr, _LOSSES))}, got {loss!r}: {missing}see geomloss"
            )
        if backend not in _BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(map(repr, _BACKENDS))}, got {backend!r}")
        if kernel is not None and not isinstance(kernel, Kernel):
            raise TypeError(f"kernel must be a kernel of mmfast.kernels, got {type(kernel).__name__}")
        self.loss = loss
        self.backend = backend
        self.p = p
        self.blur = blur
        self.reach = reach
        self.truncate = truncate
        self.diameter = diameter
        self.scaling = scaling
        self.cost = cost
        self.kernel = kernel
        self.cluster_scale = cluster_scale
        self.debias = debias
        self.potentials = potentials
        self.verbose = verbose

    def forward(self, *args):
        if len(args) not in (2, 4, 6):
            raise ValueError(
                f"SamplesLoss takes (x, y), (a, x, b, y) or (labels_x, a, x, labels_y, b, y), got {len(args)} arguments"
            )
        if len(args) == 6:
            labelled = args[0] is not None or args[3] is not None
            if labelled and self.backend not in ("auto", "multiscale"):
                raise ValueError(f"labels are for backend='auto' or 'multiscale', got backend={self.backend!r}")
            args = args[1:3] + args[4:]
        a, x, b, y = args if len(args) == 4 else (None, args[0], None, args[1])
        kernel = self._kernel()
        xs, ys, single = two_samples(x, y, kernel.n_layers)
        a = None if a is None else _weights("a", a, xs[0], single)
        b = None if b is None else _weights("b", b, ys[0], single)
        if self.potentials:
            a, b = _uniform(xs[0]) if a is None else a, _uniform(ys[0]) if b is None else b
            x, y = xs[0], ys[0]
            f = kernel_matmul(x, x, a, kernel) - kernel_matmul(x, y, b, kernel)
            g = kernel_matmul(y, y, b, kernel) - kernel_matmul(y, x, a, kernel)
            return (f[0], g[0]) if single else (f, g)
        chosen, _ = _backend.choose("mmd", xs[0].device)

        def compute(xs, ys, a, b):
            return weighted(xs, ys, a and a[0], b and b[0], kernel, chosen, None, False)

        value = by_item(kernel, compute, xs, ys, a if a is None else [a], b if b is None else [b])
        value = (0.5 * value).to(compute_dtype(xs[0].dtype))
        return value[0] if single else value

    def _kernel(self) -> Kernel:
        if self.kernel is not None:
            return self.kernel
        if isinstance(self.blur, Tensor):
            return _build(self.loss, self.blur)
        return _cached(self.loss, 1.0 if self.loss == "energy" else float(self.blur))


def _build(loss: str, blur: float | Tensor) -> Kernel:
    if loss == "energy":
        return Energy()
    check_scalar("blur", blur)
    return {"gaussian": Gaussian, "laplacian": Laplacian}[loss](blur)


_cached = _backend.kept(maxsize=64)(_build)


def _weights(name: str, weights: Tensor, x: Tensor, single: bool) -> Tensor:
    """``(B, N)``."""
    lead = tuple(x.shape[1:2] if single else x.shape[:2])
    if not isinstance(weights, Tensor) or tuple(weights.shape) not in (lead, (*lead, 1)):
        found = tuple(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
        raise ValueError(f"{name} must be a tensor {lead} or {(*lead, 1)}, got {found}")
    if weights.device != x.device:
        raise ValueError(f"{name} must be on the features' device, got {weights.device} and {x.device}")
    return weights.reshape(x.shape[:2])


def _uniform(x: Tensor) -> Tensor:
    return torch.full(x.shape[:2], 1 / max(x.shape[1], 1), dtype=compute_dtype(x.dtype), device=x.device)
