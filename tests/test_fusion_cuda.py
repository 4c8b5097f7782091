"""Attention on the GPU: every engine against the reference, graphs, no waiting, compiled, and sdpa where it is sdpa."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from fusion_cases import CASES, inputs, replaced
from numerics import assert_no_worse_than_eager

from mmfast.fusion import Source, attention_pool, cross_attention, reference, routes_cuda
from mmfast.fusion import triton as fused
from mmfast.fusion._inputs import prepare

pytestmark = pytest.mark.cuda

NAMES = [name for name in CASES if name not in ("softcap", "without_any_keys")]
ENGINES = ("short", "split", "skip", "flash", "efficient")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def to_cuda(sources):
    return [Source(*(x.cuda() if isinstance(x, torch.Tensor) else x for x in s)) for s in sources]


def with_gradients(query, sources):
    """Leaves: query, keys, values and gates; masks and biases have no gradient here."""
    of = [query]
    for s in sources:
        of += [s.key, s.value] + ([s.gate] if isinstance(s.gate, torch.Tensor) else [])
    return [x.requires_grad_() for x in of]


def results(engine, query, sources, options, of_out, of_lse):
    of = with_gradients(query, sources)
    result = engine(query, sources, **options)
    lse = torch.stack(result.lses)
    total = (result.out.double() * of_out).sum()
    if of_lse is not None:
        total = total + torch.where(lse == -torch.inf, 0.0, lse.double() * of_lse).sum()
    return [result.out, lse, *torch.autograd.grad(total, of, materialize_grads=True)]


def agrees(engine, query, sources, options, dtype, of_lse=True):
    """Value, log-sum-exp and gradients: no worse than a reference that rounds its intermediates to ``dtype``."""
    options = {"fusion": "joint", "scale": query.shape[3] ** -0.5} | options
    query, sources = prepare(query.cuda(), to_cuda(sources), options["fusion"])
    rounded = [x.to(dtype) for x in inputs(query, sources)]

    def at(kind):
        x = [t.detach().to(kind) for t in rounded]
        return x[0], replaced(sources, x[1:])

    with torch.no_grad():
        plain = reference.attention(*at(torch.float64), **options)
    of_out = torch.randn_like(plain.out).to(dtype).double()
    of_lse = torch.randn_like(torch.stack(plain.lses)) if of_lse else None
    gold = results(reference.attention, *at(torch.float64), options, of_out, of_lse)
    eager = results(reference.attention, *at(dtype), options, of_out, of_lse)

    def ours(query, sources, **options):
        return fused.run(engine, query, sources, **({"is_causal": False} | options))

    got = results(ours, *at(dtype), options, of_out, of_lse)
    # Weights and dS are rounded to the dtype before a product, in every fused kernel.
    floor = {torch.float32: 2e-5, torch.float16: 8e-3, torch.bfloat16: 5e-2}[dtype]
    floors = [floor] * len(gold)
    if engine != "short" and options["fusion"] == "decoupled":
        for at_gate, more in of_gates(*at(torch.float64), options, of_out, gold, torch.finfo(dtype).eps / 2):
            floors[at_gate] += more
    beside = dict(enumerate(of_difference(*at(torch.float64), options, of_out), 2)) if engine == "tiny" else {}
    for i, (x, y, z, allowed) in enumerate(zip(got, eager, gold, floors, strict=True)):
        what = f"{engine}, result {i}"
        assert_no_worse_than_eager(x, y, z, floor=allowed, what=what, rounding=beside.get(i))


def of_difference(query, sources, options, of_out):
    """What float32 leaves in gradients of query and keys where each query has one key and they are zero.

    dS is P (dO V - dO O). With one key O is V; eager mode adds up both products alike, and they cancel. A kernel that
    begins the sum of one with minus the other rounds it at each step, in proportion to what has been added up, at most
    the sum of |dO O|: four units of it for up to 16 features, of either sign, for each query. As dL does, this goes
    into the gradients through the log-sum-exp. To add it at the end is one more instruction of 21 for each pair.
    """
    of = with_gradients(query, sources)
    result = reference.attention(query, sources, **options)
    row = 4 * torch.finfo(torch.float32).eps / 2 * (of_out * result.out.detach()).abs().sum(3)
    row = torch.where(torch.rand_like(row) < 0.5, row, -row)
    lse = torch.stack(result.lses)
    return torch.autograd.grad(torch.where(lse == -torch.inf, 0.0, lse * row).sum(), of[:2])


def of_gates(query, sources, options, of_out, gold, unit):
    """Where gradients of gates are in ``gold``, and what the rounding of the outputs leaves in them, relative to it.

    Every engine but "short" gives the output of each source in the dtype, as calls of scaled_dot_product_attention one
    by one do, and the gradient of its gate is the sum of dO O over all that the gate is broadcast along. The roundings
    of O are of either sign and so in proportion to the root of the sum of squares of these terms, however much of the
    sum they cancel: half a unit roundoff of it in the mean, and as much from weights that are rounded before their
    product. Four units are four times both.
    """
    options, found, i = options | {"fusion": "joint"}, [], 3
    with torch.no_grad():
        for source in sources:
            i += 2
            if isinstance(source.gate, torch.Tensor):
                out = reference.attention(query, [source._replace(gate=None)], **options).out
                terms = (out * of_out).square().sum_to_size(source.gate.shape)
                found.append((i, 4 * unit * (terms.sum() / gold[i].square().sum()).sqrt().item()))
                i += 1
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", NAMES)
def test_matches_gold(name, engine, dtype):
    agrees(engine, *CASES[name](), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [6, 40, 64, 80, 96, 128, (40, 72), (64, 24)])
def test_head_dims(dim, dtype):
    dim, value_dim = dim if isinstance(dim, tuple) else (dim, dim)

    def kv(n):
        return torch.randn(2, 4, n, dim).double(), torch.randn(2, 4, n, value_dim).double()

    sources = [Source(*kv(77), lengths=torch.tensor([77, 9])), Source(*kv(4), gate=torch.randn(4).double())]
    agrees("short", torch.randn(2, 4, 1000, dim).double(), sources, {"fusion": "decoupled"}, dtype)
    sources = [s._replace(gate=None) for s in sources]
    agrees("short", torch.randn(2, 4, 1000, dim).double(), sources, {}, dtype)


needs_tiny = pytest.mark.skipif(not routes_cuda._HAS_TINY, reason="the extension has no kernels for CUDA")


@needs_tiny
@pytest.mark.parametrize("of_lse", [False, True])
@pytest.mark.parametrize("dim", [1, 3, 6, 8, 11, 16, (4, 13), (7, 2)])
@pytest.mark.parametrize("rows, keys", [(32, 1), (50, 50), (129, 513), (500, 500), (300, 1501)])
def test_tiny_heads(rows, keys, dim, of_lse):
    dim, value_dim = dim if isinstance(dim, tuple) else (dim, dim)
    query = torch.randn(3, 5, rows, dim).double()
    source = Source(torch.randn(3, 5, keys, dim).double(), torch.randn(3, 5, keys, value_dim).double())
    agrees("tiny", query, [source], {}, torch.float32, of_lse)
    lengths = torch.tensor([0, keys, keys // 2])
    beyond = (torch.arange(keys) >= lengths[:, None])[:, None, :, None]
    key, value = (x.masked_fill(beyond, torch.nan) for x in source[:2])
    agrees("tiny", query, [Source(key, value, lengths=lengths)], {"scale": -0.7}, torch.float32, of_lse)


@needs_tiny
@pytest.mark.parametrize("key_is", [torch.nan, torch.inf, -torch.inf, 1e12, 400.0])
def test_scores_of_tiny_heads(key_is):
    """What is not finite comes out where the reference has it; scores may be of any size."""
    query, key, value = torch.rand(2, 3, 70, 6) + 0.5, torch.randn(2, 3, 200, 6), torch.randn(2, 3, 200, 6)
    key[0, 1, 150:, 2] = key_is * (1 + torch.arange(50))
    query, key, value = (x.cuda() for x in (query, key, value))
    options = {"fusion": "joint", "scale": 1.0}
    found = fused.run("tiny", query, [Source(key, value)], is_causal=False, **options)
    expected = reference.attention(query, [Source(key, value)], **options)
    torch.testing.assert_close(found.out, expected.out, equal_nan=True, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.lses[0], expected.lses[0], equal_nan=True)


@needs_tiny
def test_tiny_heads_by_recordings():
    """Second calls, which launch what the first ones wrote down, on other values and with other gradients."""
    for turn in range(4):
        query, key, value = (torch.randn(24, 5, 500, 6, device="cuda").requires_grad_() for _ in range(3))
        lengths = torch.randint(0, 501, (24,), device="cuda") if turn % 2 else None
        source = Source(key, value, lengths=lengths)
        assert routes_cuda.choose(query, [source], "joint", lse=True) == "tiny"
        out, lse = cross_attention(query, source, return_lse=True)
        expected, of_lse = cross_attention(query, source, return_lse=True, backend="reference")
        torch.testing.assert_close(out, expected, atol=2e-6, rtol=1e-4)
        torch.testing.assert_close(lse, of_lse, atol=2e-6, rtol=1e-5)
        up = torch.randn_like(out)
        found = torch.autograd.grad(out, (query, key, value), up, create_graph=True)
        wanted = torch.autograd.grad(expected, (query, key, value), up, create_graph=True)
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-3)
        twice = [torch.autograd.grad(sum(x.square().sum() for x in g), query)[0] for g in (found, wanted)]
        torch.testing.assert_close(*twice, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("engine", ["split", "skip", "flash", "efficient", "cudnn"])
@pytest.mark.parametrize("of_lse", [False, True])
def test_long_keys(engine, of_lse):
    def kv(n):
        return torch.randn(2, 2, n, 64).double(), torch.randn(2, 2, n, 64).double()

    sources = [Source(*kv(1501)), Source(*kv(333))]
    agrees(engine, torch.randn(2, 4, 33, 64).double(), sources, {}, torch.bfloat16, of_lse)


@pytest.mark.parametrize("of_lse", [False, True])
@pytest.mark.parametrize("dims", [(64, 64), (24, 80), (128, 128)])
@pytest.mark.parametrize("rows", [1, 7, 16])
def test_split_differentiates(rows, dims, of_lse):
    """Learned queries, one and two splits of a source, grouped heads; keys that the whole batch shares."""
    dim, value_dim = dims

    def kv(n, batch=3):
        return torch.randn(batch, 2, n, dim).double(), torch.randn(batch, 2, n, value_dim).double()

    query = torch.randn(1, 4, rows, dim).double()
    sources = [Source(*kv(257)), Source(*kv(3000), lengths=torch.tensor([3000, 0, 77]))]
    agrees("split", query, sources, {}, torch.float32, of_lse)
    sources = [Source(*kv(257, 1)), Source(*kv(3000, 1), mask=torch.rand(2, 1, 1, 3000) < 0.5)]
    agrees("split", query.expand(2, -1, -1, -1), sources, {"scale": -0.2}, torch.float32, of_lse)


@pytest.mark.parametrize("engine", ["skip", "flash", "efficient"])
@pytest.mark.parametrize("of_lse", [False, True])
@pytest.mark.parametrize("rows", [1, 300])
def test_long_padded_keys(rows, engine, of_lse):
    """Of two sources, one with an item without keys; what lies beyond the lengths is not a number."""
    lengths = torch.tensor([0, 1200, 77])
    key, value = torch.randn(3, 2, 1201, 64).double(), torch.randn(3, 2, 1201, 64).double()
    for x in (key, value):
        x.masked_fill_((torch.arange(1201) >= lengths[:, None])[:, None, :, None], torch.nan)
    query = torch.randn(3, 4, rows, 64).double()
    agrees(engine, query, [Source(key, value, lengths=lengths)], {}, torch.bfloat16, of_lse)
    other = torch.randn(3, 2, 100, 64).double()
    agrees(engine, query, [Source(key, value, lengths=lengths), Source(other, other)], {}, torch.bfloat16, of_lse)


@pytest.mark.parametrize("kind", ["boolean", "lowest"])
@pytest.mark.parametrize("dim", [64, 80, 128])
def test_skipped_tiles(dim, kind):
    """As of images in a prompt: the first queries see all keys, the others those of their own image."""
    may = torch.zeros(2, 1, 500, 1700, dtype=torch.bool)
    may[:, :, :3], may[0, :, 3:200, :801], may[0, :, 200:, 801:1602], may[1, :, 3:, :401] = True, True, True, True
    mask = may if kind == "boolean" else torch.zeros(may.shape).masked_fill(~may, torch.finfo(torch.bfloat16).min)
    key, value = torch.randn(2, 2, 1700, dim).double(), torch.randn(2, 2, 1700, dim).double()
    query = torch.randn(2, 4, 500, dim).double()
    agrees("skip", query, [Source(key, value, mask=mask.double() if kind == "lowest" else mask)], {}, torch.bfloat16)


@pytest.mark.parametrize("of_lse", [False, True])
@pytest.mark.parametrize("dim", [64, 80, 128, (128, 64)])
@pytest.mark.parametrize("rows", [40, 256, 500])
def test_skip_differentiates(rows, dim, of_lse):
    """Grouped heads, a mask of each head, keys and values that the batch shares, a bias, lengths, causality."""
    dim, value_dim = dim if isinstance(dim, tuple) else (dim, dim)

    def kv(n, batch=2, heads=2):
        return torch.randn(batch, heads, n, dim).double(), torch.randn(batch, heads, n, value_dim).double()

    query = torch.randn(2, 4, rows, dim).double()
    may = torch.rand(2, 4, rows, 700) < 0.9
    may[:, :2, :, :300], may[:, :, 7] = True, False
    lengths, bias = torch.tensor([0, 201]), torch.randn(1, 4, 1, 333).double()
    masked = [Source(*kv(700), mask=may), Source(*kv(333, 1), bias=bias), Source(*kv(260, 2, 4), lengths=lengths)]
    agrees("skip", query, masked, {}, torch.bfloat16, of_lse)
    shared = Source(kv(700)[0], kv(700, 1)[1])
    agrees("skip", query[:1], [shared, Source(*kv(128, 1))], {"is_causal": True}, torch.float16, of_lse)
    agrees("skip", query, [shared._replace(mask=may), Source(*kv(1))], {"scale": -0.1}, torch.float16, of_lse)


def test_skip_has_the_same_bits():
    query, sources, options = several()
    up = torch.randn_like(query)
    of = [query, *(s.key for s in sources)]
    assert routes_cuda.choose(query, sources, "joint", lse=False) == "skip"
    found = [torch.autograd.grad(cross_attention(query, sources, **options), of, up) for _ in range(3)]
    assert all(torch.equal(a, b) for again in found[1:] for a, b in zip(found[0], again, strict=True))


# ---- The public function


def bf16(*shape, requires_grad=True):
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16).requires_grad_(requires_grad)


def adapter(requires_grad=True):
    query = bf16(2, 8, 1024, 40, requires_grad=requires_grad)
    text, image = (bf16(2, 8, n, 40, requires_grad=requires_grad) for n in (77, 4))
    gate = torch.full((8,), 0.6, device="cuda", requires_grad=requires_grad)
    return query, [Source(text, text), Source(image, image, gate=gate)], {"fusion": "decoupled"}


def few_queries(requires_grad=True):
    query = bf16(2, 8, 5, 64, requires_grad=requires_grad)
    audio = bf16(2, 8, 1500, 64, requires_grad=requires_grad)
    return query, [Source(audio, audio, lengths=torch.tensor([1500, 7], device="cuda"))], {}


def learned_queries(requires_grad=True):
    query = torch.randn(1, 12, 32, 64, device="cuda").requires_grad_(requires_grad)
    image = torch.randn(4, 257, 12, 64, device="cuda").transpose(1, 2).requires_grad_(requires_grad)
    return query, [Source(image, image)], {}


def several(requires_grad=True):
    query = bf16(2, 8, 300, 64, requires_grad=requires_grad)
    sources = [bf16(2, 8, n, 64, requires_grad=requires_grad) for n in (700, 333)]
    return query, [Source(x, x) for x in sources], {}


def padded(requires_grad=True):
    query = bf16(2, 8, 300, 64, requires_grad=requires_grad)
    image = bf16(2, 2, 1500, 64, requires_grad=requires_grad)
    return query, [Source(image, image, lengths=torch.tensor([700, 1500], device="cuda"))], {}


def masked(requires_grad=True):
    query, sources, options = padded(requires_grad)
    mask = torch.rand(2, 1, 300, 1500, device="cuda") < 0.5
    return query, [sources[0]._replace(mask=mask, lengths=None)], options


def tiny(requires_grad=True):
    query = torch.randn(4, 5, 500, 6, device="cuda").requires_grad_(requires_grad)
    text = torch.randn(4, 5, 400, 6, device="cuda").requires_grad_(requires_grad)
    return query, [Source(text, text, lengths=torch.tensor([400, 0, 7, 399], device="cuda"))], {}


BUILDS = (adapter, few_queries, learned_queries, several, padded, masked, tiny)


def step(query, sources, options):
    out = cross_attention(query, sources, **options)
    return (out.detach(), *torch.autograd.grad(out.sum(), [query, sources[0].key]))


@pytest.mark.parametrize("build", BUILDS)
def test_no_waiting(build):
    args = build()
    step(*args)  # kernels are compiled
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(*args)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("build", BUILDS)
def test_same_bits(build):
    torch.use_deterministic_algorithms(True)
    args = build()
    first = step(*args)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, step(*args), strict=True))


@pytest.mark.parametrize("build", BUILDS)
def test_graph(build):
    torch.use_deterministic_algorithms(True)  # else torch's flash adds up dQ in any order, and the last bit differs
    args = build()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(*args)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(*args)
    with torch.no_grad():
        args[0].copy_(torch.randn_like(args[0]))
    graph.replay()
    torch.testing.assert_close(captured, step(*args))


@pytest.mark.parametrize("build", BUILDS)
def test_compile_fullgraph(build):
    query, sources, options = build()
    compiled = torch.compile(lambda q, s: cross_attention(q, s, **options), fullgraph=True)
    torch.testing.assert_close(compiled(query, sources), cross_attention(query, sources, **options))


def test_autocast():
    query, sources, options = adapter(requires_grad=False)
    as_float = [s._replace(key=s.key.float(), value=s.value.float()) for s in sources]
    with torch.autocast("cuda", torch.bfloat16):
        out = cross_attention(query.float(), as_float, **options)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, cross_attention(query, sources, **options))


def test_sdpa_is_sdpa():
    query, key = bf16(2, 8, 2000, 64), bf16(2, 8, 3000, 64)
    assert routes_cuda.choose(query, [Source(key, key)], "joint", lse=False) == "sdpa"
    out = cross_attention(query, [(key, key)])
    assert torch.equal(out, F.scaled_dot_product_attention(query, key, key))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gated_sdpa(dtype):
    """Of one long source and a learned gate, by calls that are known too; in float16 products may leave its range."""
    query, key = (torch.randn(1, 8, n, 64, device="cuda", dtype=dtype).requires_grad_() for n in (126, 6144))
    gate = torch.full((1, 8, 1, 1), 0.5, device="cuda", dtype=dtype).requires_grad_()
    up = torch.randn_like(query)
    of = (query, key, gate)
    for _ in range(3):
        out = cross_attention(query, Source(key, key, gate=gate), fusion="decoupled")
        found = torch.autograd.grad(out, of, up)
        wide = [x.detach().double().requires_grad_() for x in of]
        plain = F.scaled_dot_product_attention(wide[0], wide[1], wide[1]) * wide[2]
        gold = torch.autograd.grad(plain, wide, up.double())
        for x, y in zip(found, gold, strict=True):
            assert (x - y).norm() <= (1e-4 if dtype == torch.float32 else 3e-2) * y.norm()
    one_node = "MulBackward0" if dtype != torch.float16 else "Gated"
    assert one_node in out.grad_fn.name()


def test_mean_weights_and_pool():
    query, sources, options = adapter(requires_grad=False)
    _, weights = cross_attention(query, sources, **options, return_weights="mean")
    _, expected = cross_attention(query, sources, **options, return_weights="mean", backend="reference")
    torch.testing.assert_close(weights, expected, atol=2e-3, rtol=2e-2)
    lengths = torch.tensor([1024, 3], device="cuda")
    pooled = attention_pool(query, sources, query_lengths=lengths, **options)
    expected = attention_pool(query, sources, query_lengths=lengths, **options, backend="reference")
    torch.testing.assert_close(pooled, expected, atol=2e-3, rtol=2e-2)


def test_offsets_beyond_32_bits():
    """Queries that lie more than 2**31 elements into their storage and apart."""
    if torch.cuda.get_device_properties(0).total_memory < 40 * 2**30:
        pytest.skip("needs 40 GB")
    query = torch.empty(3, 1, 2**30 // 16 + 5, 16, device="cuda", dtype=torch.bfloat16)
    query[2] = torch.randn(query.shape[1:], device="cuda", dtype=torch.bfloat16)
    query[:2] = 0
    key = bf16(1, 1, 20, 16, requires_grad=False)
    out = fused.short(query, [Source(key, key)], fusion="joint", scale=0.25).out
    tail = reference.attention(query[2:, :, -40:], [Source(key, key)], fusion="joint", scale=0.25).out
    torch.testing.assert_close(out[2:, :, -40:], tail, atol=2e-2, rtol=2e-2)
