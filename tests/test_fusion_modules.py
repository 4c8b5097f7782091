"""The modules of the fusion slice: torch's own, and what their docstrings promise."""

from __future__ import annotations

import copy
import inspect
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F

import mmfast
from mmfast.fusion import modules
from mmfast.nn import CrossAttentionFusion, MultiheadAttention, TemporalPooling, WeightedFusion

E, H, N, L, S = 12, 3, 2, 4, 5


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


# ---- MultiheadAttention


def pair(**options):
    """torch's module, and ours with its parameters."""
    theirs = torch.nn.MultiheadAttention(E, H, dtype=torch.float64, **options)
    with torch.no_grad():
        for p in theirs.parameters():
            p.normal_(std=0.5)
    ours = MultiheadAttention(E, H, dtype=torch.float64, **options)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return theirs, ours


def arguments(batch_first=False, batched=True, kdim=E, vdim=E):
    def sequence(length, dim):
        x = randn(N, length, dim)
        return x[0] if not batched else x if batch_first else x.transpose(0, 1).contiguous()

    return sequence(L, E), sequence(S, kdim), sequence(S, vdim)


def mask_of(kind, shape):
    if kind is None:
        return None
    mask = torch.rand(shape) < 0.3
    mask[..., :1] = False
    return mask if kind == "bool" else randn(*shape).masked_fill(mask, -torch.inf)


def same(theirs, ours, args, **call):
    """Output, weights, and gradients of inputs and parameters are the same, NaN where torch has them."""
    results = []
    for module in (theirs, ours):
        module.zero_grad()
        given = [x.detach().clone().requires_grad_() for x in args]
        masks = {
            k: v.clone().requires_grad_() if torch.is_tensor(v) and v.is_floating_point() else v
            for k, v in call.items()
        }
        torch.manual_seed(5)
        out, weights = module(*given, **masks)
        total = (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum()
        if weights is not None:
            total = total + (weights * torch.linspace(-1, 1, weights.numel()).view(weights.shape)).sum()
        total.backward()
        gradients = [x.grad for x in (*given, *(m for m in masks.values() if torch.is_tensor(m) and m.requires_grad))]
        parameters = [p.grad for _, p in sorted(module.named_parameters())]
        results.append((out, weights, gradients, parameters))
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-10, equal_nan=True)


LAYOUTS = [{"batch_first": True}, {"batch_first": False}, {"batched": False}]
BUILDS = [{}, {"bias": False}, {"kdim": 7, "vdim": 9}, {"add_bias_kv": True}, {"add_zero_attn": True},
          {"add_bias_kv": True, "add_zero_attn": True, "kdim": 7}]  # fmt: skip


@pytest.mark.parametrize("need_weights, average", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("build", BUILDS, ids=str)
def test_drop_in(build, layout, need_weights, average):
    theirs, ours = pair(batch_first=layout.get("batch_first", False), **build)
    args = arguments(**layout, kdim=build.get("kdim", E), vdim=build.get("vdim", E))
    batch = N if layout.get("batched", True) else 1
    padding = (N, S) if layout.get("batched", True) else (S,)
    for kind, of_padding, of_mask in itertools.product(
        ("bool", "float"), (None, padding), (None, (L, S), (batch * H, L, S))
    ):
        same(
            theirs,
            ours,
            args,
            key_padding_mask=mask_of(of_padding and kind, of_padding),
            attn_mask=mask_of(of_mask and kind, of_mask),
            need_weights=need_weights,
            average_attn_weights=average,
        )


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("which", ["self", "key is value", "query is key"])
def test_drop_in_shared_inputs(which, need_weights, dropout):
    for training in (True, False):
        theirs, ours = pair(dropout=dropout, batch_first=True)
        theirs.train(training), ours.train(training)
        x, z = randn(N, L, E), randn(N, L, E)
        args = {"self": (x, x, x), "key is value": (x, z, z), "query is key": (x, x, z)}[which]
        results = []
        for module in (theirs, ours):
            torch.manual_seed(4)
            results.append(module(*args, need_weights=need_weights))
        torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("build", [{}, {"add_bias_kv": True}, {"add_zero_attn": True}], ids=str)
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_drop_in_masked_rows(kind, build, need_weights):
    """Queries that may attend to nothing are what the running torch makes of them."""
    theirs, ours = pair(batch_first=True, **build)
    mask, padding = torch.zeros(L, S, dtype=torch.bool), torch.zeros(N, S, dtype=torch.bool)
    mask[1], padding[1] = True, True
    as_float = torch.zeros(L, S, dtype=torch.float64).masked_fill(mask, -torch.inf)
    padding_float = torch.zeros(N, S, dtype=torch.float64).masked_fill(padding, -torch.inf)
    args = arguments(batch_first=True)
    for m, p in ((mask, None), (None, padding), (mask, padding)):
        if kind == "float":
            m, p = None if m is None else as_float, None if p is None else padding_float
        call = {"attn_mask": m, "key_padding_mask": p, "need_weights": need_weights}
        results = [module(*args, **call) for module in (theirs, ours)]
        torch.testing.assert_close(results[1], results[0], equal_nan=True)
        same_rows = [[x.requires_grad_() for x in copy.deepcopy(args)] for _ in range(2)]
        for module, given in zip((theirs, ours), same_rows, strict=True):
            module(*given, **call)[0].sum().backward()
        for a, b in zip(*same_rows, strict=True):
            torch.testing.assert_close(a.grad, b.grad, equal_nan=True)


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("batch, keys", [(0, S), (N, 0), (0, 0)])
def test_drop_in_without_items_or_keys(batch, keys, average):
    theirs, ours = pair(batch_first=True)
    args = randn(batch, L, E), randn(batch, keys, E), randn(batch, keys, E)
    for padding, mask in itertools.product((None, (batch, keys)), (None, (L, keys))):
        given = {"key_padding_mask": mask_of(padding and "float", padding)}
        given["attn_mask"] = None if mask is None else randn(*mask)
        same(theirs, ours, args, average_attn_weights=average, **given)


def test_masked_rows_zero():
    ours = MultiheadAttention(E, H, batch_first=True, dtype=torch.float64, masked_rows="zero")
    args = [x.requires_grad_() for x in arguments(batch_first=True)]
    padding = torch.tensor([[False] * S, [True] * S])
    out, weights = ours(*args, key_padding_mask=padding)
    torch.testing.assert_close(out[1], ours.out_proj.bias.expand(L, E))
    assert not weights[1].any() and weights[0].all()
    gradients = torch.autograd.grad(out.square().sum(), args)
    assert all(not g[1].any() and g[0].any() for g in gradients)
    with pytest.raises(ValueError, match="masked_rows must be one of 'torch', 'zero', got 'nan'"):
        MultiheadAttention(E, H, masked_rows="nan")


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("honest", [True, False])
def test_drop_in_causal_hint(honest, padded, need_weights):
    """Torch believes the hint, true or not, where it has a use for it."""
    theirs, ours = pair(batch_first=True)
    args = arguments(batch_first=True)
    mask = torch.ones(L, S, dtype=torch.bool).triu(1) if honest else mask_of("bool", (L, S))
    padding = mask_of("bool", (N, S)) if padded else None
    same(theirs, ours, args, attn_mask=mask, is_causal=True, key_padding_mask=padding, need_weights=need_weights)


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("kinds", [("bool", "float"), ("float", "bool")])
def test_drop_in_mixed_masks(kinds, need_weights):
    theirs, ours = pair(batch_first=True)
    masks = {"key_padding_mask": mask_of(kinds[0], (N, S)), "attn_mask": mask_of(kinds[1], (L, S))}
    same(theirs, ours, arguments(batch_first=True), need_weights=need_weights, **masks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_drop_in_dtypes(dtype):
    theirs, ours = pair(batch_first=True)
    args = arguments(batch_first=True)
    gold = ours(*args)
    for need_weights in (True, False):
        out, weights = ours.to(dtype)(*(x.to(dtype) for x in args), need_weights=need_weights)
        eager = theirs.to(dtype)(*(x.to(dtype) for x in args), need_weights=need_weights)[0]
        assert out.dtype == dtype and (weights is None or weights.dtype == dtype)
        error, theirs_error = ((x.double() - gold[0]).square().mean() for x in (out, eager))
        assert error <= 4 * theirs_error + torch.finfo(dtype).eps ** 2


def test_drop_in_signature():
    theirs = inspect.signature(torch.nn.MultiheadAttention.__init__).parameters
    ours = inspect.signature(MultiheadAttention.__init__).parameters
    assert list(ours)[: len(theirs)] == list(theirs)
    assert all(ours[name].default == theirs[name].default for name in theirs)
    assert all(ours[name].kind == inspect.Parameter.KEYWORD_ONLY for name in list(ours)[len(theirs) :])
    names = inspect.signature(torch.nn.MultiheadAttention.forward).parameters
    for name, parameter in inspect.signature(MultiheadAttention.forward).parameters.items():
        assert parameter.default == names[name].default
    assert isinstance(MultiheadAttention(E, H), torch.nn.MultiheadAttention)
    torch.manual_seed(0)
    first = torch.nn.MultiheadAttention(E, H, kdim=3, add_bias_kv=True).state_dict()
    torch.manual_seed(0)
    second = MultiheadAttention(E, H, kdim=3, add_bias_kv=True).state_dict()
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_drop_in_errors():
    """Whatever torch refuses is refused in its words."""
    theirs, ours = pair(batch_first=True)
    q, k, v = arguments(batch_first=True)
    bad = [
        ((q[..., :5], k, v), {}),
        ((q, k[:, :3], v), {}),
        ((q, k[..., :5], v[..., :5]), {}),
        ((q[0], k, v), {}),
        ((q[None], k, v), {}),
        ((q, k, v), {"is_causal": True}),
        ((q, k, v), {"attn_mask": torch.zeros(L, S + 1).bool()}),
        ((q, k, v), {"attn_mask": torch.zeros(N, L, S).bool()}),
        ((q, k, v), {"attn_mask": torch.zeros(L, S).long()}),
        ((q, k, v), {"attn_mask": torch.zeros(1, 1, L, S).bool()}),
        ((q, k, v), {"key_padding_mask": torch.zeros(N, S + 1).bool()}),
        ((q, k, v), {"key_padding_mask": torch.zeros(S).bool()}),
        ((q.float(), k, v), {}),
    ]
    for args, call in bad:
        with pytest.raises(Exception) as expected:
            theirs(*args, **call)
        with pytest.raises(type(expected.value)) as got:
            ours(*args, **call)
        assert str(got.value) == str(expected.value)
    for args in ((0, 1), (5, 3)):
        with pytest.raises(Exception) as expected:
            torch.nn.MultiheadAttention(*args)
        with pytest.raises(type(expected.value)) as got:
            MultiheadAttention(*args)
        assert str(got.value) == str(expected.value)


def test_attention_is_ours(monkeypatch):
    """The tests above would pass if everything were handed to torch."""
    calls = []
    monkeypatch.setattr(F, "multi_head_attention_forward", lambda *a, **k: calls.append(1))
    ours = MultiheadAttention(E, H, add_bias_kv=True, dtype=torch.float64)
    for kind in ("bool", "float"):
        for need_weights in (True, False):
            call = {"attn_mask": mask_of(kind, (L, S)), "key_padding_mask": mask_of(kind, (N, S))}
            ours(*arguments(), need_weights=need_weights, **call)
    assert not calls


def test_in_a_transformer():
    layer = torch.nn.TransformerDecoderLayer(E, H, 16, batch_first=True, dtype=torch.float64).eval()
    x, memory = randn(N, L, E), randn(N, S, E)
    expected = layer(x, memory)
    ours = MultiheadAttention(E, H, batch_first=True, dtype=torch.float64).eval()
    ours.load_state_dict(layer.multihead_attn.state_dict())
    layer.multihead_attn = ours
    torch.testing.assert_close(layer(x, memory), expected)


def test_compile_fullgraph():
    ours = MultiheadAttention(E, H, batch_first=True, kdim=7, vdim=7)
    x, z = torch.randn(N, L, E), torch.randn(N, S, 7)
    padding = torch.tensor([[False] * S, [True] * (S - 1) + [False]])
    for need_weights in (True, False):
        compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
        call = {"key_padding_mask": padding, "need_weights": need_weights}
        torch.testing.assert_close(compiled(x, z, z, **call), ours(x, z, z, **call))
    fusion = CrossAttentionFusion(E, H, [7, 5], fusion="decoupled", gate="tanh", qk_norm="rms")
    torch.nn.init.constant_(fusion.gate, 0.5)
    sources = [z, torch.randn(N, 3, 5)]
    lengths = [torch.tensor([S, 0]), None]
    compiled = torch.compile(fusion, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, sources, lengths=lengths), fusion(x, sources, lengths=lengths))


def test_autocast():
    theirs, ours = (m.float() for m in pair(batch_first=True))
    args, padding = [x.float() for x in arguments(batch_first=True)], mask_of("bool", (N, S))
    with torch.autocast("cpu", torch.bfloat16):
        for need_weights in (False, True):
            results = [m(*args, key_padding_mask=padding, need_weights=need_weights) for m in (ours, theirs)]
            assert results[0][0].dtype == results[1][0].dtype == torch.bfloat16
            torch.testing.assert_close(*results, rtol=0.05, atol=0.05)
        fusion = CrossAttentionFusion(E, H, [E], gate="sigmoid", pool="mean", qk_norm="layer")
        assert fusion(args[0], [args[1]]).isfinite().all()


def modules_and_arguments():
    """One of each module, with something of every kind in it."""
    x, sources = torch.randn(N, L, E), [torch.randn(N, S, 7), torch.randn(N, 2, 5)]
    gated = {"fusion": "decoupled", "gate": "per_head", "qk_norm": "rms", "pool": "attention"}
    return [
        (
            MultiheadAttention(E, H, kdim=7, add_bias_kv=True, batch_first=True),
            (x, sources[0], x[:, :1].expand(N, S, E)),
        ),
        (CrossAttentionFusion(E, H, [7, 5], **gated), (x, sources)),
        (WeightedFusion(2, E), ([x, -x], torch.tensor([[True, False], [True, True]]))),
        (TemporalPooling(modules.POOLS, E), (x, torch.tensor([L, 0]))),
    ]


def first(result):
    return result[0] if isinstance(result, tuple) else result


@pytest.mark.parametrize("index", range(4))
def test_copied_pickled_saved_and_compiled(index):
    module, args = modules_and_arguments()[index]
    expected = first(module(*args))
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(first(other(*args)), expected)
    fresh, _ = modules_and_arguments()[index]
    assert not torch.equal(first(fresh(*args)), expected) or index == 2  # equal weights at the beginning
    fresh.load_state_dict(module.state_dict(), strict=True)
    assert torch.equal(first(fresh(*args)), expected)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(first(compiled(*args)), expected)


def test_dropout_is_repeatable():
    x, sources = torch.randn(N, L, E), [torch.randn(N, S, 7), torch.randn(N, 2, 5)]
    module = CrossAttentionFusion(E, H, [7, 5], dropout=0.5)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        module.zero_grad()
        out = module(x, sources)
        out.square().sum().backward()
        results.append([out, *(p.grad.clone() for p in module.parameters())])
    assert all(map(torch.equal, results[0], results[1])) and not torch.equal(results[0][0], results[2][0])


# ---- CrossAttentionFusion


def by_hand(module, query, sources, lengths):
    """The formula, with the sources one after the other and no attention but torch's."""
    x = module.pre_norm(query) if module.pre_norm else query

    def heads(t, norm=None):
        t = t.reshape(*t.shape[:2], -1, module.head_dim)
        return (norm(t) if norm else t).transpose(1, 2)

    q = heads(module.q_proj(x), module.q_norm)
    count = len(sources)
    groups = [range(count)] if module.fusion == "joint" else [[j] for j in range(count)]
    attended = 0
    for g, members in enumerate(groups):
        keys, values, masks = [], [], []
        for j in members:
            k, v = module.kv_proj[j](sources[j]).chunk(2, -1)
            keys.append(heads(k, module.k_norm[j] if module.k_norm else None))
            values.append(heads(v))
            exists = torch.arange(sources[j].shape[1]) < (lengths[j][:, None] if lengths[j] is not None else 10**6)
            masks.append(exists.expand(query.shape[0], -1))
        mask = torch.cat(masks, 1)[:, None, None]
        one = F.scaled_dot_product_attention(q, torch.cat(keys, 2), torch.cat(values, 2), mask, enable_gqa=True)
        if module.gate_kind == "tanh":
            one = one * module.gate[g].tanh()
        elif module.gate_kind == "per_head":
            one = one * module.gate[g][:, None, None]
        elif module.gate_kind == "sigmoid":
            factors = 2 * torch.sigmoid(module.gate_proj(x)).view(*x.shape[:2], len(groups), module.num_heads)
            one = one * factors[:, :, g].transpose(1, 2)[..., None]
        attended = attended + one
    y = module.out_proj(attended.transpose(1, 2).flatten(2))
    return y


@pytest.mark.parametrize("gate", modules.GATES)
@pytest.mark.parametrize("fusion", ["joint", "decoupled"])
@pytest.mark.parametrize("options", [
    {}, {"norm": "post", "qk_norm": "rms", "num_kv_heads": 1}, {"norm": None, "qk_norm": "layer", "residual": False},
    {"head_dim": 2, "bias": False}], ids=str)  # fmt: skip
def test_cross_attention_fusion(options, fusion, gate):
    sources, lengths = [randn(N, 6, 7), randn(N, 3, 5)], [torch.tensor([6, 2]), None]
    query = randn(N, L, E)
    query_lengths = torch.tensor([L, 2])
    for pool in (None, "mean", "attention"):
        module = CrossAttentionFusion(E, 4, [7, 5], fusion=fusion, gate=gate, pool=pool, dtype=torch.float64, **options)
        with torch.no_grad():
            for p in module.parameters():
                p.normal_()
        y = by_hand(module, query, sources, lengths)
        if pool == "mean":
            exists = (torch.arange(L) < query_lengths[:, None])[..., None]
            y = ((query + y if module.residual else y) * exists).sum(1) / query_lengths[:, None]
        elif module.residual:
            y = query + y
        y = module.post_norm(y) if module.post_norm else y
        if pool == "attention":
            heads = y.unflatten(2, (4, -1)).transpose(1, 2)
            mask = (torch.arange(L) < query_lengths[:, None])[:, None, None]
            y = F.scaled_dot_product_attention(module.probe.expand(N, -1, -1, -1), heads, heads, mask).flatten(1)
        call = {"lengths": lengths, **({"query_lengths": query_lengths} if pool else {})}
        torch.testing.assert_close(module(query, sources, **call), y)


@pytest.mark.parametrize("pool", ["mean", "attention"])
def test_fusion_does_not_look_beyond_the_lengths(pool):
    module = CrossAttentionFusion(E, 4, [7], fusion="decoupled", gate="sigmoid", pool=pool)
    x, z, lengths, results = torch.randn(N, L, E), torch.randn(N, S, 7), torch.tensor([L, 2]), []
    for beyond in (0.0, torch.nan):
        given = x.masked_fill((torch.arange(L) >= lengths[:, None])[..., None], beyond).requires_grad_()
        out = module(given, [z], query_lengths=lengths)
        results.append([out, *torch.autograd.grad(out.square().sum(), (given, *module.parameters()))])
    torch.testing.assert_close(results[1], results[0])
    assert results[0][1][:, :2].abs().sum(2).all() and not results[1][1][1, 2:].any()


@pytest.mark.parametrize("fusion", ["joint", "decoupled"])
def test_fusion_starts_as_identity(fusion):
    x, sources = torch.randn(N, L, E), [torch.randn(N, 6, 7), torch.randn(N, 3, 5)]
    module = CrossAttentionFusion(E, 4, [7, 5], fusion=fusion, gate="tanh")
    assert torch.equal(module(x, sources), x)
    module(x, sources).sum().backward()
    assert module.gate.grad.all()
    torch.manual_seed(1)
    plain = CrossAttentionFusion(E, 4, [7, 5], fusion=fusion)
    for gate in ("sigmoid", "per_head"):
        gated = CrossAttentionFusion(E, 4, [7, 5], fusion=fusion, gate=gate)
        gated.load_state_dict({**gated.state_dict(), **plain.state_dict()})
        torch.testing.assert_close(gated(x, sources), plain(x, sources))


def test_fusion_masks_and_weights():
    x, z = randn(N, L, E), randn(1, 6, 7)
    module = CrossAttentionFusion(E, 4, [7], dtype=torch.float64, dropout=0.5).eval()
    mask = torch.rand(N, 1, L, 6) < 0.5
    y, weights = module(x, [z], masks=[mask], return_weights="mean")
    torch.testing.assert_close(weights[0].sum(2), mask.any(3)[:, 0].double())
    assert not weights[0][~mask[:, 0]].any()
    torch.testing.assert_close(module(x, [z], masks=[mask]), y)
    module.train()
    assert not torch.equal(module(x, [z], masks=[mask]), y)


@pytest.mark.parametrize("pool", [None, "mean", "attention"])
def test_fusion_gradcheck(pool):
    module = CrossAttentionFusion(4, 2, [3, 2], fusion="decoupled", gate="sigmoid", pool=pool, dtype=torch.float64)
    with torch.no_grad():
        for p in module.parameters():
            p.normal_()
    x, sources = randn(2, 3, 4).requires_grad_(), [randn(2, 3, 3).requires_grad_(), randn(2, 1, 2).requires_grad_()]
    names, values = zip(*module.named_parameters(), strict=True)

    def function(x, a, b, *parameters):
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x, [a, b]))

    assert torch.autograd.gradcheck(function, (x, *sources, *values), fast_mode=True)


def test_fusion_rejects():
    for message, args, options in (
        ("embed_dim must be divisible by num_heads=5", (E, 5, [3]), {}),
        ("num_kv_heads must divide num_heads=4", (E, 4, [3]), {"num_kv_heads": 3}),
        ("source_dims must be a list", (E, 4, []), {}),
        (r"source_dims\[0\] must be a positive", (E, 4, [0]), {}),
        ("num_heads must be a positive integer, got 0", (E, 0, [3]), {}),
        ("gate must be one of None, 'tanh', 'sigmoid', 'per_head', got 'relu'", (E, 4, [3]), {"gate": "relu"}),
        ("pool must be one of", (E, 4, [3]), {"pool": "max"}),
        ("norm must be one of", (E, 4, [3]), {"norm": "layer"}),
        (r"dropout must lie in \[0, 1\]", (E, 4, [3]), {"dropout": 2.0}),
    ):
        with pytest.raises(ValueError, match=message):
            CrossAttentionFusion(*args, **options)
    module, x, z = CrossAttentionFusion(E, 4, [7], pool="mean"), torch.randn(N, L, E), torch.randn(N, 6, 7)
    for message, args, call in (
        (r"query must be \(B, L, 12\)", (x[0], [z]), {}),
        ("sources must be a list of 1", (x, z), {}),
        (r"sources\[0\] must be \(B, S, 7\)", (x, [x]), {}),
        ("lengths must be a list of 1", (x, [z]), {"lengths": []}),
        ("return_weights must be False with pool='mean'", (x, [z]), {"return_weights": True}),
    ):
        with pytest.raises(ValueError, match=message):
            module(*args, **call)
    with pytest.raises(ValueError, match="query_lengths needs a pool"):
        CrossAttentionFusion(E, 4, [7])(x, [z], query_lengths=torch.tensor([1, 2]))


# ---- WeightedFusion


@pytest.mark.parametrize("embed_dim", [None, 3])
@pytest.mark.parametrize("normalize", ["softmax", "relu"])
def test_weighted_fusion(normalize, embed_dim):
    module = WeightedFusion(3, embed_dim, normalize=normalize, dtype=torch.float64)
    inputs = [randn(2, 4, 3), randn(2, 1, 3), randn(2, 4, 3)]
    torch.testing.assert_close(module(inputs), sum(inputs) / 3, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        module.weight.copy_(randn(*module.weight.shape).abs() + 0.1)
    w = module.weight.detach()
    alpha = w.softmax(0) if normalize == "softmax" else w / (w.sum(0) + 1e-4)
    torch.testing.assert_close(module(inputs), sum(a * x for a, x in zip(alpha, inputs, strict=True)))
    present = torch.tensor([[True, False, True], [False, False, False]])
    inputs[1][0] = torch.nan
    alpha = w[[0, 2]].softmax(0) if normalize == "softmax" else w[[0, 2]] / (w[[0, 2]].sum(0) + 1e-4)
    out = module(inputs, present)
    torch.testing.assert_close(out[0], alpha[0] * inputs[0][0] + alpha[1] * inputs[2][0])
    assert not out[1].any()
    out.sum().backward()
    assert module.weight.grad.isfinite().all()


def test_weighted_fusion_rejects():
    for error, message, call in (
        (ValueError, "num_inputs must be a positive integer", lambda: WeightedFusion(0)),
        (ValueError, "normalize must be one of", lambda: WeightedFusion(2, normalize="sum")),
        (ValueError, "inputs must be a list of 2 tensors, got 1", lambda: WeightedFusion(2)([randn(2, 3)])),
        (ValueError, "inputs must have 4 features", lambda: WeightedFusion(1, 4)([randn(2, 3)])),
        (TypeError, "present must be a boolean", lambda: WeightedFusion(1)([randn(2, 3)], torch.ones(2, 1))),
        (ValueError, r"present must be \(2, 1\)", lambda: WeightedFusion(1)([randn(2, 3)], torch.ones(2, 2).bool())),
    ):
        with pytest.raises(error, match=message):
            call()


# ---- TemporalPooling


def test_temporal_pooling():
    """An item is pooled as it is alone, whatever pads it."""
    module = TemporalPooling(("mean", "max", "std", "attentive"), 3, hidden_dim=5, dtype=torch.float64)
    x, lengths = randn(4, 6, 3), torch.tensor([6, 2, 1, 0])
    padded = x.masked_fill((torch.arange(6) >= lengths[:, None])[..., None], torch.nan).requires_grad_()
    out = module(padded, lengths)
    assert out.shape == (4, 12) and not out[3].any()
    for b in range(3):
        one = x[b, : lengths[b]]
        w = (
            module.score[2].weight @ torch.tanh(one @ module.score[0].weight.T + module.score[0].bias[None]).T
        ).softmax(1)
        std = (one.var(0, correction=0) + 1e-5).sqrt()
        torch.testing.assert_close(out[b], torch.cat([one.mean(0), one.amax(0), std, (w @ one)[0]]))
        torch.testing.assert_close(module(one[None])[0], out[b])
    out.sum().backward()
    assert padded.grad.isfinite().all()
    assert all(not padded.grad[b, n:].any() for b, n in enumerate(lengths))
    assert module(x[:, :0]).eq(0).all()
    assert all(p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("lengths", [None, torch.tensor([3000, 1501])])
def test_pools_of_half_precision(lengths, dtype):
    """3000 · 40 is no float16, 1501 no bfloat16."""
    x = (torch.randn(2, 3000, 4) + 40).to(dtype)
    module = TemporalPooling(modules.POOLS, 4).to(dtype)
    out, gold = module(x, lengths), module.double()(x.double(), lengths)
    assert out.dtype == dtype
    assert ((out.double() - gold) / gold).abs().max() < torch.finfo(dtype).eps
    pooled = CrossAttentionFusion(4, 2, [4], norm=None, pool="mean", dtype=dtype)
    out, gold = (m(t, [t[:, :5]], query_lengths=lengths) for m, t in
                 ((pooled, x), (copy.deepcopy(pooled).double(), x.double())))  # fmt: skip
    assert ((out.double() - gold) / gold.abs().max()).abs().max() < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("statistic", modules.POOLS)
def test_temporal_pooling_gradcheck(statistic):
    module = TemporalPooling(statistic, 3, dtype=torch.float64)
    lengths = torch.tensor([4, 2, 0])
    assert torch.autograd.gradcheck(lambda x: module(x, lengths), randn(3, 4, 3).requires_grad_())
    assert torch.autograd.gradgradcheck(lambda x: module(x, lengths), randn(3, 4, 3).requires_grad_())


def test_temporal_pooling_rejects():
    x = randn(2, 3, 4)
    for message, call in (
        ("statistics must be one of 'mean', 'max', 'std', 'attentive', got 'sum'", lambda: TemporalPooling("sum")),
        ("statistics must name at least one", lambda: TemporalPooling(())),
        ("embed_dim must be a positive integer for 'attentive'", lambda: TemporalPooling("attentive")),
        (r"x must be \(B, T, C\)", lambda: TemporalPooling()(x[0])),
        (r"lengths must lie in \[0, 3\]", lambda: TemporalPooling()(x, torch.tensor([4, 1]))),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_exported():
    assert {"CrossAttentionFusion", "MultiheadAttention", "TemporalPooling", "WeightedFusion"} <= set(mmfast.nn.__all__)
