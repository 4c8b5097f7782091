"""Attention in float32 with heads of a few features, by CUDA C++ (`csrc/fusion/fusion_tiny.h`).

A matrix unit takes such heads for 16 features and a product of float32 for three of parts: of 6 features four fifths of
its work are zeros. One source, without masks, biases and gates, whose batch and heads are those of the query.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmfast import _backend
from mmfast.fusion._inputs import Source
from mmfast.fusion.merged import heads_inside
from mmfast.fusion.recording import is_recorded, launched, room


def forward(query: Tensor, source: Source, scale: float) -> tuple[Tensor, Tensor]:
    """Output ``(B, H, L, D_v)`` and log-sum-exp ``(B, H, L)``."""
    batch, heads, rows, _ = query.shape
    out = heads_inside(query, (batch, heads, rows, source.value.shape[3]))
    lse = room(query, (batch, heads, rows), torch.float32)
    key, value, *_ = source
    launched(_backend._C.fusion_tiny_forward(query, key, value, source.lengths, scale, out, lse, is_recorded()))
    return out, lse


def backward(
    grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, source: Source, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Gradients of query, keys and values."""
    key, value, *_ = source
    grads = [heads_inside(x, x.shape) for x in (query, key, value)]
    less = room(query, lse.shape, torch.float32)
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    launched(
        _backend._C.fusion_tiny_backward(
            grad_out, grad_lse, query, key, value, source.lengths, scale, out, lse.contiguous(), less, *grads,
            is_recorded(),
        )
    )  # fmt: skip
    return grads[0], [grads[1]], [grads[2]]
