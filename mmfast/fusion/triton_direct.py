"""Attention on the GPU with few checks around the kernels: `mmfast.fusion.direct` for the device.

Of a call that is seen for the first time everything is checked and chosen as for any other; what came of it is kept
under all that it depends on: shapes, strides, dtypes, alignments, options. A call that is like one before goes straight
to the kernels, and those of Triton by their recorded launches (`mmfast.fusion.recording`). What it comes to the
extension is told, which then makes such calls by itself (`mmfast.fusion.direct`).
"""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Hashable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from mmfast import _backend
from mmfast.fusion import merged, routes_cuda, triton
from mmfast.fusion._inputs import FUSIONS, Source, as_sources, batch_of, check_options, positive_scale, prepare
from mmfast.fusion.recording import Recording, record
from mmfast.fusion.reference import Attention

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_MOST_PLANS = 4096  # then all are forgotten: shapes that never come again must not fill the memory
_MOST_LAYOUTS = 64  # of gradients, for each plan
_ADDED, _LENGTHS, _GATE = (2, 4), 3, 5  # places of a `Source`
_PLAIN = (Tensor, torch.nn.Parameter)
_NUMBERS = (float, int, type(None))
_plans: dict[tuple, _Plan | _Composed | None] = {}
_alive: weakref.WeakValueDictionary[int, _Plan] = weakref.WeakValueDictionary()  # by what the extension's nodes know


def attention(
    query: Tensor, sources: Sequence, fusion: str, scale: float | None, is_causal: bool, lse: bool, backend: str | None
) -> Attention | None:
    """`mmfast.cross_attention` of these arguments, without dropout, softcap and weights, the lses only if asked for.
    None where there is more to do, or where a check fails, for others to say why."""
    if type(query) not in _PLAIN or not (query.is_cuda or (_INTERPRETED and backend == "triton")):
        return None
    if torch.compiler.is_compiling() or forward_ad._current_level >= 0 or not _backend._TRITON:
        return None
    found = _called(query, sources, fusion, scale, is_causal, lse, backend is None)
    if found is None:
        return None
    key, tensors, addresses = found
    plan = _plans.get(key, False)
    if plan is False:
        if len(_plans) >= _MOST_PLANS:
            _plans.clear()
        plan = _plans[key] = _plan(tensors, as_sources(sources), fusion, scale, bool(is_causal), lse)
    if plan is None:
        return None
    result = plan(tensors, addresses)
    if _backend._C is not None:
        plan.tell(key, tensors)
    return result


def _called_by_python(
    query: Tensor, sources: Sequence, fusion: str, scale: float | None, is_causal: bool, lse: bool, free: bool
) -> tuple[Hashable, list[Tensor], list[int]] | None:
    """All that a call depends on, its tensors, and their addresses; None for what is not for this module, and with
    ``free``, where the backend may be chosen, where it is chosen already.

    ``fusion_called`` of the extension, in Python."""
    if not _backend.nobody_looks_on() or torch.is_autocast_enabled(query.device.type):
        return None
    if (free and os.environ.get("MMFAST_BACKEND")) or fusion not in FUSIONS or type(scale) not in _NUMBERS:
        return None
    device = query.get_device()
    if device >= 0 and device != torch._C._cuda_getDevice():
        return None
    found = _parts(query, sources, device)
    if found is None:
        return None
    what, tensors, addresses = found
    return (fusion, scale, bool(is_causal), lse, device, torch.is_grad_enabled(), what), tensors, addresses


def _parts(query: Tensor, sources: Sequence, device: int) -> tuple[Hashable, list[Tensor], list[int]] | None:
    """What sources are made of, all tensors, and their addresses."""
    if query.is_nested or query.dim() != 4:
        return None
    if type(sources) is Source or (type(sources) is tuple and len(sources) == 2 and type(sources[0]) in _PLAIN):
        sources = (sources,)
    if type(sources) not in (list, tuple):
        return None
    has: list = []
    tensors = [query]
    for source in sources:
        if type(source) is not Source:
            if type(source) not in (list, tuple) or len(source) != 2:
                return None
            source = Source(*source)
        for place, part in enumerate(source):
            if type(part) in _PLAIN:
                has.append("tensor")
                if part.dim() != 4 and place != _LENGTHS:
                    part = _in_four(part, place, query)
                    if part is None:
                        return None
                tensors.append(part)
            elif part is None or (place == _GATE and type(part) in _NUMBERS):
                has.append(part)
            else:
                return None
    found = _describe(tensors, device)
    return None if found is None else ((*has, found[0]), tensors, found[1])


def _describe(tensors: Sequence[Tensor], device: int) -> tuple[Hashable, list[int]] | None:
    """``fusion_described`` of the extension, which takes a tenth of the time, in Python."""
    addresses, what = [], []
    for x in tensors:
        if x.is_nested or not _backend.holds_its_values(x) or x.get_device() != device:
            return None
        address = x.data_ptr()
        addresses.append(address)
        what += (x.shape, x.stride(), x.dtype, x.requires_grad, address % 16, addresses.index(address))
    return tuple(what), addresses


def _in_four(x: Tensor, place: int, query: Tensor) -> Tensor | None:
    """Masks, biases and gates in the four dimensions that kernels take; None for what is none of these."""
    dim = x.dim()
    if place in _ADDED:
        return x[(None,) * (4 - dim)] if dim in (2, 3) else None
    if place != _GATE or dim > 1 or (dim and x.shape[0] != query.shape[1]):
        return None
    return x[None, :, None, None] if dim else x[None, None, None, None]


_described = _describe if _backend._C is None else _backend._C.fusion_described
_called = _called_by_python if _backend._C is None else _backend._C.fusion_called


# ---- What is kept of a call


def _plan(
    tensors: Sequence[Tensor], sources: Sequence, fusion: str, scale: float | None, causal: bool, lse: bool
) -> _Plan | _Composed | None:
    query, *rest = tensors
    rest = iter(rest)
    own = [Source(*(next(rest) if isinstance(x, Tensor) else x for x in source)) for source in sources]
    try:
        scale = check_options(fusion, scale, 0.0, None, query.shape[3])[0]
        same, prepared = prepare(query, own, fusion)
    except (TypeError, ValueError, IndexError):
        return None
    parts = [x for s in prepared for x in s if isinstance(x, Tensor)]
    if any(a is not b for a, b in zip((same, *parts), tensors, strict=True)):
        return None  # something had to be converted
    if triton.can(query, prepared, 0.0, None, False) is not None or triton.nothing(query, prepared):
        return None
    engine = routes_cuda.choose(query, prepared, fusion, lse, plain=not causal)
    decoupled = fusion == "decoupled" and (len(prepared) > 1 or prepared[0].gate is not None)
    bare = query.is_cuda and all(s.mask is s.bias is s.lengths is None and s.key.shape[2] for s in prepared)
    if engine == "sdpa" or (engine != "short" and decoupled):
        return _Composed(query, prepared, scale, causal) if bare and not lse else None
    return (
        None
        if engine == "reference"
        else _Plan(tensors, prepared, engine == "short" and fusion, causal, scale, engine, lse)
    )


class _Composed:
    """scaled_dot_product_attention of each source, and their sum with its gates, as one would write it."""

    def __init__(self, query: Tensor, sources: list[Source], scale: float, causal: bool) -> None:
        batch = batch_of(query, sources)
        self.batch = None if all(x.shape[0] == batch for s in sources for x in (query, s.key, s.value)) else batch
        self.scale = scale
        self.causal = causal
        self.grouped = [query.shape[1] != s.key.shape[1] for s in sources]
        # The gradient of a gate is a sum of products over all that it is broadcast along: in float16 these may be out
        # of range. Else they are rounded as outputs are, and one source leaves all to autograd's own product.
        own = len(sources) == 1 and query.dtype != torch.float16
        self.wide = [
            torch.is_grad_enabled()
            and isinstance(s.gate, Tensor)
            and s.gate.requires_grad
            and not (own and s.gate.dtype == query.dtype)
            for s in sources
        ]
        self.gates = [s.gate if not isinstance(s.gate, Tensor) else "tensor" for s in sources]
        self.known = None

    def tell(self, key: bytes, _tensors: Sequence[Tensor]) -> None:
        """The extension of what to do with calls of this ``key``."""
        if self.known is None and self.scale > 0:
            parts = list(zip(self.grouped, self.wide, self.gates, strict=True))
            batch = -1 if self.batch is None else self.batch
            self.known = _backend._C.fusion_keep_composed(key, batch, self.scale, self.causal, parts)

    def __call__(self, tensors: Sequence[Tensor], _addresses: Sequence[int]) -> Attention:
        query, *rest = tensors
        query, scale, _ = positive_scale(query, self.scale)
        rest, total = iter(rest), None
        for gate, grouped, wide in zip(self.gates, self.grouped, self.wide, strict=True):
            three = query, next(rest), next(rest)
            if self.batch is not None:
                three = (x.expand(self.batch, -1, -1, -1) for x in three)
            out = F.scaled_dot_product_attention(*three, is_causal=self.causal, scale=scale, enable_gqa=grouped)
            if wide:
                out = out.float()
            if gate is not None:
                out = out * (next(rest).to(out.dtype) if gate == "tensor" else gate)
            total = out if total is None else total + out
        return Attention(total.to(query.dtype), (), None)


class _Plan:
    """A call of one of the engines of `mmfast.fusion.triton`, and its recordings."""

    def __init__(self, tensors, sources, fusion, causal, scale, engine, lse) -> None:
        packed, options = triton.pack(sources)
        self.joint, self.engine, self.lse = fusion != "decoupled", engine, lse
        self.options = (*options, self.joint, causal, False, scale, engine)
        places = iter(range(1, len(tensors)))
        of_parts = [[next(places) if isinstance(x, Tensor) else None for x in source] for source in sources]
        order = map(Source._fields.index, ("key", "value", "mask", "bias", "lengths", "gate"))
        self.lists = [[of[i] for of in of_parts if of[i] is not None] for i in order]
        self.counts = [len(part) for part in packed]
        self.count = len(tensors)
        self.tracked = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
        self.gate_gradients = any(x.requires_grad for x in packed[5])
        self.text = json.dumps({name: getattr(self, name) for name in self._TOLD})
        self._begin()

    _TOLD = ("joint", "engine", "lse", "options", "lists", "counts", "count", "tracked", "gate_gradients")

    @classmethod
    def told(cls, text: str) -> _Plan:
        """The plan of this ``text``, without recordings."""
        plan = object.__new__(cls)
        vars(plan).update(json.loads(text), text=text)
        plan._begin()
        return plan

    def _begin(self) -> None:
        self.forward: Recording | bool = True  # not made yet; or False: not to be had
        self.known = None
        self.backward: dict[Hashable, Recording | bool] = {}
        self.native_backward = None
        if _backend._C is not None:
            self.native_backward = _backend._C.RecordedBackward()
            _alive[self.native_backward.number] = self

    def tell(self, key: bytes, tensors: Sequence[Tensor]) -> None:
        """The extension of the recording that calls of this ``key`` make again."""
        forward, flash = self.forward, None  # another thread may be recording
        if self.known is not None or forward is True:
            return
        if not forward and self.is_flash(tensors):
            forward, flash = self.record_merge(tensors), (self.options[5], self.options[3])
        self.known = False
        if forward and forward.native is not None:
            from triton import knobs

            kernels = [call.kernel for call in forward.calls]
            self.known = _backend._C.fusion_keep_recorded(
                key, forward.native, forward.result, self.tracked, self.joint, flash, self.native_backward, self.text,
                knobs.runtime, kernels,
            )  # fmt: skip

    def is_flash(self, tensors: Sequence[Tensor]) -> bool:
        """Whether flash takes each of several sources as it is."""
        query, *rest = tensors
        keys, values, *others = self.lists
        if self.engine != "flash" or len(keys) == 1 or any(others) or self.options[5] <= 0 or not query.is_cuda:
            return False
        if query.shape[3] % 8 or any(x.stride(3) != 1 or not x.shape[2] for x in tensors):
            return False
        if any(x.shape[0] != query.shape[0] or x.shape[3] != query.shape[3] for x in rest):
            return False
        sources = [Source(tensors[i], tensors[j]) for i, j in zip(keys, values, strict=True)]
        return all(merged.pick(query, s, self.options[3], self.engine) == "flash" for s in sources)

    def record_merge(self, tensors: Sequence[Tensor]) -> Recording | bool:
        """Of what flash gives for each source."""
        from mmfast.fusion import triton_split

        with torch.no_grad():
            query, causal, scale = tensors[0], self.options[3], self.options[5]
            pairs = zip(*([tensors[i] for i in part] for part in self.lists[:2]), strict=True)
            parts = [merged._one("flash", query, key, value, None, causal, scale) for key, value in pairs]
            outs, lses = zip(*parts, strict=True)

            def merge() -> tuple[Tensor, Tensor]:
                out, lse = triton_split.merge(outs, lses, query.dtype)
                return out, lse[None]

            return record(merge, [*outs, *lses])[1]

    def __call__(self, tensors: Sequence[Tensor], addresses: list[int]) -> Attention:
        if self.tracked:
            out, lse = _Tracked.apply(self, addresses, *tensors)
        else:
            out, lse = self.compute(tensors, addresses)
        return Attention(out, lse.unbind(0) if self.lse else (), None)

    def _inputs(self, tensors: Sequence[Tensor]) -> tuple:
        """Query, lists and row lengths, as the operators take them."""
        return tensors[0], *([tensors[i] for i in part] for part in self.lists), None

    def compute(self, tensors: Sequence[Tensor], addresses: list[int]) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exps ``(N, B, H, L)``."""
        forward = self.forward  # another thread may be recording
        if type(forward) is bool:
            with torch.no_grad():
                run = partial(triton.forward, *self._inputs(tensors), *self.options)
                if not forward:
                    return run()
                result, self.forward = record(run, tensors)
                return result
        return forward.again(tensors, addresses)

    def differentiate(
        self, grad_out: Tensor | None, grad_lse: Tensor | None, tensors: list[Tensor], out: Tensor | None, lse: Tensor
    ) -> list[Tensor | None]:
        """Gradients of ``tensors``, where none is wanted too."""
        if grad_out is None and grad_lse is None:
            return [None] * self.count
        if any(map(_backend.is_batch_of_gradients, (grad_out, grad_lse))):
            return self.gradients_of_batch(grad_out, grad_lse, tensors)
        if grad_out is None:
            grad_out = tensors[0].new_zeros((*lse.shape[1:], tensors[self.lists[1][0]].shape[3]))
        graph = torch.is_grad_enabled() or forward_ad._current_level >= 0 or not _backend.nobody_looks_on()
        graph = graph or any(type(g) not in (Tensor, type(None)) for g in (grad_out, grad_lse))
        gradients = self.gradients_with_graph if graph else self.gradients
        return gradients(grad_out, grad_lse, tensors, out, lse)

    def gradients(self, grad_out: Tensor, grad_lse: Tensor | None, tensors, out, lse) -> list[Tensor | None]:
        """Of each of ``tensors``, without a graph."""
        given = [*tensors, lse, *(x for x in (grad_out, grad_lse, out) if x is not None)]
        found = _described(given, given[0].get_device())
        if found is None:  # a gradient that is no plain memory, or what hooks have made of the saved tensors
            return self.gradients_with_graph(grad_out, grad_lse, tensors, out, lse)
        key, addresses = found
        recording = self.backward.get(key, True)
        if type(recording) is bool:
            run = partial(
                triton.launched_backward, grad_out, grad_lse, *self._inputs(tensors), *self.options, out, lse,
                self.gate_gradients,
            )  # fmt: skip
            if recording:
                if len(self.backward) >= _MOST_LAYOUTS:
                    self.backward.clear()
                    if self.native_backward is not None:
                        self.native_backward.clear()
                result, made = record(run, given)
                self.backward[key] = made
                if made and made.native is not None:
                    places = [-1 if i is None else i for i in self._by_tensor(*made.result)]
                    self.native_backward.keep(key, made.native, places)
            else:
                result = run()
        else:
            result = recording.again(given, addresses)
        gates = [tensors[i] for i in self.lists[5]]
        return self._by_tensor(*triton.reduced(self.engine, tensors[0], gates, *result))

    def gradients_with_graph(self, grad_out: Tensor, grad_lse: Tensor | None, tensors, out, lse) -> list[Tensor | None]:
        """`gradients` that are differentiable themselves."""
        return self._by_tensor(
            *torch.ops.mmfast.fusion_device_backward(
                grad_out, grad_lse, *self._inputs(tensors), *self.options, out, lse, self.gate_gradients
            )
        )

    def gradients_of_batch(self, grad_out: Tensor | None, grad_lse: Tensor | None, tensors) -> list[Tensor | None]:
        """`gradients` for ``is_grads_batched``."""
        rest = [tensors[i] for part in self.lists for i in part]
        of_query, of_keys, of_values, _, _, _, of_gates, *_ = triton._differentiate_batch(
            self, grad_out, grad_lse, tensors[0], None, rest
        )
        return self._by_tensor(of_query, of_keys, of_values, of_gates)

    def _by_tensor(self, of_query, of_keys, of_values, of_gates) -> list[Tensor | None]:
        result: list[Tensor | None] = [None] * self.count
        result[0] = of_query
        keys, values, *_, gates = self.lists
        for part, grads in ((keys, of_keys), (values, of_values), (gates, of_gates)):
            for i, grad in zip(part, grads, strict=False):  # without gradients of gates there are none
                result[i] = grad
        return result


def differentiate(number: int, text: str, *args) -> list[Tensor | None]:
    """`_Plan.differentiate` for the extension's nodes, which outlive plans that are forgotten."""
    return (_alive.get(number) or _Plan.told(text)).differentiate(*args)


class _Tracked(torch.autograd.Function):
    """``mmfast::fusion_device_forward`` without the dispatcher."""

    @staticmethod
    def forward(ctx, plan: _Plan, addresses: list[int], *tensors: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = plan.compute(tensors, addresses)
        ctx.plan = plan
        ctx.save_for_backward(*tensors, out if plan.joint else None, lse)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, grad_out: Tensor | None, grad_lse: Tensor | None):
        *tensors, out, lse = ctx.saved_tensors
        return None, None, *ctx.plan.differentiate(grad_out, grad_lse, tensors, out, lse)
