"""torch.nn.MultiheadAttention on top of cross-attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmfast import _backend
from mmfast.fusion._inputs import Source, check_choice
from mmfast.fusion.attention import cross_attention
from mmfast.fusion.projection import linear, linear_parts


def _nan_rows(need_weights: bool) -> bool:
    """Whether this torch gives NaN, and not zero, to a query that may attend to nothing."""
    one = torch.ones(1, 1, 1, device="cpu")
    weight, bias = torch.ones(3, 1, device="cpu"), torch.zeros(3, device="cpu")
    nothing = torch.full((1, 1), -torch.inf, device="cpu")
    out, _ = F.multi_head_attention_forward(
        one, one, one, 1, 1, weight, bias, None, None, False, 0.0, weight[:1], bias[:1], training=False,
        need_weights=need_weights, attn_mask=nothing,
    )  # fmt: skip
    return bool(out.isnan().item())


with torch.no_grad():
    NAN_ROWS = {need_weights: _nan_rows(need_weights) for need_weights in (False, True)}


def _overrides(x: object) -> bool:
    """Whether ``x`` has torch functions of its own. A mode that watches them, as of a default device, is none."""
    return torch.overrides.has_torch_function((x,)) and (
        type(x).__torch_function__ is not torch._C._disabled_torch_function_impl
        and type(x) not in (Tensor, nn.Parameter)
    )


def _as_float(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -torch.inf)


class MultiheadAttention(nn.MultiheadAttention):
    r"""``torch.nn.MultiheadAttention``: the same arguments, parameters, ``state_dict``, results and error messages.

        softmax(Q Kᵀ / √(E / H) + masks) V,    Q = x_q W_q + b_q,  K = x_k W_k + b_k,  V = x_v W_v + b_v

    in H heads, and the output projection. Boolean masks say True where a key is *not* to be seen. The learned key and
    value of ``add_bias_kv`` and the zeros of ``add_zero_attn`` are sources of their own, read beside the others instead
    of appended to a copy. Inputs that do not fit are handed to torch, whose errors they raise, and so are nested
    tensors and self-attention at inference, for which torch has a path of its own (not with masks and
    ``masked_rows="zero"``, which it does not know).

    Args:
        embed_dim … dtype: as torch's.
        masked_rows: what a query gets that may attend to nothing: ``"torch"``, as the running torch has it (2.13: NaN
            with ``need_weights=True``, zero without), or ``"zero"``, a zero with a zero gradient before the output
            projection, and zero weights.
        backend: as in `mmfast.cross_attention`.

    Shapes: as torch's.

    Example:
        >>> attention = MultiheadAttention(512, 8, kdim=80, vdim=80, batch_first=True)
        >>> out, weights = attention(torch.randn(4, 448, 512), *(torch.randn(4, 1500, 80),) * 2)
    """

    def __init__(
        self,
        embed_dim,
        num_heads,
        dropout=0.0,
        bias=True,
        add_bias_kv=False,
        add_zero_attn=False,
        kdim=None,
        vdim=None,
        batch_first=False,
        device=None,
        dtype=None,
        *,
        masked_rows: str = "torch",
        backend: str | None = None,
    ) -> None:
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
        )
        check_choice("masked_rows", masked_rows, ("torch", "zero"))
        self.masked_rows, self.backend = masked_rows, backend

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Output and, with ``need_weights``, the weights, of all heads or averaged; as torch's."""
        if not self._fits(query, key, value, key_padding_mask, attn_mask, is_causal):
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        batched = query.dim() == 3
        q, k, v = self._project(query, key, value)
        # Torch takes the hint at its word only where nothing else needs the mask.
        causal = is_causal and key_padding_mask is None and not need_weights
        masks = [key_padding_mask, None if causal else attn_mask]
        alone = self.bias_k is None and not self.add_zero_attn
        as_nan = self.masked_rows == "torch" and NAN_ROWS[need_weights] and alone
        as_nan = as_nan and k.shape[2] > 0 and any(m is not None for m in masks)  # without keys torch gives zero
        options = {
            "is_causal": causal,
            "dropout_p": self.dropout if self.training else 0.0,
            "return_lse": as_nan,
            "return_weights": need_weights and ("mean" if average_attn_weights else True),
            "backend": self.backend,
        }
        # Only where a query may attend to nothing does it matter what is NaN.
        looks = as_nan and options["dropout_p"] == 0 and _backend.may_look(q)
        if looks:
            out, weights, lse = self._attend(q, k, v, masks, options)
            as_nan = bool((lse == -torch.inf).any())
        if as_nan:  # as torch, so that NaN passes to the gradients
            masks = [_as_float(m, q.dtype) for m in masks]
        if as_nan or not looks:
            out, weights, lse = self._attend(q, k, v, masks, options)
        if as_nan:
            factor = torch.where(lse == -torch.inf, torch.nan, 1.0).to(out.dtype)[..., None]
            out = out * factor
            if need_weights:
                weights = weights * (factor.mean(1) if average_attn_weights else factor)
        out = out.transpose(1, 2) if self.batch_first and batched else out.permute(2, 0, 1, 3)
        out = linear(out.flatten(2), self.out_proj.weight, self.out_proj.bias, backend=self.backend)
        if batched:
            return out, weights
        return out.squeeze(1), weights.squeeze(0) if need_weights else None

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, masks: list[Tensor | None], options: dict) -> tuple:
        """Output, weights and log-sum-exp; None for what is not asked for."""
        sources = [Source(k, v, *self._masks(q, *masks))]
        if self.bias_k is not None:
            heads = (1, self.num_heads, 1, self.head_dim)
            sources.append(Source(self.bias_k.view(heads).to(k.dtype), self.bias_v.view(heads).to(v.dtype)))
        if self.add_zero_attn:
            zeros = k.new_zeros(1, self.num_heads, 1, self.head_dim)
            sources.append(Source(zeros, zeros))
        result = cross_attention(q, sources, **options)
        if not isinstance(result, tuple):
            return result, None, None
        weights = None
        if options["return_weights"]:
            weights = result[-1][0] if len(sources) == 1 else torch.cat(result[-1], -1)
        return result[0], weights, result[1] if options["return_lse"] else None

    def _fits(self, query, key, value, key_padding_mask, attn_mask, is_causal) -> bool:
        """Whether these are inputs that torch accepts, and not for its path for self-attention at inference."""
        tensors = (query, key, value)
        masks = [m for m in (key_padding_mask, attn_mask) if m is not None]
        if any(map(_overrides, (*tensors, *masks))) or any(x.is_nested for x in tensors):
            return False
        if query is key and key is value and not self.training and (self.masked_rows == "torch" or not masks):
            return False
        dims = query.dim()
        if dims not in (2, 3) or key.dim() != dims or value.dim() != dims or len({x.dtype for x in tensors}) > 1:
            return False
        if query.shape[-1] != self.embed_dim or key.shape[-1] != self.kdim or value.shape[-1] != self.vdim:
            return False
        if key.shape[:-1] != value.shape[:-1] or not query.dtype.is_floating_point:
            return False
        if is_causal and (attn_mask is None or self.bias_k is not None or self.add_zero_attn):
            return False
        sequence = 1 if self.batch_first and dims == 3 else 0
        rows, keys = query.shape[sequence], key.shape[sequence]
        batch = query.shape[1 - sequence] if dims == 3 else 1
        if dims == 3 and key.shape[1 - sequence] != batch:
            return False
        if len({m.dtype for m in masks}) > 1 or any(m.dtype != torch.bool and m.dtype != query.dtype for m in masks):
            return False
        if key_padding_mask is not None and key_padding_mask.shape != ((batch, keys) if dims == 3 else (keys,)):
            return False
        return attn_mask is None or attn_mask.shape in ((rows, keys), (batch * self.num_heads, rows, keys))

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values ``(N, H, L, E / H)``, as views of what comes out of the products."""
        e, bias, by = self.embed_dim, self.in_proj_bias, {"backend": self.backend}
        if self._qkv_same_embed_dim and key is value:  # one product for both
            if query is key:
                q, k, v = linear_parts(query, self.in_proj_weight, bias, 3, **by)
            else:
                # Split, since gradients of slices are filled up with zeros and added.
                of_q, of_kv = self.in_proj_weight.split((e, 2 * e))
                by_q, by_kv = (None, None) if bias is None else bias.split((e, 2 * e))
                q = linear(query, of_q, by_q, **by)
                k, v = linear_parts(key, of_kv, by_kv, 2, **by)
        else:
            if self._qkv_same_embed_dim:
                weights = self.in_proj_weight.chunk(3)
            else:
                weights = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
            biases = (None,) * 3 if bias is None else bias.chunk(3)
            inputs = zip((query, key, value), weights, biases, strict=True)
            q, k, v = (linear(*each, **by) for each in inputs)

        def in_heads(x: Tensor) -> Tensor:
            x = x.unflatten(-1, (self.num_heads, self.head_dim))
            if x.dim() == 3:  # (L, H, D)
                return x.transpose(0, 1).unsqueeze(0)
            return x.transpose(1, 2) if self.batch_first else x.permute(1, 2, 0, 3)

        return in_heads(q), in_heads(k), in_heads(v)

    def _masks(self, q: Tensor, padding: Tensor | None, mask: Tensor | None) -> tuple:
        """``mask``, ``lengths`` and ``bias`` of a `Source`."""
        if padding is not None:
            padding = padding.view(q.shape[0], 1, 1, padding.shape[-1])
        if mask is not None:
            mask = mask[None, None] if mask.dim() == 2 else mask.unflatten(0, (q.shape[0], self.num_heads))
        if mask is None or padding is None:
            one = padding if mask is None else mask
            return (~one if one is not None and one.dtype == torch.bool else one,)
        return (~(mask | padding),) if mask.dtype == torch.bool else (mask, None, padding)
