"""Products and sums of kernel matrices, and the matrices themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from mmfast import _backend
from mmfast.mmd import reference
from mmfast.mmd._inputs import as_layers, by_item, check_kernel, resolver, two_samples
from mmfast.mmd._primitives import primitives
from mmfast.mmd.kernels import Kernel, Layers, apply
from mmfast.mmd.reference import compute_dtype, diagonal


class KernelSums(NamedTuple):
    """Of a kernel matrix: ``total``, ``rows``, ``cols`` and ``squares`` (the sum of the squared entries), float64."""

    total: Tensor
    rows: Tensor
    cols: Tensor
    squares: Tensor


def _samples(x, y, kernel: Kernel) -> tuple[list[Tensor], list[Tensor] | None, bool]:
    if y is None:
        xs, single = as_layers("x", x, kernel.n_layers)
        return xs, None, single
    return two_samples(x, y, kernel.n_layers)


def dense(xs: Layers, ys: Layers | None, kernel: Kernel, backend: str | None) -> Tensor:
    """Σ of the parts' matrices; with ``ys=None`` of ``xs`` with itself."""
    total = None
    for transform, terms in kernel.parts(xs, ys, resolver(backend)):
        a = apply(transform, xs)
        part = reference.matrix(a, a if ys is None else apply(transform, ys), terms)
        total = part if total is None else total + part
    return total


def kernel_matrix(
    x: Tensor | Sequence[Tensor],
    y: Tensor | Sequence[Tensor] | None = None,
    kernel: Kernel | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    r"""K_ij = k(x_i, y_j), for those who do want the whole matrix; without ``y`` that of ``x`` with itself.

    Shapes ``(n, d)``, ``(m, d)`` → ``(n, m)``, or with a batch dimension first; float64 for float64 features, else
    float32. Computed by the reference on every backend (``backend`` says who finds a bandwidth); O(n·m) memory.
    Kernel and errors as in `mmfast.mmd2`.
    """
    kernel = check_kernel(kernel)
    xs, ys, single = _samples(x, y, kernel)
    if ys is None:
        value = by_item(kernel, lambda a: dense(a, None, kernel, backend), xs)
    else:
        value = by_item(kernel, lambda a, b: dense(a, b, kernel, backend), xs, ys)
    return value[0] if single else value


def kernel_matmul(
    x: Tensor | Sequence[Tensor],
    y: Tensor | Sequence[Tensor],
    v: Tensor,
    kernel: Kernel | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    r"""K(x, y) @ v: Σ_j k(x_i, y_j) v_j, in O(n + m) memory on the native backends.

    Args:
        x, y: features ``(n, d)`` and ``(m, d)``, or batches ``(b, n, d)`` and ``(b, m, d)``, or tuples of layers.
        v: ``(m,)`` or ``(m, p)``; ``(b, m)`` or ``(b, m, p)`` for batches.
        kernel: as in `mmfast.mmd2`.

    Returns:
        ``(n,)`` or ``(n, p)``, with the batch dimension if there is one; float64 for float64 features, else float32.
        Differentiable, twice, with respect to x, y, v and the kernel's parameters.
    """
    kernel = check_kernel(kernel)
    xs, ys, single = two_samples(x, y, kernel.n_layers)
    if not isinstance(v, Tensor):
        raise TypeError(f"v must be a tensor, got {type(v).__name__}")
    lead = ys[0].shape[1:2] if single else ys[0].shape[:2]
    if v.dim() not in (len(lead), len(lead) + 1) or v.shape[: len(lead)] != lead:
        size = ", ".join(map(str, lead))
        raise ValueError(f"v must be ({size}) or ({size}, p), got {tuple(v.shape)}")
    if v.device != xs[0].device:
        raise ValueError(f"v must be on the features' device, got {v.device} and {xs[0].device}")
    if not v.is_floating_point():
        raise TypeError(f"v must be floating-point, got {v.dtype}")
    vector = v.dim() == len(lead)
    values = v.to(compute_dtype(xs[0].dtype))
    values = values[None] if single else values
    values = values[:, :, None] if vector else values
    chosen, _ = _backend.choose("mmd", xs[0].device, backend)

    def compute(xs: Layers, ys: Layers, v: list[Tensor]) -> Tensor:
        total, matmul = None, primitives(chosen).matmul
        for transform, terms in kernel.parts(xs, ys, resolver(backend)):
            part = matmul(apply(transform, xs), apply(transform, ys), v[0], terms)
            total = part if total is None else total + part
        return total

    value = by_item(kernel, compute, xs, ys, [values])
    value = value[..., 0] if vector else value
    return value[0] if single else value


def kernel_sum(
    x: Tensor | Sequence[Tensor],
    y: Tensor | Sequence[Tensor] | None = None,
    kernel: Kernel | None = None,
    *,
    diagonal: bool = True,
    backend: str | None = None,
) -> KernelSums:
    r"""Total, row sums, column sums and sum of squares of K(x, y), or of K(x, x) without ``y``.

    Args:
        x, y: features ``(n, d)`` and ``(m, d)``, or batches, or tuples of layers.
        kernel: as in `mmfast.mmd2`.
        diagonal: without ``y``, count k(x_i, x_i) too.

    Returns:
        `KernelSums` of float64 tensors: total ``()``, rows ``(n,)``, cols ``(m,)``, squares ``()``, with the batch
        dimension if there is one. Differentiable. The squares of a kernel of several metrics (an L1 kernel plus an L2
        kernel, say) are found by the reference, in O(n·m) memory.
    """
    kernel = check_kernel(kernel)
    xs, ys, single = _samples(x, y, kernel)
    chosen, _ = _backend.choose("mmd", xs[0].device, backend)
    if ys is None:
        value = by_item(kernel, lambda a: _sums(a, None, kernel, chosen, backend, diagonal), xs)
    else:
        value = by_item(kernel, lambda a, b: _sums(a, b, kernel, chosen, backend, diagonal), xs, ys)
    return KernelSums(*(t[0] for t in value)) if single else value


def _sums(xs, ys, kernel: Kernel, chosen: str, backend: str | None, with_diagonal: bool) -> KernelSums:
    parts = kernel.parts(xs, ys, resolver(backend))
    rows, cols, squares = sums_of_parts(xs, ys, parts, chosen)
    if ys is None and with_diagonal:
        own = sum(diagonal(apply(transform, xs), terms) for transform, terms in parts)
        rows, squares = rows + own, squares + own.square().sum(1)
    cols = rows if ys is None else cols
    return KernelSums(rows.sum(1), rows, cols, squares)


def sums_of_parts(xs: Layers, ys: Layers | None, parts, chosen: str) -> tuple[Tensor, Tensor, Tensor]:
    """The primitive ``sums`` of Σ parts: squares are not linear in K, so several parts need the matrix."""
    if len(parts) == 1:
        transform, terms = parts[0]
        return primitives(chosen).sums(apply(transform, xs), None if ys is None else apply(transform, ys), terms)
    values = None
    for transform, terms in parts:
        a = apply(transform, xs)
        part = reference.off_diagonal(a, terms) if ys is None else reference.matrix(a, apply(transform, ys), terms)
        values = part if values is None else values + part
    return reference.sums_of_matrix(values, ys is None)
