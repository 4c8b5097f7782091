"""Kernel products in KeOps' style: ``LazyTensor``, ``Vi``, ``Vj``, ``Pm`` of ``pykeops.torch`` (2.3), no compiler.

    from mmfast.compat.keops import LazyTensor

    x_i, y_j = LazyTensor(x[:, None, :]), LazyTensor(y[None, :, :])
    K = (-((x_i - y_j) ** 2).sum(-1) / (2 * sigma**2)).exp()
    a = K @ b  # (M, p), in O(M + N) memory

pykeops compiles any formula; here those are recognised, as they are built, that are kernels of `mmfast.kernels`. With
s = |x − y|², d = |x − y|, d₁ = Σ|x − y| and p = ⟨x, y⟩, written in any of KeOps' ways, and numbers or parameters for
the other letters:

* exp(−g·s), exp(−g·d), exp(−g·d₁): Gaussian and Laplacian kernels;
* (1 + g·d)·exp(−g·d) and (1 + g·d + g²·s/3)·exp(−g·d): Matérn kernels;
* (c + g·s)^(−e), also as ``1 / …``, ``.sqrt()`` and ``.rsqrt()``: inverse multiquadric, rational quadratic, Cauchy;
* (c + g·p)^k for whole k, and w·d, the energy distance's kernel;
* weighted sums of these, of the same points or of points with other scales.

Anything else raises NotImplementedError where it is written or reduced. Points can be scaled by numbers, and scaled
and shifted by a vector, before they are subtracted or multiplied; features can be weighted by a vector before they are
summed. A constant of at most 1e-12 under the root of s, written against NaN, is dropped: the gradient of coincident
points is 0 here. The distances of a Matérn kernel must be those of the same points, scaled once and not for each.

Of reductions there are ``K @ b``, ``K.sum(axis)``, ``(K * b_j).sum(axis)``, ``K.t()``, ``K.matvec`` and ``K.rmatvec``.
Results are float64 for float64 points, else float32, and are differentiable, twice, in points, vectors and parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mmfast.compat import _keops
from mmfast.compat._keops import Points, Sum, Vectors
from mmfast.mmd import kernel_matmul

__all__ = ["LazyTensor", "Pm", "Var", "Vi", "Vj"]


class LazyTensor:
    """A formula of points x_i and y_j, see the module; it is built and reduced like pykeops' class of this name.

    Args:
        x: ``(..., M, 1, D)`` for points x_i, ``(..., 1, N, D)`` for points y_j, leading dimensions being batches;
            ``(M, D)`` with ``axis=0`` or ``(N, D)`` with ``axis=1``; a number, a list of numbers, or a tensor of no or
            one dimension for a parameter.
        axis: 0, 1 or 2 (parameters), or None where the shape says it.
    """

    def __init__(self, x: Tensor | float | Sequence[float] | None = None, axis: int | None = None) -> None:
        self._node = None if x is None else _points(x, axis)
        self._vector: tuple[Tensor, int] | None = None  # what the kernel is multiplied by, and its axis

    # ---- What it looks like

    @property
    def shape(self) -> tuple[int, ...]:
        """``(..., M, N)``, with the number of features where they are not summed yet."""
        node = self._node
        if isinstance(node, Points):
            n = node.values.shape[-2]
            return (*node.values.shape[:-2], n if node.axis == 0 else 1, n if node.axis == 1 else 1, *self._width())
        x, y = node.groups[0][:2] if isinstance(node, Sum) else (node.x, node.y)
        batch = torch.broadcast_shapes(x.shape[:-2], y.shape[:-2])
        return (*batch, x.shape[-2], y.shape[-2], *self._width())

    def _width(self) -> tuple[int, ...]:
        if self._vector is not None:
            width = self._vector[0].shape[-1]
        elif isinstance(self._node, Points):
            width = self._node.values.shape[-1]
        else:
            width = self._node.x.shape[-1] if isinstance(self._node, Vectors) else 1
        return () if width == 1 else (width,)

    def dim(self) -> int:
        """Number of dimensions, the last one included where it is 1."""
        return len(self.shape) + (len(self._width()) == 0)

    @property
    def dtype(self) -> torch.dtype:
        node = self._node
        if isinstance(node, Points):
            return node.values.dtype
        return (node.groups[0][0] if isinstance(node, Sum) else node.x).dtype

    def __repr__(self) -> str:
        return f"LazyTensor(shape={self.shape}, {type(self._node).__name__.lower()})"

    # ---- Arithmetic

    def __add__(self, other):
        if isinstance(other, int) and other == 0:  # where sum() starts
            return self
        return self._with(_keops.add(self._plain("+"), _operand(other)))

    __radd__ = __add__

    def __sub__(self, other):
        return self._with(_keops.subtract(self._plain("-"), _operand(other)))

    def __rsub__(self, other):
        return (-self) + other

    def __neg__(self):
        return self * -1

    def __mul__(self, other):
        node = _operand(other)
        if _keops.is_kernel(node) and _keops.is_variable(self._node):
            return LazyTensor._of(node)._times_vector(self._node)
        if _keops.is_kernel(self._node) and _keops.is_variable(node):
            return self._times_vector(node)
        if self._vector is not None and not _keops.is_number(node):
            raise _keops.unknown("the product of a kernel that is multiplied by a vector with another")
        return self._with(_keops.multiply(self._node, node))

    __rmul__ = __mul__

    def __truediv__(self, other):
        return self * LazyTensor._of(_keops.reciprocal(_operand(other)))

    def __rtruediv__(self, other):
        return LazyTensor._of(_keops.reciprocal(self._plain("/"))) * other

    def __or__(self, other):
        return (self * other).sum(-1)

    def __ror__(self, other):
        return LazyTensor._of(_operand(other)) | self

    def __pow__(self, exponent):
        return self._with(_keops.power(self._plain("**"), _operand(exponent)))

    def power(self, exponent):
        return self**exponent

    def square(self):
        return self**2

    def sqrt(self):
        return self**0.5

    def rsqrt(self):
        return self**-0.5

    def __abs__(self):
        node = self._plain("abs")
        if not isinstance(node, Vectors) or node.how != "difference":
            raise _keops.unknown("the absolute value of anything but x_i - y_j")
        return self._with(replace(node, how="absolute"))

    def abs(self):
        return abs(self)

    def exp(self):
        return self._with(_keops.exp(self._plain("exp")))

    def sqnorm2(self):
        return (self**2).sum(-1)

    def norm2(self):
        return self.sqnorm2().sqrt()

    def norm(self, dim):
        if dim not in (-1, self.dim() - 1):
            raise ValueError(f"dim must be the last one, -1, got {dim}")
        return self.norm2()

    def sqdist(self, other):
        return (self - other).sqnorm2()

    # ---- Reductions

    def sum(self, axis: int = -1, dim: int | None = None, **kwargs):
        """The sum over the features (``axis=-1``), over i (the first axis that is no batch) or over j (the second).

        pykeops' options (``backend=`` and others) have no effect. Sums over i and j are tensors ``(..., N, p)`` and
        ``(..., M, p)``, with p = 1 or the width of the vector that the kernel was multiplied by.
        """
        axis = axis if dim is None else dim
        last = self.dim() - 1
        if axis in (-1, last):
            return self._with(_keops.sum_features(self._plain("sum over the features")))
        if axis not in (last - 2, last - 1):
            raise ValueError(f"axis must be {last - 2} for i, {last - 1} for j or -1, got {axis}")
        side = axis - (last - 2)
        groups = _keops.groups(self._node)
        if self._vector is not None and self._vector[1] != side:
            return LazyTensor._total(groups, None, side) * self._vector[0]
        return LazyTensor._total(groups, None if self._vector is None else self._vector[0], side)

    def sum_reduction(self, axis: int | None = None, dim: int | None = None, **kwargs) -> Tensor:
        axis = axis if dim is None else dim
        if axis in (-1, self.dim() - 1):
            raise ValueError("axis must be that of i or j")
        return self.sum(axis)

    def __matmul__(self, v: Tensor) -> Tensor:
        if self._vector is not None:
            raise _keops.unknown("K @ v of a kernel that is already multiplied by a vector")
        groups = _keops.groups(self._node)
        result = LazyTensor._total(groups, v[:, None] if v.dim() == 1 else v, 1)
        return result.reshape(-1) if v.dim() == 1 else result

    def matvec(self, v: Tensor) -> Tensor:
        return self @ v

    def rmatvec(self, v: Tensor) -> Tensor:
        return self.T @ v

    def t(self) -> LazyTensor:
        if self._vector is not None:
            raise _keops.unknown("the transpose of a kernel that is multiplied by a vector")
        return LazyTensor._of(Sum(tuple((y, x, rows) for x, y, rows in _keops.groups(self._node))))

    @property
    def T(self) -> LazyTensor:
        return self.t()

    # ---- Inside

    @staticmethod
    def _of(node, vector=None) -> LazyTensor:
        made = LazyTensor()
        made._node, made._vector = node, vector
        return made

    def _with(self, node) -> LazyTensor:
        return LazyTensor._of(node, self._vector)

    def _plain(self, what: str):
        if self._vector is not None:
            raise _keops.unknown(f"{what} of a kernel that is multiplied by a vector")
        return self._node

    def _times_vector(self, points: Points) -> LazyTensor:
        if self._vector is not None:
            raise _keops.unknown("the product of a kernel with two vectors")
        _keops.groups(self._node)  # it must be a kernel by now
        return LazyTensor._of(self._node, (points.values, points.axis))

    @staticmethod
    def _total(groups, v: Tensor | None, side: int) -> Tensor:
        """Σ_j K_ij v_j for side 1, Σ_i K_ij v_i for side 0; v is ``(..., N, p)``."""
        total = None
        for x, y, rows in _keops.merged(groups):
            x, y = (x, y) if side else (y, x)
            if v is None:
                v = x.new_ones(y.shape[-2], 1)
            lead = torch.broadcast_shapes(x.shape[:-2], y.shape[:-2], v.shape[:-2])
            a, b, w = (t.expand(*lead, *t.shape[-2:]) for t in (x, y, v))
            if lead:
                a, b, w = (t.reshape(-1, *t.shape[-2:]) for t in (a, b, w))
            part = kernel_matmul(a, b, w, _keops.Rows(rows))
            part = part.reshape(*lead, *part.shape[-2:])
            total = part if total is None else total + part
        return total


def Var(x_or_ind: Tensor, dim: int | None = None, cat: int | None = None) -> LazyTensor:
    """``LazyTensor(x_or_ind, axis=cat)``; pykeops' symbolic variables, which have ``dim``, are not offered."""
    if dim is not None:
        raise _keops.unknown("a symbolic variable")
    return LazyTensor(x_or_ind, axis=cat)


def Vi(x_or_ind: Tensor, dim: int | None = None) -> LazyTensor:
    """Points x_i from ``(..., M, D)``."""
    return Var(x_or_ind, dim, 0)


def Vj(x_or_ind: Tensor, dim: int | None = None) -> LazyTensor:
    """Points y_j from ``(..., N, D)``."""
    return Var(x_or_ind, dim, 1)


def Pm(x_or_ind: Tensor | float | Sequence[float], dim: int | None = None) -> LazyTensor:
    """A parameter: a number, or a vector ``(D,)``."""
    return Var(x_or_ind, dim, 2)


def _points(x, axis: int | None) -> Points:
    if isinstance(x, LazyTensor):
        raise TypeError("x must be a tensor or numbers, got a LazyTensor")
    if not isinstance(x, Tensor):
        if isinstance(x, tuple) or not (_keops.is_number(x) or isinstance(x, list)):
            raise TypeError(f"x must be a tensor, a number or a list of numbers, got {type(x).__name__}")
        x = torch.tensor(x, dtype=torch.float64)
    if x.dim() < 2:
        if axis not in (None, 2):
            raise ValueError(f"axis must be None or 2 for a parameter of shape {tuple(x.shape)}, got {axis}")
        return Points(x.reshape(1, -1), 2)
    if axis is not None:
        if axis not in (0, 1):
            raise ValueError(f"axis must be 0 or 1 for points of shape {tuple(x.shape)}, got {axis}")
        return Points(x, axis)
    if x.dim() == 2 or 1 not in x.shape[-3:-1]:
        raise ValueError(f"x must be (..., M, 1, D) or (..., 1, N, D), or axis be given, got {tuple(x.shape)}")
    if x.shape[-3] == 1:
        return Points(x.squeeze(-3), 2 if x.shape[-2] == 1 else 1)
    return Points(x.squeeze(-2), 0)


def _operand(other):
    """A node; parameters of one value become a number or a tensor without dimensions."""
    if not isinstance(other, LazyTensor):
        if _keops.is_number(other):
            return other
        other = LazyTensor(other)
    node = other._plain("arithmetic")
    if isinstance(node, Points) and node.axis == 2 and node.values.numel() == 1:
        return node.values.reshape(())
    return node
