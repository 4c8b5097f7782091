"""A GPU for Triton where there is none: kernels are compiled for sm_90, and a launch notes what it would launch.

For scripts in a process of their own, without ``TRITON_INTERPRET``. Tensors are on the CPU, and nothing is computed.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget

from mmfast import _backend
from mmfast.mmd import triton_tuning

launches = []  # name of the kernel, grid, stream, and the arguments with addresses in place of tensors
stream = 0


def _launcher(source, metadata):
    def launch(x, y, z, stream, function, packed, launch_metadata, enter, leave, *args):
        if enter is not None:
            enter(launch_metadata)
        placed = tuple(a.data_ptr() if isinstance(a, torch.Tensor) else a for a in args)
        launches.append((metadata.name, (x, y, z), stream, placed))

    return launch


_DRIVER = SimpleNamespace(
    launcher_cls=_launcher,
    utils=SimpleNamespace(
        load_binary=lambda name, binary, shared, device: ("module", "function", 0, 0, 1024),
        unload_module=lambda module: None,
        get_device_properties=lambda device: {"max_shared_mem": 232448},
    ),
    get_current_device=lambda: 0,
    get_current_stream=lambda device: stream,
    get_current_target=lambda: GPUTarget("cuda", 90, 32),
)
triton.runtime.driver.set_active(_DRIVER)
_backend._interprets = lambda op, device: True
triton_tuning.sizes = lambda device, *of: triton_tuning.default("sm_90", *of)
