"""Cross-attention against its definition, against torch, and at its edges, with every engine."""

from __future__ import annotations

import math

import fusion_definition as definition
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fusion_cases import CASES, ENGINES, excluding, inputs, kv, randn, replaced
from numerics import assert_no_worse_than_eager, peak_extra_bytes

import mmfast
from mmfast.fusion import Source, direct, op, reference, routes, streamed

HALF = (torch.bfloat16, torch.float16)


def can(engine: str, sources, options) -> bool:
    """Whether the engine takes it without gradients of masks."""
    return engine == "reference" or "softcap" not in options


def attend(engine, query, sources, **options):
    return mmfast.cross_attention(query, sources, backend=engine, **options)


def numpy(query, sources):
    def array(x):
        return x.detach().numpy() if isinstance(x, torch.Tensor) else x

    return array(query), [tuple(map(array, s)) for s in sources]


def flat(result) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else [x for part in result for x in flat(part)]


def finite(x: torch.Tensor) -> torch.Tensor:
    """For finite differences: where a log-sum-exp is −inf, it is whatever moves."""
    return torch.where(x == -torch.inf, 0.0, x)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", CASES)
def test_matches_gold(name, engine):
    query, sources, options = CASES[name]()
    if not can(engine, sources, options):
        pytest.skip("not for this engine")
    expected, lses, weights = definition.attention(*numpy(query, sources), **options)
    out, lse = attend(engine, query, sources, return_lse=True, **options)
    np.testing.assert_allclose(out.numpy(), expected, rtol=1e-12, atol=1e-13)
    lse = (lse,) if isinstance(lse, torch.Tensor) else lse
    assert len(lse) == len(lses)
    for a, b in zip(lse, lses, strict=True):
        np.testing.assert_allclose(a.numpy(), b, rtol=1e-12, atol=1e-13)
    if engine != "torch":
        out, got = attend(engine, query, sources, return_weights=True, **options)
        mean = attend(engine, query, sources, return_weights="mean", **options)[1]
        assert isinstance(got, tuple) and len(got) == len(sources)
        for a, m, b in zip(got, mean, weights, strict=True):
            np.testing.assert_allclose(a.numpy(), b, rtol=1e-12, atol=1e-13)
            np.testing.assert_allclose(m.numpy(), b.mean(1), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", CASES)
def test_default_engine(name, engine):
    """Half the engines' tests would be void if nobody took them."""
    query, sources, options = CASES[name]()
    if can(engine, sources, options):
        torch.testing.assert_close(
            mmfast.cross_attention(query, sources, **options), attend(engine, query, sources, **options)
        )


def gradient_inputs(query, sources, engine):
    """What is differentiated, and a function of it that gives the sources."""
    if engine != "reference":  # without gradients of masks and biases
        tensors = [query, *(x for s in sources for x in (s.key, s.value, s.gate) if isinstance(x, torch.Tensor))]

        def of(given):
            rest = iter(given[1:])
            return given[0], [
                s._replace(
                    key=next(rest), value=next(rest), gate=next(rest) if isinstance(s.gate, torch.Tensor) else s.gate
                )
                for s in sources
            ]
    else:
        tensors = inputs(query, sources)

        def of(given):
            return given[0], replaced(sources, list(given[1:]))

    return [x.detach().clone().requires_grad_() for x in tensors], of


@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", CASES)
def test_gradcheck(name, engine, with_lse):
    query, sources, options = CASES[name]()
    if not can(engine, sources, options):
        pytest.skip("not for this engine")
    tensors, of = gradient_inputs(query, sources, engine)

    def function(*given):
        query, sources = of(given)
        result = attend(engine, query, sources, return_lse=with_lse, **options)
        # gradcheck takes the numbers of the outputs that have a gradient for those of all
        return tuple(finite(x) + 0 * query.sum() for x in flat(result))

    assert torch.autograd.gradcheck(function, tensors, fast_mode=True)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["values_wider", "grouped", "lengths_joint", "bias", "decoupled_gates", "softcap"])
def test_double_backward(name, engine):
    query, sources, options = CASES[name]()
    if not can(engine, sources, options):
        pytest.skip("not for this engine")
    tensors, of = gradient_inputs(query, sources, engine)

    def function(*given):
        query, sources = of(given)
        return tuple(map(finite, flat(attend(engine, query, sources, return_lse=True, **options))))

    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


@pytest.mark.parametrize("engine", [e for e in ENGINES if e != "torch"])
@pytest.mark.parametrize("which", [True, "mean"])
@pytest.mark.parametrize("name", ["bias", "decoupled_gates", "shared_query", "without_keys"])
def test_weights_gradcheck(name, which, engine):
    query, sources, options = CASES[name]()
    tensors, of = gradient_inputs(query, sources, engine)

    def function(*given):
        query, sources = of(given)
        weights = attend(engine, query, sources, return_weights=which, **options)[1]
        return tuple(w + 0 * query.sum() for w in weights)

    assert torch.autograd.gradcheck(function, tensors, fast_mode=True)
    if name == "bias":
        assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


# ---- Against torch


def concatenated(query, sources, dtype=None):
    """scaled_dot_product_attention of all sources side by side."""
    batch = query.shape[0]
    key = torch.cat([s.key.expand(batch, -1, -1, -1) for s in sources], 2)
    value = torch.cat([s.value.expand(batch, -1, -1, -1) for s in sources], 2)
    masks = []
    for s in sources:
        shape = (batch, query.shape[1], query.shape[2], s.key.shape[2])
        mask = torch.zeros(shape, dtype=query.dtype)
        if s.mask is not None:
            mask = torch.where(s.mask, 0.0, -torch.inf).to(query.dtype) if s.mask.dtype == torch.bool else s.mask
        masks.append(mask.expand(shape))
    return key, value, torch.cat(masks, 3)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("mask", [None, "bool", "float", "padding", "causal"])
@pytest.mark.parametrize("heads", [4, 2, 1])
@pytest.mark.parametrize("lengths", [(5, 7), (7, 5), (1, 3), (600, 530), (3, 1030)])
def test_against_sdpa(lengths, heads, mask, scale, engine):
    rows, keys = lengths
    query, (key, value) = randn(2, 4, rows, 8), (randn(2, heads, keys, 8), randn(2, heads, keys, 8))
    given = {
        "bool": torch.rand(2, 1, rows, keys) < 0.5,
        "float": excluding(2, 4, rows, keys),
        "padding": (torch.arange(keys) < torch.tensor([1, keys])[:, None, None, None]).expand(2, 1, 1, keys),
    }.get(mask)
    torch_mask = given
    causal = mask == "causal"
    tensors = [x.requires_grad_() for x in (query, key, value)]
    expected = F.scaled_dot_product_attention(
        *tensors, attn_mask=torch_mask, is_causal=causal, scale=scale, enable_gqa=True
    )
    out = attend(engine, query, [Source(key, value, mask=given)], scale=scale, is_causal=causal)
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-12)
    weight = torch.randn_like(out)
    for a, b in zip(*(torch.autograd.grad(x, tensors, weight) for x in (out, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("count", [1, 3])
def test_accuracy(count, dtype, engine):
    """Output and gradients are no worse than twice what torch makes of the concatenation."""
    query = torch.randn(2, 4, 70, 40).to(dtype)
    lengths = (77, 16, 140)[:count]
    sources = [Source(torch.randn(2, 4, n, 40).to(dtype), torch.randn(2, 4, n, 40).to(dtype)) for n in lengths]
    weight = torch.randn(2, 4, 70, 40).to(dtype)
    results = []
    for name, to in ((engine, dtype), ("eager", dtype), ("gold", torch.float64)):
        tensors = [x.to(to).detach().requires_grad_() for x in inputs(query, sources)]
        given = replaced(sources, tensors[1:])
        if name == engine:
            out = attend(engine, tensors[0], given)
        else:
            key, value, _ = concatenated(tensors[0], given)
            out = F.scaled_dot_product_attention(tensors[0], key, value)
        results.append([out, *torch.autograd.grad(out, tensors, weight.to(to))])
    for i, (out, eager, gold) in enumerate(zip(*results, strict=True)):
        assert_no_worse_than_eager(out, eager, gold, what=f"tensor {i}")


def test_dropout():
    query, key, value = randn(2, 2, 50, 4), randn(2, 2, 40, 4), randn(2, 2, 40, 3)
    sources = [Source(key[:, :, :25], value[:, :, :25]), Source(key[:, :, 25:], value[:, :, 25:])]
    full = torch.cat(mmfast.cross_attention(query, sources, return_weights=True)[1], 3)
    out, lse, weights = mmfast.cross_attention(query, sources, dropout_p=0.3, return_lse=True, return_weights=True)
    weights = torch.cat(weights, 3)
    kept = weights != 0
    torch.testing.assert_close(weights, torch.where(kept, full / 0.7, 0.0))
    assert abs(kept.double().mean() - 0.7) < 0.03
    torch.testing.assert_close(out, weights @ value)
    torch.testing.assert_close(lse, mmfast.cross_attention(query, sources, return_lse=True)[1])
    assert not mmfast.cross_attention(query, sources, dropout_p=1.0).any()


def test_dropout_as_torch():
    """One source drops what scaled_dot_product_attention drops."""
    q, k, v = randn(2, 2, 5, 4), randn(2, 2, 6, 4), randn(2, 2, 6, 4)
    torch.manual_seed(3)
    expected = F.scaled_dot_product_attention(q, k, v, dropout_p=0.4)
    torch.manual_seed(3)
    torch.testing.assert_close(mmfast.cross_attention(q, (k, v), dropout_p=0.4), expected)


# ---- Nothing to attend to


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("how", ["bool", "float", "lengths", "item"])
def test_rows_without_keys(how, engine, dtype):
    query, sources = randn(2, 4, 5, 8).to(dtype), []
    dead = torch.zeros(2, 4, 5, dtype=torch.bool)
    dead[1] = True
    if how != "item" and how != "lengths":
        dead[0, :, 3] = True
        dead[0, 2, 0] = True
    for keys in (6, 3):
        options = {}
        if how == "lengths":
            options["lengths"] = torch.tensor([keys, 0])
        elif how == "item":
            options["mask"] = torch.tensor([True, False])[:, None, None, None]
        else:
            mask = ~dead[..., None] & torch.cat([torch.ones(2, 4, 5, 1), torch.rand(2, 4, 5, keys - 1)], 3).gt(0.5)
            options["mask"] = mask if how == "bool" else torch.where(mask, 0.0, -torch.inf)
        sources.append(Source(randn(2, 4, keys, 8).to(dtype), randn(2, 4, keys, 8).to(dtype), **options))
    tensors = [x.requires_grad_() for x in (query, *(x for s in sources for x in s[:2]))]
    out, lse = attend(engine, query, sources, return_lse=True)
    assert torch.equal(lse == -torch.inf, dead)
    assert not out[dead].any() and out[~dead].all()
    gradients = torch.autograd.grad((out * torch.randn_like(out)).sum() + finite(lse).sum(), tensors)
    assert all(g.isfinite().all() for g in gradients)
    assert not gradients[0][dead].any() and gradients[0][~dead].any()
    assert all(not g[1].any() for g in gradients[1:]), "an item that nobody looks at has a gradient"


@pytest.mark.parametrize("engine", ENGINES)
def test_beyond_the_lengths(engine):
    """What padding holds does not matter, not even to gradients."""
    lengths = torch.tensor([2, 0, 6])
    query, (key, value) = randn(3, 2, 4, 3), (randn(3, 2, 6, 3), randn(3, 2, 6, 3))
    results = []
    for filler in (7.0, torch.nan):
        pads = torch.arange(6)[:, None] >= lengths[:, None, None, None]
        k, v, q = (x.detach().clone() for x in (key, value, query))
        k, v = torch.where(pads, filler, k).requires_grad_(), torch.where(pads, filler, v).requires_grad_()
        q.requires_grad_()
        out = attend(engine, q, [Source(k, v, lengths=lengths)])
        results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


# ---- torch's contracts


OPCHECKED = (
    "three",
    "values_wider",
    "grouped",
    "shared_query",
    "shared_sources",
    "lengths_joint",
    "bias",
    "one_feature",
)


@pytest.mark.native
@pytest.mark.parametrize("name", (*OPCHECKED, "decoupled", "causal_masked"))
def test_opcheck(name, monkeypatch):
    """The operators as they are called for a case."""
    query, sources, options = CASES[name]()
    for x in (query, *(x for s in sources for x in (s.key, s.value, s.gate) if isinstance(x, torch.Tensor))):
        x.requires_grad_()
    forward, backward = torch.ops.mmfast.fusion_forward, torch.ops.mmfast.fusion_backward
    calls = []
    run = op._run
    monkeypatch.setattr(op, "_run", lambda *a: calls.append(op._arguments(*a)) or run(*a))
    attend("cpu", query, sources, **options)
    (arguments,) = calls
    torch.library.opcheck(forward.default, arguments)
    with torch.no_grad():
        out, lse = forward(*arguments)
    grad_out, grad_lse = torch.randn_like(out).requires_grad_(), torch.randn_like(lse).requires_grad_()
    count = 1 + 2 * len(sources)
    for g, need in ((None, [True] * count), (grad_lse, [i % 2 == 0 for i in range(count)])):
        torch.library.opcheck(
            backward.default,
            (grad_out, g, *arguments[:6], out, lse, *arguments[6:], need),
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
        )


@pytest.mark.parametrize("name", OPCHECKED)
def test_opcheck_streamed(name):
    query, sources, _ = CASES[name]()
    masks = [streamed._additive(s, torch.float64) for s in sources]
    keys, values = [s.key.requires_grad_() for s in sources], [s.value.requires_grad_() for s in sources]
    query.requires_grad_()
    masked = sum(1 << i for i, m in enumerate(masks) if m is not None)
    masks = [m for m in masks if m is not None]
    arguments = query, keys, values, masks, masked, False, 0.5
    torch.library.opcheck(torch.ops.mmfast.fusion_streamed_forward.default, arguments)
    with torch.no_grad():
        out, lse = torch.ops.mmfast.fusion_streamed_forward(*arguments)
    grad_out, grad_lse = torch.randn_like(out).requires_grad_(), torch.randn_like(lse).requires_grad_()
    for g in (None, grad_lse):
        torch.library.opcheck(
            torch.ops.mmfast.fusion_streamed_backward.default,
            (grad_out, g, *arguments[:5], out, lse, False, 0.5),
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
        )


@pytest.mark.parametrize(
    "name, compiler",
    [("lengths_joint", "inductor"), ("decoupled_gates", "aot_eager"), ("softcap", "aot_eager"), ("bias", "aot_eager")],
)
def test_compile_fullgraph(name, compiler):
    query, sources, options = CASES[name]()
    tensors = [x.requires_grad_() for x in inputs(query, sources)]

    def function(query, sources):
        return mmfast.cross_attention(query, sources, return_lse=True, **options)

    results = []
    for call in (function, torch.compile(function, fullgraph=True, backend=compiler)):
        result = flat(call(query, sources))
        loss = sum(finite(x).square().sum() for x in result)
        results.append([*result, *torch.autograd.grad(loss, tensors)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_compile_dynamic():
    """One graph for sources of every length."""
    function = torch.compile(
        lambda q, k, v, m: mmfast.cross_attention(q, [Source(k, v, bias=m)]),
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    with torch._dynamo.config.patch(error_on_recompile=True):
        for keys in (5, 9, 30):
            query, (key, value), bias = randn(2, 4, 7, 3), kv(keys), randn(7, keys)
            expected = mmfast.cross_attention(query, [Source(key, value, bias=bias)])
            torch.testing.assert_close(function(query, key, value, bias), expected)


@pytest.mark.parametrize("engine", ENGINES)
def test_autocast(engine):
    """As scaled_dot_product_attention: in the dtype of autocast, also where inputs differ in theirs."""
    query, key, value = torch.randn(2, 2, 5, 8), torch.randn(2, 2, 6, 8).bfloat16(), torch.randn(2, 2, 6, 8)
    mask = torch.randn(5, 6)
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = attend(engine, query, [Source(key, value, mask=mask)], return_lse=True)
        assert F.scaled_dot_product_attention(query, key, value).dtype == out.dtype == torch.bfloat16
    assert lse.dtype == torch.float32
    exact = attend(engine, query.bfloat16(), [Source(key, value.bfloat16(), mask=mask)])
    assert torch.equal(out, exact)
    with torch.autocast("cpu", torch.bfloat16):
        assert attend(engine, query.double(), (key.double(), value.double())).dtype == torch.float64


@pytest.mark.parametrize("engine", ENGINES)
def test_deterministic(engine):
    query, sources = torch.randn(2, 4, 100, 16), [Source(torch.randn(2, 4, 70, 16), torch.randn(2, 4, 70, 16))] * 2
    first = attend(engine, query, sources)
    assert all(torch.equal(first, attend(engine, query, sources)) for _ in range(3))


def test_peak_memory():
    """Neither scores nor a copy of keys and values: not forward, and backward only the gradients themselves."""
    heads, rows, keys, dim = 8, 512, 8192, 64
    query = torch.randn(1, heads, rows, dim)
    sources = [Source(torch.randn(1, heads, keys, dim), torch.randn(1, heads, keys, dim)) for _ in range(2)]
    one_source = heads * keys * dim * 4
    mmfast.cross_attention(query[:, :, :8], sources)
    assert peak_extra_bytes(lambda: mmfast.cross_attention(query, sources)) < 0.5 * one_source
    scores = heads * rows * 2 * keys * 4
    assert peak_extra_bytes(lambda: attend("reference", query, sources)) > scores, "the measure would not see scores"


# ---- Edges


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("fusion", ["joint", "decoupled"])
@pytest.mark.parametrize("shape", [(0, 4, 5, 3), (2, 4, 0, 3), (2, 0, 5, 3)])
def test_edge_shapes(shape, fusion, engine):
    batch, heads = shape[:2]
    query = randn(*shape).requires_grad_()
    source = Source(randn(batch, max(heads, 1), 6, 3).requires_grad_(), randn(batch, max(heads, 1), 6, 2))
    out, lse = attend(engine, query, [source, source], fusion=fusion, return_lse=True)
    assert out.shape == (*shape[:3], 2)
    assert all(x.shape == shape[:3] for x in flat(lse))
    out.sum().backward()
    assert query.grad.shape == query.shape and not source.key.grad.any()


@pytest.mark.parametrize("head_dim", [1, 2, 7, 33, 128, 256])
def test_head_dims(head_dim):
    query, (key, value) = randn(1, 2, 5, head_dim), kv(6, 2, 1, head_dim, head_dim)
    expected = F.scaled_dot_product_attention(query, key, value)
    for engine in ENGINES:
        torch.testing.assert_close(attend(engine, query, (key, value)), expected)


@pytest.mark.parametrize("engine", ENGINES)
def test_not_finite(engine):
    """NaN and infinity come out where torch has them."""
    query, key, value = randn(1, 1, 6, 3), randn(1, 1, 4, 3), randn(1, 1, 4, 3)
    query[0, 0, 1, 0], query[0, 0, 2, 0] = torch.nan, 1e200
    value[0, 0, 3, 1] = torch.inf
    for k, v in ((key, value), (key.index_fill(2, torch.tensor([1]), torch.nan), value), (key * torch.nan, value)):
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            expected = F.scaled_dot_product_attention(query, k, v)
        torch.testing.assert_close(attend(engine, query, (k, v)), expected, equal_nan=True)
        lse = attend(engine, query, (k, v), return_lse=True)[1]
        assert torch.equal(lse.isnan(), expected[..., 0].isnan())
    zero = attend(engine, 0 * query[:, :, :1], (key[:, :, :1], value[:, :, :1]), return_lse=True)
    assert zero[1].item() == 0 and torch.equal(zero[0], value[:, :, :1])


def test_ways_to_write_sources():
    query, (key, value) = randn(2, 4, 5, 3), kv()
    expected = mmfast.cross_attention(query, [Source(key, value)])
    for sources in ((key, value), [(key, value)], Source(key, value), ([key, value],), [key, value]):
        assert torch.equal(mmfast.cross_attention(query, sources), expected)


def test_inputs_are_left_alone():
    query, sources, options = CASES["bias"]()
    before = [x.clone() for x in inputs(query, sources)]
    mmfast.cross_attention(query, sources, **options)
    assert all(torch.equal(a, b) for a, b in zip(before, inputs(query, sources), strict=True))


def when_direct(monkeypatch, record):
    """``record()`` whenever the calls past the operators take an attention."""
    ours = direct.attention

    def attention(*args):
        out = ours(*args)
        if out is not None:
            record()
        return out

    monkeypatch.setattr(direct, "attention", attention)


def test_backends(monkeypatch):
    query, (key, value) = randn(2, 4, 5, 3), kv()
    assert "fusion" in mmfast._backend.info()["ops"]
    with pytest.raises(ValueError, match="backend 'cuda'"):
        attend("cuda", query, (key, value))
    with pytest.raises(ValueError, match="must be one of"):
        attend("fast", query, (key, value))
    for options, reason in (
        ({"dropout_p": 0.5}, "dropout"),
        ({"softcap": 1.0}, "softcap"),
        ({"return_weights": True}, "weights"),
    ):
        with pytest.raises(ValueError, match=f"backend 'torch' has no cross-attention with .*{reason}"):
            attend("torch", query, (key, value), **options)
    biased = Source(key, value, bias=randn(5, 6).requires_grad_())
    with pytest.raises(ValueError, match="gradient of a mask or bias"):
        attend("torch", query, biased)
    calls = []
    for taken in (op, streamed):
        monkeypatch.setattr(taken, "attention", lambda *a, **k: calls.append(1) or reference.attention(*a, **k))
    when_direct(monkeypatch, lambda: calls.append(1))
    attend(None, query, (key, value))
    monkeypatch.setenv("MMFAST_BACKEND", "reference")
    attend(None, query, (key, value))
    assert calls == [1]


@pytest.mark.native
def test_routes(monkeypatch):
    """What the table says is what is called."""
    taken = []
    for name, engine in (("cpu", op), ("torch", streamed)):
        monkeypatch.setattr(
            engine,
            "attention",
            lambda *a, _name=name, **k: taken.append(_name) or reference.attention(*a, **k),
        )
    when_direct(monkeypatch, lambda: taken.append("cpu"))
    few, long = routes.FEW_QUERIES, routes.LONG_KEYS
    for rows, keys, weights, gradients in (
        (few, long, False, False),
        (few, long, True, False),
        (few + 1, long, False, False),
        (few, long - 1, False, False),
        (2, long, False, False),
        (1, long, False, False),
        (1, long, False, True),
    ):
        key = randn(1, 1, keys, 2).requires_grad_(gradients)
        attend(None, randn(1, 1, rows, 2), (key, randn(1, 1, keys, 2)), return_weights=weights, fusion="decoupled")
    half = torch.randn(1, 1, long, 2).bfloat16()
    attend(None, half[:, :, :few], (half, half), fusion="decoupled")
    assert taken == ["torch", "cpu", "cpu", "cpu", "torch", "cpu", "torch", "cpu"]
    taken.clear()
    query, (one, two) = randn(1, 2, few, 2), (randn(1, heads, long, 2) for heads in (1, 2))
    attend(None, query, [(two, two), (two, two)])
    attend(None, query[:, :, : few // 2], [(one, one), (two, two)])
    assert taken == ["cpu", "torch"]


def broken():
    """Arguments that do not fit, each with what the message has to say."""
    q, (k, v) = randn(2, 4, 5, 3), kv()

    def source(**changes):
        return [Source(*changes.pop("kv", (k, v)), **changes)]

    value, kind = ValueError, TypeError
    yield kind, "query must be a tensor, got list", [1], [(k, v)], {}
    yield kind, "query must be float32", q.int(), [(k, v)], {}
    yield value, r"query must be \(B, H, L, D\), got \(4, 5, 3\)", q[0], [(k, v)], {}
    yield value, "query must have at least one feature", q[..., :0], [(k[..., :0], v)], {}
    yield value, "query must have batch 1 or 2, got 3", randn(3, 4, 5, 3)[:3], [(k, v)], {"expect": "batch"}
    yield kind, "sources must be a list", q, 3, {}
    yield value, "at least one source", q, [], {}
    yield kind, r"sources\[0\] must be a Source or a pair", q, [(k, v, v)], {}
    yield kind, r"value of sources\[1\] must be a tensor", q, [(k, v), (k, None)], {}
    yield kind, r"key of sources\[0\] must have the query's dtype", q, [(k.float(), v)], {}
    yield value, r"key of sources\[0\] must have the query's head dim 3, got 2", q, [(k[..., :2], v)], {}
    yield value, r"value of sources\[0\] must have the key's heads and length \(4, 5\)", q, [(k[:, :, :5], v)], {}
    yield (
        value,
        r"value of sources\[1\] must have the head dim of sources\[0\], 3, got 2",
        q,
        [(k, v), (k, v[..., :2])],
        {},
    )
    yield value, "number of heads that divides the query's 4, got 3", q, [(k[:, :3], v[:, :3])], {}
    yield value, "must have at least one feature", q, [(k, v[..., :0])], {}
    yield value, "device", q, [(k.to("meta"), v)], {}
    yield (
        kind,
        r"mask of sources\[0\] must be boolean or floating point, got torch.int64",
        q,
        source(mask=torch.ones(5, 6).long()),
        {},
    )
    yield (
        value,
        r"mask of sources\[0\] must broadcast to \(2, 4, 5, 6\), got \(5, 5\)",
        q,
        source(mask=torch.ones(5, 5)),
        {},
    )
    yield value, "2 to 4 dimensions", q, source(mask=torch.ones(6)), {}
    yield (
        kind,
        r"bias of sources\[0\] must be floating point, got torch.bool",
        q,
        source(bias=torch.ones(5, 6).bool()),
        {},
    )
    yield kind, "lengths of .* int64 or int32 tensor, got torch.float32", q, source(lengths=torch.ones(2)), {}
    yield value, r"lengths of .* must be \(2,\)", q, source(lengths=torch.ones(3).int()), {}
    yield (
        value,
        r"lengths of .* must lie in \[0, 6\], got values from -1 to 7",
        q,
        source(lengths=torch.tensor([-1, 7])),
        {},
    )
    yield value, "gate of .* needs fusion='decoupled'", q, source(gate=0.5), {}
    yield value, r"gate of .* must be \(\), \(4,\)", q, source(gate=randn(3)), {"fusion": "decoupled"}
    yield kind, "gate of .* must be a number", q, source(gate="tanh"), {"fusion": "decoupled"}
    yield value, "fusion must be one of 'joint', 'decoupled', got 'both'", q, [(k, v)], {"fusion": "both"}
    yield value, r"dropout_p must lie in \[0, 1\], got 1.5", q, [(k, v)], {"dropout_p": 1.5}
    yield value, "scale must be finite", q, [(k, v)], {"scale": math.inf}
    yield kind, "scale must be a number", q, [(k, v)], {"scale": "big"}
    yield value, "softcap must be positive, or None, got 0.0", q, [(k, v)], {"softcap": 0}
    yield value, "return_weights must be one of", q, [(k, v)], {"return_weights": "max"}


BROKEN = list(broken())


@pytest.mark.parametrize("number", range(len(BROKEN)))
def test_rejects(number):
    error, message, query, sources, options = BROKEN[number]
    if options.pop("expect", None):
        message = "batch 1 or 3, got 2"  # the first size that is not 1 is the batch
    with pytest.raises(error, match=message):
        mmfast.cross_attention(query, sources, **options)
