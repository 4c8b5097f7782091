"""The launch for few features, compiled for a GPU without one: tensor cores, and room for two programs."""

from __future__ import annotations

import json
import os
import subprocess
import sys

_SCRIPT = """
import json, pathlib, re, subprocess, tempfile
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from mmfast.mmd import triton_narrow, triton_narrow_launch, triton_settle

TYPES = {torch.float16: "*fp16", torch.float32: "*fp32", torch.float64: "*fp64", torch.uint8: "*u8"}
TYPES[torch.int32] = "*i32"
OPTIONS = ("num_warps", "num_stages", "maxnreg")
launches = []


class Launch:  # in place of a kernel: keeps what it is launched with
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *args, **named: launches.append((self.kernel, args, named))


for module, names in ((triton_settle, "survey settle arrange"), (triton_narrow, "narrow combine finish")):
    for name in names.split():
        setattr(module, name, Launch(getattr(module, name)))


def compiled(kernel, args, named):
    values = dict(zip(kernel.arg_names, args)) | {k: v for k, v in named.items() if k not in OPTIONS}
    types, constants, attributes = {}, {}, {}
    for i, p in enumerate(kernel.params):
        v = values[p.name]
        if p.is_constexpr or (isinstance(v, int) and v == 1):
            types[p.name], constants[(i,)] = "constexpr", v
        elif isinstance(v, int):
            types[p.name] = "i32"
        else:
            types[p.name] = TYPES[v.dtype]
        if not p.is_constexpr and (not isinstance(v, int) or v % 16 == 0):
            attributes[(i,)] = [["tt.divisibility", 16]]
    options = {k: named[k] for k in OPTIONS if k in named}
    return triton.compile(ASTSource(kernel, types, constants, attributes), GPUTarget("cuda", 90, 32), options)


found = {}
tool = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
for name, need in (("value", False), ("gradients", True)):
    launches.clear()
    x, numbers = torch.empty(1, 16384, 64, device="meta"), torch.empty(20, dtype=torch.float64, device="meta")
    triton_narrow_launch.quadratic(x, x, numbers, numbers, [0] * 5, "float32", (need, need), False)
    kernel = compiled(*next(launch for launch in launches if launch[0].__name__ == "narrow"))
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder, "kernel.cubin")
        file.write_bytes(kernel.asm["cubin"])
        used = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True).stdout
    found[name] = {
        "registers": int(re.search(r"REG:(\\d+)", used)[1]),
        "stack": int(re.search(r"STACK:(\\d+)", used)[1]),
        "shared": kernel.metadata.shared,
        "wgmma": kernel.asm["ptx"].count("wgmma.mma_async"),
        "copies": kernel.asm["ptx"].count("cp.async.cg"),
        "ahead": len(re.findall(r"ttg.async_wait .*num = [1-9]", kernel.asm["ttgir"])),
    }
print(json.dumps(found))
"""


def test_two_programs_share_a_multiprocessor():
    """Products by wgmma, points copied while others are multiplied; 128 registers and half of the shared memory."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", _SCRIPT], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for name, kernel in found.items():
        assert kernel["registers"] <= 128 and kernel["shared"] <= 113 * 1024, (name, kernel)
        assert kernel["ahead"] >= (1 if name == "value" else 2), (name, kernel)  # points are not waited for at once
        assert kernel["wgmma"] >= (12 if name == "value" else 24) and kernel["copies"], (name, kernel)
    # What they keep in memory is for five exponentials, where lengths do not double.
    assert found["value"]["stack"] <= 128 and found["gradients"]["stack"] <= 640, found
