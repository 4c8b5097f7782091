"""transformers' models: the attention implementation that their configurations name."""

from __future__ import annotations

import importlib
import sys
from typing import Any

from mmfast.swapping.changes import ConfigChange
from mmfast.swapping.rules import Unfit

IMPLEMENTATION = "mmfast"
_FROM = ("sdpa", "eager")


def base_class() -> type | None:
    """``PreTrainedModel`` if transformers is imported."""
    return vars(sys.modules.get("transformers.modeling_utils", sys)).get("PreTrainedModel")


def change(model: Any) -> ConfigChange:
    """The change of the configuration of ``model``, not applied yet.

    Raises:
        Unfit: saying why its attention is left alone.
    """
    config = model.config
    now = config._attn_implementation
    if now == IMPLEMENTATION:
        raise Unfit("mmfast's already")
    if now not in _FROM:
        raise Unfit(f"its attention is {now!r}; set it to 'sdpa' first")
    if not (getattr(model, "_supports_sdpa", True) or getattr(model, "_supports_attention_backend", False)):
        raise Unfit("its attention is its own and not chosen by an implementation")
    if not getattr(model, "_can_set_attn_implementation", lambda: True)():
        raise Unfit("its attention is its own and not chosen by an implementation")
    if getattr(config, "output_attentions", False):
        raise Unfit("config.output_attentions=True needs the implementation 'eager'")
    try:
        importlib.import_module("mmfast.compat.transformers_attention")  # registers it
        model.get_correct_attn_implementation(IMPLEMENTATION)
    except (ImportError, ValueError, AttributeError) as error:
        raise Unfit(f"transformers does not take it: {error}") from error
    return ConfigChange(config, IMPLEMENTATION)
