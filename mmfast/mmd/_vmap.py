"""vmap over the operators: more items of the batch where all share a kernel, else one call after the other."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Arguments that have a row for each item of the batch; so do all results of these operators.
_ROWS = {"quadratic": ("x", "y", "wx", "wy"), "sums": ("x", "y"), "matmul": ("x", "y", "v"), "pair": ("x", "y")}


def register(name: str) -> None:
    """The rule of ``mmfast::mmd_<name>``."""
    op = getattr(torch.ops.mmfast, f"mmd_{name}").default
    names, rows = [a.name for a in op._schema.arguments], _ROWS.get(name, ())

    def rule(info, in_dims, *args):
        moved = [a.movedim(d, 0) if isinstance(d, int) else a for a, d in zip(args, in_dims, strict=True)]
        # The dispatcher leaves the last arguments away where they are the defaults.
        batched = {n for n, d in zip(names, in_dims, strict=False) if isinstance(d, int)}
        given = list(zip(names, moved, strict=False))
        size = info.batch_size
        if batched <= set(rows):
            out = op(*(_folded(a, size, n in batched) if n in rows else a for n, a in given))
            return _each(out, lambda t: t.unflatten(0, (size, t.shape[0] // size)))
        outs = [op(*(a[i] if n in batched else a for n, a in given)) for i in range(size)]
        if isinstance(outs[0], Tensor):
            return torch.stack(outs), 0
        return tuple(map(torch.stack, zip(*outs, strict=True))), (0,) * len(outs[0])

    torch.library.register_vmap(f"mmfast::mmd_{name}", rule)


def _folded(t: Tensor | None, size: int, has_samples: bool) -> Tensor | None:
    """``(size, b, ...)`` as ``(size * b, ...)``."""
    if t is None:
        return None
    return (t if has_samples else t.expand(size, *t.shape)).flatten(0, 1)


def _each(out: Tensor | tuple[Tensor, ...], f: Callable[[Tensor], Tensor]) -> tuple:
    if isinstance(out, Tensor):
        return f(out), 0
    return tuple(map(f, out)), (0,) * len(out)
