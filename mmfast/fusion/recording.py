"""Launches of kernels written down once and made again, for calls that differ in addresses only.

Triton's own launch looks at every argument, entry by entry of every tuple, and the Python before it works out grids,
strides and tiles: for two sources 300 µs, more than the kernels take. All of it depends on shapes, strides, dtypes and
alignments alone. So the first call of a kind records what it allocates (`room`) and launches (`launch`), and the ones
that follow allocate the same and hand the compiled kernels the new addresses. Kernels of the extension, which launches
them itself, tell what they were given (`launched`).
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mmfast import _backend


class _Local(threading.local):
    recorder: _Recorder | None = None


_local = _Local()


class _Unfit(Exception):
    """An argument whose address is that of no tensor known."""


def room(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised memory on the device of ``like``."""
    made = like.new_empty(shape, dtype=dtype)
    recorder = _local.recorder
    if recorder is not None:
        recorder.made.append(made)
    return made


def launch(kernel, grid: tuple[int, ...], *args, **constants) -> None:
    """``kernel[grid](*args, **constants)``."""
    compiled = kernel[grid](*args, **constants)
    recorder = _local.recorder
    if recorder is not None:
        recorder.launches.append((kernel, grid, args, constants, compiled))


class Told(NamedTuple):
    """A launch of the extension's own: its one argument in words of 64 bits, of which some are addresses."""

    function: int
    grid: tuple[int, int, int]
    threads: int
    shared: int
    words: list[int]
    addresses: list[tuple[int, int]]  # place, address


def is_recorded() -> bool:
    return _local.recorder is not None


def launched(launches: Sequence[tuple]) -> None:
    """Writes down `Told` launches that have been made."""
    recorder = _local.recorder
    if recorder is not None:
        recorder.launches += [Told(*one) for one in launches]


def spoil() -> None:
    """What is computed here no recording would repeat: operators of PyTorch."""
    recorder = _local.recorder
    if recorder is not None:
        recorder.spoilt = True


class _Recorder:
    def __init__(self) -> None:
        self.made: list[Tensor] = []
        self.launches: list[tuple] = []  # of `launch`, or `Told`
        self.spoilt = False


def record(compute: Callable[[], tuple], inputs: Sequence[Tensor]) -> tuple[tuple, Recording | bool]:
    """The result of ``compute``, a tuple of tensors, None and lists of them; and how to come by it again, if that is
    nothing but launches, else False. ``inputs``: all tensors that are not made on the way."""
    recorder, before = _Recorder(), _local.recorder
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
        self.calls = [_Call(*one, slots) for one in recorder.launches if not isinstance(one, Told)]
        self.native = self._native(recorder.launches, slots)
        if len(self.calls) < len(recorder.launches) and (self.calls or self.native is None):
            raise _Unfit  # only the extension can launch these, and only by itself

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

    def _native(self, launches: Sequence[tuple], slots: dict[int, int]):
        """The same in the extension, which launches without Python; None where it or the kernels are not for that."""
        compiled = (one[-1] for one in launches if not isinstance(one, Told))
        if _backend._C is None or not all(map(_is_simple, compiled)):
            return None
        try:
            native = _backend._C.Recording([(list(s), list(of), kind) for s, of, kind in self.rooms], self.device)
        except RuntimeError:  # no driver
            return None
        calls = iter(self.calls)
        for one in launches:
            if isinstance(one, Told):
                *how, addresses = one
                if any(address not in slots for _, address in addresses):
                    raise _Unfit
                # The words lie side by side, so the first of them is where the one argument begins.
                native.add(*how, [(place, slots[address]) for place, address in addresses])
                continue
            _, _, args, _, compiled = one
            call, words, pointers = next(calls), [], []
            types = compiled.src.signature.values()
            for kind, value in _flat(tuple(types), (*args, *call.tail)):
                if kind[0] == "*":
                    pointers.append((len(words), _slot_of(value, slots)))
                    words.append(0)
                elif (word := _word(kind, value)) is not None:
                    words.append(word)
                else:
                    return None
            words += [0, 0]  # scratch memory, of which there is none
            of = compiled.metadata
            native.add(compiled.function, call.grid, 32 * of.num_warps, of.shared, words, pointers)
        return native

    def is_watched(self) -> bool:
        """Whether somebody is to be told of launches, which Triton does."""
        return any(call.is_watched(call.kernel) for call in self.calls)

    def again(self, inputs: Sequence[Tensor], addresses: Sequence[int]) -> tuple:
        """The result for ``inputs``, which lie at ``addresses``."""
        device = self.device
        if not self.calls:
            made = self.native.again(addresses, stream_of(device.index))
            return self._result(made)
        made = [torch.empty_strided(s, of, dtype=kind, device=device) for s, of, kind in self.rooms]
        where = [*addresses, *[t.data_ptr() for t in made]]
        stream = stream_of(device.index)
        for call in self.calls:
            call(stream, where, (inputs, made))
        return self._result(made)

    def _result(self, made: Sequence[Tensor]) -> tuple:
        return tuple(
            None if at is None else made[at] if type(at) is int else [None if i is None else made[i] for i in at]
            for at in self.result
        )


def stream_of(index: int | None) -> int:
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

            self.run, self.before, self.packed = _launch.without_scratch(compiled)
            self.is_watched = _launch.is_watched

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
            fixed[i] = None  # not kept: neither its memory nor the graph that it is part of
            direct.append((i, _slot_of(x, slots)))
        elif isinstance(x, tuple) and _has_tensor(x):
            fixed[i] = None
            nested.append((i, _filler(x, slots)))
    kind = type(args) if hasattr(args, "_fields") else None

    def fill(values: Sequence) -> tuple:
        out = fixed.copy()
        for i, slot in direct:
            out[i] = values[slot]
        for i, of in nested:
            out[i] = of(values)
        return tuple(out) if kind is None else kind._make(out)

    return fill


def _slot_of(x: Tensor, slots: dict[int, int]) -> int:
    slot = slots.get(x.data_ptr())
    if slot is None and x.numel():
        raise _Unfit
    return slot or 0


def _is_simple(compiled) -> bool:
    """Whether a launch is a grid of blocks and no more."""
    run, of = getattr(compiled, "run", None), getattr(compiled, "metadata", None)
    plain = type(run).__name__ == "CudaLauncher" and not (run.global_scratch_size or run.profile_scratch_size)
    return plain and of.num_ctas == 1 and not (run.launch_cooperative_grid or run.launch_pdl)


def _flat(types: tuple, values: Sequence) -> Iterator[tuple[str, object]]:
    """The arguments that are left at run time, with their types."""
    for kind, value in zip(types, values, strict=True):
        if isinstance(kind, tuple):
            yield from _flat(kind, value)
        elif kind != "constexpr":
            yield kind, value


def _word(kind: str, value) -> int | None:
    """An argument as it lies in the first bytes of 64 bits; None for types that no kernel here has."""
    if kind in ("i1", "u1", "i8", "i16", "i32", "i64", "u8", "u16", "u32", "u64"):
        return int(value) & (1 << 64) - 1
    if kind in ("fp32", "fp64"):
        return int.from_bytes(struct.pack("<f" if kind == "fp32" else "<d", value), "little")
    return None


def _has_tensor(x: tuple) -> bool:
    return any(isinstance(y, Tensor) or (isinstance(y, tuple) and _has_tensor(y)) for y in x)
