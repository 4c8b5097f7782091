"""What Python makes of the CUDA kernel for few features, with a definition in its place: no GPU is needed.

The kernel itself runs on the host in tests/native/test_mmd_block.cpp, and on the GPU in tests/test_mmd_cuda.py.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from mmfast import _backend
from mmfast.mmd import cuda, reference
from mmfast.mmd.terms import GAUSSIAN, Terms


def kernel(x, y, wx, wy, coefs, params, families, gradient, all_sums):
    """As ``_C.mmd_quadratic_few``, in two shares: Gaussians, whole matrices and autograd."""
    z = torch.cat((x, y), 1).double().requires_grad_()
    n, total = x.shape[1], z.shape[1]
    w = torch.cat([torch.ones_like(t[..., 0]) if v is None else v for t, v in ((x, wx), (y, wy))], 1).double()
    values = reference.off_diagonal([z], Terms(tuple(families), (0,) * len(families), params)).double()
    of_x = torch.arange(total) < n
    rows = torch.stack([(values * w[:, None] * part).sum(2) for part in (of_x, ~of_x)], 1)
    a = [w * of_x, w * ~of_x]
    forms = [(a[i][:, :, None] * values * a[j][:, None]).sum() for i, j in ((0, 0), (1, 1), (0, 1))]
    (grad,) = torch.autograd.grad(sum(c * f for c, f in zip(coefs, forms, strict=True)), z)
    rows, grad = rows.detach(), grad.to(x.dtype)
    return torch.stack((0.25 * rows, 0.75 * rows), 1), torch.stack((0.25 * grad, 0.75 * grad), 1)


@pytest.mark.parametrize("weights", [(False, False), (True, True), (True, False)])
def test_combination(weights, monkeypatch):
    monkeypatch.setattr(_backend, "_C", SimpleNamespace(mmd_quadratic_few=kernel))
    leaves = [torch.randn(2, n, 3, dtype=torch.float64, requires_grad=True) for n in (6, 5)]
    leaves += [
        torch.rand(2, n, dtype=torch.float64, requires_grad=True) if given else None
        for n, given in zip((6, 5), weights, strict=True)
    ]
    coefs = torch.tensor([0.2, 0.3, -0.7], dtype=torch.float64)
    params = torch.tensor([[1.0, 0.3, 0, 0], [0.5, 0.1, 0, 0]], dtype=torch.float64)
    table = params, [3], [GAUSSIAN] * 2, [0, 0]
    need = [t is not None for t in leaves] + [False, False]
    assert cuda.fits(*leaves, coefs, *table, need)
    value, sums, *units = cuda.quadratic_forward(*leaves, coefs, *table, need)
    x, y, wx, wy = leaves
    expected, expected_sums = reference.quadratic([x], [y], wx, wy, coefs, Terms((GAUSSIAN,) * 2, (0, 0), params))
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(sums, expected_sums)
    given = [t for t in leaves if t is not None]
    grads = torch.autograd.grad(expected.sum(), given)
    for unit, grad in zip([u for u, n in zip(units, need, strict=False) if n], grads, strict=True):
        torch.testing.assert_close(unit, grad)


def test_what_does_not_fit(monkeypatch):
    params, need = torch.zeros(1, 4), [True] * 4 + [False] * 2
    monkeypatch.setattr(_backend, "_C", SimpleNamespace(mmd_quadratic_few=kernel))

    def fits(dims, terms=1, need=need):
        return cuda.fits(None, None, None, None, None, params, dims, [GAUSSIAN] * terms, [0] * terms, need)

    assert fits([16]) and fits([3], 64)
    assert not fits([17]) and not fits([3, 3]) and not fits([3], 65)
    assert not fits([3], need=[True] * 5 + [False])  # gradients of the parameters
    monkeypatch.setattr(_backend, "_C", None)
    assert not fits([3])
