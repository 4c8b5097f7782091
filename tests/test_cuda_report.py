"""The tuned CUDA kernels keep everything in registers: the assembler reports no spill on sm_90a. Needs nvcc, no GPU."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHAPES = ("Tuned400", "Tuned512", "Tuned1024", "Tuned2048", "Tuned4096")
# Two blocks on a multiprocessor are 18 warps: five for one of its four parts, each with 16384 registers.
MOST_REGISTERS = 16384 // (5 * 32) // 8 * 8
ALONE = ("TunedShapeILi1ELi32E", "TunedShapeILi8ELi8E")  # backward: shared memory has room for one block


def compiled(source: Path, target: Path) -> dict[str, tuple[int, ...]]:
    """Kernel → bytes of stack, spill stores, spill loads; registers."""
    nvcc = subprocess.run(
        [sys.executable, "setup.py", "--print-nvcc"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    if not nvcc:
        pytest.skip("no nvcc")
    flags = [
        "-std=c++20",
        "--expt-relaxed-constexpr",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-Xptxas=-v",
        f"-I{ROOT / 'csrc'}",
    ]
    done = subprocess.run([nvcc, *flags, "-cubin", "-o", target, source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pattern = (
        r"entry function '(\S+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?"
        r"Used (\d+) registers"
    )
    return {m[1]: tuple(map(int, m.groups()[1:])) for m in re.finditer(pattern, done.stderr, re.DOTALL)}


@pytest.fixture(scope="module", params=[False, True], ids=["forward", "backward"])
def report(request, tmp_path_factory) -> dict[str, tuple[int, ...]]:
    """`compiled`, and how many registers a kernel may have."""
    source = tmp_path_factory.mktemp("report") / "tuned.cu"
    backward = str(request.param).lower()
    lines = ['#include "mel/mel_cuda.cuh"', "namespace mmfast::mel {"]
    lines += [
        f"template __global__ void tile_kernel<{backward}, float, {shape}>(const __grid_constant__ BlockJob<float>, "
        f"const __grid_constant__ Layout, const {shape}, int64_t, float*, float*);"
        for shape in SHAPES
    ]
    source.write_text("\n".join([*lines, "}", ""]))
    kernels = compiled(source, source.with_suffix(".cubin"))
    return {
        name: (*used, 168 if request.param and any(shape in name for shape in ALONE) else MOST_REGISTERS)
        for name, used in kernels.items()
    }


@pytest.mark.slow
def test_no_spills(report):
    assert len(report) == len(SHAPES)
    for kernel, (stack, stores, loads, registers, most) in report.items():
        assert (stack, stores, loads) == (0, 0, 0), kernel
        assert registers <= most, kernel


@pytest.mark.slow
def test_tiny_heads_stay_in_registers(tmp_path):
    """Three kernels for each of five widths; two blocks fit a multiprocessor, but of the widest in the backward."""
    kernels = compiled(ROOT / "csrc/fusion/fusion_tiny_cuda.cu", tmp_path / "tiny.cubin")
    assert len(kernels) == 15
    for kernel, (stack, stores, loads, registers) in kernels.items():
        assert (stack, stores, loads) == (0, 0, 0), kernel
        assert registers <= (255 if "TinyOf" in kernel and "ILi16E" in kernel else 128), kernel
