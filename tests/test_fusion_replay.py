"""Recorded launches made again by the extension (`csrc/fusion/fusion_replay.cpp`), on a driver that multiplies."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from mmfast import _backend
from mmfast.fusion import Source, direct, triton_direct

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
    if (stream || *(void**)arguments[4] || *(void**)arguments[5]) return 2;
    const float *from = *(const float**)arguments[0], factor = *(float*)arguments[3];
    float* to = *(float**)arguments[1];
    for (int i = 0; i < *(int*)arguments[2]; ++i) to[i] = factor * from[i];
    return 0;
}
"""

PROGRAM = """
import ctypes, os, struct, sys
from types import SimpleNamespace

ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)

import torch

from mmfast import _backend
from mmfast.fusion import Source, direct, triton_direct
from mmfast.fusion import recording as recording_of

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
    return [2 * grad_out, None, None]


triton_direct.differentiate = differentiate
backward = C.RecordedBackward()
plan.number = backward.number
assert C.RecordedBackward().number > backward.number
x, key = torch.randn(1, 1, 2, 3, requires_grad=True), torch.randn(1, 1, 1, 3, requires_grad=True)
value = torch.randn(1, 1, 1, 3)
# Three inputs, then the output with its rows apart, and the log-sum-exp.
forward = recording([((1, 1, 2, 3), (6, 6, 1, 2)), ((1, 1, 1, 2), (2, 2, 2, 1))], (0, 3, 6, 2.0), (1, 4, 2, 0.5))
enter, leave = SimpleNamespace(calls=[]), SimpleNamespace(calls=[])
runtime, kernel = SimpleNamespace(launch_enter_hook=enter, launch_exit_hook=leave), SimpleNamespace(pre_run_hooks=[])


def ask(sources, lse=True, **changes):
    given = {"fusion": "joint", "scale": None, "is_causal": False} | changes
    known = direct.attention(x, sources, *given.values(), 0.0, None, lse, False, "triton")
    return C.fusion_called(x, sources, *given.values(), lse, True) if known is None else known


def attend(lse=True, **changes):
    return ask([(key, value)], lse, **changes)


def keep(recording, tracked=True, flash=None, backward=backward, **changes):
    name, *_ = attend(**changes)
    return C.fusion_keep_recorded(
        name, recording, [0, 1], tracked, True, flash, backward, "the plan", runtime, [kernel]
    )


known = keep(forward)
out, lse = attend()
assert out.stride() == (6, 6, 1, 2) and torch.equal(out.mT.flatten(), 2 * x.flatten())
assert lse.shape == (1, 1, 2) and torch.equal(lse.flatten(), key.flatten()[:2] / 2)
assert out.requires_grad and lse.requires_grad
# Other calls are not known, nor is this one where somebody is to be told of launches.
for changes in ({"fusion": "decoupled"}, {"scale": 0.5}, {"is_causal": True}, {"lse": False}):
    _, tensors, addresses = attend(**changes)
    assert tensors[0] is x and tensors[1] is key and addresses[2] == value.data_ptr()
with torch.no_grad():
    assert len(attend()) == 3
    untracked = keep(forward, tracked=False, lse=False)
    again = attend(lse=False)
    assert torch.equal(again, out) and not again.requires_grad and not again.is_inference()
with torch.inference_mode():
    assert attend(lse=False).is_inference()
for told in (enter.calls, leave.calls, kernel.pre_run_hooks):
    told.append(print)
    assert len(attend()) == 3
    told.clear()
leave.calls = ()
runtime.launch_exit_hook = print
assert len(attend()) == 3
runtime.launch_exit_hook = None
assert len(attend()) == 2
with torch.autocast("cpu"):
    assert attend() is None
os.environ["MMFAST_BACKEND"] = "reference"
assert C.fusion_called(x, [(key, value)], "joint", None, False, True, True) is None
del os.environ["MMFAST_BACKEND"]

# Not recorded yet: the plan is asked.
up = torch.randn(1, 1, 3, 2).mT
(of_x,) = torch.autograd.grad(out, x, up)
assert torch.equal(of_x, 2 * up) and plan.calls == 1

# Recorded: the gradient of the key lies in memory of (2, 3) and is summed over what it was broadcast along.
rooms = [((1, 1, 2, 3), (6, 6, 1, 2)), ((1, 1, 2, 3), (6, 6, 3, 1))]
backward.keep(plan.key, recording(rooms, (4, 6, 6, 3.0), (4, 7, 6, 5.0)), [0, 1, -1])
out, lse = attend()
of_x, of_key = torch.autograd.grad(out, (x, key), up)
assert torch.equal(of_x, 3 * up) and plan.calls == 1
torch.testing.assert_close(of_key, 5 * up.mT.reshape(1, 1, 2, 3).sum(2, keepdim=True))

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
refused = recording(rooms)
refused.add(9, (4, 2, 1), 64, 16, [0] * 6, [])
other = keep(refused, scale=0.7)
try:
    attend(scale=0.7)
except RuntimeError as error:
    assert "CUDA's error 3" in str(error)
else:
    raise AssertionError

# Memory is filled where that is asked for.
torch.use_deterministic_algorithms(True)
assert recording([((2, 3), (1, 2))]).again([], 0)[0].isnan().all()
torch.use_deterministic_algorithms(False)

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
x = torch.randn(1, 1, 2, 3, requires_grad=True)
for _ in range(2):
    out, lse = attend()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        out.backward(up)
    assert torch.equal(x.grad, 2 * up)
    x.grad = None
out, lse = attend()
del backward, keep
out.backward(up)
assert torch.equal(x.grad, 2 * up)

# A call is known as long as its plan lives.
del known
assert len(attend()) == 3

# Flash attends to each source; what it gives is merged, and its backward is given output and log-sum-exp of the merge.
seen = []


def flash(query, key, value, dropout=0.0, causal=False, mask=False, *, scale):
    seen.append((key, value, causal, scale))
    empty = torch.empty(0)
    return query + len(seen), query[..., 0] + len(seen), empty, empty, 2, 1, empty, empty, empty


def flash_backward(grad, query, key, value, out, lse, *rest, scale):
    assert grad.stride(3) == 1 and rest[2:6] == (2, 1, 0.0, False) and scale == 0.25
    seen.append((out, lse))
    return grad + len(seen), key + 1, value + len(seen)


library = torch.library.Library("aten", "IMPL")
library.impl("_scaled_dot_product_flash_attention", flash, "CPU")
library.impl("_scaled_dot_product_flash_attention_backward", flash_backward, "CPU")
other, other_value = torch.randn(1, 1, 1, 3, requires_grad=True), torch.randn(1, 1, 1, 3)
backward = C.RecordedBackward()
plan.number = backward.number


def attend():
    return ask([(key, value), (other, other_value)], scale=0.25)


# Of the four that it is given, the second output is doubled and the first log-sum-exp halved.
merge = recording([((1, 1, 2, 3), (6, 6, 3, 1)), ((1, 1, 1, 2), (2, 2, 2, 1))], (1, 4, 6, 2.0), (2, 5, 2, 0.5))
known = C.fusion_keep_recorded(
    attend()[0], merge, [0, 1], True, True, (0.25, False), backward, "the plan", runtime, [kernel]
)
out, lse = attend()
torch.testing.assert_close(out, 2 * (x + 2))
torch.testing.assert_close(lse, (x[..., 0] + 1) / 2)
assert [s[2:] for s in seen] == [(False, 0.25)] * 2 and torch.equal(seen[1][0], other)
before, seen[:] = plan.calls, []
of_x, of_key, of_other = torch.autograd.grad(out, (x, key, other), up, retain_graph=True)
assert plan.calls == before and all(torch.equal(s[0], out) and torch.equal(s[1], lse) for s in seen)
torch.testing.assert_close(of_x, 2 * up + 3)
assert torch.equal(of_key, key + 1) and torch.equal(of_other, other + 1)


def differentiate(number, text, *rest):
    plan.calls += 1
    return [None] * 5


triton_direct.differentiate = differentiate
torch.autograd.grad(out.sum() + lse.sum(), x, allow_unused=True)
assert plan.calls == before + 1
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


def _randn(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype).requires_grad_()


def _sources(name):
    """Query, sources and whether the softmax is causal."""
    half = torch.float16
    pair = _randn(2, 4, 5, 8), _randn(2, 4, 5, 8)
    halves = tuple(x.detach().half().requires_grad_() for x in pair)
    return {
        "one": (_randn(2, 4, 3, 8), [pair], True),
        "grouped": (_randn(2, 8, 3, 8), [pair], False),
        "shared query": (_randn(1, 4, 3, 8), [pair], False),
        "gate of queries": (
            _randn(2, 4, 3, 8, dtype=half),
            [Source(*halves, gate=_randn(2, 4, 3, 1, dtype=half))],
            False,
        ),
        "gate of heads": (_randn(2, 4, 3, 8, dtype=half), [Source(*halves, gate=_randn(4))], False),
        "several": (
            _randn(2, 8, 3, 8),
            [Source(*pair, gate=0.5), Source(_randn(1, 8, 7, 8), _randn(1, 8, 7, 8), gate=_randn(1, 1, 1, 1)), pair],
            False,
        ),
    }[name]  # fmt: skip


def _called(query, sources, causal=False):
    """What is known of a call, or else how it is called."""
    known = direct.attention(query, sources, "decoupled", None, causal, 0.0, None, False, False, "triton")
    if known is not None:
        return known
    return _backend._C.fusion_called(query, sources, "decoupled", None, causal, False, True)


NAMES = ["one", "grouped", "shared query", "gate of queries", "gate of heads", "several"]


@pytest.mark.parametrize("tracked", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_written_out(name, tracked):
    """The extension calls scaled_dot_product_attention as `_Composed` does, gradients and their gradients too."""
    query, sources, causal = _sources(name)

    def called():
        return _called(query, sources, causal)

    with torch.set_grad_enabled(tracked), sdpa_kernel(SDPBackend.MATH):  # which has second derivatives
        key, tensors, addresses = called()
        gates = [s.gate if isinstance(s, Source) else None for s in sources]
        given = [Source(s[0], s[1], gate=g) for s, g in zip(sources, gates, strict=True)]
        plan = triton_direct._Composed(query, given, 8**-0.5, causal)
        expected = plan(tensors, addresses).out
        plan.tell(key, tensors)
        ours = called()
        assert ours.dtype == query.dtype and ours.requires_grad is tracked
        torch.testing.assert_close(ours, expected)
        with torch.overrides.TorchFunctionMode():  # who is told of functions is told of this one
            assert len(called()) == 3
    if tracked:
        leaves = [x for s in [(query,), *sources] for x in s if isinstance(x, torch.Tensor)]
        grad, onward, seconds = torch.randn_like(ours), torch.randn_like(query), []
        for out in (ours, expected):
            first = torch.autograd.grad(out, leaves, grad, create_graph=True)
            seconds.append([*first, *torch.autograd.grad(first[0], leaves, onward, allow_unused=True)])
        tolerance = {"atol": 4e-2, "rtol": 1e-2} if query.dtype == torch.float16 else {}
        torch.testing.assert_close(*seconds, **tolerance)
    del plan
    with torch.set_grad_enabled(tracked):
        assert len(called()) == 3


def test_gradient_of_a_gate_is_no_sum_in_half_precision():
    """As in `_Composed`: 65504 is exceeded on the way."""
    query, ones = torch.randn(1, 4, 256, 8).half(), torch.ones(1, 4, 5, 8).half()
    gate = torch.ones(1, 1, 1, 1).requires_grad_()
    source = Source(ones, ones, gate=gate)
    key, tensors, _ = _called(query, source)
    plan = triton_direct._Composed(query, [source], 0.3, False)
    plan.tell(key, tensors)
    out = _called(query, source)
    (grad,) = torch.autograd.grad(out, gate, torch.full_like(out, 100))
    torch.testing.assert_close(grad.squeeze(), torch.tensor(100.0 * out.numel()))
