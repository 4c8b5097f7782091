"""Prints what CMake needs to know of the running Python's torch, one `NAME=value` a line."""

import sysconfig
from pathlib import Path

import torch

root = Path(torch.__file__).parent
print(f"TORCH_ROOT={root}")
print(f"TORCH_ABI={int(torch.compiled_with_cxx11_abi())}")
print(f"TORCH_CUDA={torch.version.cuda or ''}")
print(f"PYTHON_INCLUDE={sysconfig.get_paths()['include']}")
print(f"PYTHON_SUFFIX={sysconfig.get_config_var('EXT_SUFFIX')}")
