"""Derivatives by torch.func and in forward mode: nothing is lost where a kernel has no formula for them."""

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad

import mmfast
from mmfast.kernels import Gaussian
from mmfast.mel import MelConfig, extract

KEYS, OTHERS = torch.randn(2, 3, 4, 7, 8, generator=torch.Generator().manual_seed(1)).unbind()
POINTS = torch.randn(9, 5, generator=torch.Generator().manual_seed(2))
CONFIG = MelConfig(n_fft=64, hop_length=20, n_mels=10, log="ln", log_offset=1e-3)

FUNCTIONS = {
    "mel": ((2, 300), lambda x, b: extract(x, CONFIG, backend=b)),
    "mfcc": ((2, 300), lambda x, b: extract(x, CONFIG.replace(n_mfcc=4), backend=b)),
    "mmd2": ((7, 5), lambda x, b: mmfast.mmd2(x, POINTS.to(x), kernel=Gaussian(1.0), backend=b)),
    "kernel_matmul": ((7, 5), lambda x, b: mmfast.kernel_matmul(x, POINTS.to(x), POINTS.to(x), backend=b)),
    "hsic": ((9, 5), lambda x, b: mmfast.hsic(x, POINTS.to(x), backend=b)),
    "joint": (
        (3, 4, 6, 8),
        lambda x, b: mmfast.cross_attention(x, [(KEYS.to(x), OTHERS.to(x)), (OTHERS.to(x), KEYS.to(x))], backend=b),
    ),
    "decoupled": (
        (3, 4, 6, 8),
        lambda x, b: mmfast.cross_attention(
            x, [(KEYS.to(x), OTHERS.to(x)), (OTHERS.to(x), KEYS.to(x))], fusion="decoupled", backend=b
        ),
    ),
    "pool": ((3, 4, 6, 8), lambda x, b: mmfast.fusion.attention_pool(x, [(KEYS.to(x), OTHERS.to(x))], backend=b)),
}


def _gradient(f, x):
    return torch.func.grad(lambda x: f(x).sin().sum())(x)


def _jvp(f, x):
    return torch.func.jvp(f, (x,), (x.cos(),))[1]


def _dual(f, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, x.cos()))).tangent


def _forward_over_reverse(f, x):
    return torch.func.jvp(lambda x: _gradient(f, x), (x,), (x.cos(),))[1]


def _of_each_sample(f, x):
    return torch.func.vmap(lambda row: _gradient(lambda r: f(r[None]), row))(x)


@pytest.mark.parametrize(
    "name, derive",
    [(n, d) for n in FUNCTIONS for d in (_gradient, _jvp, _dual, _forward_over_reverse)]
    + [("mel", _of_each_sample), ("mfcc", _of_each_sample)],
)
def test_derivatives_by_formula(name, derive, backend):
    shape, function = FUNCTIONS[name]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    for asked in (backend, None):
        actual = derive(lambda x, asked=asked: function(x, asked), x)
        expected = derive(lambda x: function(x, "reference"), x.double())
        assert expected.abs().max() > 0
        torch.testing.assert_close(actual.double(), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def _first_on_fakes(f, x):
    with FakeTensorMode() as mode:
        f(mode.from_tensor(x))


def _first_by_default_elsewhere(f, x):
    with torch.device("meta"):
        f(x)


def _first_in_inference_mode(f, x):
    with torch.inference_mode():
        f(x)


_FIRST_CALLS = [_gradient, _dual, _first_by_default_elsewhere, _first_in_inference_mode]


@pytest.mark.parametrize(
    "name, call",
    [(name, call) for name in ("mel", "mmd2") for call in _FIRST_CALLS]
    + [("mel", _first_on_fakes)],  # POINTS, which mmd2 takes, is a real tensor
)
def test_first_call_leaves_no_mark(name, call):
    """What is kept from a first call under a transform, a mode or another default device serves any later call."""
    window = {_gradient: 48, _dual: 49, _first_on_fakes: 50, _first_by_default_elsewhere: 51}.get(call, 52)
    if name == "mel":  # a configuration that nobody had before
        shape, function = (2, 300), lambda x: extract(x, CONFIG.replace(win_length=window, n_mfcc=5))
    else:
        kernel = mmfast.kernels.MultiGaussian(bandwidth="dan") + 0.5 * Gaussian(1.0)
        shape, function = (7, 5), lambda x: mmfast.mmd2(x, POINTS, kernel=kernel)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    call(function, x)
    x.requires_grad_()
    out = function(x)
    out.sum().backward()
    assert type(out) is torch.Tensor and type(x.grad) is torch.Tensor and out.device.type == "cpu"
    assert out.isfinite().all() and x.grad.isfinite().all() and x.grad.abs().sum() > 0
