"""Merged, pooled, packed and nested cross-attention."""

from __future__ import annotations

import math

import pytest
import torch
from fusion_cases import CASES, ENGINES, kv, randn

import mmfast
from mmfast.fusion import PackedSource, Source, attention_pool, merge, packed_attention
from mmfast.fusion import packed as module
from mmfast.fusion.attention import attend

HALF = (torch.bfloat16, torch.float16)

# ---- merge


def test_merge():
    query, sources, _ = CASES["lengths_joint"]()
    parts = [mmfast.cross_attention(query, s, return_lse=True) for s in sources]
    together = mmfast.cross_attention(query, sources, return_lse=True)
    for got, expected in zip(merge(*zip(*parts, strict=True)), together, strict=True):
        torch.testing.assert_close(got, expected)
    nothing = merge([randn(2, 3), randn(2, 3)], [torch.full((2,), -torch.inf)] * 2)
    assert not nothing[0].any() and (nothing[1] == -torch.inf).all()


def test_merge_gradcheck():
    outs = [randn(2, 3, 4).requires_grad_() for _ in range(3)]
    lses = [randn(2, 3).requires_grad_() for _ in range(3)]
    with torch.no_grad():
        lses[0][0, 0] = lses[1][1] = -torch.inf
    a, b = torch.autograd.grad(sum(x.square().sum() for x in merge(outs, lses)), (outs[0], lses[0]))
    assert a[0, 0].eq(0).all() and b[0, 0] == 0 and a.isfinite().all() and b.isfinite().all()
    lses = [randn(2, 3).requires_grad_() for _ in range(3)]
    assert torch.autograd.gradcheck(lambda *x: merge(x[:3], x[3:]), (*outs, *lses))
    assert torch.autograd.gradgradcheck(lambda *x: merge(x[:3], x[3:]), (*outs, *lses))


@pytest.mark.parametrize("dtype", HALF)
def test_merge_half(dtype):
    outs, lses = [torch.randn(50, 8).to(dtype) for _ in range(2)], [3 * torch.randn(50) for _ in range(2)]
    out, lse = merge(outs, lses)
    assert out.dtype == dtype and lse.dtype == torch.float32
    gold = merge([x.double() for x in outs], [x.double() for x in lses])
    torch.testing.assert_close(out, gold[0].to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    torch.testing.assert_close(lse, gold[1].float())


def test_merge_rejects():
    a, b = randn(2, 3, 4), randn(2, 3)
    for error, message, outs, lses in (
        (TypeError, "outputs must be a list of tensors", a, [b]),
        (ValueError, "outputs must hold at least one", [], []),
        (ValueError, "lses must be as many as outputs, 2, got 1", [a, a], [b]),
        (ValueError, r"lses must be \(2, 3\), one for each output row, got \(3,\)", [a], [b[0]]),
        (ValueError, "outputs must have one shape", [a, a[..., :2]], [b, b]),
        (TypeError, "outputs must have one dtype", [a, a.float()], [b, b]),
    ):
        with pytest.raises(error, match=message):
            merge(outs, lses)


# ---- Pooling


@pytest.mark.parametrize("engine", ENGINES)
def test_pooling_does_not_look_beyond_the_lengths(engine):
    """Neither forward nor backward: 0 · NaN is NaN."""
    query, lengths, results = randn(2, 2, 9, 3), torch.tensor([4, 0]), []
    sources = [Source(*(x.requires_grad_() for x in kv(5, heads=2)))]
    for beyond in (0.0, torch.nan):
        q = query.masked_fill((torch.arange(9) >= lengths[:, None])[:, None, :, None], beyond).requires_grad_()
        out = attention_pool(q, sources, query_lengths=lengths, backend=engine)
        results.append([out, *torch.autograd.grad(out.square().sum(), (q, sources[0].key, sources[0].value))])
    torch.testing.assert_close(results[1], results[0])
    assert all(x[0].any() for x in results[0])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"fusion": "decoupled"}])
@pytest.mark.parametrize("rows", [1, 7, 1100])
def test_pooling(rows, options, engine):
    gate = {"gate": randn(2, 4, rows, 1)} if options.get("fusion") else {}
    query = randn(2, 4, rows, 3)
    sources = [
        Source(*kv(9), mask=torch.rand(2, 1, rows, 9) < 0.7, **gate),
        Source(*kv(rows + 1), bias=randn(1, 4, rows, 1)),
    ]
    lengths = torch.tensor([rows // 2, 0])
    tensors = [query, *(x for s in sources for x in s[:2]), *gate.values()]
    for x in tensors:
        x.requires_grad_()
    out = mmfast.cross_attention(query, sources, backend=engine, **options)
    pooled = attention_pool(query, sources, backend=engine, **options)
    torch.testing.assert_close(pooled, out.mean(2))
    some = attention_pool(query, sources, query_lengths=lengths, backend=engine, **options)
    torch.testing.assert_close(some[0], out[0, :, : rows // 2].sum(1) / max(rows // 2, 1))
    assert not some[1].any()
    weight = torch.randn_like(pooled)
    expected = torch.autograd.grad(out.mean(2), tensors, weight)
    for a, b in zip(torch.autograd.grad(pooled, tensors, weight), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_pooling_memory(monkeypatch):
    """What is saved for the gradient does not grow with the queries."""
    saved = {}
    for rows in (600, 1200):
        query, source = torch.randn(1, 2, rows, 4).requires_grad_(), (torch.randn(1, 2, 6, 4), torch.randn(1, 2, 6, 4))
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, sizes=sizes: sizes.append(x.numel()) or x, lambda x: x):
            attention_pool(query, source)
        saved[rows] = sum(size for size in sizes if size != query.numel())
    assert saved[600] == saved[1200]


def test_pooling_rejects():
    query, source = randn(2, 4, 5, 3), kv()
    for error, message, given, options in (
        (ValueError, r"query_lengths must lie in \[0, 5\]", query, {"query_lengths": torch.tensor([1, 6])}),
        (ValueError, r"query must be \(B, H, L, D\)", query[0], {}),
        (ValueError, "fusion must be one of", query, {"fusion": "sum"}),
    ):
        with pytest.raises(error, match=message):
            attention_pool(given, source, **options)


# ---- Packed sequences


def packed(lengths, *shape):
    """Rows of all items, and where each item begins."""
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    return randn(int(offsets[-1]), *shape), offsets


LENGTHS = (3, 0, 5, 1), ((4, 2, 0, 6), (1, 0, 0, 2))  # an item without queries, without keys here, without keys at all


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("options", [{}, {"is_causal": True, "scale": 0.3}, {"fusion": "decoupled"}, {"softcap": 2.0}])
@pytest.mark.parametrize("engine", ["reference", None])
def test_packed(engine, options, dtype):
    """Each item is what it is alone."""
    query, of_query = packed(LENGTHS[0], 4, 3)
    gate = randn(4) if options.get("fusion") else None
    sources = []
    for lengths, heads in zip(LENGTHS[1], (2, 4), strict=True):
        key, offsets = packed(lengths, heads, 3)
        sources.append(PackedSource(key, randn(len(key), heads, 2), offsets.to(dtype), gate))
    tensors = [query, *(x for s in sources for x in s[:2])] + ([] if gate is None else [gate])
    for x in tensors:
        x.requires_grad_()
    result = packed_attention(query, of_query.to(dtype), sources, return_lse=True, backend=engine, **options)
    out, lses = result[0], result[1] if isinstance(result[1], tuple) else (result[1],)
    parts, lse_parts = [], []
    for b in range(4):

        def item(x, offsets, b=b):
            return x[offsets[b] : offsets[b + 1]].transpose(0, 1)[None]

        alone = [Source(item(s.key, s.cu_seqlens), item(s.value, s.cu_seqlens), gate=s.gate) for s in sources]
        one, lse = mmfast.cross_attention(item(query, of_query), alone, return_lse=True, **options)
        parts.append(one[0].transpose(0, 1))
        lse_parts.append([x[0].transpose(0, 1) for x in (lse if isinstance(lse, tuple) else (lse,))])
    expected = torch.cat(parts)
    torch.testing.assert_close(out, expected)
    assert out.shape == (9, 4, 2)
    for i, lse in enumerate(lses):
        torch.testing.assert_close(lse, torch.cat([part[i] for part in lse_parts]))
    weight = torch.randn_like(out)
    gradients = (torch.autograd.grad(x, tensors, weight) for x in (out, expected))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_packed_groups(monkeypatch):
    """Short items share a call, whatever stands in one of them; what is long or has no like is computed in place."""
    calls = []
    monkeypatch.setattr(module, "attend", lambda query, *rest: calls.append(query.shape) or attend(query, *rest))
    lengths = [[int(n) for n in torch.randint(low, high, (64,))] for low, high in ((1, 12), (0, 20), (1, 5))]
    (query, of_query), *keys = (packed(given, 2, 3) for given in lengths)
    sources = [PackedSource(key, randn(len(key), 2, 3), offsets) for key, offsets in keys]
    leaves = [query, sources[0].key, sources[1].value]
    for x in leaves:
        x.requires_grad_()

    def run():
        out, lse = packed_attention(query, of_query, sources, return_lse=True)
        return out, lse, *torch.autograd.grad(out.square().sum() + lse.exp().sum(), leaves)

    expected = packed_attention(query, of_query, sources, return_lse=True, backend="reference")
    calls.clear()
    before = run()
    assert len(calls) <= 3 and sum(shape[0] for shape in calls) == 64, calls
    for found, wanted in zip(before, expected, strict=False):
        torch.testing.assert_close(found, wanted)
    with torch.no_grad():
        of_key = keys[0][1]
        sources[0].key[of_key[5] : of_key[6]] = math.nan
    others = [torch.ones(len(x), dtype=torch.bool) for x in before]
    for other, offsets in zip(others, (of_query, of_query, of_query, of_key, keys[1][1]), strict=True):
        other[offsets[5] : offsets[6]] = False
    for found, wanted, other in zip(run(), before, others, strict=True):
        assert torch.equal(found[other], wanted[other])
    wide = (256, 256)
    assert module._groups([(600, 900), (600, 900), (9, 20), (1, 12), (0, 3)], wide) == [[3, 2], [0], [1]]


def test_packed_double_backward():
    (query, of_query), (key, of_key) = packed((2, 1, 3), 1, 2), packed((1, 4, 2), 1, 2)
    inputs = query.requires_grad_(), key.requires_grad_()
    assert torch.autograd.gradgradcheck(
        lambda q, k: packed_attention(q, of_query, PackedSource(k, k, of_key), return_lse=True), inputs
    )


def test_packed_without_items():
    out, lse = packed_attention(
        randn(0, 4, 3),
        torch.zeros(1).int(),
        PackedSource(randn(0, 4, 3), randn(0, 4, 2), torch.zeros(1).int()),
        return_lse=True,
    )
    assert out.shape == (0, 4, 2) and lse.shape == (0, 4)


def test_packed_compile():
    query, of_query = packed((3, 4), 4, 3)
    key, of_key = packed((5, 2), 4, 3)
    expected = packed_attention(query, of_query, PackedSource(key, key, of_key))
    function = torch.compile(
        lambda q, cq, k, ck: packed_attention(q, cq, PackedSource(k, k, ck)), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(function(query, of_query, key, of_key), expected)


def test_packed_rejects():
    (query, of_query), (key, of_key) = packed((3, 2), 4, 3), packed((1, 5), 4, 3)
    good = PackedSource(key, key, of_key)
    for error, message, q, offsets, source in (
        (ValueError, r"query must be \(T, H, D\)", query[None], of_query, good),
        (TypeError, r"sources\[0\] must be a PackedSource", query, of_query, [(key, key)]),
        (TypeError, "cu_seqlens must be an int64 or int32", query, of_query.float(), good),
        (ValueError, r"cu_seqlens must ascend from 0 to 5, got \[0, 3, 6\]", query, torch.tensor([0, 3, 6]), good),
        (
            ValueError,
            r"cu_seqlens of sources\[0\] must be \(3,\)",
            query,
            of_query,
            good._replace(cu_seqlens=of_key[:2]),
        ),
        (ValueError, "cu_seqlens of .* must ascend", query, of_query, good._replace(cu_seqlens=of_key.flip(0))),
        (ValueError, "gate of .* must be", query, of_query, good._replace(gate=randn(5, 4))),
    ):
        with pytest.raises(error, match=message):
            packed_attention(q, offsets, source)


# ---- Nested tensors


def nested(lengths, heads=4, dim=3):
    """``(B, H, ragged, D)``."""
    parts = [randn(n, heads, dim) for n in lengths]
    return torch.nested.nested_tensor(parts, layout=torch.jagged).transpose(1, 2)


def test_nested():
    """Each item is what it is alone; what is not nested keeps its shape."""
    query, dense = nested((3, 1, 5)), randn(3, 4, 2, 3)
    sources = [(nested((2, 6, 1)),) * 2, kv(4, batch=3)]
    for q in (query, dense):
        out, lse = mmfast.cross_attention(q, sources, return_lse=True)
        assert out.is_nested == q.is_nested == lse.is_nested
        for b in range(3):
            alone = [(s[0][b][None], s[1][b][None]) for s in sources]
            expected = mmfast.cross_attention(q[b][None], alone, return_lse=True)
            torch.testing.assert_close(out[b][None], expected[0])
            torch.testing.assert_close(lse[b][None], expected[1])


def test_nested_gradient():
    values = randn(9, 4, 3).requires_grad_()
    offsets = torch.tensor([0, 3, 4, 9])
    query = torch.nested.nested_tensor_from_jagged(values, offsets).transpose(1, 2)
    source = kv(4, batch=3)
    mmfast.cross_attention(query, source).values().square().sum().backward()
    for b in range(3):
        one = values.detach()[offsets[b] : offsets[b + 1]].requires_grad_()
        out = mmfast.cross_attention(one.transpose(0, 1)[None], (source[0][b : b + 1], source[1][b : b + 1]))
        (gradient,) = torch.autograd.grad(out.square().sum(), one)
        torch.testing.assert_close(values.grad[offsets[b] : offsets[b + 1]], gradient)


def test_nested_rejects():
    query = nested((3, 1, 5))
    with pytest.raises(ValueError, match=r"mask of sources\[0\] must be None with nested tensors"):
        mmfast.cross_attention(query, [Source(*kv(batch=3), mask=torch.ones(1, 6).bool())])
    with pytest.raises(ValueError, match=r"value of .* must have the lengths of its key"):
        mmfast.cross_attention(query, [(nested((1, 2, 3)), nested((2, 2, 2)))])
    with pytest.raises(ValueError, match="third dimension ragged"):
        mmfast.cross_attention(query.transpose(1, 2), [kv(batch=3)])
    with pytest.raises(ValueError, match="return_weights must be False for nested"):
        mmfast.cross_attention(query, [kv(batch=3)], return_weights=True)
