"""What every test gets: poisoned uninitialised memory, its own random state, and the backends that can run here."""

from __future__ import annotations

import os
import random
import runpy
import sys
from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest
import torch

from mmfast import _backend

try:
    from hypothesis import settings
except ImportError:  # only the tests that use it need it
    pass
else:
    settings.register_profile("repeatable", derandomize=True, deadline=None, print_blob=True)
    settings.register_profile("search", deadline=None, print_blob=True)
    settings.load_profile(os.environ.get("MMFAST_FUZZ", "repeatable"))


# Triton decides at import whether it compiles or interprets: those tests are a run of their own (`make triton-test`).
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreter"]


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        _missing("MMFAST_REQUIRE_CUDA", "no GPU that torch can use")
    if item.get_closest_marker("native"):
        need_native()


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """``torch.empty`` and ``at::empty`` hand out NaN and the largest integer, so that what nobody wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _own_random_state():
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    yield
    random.setstate(before[0])
    np.random.set_state(before[1])
    torch.set_rng_state(before[2])


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend for CPU tensors; ``cpu`` needs the native extension."""
    if request.param == "cpu":
        need_native()
    return request.param


@pytest.fixture(params=["reference", "cpu"])
def mmd_backend(request: pytest.FixtureRequest) -> str:
    """Each backend of the mmd slice for CPU tensors."""
    if request.param == "cpu":
        need_native_mmd()
    return request.param


@pytest.fixture
def mmd_native() -> str:
    """The backend ``cpu``, for what only the native kernels of the mmd slice promise."""
    need_native_mmd()
    return "cpu"


@pytest.fixture
def run_without(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, ModuleType], dict]:
    """The names of a module that is run anew where a package cannot be imported."""

    def run(package: str, module: ModuleType) -> dict:
        for name in [package, *(name for name in sys.modules if name.startswith(f"{package}."))]:
            monkeypatch.setitem(sys.modules, name, None)
        return runpy.run_path(module.__file__)

    return run


def need_cuda() -> None:
    """Skip without CUDA kernels, or fail under ``MMFAST_REQUIRE_CUDA=1``."""
    if "cuda" not in _backend.OPS["mel"]:
        _missing("MMFAST_REQUIRE_CUDA", "the extension is built without CUDA")


@pytest.fixture
def native() -> str:
    """The backend ``cpu``, for what only the native kernels promise."""
    need_native()
    return "cpu"


def need_native() -> None:
    """Skip without the native extension, or fail under ``MMFAST_REQUIRE_NATIVE=1``."""
    if _backend._C is None:
        _missing("MMFAST_REQUIRE_NATIVE", f"the native extension did not load: {_backend.LOAD_ERROR}")


def need_native_mmd() -> None:
    """As `need_native`, where the slice has kernels for the CPU at all."""
    need_native()
    if "cpu" not in _backend.OPS["mmd"]:
        _missing("MMFAST_REQUIRE_NATIVE", "the mmd slice has no kernels for CPU tensors")


def _missing(variable: str, reason: str) -> None:
    if os.environ.get(variable) == "1":
        pytest.fail(f"{variable}=1, but {reason}", pytrace=False)
    pytest.skip(reason)
