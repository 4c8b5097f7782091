"""Cross-attention from one modality to several others."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from mmfast import _backend
from mmfast.fusion import direct, op, reference, routes, streamed, triton_direct
from mmfast.fusion import triton as fused
from mmfast.fusion._inputs import Source, Sources, check_choice, check_options, check_tensor, prepare
from mmfast.fusion.reference import Attention

WEIGHTS = (False, True, "mean")
_ENGINES = {"cpu": op, "torch": streamed, "triton": fused}


def cross_attention(
    query: Tensor,
    sources: Sources | Source | tuple[Tensor, Tensor],
    *,
    fusion: str = "joint",
    scale: float | None = None,
    is_causal: bool = False,
    dropout_p: float = 0.0,
    softcap: float | None = None,
    return_lse: bool = False,
    return_weights: bool | str = False,
    backend: str | None = None,
) -> Tensor | tuple:
    r"""Attention of ``query`` to one or several sources of keys and values, each read where it lies.

    With the scores of source j,

        S_j = cap(scale · Q K_jᵀ) + mask_j + bias_j,    cap(s) = softcap · tanh(s / softcap), or s without a softcap,

    ``"joint"`` takes one softmax over the keys of all sources, as over their concatenation, and ``"decoupled"`` one
    softmax each (IP-Adapter, Ye et al. 2023; the image branch of Wan 2.1):

        L = log Σ_j Σ_k exp S_jk        O = Σ_j exp(S_j − L) V_j              "joint"
        L_j = log Σ_k exp S_jk          O = Σ_j gate_j · exp(S_j − L_j) V_j   "decoupled"

    A query that may attend to nothing gives zero, a zero gradient and L = −inf; so does a source without keys.

    Args:
        query: ``(B, H, L, D)``; float32, float64, float16 or bfloat16, of any strides. Half precisions are computed in
            float32, but that tensor cores, AMX and AVX512_BF16 multiply values by probabilities rounded to the dtype,
            as ``scaled_dot_product_attention`` does. Under autocast query, keys and values but for float64 are taken in
            its dtype, as by that.
        sources: `Source` or pairs ``(key, value)``, or a single one of either. Batch sizes, of the query too, may be 1.
            A `torch.nested` query ``(B, H, ragged, D)`` or source of the jagged layout goes by `packed_attention`; then
            a source has no mask, lengths or bias, and weights are not to be had.
        fusion: ``"joint"`` or ``"decoupled"``.
        scale: default ``D ** -0.5``.
        is_causal: query i attends to the keys 0 … i of each source only; together with masks.
        dropout_p: weights are dropped with this probability, and the others divided by ``1 - dropout_p``. There is no
            training flag: pass 0 at evaluation.
        softcap: bound of the scores, before masks and biases.
        return_lse: also return L: ``(B, H, L)``, natural logarithm, float32 or float64; if decoupled a tuple with L_j
            for each source. Differentiable.
        return_weights: also return the weights, after dropout and without gates: a tuple with ``(B, H, L, S_j)`` for
            each source, or with ``"mean"`` their means over the heads, ``(B, L, S_j)``. Differentiable.
        backend: ``"reference"``: plain PyTorch, which writes the scores. ``"cpu"``: the native kernels, all sources in
            one pass. ``"torch"``: torch's flash attention, source by source, merged through L. Both for CPU tensors,
            without dropout, softcap and gradients of masks and biases, ``"torch"`` also without weights. ``"triton"``:
            on the GPU, the kernels of `mmfast.fusion.triton` or torch's, whichever `routes_cuda` says; in half
            precisions and float32, without dropout, softcap, weights but their means, and gradients of masks and
            biases. By default the fastest of them for the device and the shape at hand (`mmfast.fusion.routes`), else
            the reference.

    Returns:
        ``(B, H, L, D_v)`` in the dtype of the query, or a tuple of it, L and the weights, as asked for.

    Differentiable, twice, with respect to query, keys, values, gates, floating point masks and biases. What a mask
    excludes must be finite all the same (0 · NaN is NaN); what lies beyond ``lengths`` need not be. A floating point
    mask that leaves a query only keys at −1e9 or the like is no exclusion: gradients and weights of such a call are the
    reference's on the CPU, except in a compiled graph, where they may be wrong for these queries. −inf is safe.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.

    Example:
        >>> query = torch.randn(2, 8, 4096, 64)
        >>> text, image = (torch.randn(2, 8, 77, 64),) * 2, (torch.randn(2, 8, 4, 64),) * 2
        >>> cross_attention(query, [text, Source(*image, gate=0.6)], fusion="decoupled").shape
        torch.Size([2, 8, 4096, 64])
    """
    if not is_dynamo_compiling():  # other tracers have tensors or modes of their own, which `direct` leaves to others
        known = direct.attention(
            query, sources, fusion, scale, is_causal, dropout_p, softcap, return_lse, return_weights, backend
        )
        if known is not None:
            return known
    bare = softcap is None and type(dropout_p) is float and not dropout_p and return_weights is False
    if bare and backend in (None, "triton"):
        result = triton_direct.attention(query, sources, fusion, scale, is_causal, bool(return_lse), backend)
        if result is not None:
            return _returned(result, fusion, return_lse, return_weights)
    check_choice("return_weights", return_weights, WEIGHTS)
    if _any_nested(query, sources):
        from mmfast.fusion import packed

        if return_weights:
            raise ValueError("return_weights must be False for nested tensors, whose weights differ in shape")
        return packed.nested_attention(
            query,
            sources,
            fusion=fusion,
            scale=scale,
            is_causal=is_causal,
            dropout_p=dropout_p,
            softcap=softcap,
            return_lse=return_lse,
            backend=backend,
        )
    check_tensor("query", query, 4, "(B, H, L, D)")
    if query.shape[3] == 0:
        raise ValueError(f"query must have at least one feature, got {tuple(query.shape)}")
    scale, dropout_p, softcap = check_options(fusion, scale, dropout_p, softcap, query.shape[3])
    query, sources = prepare(query, sources, fusion)
    result = attend(
        query, sources, fusion, scale, bool(is_causal), dropout_p, softcap, return_weights, backend, bool(return_lse)
    )
    return _returned(result, fusion, return_lse, return_weights)


def _returned(result: Attention, fusion: str, lse: bool, weights: bool | str) -> Tensor | tuple:
    extra = ()
    if lse:
        extra += (result.lses[0] if fusion == "joint" else result.lses,)
    if weights:
        extra += (result.weights,)
    return (result.out, *extra) if extra else result.out


def _any_nested(query: object, sources: object) -> bool:
    if isinstance(query, Tensor) and query.is_nested:
        return True
    if not isinstance(sources, (list, tuple)):
        return False
    return any(
        isinstance(x, Tensor) and x.is_nested
        for source in sources
        for x in (source if isinstance(source, (list, tuple)) else (source,))
    )


def attend(
    query: Tensor,
    sources: list[Source],
    fusion: str,
    scale: float,
    is_causal: bool,
    dropout_p: float,
    softcap: float | None,
    weights: bool | str,
    backend: str | None,
    lse: bool = True,
) -> Attention:
    """Checked arguments to the engine that computes them, outside autocast.

    Weights are their means over the heads where ``weights`` is ``"mean"``; without ``lse`` there may be no lses.
    """
    engine = choose_engine(query.device, backend)
    if engine in _ENGINES:
        reason = _ENGINES[engine].can(query, sources, dropout_p, softcap, weights)
        if reason is not None:
            if backend is not None:
                raise ValueError(
                    f"backend {engine!r} has no cross-attention with {reason}; backend=None takes the reference"
                )
            engine = "reference"
        elif engine == "cpu" and _is_free(backend) and not _is_transformed():
            engine = routes.choose(query, sources, fusion, weights)

    def compute() -> Attention:
        if engine == "triton":
            return fused.attention(
                query, sources, fusion=fusion, scale=scale, is_causal=is_causal, lse=lse, weights=weights == "mean"
            )
        if engine == "cpu":
            return op.attention(query, sources, fusion=fusion, scale=scale, is_causal=is_causal, weights=weights)
        if engine == "torch":
            return streamed.attention(query, sources, fusion=fusion, scale=scale, is_causal=is_causal)
        return reference.attention(
            query,
            sources,
            fusion=fusion,
            scale=scale,
            is_causal=is_causal,
            dropout_p=dropout_p,
            softcap=softcap,
            weights=weights,
        )

    with _backend.without_autocast(query.device.type):
        result = compute()
        if engine in ("cpu", "torch") and (weights or result.out.requires_grad) and _is_far(sources, result.lses):
            engine = "reference"
            result = compute()
    return result


# A log-sum-exp beyond it has lost what probabilities of less than a part in 10 000 off need.
_FAR = 1024.0


def _is_far(sources: Sequence[Source], lses: Sequence[Tensor]) -> bool:
    """Whether masks add so much to all keys of a row (−1e9 where none may be seen) that the log-sum-exp, from which
    the kernels take probabilities again for weights and gradients, does not hold them. Not known of a traced one."""
    if all(x is None or x.dtype == torch.bool for s in sources for x in (s.mask, s.bias)):
        return False
    if not all(map(_backend.may_look, lses)):
        return False
    return any(bool((lse.isfinite() & (lse.abs() > _FAR)).any()) for lse in lses)


def choose_engine(device: torch.device, backend: str | None) -> str:
    """``"torch"``, or a backend of `_backend.choose`."""
    plain = not (_backend.is_differentiated_by_formula() or _is_transformed())
    if backend == "torch":
        return backend if plain else "reference"
    chosen = _backend.choose("fusion", device, backend)[0]
    return "torch" if _is_free(backend) and chosen == "reference" and plain else chosen


def _is_transformed() -> bool:
    """Inside `torch.func.vmap` and its like, for which flash attention, source by source, has no rule."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def _is_free(backend: str | None) -> bool:
    return backend is None and not os.environ.get("MMFAST_BACKEND")


def merge(outputs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    r"""What attention to all keys would give, from attentions to parts of them.

        L = log Σ_j exp L_j,    O = Σ_j exp(L_j − L) O_j

    Args:
        outputs: tensors ``(..., L, D_v)`` of one shape and dtype.
        lses: their log-sum-exps ``(..., L)``, natural logarithm; −inf for a part without keys.

    Returns:
        O in the dtype of ``outputs``, and L in float32, or float64 for float64. Where all L_j are −inf: 0 and −inf.

    Differentiable, twice, with respect to both.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.
    """
    for name, parts in (("outputs", outputs), ("lses", lses)):
        if not isinstance(parts, (list, tuple)) or not all(isinstance(x, Tensor) for x in parts):
            raise TypeError(f"{name} must be a list of tensors, got {type(parts).__name__}")
        if not parts:
            raise ValueError(f"{name} must hold at least one tensor, got none")
        for x in parts:
            if not x.dtype.is_floating_point:
                raise TypeError(f"{name} must be floating point tensors, got {x.dtype}")
            if x.device != outputs[0].device:
                raise ValueError(f"{name} must be on one device, {outputs[0].device}, got {x.device}")
    first = outputs[0]
    if len(outputs) != len(lses):
        raise ValueError(f"lses must be as many as outputs, {len(outputs)}, got {len(lses)}")
    for out, lse in zip(outputs, lses, strict=True):
        if out.dtype != first.dtype:
            raise TypeError(f"outputs must have one dtype, got {first.dtype} and {out.dtype}")
        if out.shape != first.shape or out.dim() < 1:
            raise ValueError(f"outputs must have one shape (..., D_v), got {tuple(first.shape)} and {tuple(out.shape)}")
        if lse.shape != first.shape[:-1]:
            raise ValueError(f"lses must be {tuple(first.shape[:-1])}, one for each output row, got {tuple(lse.shape)}")
    return reference.merge(outputs, lses)


def attention_pool(
    query: Tensor,
    sources: Sources | Source | tuple[Tensor, Tensor],
    *,
    query_lengths: Tensor | None = None,
    backend: str | None = None,
    **options,
) -> Tensor:
    r"""The mean of `cross_attention` over the queries, ``(B, H, D_v)``; its output before the mean is never whole.

        out_b = 1 / n_b Σ_{i < n_b} cross_attention(query, sources)_bi

    With one query it is attention pooling (Set Transformer's PMA, SigLIP's MAP head). Many queries go in blocks of 512,
    computed again for the gradient, so that memory does not grow with ``L`` beyond masks and gates.

    Args:
        query: ``(B, H, L, D)``.
        sources: as in `cross_attention`; not nested.
        query_lengths: ``(B,)`` integers n_b in ``[0, L]``; by default L. An item without queries gives 0.
        options: ``fusion``, ``scale``, ``is_causal``, ``dropout_p`` and ``softcap`` of `cross_attention`.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.
    """
    from mmfast.fusion import pooling

    return pooling.attention_pool(query, sources, query_lengths, backend, **options)


__all__ = ["Source", "attention_pool", "cross_attention", "merge"]
