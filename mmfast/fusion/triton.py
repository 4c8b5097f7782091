"""Cross-attention on the GPU: operators over the Triton kernels, and who computes what.

``mmfast::fusion_device_forward`` and ``_backward`` run one of several engines: ``"short"``, the kernels of
`triton_short` for few keys, with every option but dropout and softcap; ``"split"``, those of `triton_split` for few
queries; ``"skip"``, those of `triton_skip` for long keys that masks leave a part of; ``"tiny"``, those of `tiny` for
heads of a few features; and those of `merged`, torch's own kernels source by source. All but the first know one softmax
without gates; the backward of "split" in half precision, and of "skip" in float32, is that of `merged`.
`routes_cuda.choose` decides.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmfast import _backend
from mmfast.fusion import merged, reference, routes_cuda, tiny
from mmfast.fusion._derivatives import alias, of_batch
from mmfast.fusion._inputs import Source, batch_of
from mmfast.fusion._vmap import one_by_one
from mmfast.fusion.reference import Attention

# Autograd has no lists with None in them, so `has` says which source each tensor belongs to: bits 1 mask, 2 bias,
# 4 lengths, 8 gate. `factors` are the gates that are numbers.
_INPUTS = (
    "Tensor query, Tensor[] keys, Tensor[] values, Tensor[] masks, Tensor[] biases, Tensor[] lengths, Tensor[] gates, "
    "Tensor? row_lengths, int[] has, float[] factors, bool joint, bool causal, bool pool, float scale, str engine"
)
torch.library.define("mmfast::fusion_device_forward", f"({_INPUTS}) -> (Tensor out, Tensor lse)")
torch.library.define(
    "mmfast::fusion_device_backward",
    f"(Tensor grad_out, Tensor? grad_lse, {_INPUTS}, Tensor? out, Tensor lse, bool gate_gradients)"
    " -> (Tensor grad_query, Tensor[] grad_keys, Tensor[] grad_values, Tensor[] grad_gates)",
)
torch.library.define(
    "mmfast::fusion_mean_weights",
    "(Tensor query, Tensor[] keys, Tensor[] masks, Tensor[] biases, Tensor[] lengths, int[] has, Tensor[] lses, "
    "bool causal, float scale) -> Tensor[]",
)
MOST_SOURCES, WIDEST = 8, 256


def can(
    query: Tensor, sources: Sequence[Source], dropout_p: float, softcap: float | None, weights: bool | str
) -> str | None:
    """Why the kernels cannot do this, or None if they can."""
    if query.dtype == torch.float64:
        return "float64"
    if dropout_p:
        return "dropout"
    if softcap is not None:
        return "a softcap"
    if weights and weights != "mean":
        return "the weights of each head"
    if weights and torch.is_grad_enabled() and _any_gradient(query, sources):
        return "the gradient of weights"
    if max(query.shape[3], sources[0].value.shape[3]) > WIDEST:
        return f"more than {WIDEST} features a head"
    if len(sources) > MOST_SOURCES:
        return f"more than {MOST_SOURCES} sources"
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for s in sources for x in (s.mask, s.bias)):
        return "the gradient of a mask or bias"
    return None


def _any_gradient(query: Tensor, sources: Sequence[Source]) -> bool:
    return query.requires_grad or any(isinstance(x, Tensor) and x.requires_grad for s in sources for x in s)


def attention(
    query: Tensor,
    sources: Sequence[Source],
    *,
    fusion: str,
    scale: float,
    is_causal: bool = False,
    lse: bool = True,
    weights: bool = False,
) -> Attention:
    """`mmfast.fusion.reference.attention` of what `can` allows.

    Without ``lse`` perhaps without log-sum-exps. ``weights``: their means over the heads, ``(B, L, S_j)``.
    """
    if nothing(query, sources):
        mean = "mean" if weights else False
        return reference.attention(query, sources, fusion=fusion, scale=scale, is_causal=is_causal, weights=mean)
    engine = routes_cuda.choose(query, sources, fusion, lse or weights, plain=not is_causal)
    result = run(engine, query, sources, fusion=fusion, scale=scale, is_causal=is_causal)
    return result._replace(weights=mean_weights(query, sources, result.lses, scale, is_causal)) if weights else result


def mean_weights(
    query: Tensor, sources: Sequence[Source], lses: Sequence[Tensor], scale: float, is_causal: bool
) -> tuple[Tensor, ...]:
    """Weights averaged over the heads, of which no gradient is asked for; ``lses`` as in `Attention`."""
    (keys, _, masks, biases, lengths, _), (has, _) = pack([s._replace(gate=None) for s in sources])
    if len(lses) != len(sources):
        lses = [lses[0]] * len(sources)
    return tuple(
        torch.ops.mmfast.fusion_mean_weights(
            query, keys, masks, biases, lengths, has, [lse.detach() for lse in lses], is_causal, scale
        )
    )


def nothing(query: Tensor, sources: Sequence[Source]) -> bool:
    return not query.numel() or not any(s.key.numel() for s in sources)


def run(
    engine: str, query: Tensor, sources: Sequence[Source], *, fusion: str, scale: float, is_causal: bool
) -> Attention:
    """By the engine of that name; see `routes_cuda`."""
    if engine == "short":
        return short(query, sources, fusion=fusion, scale=scale, is_causal=is_causal)
    if engine == "sdpa":
        return Attention(routes_cuda.sdpa(query, sources[0], scale, is_causal), (), None)
    if engine == "reference":
        return reference.attention(query, sources, fusion=fusion, scale=scale, is_causal=is_causal)
    return long(query, sources, fusion=fusion, scale=scale, is_causal=is_causal, engine=engine)


def short(
    query: Tensor,
    sources: Sequence[Source],
    *,
    fusion: str,
    scale: float,
    is_causal: bool = False,
    pool: bool = False,
    row_lengths: Tensor | None = None,
) -> Attention:
    """`mmfast.fusion.reference.attention` by the kernels for few keys; ``pool``: the output summed over the queries."""
    packed = pack(sources)
    out, lse = torch.ops.mmfast.fusion_device_forward(
        query, *packed[0], row_lengths, *packed[1], fusion == "joint", is_causal, pool, scale, "short"
    )
    return Attention(out, tuple(lse.unbind(0)), None)


def pool(
    query: Tensor,
    sources: Sequence[Source],
    row_lengths: Tensor | None,
    fusion: str,
    scale: float,
    is_causal: bool,
    dropout_p: float,
    softcap: float | None,
) -> Tensor | None:
    """The sum of the outputs over the queries ``(B, H, D_v)``, float32; None where the kernels cannot sum at once."""
    if can(query, sources, dropout_p, softcap, False) is not None or nothing(query, sources):
        return None
    if routes_cuda.choose(query, sources, fusion, True, plain=False) != "short":
        return None
    return short(
        query, sources, fusion=fusion, scale=scale, is_causal=is_causal, pool=True, row_lengths=row_lengths
    ).out


def long(
    query: Tensor,
    sources: Sequence[Source],
    *,
    fusion: str,
    scale: float,
    is_causal: bool = False,
    engine: str = "flash",
) -> Attention:
    """The same by ``"split"``, ``"skip"`` or one of `merged.ENGINES`. Decoupled sources one by one."""

    batch = batch_of(query, list(sources))

    def softmax(some: Sequence[Source]) -> tuple[Tensor, Tensor]:
        own = query
        if batch_of(query, list(some)) != batch and any(_differs_by_item(s) for s in some):
            own = query.expand(batch, -1, -1, -1)  # or these sources by themselves would be one item's
        packed = pack([s._replace(gate=None) for s in some])
        out, lse = torch.ops.mmfast.fusion_device_forward(
            own, *packed[0], None, *packed[1], True, is_causal, False, scale, engine
        )
        return out, lse[0]

    if fusion == "joint":
        out, lse = softmax(sources)
        return Attention(out, (lse,), None)
    total, lses = None, []
    for source in sources:
        if not source.key.shape[2]:
            lses.append(query.new_full((batch, *query.shape[1:3]), -torch.inf, dtype=torch.float32))
            continue
        out, lse = softmax([source])
        lses.append(_expand(lse, batch))
        if len(sources) > 1 or source.gate is not None:
            out = out.float()
        if source.gate is not None:
            out = out * (source.gate.float() if isinstance(source.gate, Tensor) else source.gate)
        total = out if total is None else total + out
    return Attention(_expand(total, batch).to(query.dtype), tuple(lses), None)


def _differs_by_item(source: Source) -> bool:
    """Whether masks, biases or lengths do, whatever keys and values are."""
    added = (source.mask, source.bias)
    return source.lengths is not None or any(x is not None and x.shape[0] != 1 for x in added)


def _expand(x: Tensor, batch: int) -> Tensor:
    return x.expand(batch, *x.shape[1:]) if x.shape[0] == 1 and batch != 1 else x


# ---- Sources to lists and back


def pack(sources: Sequence[Source]) -> tuple[tuple[list[Tensor], ...], tuple[list[int], list[float]]]:
    gates = [s.gate if isinstance(s.gate, Tensor) else None for s in sources]
    optional = list(
        zip([s.mask for s in sources], [s.bias for s in sources], [s.lengths for s in sources], gates, strict=True)
    )
    has = [sum(1 << i for i, x in enumerate(of) if x is not None) for of in optional]
    lists = [[of[i] for of in optional if of[i] is not None] for i in range(4)]
    factors = [1.0 if s.gate is None or isinstance(s.gate, Tensor) else float(s.gate) for s in sources]
    return ([s.key for s in sources], [s.value for s in sources], *lists), (has, factors)


def _unpack(keys, values, masks, biases, lengths, gates, has, factors) -> list[Source]:
    rest = [iter(x) for x in (masks, biases, lengths, gates)]
    sources = []
    for key, value, bits, factor in zip(keys, values, has, factors, strict=True):
        mask, bias, length, gate = (next(x) if bits >> i & 1 else None for i, x in enumerate(rest))
        sources.append(Source(key, value, mask, length, bias, factor if gate is None else gate))
    return sources


# ---- The operators


def forward(
    query, keys, values, masks, biases, lengths, gates, row_lengths, has, factors, joint, causal, pool, scale, engine
):
    sources = _unpack(keys, values, masks, biases, lengths, gates, has, factors)
    batch = batch_of(query, sources)
    with _backend.on_device_of(query):
        if engine == "short":
            from mmfast.fusion import triton_short  # here: on the CPU `merged` does without Triton

            return triton_short.forward(query, sources, joint, causal, scale, batch, pool, row_lengths)
        if engine == "tiny":
            out, lse = tiny.forward(query, sources[0], scale)
        elif engine == "split":
            from mmfast.fusion import triton_split

            out, lse = triton_split.forward(query, sources, causal, scale, batch)
        elif engine == "skip":
            from mmfast.fusion import triton_skip

            out, lse = triton_skip.forward(query, sources, causal, scale, batch)
        else:
            out, lse = merged.forward(query, sources, causal, scale, batch, engine)
    return out, lse[None]


def _backward(
    grad_out, grad_lse, query, keys, values, masks, biases, lengths, gates, row_lengths, has, factors, joint, causal,
    pool, scale, engine, out, lse, gate_gradients,
):  # fmt: skip
    result = launched_backward(
        grad_out, grad_lse, query, keys, values, masks, biases, lengths, gates, row_lengths, has, factors, joint,
        causal, pool, scale, engine, out, lse, gate_gradients,
    )  # fmt: skip
    return reduced(engine, query, gates, *result)


def launched_backward(
    grad_out, grad_lse, query, keys, values, masks, biases, lengths, gates, row_lengths, has, factors, joint, causal,
    pool, scale, engine, out, lse, gate_gradients,
):  # fmt: skip
    """``mmfast::fusion_device_backward`` before `reduced`."""
    sources = _unpack(keys, values, masks, biases, lengths, gates, has, factors)
    if engine != "short":
        of_lse = None if grad_lse is None else grad_lse[0]
        with _backend.on_device_of(query):
            if engine == "tiny":
                return *tiny.backward(grad_out, of_lse, query, sources[0], out, lse[0], scale), []
            if engine == "split":
                from mmfast.fusion import triton_split

                if triton_split.differentiates(query, sources, lse.shape[1]):
                    given = grad_out, of_lse, query, sources, out, lse[0], causal, scale
                    return *triton_split.backward(*given), []
            if engine == "skip":
                from mmfast.fusion import triton_skip

                if triton_skip.differentiates(query, sources):
                    return *triton_skip.backward(grad_out, of_lse, query, sources, out, lse[0], causal, scale), []
            return *merged.backward(grad_out, of_lse, query, sources, out, lse[0], causal, scale, engine), []
    from mmfast.fusion import triton_short

    wanted = [gate_gradients and isinstance(s.gate, Tensor) for s in sources]
    if pool:
        grad_out = grad_out[:, :, None].expand(-1, -1, query.shape[2], -1)
    with _backend.on_device_of(query):
        *grads, grad_gates = triton_short.backward(
            grad_out, grad_lse, query, sources, None if pool else out, lse, joint, causal, scale, wanted, row_lengths
        )
    return *grads, [g for g in grad_gates if g is not None]


def reduced(engine, query, gates, grad_query, grad_keys, grad_values, grad_gates):
    """Gradients summed over what query and gates were broadcast along."""
    if engine == "short":
        from mmfast.fusion import triton_short

        grad_query, grad_gates = triton_short.reduced(query, gates, grad_query, grad_gates)
    return grad_query, grad_keys, grad_values, grad_gates


def _mean_weights(query, keys, masks, biases, lengths, has, lses, causal, scale):
    from mmfast.fusion import triton_weights

    sources = _unpack(keys, keys, masks, biases, lengths, [], has, [1.0] * len(keys))
    with _backend.on_device_of(query):
        return triton_weights.mean_weights(query, sources, lses, causal, scale, lses[0].shape[0])


for _device in ("cuda", "cpu"):  # on the CPU by Triton's interpreter
    torch.library.impl("mmfast::fusion_device_forward", _device, forward)
    torch.library.impl("mmfast::fusion_device_backward", _device, _backward)
    torch.library.impl("mmfast::fusion_mean_weights", _device, _mean_weights)


@torch.library.register_fake("mmfast::fusion_device_forward")
def _(
    query, keys, values, masks, biases, lengths, gates, row_lengths, has, factors, joint, causal, pool, scale, engine
):
    batch = next((x.shape[0] for x in (query, *keys, *values) if x.shape[0] != 1), 1)
    heads, rows, wide = query.shape[1], query.shape[2], values[0].shape[3]
    if pool:
        out = query.new_empty((batch, heads, wide), dtype=torch.float32)
    else:
        out = query.new_empty((batch, rows, heads, wide)).transpose(1, 2)
    return out, query.new_empty((1 if joint else len(keys), batch, heads, rows), dtype=torch.float32)


@torch.library.register_fake("mmfast::fusion_device_backward")
def _(
    grad_out, grad_lse, query, keys, values, masks, biases, lengths, gates, row_lengths, has, factors, joint, causal,
    pool, scale, engine, out, lse, gate_gradients,
):  # fmt: skip
    def like(x):
        return x.new_empty((x.shape[0], x.shape[2], x.shape[1], x.shape[3])).transpose(1, 2)

    of_gates = [torch.empty_like(g, memory_format=torch.contiguous_format) for g in gates] if gate_gradients else []
    return like(query), [like(k) for k in keys], [like(v) for v in values], of_gates


@torch.library.register_fake("mmfast::fusion_mean_weights")
def _(query, keys, masks, biases, lengths, has, lses, causal, scale):
    return [query.new_empty((lses[0].shape[0], query.shape[2], k.shape[2])) for k in keys]


# ---- Autograd


def _save_forward(ctx, inputs, output):
    query, keys, values, masks, biases, lengths, gates, row_lengths, *ctx.options = inputs
    lists = (keys, values, masks, biases, lengths, gates)
    ctx.counts = [len(x) for x in lists]
    ctx.gate_gradients = any(g.requires_grad for g in gates)
    ctx.joint, ctx.pool = ctx.options[2], ctx.options[4]
    out = output[0] if ctx.joint and not ctx.pool else None
    ctx.save_for_backward(query, row_lengths, out, output[1], *(x for part in lists for x in part))
    ctx.shape, ctx.kind = output[0].shape, output[0].dtype
    ctx.set_materialize_grads(False)


def _split(tensors: Sequence[Tensor], counts: Sequence[int]) -> list[list[Tensor]]:
    rest = iter(tensors)
    return [[next(rest) for _ in range(n)] for n in counts]


def _differentiate(ctx, grad_out, grad_lse):
    nothing = [None] * 7
    lists = [[None] * n for n in ctx.counts]
    if grad_out is None and grad_lse is None:
        return None, *lists, None, *nothing
    query, row_lengths, out, lse, *rest = ctx.saved_tensors
    if any(map(_backend.is_batch_of_gradients, (grad_out, grad_lse))):
        return _differentiate_batch(ctx, grad_out, grad_lse, query, row_lengths, rest)
    if grad_out is None:
        grad_out = query.new_zeros(ctx.shape, dtype=ctx.kind)
    grad_query, grad_keys, grad_values, grad_gates = torch.ops.mmfast.fusion_device_backward(
        grad_out, grad_lse, query, *_split(rest, ctx.counts), row_lengths, *ctx.options, out, lse, ctx.gate_gradients
    )
    lists[0], lists[1] = grad_keys, grad_values
    if ctx.gate_gradients:
        lists[5] = grad_gates
    return grad_query, *lists, None, *nothing


def _differentiate_batch(ctx, grad_out, grad_lse, query, row_lengths, rest):
    keys, values, *added, gates = _split(rest, ctx.counts)
    n, g = len(keys), len(gates) if ctx.gate_gradients else 0
    with torch.enable_grad():
        inputs = [alias(x) for x in (query, *keys, *values, *gates)]
        query, keys, values, gates = inputs[0], inputs[1 : 1 + n], inputs[1 + n : 1 + 2 * n], inputs[1 + 2 * n :]
        outputs = _by_reference(query, keys, values, *added, gates, row_lengths, *ctx.options)
    by_query, *by = of_batch(outputs, (grad_out, grad_lse), inputs[: 1 + 2 * n + g])
    lists = [by[:n], by[n : 2 * n], *([None] * k for k in ctx.counts[2:5]), by[2 * n :] or [None] * ctx.counts[5]]
    return by_query, *lists, None, *[None] * 7


def _by_reference(
    query, keys, values, masks, biases, lengths, gates, row_lengths, has, factors, joint, causal, pool, scale, _engine
) -> tuple[Tensor, Tensor]:
    """What ``mmfast::fusion_device_forward`` gives."""
    sources = _unpack(keys, values, masks, biases, lengths, gates, has, factors)
    result = reference.attention(
        query, sources, fusion="joint" if joint else "decoupled", scale=scale, is_causal=causal
    )
    return _pooled(result.out, row_lengths) if pool else result.out, torch.stack(result.lses)


torch.library.register_autograd("mmfast::fusion_device_forward", _differentiate, setup_context=_save_forward)


def _save_backward(ctx, inputs, output):
    grad_out, grad_lse, query, keys, values, masks, biases, lengths, gates, row_lengths, *options = inputs
    *ctx.options, _, _, ctx.gate_gradients = options
    lists = (keys, values, masks, biases, lengths, gates)
    ctx.counts = [len(x) for x in lists]
    ctx.save_for_backward(grad_out, grad_lse, query, row_lengths, *(x for part in lists for x in part))
    ctx.set_materialize_grads(False)


def _differentiate_twice(ctx, grad_query, grad_keys, grad_values, grad_gates):
    """Second derivatives, by the reference: rare, and then its memory is the price."""
    *tensors, row_lengths = ctx.saved_tensors[:4]
    lists = _split(ctx.saved_tensors[4:], ctx.counts)
    onward = torch.is_grad_enabled()
    with torch.enable_grad():
        grad_out, grad_lse, query = (alias(x) for x in tensors)
        keys, values, gates = ([alias(x) for x in lists[i]] for i in (0, 1, 5))
        out, lses = _by_reference(query, keys, values, *lists[2:5], gates, row_lengths, *ctx.options)
        outputs, given = [out], [grad_out]
        if grad_lse is not None:
            outputs.append(lses)
            given.append(grad_lse)
        of = [query, *keys, *values, *(gates if ctx.gate_gradients else [])]
        incoming = [grad_query]
        for part, n in ((grad_keys, len(keys)), (grad_values, len(values)), (grad_gates, len(of) - 1 - 2 * len(keys))):
            incoming += part or [None] * n
        wanted = [(x, g) for x, g in zip(of, incoming, strict=True) if g is not None]
        first = torch.autograd.grad(outputs, [x for x, _ in wanted], given, create_graph=True)
        twice = [grad_out, *([] if grad_lse is None else [grad_lse]), query, *keys, *values, *gates]
        second = torch.autograd.grad(first, twice, [g for _, g in wanted], allow_unused=True, create_graph=onward)
    rest = list(second)
    of_out, of_lse = rest.pop(0), None if grad_lse is None else rest.pop(0)
    of_query, of_keys, of_values, of_gates = (
        rest[0],
        rest[1 : 1 + len(keys)],
        rest[1 + len(keys) : 1 + 2 * len(keys)],
        rest[1 + 2 * len(keys) :],
    )
    unused = [[None] * n for n in ctx.counts[2:5]]
    # ..., row_lengths, has, factors, joint, causal, pool, scale, engine, out, lse, gate_gradients
    return of_out, of_lse, of_query, of_keys, of_values, *unused, of_gates, None, *[None] * 10


def _pooled(out: Tensor, row_lengths: Tensor | None) -> Tensor:
    out = out.to(torch.float32)
    if row_lengths is not None:
        out = out * (torch.arange(out.shape[2], device=out.device) < row_lengths[:, None])[:, None, :, None]
    return out.sum(2)


torch.library.register_autograd("mmfast::fusion_device_backward", _differentiate_twice, setup_context=_save_backward)

one_by_one("fusion_device_forward", "fusion_device_backward", "fusion_mean_weights")
