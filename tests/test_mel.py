"""The mel op against its definition, its float64 gold, and what a drop-in has to promise, on every backend."""

from __future__ import annotations

import itertools
import math

import definition
import pytest
import torch
from cases import CASES, DTYPES, TUNED, Case
from numerics import assert_no_worse_than_eager, peak_extra_bytes
from torch.utils._python_dispatch import TorchDispatchMode

from mmfast.mel import MelConfig, extract, reference, tables

ALL = pytest.mark.parametrize("case", CASES.values(), ids=lambda case: case.name)
INF = math.inf

# Small enough for finite differences, together they pass through every step.
SMOOTH = {
    "log_mel": MelConfig(n_fft=8, hop_length=3, n_mels=4, log="ln", log_offset=0.1),
    "magnitude": MelConfig(n_fft=9, win_length=6, hop_length=4, n_mels=3, power=1.0, pad_mode="circular"),
    "power_half": MelConfig(n_fft=8, hop_length=4, n_mels=3, power=0.5, pad_mode="replicate", pad=2),
    "power_3": MelConfig(n_fft=6, hop_length=4, n_mels=3, power=3.0, normalized="window", layout="time_feature"),
    "spectrum": MelConfig(n_fft=5, hop_length=4, filters=None, power=1.5, power_offset=0.01, framing="valid"),
    "mfcc_db": MelConfig(n_fft=8, hop_length=4, n_mels=6, n_mfcc=4, log="db", log_floor=1e-3, top_db=6.0, lifter=5.0),
    "whisper": MelConfig(
        n_fft=8, hop_length=4, n_mels=4, log="log10", log_floor=1e-3, top_db=0.7, top_db_scope="batch", drop_last=True,
        output_offset=4.0, output_scale=0.25,
    ),
    "kaldi": MelConfig(
        n_fft=8, win_length=7, hop_length=4, n_mels=4, framing="kaldi", pad_mode="mirror", window="hamming",
        window_position="start", remove_dc=True, preemphasis=0.9, mel_scale="kaldi", f_min=20.0, log="ln",
        log_floor=1e-4, energy="prepend", energy_floor=1e-3,
    ),
    "nemo": MelConfig(
        n_fft=8, hop_length=4, n_mels=4, pad_mode="constant", preemphasis=0.9, preemphasis_scope="signal", log="ln",
        log_offset=0.01, energy="append", raw_energy=False, input_scale=2.0, n_mfcc=3,
    ),
}  # fmt: skip


def gold(waveform: torch.Tensor, config: MelConfig, **given):
    """The float64 reference."""
    return extract(waveform.double(), config, backend="reference", **given)


def with_gradient(waveform: torch.Tensor, config: MelConfig, upstream: torch.Tensor, backend: str, **given):
    """Features, and the gradient of ``sum(features * upstream)`` with respect to the waveform."""
    waveform = waveform.detach().clone().requires_grad_()
    out = extract(waveform, config, backend=backend, **given)
    return out, torch.autograd.grad(out, waveform, upstream.to(out.dtype))[0]


def compare(waveform: torch.Tensor, config: MelConfig, backend: str, factor: float = 2.0) -> None:
    """Features and the waveform's gradient against float64: no worse than the reference in the same dtype.

    The reference, the yardstick, is itself good to its dtype: relative to the whole, 200 units in the last place of
    float32, or 4 of a half precision.
    """
    upstream = torch.randn(extract(waveform, config, backend=backend).shape, dtype=torch.float64)
    ours = with_gradient(waveform, config, upstream, backend)
    exact = with_gradient(waveform.double(), config, upstream, "reference")
    if backend == "reference":
        bound = max(200 * torch.finfo(torch.float32).eps, 4 * torch.finfo(waveform.dtype).eps)
        for out, gold64 in zip(ours, exact, strict=True):
            assert out.dtype == waveform.dtype and out.is_contiguous()
            finite = out.isfinite()
            assert (out - gold64)[finite].norm() <= bound * gold64[finite].norm()
            assert gold64.norm() > 0 and (finite.all() or waveform.dtype == torch.float16)
    else:
        eager = with_gradient(waveform, config, upstream, "reference")
        for what, *results in zip(("features", "gradient"), ours, eager, exact, strict=True):
            assert_no_worse_than_eager(*results, factor, what=what)


@ALL
def test_matches_definition(case):
    """The float64 reference is what the documentation of `MelConfig` says, sample by sample."""
    config, rows = case.config, case.waveform(torch.float64)[..., :6000].flatten(0, -2)
    group = {"item": 1, "channels": case.shape[-2], "batch": 0}[config.top_db_scope]
    args = tables.window(config), tables.filters(config), tables.dct(config)
    arrays = (None if t is None else t.numpy() for t in args)
    expected, counts = definition.features(rows.numpy(), [rows.shape[1]] * len(rows), *arrays, group, 0, config)
    out, out_counts = reference.mel_reference(rows, *args, None, group, 0, config)
    torch.testing.assert_close(out, torch.from_numpy(expected), rtol=1e-9, atol=1e-9)
    assert out_counts.tolist() == counts == [config.frame_count(rows.shape[1])] * len(rows)


@ALL
def test_matches_gold(case, backend):
    compare(case.waveform(), case.config, backend)


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d != torch.float32], ids=str)
@pytest.mark.parametrize("case", TUNED, ids=lambda case: case.name)
def test_matches_gold_dtypes(case, dtype, backend):
    compare(case.waveform(dtype), case.config, backend)


def test_int16(backend):
    samples = torch.randint(-(2**15), 2**15, (2, 900), dtype=torch.int16)
    config = CASES["frame_preemphasis"].config
    out = extract(samples, config, backend=backend)
    assert out.dtype == torch.float32
    assert torch.equal(out, extract(samples.float(), config, backend=backend))


@pytest.mark.parametrize("case", TUNED[:6], ids=lambda case: case.name)
def test_autocast(case, backend):
    """The arithmetic stays in float32."""
    waveform = case.waveform()
    with torch.autocast("cpu", torch.bfloat16):
        inside = extract(waveform, case.config, backend=backend)
    assert torch.equal(inside, extract(waveform, case.config, backend=backend))


@pytest.mark.parametrize("n_fft, win_length", [(400, 400), (401, 401), (512, 400), (513, 400), (64, 41), (1, 1), (2, 1)])
@pytest.mark.parametrize("pad_mode", ["reflect", "constant", "replicate", "circular"])
def test_matches_torchaudio_formula(n_fft, win_length, pad_mode, backend):
    """`torch.stft` and torchaudio's chain of operations after it."""
    x = torch.randn(2, 3000, dtype=torch.float64)
    config = MelConfig(
        n_fft=n_fft, win_length=win_length, hop_length=77, pad_mode=pad_mode, n_mels=12, log="db", log_floor=1e-2,
        top_db=20.0, top_db_scope="batch", n_mfcc=9, power=1.0, normalized="window",
    )  # fmt: skip
    window = torch.hann_window(win_length, dtype=torch.float64)
    stft = torch.stft(x, n_fft, 77, win_length, window, pad_mode=pad_mode, return_complex=True)
    mel = (stft / window.square().sum().sqrt()).abs().transpose(1, 2) @ tables.filters(config)
    db = 10 * mel.clamp(min=1e-2).log10()
    expected = (torch.maximum(db, db.max() - 20) @ tables.dct(config)).transpose(1, 2)
    torch.testing.assert_close(extract(x, config, backend=backend), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("which", ["waveform", "filters", "both"])
@pytest.mark.parametrize("name", SMOOTH)
def test_gradcheck(name, which, backend):
    torch.autograd.gradcheck(*_checked(name, which, backend), fast_mode=which != "waveform")


@pytest.mark.parametrize("which", ["waveform", "filters", "both"])
@pytest.mark.parametrize("name", SMOOTH)
def test_double_backward(name, which, backend):
    torch.autograd.gradgradcheck(*_checked(name, which, backend), fast_mode=True)


def _checked(name: str, which: str, backend: str):
    """A function of the inputs to check, two ragged rows and two whole ones, and the inputs."""
    config = SMOOTH[name]
    waveform = torch.randn(2, 12, dtype=torch.float64)
    filters = tables.filters(config)
    if filters is None:
        which = "waveform"
    else:  # none of them empty: there the logarithm has a kink
        filters = filters + 0.1 * torch.rand_like(filters)
    lengths = torch.tensor([12, 9])

    def function(*inputs):
        w = inputs[0] if which != "filters" else waveform
        f = inputs[-1] if which != "waveform" else filters
        whole = extract(w, config, filters=f, backend=backend)
        return whole, extract(w, config, filters=f, lengths=lengths, backend=backend)[0]

    inputs = {"waveform": (waveform,), "filters": (filters,), "both": (waveform, filters)}[which]
    return function, tuple(t.requires_grad_() for t in inputs)


@pytest.mark.parametrize("signal", ["silence", "constant", "part"])
@pytest.mark.parametrize("log, floor, offset", [(None, 0, 0), ("ln", 0, 0), ("db", 1e-10, 0), ("log10", 0, 1e-6)])
@pytest.mark.parametrize("power", [0.5, 1.0, 2.0, 3.0])
def test_gradients_are_finite(power, log, floor, offset, signal, backend):
    """Also where ``|X| ** p`` or the logarithm has no derivative; there it counts as 0, in the first order and the second."""
    config = MelConfig(
        n_fft=16, hop_length=8, n_mels=5, power=power, log=log, log_floor=floor, log_offset=offset, remove_dc=True,
        top_db=None if log is None else 80.0,
    )  # fmt: skip
    waveform = torch.zeros(1, 100) if signal == "silence" else torch.ones(1, 100)
    if signal == "part":
        waveform[:, 50:] = torch.randn(50)
    filters = tables.filters(config).float().requires_grad_()
    waveform.requires_grad_()
    out = extract(waveform, config, filters=filters, backend=backend)
    first = torch.autograd.grad(out.nan_to_num(0, 0, 0).sum(), (waveform, filters), create_graph=True)
    assert all(g.isfinite().all() for g in first)
    assert signal != "silence" or not first[0].any()
    second = torch.autograd.grad(sum(g.square().sum() for g in first), (waveform, filters), allow_unused=True)
    assert all(g is None or g.isfinite().all() for g in second)


def test_ties(backend):
    """`clamp` passes the gradient at equality, `maximum` halves it, `amax` shares it among equal maxima."""
    config = MelConfig(
        n_fft=1, hop_length=1, window="rectangular", center_pad=0, filters=None, log="ln", log_floor=0.25, top_db=0.0
    )
    x = torch.tensor([[0.5, 1.0, 1.0, 0.25]], dtype=torch.float64, requires_grad=True)
    v = x.square().clamp(min=0.25).log()
    for top_db in (None, 0.0, 4 * math.log(2.0)):  # the last: 2 ln 2 below the maximum of 0 lies exactly the floor
        expected = v if top_db is None else torch.maximum(v, v.amax() - top_db)
        upstream = torch.tensor([[1.0, 2.0, 4.0, 8.0]], dtype=torch.float64)
        wanted = torch.autograd.grad(expected, x, upstream, retain_graph=True)[0]
        out = extract(x, config.replace(top_db=top_db), backend=backend)
        torch.testing.assert_close(out[:, 0], expected, rtol=0, atol=1e-14)
        torch.testing.assert_close(torch.autograd.grad(out[:, 0], x, upstream)[0], wanted, rtol=0, atol=1e-14)


class _Record(TorchDispatchMode):
    """Collects the calls of operators of the library."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "mmfast":
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["whisper", "kaldi_mfcc", "spectrum", "energy_prepend"])
@pytest.mark.parametrize("ragged", [False, True])
def test_opcheck(name, ragged, native):
    """The registered operators keep torch's rules: schema, fake tensors, autograd."""
    case = CASES[name]
    waveform = case.waveform()[..., :1500].flatten(0, -2).requires_grad_()
    lengths = torch.tensor([1500, 900]) if ragged else None
    with _Record() as record:
        out = extract(waveform, case.config, lengths=lengths, backend=native)
        (out[0] if ragged else out).sum().backward()
    names = [func._schema.name for func, _, _ in record.calls]
    assert names == ["mmfast::mel_forward", "mmfast::mel_backward"], names
    for func, args, kwargs in record.calls:
        differentiable = (t.detach().requires_grad_() if t is waveform or _same(t, waveform) else t for t in args)
        torch.library.opcheck(func, tuple(differentiable), kwargs)


def _same(t, waveform) -> bool:
    return isinstance(t, torch.Tensor) and t.data_ptr() == waveform.data_ptr() and t.shape == waveform.shape


@pytest.mark.filterwarnings("ignore:Dynamo detected a call")
@pytest.mark.parametrize("ragged", [False, True])
def test_compile_fullgraph(ragged, backend):
    config = MelConfig(
        n_fft=64, win_length=50, n_mels=12, n_mfcc=5, framing="kaldi", pad_mode="mirror", log="db", log_floor=1e-10,
        top_db=40.0, preemphasis=0.9, energy="append",
    )  # fmt: skip
    lengths = torch.tensor([700, 400]) if ragged else None

    def run(waveform):
        out = extract(waveform, config, lengths=lengths, backend=backend)
        return out[0] if ragged else out

    waveform = torch.randn(2, 700, requires_grad=True)
    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(waveform)
    eager = run(waveform)
    torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-5)
    upstream = torch.randn_like(eager)
    grads = (torch.autograd.grad(out, waveform, upstream)[0] for out in (compiled, eager))
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


EDGES = MelConfig(n_fft=16, hop_length=5, n_mels=4, log="ln", log_floor=1e-6, top_db=30.0, top_db_scope="channels")


@pytest.mark.parametrize("shape", [(0, 50), (3, 0, 50), (0, 3, 50), (50,), (1, 1, 1, 50), (2, 3, 50), (9,), (17, 9)])
def test_edge_shapes(shape, backend):
    """Any leading dimensions, none and empty ones too, and the shortest signal."""
    waveform = torch.randn(shape, requires_grad=True)
    out = extract(waveform, EDGES, backend=backend)
    assert out.shape == (*shape[:-1], 4, EDGES.frame_count(shape[-1]))
    for item in itertools.product(*map(range, shape[:-2])):
        torch.testing.assert_close(out[item], extract(waveform[item], EDGES, backend=backend), rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad(out.sum(), waveform)
    assert gradient.shape == waveform.shape and gradient.isfinite().all()


@pytest.mark.parametrize("samples", [0, 1, 3])
@pytest.mark.parametrize("framing", ["center", "valid", "kaldi"])
@pytest.mark.parametrize("pad_mode", ["constant", "mirror", "replicate"])
def test_edge_lengths(samples, framing, pad_mode, backend):
    """Signals much shorter than a frame, also those of no samples."""
    config = EDGES.replace(framing=framing, center_pad=None, pad_mode=pad_mode, energy="append")
    waveform = torch.randn(2, samples, dtype=torch.float64)
    if samples < config.min_length:
        with pytest.raises(ValueError, match="waveform"):
            extract(waveform, config, backend=backend)
        return
    out = extract(waveform, config, backend=backend)
    args = tables.window(config).numpy(), tables.filters(config).numpy(), None
    expected, _ = definition.features(waveform.numpy(), [samples] * 2, *args, 2, 0, config)
    torch.testing.assert_close(out, torch.from_numpy(expected), rtol=1e-9, atol=1e-9)


def test_strides(backend):
    """Transposed, strided, expanded, shifted and reversed batches give what their copies give."""
    base = torch.randn(6, 400)
    config = EDGES.replace(top_db_scope="item")
    views = {
        "transposed": torch.randn(400, 6).t(),
        "every second": base[:, ::2],
        "rows": base[::3],
        "expanded": base[:1].expand(4, 400),
        "shifted": base.flatten()[7:1207].view(3, 400),
        "overlapping": base.flatten().unfold(0, 300, 100),
        "permuted": base.view(2, 3, 400).permute(1, 0, 2),
    }
    for name, view in views.items():
        upstream = torch.randn(extract(view, config).shape)
        results = (with_gradient(x, config, upstream, backend) for x in (view, view.contiguous()))
        for ours, copies in zip(*results, strict=True):
            assert torch.equal(ours, copies), name
        out = extract(view.detach(), config, backend=backend)
        assert torch.equal(out, extract(view.contiguous(), config, backend=backend)), name
