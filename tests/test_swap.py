"""`mmfast.swap`: what is swapped, what is kept, what is left alone, and the way back."""

from __future__ import annotations

import copy
import importlib
import io
import subprocess
import sys

import pytest
import torch
from torch import nn

import mmfast
from mmfast.fusion import multihead
from mmfast.swapping import changes, rules

torchaudio = pytest.importorskip("torchaudio")
pytest.importorskip("tabulate")
pytestmark = pytest.mark.filterwarnings("ignore:At least one mel filterbank")

T = torchaudio.transforms
MEL = {"n_fft": 256, "hop_length": 100, "n_mels": 20}
CHAINS = {
    "Spectrogram": lambda: T.Spectrogram(256, hop_length=100, power=1.0),
    "MelSpectrogram": lambda: T.MelSpectrogram(8000, **MEL),
    "MFCC": lambda: T.MFCC(8000, 13, melkwargs=MEL),
    "LFCC": lambda: T.LFCC(8000, n_filter=20, n_lfcc=13, speckwargs={"n_fft": 256, "hop_length": 100}),
}


class Fused(nn.Module):
    """Sound and a sequence: features, cross-attention, self-attention, batch norm and dropout."""

    def __init__(self):
        super().__init__()
        self.sound = T.MFCC(8000, 13, melkwargs=MEL)
        self.cross = nn.MultiheadAttention(16, 4, kdim=13, vdim=13, dropout=0.2, batch_first=True)
        self.own = nn.MultiheadAttention(16, 2, batch_first=True)
        self.norm = nn.BatchNorm1d(16)
        self.drop = nn.Dropout(0.5)
        self.calls = 0

    def forward(self, x, wave):
        self.calls += 1
        sound = self.sound(wave).transpose(1, 2)
        x = x + self.cross(x, sound, sound)[0]
        x = self.own(x, x, x, need_weights=False)[0]
        return self.norm(self.drop(x).transpose(1, 2))


def fused_inputs():
    return torch.randn(3, 5, 16), 0.1 * torch.randn(3, 1600)


class Attends(nn.Module):
    """Cross-attention to each of two sequences, with layers that a test can tell apart by their width."""

    def __init__(self):
        super().__init__()
        self.first = nn.MultiheadAttention(8, 2, kdim=6, vdim=6, batch_first=True)
        self.second = nn.MultiheadAttention(8, 2, kdim=7, vdim=7, batch_first=True)
        self.third = nn.MultiheadAttention(8, 2, kdim=9, vdim=9, batch_first=True)

    def forward(self, x, a, b, c):
        for layer, y in ((self.first, a), (self.second, b), (self.third, c)):
            x = x + layer(x, y, y, need_weights=False)[0]
        return x


def attends_inputs():
    return torch.randn(2, 4, 8), torch.randn(2, 5, 6), torch.randn(2, 3, 7), torch.randn(2, 6, 9)


def state(model):
    """All that a swap must leave alone: identities, values, modes and hooks."""
    kept = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return [
        [name, id(m), m.training, *({k: id(v) for k, v in d.items()} for d in (m._parameters, m._buffers))]
        + [id(getattr(m, hooks)) for hooks in kept]
        for name, m in model.named_modules()
    ]


def classes(model):
    return {name: type(m) for name, m in model.named_modules()}


def attributes(model):
    return {name: set(vars(m)) | set(m._modules) for name, m in model.named_modules()}


@pytest.mark.parametrize("name", CHAINS)
def test_torchaudio(name):
    model = nn.Sequential(CHAINS[name](), nn.Flatten())
    wave = torch.randn(2, 1600)
    expected, before, plain, keys = model(wave), state(model), classes(model), list(model.state_dict())
    report = mmfast.swap(model, check=wave)
    assert type(model[0]) is getattr(mmfast.compat.torchaudio.transforms, name)
    assert all(type(m).__module__.startswith(("mmfast", "torch.nn")) for m in model.modules())
    assert [row.path for row in report.rows if row.part_of is None] == ["0"]
    assert state(model) == before and list(model.state_dict()) == keys
    assert report.differences[0].name.startswith(("output", "grad of input")) and report.differences[0].agrees
    torch.testing.assert_close(model(wave), expected, rtol=1e-4, atol=1e-4)
    report.undo()
    assert classes(model) == plain and state(model) == before and torch.equal(model(wave), expected)


@pytest.mark.parametrize(("training", "dtype"), [(True, torch.float32), (False, torch.float32), (True, torch.float64)])
def test_model(training, dtype):
    model = Fused().to(dtype).train(training)
    model.cross.in_proj_bias.requires_grad_(False)
    inputs = tuple(x.to(dtype) for x in fused_inputs())
    before, plain, names = state(model), classes(model), attributes(model)
    weights = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    report = mmfast.swap(model, check=inputs)
    assert [row.path for row in report.swapped if row.part_of is None] == ["sound", "cross", "own"]
    assert not report.undone and not report.left_alone
    assert len(report.differences) > (8 if training else 4)
    # Nothing of the check is left behind.
    assert state(model) == before and model.calls == 0 and model.drop.p == 0.5 and model.cross.dropout == 0.2
    assert all(p.grad is None for p in model.parameters())
    for key, value in model.state_dict().items():
        assert torch.equal(value, weights[key]), key
    if training:
        model(*inputs).square().sum().backward()
        old = model.cross.out_proj.weight.detach().clone()
        optimizer.step()
        assert not torch.equal(model.cross.out_proj.weight, old)
    report.undo()
    report.undo()
    assert classes(model) == plain and state(model) == before and attributes(model) == names
    assert [row.action for row in report.rows if row.part_of is None] == ["undone"] * 3


def test_random_state_and_gradients_are_kept():
    model, inputs = Attends(), attends_inputs()
    model(*inputs).sum().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    random = torch.get_rng_state()
    mmfast.swap(model, check=inputs)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
    assert all(x.grad is None and not x.requires_grad for x in inputs)


def test_the_check_runs_without_dropout():
    seen = []

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.MultiheadAttention(8, 2, dropout=0.3)
            self.drop, self.layerdrop, self.drop_last = nn.Dropout(0.5), 0.2, 3

        def forward(self, x):
            seen.append((self.layer.dropout, self.drop.p, self.layerdrop, self.drop_last))
            return self.drop(self.layer(x, x, x)[0])

    model = Model()
    mmfast.swap(model, check=torch.randn(4, 2, 8))
    assert set(seen) == {(0.0, 0.0, 0.0, 3)} and len(seen) == 3  # before, in float64, after
    assert (model.layer.dropout, model.drop.p, model.layerdrop) == (0.3, 0.5, 0.2)


def test_the_fused_forward_is_called_and_hooks_fire(monkeypatch):
    model, inputs = Attends(), attends_inputs()
    seen, calls = [], []
    handle = model.second.register_forward_hook(lambda module, _, out: seen.append(module))
    model.second.register_full_backward_hook(lambda module, *_: seen.append("backward"))
    real = multihead.cross_attention
    monkeypatch.setattr(multihead, "cross_attention", lambda *a, **k: calls.append(1) or real(*a, **k))
    mmfast.swap(model)
    model(*(x.requires_grad_() for x in inputs)).sum().backward()
    assert len(calls) == 3 and seen == [model.second, "backward"]
    handle.remove()
    model(*inputs)
    assert len(seen) == 2


def test_transformer_layers():
    """Encoder layers have a path of their own at inference, which reads the attention's weights."""
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, batch_first=True), 2)
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 4, batch_first=True), 1)
    x, padding = torch.randn(3, 6, 16), torch.zeros(3, 6, dtype=torch.bool)
    padding[1, 4:] = True
    for training in (True, False):
        encoder.train(training), decoder.train(training)
        report = mmfast.swap(encoder, check={"src": x, "src_key_padding_mask": padding})
        assert [row.path for row in report.swapped] == ["layers.0.self_attn", "layers.1.self_attn"]
        assert "reads the weights itself" in report.rows[0].why
        report.undo()
        assert len(mmfast.swap(decoder, check=(x, torch.randn(3, 9, 16))).swapped) == (2 if training else 0)
    with torch.no_grad():
        expected = encoder(x, src_key_padding_mask=padding)
        mmfast.swap(encoder)
        torch.testing.assert_close(encoder(x, src_key_padding_mask=padding), expected)


def test_shared_and_hidden_references():
    model = nn.Module()
    model.a = CHAINS["MelSpectrogram"]()
    model.b = nn.ModuleList([model.a])
    model.hidden = [model.a]
    report = mmfast.swap(model)
    assert model.a is model.b[0] is model.hidden[0] and type(model.a).__module__.startswith("mmfast")
    assert report.rows[0].path == "a" and report.rows[0].also == ("b.0",)
    assert "a = b.0" in str(report)


def test_the_model_itself_saved_and_copied():
    model = nn.MultiheadAttention(8, 2)
    report = mmfast.swap(model)
    assert type(model) is mmfast.nn.MultiheadAttention and "(the model)" in str(report)
    x, y = torch.randn(3, 2, 8), torch.randn(4, 2, 8)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        torch.testing.assert_close(other(x, y, y), model(x, y, y))
    again = mmfast.swap(model)
    assert not again.swapped and again.rows[0].why == "mmfast's already"


class _Sub(T.MelSpectrogram):
    pass


def _patched():
    attention = nn.MultiheadAttention(8, 2)
    attention.forward = attention.forward
    return attention


def _parametrized():
    attention = nn.MultiheadAttention(8, 2)
    nn.utils.parametrize.register_parametrization(attention, "in_proj_weight", nn.Tanh())
    return attention


class _Wrapped(torch.Tensor):
    pass


def _odd_tensor():
    attention = nn.MultiheadAttention(8, 2)
    attention.in_proj_weight = nn.Parameter(attention.in_proj_weight.detach().as_subclass(_Wrapped))
    return attention


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (_Sub, "a subclass of MelSpectrogram"),
        (lambda: T.Spectrogram(power=None), "power must be a positive number"),
        (_patched, "its forward was replaced"),
        (_parametrized, "parametrized"),
        (_odd_tensor, "_Wrapped"),
        (lambda: torch.ao.nn.quantizable.MultiheadAttention(8, 2), "a subclass of MultiheadAttention"),
        (lambda: torch.jit.script(T.MelSpectrogram()), "torch.jit"),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_left_alone(make, why):
    model = nn.ModuleDict({"x": make()})
    before = type(model.x)
    report = mmfast.swap(model)
    row = next(row for row in report.rows if row.path == "x")
    assert row.action == "left alone" and why in row.why and row.new is None
    assert type(model.x) is before and why.split()[0] in str(report)


def test_steps_alone_and_inside_a_chain_with_hooks():
    model = nn.ModuleDict({"mfcc": CHAINS["MFCC"](), "db": T.AmplitudeToDB(), "scale": T.MelScale()})
    seen = []
    model.mfcc.MelSpectrogram.register_forward_hook(lambda *_: seen.append(1))
    expected = model.mfcc(torch.ones(1, 900).cumsum(1))
    report = mmfast.swap(model)
    assert type(model.db) is T.AmplitudeToDB and type(model.scale) is T.MelScale
    assert {row.part_of for row in report.rows} == {None, "mfcc"} and len(report.rows) == 5
    torch.testing.assert_close(model.mfcc(torch.ones(1, 900).cumsum(1)), expected, rtol=1e-3, atol=1e-3)
    assert len(seen) == 2


def test_weight_norm_and_parametrized_children():
    model = nn.ModuleDict({"old": nn.MultiheadAttention(8, 2), "new": nn.MultiheadAttention(8, 2)})
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(model.old, "in_proj_weight")
    nn.utils.parametrizations.weight_norm(model.new.out_proj)
    x, y = torch.randn(3, 2, 8), torch.randn(4, 2, 8)
    for layer in model.values():
        keys = list(layer.state_dict())
        assert len(mmfast.swap(layer, check=(x, y, y)).swapped) == 1
        assert list(layer.state_dict()) == keys
    grads = torch.autograd.grad(model.new(x, y, y)[0].sum(), list(model.new.out_proj.parameters()))
    assert all(g is not None for g in grads)


@pytest.mark.parametrize(
    ("choice", "swapped"),
    [
        ({"only": "cross"}, ["cross"]),
        ({"only": "sound.MelSpectrogram"}, ["sound.MelSpectrogram"]),
        ({"only": ["*ow*", "cross"]}, ["cross", "own"]),
        ({"only": nn.MultiheadAttention, "skip": "own"}, ["cross"]),
        ({"skip": [T.MFCC, lambda path, module: path == "own"]}, ["cross"]),
        ({"skip": Fused}, []),
        ({"only": lambda path, module: getattr(module, "num_heads", 0) == 2}, ["own"]),
    ],
)
def test_only_and_skip(choice, swapped):
    model = Fused()
    report = mmfast.swap(model, dry_run=True, **choice)
    assert [row.path for row in report.swapped if row.part_of is None] == swapped
    assert all(row.why in ("skip=", "not in only=") for row in report.left_alone)
    assert all(
        type(m).__module__ != "mmfast.nn" and not type(m).__module__.startswith("mmfast") for m in model.modules()
    )
    real = mmfast.swap(model, **choice)
    assert [row.path for row in real.swapped] == [row.path for row in report.swapped]


def test_rejects():
    model = Fused()
    with pytest.raises(ValueError, match=r"only: no module has a path like 'corss'"):
        mmfast.swap(model, only="corss")
    with pytest.raises(TypeError, match="skip must be a glob"):
        mmfast.swap(model, skip=3)
    for tolerance in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="tolerance must be at least 0"):
            mmfast.swap(model, check=(torch.randn(3, 5, 16), torch.randn(3, 1600)), tolerance=tolerance)
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got list"):
        mmfast.swap([model])
    with pytest.raises(AssertionError, match="embedding dimension"):  # as it was: the inputs are wrong
        mmfast.swap(model, check=(torch.randn(3, 5, 17), torch.randn(3, 1600)))
    assert type(model.cross) is nn.MultiheadAttention


@pytest.mark.parametrize("fault", ["wrong", "slightly", "gradient", "raises", "nan"])
def test_check_names_and_undoes_the_one_that_disagrees(monkeypatch, fault):
    real = mmfast.nn.MultiheadAttention.forward

    def faulty(self, *args, **kwargs):
        out, weights = real(self, *args, **kwargs)
        if self.kdim == 7:
            if fault == "raises":
                raise IndexError("no such thing")
            if fault == "gradient":
                out = 2 * out - out.detach()
            else:
                out = out * {"wrong": 2.0, "slightly": 1.001, "nan": float("nan")}[fault]
        return out, weights

    monkeypatch.setattr(mmfast.nn.MultiheadAttention, "forward", faulty)
    model = Attends()
    report = mmfast.swap(model, check=attends_inputs())
    (row,) = report.undone
    assert row.path == "second" and type(model.second) is nn.MultiheadAttention
    assert set(vars(model.second)) == set(vars(nn.MultiheadAttention(8, 2)))
    assert "IndexError: no such thing" in row.why if fault == "raises" else "differs by" in row.why
    assert [row.path for row in report.swapped] == ["first", "third"]
    assert all(d.agrees for d in report.differences) and "1 undone" in str(report)
    report.undo()
    assert type(model.first) is nn.MultiheadAttention


def test_a_gradient_that_goes_missing_is_seen(monkeypatch):
    real = mmfast.nn.MultiheadAttention.forward

    def forward(self, query, key, value, **kwargs):
        return real(self, query, key.detach() if self.kdim == 7 else key, value, **kwargs)

    monkeypatch.setattr(mmfast.nn.MultiheadAttention, "forward", forward)
    (row,) = mmfast.swap(Attends(), check=attends_inputs()).undone
    assert row.path == "second" and "grad of input[2]" in row.why


def test_tolerance():
    model, inputs = Attends(), attends_inputs()
    report = mmfast.swap(model, check=inputs, tolerance=0.0)
    assert report.undone and all("allowed 0.0e+00" in row.why for row in report.undone)
    assert not mmfast.swap(model, check=inputs, tolerance=1e-2).undone


@pytest.mark.parametrize("when", ["apply", "check"])
def test_an_exception_half_way_leaves_the_model_as_it_was(monkeypatch, when):
    model = Fused()
    before, plain, names = state(model), classes(model), attributes(model)
    real, count = changes.ClassChange.apply, []

    def failing(self):
        count.append(1)
        if len(count) == 4:
            raise KeyboardInterrupt
        real(self)

    if when == "apply":
        monkeypatch.setattr(changes.ClassChange, "apply", failing)
    else:
        monkeypatch.setattr(
            "mmfast.swapping.check.Check.differences", lambda self: (_ for _ in ()).throw(KeyboardInterrupt)
        )
    with pytest.raises(KeyboardInterrupt):
        mmfast.swap(model, check=fused_inputs())
    assert classes(model) == plain and state(model) == before and attributes(model) == names


def test_undo_refuses_what_others_changed():
    model = Attends()
    report = mmfast.swap(model)
    nn.utils.parametrize.register_parametrization(model.third, "in_proj_bias", nn.Tanh())
    with pytest.raises(RuntimeError, match="third was changed since the swap"):
        report.undo()
    assert type(model.first) is mmfast.nn.MultiheadAttention
    nn.utils.parametrize.remove_parametrizations(model.third, "in_proj_bias")
    report.undo()
    assert type(model.third) is nn.MultiheadAttention


def test_half_precision_and_outputs_of_all_kinds():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x, y, n=None):
            out, weights = self.a(x, y, y)
            return {"out": [out, weights], "argmax": weights.argmax(-1), "n": n, "none": None, "masked": out.log()}

    model = Model().bfloat16()
    report = mmfast.swap(
        model, check={"x": torch.randn(2, 3, 8).bfloat16(), "y": torch.randn(2, 4, 8).bfloat16(), "n": 3}
    )
    names = {d.name for d in report.differences}
    assert len(report.swapped) == 1 and {"output.out[0]", "output.out[1]", "output.argmax", "output.masked"} <= names
    assert {"grad of input[0]", "grad of a.in_proj_weight"} <= names
    called = mmfast.swap(Model(), check=lambda m: m(torch.ones(1, 2, 8), torch.ones(1, 3, 8))["out"])
    assert called.differences and not called.undone


def test_rules_lead_somewhere():
    """Every drop-in that a rule names exists; homes are of the form module:name."""
    for rule in rules.RULES:
        assert rule.op in mmfast._backend.OPS
        module, name = rule.target.split(":")
        try:
            found = importlib.import_module(f"mmfast.{module}")
        except ImportError as error:
            assert "needs the package" in str(error)
            continue
        assert isinstance(getattr(found, name), type)
    assert rules.known()[nn.MultiheadAttention].target == "nn:MultiheadAttention"


def test_import_brings_no_library():
    libraries = ("torchaudio", "transformers", "diffusers", "geomloss", "ignite", "torchmetrics", "tabulate")
    script = "import sys, mmfast, torch; mmfast.swap(torch.nn.Linear(2, 2)); "
    script += f"print([m for m in {libraries} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_check_of_a_model_with_an_expanded_buffer():
    """Nothing can be written to it, and nothing needs to be."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2)
            self.register_buffer("scale", torch.ones(1, 8).expand(3, 8))
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return self.attention(x, x[:2], x[:2])[0] * self.scale

    model = Model()
    report = mmfast.swap(model, check=torch.randn(3, 3, 8))
    assert [row.path for row in report.swapped] == ["attention"]
    assert model.calls == 0
