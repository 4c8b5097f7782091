"""The mmd slice in plain PyTorch: fallback, oracle and baseline in one. It forms the matrices that the kernels avoid.

Features come as layers: sequences of ``(b, n, d)`` tensors, float32, float64, float16 or bfloat16. Matrices have the
compute dtype (float32, or float64 for float64), sums are accumulated and returned in float64.

L2 distances come from products of centred features, which keeps float32 accurate for data far from the origin, or from
differences where there are few features. First and second derivatives are finite everywhere: between points that
coincide they are those of the limit where there is one (Gaussian, power, Matérn 3/2 and 5/2), else 0 (Laplacian,
energy).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from mmfast import _backend
from mmfast.mmd.terms import (
    DOT,
    ENERGY,
    GAUSSIAN,
    L1,
    LAPLACIAN,
    LAPLACIAN_L1,
    MATERN32,
    MATERN52,
    METRIC,
    POLYNOMIAL,
    POWER,
    ROOTS,
    Terms,
)

Layers = Sequence[Tensor]

_FEW = 8  # features up to which differences are taken one by one
_NEAR = 32 * torch.finfo(torch.float64).eps  # what cancellation leaves of a zero, relative to the squared norms


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What kernels of features of ``dtype`` are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _in_full(function):
    @functools.wraps(function)
    def wrapped(x, *args, **kwargs):
        device = (x if isinstance(x, Tensor) else x[0]).device.type
        with _backend.without_autocast(device):
            return function(x, *args, **kwargs)

    return wrapped


# ---- Kernel values


@_in_full
def matrix(x: Layers, y: Layers, terms: Terms) -> Tensor:
    """K(x, y), ``(b, n, m)``, in the compute dtype. Pass ``x`` itself as ``y`` for the points' own matrix."""
    same = all(a is b for a, b in zip(x, y, strict=True))
    product = None
    for layer, (a, b) in enumerate(zip(x, y, strict=True)):
        values = _values(terms, layer, *_measure(a, b, same, _families(terms, layer)))
        product = values if product is None else product * values
    return product


def aligned(x: Layers, y: Layers, terms: Terms) -> Tensor:
    """k(x_i, y_i), ``(b, n)``, in the compute dtype."""
    return aligned_each([(x, y)], terms)[0]


def aligned_each(pairs: Sequence[tuple[Layers, Layers]], terms: Terms) -> Tensor:
    """`aligned` of each pair, ``(len(pairs), b, n)``: a few operators for all of them."""
    with _backend.without_autocast(pairs[0][0][0].device.type):
        product = None
        for layer in range(len(pairs[0][0])):
            metric = METRIC[_families(terms, layer)[0]]
            measure = torch.stack([_measure_aligned(x[layer], y[layer], metric) for x, y in pairs])
            values = _values_at_once(terms, layer, measure)
            product = values if product is None else product * values
        return product


def _measure_aligned(a: Tensor, b: Tensor, metric: int) -> Tensor:
    a, b = a.to(compute_dtype(a.dtype)), b.to(compute_dtype(b.dtype))
    if metric == DOT:
        return (a * b).sum(-1)
    return (a - b).abs().sum(-1) if metric == L1 else (a - b).square().sum(-1)


def _values_at_once(terms: Terms, layer: int, measure: Tensor) -> Tensor:
    """`_values` of a few measures: exponentials of all bandwidths together, which takes memory for each."""
    rows = _rows(terms, layer)
    exponentials = all(terms.families[t] in (GAUSSIAN, LAPLACIAN_L1) for t in rows)
    if len(rows) == 1 or not exponentials or rows[-1] - rows[0] >= len(rows):
        return _values(terms, layer, measure, measure == 0)
    weight, gamma = terms.params[rows[0] : rows[-1] + 1, :2].reshape(len(rows), 2, *[1] * measure.dim()).unbind(1)
    return (weight * torch.exp(-gamma * measure)).sum(0)


def diagonal(x: Layers, terms: Terms) -> Tensor:
    """k(x_i, x_i), ``(b, n)``, in float64."""
    product = None
    for layer, a in enumerate(x):
        families = _families(terms, layer)
        if METRIC[families[0]] == DOT:
            square = a.double().square().sum(-1)
            values = _values(terms, layer, square, None)
        else:
            weights = [terms.params[t, 0] for t in _rows(terms, layer) if terms.families[t] != ENERGY]
            total = sum(weights) if weights else terms.params.new_zeros(())
            values = total.expand(a.shape[:2])
        product = values if product is None else product * values
    return product


def _rows(terms: Terms, layer: int) -> list[int]:
    return [t for t, of in enumerate(terms.layers) if of == layer]


def _families(terms: Terms, layer: int) -> list[int]:
    return [terms.families[t] for t in _rows(terms, layer)]


def _measure(x: Tensor, y: Tensor, same: bool, families: list[int]) -> tuple[Tensor, Tensor | None]:
    """Squared L2 distances, L1 distances or dot products ``(b, n, m)``, and where the distances are zero."""
    dtype = compute_dtype(x.dtype)
    metric = METRIC[families[0]]
    x, y = x.to(dtype), y.to(dtype)
    if metric == DOT:
        return x @ y.transpose(1, 2), None
    if metric == L1:
        return (x[:, :, None] - y[:, None]).abs().sum(-1), None
    roots = any(family in ROOTS for family in families)
    if x.shape[2] <= _FEW:
        square = x.new_zeros(x.shape[0], x.shape[1], y.shape[1])
        for a, b in zip(x.unbind(2), y.unbind(2), strict=True):
            square = square + (a[:, :, None] - b[:, None]).square()
        return square, (square == 0 if roots else None)
    x, y = _centred(x, y, torch.float64 if roots else dtype)
    norms = x.square().sum(2)[:, :, None], y.square().sum(2)[:, None]
    square = norms[0] + norms[1] - 2 * (x @ y.transpose(1, 2))
    # What rounding makes of a zero is taken away as a constant, so that derivatives pass.
    wrong = square.detach()
    zero = wrong <= _NEAR * (norms[0] + norms[1]).detach() if roots else wrong < 0
    if same:
        zero = zero | torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
    square = square - torch.where(zero, wrong, 0)
    return square.to(dtype), (zero if roots else None)


def _centred(x: Tensor, y: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Both about their common middle, a constant: distances, and so all their derivatives, do not depend on it."""
    with torch.no_grad():
        centre = middle((x, y)).to(dtype)
    x, y = x.to(dtype), y.to(dtype)
    return x - centre, y - centre


def middle(samples: Sequence[Tensor], dtype: torch.dtype | None = None) -> Tensor:
    """Of rows of samples ``(b, n, d)`` the median of the means of three thirds, ``(b, 1, d)``; 0 where something is not
    finite. One row far off, or a bad one, must not spoil the others."""
    whole = _mean_of(samples, dtype)
    parts = [[s[:, i::3] for s in samples] for i in range(3)]
    # Of fewer than three rows some thirds are empty.
    means = [torch.where(whole.new_full((), _count(p)) > 0, _mean_of(p, dtype), whole) for p in parts]
    low, high = torch.minimum(*means[:2]), torch.maximum(*means[:2])
    return torch.where(whole.isfinite(), torch.maximum(low, torch.minimum(high, means[2])), 0)


def _count(samples: Sequence[Tensor]) -> int:
    return sum(s.shape[1] for s in samples)


def _mean_of(samples: Sequence[Tensor], dtype: torch.dtype | None) -> Tensor:
    first, *rest = (s.sum(1, keepdim=True, dtype=dtype) for s in samples)
    for s in rest:
        first = first + s
    return first / max(_count(samples), 1)


def _values(terms: Terms, layer: int, measure: Tensor, zero: Tensor | None) -> Tensor:
    """Σ of a layer's terms at squared distances, distances or products; ``zero`` marks zero distances."""
    families = _families(terms, layer)
    root = None
    if any(family in ROOTS for family in families):
        root = measure.masked_fill(zero, 1).sqrt().masked_fill(zero, 0)
    total = None
    for t in _rows(terms, layer):
        values = _term(terms.families[t], terms.params[t].unbind(), measure, root, zero)
        total = values if total is None else total + values
    return total


def _term(family: int, params: Sequence[Tensor], measure: Tensor, root: Tensor | None, zero: Tensor | None) -> Tensor:
    # A tensor without dimensions does not raise the dtype of one that has some.
    weight, gamma, offset, exponent = params
    if family == GAUSSIAN:
        return weight * torch.exp(-gamma * measure)
    if family == LAPLACIAN:
        return weight * torch.exp(-gamma * root)
    if family == POWER:
        return weight * (1 + gamma * measure) ** -exponent
    if family == MATERN32:
        values = (1 + gamma * root) * torch.exp(-gamma * root)
        return weight * torch.where(zero, 1 - gamma**2 / 2 * measure, values)  # the first derivative at 0, by series
    if family == MATERN52:
        values = (1 + gamma * root + gamma**2 / 3 * measure) * torch.exp(-gamma * root)
        return weight * torch.where(zero, 1 - gamma**2 / 6 * measure, values)
    if family == ENERGY:
        return -weight * root
    if family == LAPLACIAN_L1:
        return weight * torch.exp(-gamma * measure)
    if family == POLYNOMIAL:
        return weight * (gamma * measure + offset) ** exponent.detach()
    raise ValueError(f"family must be 0 ... 7, got {family}")


# ---- Primitives


@_in_full
def quadratic(
    x: Layers, y: Layers, wx: Tensor | None, wy: Tensor | None, coefs: Tensor, terms: Terms
) -> tuple[Tensor, Tensor]:
    r"""The quadratic forms of an MMD and their combination.

    With a = ``wx`` ``(b, n)`` and b = ``wy`` ``(b, m)``, or ones,

        sums = [Σ_{i≠j} a_i a_j k(x_i, x_j),  Σ_{i≠j} b_i b_j k(y_i, y_j),  Σ_ij a_i b_j k(x_i, y_j)],

    returns ``value = sums @ coefs`` ``(b,)``, which is differentiable, and ``sums`` ``(b, 3)``, which is not. Blocks
    with a constant coefficient 0 are left out (their sum is 0).
    """
    blocks = ((x, None, wx, wx), (y, None, wy, wy), (x, y, wx, wy))
    wanted = (True, True, True)
    if not coefs.requires_grad and coefs.device.type == "cpu" and not torch.compiler.is_compiling():
        wanted = tuple(c != 0 for c in coefs.tolist())
    sums = [_form(*block, terms) if keep else None for block, keep in zip(blocks, wanted, strict=True)]
    nothing = torch.zeros(x[0].shape[0], dtype=torch.float64, device=x[0].device)
    sums = torch.stack([nothing if s is None else s for s in sums], dim=1)
    return (sums * coefs).sum(1), sums.detach()


def _form(x: Layers, y: Layers | None, a: Tensor | None, b: Tensor | None, terms: Terms) -> Tensor:
    values = off_diagonal(x, terms) if y is None else matrix(x, y, terms)
    if a is not None:
        values = values * a.to(values.dtype)[:, :, None]
    if b is not None:
        values = values * b.to(values.dtype)[:, None]
    return values.sum((1, 2), dtype=torch.float64)


def off_diagonal(x: Layers, terms: Terms) -> Tensor:
    """K(x, x) with zeros for its diagonal."""
    values = matrix(x, x, terms)
    return values.masked_fill(torch.eye(values.shape[1], dtype=torch.bool, device=values.device), 0)


@_in_full
def matmul(x: Layers, y: Layers, v: Tensor, terms: Terms, skip_diagonal: bool = False) -> Tensor:
    """K(x, y) @ v for ``v`` ``(b, m, p)``; with ``skip_diagonal`` y is x, and a point's kernel with itself counts 0."""
    values = off_diagonal(x, terms) if skip_diagonal else matrix(x, y, terms)
    return values @ v.to(values.dtype)


@_in_full
def sums(x: Layers, y: Layers | None, terms: Terms) -> tuple[Tensor, Tensor, Tensor]:
    """Row sums ``(b, n)``, column sums ``(b, m)`` and the sum of squares ``(b,)`` of K(x, y).

    Without ``y`` those of K(x, x) without its diagonal; the columns are then the rows, and left out: ``(b, 0)``.
    """
    return sums_of_matrix(off_diagonal(x, terms) if y is None else matrix(x, y, terms), y is None)


def sums_of_matrix(values: Tensor, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """`sums` of a matrix."""
    rows = values.sum(2, dtype=torch.float64)
    cols = rows[:, :0] if symmetric else values.sum(1, dtype=torch.float64)
    return rows, cols, values.square().sum((1, 2), dtype=torch.float64)


@_in_full
def pair(x: Layers, terms_x: Terms, y: Layers, terms_y: Terms) -> tuple[Tensor, Tensor, Tensor]:
    """Of K = K(x, x) and L = L(y, y) without diagonals: K 1 and L 1 ``(b, n)``, and ``(b, 3)`` [ΣKL, ΣKK, ΣLL]."""
    return pair_of_matrices(off_diagonal(x, terms_x), off_diagonal(y, terms_y))


def pair_of_matrices(k: Tensor, other: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`pair` of two matrices without diagonals."""
    products = [(a * b).sum((1, 2), dtype=torch.float64) for a, b in ((k, other), (k, k), (other, other))]
    return k.sum(2, dtype=torch.float64), other.sum(2, dtype=torch.float64), torch.stack(products, dim=1)


@torch.no_grad()
@_in_full
def permutations(z: Layers, terms: Terms, members: Tensor) -> tuple[Tensor, Tensor]:
    """Σ_{i≠j in group} k(z_i, z_j) of each group, a row of ``members`` ``(B, N)`` bool, and the row sums ``(N,)``.

    Layers are ``(1, N, d)``. Without gradient.
    """
    values = off_diagonal(z, terms)[0].double()
    groups = members.double()
    return ((groups @ values) * groups).sum(1), values.sum(1)


@torch.no_grad()
@_in_full
def select(
    x: Tensor, y: Tensor | None, ranks: Tensor, skip_diagonal: bool, lower_triangle: bool
) -> tuple[Tensor, Tensor]:
    """Squared L2 distances at ``ranks`` (from 0, ascending, int64) among those of all pairs, and the pairs.

    ``x`` ``(n, d)`` and ``y`` ``(m, d)``, or ``None`` for ``x``. Pairs i = j are left out with ``skip_diagonal``, and
    i < j with ``lower_triangle``. Returns ``(R,)`` float64 and ``(R, 2)`` int64. Without gradient.
    """
    if x.is_meta:  # which pairs there are to choose from would have to be asked there
        return x.new_empty(len(ranks), dtype=torch.float64), x.new_empty((len(ranks), 2), dtype=torch.int64)
    other = x if y is None else y
    square, _ = _measure(x[None].double(), other[None].double(), y is None, [GAUSSIAN])
    index = torch.ones(square.shape[1:], dtype=torch.bool, device=x.device)
    if lower_triangle:
        index = index.tril(-1 if skip_diagonal else 0)
    elif skip_diagonal:
        index.fill_diagonal_(False)
    index = index.nonzero()
    values, order = square[0][index[:, 0], index[:, 1]].sort()
    return values[ranks], index[order[ranks]]
