"""Checks of what the public functions of the mmd slice are given, and the form in which the primitives take it."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mmfast import _backend
from mmfast.mmd.bandwidth import Rule
from mmfast.mmd.kernels import Kernel, Layers, MultiGaussian, Resolve, resolve_locally

Features = "Tensor | Sequence[Tensor]"

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


_DEFAULT = MultiGaussian()  # DAN's five Gaussians


def check_kernel(kernel: Kernel | None) -> Kernel:
    if kernel is None:
        return _DEFAULT
    if not isinstance(kernel, Kernel):
        raise TypeError(f"kernel must be a kernel of mmfast.kernels, got {type(kernel).__name__}")
    return kernel


def as_layers(name: str, x: Tensor | Sequence[Tensor], count: int) -> tuple[list[Tensor], bool]:
    """Layers ``(b, n, d)``, and whether they came without a batch dimension."""
    if isinstance(x, Tensor):
        x = (x,)
    elif not isinstance(x, (tuple, list)) or not all(isinstance(layer, Tensor) for layer in x):
        kind = type(x).__name__
        raise TypeError(f"{name} must be a tensor, or a tuple of tensors, one for each feature layer; got {kind}")
    if len(x) != count:
        raise ValueError(f"{name} must have {count} feature layers for this kernel, got {len(x)}")
    first = x[0]
    single = first.dim() == 2
    for layer in x:
        if layer.dtype not in _DTYPES:
            raise TypeError(f"{name} must be float32, float64, float16 or bfloat16, got {layer.dtype}")
        _backend.check_dense(name, layer)
        if layer.dim() not in (2, 3):
            raise ValueError(f"{name} must be (n, d), or (b, n, d), got {tuple(layer.shape)}")
        if layer is not first:
            if layer.dim() != first.dim() or layer.shape[:-1] != first.shape[:-1]:
                raise ValueError(
                    f"{name} must have as many rows in each layer, got {tuple(first.shape)} and {tuple(layer.shape)}"
                )
            _check_same(f"layers of {name}", first, layer)
    return [layer[None] if single else layer for layer in x], single


def two_samples(
    x: Tensor | Sequence[Tensor], y: Tensor | Sequence[Tensor], count: int, names: tuple[str, str] = ("x", "y")
) -> tuple[list[Tensor], list[Tensor], bool]:
    """The layers of both, which fit together, and whether they came without a batch dimension."""
    xs, single = as_layers(names[0], x, count)
    ys, other = as_layers(names[1], y, count)
    for a, b in zip(xs, ys, strict=True):
        if a.shape[2] != b.shape[2]:
            raise ValueError(
                f"{names[0]} and {names[1]} must have the same number of features, got {a.shape[2]} and {b.shape[2]}"
            )
        if a.dtype != b.dtype or a.device != b.device:
            _check_same(f"{names[0]} and {names[1]}", a, b)
    if single != other or xs[0].shape[0] != ys[0].shape[0]:
        shapes = f"{tuple(xs[0].shape[single:])} and {tuple(ys[0].shape[other:])}"
        raise ValueError(f"{names[0]} and {names[1]} must both be (n, d), or (b, n, d) with the same b, got {shapes}")
    return xs, ys, single


def _check_same(what: str, a: Tensor, b: Tensor) -> None:
    if a.device != b.device:
        raise ValueError(f"{what} must be on the same device, got {a.device} and {b.device}")
    if a.dtype != b.dtype:
        raise TypeError(f"{what} must have the same dtype, got {a.dtype} and {b.dtype}")


def need_rows(name: str, x: Layers, least: int, why: str) -> None:
    if x[0].shape[1] < least:
        raise ValueError(f"{name} must have at least {least} row{'s' * (least > 1)} for {why}, got {x[0].shape[1]}")


def check_weights(name: str, weights: Tensor | None, x: Layers, single: bool) -> Tensor | None:
    """``(b, n)``, float64, which sum to 1 in each row."""
    if weights is None:
        return None
    if not isinstance(weights, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(weights).__name__}")
    expected = x[0].shape[1:2] if single else x[0].shape[:2]
    if weights.shape != expected:
        raise ValueError(f"{name} must be {tuple(expected)}, one for each row, got {tuple(weights.shape)}")
    if weights.device != x[0].device:
        raise ValueError(f"{name} must be on the features' device, got {weights.device} and {x[0].device}")
    if weights.is_complex() or weights.dtype == torch.bool:
        raise TypeError(f"{name} must be real numbers, got {weights.dtype}")
    weights = (weights[None] if single else weights).double()
    total = weights.sum(1, keepdim=True)
    if _backend.may_look(total):
        wrong = [t for t in total.flatten().tolist() if not 0 < t < float("inf")]
        if wrong:
            raise ValueError(f"{name} must have a positive, finite sum, got {wrong[0]}")
    return weights / total


def check_choice(name: str, value: object, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def as_integer(name: str, value: object) -> int:
    """Python's integers as they are (some stand for sizes of a traced graph), numpy's as Python's."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    return int(value)


def resolver(backend: str | None) -> Resolve:
    """How kernels look up rules, with the backend that was asked for."""
    if backend is None:
        return resolve_locally

    def resolve(rule: Rule, x: Layers, y: Layers | None) -> Tensor:
        return rule(x[0][0], None if y is None else y[0][0], backend)

    return resolve


def item(x: Layers | None, i: int) -> list[Tensor] | None:
    return None if x is None else [layer[i : i + 1] for layer in x]


def by_item(kernel: Kernel, function: Callable, *samples: Layers | None):
    """``function`` of the samples, item by item where a rule has to find a bandwidth for each of a batch."""
    b = samples[0][0].shape[0]
    if b == 1 or not kernel.data_dependent:
        return function(*samples)
    results = [function(*(item(sample, i) for sample in samples)) for i in range(b)]
    if not results:  # no item: nothing to look at, and nothing that depends on it
        raise ValueError("a kernel whose bandwidth is found in the data needs at least one item in the batch")
    if isinstance(results[0], tuple):
        return type(results[0])(*map(torch.cat, zip(*results, strict=True)))
    return torch.cat(results)
