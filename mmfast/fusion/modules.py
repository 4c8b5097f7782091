"""The fusion slice as modules."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmfast.fusion._inputs import (
    FUSIONS,
    Source,
    check_choice,
    check_lengths,
    check_number,
    check_positive,
    compute_dtype,
)
from mmfast.fusion.attention import attention_pool, cross_attention
from mmfast.fusion.multihead import MultiheadAttention
from mmfast.fusion.projection import project, project_parts

__all__ = ["CrossAttentionFusion", "MultiheadAttention", "TemporalPooling", "WeightedFusion"]

GATES = (None, "tanh", "sigmoid", "per_head")
NORMS = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}


class CrossAttentionFusion(nn.Module):
    r"""A sequence attends to several other modalities: projections, attention, gate, residual and norm.

        y = x + W_o [ gate · attention(W_q n(x), {W_k,j z_j, W_v,j z_j}) ]

    with n the norm (or around the sum, for ``norm="post"``), and the attention of `mmfast.cross_attention`.

    Args:
        embed_dim: features E of the sequence that attends.
        num_heads: H.
        source_dims: features of each source.
        fusion: ``"joint"``: one softmax over all sources. ``"decoupled"``: one each, added.
        gate: factor of the attention: of each source if decoupled, else one for all.
            ``None``: 1. ``"tanh"``: tanh(α), α learned from 0, so that training starts from the identity (Flamingo,
            Alayrac et al. 2022). ``"per_head"``: α_h, learned from 1. ``"sigmoid"``: 2 σ(W n(x) + b) for each query and
            head, learned from 1 (LTX-2).
        qk_norm: ``None``, ``"layer"`` or ``"rms"``: norm of queries and keys in each head.
        norm: ``"pre"``, ``"post"`` or ``None``: layer norm of the sequence, or of the sum.
        residual: add the sequence.
        pool: ``None``; ``"mean"``: the mean over the sequence, whose output is not written (`attention_pool`);
            ``"attention"``: a learned query attends to the output, in H heads.
        num_kv_heads: heads of keys and values, which divide H; default H.
        head_dim: default E / H.
        dropout: of the attention weights, in training.
        bias: in all projections.
        backend: as in `mmfast.cross_attention`.
        device, dtype: of the parameters.

    Shapes: query ``(B, L, E)``, sources ``(B, S_j, source_dims[j])`` → ``(B, L, E)``, or ``(B, E)`` with a pool.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.

    Example:
        >>> fusion = CrossAttentionFusion(512, 8, [768, 80], fusion="decoupled", gate="tanh")
        >>> text, audio = torch.randn(4, 77, 768), torch.randn(4, 1500, 80)
        >>> fusion(torch.randn(4, 64, 512), [text, audio], lengths=[None, torch.tensor([1500, 9, 0, 700])]).shape
        torch.Size([4, 64, 512])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        source_dims: Sequence[int],
        *,
        fusion: str = "joint",
        gate: str | None = None,
        qk_norm: str | None = None,
        norm: str | None = "pre",
        residual: bool = True,
        pool: str | None = None,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        dropout: float = 0.0,
        bias: bool = True,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        embed_dim, num_heads, num_kv_heads, head_dim, source_dims = _check_sizes(
            embed_dim, num_heads, num_kv_heads, head_dim, source_dims, pool
        )
        check_choice("fusion", fusion, FUSIONS)
        check_choice("gate", gate, GATES)
        check_choice("qk_norm", qk_norm, (None, *NORMS))
        check_choice("norm", norm, (None, "pre", "post"))
        check_choice("pool", pool, (None, "mean", "attention"))
        dropout = check_number("dropout", dropout)
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout must lie in [0, 1], got {dropout}")
        self.embed_dim, self.num_heads, self.num_kv_heads = embed_dim, num_heads, num_kv_heads
        self.head_dim = embed_dim // num_heads if head_dim is None else head_dim
        self.source_dims, self.fusion, self.gate_kind = source_dims, fusion, gate
        self.residual, self.pool, self.dropout, self.backend = residual, pool, dropout, backend
        kw = {"device": device, "dtype": dtype}
        inner, count = num_heads * self.head_dim, len(self.source_dims)
        self.q_proj = nn.Linear(embed_dim, inner, bias, **kw)
        width = 2 * num_kv_heads * self.head_dim  # keys and values by one product
        self.kv_proj = nn.ModuleList(nn.Linear(dim, width, bias, **kw) for dim in self.source_dims)
        self.out_proj = nn.Linear(inner, embed_dim, bias, **kw)
        self.pre_norm = nn.LayerNorm(embed_dim, **kw) if norm == "pre" else None
        self.post_norm = nn.LayerNorm(embed_dim, **kw) if norm == "post" else None
        make = NORMS.get(qk_norm)
        self.q_norm = make(self.head_dim, **kw) if make else None
        self.k_norm = nn.ModuleList(make(self.head_dim, **kw) for _ in self.source_dims) if make else None
        gates = count if fusion == "decoupled" else 1
        self.gate = self.gate_proj = None
        if gate == "sigmoid":
            self.gate_proj = nn.Linear(embed_dim, gates * num_heads, **kw)
        elif gate is not None:
            self.gate = nn.Parameter(torch.empty(gates if gate == "tanh" else (gates, num_heads), **kw))
        self.probe = None
        if pool == "attention":
            self.probe = nn.Parameter(torch.empty(1, num_heads, 1, embed_dim // num_heads, **kw))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier's weights, zero biases, gates that start as the class says."""
        for linear in (self.q_proj, self.out_proj, *self.kv_proj):
            nn.init.xavier_uniform_(linear.weight)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        if self.gate_proj is not None:
            nn.init.zeros_(self.gate_proj.weight)
            nn.init.zeros_(self.gate_proj.bias)
        if self.gate is not None:
            nn.init.constant_(self.gate, 0.0 if self.gate_kind == "tanh" else 1.0)
        if self.probe is not None:
            nn.init.normal_(self.probe, std=self.probe.shape[3] ** -0.5)

    def forward(
        self,
        query: Tensor,
        sources: Sequence[Tensor],
        *,
        masks: Sequence[Tensor | None] | None = None,
        lengths: Sequence[Tensor | None] | None = None,
        query_lengths: Tensor | None = None,
        return_weights: bool | str = False,
    ) -> Tensor | tuple[Tensor, tuple[Tensor, ...]]:
        """The fused sequence, or what is pooled from it.

        Args:
            query: ``(B, L, E)``.
            sources: ``(B, S_j, source_dims[j])`` each; batch 1 is shared by all.
            masks, lengths: for each source what a `Source` takes, or None.
            query_lengths: ``(B,)``: how many elements of the sequence a pool is to take, whatever the others hold; only
                with a pool.
            return_weights: as in `mmfast.cross_attention`: a pair with the weights is returned. Not with
                ``pool="mean"``, which does not have them.
        """
        self._check(query, sources, masks, lengths, query_lengths, return_weights)
        if query_lengths is not None:
            query_lengths = check_lengths("query_lengths", query_lengths, query.device, *query.shape[:2])
            query = torch.where(_exists(query_lengths, query), query, 0.0)
        x = query if self.pre_norm is None else self.pre_norm(query)
        q = self._in_heads(project(self.q_proj, x, backend=self.backend), self.q_norm)
        gates = self._gates(x)
        given = []
        for j, z in enumerate(sources):
            k, v = project_parts(self.kv_proj[j], z, 2, backend=self.backend)
            k = self._in_heads(k, None if self.k_norm is None else self.k_norm[j])
            source = Source(k, self._in_heads(v), None if masks is None else masks[j])
            source = source._replace(lengths=None if lengths is None else lengths[j])
            given.append(source._replace(gate=gates[j]) if self.fusion == "decoupled" else source)
        options = {
            "fusion": self.fusion,
            "dropout_p": self.dropout if self.training else 0.0,
            "backend": self.backend,
        }
        whole = gates[0] if self.fusion == "joint" else None  # factor of it all
        if self.pool == "mean" and (whole is None or whole.shape[2] == 1):
            out = attention_pool(q, given, query_lengths=query_lengths, **options)[:, :, None]
            out = (out if whole is None else out * whole.to(out.dtype)).transpose(1, 2).flatten(2)
            return self._finish(_mean(query, query_lengths) if self.residual else None, out[:, 0])
        result = cross_attention(q, given, return_weights=return_weights, **options)
        out, weights = result if return_weights else (result, None)
        out = (out if whole is None else out * whole.to(out.dtype)).transpose(1, 2).flatten(2)
        if self.pool == "mean":
            residual = _mean(query, query_lengths) if self.residual else None
            return self._finish(residual, _mean(out, query_lengths))
        y = self._finish(query if self.residual else None, out)
        if self.pool == "attention":
            heads = y.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            probed = Source(heads, heads, lengths=query_lengths)
            y = cross_attention(self.probe.to(y.dtype), probed, backend=self.backend)[:, :, 0].flatten(1)
        return (y, weights) if return_weights else y

    def _in_heads(self, x: Tensor, norm: nn.Module | None = None) -> Tensor:
        x = x.unflatten(2, (-1, self.head_dim))
        return (x if norm is None else norm(x).to(x.dtype)).transpose(1, 2)

    def _gates(self, x: Tensor) -> list[Tensor | None]:
        """For each softmax a factor in 4 dimensions, or None."""
        if self.gate_proj is not None:
            gates = 2 * project(self.gate_proj, x, backend=self.backend).sigmoid()
            return list(gates.unflatten(2, (-1, self.num_heads)).permute(2, 0, 3, 1)[..., None])
        if self.gate is None:
            return [None] * len(self.source_dims)
        gates = self.gate.tanh() if self.gate_kind == "tanh" else self.gate
        return [g.view(1, -1, 1, 1) for g in gates]

    def _finish(self, residual: Tensor | None, attended: Tensor) -> Tensor:
        y = project(self.out_proj, attended, backend=self.backend)
        y = y if residual is None else residual + y
        return y if self.post_norm is None else self.post_norm(y)

    def _check(self, query, sources, masks, lengths, query_lengths, return_weights) -> None:
        if not isinstance(query, Tensor) or query.dim() != 3 or query.shape[2] != self.embed_dim:
            got = tuple(query.shape) if isinstance(query, Tensor) else type(query).__name__
            raise ValueError(f"query must be (B, L, {self.embed_dim}), got {got}")
        for name, parts in (("sources", sources), ("masks", masks), ("lengths", lengths)):
            if parts is None and name != "sources":
                continue
            if not isinstance(parts, (list, tuple)) or len(parts) != len(self.source_dims):
                got = len(parts) if isinstance(parts, (list, tuple)) else type(parts).__name__
                raise ValueError(f"{name} must be a list of {len(self.source_dims)}, one for each source, got {got}")
        for j, (z, dim) in enumerate(zip(sources, self.source_dims, strict=True)):
            if not isinstance(z, Tensor) or z.dim() != 3 or z.shape[2] != dim:
                got = tuple(z.shape) if isinstance(z, Tensor) else type(z).__name__
                raise ValueError(f"sources[{j}] must be (B, S, {dim}), got {got}")
        if query_lengths is not None and self.pool is None:
            raise ValueError("query_lengths needs a pool: every query has an output of its own, got pool=None")
        if return_weights and self.pool == "mean":
            raise ValueError("return_weights must be False with pool='mean', which does not write them")

    def extra_repr(self) -> str:
        return (
            f"{self.embed_dim}, {self.num_heads}, {list(self.source_dims)}, fusion={self.fusion!r}, "
            f"gate={self.gate_kind!r}, pool={self.pool!r}"
        )


def _check_sizes(embed_dim, num_heads, num_kv_heads, head_dim, source_dims, pool) -> tuple:
    """All but the last, as Python's integers."""
    embed_dim = check_positive("embed_dim", embed_dim)
    num_heads = check_positive("num_heads", num_heads)
    num_kv_heads = check_positive("num_kv_heads", num_kv_heads)
    if (head_dim is None or pool == "attention") and embed_dim % num_heads:
        raise ValueError(f"embed_dim must be divisible by num_heads={num_heads}, got {embed_dim}")
    if head_dim is not None:
        head_dim = check_positive("head_dim", head_dim, ", or None")
    if num_heads % num_kv_heads:
        raise ValueError(f"num_kv_heads must divide num_heads={num_heads}, got {num_kv_heads}")
    if not isinstance(source_dims, (list, tuple)) or not source_dims:
        raise ValueError(f"source_dims must be a list with the features of each source, got {source_dims!r}")
    source_dims = tuple(check_positive(f"source_dims[{j}]", dim) for j, dim in enumerate(source_dims))
    return embed_dim, num_heads, num_kv_heads, head_dim, source_dims


def _check_floating(name: str, x: object, or_complex: bool = False) -> None:
    if not isinstance(x, Tensor) or not (x.dtype.is_floating_point or (or_complex and x.dtype.is_complex)):
        raise TypeError(f"{name} must be a floating point tensor, got {getattr(x, 'dtype', type(x).__name__)}")


def _exists(lengths: Tensor, x: Tensor) -> Tensor:
    """``(B, T, 1)``: which elements of ``(B, T, C)`` there are."""
    return (torch.arange(x.shape[1], device=x.device) < lengths[:, None])[..., None]


def _mean(x: Tensor, lengths: Tensor | None) -> Tensor:
    """Over the elements that exist, ``(B, T, C)`` → ``(B, C)``; 0 where there are none."""
    dtype = compute_dtype(x.dtype)  # half precision holds neither the sum nor every count
    if lengths is None:
        return (x.sum(1, dtype=dtype) / max(x.shape[1], 1)).to(x.dtype)
    total = torch.where(_exists(lengths, x), x, 0.0).sum(1, dtype=dtype)
    return (total / lengths.clamp(min=1)[:, None]).to(x.dtype)


class WeightedFusion(nn.Module):
    r"""Σ_k α_k f_k of features of one shape, with learned weights that sum to 1.

        "softmax"   α = softmax(w)
        "relu"      α_k = max(w_k, 0) / (Σ_j max(w_j, 0) + 1e-4)      (fast normalised fusion, Tan et al. 2020)

    Args:
        num_inputs: n.
        embed_dim: with it, each feature has weights of its own; by default all features share them.
        normalize: ``"softmax"`` or ``"relu"``. All weights start equal.
        device, dtype: of ``weight``, ``(n,)`` or ``(n, embed_dim)``.

    Shapes: n tensors ``(..., C)`` that broadcast to one shape → that shape.

    Raises:
        ValueError: naming the argument that does not fit.
    """

    def __init__(
        self,
        num_inputs: int,
        embed_dim: int | None = None,
        *,
        normalize: str = "softmax",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_inputs = check_positive("num_inputs", num_inputs)
        embed_dim = None if embed_dim is None else check_positive("embed_dim", embed_dim, ", or None")
        check_choice("normalize", normalize, ("softmax", "relu"))
        self.num_inputs, self.embed_dim, self.normalize = num_inputs, embed_dim, normalize
        shape = (num_inputs,) if embed_dim is None else (num_inputs, embed_dim)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Equal weights."""
        nn.init.constant_(self.weight, 0.0 if self.normalize == "softmax" else 1.0)

    def forward(self, inputs: Sequence[Tensor], present: Tensor | None = None) -> Tensor:
        """The weighted sum.

        Args:
            inputs: n tensors.
            present: ``(B, n)`` boolean: which modalities an item has. The others have no weight, whatever they hold,
                and those that it has sum to 1; an item that has none gives 0.
        """
        if not isinstance(inputs, (list, tuple)) or len(inputs) != self.num_inputs:
            got = len(inputs) if isinstance(inputs, (list, tuple)) else type(inputs).__name__
            raise ValueError(f"inputs must be a list of {self.num_inputs} tensors, got {got}")
        for i, x in enumerate(inputs):
            _check_floating(f"inputs[{i}]", x, or_complex=True)
        try:
            inputs = torch.broadcast_tensors(*inputs)
        except RuntimeError as error:
            shapes = ", ".join(str(tuple(x.shape)) for x in inputs)
            raise ValueError(f"inputs must broadcast to one shape, got {shapes}") from error
        if self.embed_dim is not None and inputs[0].shape[-1:] != (self.embed_dim,):
            raise ValueError(f"inputs must have {self.embed_dim} features, got {tuple(inputs[0].shape)}")
        weight = self.weight
        if present is not None:
            if not isinstance(present, Tensor) or present.dtype != torch.bool:
                raise TypeError(f"present must be a boolean tensor, got {getattr(present, 'dtype', type(present))}")
            expected = (*inputs[0].shape[:1], self.num_inputs)
            if inputs[0].dim() == 0 or present.shape != expected:
                raise ValueError(f"present must be {expected}, got {tuple(present.shape)}")
            present = present if self.embed_dim is None else present[..., None]
        axis = 0 if present is None else 1
        if self.normalize == "softmax":
            lowest = torch.finfo(weight.dtype).min
            alpha = (weight if present is None else torch.where(present, weight, lowest)).softmax(axis)
        else:
            alpha = weight.relu() if present is None else weight.relu() * present
            alpha = alpha / (alpha.sum(axis, keepdim=True) + 1e-4)
        out = 0
        for k, x in enumerate(inputs):
            a = alpha.select(axis, k)
            if present is not None:
                here = present.select(1, k)
                spread = (-1,) + (1,) * (x.dim() - a.dim()) + tuple(a.shape[1:])
                a = a.view(spread)
                x = torch.where(here.view((-1,) + (1,) * (x.dim() - 1)), x, 0.0)
            out = out + a.to(x.dtype) * x
        return out

    def extra_repr(self) -> str:
        return f"{self.num_inputs}, embed_dim={self.embed_dim}, normalize={self.normalize!r}"


POOLS = ("mean", "max", "std", "attentive")


class TemporalPooling(nn.Module):
    r"""A sequence ``(B, T, C)`` as one vector ``(B, C)`` for each statistic, side by side.

        "mean"        μ = 1/n Σ_t x_t
        "max"         max_t x_t
        "std"         √(1/n Σ_t (x_t − μ)² + ε)              (statistics pooling, Snyder et al. 2018)
        "attentive"   Σ_t a_t x_t,  a = softmax_t(vᵀ tanh(W x_t + b))      (self-attentive pooling, Okabe et al. 2018)

    Args:
        statistics: one or several of these, in the order of the output: ``("mean", "std")`` gives ``(B, 2 C)``.
        embed_dim: C, for ``"attentive"``.
        hidden_dim: rows of W; default C.
        eps: ε.
        device, dtype: of W, b and v.

    Only the first ``lengths`` elements of an item exist; what lies beyond does not matter. An item without any gives 0.
    Sums of half precision are taken in float32.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.
    """

    def __init__(
        self,
        statistics: str | Sequence[str] = "mean",
        embed_dim: int | None = None,
        *,
        hidden_dim: int | None = None,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        statistics = (statistics,) if isinstance(statistics, str) else statistics
        if not isinstance(statistics, (list, tuple)):
            raise TypeError(f"statistics must be a name or a list of them, got {type(statistics).__name__}")
        statistics, eps = tuple(statistics), check_number("eps", eps)
        if not statistics:
            raise ValueError(f"statistics must name at least one of {', '.join(map(repr, POOLS))}, got none")
        for name in statistics:
            check_choice("statistics", name, POOLS)
        self.statistics, self.eps = statistics, eps
        self.score = None
        if "attentive" in statistics:
            embed_dim = check_positive("embed_dim", embed_dim, " for 'attentive'")
            hidden = embed_dim if hidden_dim is None else check_positive("hidden_dim", hidden_dim, ", or None")
            kw = {"device": device, "dtype": dtype}
            # Without a bias: the softmax does not see it.
            self.score = nn.Sequential(
                nn.Linear(embed_dim, hidden, **kw), nn.Tanh(), nn.Linear(hidden, 1, bias=False, **kw)
            )

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """``(B, T, C)`` and ``(B,)`` → ``(B, len(statistics) · C)``."""
        if not isinstance(x, Tensor) or x.dim() != 3:
            raise ValueError(f"x must be (B, T, C), got {tuple(getattr(x, 'shape', ()))}")
        _check_floating("x", x)
        count, exists, dtype = max(x.shape[1], 1), None, compute_dtype(x.dtype)
        if lengths is not None:
            lengths = check_lengths("lengths", lengths, x.device, x.shape[0], x.shape[1])
            exists = _exists(lengths, x)
            count = lengths.clamp(min=1)[:, None]
            x = torch.where(exists, x, 0.0)
        mean = x.sum(1, dtype=dtype) / count if {"mean", "std"} & set(self.statistics) else None
        parts = [self._statistic(name, x, exists, lengths, count, mean) for name in self.statistics]
        return torch.cat([part.to(x.dtype) for part in parts], 1)

    def _statistic(self, name, x, exists, lengths, count, mean) -> Tensor:
        if name == "mean":
            return mean
        if x.shape[1] == 0:
            return x.new_zeros(x.shape[0], x.shape[2])
        if name == "max":
            if exists is None:
                return x.amax(1)
            return torch.where((lengths > 0)[:, None], torch.where(exists, x, -torch.inf).amax(1), 0.0)
        if name == "std":
            squares = (x - mean[:, None]).square()
            if exists is None:
                return (squares.sum(1) / count + self.eps).sqrt()
            some = (lengths > 0)[:, None]
            return torch.where(some, (torch.where(exists, squares, 0.0).sum(1) / count + self.eps).sqrt(), 0.0)
        scores = self.score(x)
        if exists is not None:
            scores = torch.where(exists, scores, torch.finfo(scores.dtype).min)
        return (scores.softmax(1, dtype=compute_dtype(x.dtype)) * x).sum(1)

    def extra_repr(self) -> str:
        return ", ".join(map(repr, self.statistics))
