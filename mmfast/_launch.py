"""Launches of Triton kernels whose compiled form is found once: from then on a launch costs little more than a call.

Triton's ``kernel[grid](...)`` looks at each argument before each launch to find what it has compiled for such ones: 20
to 40 µs for a kernel with 20 arguments, where a small batch keeps the device busy for 3. Here the caller says by a key
which launches are alike.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from types import BuiltinFunctionType

import triton
from torch import Tensor
from triton import knobs
from triton.runtime import JITFunction, driver

from mmfast._backend import on_device_of

_MOST = 4096  # launches that are remembered
_found: dict[tuple, tuple] = {}
_VERSION = triton.__version__.split(".")[:2]


def launch(
    kernel,
    grid: tuple[int, ...],
    args: Sequence | Callable[[], Sequence],
    constants: Mapping[str, object],
    key: Hashable,
    placed: Sequence | None = None,
) -> None:
    """``kernel[grid](*args, **constants)`` on the current stream of the current device.

    Args:
        kernel: of ``triton.jit``.
        grid: up to three numbers.
        args: what the kernel's first parameters are, or a function that gives them, which a known launch that is
            ``placed`` does not call.
        constants: the parameters behind them, by name, and options such as ``num_warps``.
        key: equal where the launches have the same constants and their arguments are alike to Triton: the dtypes of
            tensors and whether they begin at a multiple of 16 bytes (`places`), and of whole numbers which are 1, which
            are multiples of 16 and which take more than 32 bits. It need not name the kernel or the device.
        placed: ``args`` with addresses in place of the tensors, which a launch takes faster.
    """
    if type(kernel) is not JITFunction:  # the interpreter's
        kernel[grid](*(args() if callable(args) else args), **constants)
        return
    active = driver.active
    device = active.get_current_device()
    known = id(kernel), device, key
    found = _found.get(known)
    if found is None or is_watched(kernel):
        args = args() if callable(args) else args
        compiled = kernel[grid](*args, **constants)
        if found is None:
            if len(_found) >= _MOST:
                _found.clear()
            behind = kernel.arg_names[len(args) :]
            last = tuple(constants[n] if n in constants else kernel.signature.parameters[n].default for n in behind)
            # What was compiled is held, and the kernel too: its id must not become another one's.
            _found[known] = *without_scratch(compiled), last, (kernel, compiled)
        return
    run, before, packed, last, _ = found
    x, y, z = grid if len(grid) == 3 else (*grid, 1, 1)[:3]
    stream = active.get_current_stream(device)
    if placed is not None:
        args = placed
    elif callable(args):
        args = args()
    if packed:
        run(x, y, z, stream, *before, (*args, *last))
    else:
        run(x, y, z, stream, *before, *args, *last)


def launch_as_given(kernel, grid: tuple[int, ...], args: Sequence, constants: Mapping[str, object]) -> None:
    """`launch` on the device of the first argument, a tensor, where all arguments are the key: tensors and numbers.

    For kernels that take longer, or whose arguments have no shorter description.
    """
    key, placed = list(constants.items()), []
    for arg in args:
        if isinstance(arg, Tensor):
            address = arg.data_ptr()
            placed.append(address)
            key.append((arg.dtype, address & 15 == 0))
        else:
            placed.append(arg)
            key.append(arg)
    with on_device_of(args[0]):
        launch(kernel, grid, args, constants, tuple(key), placed)


def without_scratch(compiled) -> tuple[Callable, tuple, bool]:
    """What to launch with, what stands between the stream and the arguments, and whether these are one tuple.

    Triton's launcher is a function in C, and around it one in Python that brings memory for kernels that need it. Where
    this one does not, and the function in C takes what it is known to take, it is called itself.
    """
    run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
    inner, hooks = getattr(run, "launch", None), (None, None, None)
    if type(run).__name__ == "CudaLauncher" and isinstance(inner, BuiltinFunctionType):
        scratch = run.global_scratch_size or run.profile_scratch_size
        how = function, run.launch_cooperative_grid, run.launch_pdl
        if _VERSION == ["3", "6"] and not scratch:
            return inner, (*how, None, None, metadata, *hooks), False
        if _VERSION == ["3", "9"] and not scratch and not run.gsan_enabled:
            types = run.arg_annotations, run.kernel_signature
            return inner, (*how, metadata, *hooks, None, None, *types), True
    return run, (function, metadata, *hooks), False


def is_watched(kernel) -> bool:
    """True where somebody is to be told of launches, which Triton does."""
    runtime = knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave) or kernel.pre_run_hooks)


def key_at(key: Hashable, *addresses: int) -> Hashable:
    """``key`` of launches at these addresses: Triton compiles for those that are multiples of 16, as nearly all are."""
    odd = 0
    for address in addresses:
        odd |= address
    return (key, *[address & 15 for address in addresses]) if odd & 15 else key
