"""The examples run, and show what they say."""

from __future__ import annotations

import importlib
import math
import sys
from pathlib import Path

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("scipy")

FOLDER = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture(scope="module")
def digits():
    sys.path.insert(0, str(FOLDER))  # its own processes import it too
    yield importlib.import_module("adapt_digits")
    sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def runs(digits):
    settings = digits.Settings(steps=80, batch=192)
    return {backend: digits.train(backend, 0, settings) for backend in digits.NAMES}


def test_domains_are_other_images_of_the_same_kind(digits):
    source, labels, target, target_labels = digits.domains(digits.Settings())
    assert len(source) == len(labels) == 899 and len(target) == len(target_labels) == 898
    assert source.shape[1:] == target.shape[1:] == (1, 8, 8)
    for images in (source, target):
        assert images.min() >= 0 and images.max() <= 1
    # Not distorted, the second half is like the first.
    _, _, plain, _ = digits.domains(digits.Settings(angle=0, blur=0, contrast=1))
    assert (plain.mean(0) - source.mean(0)).abs().max() < 0.06 < (target.mean(0) - source.mean(0)).abs().max()


def test_backends_agree_in_the_first_step(runs):
    """The same start and the same batches; later steps may part by rounding."""
    reference, fused = runs["reference"], runs["auto"]
    assert reference.first_mmd == pytest.approx(fused.first_mmd, rel=1e-4) and fused.first_mmd > 0.01
    assert reference.first_loss == pytest.approx(fused.first_loss, rel=1e-6)
    assert runs[None].first_loss < fused.first_loss and runs[None].first_mmd == 0


def test_adaptation_helps_as_much_with_either_backend(runs):
    none, reference, fused = (runs[backend].accuracy[-1] for backend in (None, "reference", "auto"))
    assert min(reference, fused) > none + 0.15
    assert fused == pytest.approx(reference, abs=0.05)
    assert all(run.source_accuracy > 0.9 for run in runs.values())


def test_runs_can_be_repeated(digits, runs):
    again = digits.train("auto", 0, digits.Settings(steps=80, batch=192))
    assert again.first_loss == runs["auto"].first_loss and again.accuracy == runs["auto"].accuracy


def test_command_prints_a_table_and_writes_a_plot(digits, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    pytest.importorskip("tabulate")
    assert digits.main(["--steps", "3", "--batch", "64", "--seeds", "1", "--out", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    for name in digits.NAMES.values():
        (line,) = (line for line in output.splitlines() if line.startswith(f"| {name} "))
        cells = [cell.strip() for cell in line.split("|")[2:-1]]
        assert len(cells) == 6 and math.isfinite(float(cells[2]))
    picture = (tmp_path / "adapt_digits.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 5000


@pytest.mark.parametrize("option", [("--steps", "0"), ("--batch", "1"), ("--seeds", "0"), ("--threads", "-1")])
def test_command_refuses_what_makes_no_table(digits, tmp_path, capsys, option):
    with pytest.raises(SystemExit) as stop:
        digits.main([*option, "--out", str(tmp_path)])
    assert stop.value.code == 2 and "must be at least" in capsys.readouterr().err
