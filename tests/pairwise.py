"""MMD by its definition, pair by pair and term by term: what the drop-ins are compared with."""

from __future__ import annotations

import torch


def samples(n: int, m: int, *widths: int, shift: float = 0.5) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    x = [torch.randn(n, d, dtype=torch.float64, requires_grad=True) for d in widths]
    y = [(torch.randn(m, d, dtype=torch.float64) + shift).requires_grad_() for d in widths]
    return x, y


def assert_same(actual, expected, inputs, rtol=1e-10, atol=1e-13):
    """The same value, and the same gradient for each of ``inputs``; graphs are kept."""
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)
    ours, theirs = (torch.autograd.grad(value.sum(), inputs, retain_graph=True) for value in (actual, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def matrix(kernel, x, y):
    """``kernel(a, b)`` of each pair of rows, ``(n, m)``."""
    return torch.stack([torch.stack([kernel(a, b) for b in y]) for a in x])


def gaussian_ladder(x, y, mul, num, sigma):
    """DAN's kernel of all pairs of both samples, ``(n + m, n + m)``."""
    z = torch.cat([x, y])
    square = [[(a - b).square().sum() for b in z] for a in z]
    width = sigma or sum(s.detach() for row in square for s in row) / (len(z) * (len(z) - 1))
    bands = [width * mul ** (i - num // 2) for i in range(num)]
    return torch.stack([torch.stack([sum(torch.exp(-s / b) for b in bands) for s in row]) for row in square])


def unbiased(k, n):
    """The U-statistic, from the matrix of both samples, the first of which has n rows."""
    m = len(k) - n
    xx = sum(k[i, j] for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    yy = sum(k[n + i, n + j] for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return xx + yy - 2 * sum(k[i, n + j] for i in range(n) for j in range(m)) / (n * m)


def biased(k, n, a=None, b=None):
    """aᵀ K_xx a + bᵀ K_yy b − 2 aᵀ K_xy b of a matrix of both samples; equal weights unless given."""
    m = len(k) - n
    w = [*([1 / n] * n if a is None else a), *(-v for v in ([1 / m] * m if b is None else b))]
    return sum(w[i] * w[j] * k[i, j] for i in range(n + m) for j in range(n + m))
