"""What a provider is, mmfast's own two, and the list of all."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from importlib import metadata
from typing import Any

import torch

import mmfast
from mmfast import _backend


def _identity(x: Any) -> Any:
    return x


@dataclass(frozen=True)
class Runner:
    """A provider made ready for one case.

    Args:
        forward: what ``prepare`` returned → the result, a tensor of the case's shape.
        prepare: the case's inputs, a tensor or a tuple of tensors, in the container that the library wants (array,
            list), outside the timed call.
        differentiable: gradients flow through ``forward``.
    """

    forward: Callable[[Any], torch.Tensor]
    prepare: Callable[[Any], Any] = _identity
    differentiable: bool = True

    def call(self, mode: str, inputs: Any, upstream: torch.Tensor) -> Callable[[], tuple[torch.Tensor, ...]]:
        """The function to time: () → (result,), or (gradients..., result) for the mode "backward"."""
        if mode == "forward":
            x = self.prepare(inputs)
            return lambda: (self.forward(x),)
        if not self.differentiable:
            raise ValueError("this provider has no backward")
        if isinstance(inputs, tuple):
            x = self.prepare(tuple(t.detach().clone().requires_grad_() for t in inputs))
        else:
            x = self.prepare(inputs.detach().clone().requires_grad_())
        return lambda: self.forward_backward(x, upstream)

    def forward_backward(self, x: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The gradients of ``sum(upstream * result)`` with respect to the inputs, and the result."""
        result = self.forward(x)
        return *torch.autograd.grad(result, x, upstream), result.detach()


class Provider:
    """One way to compute a case.

    Attributes:
        name: what rows and ``--providers`` call it.
        package: distribution whose version a row carries.
        module: import name that must be installed.
        differentiable: has a backward.
        devices: device types that it runs on.
    """

    name: str
    package: str
    module: str
    differentiable = True
    devices: tuple[str, ...] = ("cpu", "cuda")

    def missing(self, device: str) -> str | None:
        """Why the provider cannot run on this machine, or ``None``."""
        if importlib.util.find_spec(self.module) is None:
            return f"{self.package} is not installed"
        return None if device in self.devices else f"runs on {', '.join(self.devices)} only"

    def version(self) -> str:
        """Version of the library behind it."""
        return metadata.version(self.package)

    def supports(self, case: Any, mode: str) -> bool:
        """Whether it computes the numbers of ``case``, and has a backward if ``mode`` asks for one."""
        return self.name in case.peers and (mode == "forward" or self.differentiable)

    def runs(self, case: Any, device: str) -> bool:
        """Whether it has what ``case`` takes on ``device``."""
        return True

    def build(self, case: Any, device: str) -> Runner:
        """The provider made ready for ``case``, as its documentation advises for speed."""
        raise NotImplementedError


class Reference(Provider):
    """The plain PyTorch implementation inside mmfast, but for cases too large for it."""

    name, package, module = "reference", "torch", "torch"

    def supports(self, case, mode):
        return case.reference

    def build(self, case, device):
        return Runner(partial(case.compute, backend="reference"), getattr(case, "prepare", _identity))


class Native(Provider):
    """The fused operator, on the backend that mmfast chooses for the device."""

    name, package, module = "mmfast", "mmfast", "mmfast"

    def missing(self, device):
        found = [_backend.choose(op, torch.device(device)) for op in _backend.OPS]
        return f"backend reference: {found[0][1]}" if all(backend == "reference" for backend, _ in found) else None

    def runs(self, case, device):
        if case.slice == "fusion":  # which also has torch's own kernels to build on
            return case.fused(device)
        return _backend.choose(case.slice, torch.device(device))[0] != "reference"

    def version(self):
        return mmfast.__version__

    def supports(self, case, mode):
        return True

    def build(self, case, device):
        compute = case.computation(device) if hasattr(case, "computation") else case.compute
        return Runner(compute, getattr(case, "prepare", _identity))


PEER_MODULES = (
    "torchaudio_peer",
    "torch_compile",
    "librosa_peer",
    "kaldi_native_fbank_peer",
    "whisper_peer",
    "transformers_peer",
    "nnaudio_peer",
    "mmd_torch",
    "mmd_blocked",
    "mmd_keops",
    "mmd_tests",
    "fusion_torch",
    "fusion_modules",
)


def every() -> dict[str, Provider]:
    """All providers by name, installed or not; an adapter imports its library only when it builds."""
    providers: list[Provider] = [Native(), Reference()]
    for name in PEER_MODULES:
        providers += importlib.import_module(f"benchmarks.peers.{name}").PROVIDERS
    return {provider.name: provider for provider in providers}


def select(globs: str | None, device: str = "cpu") -> tuple[list[Provider], dict[str, str]]:
    """Providers that match ``globs`` (comma-separated, ``None`` for all) and can run here, and why the others cannot.

    Raises:
        ValueError: a pattern that matches no provider.
    """
    known = every()
    patterns = globs.split(",") if globs else ["*"]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in known):
            raise ValueError(f"--providers: nothing matches {pattern!r}; providers: {', '.join(known)}")
    chosen = [p for name, p in known.items() if any(fnmatchcase(name, pattern) for pattern in patterns)]
    reasons = {p.name: p.missing(device) for p in chosen}
    return [p for p in chosen if reasons[p.name] is None], {k: v for k, v in reasons.items() if v is not None}
