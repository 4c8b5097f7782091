"""How exact the products of float32 features have to be, by name."""

from __future__ import annotations

PRECISIONS = ("float32", "tf32", "bfloat16")

_current = "float32"


def current() -> str:
    """The name in force."""
    return _current


class precision:
    r"""How exact the products of float32 features are where kernels run on tensor cores, as a context.

    ``"float32"``
        The default: as exact as float32 arithmetic. Each product of tiles is three of two float16 parts of 11 bits.
    ``"tf32"``
        One product of features rounded to 11 bits, the precision of ``torch.set_float32_matmul_precision("high")``.
    ``"bfloat16"``
        One product of features rounded to bfloat16's 8 bits (``"medium"`` there).

    The last two give the exact kernel between the rounded features, centred: distances are never negative and 0 between
    equal rows. Gradients are taken with the precision of their forward call. Half-precision features are multiplied
    exactly in one product whatever the name, and float64 features in float64. The CPU's kernels and the reference
    accept each name and compute in float32. The setting is the process's, like PyTorch's own.

    Raises:
        ValueError: another name.

    Example:
        >>> with mmfast.mmd.precision("tf32"):
        ...     loss = mmfast.mmd2(x, y)
    """

    def __init__(self, name: str) -> None:
        if name not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(map(repr, PRECISIONS))}, got {name!r}")
        self.name = name

    def __enter__(self) -> precision:
        global _current
        self._before, _current = _current, self.name
        return self

    def __exit__(self, *_) -> None:
        global _current
        _current = self._before
