"""torch.compile of mmfast's own reference, and of the usual pipeline on ``torch.stft``: whole graphs, fixed shapes.

The compiler calls the FFT and fuses what surrounds it. torchaudio's own modules are no stronger baseline: torch 2.13
breaks their graph at ``F.spectrogram`` and runs the parts one after the other.
"""

from __future__ import annotations

import warnings
from functools import partial

import torch

from benchmarks.providers import Provider, Runner


def _compile(function):
    # Complex numbers are not generated, only called; the compiler warns of it on every graph.
    warnings.filterwarnings("ignore", message=".*Torchinductor does not support code generation for complex.*")
    return torch.compile(function, dynamic=False, fullgraph=True)


def _tables(case, device):
    """Passed in as tensors: traced into the graph they would be computed again in every call."""
    return {name: value.to(device, torch.float32) for name, value in case.tables().items()}


def stft_pipeline(x, config, window, filters, dct=None):
    """What is written by hand for ``config`` when torchaudio is not at hand: (B, T) → (B, C, frames)."""
    c = config
    spectrum = torch.stft(
        x, c.n_fft, c.hop_length, c.win_length, window, center=True, pad_mode=c.pad_mode, return_complex=True
    )
    if c.drop_last:
        spectrum = spectrum[..., :-1]
    y = filters.T @ torch.view_as_real(spectrum).square().sum(-1)
    if c.log is not None:
        y = y.clamp(min=c.log_floor) + c.log_offset
        y = {"ln": torch.log, "log10": torch.log10, "db": lambda p: c.db_multiplier * torch.log10(p)}[c.log](y)
        if c.top_db is not None:
            top = y.amax((-2, -1), keepdim=True) if c.top_db_scope == "item" else y.max()
            y = torch.maximum(y, top - c.top_db)
        y = (y + c.output_offset) * c.output_scale
    return y if dct is None else dct.T @ y


class ReferenceCompile(Provider):
    name, package, module = "reference-compile", "torch", "torch"

    def build(self, case, device):
        return Runner(_compile(partial(case.compute, backend="reference", **_tables(case, device))))


class StftCompile(Provider):
    name, package, module = "stft-compile", "torch", "torch"

    def build(self, case, device):
        return Runner(_compile(partial(stft_pipeline, config=case.config, **_tables(case, device))))


PROVIDERS = [ReferenceCompile(), StftCompile()]
