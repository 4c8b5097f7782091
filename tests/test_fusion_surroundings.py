"""What surrounds attention: tracers, modes, default devices, masks of numbers, memory of results, numpy's numbers."""

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

import mmfast
from mmfast import nn
from mmfast.fusion import PackedSource, Source, attention, attention_pool, gated_residual, packed_attention

MASK = torch.tensor([[True, True, True], [False, True, True], [False, False, False]])  # nothing, one and all to see


def _tensors(lengths=(5, 7), dims=(16, 24), dtype=torch.float32, requires_grad=False):
    shapes = [(lengths[0], dims[0])] + [(n, d) for n in lengths[1:] for d in dims]
    return [torch.randn(2, 4, *shape, dtype=dtype, requires_grad=requires_grad) for shape in shapes]


def _cross(query, key, value, lengths):
    source = Source(key, value, lengths=lengths)
    out, lses = mmfast.cross_attention(query, [source, (key, value)], fusion="decoupled", return_lse=True)
    return out, *lses


def _pool(query, key, value, lengths):
    return attention_pool(query, [(key, value)], query_lengths=lengths)


def _packed(query, key, value, offsets):
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    return packed_attention(query, offsets[0], [PackedSource(key, value, offsets[1])])


RUNS = {
    "lengths": (_cross, torch.tensor([3, 7]), torch.tensor([7, 1])),
    "pool": (_pool, torch.tensor([3, 5]), torch.tensor([0, 2])),
    "packed": (_packed, torch.tensor([[0, 2, 5], [0, 3, 7]]), torch.tensor([[0, 4, 5], [0, 0, 7]])),
}


def _close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["trace", "real", "fake", "symbolic"])
@pytest.mark.parametrize("name", RUNS)
def test_a_recorded_graph_holds_no_lengths(name, how):
    """Traced with some lengths or offsets, it is right for others."""
    run, given, others = RUNS[name]
    tensors = _tensors()
    if how == "trace":
        graph = torch.jit.trace(run, (*tensors, given), check_trace=False)
    else:
        graph = make_fx(run, tracing_mode=how)(*tensors, given)
    for lengths in (given, others):
        _close(graph(*tensors, lengths), run(*tensors, lengths))


@pytest.mark.parametrize("name", RUNS)
def test_lengths_without_values(name):
    run, given, others = RUNS[name]
    tensors = _tensors()
    expected = run(*tensors, given)
    with FakeTensorMode() as mode:
        shapes = run(*[mode.from_tensor(x) for x in (*tensors, given)])
    as_tuple = lambda x: x if isinstance(x, tuple) else (x,)  # noqa: E731
    assert [x.shape for x in as_tuple(shapes)] == [x.shape for x in as_tuple(expected)]
    together = torch.func.vmap(run, in_dims=(None, None, None, 0))(*tensors, torch.stack([given, others]))
    for a, b, c in zip(*map(as_tuple, (together, expected, run(*tensors, others))), strict=True):
        _close(a, torch.stack([b, c]))
    _close(torch.func.functionalize(run)(*tensors, others), run(*tensors, others))


def test_wrong_lengths_are_refused_inside_vmap():
    with pytest.raises(ValueError, match=r"query_lengths must lie in \[0, 5\]"):
        torch.func.vmap(_pool, in_dims=(None, None, None, 0))(*_tensors(), torch.tensor([[1, 2], [3, 6]]))


@pytest.mark.parametrize("name", RUNS)
def test_a_default_device_changes_nothing(name):
    run, given, _ = RUNS[name]
    tensors = _tensors()
    with torch.device("meta"):
        out = run(*tensors, given)
    _close(out, run(*tensors, given))


def test_nested_tensors_in_one_graph():
    def nested(*lengths):
        rows = [torch.randn(n, 4, 16) for n in lengths]
        return torch.nested.nested_tensor(rows, layout=torch.jagged).transpose(1, 2)

    def run(query, key):
        return mmfast.cross_attention(query, [(key, key)])

    query, key = nested(3, 2, 4), nested(2, 5, 1)
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    _close(compiled(query, key).values(), run(query, key).values())


class _Watch(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [_Watch(), torch.device("cpu")], ids=["watch", "device"])
def test_modes_leave_masked_rows_alone(mode):
    """A mode that watches functions is no reason to leave attention to torch, which knows no ``masked_rows``."""
    layer, x, y = nn.MultiheadAttention(16, 4, batch_first=True, masked_rows="zero"), *torch.randn(2, 3, 3, 16)
    expected = layer(x, y, y, key_padding_mask=MASK)
    with mode:
        results = layer(x, y, y, key_padding_mask=MASK)
    _close(results, expected)
    assert results[0].isfinite().all()


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_masked_rows_of_self_attention_at_inference(grad, need_weights):
    layer = nn.MultiheadAttention(16, 4, batch_first=True, masked_rows="zero").eval()
    x = torch.randn(3, 3, 16)
    with torch.set_grad_enabled(grad):
        out, weights = layer(x, x, x, key_padding_mask=MASK, need_weights=need_weights)
    _close(out[0], layer.out_proj.bias.detach().expand(3, 16))
    assert out.isfinite().all() and (weights is None or (weights[0] == 0).all())


@pytest.mark.native
@pytest.mark.parametrize("backend", [None, "cpu", "torch"])
@pytest.mark.parametrize("lowest", [-1e4, -1e9, -1e30, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("shape", [(5, 7), (1, 130)], ids=["panel", "few"])
def test_rows_of_which_a_mask_of_numbers_leaves_nothing(shape, lowest, backend):
    """As the formula: their probabilities cannot be had from a log-sum-exp of that size."""
    for per_head in (False, True):
        mask = torch.zeros(2, 4 if per_head else 1, *shape)
        mask[0] = lowest
        results = []
        for one in (backend, "reference"):
            torch.manual_seed(0)
            tensors = _tensors(shape, requires_grad=True)
            source = Source(*tensors[1:], mask=mask)
            out = mmfast.cross_attention(tensors[0], [source], backend=one)
            with torch.no_grad():
                again = mmfast.cross_attention(tensors[0], [source], backend=one)
            results.append([out, again, *torch.autograd.grad(out.square().sum(), tensors)])
            if one != "torch":
                results[-1] += mmfast.cross_attention(tensors[0], [source], return_weights="mean", backend=one)[1]
        for a, b in zip(*results, strict=False):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.native
def test_how_far_is_far():
    assert mmfast._backend._C.fusion_far == attention._FAR


@pytest.mark.native
@pytest.mark.parametrize("requires_grad", [False, True])
def test_weights_may_be_written_to(requires_grad):
    query, key, value = _tensors(requires_grad=requires_grad)
    for weights in (True, "mean"):
        _, (one, other) = mmfast.cross_attention(query, [(key, value)] * 2, return_weights=weights)
        assert not one._is_view() and not other._is_view()
        one.mul_(2)


@pytest.mark.native
def test_gradients_of_gates_have_memory_of_their_own():
    query, key, value = _tensors()
    gates = [torch.rand(2, 4, 5, 1, requires_grad=True) for _ in range(2)]
    mmfast.cross_attention(query, [Source(key, value, gate=g) for g in gates], fusion="decoupled").sum().backward()
    sizes = [g.grad.untyped_storage().nbytes() for g in gates]
    assert sizes == [g.nbytes for g in gates]


def test_numbers_of_numpy():
    query, key, value = _tensors()
    sources = [Source(key, value, gate=np.float32(0.5))]
    options = {"scale": np.float32(0.25), "dropout_p": np.float32(0), "softcap": np.int64(3)}
    out = mmfast.cross_attention(query, sources, fusion="decoupled", **options)
    _close(out, 0.5 * mmfast.cross_attention(query, [(key, value)], scale=0.25, softcap=3))
    layer = nn.CrossAttentionFusion(np.int64(16), np.int32(4), [np.int64(8)], dropout=np.float32(0))
    assert layer(torch.randn(2, 3, 16), [torch.randn(2, 5, 8)]).shape == (2, 3, 16)
    assert nn.WeightedFusion(np.int64(2), np.int64(3)).weight.shape == (2, 3)
    assert nn.TemporalPooling("attentive", np.int64(3))(torch.randn(2, 4, 3)).shape == (2, 3)


X = torch.randn(2, 3, 4)
WRONG = {
    "x must be a tensor": (TypeError, lambda: gated_residual(None, X)),
    "y must be a tensor": (TypeError, lambda: gated_residual(X, None)),
    "gate must be a tensor, or None": (TypeError, lambda: gated_residual(X, X, 0.5)),
    "weight must be a tensor, or None": (TypeError, lambda: gated_residual(X, X, norm="rms", weight=[1.0] * 4)),
    "eps must be a number": (TypeError, lambda: gated_residual(X, X, norm="rms", eps="small")),
    "x must have features": (ValueError, lambda: gated_residual(X[0, 0, 0], X[0, 0, 0], norm="rms")),
    r"inputs\[1\] must be a floating point tensor": (TypeError, lambda: nn.WeightedFusion(2)([X, X.long()])),
    "inputs must broadcast": (ValueError, lambda: nn.WeightedFusion(2)([X, X[..., :3]])),
    "inputs must have 3 features": (ValueError, lambda: nn.WeightedFusion(1, 3)([X[0, 0, 0]])),
    "present must be": (ValueError, lambda: nn.WeightedFusion(1)([X[0, 0, 0]], torch.ones(1, 1) > 0)),
    "x must be a floating point tensor": (TypeError, lambda: nn.TemporalPooling()(X.long())),
    "statistics must be a name": (TypeError, lambda: nn.TemporalPooling(3)),
    "hidden_dim must be a positive integer": (ValueError, lambda: nn.TemporalPooling("attentive", 4, hidden_dim=0)),
    "dropout must be a number": (TypeError, lambda: nn.CrossAttentionFusion(16, 4, [8], dropout="some")),
    "embed_dim must be a positive integer": (ValueError, lambda: nn.CrossAttentionFusion(True, 1, [8])),
    "sources must be a PackedSource or a list": (TypeError, lambda: packed_attention(X, torch.tensor([0, 2]), None)),
}


@pytest.mark.parametrize("message", WRONG)
def test_errors_name_the_argument(message):
    error, call = WRONG[message]
    with pytest.raises(error, match=message):
        call()
