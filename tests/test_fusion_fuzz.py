"""Cross-attention with masks, lengths and shapes that nobody thought of, against a dense computation."""

from __future__ import annotations

import pytest
import torch
from fusion_cases import ENGINES

import mmfast
from mmfast.fusion import Source, merge

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st


@st.composite
def problems(draw):
    """Query, sources and options; every choice of which tensor is shared, what is masked and how."""
    batch, rows = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    heads, dim, value_dim = draw(st.sampled_from([1, 2, 4])), draw(st.integers(1, 9)), draw(st.integers(1, 9))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))

    def randn(*shape):
        return torch.randn(shape, generator=random, dtype=torch.float64)

    def shared():
        return 1 if draw(st.booleans()) else batch

    def mask_shape(keys):
        sizes = [size if draw(st.booleans()) else 1 for size in (batch, heads, rows, keys)]
        return sizes[draw(st.integers(0, 2)) :] if sizes[0] == sizes[1] == 1 else sizes

    fusion = draw(st.sampled_from(["joint", "decoupled"]))
    sources = []
    for _ in range(draw(st.integers(1, 3))):
        keys, kv_heads = (
            draw(st.sampled_from([0, 1, 2, 5, 9])),
            draw(st.sampled_from([h for h in (1, 2, 4) if heads % h == 0])),
        )
        parts = {"mask": None, "lengths": None, "bias": None, "gate": None}
        density = draw(st.sampled_from([0.0, 0.3, 0.8]))
        kind = draw(st.sampled_from([None, "bool", "float"]))
        if kind:
            parts["mask"] = torch.rand(mask_shape(keys), generator=random) < density
            if kind == "float":
                parts["mask"] = torch.where(parts["mask"], randn(*parts["mask"].shape), -torch.inf)
        if draw(st.booleans()):
            parts["lengths"] = torch.randint(0, keys + 1, (batch,), generator=random)
        if draw(st.integers(0, 3)) == 0:
            parts["bias"] = randn(*mask_shape(keys))
        if fusion == "decoupled" and draw(st.booleans()):
            parts["gate"] = randn(*draw(st.sampled_from([(), (heads,), (batch, heads, rows, 1), (1, 1, 1, value_dim)])))
        key, value = randn(shared(), kv_heads, keys, dim), randn(shared(), kv_heads, keys, value_dim)
        sources.append(Source(key, value, **parts))
    return randn(batch, heads, rows, dim), sources, {"fusion": fusion, "is_causal": draw(st.booleans())}


def dense(query, sources, fusion, is_causal):
    """One matrix of scores over all keys, softmaxes of its columns; the loops' twin that autograd can follow."""
    batch, heads, rows, dim = query.shape
    scores, values, columns, gates = [], [], [], []
    for s in sources:
        keys = s.key.shape[2]
        repeat = heads // s.key.shape[1]
        key = s.key.repeat_interleave(repeat, 1).expand(batch, -1, -1, -1)
        values.append(s.value.repeat_interleave(repeat, 1).expand(batch, -1, -1, -1))
        one = torch.einsum("bhid,bhjd->bhij", query, key) / dim**0.5
        out_of_it = torch.zeros(batch, heads, rows, keys, dtype=torch.bool)
        for added in (s.mask, s.bias):
            if added is not None and added.dtype == torch.bool:
                out_of_it = out_of_it | ~added
            elif added is not None:
                out_of_it = out_of_it | (added == -torch.inf)
                one = one + added.clamp(min=-1e6)
        if s.lengths is not None:
            out_of_it = out_of_it | (torch.arange(keys) >= s.lengths.view(-1, 1, 1, 1))
        if is_causal:
            out_of_it = out_of_it | torch.ones(rows, keys, dtype=torch.bool).triu(1)
        scores.append(one)
        columns.append(~out_of_it)
        g = torch.ones(()) if s.gate is None else s.gate
        gates.append(g[:, None, None] if g.dim() == 1 else g)
    groups = [list(range(len(sources)))] if fusion == "joint" else [[i] for i in range(len(sources))]
    out, lses = 0, []
    for group in groups:
        s, keep = torch.cat([scores[i] for i in group], 3), torch.cat([columns[i] for i in group], 3)
        some = keep.any(3, keepdim=True)
        # Rows with nothing get a softmax over everything, which is then taken away.
        filled = s.masked_fill(~keep & some, -1e30)
        weights = filled.softmax(3) * keep
        one = weights @ torch.cat([values[i] for i in group], 2)
        out = out + gates[group[0]] * one
        lses.append(torch.where(some[..., 0], filled.logsumexp(3), -torch.inf))
    return out, lses


def finite(x):
    return torch.where(x == -torch.inf, 0.0, x)


@pytest.mark.parametrize("engine", ENGINES)
@settings(max_examples=150)
@given(problems())
def test_agrees_with_dense(engine, problem):
    query, sources, options = problem
    tensors = [query, *(x for s in sources for x in (s.key, s.value, s.gate) if isinstance(x, torch.Tensor))]
    if engine == "reference":
        tensors += [x for s in sources for x in (s.mask, s.bias) if x is not None and x.dtype != torch.bool]
    for x in tensors:
        x.requires_grad_()
    out, lse = mmfast.cross_attention(query, sources, return_lse=True, backend=engine, **options)
    lses = lse if isinstance(lse, tuple) else (lse,)
    expected, expected_lses = dense(query, sources, **options)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-11)
    for a, b in zip(lses, expected_lses, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    lse_weight = weight[..., 0]
    gradients = []
    for one, parts in ((out, lses), (expected, expected_lses)):
        loss = (one * weight).sum() + sum((finite(x) * lse_weight).sum() for x in parts)
        gradients.append(torch.autograd.grad(loss, tensors, allow_unused=True))
    for x, a, b in zip(tensors, *gradients, strict=True):
        a, b = (torch.zeros_like(x) if g is None else g for g in (a, b))
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@settings(max_examples=60)
@given(problems())
def test_engines_agree_in_single_precision(problem):
    query, sources, options = problem

    def single(x):
        return x.float() if isinstance(x, torch.Tensor) and x.dtype == torch.float64 else x

    given_sources = [Source(*map(single, s)) for s in sources]
    results = [
        mmfast.cross_attention(query.float(), given_sources, return_lse=True, backend=e, **options) for e in ENGINES
    ]
    for other in results[1:]:
        torch.testing.assert_close(results[0], other, rtol=1e-4, atol=1e-5)


@settings(max_examples=60)
@given(problems(), st.integers(0, 4))
def test_any_split_is_the_whole(problem, cut):
    """Keys in two sources, or in two calls that are merged, give what they give in one."""
    query, sources, _ = problem
    source = sources[0]._replace(gate=None)
    whole = mmfast.cross_attention(query, source, return_lse=True)
    keys = source.key.shape[2]
    cut = min(cut, keys)

    def part(start, stop):
        def columns(x):
            return x[..., start:stop] if x is not None and x.shape[-1] != 1 else x

        lengths = None if source.lengths is None else (source.lengths - start).clamp(0, stop - start)
        key, value = source.key[:, :, start:stop], source.value[:, :, start:stop]
        return Source(key, value, columns(source.mask), lengths, columns(source.bias))

    parts = [part(0, cut), part(cut, keys)]
    torch.testing.assert_close(mmfast.cross_attention(query, parts, return_lse=True), whole)
    merged = merge(*zip(*(mmfast.cross_attention(query, p, return_lse=True) for p in parts), strict=True))
    torch.testing.assert_close(merged, whole)
