"""The classes that swap knows, and what becomes of them.

A class is known by where its library offers it, and is looked up among the modules that are imported already: a model
that holds one has imported its library, and no other library needs to be there. Only the very class is taken. A
subclass may compute something else.
"""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from mmfast.swapping import sharding
from mmfast.swapping.changes import ABSENT, ClassChange


class Unfit(Exception):
    """The message says why an object of a known class is left alone."""


@dataclass(frozen=True)
class Rule:
    """What becomes of the objects of one class.

    Args:
        home: where its library offers it, ``module:name``; several with ``|`` between them.
        target: the drop-in, ``module:name`` below ``mmfast``.
        op: the slice whose backend computes.
        attributes: for an object the attributes that the drop-in has besides; raises `Unfit`.
        within: only as a part of these classes, whose fused pass needs it.
        note: for the report.
        mixed: the drop-in's methods stand before those of the library's class, which it keeps: `isinstance` too.
        no_grad: the library puts ``forward`` under ``torch.no_grad()`` on each instance; the drop-in does so itself.
    """

    home: str
    target: str
    op: str
    attributes: Callable[[Any], dict[str, Any]] = lambda subject: {}
    within: tuple[str, ...] = ()
    note: str = ""
    mixed: bool = False
    no_grad: bool = False

    def classes(self) -> list[type]:
        """The known class, under the homes that are imported."""
        found = (_imported(home) for home in self.home.split("|"))
        return [cls for cls in found if isinstance(cls, type)]

    def change(self, subject: Any) -> ClassChange:
        """The change of one object, not applied yet."""
        module, name = self.target.split(":")
        try:
            new = getattr(importlib.import_module(f"mmfast.{module}"), name)
        except ImportError as error:
            raise Unfit(f"its counterpart does not import here: {error}") from error
        new = _mixed(new, type(subject)) if self.mixed else new
        return ClassChange(subject, new, self.attributes(subject))


@lru_cache
def _mixed(new: type, old: type) -> type:
    def reduce(self, protocol):
        _, _, *state = super(mixed, self).__reduce_ex__(max(protocol, 2))
        return _instance, (new, old), *state

    body = {"__module__": new.__module__, "__doc__": new.__doc__, "__reduce_ex__": reduce}
    mixed = type(new.__name__, (new, old), body)
    return mixed


def _instance(new: type, old: type) -> Any:
    """For pickle, which finds no class that was made here under its name."""
    cls = _mixed(new, old)
    return cls.__new__(cls)


def _imported(home: str) -> Any:
    module, name = home.split(":")
    return vars(sys.modules[module]).get(name) if module in sys.modules else None


def _spectrogram(s: Any) -> dict[str, Any]:
    from mmfast.compat.torchaudio import _fused

    try:
        _fused.describe(
            s.n_fft,
            s.win_length,
            s.hop_length,
            s.pad,
            s.power,
            s.normalized,
            s.center,
            s.pad_mode,
        )
    except (ValueError, TypeError) as error:
        raise Unfit(str(error)) from error
    return {}


def _attention(attention: nn.MultiheadAttention) -> dict[str, Any]:
    return {"masked_rows": "torch", "backend": None}


def _geomloss(loss: Any) -> dict[str, Any]:
    from mmfast.compat.geomloss import _LOSSES

    if loss.loss not in _LOSSES:
        raise Unfit(f"loss={loss.loss!r}: of geomloss' losses {', '.join(_LOSSES)} are offered")
    if loss.kernel is not None:
        raise Unfit("its kernel is a function that builds a matrix")
    if loss.backend not in ("auto", "tensorized", "online"):
        raise Unfit(f"backend={loss.backend!r} truncates kernels")
    return {}


def _pytorch_adapt(loss: Any) -> dict[str, Any]:
    from mmfast.compat import pytorch_adapt as compat

    batched = type(loss).__name__ == "MMDBatchedLoss"
    distance = loss.dist_func.distance if batched else loss.dist_func
    try:
        compat._check_distance(distance)
    except ValueError as error:
        raise Unfit(str(error)) from error
    attributes = {"_kernel": compat._Gaussians(loss), "_products": {}}
    return attributes | {"batch_size": loss.dist_func.batch_size} if batched else attributes


def _mkmmd(loss: Any) -> dict[str, Any]:
    from mmfast.compat import tllib

    return {"_sum": _kernel(tllib._sum, loss.kernels)}


def _jmmd(loss: Any) -> dict[str, Any]:
    from mmfast.compat import tllib
    from mmfast.kernels import Product

    return {"_product": Product([_kernel(tllib._sum, layer) for layer in loss.kernels])}


def _kernel(translate: Callable, kernels: Any) -> Any:
    try:
        return translate(kernels)
    except TypeError as error:
        raise Unfit(str(error)) from error


def _torchdrift(detector: Any) -> dict[str, Any]:
    from mmfast.compat import torchdrift as compat

    theirs = detector.kernel
    ours = getattr(compat, type(theirs).__name__, None)
    if ours is None or type(theirs) is not _imported(f"torchdrift.detectors.mmd:{type(theirs).__name__}"):
        raise Unfit(f"a kernel that is not translated: {type(theirs).__name__}")
    # TorchDrift's own statistic and p-value, also where they are not what it documents.
    return {"kernel": ours(**vars(theirs)), "keep_diagonal": True, "corrected": False}


def _torchmetrics(metric: Any) -> dict[str, Any]:
    from mmfast.compat.torchmetrics import KernelInceptionDistance

    # A metric wraps its own methods when it is made.
    return {"compute": metric._wrap_compute(KernelInceptionDistance.compute.__get__(metric))}


def _deepda(loss: Any) -> dict[str, Any]:
    """DeepDA is copied, not installed: what this copy computes must be seen."""
    from mmfast.compat import deepda

    target = getattr(deepda, type(loss).__name__)
    local = type(loss).__name__ == "LMMDLoss"
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    inputs = [draw(8, 3), draw(8, 3) + 0.5]
    if local:
        labels = torch.arange(8) % loss.num_class
        inputs += [labels, draw(8, loss.num_class).softmax(1)]
    theirs, ours = copy.deepcopy(loss), copy.deepcopy(loss)
    ours.__class__ = target
    try:
        if local:
            theirs.curr_iter = ours.curr_iter = loss.max_iter // 2 + 1  # the factor is 0 at first
        expected, found = theirs(*inputs), ours(*inputs)
    except Exception as error:
        raise Unfit(f"this copy of DeepDA's loss does not run like DeepDA's: {error}") from error
    if not torch.allclose(torch.as_tensor(expected).double().reshape(-1), found.double().reshape(-1), rtol=1e-4):
        raise Unfit("this copy of DeepDA's loss computes something else than DeepDA's")
    return {}


def _nemo(features: Any) -> dict[str, Any]:
    from mmfast.compat.nemo import FilterbankFeatures

    if features.exact_pad:
        raise Unfit("exact_pad=True: NeMo counts a frame less than it documents, mmfast's does not")
    if features.preemph is None:
        raise Unfit("preemph=None: NeMo lets what lies past an item's end into its last frames, mmfast's does not")
    if features.window is None:
        raise Unfit("window='none' does not run in NeMo")
    # Versions of NeMo differ in the number of frames: what this one computes must be seen.
    theirs, ours = copy.copy(features), copy.copy(features)
    ours.__class__ = FilterbankFeatures
    vars(theirs).pop("forward", None)
    vars(ours).pop("forward", None)
    theirs.training = ours.training = False
    samples = 2 * features.n_fft + 7 * features.hop_length + 1
    generator = torch.Generator().manual_seed(0)
    wave = torch.randn(1, samples, generator=generator).to(features.fb.device)
    try:
        for length in (samples, samples - features.n_fft):
            with torch.no_grad():
                expected, found = (module(wave, torch.tensor([length]).to(wave.device)) for module in (theirs, ours))
            if not torch.equal(expected[1], found[1]) or expected[0].shape != found[0].shape:
                raise Unfit("this version of NeMo counts frames otherwise")
            if not torch.allclose(expected[0], found[0], rtol=1e-3, atol=1e-3):
                raise Unfit("this version of NeMo computes something else")
    except Unfit:
        raise
    except Exception as error:
        raise Unfit(f"it does not run like NeMo's: {error}") from error
    return {"forward": ABSENT} if "forward" in vars(features) else {}


_CHAINS = ("MelSpectrogram", "MFCC", "LFCC")
_DIFFUSERS = "diffusers.models.attention_processor"
_AUDIO = "compat.torchaudio.transforms"
_SELF = "self-attention in evaluation stays with torch"

RULES = (
    Rule("torch.nn:MultiheadAttention", "nn:MultiheadAttention", "fusion", _attention, note=_SELF),
    Rule(f"{_DIFFUSERS}:AttnProcessor2_0", "compat.diffusers:AttnProcessor2_0", "fusion"),
    Rule(f"{_DIFFUSERS}:IPAdapterAttnProcessor2_0", "compat.diffusers:IPAdapterAttnProcessor2_0", "fusion"),
    Rule(f"{_DIFFUSERS}:JointAttnProcessor2_0", "compat.diffusers:JointAttnProcessor2_0", "fusion"),
    Rule("torchaudio.transforms:Spectrogram", f"{_AUDIO}:Spectrogram", "mel", _spectrogram),
    Rule("torchaudio.transforms:MelSpectrogram", f"{_AUDIO}:MelSpectrogram", "mel"),
    Rule("torchaudio.transforms:MFCC", f"{_AUDIO}:MFCC", "mel"),
    Rule("torchaudio.transforms:LFCC", f"{_AUDIO}:LFCC", "mel"),
    Rule("torchaudio.transforms:MelScale", f"{_AUDIO}:MelScale", "mel", within=_CHAINS),
    Rule("torchaudio.transforms:AmplitudeToDB", f"{_AUDIO}:AmplitudeToDB", "mel", within=_CHAINS),
    Rule(
        "nemo.collections.asr.parts.preprocessing.features:FilterbankFeatures",
        "compat.nemo:FilterbankFeatures",
        "mel",
        _nemo,
        note="dither in training leaves the waveform that it is given as it is",
        mixed=True,
        no_grad=True,
    ),
    Rule("geomloss:SamplesLoss", "compat.geomloss:SamplesLoss", "mmd", _geomloss),
    Rule("pytorch_adapt.layers:MMDLoss", "compat.pytorch_adapt:MMDLoss", "mmd", _pytorch_adapt),
    Rule("pytorch_adapt.layers:MMDBatchedLoss", "compat.pytorch_adapt:MMDBatchedLoss", "mmd", _pytorch_adapt),
    Rule(
        "tllib.alignment.dan:MultipleKernelMaximumMeanDiscrepancy",
        "compat.tllib:MultipleKernelMaximumMeanDiscrepancy",
        "mmd",
        _mkmmd,
    ),
    Rule(
        "tllib.alignment.jan:JointMultipleKernelMaximumMeanDiscrepancy",
        "compat.tllib:JointMultipleKernelMaximumMeanDiscrepancy",
        "mmd",
        _jmmd,
    ),
    Rule(
        "torchdrift.detectors.mmd:KernelMMDDriftDetector",
        "compat.torchdrift:KernelMMDDriftDetector",
        "mmd",
        _torchdrift,
        note="TorchDrift's statistic and p-value are kept",
    ),
    Rule(
        "torchmetrics.image.kid:KernelInceptionDistance",
        "compat.torchmetrics:KernelInceptionDistance",
        "mmd",
        _torchmetrics,
    ),
    Rule("ignite.metrics:MaximumMeanDiscrepancy", "compat.ignite:MaximumMeanDiscrepancy", "mmd"),
    Rule("ignite.metrics:HSIC", "compat.ignite:HSIC", "mmd"),
    Rule("loss_funcs.mmd:MMDLoss", "compat.deepda:MMDLoss", "mmd", _deepda),
    Rule("loss_funcs.lmmd:LMMDLoss", "compat.deepda:LMMDLoss", "mmd", _deepda),
)


def known() -> dict[type, Rule]:
    """The classes of `RULES` whose libraries are imported."""
    return {cls: rule for rule in RULES for cls in rule.classes()}


def veto(subject: Any, classes: dict[type, Rule], around: Iterable[Any] = ()) -> str | None:
    """Why an object of a class derived from a known one, or of a known one in a special state, is left alone."""
    cls = type(subject)
    if cls.__module__.partition(".")[0] == "mmfast":
        return "mmfast's already"
    if cls not in classes:
        base = next(base for base in cls.__mro__ if base in classes)
        if isinstance(subject, nn.Module) and nn.utils.parametrize.is_parametrized(subject):
            return "parametrized, which gave it a class of its own; swap first, then parametrize"
        if sharding.by_fully_shard(subject):
            return "fully_shard gave it a class of its own; swap first, then shard"
        return f"a subclass of {base.__name__}, which may compute something else"
    if "forward" in vars(subject) and not (classes[cls].no_grad and _only_no_grad(subject)):
        return "its forward was replaced on this instance"
    if not isinstance(subject, nn.Module):
        return None
    gathered = any(map(sharding.by_fully_shard, around))  # before its forward is called
    for module in subject.modules():
        for name, p in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if isinstance(p, (nn.parameter.UninitializedParameter, nn.parameter.UninitializedBuffer)):
                return f"{name} has no shape yet: run the model once"
            if type(p) not in _PLAIN and not (gathered and type(p).__name__ == "DTensor"):
                return f"{name} is a {type(p).__name__}, which native kernels do not take"
    return None


def _only_no_grad(module: nn.Module) -> bool:
    """Whether ``forward`` of this instance is that of its class, bound to it, under ``torch.no_grad()``."""
    forward = module.forward
    if getattr(forward, "__globals__", {}).get("__name__") != torch.no_grad.__call__.__globals__["__name__"]:
        return False
    inside = getattr(forward, "__wrapped__", None)
    # A deep copy's is bound to the module that was copied.
    return getattr(inside, "__func__", None) is type(module).forward and inside.__self__ is module


_PLAIN = (torch.Tensor, nn.Parameter, nn.parameter.Buffer)
