"""`mmfast.swap` through the wrappers of torch, and ``mmfast swap-check``."""

from __future__ import annotations

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
        (["../factory:make"], "FACTORY must be package.module:name, got '../factory:make'"),
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
