"""The mmd slice by its textbook definitions, in numpy and float64: differences, matrices and loops."""

from __future__ import annotations

import numpy as np

from mmfast import kernels as k


def squares(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return ((x[:, None] - y[None]) ** 2).sum(-1)


def distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.sqrt(squares(x, y))


def _rows(x: np.ndarray) -> np.ndarray:
    norms = np.sqrt((x**2).sum(1, keepdims=True))
    return np.divide(x, norms, out=np.zeros_like(x), where=norms > 0)


def _dan(x: np.ndarray, y: np.ndarray, pooled: np.ndarray, diagonal: bool = False) -> np.ndarray:
    """Sum of five Gaussians as DAN's code builds it."""
    total = len(pooled)
    s = squares(pooled, pooled).sum()
    bandwidth = s / (total**2 if diagonal else total**2 - total) / 2.0**2
    return sum(np.exp(-squares(x, y) / (bandwidth * 2.0**i)) for i in range(5))


def _median(pooled: np.ndarray) -> float:
    s = squares(pooled, pooled)
    return np.median(s[~np.eye(len(s), dtype=bool)])


# name → (kernel, its matrix from x, y and the pooled sample)
KERNELS = {
    "gaussian": (k.Gaussian(1.7), lambda x, y, z: np.exp(-squares(x, y) / (2 * 1.7**2))),
    "gaussian_median": (k.Gaussian("median"), lambda x, y, z: np.exp(-squares(x, y) / (2 * _median(z)))),
    "gaussian_tllib": (
        k.Gaussian("tllib"), lambda x, y, z: np.exp(-squares(x, y) / (2 * squares(z, z).mean())),
    ),
    "multi": (
        k.MultiGaussian([0.5, 3.0, 20.0], weights=[1.0, 0.2, 2.0]),
        lambda x, y, z: sum(w * np.exp(-squares(x, y) / b) for b, w in ((0.5, 1.0), (3.0, 0.2), (20.0, 2.0))),
    ),
    "multi_mean": (
        k.MultiGaussian([1.0, 4.0, 30.0], reduce="mean"),
        lambda x, y, z: np.mean([np.exp(-squares(x, y) / b) for b in (1.0, 4.0, 30.0)], axis=0),
    ),
    "ladder": (
        k.MultiGaussian(bandwidth=2.5, kernel_mul=3.0, kernel_num=4),
        lambda x, y, z: sum(np.exp(-squares(x, y) / (2.5 / 9 * 3.0**i)) for i in range(4)),
    ),
    "dan": (k.MultiGaussian(), _dan),
    "tllib": (
        k.MultiGaussian(bandwidth="tllib"),
        lambda x, y, z: sum(np.exp(-squares(x, y) / (2 * 2.0**a * squares(z, z).mean())) for a in range(-3, 2)),
    ),
    "laplacian": (k.Laplacian(2.2), lambda x, y, z: np.exp(-distances(x, y) / 2.2)),
    "laplacian_l1": (
        k.Laplacian(3.1, p=1), lambda x, y, z: np.exp(-np.abs(x[:, None] - y[None]).sum(-1) / 3.1),
    ),
    "imq": (k.InverseMultiquadric(1.5), lambda x, y, z: 1 / np.sqrt(1 + squares(x, y) / 1.5**2)),
    "imq_one": (k.InverseMultiquadric(1.5, exponent=1.0), lambda x, y, z: 1 / (1 + squares(x, y) / 1.5**2)),
    "rq": (k.RationalQuadratic(1.3, 0.7), lambda x, y, z: (1 + squares(x, y) / (2 * 0.7 * 1.3**2)) ** -0.7),
    "matern12": (k.Matern(1.9, 0.5), lambda x, y, z: np.exp(-distances(x, y) / 1.9)),
    "matern32": (
        k.Matern(1.9, 1.5),
        lambda x, y, z: (1 + np.sqrt(3) * distances(x, y) / 1.9) * np.exp(-np.sqrt(3) * distances(x, y) / 1.9),
    ),
    "matern52": (
        k.Matern(1.9, 2.5),
        lambda x, y, z: (1 + np.sqrt(5) * distances(x, y) / 1.9 + 5 * squares(x, y) / (3 * 1.9**2))
        * np.exp(-np.sqrt(5) * distances(x, y) / 1.9),
    ),
    "poly": (k.Polynomial(), lambda x, y, z: (x @ y.T / x.shape[1] + 1) ** 3),
    "poly2": (k.Polynomial(2, gamma=0.3, coef=-0.5), lambda x, y, z: (0.3 * x @ y.T - 0.5) ** 2),
    "linear": (k.Linear(), lambda x, y, z: x @ y.T),
    "cosine": (k.Cosine(), lambda x, y, z: _rows(x) @ _rows(y).T),
    "energy": (k.Energy(), lambda x, y, z: -distances(x, y)),
    "sum": (
        2.0 * k.Gaussian(1.1) + k.Matern(2.0, 1.5) + 0.5 * k.Energy(),
        lambda x, y, z: 2 * np.exp(-squares(x, y) / (2 * 1.1**2))
        + (1 + np.sqrt(3) * distances(x, y) / 2) * np.exp(-np.sqrt(3) * distances(x, y) / 2)
        - 0.5 * distances(x, y),
    ),
    "sum_of_metrics": (
        k.Gaussian(1.1) + 0.3 * k.Laplacian(2.0, p=1) + k.Cosine(),
        lambda x, y, z: np.exp(-squares(x, y) / (2 * 1.1**2))
        + 0.3 * np.exp(-np.abs(x[:, None] - y[None]).sum(-1) / 2)
        + _rows(x) @ _rows(y).T,
    ),
}  # fmt: skip

# Kernels that take tuples of two layers, with the matrices of the layers.
PRODUCTS = {
    "product": (
        k.Product([k.Gaussian(1.4), k.Laplacian(2.0, p=1)]),
        lambda x, y: (
            np.exp(-squares(x[0], y[0]) / (2 * 1.4**2)) * np.exp(-np.abs(x[1][:, None] - y[1][None]).sum(-1) / 2)
        ),
    ),
    "joint": (
        k.Product([k.MultiGaussian(), k.MultiGaussian(bandwidth=1.68, kernel_num=1)]),
        lambda x, y: _dan(x[0], y[0], np.concatenate((x[0], y[0]))) * np.exp(-squares(x[1], y[1]) / 1.68),
    ),
    "product_of_sums": (
        3.0 * k.Product([k.Gaussian(1.4) + k.Cosine(), 0.5 * k.Energy() + k.Linear()]),
        lambda x, y: (
            3
            * (np.exp(-squares(x[0], y[0]) / (2 * 1.4**2)) + _rows(x[0]) @ _rows(y[0]).T)
            * (-0.5 * distances(x[1], y[1]) + x[1] @ y[1].T)
        ),
    ),
}


def matrices(name: str, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """K(x, x), K(y, y), K(x, y); bandwidths from the pooled sample."""
    pooled, matrix = np.concatenate((x, y)), KERNELS[name][1]
    return matrix(x, x, pooled), matrix(y, y, pooled), matrix(x, y, pooled)


def mmd2(xx: np.ndarray, yy: np.ndarray, xy: np.ndarray, estimator: str, block_size: int | None = None) -> float:
    """Double loops over the three matrices."""
    n, m = xy.shape

    def h(i: int, j: int) -> float:
        return xx[i, j] + yy[i, j] - xy[i, j] - xy[j, i]

    if estimator == "biased":
        return xx.sum() / n**2 + yy.sum() / m**2 - 2 * xy.sum() / (n * m)
    if estimator == "unbiased":
        within = sum(xx[i, j] for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
        within += sum(yy[i, j] for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
        return within - 2 * sum(xy[i, j] for i in range(n) for j in range(m)) / (n * m)
    if estimator == "one_sample_u":
        return np.mean([h(i, j) for i in range(n) for j in range(n) if i != j])
    if estimator == "linear":
        return np.mean([h(i, i + 1) for i in range(0, n - 1, 2)])
    if estimator == "linear_cyclic":
        return np.mean([h(i, (i + 1) % n) for i in range(n)])
    size = block_size or max(2, int(n**0.5))
    starts = range(0, n - size + 1, size)
    return np.mean([h(i, j) for s in starts for i in range(s, s + size) for j in range(s, s + size) if i != j])


def weighted_mmd2(xx, yy, xy, a: np.ndarray, b: np.ndarray, unbiased: bool) -> float:
    a, b = a / a.sum(), b / b.sum()
    if not unbiased:
        return a @ xx @ a + b @ yy @ b - 2 * a @ xy @ b

    def within(matrix: np.ndarray, w: np.ndarray) -> float:
        pairs = [(i, j) for i in range(len(w)) for j in range(len(w)) if i != j]
        return sum(w[i] * w[j] * matrix[i, j] for i, j in pairs) / sum(w[i] * w[j] for i, j in pairs)

    return within(xx, a) + within(yy, b) - 2 * a @ xy @ b


def hsic(k_matrix: np.ndarray, l_matrix: np.ndarray, estimator: str) -> float:
    n = len(k_matrix)
    if estimator == "biased":
        h = np.eye(n) - 1 / n
        return np.trace(k_matrix @ h @ l_matrix @ h) / (n - 1) ** 2
    k0, l0, one = k_matrix - np.diag(np.diag(k_matrix)), l_matrix - np.diag(np.diag(l_matrix)), np.ones(n)
    value = np.trace(k0 @ l0) + (one @ k0 @ one) * (one @ l0 @ one) / ((n - 1) * (n - 2))
    return (value - 2 / (n - 2) * (one @ k0 @ l0 @ one)) / (n * (n - 3))
