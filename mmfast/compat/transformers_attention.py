"""``attn_implementation="mmfast"`` for the models of Hugging Face transformers that let attention be chosen.

Importing this module registers it, with the masks of ``"sdpa"``:

    import mmfast.compat.transformers_attention
    model = AutoModel.from_pretrained(..., attn_implementation="mmfast")  # or model.set_attn_implementation("mmfast")

Results are those of ``"sdpa"``, for dynamic and static caches, grouped heads and beams alike. What that refuses is
computed too: ``softcap``, and attention weights where a model passes on ``output_attentions=True``. Attention sinks and
the cache of continuous batching are refused.

The choice reaches the vision model, the Q-Former and the language model of BLIP-2, encoder and decoder of Whisper and
T5, and the vision and language models of Mllama, its cross-attention included. Layers that never ask for an
implementation: those of Perceiver, which `replace_perceiver_attention` exchanges, and pooling heads that hold a
``torch.nn.MultiheadAttention`` (SigLIP's), whose place `mmfast.nn.MultiheadAttention` takes. Compared with
transformers 5.23.
"""

from __future__ import annotations

import torch

from mmfast.fusion import Source, cross_attention

try:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask
    from transformers.models.perceiver import modeling_perceiver
except ImportError as error:
    raise ImportError(
        "mmfast.compat.transformers_attention needs the package transformers: pip install transformers"
    ) from error

__all__ = ["PerceiverSelfAttention", "attention_forward", "register", "replace_perceiver_attention"]


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
    rows = query.shape[2]
    is_causal = bool(is_causal) and attention_mask is None and rows > 1
    if is_causal and key.shape[2] > rows:  # the first rows of a static cache; no row sees the rest
        key, value = key[:, :, :rows], value[:, :, :rows]
        position_bias = None if position_bias is None else position_bias[..., :rows]
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


class PerceiverSelfAttention(modeling_perceiver.PerceiverSelfAttention):
    """transformers' layer of that name, for latents and for inputs, with the attention of `mmfast.cross_attention`.

    The same parameters and results; a query that may attend to nothing gives the mean of the values, as there.
    """

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        inputs: torch.Tensor | None = None,
        inputs_mask: torch.Tensor | None = None,
        output_attentions: bool | None = False,
    ) -> tuple[torch.Tensor, ...]:
        """``(B, L, C)`` → ``(B, L, v_channels)``, and with ``output_attentions`` the weights ``(B, H, L, S)``."""
        x = self.layernorm1(hidden_states)
        context, mask = (x, attention_mask) if inputs is None else (self.layernorm2(inputs), inputs_mask)
        query = self.transpose_for_scores(self.query(x), self.qk_channels_per_head)
        key = self.transpose_for_scores(self.key(context), self.qk_channels_per_head)
        value = self.transpose_for_scores(self.value(context), self.v_channels_per_head)
        result = cross_attention(
            query,
            [Source(key, value, mask=mask)],
            dropout_p=self.dropout.p if self.training else 0.0,
            return_weights=bool(output_attentions),
        )
        out, weights = (result[0], result[1]) if output_attentions else (result, ())
        return out.transpose(1, 2).flatten(2), *weights


def replace_perceiver_attention(model: torch.nn.Module) -> list[str]:
    """Gives the attention layers of Perceivers in ``model`` the class `PerceiverSelfAttention`, in place.

    Returns:
        The names of the layers changed.
    """
    changed = []
    for name, module in model.named_modules():
        if type(module) is modeling_perceiver.PerceiverSelfAttention:
            module.__class__ = PerceiverSelfAttention
            changed.append(name)
    return changed


def register(name: str = "mmfast") -> None:
    """Make ``attn_implementation=name`` mean this attention."""
    AttentionInterface.register(name, attention_forward)
    AttentionMaskInterface.register(name, sdpa_mask)


register()
