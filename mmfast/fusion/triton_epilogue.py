"""The gated residual and its norm in one pass forward and one backward.

    s = x + g y        n = norm(s) · weight + bias        g: 1, a number on the device, its tanh or its sigmoid

PyTorch takes five passes over (N, E) forward (gate · y, +, the norm's) and more backward; here x and y are read and
s and n written, backward x, y and the gradients read and dx and dy written. A program takes row after row and keeps
its part of the gradients of gate, weight and bias in registers; a fixed number of programs, added up in order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmfast.fusion.routes_cuda import power_of_two
from mmfast.fusion.triton_tiles import few_values, multiprocessors

NORMS = ("", "layer", "rms")
ACTIVATIONS = ("", "tanh", "sigmoid")
WIDEST = 16384  # features that a program holds in registers


@triton.jit
def _gate(gate, ACTIVATION: tl.constexpr):
    """The factor, and its derivative by what it is made of."""
    g = tl.load(gate).to(tl.float32)
    if ACTIVATION == 1:
        g = 2.0 / (1.0 + tl.exp(-2.0 * g)) - 1.0
        return g, 1.0 - g * g
    elif ACTIVATION == 2:
        g = 1.0 / (1.0 + tl.exp(-g))
        return g, g * (1.0 - g)
    else:
        return g, 1.0 + 0.0 * g


@triton.jit
def _normal(s, there, features, eps, NORM: tl.constexpr):
    """(s − mean) / deviation, and 1 / deviation."""
    if NORM == 1:
        s = tl.where(there, s - tl.sum(s, 0) / features, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(s * s, 0) / features + eps)
    return tl.where(there, s * scale, 0.0), scale


@triton.jit
def _forward(
    x, y, gate, weight, bias, total, normed, rows, features, eps,
    NORM: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
    SUM: tl.constexpr, ROWS: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, BE)
    inside = columns < features
    for i in range(ROWS):
        row = tl.program_id(0).to(tl.int64) * ROWS + i
        there = inside & (tl.full([BE], 0, tl.int64) + row < rows)  # the interpreter splats no boolean
        at = row * features + columns
        s = tl.load(y + at, mask=there, other=0.0).to(tl.float32)
        if GATED:
            s = s * _gate(gate, ACTIVATION)[0]
        s += tl.load(x + at, mask=there, other=0.0).to(tl.float32)
        if SUM:
            tl.store(total + at, s.to(total.dtype.element_ty), mask=there)
        if NORM > 0:
            n = _normal(s, there, features, eps, NORM)[0]
            if WEIGHT:
                n = n * tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
            if BIAS:
                n += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
            tl.store(normed + at, n.to(normed.dtype.element_ty), mask=there)


@triton.jit
def _backward(
    grad_total, grad_normed, x, y, gate, weight, grad_x, grad_y, part_gate, part_weight, part_bias, rows, features, eps,
    NORM: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr, WEIGHT: tl.constexpr, SUM: tl.constexpr,
    ROWS: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, BE)
    inside = columns < features
    of_gate = tl.zeros([BE], tl.float32)
    of_weight = tl.zeros([BE], tl.float32)
    of_bias = tl.zeros([BE], tl.float32)
    for i in range(ROWS):
        row = tl.program_id(0).to(tl.int64) * ROWS + i
        there = inside & (tl.full([BE], 0, tl.int64) + row < rows)  # the interpreter splats no boolean
        at = row * features + columns
        b = tl.load(y + at, mask=there, other=0.0).to(tl.float32)
        ds = tl.zeros([BE], tl.float32)
        if SUM:
            ds += tl.load(grad_total + at, mask=there, other=0.0).to(tl.float32)
        if NORM > 0:
            s = tl.load(x + at, mask=there, other=0.0).to(tl.float32)
            if GATED:
                s += b * _gate(gate, ACTIVATION)[0]
            else:
                s += b
            n, scale = _normal(s, there, features, eps, NORM)
            dn = tl.load(grad_normed + at, mask=there, other=0.0).to(tl.float32)
            of_weight += dn * n
            of_bias += dn
            if WEIGHT:
                dn = dn * tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
            dn = dn - n * (tl.sum(dn * n, 0) / features) - (tl.sum(dn, 0) / features if NORM == 1 else 0.0)
            ds += tl.where(there, dn * scale, 0.0)
        tl.store(grad_x + at, ds.to(grad_x.dtype.element_ty), mask=there)
        if GATED:
            of_gate += ds * b
            tl.store(grad_y + at, (ds * _gate(gate, ACTIVATION)[0]).to(grad_y.dtype.element_ty), mask=there)
    to = tl.program_id(0).to(tl.int64)
    if GATED:
        tl.store(part_gate + to, tl.sum(of_gate, 0) * _gate(gate, ACTIVATION)[1])
    if NORM > 0:
        tl.store(part_weight + to * features + columns, of_weight, mask=inside)
        tl.store(part_bias + to * features + columns, of_bias, mask=inside)


def _programs(rows: int, device: torch.device) -> tuple[int, int]:
    each = few_values(triton.cdiv(rows, 4 * multiprocessors(device)))
    return triton.cdiv(rows, each), each


def _warps(features: int) -> int:
    return min(16, max(1, power_of_two(features) // 512))


def forward(
    x: Tensor, y: Tensor, gate: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, norm: str,
    activation: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """s and n of contiguous ``x`` and ``y``; n is empty without a norm."""
    features = x.shape[-1]
    rows = x.numel() // features
    total = torch.empty_like(x)
    normed = torch.empty_like(x) if norm else x.new_empty((0,))
    grid, each = _programs(rows, x.device)
    _forward[(grid,)](
        x, y, x if gate is None else gate, x if weight is None else weight, x if bias is None else bias, total, normed,
        rows, features, eps, NORM=NORMS.index(norm), GATED=gate is not None, ACTIVATION=ACTIVATIONS.index(activation),
        WEIGHT=weight is not None, BIAS=bias is not None, SUM=True, ROWS=each, BE=power_of_two(features),
        num_warps=_warps(features),
    )  # fmt: skip
    return total, normed


def backward(
    grad_total: Tensor | None, grad_normed: Tensor | None, x: Tensor, y: Tensor, gate: Tensor | None,
    weight: Tensor | None, bias: Tensor | None, eps: float, norm: str, activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, y, gate, weight and bias; empty where there is none."""
    features = x.shape[-1]
    rows = x.numel() // features
    grid, each = _programs(rows, x.device)
    norm = norm if grad_normed is not None else ""
    grad_x = torch.empty_like(x)
    grad_y = torch.empty_like(y) if gate is not None else x.new_empty((0,))
    part_gate = x.new_empty((grid,), dtype=torch.float32)
    part_weight, part_bias = (x.new_empty((grid, features) if norm else (0, 0), dtype=torch.float32) for _ in range(2))
    _backward[(grid,)](
        x if grad_total is None else grad_total, x if grad_normed is None else grad_normed, x, y,
        x if gate is None else gate, x if weight is None else weight, grad_x, grad_y, part_gate, part_weight, part_bias,
        rows, features, eps, NORM=NORMS.index(norm), GATED=gate is not None,
        ACTIVATION=ACTIVATIONS.index(activation), WEIGHT=weight is not None, SUM=grad_total is not None, ROWS=each,
        BE=power_of_two(features), num_warps=_warps(features),
    )  # fmt: skip
    if gate is None:
        grad_y = grad_x.clone()  # an operator's results are not views of each other
    grad_gate = part_gate.sum().to(gate.dtype) if gate is not None else x.new_empty((0,))
    return grad_x, grad_y, grad_gate, _sum_of(part_weight, weight, x), _sum_of(part_bias, bias, x)


def _sum_of(part: Tensor, of: Tensor | None, x: Tensor) -> Tensor:
    if of is None:
        return x.new_empty((0,))
    return part.sum(0).to(of.dtype) if part.numel() else torch.zeros_like(of)
