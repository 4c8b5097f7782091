"""The Triton kernels of the fusion slice against the reference in float64: values, log-sum-exps and all gradients."""

from __future__ import annotations

import fusion_cases
import pytest
import torch
from fusion_cases import inputs, replaced

from mmfast.fusion import attention_pool, cross_attention, reference
from mmfast.fusion import triton as fused
from mmfast.fusion._inputs import prepare

TOLERANCE = {torch.float32: 3e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def make(query, sources, options, dtype):
    """Inputs in ``dtype``, leaves of the gradient, and the same in float64; masks and biases have none."""
    options = {"fusion": "joint", "scale": query.shape[3] ** -0.5, "is_causal": False} | options
    query, sources = prepare(query, sources, options["fusion"])
    rounded = [x.to(dtype) for x in inputs(query, sources)]
    sources = replaced(sources, rounded[1:])
    gold = replaced(sources, [x.double() for x in rounded[1:]])
    return (rounded[0], sources), (rounded[0].double(), gold), options


def leaves(query, sources):
    tensors = [query]
    for s in sources:
        tensors += [s.key, s.value] + ([s.gate] if isinstance(s.gate, torch.Tensor) else [])
    return [x.requires_grad_() for x in tensors]


def run(engine, query, sources, options, of_out, of_lse):
    of = leaves(query, sources)
    result = engine(query, sources, **options)
    lse = torch.stack(result.lses)
    total = (result.out.to(of_out.dtype) * of_out).sum()
    if of_lse is not None:
        total = total + torch.where(lse == -torch.inf, 0.0, lse.double() * of_lse).sum()
    return result.out.detach(), lse.detach(), torch.autograd.grad(total, of, materialize_grads=True)


def check(engine, query, sources, options, dtype=torch.float32, with_lse=True):
    ours, gold, options = make(query, sources, options, dtype)
    with torch.no_grad():
        plain = reference.attention(*gold, **options)
    of_out = torch.randn(plain.out.shape, dtype=torch.float64).to(dtype).double()
    of_lse = torch.randn(len(plain.lses), *plain.lses[0].shape, dtype=torch.float64) if with_lse else None
    out, lse, grads = run(engine, *ours, options, of_out, of_lse)
    gold_out, gold_lse, gold_grads = run(reference.attention, *gold, options, of_out, of_lse)
    assert out.dtype == dtype and lse.dtype == torch.float32
    close(out, gold_out, dtype, "out")
    assert torch.equal(lse.isinf(), gold_lse.isinf())
    close(lse.nan_to_num(neginf=0), gold_lse.nan_to_num(neginf=0), dtype, "lse")
    for i, (grad, expected) in enumerate(zip(grads, gold_grads, strict=True)):
        assert grad.shape == expected.shape and grad.dtype == dtype
        close(grad, expected, dtype, f"gradient {i}")


def close(got, expected, dtype, what):
    assert got.isfinite().all(), what
    error, size = (got.double() - expected).abs(), expected.abs()
    limit = TOLERANCE[dtype] * (1 + size.amax() if size.numel() else 1)
    assert (error <= limit).all(), f"{what}: {error.max():.2e}, allowed {limit:.2e}"


SHORT = [name for name in fusion_cases.CASES if name not in ("softcap", "without_any_keys")]


@pytest.mark.parametrize("name", SHORT)
def test_matches_gold(name):
    check(fused.short, *fusion_cases.CASES[name]())


@pytest.mark.parametrize("name", SHORT)
@pytest.mark.parametrize("engine", ["split", "cpu"])
def test_long_keys_match_gold(name, engine):
    check(lambda *args, **options: fused.long(*args, engine=engine, **options), *fusion_cases.CASES[name]())


@pytest.mark.parametrize("name", ["three", "grouped", "bias", "causal_masked", "decoupled_gates", "without_keys"])
def test_mean_weights(name):
    query, sources, options = fusion_cases.CASES[name]()
    sources = replaced(sources, [x.float() for x in inputs(query, sources)[1:]])
    out, weights = cross_attention(query.float(), sources, **options, return_weights="mean", backend="triton")
    expected = cross_attention(query.float(), sources, **options, return_weights="mean", backend="reference")
    torch.testing.assert_close((out, *weights), (expected[0], *expected[1]), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["three", "decoupled", "decoupled_gates", "causal_masked"])
@pytest.mark.parametrize("lengths", [None, (0, 3)])
def test_pooled_matches_gold(name, lengths):
    query, sources, options = fusion_cases.CASES[name]()
    lengths = None if lengths is None else torch.tensor(lengths)
    of_out = torch.randn(query.shape[0], query.shape[1], sources[0].value.shape[3], dtype=torch.float64)
    results = []
    for dtype, backend in ((torch.float32, "triton"), (torch.float64, "reference")):
        some = replaced(sources, [x.to(dtype) for x in inputs(query, sources)[1:]])
        of = leaves(query.to(dtype), some)
        out = attention_pool(of[0], some, query_lengths=lengths, backend=backend, **options)
        results.append((out, *torch.autograd.grad((out.double() * of_out).sum(), of, materialize_grads=True)))
    for got, expected in zip(*results, strict=True):
        close(got.detach(), expected.detach(), torch.float32, "pooled")
