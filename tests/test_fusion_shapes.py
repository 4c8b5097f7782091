"""Shapes that the CPU kernels treat apart: few queries, one panel of them, several, features that fill no vector."""

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_no_worse_than_eager

import mmfast
from mmfast import _backend
from mmfast.fusion import Source

pytestmark = pytest.mark.native


def close_to_gold(dtype, tensors, lengths, mask, weights, causal=False):
    """Output, log-sum-exp and gradients of two sources, compared with the float64 reference: (name, ours, gold)."""

    def results(engine, kind):
        query, k0, v0, k1, v1 = given = [x.detach().to(kind).requires_grad_() for x in tensors]
        sources = [Source(k0, v0, lengths=lengths), Source(k1, v1, mask=mask)]
        out, lse = mmfast.cross_attention(query, sources, is_causal=causal, return_lse=True, backend=engine)
        lse = torch.where(lse == -torch.inf, 0.0, lse)
        loss = (out.double() * weights[0]).sum() + (lse.double() * weights[1]).sum()
        return [out, lse, *torch.autograd.grad(loss, given)]

    names = ["out", "lse", "dq", "dk0", "dv0", "dk1", "dv1"]
    compared = list(zip(names, results("cpu", dtype), results("reference", torch.float64), strict=True))
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 6e-3}[dtype]
    for name, got, expected in compared:
        assert got.isfinite().all()
        error = (got.double() - expected).norm() / expected.norm()
        assert error < tolerance, f"{name}: {error:.1e}"
    return compared


@pytest.mark.parametrize("rows", [1, 2, 4, 5, 7])
@pytest.mark.parametrize("shared", ["none", "query", "keys"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_few_queries(dtype, shared, rows):
    """Long keys of two sources, lengths and a mask that hides all from a query: outputs, lses and gradients."""
    sizes = {"query": (1, 2, 2), "keys": (2, 1, 2)}.get(shared, (2, 2, 2))
    query = torch.randn(sizes[0], 4, rows, 40, dtype=torch.float64)
    tensors = [
        query,
        *(
            torch.randn(b, 4, n, d, dtype=torch.float64)
            for b, n in zip(sizes[1:], (530, 301), strict=True)
            for d in (40, 24)
        ),
    ]
    tensors = [x.to(dtype).requires_grad_() for x in tensors]
    mask = torch.rand(2, 1, rows, 301) < 0.5
    mask[1, :, rows - 1] = False
    weights = torch.randn(2, 4, rows, 24).double(), torch.randn(2, 4, rows).double()

    close_to_gold(dtype, tensors, torch.tensor([517, 0]), mask, weights)


@pytest.mark.parametrize("by_columns", [False, True])
@pytest.mark.parametrize("keys", [(1, 2), (9, 66)])
@pytest.mark.parametrize("dims", [(3, 1), (8, 20), (40, 24), (72, 100), (36, 130)])
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8])
def test_few_queries_and_keys(rows, dims, keys, by_columns):
    """Whole vectors of features and the rest of them, keys that fill no vector, features that are not neighbours; masks
    of numbers for each key, for all keys alike, and by columns."""
    tensors = [torch.randn(2, 4, rows, dims[0])]
    for n in keys:
        tensors += [torch.randn(2, 2, n, d) for d in dims]
    mask = torch.randn(2, 1, rows, 1 if dims[0] == 8 else keys[1])
    if by_columns:
        *tensors, mask = (x.mT.contiguous().mT for x in (*tensors, mask))
    weights = torch.randn(2, 4, rows, dims[1]).double(), torch.randn(2, 4, rows).double()

    close_to_gold(torch.float32, tensors, torch.tensor([keys[0], keys[0] - 1]), mask, weights)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("dtype", "batch", "rows", "dims"),
    [
        (torch.float64, 2, 9, (12, 24)),
        (torch.float32, 2, 20, (40, 48)),
        (torch.float32, 2, 61, (64, 80)),
        (torch.bfloat16, 2, 32, (64, 64)),
        (torch.float32, 14, 32, (64, 64)),  # gradients large enough to be streamed
    ],
)
def test_one_panel(dtype, batch, rows, dims, causal):
    """Keys and values read in place, gradients written where they belong, heads inside the rows; of two sources, with
    lengths and a mask that hides all from a query."""
    heads, keys = 8 if batch == 2 else 12, (257, 130)

    def heads_inside(b, n, d):
        return torch.randn(b, n, heads, d, dtype=torch.float64).to(dtype).transpose(1, 2)

    tensors = [heads_inside(1, rows, dims[0]), *(heads_inside(batch, n, d) for n in keys for d in dims)]
    lengths = torch.randint(0, 258, (batch,))
    lengths[0] = 0
    mask = torch.rand(batch, 1, rows, keys[1]) < 0.5
    mask[0, :, rows - 1] = False
    weights = torch.randn(batch, heads, rows, dims[1]).double(), torch.randn(batch, heads, rows).double()

    for name, got, expected in close_to_gold(dtype, tensors, lengths, mask, weights, causal):
        if name[0] == "d" and name != "dq":
            assert torch.equal(got[expected == 0], torch.zeros_like(got[expected == 0])), f"{name}: nobody looks there"


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("dtype", "heads", "rows", "dims"),
    [
        (torch.float64, 4, 70, (12, 24)),
        (torch.float32, 4, 65, (40, 48)),
        (torch.float32, 4, 600, (64, 64)),
        (torch.float32, 4, 200, (250, 256)),  # few panels stay in the cache
        (torch.float32, 1, 70, (64, 64)),  # each panel by itself, one of them narrow
        (torch.bfloat16, 4, 130, (64, 80)),
    ],
)
def test_several_panels(dtype, heads, rows, dims, causal):
    """Panels that go through the blocks of long keys together: of two sources, with lengths and a mask that hides all
    from a query; the same by any number of threads."""
    tensors = [torch.randn(2, n, heads, d).transpose(1, 2) for n in (300, 350) for d in dims]
    tensors = [x.to(dtype) for x in (torch.randn(2, rows, heads, dims[0]).transpose(1, 2), *tensors)]
    mask = torch.rand(2, 1, rows, 350) < 0.5
    mask[0, :, rows - 1] = False
    weights = torch.randn(2, heads, rows, dims[1]).double(), torch.randn(2, heads, rows).double()
    close_to_gold(dtype, tensors, torch.tensor([0, 290]), mask, weights, causal)
    query, *rest = (x.detach() for x in tensors)
    sources = [Source(rest[0], rest[1]), Source(rest[2], rest[3], mask)]
    threads, outs = torch.get_num_threads(), []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            outs.append(mmfast.cross_attention(query, sources, is_causal=causal, backend="cpu"))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*outs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 80, 8192, 32), (1, 1, 200, 3000, 64), (1, 2, 130, 2000, 48)])
def test_shares_of_the_keys_of_a_narrow_last_panel(shape, dtype):
    """Few panels: threads share the keys, and what they give is merged."""
    batch, heads, rows, keys, dim = shape
    query = torch.randn(batch, heads, rows, dim).to(dtype)
    key, value = torch.randn(2, batch, heads, keys, dim).to(dtype).unbind()
    gold = F.scaled_dot_product_attention(query.double(), key.double(), value.double())
    threads = torch.get_num_threads()
    try:
        for n in (2, 8):
            torch.set_num_threads(n)
            out = mmfast.cross_attention(query, [(key, value)], backend="cpu")
            eager = F.scaled_dot_product_attention(query, key, value)
            assert_no_worse_than_eager(out, eager, gold, floor=1e-14 if dtype == torch.float64 else None)
    finally:
        torch.set_num_threads(threads)


LONG = {
    "joint": ((2, 4, 4, 100, (77, 600, 33), 64), {}),
    "grouped heads": ((2, 6, 2, 40, (700,), 40), {}),
    "causal": ((1, 2, 2, 300, (1500,), 64), {"causal": True}),
    "lengths": ((3, 2, 2, 50, (700, 20), 32), {"lengths": [0, 333, 700]}),
    "mask": ((2, 2, 2, 70, (900,), 64), {"masked": True}),
    "many queries": ((1, 1, 1, 16384, (530,), 32), {}),
    "few queries": ((1, 2, 2, 16, (20000,), 32), {}),
}


@pytest.mark.parametrize("name", LONG)
def test_long_keys_of_half_precision(name):
    """Output, gradients and mean weights beside the reference in bfloat16, by one thread and by several."""
    (batch, heads, key_heads, rows, keys, dim), options = LONG[name]
    query, grad = torch.randn(2, batch, heads, rows, dim).bfloat16().unbind()
    pairs = [torch.randn(2, batch, key_heads, n, dim).bfloat16().unbind() for n in keys]
    mask = torch.rand(batch, 1, rows, keys[0]) < 0.7 if "masked" in options else None
    lengths = torch.tensor(options["lengths"]) if "lengths" in options else None

    causal = "causal" in options

    def inputs(dtype):
        given = [x.detach().to(dtype).requires_grad_() for x in (query, *(x for pair in pairs for x in pair))]
        sources = [Source(k, v) for k, v in zip(given[1::2], given[2::2], strict=True)]
        sources[0] = sources[0]._replace(mask=mask, lengths=lengths)
        return given, sources

    def results(engine, dtype):
        given, sources = inputs(dtype)
        out = mmfast.cross_attention(given[0], sources, is_causal=causal, backend=engine)
        weights = () if rows > 1000 else _weights("mean", given[0], sources, causal, engine)
        return [out, *torch.autograd.grad(out, given, grad.to(dtype)), *weights]

    gold, eager = results("reference", torch.float64), results("reference", torch.bfloat16)
    beside = {}
    if _backend._C.build_info()["isa_used"] == "avx512_bf16":
        (exact, *_), sources = inputs(torch.float64)
        weights = _weights(True, exact, sources, causal, "reference")
        beside = dict(enumerate(of_rounded_weights(query, pairs, grad, gold[0], weights), 2))
    threads = torch.get_num_threads()
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            ours = results("cpu", torch.bfloat16)
            for i, each in enumerate(zip(ours, eager, gold, strict=True)):
                assert_no_worse_than_eager(*each, factor=1.5, floor=1e-5, what=f"result {i}", rounding=beside.get(i))
            assert all(map(torch.equal, ours, results("cpu", torch.bfloat16)))
    finally:
        torch.set_num_threads(threads)


def of_rounded_weights(query, pairs, grad, out, weights):
    """The standard deviation of gradients of each key and value when weights, and gradients of scores, are rounded."""
    query, grad = query.double(), grad.double()
    delta = (grad * out.detach()).sum(-1, keepdim=True)
    for (key, value), p in zip(pairs, weights, strict=True):
        of_score = p * (grad @ _per_head(value, query).mT - delta) * query.shape[-1] ** -0.5
        for factor, rows in ((of_score, query), (p, grad)):
            sums = factor.square().mT @ rows.square()
            of_group = sums.unflatten(1, (key.shape[1], -1)).sum(2)
            yield of_group.sqrt() * torch.finfo(torch.bfloat16).eps / 2 / 3**0.5


def _per_head(x, query):
    return x.double().repeat_interleave(query.shape[1] // x.shape[1], 1)


def _weights(which, query, sources, causal, engine):
    with torch.no_grad():
        return mmfast.cross_attention(query, sources, is_causal=causal, return_weights=which, backend=engine)[1]


@pytest.mark.parametrize("rows", [65, 134])
@pytest.mark.parametrize("dims", [(40, 40), (6, 24), (72, 8), (20, 36)])
def test_gradients_of_dims_that_are_no_multiple(rows, dims):
    """Some of the last features of two queries share a vector; a key that nobody may attend to may be infinite."""
    tensors = [torch.randn(2, n, 3, d).transpose(1, 2) for n, d in zip((rows, 77, 77), (dims[0], *dims), strict=True)]
    mask = torch.rand(1, 3, rows, 77) < 0.8
    mask[..., 5] = False
    grad = torch.randn(2, rows, 3, dims[1]).transpose(1, 2)
    results = []
    for to in (torch.float32, torch.float64):
        query, key, value = (x.detach().to(to).requires_grad_() for x in tensors)
        if to == torch.float64:
            out = F.scaled_dot_product_attention(query, key, value, mask)
        else:
            out = mmfast.cross_attention(query, [Source(key, value, mask)], backend="cpu")
        results.append(torch.autograd.grad(out, (query, key, value), grad.to(to)))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=2e-5)
    tensors[1] = tensors[1].detach().index_fill(2, torch.tensor([5]), torch.inf)
    query, key, value = (x.detach().requires_grad_() for x in tensors)
    out = mmfast.cross_attention(query, [Source(key, value, mask)], backend="cpu")
    _, *again = torch.autograd.grad(out, (query, key, value), grad)
    for x, same in zip(again, results[0][1:], strict=True):
        torch.testing.assert_close(x, same)
