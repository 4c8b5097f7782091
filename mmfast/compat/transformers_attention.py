"""``attn_implementation="mmfast"`` for the models of Hugging Face transformers that let attention be chosen.

Importing this module registers it, with the masks of ``"sdpa"``:

    import mmfast.compat.transformers_attention
    model = AutoModel.from_pretrained(..., attn_implementation="mmfast")  # or model.set_attn_implementation("mmfast")

Results are those of ``"sdpa"``. What that refuses is computed too: ``softcap``, and attention weights where a model
passes on ``output_attentions=True``. Models with attention of their own (Perceiver, say) do not ask for an
implementation, and attention sinks and the cache of continuous batching are refused. Compared with transformers 5.23.
"""

from __future__ import annotations

import torch

from mmfast.fusion import Source, cross_attention

try:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask
except ImportError as error:
    raise ImportError(
        "mmfast.compat.transformers_attention needs the package transformers: pip install transformers"
    ) from error

__all__ = ["attention_forward", "register"]


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: torch.Tensor | None = None,
    cache: object = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    output_attentions: bool = False,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention as transformers' models call it.

    Args:
        module: the attention layer; its ``is_causal`` counts where the argument is None.
        query: ``(B, H, L, D)``.
        key, value: ``(B, H_kv, S, D)``, not repeated for the heads that share them.
        attention_mask: boolean, True where a query may attend, or floating point, added; with it ``is_causal`` is off.
        dropout, scaling, softcap: as in `mmfast.cross_attention`.
        position_bias: added to the scores.
        output_attentions: return the weights.

    Returns:
        ``(B, L, H, D)``, contiguous, and the weights ``(B, H, L, S)`` or None.

    Raises:
        ValueError: for a paged cache or attention sinks.
    """
    if cache is not None:
        raise ValueError("cache must be None: attn_implementation='mmfast' has no continuous batching")
    if s_aux is not None:
        raise ValueError("s_aux must be None: attn_implementation='mmfast' has no attention sinks")
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    # A single query is the last one, and sees all.
    is_causal = bool(is_causal) and attention_mask is None and query.shape[2] > 1
    result = cross_attention(
        query,
        [Source(key, value, mask=attention_mask, bias=position_bias)],
        scale=scaling,
        is_causal=is_causal,
        dropout_p=dropout,
        softcap=softcap,
        return_weights=bool(output_attentions),
    )
    out, weights = (result[0], result[1][0]) if output_attentions else (result, None)
    return out.transpose(1, 2).contiguous(), weights


def register(name: str = "mmfast") -> None:
    """Make ``attn_implementation=name`` mean this attention."""
    AttentionInterface.register(name, attention_forward)
    AttentionMaskInterface.register(name, sdpa_mask)


register()
