"""`torch.func.vmap` over the operators of the fusion slice."""

from __future__ import annotations

import torch
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten


def one_by_one(*names: str) -> None:
    """The rule of ``mmfast::<name>``: one call after the other, since what shares a batch of one may be any of them."""
    for name in names:
        torch.library.register_vmap(f"mmfast::{name}", _rule(getattr(torch.ops.mmfast, name).default))


def _rule(op):
    def rule(info, in_dims, *args):
        flat, spec = tree_flatten(args)
        dims = tree_flatten(in_dims)[0]

        def at(i):
            parts = [x.select(d, i) if isinstance(d, int) else x for x, d in zip(flat, dims, strict=True)]
            return tree_unflatten(parts, spec)

        outs = tree_map(lambda *each: torch.stack(each), *(op(*at(i)) for i in range(info.batch_size)))
        return outs, tree_map(lambda _: 0, outs)

    return rule
