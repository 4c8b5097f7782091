"""KID over all samples against double loops, and its standard error against what repeated samples show."""

from __future__ import annotations

import pytest
import torch

import mmfast
from mmfast.kernels import Polynomial


def samples(n: int = 9, m: int = 7, d: int = 5, dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(n, d, dtype=dtype), 1.2 * torch.randn(m, d, dtype=dtype) + 0.3


def definition(x, y, degree=3, gamma=None, coef=1.0) -> float:
    gamma = 1 / x.shape[1] if gamma is None else gamma

    def mean(a, b, same):
        pairs = [(p, q) for i, p in enumerate(a) for j, q in enumerate(b) if not (same and i == j)]
        return sum((gamma * float(p @ q) + coef) ** degree for p, q in pairs) / len(pairs)

    return mean(x, x, True) + mean(y, y, True) - 2 * mean(x, y, False)


@pytest.mark.parametrize(
    "options", [{}, {"degree": 2, "gamma": 0.3, "coef": -0.5}, {"degree": 1, "coef": 0.0}], ids=str
)
@pytest.mark.parametrize("sizes", [(9, 7), (4, 4), (6, 30)])
def test_matches_definition(sizes, options, mmd_backend):
    x, y = samples(*sizes)
    value, error = mmfast.kid(x, y, **options, backend=mmd_backend)
    assert value.item() == pytest.approx(definition(x, y, **options), rel=1e-10)
    assert value.dtype == error.dtype == torch.float64
    kernel = Polynomial(options.get("degree", 3), options.get("gamma"), options.get("coef", 1.0))
    variance = mmfast.mmd2_variance(x, y, kernel, backend=mmd_backend)
    torch.testing.assert_close(error, variance.sqrt(), equal_nan=True)
    torch.testing.assert_close(value, mmfast.mmd2(x, y, kernel, backend=mmd_backend))


@pytest.mark.parametrize("shift", [0.0, 0.4])
def test_standard_error_is_that_of_repeated_samples(shift):
    """The mean of the squared errors is the variance of the values, where the samples differ and where they do not."""
    x, y = torch.randn(4000, 25, 3), torch.randn(4000, 18, 3) + shift
    values, errors = mmfast.kid(x.double(), y.double())
    variances = mmfast.mmd2_variance(x.double(), y.double(), Polynomial())
    torch.testing.assert_close(errors, variances.sqrt(), equal_nan=True)
    assert variances.mean().item() == pytest.approx(values.var().item(), rel=0.1)
    if shift == 0:  # unbiased
        assert abs(values.mean()) < 4 * (values.var() / len(values)).sqrt()


def test_standard_error_of_the_mean_of_subsets_is_larger():
    """What metrics of subsets call the deviation is that of a subset."""
    x, y = torch.randn(1200, 16), torch.randn(1200, 16) + 0.05
    subsets = torch.stack([mmfast.mmd2(a, b, Polynomial()) for a, b in zip(x.split(100), y.split(100), strict=True)])
    assert mmfast.kid(x, y).standard_error < 0.5 * subsets.std()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(dtype, mmd_backend):
    x, y = (t.to(dtype) for t in samples(40, 30, 64))
    value, error = mmfast.kid(x, y, backend=mmd_backend)
    gold = mmfast.kid(x.double(), y.double(), backend="reference")
    assert value.dtype == error.dtype == torch.float32
    assert value.item() == pytest.approx(gold.value.item(), rel=2e-6)
    assert error.item() == pytest.approx(gold.standard_error.item(), rel=1e-5)


def test_batches(mmd_backend):
    x, y = torch.randn(3, 12, 4).double(), torch.randn(3, 9, 4).double()
    found = mmfast.kid(x, y, backend=mmd_backend)
    each = [mmfast.kid(a, b, backend=mmd_backend) for a, b in zip(x, y, strict=True)]
    torch.testing.assert_close(found.value, torch.stack([one.value for one in each]))
    torch.testing.assert_close(found.standard_error, torch.stack([one.standard_error for one in each]), equal_nan=True)


def test_gradcheck(mmd_backend):
    x, y = (t.requires_grad_() for t in samples(6, 5, 3))
    torch.autograd.gradcheck(lambda a, b: mmfast.kid(a, b, backend=mmd_backend).value, (x, y))
    assert not mmfast.kid(x, y, backend=mmd_backend).standard_error.requires_grad


def test_negative_variance_is_nan():
    """Such samples exist; the estimate says that it does not know."""
    assert mmfast.kid(torch.randn(200, 4, 2).double(), torch.randn(200, 4, 2).double()).standard_error.isnan().any()


def test_rejects():
    x, y = samples()
    with pytest.raises(ValueError, match="features_x must have at least 4 rows for the standard error of a KID, got 3"):
        mmfast.kid(x[:3], y)
    with pytest.raises(ValueError, match="features_y must have at least 4 rows"):
        mmfast.kid(x, y[:2])
    with pytest.raises(ValueError, match="features_x and features_y must have the same number of features"):
        mmfast.kid(x, y[:, :4])
    with pytest.raises(ValueError, match="degree must be an integer >= 1, got 0"):
        mmfast.kid(x, y, degree=0)
    with pytest.raises(TypeError, match="features_x"):
        mmfast.kid(x.numpy(), y.numpy())
