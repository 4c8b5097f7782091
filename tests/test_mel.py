"""The mel op against its definition, its float64 gold, and what a drop-in has to promise, on every backend."""

from __future__ import annotations

import itertools
import math

import definition
import pytest
import torch
from cases import CASES, DTYPES, TUNED
from conftest import need_cuda, need_native
from numerics import assert_no_worse_than_eager, peak_extra_bytes
from on_device import extract
from torch.utils._python_dispatch import TorchDispatchMode

from mmfast.mel import MelConfig, reference, tables

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


@pytest.fixture(params=["reference", "cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend, the native ones where they can run."""
    if request.param == "cpu":
        need_native()
    if request.param == "cuda":
        need_cuda()
    return request.param


def gold(waveform: torch.Tensor, config: MelConfig, **given):
    """The float64 reference."""
    return extract(waveform.double(), config, backend="reference", **given)


def with_gradient(waveform: torch.Tensor, config: MelConfig, upstream: torch.Tensor, backend: str, **given):
    """Features, and the gradient of ``sum(features * upstream)`` with respect to the waveform."""
    waveform = waveform.detach().clone().requires_grad_()
    out = extract(waveform, config, backend=backend, **given)
    return out, torch.autograd.grad(out, waveform, upstream.to(out.dtype))[0]


def compare(waveform: torch.Tensor, config: MelConfig, backend: str) -> None:
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
            assert_no_worse_than_eager(*results, what=what)


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


@pytest.mark.parametrize(
    "n_fft, win_length", [(400, 400), (401, 401), (512, 400), (513, 400), (64, 41), (1, 1), (2, 1)]
)
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
    """Also where ``|X| ** p`` or the logarithm has no derivative: there it counts as 0, in both orders."""
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
    if signal == "silence":
        assert not first[0].any()
        wanted = {None: 0.0, "ln": -INF, "db": -100.0, "log10": -6.0}[log]
        torch.testing.assert_close(out, torch.full_like(out, wanted), rtol=1e-6, atol=0)
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


@pytest.mark.parametrize(
    "name, ragged", [("whisper", False), ("kaldi_mfcc", True), ("spectrum", False), ("energy_prepend", True)]
)
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


RAGGED = [
    *(case for name, case in CASES.items() if name.startswith(("center_", "kaldi_")) and case.config.top_db is None),
    *(CASES[name] for name in ("valid_padded", "wide_center_pad", "hop_beyond_frame", "window_center", "window_start")),
    *(CASES[name] for name in ("whisper_item", "signal_preemphasis", "energy_htk", "spectrum", "log_without_floor")),
]


@pytest.mark.parametrize("case", RAGGED, ids=lambda case: case.name)
def test_ragged_equals_single(case, backend):
    """A row gives what its valid samples give alone, whatever follows them; so does its gradient, 0 beyond."""
    config = case.config.replace(fill=-3.0)
    samples, least = case.shape[-1], case.config.min_length
    lengths = torch.tensor(
        [samples, samples - 1, samples // 2 + 1, samples // 3, least + 5, least, max(0, least - 1), 0]
    )
    lengths = lengths.clamp(max=samples)
    rows = torch.randn(len(lengths), samples, dtype=torch.float64)
    if backend != "reference":
        rows = rows.float()
    beyond = torch.arange(samples) >= lengths[:, None]
    upstream = torch.randn(extract(rows, config).shape, dtype=rows.dtype)
    waveform = rows.masked_fill(beyond, math.nan).requires_grad_()
    out, counts = extract(waveform, config, lengths=lengths, backend=backend)
    (gradient,) = torch.autograd.grad(out, waveform, upstream)
    assert counts.tolist() == [config.frame_count(n) for n in lengths.tolist()]
    assert not gradient[beyond].any()
    time = 1 if config.layout == "time_feature" else 2
    for b, (length, count) in enumerate(zip(lengths.tolist(), counts.tolist(), strict=True)):
        assert (out[b].narrow(time - 1, count, out.shape[time] - count) == config.fill).all()
        if length < least:
            assert not gradient[b].any()
            continue
        alone, alone_gradient = with_gradient(
            rows[b : b + 1, :length], config, upstream[b : b + 1].narrow(time, 0, count), backend
        )
        close = {"rtol": 1e-9, "atol": 1e-9} if backend == "reference" else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(out[b : b + 1].narrow(time, 0, count), alone, **close)
        torch.testing.assert_close(gradient[b : b + 1, :length], alone_gradient, **close)


@pytest.mark.parametrize("scope", ["item", "channels", "batch"])
@pytest.mark.parametrize("dither", [0.0, 2.0])
def test_ragged_maximum(dither, scope, backend):
    """The maximum that ``top_db`` counts from is that of valid frames of the rows in the scope, with dither too."""
    config = MelConfig(
        n_fft=16, hop_length=6, n_mels=4, log="db", log_floor=1e-10, top_db=6.0, top_db_scope=scope, dither=dither
    )
    rows = torch.randn(2, 3, 100, dtype=torch.float64) * torch.tensor([1.0, 3.0, 0.2])[:, None]
    rows[..., 60:] *= 50  # loud where it does not count
    lengths = torch.tensor([[60, 33, 50], [9, 0, 7]])
    torch.manual_seed(5)
    out, counts = extract(rows, config, lengths=lengths, backend=backend)
    torch.manual_seed(5)
    seed = int(torch.randint(2**31 - 1, ()))  # as `extract` draws it
    args = tables.window(config).numpy(), tables.filters(config).numpy(), None
    group, ends = {"item": 1, "channels": 3, "batch": 0}[scope], lengths.flatten().tolist()
    expected, wanted = definition.features(rows.view(6, 100).numpy(), ends, *args, group, seed, config)
    assert counts.flatten().tolist() == wanted
    torch.testing.assert_close(out.view(6, 4, -1), torch.from_numpy(expected), rtol=1e-9, atol=1e-9)


def test_ragged_unread_samples(backend):
    """Valid samples after the last whole frame are in no frame: NaN there reaches neither features nor gradient."""
    config = MelConfig(n_fft=16, hop_length=8, n_mels=4, framing="valid", log="ln", log_floor=1e-6)
    waveform = torch.randn(2, 64)
    waveform[0, 38] = math.nan
    waveform.requires_grad_()
    out, counts = extract(waveform, config, lengths=torch.tensor([39, 64]), backend=backend)
    assert counts.tolist() == [3, 7] and out.isfinite().all()
    (gradient,) = torch.autograd.grad(out.sum(), waveform)
    assert gradient.isfinite().all() and not gradient[0, 32:].any() and gradient[0, 31] != 0


@pytest.mark.parametrize("mode", ["reflect", "constant", "replicate", "circular", "mirror"])
def test_outside_index(mode):
    """Every position around signals of a few samples, as often folded as it takes."""
    for length in range(1, 6):
        config = MelConfig(pad_mode=mode)
        signal = [float(t + 1) for t in range(length)]
        position = torch.arange(-17, 18)
        index = reference.outside_index(position, length, mode)
        found = [signal[i] if 0 <= i < length else 0.0 for i in index.tolist()]
        assert found == [definition._sample(signal, t, config) for t in position.tolist()]
        assert torch.equal(index, reference.outside_index(position, torch.tensor(length), mode))


def test_ragged_shapes(backend):
    """Counts have the leading shape; a single waveform takes a scalar; int32 will do; no frames at all is a result."""
    out, count = extract(torch.randn(50), EDGES, lengths=torch.tensor(30), backend=backend)
    assert out.shape == (4, 11) and count.shape == () and count == 7
    out, counts = extract(
        torch.randn(2, 3, 50), EDGES, lengths=torch.full((2, 3), 50, dtype=torch.int32), backend=backend
    )
    assert counts.dtype == torch.int64 and counts.tolist() == [[11] * 3] * 2
    out, counts = extract(torch.randn(2, 3), EDGES, lengths=torch.tensor([3, 0]), backend=backend)
    assert out.shape == (2, 4, 0) and counts.tolist() == [0, 0]
    for lengths in (torch.tensor([50, 1, 30, 1])[::2], torch.tensor(50).expand(2)):
        counts = extract(torch.randn(2, 50), EDGES, lengths=lengths, backend=backend)[1]
        assert counts.tolist() == [11, 7 if lengths[1] == 30 else 11]
    out, counts = extract(torch.randn(0, 50), EDGES, lengths=torch.zeros(0, dtype=torch.int64), backend=backend)
    assert out.shape == (0, 4, 11) and counts.shape == (0,)


@pytest.mark.parametrize("name", ["whisper", "mfcc_db", "kaldi_mfcc", "n_fft_401", "mel_2048"])
def test_determinism(name, backend):
    """Bit for bit the same again, gradients too; on the native backend also with another number of threads."""
    case = CASES[name]
    waveform = case.waveform()
    upstream = torch.randn(extract(waveform, case.config).shape)
    first = with_gradient(waveform, case.config, upstream, backend)
    threads = torch.get_num_threads()
    try:
        for n in (threads, 2, 1) if backend != "reference" else (threads,):
            torch.set_num_threads(n)
            for again, before in zip(with_gradient(waveform, case.config, upstream, backend), first, strict=True):
                assert torch.equal(again, before), f"{n} threads"
    finally:
        torch.set_num_threads(threads)


def test_inference_mode_first(backend):
    """Tables made in inference mode serve a later call that wants a gradient."""
    rate = {"reference": 7001, "cpu": 7002, "cuda": 7003}[backend]  # a configuration that no cache holds yet
    config = MelConfig(n_fft=24, hop_length=9, n_mels=5, sample_rate=rate)
    with torch.inference_mode():
        expected = extract(torch.ones(2, 60), config, backend=backend)
    waveform = torch.ones(2, 60, requires_grad=True)
    out = extract(waveform, config, backend=backend)
    torch.testing.assert_close(out, expected)
    assert torch.autograd.grad(out.sum(), waveform)[0].abs().sum() > 0


def test_backward_rejects(native):
    """The operator itself checks what the kernels are about to read."""
    waveform, config = torch.randn(2, 60), MelConfig(n_fft=16, hop_length=8, n_mels=4)
    features, _, maxima = torch.ops.mmfast.mel_forward(waveform, None, None, None, None, 0, 0, config.key)
    for grad in (features[:, :, 1:], features.transpose(1, 2), features[:1]):
        with pytest.raises(ValueError, match="grad must be"):
            torch.ops.mmfast.mel_backward(grad, waveform, None, None, None, None, maxima, 0, 0, config.key, True, False)


def test_rows_are_independent(native):
    """A row's features do not depend on where in the batch it stands, bit for bit."""
    config = CASES["whisper_item"].config
    waveform = torch.randn(5, 4000)
    together = extract(waveform, config, backend=native)
    for row, features in zip(waveform, together, strict=True):
        assert torch.equal(extract(row, config, backend=native), features)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int16])
@pytest.mark.parametrize(
    "name",
    ["mfcc_log", "log_mel_short", "kaldi_fbank", "mel_2048", "spectrum", "energy_prepend", "hop_beyond_frame"],
)
def test_tails_of_several_rows(name, dtype, native):
    """Rows whose last frames meet in one tile give what each gives alone, bit for bit, and a bad row no other."""
    config = CASES[name].config
    for frames in (1, 2, 3, 5, 8, 17, 19, 34):
        length = max(frames * config.hop_length - config.count_offset, config.min_length, 1)
        for rows in (2, 3, 9, 17):
            wide = torch.randn(rows, 2, length + 3, dtype=torch.float64) * (1000 if dtype == torch.int16 else 1)
            for waveform in (wide.to(dtype)[:, 0, :length].contiguous(), wide.to(dtype)[:, 1, 3:]):
                if dtype != torch.int16:
                    waveform[1, length // 2] = math.nan
                together = extract(waveform, config, backend=native)
                alone = torch.stack([extract(row, config, backend=native) for row in waveform])
                torch.testing.assert_close(together, alone, rtol=0, atol=0, equal_nan=True)
                assert frames <= config.frame_count(length) <= 34 and together[0].isfinite().all()


@pytest.mark.parametrize("value", [math.nan, INF, -INF])
@pytest.mark.parametrize(
    "name", ["whisper_item", "kaldi_fbank", "empty_filters", "spectrum", "energy_prepend", "mfcc_log"]
)
def test_nan_inf(name, value, backend):
    """A bad sample spoils the frames that read it, as in the reference, and no others."""
    config = CASES[name].config.replace(top_db=None)
    waveform = torch.randn(2, 4000)
    clean = extract(waveform, config, backend=backend)
    waveform[0, 2000] = value
    out = extract(waveform, config, backend=backend)
    if config.layout == "time_feature":
        out, clean = out.transpose(1, 2), clean.transpose(1, 2)
    starts = [f * config.hop_length + config.first_sample for f in range(out.shape[2])]
    reads = [f for f, start in enumerate(starts) if start <= 2000 < start + config.win_length]  # 0 * NaN is NaN
    spoilt = torch.zeros(out.shape, dtype=torch.bool)
    spoilt[0, :, reads] = True
    assert not out[spoilt].isfinite().any()
    assert torch.equal(out[~spoilt].isfinite(), clean[~spoilt].isfinite())
    torch.testing.assert_close(out[~spoilt], clean[~spoilt], rtol=1e-5, atol=1e-4)
    if math.isnan(value):
        assert out[spoilt].isnan().all()


def test_nan_maximum(backend):
    """A NaN takes the whole scope of ``top_db`` with it, as `amax` has it."""
    config = EDGES.replace(top_db_scope="item")
    waveform = torch.randn(2, 60)
    waveform[0, 30] = math.nan
    out = extract(waveform, config, backend=backend)
    assert out[0].isnan().all() and out[1].isfinite().all()


def test_dither(backend):
    """Noise by the documented formula from the seed; new with every call, the same after a seed."""
    config = MelConfig(n_fft=16, win_length=12, hop_length=7, filters=None, dither=0.5)
    noise = reference.dither_noise(7, 3, 2, 12, torch.float64)
    wanted = [[[definition.noise(7, b, f, n) for n in range(12)] for f in range(2)] for b in range(3)]
    torch.testing.assert_close(noise, torch.tensor(wanted, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    large = reference.dither_noise(2**31 - 2, 4, 250, 100)
    assert abs(large.mean()) < 0.02 and abs(large.std() - 1) < 0.02 and abs((large**4).mean() - 3) < 0.15
    waveform = torch.randn(3, 100)
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(extract(waveform, config, backend=backend))
    assert torch.equal(outs[0], outs[1]) and not torch.allclose(outs[0], outs[2])
    torch.manual_seed(1)
    compared = extract(waveform.double(), config, backend="reference")
    torch.testing.assert_close(outs[0].double(), compared, rtol=1e-4, atol=1e-4)


def test_filter_gradient(backend):
    """A trainable filter bank learns the same on every backend."""
    case = CASES["whisper"]
    waveform = case.waveform()
    filters = tables.filters(case.config)
    upstream = torch.randn(extract(waveform, case.config).shape, dtype=torch.float64)

    def gradient(dtype, backend):
        bank = filters.to(dtype).requires_grad_()
        out = extract(waveform.to(dtype), case.config, filters=bank, backend=backend)
        return torch.autograd.grad(out, bank, upstream.to(dtype))[0]

    exact = gradient(torch.float64, "reference")
    assert exact.norm() > 0
    assert_no_worse_than_eager(gradient(torch.float32, backend), gradient(torch.float32, "reference"), exact)


REJECTED = {
    "waveform must be a tensor": (TypeError, lambda x: extract([0.0] * 100, EDGES)),
    "waveform must be float32": (TypeError, lambda x: extract(x.to(torch.int32), EDGES)),
    "waveform must be float32, .* got torch.complex64": (TypeError, lambda x: extract(x.to(torch.complex64), EDGES)),
    "config must be a MelConfig, got dict": (TypeError, lambda x: extract(x, {"n_mels": 80})),
    "waveform must have at least one dimension": (ValueError, lambda x: extract(torch.tensor(1.0), EDGES)),
    "waveform must have at least 9 samples": (ValueError, lambda x: extract(x[..., :8], EDGES)),
    "lengths must be an int64": (TypeError, lambda x: extract(x, EDGES, lengths=torch.ones(2))),
    "lengths must have the leading shape": (ValueError, lambda x: extract(x, EDGES, lengths=torch.tensor([50]))),
    r"lengths must lie in \[0, 100\], got values from 3 to 101": (
        ValueError,
        lambda x: extract(x, EDGES, lengths=torch.tensor([3, 101])),
    ),
    "lengths must lie": (ValueError, lambda x: extract(x, EDGES, lengths=torch.tensor([-1, 3]))),
    "window must have shape": (ValueError, lambda x: extract(x, EDGES, window=torch.ones(15))),
    "filters must have shape": (ValueError, lambda x: extract(x, EDGES, filters=torch.ones(4, 9))),
    "filters must be a floating": (TypeError, lambda x: extract(x, EDGES, filters=torch.ones(9, 4, dtype=torch.int32))),
    "backend must be one of": (ValueError, lambda x: extract(x, EDGES, backend="fast")),
    "n_fft must be in": (ValueError, lambda x: MelConfig(n_fft=0)),
    "n_fft must be an integer": (TypeError, lambda x: MelConfig(n_fft=400.0)),
    "hop_length must be in": (ValueError, lambda x: MelConfig(hop_length=0)),
    "win_length must be at most n_fft": (ValueError, lambda x: MelConfig(win_length=401)),
    "n_mels must be in": (ValueError, lambda x: MelConfig(n_mels=0)),
    "f_min and f_max must satisfy": (ValueError, lambda x: MelConfig(f_max=9000)),
    "f_min and f_max must satisfy .* f_min=4000": (ValueError, lambda x: MelConfig(f_min=4000, f_max=4000)),
    "pad_mode must be one of": (ValueError, lambda x: MelConfig(pad_mode="symmetric")),
    "power must be positive": (ValueError, lambda x: MelConfig(power=0)),
    "top_db must not be negative": (ValueError, lambda x: MelConfig(log="db", top_db=-1)),
    "top_db needs a log scale": (ValueError, lambda x: MelConfig(top_db=80)),
    "n_mfcc must be at most n_mels": (ValueError, lambda x: MelConfig(n_mels=10, n_mfcc=11)),
    "window must have win_length": (ValueError, lambda x: MelConfig(n_fft=4, window=(1.0, 2.0))),
    "window must be a name": (TypeError, lambda x: MelConfig(window=400)),
    "mel_norm must be a number": (TypeError, lambda x: MelConfig(mel_norm=[2])),
    "log_floor must be finite": (ValueError, lambda x: MelConfig(log_floor=math.nan)),
    "vtln_low and vtln_high": (
        ValueError,
        lambda x: tables.filters(MelConfig(mel_scale="kaldi", f_min=200, vtln_warp=1.1)),
    ),
}


@pytest.mark.parametrize("message", REJECTED)
def test_rejects(message):
    """Every error names the argument."""
    error, call = REJECTED[message]
    with pytest.raises(error, match=message):
        call(torch.randn(2, 100))


def test_peak_memory(native):
    """Beyond its result the op needs less than 4 MB a thread, forward and backward, and saves only the waveform."""
    budget = 4 * 2**20 * torch.get_num_threads() + 2**19
    for name, samples in (("whisper_item", 480000), ("mfcc_db", 480000), ("mel_2048", 480000), ("kaldi_mfcc", 480000)):
        config = CASES[name].config
        waveform = torch.randn(4, samples, requires_grad=True)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # noqa: B023
            out = extract(waveform, config, backend=native)
        upstream = torch.randn_like(out)
        torch.autograd.grad(out, waveform, upstream, retain_graph=True)  # makes plans and tables
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
        assert sum(storages.values()) < waveform.numel() * 4 + 4 * 2**20, name
        with torch.no_grad():
            assert peak_extra_bytes(lambda: extract(waveform, config, backend=native)) < budget, name  # noqa: B023
        extra = peak_extra_bytes(lambda: torch.autograd.grad(out, waveform, upstream, retain_graph=True))  # noqa: B023
        assert extra < budget, name


def test_peak_memory_is_seen():
    """The reference allocates its spectrogram, and the measurement of `test_peak_memory` says so."""
    config = CASES["whisper_item"].config
    waveform = torch.randn(4, 160000)
    extract(waveform, config, backend="reference")
    spectrogram = 4 * config.frame_count(160000) * config.n_freqs * 8
    assert peak_extra_bytes(lambda: extract(waveform, config, backend="reference")) > spectrogram
