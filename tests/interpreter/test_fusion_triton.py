"""The Triton kernels of the fusion slice against the reference in float64: values, log-sum-exps and all gradients."""

from __future__ import annotations

import functools

import pytest
import torch
from fusion_cases import excluding, inputs, randn, replaced

from mmfast.fusion import (
    Source,
    attention_pool,
    cross_attention,
    merged,
    recording,
    reference,
    routes_cuda,
    triton_skip,
    triton_split,
    triton_tiles,
)
from mmfast.fusion import triton as fused
from mmfast.fusion import triton_short_sizes as sizes
from mmfast.fusion._inputs import prepare
from mmfast.fusion.epilogue import gated_residual

TOLERANCE = {torch.float32: 3e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def make(query, sources, options, dtype):
    """Inputs in ``dtype``, leaves of the gradient, and the same in float64; masks and biases have none."""
    options = {"fusion": "joint", "scale": query.shape[3] ** -0.5, "is_causal": False} | options
    query, sources = prepare(query, sources, options["fusion"])
    rounded = [x.to(dtype) for x in inputs(query, sources)]
    sources = replaced(sources, rounded[1:])
    gold = replaced(sources, [x.double() for x in rounded[1:]])
    return (rounded[0], sources), (rounded[0].double(), gold), options


def leaves(query, sources):
    tensors = [query]
    for s in sources:
        tensors += [s.key, s.value] + ([s.gate] if isinstance(s.gate, torch.Tensor) else [])
    return [x.requires_grad_() for x in tensors]


def run(engine, query, sources, options, of_out, of_lse):
    of = leaves(query, sources)
    result = engine(query, sources, **options)
    lse = torch.stack(result.lses)
    total = (result.out.to(of_out.dtype) * of_out).sum()
    if of_lse is not None:
        total = total + torch.where(lse == -torch.inf, 0.0, lse.double() * of_lse).sum()
    return result.out.detach(), lse.detach(), torch.autograd.grad(total, of, materialize_grads=True)


def check(engine, query, sources, options, dtype=torch.float32, with_lse=True):
    ours, gold, options = make(query, sources, options, dtype)
    with torch.no_grad():
        plain = reference.attention(*gold, **options)
    of_out = torch.randn(plain.out.shape, dtype=torch.float64).to(dtype).double()
    of_lse = torch.randn(len(plain.lses), *plain.lses[0].shape, dtype=torch.float64) if with_lse else None
    out, lse, grads = run(engine, *ours, options, of_out, of_lse)
    gold_out, gold_lse, gold_grads = run(reference.attention, *gold, options, of_out, of_lse)
    assert out.dtype == dtype and lse.dtype == torch.float32
    close(out, gold_out, dtype, "out")
    assert torch.equal(lse.isinf(), gold_lse.isinf())
    close(lse.nan_to_num(neginf=0), gold_lse.nan_to_num(neginf=0), dtype, "lse")
    for i, (grad, expected) in enumerate(zip(grads, gold_grads, strict=True)):
        assert grad.shape == expected.shape and grad.dtype == dtype
        close(grad, expected, dtype, f"gradient {i}")


def close(got, expected, dtype, what):
    assert got.isfinite().all(), what
    error, size = (got.double() - expected).abs(), expected.abs()
    limit = TOLERANCE[dtype] * (1 + size.amax() if size.numel() else 1)
    assert (error <= limit).all(), f"{what}: {error.max():.2e}, allowed {limit:.2e}"


def kv(batch=1, heads=2, keys=5, dim=8, value_dim=None):
    return randn(batch, heads, keys, dim), randn(batch, heads, keys, value_dim or dim)


def _six_features():
    return randn(2, 1, 20, 6), [Source(*kv(2, 1, 7, 6)), Source(*kv(2, 1, 18, 6))], {"scale": -0.7}


def _ip_adapter():
    return randn(1, 2, 65, 40), [Source(*kv(1, 2, 77, 40)), Source(*kv(1, 2, 4, 40), gate=0.6)], {"fusion": "decoupled"}


def _a_tile_of_128():
    return randn(1, 1, 130, 16), [Source(*kv(1, 1, 126, 16), gate=randn(1, 1, 130, 1))], {"fusion": "decoupled"}


def _gate_of_a_head_lengths():
    sources = [
        Source(*kv(2, 2, 20, 64), lengths=torch.tensor([0, 7])),
        Source(*kv(2, 2, 16, 64), gate=randn(2), lengths=torch.tensor([16, 1], dtype=torch.int32)),
    ]
    return randn(2, 2, 5, 64), sources, {"fusion": "decoupled"}


def _gate_of_a_query_masks():
    sources = [
        Source(*kv(1, 2, 9, 80, 24), gate=randn(1, 2, 18, 1), mask=torch.rand(1, 2, 18, 9) < 0.4),
        Source(*kv(1, 2, 3, 80, 24), gate=randn(1, 1, 18, 1), mask=torch.rand(1, 1, 18, 1) < 0.5),
    ]
    return randn(1, 2, 18, 80), sources, {"fusion": "decoupled"}


def _gate_of_a_feature():
    sources = [Source(*kv(1, 2, 37, 96), gate=randn(1, 2, 1, 96)), Source(*kv(1, 2, 0, 96), gate=randn(2))]
    return randn(1, 2, 3, 96), sources, {"fusion": "decoupled", "is_causal": True}


def _bias_causal():
    source = Source(*kv(1, 1, 12, 128), bias=randn(1, 1, 7, 12), mask=excluding(7, 12))
    return randn(1, 1, 7, 128), [source, Source(*kv(1, 1, 2, 128))], {"is_causal": True}


def _more_keys_than_are_kept():
    sources = [Source(*kv(1, 1, 150, 16), gate=randn(1)), Source(*kv(1, 1, 129, 16))]
    return randn(1, 1, 5, 16), sources, {"fusion": "decoupled"}


def _groups_shared_keys():
    return randn(2, 4, 3, 16), [Source(*kv(1, 2, 5, 16)), Source(*kv(1, 1, 3, 16), bias=randn(2, 4, 3, 3))], {}


def _shared_queries():
    return randn(1, 2, 3, 16), [Source(*kv(2, 2, 5, 16)), Source(kv(2, 2, 6, 16)[0], kv(1, 2, 6, 16)[1])], {}


def _nothing_to_attend_to():
    source = Source(*kv(1, 2, 5, 16), mask=torch.arange(4)[:, None] % 2 == 0)
    return randn(1, 2, 4, 16), [source, Source(*kv(1, 2, 3, 16), lengths=torch.tensor([0]))], {}


def _strided():
    key = randn(1, 6, 16, 2).permute(0, 3, 1, 2)
    return randn(1, 5, 2, 16).transpose(1, 2), [Source(key, randn(1, 2, 16, 6).transpose(2, 3))], {}


SMALL = {name[1:]: build for name, build in list(globals().items()) if name.startswith("_") and name[1:2].isalpha()}


@pytest.mark.parametrize("name", [name for name in SMALL if name != "a_tile_of_128"])
def test_matches_gold(name):
    check(fused.short, *SMALL[name]())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["ip_adapter", "a_tile_of_128", "groups_shared_keys"])
def test_half_precision(name, dtype, monkeypatch):
    monkeypatch.setattr(sizes, "capability", lambda device: (9, 0))  # keys are held where a block has 64 queries
    check(fused.short, *SMALL[name](), dtype, with_lse=dtype == torch.float16)


@pytest.mark.parametrize(
    "dim, dtype, by",
    [
        (40, torch.bfloat16, 8),
        (72, torch.float16, 8),
        (20, torch.bfloat16, 4),
        (40, torch.float32, 4),
        (6, torch.float32, 2),
    ],
)
def test_aligned(dim, dtype, by):
    x = torch.empty(2, 7, 3, dim, dtype=dtype)
    assert triton_tiles.aligned(x, x.transpose(1, 2), x[:1].expand(4, -1, -1, -1)) == by
    assert triton_tiles.aligned(x, x.transpose(2, 3)) == triton_tiles.aligned(x, x[..., :-1]) == 1


@pytest.mark.parametrize(
    "of, items, expected", [(64, 128, (2, 32)), (64, 160, (3, 22)), (64, 400, (1, 64)), (1, 9, (1, 1))]
)
def test_as_many_sums_as_pay(of, items, expected):
    """Programs that all run at once, where that is possible, or nearly full rounds of few."""
    assert sizes.soonest(of, items, 264, 6) == expected


# Of the forward and the backward pass, for sm_90, and for sm_80 in the last two: features of keys and of values, keys,
# dtype, whether joint, whether keys are held; then stages, and bytes of shared memory as the compiler has them.
COMPILED = [
    (16, 16, (77, 4), torch.float32, False, False, (3, 40960), (1, 40960)),
    (16, 16, (77, 4), torch.float32, True, False, (3, 40960), (2, 58112)),
    (64, 64, (77, 4), torch.float32, True, False, (3, 163840), (2, 131840)),
    (64, 64, (128,), torch.float32, True, False, (3, 196608), (2, 213504)),
    (64, 128, (77, 4), torch.float32, False, False, (3, 246272), None),
    (128, 128, (77, 4), torch.float32, True, False, (3, 327680), (2, 114944)),
    (128, 128, (77, 4), torch.float32, True, False, (2, 196608), None),
    (128, 128, (64,), torch.float32, True, False, (3, 262144), (2, 131328)),
    (128, 128, (64,), torch.float32, True, False, (2, 163840), None),
    (256, 256, (32,), torch.float32, False, False, (3, 327680), None),
    (64, 64, (77, 16), torch.bfloat16, False, True, (3, 57344), None),
    (64, 64, (256,), torch.bfloat16, False, True, (3, 98304), (2, 164864)),
    (128, 128, (128,), torch.bfloat16, True, True, (3, 122880), (2, 197120)),
    (256, 256, (64,), torch.bfloat16, True, True, (3, 180224), None),
    (128, 128, (128,), torch.bfloat16, True, False, (3, 180224), (2, 131328)),
    (256, 256, (64,), torch.bfloat16, True, False, (3, 204800), (2, 106624)),
]


@pytest.mark.parametrize("dim, value_dim, keys, dtype, joint, held, forward, backward", COMPILED, ids=str)
def test_shared_memory_is_enough(dim, value_dim, keys, dtype, joint, held, forward, backward, monkeypatch):
    """What sizes are chosen by is not less than what the compiler takes, and not much more where it decides."""
    query = torch.empty(1, 1, 1000, dim, dtype=dtype)
    sources = [
        Source(torch.empty(1, 1, n, dim, dtype=dtype), torch.empty(1, 1, n, value_dim, dtype=dtype)) for n in keys
    ]
    layout = sizes.lay_out(query, sources, joint)
    monkeypatch.setattr(sizes, "roomy", lambda device, kilobytes=200: held)
    for found, way in ((forward, False), (backward, True)):
        if found is not None:
            block = sizes.backward_sizes(query, layout, joint)[0] if way else 64
            most = sizes.shared_bytes(layout, dtype.itemsize, block, held and block >= 64, found[0], way, joint and way)
            assert found[1] <= most <= max(2.3 * found[1], 100 * 1024)


@pytest.mark.parametrize("kb", [99, 163, 227])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stages_by_shared_memory(kb, dtype, monkeypatch):
    """As many as fit of what may be given to the kernels, and never so few without need."""
    monkeypatch.setattr(sizes, "shared_memory", lambda device: kb * 1024)
    chosen = set()
    for dim in (16, 64, 128, 256):
        for keys in (16, 64, 128, 256, 512):
            query, key = torch.empty(1, 1, 1000, dim, dtype=dtype), torch.empty(1, 1, keys, dim, dtype=dtype)
            if not routes_cuda.fits(query, [Source(key, key)]):
                continue
            layout = sizes.lay_out(query, [Source(key, key)], True)
            block, _, _, stages, _ = sizes.forward_sizes(query, layout, True)
            taken = [sizes.shared_bytes(layout, dtype.itemsize, block, False, s, False) for s in (stages, stages + 1)]
            assert stages == 1 or taken[0] <= kb * 1024
            assert stages == 3 or taken[1] > kb * 1024
            chosen.add(stages)
    assert 3 in chosen and len(chosen) > 1


def test_many_blocks(monkeypatch):
    """Programs that take several blocks of queries, several programs for a head, and the last block not full."""
    monkeypatch.setattr(sizes, "multiprocessors", lambda device: 2)
    monkeypatch.setattr(sizes, "SUM", 0)
    query, sources = randn(2, 1, 200, 16), [Source(*kv(2, 1, 5, 16)), Source(*kv(1, 1, 17, 16))]
    assert sizes.grid_of(query, 2, 64, 4) == sizes.grid_of_sums(query, 2, 64, 4) == (2, 2)
    check(fused.short, query, sources, {}, with_lse=False)


@pytest.mark.parametrize("sources", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_many_blocks_with_gates(dtype, sources, monkeypatch):
    """One program has all blocks of a head, and fetches the gates of the next one."""
    monkeypatch.setattr(sizes, "multiprocessors", lambda device: 1)
    monkeypatch.setattr(sizes, "capability", lambda device: (9, 0))
    both = [Source(*kv(2, 2, n, 16), gate=randn(2, 2, 150, 1)) for n in (7, 18)]
    check(fused.short, randn(2, 2, 150, 16), both[:sources], {"fusion": "decoupled"}, dtype, with_lse=False)


@pytest.mark.parametrize("name", ["six_features", "bias_causal", "groups_shared_keys", "shared_queries"])
def test_split_matches_gold(name):
    check(lambda *args, **options: fused.long(*args, engine="split", **options), *SMALL[name]())


@pytest.mark.parametrize("name", ["gate_of_a_head_lengths", "nothing_to_attend_to"])
def test_split_decoupled_and_empty(name):
    check(lambda *args, **options: fused.long(*args, engine="split", **options), *SMALL[name]())


def test_split_in_many_parts(monkeypatch):
    """More splits than one, the last not full, of two sources, for a batch of queries that share the keys."""
    monkeypatch.setattr(triton_split, "multiprocessors", lambda device: 5)
    query, sources = randn(3, 2, 2, 16), [Source(*kv(1, 1, 150, 16)), Source(*kv(1, 1, 40, 16))]
    check(lambda *args, **options: fused.long(*args, engine="split", **options), query, sources, {})


def by_splitting(*args, **options):
    return fused.long(*args, engine="split", **options)


def _learned_queries():
    return randn(1, 2, 5, 24), [Source(*kv(3, 2, 70, 24, 8))], {}


def _masked_groups():
    lengths, may = torch.tensor([33, 0]), torch.rand(2, 1, 3, 40) < 0.5
    sources = [Source(*kv(2, 2, 40, 16), lengths=lengths), Source(*kv(2, 2, 40, 16), mask=may, bias=randn(4, 3, 40))]
    return randn(2, 4, 3, 16).transpose(2, 3).contiguous().transpose(2, 3), sources, {"scale": -0.3}


def _shared_by_the_batch():
    source = Source(*kv(1, 2, 45, 72), mask=excluding(3, 2, 7, 45))
    return randn(3, 2, 7, 72), [source, Source(*kv(1, 2, 1, 72))], {"is_causal": True}


DIFFERENTIATED = (_learned_queries, _masked_groups, _shared_by_the_batch, _nothing_to_attend_to)


@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize("parts", [1, 100])
@pytest.mark.parametrize("build", DIFFERENTIATED)
def test_split_differentiates(build, parts, with_lse, monkeypatch):
    """By its own kernels, each source in one part or in many."""
    monkeypatch.setattr(triton_split, "multiprocessors", lambda device: parts)
    monkeypatch.setattr(merged, "backward", None)
    check(by_splitting, *build(), with_lse=with_lse)


@pytest.mark.parametrize("shape, dtype", [((2, 2, 40, 128), torch.float32), ((1, 2, 3, 16), torch.bfloat16)])
def test_split_leaves_what_has_no_room_and_half_precision(shape, dtype):
    """`merged` differentiates."""
    query, sources = torch.randn(shape, dtype=dtype), [Source(*kv(shape[0], 2, 70, shape[3]))]
    assert not triton_split.differentiates(query, sources, shape[0])
    check(by_splitting, query.double(), sources, {}, dtype)


def by_skipping(*args, **options):
    return fused.long(*args, engine="skip", **options)


@pytest.fixture
def in_float32(monkeypatch):
    """The kernels of the backward, which are for half precision, to the accuracy of float32; and no others."""
    monkeypatch.setattr(triton_skip, "differentiates", lambda query, sources: True)
    monkeypatch.setattr(merged, "backward", None)


def _masks_of_heads():
    """In rows and blocks of their own for each head, a bias, and a mask of rows that leaves some out of a source."""
    may = torch.rand(2, 4, 70, 40) < 0.6
    may[:, 1, :64] = False
    rows = torch.arange(70)[:, None] % 3 != 0
    bias = randn(1, 4, 1, 33)
    sources = [Source(*kv(2, 2, 40, 16), mask=may), Source(*kv(2, 4, 33, 16), mask=rows, bias=bias)]
    return randn(2, 4, 70, 16), sources, {"scale": -0.3}


def _several_whole_and_ragged():
    """Without masks: whole tiles, less than one, one whole; an item of no length, and one that ends within a tile."""
    lengths = torch.tensor([0, 33, 70])
    sources = [Source(*kv(3, 1, 70, 24, 8), lengths=lengths), Source(*kv(1, 3, 64, 24, 8)), Source(*kv(3, 3, 5, 24, 8))]
    return randn(3, 3, 70, 24), sources, {}


def _no_keys_at_all():
    """Items without keys, and a source that has none."""
    sources = [Source(*kv(2, 2, 40, 16), lengths=torch.tensor([0, 3])), Source(*kv(2, 2, 0, 16))]
    return randn(2, 2, 5, 16), sources, {}


def _queries_shared_by_the_batch():
    """And keys of one batch, values of another, in a group of heads."""
    sources = [Source(kv(3, 2, 40, 16)[0], kv(1, 2, 40, 16)[1]), Source(kv(1, 1, 40, 16)[0], kv(3, 1, 40, 16)[1])]
    return randn(1, 4, 70, 16), sources, {"is_causal": True}


def _padding():
    """One row of a mask for all queries: tiles that are whole, cut, and left out."""
    may = torch.arange(100) < torch.tensor([70, 3])[:, None]
    low = torch.where(torch.arange(33) % 3 == 0, -torch.inf, 0.0).double()
    sources = [
        Source(*kv(2, 2, 100, 16), mask=may[:, None, None]),
        Source(*kv(1, 4, 33, 16), mask=low[None, None, None]),
    ]
    return randn(2, 4, 70, 16), sources, {}


def _masks_alone_by_item():
    """Queries, keys and values of one source are shared by the batch, and what may attend to what is not."""
    shared = Source(*kv(1, 2, 40, 16), mask=torch.rand(2, 1, 70, 40) < 0.6)
    ragged = Source(*kv(1, 2, 20, 16), lengths=torch.tensor([3, 20]), gate=0.5)
    return randn(1, 2, 70, 16), [shared, ragged, Source(*kv(2, 2, 33, 16))], {"fusion": "decoupled"}


SKIPPED = (
    "six_features", "gate_of_a_head_lengths", "gate_of_a_query_masks", "bias_causal", "groups_shared_keys",
    "shared_queries", "nothing_to_attend_to", "strided",
)  # fmt: skip
LONG = (
    _masks_of_heads, _padding, _masks_alone_by_item, _several_whole_and_ragged, _no_keys_at_all,
    _queries_shared_by_the_batch,
)  # fmt: skip


@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize("build", [*(SMALL[name] for name in SKIPPED), *LONG])
def test_skip_matches_gold(build, with_lse, in_float32):
    check(by_skipping, *build(), with_lse=with_lse)


SIZES = triton_skip.sizes(torch.empty(1, 1, 70, 16), 16)
LOWEST = torch.finfo(torch.float32).min


def images(excluded):
    """Two items, queries in blocks of 64, keys in tiles of 32: what the first block sees the second does not."""
    may = torch.ones(2, 1, 70, 100, dtype=torch.bool)
    may[0, :, 64:, 32:] = False
    may[1, :, :, 64:] = False
    may[1, :, 3, 10] = False
    return may if excluded is None else torch.zeros(may.shape).masked_fill(~may, excluded)


@pytest.mark.parametrize("excluded", [None, -torch.inf, LOWEST])
def test_skips_tiles(excluded, in_float32):
    """What is excluded for a block of queries is not read, and masks only where they are of use."""
    query, (key, value) = randn(2, 2, 70, 16).float(), [x.float() for x in kv(2, 1, 100, 16)]
    mask, up = images(excluded), torch.randn(2, 2, 70, 16)
    results = []
    for engine in (reference.attention, by_skipping):
        of = [x.clone() for x in (query, key, value)]
        if engine is by_skipping:
            for x in of[1:]:
                x[1, :, 64:] = torch.nan
        of = [x.requires_grad_() for x in of]
        source = Source(*of[1:], mask=mask)
        got = engine(of[0], [source], fusion="joint", scale=0.25)
        results.append((got.out, got.lses, torch.autograd.grad(got.out, of, up)))
    torch.testing.assert_close(results[1], results[0], atol=6e-6, rtol=1e-5)
    lists, by_keys = triton_skip._lists(query, source, False, 2, SIZES, by_keys=True)
    # Where nothing is masked, and where bits tell what is: the last tile is not full.
    assert lists.counts.tolist() == [[3, 1, 0], [1, 0, 0], [1, 1, 0], [2, 0, 0]]
    assert lists.tiles[0, 0, :3].tolist() == [0, 1, 2] and lists.tiles[2, :2, 0].tolist() == [1, 0]
    # Two heads with two blocks each: what visits each of the four tiles of the first item, and of the second.
    assert by_keys.counts.tolist() == [
        [*x, 0] for x in ((4, 0), (2, 0), (2, 0), (0, 2), (2, 2), (4, 0), (0, 0), (0, 0))
    ]
    assert by_keys.tiles[1, 0, :2].tolist() == [0, 2] and by_keys.tiles[4, :2, :2].tolist() == [[1, 3], [0, 2]]


def test_skips_only_beside_other_keys():
    """A query for which all keys are as good as excluded attends to all: its block leaves nothing out."""
    query, (key, value) = randn(1, 2, 70, 16).float(), [x.float() for x in kv(1, 1, 100, 16)]
    mask = images(torch.finfo(torch.float16).min)[1:].half()
    mask[:, :, 5] = torch.finfo(torch.float16).min
    source = Source(key, value, mask=mask, lengths=torch.tensor([90]))
    assert triton_skip._lists(query, source, False, 1, SIZES)[0].counts.tolist() == [[0, 0, 3], [2, 0, 0]]
    results = [f(query, [source], fusion="joint", scale=0.25).out for f in (by_skipping, reference.attention)]
    torch.testing.assert_close(*results, atol=1e-2, rtol=1e-2)  # scores of 65504 are rounded to 1 / 256
    assert results[0][:, :, 5].abs().max() > 0


def test_skip_by_lengths_and_causality():
    query, source = randn(2, 1, 70, 16), Source(*kv(2, 1, 100, 16), lengths=torch.tensor([100, 33]))
    assert triton_skip._lists(query.float(), source, False, 2, SIZES)[0].counts.tolist() == [[3, 1, 0], [1, 1, 0]]
    lists, _ = triton_skip._lists(query.float(), source, True, 2, SIZES)
    assert lists.counts.tolist() == [[0, 2, 0], [2, 1, 0], [0, 2, 0], [1, 1, 0]]
    check(by_skipping, query, [source, Source(*kv(1, 1, 40, 16))], {"is_causal": True})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_skip_in_half_precision(dtype):
    """Blocks of 128 queries, a mask in the dtype of the queries, whose lowest number is its own."""
    mask = torch.where(images(None)[:, :, :, :60], 0.0, torch.finfo(dtype).min).to(dtype)
    query, source = randn(2, 2, 70, 16), Source(*kv(2, 1, 60, 16), mask=mask)
    check(by_skipping, query, [source, Source(*kv(1, 1, 130, 16))], {"scale": -0.3}, dtype, with_lse=False)


def _long(dtype, rows=140, batch=2):
    """Of two sources in half precision, one with a mask and shared by the batch, one of other lengths."""
    up, query = (torch.randn(batch, 4, rows, 16, dtype=dtype) for _ in range(2))
    (key, value), (more, values) = ([torch.randn(n, 2, s, 16, dtype=dtype) for _ in range(2)] for n, s in
                                    ((1, 150), (batch, 40)))  # fmt: skip
    mask, lengths = torch.ones(rows, 150, dtype=torch.bool), torch.tensor([0, 33])[-batch:]
    mask[:128, 64:], mask[128:, :100], mask[:, 7] = False, False, False
    mask[70:90, 20:50] = False  # in the second step of a block
    return query, [Source(key, value, mask=mask[None, None]), Source(more, values, lengths=lengths)], up


def test_skip_of_large_blocks():
    """Blocks of 128 queries in two steps, 128 keys of two tiles that differ, queries that do not fill a block."""
    query, sources, up = _long(torch.float16)
    lists, by_keys = triton_skip._lists(query, sources[0], False, 2, triton_skip.sizes(query, 16), by_keys=True)
    assert lists.counts.tolist() == [[0, 1, 0], [0, 2, 0]]  # of three tiles of 64 keys
    # Of two heads with two blocks: one visits the first of the first 128 keys, the other their second and the rest.
    assert by_keys.counts.tolist() == [[0, 4, 0], [0, 2, 0]]
    for rows in (140, 256):
        query, sources, up = _long(torch.float16, rows)
        results = []
        for kind, engine in ((torch.float16, by_skipping), (torch.float64, reference.attention)):
            of = [x.to(kind).requires_grad_() for x in inputs(query, sources)]
            out = engine(of[0], replaced(sources, of[1:]), fusion="joint", scale=0.25).out
            results.append(torch.autograd.grad(out, of, up.to(kind)))
        for i, (got, expected) in enumerate(zip(*results, strict=True)):
            close(got, expected, torch.float16, f"gradient {i}")


def test_skip_made_again():
    """The launches of the backward, recorded and repeated on other values: the same bits as of themselves."""
    query, sources, up = _long(torch.bfloat16)
    given = [*inputs(query, sources), sources[0].mask, sources[1].lengths, up]

    def compute(tensors):
        of = replaced(sources, tensors[1:5])
        of = [of[0]._replace(mask=tensors[5]), of[1]._replace(lengths=tensors[6])]
        out, lse = triton_skip.forward(tensors[0], of, False, 0.25, 2)
        grad_query, *rest = triton_skip.backward(tensors[7], None, tensors[0], of, out, lse, False, 0.25)
        return out, lse, grad_query, *rest

    _, recorded = recording.record(lambda: compute(given), given)
    assert isinstance(recorded, recording.Recording)
    for turn in range(2):
        others = [x if i in (5, 6) else torch.randn_like(x) for i, x in enumerate(given)]
        found = recorded.again(others, [x.data_ptr() for x in others])
        for got, expected in zip(found, compute(others), strict=True):
            torch.testing.assert_close(got, expected, atol=0, rtol=0, msg=f"in turn {turn}")


@pytest.mark.parametrize("engine", ["short", "split", "skip"])
def test_lengths_that_say_too_much(engine):
    """On a device nobody checks them: what lies behind the keys must not be read as keys."""
    query = torch.randn(2, 2, 5, 16)
    key, value = (torch.randn(2, 2, 40, 16)[:, :, :20] for _ in range(2))
    results = []
    for lengths in ([33, 20], [20, 20]):
        sources = [Source(key, value, lengths=torch.tensor(lengths))]
        run = fused.short if engine == "short" else functools.partial(fused.long, engine=engine)
        got = run(query, sources, fusion="joint", scale=0.25)
        results.append((got.out, got.lses[0]))
    torch.testing.assert_close(*results, atol=0, rtol=0)


def test_merge():
    outs = [torch.randn(2, 3, 7, 5), torch.randn(2, 7, 3, 5).transpose(1, 2), torch.randn(2, 3, 7, 5)]
    lses = [torch.where(torch.rand(2, 3, 7) < 0.3, -torch.inf, torch.randn(2, 3, 7)) for _ in outs]
    expected = reference.merge([x.double() for x in outs], [x.double() for x in lses])
    got = triton_split.merge(outs, lses, torch.float32)
    torch.testing.assert_close(tuple(x.double() for x in got), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ["groups_shared_keys", "bias_causal", "gate_of_a_feature"])
def test_mean_weights(name):
    query, sources, options = SMALL[name]()
    sources = replaced(sources, [x.float() for x in inputs(query, sources)[1:]])
    out, weights = cross_attention(query.float(), sources, **options, return_weights="mean", backend="triton")
    expected = cross_attention(query.float(), sources, **options, return_weights="mean", backend="reference")
    torch.testing.assert_close((out, *weights), (expected[0], *expected[1]), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "name, lengths",
    [("groups_shared_keys", None), ("gate_of_a_head_lengths", (0, 3)), ("gate_of_a_query_masks", (11,))],
)
def test_pooled_matches_gold(name, lengths):
    query, sources, options = SMALL[name]()
    lengths = None if lengths is None else torch.tensor(lengths)
    of_out = torch.randn(max(query.shape[0], 1), query.shape[1], sources[0].value.shape[3], dtype=torch.float64)
    results = []
    for dtype, backend in ((torch.float32, "triton"), (torch.float64, "reference")):
        some = replaced(sources, [x.to(dtype) for x in inputs(query, sources)[1:]])
        of = leaves(query.to(dtype), some)
        out = attention_pool(of[0], some, query_lengths=lengths, backend=backend, **options)
        results.append((out, *torch.autograd.grad((out.double() * of_out).sum(), of, materialize_grads=True)))
    for got, expected in zip(*results, strict=True):
        close(got.detach(), expected.detach(), torch.float32, "pooled")


def test_double_backward():
    """Second derivatives are the reference's."""
    query, sources, options = _gate_of_a_head_lengths()
    (query, sources), _, options = make(query[:, :, :2], sources, options, torch.float32)
    seconds = []
    for engine in (fused.short, reference.attention):
        of = [x.detach().requires_grad_() for x in inputs(query, sources)]
        out = engine(of[0], replaced(sources, of[1:]), **options).out
        first = torch.autograd.grad(out.square().sum(), of, create_graph=True)
        seconds.append(torch.autograd.grad(sum(g.square().sum() for g in first), of))
    for got, expected in zip(*seconds, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-4 * expected.abs().max().item(), rtol=1e-3)


def test_opcheck():
    query, sources, _ = _groups_shared_keys()
    query, sources = query.float().requires_grad_(), replaced(sources, [x.float() for x in inputs(query, sources)[1:]])
    query, sources = prepare(query, sources, "joint")
    packed = fused.pack(sources)
    args = (query, *packed[0], None, *packed[1], True, False, False, 0.25)
    for engine in ("short", "split", "skip"):
        torch.library.opcheck(
            torch.ops.mmfast.fusion_device_forward, (*args, engine), test_utils=("test_schema", "test_faketensor")
        )


def test_vmap():
    """One call after the other, also where one source of two is batched."""
    query, (key, value), other = randn(3, 1, 2, 4, 8).float(), [x.float() for x in kv(keys=5)], kv(keys=3)
    batched = [torch.stack([x, 2 * x, x.flip(2)]).float() for x in other]

    def run(query, *two):
        out, lse, weights = cross_attention(
            query, [(key, value), two], return_lse=True, return_weights="mean", backend="triton"
        )
        return out, lse, *weights

    together = torch.func.vmap(run)(query, *batched)
    for i in range(3):
        for a, b in zip(together, run(query[i], *(x[i] for x in batched)), strict=True):
            torch.testing.assert_close(a[i], b, rtol=0, atol=0)


@pytest.mark.parametrize("fusion", ["joint", "decoupled"])
def test_batched_gradients(fusion):
    gate = {"gate": torch.rand(1, 2, 1, 1)} if fusion == "decoupled" else {}
    query, first, second = randn(1, 2, 4, 8).float(), [x.float() for x in kv(keys=5)], [x.float() for x in kv(keys=3)]
    sources = [Source(*first, mask=torch.rand(1, 1, 4, 5) < 0.8, **gate), Source(*second)]
    of = leaves(query, sources)
    out = cross_attention(query, sources, fusion=fusion, backend="triton")
    upstream = torch.randn(3, *out.shape)
    together = torch.autograd.grad(out, of, upstream, is_grads_batched=True, retain_graph=True)
    for i, one in enumerate(upstream):
        for a, b in zip(together, torch.autograd.grad(out, of, one, retain_graph=True), strict=True):
            torch.testing.assert_close(a[i], b, rtol=1e-4, atol=1e-5)


def test_same_bits():
    query, sources, options = _ip_adapter()
    results = []
    for _ in range(2):
        ours, _, full = make(query, sources, options, torch.float32)
        of_out = torch.ones(query.shape, dtype=torch.float64)
        results.append(run(fused.short, *ours, full, of_out, None))
    (out, lse, grads), (again, lse_again, grads_again) = results
    assert torch.equal(out, again) and torch.equal(lse, lse_again)
    assert all(torch.equal(a, b) for a, b in zip(grads, grads_again, strict=True))


@pytest.mark.parametrize("rows, keys", [(0, 3), (2, 0)])
def test_nothing_to_compute(rows, keys):
    query, key = torch.randn(2, 1, rows, 8), torch.randn(2, 1, keys, 8)
    got = cross_attention(query, [(key, key)], return_lse=True, return_weights="mean", backend="triton")
    expected = cross_attention(query, [(key, key)], return_lse=True, return_weights="mean", backend="reference")
    torch.testing.assert_close(got, expected)


def test_rejects():
    query, sources = torch.randn(1, 1, 2, 8, dtype=torch.float64), [(torch.randn(1, 1, 2, 8).double(),) * 2]
    with pytest.raises(ValueError, match="float64"):
        cross_attention(query, sources, backend="triton")
    with pytest.raises(ValueError, match="dropout"):
        cross_attention(query.float(), [(sources[0][0].float(),) * 2], dropout_p=0.5, backend="triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "norm, activation, gated",
    [(None, "tanh", True), ("layer", "sigmoid", True), ("rms", None, True), ("layer", None, False)],
)
def test_gated_residual(norm, activation, gated, dtype):
    features = 24
    x, y = (torch.randn(3, 5, features, dtype=dtype) for _ in range(2))
    options = {"gate": torch.randn(1, dtype=dtype) if gated else None, "weight": None, "bias": None}
    if norm:
        options["weight"] = torch.randn(features, dtype=dtype)
    if norm == "layer":
        options["bias"] = torch.randn(features, dtype=dtype)
    results = []
    for backend, kind in (("triton", dtype), ("reference", torch.float64)):
        of = [None if t is None else t.to(kind).requires_grad_() for t in (x, y, *options.values())]
        given = dict(zip(options, of[2:], strict=True))
        out = gated_residual(*of[:2], **given, activation=activation, norm=norm, backend=backend)
        out = out if norm else (out,)
        total = sum((o.double() * torch.linspace(-1, 1 + i, o.numel()).view(o.shape)).sum() for i, o in enumerate(out))
        results.append((*out, *torch.autograd.grad(total, [t for t in of if t is not None])))
    for got, expected in zip(*results, strict=True):
        assert got.dtype == dtype
        close(got.detach(), expected.detach(), dtype, "gated residual")


def test_compile_fullgraph():
    query, sources, options = _more_keys_than_are_kept()
    query = query.float().requires_grad_()
    sources = [s._replace(key=s.key.float(), value=s.value.float()) for s in sources]
    compiled = torch.compile(
        lambda q: cross_attention(q, sources, **options, backend="triton"), fullgraph=True, backend="aot_eager"
    )
    results = []
    for f in (compiled, lambda q: cross_attention(q, sources, **options, backend="triton")):
        out = f(query)
        results.append((out, *torch.autograd.grad(out.square().sum(), query)))
    for got, expected in zip(*results, strict=True):
        assert torch.equal(got, expected)
