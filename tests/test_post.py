"""Deltas and normalisation: against torchaudio's loops, their formulas, and item by item."""

from __future__ import annotations

import itertools

import pytest
import torch

from mmfast.mel import deltas, normalize, sliding_normalize

LENGTHS = torch.tensor([[30, 7, 1], [0, 30, 12]])
CALLS = {
    "deltas": lambda x, **kw: deltas(x, **kw),
    "deltas_9": lambda x, **kw: deltas(x, 9, **kw),
    "deltas_zeros": lambda x, **kw: deltas(x, 6, "constant", **kw),
    "normalize": lambda x, **kw: normalize(x, **kw),
    "normalize_nemo": lambda x, **kw: normalize(x, eps=1e-5, ddof=1, **kw),
    "normalize_seamless": lambda x, **kw: normalize(x, eps=1e-7, eps_on="variance", ddof=1, **kw),
    "normalize_mean": lambda x, **kw: normalize(x, variance=False, **kw),
    "normalize_variance": lambda x, **kw: normalize(x, mean=False, eps=0.0, **kw),
    "sliding": lambda x, **kw: sliding_normalize(x, 10, 5, **kw),
    "sliding_center": lambda x, **kw: sliding_normalize(x, 9, center=True, norm_vars=True, **kw),
    "sliding_variance": lambda x, **kw: sliding_normalize(x, 10, 8, norm_vars=True, **kw),
}
ALL = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


@pytest.mark.parametrize("win_length", [3, 4, 5, 9])
@pytest.mark.parametrize("mode", ["replicate", "reflect", "constant", "circular"])
def test_deltas_are_torchaudios(mode, win_length):
    functional = pytest.importorskip("torchaudio.functional")
    x = torch.randn(2, 3, 4, 50, dtype=torch.float64)
    expected = functional.compute_deltas(x, win_length, mode)
    torch.testing.assert_close(deltas(x, win_length, mode), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(deltas(x.mT, win_length, mode, dim=-2).mT, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("norm_vars", [False, True])
@pytest.mark.parametrize("center", [False, True])
def test_sliding_is_torchaudios(center, norm_vars):
    functional = pytest.importorskip("torchaudio.functional")
    for frames, window, least in itertools.product((1, 2, 50, 130), (3, 30, 600), (0, 1, 20, 100)):
        x = torch.randn(2, frames, 4, dtype=torch.float64) * 3 + 5
        expected = functional.sliding_window_cmn(x, window, least, center, norm_vars)
        ours = sliding_normalize(x, window, least, center, norm_vars, dim=-2)
        torch.testing.assert_close(ours, expected, rtol=1e-7, atol=1e-7, msg=f"{frames} {window} {least}")
        torch.testing.assert_close(
            sliding_normalize(x.mT, window, least, center, norm_vars).mT, ours, rtol=1e-12, atol=1e-12
        )


def test_normalize_formula():
    x = torch.randn(2, 5, 40, dtype=torch.float64) * 3 + 5
    mean, std, var = x.mean(-1, keepdim=True), x.std(-1, keepdim=True), x.var(-1, keepdim=True, correction=0)
    close = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(normalize(x, eps=0.1, ddof=1), (x - mean) / (std + 0.1), **close)
    torch.testing.assert_close(normalize(x, eps=0.1, eps_on="variance"), (x - mean) / (var + 0.1).sqrt(), **close)
    torch.testing.assert_close(normalize(x, mean=False, eps=0), x / var.sqrt(), **close)
    torch.testing.assert_close(normalize(x, variance=False), x - mean, **close)


@ALL
@pytest.mark.parametrize("dim", [-1, -2])
def test_ragged_equals_single(call, dim):
    """What stands beyond an item's frames, NaN too, changes nothing and gives 0, also in the gradient."""
    x = torch.randn(2, 3, 4, 30, dtype=torch.float64)
    beyond = (torch.arange(30) >= LENGTHS[..., None, None]).expand_as(x)
    poisoned = x.masked_fill(beyond, torch.nan).transpose(dim, -1).requires_grad_()
    ours = call(poisoned, lengths=LENGTHS, dim=dim)
    (gradient,) = torch.autograd.grad(ours.square().sum(), poisoned)
    ours, gradient = ours.transpose(dim, -1), gradient.transpose(dim, -1)
    assert not ours[beyond].any() and not gradient[beyond].any() and gradient.isfinite().all()
    for index in itertools.product(range(2), range(3)):
        length = LENGTHS[index]
        torch.testing.assert_close(ours[index][:, :length], call(x[index][:, :length]), rtol=1e-9, atol=1e-9)


@ALL
def test_gradcheck(call):
    x = torch.randn(2, 3, 12, dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor([12, 6])
    for function in (call, lambda x: call(x, lengths=lengths)):
        torch.autograd.gradcheck(function, x)
        torch.autograd.gradgradcheck(function, x, fast_mode=True)


@ALL
def test_constant_features(call):
    """No variance: finite values and gradients."""
    x = torch.full((2, 3, 20), 0.1, requires_grad=True)
    out = call(x)
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert out.isfinite().all() and gradient.isfinite().all()


@ALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(call, dtype):
    x = (torch.randn(2, 3, 2500) * 3 + 30).to(dtype)
    out = call(x)
    assert out.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), call(x.double()), rtol=4 * eps, atol=max(eps, 1e-5))


@ALL
def test_edge_shapes(call):
    for shape in ((3, 0), (0, 3, 5), (3, 1), (2, 0, 5), (5,)):
        assert call(torch.randn(shape)).shape == shape
    assert call(torch.randn(3, 5), lengths=torch.tensor(4)).shape == (3, 5)
    assert call(torch.randn(0, 3, 5), lengths=torch.zeros(0, dtype=torch.int64)).shape == (0, 3, 5)


def test_drift():
    """Sums over an hour of frames far from zero lose nothing that float32 could show."""
    x = torch.randn(1, 360_000) + 1000
    out = sliding_normalize(x, 300, norm_vars=True)
    last = x[:, -301:].double()
    expected = (last[:, -1] - last.mean()) / last.std(correction=0)
    torch.testing.assert_close(out[:, -1].double(), expected, rtol=1e-6, atol=1e-6)


REJECTED = {
    "features must be a floating point": (TypeError, lambda: deltas(torch.ones(3, 5, dtype=torch.int64))),
    "win_length must be at least 3": (ValueError, lambda: deltas(torch.ones(3, 5), 2)),
    "mode must be one of": (ValueError, lambda: deltas(torch.ones(3, 5), mode="mirror")),
    "dim must be an axis": (ValueError, lambda: normalize(torch.ones(3, 5), dim=2)),
    "lengths must be an int64": (TypeError, lambda: normalize(torch.ones(2, 3, 5), lengths=torch.ones(2))),
    "lengths must have the leading shape": (ValueError, lambda: deltas(torch.ones(2, 3, 5), lengths=torch.tensor([1]))),
    "eps_on must be": (ValueError, lambda: normalize(torch.ones(3, 5), eps_on="mean")),
    "eps and ddof": (ValueError, lambda: normalize(torch.ones(3, 5), eps=-1.0)),
    "cmn_window must be": (ValueError, lambda: sliding_normalize(torch.ones(3, 5), 0)),
    "min_cmn_window must be at least 0": (ValueError, lambda: sliding_normalize(torch.ones(3, 5), min_cmn_window=-1)),
    "cmn_window must be an integer": (TypeError, lambda: sliding_normalize(torch.ones(3, 5), 600.0)),
    "win_length must be an integer": (TypeError, lambda: deltas(torch.ones(3, 5), 5.0)),
}


@pytest.mark.parametrize("message", REJECTED)
def test_rejects(message):
    error, call = REJECTED[message]
    with pytest.raises(error, match=message):
        call()
