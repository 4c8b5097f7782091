"""Markers that decide between skipping and failing: a machine that claims to have something must have it."""

import os

import pytest
import torch

from mmfast import _backend


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        _missing("MMFAST_REQUIRE_CUDA", "torch sees no GPU")
    if item.get_closest_marker("native") and _backend._C is None:
        _missing("MMFAST_REQUIRE_NATIVE", str(_backend.LOAD_ERROR))


def _missing(variable: str, reason: str) -> None:
    if os.environ.get(variable) == "1":
        pytest.fail(f"{variable}=1, but {reason}", pytrace=False)
    pytest.skip(reason)
