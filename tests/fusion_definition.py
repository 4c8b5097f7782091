"""Cross-attention as its definition says it, query by query and key by key, in Python's own floating point numbers."""

from __future__ import annotations

import math

import numpy as np


def attention(query, sources, fusion="joint", scale=None, is_causal=False, softcap=None):
    """Output ``(B, H, L, D_v)``, a list of log-sum-exps ``(B, H, L)`` and for each source the weights, of numpy arrays.

    Sources are tuples like `mmfast.fusion.Source`. Heads of keys are not repeated, batches not broadcast: looked up.
    """
    batch = max(x.shape[0] for x in (query, *(part for s in sources for part in s[:2])))
    heads, rows, dim = query.shape[1:]
    scale = dim**-0.5 if scale is None else scale
    out = np.zeros((batch, heads, rows, sources[0][1].shape[3]))
    lses = [np.zeros((batch, heads, rows)) for _ in (sources if fusion == "decoupled" else sources[:1])]
    weights = [np.zeros((batch, heads, rows, s[0].shape[2])) for s in sources]
    for b, h, i in np.ndindex(batch, heads, rows):
        q = at(query, b)[h, i]
        scores = [
            [score(q, s, b, h, i, j, heads, scale, is_causal, softcap) for j in range(s[0].shape[2])] for s in sources
        ]
        together = [list(range(len(sources)))] if fusion == "joint" else [[n] for n in range(len(sources))]
        for group, members in enumerate(together):
            flat = [s for n in members for s in scores[n] if s is not None]
            largest = max(flat, default=0.0)
            total = math.fsum(math.exp(s - largest) for s in flat)
            lses[group][b, h, i] = largest + math.log(total) if flat else -math.inf
            for n in members:
                for j, s in enumerate(scores[n]):
                    if s is None:
                        continue
                    w = math.exp(s - largest) / total
                    weights[n][b, h, i, j] = w
                    value = at(sources[n][1], b)
                    out[b, h, i] += w * gate(sources[n], b, h, i) * value[h * value.shape[0] // heads, j]
    return out, lses, weights


def at(x, b):
    return x[b if x.shape[0] > 1 else 0]


def look(x, b, h, i, j):
    """``x[b, h, i, j]`` under broadcasting, where the first dimensions may be missing."""
    index = (b, h, i, j)[4 - x.ndim :]
    return x[tuple(k if size > 1 else 0 for k, size in zip(index, x.shape, strict=True))]


def score(q, source, b, h, i, j, heads, scale, is_causal, softcap):
    """Of query i for key j, or None where it may not attend."""
    key, _, mask, lengths, bias, _ = source
    if lengths is not None and j >= lengths[b]:
        return None
    if is_causal and j > i:
        return None
    k = at(key, b)
    s = scale * math.fsum(q * k[h * k.shape[0] // heads, j])
    if softcap is not None:
        s = softcap * math.tanh(s / softcap)
    for added in (mask, bias):
        if added is None:
            continue
        value = look(added, b, h, i, j)
        if added.dtype == bool:
            if not value:
                return None
        else:
            s += value
    return None if s == -math.inf else s


def gate(source, b, h, i):
    g = source[5]
    if g is None:
        return 1.0
    g = np.asarray(g)
    if g.ndim == 0:
        return g
    if g.ndim == 1:
        return g[h]
    return np.broadcast_to(g, (max(b + 1, g.shape[0]), max(h + 1, g.shape[1]), max(i + 1, g.shape[2]), g.shape[3]))[
        b, h, i
    ]
