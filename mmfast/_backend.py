"""Loads the native extension and chooses who computes: `reference`, `cpu`, `cuda` or `triton`."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import os
import platform
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _disable_current_modes

BACKENDS = ("reference", "cpu", "cuda", "triton")

# Which backends each operator has besides the reference, best first, for the device the tensors are on.
OPS: dict[str, dict[str, tuple[str, ...]]] = {
    "mel": {"cpu": ("cpu",)},
    "mmd": {"cpu": ("cpu",), "cuda": ("triton",)},
    "fusion": {"cpu": ("cpu",), "cuda": ("triton",)},
}

_REBUILD = "install mmfast again from its source: pip install --no-build-isolation --force-reinstall --no-deps ."


def _load() -> tuple[ModuleType | None, ImportError | None]:
    """The extension, or the error that says why there is none and what to do."""
    try:
        module = importlib.import_module("mmfast._C")
    except ImportError as error:
        explained = ImportError(_explain(error))
        explained.__cause__ = error
        return None, explained
    if _series(module.torch_version) != _series(torch.__version__):
        # It may load and even run, but nothing promises that its idea of a tensor is this torch's.
        return None, ImportError(_built_for(module.torch_version))
    return module, None


def _explain(error: ImportError) -> str:
    """Why loading failed, from the files that lie where the extension should be."""
    files = sorted(path for path in Path(__file__).parent.glob("_C.*") if path.suffix in (".so", ".pyd", ".dylib"))
    mine = [path for path in files if path.name[2:] in importlib.machinery.EXTENSION_SUFFIXES]
    if not files:
        return f"mmfast is installed without native kernels; to have them, {_REBUILD}"
    if not mine:
        this = importlib.machinery.EXTENSION_SUFFIXES[0]
        return f"{files[0].name} was built for another Python (this one loads _C{this}); {_REBUILD}"
    built = re.search(rb"mmfast\._C built for torch ([^;]+);", mine[0].read_bytes())
    if built and _series(built[1].decode()) != _series(torch.__version__):
        return _built_for(built[1].decode())
    return f"{mine[0].name} did not load: {error}"


def _built_for(version: str) -> str:
    return f"the native extension was built for torch {version}, and this is torch {torch.__version__}; {_REBUILD}"


def _series(version: str) -> list[str]:
    return version.split(".")[:2]


_TRITON = importlib.util.find_spec("triton") is not None  # asked for once: a compiler cannot trace the question
_C, LOAD_ERROR = _load()  # the error is kept: `mmfast info` and a request for backend="cpu" show it
if _C is not None and _C.with_cuda:
    OPS["mel"]["cuda"] = ("cuda",)
    OPS["mmd"]["cuda"] = ("cuda", "triton")  # CUDA C++ for few features, Triton for the rest


def choose(op: str, device: torch.device, requested: str | None = None) -> tuple[str, str]:
    """Backend for ``op`` on tensors of ``device``, and the reason in words.

    ``requested`` (the ``backend=`` argument) wins over the environment variable ``MMFAST_BACKEND``; without either the
    native kernels are taken where they exist, else the reference. Inside ``torch.func.grad``, ``jvp`` and their like
    and with dual tensors it is the reference whoever asks (`is_differentiated_by_formula`).

    Raises:
        ValueError: unknown name, or one that cannot run ``op`` on ``device``.
        ImportError: a native backend was asked for and the extension did not load; the cause is chained.
    """
    there = OPS[op].get(device.type, ())
    origin = "backend=" if requested is not None else "MMFAST_BACKEND"
    requested = requested or os.environ.get("MMFAST_BACKEND") or None
    if requested is None:
        if is_differentiated_by_formula():
            return "reference", _BY_FORMULA
        reasons = []
        for name in there:  # up to the first that can run: this stands before every call
            if (reason := _missing(name)) is None:
                kind = "Triton" if name == "triton" else "native"
                return name, f"{kind} kernels for {device.type} tensors"
            reasons.append(reason)
        return "reference", "; ".join(reasons) or f"no native {op} kernels for {device.type} tensors"
    if requested == "reference":
        return "reference", f"asked for by {origin}"
    if requested not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, got {requested!r} from {origin}")
    if requested not in there and not (requested == "triton" and _interprets(op, device)):
        raise ValueError(f"backend {requested!r} (from {origin}) has no {op} kernels for tensors on {device}")
    if requested == "triton" and _missing(requested):
        raise ImportError("backend 'triton' needs triton, which is not installed; pip install triton")
    if _missing(requested):
        raise ImportError(f"backend {requested!r} needs the native extension: {LOAD_ERROR}") from LOAD_ERROR
    if is_differentiated_by_formula():
        return "reference", _BY_FORMULA
    return requested, f"asked for by {origin}"


def _missing(backend: str) -> str | None:
    """Why a backend cannot run here, or None if it can."""
    if backend == "triton":
        return None if _TRITON else "triton is not installed"
    return None if _C is not None else f"no native extension: {LOAD_ERROR}"


def _interprets(op: str, device: torch.device) -> bool:
    """True where Triton's interpreter runs the kernels of ``op`` on the CPU: for tests, never by itself."""
    asked = os.environ.get("TRITON_INTERPRET") == "1"
    return asked and device.type == "cpu" and "triton" in OPS[op].get("cuda", ())


def info() -> dict[str, Any]:
    """What was built, what this machine has, and which backend each operator uses and why; see `format_info`.

    Keys: ``versions``, ``extension`` (its file, or None), ``load_error``, ``build`` (``_C.build_info()``, or None),
    ``machine``, ``environment`` (the ``MMFAST_*`` variables that are set) and ``ops``: operator → device →
    ``{"backend", "reason"}``; the backend is None where the environment asks for what cannot be.
    """
    import mmfast

    build = build_error = None
    if _C is not None:
        try:
            build = _C.build_info()
        except ValueError as error:  # MMFAST_CPU_ISA names no instruction set
            build_error = str(error)
    return {
        "versions": {
            "mmfast": mmfast.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": _version("triton"),
        },
        "extension": None if _C is None else _C.__file__,
        "load_error": build_error if LOAD_ERROR is None else str(LOAD_ERROR),
        "build": build,
        "machine": _machine(),
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith("MMFAST_")},
        "ops": {op: {device: _choice(op, device) for device in _devices()} for op in OPS},
    }


def _devices() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def _choice(op: str, device: str) -> dict[str, str | None]:
    try:
        backend, reason = choose(op, torch.device(device))
    except (ValueError, ImportError) as error:
        backend, reason = None, str(error)
    return {"backend": backend, "reason": reason}


def _machine() -> dict[str, Any]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    return {
        "cpu": _cpu_name(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "torch_cuda": torch.version.cuda,
        "gpus": [
            f"{torch.cuda.get_device_name(i)} (sm_{''.join(map(str, torch.cuda.get_device_capability(i)))})"
            for i in gpus
        ],
    }


def _cpu_name() -> str:
    if sys.platform == "linux":
        name = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if name:
            return name[1]
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    if importlib.util.find_spec(package) is None:
        return None
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def format_info(info: dict[str, Any]) -> str:
    """The dictionary of `info` as the text that ``mmfast info`` prints."""
    versions, build, machine = info["versions"], info["build"], info["machine"]
    lines = [f"mmfast {versions['mmfast']}, torch {versions['torch']}, Python {versions['python']}"]
    if versions["triton"]:
        lines[0] += f", triton {versions['triton']}"
    lines += ["", "Built"]
    if build:
        cuda = f"{build['cuda_version']}, for {' '.join(build['cuda_archs'])}" if build["cuda"] else "no"
        reason = f" ({build['cuda_reason']})" if build["cuda_reason"] else ""
        lines += [
            f"  extension      {info['extension']}",
            f"  for            torch {build['torch']}, by {build['compiler']}, {build['build_type']}",
            f"  OpenMP         {build['openmp'] or 'no'}",
            f"  CPU kernels    {' '.join(build['isa_built'])}",
            f"  CUDA kernels   {cuda}{reason}",
        ]
    else:
        lines.append(f"  nothing that can be used: {info['load_error']}")
    used = f", uses {build['isa_used']}" if build else ""
    lines += [
        "",
        "Machine",
        f"  CPU            {machine['cpu']}, {machine['cores']} cores{used}, {machine['threads']} threads",
        f"  GPU            {', '.join(machine['gpus']) or 'none that torch can use'} "
        f"(torch built {'for CUDA ' + machine['torch_cuda'] if machine['torch_cuda'] else 'without CUDA'})",
        "",
        "Backends",
    ]
    for op, devices in info["ops"].items():
        lines += [f"  {op:<8} {device:<5} {c['backend'] or 'error'}: {c['reason']}" for device, c in devices.items()]
    if info["environment"]:
        lines += ["", "Environment", *(f"  {name}={value}" for name, value in info["environment"].items())]
    return "\n".join(lines)


_TRACERS = [getattr(torch._C._TorchDispatchModeKey, name) for name in ("FAKE", "PROXY", "FUNCTIONAL")]


def keeps() -> bool:
    """False while a graph is traced and inside function transforms: tensors made there carry marks of it, which would
    break later calls, and are needed there with these marks."""
    if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    return torch._C._len_torch_dispatch_stack() == 0 or not any(map(torch._C._get_dispatch_mode, _TRACERS))


@contextlib.contextmanager
def apart():
    """For tensors that are made once and kept: not in inference mode, which would bar them from training, not on a
    default device, and unseen by modes that watch or change what is done."""
    with torch.inference_mode(False), torch._C.DisableTorchFunction(), _disable_current_modes():
        yield


def moved(owner: object, name: str, device: torch.device) -> torch.Tensor:
    """The tensor ``owner.name`` on ``device``, and left there for later calls, unless it is a tracer's or a
    transform's, which no later call could use."""
    t = getattr(owner, name)
    if t.device == device:
        return t
    if torch.compiler.is_dynamo_compiling():
        t = t.to(device)
    elif device.type == "meta" or not keeps():
        return t.to(device)
    else:
        with apart():
            t = t.to(device)
    setattr(owner, name, t)
    return t


def kept(maxsize: int):
    """`functools.lru_cache` for functions that make tensors."""

    def decorate(make):
        @functools.lru_cache(maxsize)
        def once(*args, **kwargs):
            with apart():
                return make(*args, **kwargs)

        @functools.wraps(make)
        def get(*args, **kwargs):
            return (once if keeps() else make)(*args, **kwargs)

        return get

    return decorate


def plain(value):
    """A number that torch.compile holds as a symbol (``dynamic=True``, or after a second value) as that number: a set
    hashes what it takes. For what decides what is computed and is no operand."""
    if isinstance(value, (int, float)):
        (value,) = {value}
    return value


_BY_FORMULA = "torch.func and forward mode differentiate operator by operator"
_Transform = torch._C._functorch.TransformType


def is_differentiated_by_formula() -> bool:
    """True inside ``torch.func.grad``, ``jvp`` and their like and inside `torch.autograd.forward_ad.dual_level`.

    They know no formula of a kernel: a tangent would be lost there in silence. Not asked while a graph is traced.
    """
    if torch.compiler.is_compiling():
        return False
    if forward_ad._current_level >= 0:
        return True
    if torch._C._functorch.peek_interpreter_stack() is None:
        return False
    return any(
        level.key() in (_Transform.Grad, _Transform.Jvp) for level in torch._C._functorch.get_interpreter_stack() or ()
    )


def check_dense(name: str, t: torch.Tensor) -> None:
    """That ``t`` is neither sparse nor nested, for which torch would raise errors of its own further on."""
    if t.layout is not torch.strided or t.is_nested:
        raise TypeError(f"{name} must be a dense tensor, got {'a nested one' if t.is_nested else t.layout}")


def is_plain(t: torch.Tensor) -> bool:
    """True where the memory of ``t``, on the CPU, holds its values (`holds_its_values`)."""
    return holds_its_values(t) and t.is_cpu


def holds_its_values(t: torch.Tensor) -> bool:
    """True where the memory of ``t`` holds its values: strided, no other subclass than a parameter, nothing still to be
    done, no batch of gradients (``is_grads_batched``)."""
    ours = type(t) in (torch.Tensor, torch.nn.Parameter) and not is_batch_of_gradients(t)
    dense = ours and t.layout is torch.strided and not t.is_nested
    return dense and not t.is_neg() and not t._is_zerotensor()


def on_device_of(x: torch.Tensor) -> contextlib.AbstractContextManager:
    """Kernels are launched on the current device: make it that of ``x``."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(x.device)


def is_tracked(t: torch.Tensor | None) -> bool:
    """Whether autograd follows what is done with ``t``; inside `torch.func.vmap`, whose tensors deny it, too. A graph
    that is traced there takes no look at what they hold: then it may."""
    if t is None or not t.is_floating_point() or not torch.is_grad_enabled():
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:
        if torch.compiler.is_compiling():
            return True
        while torch._C._functorch.is_functorch_wrapped_tensor(t) and not t.requires_grad:
            t = torch._C._functorch.get_unwrapped(t)
    return t.requires_grad


def is_batch_of_gradients(x: torch.Tensor | None) -> bool:
    """True of what `torch.autograd.grad` hands down with ``is_grads_batched``."""
    return x is not None and torch._C._functorch.is_legacy_batchedtensor(x)


def values_of(t: torch.Tensor) -> torch.Tensor | None:
    """The tensor beneath function transforms, whose values may be asked for; None while a graph is traced, and on an
    accelerator, for which that would wait."""
    if torch.compiler.is_compiling() or torch._C._is_tracing():
        return None
    while torch._C._functorch.is_functorch_wrapped_tensor(t):
        t = torch._C._functorch.get_unwrapped(t)
    traced = torch._C._len_torch_dispatch_stack() and any(map(torch._C._get_dispatch_mode, _TRACERS))
    return t if not traced and type(t) in (torch.Tensor, torch.nn.Parameter) and t.is_cpu else None


def check_within(name: str, lengths: torch.Tensor, longest: int) -> None:
    """That lengths lie in [0, longest], where their values may be asked for (`values_of`)."""
    values = values_of(lengths)
    if values is not None and values.numel():
        low, high = int(values.min()), int(values.max())
        if low < 0 or high > longest:
            raise ValueError(f"{name} must lie in [0, {longest}], got values from {low} to {high}")


def nobody_looks_on() -> bool:
    """True outside function transforms, modes of dispatch and `torch.jit.trace`: a kernel may then be called itself.

    The dispatcher has no say there, and takes as long as thirty frames or a small attention.
    """
    return (
        torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and not torch._C._is_tracing()  # it would write down that memory was asked for, and nothing of what is in it
    )


def may_look(t: torch.Tensor) -> bool:
    """True where reading the values of ``t`` waits for no device, and nobody records or transforms what is done."""
    return t.is_cpu and not torch.compiler.is_compiling() and nobody_looks_on()


def is_autocast(kind: str) -> bool:
    """True where autocast is on for devices of this kind; "meta" has none."""
    return kind != "meta" and torch.is_autocast_enabled(kind)  # is_autocast_available: torch 2.11 does not trace it


def without_autocast(kind: str) -> contextlib.AbstractContextManager:
    """Matrix products in the dtype of their factors, on devices of this kind."""
    return torch.autocast(kind, enabled=False) if is_autocast(kind) else contextlib.nullcontext()
