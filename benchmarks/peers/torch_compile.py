"""torch.compile of mmfast's own reference, and of the torchaudio pipeline.

The compiler leaves the FFT to the library and fuses what surrounds it. Compilation happens in the untimed first calls.
"""

from __future__ import annotations

import warnings
from functools import partial

import torch

from benchmarks.peers import torchaudio_peer
from benchmarks.providers import Provider, Runner


def _compile(function):
    # Complex numbers are not generated, only called; the compiler warns of it on every graph.
    warnings.filterwarnings("ignore", message=".*Torchinductor does not support code generation for complex.*")
    return torch.compile(function, dynamic=False)


class ReferenceCompile(Provider):
    name, package, module = "reference-compile", "torch", "torch"

    def build(self, case, device):
        return Runner(_compile(partial(case.compute, backend="reference")))


class TorchaudioCompile(Provider):
    name, package, module = "torchaudio-compile", "torchaudio", "torchaudio"

    def build(self, case, device):
        return Runner(_compile(torchaudio_peer.pipeline(case.config).to(device)))


PROVIDERS = [ReferenceCompile(), TorchaudioCompile()]
