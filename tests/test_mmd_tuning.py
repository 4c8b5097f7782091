"""The sizes of the Triton kernels' tiles: the table, the file of measured ones, and the command that measures."""

from __future__ import annotations

import json

import pytest
import torch

from mmfast import cli
from mmfast.mmd import triton_tuning as tuning
from mmfast.mmd import tune

SHARED = {"sm_80": 163, "sm_90": 227, "sm_100": 227}  # KiB that a block may have


@pytest.mark.parametrize("arch", [*SHARED, "sm_75", "sm_86", "sm_120"])
def test_table(arch):
    """Something for each; what the stages of a sweep hold fits in shared memory."""
    for dtype, parts in ((torch.float16, 2), (torch.float16, 1), (torch.bfloat16, 1), (torch.float64, 1)):
        for width in (1, 64, 65, 300, 5000):
            sizes = tuning.default(arch, width, dtype, parts)
            assert all(n & (n - 1) == 0 for n in (sizes.block, sizes.step, sizes.cols, sizes.warps))
            held = sizes.stages * 2 * parts * sizes.block * sizes.step * dtype.itemsize
            assert held <= SHARED.get(arch, 227) * 1024, (dtype, parts, width)


def test_measured_sizes_are_kept(tmp_path, monkeypatch):
    path = tmp_path / "below" / "sizes.json"
    monkeypatch.setenv("MMFAST_TUNE_CACHE", str(path))
    name = tuning.key("Some GPU", 100, torch.float16, 2)
    assert name == "Some GPU/256/float16x2" != tuning.key("Some GPU", 1000, torch.float16, 2)
    assert tuning.measured(str(path)) == {}
    assert tuning.save({name: tuning.Sizes(64)}) == path
    tuning.save({"other": tuning.Sizes(32)})
    assert tuning.measured(str(path)) == {name: tuning.Sizes(64), "other": tuning.Sizes(32)}
    # A GPU of that name takes them, another one the table's.
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for gpu, expected in (("Some GPU", tuning.Sizes(64)), ("Another", tuning.default("sm_90", 100, torch.float16, 2))):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, gpu=gpu: gpu)
        tuning._sizes.cache_clear()
        assert tuning.sizes(torch.device("cuda", 0), 100, torch.float16, 2) == expected
    tuning._sizes.cache_clear()


def test_pairs_are_taken_where_they_were_faster(tmp_path, monkeypatch):
    monkeypatch.setenv("MMFAST_TUNE_CACHE", str(tmp_path / "sizes.json"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    device, name = torch.device("cuda", 0), tuning.key("Some GPU", 100, torch.float16, 2)
    tuning._pairs.cache_clear()
    for gradient in (False, True):
        assert not tuning.pairs(device, gradient)
        tuning.save_pairs("Some GPU", gradient, True)
        tuning.save({name: tuning.Sizes(64)})
        assert tuning.pairs(device, gradient)
        assert tuning.measured(str(tmp_path / "sizes.json")) == {name: tuning.Sizes(64)}
        tuning.save_pairs("Some GPU", gradient, False)
        assert not tuning.pairs(device, gradient)
    tuning._pairs.cache_clear()


@pytest.mark.parametrize("content", ["", "[1, 2]", json.dumps({"a": {"unknown": 1}}), json.dumps({"a": 3})])
def test_a_bad_file_is_no_file(content, tmp_path):
    path = tmp_path / "sizes.json"
    path.write_text(content)
    assert tuning.measured(str(path)) == {}


def test_choices():
    """No choice twice, and the table's first."""
    default = tuning.default("sm_90", 256, torch.float16, 2)
    found = list(tune.choices(default))
    assert found[0] == default and len(set(found)) == len(found) > 20


def test_without_a_gpu(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert cli.main(["tune", "mmd"]) == 1
    assert "built-in table" in capsys.readouterr().err
