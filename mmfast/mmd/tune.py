"""`mmfast tune mmd`: measures sizes of tiles on this machine's GPU, and keeps the fastest for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from mmfast.mmd import triton_tuning
from mmfast.mmd.triton_tuning import WIDTHS, Sizes

_FORMATS = ((torch.float16, 2, "float32"), (torch.float16, 1, "tf32"), (torch.bfloat16, 1, "bfloat16"))


class CannotTune(RuntimeError):
    """There is nothing to measure on."""


def choices(default: Sizes) -> Iterator[Sizes]:
    """The table's choice first, then those near it. Those that do not fit a GPU fail when they are tried."""
    yield default
    for block, warps in ((128, 8), (128, 4), (64, 4)):
        for step in (32, 64, 128):
            for stages in (2, 3, 4):
                sizes = dataclasses.replace(default, block=block, warps=warps, step=step, stages=stages)
                if sizes != default:
                    yield sizes
    for cols in (64, 128, 256):
        for warps in (4, 8):
            for stages in (2, 3):
                sizes = dataclasses.replace(default, cols=cols, product_warps=warps, product_stages=stages)
                if sizes != default:
                    yield sizes


def tune(quick: bool = False, say=print) -> str:
    """Measures a forward and backward step for each width and precision; the path of the file with what was fastest.

    Raises:
        CannotTune: no GPU that torch can use, or no Triton.
    """
    if not torch.cuda.is_available():
        raise CannotTune("tune measures on a GPU, and torch can use none here; without one the built-in table stands")
    try:
        import triton
    except ImportError as error:
        raise CannotTune("tune measures Triton kernels, and triton is not installed; pip install triton") from error
    device = torch.device("cuda", torch.cuda.current_device())
    name, arch = torch.cuda.get_device_name(device), triton_tuning.architecture(device)
    found = {}
    for width in WIDTHS:
        for dtype, parts, precision in _FORMATS:
            key = triton_tuning.key(name, width, dtype, parts)
            default = triton_tuning.default(arch, width, dtype, parts)
            times = {}
            for sizes in choices(default):
                time = _time(device, width, sizes, precision, 2048 if quick else 8192, triton)
                if time is not None:
                    times[sizes] = time
            if not times:
                say(f"{key}: nothing ran")
                continue
            best = min(times, key=times.get)
            found[key] = best
            before = f"{times[default]:.3f} ms" if default in times else "does not run"
            say(f"{key}: {times[best]:.3f} ms, the table's choice {before}; {best}")
    for gradient in (False, True):
        _try_pairs(device, name, gradient, triton, say)
    return str(triton_tuning.save(found))


def _try_pairs(device: torch.device, name: str, gradient: bool, triton, say) -> None:
    """Values of 64 features, or those and gradients, by warpgroups and without them, where the extension has them."""
    from mmfast import kernels
    from mmfast.mmd import mmd2, triton_narrow_launch

    if not triton_narrow_launch.has_pairs(device):
        return
    x = torch.randn(16384, 64, device=device, requires_grad=gradient)
    y = (torch.randn(16384, 64, device=device) + 0.1).requires_grad_(gradient)

    def step(kernel) -> tuple[torch.Tensor, ...]:
        value = mmd2(x, y, kernel, backend="triton")
        return (value, *torch.autograd.grad(value, (x, y))) if gradient else (value,)

    found, times = {}, {}
    try:
        for way in (False, True):
            triton_narrow_launch.use_pairs(way, way)
            kernel = kernels.MultiGaussian(bandwidth="dan")  # a kernel remembers how it was computed
            found[way] = step(kernel)
            times[way] = triton.testing.do_bench(
                lambda kernel=kernel: step(kernel), warmup=10, rep=50, return_mode="median"
            )
    finally:
        triton_narrow_launch.use_pairs(None)
    off = [float((a - b).norm() / b.norm()) for a, b in zip(found[True], found[False], strict=True)]
    same = all(o <= 1e-4 for o in off)
    triton_tuning.save_pairs(name, gradient, same and times[True] < times[False])
    say(
        f"{name}, values {'and gradients ' if gradient else ''}of 64 features: {times[False]:.3f} ms, by warpgroups "
        f"{times[True]:.3f} ms" + ("" if same else f"; not used, for it is off by {off} of what is right")
    )


def _time(device: torch.device, width: int, sizes: Sizes, precision: str, n: int, triton) -> float | None:
    """Median milliseconds of a step, or None where the sizes do not fit the GPU."""
    from mmfast import kernels
    from mmfast.mmd import mmd2, triton_points
    from mmfast.mmd import precision as named

    x = torch.randn(n, width, device=device, requires_grad=True)
    y = torch.randn(n, width, device=device, requires_grad=True)
    kernel = kernels.MultiGaussian(bandwidth=2.0 * width)

    def step() -> None:
        torch.autograd.grad(mmd2(x, y, kernel, backend="triton"), (x, y))

    triton_points.use(sizes)
    try:
        with named(precision):
            step()
            return triton.testing.do_bench(step, warmup=10, rep=50, return_mode="median")
    except (triton.runtime.errors.OutOfResources, triton.compiler.errors.CompilationError, RuntimeError):
        return None
    finally:
        triton_points.use(None)
