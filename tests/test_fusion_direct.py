"""Attention past the checks and operators of Python: the same as by them, or left to them; and vmap."""

import re
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

import mmfast
from mmfast.fusion import Source, direct

pytestmark = pytest.mark.native


def _attend(query, sources, fusion="joint", scale=None, causal=False, lse=False, weights=False, **changes):
    """`direct.attention`, with arguments of `mmfast.cross_attention` in ``changes``."""
    given = {"dropout_p": 0.0, "softcap": None, "return_lse": lse, "return_weights": weights, "backend": None}
    return direct.attention(query, sources, fusion, scale, causal, *(given | changes).values())


def _tensors(dtype=torch.float32, batches=(2, 2), heads=(4, 4), lengths=(5, 7), dims=(16, 24), requires_grad=False):
    tensors = [torch.randn(batches[0], heads[0], lengths[0], dims[0])]
    tensors += [torch.randn(batches[1], heads[1], n, d) for n in lengths[1:] for d in dims]
    return [x.to(dtype).requires_grad_(requires_grad) for x in tensors]


def _pairs(tensors):
    return list(zip(tensors[1::2], tensors[2::2], strict=True))


CASES = {
    "one": {},
    "float64": {"dtype": torch.float64},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
    "grouped": {"heads": (4, 2)},
    "shared query": {"batches": (1, 3)},
    "shared sources": {"batches": (3, 1), "lengths": (5, 7, 9)},
    "three": {"lengths": (70, 7, 130, 1)},
}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("name", CASES)
def test_as_by_the_operators(name, scale, causal, monkeypatch):
    """The same bits: outputs, and gradients of all inputs."""
    tensors = _tensors(**CASES[name], requires_grad=True)
    assert _attend(tensors[0], _pairs(tensors), "joint", scale, causal) is not None
    results = []
    for way in ("direct", "operators"):
        if way == "operators":
            monkeypatch.setattr(direct, "attention", lambda *args: None)
            monkeypatch.setattr("mmfast.fusion.op.is_plain", lambda tensors: False)
        out = mmfast.cross_attention(tensors[0], _pairs(tensors), scale=scale, is_causal=causal)
        with torch.no_grad():
            again = mmfast.cross_attention(tensors[0], _pairs(tensors), scale=scale, is_causal=causal)
        results.append([out, again, *torch.autograd.grad(out, tensors, torch.ones_like(out))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert torch.equal(*results[0][:2]) and results[0][0].stride() == results[1][0].stride()


def _more(name, tensors, dtype=torch.float32):
    """Sources with what is beside keys and values, and the gates that are to have gradients."""
    (k, v), (k2, v2) = _pairs(tensors)
    mask = torch.rand(2, 1, 5, 7) < 0.6
    mask[0, 0, 1] = False
    gates = [torch.rand(4), torch.rand(2, 1, 5, 1), torch.tensor(0.3)]
    gates = [x.to(dtype).requires_grad_() for x in gates]
    sources = {
        "mask": [Source(k, v, mask=mask), (k2, v2)],
        "two dimensions": [Source(k, v, mask=torch.randn(5, 7)), Source(k2, v2, bias=torch.randn(4, 1, 9))],
        "half": [Source(k, v, mask=torch.randn(5, 7).half()), Source(k2, v2, bias=torch.randn(5, 9).bfloat16())],
        "lengths": [Source(k, v, lengths=torch.tensor([7, 0])), Source(k2, v2, lengths=torch.tensor([0, 4]).int())],
        "all": [Source(k, v, mask, torch.tensor([3, 7])[[1, 0]], torch.randn(2, 4, 5, 7), 0.5), (k2, v2)],
        "gate a head": [Source(k, v, gate=gates[0]), (k2, v2)],
        "gate a query": [(k, v), Source(k2, v2, lengths=torch.tensor([9, 2]), gate=gates[1])],
        "gate": [Source(k, v, mask=mask, gate=gates[2]), Source(k2, v2, gate=-2.0)],
    }[name]
    return sources, [x for x in gates if any(x is s[5] for s in sources if len(s) > 2)]


@pytest.mark.parametrize("return_weights", [False, True, "mean"])
@pytest.mark.parametrize(
    ("name", "fusion"),
    [
        *((name, "joint") for name in ("mask", "two dimensions", "half", "lengths")),
        *((name, "decoupled") for name in ("mask", "half", "lengths", "all", "gate a head", "gate a query", "gate")),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whatever_belongs_to_a_source(name, fusion, dtype, return_weights, monkeypatch):
    """The same bits as by the operators: outputs, log-sum-exps, weights, and gradients through each of them."""
    heads = (4, 2) if name == "half" else (4, 4)
    tensors = _tensors(dtype, heads=heads, lengths=(5, 7, 9), requires_grad=True)
    sources, gates = _more(name, tensors, torch.float32 if name == "gate a head" else dtype)
    options = {"fusion": fusion, "return_lse": True, "return_weights": return_weights}
    assert _attend(tensors[0], sources, fusion, None, False, True, return_weights) is not None
    results = []
    for way in ("direct", "operators"):
        if way == "operators":
            monkeypatch.setattr(direct, "attention", lambda *args: None)
            monkeypatch.setattr("mmfast.fusion.op.is_plain", lambda tensors: False)
        out, lse, *weights = mmfast.cross_attention(tensors[0], sources, **options)
        outputs = [out, *([lse] if fusion == "joint" else lse), *(weights[0] if weights else ())]
        with torch.no_grad():
            out, lse, *weights = mmfast.cross_attention(tensors[0], sources, **options)
        again = [out, *([lse] if fusion == "joint" else lse), *(weights[0] if weights else ())]
        upstream = [torch.linspace(-1, 1, x.numel()).view(x.shape).to(x.dtype) for x in outputs]
        grads = torch.autograd.grad(outputs[:1], [*tensors, *gates], upstream[:1], retain_graph=True)
        through = torch.autograd.grad(outputs[1:], tensors[:2], upstream[1:])
        results.append([*outputs, *again, *grads, *through])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    n = len(outputs)
    assert all(torch.equal(a, b) for a, b in zip(results[0][:n], results[0][n : 2 * n], strict=True))


def test_second_derivatives_of_gates_lses_and_weights():
    tensors = _tensors(torch.float64, batches=(1, 2), heads=(2, 2), lengths=(3, 4, 2), dims=(3, 2), requires_grad=True)
    gate = torch.rand(2, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(3, 4) < 0.7

    def attend(query, k, v, k2, v2, gate):
        sources = [Source(k, v, mask=mask, gate=gate), Source(k2, v2, lengths=torch.tensor([2, 1]))]
        out, lses, weights = mmfast.cross_attention(
            query, sources, fusion="decoupled", return_lse=True, return_weights=True
        )
        return out, *(x.clamp(min=-9) for x in lses), *weights

    assert torch.autograd.gradgradcheck(attend, [*tensors, gate])


def test_ways_to_write_sources():
    query, key, value = _tensors()
    for sources in ((key, value), [(key, value)], ([key, value],), Source(key, value), [Source(key, value)]):
        assert _attend(query, sources, "joint", None, False) is not None


def test_sources_are_made_as_named_tuples_are():
    """Calls of `Source` go past its ``__new__``, which says what is wrong with those that fit no source."""
    key, value, gate = torch.zeros(1), object(), object()
    for positional, named in (
        ((key, value), {}),
        ((key, value, None, None, None, gate), {}),
        ((key, value), {"gate": gate, "bias": 1}),
        ((key,), {"lengths": 2, "value": value, "".join(["ma", "sk"]): gate}),  # a name that is not interned
        ((), {"value": value, "key": key}),
    ):
        made, expected = Source(*positional, **named), Source.__new__(Source, *positional, **named)
        assert type(made) is Source and all(a is b for a, b in zip(made, expected, strict=True))
    for positional, named in (
        ((key,), {}),
        ((), {"key": key, "gate": gate}),
        ((key, value), {"key": key}),
        ((key, value), {"scale": 1}),
        ((1, 2, 3, 4, 5, 6, 7), {}),
    ):
        with pytest.raises(TypeError) as error:
            Source.__new__(Source, *positional, **named)
        with pytest.raises(TypeError, match=re.escape(str(error.value))):
            Source(*positional, **named)


def test_sources_let_go_of_what_they_hold():
    part, before = object(), sys.getrefcount(Source)
    for _ in range(1000):
        Source(part, part, gate=part)
        with pytest.raises(TypeError):
            Source(part, gate=part)
    assert sys.getrefcount(part) == 2 and abs(sys.getrefcount(Source) - before) < 100


def test_second_derivatives():
    tensors = _tensors(torch.float64, lengths=(3, 4, 2), dims=(3, 2), requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda *x: mmfast.cross_attention(x[0], _pairs(x)), tensors)


def test_batched_gradients():
    tensors = _tensors(requires_grad=True)
    out = mmfast.cross_attention(tensors[0], _pairs(tensors))
    upstream = torch.randn(3, *out.shape)
    together = torch.autograd.grad(out, tensors, upstream, is_grads_batched=True, retain_graph=True)
    for i, one in enumerate(upstream):
        for a, b in zip(together, torch.autograd.grad(out, tensors, one, retain_graph=True), strict=True):
            torch.testing.assert_close(a[i], b)


def _decoupled(query, key, value, other, other_value, mask, gate, lengths):
    sources = [Source(key, value, mask=mask), Source(other, other_value, lengths=lengths, gate=gate)]
    results = mmfast.cross_attention(query, sources, fusion="decoupled", return_lse=True, return_weights="mean")
    return [results[0], *results[1], *results[2]]


@pytest.mark.parametrize("batched", [(0,) * 8, (0, None, None, 0, 0, None, 0, None), (None,) * 4 + (1, 0, None, 0)])
def test_vmap(batched):
    """Any arguments batched, also those in lists of their own, on any axis: as one call after the other."""
    tensors = [*_tensors(lengths=(5, 7, 3)), torch.rand(2, 1, 5, 7) < 0.7, torch.rand(1, 4, 1, 1), torch.tensor([3, 0])]
    inputs = [
        x if axis is None else torch.stack([x, x.flip(0), x.roll(1, -1)], axis)
        for x, axis in zip(tensors, batched, strict=True)
    ]
    together = torch.func.vmap(_decoupled, in_dims=batched)(*inputs)
    for i in range(3):
        one = [x if axis is None else x.select(axis, i) for x, axis in zip(inputs, batched, strict=True)]
        for a, b in zip(together, _decoupled(*one), strict=True):
            torch.testing.assert_close(a[i], b)


def test_vmap_of_tracked_tensors():
    tensors = [torch.stack([x, 2 * x]).requires_grad_() for x in _tensors()]
    out = torch.func.vmap(lambda *x: mmfast.cross_attention(x[0], _pairs(x)))(*tensors)
    grads = torch.autograd.grad(out.sum(), tensors)
    alone = [x.detach()[1].requires_grad_() for x in tensors]
    expected = torch.autograd.grad(mmfast.cross_attention(alone[0], _pairs(alone)).sum(), alone)
    for a, b in zip(grads, expected, strict=True):
        torch.testing.assert_close(a[1], b)


def test_batched_gradients_of_lses_and_gates():
    tensors = [x.requires_grad_() for x in (*_tensors(lengths=(5, 7, 3)), torch.rand(1, 4, 1, 1))]
    results = _decoupled(*tensors[:5], torch.rand(2, 1, 5, 7) < 0.7, tensors[5], torch.tensor([3, 1]))[:3]
    upstream = [torch.randn(3, *x.shape) for x in results]
    together = torch.autograd.grad(results, tensors, upstream, is_grads_batched=True, retain_graph=True)
    for i in range(3):
        one = torch.autograd.grad(results, tensors, [x[i] for x in upstream], retain_graph=True)
        for a, b in zip(together, one, strict=True):
            torch.testing.assert_close(a[i], b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_batched_gradients_are_differentiated_on(backend):
    tensors = _tensors(torch.float64, lengths=(3, 4), dims=(3, 2), requires_grad=True)
    out = mmfast.cross_attention(tensors[0], _pairs(tensors), backend=backend)
    upstream = torch.randn(2, *out.shape, dtype=torch.float64)
    together = torch.autograd.grad(out, tensors, upstream, is_grads_batched=True, create_graph=True)
    alone = [torch.autograd.grad(out, tensors, one, create_graph=True) for one in upstream]
    second = torch.autograd.grad(sum(x.square().sum() for x in together), tensors, retain_graph=True)
    expected = torch.autograd.grad(sum(x.square().sum() for one in alone for x in one), tensors)
    for a, b in zip(second, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", [None, "torch"])
def test_few_queries_of_long_sources(backend):
    """Where flash attention is taken, source by source: a batch of gradients, and vmap, which it leaves to others."""
    tensors = [x.requires_grad_() for x in _tensors(lengths=(4, 600))]
    sources = [Source(*tensors[1:], mask=torch.rand(2, 1, 4, 600) < 0.8)]
    out, (lse,) = mmfast.cross_attention(tensors[0], sources, fusion="decoupled", return_lse=True, backend=backend)
    upstream = [torch.randn(3, *x.shape) for x in (out, lse)]
    together = torch.autograd.grad([out, lse], tensors, upstream, is_grads_batched=True, retain_graph=True)
    for i in range(3):
        one = torch.autograd.grad([out, lse], tensors, [x[i] for x in upstream], retain_graph=True)
        for a, b in zip(together, one, strict=True):
            torch.testing.assert_close(a[i], b, rtol=1e-4, atol=1e-5)
    queries = torch.stack([tensors[0], 2 * tensors[0]]).detach()

    def run(query):
        return mmfast.cross_attention(query, sources, fusion="decoupled", backend=backend)

    with torch.no_grad():
        torch.testing.assert_close(torch.func.vmap(run)(queries), torch.stack([run(q) for q in queries]))


def test_some_inputs_tracked():
    for i in range(3):
        tensors = _tensors()
        tensors[i].requires_grad_()
        out = mmfast.cross_attention(tensors[0], _pairs(tensors))
        out.sum().backward()
        assert [x.grad is not None for x in tensors] == [j == i for j in range(3)]


def test_the_output_may_be_written_to():
    tensors = _tensors(requires_grad=True)
    out = mmfast.cross_attention(tensors[0], _pairs(tensors))
    assert not out._is_view()
    expected = torch.autograd.grad((2 * out + 1).sum(), tensors, retain_graph=True)
    out = mmfast.cross_attention(tensors[0], _pairs(tensors))
    written = out.mul_(2).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        written.sum().backward()  # as after any operator that needs its output
    with torch.no_grad():
        mmfast.cross_attention(tensors[0], _pairs(tensors)).add_(1)
    assert all(x.isfinite().all() for x in expected)


def test_inputs_written_to_are_noticed():
    tensors = _tensors(requires_grad=True)
    out = mmfast.cross_attention(tensors[0], _pairs(tensors))
    with torch.no_grad():
        tensors[1].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_saved_tensors_are_packed_once():
    tensors, packed, unpacked = _tensors(requires_grad=True), [], []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: packed.append(x) or x, lambda x: unpacked.append(x) or x):
        out = mmfast.cross_attention(tensors[0], _pairs(tensors))
    out.sum().backward()
    assert len(packed) == len(unpacked) == 5  # query, key, value, output and log-sum-exp


class _Subclass(torch.Tensor):
    pass


@pytest.mark.parametrize(
    "what",
    ["rank", "features", "heads", "dtype", "batch", "empty", "scale", "subclass", "nested", "meta", "negative"],
)
def test_left_to_others(what):
    query, key, value = _tensors()
    source, scale = (key, value), None
    if what == "rank":
        query = query[0]
    elif what == "features":
        query = query[..., :8]
    elif what == "heads":
        query = query[:, :3]
    elif what == "dtype":
        query = query.double()
    elif what == "batch":
        query = query.repeat(2, 1, 1, 1)
    elif what == "empty":
        source = key[:, :, :0], value[:, :, :0]
    elif what == "scale":
        scale = float("nan")
    elif what == "subclass":
        query = query.as_subclass(_Subclass)
    elif what == "nested":
        query = torch.nested.nested_tensor([query[0], query[1]])
    elif what == "meta":
        query, source = query.to("meta"), (key.to("meta"), value.to("meta"))
    elif what == "negative":
        source = key, torch._neg_view(value)
    assert _attend(query, [source], "joint", scale, False) is None


WRONG = {
    "mask": [
        torch.ones(5, 6),
        torch.ones(7),
        torch.ones(1, 1, 1, 5, 7),
        torch.ones(5, 7).long(),
        torch.ones(3, 1, 5, 7),
        torch.ones(5, 7, requires_grad=True),
        torch.ones(5, 7).as_subclass(_Subclass),
        torch.ones(5, 7, device="meta"),
        torch._neg_view(torch.ones(5, 7)),
        [[1.0] * 7] * 5,
    ],
    "bias": [torch.ones(5, 7) > 0, torch.ones(5, 6), torch.ones(5, 7, requires_grad=True)],
    "lengths": [
        torch.tensor([1, 8]),
        torch.tensor([-1, 7]),
        torch.tensor([7]),
        torch.tensor([[1, 7]]),
        torch.tensor([1.0, 7.0]),
        torch.tensor([1, 7], device="meta"),
        [1, 7],
    ],
    "gate": [
        torch.ones(3),
        torch.ones(2, 4, 5, 24),
        torch.ones(4, 1),
        torch.ones(4).long(),
        float("inf"),
        True,
        "1",
        torch.ones(4).as_subclass(_Subclass),
    ],
}


@pytest.mark.parametrize(("name", "i"), [(name, i) for name, wrong in WRONG.items() for i in range(len(wrong))])
def test_left_to_others_of_a_source(name, i):
    query, key, value = _tensors()
    source = Source(key, value)._replace(**{name: WRONG[name][i]})
    assert _attend(query, [source], "decoupled", None, False) is None
    assert _attend(query, [Source(key, value)], "decoupled", None, False) is not None


def test_left_to_others_together():
    query, key, value = _tensors()
    gate = Source(key, value, gate=torch.ones(4))
    assert _attend(query, [gate], "joint", None, False) is None  # an error of others
    assert _attend(query, [(key, value), (key[:, :2], value[:, :2])], "joint", None, False) is None
    assert _attend(query, [(key, value), (key[:, :2], value[:, :2])], "decoupled", None, False) is not None
    long = [torch.randn(2, 4, 505, x.shape[3]) for x in (key, value)]
    assert _attend(query, [(key, value), long], "decoupled", None, False) is None
    assert _attend(query, [(key, value), long], "joint", None, False) is not None
    assert _attend(query, [], "joint", None, False) is None
    assert _attend(query, [(key, value)] * 17, "joint", None, False) is None


@pytest.mark.parametrize("fusion", ["joint", "decoupled"])
def test_what_is_returned(fusion):
    """In the form that `mmfast.cross_attention` has when others return it."""

    def form(x):
        return type(x), tuple(map(form, x)) if isinstance(x, tuple) else (x.shape, x.dtype, x.requires_grad)

    query, key, value = _tensors(requires_grad=True)
    sources = [(key, value), Source(key, value)]
    for lse in (False, True, 1):
        for weights in (False, True, "mean"):
            ours = _attend(query, sources, fusion, lse=lse, weights=weights)
            expected = mmfast.cross_attention(
                query, sources, fusion=fusion, return_lse=lse, return_weights=weights, backend="reference"
            )
            assert form(ours) == form(expected)


@pytest.mark.parametrize(
    "changes",
    [
        {"dropout_p": 0.1},
        {"dropout_p": 0},
        {"dropout_p": "0"},
        {"softcap": 2.0},
        {"return_weights": "all"},
        {"return_weights": 1},
        {"backend": "cpu"},
        {"backend": "triton"},
        {"backend": 3},
    ],
)
def test_left_to_others_for_options(changes):
    query, key, value = _tensors()
    assert _attend(query, [(key, value)]) is not None
    assert _attend(query, [(key, value)], **changes) is None
    for fusion in ("other", None, "join"):
        assert _attend(query, [(key, value)], fusion) is None


def test_errors_of_arguments_are_told():
    query, key, value = _tensors()
    with pytest.raises(RuntimeError, match="Boolean value of Tensor with more than one value is ambiguous"):
        mmfast.cross_attention(query, (key, value), return_lse=torch.ones(2))
    with pytest.raises(TypeError, match="all arguments"):
        direct.attention(query, (key, value))


@pytest.mark.parametrize("where", ["environment", "autocast", "vmap", "grad", "dual", "fake"])
def test_left_to_others_where(where, monkeypatch):
    query, key, value = _tensors()
    seen = []

    def attend(query):
        seen.append(_attend(query, [(key, value)]))
        return query.sum()

    if where == "environment":
        monkeypatch.setenv("MMFAST_BACKEND", "reference")
        attend(query)
    elif where == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            attend(query)
            assert mmfast.cross_attention(query, [(key, value)]).dtype == torch.bfloat16
    elif where == "vmap":
        torch.func.vmap(attend)(query[None])
    elif where == "grad":
        torch.func.grad(attend)(query)
    elif where == "dual":
        with forward_ad.dual_level():
            attend(forward_ad.make_dual(query, query))
    else:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            attend(mode.from_tensor(query))
    assert seen == [None]
