"""Calls that nobody thought of, on each engine that can take them: any sizes, heads, masks, lengths, biases, gates."""

from __future__ import annotations

import functools
import random

import pytest
import torch
from fusion_cases import randn
from test_fusion_triton import check

from mmfast.fusion import Source, routes_cuda
from mmfast.fusion import triton as fused
from mmfast.fusion._inputs import batch_of, prepare


def _shape(draw, *shape):
    """Any part of it may be 1."""
    return [n if draw.random() < 0.6 else 1 for n in shape]


def _mask(draw, *shape):
    """Rows without keys are as likely as full ones."""
    shape = _shape(draw, *shape)
    kind = draw.choice(["seldom", "often", "mostly", "values"])
    if kind == "values":
        return torch.randn(shape).masked_fill(torch.rand(shape) < 0.3, -torch.inf)
    return torch.rand(shape) < {"seldom": 0.1, "often": 0.5, "mostly": 0.95}[kind]


def _source(draw, batch, groups, heads, rows, dim, value_dim, fusion):
    keys = draw.choice([1, 3, 16, 20, 33, 64, 77, 130, 200])
    own = draw.choice([1, batch])
    options = {}
    if draw.random() < 0.35:
        options["mask"] = _mask(draw, batch, heads, rows, keys)
    if draw.random() < 0.2:
        options["bias"] = torch.randn(_shape(draw, batch, heads, rows, keys))
    if draw.random() < 0.3:
        counts = [draw.choice([0, 1, keys // 2, keys]) for _ in range(batch)]
        options["lengths"] = torch.tensor(counts, dtype=draw.choice([torch.int32, torch.int64]))
    if fusion == "decoupled" and draw.random() < 0.6:
        shapes = (heads,), (1, 1, rows, 1), (batch, heads, rows, value_dim)
        options["gate"] = draw.choice([0.6, *(randn(*shape) for shape in shapes)])
    return Source(randn(own, groups, keys, dim), randn(own, groups, keys, value_dim), **options)


def _call(draw):
    """Query, sources and options as a user may give them."""
    batch, groups, repeats = draw.choice([1, 1, 2, 3]), draw.choice([1, 2]), draw.choice([1, 1, 2, 3])
    rows, dim = draw.choice([1, 2, 7, 16, 33, 65, 130]), draw.choice([1, 6, 8, 16, 24, 40, 64, 72, 96])
    value_dim = draw.choice([dim, dim, 8, 24, 64])
    fusion, heads = draw.choice(["joint", "decoupled"]), groups * repeats
    sizes = batch, groups, heads, rows, dim, value_dim, fusion
    sources = [_source(draw, *sizes) for _ in range(draw.choice([1, 1, 1, 2, 3]))]
    scale = draw.choice([dim**-0.5, -0.3, 0.0, 1.0])
    is_causal = len(sources) == 1 and draw.random() < 0.15
    return randn(batch, heads, rows, dim), sources, {"fusion": fusion, "is_causal": is_causal, "scale": scale}


def _engines(query, sources, fusion, lse):
    """Those that the table may name for such a call."""
    shared, group = routes_cuda.folds(query, sources, batch_of(query, sources))
    few = query.shape[2] * shared * group <= routes_cuda.FEW_QUERIES
    names = ("short", "split", "skip") if few else ("short", "skip")
    return [name for name in names if routes_cuda.able(name, query, sources, fusion, lse)]


@pytest.mark.parametrize("engine", ["short", "split", "skip"])
@pytest.mark.parametrize("seed", range(6))
def test_random_calls(engine, seed, monkeypatch):
    """The first call by this seed that the engine can take: values, log-sum-exps, and gradients of all that has one."""
    # Of scores of any size rounding leaves more than of those that other tests choose.
    tolerance = {torch.float32: 3e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}
    monkeypatch.setattr("test_fusion_triton.TOLERANCE", tolerance)
    draw = random.Random(f"{engine}/{seed}")
    torch.manual_seed(seed)
    while True:
        query, sources, options = _call(draw)
        dtype, lse = draw.choice([torch.float32, torch.bfloat16, torch.float16]), draw.random() < 0.6
        try:
            prepared = prepare(query, sources, options["fusion"])
        except ValueError:  # a mask for every row of one source, a batch of another: the op says so too
            continue
        work = query.shape[:3].numel() * sum(s.key.shape[2] for s in sources)
        if work < 20_000 and engine in _engines(prepared[0].to(dtype), prepared[1], options["fusion"], lse):
            break
    check(functools.partial(fused.run, engine), query, sources, options, dtype, with_lse=lse)
