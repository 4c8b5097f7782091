"""Attention to several sources as PyTorch has it: a fused or a plain kernel, with the concatenation, sum or expansion.

One softmax over all sources needs their keys and values in one tensor; decoupled sources are one call each, and a sum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.fusion_cases import allowed, source_masks
from benchmarks.providers import Provider, Runner

Masks = Sequence[Tensor | None]


def dense_masks(case, device: str) -> list[Tensor | None]:
    """The mask of each source as scaled_dot_product_attention takes it: boolean, or floating point where models do."""
    if case.mask == "tiles":
        return [mask for mask, _ in source_masks(case, device)]
    return [None if mask is None else mask for mask in allowed(case, device)]


def together(case, inputs: Sequence[Tensor], masks: Masks, attend: Callable[..., Tensor]) -> Tensor:
    """What ``attend(query, key, value, mask)`` gives for the case."""
    query, pairs, gates = case.parts(inputs)
    if case.shared_query:
        query = query.expand(case.batch, -1, -1, -1)
    if case.fusion == "joint":
        if len(pairs) == 1:
            return attend(query, *pairs[0], masks[0])
        key, value = (torch.cat(tensors, 2) for tensors in zip(*pairs, strict=True))
        return attend(query, key, value, joined(case, masks))
    out = None
    for (key, value), mask, gate in zip(pairs, masks, gates, strict=True):
        one = attend(query, key, value, mask)
        one = one if gate is None else one * gate
        out = one if out is None else out + one
    return out


def joined(case, masks: Masks) -> Tensor | None:
    """The masks of all sources side by side."""
    given = [m for m in masks if m is not None]
    if not given:
        return None
    shape = torch.broadcast_shapes(*(m.shape[:3] for m in given))
    ones = [
        torch.ones(*shape, n, dtype=torch.bool, device=given[0].device) if m is None else m.expand(*shape, n)
        for n, m in zip(case.keys, masks, strict=True)
    ]
    return torch.cat(ones, 3)


def sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, mask, enable_gqa=query.shape[1] != key.shape[1])


def plain(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Matrix product, softmax, matrix product. Heads that share keys are more rows of one product."""
    rows, groups = query.shape[2], query.shape[1] // key.shape[1]
    query = query * query.shape[3] ** -0.5
    if groups > 1:
        query = query.unflatten(1, (key.shape[1], groups)).flatten(2, 3)
    scores = query @ key.transpose(2, 3)
    if mask is None:
        out = scores.softmax(3) @ value
        return out.unflatten(2, (groups, rows)).flatten(1, 2) if groups > 1 else out
    scores = scores.unflatten(2, (groups, rows))
    if mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask[:, :, None], torch.finfo(scores.dtype).min)
    else:
        scores = scores + mask[:, :, None]
    out = (scores.softmax(4).flatten(2, 3) @ value).unflatten(2, (groups, rows)).flatten(1, 2)
    if mask.dtype == torch.bool and mask.shape[2] > 1:
        out = out * mask.any(3, keepdim=True)  # a row that may attend to nothing has been given the mean
    return out


class Eager(Provider):
    """``attend`` on the case's inputs."""

    package, module = "torch", "torch"

    def __init__(self, name: str, attend: Callable[..., Tensor], devices: tuple[str, ...] = ("cpu", "cuda")) -> None:
        self.name, self.attend, self.devices = name, attend, devices

    def build(self, case, device):
        masks = dense_masks(case, device)
        return Runner(lambda inputs: together(case, inputs, masks, self.attend))


class Backend(Eager):
    """scaled_dot_product_attention held to one of its kernels; which one is best depends on the GPU."""

    def __init__(self, name: str, backend: SDPBackend) -> None:
        super().__init__(name, sdpa, ("cuda",))
        self.backend = backend

    def runs(self, case, device):
        # Flash attention and cuDNN have no float32, and flash attention no masks.
        half, masked = case.dtype != torch.float32, case.mask is not None
        fits = {SDPBackend.FLASH_ATTENTION: half and not masked, SDPBackend.CUDNN_ATTENTION: half}
        return fits.get(self.backend, True)

    def build(self, case, device):
        forward = super().build(case, device).forward

        def within(inputs):
            with sdpa_kernel(self.backend):
                return forward(inputs)

        return Runner(within)


class Compiled(Eager):
    """torch.compile of ``attend`` and what is around it; its patterns may put a fused kernel in its place."""

    def build(self, case, device):
        masks = dense_masks(case, device)
        compiled = torch.compile(
            lambda *inputs: together(case, inputs, masks, self.attend), dynamic=False, fullgraph=True
        )
        return Runner(lambda inputs: compiled(*inputs))


class ReferenceCompile(Provider):
    """torch.compile of mmfast's reference."""

    name, package, module = "attention-reference-compile", "torch", "torch"

    def build(self, case, device):
        masks = source_masks(case, device)
        compiled = torch.compile(lambda *inputs: case.attend(inputs, masks, "reference"), dynamic=False, fullgraph=True)
        return Runner(lambda inputs: compiled(*inputs))


class Flex(Compiled):
    """FlexAttention, compiled as its documentation demands. On the CPU it has no backward."""

    differentiable = torch.cuda.is_available()

    def __init__(self) -> None:
        def attend(query, key, value, mask):
            from torch.nn.attention.flex_attention import flex_attention

            return flex_attention(query, key, value)

        super().__init__("flex", attend)


PROVIDERS = [
    Eager("sdpa", sdpa),
    Eager("plain", plain),
    Compiled("plain-compile", plain),
    ReferenceCompile(),
    Flex(),
    Backend("sdpa-cudnn", SDPBackend.CUDNN_ATTENTION),
    Backend("sdpa-flash", SDPBackend.FLASH_ATTENTION),
    Backend("sdpa-efficient", SDPBackend.EFFICIENT_ATTENTION),
]
