"""Launches as on a GPU, without one: Triton looks at the arguments, compiles for sm_90, and a stub takes the launch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path


def run(script: str):
    """What a script prints as JSON, in a process where Triton does not interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), environment.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


_MMD = """
import contextlib, json
import stub_driver
import torch
from mmfast import kernels as k, mmd
from mmfast.mmd import triton_gram, triton_points, triton_tuning

def points(*shape):
    return torch.randn(*shape).requires_grad_()

def differentiated(value):
    value.sum().backward()

x, y = points(300, 200), points(280, 200)
differentiated(mmd.mmd2(points(50, 20), points(40, 20), backend="triton"))
differentiated(mmd.mmd2(points(2, 50, 20), points(2, 40, 20), backend="triton"))
differentiated(mmd.mmd2(points(300, 20), points(280, 20), backend="triton"))
differentiated(mmd.mmd2(points(2, 300, 20), points(2, 280, 20), k.Gaussian(3.0), backend="triton"))
differentiated(mmd.mmd2(x, y, k.Gaussian(3.0), backend="triton"))
differentiated(mmd.mmd2(x, y, k.Laplacian(3.0, p=1), backend="triton"))
differentiated(mmd.lmmd(x, y, torch.rand(300, 3), torch.rand(280, 3), k.Gaussian(3.0), backend="triton"))
triton_gram.LEAST_ROWS = 0
differentiated(mmd.mmd2(x, y, k.Gaussian(3.0), backend="triton"))
triton_points.use(triton_tuning.Sizes(block=32, step=32, strip=2))
with contextlib.suppress(IndexError):  # what no kernel has found
    k.MedianDistance()(points(60, 20).detach(), points(50, 20).detach(), "triton")
print(json.dumps([name for name, *_ in stub_driver.launches]))
"""


def test_every_kernel_of_mmd_is_launched():
    """Arguments that Triton takes, and tiles that fit in an H100's shared memory."""
    found = run(_MMD)
    assert found[:3] == ["distances", "values", "gradient"]
    assert set(found) == {
        "add_shares", "arrange", "combine", "count_digits", "distances", "evaluate", "extents", "finish", "gradient",
        "multiply", "narrow", "powers", "prepare", "scale_of", "settle", "settle_columns", "settle_numbers", "signs",
        "survey", "sweep", "values",
    }  # fmt: skip


_LAUNCH = """
import json
import stub_driver
import torch
import triton
from mmfast import _launch
from mmfast.mmd import triton_prepare

calls = []
ordinary = triton.runtime.JITFunction.run

def counted(self, *args, **named):
    calls.append(self)
    return ordinary(self, *args, **named)

triton.runtime.JITFunction.run = counted
most, out = torch.zeros(8), torch.zeros(64)
constants = {"MOST": 60, "LANES": 16}
seen = {}

def launch(name, most=most, blocks=4, constants=constants, function=False):
    tensors = most, out[:4], out[16:20], out[32:36]
    addresses = [t.data_ptr() for t in tensors]
    before, launched = len(calls), len(stub_driver.launches)
    args = (lambda: (*tensors, blocks)) if function else (*tensors, blocks)
    key = _launch.key_at((blocks, tuple(constants.items())), *addresses)
    _launch.launch(triton_prepare.powers, (2,), args, constants, key, (*addresses, blocks) if function else None)
    assert len(stub_driver.launches) == launched + 1
    seen[name] = len(calls) - before, stub_driver.launches[-1]

launch("first")
launch("again")
launch("by addresses", function=True)
launch("odd", torch.zeros(9)[1:])
launch("odd again", torch.zeros(9)[1:])
launch("one block", blocks=1)
stub_driver.stream = 7
launch("other stream")
enter = triton.knobs.runtime.launch_enter_hook
told = []
enter.add(told.append)
launch("watched")
enter.remove(told.append)
launch("unwatched")
launch("other constants", constants={"MOST": 50, "LANES": 16})
print(json.dumps([seen, len(told)]))
"""


def test_launches_that_are_alike_are_looked_at_once():
    seen, told = run(_LAUNCH)
    asked = {name: times for name, (times, _) in seen.items()}
    assert asked == {
        "first": 1, "again": 0, "by addresses": 0, "odd": 1, "odd again": 0, "one block": 1, "other stream": 0,
        "watched": 1, "unwatched": 0, "other constants": 1,
    }  # fmt: skip
    launches = {name: launch for name, (_, launch) in seen.items()}
    assert launches["first"] == launches["again"] == launches["by addresses"]
    name, grid, stream, arguments = launches["first"]
    assert (name, grid, stream) == ("powers", [2, 1, 1], 0)
    assert arguments[4:] == [4, 60, 16]
    assert launches["other stream"] == [name, grid, 7, arguments] == launches["watched"] == launches["unwatched"]
    assert launches["other constants"][3][4:] == [4, 50, 16]
    assert told == 1
