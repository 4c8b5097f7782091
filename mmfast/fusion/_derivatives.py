"""Derivatives that the operators of the fusion slice have from the reference."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def alias(x: Tensor | None) -> Tensor | None:
    """So that differentiation stops here and not where the caller's graph began, which goes on behind it."""
    return None if x is None else x.view_as(x) if x.requires_grad else x.detach().requires_grad_()


def of_batch(outputs: Sequence[Tensor], grads: Sequence[Tensor | None], inputs: Sequence[Tensor]) -> list:
    """Gradients of ``inputs`` for a batch of gradients (``is_grads_batched``), which no operator with lists takes."""
    pairs = [(x, v) for x, v in zip(outputs, grads, strict=True) if v is not None]
    outputs, grads = zip(*pairs, strict=True)
    onward = torch.is_grad_enabled()
    return list(torch.autograd.grad(outputs, inputs, grads, allow_unused=True, create_graph=onward))
