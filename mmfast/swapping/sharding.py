"""Models whose parameters lie in several processes: torch's FSDP, of modules (``fully_shard``) and as a wrapper."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn


def by_fully_shard(module: Any) -> bool:
    """Whether ``fully_shard`` was applied to this very module."""
    return any(base.__name__ == "FSDPModule" for base in type(module).__mro__)


def by_wrapper(module: Any) -> bool:
    """Whether it is a ``FullyShardedDataParallel``."""
    return type(module).__name__ == "FullyShardedDataParallel"


def is_sharded(model: nn.Module) -> bool:
    """Whether a module of ``model`` is, so that a forward pass is one of all processes together."""
    return any(by_fully_shard(m) or by_wrapper(m) for m in model.modules())


def reshard(model: nn.Module, failed: bool = False) -> None:
    """Takes the whole parameters away that a forward pass without a backward pass leaves in the outermost module.

    Whoever asks for ``model.parameters()`` would get those, and an optimizer of them would train nothing.
    """
    outermost = True
    for module in model.modules():
        if not by_fully_shard(module):
            continue
        if failed and outermost and hasattr(module, "reset_iter_state"):  # torch 2.13
            module.reset_iter_state()
        module.reshard()
        outermost = False


def dtypes(model: nn.Module) -> set[torch.dtype]:
    """Those that mixed precision computes in."""
    found = set()
    for module in model.modules():
        if by_fully_shard(module):
            policy = getattr(module._get_fsdp_state(), "_mp_policy", None)
        else:
            policy = module.mixed_precision if by_wrapper(module) else None
        found.add(getattr(policy, "param_dtype", None))
    return found - {None}


def agreed(model: nn.Module, verdict: bool) -> bool:
    """Whether ``verdict`` holds in all processes that a forward pass of ``model`` needs."""
    for group in _groups(model):
        device = "cpu" if "gloo" in dist.get_backend(group) else torch.device("cuda", torch.cuda.current_device())
        flag = torch.tensor(int(verdict), device=device)
        dist.all_reduce(flag, dist.ReduceOp.MIN, group=group)
        verdict = bool(flag)
    return verdict


def _groups(model: nn.Module) -> list[Any]:
    """Each group once, in the same order in all processes."""
    found: dict[int, Any] = {}
    for module in model.modules():
        if by_wrapper(module):
            groups = [module.process_group, getattr(module, "_inter_node_pg", None)]
        else:
            meshes = [p.device_mesh for p in module.parameters(recurse=False) if type(p).__name__ == "DTensor"]
            groups = [group for mesh in meshes for group in mesh.get_all_groups()]
        found.update({id(group): group for group in groups if group is not None})
    return list(found.values())
