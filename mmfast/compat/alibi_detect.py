"""alibi-detect's MMD functions, kernel and drift detector, under their names (0.13, PyTorch), without kernel matrices.

``mmd2``, ``mmd2_from_kernel_matrix`` and ``squared_pairwise_distance`` are those of ``alibi_detect.utils.pytorch``,
``GaussianRBF`` and ``sigma_median`` those of its ``kernels``, ``MMDDrift`` that of ``alibi_detect.cd``. alibi-detect
itself is not needed.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

import mmfast
from mmfast.kernels import Energy, Kernel, MeanDistance, MultiGaussian
from mmfast.mmd import kernel_matrix, two_sample_test
from mmfast.mmd.bandwidth import squared_distances_at

__all__ = ["GaussianRBF", "MMDDrift", "mmd2", "mmd2_from_kernel_matrix", "sigma_median", "squared_pairwise_distance"]

_SMALLEST = 1e-30  # squared distances are no smaller


def squared_pairwise_distance(x: Tensor, y: Tensor, a_min: float = _SMALLEST) -> Tensor:
    """|x_i − y_j|², but at least ``a_min``: ``(n, m)`` of ``(n, d)`` and ``(m, d)``."""
    return kernel_matrix(x, y, _DISTANCE).square().clamp(min=a_min)


_DISTANCE = Energy()


def sigma_median(x: Tensor, y: Tensor, dist: Tensor) -> Tensor:
    """√(median of ``dist`` / 2), ``(1,)``: the lower median of the off-diagonal entries where x equals y.

    For x ≠ y it is the entry before the lower median where their number is odd, as in alibi-detect.
    """
    index = _rank(x, y)[0] % dist.numel()
    return (0.5 * dist.flatten().kthvalue(index + 1).values[None]) ** 0.5


def _rank(x: Tensor, y: Tensor) -> tuple[int, bool]:
    """Which squared distance in ascending order is alibi-detect's median, and whether the points are the same."""
    same = x is y or (x.shape == y.shape and torch.equal(x, y))
    own = len(x) if same else 0
    return own + (len(x) * len(y) - own) // 2 - 1, same


def _sigma_median_streamed(x: Tensor, y: Tensor) -> Tensor:
    """`sigma_median` of features, without the matrix of their distances."""
    rank, same = _rank(x, y)
    if not same:
        found = squared_distances_at(x, y, [rank % (len(x) * len(y))])
    elif len(x) > 1:  # each pair stands twice in the matrix, after the zeros of the diagonal
        found = squared_distances_at(x, None, [(rank - len(x)) // 2], skip_diagonal=True, lower_triangle=True)
    else:
        found = x.new_zeros(1)
    return (0.5 * found.clamp(min=_SMALLEST)) ** 0.5


def _sigma_mean(x: Tensor, y: Tensor) -> Tensor:
    """alibi-detect's rule under KeOps: √(mean squared distance / 2), of different points where x equals y."""
    return MeanDistance("x" if _rank(x, y)[1] else "cross", scale=0.5)(x, y)[None] ** 0.5


_STREAMED = {sigma_median: _sigma_median_streamed, _sigma_mean: _sigma_mean}


class GaussianRBF(Kernel):
    r"""k(x, y) = mean over σ of exp(−|x − y|² / (2σ²)); a kernel of `mmfast.kernels` too.

    Args:
        sigma: a tensor of one or more σ; if None, they are found the first time that the kernel is called.
        init_sigma_fn: called with x, y and their squared distances, gives σ; by default `sigma_median`, which is then
            computed without the matrix.
        trainable: whether ``log_sigma``, the module's one parameter, requires a gradient.
    """

    def __init__(
        self, sigma: Tensor | None = None, init_sigma_fn: Callable | None = None, trainable: bool = False
    ) -> None:
        super().__init__()
        log_sigma = torch.empty(1) if sigma is None else torch.as_tensor(sigma).reshape(-1).log()
        self.log_sigma = nn.Parameter(log_sigma, requires_grad=trainable)
        self.init_required = sigma is None
        self.init_sigma_fn = sigma_median if init_sigma_fn is None else init_sigma_fn
        self.trainable = trainable

    @property
    def sigma(self) -> Tensor:
        """``(number of σ,)``."""
        return self.log_sigma.exp()

    def infer(self, x: Tensor, y: Tensor) -> None:
        """Sets σ to what ``init_sigma_fn`` finds in features ``(n, d)`` and ``(m, d)``."""
        with torch.no_grad():
            if self.init_sigma_fn in _STREAMED:
                sigma = _STREAMED[self.init_sigma_fn](x, y)
            else:
                sigma = self.init_sigma_fn(x, y, squared_pairwise_distance(x, y))
            self.log_sigma.copy_(sigma.log())
        self.init_required = False

    def parts(self, x, y=None, resolve=None):
        if self.init_required:
            if x[0].shape[0] != 1:
                raise ValueError("the kernel has no sigma yet: give one, or call it with one sample first")
            self.infer(x[0][0], x[0][0])
        return MultiGaussian(2 * self.sigma.square(), reduce="mean").parts(x, y)

    def forward(self, x: np.ndarray | Tensor, y: np.ndarray | Tensor, infer_sigma: bool = False) -> Tensor:
        """The matrix ``(n, m)`` of features ``(n, ...)`` and ``(m, ...)``; with ``infer_sigma`` σ is found in them."""
        x, y = (torch.as_tensor(a).flatten(1) for a in (x, y))
        if infer_sigma or self.init_required:
            if self.trainable and infer_sigma:
                raise ValueError("Gradients cannot be computed w.r.t. an inferred sigma value")
            self.infer(x, y)
        return kernel_matrix(x, y, self)

    def extra_repr(self) -> str:
        return "sigma=None" if self.init_required else f"sigma={self.sigma.tolist()}"


def mmd2_from_kernel_matrix(kernel_mat: Tensor, m: int, permute: bool = False, zero_diag: bool = True) -> Tensor:
    """MMD² from the kernel matrix of [x; y], the last ``m`` rows and columns being those of y.

    Args:
        kernel_mat: ``(n + m, n + m)``.
        m: rows of y, ≥ 2.
        permute: put rows and columns in one random order first. `mmfast.two_sample_test` does many orders at once.
        zero_diag: leave the diagonal out. Otherwise it is taken to be zero, or enters sums that do not count it.
    """
    n = len(kernel_mat) - m
    if kernel_mat.dim() != 2 or kernel_mat.shape[0] != kernel_mat.shape[1] or min(n, m) < 2:
        raise ValueError(f"kernel_mat must be (n + m, n + m), n, m >= 2, got {tuple(kernel_mat.shape)} and m = {m}")
    if permute:
        order = torch.randperm(n + m)
        kernel_mat = kernel_mat[order][:, order]
    blocks = kernel_mat[:n, :n], kernel_mat[n:, n:]
    own = [block.diagonal().sum() if zero_diag else 0.0 for block in blocks]
    within = [(k.sum() - d) / (size * (size - 1)) for k, d, size in zip(blocks, own, (n, m), strict=True)]
    return within[0] + within[1] - 2 * kernel_mat[n:, :n].mean()


def mmd2(x: Tensor, y: Tensor, kernel: Callable) -> Tensor:
    """The unbiased MMD² of ``(n, ...)`` and ``(m, ...)``, differentiable.

    ``kernel`` is a `GaussianRBF` (which, if it has no σ yet, finds it in x) or a kernel of `mmfast.kernels`; any other
    callable is asked for the three matrices.
    """
    if isinstance(kernel, Kernel):
        return mmfast.mmd2(x.flatten(1), y.flatten(1), kernel, "unbiased")
    n, m = len(x), len(y)
    k_xx, k_yy, k_xy = kernel(x, x), kernel(y, y), kernel(x, y)
    return (k_xx.sum() - k_xx.trace()) / (n * (n - 1)) + (k_yy.sum() - k_yy.trace()) / (m * (m - 1)) - 2 * k_xy.mean()


class MMDDrift:
    r"""The MMD drift detector: does new data come from the distribution of the reference data? By a permutation test.

    The arguments, ``score``, ``predict`` and its dictionary are alibi-detect's, and with the same random state of torch
    so are the permutations. What differs, and why:

    * ``p_val`` is (1 + #{null ≥ MMD²}) / (1 + n_permutations), where alibi-detect leaves out both ones and therefore
      rejects too often, with p-values of 0 (SeldonIO/alibi-detect#960), and ``distance_threshold`` is the value from
      which on drift is flagged. ``corrected=False`` gives alibi-detect's p-value and threshold. With the default 100
      permutations and ``p_val=.05`` both flag the same data.
    * ``sigma`` may be a number or a tensor too; alibi-detect ignores those silently.
    * a kernel must be one of `mmfast.kernels` or a `GaussianRBF`, so that no matrix is needed. Trained ones keep their
      σ, where alibi-detect raises an error or, with ``configure_kernel_from_x_ref=False``, replaces it.

    Args:
        x_ref: reference data ``(n, ...)``, an array (or what ``preprocess_fn`` makes an array of).
        backend: which of alibi-detect's conventions for the bandwidth: ``"tensorflow"`` and ``"pytorch"`` take the
            median of squared distances, ``"keops"`` their mean. mmfast computes in each case.
        p_val: significance.
        x_ref_preprocessed, preprocess_at_init, preprocess_fn: what is done to data first, and when to ``x_ref``.
        update_x_ref: ``{"last": n}`` or ``{"reservoir_sampling": n}``: how predictions change the reference data.
        kernel: by default `GaussianRBF`.
        sigma: σ of the `GaussianRBF`; several are averaged over.
        configure_kernel_from_x_ref: find σ in ``x_ref``, once, unless ``sigma`` is given; that of a `GaussianRBF` that
            was passed as ``kernel`` is replaced too, if it is not trainable. With False a σ that is missing is found in
            the distances between ``x_ref`` and ``x`` at each prediction, which then is no exact test.
        n_permutations: of the test.
        batch_size_permutations: ignored; all permutations are one product.
        device: of the computation; by default ``"cuda"`` where there is one.
        input_shape, data_type: for the metadata.
        corrected: see above.

    Example:
        >>> detector = MMDDrift(np.random.randn(500, 32), backend="pytorch")
        >>> detector.predict(np.random.randn(200, 32) + 0.5)["data"]["is_drift"]
        1
    """

    def __init__(
        self,
        x_ref: np.ndarray | list,
        backend: str = "tensorflow",
        p_val: float = 0.05,
        x_ref_preprocessed: bool = False,
        preprocess_at_init: bool = True,
        update_x_ref: dict[str, int] | None = None,
        preprocess_fn: Callable | None = None,
        kernel: Callable | None = None,
        sigma: np.ndarray | Tensor | float | None = None,
        configure_kernel_from_x_ref: bool = True,
        n_permutations: int = 100,
        batch_size_permutations: int = 1000000,
        device: str | torch.device | None = None,
        input_shape: tuple | None = None,
        data_type: str | None = None,
        *,
        corrected: bool = True,
    ) -> None:
        backend = backend.lower()
        if backend not in ("tensorflow", "pytorch", "keops"):
            raise ValueError(f"backend must be 'tensorflow', 'pytorch' or 'keops', got {backend!r}")
        if preprocess_fn is not None and not callable(preprocess_fn):
            raise ValueError("`preprocess_fn` is not a valid Callable.")
        if update_x_ref is not None and list(update_x_ref) not in (["last"], ["reservoir_sampling"]):
            raise ValueError(f"update_x_ref must be {{'last': n}} or {{'reservoir_sampling': n}}, got {update_x_ref!r}")
        if not 0 < p_val < 1:
            raise ValueError(f"p_val must be between 0 and 1, got {p_val}")
        self.p_val, self.n_permutations, self.corrected = p_val, n_permutations, corrected
        self.update_x_ref, self.preprocess_fn = update_x_ref, preprocess_fn
        self.preprocess_at_init, self.x_ref_preprocessed = preprocess_at_init, x_ref_preprocessed
        self.n = len(x_ref)
        self.input_shape = input_shape if isinstance(input_shape, tuple) else getattr(x_ref, "shape", (None,))[1:]
        now = preprocess_fn is not None and preprocess_at_init and not x_ref_preprocessed
        self.x_ref = preprocess_fn(x_ref) if now else x_ref
        if isinstance(device, torch.device):
            self.device = device
        else:
            wanted = device is None or device.lower() in ("gpu", "cuda")
            self.device = torch.device("cuda" if wanted and torch.cuda.is_available() else "cpu")
        self.meta = {
            "name": type(self).__name__,
            "online": False,
            "data_type": data_type,
            "version": mmfast.__version__,
            "detector_type": "drift",
            "backend": backend,
        }
        self.kernel, self.infer_sigma = self._kernel(kernel, sigma, backend, configure_kernel_from_x_ref)
        if self.infer_sigma and configure_kernel_from_x_ref:
            x = self._features(self.x_ref)
            self.kernel.infer(x, x)
            self.infer_sigma = False

    def _kernel(self, kernel, sigma, backend: str, configure: bool) -> tuple[Kernel, bool]:
        """The kernel, and whether its σ is to be found in data."""
        if sigma is not None:
            sigma = torch.as_tensor(sigma, device=self.device)
            sigma = sigma if sigma.is_floating_point() else sigma.float()
        if kernel is None or kernel is GaussianRBF:
            kernel = GaussianRBF(sigma, _sigma_mean if backend == "keops" else None).to(self.device)
            return kernel, sigma is None
        if not isinstance(kernel, Kernel):
            kind = kernel.__name__ if isinstance(kernel, type) else type(kernel).__name__
            raise TypeError(f"kernel must be a GaussianRBF or a kernel of mmfast.kernels, got {kind}")
        if not isinstance(kernel, GaussianRBF):
            return kernel.to(self.device), False
        return kernel.to(self.device), kernel.init_required or (configure and not kernel.trainable)

    def _features(self, x: np.ndarray | list | Tensor) -> Tensor:
        x = torch.as_tensor(x, device=self.device).flatten(1)
        return x if x.is_floating_point() else x.float()

    def preprocess(self, x: np.ndarray | list) -> tuple[np.ndarray, np.ndarray]:
        """Reference data and new data, both preprocessed."""
        if self.preprocess_fn is None:
            return self.x_ref, x
        ready = self.preprocess_at_init or self.x_ref_preprocessed
        return self.x_ref if ready else self.preprocess_fn(self.x_ref), self.preprocess_fn(x)

    def score(self, x: np.ndarray | list) -> tuple[float, float, float]:
        """p-value, MMD² of the data ``(m, ...)`` to the reference data, and the MMD² above which drift is flagged."""
        x_ref, x = (self._features(a) for a in self.preprocess(x))
        if self.infer_sigma:
            self.kernel.infer(x_ref, x)
        test = two_sample_test(x_ref, x, self.kernel, permutations=self._permutations(len(x_ref), len(x)))
        null, count = test.null.sort(descending=True).values, self.n_permutations
        if self.corrected:
            p_value = test.p_value.item()
            # The most permutations that may reach the statistic where p_value < p_val.
            index = sum((1 + k) / (1 + count) < self.p_val for k in range(count)) - 1
        else:
            p_value, index = (null >= test.statistic).double().mean().item(), int(self.p_val * count)
        return p_value, test.statistic.item(), null[index].item() if index >= 0 else float("inf")

    def _permutations(self, n: int, m: int) -> Tensor:
        """Who takes the place of the reference data."""
        members = torch.zeros(self.n_permutations, n + m, dtype=torch.bool)
        for row in members:
            row[torch.randperm(n + m)[:n]] = True
        return members

    def predict(self, x: np.ndarray | list, return_p_val: bool = True, return_distance: bool = True) -> dict:
        """Whether the data ``(m, ...)`` has drifted.

        Returns:
            ``{"meta": ..., "data": {"is_drift": 0 or 1, "p_val", "threshold", "distance", "distance_threshold"}}``;
            what is not asked for is None or, ``distance_threshold``, absent.
        """
        p_value, distance, threshold = self.score(x)
        if self.update_x_ref is not None:
            if self.preprocess_fn is not None and self.preprocess_at_init:
                x = self.preprocess_fn(x)
            self.x_ref = self._updated(x)
        self.n += len(x)
        data = {"is_drift": int(p_value < self.p_val), "distance": None, "p_val": None, "threshold": None}
        if return_p_val:
            data |= {"p_val": p_value, "threshold": self.p_val}
        if return_distance:
            data |= {"distance": distance, "distance_threshold": threshold}
        return {"data": data, "meta": copy.deepcopy(self.meta)}

    def _updated(self, x: np.ndarray) -> np.ndarray:
        """The reference data after ``x``."""
        ((method, size),) = self.update_x_ref.items()
        x_ref = np.asarray(self.x_ref)
        if method == "last":
            return np.concatenate((x_ref, x))[-size:]
        room = max(size - len(x_ref), 0)
        kept = np.concatenate((x_ref, x[:room]))
        for seen, one in enumerate(x[room:], start=self.n + room + 1):
            place = int(random.random() * seen)
            if place < size:
                kept[place] = one
        return kept
