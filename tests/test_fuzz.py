"""Configurations, shapes, strides and dtypes that nobody thought of."""

from __future__ import annotations

import definition
import exact
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numerics import assert_no_worse_than_eager

from mmfast.mel import MelConfig, extract, reference, tables

WINDOWS = ("hann", "hamming", "blackman", "povey", "rectangular")
QUICK = {"suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture], "deadline": None}


def _maybe(value, chance: int = 3) -> st.SearchStrategy:
    """Mostly nothing."""
    return st.integers(0, chance).flatmap(lambda i: value if i == 0 else st.none())


@st.composite
def configs(draw, largest: int = 600) -> MelConfig:
    """Any `MelConfig` of at most ``largest`` points whose logarithm, if any, has a floor."""
    few = st.integers(1, 40)
    n_fft = draw(st.one_of(few, st.sampled_from([64, 100, 128, 243, 400, 401, 512, 600]), st.integers(1, largest)))
    n_fft = min(n_fft, largest)
    fields = {
        "n_fft": n_fft,
        "win_length": draw(_maybe(st.integers(1, n_fft))),
        "hop_length": draw(_maybe(st.integers(1, 2 * n_fft + 3), 1)),
        "framing": draw(st.sampled_from(("center", "valid", "kaldi"))),
        "pad": draw(st.sampled_from((0, 0, 0, 1, 17))),
        "pad_mode": draw(st.sampled_from(("reflect", "constant", "replicate", "circular", "mirror"))),
        "drop_last": draw(st.booleans()),
        "window": draw(st.sampled_from(WINDOWS)),
        "window_periodic": draw(st.booleans()),
        "window_position": draw(st.sampled_from(("center", "start"))),
        "normalized": draw(st.sampled_from((False, False, "window", "frame_length"))),
        "input_scale": draw(st.sampled_from((1.0, 1.0, 30.0))),
        "remove_dc": draw(st.booleans()),
        "preemphasis": draw(st.sampled_from((0.0, 0.0, 0.97))),
        "preemphasis_scope": draw(st.sampled_from(("frame", "signal"))),
        "energy": draw(_maybe(st.sampled_from(("prepend", "append", "replace_first", "replace_last")), 2)),
        "raw_energy": draw(st.booleans()),
        "energy_floor": draw(st.sampled_from((0.0, 1.0))),
        "power": draw(st.sampled_from((2.0, 2.0, 1.0, 0.5, 3.0))),
        "power_offset": draw(st.sampled_from((0.0, 0.0, 1e-3))),
        "filters": draw(st.sampled_from(("mel", "mel", "linear", None))),
        "n_mels": draw(st.integers(1, 90)),
        "f_min": draw(st.sampled_from((0.0, 20.0))),
        "f_max": draw(st.sampled_from((None, 7600.0))),
        "mel_scale": draw(st.sampled_from(("htk", "slaney", "kaldi"))),
        "mel_norm": draw(st.sampled_from((None, None, "slaney", 1.0))),
        "layout": draw(st.sampled_from(("feature_time", "time_feature"))),
        "fill": draw(st.sampled_from((0.0, -7.0))),
        "output_offset": draw(st.sampled_from((0.0, 4.0))),
        "output_scale": draw(st.sampled_from((1.0, 0.25))),
    }
    if draw(st.booleans()):
        floor, offset = draw(st.sampled_from(((1e-3, 0.0), (0.0, 1e-2), (1e-4, 1e-3))))
        fields |= {
            "log": draw(st.sampled_from(("ln", "log10", "db"))),
            "log_floor": floor,
            "log_offset": offset,
            "db_reference": draw(st.sampled_from((1.0, 0.3))),
            "top_db": draw(_maybe(st.sampled_from((0.0, 1.0, 20.0)), 1)),
            "top_db_scope": draw(st.sampled_from(("item", "channels", "batch"))),
        }
    if fields["filters"] and draw(st.booleans()):
        fields |= {
            "n_mfcc": draw(st.integers(1, fields["n_mels"])),
            "dct_norm": draw(st.sampled_from(("ortho", None))),
            "lifter": draw(st.sampled_from((0.0, 22.0))),
            "lifter_kind": draw(st.sampled_from(("kaldi", "librosa"))),
            "cepstra_order": draw(st.sampled_from(("c0_first", "htk"))),
        }
    config = MelConfig(**fields)
    if not tables.window(config).any():  # a symmetric Hann window of two samples, which has no norm to divide by
        config = config.replace(normalized=False)
    return config


@st.composite
def waveforms(draw, config: MelConfig, dtypes=(torch.float32,), most: int = 2500) -> torch.Tensor:
    """Noise of any leading shape, with strides of any kind and parts of silence."""
    leading = draw(st.sampled_from(((), (1,), (3,), (2, 2), (17,), (1, 3))))
    spare = draw(st.one_of(st.integers(0, 50), st.integers(0, most)))
    samples = config.min_length + spare
    seed = draw(st.integers(0, 2**16))
    generator = torch.Generator().manual_seed(seed)
    kind = draw(st.sampled_from(("contiguous", "contiguous", "strided", "transposed", "shifted")))
    if kind == "strided":
        x = torch.randn(*leading, 2 * samples, generator=generator)[..., ::2]
    elif kind == "transposed":
        x = torch.randn(samples, *leading, generator=generator).movedim(0, -1)
    else:
        x = torch.randn(*leading, samples + 3, generator=generator)[..., 3:]
        x = x.contiguous() if kind == "contiguous" else x
    if draw(st.booleans()):
        x[..., samples // 3 : samples // 2] = 0
    return x.to(draw(st.sampled_from(dtypes)))


def _lengths(draw, waveform: torch.Tensor) -> torch.Tensor | None:
    if draw(st.booleans()):
        return None
    n = waveform.shape[-1]
    edge = st.sampled_from((0, n, n // 2))
    values = [draw(st.one_of(edge, st.integers(0, n))) for _ in range(waveform.shape[:-1].numel())]
    return torch.tensor(values, dtype=torch.int64).view(waveform.shape[:-1])


@settings(max_examples=80, **QUICK)
@given(data=st.data())
def test_reference_matches_definition(data):
    """The float64 reference is the documented formula, whatever the configuration."""
    config = data.draw(configs(largest=80))
    waveform = data.draw(waveforms(config, (torch.float64,), most=300))
    lengths = _lengths(data.draw, waveform)
    out = extract(waveform, config, lengths=lengths, backend="reference")
    out = out if lengths is None else out[0]
    rows, ends, arrays, group = _as_arrays(waveform, lengths, config)
    expected, _ = definition.features(rows, ends, *arrays, group, 0, config)
    torch.testing.assert_close(out.reshape(expected.shape), torch.from_numpy(expected), rtol=1e-8, atol=1e-8)


@settings(max_examples=60, **QUICK)
@given(data=st.data())
def test_long_double_is_the_definition(data):
    """Values against `definition`, the gradient against autograd of the reference, both float64."""
    config = data.draw(configs(largest=80))
    waveform = data.draw(waveforms(config, (torch.float64,), most=300)).detach().requires_grad_()
    lengths = _lengths(data.draw, waveform)
    out = extract(waveform, config, lengths=lengths, backend="reference")
    out = out if lengths is None else out[0]
    upstream = torch.randn(out.shape, dtype=torch.float64)
    gold, gradient = _longer(waveform.detach(), lengths, config, upstream)
    rows, ends, arrays, group = _as_arrays(waveform.detach(), lengths, config)
    expected, _ = definition.features(rows, ends, *arrays, group, 0, config)
    torch.testing.assert_close(gold.reshape(expected.shape), torch.from_numpy(expected), rtol=1e-8, atol=1e-8)
    if not _near_a_clamp(waveform, config, gold):
        (wanted,) = torch.autograd.grad(out, waveform, upstream)
        torch.testing.assert_close(gradient, wanted, rtol=1e-6, atol=1e-6 * (1 + wanted.norm().item()))


@settings(max_examples=150, **QUICK)
@given(data=st.data())
def test_native_matches_gold(data, native):
    """Values and gradients of the native kernels against float64; a few values have less luck than many."""
    config = data.draw(configs())
    waveform = data.draw(
        waveforms(config, (torch.float32, torch.float32, torch.float64, torch.float16, torch.bfloat16))
    )
    lengths = _lengths(data.draw, waveform)
    results = []
    for x, backend in ((waveform, native), (waveform, "reference"), (waveform.double(), "reference")):
        x = x.detach().requires_grad_()  # detached, not cloned: the strides stay
        out = extract(x, config, lengths=lengths, backend=backend)
        out, counts = out if lengths is not None else (out, None)
        upstream = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        results.append((out, torch.autograd.grad(out, x, upstream.to(out.dtype))[0], counts))
    (out, gradient, counts), (eager, eager_gradient, eager_counts), (gold, gold_gradient, _) = results
    assert lengths is None or torch.equal(counts, eager_counts)
    if waveform.dtype == torch.float64:  # what eager mode computes is no gold for itself
        gold, gold_gradient = _longer(waveform, lengths, config, upstream)
    # A few values have a condition of their own, beside which eager mode's luck says little.
    floor = 32 * torch.finfo(waveform.dtype).eps
    assert_no_worse_than_eager(out, eager, gold, factor=4, floor=floor, what="features")
    if not _near_a_clamp(waveform, config, gold):
        assert_no_worse_than_eager(gradient, eager_gradient, gold_gradient, factor=4, floor=floor, what="gradient")


def _longer(
    waveform: torch.Tensor, lengths: torch.Tensor | None, config: MelConfig, upstream: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Features and gradient in long double, rounded to float64."""
    rows, ends, arrays, group = _as_arrays(waveform, lengths, config)
    wanted = upstream.reshape(len(rows), *upstream.shape[-2:]).numpy()
    out, gradient = exact.features_and_gradient(rows, ends, *arrays, group, config, wanted)
    out = torch.from_numpy(out.astype(np.float64)).reshape(upstream.shape)
    return out, None if gradient is None else torch.from_numpy(gradient.astype(np.float64)).reshape(waveform.shape)


def _as_arrays(waveform: torch.Tensor, lengths: torch.Tensor | None, config: MelConfig):
    """Rows, their lengths, the tables and the group, as `definition.features` takes them."""
    rows = waveform.reshape(waveform.shape[:-1].numel(), waveform.shape[-1])
    ends = [rows.shape[1]] * len(rows) if lengths is None else lengths.flatten().tolist()
    found = (tables.window(config), tables.filters(config), tables.dct(config))
    arrays = [None if t is None else t.numpy() for t in found]
    channels = waveform.shape[-2] if waveform.dim() > 1 else 0
    return rows.numpy(), ends, arrays, {"item": 1, "channels": channels, "batch": 0}[config.top_db_scope]


def _near_a_clamp(waveform: torch.Tensor, config: MelConfig, exact: torch.Tensor) -> bool:
    """Whether rounding can decide which side of a floor or maximum a value falls on: the gradient jumps there."""
    if config.log is None and not (config.energy and config.energy_floor):
        return False
    before = config.replace(log=None, top_db=None, n_mfcc=None, lifter=0.0, cepstra_order="c0_first", energy=None)
    before = before.replace(output_offset=0.0, output_scale=1.0)
    m = extract(waveform.double(), before, backend="reference")
    near = ((m / max(config.log_floor, 1e-300) - 1).abs() < 1e-2).any()
    return bool(near) or config.top_db is not None or bool(config.energy and config.energy_floor)


@settings(max_examples=100, **QUICK)
@given(data=st.data())
def test_rejects_or_computes(data, backend):
    """Fields of any value give a `ValueError` or `TypeError` that names one of them, or a configuration that works."""
    numbers = st.one_of(st.integers(-2, 70), st.floats(-2.0, 70.0), st.just(float("nan")), st.booleans(), st.none())
    names = (
        "n_fft",
        "win_length",
        "hop_length",
        "center_pad",
        "pad",
        "n_mels",
        "n_mfcc",
        "power",
        "log_floor",
        "f_max",
    )
    fields = data.draw(st.dictionaries(st.sampled_from(names), numbers, max_size=4))
    waveform = torch.randn(2, 80)
    try:
        config = MelConfig(**{"n_fft": 32, "n_mels": 6, **fields})
        out = extract(waveform, config, backend=backend)
    except (ValueError, TypeError) as error:
        assert any(name in str(error) for name in (*fields, "f_min", "waveform", "win_length", "n_mels")), error
    else:
        assert out.shape == (2, config.n_features, config.frame_count(80))
        assert config.power > 4 or not out.isnan().any()  # above, squares overflow


@pytest.mark.parametrize(
    "config", [MelConfig(), MelConfig(window=(0.5, 1.0), n_fft=2, n_mels=1)], ids=["plain", "values"]
)
def test_key_round_trip(config):
    assert MelConfig.from_key(config.key) == config and hash(MelConfig.from_key(config.key)) == hash(config)


@settings(max_examples=50, **QUICK)
@given(configs())
def test_key_round_trip_of_any(config):
    assert MelConfig.from_key(config.key) == config


def test_reference_is_callable_alone():
    """`mel_reference` needs no help from `extract`."""
    config = MelConfig(n_fft=8, n_mels=2)
    out, counts = reference.mel_reference(
        torch.randn(2, 20), tables.window(config).float(), tables.filters(config).float(), None, None, 1, 0, config
    )
    assert out.shape == (2, 2, 6) and counts.tolist() == [6, 6]
