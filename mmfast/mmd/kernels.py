"""Kernels of the mmd slice: what they are called, their parameters, and the `Terms` that the primitives compute."""

from __future__ import annotations

import functools
import itertools
import numbers
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from mmfast import _backend
from mmfast.mmd.bandwidth import MeanDistance, Rule, as_rule
from mmfast.mmd.terms import (
    ENERGY,
    GAUSSIAN,
    L2,
    LAPLACIAN,
    LAPLACIAN_L1,
    MATERN32,
    MATERN52,
    METRIC,
    POLYNOMIAL,
    POWER,
    Terms,
    check_scalar,
    table,
    vector,
)

Layers = Sequence[Tensor]
Transform = Callable[[Layers], list[Tensor]]
Resolve = Callable[[Rule, Layers, "Layers | None"], Tensor]


Part = tuple["Transform | None", Terms]

# For what is no tensor and no module: a module's own looks through its parameters and buffers first, so that a kernel
# that a training step builds would cost as much as the step.
_set = object.__setattr__


def apply(transform: Transform | None, layers: Layers) -> Layers:
    """The layers that a part's terms are about."""
    return layers if transform is None else transform(layers)


def resolve_locally(rule: Rule, x: Layers, y: Layers | None) -> Tensor:
    """The squared length that ``rule`` finds in the first item of each batch."""
    return rule(x[0][0], None if y is None else y[0][0])


def fixed_terms(kernel: Kernel, x: Tensor, y: Tensor) -> Terms | None:
    """The terms of a kernel of one layer ``(n, d)`` that are the same in every call, with lengths in a rule's means."""
    if kernel.n_layers != 1:
        return None
    terms = kernel.in_means([x])
    if terms is None and kernel.constant:
        parts = kernel.parts([x], [y])
        if len(parts) == 1 and parts[0][0] is None:
            terms = parts[0][1]
    return terms


class Kernel(nn.Module):
    """A kernel k(x, y); ``kernel(x, y)`` is the matrix of `mmfast.kernel_matrix`.

    Kernels add up (``k1 + k2``), can be weighted (``0.5 * k``, the weight may be a tensor that requires a gradient)
    and multiplied over several feature layers (`Product`). Parameters given as tensors are registered as the module's
    parameters or buffers; numbers are read once and must not be changed afterwards.
    """

    n_layers = 1

    def __init__(self) -> None:
        super().__init__()
        _set(self, "_cache", {})

    def parts(self, x: Layers, y: Layers | None = None, resolve: Resolve = resolve_locally) -> list[Part]:
        """Terms by metric and transform of the features: the kernel is the sum of its parts.

        ``x`` and ``y`` are layers of features ``(b, n, d)``; rules for the bandwidth look at them through ``resolve``.
        """
        raise NotImplementedError

    def in_means(self, x: Layers) -> Terms | None:
        """The terms with lengths in multiples of a rule's mean squared distance, where they are all of this form."""
        return None

    @property
    def numbers(self) -> Hashable | None:
        """What kernels that are the same have in common, where nothing but numbers and rules makes them up."""
        return None

    @property
    def data_dependent(self) -> bool:
        """Whether a rule finds a parameter in the data."""
        return any(child.data_dependent for child in self._factors())

    @property
    def constant(self) -> bool:
        """Whether nothing but numbers stands in the terms, so that they are built once."""
        return not (self.data_dependent or self._parameters or self._buffers) and all(
            child.constant for child in self._factors()
        )

    def _factors(self) -> Sequence[Kernel]:
        """The kernels that this one is made of."""
        return ()

    def forward(self, x, y=None, **options):
        from mmfast.mmd import kernel_matrix

        return kernel_matrix(x, y, self, **options)

    def __add__(self, other: Kernel) -> Kernel:
        if isinstance(other, int) and other == 0:  # where sum() starts
            return self
        return Sum([self, other]) if isinstance(other, Kernel) else NotImplemented

    __radd__ = __add__

    def __mul__(self, weight: float | Tensor) -> Kernel:
        return Scaled(self, weight) if isinstance(weight, (numbers.Real, Tensor)) else NotImplemented

    __rmul__ = __mul__

    def _own(self, name: str, value: object) -> None:
        """Sets an attribute; tensors become parameters or buffers of the module, numpy's numbers Python's."""
        if isinstance(value, nn.Parameter):
            setattr(self, name, value)
        elif isinstance(value, Tensor):
            self.register_buffer(name, value, persistent=False)
        else:
            number = isinstance(value, numbers.Real) and not isinstance(value, (int, float))
            _set(self, name, float(value) if number else value)

    def _cached(self, key: object, make: Callable[[], object]) -> object:
        if not _backend.keeps():
            return make()
        found = self._cache.get(key)
        if found is None:
            with _backend.apart():
                found = self._cache[key] = make()
        return found

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_cache": {}}


def _is_mean(rule: Rule | None) -> bool:
    return type(rule) is MeanDistance and rule.detach


class _Single(Kernel):
    """One term whose length is a number, a tensor or a rule."""

    family: int
    length_name = "scale"

    def _set_length(self, value: float | str | Tensor | Rule) -> None:
        rule = as_rule(value, self.length_name)
        if rule is None:
            check_scalar(self.length_name, value)
        elif METRIC[self.family] != L2:
            raise ValueError(f"{self.length_name} must be a number: rules measure L2 distances")
        self.rule = rule
        self._own(self.length_name, value)

    @property
    def data_dependent(self) -> bool:
        return getattr(self, "rule", None) is not None

    def _row(self, square: float | Tensor, width: int) -> Sequence[float | Tensor]:
        """Weight, gamma, offset and exponent, from the squared length and the number of features."""
        raise NotImplementedError

    def parts(self, x, y=None, resolve=resolve_locally):
        device = x[0].device
        if self.data_dependent:
            return [(None, self._terms(resolve(self.rule, x, y), x))]
        length = getattr(self, self.length_name, 1.0)
        if self.constant:
            key = (device, x[0].shape[-1]) if self.family == POLYNOMIAL else device
            return self._cached(key, lambda: [(self._transform, self._terms(float(length) ** 2, x))])
        length = length.to(device, torch.float64) if isinstance(length, Tensor) else length
        return [(self._transform, self._terms(length * length, x))]

    def in_means(self, x):
        if not _is_mean(getattr(self, "rule", None)) or self._parameters or self._buffers:
            return None
        # What the rule multiplies the mean with goes with the constants.
        return self._cached(
            (x[0].device, "means", self.rule), lambda: replace(self._terms(self.rule.scale, x), rule=self.rule)
        )

    _transform: Transform | None = None

    def _terms(self, square: float | Tensor, x: Layers) -> Terms:
        return Terms((self.family,), (0,), table([self._row(square, x[0].shape[-1])], x[0].device))

    def extra_repr(self) -> str:
        return f"{self.length_name}={getattr(self, self.length_name, None)}"


class Gaussian(_Single):
    r"""k(x, y) = exp(−|x − y|² / (2σ²)).

    Args:
        sigma: σ > 0, a number or a tensor without dimensions; or a rule for σ², by name or as an object
            (`mmfast.kernels.MeanDistance`, `mmfast.kernels.MedianDistance`): ``"median"`` is the median heuristic.
    """

    family = GAUSSIAN
    length_name = "sigma"

    def __init__(self, sigma: float | str | Tensor | Rule = 1.0) -> None:
        super().__init__()
        self._set_length(sigma)

    def _row(self, square, width):
        return 1.0, 0.5 / square, 0.0, 0.0


class Laplacian(_Single):
    r"""k(x, y) = exp(−|x − y|_p / scale), with the L2 (p = 2) or the L1 (p = 1) norm.

    The gradient between points that coincide is 0.

    Args:
        scale: > 0, a number or a tensor without dimensions; with p = 2 also a rule for its square.
    """

    family = LAPLACIAN

    def __init__(self, scale: float | str | Tensor | Rule = 1.0, p: int = 2) -> None:
        super().__init__()
        if p not in (1, 2):
            raise ValueError(f"p must be 1 or 2, got {p!r}")
        self.p = int(p)
        self.family = LAPLACIAN if p == 2 else LAPLACIAN_L1
        self._set_length(scale)

    def _row(self, square, width):
        return 1.0, square**-0.5, 0.0, 0.0

    def extra_repr(self):
        return f"{super().extra_repr()}, p={self.p}"


class InverseMultiquadric(_Single):
    r"""k(x, y) = (1 + |x − y|² / scale²)^(−exponent); times scale^(−2·exponent) it is (scale² + |x − y|²)^(−exponent).

    Args:
        scale: > 0, a number, a tensor without dimensions, or a rule for its square.
        exponent: > 0; ½ is the textbook's, 1 that of Wasserstein auto-encoders.
    """

    family = POWER

    def __init__(self, scale: float | str | Tensor | Rule = 1.0, exponent: float | Tensor = 0.5) -> None:
        super().__init__()
        self._set_length(scale)
        check_scalar("exponent", exponent)
        self._own("exponent", exponent)

    def _row(self, square, width):
        return 1.0, 1.0 / square, 0.0, self.exponent

    def extra_repr(self):
        return f"{super().extra_repr()}, exponent={self.exponent}"


class RationalQuadratic(_Single):
    r"""k(x, y) = (1 + |x − y|² / (2·alpha·scale²))^(−alpha).

    Args:
        scale: > 0, a number, a tensor without dimensions, or a rule for its square.
        alpha: > 0, a number or a tensor without dimensions.
    """

    family = POWER

    def __init__(self, scale: float | str | Tensor | Rule = 1.0, alpha: float | Tensor = 1.0) -> None:
        super().__init__()
        self._set_length(scale)
        check_scalar("alpha", alpha)
        self._own("alpha", alpha)

    def _row(self, square, width):
        return 1.0, 0.5 / (self.alpha * square), 0.0, self.alpha

    def extra_repr(self):
        return f"{super().extra_repr()}, alpha={self.alpha}"


class Matern(_Single):
    r"""Matérn kernels of order nu, with r = √(2·nu)·|x − y| / scale.

    nu = ½: exp(−r);  nu = 3/2: (1 + r)·exp(−r);  nu = 5/2: (1 + r + r²/3)·exp(−r).

    Args:
        scale: > 0, a number, a tensor without dimensions, or a rule for its square.
        nu: 0.5, 1.5 or 2.5.
    """

    def __init__(self, scale: float | str | Tensor | Rule = 1.0, nu: float = 1.5) -> None:
        super().__init__()
        families = {0.5: LAPLACIAN, 1.5: MATERN32, 2.5: MATERN52}
        if nu not in families:
            raise ValueError(f"nu must be 0.5, 1.5 or 2.5, got {nu!r}")
        self.nu = float(nu)
        self.family = families[nu]
        self._set_length(scale)

    def _row(self, square, width):
        return 1.0, (2 * self.nu / square) ** 0.5, 0.0, 0.0

    def extra_repr(self):
        return f"{super().extra_repr()}, nu={self.nu}"


class Energy(_Single):
    r"""k(x, y) = −|x − y|: the MMD² of this kernel is the energy distance (Székely and Rizzo).

    Conditionally positive definite: meaningful where weights sum to zero. The gradient between coincident points is 0.
    """

    family = ENERGY

    def _row(self, square, width):
        return 1.0, 0.0, 0.0, 0.0

    def extra_repr(self):
        return ""


class Polynomial(_Single):
    r"""k(x, y) = (gamma·⟨x, y⟩ + coef)^degree.

    Args:
        degree: an integer ≥ 1.
        gamma: > 0, or ``None`` for 1 / (number of features), as in the kernel inception distance.
        coef: a number or a tensor without dimensions.
    """

    family = POLYNOMIAL

    def __init__(self, degree: int = 3, gamma: float | Tensor | None = None, coef: float | Tensor = 1.0) -> None:
        super().__init__()
        if isinstance(degree, bool) or degree != int(degree) or degree < 1:
            raise ValueError(f"degree must be an integer >= 1, got {degree!r}")
        if gamma is not None:
            check_scalar("gamma", gamma)
        check_scalar("coef", coef, positive=False)
        self.degree = int(degree)
        self._own("gamma", gamma)
        self._own("coef", coef)

    def _row(self, square, width):
        gamma = 1.0 / max(width, 1) if self.gamma is None else self.gamma
        return 1.0, gamma, self.coef, float(self.degree)

    def extra_repr(self):
        return f"degree={self.degree}, gamma={self.gamma}, coef={self.coef}"


class Linear(_Single):
    r"""k(x, y) = ⟨x, y⟩: the MMD² is the squared distance of the means."""

    family = POLYNOMIAL

    def _row(self, square, width):
        return 1.0, 1.0, 0.0, 1.0

    def extra_repr(self):
        return ""


class Cosine(Linear):
    r"""k(x, y) = ⟨x, y⟩ / (|x|·|y|), and 0 where a vector is 0."""

    @staticmethod
    def _transform(layers: Layers) -> list[Tensor]:
        return [_normalized(layer) for layer in layers]


def _normalized(x: Tensor) -> Tensor:
    x = x if x.dtype == torch.float64 else x.float()
    if x.shape[-1]:  # a factor changes nothing, and keeps the square of a tiny or huge vector within range
        largest = x.detach().abs().amax(-1, keepdim=True)
        x = x / largest.masked_fill(largest == 0, 1)
    square = x.square().sum(-1, keepdim=True)
    zero = square == 0
    return (x * square.masked_fill(zero, 1).rsqrt()).masked_fill(zero, 0)


class MultiGaussian(Kernel):
    r"""k(x, y) = Σ_i w_i exp(−|x − y|² / b_i), or the mean over i.

    The bandwidths b_i divide the squared distance as they are, without ½. They are given (``bandwidths``), or a
    geometric ladder around one value (``bandwidth``):

        b_i = bandwidth · kernel_mul^(i − kernel_num // 2),   i = 0 … kernel_num − 1

    Args:
        bandwidths: numbers > 0, or a tensor ``(kernel_num,)`` that may require a gradient.
        weights: as many numbers or a tensor; 1 by default.
        reduce: ``"sum"`` (DAN, tllib) or ``"mean"`` (pytorch-adapt, alibi-detect).
        bandwidth: the centre of the ladder: a number, a tensor without dimensions, or a rule. ``"dan"`` (the default)
            is the mean of the squared distances between different points of the pooled sample, as in DAN and JAN
            (Long et al. 2015, 2017; the reference code's ``guassian_kernel``); ``"tllib"`` counts each point's zero
            distance to itself too, which makes the ladder with its default values the sum of tllib's
            ``GaussianKernel(alpha=2**k)``, k = −3 … 1.
        kernel_mul, kernel_num: of the ladder.
    """

    def __init__(
        self,
        bandwidths: Sequence[float] | Tensor | None = None,
        weights: Sequence[float] | Tensor | None = None,
        reduce: str = "sum",
        bandwidth: float | str | Tensor | Rule | None = None,
        kernel_mul: float = 2.0,
        kernel_num: int = 5,
    ) -> None:
        super().__init__()
        if reduce not in ("sum", "mean"):
            raise ValueError(f"reduce must be 'sum' or 'mean', got {reduce!r}")
        if bandwidths is not None and bandwidth is not None:
            raise ValueError("give either bandwidths or bandwidth, not both")
        rule = None
        if bandwidths is None:
            if isinstance(kernel_num, bool) or kernel_num != int(kernel_num) or kernel_num < 1:
                raise ValueError(f"kernel_num must be an integer >= 1, got {kernel_num!r}")
            check_scalar("kernel_mul", kernel_mul)
            bandwidth = "dan" if bandwidth is None else bandwidth
            rule = as_rule(bandwidth, "bandwidth")
            if rule is None:
                check_scalar("bandwidth", bandwidth)
            kernel_num = int(kernel_num)
        else:
            bandwidths = vector("bandwidths", bandwidths, positive=True)
            kernel_num = len(bandwidths)
        if weights is not None:
            weights = vector("weights", weights)
            if len(weights) != kernel_num:
                raise ValueError(f"weights must be {kernel_num}, one for each bandwidth, got {len(weights)}")
        _set(self, "reduce", reduce)
        _set(self, "rule", rule)
        _set(self, "kernel_num", kernel_num)
        _set(self, "kernel_mul", float(kernel_mul))
        self._own("bandwidths", bandwidths)
        self._own("bandwidth", bandwidth)
        self._own("weights", weights)
        _set(self, "_families", (GAUSSIAN,) * kernel_num)
        _set(self, "_layers", (0,) * kernel_num)

    @property
    def numbers(self):
        if type(self) is not MultiGaussian or self._parameters or self._buffers:
            return None
        given = tuple(self.bandwidths or ()), tuple(self.weights or ())
        return self.reduce, self.rule, self.kernel_num, self.kernel_mul, self.bandwidth, *given

    @property
    def data_dependent(self) -> bool:
        return self.rule is not None

    def parts(self, x, y=None, resolve=resolve_locally):
        device = x[0].device
        if self.constant:
            return self._cached(device, lambda: [(None, self._terms(device, self.bandwidth))])
        bandwidth = self.bandwidth if self.rule is None else resolve(self.rule, x, y)
        return [(None, self._terms(device, bandwidth))]

    def in_means(self, x):
        if not _is_mean(self.rule) or isinstance(self.weights, Tensor):
            return None
        device = x[0].device
        return self._cached(
            (device, "means", self.rule), lambda: replace(self._terms(device, self.rule.scale), rule=self.rule)
        )

    def _terms(self, device: torch.device, bandwidth: float | Tensor | None) -> Terms:
        if isinstance(self.weights, Tensor) or isinstance(self.bandwidths, Tensor):
            params = self._trained(device, bandwidth)
        elif isinstance(bandwidth, Tensor):
            fixed, ladder = self._cached((device, "ladder"), lambda: self._ladder(device))
            params = torch.addcdiv(fixed, ladder, bandwidth.to(device, torch.float64))
        else:
            values = self.bandwidths or [bandwidth * step for step in self._steps()]
            rows = [[w, 1 / b, 0.0, 0.0] for w, b in zip(self._weights(), values, strict=True)]
            params = table(rows, device)
        return Terms(self._families, self._layers, params)

    def _steps(self) -> list[float]:
        return [self.kernel_mul ** (i - self.kernel_num // 2) for i in range(self.kernel_num)]

    def _weights(self) -> list[float]:
        share = 1.0 / self.kernel_num if self.reduce == "mean" else 1.0
        return [share * weight for weight in (self.weights or [1.0] * self.kernel_num)]

    def _ladder(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The weights where they stand in the terms, and what over the bandwidth is gamma where that stands."""
        fixed = torch.tensor([[w, 0.0, 0.0, 0.0] for w in self._weights()], dtype=torch.float64, device=device)
        ladder = torch.tensor([[0.0, 1 / s, 0.0, 0.0] for s in self._steps()], dtype=torch.float64, device=device)
        return fixed, ladder

    def _trained(self, device: torch.device, bandwidth: float | Tensor | None) -> Tensor:
        def column(values: Sequence[float] | Tensor) -> Tensor:
            if isinstance(values, Tensor):
                return values.to(device, torch.float64)
            make = functools.partial(torch.tensor, values, dtype=torch.float64, device=device)
            return self._cached((device, tuple(values)), make)  # a copy from the host would wait for the device

        values = column(self._steps()) * bandwidth if self.bandwidths is None else column(self.bandwidths)
        if isinstance(self.weights, Tensor):
            weights = column(self.weights) / (self.kernel_num if self.reduce == "mean" else 1)
        else:
            weights = column(self._weights())
        nothing = torch.zeros_like(values)
        return torch.stack((weights, values.reciprocal(), nothing, nothing), dim=1)

    def extra_repr(self):
        if self.bandwidths is not None:
            return f"{self.bandwidths}, weights={self.weights}, reduce={self.reduce!r}"
        ladder = f"kernel_mul={self.kernel_mul}, kernel_num={self.kernel_num}"
        return f"bandwidth={self.bandwidth}, {ladder}, weights={self.weights}, reduce={self.reduce!r}"


class Scaled(Kernel):
    """weight · kernel, as ``weight * kernel`` builds it; a negative weight is the caller's business."""

    def __init__(self, kernel: Kernel, weight: float | Tensor) -> None:
        super().__init__()
        check_scalar("weight", weight, positive=False)
        self.kernel = kernel
        self.n_layers = kernel.n_layers
        self._own("weight", weight)

    def _factors(self):
        return (self.kernel,)

    def parts(self, x, y=None, resolve=resolve_locally):
        def scaled() -> list[Part]:
            return [(transform, self._scale(terms)) for transform, terms in self.kernel.parts(x, y, resolve)]

        return self._cached((x[0].device, *(t.shape[-1] for t in x)), scaled) if self.constant else scaled()

    def in_means(self, x):
        found = None if isinstance(self.weight, Tensor) else self.kernel.in_means(x)
        if found is None:
            return None
        return replace(self._cached((x[0].device, "means"), lambda: self._scale(found)), rule=found.rule)

    def _scale(self, terms: Terms) -> Terms:
        weight = self.weight
        if isinstance(weight, Tensor):
            weight = weight.to(terms.params.device, torch.float64)
        # In a product one factor carries the weight.
        rows = [[layer == terms.layers[0], False, False, False] for layer in terms.layers]
        device = terms.params.device
        chosen = self._cached((device, terms.layers), lambda: torch.tensor(rows, device=device))
        return Terms(terms.families, terms.layers, torch.where(chosen, terms.params * weight, terms.params))

    def extra_repr(self):
        return f"weight={self.weight}"


class Sum(Kernel):
    """Σ of kernels over the same features, as ``k1 + k2`` builds it."""

    def __init__(self, kernels: Sequence[Kernel]) -> None:
        super().__init__()
        kernels = _kernels(kernels)
        flat = [k for kernel in kernels for k in (kernel.kernels if isinstance(kernel, Sum) else [kernel])]
        if len({kernel.n_layers for kernel in flat}) > 1:
            raise ValueError(f"kernels of a sum must take as many layers, got {[k.n_layers for k in flat]}")
        self.kernels = nn.ModuleList(flat)
        self.n_layers = flat[0].n_layers

    def _factors(self):
        return self.kernels

    def parts(self, x, y=None, resolve=resolve_locally):
        def merged() -> list[Part]:
            return _merge([part for kernel in self.kernels for part in kernel.parts(x, y, resolve)])

        return self._cached((x[0].device, *(t.shape[-1] for t in x)), merged) if self.constant else merged()

    def in_means(self, x):
        found = [kernel.in_means(x) for kernel in self.kernels]
        if any(terms is None for terms in found) or len({replace(terms.rule, scale=1.0) for terms in found}) > 1:
            return None
        ((_, terms),) = self._cached((x[0].device, "means"), lambda: _merge([(None, terms) for terms in found]))
        return replace(terms, rule=found[0].rule)


def _merge(parts: list[Part]) -> list[Part]:
    """Parts of one layer that share transform and metric become one: one sweep over the pairs instead of several."""
    groups: dict[object, list[Part]] = {}
    for i, (transform, terms) in enumerate(parts):
        single = set(terms.layers) == {0}
        groups.setdefault((transform, METRIC[terms.families[0]]) if single else i, []).append((transform, terms))
    merged = []
    for group in groups.values():
        if len(group) == 1:
            merged += group
            continue
        families = tuple(family for _, terms in group for family in terms.families)
        params = torch.cat([terms.params for _, terms in group])
        merged.append((group[0][0], Terms(families, (0,) * len(families), params)))
    return merged


class Product(Kernel):
    """Π of kernels, one for each feature layer: that of joint MMD (JAN, Long et al. 2017).

    Features are then tuples with a tensor for each layer: ``mmd2((f1, f2), (g1, g2), Product([k1, k2]))``. The product
    of two kernels of the same features is that of a tuple with the features twice.
    """

    def __init__(self, kernels: Sequence[Kernel]) -> None:
        super().__init__()
        kernels = _kernels(kernels)
        if any(kernel.n_layers != 1 for kernel in kernels):
            raise ValueError("kernels of a product must take one layer each")
        self.kernels = nn.ModuleList(kernels)
        self.n_layers = len(kernels)

    def _factors(self):
        return self.kernels

    def parts(self, x, y=None, resolve=resolve_locally):
        def multiplied() -> list[Part]:
            factors = [
                kernel.parts([x[i]], None if y is None else [y[i]], resolve) for i, kernel in enumerate(self.kernels)
            ]
            return [_multiply(choice) for choice in itertools.product(*factors)]

        return self._cached((x[0].device, *(t.shape[-1] for t in x)), multiplied) if self.constant else multiplied()


def _multiply(factors: Sequence[Part]) -> Part:
    """The product of one part of each layer."""
    families = tuple(family for _, terms in factors for family in terms.families)
    layers = tuple(i for i, (_, terms) in enumerate(factors) for _ in terms.families)
    params = torch.cat([terms.params for _, terms in factors]) if len(factors) > 1 else factors[0][1].params
    transforms = [transform for transform, _ in factors]
    if not any(transforms):
        return None, Terms(families, layers, params)

    def each(features: Layers) -> list[Tensor]:
        return [apply(transform, [layer])[0] for transform, layer in zip(transforms, features, strict=True)]

    return each, Terms(families, layers, params)


def _kernels(kernels: Sequence[Kernel]) -> list[Kernel]:
    kernels = list(kernels)
    wrong = [type(kernel).__name__ for kernel in kernels if not isinstance(kernel, Kernel)]
    if not kernels or wrong:
        raise TypeError(f"kernels must be one or more kernels of mmfast.kernels, got {wrong or 'none'}")
    return kernels
