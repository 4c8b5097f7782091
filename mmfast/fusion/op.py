"""Operators ``mmfast::fusion_forward`` and ``_backward``: cross-attention by the native kernels.

All sources are read in one pass over the queries. Decoupled ones together have at most `RESIDENT_KEYS` keys there and
gates of one number a query; others are computed one by one and summed. ``mmfast::fusion_weights`` gives attention
weights from the log-sum-exp, so that their mean over the heads is all that is written. Second derivatives are those of
the reference.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from mmfast import _backend
from mmfast.fusion import reference
from mmfast.fusion._derivatives import alias, of_batch
from mmfast.fusion._inputs import Source, batch_of, compute_dtype, is_plain
from mmfast.fusion._vmap import one_by_one
from mmfast.fusion.reference import Attention

RESIDENT_KEYS = 512
MOST_SOURCES = 16

# ``extras`` are the masks, biases and lengths there are, source by source, and ``parts`` says which: bit 0 mask, bit 1
# bias, bit 2 lengths, bit 3 gate. Autograd has no lists with None in them.
_INPUTS = "Tensor query, Tensor[] keys, Tensor[] values, Tensor[] gates, Tensor[] extras, int[] parts"
_OPTIONS = "bool decoupled, bool is_causal, float scale"
torch.library.define("mmfast::fusion_forward", f"({_INPUTS}, {_OPTIONS}) -> (Tensor out, Tensor lse)")
torch.library.define(
    "mmfast::fusion_weights",
    "(Tensor query, Tensor[] keys, Tensor lse, Tensor[] extras, int[] parts, bool mean, bool is_causal, float scale)"
    " -> Tensor[]",
)
torch.library.define(
    "mmfast::fusion_backward",
    f"(Tensor grad_out, Tensor? grad_lse, {_INPUTS}, Tensor out, Tensor lse, {_OPTIONS}, bool[] need)"
    " -> (Tensor grad_query, Tensor[] grad_keys, Tensor[] grad_values, Tensor[] grad_gates)",
)


def can(query: Tensor, sources: Sequence[Source], dropout_p: float, softcap: float | None, weights: bool) -> str | None:
    """Why `attention` cannot do this, or None if it can."""
    if dropout_p:
        return "dropout"
    if softcap is not None:
        return "a softcap"
    if len(sources) > MOST_SOURCES:
        return f"more than {MOST_SOURCES} sources"
    if any(_backend.is_tracked(x) for s in sources for x in (s.mask, s.bias)):
        return "the gradient of a mask or bias"
    return None


def attention(
    query: Tensor,
    sources: Sequence[Source],
    *,
    fusion: str,
    scale: float,
    is_causal: bool = False,
    weights: bool | str = False,
) -> Attention:
    """`mmfast.fusion.reference.attention` of what `can` allows; ``weights="mean"``: ``(B, L, S)``."""
    result = _attention(query, sources, fusion, scale, is_causal)
    if not weights:
        return result
    query = query.expand(batch_of(query, list(sources)), -1, -1, -1)  # a part may lack what has the batch
    groups = [sources] if fusion == "joint" else [[s] for s in sources]
    parts = []
    for group, lse in zip(groups, result.lses, strict=True):
        group = [s._replace(value=s.key, gate=None) for s in group]
        query_, keys, _, _, extras, flags, _, *options = _arguments(query, group, False, is_causal, scale)
        parts += torch.ops.mmfast.fusion_weights.default(query_, keys, lse, extras, flags, weights == "mean", *options)
    return result._replace(weights=tuple(parts))


def _attention(query: Tensor, sources: Sequence[Source], fusion: str, scale: float, is_causal: bool) -> Attention:
    if fusion == "joint":
        out, lse = _run(query, sources, False, is_causal, scale)
        return Attention(out, (lse[0],), None)
    one_pass = sum(s.key.shape[2] for s in sources) <= RESIDENT_KEYS and not any(
        isinstance(s.gate, Tensor) and s.gate.shape[3] != 1 for s in sources
    )
    if one_pass:
        out, lse = _run(query, sources, True, is_causal, scale)
        return Attention(out, lse.unbind(), None)
    dtype, out, lses = compute_dtype(query.dtype), None, []
    query = query.expand(batch_of(query, list(sources)), -1, -1, -1)  # one source may lack what has the batch
    for source in sources:
        one, lse = _run(query, [source._replace(gate=None)], False, is_causal, scale)
        if len(sources) > 1 or source.gate is not None:
            one = one.to(dtype)
        if source.gate is not None:
            one = one * (source.gate.to(dtype) if isinstance(source.gate, Tensor) else source.gate)
        out = one if out is None else out + one
        lses.append(lse[0])
    return Attention(out.to(query.dtype), tuple(lses), None)


def _run(*call) -> tuple[Tensor, Tensor]:
    given = query, keys, values, gates, extras, *_ = _arguments(*call)
    if is_plain((query, *keys, *values, *gates, *extras)):
        return _backend._C.fusion_attend(_native(*given))
    return torch.ops.mmfast.fusion_forward.default(*given)


def _arguments(query: Tensor, sources: Sequence[Source], decoupled: bool, is_causal: bool, scale: float) -> tuple:
    """What ``mmfast::fusion_forward`` takes."""
    gates, extras, parts = [], [], []
    for source in sources:
        part = 0
        for bit, x in enumerate((source.mask, source.bias, source.lengths)):
            if x is not None:
                extras.append(x)
                part |= 1 << bit
        if source.gate is not None:
            gate = source.gate
            if not isinstance(gate, Tensor):
                gate = torch.full((1, 1, 1, 1), gate, dtype=compute_dtype(query.dtype), device=query.device)
            gates.append(gate)
            part |= 8
        parts.append(part)
    keys, values = [s.key for s in sources], [s.value for s in sources]
    return query, keys, values, gates, extras, parts, decoupled, is_causal, scale


# ---- The operators


def _spread(gates: Sequence[Tensor], extras: Sequence[Tensor], parts: Sequence[int]) -> list[list[Tensor | None]]:
    """Masks, biases, lengths and gates, one or None for each source."""
    gates, extras = iter(gates), iter(extras)
    of = [[next(gates if bit == 3 else extras) if part >> bit & 1 else None for bit in range(4)] for part in parts]
    return [list(column) for column in zip(*of, strict=True)]


def _native(query, keys, values, gates, extras, parts, decoupled, is_causal, scale):
    return _backend._C.FusionArguments(query, keys, values, *_spread(gates, extras, parts), decoupled, is_causal, scale)


def _forward(*given):
    return _backend._C.fusion_forward(_native(*given))


def _backward(
    grad_out, grad_lse, query, keys, values, gates, extras, parts, out, lse, decoupled, is_causal, scale, need
):
    given = _native(query, keys, values, gates, extras, parts, decoupled, is_causal, scale)
    by_query, by_keys, by_values, of_rows = _backend._C.fusion_backward(given, grad_out, grad_lse, out, lse, need)
    rest = iter(gates)
    by_gates = []
    for j, part in enumerate(parts):
        if part & 8:
            gate = next(rest)
            by_gates.append(of_rows[j][..., None].sum_to_size(gate.shape).to(gate.dtype).clone())
    return by_query, by_keys, by_values, by_gates


def _weights(query, keys, lse, extras, parts, mean, is_causal, scale):
    return _backend._C.fusion_weights(_native(query, keys, keys, (), extras, parts, False, is_causal, scale), lse, mean)


torch.library.impl("mmfast::fusion_weights", "cpu", _weights)
torch.library.impl("mmfast::fusion_forward", "cpu", _forward)
torch.library.impl("mmfast::fusion_backward", "cpu", _backward)


@torch.library.register_fake("mmfast::fusion_forward")
def _(query, keys, values, gates, extras, parts, decoupled, is_causal, scale):
    batch = next((x.shape[0] for x in (query, *keys, *values) if x.shape[0] != 1), 1)
    heads, rows = query.shape[1:3]
    out = query.new_empty((batch, rows, heads, values[0].shape[3])).transpose(1, 2)
    softmaxes = len(keys) if decoupled else 1
    return out, query.new_empty((softmaxes, batch, heads, rows), dtype=compute_dtype(query.dtype))


@torch.library.register_fake("mmfast::fusion_weights")
def _(query, keys, lse, extras, parts, mean, is_causal, scale):
    shape = lse.shape[:1] + lse.shape[2:] if mean else lse.shape
    return [query.new_empty((*shape, k.shape[2])) for k in keys]


@torch.library.register_fake("mmfast::fusion_backward")
def _(grad_out, grad_lse, query, keys, values, gates, extras, parts, out, lse, decoupled, is_causal, scale, need):
    def like(x, wanted):
        if not wanted:
            return x.new_empty((0,))
        return x.new_empty((x.shape[0], x.shape[2], x.shape[1], x.shape[3])).transpose(1, 2)

    n = len(keys)
    return (
        like(query, need[0]),
        [like(x, w) for x, w in zip(keys, need[1 : 1 + n], strict=True)],
        [like(x, w) for x, w in zip(values, need[1 + n :], strict=True)],
        [x.new_empty(x.shape) for x in gates],
    )


# ---- Gradients


def _save_forward(ctx, inputs, output):
    query, keys, values, gates, extras, ctx.parts, *ctx.options = inputs
    ctx.need = [x.requires_grad for x in (query, *keys, *values)]
    ctx.save_for_backward(query, *keys, *values, *gates, *extras, *output)
    ctx.set_materialize_grads(False)


def _split(tensors: Sequence[Tensor], counts: tuple[int, int, int]) -> list:
    """Query, keys, values, gates, extras and what comes behind."""
    n, g, e = counts
    query, *rest = tensors
    ends = [0, n, 2 * n, 2 * n + g, 2 * n + g + e, len(rest)]
    return [query, *(rest[a:b] for a, b in itertools.pairwise(ends))]


def _counts(parts: Sequence[int]) -> tuple[int, int, int]:
    """Of sources, gates and extras."""
    return len(parts), sum(part >> 3 for part in parts), sum((part & 7).bit_count() for part in parts)


def _differentiate(ctx, grad_out, grad_lse):
    n, g, e = _counts(ctx.parts)
    by = [None] * (1 + 2 * n + g)
    if grad_out is not None or grad_lse is not None:
        by = differentiate(grad_out, grad_lse, ctx.saved_tensors, ctx.parts, *ctx.options, ctx.need)
    by_query, by_keys, by_values, by_gates, _, _ = _split(by, (n, g, 0))
    return by_query, by_keys, by_values, by_gates, [None] * e, *(None,) * 4


def differentiate(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    saved: Sequence[Tensor],
    parts: Sequence[int],
    decoupled: bool,
    is_causal: bool,
    scale: float,
    need: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of query, keys, values and gates, from what ``mmfast::fusion_forward`` was given and gave."""
    counts = n, g, _ = _counts(parts)
    query, keys, values, gates, extras, (out, lse) = _split(saved, counts)
    options = decoupled, is_causal, scale
    if any(map(_backend.is_batch_of_gradients, (grad_out, grad_lse))):
        with torch.enable_grad():
            inputs = [alias(x) for x in (query, *keys, *values, *gates)]
            query, keys, values, gates, _, _ = _split(inputs, (n, g, 0))
            outputs = _by_reference(query, keys, values, gates, extras, parts, *options)
        return of_batch(outputs, (grad_out, grad_lse), inputs)
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    by_query, by_keys, by_values, by_gates = torch.ops.mmfast.fusion_backward.default(
        grad_out, grad_lse, query, keys, values, gates, extras, parts, out, lse, *options, need
    )
    by = zip((by_query, *by_keys, *by_values), need, strict=True)
    return [*(x if wanted else None for x, wanted in by), *by_gates]


def _by_reference(query, keys, values, gates, extras, parts, decoupled, is_causal, scale) -> tuple[Tensor, Tensor]:
    """What ``mmfast::fusion_forward`` gives."""
    masks, biases, lengths, gates = _spread(gates, extras, parts)
    sources = [Source(*s) for s in zip(keys, values, masks, lengths, biases, gates, strict=True)]
    fusion = "decoupled" if decoupled else "joint"
    result = reference.attention(query, sources, fusion=fusion, scale=scale, is_causal=is_causal)
    return result.out, torch.stack(result.lses)


def _save_backward(ctx, inputs, output):
    grad_out, grad_lse, query, keys, values, gates, extras, ctx.parts, _, _, *ctx.options = inputs
    ctx.save_for_backward(query, *keys, *values, *gates, *extras, grad_out, grad_lse)
    ctx.set_materialize_grads(False)


def _differentiate_twice(ctx, grad_query, grad_keys, grad_values, grad_gates):
    """Second derivatives, by the reference: rare, and then its memory is the price.

    Output and log-sum-exp are functions of the others: what flows through them is in the others' derivatives.
    """
    n, g, e = counts = _counts(ctx.parts)
    decoupled, is_causal, scale, need = ctx.options
    incoming = [grad_query, *(grad_keys or [None] * n), *(grad_values or [None] * n)]
    incoming = [x if w else None for x, w in zip(incoming, need, strict=True)] + list(grad_gates or [None] * g)
    nothing = None, [None] * n, [None] * n, [None] * g, [None] * e, *(None,) * 7
    if all(x is None for x in incoming):
        return None, None, *nothing
    onward = torch.is_grad_enabled()
    query, keys, values, gates, extras, (grad_out, grad_lse) = _split(ctx.saved_tensors, counts)

    with torch.enable_grad():
        grad_out, grad_lse, *inputs = [alias(x) for x in (grad_out, grad_lse, query, *keys, *values, *gates)]
        query, keys, values, gates, _, _ = _split(inputs, (n, g, 0))
        out, lses = _by_reference(query, keys, values, gates, extras, ctx.parts, decoupled, is_causal, scale)
        outputs = [(out, grad_out)] + ([] if grad_lse is None else [(lses, grad_lse)])
        wanted = [(x, v) for x, v in zip(inputs, incoming, strict=True) if v is not None]
        first = torch.autograd.grad(
            [x for x, _ in outputs],
            [x for x, _ in wanted],
            [v for _, v in outputs],
            create_graph=True,
            materialize_grads=True,
        )
        pairs = [(f, v) for f, (_, v) in zip(first, wanted, strict=True) if f.requires_grad]
        of = [grad_out, *([] if grad_lse is None else [grad_lse]), *inputs]
        second = [None] * len(of)
        if pairs:
            second = list(
                torch.autograd.grad(
                    [f for f, _ in pairs], of, [v for _, v in pairs], allow_unused=True, create_graph=onward
                )
            )
    by_grad_lse = None if grad_lse is None else second.pop(1)
    by_query, by_keys, by_values, by_gates, _, _ = _split(second[1:], (n, g, 0))
    return second[0], by_grad_lse, by_query, by_keys, by_values, by_gates, [None] * e, *(None,) * 7


torch.library.register_autograd("mmfast::fusion_forward", _differentiate, setup_context=_save_forward)
torch.library.register_autograd("mmfast::fusion_backward", _differentiate_twice, setup_context=_save_backward)


def _save_weights(ctx, inputs, output):
    query, keys, lse, extras, *ctx.options = inputs
    ctx.save_for_backward(query, *keys, lse, *extras)
    ctx.set_materialize_grads(False)


def _differentiate_weights(ctx, grads):
    parts, mean, *options = ctx.options
    n, _, e = _counts(parts)
    given = [None] * n if grads is None else grads
    by_query, *by_keys, by_lse = differentiate_weights(given, ctx.saved_tensors, parts, mean, *options)
    return by_query, by_keys, by_lse, [None] * e, *(None,) * 4


def differentiate_weights(
    grads: Sequence[Tensor | None],
    saved: Sequence[Tensor],
    parts: Sequence[int],
    mean: bool,
    is_causal: bool,
    scale: float,
) -> list[Tensor | None]:
    """Gradients of query, keys and log-sum-exp, through scores that are written: exp(S - L), differentiable on."""
    n = len(parts)
    wanted = [i for i, g in enumerate(grads) if g is not None]
    if not wanted:
        return [None] * (n + 2)
    onward = torch.is_grad_enabled()
    with torch.enable_grad():
        query, *keys, lse = inputs = [alias(x) for x in saved[: n + 2]]
        masks, biases, lengths, _ = _spread((), saved[n + 2 :], parts)
        shift = torch.where(lse == -torch.inf, torch.inf, lse)[..., None]
        outputs = []
        for i in wanted:
            source = Source(keys[i], keys[i], masks[i], lengths[i], biases[i])
            one = (reference.scores(query, source, scale, is_causal) - shift).exp()
            outputs.append((one.mean(1) if mean else one).to(query.dtype))
        return list(
            torch.autograd.grad(outputs, inputs, [grads[i] for i in wanted], allow_unused=True, create_graph=onward)
        )


torch.library.register_autograd("mmfast::fusion_weights", _differentiate_weights, setup_context=_save_weights)


one_by_one("fusion_forward", "fusion_backward", "fusion_weights")
