"""`torch.jit.trace` of functions that call the native kernels past the operators: they must be recorded there."""

from __future__ import annotations

import warnings

import pytest
import torch

import mmfast
from mmfast.mel import MelConfig, extract

pytestmark = pytest.mark.native


def _attention(query):
    keys = torch.linspace(-1, 1, 2 * 3 * 7 * 8).reshape(2, 3, 7, 8)
    return mmfast.cross_attention(query, [(keys, keys + 1)])


@pytest.mark.parametrize("tracked", [False, True])
@pytest.mark.parametrize(
    ("function", "shape"), [(lambda x: extract(x, MelConfig()), (2, 4000)), (_attention, (2, 3, 5, 8))]
)
def test_records_what_is_computed(function, shape, tracked):
    first, second = torch.randn(shape), torch.randn(shape)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(function, (first.requires_grad_(tracked),), check_trace=False)
    torch.testing.assert_close(traced(second), function(second))
