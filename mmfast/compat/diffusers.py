"""Attention processors of Hugging Face diffusers: the same names, arguments, parameters and results.

    from mmfast.compat.diffusers import replace_processors
    replace_processors(pipeline.unet)  # or transformer; again after load_ip_adapter, which brings diffusers' own

The text and all images of IP-Adapters are attended to in one call, ``fusion="decoupled"``, with the adapters' scales
and masks as gates. Each class is a subclass of diffusers' own, so that a pipeline's ``set_ip_adapter_scale`` and
``unload_ip_adapter`` find it. Sums over adapters are rounded once, in half precision a little closer to float64 than
diffusers'. Models that call ``dispatch_attention_fn`` (Flux, Wan, LTX) choose a backend of diffusers instead, and have
no processor here. Compared with diffusers 0.42.
"""

from __future__ import annotations

import torch

from mmfast.fusion import Source, cross_attention

try:
    from diffusers.image_processor import IPAdapterMaskProcessor
    from diffusers.models import attention_processor as theirs
except ImportError as error:
    raise ImportError("mmfast.compat.diffusers needs the package diffusers: pip install diffusers") from error

__all__ = ["AttnProcessor2_0", "IPAdapterAttnProcessor2_0", "JointAttnProcessor2_0", "replace_processors"]


def _heads(attn: theirs.Attention, x: torch.Tensor) -> torch.Tensor:
    """``(B, L, H D)`` → ``(B, H, L, D)``."""
    return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)


def _flat(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2).flatten(2)


class _Block:
    """What surrounds attention in a UNet: spatial norm, image to sequence, group norm; and all the way back."""

    def __init__(self, attn: theirs.Attention, x: torch.Tensor, temb: torch.Tensor | None) -> None:
        self.attn, self.residual = attn, x
        if attn.spatial_norm is not None:
            x = attn.spatial_norm(x, temb)
        self.shape = x.shape
        if x.dim() == 4:
            x = x.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            x = attn.group_norm(x.transpose(1, 2)).transpose(1, 2)
        self.x = x

    def context(self, given: torch.Tensor | None) -> torch.Tensor:
        """What keys and values are made of."""
        if given is None:
            return self.x
        return self.attn.norm_encoder_hidden_states(given) if self.attn.norm_cross else given

    def mask(self, given: torch.Tensor | None, context: torch.Tensor) -> torch.Tensor | None:
        """``(B, H, 1 or L, S)``, to be added."""
        if given is None:
            return None
        batch, length = context.shape[:2]
        mask = self.attn.prepare_attention_mask(given, length, batch)
        return mask.view(batch, self.attn.heads, -1, mask.shape[-1])

    def leave(self, attended: torch.Tensor) -> torch.Tensor:
        """Output projection, dropout, residual."""
        y = _flat(attended)
        for layer in self.attn.to_out:
            y = layer(y)
        if len(self.shape) == 4:
            y = y.transpose(1, 2).reshape(self.shape)
        if self.attn.residual_connection:
            y = y + self.residual
        return y / self.attn.rescale_output_factor


def _query(attn: theirs.Attention, x: torch.Tensor) -> torch.Tensor:
    query = _heads(attn, attn.to_q(x))
    return query if attn.norm_q is None else attn.norm_q(query)


class AttnProcessor2_0(theirs.AttnProcessor2_0):
    """``diffusers.models.attention_processor.AttnProcessor2_0``: self-attention and cross-attention of a UNet."""

    def __call__(
        self,
        attn: theirs.Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
        *args,
        **kwargs,
    ) -> torch.Tensor:
        """``(B, L, C)`` or ``(B, C, height, width)`` → that shape; ``encoder_hidden_states`` is ``(B, S, C_enc)``."""
        block = _Block(attn, hidden_states, temb)
        context = block.context(encoder_hidden_states)
        key = _heads(attn, attn.to_k(context))
        key = key if attn.norm_k is None else attn.norm_k(key)
        source = Source(key, _heads(attn, attn.to_v(context)), mask=block.mask(attention_mask, context))
        return block.leave(cross_attention(_query(attn, block.x), [source]))


class IPAdapterAttnProcessor2_0(theirs.IPAdapterAttnProcessor2_0):
    """``diffusers.models.attention_processor.IPAdapterAttnProcessor2_0``: text, and images beside it.

        attention(q, text) + Σ_a scale_a · mask_a · attention(q, image_a)

    Args:
        hidden_size, cross_attention_dim, num_tokens, scale: as diffusers'. A scale may be a number, a list with one for
            each masked image, or a tensor ``()``, which gets its gradient.
    """

    def __call__(
        self,
        attn: theirs.Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | tuple | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
        scale: float = 1.0,
        ip_adapter_masks: torch.Tensor | list | None = None,
    ) -> torch.Tensor:
        """As diffusers'; ``encoder_hidden_states`` is a pair of the text and a list with ``(B, images, tokens, C)``.

        Raises:
            ValueError: no ``encoder_hidden_states``, masks that do not fit, or scales in a list without masks.
        """
        if encoder_hidden_states is None:
            raise ValueError("encoder_hidden_states must be a pair (text, images), got None: an IP-Adapter needs both")
        if isinstance(encoder_hidden_states, tuple):
            text, images = encoder_hidden_states
        else:  # as diffusers still takes them: the images' tokens after the text's
            end = encoder_hidden_states.shape[1] - self.num_tokens[0]
            text, images = encoder_hidden_states[:, :end], [encoder_hidden_states[:, end:]]
        block = _Block(attn, hidden_states, temb)
        context = block.context(text)
        # Unlike AttnProcessor2_0, diffusers' has no norms of queries and keys here.
        query = _heads(attn, attn.to_q(block.x))
        key, value = _heads(attn, attn.to_k(context)), _heads(attn, attn.to_v(context))
        sources = [Source(key, value, mask=block.mask(attention_mask, context))]
        masks = self._masks(ip_adapter_masks, images)
        parts = zip(images, self.scale, self.to_k_ip, self.to_v_ip, masks, strict=False)
        for index, (image, weight, to_k, to_v, mask) in enumerate(parts):
            if _is_zero(weight):
                continue
            if mask is None:
                if isinstance(weight, list):
                    raise ValueError(f"scale[{index}] must be a number without ip_adapter_masks, got {weight}")
                key, value = _heads(attn, to_k(image).flatten(1, -2)), _heads(attn, to_v(image).flatten(1, -2))
                sources.append(Source(key, value, gate=weight))
                continue
            # All images by one product; each is a source, whose mask is a gate for each query.
            keys, values = to_k(image), to_v(image)
            weights = weight if isinstance(weight, list) else [weight] * mask.shape[1]
            for i, one in enumerate(weights):
                if _is_zero(one):
                    continue
                gate = IPAdapterMaskProcessor.downsample(mask[:, i], query.shape[0], query.shape[2], 1)
                gate = gate.to(query.device, query.dtype)[:, None] * one
                sources.append(Source(_heads(attn, keys[:, i]), _heads(attn, values[:, i]), gate=gate))
        return block.leave(cross_attention(query, sources, fusion="decoupled"))

    def _masks(self, masks: torch.Tensor | list | None, images: list[torch.Tensor]) -> list[torch.Tensor | None]:
        """For each adapter ``(1, images, height, width)`` or None."""
        if masks is None:
            return [None] * len(self.scale)
        if not isinstance(masks, list):
            masks = list(masks.unsqueeze(1))
        if not len(masks) == len(self.scale) == len(images):
            raise ValueError(
                f"ip_adapter_masks must be {len(self.scale)}, one for each scale and adapter, got {len(masks)} masks "
                f"and {len(images)} adapters"
            )
        for index, (mask, scale, image) in enumerate(zip(masks, self.scale, images, strict=True)):
            if mask is None:
                continue
            if not isinstance(mask, torch.Tensor) or mask.dim() != 4:
                got = tuple(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
                raise ValueError(
                    f"ip_adapter_masks[{index}] must be (1, images, height, width), as of IPAdapterMaskProcessor, "
                    f"got {got}"
                )
            count = image.shape[1]
            if mask.shape[1] != count or (isinstance(scale, list) and len(scale) != count):
                scales = len(scale) if isinstance(scale, list) else 1
                raise ValueError(
                    f"ip_adapter_masks[{index}] must have {count} masks, one for each image, and as many scales or "
                    f"one, got {mask.shape[1]} and {scales}"
                )
        return masks


def _is_zero(scale: float | list | torch.Tensor) -> bool:
    """Known to be zero; a scale that is learned is not."""
    if isinstance(scale, torch.Tensor):
        return False
    return all(s == 0 for s in scale) if isinstance(scale, list) else scale == 0


class JointAttnProcessor2_0(theirs.JointAttnProcessor2_0):
    """``diffusers.models.attention_processor.JointAttnProcessor2_0``: image and text attend to both, as in SD3.

    Two queries, each to two sources where they lie: nothing is concatenated, and nothing split afterwards.
    """

    def __call__(
        self,
        attn: theirs.Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        *args,
        **kwargs,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """``(B, L, C)`` and perhaps ``(B, S, C_enc)`` → as many; the mask is not used, as diffusers' does not."""
        key = _heads(attn, attn.to_k(hidden_states))
        key = key if attn.norm_k is None else attn.norm_k(key)
        query, sources = _query(attn, hidden_states), [Source(key, _heads(attn, attn.to_v(hidden_states)))]
        if encoder_hidden_states is not None:
            added = [_heads(attn, project(encoder_hidden_states))
                     for project in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)]  # fmt: skip
            for i, norm in enumerate((attn.norm_added_q, attn.norm_added_k)):
                added[i] = added[i] if norm is None else norm(added[i])
            sources.append(Source(*added[1:]))
        y = _flat(cross_attention(query, sources))
        for layer in attn.to_out:
            y = layer(y)
        if encoder_hidden_states is None:
            return y
        context = _flat(cross_attention(added[0], sources))
        return y, context if attn.context_pre_only else attn.to_add_out(context)


_OURS = {
    theirs.AttnProcessor2_0: AttnProcessor2_0,
    theirs.IPAdapterAttnProcessor2_0: IPAdapterAttnProcessor2_0,
    theirs.JointAttnProcessor2_0: JointAttnProcessor2_0,
}


def replace_processors(model: torch.nn.Module) -> list[str]:
    """Gives every attention layer of ``model`` whose processor has a counterpart here that one, in place.

    Parameters of IP-Adapters stay the same objects, so that optimizers keep them; their scales are taken along. Other
    processors stay.

    Args:
        model: a UNet, transformer or autoencoder of diffusers, or any module that holds attention layers.

    Returns:
        The names of the layers changed; none if there was nothing to replace.
    """
    changed = []
    for name, module in model.named_modules():
        ours = _OURS.get(type(getattr(module, "processor", None)))
        if ours is None or not isinstance(module, theirs.Attention):
            continue
        old = module.processor
        new = ours.__new__(ours)
        new.__dict__.update(old.__dict__)  # of a module: parameters, submodules, hooks, scales
        module.set_processor(new)
        changed.append(name)
    return changed
