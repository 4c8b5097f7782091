"""MMD² by its estimators, the class-weighted form, and the witness function."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mmfast import _backend
from mmfast.mmd._inputs import (
    as_integer,
    by_item,
    check_choice,
    check_kernel,
    check_weights,
    need_rows,
    resolver,
    two_samples,
)
from mmfast.mmd._primitives import primitives
from mmfast.mmd.kernels import Kernel, Layers, Part, apply
from mmfast.mmd.reference import aligned, aligned_each, compute_dtype, diagonal
from mmfast.mmd.terms import DOT, METRIC, Terms

ESTIMATORS = ("biased", "unbiased", "one_sample_u", "linear", "linear_cyclic", "block")


def mmd2(
    x: Tensor | Sequence[Tensor],
    y: Tensor | Sequence[Tensor],
    kernel: Kernel | None = None,
    estimator: str = "unbiased",
    *,
    weights_x: Tensor | None = None,
    weights_y: Tensor | None = None,
    block_size: int | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""The squared maximum mean discrepancy of two samples (Gretton et al. 2012).

    With weights a_i = 1/n and b_j = 1/m, or the given ones divided by their sum:

    ==================  ==============================================================================================
    ``"biased"``        Σ_ij a_i a_j k(x_i,x_j) + Σ_ij b_i b_j k(y_i,y_j) − 2 Σ_ij a_i b_j k(x_i,y_j), the V-statistic
    ``"unbiased"``      the same without i = j in the first two sums, which are divided by 1 − Σa² and 1 − Σb²: the
                        U-statistic, whose mean is 0 for equal distributions. It can be negative and is not clamped
    ``"one_sample_u"``  1/(n(n−1)) Σ_{i≠j} [k(x_i,x_j) + k(y_i,y_j) − k(x_i,y_j) − k(x_j,y_i)]; needs n = m
    ``"linear"``        the mean of that bracket over the pairs (0,1), (2,3), …, in O(n) (Gretton et al., Lemma 14)
    ``"linear_cyclic"`` the mean of that bracket over the pairs (0,1), (1,2), …, (n−1,0), as DAN and JAN take it
    ``"block"``         the mean of ``"one_sample_u"`` over blocks of ``block_size`` consecutive rows (Zaremba et al.
                        2013); rows that fill no block are left out
    ==================  ==============================================================================================

    Args:
        x, y: features ``(n, d)`` and ``(m, d)``, or batches ``(b, n, d)`` and ``(b, m, d)`` of independent pairs of
            samples; a tuple with a tensor for each layer for a `mmfast.kernels.Product`. float32, float64, float16 or
            bfloat16 (half precisions are computed in float32), any strides.
        kernel: of `mmfast.kernels`; by default ``MultiGaussian(bandwidth="dan")``. Rules find the bandwidth of each
            item of a batch in its own points.
        estimator: one of the table.
        weights_x, weights_y: ``(n,)`` and ``(m,)`` (``(b, n)``, ``(b, m)`` for batches), with a positive sum; for
            ``"biased"`` and ``"unbiased"``.
        block_size: rows in a block, at least 2; ⌊√n⌋ by default.
        backend: ``"reference"`` or a native one; by default the fastest that can run.

    Returns:
        A tensor without dimensions, ``(b,)`` for batches; float64 for float64 features, else float32. Summed in
        float64. Differentiable, twice, with respect to features, weights and the kernel's parameters; bandwidths that
        a rule found are constants.

    Raises:
        TypeError, ValueError: naming the argument that does not fit; fewer rows than the estimator needs.

    Example:
        >>> x, y = torch.randn(100, 8), torch.randn(80, 8) + 0.5
        >>> loss = mmd2(x.requires_grad_(), y)
        >>> loss.backward()
    """
    kernel = check_kernel(kernel)
    if estimator not in ESTIMATORS:
        check_choice("estimator", estimator, ESTIMATORS)
    if weights_x is weights_y is block_size is None:
        value = _direct(x, y, kernel, estimator, backend)
        if value is not None:
            return value
    xs, ys, single = two_samples(x, y, kernel.n_layers)
    if block_size is not None and estimator != "block":
        raise ValueError(f"block_size is for estimator='block', got estimator={estimator!r}")
    chosen, _ = _backend.choose("mmd", xs[0].device, backend)
    if weights_x is None and weights_y is None:
        compute = _ESTIMATES[estimator]
        extra = (block_size,) if estimator == "block" else ()
        if kernel.data_dependent and xs[0].shape[0] != 1 and not _finds_lengths(xs, ys, kernel, estimator, chosen):
            value = by_item(kernel, lambda a, b: compute(a, b, kernel, chosen, backend, *extra), xs, ys)
        else:
            value = compute(xs, ys, kernel, chosen, backend, *extra)
    else:
        if estimator not in ("biased", "unbiased"):
            raise ValueError(f"weights are for the estimators 'biased' and 'unbiased', got {estimator!r}")
        wx = check_weights("weights_x", weights_x, xs, single)
        wy = check_weights("weights_y", weights_y, ys, single)
        unbiased = estimator == "unbiased"
        value = by_item(
            kernel,
            lambda a, b, v, w: weighted(a, b, v and v[0], w and w[0], kernel, chosen, backend, unbiased),
            xs,
            ys,
            None if wx is None else [wx],
            None if wy is None else [wy],
        )
    value = value.to(compute_dtype(xs[0].dtype))
    return value.squeeze(0) if single else value


def _direct(x, y, kernel: Kernel, estimator: str, backend: str | None) -> Tensor | None:
    """`mmfast.mmd.small.mmd2` or `mmfast.mmd.direct.mmd2`, where there are kernels to call."""
    if isinstance(x, Tensor) and (x.is_cuda or backend == "triton"):
        from mmfast.mmd import small

        return small.mmd2(x, y, kernel, estimator, backend)
    if _backend._C is None or estimator not in ("unbiased", "biased"):
        return None
    from mmfast.mmd import direct

    return direct.mmd2(x, y, kernel, estimator == "unbiased", backend)


@_backend.kept(maxsize=256)
def constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """A float64 tensor on the device, made once."""
    return torch.tensor(values, dtype=torch.float64, device=device)


def coefficients(estimator: str, n: int, m: int) -> tuple[float, float, float]:
    """What the sums over pairs of x, of y and of both are multiplied by."""
    if estimator == "biased":
        return 1 / n**2, 1 / m**2, -2 / (n * m)
    return 1 / (n * (n - 1)), 1 / (m * (m - 1)), -2 / (n * m if estimator == "unbiased" else n * (n - 1))


def _parts(xs: Layers, ys: Layers, kernel: Kernel, backend: str | None) -> list[tuple[Layers, Layers, Terms]]:
    return [(apply(t, xs), apply(t, ys), terms) for t, terms in kernel.parts(xs, ys, resolver(backend))]


def _small(chosen: str):
    """`mmfast.mmd.small`, where its kernels are at hand."""
    if chosen not in ("cuda", "triton"):
        return None
    from mmfast.mmd import small

    return small


def _means(xs: Layers, ys: Layers, kernel: Kernel, chosen: str) -> Terms | None:
    """Terms whose lengths are left to be found along with the value."""
    small = _small(chosen)
    return kernel.in_means(xs) if small is not None and small.takes_points(xs, ys) else None


def _finds_lengths(xs: Layers, ys: Layers, kernel: Kernel, estimator: str, chosen: str) -> bool:
    return estimator in ("biased", "unbiased", "one_sample_u") and _means(xs, ys, kernel, chosen) is not None


def _estimate(xs: Layers, ys: Layers, coefs: tuple[float, ...], kernel, chosen, backend, **pairs: bool) -> Tensor:
    """The sum over the kernel's parts of `_form`, with the lengths that rules find."""
    terms = _means(xs, ys, kernel, chosen)
    parts = [(xs, ys, terms)] if terms is not None else _parts(xs, ys, kernel, backend)
    return _form(parts, coefs, chosen, **pairs)


def _form(
    parts: list[tuple[Layers, Layers, Terms]],
    coefs: tuple[float, ...],
    chosen: str,
    self_pairs: bool = False,
    skip_aligned: bool = False,
) -> Tensor:
    """Σ c_0 k(x_i, x_j) + Σ c_1 k(y_i, y_j) + Σ c_2 k(x_i, y_j), see `mmfast.mmd.small.form` for i = j."""
    on_device, small = constant(coefs, parts[0][0][0].device), _small(chosen)
    values = []
    for a, b, terms in parts:
        if small is not None and small.takes(a, b, terms):
            values.append(small.form(a[0], b[0], on_device, terms, self_pairs, skip_aligned))
            continue
        values.append(primitives(chosen).quadratic(a, b, None, None, on_device, terms)[0])
        if self_pairs and any(METRIC[family] == DOT for family in terms.families):
            values += [diagonal(t, terms).sum(1) * c for t, c in zip((a, b), coefs[:2], strict=True)]
        elif self_pairs:  # the same for all points
            each = diagonal([layer[:, :1] for layer in a], terms)[:, 0]
            values.append(each * (coefs[0] * a[0].shape[1] + coefs[1] * b[0].shape[1]))
        if skip_aligned:
            values.append(aligned(a, b, terms).sum(1, dtype=torch.float64) * -coefs[2])
    return _total(values)


def _total(values: list[Tensor]) -> Tensor:
    return values[0] if len(values) == 1 else torch.stack(values).sum(0)


def _biased(xs, ys, kernel, chosen, backend) -> Tensor:
    need_rows("x", xs, 1, "estimator='biased'")
    need_rows("y", ys, 1, "estimator='biased'")
    n, m = xs[0].shape[1], ys[0].shape[1]
    return _estimate(xs, ys, coefficients("biased", n, m), kernel, chosen, backend, self_pairs=True)


def _unbiased(xs, ys, kernel, chosen, backend) -> Tensor:
    need_rows("x", xs, 2, "estimator='unbiased'")
    need_rows("y", ys, 2, "estimator='unbiased'")
    n, m = xs[0].shape[1], ys[0].shape[1]
    return _estimate(xs, ys, coefficients("unbiased", n, m), kernel, chosen, backend)


def weighted(xs, ys, wx, wy, kernel, chosen, backend, unbiased: bool) -> Tensor:
    """aᵀ K_xx a + bᵀ K_yy b − 2 aᵀ K_xy b, with the weights ``(b, n)``, ``(b, m)`` as they are; None is 1/n, 1/m.

    ``unbiased`` leaves i = j out and is for weights that sum to 1; without it they may sum to anything.
    """
    least = 2 if unbiased else 1
    need_rows("x", xs, least, f"estimator={'unbiased' if unbiased else 'biased'!r}")
    need_rows("y", ys, least, f"estimator={'unbiased' if unbiased else 'biased'!r}")
    dtype, device = compute_dtype(xs[0].dtype), xs[0].device
    a = _uniform(xs) if wx is None else wx.to(dtype)
    b = _uniform(ys) if wy is None else wy.to(dtype)
    squares_a, squares_b = a.double().square(), b.double().square()
    quadratic = primitives(chosen).quadratic
    values = []
    for px, py, terms in _parts(xs, ys, kernel, backend):
        if unbiased:
            for i, scale in enumerate((1 / (1 - squares_a.sum(1)), 1 / (1 - squares_b.sum(1)), -2.0)):
                coefs = constant(tuple(float(i == j) for j in range(3)), device)
                values.append(quadratic(px, py, a, b, coefs, terms)[0] * scale)
        else:
            values.append(quadratic(px, py, a, b, constant((1.0, 1.0, -2.0), device), terms)[0])
            values.append((diagonal(px, terms) * squares_a).sum(1) + (diagonal(py, terms) * squares_b).sum(1))
    return _total(values)


def _uniform(xs: Layers) -> Tensor:
    b, n = xs[0].shape[:2]
    return torch.full((b, n), 1 / n, dtype=compute_dtype(xs[0].dtype), device=xs[0].device)


def _need_equal(xs: Layers, ys: Layers, estimator: str) -> int:
    n, m = xs[0].shape[1], ys[0].shape[1]
    if n != m:
        raise ValueError(f"x and y must have as many rows for estimator={estimator!r}, got {n} and {m}")
    need_rows("x", xs, 2, f"estimator={estimator!r}")
    return n


def _one_sample_u(xs, ys, kernel, chosen, backend) -> Tensor:
    n = _need_equal(xs, ys, "one_sample_u")
    return _estimate(xs, ys, coefficients("one_sample_u", n, n), kernel, chosen, backend, skip_aligned=True)


def _linear(xs, ys, kernel, chosen, backend) -> Tensor:
    n = _need_equal(xs, ys, "linear")

    def split(layers: Layers) -> tuple[list[Tensor], list[Tensor]]:
        return [t[:, 0 : n - n % 2 : 2] for t in layers], [t[:, 1::2] for t in layers]

    return _bracket(_parts(xs, ys, kernel, backend), split)


def _linear_cyclic(xs, ys, kernel, chosen, backend) -> Tensor:
    _need_equal(xs, ys, "linear_cyclic")
    return _bracket(_parts(xs, ys, kernel, backend), lambda layers: (layers, [t.roll(-1, 1) for t in layers]))


def _bracket(parts: list[tuple[Layers, Layers, Terms]], split: Callable) -> Tensor:
    """The mean of k(x,x') + k(y,y') − k(x,y') − k(x',y) over the pairs that ``split`` makes."""
    values = []
    for x, y, terms in parts:
        (x1, x2), (y1, y2) = split(x), split(y)
        kernels = aligned_each([(x1, x2), (y1, y2), (x1, y2), (x2, y1)], terms).mean(2, dtype=torch.float64)
        values.append(kernels[:2].sum(0) - kernels[2:].sum(0))
    return _total(values)


def _block(xs, ys, kernel, chosen, backend, block_size: int | None) -> Tensor:
    n = _need_equal(xs, ys, "block")
    size = max(2, int(n**0.5)) if block_size is None else as_integer("block_size", block_size)
    if not 2 <= size <= n:
        raise ValueError(f"block_size must be from 2 to the number of rows, {n}, got {size}")
    batch, blocks = xs[0].shape[0], n // size

    def split(layers: Layers) -> list[Tensor]:
        return [t[:, : blocks * size].reshape(batch * blocks, size, t.shape[2]) for t in layers]

    parts = [(split(a), split(b), terms) for a, b, terms in _parts(xs, ys, kernel, backend)]
    return _form(parts, coefficients("one_sample_u", size, size), chosen, skip_aligned=True).view(batch, blocks).mean(1)


_ESTIMATES = {
    "biased": _biased,
    "unbiased": _unbiased,
    "one_sample_u": _one_sample_u,
    "linear": _linear,
    "linear_cyclic": _linear_cyclic,
    "block": _block,
}


def lmmd(
    x: Tensor | Sequence[Tensor],
    y: Tensor | Sequence[Tensor],
    classes_x: Tensor,
    classes_y: Tensor,
    kernel: Kernel | None = None,
    *,
    n_classes: int | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Local MMD: the mean over classes of the biased MMD² with the rows weighted by class (Zhu et al. 2020, DSAN).

        LMMD = 1/C Σ_c [aᶜᵀ K_xx aᶜ + bᶜᵀ K_yy bᶜ − 2 aᶜᵀ K_xy bᶜ],   aᶜ = p_x(c|·) / Σ p_x(c|·),   bᶜ likewise,

    over the C classes that are the most probable one for a row of ``x`` and for a row of ``y``; 0 if there is none.
    With z = [x; y] and the columns [aᶜ; −bᶜ] of A that is tr(Aᵀ K(z, z) A) / C: one product.

    Args:
        x, y: features ``(n, d)`` and ``(m, d)``, or tuples of layers.
        classes_x, classes_y: integer labels ``(n,)`` or probabilities ``(n, n_classes)``; as many rows as features.
            Probabilities are differentiated; detach those that should be constants.
        kernel: as in `mmd2`.
        n_classes: needed where both are labels.

    Returns:
        A tensor without dimensions, float64 for float64 features, else float32.
    """
    kernel = check_kernel(kernel)
    xs, ys, single = two_samples(x, y, kernel.n_layers)
    if not single:
        raise ValueError(f"x must be (n, d) for lmmd, got {tuple(xs[0].shape)}")
    dtype = compute_dtype(xs[0].dtype)
    given = [t.shape[1] for t in (classes_x, classes_y) if isinstance(t, Tensor) and t.dim() == 2]
    if n_classes is None and not given:
        raise ValueError("n_classes must be given where classes_x and classes_y are both labels")
    count = given[0] if n_classes is None else as_integer("n_classes", n_classes)
    a, seen_x = _class_weights("classes_x", classes_x, xs, count)
    b, seen_y = _class_weights("classes_y", classes_y, ys, count)
    common = (seen_x & seen_y).double()
    weights = torch.cat((a, -b)) * common
    chosen, _ = _backend.choose("mmd", xs[0].device, backend)
    matmul = primitives(chosen).matmul
    values = []
    for px, py, terms in _parts(xs, ys, kernel, backend):
        z = [torch.cat(both, dim=1) for both in zip(px, py, strict=True)]
        product = matmul(z, z, weights[None].to(dtype), terms, True)[0].double()
        values.append(((product + diagonal(z, terms)[0, :, None] * weights) * weights).sum())
    return (_total(values) / common.sum().clamp(min=1)).to(dtype)


def _class_weights(name: str, classes: Tensor, xs: Layers, count: int) -> tuple[Tensor, Tensor]:
    """Columns of weights that sum to 1, ``(n, C)`` float64, and which classes are the most probable one of a row."""
    n = xs[0].shape[1]
    if not isinstance(classes, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(classes).__name__}")
    labels = classes.dim() == 1 and not classes.is_floating_point()
    if classes.shape != ((n,) if labels else (n, count)):
        raise ValueError(f"{name} must be integer ({n},) or probabilities ({n}, {count}), got {tuple(classes.shape)}")
    if classes.device != xs[0].device:
        raise ValueError(f"{name} must be on the features' device, got {classes.device} and {xs[0].device}")
    if labels and n and _backend.may_look(classes) and not 0 <= int(classes.min()) <= int(classes.max()) < count:
        raise ValueError(
            f"{name} must be from 0 to n_classes - 1 = {count - 1}, got {classes.min()} to {classes.max()}"
        )
    best = classes.long() if labels else classes.argmax(1)
    seen = torch.zeros(count, dtype=torch.bool, device=classes.device).index_fill(0, best, True)
    values = torch.nn.functional.one_hot(best, count).double() if labels else classes.double()
    total = values.sum(0)
    return values / torch.where(total > 0, total, 1), seen


def witness(
    points: Tensor | Sequence[Tensor],
    x: Tensor | Sequence[Tensor],
    y: Tensor | Sequence[Tensor],
    kernel: Kernel | None = None,
    *,
    weights_x: Tensor | None = None,
    weights_y: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""The (unnormalised) witness function of an MMD: f(t) = Σ_i a_i k(t, x_i) − Σ_j b_j k(t, y_j).

    Large where ``x`` is denser than ``y``. Shapes: points ``(p, d)``, x ``(n, d)``, y ``(m, d)`` → ``(p,)``, or all
    with a batch dimension first. Weights and kernel as in `mmd2`; rules look at ``x`` and ``y``.
    """
    kernel = check_kernel(kernel)
    xs, ys, single = two_samples(x, y, kernel.n_layers)
    ts, _, _ = two_samples(points, x, kernel.n_layers, ("points", "x"))
    need_rows("x", xs, 1, "a witness function")
    need_rows("y", ys, 1, "a witness function")
    dtype = compute_dtype(xs[0].dtype)
    wx = check_weights("weights_x", weights_x, xs, single)
    wy = check_weights("weights_y", weights_y, ys, single)
    v = torch.cat((_uniform(xs) if wx is None else wx.to(dtype), -(_uniform(ys) if wy is None else wy.to(dtype))), 1)
    chosen, _ = _backend.choose("mmd", xs[0].device, backend)

    def compute(ts: Layers, xs: Layers, ys: Layers, v: list[Tensor]) -> Tensor:
        zs = [torch.cat(both, dim=1) for both in zip(xs, ys, strict=True)]
        parts: list[Part] = kernel.parts(xs, ys, resolver(backend))
        matmul = primitives(chosen).matmul
        return _total([matmul(apply(t, ts), apply(t, zs), v[0][:, :, None], terms)[..., 0] for t, terms in parts])

    value = by_item(kernel, compute, ts, xs, ys, [v])
    return value[0] if single else value
