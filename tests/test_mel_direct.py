"""The one native call of `mmfast.mel.direct` beside the operators: the same numbers, and all that autograd promises."""

from __future__ import annotations

import gc

import pytest
import torch
import torch._dynamo.compiled_autograd
from conftest import need_cuda, need_native
from numerics import assert_no_worse_than_eager
from torch.utils._python_dispatch import TorchDispatchMode

from mmfast.mel import MelConfig, direct, extract, op, reference

CONFIGS = {
    "logmel": MelConfig(n_mels=20, log="log10", log_floor=1e-10),
    "whisper": MelConfig(
        n_fft=400, hop_length=160, n_mels=80, log="log10", log_floor=1e-10, top_db=3.0, top_db_scope="batch",
        output_offset=4.0, output_scale=0.25,
    ),
    "by_item": MelConfig(n_mels=20, log="db", log_floor=1e-10, top_db=20.0, layout="time_feature"),
    "mfcc": MelConfig(n_fft=101, hop_length=40, n_mels=12, log="db", log_floor=1e-10, top_db=20.0, n_mfcc=5),
    "kaldi": MelConfig(
        n_fft=512, win_length=400, hop_length=160, n_mels=23, framing="kaldi", mel_scale="kaldi", remove_dc=True,
        preemphasis=0.97, log="ln", log_floor=1e-7, energy="prepend", normalized="window",
    ),
}  # fmt: skip
EACH = pytest.mark.parametrize("name", CONFIGS)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)], autouse=True)
def device(request: pytest.FixtureRequest) -> str:
    need_native()
    if request.param == "cuda":
        need_cuda()
    return request.param


def samples(device: str, *shape: int, dtype=torch.float32, **options) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(*(shape or (3, 5000)), generator=generator) * torch.linspace(0.01, 1, (shape or (3, 5000))[-1])
    return x.to(device=device, dtype=dtype).requires_grad_(**options)


def of_operators(x: torch.Tensor, config: MelConfig, lengths: torch.Tensor | None = None):
    rows, group = x if x.dim() == 2 else x[None], int(config.top_db_scope == "item")
    valid = None if lengths is None else lengths.reshape(-1)
    out, counts, _ = torch.ops.mmfast.mel_forward(rows, None, None, None, valid, group, 0, config.key)
    out = out if x.dim() == 2 else out[0]
    return out if lengths is None else (out, counts.view(lengths.shape))


def some_lengths(x: torch.Tensor) -> torch.Tensor:
    """The whole of a row, nothing and a part of the others; of ``(T,)`` samples a part."""
    most = x.shape[-1]
    values = [most, 0, 2345 % most][: x.shape[0]] if x.dim() == 2 else most // 2
    return torch.tensor(values, dtype=torch.int64, device=x.device)


@EACH
@pytest.mark.parametrize("shape", [(3, 5000), (5000,), (1, 5120), (0, 5000)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_same_as_the_operators(name, shape, dtype, device):
    config, x = CONFIGS[name], samples(device, *shape, dtype=dtype)
    value, expected = direct.extract(x, config), of_operators(x, config)
    assert torch.equal(value, expected) and value.dtype == dtype and value.requires_grad
    with torch.no_grad():
        assert torch.equal(direct.extract(x, config), expected)
    upstream = torch.linspace(-1, 1, value.numel(), device=device, dtype=dtype).view_as(value)
    (ours,), (theirs,) = (torch.autograd.grad(y, x, upstream) for y in (value, expected))
    assert torch.equal(ours, theirs) and ours.dtype == dtype and ours.shape == x.shape


@EACH
@pytest.mark.parametrize("shape", [(3, 5000), (5000,), (1, 5120), (0, 5000), (3, 30)], ids=str)
def test_lengths(name, shape, device):
    config, x = CONFIGS[name], samples(device, *shape)
    lengths = some_lengths(x)
    (value, counts), (expected, expected_counts) = direct.extract(x, config, lengths), of_operators(x, config, lengths)
    assert torch.equal(value, expected) and torch.equal(counts, expected_counts)
    assert value.requires_grad and not counts.requires_grad and counts.shape == lengths.shape
    with torch.no_grad():
        value, counts = direct.extract(x, config, lengths)
        assert torch.equal(value, expected) and torch.equal(counts, expected_counts)
    value = direct.extract(x, config, lengths)[0]
    upstream = torch.linspace(-1, 1, value.numel(), device=device).view_as(value)
    (ours,), (theirs,) = (torch.autograd.grad(y, x, upstream) for y in (value, expected))
    assert torch.equal(ours, theirs)


def test_lengths_that_others_see_to(device):
    config, x = CONFIGS["logmel"], samples(device)
    lengths = some_lengths(x)
    whole, counts = extract(x, config, lengths=lengths)
    assert direct.extract(x, config, lengths.int()) is None
    assert direct.extract(x, config, lengths[:2]) is None
    assert direct.extract(x, config, lengths[:, None]) is None
    assert direct.extract(x, config, torch.stack([lengths] * 2, 1)[:, 0]) is None  # not contiguous
    assert direct.extract(x, config, torch.nn.Parameter(lengths, requires_grad=False)) is None
    assert direct.extract(x, config, lengths.to("meta")) is None
    found, again = extract(x, config, lengths=lengths.int())
    assert torch.equal(found, whole) and torch.equal(again, counts)
    for beyond in (-1, 5001):
        wrong = torch.tensor([5000, 12, beyond], device=device)
        if device == "cpu":
            with pytest.raises(ValueError, match="must lie in"):
                extract(x, config, lengths=wrong)
        else:
            assert torch.equal(extract(x, config, lengths=wrong)[0][:2], extract(x[:2], config, lengths=wrong[:2])[0])


@pytest.mark.parametrize("shape", [(3, 3000), (3000,)], ids=str)
def test_lengths_differentiated_again(shape, device):
    config, x = CONFIGS["whisper"], samples(device, *shape)
    lengths = some_lengths(x)
    results = []
    for out, _ in (direct.extract(x, config, lengths), of_operators(x, config, lengths)):
        (first,) = torch.autograd.grad(out.sin().sum(), x, create_graph=True)
        results.append((first, *torch.autograd.grad(first.square().sum(), x)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert first.reshape(-1)[-1] == 0  # what is not valid has no gradient
    out, _ = direct.extract(x, config, lengths)
    together = torch.autograd.grad(out, x, torch.stack([torch.ones_like(out)] * 2), is_grads_batched=True)[0]
    torch.testing.assert_close(together[1], torch.autograd.grad(direct.extract(x, config, lengths)[0].sum(), x)[0])


def test_lengths_written_to_are_noticed(device):
    x = samples(device)
    lengths = some_lengths(x)
    out, _ = direct.extract(x, CONFIGS["logmel"], lengths)
    lengths.sub_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t if t.is_floating_point() else t[:2]):
        out, _ = direct.extract(x, CONFIGS["logmel"], some_lengths(x))
    with pytest.raises(ValueError, match="lengths do not fit"):
        out.sum().backward()


@EACH
def test_strides(name, device):
    config, x = CONFIGS[name], samples(device, 10000, 3)
    value, dense = direct.extract(x.t()[:, ::2], config), x.detach().t()[:, ::2].contiguous().requires_grad_()
    expected = extract(dense, config)
    torch.testing.assert_close(value, expected)
    upstream = torch.randn_like(value)
    torch.testing.assert_close(
        torch.autograd.grad(value, x, upstream.transpose(1, 2).contiguous().transpose(1, 2))[0].t()[:, ::2],
        torch.autograd.grad(expected, dense, upstream)[0],
    )


@EACH
@pytest.mark.parametrize("shape", [(2, 2000), (2000,)], ids=str)
def test_second_derivatives(name, shape, device):
    config, x = CONFIGS[name], samples(device, *shape)
    rows = x if x.dim() == 2 else x[None]
    group = int(config.top_db_scope == "item")
    results = []
    for out in (direct.extract(x, config), reference.mel_reference(rows, None, None, None, None, group, 0, config)[0]):
        (first,) = torch.autograd.grad(out.sin().sum(), x, create_graph=True)
        results.append((first, *torch.autograd.grad(first.square().sum(), x)))
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).norm() <= 1e-3 * theirs.norm()


def test_batches_of_gradients(device):
    x = samples(device, 2, 4000)
    for one in (x, x[0]):
        out = direct.extract(one, CONFIGS["whisper"])
        upstream = torch.randn(3, *out.shape, device=device)
        together = torch.autograd.grad(out, x, upstream, is_grads_batched=True, retain_graph=True)[0]
        alone = [torch.autograd.grad(out, x, each, retain_graph=True)[0] for each in upstream]
        torch.testing.assert_close(together, torch.stack(alone))


def test_graph_is_freed(device):
    x = samples(device)
    out = direct.extract(x, CONFIGS["logmel"])
    first = torch.autograd.grad(out.sum(), x, retain_graph=True)
    assert torch.equal(first[0], torch.autograd.grad(out.sum(), x)[0])
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out.sum(), x)


def test_samples_written_to_are_noticed(device):
    x = samples(device)
    out = direct.extract(x, CONFIGS["logmel"])
    with torch.no_grad():
        x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_features_may_be_written_to(device):
    x = samples(device)
    (expected,) = torch.autograd.grad((2 * direct.extract(x, CONFIGS["whisper"]) + 1).sum(), x)
    out = direct.extract(x, CONFIGS["whisper"])
    assert not out._is_view()
    assert torch.equal(torch.autograd.grad(out.mul_(2).add_(1).sum(), x)[0], expected)


def test_hooks_on_what_is_saved(device):
    x, packed = samples(device), []
    (expected,) = torch.autograd.grad(direct.extract(x, CONFIGS["whisper"]).sum(), x)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t.cpu(), lambda t: t.to(device)):
        out = direct.extract(x, CONFIGS["whisper"])
    assert len(packed) == 2  # samples and maximum
    assert torch.equal(torch.autograd.grad(out.sum(), x)[0], expected)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t[..., :1000]):
        out = direct.extract(x, CONFIGS["logmel"])
    with pytest.raises(ValueError, match="grad must be"):
        torch.autograd.grad(out.sum(), x)


def test_front_end_that_is_gone(device):
    """The node finds it again, or goes by the operator."""
    config = CONFIGS["whisper"].replace(n_mels=33)
    x = samples(device)
    out = direct.extract(x, config)
    (expected,) = torch.autograd.grad(out.sum(), x, retain_graph=True)
    direct._how.cache_clear()
    gc.collect()
    assert torch.equal(torch.autograd.grad(out.sum(), x, retain_graph=True)[0], expected)
    extract(x, config)
    assert torch.equal(torch.autograd.grad(out.sum(), x)[0], expected)


def test_nothing_is_kept_of_a_mode(device):
    class Counts(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            Counts.calls += function is torch.ops.mmfast.mel_forward.default
            return function(*args, **(kwargs or {}))

    config, x = CONFIGS["logmel"].replace(n_mels=31), samples(device)
    with Counts():
        assert direct.extract(x, config) is None
        seen = extract(x, config)
    assert Counts.calls == 1
    assert torch.equal(direct.extract(x, config), seen)
    batch = torch.stack([x, 2 * x]).detach()
    together = torch.func.vmap(lambda one: extract(one, config))(batch)
    assert torch.equal(together[0], seen)
    (by_formula,) = torch.func.vjp(lambda y: extract(y, config), x.detach())[1](torch.ones_like(seen))
    (by_kernel,) = torch.autograd.grad(direct.extract(x, config).sum(), x)
    wide = x.detach().double().requires_grad_()
    (gold,) = torch.autograd.grad(extract(wide, config, backend="reference").sum(), wide)
    # Of a logarithm: two results as good differ by parts of the largest element, in every element.
    assert_no_worse_than_eager(by_kernel, by_formula, gold)


@pytest.mark.parametrize("ragged", [False, True])
def test_compiled_autograd(ragged, device):
    """Which asks each node for a text and has no room for outputs without a gradient."""
    x = samples(device)

    def gradient():
        lengths = some_lengths(x) if ragged else None
        out = direct.extract(x, CONFIGS["whisper"], lengths)
        return torch.autograd.grad((out[0] if ragged else out).sum(), x)[0]

    expected = gradient()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        torch.testing.assert_close(gradient(), expected)


def test_inference(device):
    config = CONFIGS["by_item"].replace(n_mels=29)
    x = samples(device)
    with torch.inference_mode():
        inside = extract(x, config)
        mine = extract(x.clone(), config)
    assert inside.is_inference() and mine.is_inference()
    out = direct.extract(x, config)
    assert out.requires_grad and torch.equal(out, inside) and torch.equal(mine, inside)
    out.sum().backward()
    assert x.grad.isfinite().all()


def test_what_is_left_to_others(device):
    config = CONFIGS["logmel"]
    x = samples(device)
    assert direct.extract(x.double(), config) is None
    assert direct.extract(x[None], config) is None
    assert direct.extract(x.detach()[:, :3], config) is None  # too short: an error of others
    assert direct.extract(x, config.replace(dither=1.0)) is None
    assert direct.extract(x.detach().to("meta"), config) is None
    with torch.autograd.forward_ad.dual_level():
        assert direct.extract(x, config) is None


def test_backend_of_the_environment(device, monkeypatch):
    x = samples(device)
    expected = extract(x, CONFIGS["logmel"])
    monkeypatch.setenv("MMFAST_BACKEND", device)
    assert direct.extract(x, CONFIGS["logmel"]) is None
    assert torch.equal(extract(x, CONFIGS["logmel"]), expected)


def test_operators_are_left_out(device, monkeypatch):
    """With what is given, too: lengths and tables, double precision."""
    monkeypatch.setattr(op, "_forward", None)
    config = CONFIGS["logmel"]
    x = samples(device)
    lengths = torch.tensor([5000, 0, 2345], device=device)
    filters = torch.rand(config.n_freqs, config.n_mels, device=device, requires_grad=True)
    out, _ = extract(x, config, lengths=lengths, filters=filters)
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), (x, filters)))
    with torch.no_grad():
        assert torch.equal(extract(x.double(), config, backend=device), extract(x.double(), config))
