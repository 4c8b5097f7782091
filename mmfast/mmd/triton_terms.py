"""The value of a kernel at a tile of measures, its derivatives, and the sums over a tile."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)

# No kernel may have an argument ``params``: the function that Triton writes to look at the arguments of a launch has a
# variable of that name. So ``table`` is what `mmfast.mmd.terms.Terms` calls ``params``.


@triton.jit
def _not_negative(z, ACC: tl.constexpr):
    """0 for what is below it, and NaN stays: one instruction in float32, where a comparison takes five."""
    return tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL) if tl.float32 == ACC else tl.where(z < 0, 0, z)


@triton.jit
def _median(a, b, c):
    """Of three."""
    return tl.maximum(tl.minimum(a, b), tl.minimum(tl.maximum(a, b), c))


@triton.jit
def _rate(at, ACC: tl.constexpr):
    """-γ log2 e of a term, rounded once: an error here is the same for all pairs, and no sum averages it out."""
    return (tl.load(at + 1) * -LOG2E).to(ACC)


@triton.jit
def _doubles(table, FIRST: tl.constexpr, COUNT: tl.constexpr, ACC: tl.constexpr):
    """Is each γ twice the next one's?"""
    doubles = tl.full((), 1, tl.int1)
    for t in tl.static_range(COUNT - 1):
        at = table + (FIRST + t) * 4 + 1
        doubles = doubles & (tl.load(at).to(ACC) == 2 * tl.load(at + 4).to(ACC))
    return doubles


@triton.jit
def _gaussians(z, table, FIRST: tl.constexpr, COUNT: tl.constexpr, ACC: tl.constexpr):
    """Σ w exp(-γ z) and its derivative: one exponential and squarings where each γ is twice the next one's."""
    last = table + (FIRST + COUNT - 1) * 4
    w, g = tl.load(last).to(ACC), tl.load(last + 1).to(ACC)
    u = tl.exp2(z * _rate(last, ACC))
    v = w * u
    h = (-g * w) * u
    if COUNT > 1:
        if _doubles(table, FIRST, COUNT, ACC):
            for i in tl.static_range(COUNT - 1):
                at = table + (FIRST + COUNT - 2 - i) * 4
                w, g = tl.load(at).to(ACC), tl.load(at + 1).to(ACC)
                u = u * u
                v += w * u
                h += (-g * w) * u
        else:
            for i in tl.static_range(COUNT - 1):
                at = table + (FIRST + i) * 4
                w, g = tl.load(at).to(ACC), tl.load(at + 1).to(ACC)
                u = tl.exp2(z * _rate(at, ACC))
                v += w * u
                h += (-g * w) * u
    return v, h


@triton.jit
def _lower(base, exponent):
    """base ** (exponent - 1), for a whole exponent >= 1."""
    power = base * 0 + 1
    e = exponent.to(tl.int32)
    while e > 1:
        power = power * base
        e -= 1
    return power


@triton.jit
def _term(z, at, FAMILY: tl.constexpr, ACC: tl.constexpr):
    """One term at the measure ``z`` and its derivative; see `mmfast.mmd.terms` for the families."""
    w, g = tl.load(at).to(ACC), tl.load(at + 1).to(ACC)
    if FAMILY == 0 or FAMILY == 6:
        v = w * tl.exp2(z * _rate(at, ACC))
        h = -g * v
    elif FAMILY == 2:
        e = tl.load(at + 3).to(ACC)
        u = 1 + g * z
        v = w * tl.exp2(-e * tl.log2(u))
        h = -e * g * v / u
    elif FAMILY == 7:
        e = tl.load(at + 3).to(ACC)
        b = g * z + tl.load(at + 2).to(ACC)
        low = _lower(b, e)
        v = w * low * b
        h = w * e * g * low
    else:
        d = tl.sqrt(z)
        apart = tl.where(d == 0, 0, 1 / tl.where(d == 0, 1, d))  # where points coincide the derivative is taken as 0
        if FAMILY == 5:
            v = -w * d
            h = -0.5 * w * apart
        else:
            a = g * d
            e = w * tl.exp2(d * _rate(at, ACC))
            if FAMILY == 1:
                v = e
                h = -0.5 * g * e * apart
            elif FAMILY == 3:
                v = (1 + a) * e
                h = -0.5 * g * g * e
            else:
                v = (1 + a + a * a * (1.0 / 3)) * e
                h = (-1.0 / 6) * g * g * (1 + a) * e
    return v, h


@triton.jit
def _terms(z, table, FAMILIES: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr, LADDER: tl.constexpr,
           ACC: tl.constexpr):  # fmt: skip
    """Σ of a layer's terms, and its derivative by the measure."""
    if LADDER:
        v, h = _gaussians(z, table, FIRST, COUNT, ACC)
    else:
        v, h = _term(z, table + FIRST * 4, FAMILIES[FIRST], ACC)
        for t in tl.static_range(1, COUNT):
            more, by = _term(z, table + (FIRST + t) * 4, FAMILIES[FIRST + t], ACC)
            v += more
            h += by
    return v, h


@triton.jit
def _total(x):
    """Σ of a tile: rows in its own precision, their sums in float64."""
    return tl.sum(tl.sum(x, 1).to(tl.float64), 0)


@triton.jit
def _parameter_sums(z, u, table, place, T, FAMILY: tl.constexpr, ACC: tl.constexpr):
    """Σ u · (derivatives of term ``T`` by weight, γ, offset and exponent) where those stand in ``place``, else 0."""
    at = table + T * 4
    w, g = tl.load(at).to(ACC), tl.load(at + 1).to(ACC)
    found = tl.zeros_like(place).to(tl.float64)
    if FAMILY == 0 or FAMILY == 6:
        k = tl.exp2(z * _rate(at, ACC))
        by = -w * z * k
    elif FAMILY == 2:
        e = tl.load(at + 3).to(ACC)
        t = 1 + g * z
        log = tl.log2(t)
        k = tl.exp2(-e * log)
        by = -w * e * z * k / t
        found += tl.where(place == T * 4 + 3, _total(u * (-w / LOG2E) * log * k), 0)
    elif FAMILY == 7:
        e = tl.load(at + 3).to(ACC)
        b = g * z + tl.load(at + 2).to(ACC)
        low = _lower(b, e)
        k = low * b
        by = w * e * low * z
        found += tl.where(place == T * 4 + 2, _total(u * (w * e) * low), 0)
    else:
        d = tl.sqrt(z)
        a = g * d
        e = tl.exp2(d * _rate(at, ACC))
        if FAMILY == 5:
            k = -d
            by = d * 0
        elif FAMILY == 1:
            k = e
            by = -w * d * e
        elif FAMILY == 3:
            k = (1 + a) * e
            by = -w * g * z * e
        else:
            k = (1 + a + a * a * (1.0 / 3)) * e
            by = (-1.0 / 3) * w * g * z * (1 + a) * e
    found += tl.where(place == T * 4, _total(u * k), 0)
    return found + tl.where(place == T * 4 + 1, _total(u * by), 0)
