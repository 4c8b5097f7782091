"""Linear layers whose half precision does not depend on the units of the CPU.

Where a CPU multiplies no float16 or bfloat16, torch's products of them take 3 times as long as those of float32
(bfloat16), or 13 and with gradients 100 times (float16): measured with 512 features on AVX-512 without AVX512-BF16,
torch 2.13. There they are computed in float32 and rounded once, which is what units for half precision give as well.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _has_units(*names: str) -> bool:
    capabilities = torch.cpu.get_capabilities()
    return not capabilities.get("architecture", "").startswith("x86") or any(map(capabilities.get, names))


HAS_UNITS = {
    torch.bfloat16: _has_units("avx512_bf16", "amx_bf16", "avx_ne_convert"),
    torch.float16: _has_units("avx512_fp16", "amx_fp16", "avx_ne_convert"),
}


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``torch.nn.functional.linear``; on a CPU without units for the dtype (or autocast's) computed in float32."""
    dtype = _by_way_of_float32(x, weight)
    if dtype is None:
        return F.linear(x, weight, bias)
    with torch.autocast("cpu", enabled=False):
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(dtype)


def project(layer: nn.Module, x: Tensor) -> Tensor:
    """``layer(x)``, by `linear` if the layer is a ``torch.nn.Linear`` that nothing was hooked to."""
    hooked = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    if type(layer) is not nn.Linear or hooked or nn.modules.module._has_any_global_hook():
        return layer(x)
    return linear(x, layer.weight, layer.bias)


def _by_way_of_float32(x: Tensor, weight: Tensor) -> torch.dtype | None:
    """The dtype of the result, if it is to be computed in float32."""
    if x.device.type != "cpu":
        return None
    dtype = x.dtype
    if torch.is_autocast_enabled("cpu"):
        if torch.float64 in (dtype, weight.dtype):
            return None
        dtype = torch.get_autocast_dtype("cpu")
    elif weight.dtype != dtype:
        return None
    return None if HAS_UNITS.get(dtype, True) else dtype
