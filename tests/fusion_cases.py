"""Small inputs of every option of cross-attention: name → (query, sources, options), all in float64."""

from __future__ import annotations

import inspect
import os

import torch

from mmfast import _backend
from mmfast.fusion import Source

_has_native = _backend._C is not None or os.environ.get("MMFAST_REQUIRE_NATIVE") == "1"
ENGINES = ("reference", *(("cpu",) if _has_native else ()), "torch")

B, H, L, D = 2, 4, 5, 3


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def kv(keys: int = 6, heads: int = H, batch: int = B, dim: int = D, value_dim: int = D):
    return randn(batch, heads, keys, dim), randn(batch, heads, keys, value_dim)


def excluding(*shape: int) -> torch.Tensor:
    """A floating point mask with −inf in it."""
    return torch.where(torch.rand(*shape) < 0.4, -torch.inf, randn(*shape))


def _single():
    return randn(B, H, L, D), [Source(*kv())], {}


def _three():
    return randn(B, H, L, D), [Source(*kv(7)), Source(*kv(1)), Source(*kv(4))], {}


def _values_wider():
    return randn(B, H, L, D), [Source(*kv(7, value_dim=5)), Source(*kv(2, value_dim=5))], {}


def _values_narrower():
    return randn(B, H, L, D), [Source(*kv(7, value_dim=1))], {"scale": 0.7}


def _grouped():
    return randn(B, H, L, D), [Source(*kv(6, heads=2)), Source(*kv(3, heads=1)), Source(*kv(2))], {}


def _shared_query():
    return randn(1, H, L, D), [Source(*kv(6)), Source(*kv(3, batch=1))], {}


def _shared_sources():
    return randn(B, H, L, D), [Source(*kv(6, batch=1)), Source(kv(3)[0], kv(3, batch=1)[1])], {}


def _shared_grouped_causal():
    return randn(B, H, L, D), [Source(*kv(6, batch=1, heads=2), bias=randn(B, H, 1, 6))], {"is_causal": True}


def _lengths():
    return randn(B, H, L, D), [Source(*kv(6), lengths=torch.tensor([0, 4]))], {}


def _lengths_joint():
    first = Source(*kv(6), lengths=torch.tensor([0, 4], dtype=torch.int32))
    return randn(B, H, L, D), [first, Source(*kv(3, batch=1), lengths=torch.tensor([0, 3]))], {}


def _row_selection():
    """Flamingo's: each query sees one of the images, or none."""
    of = torch.tensor([[0, 1, 2, 2, 0], [2, 2, 0, 1, 1]])[:, None, :, None]
    return randn(B, H, L, D), [Source(*kv(3), mask=of == 1), Source(*kv(3), mask=of == 2)], {}


def _boolean_mask():
    return randn(B, H, L, D), [Source(*kv(6), mask=torch.rand(B, H, L, 6) < 0.4)], {}


def _boolean_mask_2d():
    return randn(B, H, L, D), [Source(*kv(6), mask=torch.rand(L, 6) < 0.4), Source(*kv(2))], {}


def _float_mask():
    return randn(B, H, L, D), [Source(*kv(6), mask=excluding(B, 1, L, 6)), Source(*kv(2), mask=randn(H, 1, 2))], {}


def _bias():
    masked = Source(*kv(6, heads=2), mask=torch.rand(B, 1, L, 6) < 0.6, bias=randn(1, H, L, 6))
    return randn(B, H, L, D), [masked, Source(*kv(2), mask=randn(L, 1), bias=excluding(1, 1, 1, 2))], {}


def _causal():
    return randn(B, H, L, D), [Source(*kv(L)), Source(*kv(2)), Source(*kv(9))], {"is_causal": True}


def _causal_masked():
    source = Source(*kv(7), lengths=torch.tensor([7, 2]), mask=torch.rand(B, H, L, 7) < 0.5)
    return randn(B, H, L, D), [source], {"is_causal": True}


def _softcap():
    return 5 * randn(B, H, L, D), [Source(*kv(6), lengths=torch.tensor([3, 6])), Source(*kv(3))], {"softcap": 1.5}


def _decoupled():
    sources = [Source(*kv(6)), Source(*kv(4), gate=0.3), Source(*kv(2, batch=1), gate=torch.tensor(-1.2).double())]
    return randn(B, H, L, D), sources, {"fusion": "decoupled"}


def _decoupled_gates():
    sources = [
        Source(*kv(6, value_dim=2), gate=randn(H), lengths=torch.tensor([0, 6])),
        Source(*kv(4, value_dim=2), gate=randn(B, H, L, 1)),
        Source(*kv(2, value_dim=2), gate=randn(1, 1, L, 2), mask=torch.rand(B, 1, L, 1) < 0.5),
    ]
    return randn(B, H, L, D), sources, {"fusion": "decoupled", "is_causal": True}


def _one_query():
    return randn(B, H, 1, D), [Source(*kv(6)), Source(*kv(3), gate=2.0)], {"fusion": "decoupled"}


def _one_feature():
    return randn(B, H, L, 1), [Source(*kv(6, dim=1, value_dim=1))], {"scale": -2.0}


def _negative_scale_causal():
    """What is excluded is excluded still: −inf is not to be scaled."""
    source = Source(*kv(7, heads=2), lengths=torch.tensor([7, 2]))
    return randn(B, H, L, D), [Source(*kv(L)), source, Source(*kv(3, batch=1))], {"is_causal": True, "scale": -0.7}


def _scale_zero_causal():
    return (
        randn(1, H, L, D),
        [Source(*kv(L)), Source(*kv(2), mask=torch.rand(B, 1, L, 2) < 0.5)],
        {
            "is_causal": True,
            "scale": 0.0,
        },
    )


def _strided():
    key = randn(B, 6, D, H).permute(0, 3, 1, 2)
    return randn(B, L, H, D).transpose(1, 2), [Source(key, randn(B, H, D, 6).transpose(2, 3)), Source(*kv(3))], {}


def _without_keys():
    return randn(B, H, L, D), [Source(*kv(0)), Source(*kv(3)), Source(*kv(0))], {}


def _without_keys_decoupled():
    return randn(1, H, L, D), [Source(*kv(0)), Source(*kv(3, batch=1))], {"fusion": "decoupled"}


def _without_any_keys():
    return randn(1, H, L, D), [Source(*kv(0)), Source(*kv(0))], {}


CASES = {name[1:]: build for name, build in list(globals().items()) if name[:1] == "_" and inspect.isfunction(build)}


def inputs(query: torch.Tensor, sources: list[Source]) -> list[torch.Tensor]:
    """Every tensor with a gradient: query, keys, values, gates, floating point masks and biases."""
    rest = (x for s in sources for x in (s.key, s.value, s.mask, s.bias, s.gate))
    return [query, *(x for x in rest if isinstance(x, torch.Tensor) and x.dtype.is_floating_point)]


def replaced(sources: list[Source], tensors: list[torch.Tensor]) -> list[Source]:
    """The sources with ``tensors`` (without the query) in place of those of `inputs`."""
    tensors = iter(tensors)

    def new(x):
        return next(tensors) if isinstance(x, torch.Tensor) and x.dtype.is_floating_point else x

    return [
        s._replace(key=new(s.key), value=new(s.value), mask=new(s.mask), bias=new(s.bias), gate=new(s.gate))
        for s in sources
    ]
