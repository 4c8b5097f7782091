"""Recorded launches made again by the extension (`csrc/fusion/fusion_replay.cpp`), on a driver that multiplies."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap

import pytest

pytestmark = pytest.mark.native

# Arguments: from, to, a number, a factor, and two pieces of scratch memory.
DRIVER = """
int cuCtxGetCurrent(void** context) { *context = (void*)1; return 0; }
int cuCtxSetCurrent(void* context) { return 0; }
int cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void* stream, void** arguments, void** extra) {
    if (function == (void*)8) {  /* one argument, which holds all of it */
        const struct { const float* from; float* to; long count; double factor; } job = *(typeof(job)*)arguments[0];
        for (long i = 0; i < job.count; ++i) job.to[i] = (float)job.factor * job.from[i];
        return gx != 3 || bx != 32;
    }
    if (gx != 4 || gy != 2 || gz != 1 || bx != 64 || by != 1 || bz != 1) return 1;
    if (function != (void*)7 || shared != 16) return 3;
    if (stream != (void*)11 || *(void**)arguments[4] || *(void**)arguments[5]) return 2;
    const float *from = *(const float**)arguments[0], factor = *(float*)arguments[3];
    float* to = *(float**)arguments[1];
    for (int i = 0; i < *(int*)arguments[2]; ++i) to[i] = factor * from[i];
    return 0;
}
"""

PROGRAM = """
import ctypes, struct, sys

ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)

import torch

from mmfast import _backend
from mmfast.fusion import recording as recording_of
from mmfast.fusion import triton_direct

C, cpu = _backend._C, torch.device("cpu")


def recording(rooms, *launches):
    made = C.Recording([(list(shape), list(strides), torch.float32) for shape, strides in rooms], cpu)
    for source, target, count, factor in launches:
        bits = int.from_bytes(struct.pack("<f", factor), "little")
        made.add(7, (4, 2, 1), 64, 16, [0, 0, count, bits, 0, 0], [(0, source), (1, target)])
    return made


class plan:
    calls, number = 0, 0


def differentiate(number, text, grad_out, grad_lse, tensors, out, lse):
    assert (number, text) == (plan.number, "the plan")
    plan.calls += 1
    given = [*tensors, lse, *(g for g in (grad_out, grad_lse) if g is not None), out]
    plan.key = C.fusion_described(given, -1)[0]
    return [2 * grad_out, None]


triton_direct.differentiate = differentiate
backward = C.RecordedBackward()
plan.number = backward.number
assert C.RecordedBackward().number > backward.number
x, gate = torch.randn(2, 3, requires_grad=True), torch.randn(1, 3, requires_grad=True)
# Two inputs, then the output with its rows apart, and the log-sum-exp.
forward = recording([((2, 3), (1, 2)), ((2,), (1,))], (0, 2, 6, 2.0), (1, 3, 2, 0.5))


def attend():
    addresses = C.fusion_described([x, gate], -1)[1]
    return C.fusion_replayed([x, gate], forward, addresses, [0, 1], backward, "the plan", 11, True)


out, lse = attend()
assert out.stride() == (1, 2) and torch.equal(out.t().flatten(), 2 * x.flatten())
assert torch.equal(lse, gate[0, :2] / 2)
made = forward.again(C.fusion_described([x, gate], -1)[1], 11)
assert torch.equal(made[0], out) and torch.equal(made[1], lse) and not made[0].requires_grad

# Not recorded yet: the plan is asked.
up = torch.randn(2, 3).t().contiguous().t()
(of_x,) = torch.autograd.grad(out, x, up)
assert torch.equal(of_x, 2 * up) and plan.calls == 1

# Recorded: the gradient of the gate lies in memory of (2, 3) and is summed over what it was broadcast along.
backward.keep(plan.key, recording([((2, 3), (1, 2)), ((2, 3), (3, 1))], (3, 5, 6, 3.0), (3, 6, 6, 5.0)), [0, 1])
out, lse = attend()
of_x, of_gate = torch.autograd.grad(out, (x, gate), up)
assert torch.equal(of_x, 3 * up) and plan.calls == 1
torch.testing.assert_close(of_gate, 5 * up.t().reshape(2, 3).sum(0, keepdim=True))

# Of another layout, differentiated again, or with a gradient of the log-sum-exp it is the plan again.
for options in ({"grad_outputs": up.contiguous()}, {"grad_outputs": up, "create_graph": True}):
    out, lse = attend()
    before = plan.calls
    torch.autograd.grad(out, x, **options)
    assert plan.calls == before + 1
out, lse = attend()
torch.autograd.grad((out.sum() + lse.sum()), x)
assert plan.calls == before + 2
backward.clear()
out, lse = attend()
torch.autograd.grad(out, x, up)
assert plan.calls == before + 3

# A tensor that was changed, and what the driver refuses.
out, lse = attend()
with torch.no_grad():
    x.mul_(2)
try:
    out.sum().backward()
except RuntimeError as error:
    assert "modified by an inplace operation" in str(error)
else:
    raise AssertionError
try:
    forward.again(C.fusion_described([x, gate], -1)[1], 12)
except RuntimeError as error:
    assert "CUDA's error 2" in str(error)
else:
    raise AssertionError

# Kernels of the extension, which say what they were given.
def told(missing):
    def compute():
        out = recording_of.room(x, (3, 2)).t()
        factor = int.from_bytes(struct.pack("<d", 2.5), "little")
        places = [(0, x.data_ptr()), (1, out.data_ptr() + 4 * missing)]
        recording_of.launched([(8, (3, 1, 1), 32, 0, [0, 0, 6, factor], places)])
        assert recording_of.is_recorded()
        return out, None

    return recording_of.record(compute, [x])[1]


y = torch.randn(2, 3)
found, nothing = told(False).again([y], [y.data_ptr()])
assert nothing is None and found.stride() == (1, 2) and torch.equal(found.t().flatten(), 2.5 * y.flatten())
assert not told(False).is_watched() and told(True) is False and not recording_of.is_recorded()

# What is no plain memory, or not here, has no description.
assert C.fusion_described([torch.zeros(2, dtype=torch.complex64).conj().imag], -1) is None
assert C.fusion_described([x], 0) is None

# Compiled autograd, which looks at what a node holds, takes the same way; so do graphs whose plan is forgotten.
x = torch.randn(2, 3, requires_grad=True)
for _ in range(2):
    out, lse = attend()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        out.backward(up)
    assert torch.equal(x.grad, 2 * up)
    x.grad = None
out, lse = attend()
del backward
out.backward(up)
assert torch.equal(x.grad, 2 * up)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the stand-in for the driver is made for Linux")
def test_replayed(tmp_path):
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    (tmp_path / "driver.c").write_text(DRIVER)
    library, source = tmp_path / "libcuda.so.1", tmp_path / "driver.c"
    subprocess.run([compiler, "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", library, source], check=True)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM), library], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
