"""Scores of any size, in any order: maxima that come late, in every order in which the CPU kernels take the keys."""

import pytest
import torch

import mmfast

pytestmark = pytest.mark.native

# Queries, keys of each source, features, fusion.
SHAPES = {
    "panels": (70, [77, 30], 40, "joint"),
    "blocks": (70, [700], 24, "joint"),
    "copies": (20, [301], 20, "joint"),
    "in-place": (33, [257, 90], 64, "joint"),
    "few": (3, [900], 16, "joint"),
    "decoupled": (40, [77, 130], 32, "decoupled"),
}
PROFILES = {
    "even": lambda n: torch.zeros(n),
    "late": lambda n: 5.0 * (torch.arange(n) == n - 2),
    "jump": lambda n: 12.0 * (torch.arange(n) >= 40),
    "cliff": lambda n: 60.0 * (torch.arange(n) >= 11),
    "fall": lambda n: 60.0 * (torch.arange(n) < 6),
    "abyss": lambda n: -100.0 * (torch.arange(n) < 6),
    "ramp": lambda n: 0.25 * torch.arange(n),
    "spikes": lambda n: 4.0 * (torch.arange(n) % 50 == 49) * (1 + torch.arange(n) // 50),
}


def inputs(shape, profile):
    rows, counts, dim, fusion = SHAPES[shape]

    def heads_inside(n):
        return torch.randn(2, n, 4, dim).transpose(1, 2)

    query = heads_inside(rows)
    query[..., 0] = 1
    sources = [(heads_inside(n), heads_inside(n)) for n in counts]
    for key, _ in sources:
        key[..., 0] = PROFILES[profile](key.shape[2])
    return query, sources, fusion


def attend(query, sources, fusion, kind=torch.float32, engine="cpu"):
    query = query.to(kind)
    sources = [(key.to(kind), value.to(kind)) for key, value in sources]
    given = [x.requires_grad_() for x in (query, *(x for pair in sources for x in pair))]
    out, lse = mmfast.cross_attention(query, sources, fusion=fusion, scale=1.0, return_lse=True, backend=engine)
    lse = torch.stack(list(lse)) if isinstance(lse, tuple | list) else lse
    return [out, lse, *torch.autograd.grad((out * out.detach().cos()).sum(), given)]


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("shape", SHAPES)
def test_late_maxima(shape, profile):
    """Outputs, log-sum-exps and gradients as exact as scores of this size can be in float32."""
    query, sources, _ = given = inputs(shape, profile)
    gold = attend(*given, kind=torch.float64, engine="reference")
    ours, reference = attend(*given), attend(*given, engine="reference")
    # The log-sum-exp that gradients start from is as large as the scores, and rounded.
    rounding = 2**-22 * max((query @ key.mT).detach().abs().max() for key, _ in sources)
    for got, eager, expected in zip(ours, reference, gold, strict=True):
        size = expected.abs().max().clamp_min(1)
        error, allowed = ((x.double() - expected).abs().max() / size for x in (got, eager))
        assert error <= 2 * allowed + rounding


@pytest.mark.parametrize("value", [1e34, 1e-34])
@pytest.mark.parametrize("shape", SHAPES)
def test_extreme_values(shape, value):
    """Exponentials that exceed 1 neither overflow with large values nor lose the digits of small ones."""
    query, sources, fusion = inputs(shape, "late")
    sources = [(key, v * value) for key, v in sources]
    with torch.no_grad():
        expected = mmfast.cross_attention(
            query.double(),
            [(k.double(), v.double()) for k, v in sources],
            fusion=fusion,
            scale=1.0,
            backend="reference",
        )
        got = mmfast.cross_attention(query, sources, fusion=fusion, scale=1.0)
    assert (got.double() - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("place", [0, 3, 8, 60, -1])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("shape", SHAPES)
def test_infinite_scores(shape, value, place):
    """A key that is infinite or NaN: infinity and NaN come out where the reference has them."""
    query, sources, fusion = inputs(shape, "even")
    sources[0][0][0, 1, place, 0] = value
    with torch.no_grad():
        expected = mmfast.cross_attention(query, sources, fusion=fusion, scale=1.0, backend="reference")
        got = mmfast.cross_attention(query, sources, fusion=fusion, scale=1.0)
    torch.testing.assert_close(got, expected, equal_nan=True, rtol=1e-4, atol=1e-5)
