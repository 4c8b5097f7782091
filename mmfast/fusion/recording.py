"""Launches of Triton kernels written down once and made again, for calls that differ in addresses only.

Triton's own launch looks at every argument, entry by entry of every tuple, and the Python before it works out grids,
strides and tiles: for two sources 300 µs, more than the kernels take. All of it depends on shapes, strides, dtypes and
alignments alone. So the first call of a kind records what it allocates (`room`) and launches (`launch`), and the ones
that follow allocate the same and hand the compiled kernels the new addresses.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_local = threading.local()


class _Unfit(Exception):
    """An argument whose address is that of no tensor known."""


def room(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised memory on the device of ``like``."""
    made = like.new_empty(shape, dtype=dtype)
    recorder = getattr(_local, "recorder", None)
    if recorder is not None:
        recorder.made.append(made)
    return made


def launch(kernel, grid: tuple[int, ...], *args, **constants) -> None:
    """``kernel[grid](*args, **constants)``."""
    compiled = kernel[grid](*args, **constants)
    recorder = getattr(_local, "recorder", None)
    if recorder is not None:
        recorder.launches.append((kernel, grid, args, constants, compiled))


def spoil() -> None:
    """What is computed here no recording would repeat: operators of PyTorch."""
    recorder = getattr(_local, "recorder", None)
    if recorder is not None:
        recorder.spoilt = True


class _Recorder:
    def __init__(self) -> None:
        self.made: list[Tensor] = []
        self.launches: list[tuple] = []
        self.spoilt = False


def record(compute: Callable[[], tuple], inputs: Sequence[Tensor]) -> tuple[tuple, Recording | bool]:
    """The result of ``compute``, a tuple of tensors, None and lists of them; and how to come by it again, if that is
    nothing but launches, else False. ``inputs``: all tensors that are not made on the way."""
    recorder, before = _Recorder(), getattr(_local, "recorder", None)
    _local.recorder = recorder
    try:
        result = compute()
    finally:
        _local.recorder = before
    if recorder.spoilt or not recorder.launches:
        return result, False
    try:
        return result, Recording(recorder, inputs, result)
    except _Unfit:
        return result, False


class Recording:
    """Memory to allocate, kernels to launch, and which of the memory is the result."""

    def __init__(self, recorder: _Recorder, inputs: Sequence[Tensor], result: tuple) -> None:
        # Memory without elements has no address, and nobody reads it.
        made = [t for t in recorder.made if t.numel()]
        slots: dict[int, int] = {}
        for i, t in enumerate((*inputs, *made)):
            slots.setdefault(t.data_ptr(), i)
        self.rooms = [(t.shape, t.stride(), t.dtype) for t in made]
        self.device = inputs[0].device
        self.result = tuple(self._place(part, slots, len(inputs)) for part in result)
        self.calls = [_Call(*one, slots) for one in recorder.launches]

    def _place(self, part, slots: dict[int, int], first: int):
        """An index of the memory that is made, in whose place its view of this form is allocated."""
        if isinstance(part, (list, tuple)):
            return [self._place(x, slots, first) for x in part]
        if part is None:
            return None
        at = slots.get(part.data_ptr(), -1) - first
        if not part.numel() or at < 0 or part.numel() != torch.Size(self.rooms[at][0]).numel():
            raise _Unfit
        self.rooms[at] = (part.shape, part.stride(), part.dtype)
        return at

    def again(self, inputs: Sequence[Tensor], addresses: Sequence[int]) -> tuple:
        """The result for ``inputs``, which lie at ``addresses``."""
        device = self.device
        made = [torch.empty_strided(s, of, dtype=kind, device=device) for s, of, kind in self.rooms]
        where = [*addresses, *[t.data_ptr() for t in made]]
        stream = _stream(device.index)
        for call in self.calls:
            call(stream, where, (inputs, made))
        return tuple(
            None if at is None else made[at] if type(at) is int else [None if i is None else made[i] for i in at]
            for at in self.result
        )


def _stream(index: int | None) -> int:
    return 0 if index is None else torch._C._cuda_getCurrentRawStream(index)


class _Call:
    """One launch. In Triton's interpreter, which compiles nothing, with tensors in place of addresses."""

    def __init__(self, kernel, grid, args, constants, compiled, slots: dict[int, int]) -> None:
        self.kernel, self.given, self.constants, self.compiled = kernel, grid, constants, compiled
        self.grid = (*grid, *(1,) * (3 - len(grid)))
        self.fill = _filler(tuple(args), slots)
        self.tail = tuple(constants[name] for name in kernel.arg_names[len(args) :])
        if compiled is not None:
            from mmfast import _launch  # here: on the CPU `merged` does without Triton

            self.run, self.before, self.packed = _launch._without_scratch(compiled)
            self.is_watched = _launch._is_watched

    def __call__(self, stream: int, addresses: list[int], tensors: tuple) -> None:
        if self.compiled is None or self.is_watched(self.kernel):
            inputs, made = tensors
            self.kernel[self.given](*self.fill([*inputs, *made]), **self.constants)
        elif self.packed:
            self.run(*self.grid, stream, *self.before, (*self.fill(addresses), *self.tail))
        else:
            self.run(*self.grid, stream, *self.before, *self.fill(addresses), *self.tail)


def _filler(args: tuple, slots: dict[int, int]) -> Callable[[Sequence], tuple]:
    """A function that puts what lies at each slot in the places of tensors in ``args``."""
    fixed, direct, nested = list(args), [], []
    for i, x in enumerate(args):
        if isinstance(x, Tensor):
            slot = slots.get(x.data_ptr())
            if slot is None:
                if x.numel():
                    raise _Unfit
                slot = 0
            direct.append((i, slot))
            fixed[i] = None  # a recording keeps no tensor alive
        elif isinstance(x, tuple) and _has_tensor(x):
            nested.append((i, _filler(x, slots)))
            fixed[i] = None
    kind = type(args) if hasattr(args, "_fields") else None

    def fill(values: Sequence) -> tuple:
        out = fixed.copy()
        for i, slot in direct:
            out[i] = values[slot]
        for i, of in nested:
            out[i] = of(values)
        return tuple(out) if kind is None else kind._make(out)

    return fill


def _has_tensor(x: tuple) -> bool:
    return any(isinstance(y, Tensor) or (isinstance(y, tuple) and _has_tensor(y)) for y in x)
