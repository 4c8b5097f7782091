"""Runs a model before and after a swap and says how far it moved."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mmfast.swapping import sharding
from mmfast.swapping.report import Difference

# Relative to the largest value, where there is no float64 result to say how exact the model was before.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
_DOUBLE = (torch.float64, torch.complex128)
_NO_GOLD = (*_DOUBLE, torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class Check:
    """Outputs and gradients of ``model`` for ``inputs``, now and whenever `differences` is asked for.

    A run repeats random numbers, switches dropout off (which elements it drops is nobody's promise), and leaves
    buffers, counters, gradients and the random state as it found them. Gradients are those of Σ r·output with fixed
    random r, for every parameter and floating-point input that takes part. A tensor that appears twice in ``inputs`` is
    the same tensor in the run too.

    Integers and booleans are reported, and not judged.

    The allowed relative difference is ``tolerance``, or by default 16 times the error that the model had before against
    itself in float64, plus 64 roundings of the dtype; where it does not run in float64, a figure for the dtype.

    Args:
        model: called as ``model(x)``, ``model(*tuple)`` or ``model(**dict)``; ``inputs`` may also be a function, which
            is called with the model and returns the outputs.
    """

    def __init__(self, model: Any, inputs: Any, tolerance: float | None = None) -> None:
        self.model, self.inputs, self.tolerance = _unwrap(model), inputs, tolerance
        self.notes: list[str] = []
        self._sharded = sharding.is_sharded(self.model)
        self._dtypes = sharding.dtypes(self.model) if self._sharded else ()
        self.before = self._run(self.model, self.inputs)
        self.gold = self._gold()
        mode = "training" if self.model.training else "evaluation"
        backward = any(name.startswith("grad") for name in self.before)
        self.notes.insert(
            0, f"checked in {mode} mode without dropout, forward {'and backward' if backward else 'only'}"
        )

    def agreed(self, verdict: bool) -> bool:
        """Whether ``verdict`` holds here, and for a sharded model in all the processes that run it together."""
        return sharding.agreed(self.model, verdict) if self._sharded else verdict

    def differences(self) -> list[Difference]:
        """Of every tensor, the worst in units of its tolerance first."""
        after = self._run(self.model, self.inputs)
        before = dict(self.before)
        for name in set(before) ^ set(after):
            if not name.startswith("grad"):
                raise RuntimeError(f"one run has an output that the other has not: {name}")
            # No gradient is one of zeros.
            there, here = (before, after) if name in after else (after, before)
            there[name] = torch.zeros_like(here[name])
        largest = {}  # of outputs, and of gradients
        for name, value in before.items():
            largest[name[:4]] = max(largest.get(name[:4], 0.0), _largest(value))
        found = [self._difference(name, before[name], after[name], largest[name[:4]]) for name in before]
        return sorted(found, key=lambda d: d.relative / d.tolerance if d.tolerance else math.inf, reverse=True)

    def _difference(self, name: str, before: Tensor, after: Tensor, largest: float) -> Difference:
        if before.shape != after.shape or before.dtype != after.dtype:
            return Difference(name, math.inf, math.inf, 0.0, f"{_describe(before)} → {_describe(after)}")
        scale, moved = _largest(before), _distance(after, before)
        gold, eps = self.gold.get(name), _eps(before.dtype)
        gold_before = gold_after = None
        if gold is not None:
            gold_before, gold_after = (_ratio(_distance(x, gold), scale) for x in (before, after))
        if self.tolerance is not None and eps:
            tolerance = self.tolerance
        elif not eps:
            tolerance = math.inf  # an argmax, say, may go either way at a tie
        elif gold_before is not None and math.isfinite(gold_before):
            # A gradient that is zero but for rounding is as large as its neighbours' rounding.
            tolerance = 16 * gold_before + 64 * eps + eps * _ratio(largest, scale)
        else:
            coarsest = max(_TOLERANCE.get(dtype, 1e-1) for dtype in (before.dtype, *self._dtypes))
            tolerance = coarsest * max(1.0, 1e-2 * _ratio(largest, scale))
        dtype = str(before.dtype).removeprefix("torch.")
        return Difference(name, moved, _ratio(moved, scale), tolerance, dtype, gold_before, gold_after)

    def _gold(self) -> dict[str, Tensor]:
        """The same in float64, as far as the model lets itself be copied and converted."""
        if self._sharded or callable(self.inputs) or all(x.dtype in _NO_GOLD for x in self.before.values()):
            return {}
        try:
            model = copy.deepcopy(self.model).double()
            gold = self._run(model, _mapped(self.inputs, lambda x: x.double() if x.is_floating_point() else x))
        except Exception as error:
            self.notes.append(f"no float64 result to compare with ({type(error).__name__}: {error})".splitlines()[0])
            return {}
        wanted = {name for name, x in self.before.items() if x.dtype not in _NO_GOLD}
        double = {name: x for name, x in gold.items() if name in wanted and x.dtype in _DOUBLE}
        if len(double) < len(wanted):
            self.notes.append("the model does not keep float64: it was compared with itself only")
            return {}
        return double

    def _run(self, model: nn.Module, inputs: Any) -> dict[str, Tensor]:
        # The gradients of sharded parameters go elsewhere than torch.autograd.grad looks.
        with _untouched(model), torch.set_grad_enabled(not self._sharded):
            leaves: dict[int, tuple[str, Tensor]] = {}
            outputs = _call(model, inputs if callable(inputs) else _as_leaves(inputs, leaves))
            named = dict(_tensors(outputs, "output"))
            result = {name: x.detach().clone() for name, x in named.items()}
            if not self._sharded:
                result |= _gradients(model, named, leaves)
        return result


def _call(model: nn.Module, inputs: Any) -> Any:
    if callable(inputs):
        return inputs(model)
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)


def _unwrap(model: Any) -> nn.Module:
    """What computes: without the wrappers that compile it, or that send it to several devices."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif type(model).__name__ == "OptimizedModule":
            model = model._orig_mod
        else:
            return model


def _mapped(inputs: Any, function: Callable[[Tensor], Tensor], memo: dict | None = None) -> Any:
    """``inputs`` with ``function`` of each tensor, once for each."""
    memo = {} if memo is None else memo
    if isinstance(inputs, Tensor):
        if id(inputs) not in memo:
            memo[id(inputs)] = function(inputs)
        return memo[id(inputs)]
    if isinstance(inputs, Mapping):
        return {key: _mapped(value, function, memo) for key, value in inputs.items()}
    if isinstance(inputs, (list, tuple)):
        items = [_mapped(value, function, memo) for value in inputs]
        return type(inputs)(*items) if hasattr(inputs, "_fields") else type(inputs)(items)
    return inputs


def _as_leaves(inputs: Any, leaves: dict[int, tuple[str, Tensor]]) -> Any:
    """Copies that gradients arrive at; the model gets a copy of the copy, which it may write to."""

    def leaf(x: Tensor) -> Tensor:
        x = x.detach().clone()
        if not x.is_floating_point():
            return x
        x.requires_grad_()
        leaves[id(x)] = f"input[{len(leaves)}]", x
        return x.clone()

    return _mapped(inputs, leaf)


def _tensors(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a nested output, with names that tell where they were."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _tensors(item, f"{name}.{key}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _tensors(item, f"{name}[{index}]")
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for one in dataclasses.fields(value):
            yield from _tensors(getattr(value, one.name), f"{name}.{one.name}")


def _gradients(model: nn.Module, outputs: dict[str, Tensor], leaves: dict[int, tuple[str, Tensor]]) -> dict:
    total = None
    for x in outputs.values():
        if x.requires_grad and (x.is_floating_point() or x.is_complex()):
            generator = torch.Generator().manual_seed(1)
            weights = torch.rand(x.shape, generator=generator, dtype=torch.float64) + 0.5
            part = (torch.view_as_real(x).sum(-1) if x.is_complex() else x) * weights.to(x.device, x.real.dtype)
            # What is NaN or infinite would hide every gradient.
            part = torch.where(part.isfinite(), part, torch.zeros_like(part)).sum()
            total = part if total is None else total + part.to(total.device, total.dtype)
    if total is None:
        return {}
    wanted = {name: p for name, p in model.named_parameters() if p.requires_grad}
    wanted |= dict(leaves.values())
    grads = torch.autograd.grad(total, list(wanted.values()), allow_unused=True)
    return {f"grad of {n}": g.detach().clone() for n, g in zip(wanted, grads, strict=True) if g is not None}


@contextlib.contextmanager
def _untouched(model: nn.Module):
    """Fixed random numbers and no dropout inside; state as before afterwards."""
    modules = list(model.modules())
    devices = {p.device for p in (*model.parameters(), *model.buffers()) if p.device.type == "cuda"}
    buffers = [(b, b.detach().clone()) for m in modules for b in m._buffers.values() if b is not None]
    # A FullyShardedDataParallel writes down that it was set up.
    saved = [(vars(m), {k: v for k, v in vars(m).items() if _plain(v)}) for m in modules if not sharding.by_wrapper(m)]
    configs = {id(m.config): m.config for m in modules if hasattr(getattr(m, "config", None), "__dict__")}
    saved += [(vars(c), {k: v for k, v in vars(c).items() if _plain(v)}) for c in configs.values()]
    kernels = [(m._buffers, dict(m._buffers)) for m in modules]
    failed = True
    try:
        for attributes, plain in saved:
            attributes.update({k: 0.0 for k, v in plain.items() if isinstance(v, float) and "drop" in k.lower()})
        for module in modules:
            if isinstance(module, nn.modules.dropout._DropoutNd):
                module.p = 0.0
            elif isinstance(
                module, nn.parallel.DistributedDataParallel
            ):  # within the model: it does not wait for others
                module.require_forward_param_sync = module.require_backward_grad_sync = False
        with torch.random.fork_rng([d.index for d in devices]):
            torch.manual_seed(0)
            yield
        failed = False
    finally:
        sharding.reshard(model, failed)
        for attributes, plain in saved:
            attributes.update(plain)
        for current, before in kernels:
            current.update(before)
        with torch.no_grad():
            for buffer, value in buffers:
                if not _same(buffer, value):  # an expanded one cannot be written to, and nobody did
                    buffer.copy_(value)


def _same(x: Tensor, y: Tensor) -> bool:
    """Bit for bit, as far as that can be seen."""
    return not (x.is_meta or y.is_meta) and x.shape == y.shape and bool(((x == y) | ((x != x) & (y != y))).all())


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str, Tensor))


def _largest(x: Tensor) -> float:
    """max |x| over what is finite."""
    x = _wide(x)
    x = x[x.isfinite()]
    return float(x.abs().max()) if x.numel() else 0.0


def _distance(x: Tensor, y: Tensor) -> float:
    """max |x − y|; NaN and infinity are 0 away from themselves and infinitely far from all else."""
    x, y = _wide(x), _wide(y)
    same = (x == y) | (x.isnan() & y.isnan())
    apart = torch.where(same, 0.0, (x - y).abs().nan_to_num(math.inf, math.inf))
    return float(apart.max()) if apart.numel() else 0.0


def _wide(x: Tensor) -> Tensor:
    x = x.detach()
    if x.is_complex():
        return torch.view_as_real(x.resolve_conj()).double()
    return x.double()


def _ratio(x: float, scale: float) -> float:
    return x / scale if scale else (0.0 if x == 0 else math.inf)


def _eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps if dtype.is_floating_point or dtype.is_complex else 0.0


def _describe(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}"
