"""Centred kernel alignment under the names of three libraries, in O(n) memory where features are given.

* ckatorch 1.0: `cka_base`, `cka_batch`, `hsic0`, `hsic1`, `linear_kernel`, `rbf_kernel`;
* platonic-rep: `AlignmentMetrics` (its ``cka`` and ``unbiased_cka``), `hsic_biased`, `hsic_unbiased`;
* torch_cka 0.21: `CKA`, for the layers of two models.

`mmfast.cka` and `mmfast.hsic` are what they are made of.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from mmfast import _backend, mmd
from mmfast.kernels import Gaussian, Kernel, Linear, MedianDistance
from mmfast.mmd import dependence, kernel_matrix
from mmfast.mmd.reference import pair_of_matrices

__all__ = [
    "CKA",
    "AlignmentMetrics",
    "cka_base",
    "cka_batch",
    "hsic0",
    "hsic1",
    "hsic_biased",
    "hsic_unbiased",
    "linear_kernel",
    "rbf_kernel",
]

# ---- ckatorch


def _rbf(threshold: float) -> Gaussian:
    """σ² is threshold² times the lower median of all n² squared distances, which carries a gradient."""
    return Gaussian(MedianDistance("x", diagonal=True, kind="lower", scale=float(threshold) ** 2, detach=False))


def cka_base(
    x: Tensor,
    y: Tensor,
    kernel: str = "linear",
    unbiased: bool = False,
    threshold: float = 1.0,
    method: str = "fro_norm",
) -> Tensor:
    r"""ckatorch's CKA of features ``(n, j)`` and ``(n, k)``, computed and returned in float64, as there.

    Args:
        kernel: ``"linear"`` or ``"rbf"`` with σ = threshold · (median distance).
        unbiased: the unbiased HSIC, n ≥ 4.
        method: ``"fro_norm"`` or ``"hsic"``: the same here, and differentiable. ckatorch forgets ``unbiased`` with
            ``"hsic"``, and cuts the gradient off with ``"fro_norm"``.
    """
    if kernel not in ("linear", "rbf"):
        raise ValueError(f"kernel must be 'linear' or 'rbf', got {kernel!r}")
    if method not in ("hsic", "fro_norm"):
        raise ValueError(f"method must be 'hsic' or 'fro_norm', got {method!r}")
    both = Linear() if kernel == "linear" else _rbf(threshold)
    return mmd.cka(x.double(), y.double(), both, both, "unbiased" if unbiased else "biased")


def cka_batch(x: Tensor, y: Tensor) -> Tensor:
    r"""ckatorch's CKA of minibatches ``(b, n, j)`` and ``(b, n, k)``, float64 (Nguyen et al. 2021).

    With HSIC the sum of the unbiased linear HSIC of each batch: HSIC(x, y) / √(HSIC(x, x)·HSIC(y, y)).
    """
    x, y = x.double(), y.double()
    pairs = ((x, y), (x, x), (y, y))
    both, left, right = (mmd.hsic(a, b, Linear(), Linear(), "unbiased").sum() for a, b in pairs)
    return both / (left * right).sqrt()


def hsic0(gram_x: Tensor, gram_y: Tensor) -> Tensor:
    """ckatorch's biased HSIC of symmetric Gram matrices ``(n, n)``: tr(KHLH) / (n − 1)².

    ckatorch lets one matrix pass that is not symmetric; here it is refused, where its values can be looked at.
    """
    for name, gram in (("gram_x", gram_x), ("gram_y", gram_y)):
        if _backend.may_look(gram) and not torch.allclose(gram, gram.T):
            raise ValueError(f"{name} must be symmetric")
    return hsic_biased(gram_x, gram_y) / (len(gram_x) - 1) ** 2


def hsic1(gram_x: Tensor, gram_y: Tensor) -> Tensor:
    """ckatorch's unbiased HSIC of batches of Gram matrices ``(b, n, n)``, n ≥ 4 → ``(b,)``."""
    if gram_x.dim() != 3 or gram_x.shape != gram_y.shape:
        shapes = f"{tuple(gram_x.shape)} and {tuple(gram_y.shape)}"
        raise ValueError(f"gram_x and gram_y must both be (b, n, n), got {shapes}")
    n = _need_four(gram_x.shape[1])
    own = torch.eye(n, dtype=torch.bool, device=gram_x.device)
    # The transpose makes tr(KL) of Σ K∘L, and column sums of K.
    sums = pair_of_matrices(gram_x.transpose(1, 2).masked_fill(own, 0), gram_y.masked_fill(own, 0))
    return (dependence._unbiased(*sums)[:, 0] / (n * (n - 3))).to(gram_x.dtype)


def _need_four(n: int) -> int:
    if n < 4:
        raise ValueError(f"the unbiased HSIC needs at least 4 points, got {n}")
    return n


def linear_kernel(x: Tensor) -> Tensor:
    """x xᵀ, ``(n, n)`` of ``(n, j)``."""
    return kernel_matrix(x, None, Linear())


def rbf_kernel(x: Tensor, threshold: float = 1.0) -> Tensor:
    """exp(−|x_i − x_j|² / (2·threshold²·median)), the lower median of all squared distances, those of i = j counted."""
    return kernel_matrix(x, None, _rbf(threshold))


# ---- platonic-rep


def hsic_unbiased(K: Tensor, L: Tensor) -> Tensor:
    """platonic-rep's unbiased HSIC of Gram matrices ``(n, n)``, n ≥ 4."""
    return hsic1(K[None], L[None])[0]


def hsic_biased(K: Tensor, L: Tensor) -> Tensor:
    """platonic-rep's biased HSIC of symmetric Gram matrices ``(n, n)``: tr(KHLH), not divided by anything."""
    return dependence._biased(*pair_of_matrices(K[None], L[None]))[0, 0].to(K.dtype)


class AlignmentMetrics:
    """platonic-rep's ``AlignmentMetrics``, as far as they are alignments of kernels."""

    SUPPORTED_METRICS: Sequence[str] = ("cka", "unbiased_cka")

    @staticmethod
    def measure(metric: str, *args, **kwargs) -> float:
        """The metric of this name."""
        if metric not in AlignmentMetrics.SUPPORTED_METRICS:
            raise ValueError(f"metric must be one of {', '.join(AlignmentMetrics.SUPPORTED_METRICS)}, got {metric!r}")
        return getattr(AlignmentMetrics, metric)(*args, **kwargs)

    @staticmethod
    def cka(
        feats_A: Tensor, feats_B: Tensor, kernel_metric: str = "ip", rbf_sigma: float = 1.0, unbiased: bool = False
    ) -> float:
        r"""HSIC(A, B) / (√(HSIC(A, A)·HSIC(B, B)) + 1e-6), a number without a gradient.

        The 1e-6 is platonic-rep's, and kept: with ``unbiased``, whose HSIC are divided by n(n − 3), it pulls the value
        of many normalised features down visibly, that of features with themselves too. `mmfast.cka` is without.

        Args:
            feats_A, feats_B: ``(n, a)`` and ``(n, b)``.
            kernel_metric: ``"ip"``, inner products, or ``"rbf"`` with σ = rbf_sigma.
        """
        if kernel_metric not in ("ip", "rbf"):
            raise ValueError(f"kernel_metric must be 'ip' or 'rbf', got {kernel_metric!r}")
        kernel: Kernel = Linear() if kernel_metric == "ip" else Gaussian(float(rbf_sigma))
        with torch.no_grad():
            values, n, _, _ = dependence._moments(feats_A, feats_B, kernel, kernel, unbiased, True, None, True)
        both, left, right = values[0] / (n * (n - 3) if unbiased else 1)
        return (both / ((left * right).sqrt() + 1e-6)).item()

    @staticmethod
    def unbiased_cka(*args, **kwargs) -> float:
        """`cka` with ``unbiased=True``."""
        return AlignmentMetrics.cka(*args, **{**kwargs, "unbiased": True})


# ---- torch_cka


class CKA:
    r"""torch_cka's comparison of the layers of two models by minibatch CKA (Nguyen et al. 2021), with linear kernels.

    With HSIC the mean over batches of the unbiased linear HSIC of layers' outputs, flattened to ``(n, ·)``, n ≥ 4:
    ``compare`` fills ``hsic_matrix`` with HSIC(i, j) / (√HSIC(i, i)·√HSIC(j, j)), a row for each layer of the first
    model and a column for each one of the second. What torch_cka gets wrong and is right here:

    * rows and columns are in the order of ``export()["model1_layers"]`` and ``["model2_layers"]``, that of
      ``named_modules()``; there in the order in which layers happen to finish, which is another one wherever a module
      holds others (the whole model comes last, not first);
    * an output that the next layer changes in place (``ReLU(inplace=True)``) is taken as it was;
    * of one loader both models see the same batches; there it is read twice, in two orders if it shuffles;
    * hooks are removed afterwards, nothing is recorded for a gradient, and each layer's matrix is built once a batch.

    Args:
        model1, model2: modules; moved to ``device`` and set to evaluation, as there.
        model1_name, model2_name: by default the names of their classes.
        model1_layers, model2_layers: names out of ``named_modules()``, by default all of them. Their outputs must be
            tensors ``(n, ...)``. Of a module that is called several times the last output counts.
        device: where to compute.

    Example:
        >>> net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> comparison = CKA(net, net, model1_layers=["0", "2"], model2_layers=["0", "2"])
        >>> data = torch.utils.data.TensorDataset(torch.randn(64, 8))
        >>> comparison.compare(torch.utils.data.DataLoader(data, batch_size=32))
        >>> comparison.export()["CKA"].shape
        torch.Size([2, 2])
    """

    def __init__(
        self,
        model1: nn.Module,
        model2: nn.Module,
        model1_name: str | None = None,
        model2_name: str | None = None,
        model1_layers: list[str] | None = None,
        model2_layers: list[str] | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        self.device = device
        self.model1, self.model2 = (model.to(device).eval() for model in (model1, model2))
        self.model1_layers, self.model2_layers = model1_layers, model2_layers
        self.model1_info = {"Name": model1_name or type(model1).__name__, "Layers": _names(model1, model1_layers, 1)}
        self.model2_info = {"Name": model2_name or type(model2).__name__, "Layers": _names(model2, model2_layers, 2)}

    def compare(self, dataloader1: Iterable, dataloader2: Iterable | None = None) -> None:
        """Compare the layers' outputs for the first item of each batch, of one loader or of a loader for each model."""
        single = dataloader2 is None or dataloader2 is dataloader1
        for info, loader in (
            (self.model1_info, dataloader1),
            (self.model2_info, dataloader1 if single else dataloader2),
        ):
            info["Dataset"] = repr(getattr(loader, "dataset", loader)).split("\n")[0]
        batches, both, left, right = 0, 0.0, 0.0, 0.0
        pairs = ((batch, batch) for batch in dataloader1) if single else zip(dataloader1, dataloader2, strict=False)
        for (x1, *_), (x2, *_) in pairs:
            if len(x1) != len(x2):
                raise ValueError(f"batches of both loaders must have the same size, got {len(x1)} and {len(x2)}")
            first = _grams(self.model1, self.model1_info["Layers"], x1.to(self.device))
            second = _grams(self.model2, self.model2_info["Layers"], x2.to(self.device))
            left, right = left + hsic1(first, first), right + hsic1(second, second)
            both = both + torch.stack([hsic1(gram.expand_as(second), second) for gram in first])
            batches += 1
        if not batches:
            raise ValueError("the loaders hold no batch")
        values = both / (left.sqrt()[:, None] * right.sqrt())
        if values.isnan().any():
            raise ValueError("the output of some layer does not vary over the data, or too little in these batches")
        self.hsic_matrix = values.float().cpu()

    def export(self) -> dict:
        """Names, layers, data sets and the matrix ``"CKA"``."""
        return {
            "model1_name": self.model1_info["Name"],
            "model2_name": self.model2_info["Name"],
            "CKA": self.hsic_matrix,
            "model1_layers": self.model1_info["Layers"],
            "model2_layers": self.model2_info["Layers"],
            "dataset1_name": self.model1_info["Dataset"],
            "dataset2_name": self.model2_info["Dataset"],
        }


def _names(model: nn.Module, wanted: list[str] | None, number: int) -> list[str]:
    names = [name for name, _ in model.named_modules()]
    missing = [] if wanted is None else [name for name in wanted if name not in names]
    if missing or (wanted is not None and not wanted):
        raise ValueError(f"model{number}_layers must be names of layers, got {missing or wanted}")
    return [name for name in names if wanted is None or name in wanted]


def _grams(model: nn.Module, names: list[str], x: Tensor) -> Tensor:
    """Gram matrices ``(layers, n, n)`` of the layers' outputs, float64."""
    found: dict[str, Tensor] = {}

    def hook(name: str):
        def keep(module: nn.Module, inputs: object, output: Tensor) -> None:
            if not isinstance(output, Tensor):
                kind = type(output).__name__
                raise TypeError(f"layer {name!r} must return a tensor, got {kind}: choose layers that do")
            features = output.flatten(1)
            # HSIC does not depend on the mean, and without it products do not cancel.
            found[name] = linear_kernel(features - features.mean(0)).double()

        return keep

    modules = dict(model.named_modules())
    handles = [modules[name].register_forward_hook(hook(name)) for name in names]
    try:
        with torch.no_grad():
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    unseen = [name for name in names if name not in found]
    if unseen:
        raise ValueError(f"layers that are never called cannot be compared: {', '.join(map(repr, unseen))}")
    return torch.stack([found[name] for name in names])
