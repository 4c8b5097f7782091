"""`mmfast.swap` in two processes: models in DDP and in both kinds of FSDP train as they did."""

from __future__ import annotations

import datetime

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor

import mmfast

torchaudio = pytest.importorskip("torchaudio")
pytest.importorskip("tabulate")

SWAPPED = ["sound", "cross", "block.self_attn", "own"]


class Model(nn.Module):
    """Sound and a sequence: features, cross-attention, an encoder layer and self-attention."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        mel = {"n_fft": 256, "hop_length": 100, "n_mels": 20}
        self.sound = torchaudio.transforms.MFCC(8000, 13, melkwargs=mel)
        self.cross = nn.MultiheadAttention(16, 4, kdim=13, vdim=13, batch_first=True)
        self.block = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True)
        self.own = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, x, wave):
        sound = self.sound(wave).transpose(1, 2)
        x = self.block(x + self.cross(x, sound, sound, need_weights=False)[0])
        return self.head(x + self.own(x, x, x, need_weights=False)[0])


def inputs(rank: int):
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(3, 5, 16, generator=generator), 0.1 * torch.randn(3, 1600, generator=generator)


def ddp(model):
    return nn.parallel.DistributedDataParallel(model)


def ddp_inside(model):
    model.block.norm1 = nn.BatchNorm1d(5)  # whose buffers each forward pass broadcasts
    model.block = nn.parallel.DistributedDataParallel(model.block)
    return model


def wrapper(model):
    policy = ModuleWrapPolicy({nn.MultiheadAttention, nn.TransformerEncoderLayer})
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True, auto_wrap_policy=policy)


def wrapper_flat(model):
    policy = ModuleWrapPolicy({nn.TransformerEncoderLayer})
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), auto_wrap_policy=policy)


def sharded(model, **options):
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(model.block, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh)


def sharded_half(model):
    return sharded(model, mp_policy=MixedPrecisionPolicy(torch.bfloat16, output_dtype=torch.float32))


def sharded_itself(model):
    fully_shard(model.own, mesh=init_device_mesh("cpu", (2,)))
    return sharded(model)


def local(x):
    return x.to_local() if isinstance(x, DTensor) else x


def trained(model, rank: int) -> dict[str, torch.Tensor]:
    """Outputs, gradients and parameters of this process, with an optimizer that is made now."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    found = {}
    for step in range(2):
        out = model(*inputs(rank))
        found[f"output {step}"] = out.detach().clone()
        out.square().mean().backward()
        grads = {f"grad {step} of {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
        found |= {name: local(grad).clone() for name, grad in grads.items()}
        optimizer.step()
        optimizer.zero_grad()
    return found | {name: local(p).detach().clone() for name, p in model.named_parameters()}


def check_same(found, expected, tolerance: float) -> None:
    assert found.keys() == expected.keys()
    assert sum(name.startswith("grad 1") for name in found) >= 1
    for name, value in expected.items():
        moved, largest = ((x.abs().max().item() if x.numel() else 0.0) for x in (found[name] - value, value))
        assert moved <= tolerance * max(largest, 1e-3), (name, moved, largest)


def plain(path: str) -> str:
    return path.replace("_fsdp_wrapped_module.", "").replace("._fsdp_wrapped_module", "").replace("module.", "")


def check_trains(wrap, rank: int) -> None:
    """A swapped model trains as one that is not, to the bit after an undo."""
    tolerance = 5e-2 if wrap is sharded_half else 1e-4
    expected = trained(wrap(Model()), rank)
    for undo in (False, True):
        model = wrap(Model())
        before = [id(p) for p in model.parameters()]
        report = mmfast.swap(model, check=None if undo else inputs(rank))
        wanted = SWAPPED[:-1] if wrap is sharded_itself else SWAPPED
        assert [plain(row.path) for row in report.swapped if row.part_of is None] == wanted, report
        if wrap is sharded_itself:
            assert [(row.path, row.why[:24]) for row in report.left_alone] == [("own", "fully_shard gave it a cl")]
        assert [id(p) for p in model.parameters()] == before
        if undo:
            report.undo()
            assert not any(type(m).__module__.startswith("mmfast") for m in model.modules())
        check_same(trained(model, rank), expected, 0.0 if undo else tolerance)


def check_verdicts(wrap, rank: int) -> None:
    """What one process of a sharded model undoes, all of them do; those of a part in DDP do not wait for each other."""
    model = wrap(Model())
    forward = mmfast.nn.MultiheadAttention.forward

    def wrong(self, query, *args, **options):
        out, weights = forward(self, query, *args, **options)
        return (out * 2 if self.kdim == 13 else out), weights

    if rank == 1:
        mmfast.nn.MultiheadAttention.forward = wrong
    try:
        report = mmfast.swap(model, check=inputs(rank))
    finally:
        mmfast.nn.MultiheadAttention.forward = forward
    together = wrap is sharded
    assert [row.path for row in report.undone] == ["cross"] * (together or rank == 1), report
    for row in report.undone:
        assert ("differs by" if rank else "disagrees in another process") in row.why
    assert (type(model.cross) is nn.MultiheadAttention) == (together or rank == 1)
    assert len([row for row in report.swapped if row.part_of is None]) == 4 - len(report.undone)
    model(*inputs(rank)).sum().backward()


def worker(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60)
    )
    try:
        for wrap in (ddp, ddp_inside, wrapper, wrapper_flat, sharded, sharded_half, sharded_itself):
            try:
                check_trains(wrap, rank)
            except BaseException as error:
                raise AssertionError(f"{wrap.__name__} on rank {rank}") from error
        check_verdicts(sharded, rank)
        check_verdicts(ddp_inside, rank)
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="torch was built without Gloo")
def test_two_processes(tmp_path):
    mp.spawn(worker, (str(tmp_path / "store"),), nprocs=2)
