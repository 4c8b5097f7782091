"""Linear layers that do not depend on what torch makes of the CPU.

Where a CPU multiplies no float16 or bfloat16, torch's products of them take 3 times as long as those of float32
(bfloat16), or 13 and with gradients 100 times (float16): measured with 512 features on AVX-512 without AVX512-BF16,
torch 2.13. There they are computed in float32 and rounded once, which is what units for half precision give as well.

Large products of float32 go by oneDNN where torch's own, MKL's, leave half of the CPU unused: see `prefers_onednn`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmfast import _backend
from mmfast.fusion._inputs import is_plain


def _has_units(*names: str) -> bool:
    capabilities = torch.cpu.get_capabilities()
    return not capabilities.get("architecture", "").startswith("x86") or any(map(capabilities.get, names))


HAS_UNITS = {
    torch.bfloat16: _has_units("avx512_bf16", "amx_bf16", "avx_ne_convert"),
    torch.float16: _has_units("avx512_fp16", "amx_fp16", "avx_ne_convert"),
}


@cache
def prefers_onednn() -> bool:
    """Whether this is a processor of AMD with AVX-512: see csrc/fusion/fusion_projection_float.h."""
    return _backend._C is not None and _backend._C.fusion_prefers_onednn()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """``torch.nn.functional.linear``; on a CPU without units for the dtype (or autocast's) computed in float32.

    On a CPU with AMX or AVX512_BF16 our own kernels multiply bfloat16, and on one of AMD with AVX-512 oneDNN float32
    (unless ``torch.backends.mkldnn`` is switched off), if ``backend`` does not say otherwise.
    """
    return linear_parts(x, weight, bias, 1, backend=backend)[0]


def linear_parts(
    x: Tensor, weight: Tensor, bias: Tensor | None, parts: int, *, backend: str | None = None
) -> Sequence[Tensor]:
    """So many equal parts of the last dimension of `linear`. Each has memory of its own where our kernels run, and its
    gradient needs not be joined with the others'."""
    given = _for_kernels(x, weight, bias, backend)
    if given is not None:
        sizes = [weight.shape[0] // parts] * parts
        if (result := _backend._C.fusion_linear(*given, sizes)) is not None:
            return result
    dtype = _by_way_of_float32(x, weight)
    if dtype is None:
        result = F.linear(x, weight, bias)
    else:
        with torch.autocast("cpu", enabled=False):
            result = F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(dtype)
    return (result,) if parts == 1 else result.chunk(parts, -1)


def project(layer: nn.Module, x: Tensor, *, backend: str | None = None) -> Tensor:
    """``layer(x)``, by `linear` if the layer is a ``torch.nn.Linear`` that nothing was hooked to."""
    return project_parts(layer, x, 1, backend=backend)[0]


def project_parts(layer: nn.Module, x: Tensor, parts: int, *, backend: str | None = None) -> Sequence[Tensor]:
    """The same in so many equal parts of the last dimension, by `linear_parts`."""
    hooked = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    if type(layer) is not nn.Linear or hooked or nn.modules.module._has_any_global_hook():
        return layer(x).chunk(parts, -1)
    return linear_parts(x, layer.weight, layer.bias, parts, backend=backend)


def _for_kernels(x: Tensor, weight: Tensor, bias: Tensor | None, backend: str | None) -> tuple | None:
    """Input, weight and bias for the extension, as autocast would have them, or None where it cannot be asked."""
    tensors = (x, weight) if bias is None else (x, weight, bias)
    if x.device.type != "cpu" or not is_plain(tensors) or _backend.choose("fusion", x.device, backend)[0] != "cpu":
        return None
    if torch.is_autocast_enabled("cpu"):
        kinds = {t.dtype for t in tensors}
        if torch.get_autocast_dtype("cpu") != torch.bfloat16 or not kinds <= {torch.float32, torch.bfloat16}:
            return None
        tensors = tuple(t.to(torch.bfloat16) for t in tensors)
    else:
        dtype = torch.float32 if x.dtype == torch.float32 and prefers_onednn() else torch.bfloat16
        if any(t.dtype != dtype for t in tensors):
            return None
    return tensors if bias is not None else (*tensors, None)


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
