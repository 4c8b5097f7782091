"""Modules around attention in PyTorch: torch.nn.MultiheadAttention, and a gated block written by hand."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.func import functional_call

from benchmarks.providers import Provider, Runner


class _OfTorch(Provider):
    package, module = "torch", "torch"

    def __init__(self, name: str, compiled: bool = False) -> None:
        self.name, self.compiled = name, compiled

    def build(self, case, device):
        forward = self.forward(case)
        if not self.compiled:
            return Runner(forward)
        compiled = torch.compile(lambda *inputs: forward(inputs), dynamic=False, fullgraph=True)
        return Runner(lambda inputs: compiled(*inputs))

    def forward(self, case):
        """``inputs`` → output."""
        raise NotImplementedError


class MultiheadAttention(_OfTorch):
    """torch's, with its defaults; or without the weights, which another module of the model may want."""

    def __init__(self, name: str, compiled: bool = False, need_weights: bool = True) -> None:
        super().__init__(name, compiled)
        self.need_weights = need_weights

    def forward(self, case):
        module = torch.nn.MultiheadAttention(case.width, case.heads, batch_first=True, device="meta", dtype=case.dtype)
        if not self.compiled:
            module.register_forward_pre_hook(self._without_weights, with_kwargs=True)
            return case.runner(module)
        names = [name for name, _ in sorted(module.named_parameters())]

        def whole(inputs):
            x, z, *parameters = inputs
            return functional_call(module, dict(zip(names, parameters, strict=True)), (x, z, z))[0]

        return whole

    def _without_weights(self, module, args, kwargs):
        return args, kwargs | {"need_weights": self.need_weights}


class Block(_OfTorch):
    """Norm, projections, scaled_dot_product_attention for each source, gates, sum, projection and residual."""

    def forward(self, case):
        names = [name for name, _ in sorted(case.module("meta").named_parameters())]
        count = 1 + len(case.keys)

        def heads(x):
            return x.unflatten(2, (case.heads, case.dim)).transpose(1, 2)

        def block(inputs):
            p = dict(zip(names, inputs[count:], strict=True))
            x = inputs[0]
            normed = F.layer_norm(x, (case.width,), p["pre_norm.weight"], p["pre_norm.bias"])
            q = heads(F.linear(normed, p["q_proj.weight"], p["q_proj.bias"]))
            out = None
            for j, z in enumerate(inputs[1:count]):
                k, v = F.linear(z, p[f"kv_proj.{j}.weight"], p[f"kv_proj.{j}.bias"]).chunk(2, 2)
                one = p["gate"][j].tanh() * F.scaled_dot_product_attention(q, heads(k), heads(v))
                out = one if out is None else out + one
            return x + F.linear(out.transpose(1, 2).flatten(2), p["out_proj.weight"], p["out_proj.bias"])

        return block


PROVIDERS = [
    MultiheadAttention("torch-mha"),
    MultiheadAttention("torch-mha-compile", compiled=True),
    MultiheadAttention("torch-mha-no-weights", need_weights=False),
    Block("block-sdpa"),
    Block("block-compile", compiled=True),
]
