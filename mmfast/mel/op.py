"""Operators ``mmfast::mel_forward`` and ``mmfast::mel_backward``: schema, fake, implementations, autograd.

Both take the text of a `MelConfig` (`MelConfig.key`): what is static about a front end is one constant in a traced
graph. Tables left out are those of the configuration, so that they need not be traced either.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch

from mmfast import _backend
from mmfast.mel.config import _CHOICES, MelConfig
from mmfast.mel.reference import compute_dtype, mel_reference
from mmfast.mel.tables import resolve

torch.library.define(
    "mmfast::mel_forward",
    "(Tensor waveform, Tensor? window, Tensor? filters, Tensor? dct, Tensor? lengths, SymInt group, SymInt seed,"
    " str config) -> (Tensor features, Tensor frame_counts, Tensor maxima)",
)
torch.library.define(
    "mmfast::mel_backward",
    "(Tensor grad, Tensor waveform, Tensor? window, Tensor? filters, Tensor? dct, Tensor? lengths, Tensor maxima,"
    " SymInt group, SymInt seed, str config, bool need_waveform, bool need_filters)"
    " -> (Tensor grad_waveform, Tensor grad_filters)",
)


_forward = torch.ops.mmfast.mel_forward.default


def mel(rows, window, filters, dct, lengths, group, seed, config: MelConfig):
    """`mel_reference` by the native kernels: the same arguments, the same results."""
    args = rows, window, filters, dct, lengths, group, seed, config.key
    if torch.compiler.is_compiling():
        return _forward(*args)[:2]
    tracked = _backend.is_tracked(rows) or _backend.is_tracked(filters)
    if _takes_no_dispatcher(rows, window, filters, dct, lengths):
        return _Direct.apply(*args) if tracked else _forward_native(*args)[:2]
    if tracked:
        return _forward(*args)[:2]
    with torch._C._AutoDispatchBelowAutograd():  # its look through the arguments takes as long as a short clip
        return _forward(*args)[:2]


def _takes_no_dispatcher(*tensors) -> bool:
    return _backend.nobody_looks_on() and all(t is None or _is_native(t) for t in tensors)


def _is_native(t: torch.Tensor) -> bool:
    return (t.is_cpu or (t.is_cuda and _backend._C.with_cuda)) and _backend.holds_its_values(t)


class _Direct(torch.autograd.Function):
    """The operators' kernels and derivatives without the operators, which take longer than a second of audio."""

    @staticmethod
    def forward(ctx, *args):
        out = _forward_native(*args)
        _save_forward(ctx, args, out)
        return out[:2]

    @staticmethod
    def backward(ctx, grad, _counts):
        return _differentiate(ctx, grad, None, None)


def differentiate(grad, waveform, maxima, key, lengths):
    """The gradient of ``(T,)`` or ``(B, T)`` samples, by the operator: what the node of `mmfast.mel.direct` leaves."""
    alone, group = waveform.dim() == 1, int(MelConfig.from_key(key).top_db_scope == "item")
    if alone:
        grad, waveform = grad.unsqueeze(0), waveform.unsqueeze(0)
        lengths = None if lengths is None else lengths.unsqueeze(0)
    args = None, None, None, lengths, maxima, group, 0, key, True, False
    result = torch.ops.mmfast.mel_backward(grad, waveform, *args)[0]
    return result.squeeze(0) if alone else result


@lru_cache(maxsize=1024)
def plan(key: str):
    """The native form of a configuration: transform tables, and its own filters (in float32) without their zeros.

    Also the `MelConfig`, and the filters' tensor to keep it alive: the kernels know it by its address.
    """
    config = MelConfig.from_key(key)
    native = _native_plan(config)
    filters = resolve(config, torch.float32, torch.device("cpu"), None, None, None)[1]
    if filters is not None:
        native.prepare(filters)
    return native, config, filters


def _native_plan(c: MelConfig):
    per_ln = {None: 0.0, "ln": 1.0, "log10": 1 / math.log(10), "db": c.db_multiplier / math.log(10)}[c.log]
    shift = c.db_multiplier * math.log10(max(c.log_floor, c.db_reference)) if c.log == "db" else 0.0
    pad_mode = "constant" if c.framing == "valid" else c.pad_mode
    return _backend._C.MelPlan(
        n_fft=c.n_fft,
        window=c.win_length,
        hop=c.hop_length,
        first=c.first_sample,
        count_offset=c.count_offset,
        min_length=c.min_length,
        pad=c.pad,
        pad_mode=_CHOICES["pad_mode"].index(pad_mode),
        input_scale=c.input_scale,
        preemphasis=c.preemphasis,
        preemphasis_of_signal=c.preemphasis_scope == "signal",
        dither=c.dither,
        energy_floor=c.energy_floor,
        remove_dc=c.remove_dc,
        raw_energy=c.raw_energy,
        energy=_CHOICES["energy"].index(c.energy),
        power=c.power,
        power_offset=c.power_offset,
        normalized=_CHOICES["normalized"].index(c.normalized),
        log=c.log is not None,
        log_floor=c.log_floor,
        log_offset=c.log_offset,
        log_scale=per_ln,
        log_shift=-shift,
        has_top_db=c.top_db is not None,
        top_db=c.top_db or 0.0,
        output_offset=c.output_offset,
        output_scale=c.output_scale,
        fill=c.fill,
        time_major=c.layout == "time_feature",
    )


def _forward_native(waveform, window, filters, dct, lengths, group, seed, config):
    own, config, _ = plan(config)
    tables = resolve(config, compute_dtype(waveform.dtype), waveform.device, window, filters, dct)
    return _backend._C.mel_forward(own, waveform, *tables, lengths, group, seed)


def _backward_native(
    grad, waveform, window, filters, dct, lengths, maxima, group, seed, config, need_waveform, need_filters
):
    own, config, _ = plan(config)
    tables = resolve(config, compute_dtype(waveform.dtype), waveform.device, window, filters, dct)
    return _backend._C.mel_backward(
        own, grad, waveform, *tables, lengths, maxima, group, seed, need_waveform, need_filters
    )


for _device in _backend.OPS["mel"]:
    torch.library.impl("mmfast::mel_forward", _device, _forward_native)
    torch.library.impl("mmfast::mel_backward", _device, _backward_native)


@torch.library.register_fake("mmfast::mel_forward")
def _(waveform, window, filters, dct, lengths, group, seed, config):
    c = MelConfig.from_key(config)
    rows, frames = waveform.shape[0], c.frame_count(waveform.shape[1])
    shape = (rows, frames, c.n_features) if c.layout == "time_feature" else (rows, c.n_features, frames)
    out_dtype = torch.float32 if waveform.dtype == torch.int16 else waveform.dtype
    groups = 0 if c.top_db is None else (rows + group - 1) // group if group else min(rows, 1)
    return (
        waveform.new_empty(shape, dtype=out_dtype),
        waveform.new_empty((rows,), dtype=torch.int64),
        waveform.new_empty((groups,), dtype=compute_dtype(waveform.dtype)),
    )


@torch.library.register_fake("mmfast::mel_backward")
def _(grad, waveform, window, filters, dct, lengths, maxima, group, seed, config, need_waveform, need_filters):
    return (
        waveform.new_empty((waveform.shape[0] if need_waveform else 0, waveform.shape[1])),
        waveform.new_empty(filters.shape if need_filters else (0,), dtype=compute_dtype(waveform.dtype)),
    )


def _save_forward(ctx, inputs, output):
    waveform, window, filters, dct, lengths, ctx.group, ctx.seed, ctx.config = inputs
    _, counts, maxima = output
    ctx.save_for_backward(waveform, window, filters, dct, lengths, maxima)
    ctx.mark_non_differentiable(counts, maxima)  # those of them that are returned
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad, _counts, _maxima):
    if grad is None:
        return (None,) * 8
    need_waveform, need_filters = ctx.needs_input_grad[0], ctx.needs_input_grad[2]
    tensors = ctx.saved_tensors
    # A second derivative is asked for by enabling gradients here.
    direct = not torch.is_grad_enabled() and _takes_no_dispatcher(grad, *tensors)
    grad_waveform, grad_filters = (_backward_native if direct else torch.ops.mmfast.mel_backward)(
        grad, *tensors, ctx.group, ctx.seed, ctx.config, need_waveform, need_filters
    )
    # waveform, window, filters, dct, lengths, group, seed, config. Window and DCT have gradients in the reference only.
    return grad_waveform if need_waveform else None, None, grad_filters if need_filters else None, *(None,) * 5


torch.library.register_autograd("mmfast::mel_forward", _differentiate, setup_context=_save_forward)


def _save_backward(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:6])
    ctx.group, ctx.seed, ctx.config, ctx.need_waveform, ctx.need_filters = inputs[7:]
    ctx.set_materialize_grads(False)


def _differentiate_twice(ctx, grad_waveform, grad_filters):
    """Second derivatives, by the reference: rare, and then its memory is the price."""

    def tracked(tensor):
        # An alias, so that differentiation stops here and not where the caller's graph began.
        if tensor is None:
            return None
        return tensor.view_as(tensor) if tensor.requires_grad else tensor.detach().requires_grad_()

    grad, waveform, window, filters, dct, lengths = ctx.saved_tensors
    onward = torch.is_grad_enabled()
    with torch.enable_grad():
        grad, waveform, filters = tracked(grad), tracked(waveform), tracked(filters)
        config = MelConfig.from_key(ctx.config)
        features, _ = mel_reference(waveform, window, filters, dct, lengths, ctx.group, ctx.seed, config)
        wanted = [(waveform, grad_waveform)] if ctx.need_waveform and grad_waveform is not None else []
        if ctx.need_filters and grad_filters is not None:
            wanted.append((filters, grad_filters))
        if not wanted:
            return (None,) * 12
        first = torch.autograd.grad(features, [x for x, _ in wanted], grad, create_graph=True)
        inputs = [grad, waveform] + ([] if filters is None else [filters])
        second = torch.autograd.grad(first, inputs, [g for _, g in wanted], allow_unused=True, create_graph=onward)
    filters_second = second[2] if filters is not None else None
    # grad, waveform, window, filters, then dct … need_filters
    return second[0], second[1], None, filters_second, *(None,) * 8


torch.library.register_autograd("mmfast::mel_backward", _differentiate_twice, setup_context=_save_backward)


# vmap: what it adds is more rows of the batch.


def _rows(info, dim, tensor):
    """``(B, ...)`` under vmap as ``(N * B, ...)``."""
    if tensor is None:
        return None
    tensor = tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return tensor.reshape(info.batch_size * tensor.shape[1], *tensor.shape[2:]).contiguous()  # lengths must be


def _samples(info, dims, tensors):
    """The arguments of each sample: noise follows the number of a row, which is to be the same in all of them."""
    for i in range(info.batch_size):
        yield [t if t is None or d is None else t.select(d, i) for t, d in zip(tensors, dims, strict=False)]


def _by_sample(info, tensor):
    """``(N * B, ...)`` as ``(N, B, ...)``; there may be nothing in it."""
    return tensor.reshape(info.batch_size, tensor.shape[0] // info.batch_size, *tensor.shape[1:])


def _check_shared(dims):
    if any(d is not None for d in dims):
        raise ValueError("window, filters and dct must be the same for all samples under vmap")


@torch.library.register_vmap("mmfast::mel_forward")
def _(info, in_dims, waveform, window, filters, dct, lengths, group, seed, config):
    _check_shared(in_dims[1:4])
    if MelConfig.from_key(config).dither:
        samples = _samples(info, in_dims, (waveform, window, filters, dct, lengths))
        outs = [torch.ops.mmfast.mel_forward(*sample, group, seed, config) for sample in samples]
        return tuple(map(torch.stack, zip(*outs, strict=True))), (0, 0, 0)
    rows, lengths = _rows(info, in_dims[0], waveform), _rows(info, in_dims[4], lengths)
    group = group or rows.shape[0] // info.batch_size
    out = torch.ops.mmfast.mel_forward(rows, window, filters, dct, lengths, group, seed, config)
    return tuple(_by_sample(info, t) for t in out), (0, 0, 0)


@torch.library.register_vmap("mmfast::mel_backward")
def _(
    info,
    in_dims,
    grad,
    waveform,
    window,
    filters,
    dct,
    lengths,
    maxima,
    group,
    seed,
    config,
    need_waveform,
    need_filters,
):
    _check_shared(in_dims[2:5])
    if need_filters:
        raise ValueError("the gradient of filters has no rule for vmap: compute it sample by sample")
    if MelConfig.from_key(config).dither:
        rest = group, seed, config, need_waveform, need_filters
        samples = _samples(info, in_dims, (grad, waveform, window, filters, dct, lengths, maxima))
        outs = [torch.ops.mmfast.mel_backward(*sample, *rest) for sample in samples]
        return (torch.stack([by_waveform for by_waveform, _ in outs]), outs[0][1]), (0, None)
    grad, waveform, lengths, maxima = (
        _rows(info, in_dims[i], t) for i, t in ((0, grad), (1, waveform), (5, lengths), (6, maxima))
    )
    group = group or waveform.shape[0] // info.batch_size
    grad_waveform, grad_filters = torch.ops.mmfast.mel_backward(
        grad, waveform, window, filters, dct, lengths, maxima, group, seed, config, need_waveform, need_filters
    )
    return (_by_sample(info, grad_waveform), grad_filters), (0, None)
