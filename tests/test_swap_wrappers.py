"""`mmfast.swap` through the wrappers of torch, and ``mmfast swap-check``."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from test_swap import Attends, attends_inputs
from torch import nn

import mmfast
from mmfast import cli

pytest.importorskip("torchaudio")
pytest.importorskip("tabulate")
pytestmark = pytest.mark.filterwarnings("ignore:At least one mel filterbank")


def test_compiled():
    model, inputs = Attends(), attends_inputs()
    count = []

    def backend(graph, _):
        count.append(1)
        return graph.forward

    compiled = torch.compile(model, backend=backend)
    expected = compiled(*inputs)
    report = mmfast.swap(compiled, only="second", check=inputs)
    assert [row.path for row in report.swapped] == ["_orig_mod.second"]
    assert len(count) == 1
    torch.testing.assert_close(compiled(*inputs), expected)
    assert len(count) == 2  # compiled again, with the new class
    report.undo()
    torch.testing.assert_close(compiled(*inputs), expected)


def test_data_parallel():
    model, inputs = Attends(), attends_inputs()
    wrapped = nn.DataParallel(model)
    report = mmfast.swap(wrapped, only="first", check=inputs)
    assert [row.path for row in report.swapped] == ["module.first"] and report.differences
    wrapped(*inputs).sum().backward()


DISTRIBUTED = """
import torch, mmfast, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from test_swap import Attends, attends_inputs
dist.init_process_group("gloo", init_method="file://{file}", rank=0, world_size=1)
inputs = attends_inputs()
ddp = torch.nn.parallel.DistributedDataParallel(Attends())
assert len(mmfast.swap(ddp, only=["first", "second"], check=inputs).swapped) == 2
ddp(*inputs).sum().backward()
ddp(*inputs).sum().backward()
assert ddp.module.first.in_proj_bias.grad is not None
for flat in (True, False):
    fsdp = FullyShardedDataParallel(Attends(), device_id=torch.device("cpu"), use_orig_params=not flat)
    expected = fsdp(*inputs)
    report = mmfast.swap(fsdp, only="first", check=inputs)
    assert [row.path for row in report.swapped] == ["_fsdp_wrapped_module.first"], report
    assert "forward only" in report.notes[0]
    torch.testing.assert_close(fsdp(*inputs), expected)
    fsdp(*inputs).sum().backward()
model, mesh = Attends(), init_device_mesh("cpu", (1,))
fully_shard(model.third, mesh=mesh)
fully_shard(model, mesh=mesh)
report = mmfast.swap(model)
assert [row.path for row in report.swapped] == ["first", "second"], report
assert "fully_shard" in report.left_alone[0].why
model(*inputs).sum().backward()
assert model.first.in_proj_bias.grad is not None
dist.destroy_process_group()
print("fine")
"""


def test_distributed(tmp_path):
    """DDP, and FSDP in both versions, with one process."""
    script = DISTRIBUTED.format(file=tmp_path / "store")
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, env=env)
    assert done.stdout.endswith("fine\n"), done.stdout + done.stderr


FACTORY = """
import torch, torchaudio
from torch import nn

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.mel = torchaudio.transforms.MelSpectrogram(8000, n_fft=256, n_mels=20)
        self.head = nn.Linear(20, 3)

    def forward(self, wave):
        return self.head(self.mel(wave).transpose(1, 2))

def make():
    return Model()

def pair():
    return Model(), torch.randn(2, 1600)

inputs = torch.randn(1, 900)
nothing = 3
"""


@pytest.fixture
def factory(tmp_path, monkeypatch):
    (tmp_path / "my_factory.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    sys.modules.pop("my_factory", None)


def test_command(factory, capsys, monkeypatch):
    assert cli.main(["swap-check", "my_factory:pair", "--rounds", "2"]) == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("1 swapped", "grad of head.weight", "times as fast", "with 2 steps inside"))
    assert cli.main(["swap-check", "my_factory:make"]) == 0
    assert "no example inputs" in capsys.readouterr().out
    assert cli.main(["swap-check", "my_factory:Model", "--inputs", "my_factory:inputs", "--rounds", "0"]) == 0
    printed = capsys.readouterr().out
    assert "grad of input[0]" in printed and "times as fast" not in printed
    assert cli.main(["swap-check", "my_factory:pair", "--dry-run", "--skip", "mel"]) == 0
    assert "0 swapped, 2 left alone" in capsys.readouterr().out
    monkeypatch.setattr(mmfast.compat.torchaudio.transforms.MelSpectrogram, "forward", lambda self, w: w)
    assert cli.main(["swap-check", "my_factory:pair", "--rounds", "0"]) == 1
    assert "1 undone" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["my_factory"], "FACTORY must be package.module:name, got 'my_factory'"),
        (["no_such:make"], "No module named 'no_such'"),
        (["my_factory:maker"], "has no attribute 'maker'"),
        (["my_factory:nothing"], "must return a torch.nn.Module, or a pair of it and inputs, got int"),
        (["my_factory:make", "--only", "mal"], "no module has a path like 'mal'"),
        (["my_factory:make", "--inputs", "my_factory:nothing"], "the model does not run on its inputs"),
        (["my_factory:make", "--rounds", "-1"], "--rounds must not be negative"),
    ],
)
def test_command_rejects(factory, capsys, arguments, message):
    assert cli.main(["swap-check", *arguments]) == 2
    assert message in capsys.readouterr().err
