"""Attention to long sources one by one, merged: on the CPU by its flash kernel, as on the GPU by those of the GPU."""

from __future__ import annotations

import itertools

import pytest
import torch
from fusion_cases import CASES, inputs, replaced

from mmfast.fusion import merged, reference, routes_cuda, triton_direct
from mmfast.fusion import triton as fused
from mmfast.fusion._inputs import Source, prepare


def by_cpu(query, sources, **options):
    return fused.long(query, sources, engine="cpu", **options)


def results(engine, query, sources, options, of_lse):
    of = [query, *(x for s in sources for x in (s.key, s.value) + ((s.gate,) if torch.is_tensor(s.gate) else ()))]
    of = [x.requires_grad_() for x in of]
    result = engine(query, sources, **options)
    lse = torch.stack(result.lses)
    total = (result.out.double() * torch.linspace(-1, 1, result.out.numel()).view(result.out.shape)).sum()
    if of_lse:
        total = total + torch.where(lse == -torch.inf, 0.0, lse).double().square().sum()
    return [result.out, lse.nan_to_num(neginf=-7), *torch.autograd.grad(total, of, materialize_grads=True)]


@pytest.mark.parametrize("of_lse", [False, True])
@pytest.mark.parametrize("name", [name for name in CASES if name not in ("softcap", "without_any_keys")])
def test_matches_gold(name, of_lse):
    query, sources, options = CASES[name]()
    options = {"fusion": "joint", "scale": query.shape[3] ** -0.5} | options
    query, sources = prepare(query, sources, options["fusion"])
    rounded = [x.float() for x in inputs(query, sources)]
    got = results(by_cpu, rounded[0], replaced(sources, rounded[1:]), options, of_lse)
    gold = [x.double() for x in rounded]
    expected = results(reference.attention, gold[0], replaced(sources, gold[1:]), options, of_lse)
    for x, gold in zip(got, expected, strict=True):
        torch.testing.assert_close(x.double(), gold, atol=5e-6, rtol=1e-5)


def sequences(cum_q, cum_k):
    """Slices of the queries and keys of each sequence, which cover everything."""
    of = [[slice(a, b) for a, b in itertools.pairwise(x.tolist())] for x in (cum_q, cum_k)]
    return zip(*of, strict=True)


def weights_of(q, k, scale):
    """Scores ``(H, L, S)``, with the keys of each head."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    return torch.einsum("ihd,jhd->hij", q * scale, k), k


class Flash:
    """torch's flash kernels of sequences that lie behind each other, on the CPU: what they write, and nothing else."""

    @staticmethod
    def _flash_attention_forward(q, k, v, cum_q, cum_k, max_q, max_k, dropout, causal, debug, *, scale):
        assert not dropout and not causal and q.shape[2] == k.shape[2] == v.shape[2] and q.shape[2] % 8 == 0
        assert scale > 0 and max_q > 1 and cum_q.dtype == cum_k.dtype == torch.int32
        assert (int(cum_q[-1]), int(cum_k[-1])) == (len(q), len(k))
        out, lse = torch.full_like(q, torch.nan), q.new_full((q.shape[1], len(q)), torch.nan)
        for i, j in sequences(cum_q, cum_k):
            scores, _ = weights_of(q[i], k[j], scale)
            values = v[j].repeat_interleave(q.shape[1] // v.shape[1], 1)
            out[i] = torch.einsum("hij,jhd->ihd", scores.softmax(2), values)
            lse[:, i] = scores.logsumexp(2) if j.stop > j.start else torch.inf
        return out, lse

    @staticmethod
    def _flash_attention_backward(do, q, k, v, o, lse, cum_q, cum_k, max_q, max_k, *_, scale):
        assert scale > 0
        dq, dk, dv = (torch.full_like(x, torch.nan) for x in (q, k, v))
        for i, j in sequences(cum_q, cum_k):
            scores, keys = weights_of(q[i], k[j], scale)
            p = (scores - lse[:, i, None]).exp()
            dp, _ = weights_of(do[i], v[j], 1.0)
            ds = scale * p * (dp - (do[i] * o[i]).sum(2).T[..., None])
            dq[i] = torch.einsum("hij,jhd->ihd", ds, keys)
            for grad, x, y in ((dk, ds, q[i]), (dv, p, do[i])):
                grad[j] = torch.einsum("hij,ihd->jhd", x, y).unflatten(1, (k.shape[1], -1)).sum(2)
        return dq, dk, dv


@pytest.mark.parametrize("of_lse", [False, True])
@pytest.mark.parametrize("rows, batch, scale", [(5, 3, 0.4), (1, 3, -0.4), (4, 1, 0.0)])
def test_lengths_by_flash(rows, batch, scale, of_lse, monkeypatch):
    """Keys stay where they lie, those beyond a length are read by nobody and have a gradient of zero."""
    monkeypatch.setattr(merged, "_aten", Flash)
    monkeypatch.setattr(merged, "pick", lambda *_: "flash")
    query = torch.randn(batch, rows, 4, 5, dtype=torch.float64).transpose(1, 2)
    key, value = torch.randn(3, 7, 2, 5, dtype=torch.float64).transpose(1, 2), torch.randn(3, 2, 7, 8).double()
    lengths = torch.tensor([7, 0, 3])
    source = Source(key, value, lengths=lengths)
    options = {"fusion": "joint", "scale": scale}
    expected = results(reference.attention, query, [source], options, of_lse)
    beyond = (torch.arange(7) >= lengths[:, None])[:, None, :, None]
    poisoned = [x.detach().masked_fill(beyond, torch.nan).requires_grad_() for x in (key, value)]
    got = results(by_cpu, query.detach(), [Source(*poisoned, lengths=lengths)], options, of_lse)
    torch.testing.assert_close(got, [x.to(y.dtype) for x, y in zip(expected, got, strict=True)], atol=1e-6, rtol=1e-6)
    assert (got[0][1] == 0).all()
    assert all((g.masked_select(beyond) == 0).all() for g in got[3:])


@pytest.mark.parametrize("wish", ["flash", "efficient", "cudnn"])
@pytest.mark.parametrize("options", [{}, {"lengths": (4,)}, {"mask": (4, 1, 1, 640)}])
def test_torch_takes_the_calls(wish, options):
    """What torch's kernels are given has the shapes and dtypes that their fake implementations take."""
    query = torch.empty(4, 33, 8, 64, dtype=torch.bfloat16, device="meta").transpose(1, 2)
    key = torch.empty(4, 640, 2, 64, dtype=torch.bfloat16, device="meta").transpose(1, 2)
    dtypes = {"lengths": torch.int64, "mask": torch.bool}
    given = {k: torch.empty(shape, dtype=dtypes[k], device="meta") for k, shape in options.items()}
    sources = [Source(key, key, **given)]
    out, lse = merged.forward(query, sources, False, 0.1, 4, wish)
    assert out.shape == query.shape and out.dtype == query.dtype and lse.shape == (4, 8, 33)
    for grad_lse in (None, torch.empty_like(lse)):
        grads = merged.backward(out, grad_lse, query, sources, out, lse, False, 0.1, wish)
        for grad, x in zip((grads[0], *grads[1], *grads[2]), (query, key, key), strict=True):
            assert grad.shape == x.shape and grad.dtype == x.dtype


def test_who_takes_lengths():
    """Flash, which is told of nothing else."""
    query = torch.empty(4, 8, 33, 64, dtype=torch.bfloat16, device="meta")
    lengths, mask = torch.empty(4, device="meta"), torch.empty(4, 1, 33, 33, device="meta")
    padded = Source(query, query, lengths=lengths)
    assert merged.pick(query, padded, False, "flash") == merged.pick(query, padded, False, "cudnn") == "flash"
    for other in (padded._replace(mask=mask), padded._replace(bias=mask)):
        assert merged.pick(query, other, False, "flash") == "efficient"
    assert merged.pick(query, padded, True, "flash") == "efficient"  # causality would end at the lengths
    assert merged.pick(query, padded, False, "efficient") == "efficient"
    assert merged.pick(query.float(), Source(query, query, lengths=lengths), False, "flash") == "efficient"


def by_plan(query, source, scale, causal):
    return triton_direct._Composed(query, [source], scale, causal)([query, source.key, source.value], []).out


@pytest.mark.parametrize("scale", [-0.4, 0.0])
@pytest.mark.parametrize("run", [routes_cuda.sdpa, by_plan])
def test_no_flash_is_given_such_a_scale(run, scale, monkeypatch):
    """Causality is an exclusion in flash, whose −inf is not to be scaled by it."""
    query, key = torch.randn(2, 4, 5, 4).requires_grad_(), torch.randn(2, 2, 5, 4).requires_grad_()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        ours = run(query, Source(key, key), scale, True)
    expected = reference.attention(query, [Source(key, key)], fusion="joint", scale=scale, is_causal=True).out
    torch.testing.assert_close(ours, expected)
    gradients = (torch.autograd.grad(out.square().sum(), (query, key)) for out in (ours, expected))
    torch.testing.assert_close(*gradients)


def test_double_backward():
    query, key = torch.randn(2, 2, 3, 4).requires_grad_(), torch.randn(2, 1, 5, 4).requires_grad_()
    seconds = []
    for engine in (by_cpu, reference.attention):
        out = engine(query, [Source(key, key)], fusion="joint", scale=0.4).out
        first = torch.autograd.grad(out.square().sum(), (query, key), create_graph=True)
        seconds.append(torch.autograd.grad(sum(g.square().sum() for g in first), (query, key)))
    torch.testing.assert_close(*seconds, atol=1e-4, rtol=1e-3)


def of_shape(batch, heads, rows, keys, dim=64, key_heads=None, dtype=torch.bfloat16, **options):
    query = torch.empty(batch, heads, rows, dim, dtype=dtype, device="meta")
    made = [torch.empty(batch, key_heads or heads, n, dim, dtype=dtype, device="meta") for n in keys]
    return query, [Source(x, x, **options) for x in made]


@pytest.mark.parametrize(
    "shape, fusion, kind",
    [
        (of_shape(16, 8, 4096, (77,), 40), "joint", "few keys, one source"),
        (of_shape(16, 8, 4096, (77, 4), 40), "joint", "few keys, several sources"),
        (of_shape(16, 8, 4096, (77, 4), 40), "decoupled", "few keys, decoupled"),
        (of_shape(1, 32, 6144, (126,), gate=0.5), "decoupled", "few keys, decoupled"),
        (of_shape(64, 12, 32, (129,), dtype=torch.float32), "joint", "few keys, one source"),
        (of_shape(64, 12, 32, (257,), dtype=torch.float32), "joint", "few queries"),
        (of_shape(8, 20, 1, (1500,)), "joint", "few queries"),
        (of_shape(4, 32, 8, (6404,), 128, key_heads=8), "joint", "few queries"),
        (of_shape(4, 32, 1024, (6404,), 128, mask=torch.empty(1, device="meta")), "joint", "long, masked"),
        (of_shape(2, 24, 4096, (4429,)), "joint", "long, one source"),
        (of_shape(24, 5, 500, (500,), 6, dtype=torch.float32), "joint", "tiny heads"),
        (of_shape(24, 5, 500, (5000,), 16, dtype=torch.float32, lengths=torch.empty(24)), "decoupled", "tiny heads"),
        (of_shape(24, 5, 500, (500,), 6), "joint", "few keys, one source"),
        (of_shape(24, 5, 500, (200,), 17, dtype=torch.float32), "joint", "few keys, one source"),
        (of_shape(24, 6, 500, (500,), 6, key_heads=3, dtype=torch.float32), "joint", "few keys, one source"),
        (of_shape(24, 5, 500, (500,), 6, dtype=torch.float32, gate=0.5), "decoupled", "few keys, decoupled"),
        (of_shape(24, 5, 500, (50, 50), 6, dtype=torch.float32), "joint", "few keys, several sources"),
        (of_shape(24, 5, 31, (50,), 6, dtype=torch.float32), "joint", "few keys, one source"),
        (of_shape(24, 5, 60, (5000,), 6, dtype=torch.float32), "joint", "few queries"),
        (of_shape(2, 24, 4096, (4096, 333)), "joint", "long, several sources"),
        (of_shape(1, 1, 1, (2**40,)), "joint", "few queries"),
    ],
)
def test_kind(shape, fusion, kind):
    assert routes_cuda.kind_of(*shape, fusion) == kind


def test_table_knows_every_kind():
    assert {case.kind for case in routes_cuda.CASES} == {key.kind for key in routes_cuda.TABLE}
    for case in routes_cuda.CASES:
        options = {"lengths": torch.empty(case.batch, device="meta")} if case.masked else {}
        options["dtype"] = torch.float32 if case.kind == "tiny heads" else torch.bfloat16
        shape = of_shape(case.batch, case.heads, case.rows, case.keys, case.dim, **options)
        assert routes_cuda.kind_of(*shape, case.fusion) == case.kind


def test_sdpa_only_without_lse_and_masks():
    query, sources = of_shape(2, 24, 4096, (4429,))
    assert routes_cuda.choose(query, sources, "joint", lse=False) == "sdpa"
    assert routes_cuda.choose(query, sources, "joint", lse=True) != "sdpa"
    assert not routes_cuda.able("sdpa", query, [sources[0]._replace(gate=2.0)], "decoupled", False)


@pytest.mark.parametrize("dtype, engine", [(torch.float32, "split"), (torch.bfloat16, "sdpa")])
def test_few_queries_in_float32_are_split_with_gradients_too(dtype, engine):
    query, sources = of_shape(64, 12, 32, (577,), dtype=dtype)
    assert routes_cuda.choose(query.requires_grad_(), sources, "joint", lse=False) == engine


def test_masked_keys_are_skipped_in_half_precision():
    for dtype, engine in ((torch.bfloat16, "skip"), (torch.float32, "cpu")):
        query, sources = of_shape(
            4, 32, 1024, (6404,), 128, 8, dtype, mask=torch.empty(4, 1, 1024, 6404, device="meta")
        )
        assert routes_cuda.choose(query, sources, "joint", lse=False) == engine


@pytest.mark.parametrize(
    "keys, options, fusion, engine",
    [
        ((4096, 333), {}, "joint", "skip"),
        ((4096, 333), {}, "decoupled", "cpu"),  # one by one, as calls of sdpa
        ((4096, 333), {"dim": 160}, "joint", "cpu"),
        ((4096, 333), {"dtype": torch.float32}, "joint", "cpu"),
        ((4096, 333), {"dim": 160, "lengths": torch.empty(2)}, "decoupled", "skip"),
        ((4096,), {}, "joint", "cpu"),
    ],
)
def test_several_long_sources_go_together(keys, options, fusion, engine):
    """Where each would be a call of a kernel of its own; a single one without masks is left to PyTorch's kernels."""
    query, sources = of_shape(2, 24, 4096, keys, **options)
    for tracked in (False, True):
        found = routes_cuda.choose(query.detach().requires_grad_(tracked), sources, fusion, lse=True)
        assert found == engine


def test_tiles_cover_the_keys():
    for keys, dtype in itertools.product((*range(1, 300), 500, 1000), (torch.float32, torch.bfloat16)):
        tiles = routes_cuda.tiles_of(keys, dtype)
        assert [start for start, _ in tiles] == [sum(w for _, w in tiles[:i]) for i in range(len(tiles))]
        assert all(16 <= w <= (64 if dtype == torch.float32 else 128) and w & (w - 1) == 0 for _, w in tiles)
        assert 0 <= sum(w for _, w in tiles) - keys < max(16, keys / 4)


def test_tuned_table(tmp_path, monkeypatch):
    """The fastest comes first, then who can do what it cannot; a file that holds nonsense changes nothing."""
    monkeypatch.setattr(routes_cuda, "TABLE", dict(routes_cuda.TABLE))
    times = {
        "tiny": None,
        "short": 3.0,
        "split": 1.0,
        "skip": None,
        "flash": 2.0,
        "sdpa": None,
        "efficient": None,
        "cudnn": None,
    }
    lines = []
    table = routes_cuda.tune(lambda case, half, gradients, engine: times[engine], lines.append)
    assert len(table) == len(lines) == len(routes_cuda.TABLE)
    path = tmp_path / "table.json"
    path.write_text(routes_cuda.to_json("a device", table))
    routes_cuda.read(path)
    key = routes_cuda.Key("long, one source", True, False)
    assert routes_cuda.TABLE[key] == ("split", "flash", "short", "sdpa")
    before = dict(routes_cuda.TABLE)
    path.write_text('{"table": [{"kind": "long, one source", "half": true, "gradients": false, "engines": ["magic"]}]}')
    routes_cuda.read(path)
    assert before == routes_cuda.TABLE


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_tune_needs_a_gpu():
    with pytest.raises(RuntimeError, match="GPU"):
        routes_cuda.tune_here()


@pytest.mark.parametrize("with_lse", [False, True])
def test_opcheck(with_lse):
    query, key = torch.randn(1, 4, 3, 8), torch.randn(2, 2, 5, 8)
    mask = torch.rand(2, 1, 3, 5) < 0.7
    rest = ([mask], [], [], [], None, [1, 0], [1.0, 1.0], True, False, False, 0.3, "cpu")
    args = (query, [key, key], [key, key], *rest)
    torch.library.opcheck(torch.ops.mmfast.fusion_device_forward, args, test_utils=("test_schema", "test_faketensor"))
    out, lse = torch.ops.mmfast.fusion_device_forward(*args)
    backward = (out, lse if with_lse else None, *args, out, lse, False)
    torch.library.opcheck(
        torch.ops.mmfast.fusion_device_backward, backward, test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.parametrize("dynamic", [False, True])
def test_choice_compiles(dynamic):
    def f(query, key):
        engine = routes_cuda.choose(query, [Source(key, key, gate=0.5), Source(key, key)], "decoupled", False)
        return query + 1 if engine == "short" else query - 1

    compiled = torch.compile(f, fullgraph=True, backend="eager", dynamic=dynamic)
    for rows, keys, expected in ((40, 40, 1), (40, 44, 1), (500, 4000, -1)):
        query, key = torch.zeros(1, 2, rows, 64), torch.zeros(1, 2, keys, 64)
        assert (compiled(query, key) == expected).all()
