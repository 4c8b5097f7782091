"""The mel op against its definition, its float64 gold, and what a drop-in has to promise, on every backend."""

from __future__ import annotations

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


def compare(case: Case, dtype: torch.dtype, backend: str) -> None:
    waveform = case.waveform(dtype)
    upstream = torch.randn(gold(waveform, case.config).shape, dtype=torch.float64)
    if not case.config.log_floor and not case.config.log_offset and case.config.log:
        upstream = upstream * gold(waveform, case.config).isfinite()
    out, out_grad = with_gradient(waveform, case.config, upstream, backend)
    eager, eager_grad = with_gradient(waveform, case.config, upstream, "reference")
    exact, exact_grad = with_gradient(waveform.double(), case.config, upstream, "reference")
    assert_no_worse_than_eager(out, eager, exact, what="features")
    assert_no_worse_than_eager(out_grad, eager_grad, exact_grad, what="gradient")


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
    compare(case, torch.float32, backend)
