"""The short way of attention on the device: recorded launches made again give what the long way gives, and notice what
they must not pass over."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from mmfast.fusion import Source, cross_attention, recording, triton_direct


@pytest.fixture(autouse=True)
def _nothing_is_kept():
    triton_direct._plans.clear()


def randn(*shape):
    return torch.randn(shape).requires_grad_()


def joint():
    return [
        randn(2, 4, 20, 8),
        randn(2, 2, 19, 8),
        randn(2, 2, 19, 8),
        randn(1, 4, 5, 8),
        randn(1, 4, 5, 8),
    ], lambda t: (
        t[0],
        [(t[1], t[2]), Source(t[3], t[4])],
        {},
    )


def adapter():
    tensors = [randn(2, 2, 20, 8), *(randn(2, 2, n, 8) for n in (9, 9, 4, 4)), randn(2, 2, 20, 1), randn(2)]
    return tensors, lambda t: (
        t[0],
        [Source(t[1], t[2], gate=t[5]), Source(t[3], t[4], gate=t[6]), Source(t[3], t[4], gate=0.5)],
        {"fusion": "decoupled"},
    )


def masked():
    mask, lengths = torch.rand(2, 1, 20, 19) < 0.7, torch.tensor([3, 19])
    tensors = [randn(1, 2, 20, 8), randn(2, 2, 19, 8), randn(2, 2, 19, 8)]
    return tensors, lambda t: (t[0], Source(t[1], t[2], mask=mask, lengths=lengths), {"is_causal": True})


def few_queries():
    tensors = [randn(2, 2, 1, 8), randn(2, 2, 1500, 8), randn(2, 2, 1500, 8)]
    return tensors, lambda t: (t[0], [Source(t[1], t[2])], {"scale": -0.3})


BUILDS = (joint, adapter, masked, few_queries)


def outputs(tensors, call, backend, lse):
    query, sources, options = call(tensors)
    out = cross_attention(query, sources, **options, return_lse=lse, backend=backend)
    return [out] if not lse else [out[0], *(out[1] if isinstance(out[1], tuple) else [out[1]])]


def gradients(found, tensors, seed, **options):
    generator = torch.Generator().manual_seed(seed)
    total = sum((torch.where(x == -torch.inf, 0.0, x) * torch.randn(x.shape, generator=generator)).sum() for x in found)
    return torch.autograd.grad(total, tensors, **options)


@pytest.mark.parametrize("lse", [False, True])
@pytest.mark.parametrize("build", BUILDS)
def test_made_again(build, lse):
    """On other values each time; the second call and its backward are repetitions."""
    tensors, call = build()
    for seed in range(3):
        tensors = [torch.randn_like(t).requires_grad_() for t in tensors]
        ours, expected = (outputs(tensors, call, backend, lse) for backend in ("triton", "reference"))
        torch.testing.assert_close(ours, expected, atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(
            gradients(ours, tensors, seed), gradients(expected, tensors, seed), atol=5e-5, rtol=5e-5
        )
        with torch.no_grad():
            torch.testing.assert_close(outputs(tensors, call, "triton", lse), expected, atol=2e-5, rtol=2e-5)
    plans = list(triton_direct._plans.values())
    assert len(plans) == 2
    assert all(isinstance(plan.forward, recording.Recording) for plan in plans)
    assert sum(len(plan.backward) for plan in plans) == 1
    if build is not few_queries:  # whose backward is torch's
        assert all(isinstance(x, recording.Recording) for plan in plans for x in plan.backward.values())


def test_second_derivatives():
    tensors, call = adapter()
    for _ in range(2):
        second = []
        for backend in ("triton", "reference"):
            first = gradients(outputs(tensors, call, backend, False), tensors, 0, create_graph=True)
            second.append(torch.autograd.grad(sum(g.square().sum() for g in first), tensors))
        torch.testing.assert_close(*second, atol=1e-4, rtol=1e-4)


def test_batch_of_gradients():
    (query, key, value), call = masked()
    out = outputs([query, key, value], call, "triton", False)[0]
    grads = torch.randn(3, *out.shape)
    found = torch.autograd.grad(out, (query, key, value), grads, is_grads_batched=True, retain_graph=True)
    for i, g in enumerate(grads):
        one = torch.autograd.grad(out, (query, key, value), g, retain_graph=True)
        torch.testing.assert_close([x[i] for x in found], list(one), atol=5e-5, rtol=5e-5)


def test_same_tensor_twice():
    """Keys that are the values, once; then others of the same shape that are not."""
    query, key, value = torch.randn(1, 2, 20, 8), torch.randn(1, 2, 19, 8), torch.randn(1, 2, 19, 8)
    for k, v in ((key, key), (key, value), (key, key), (key, value)):
        expected = cross_attention(query, (k, v), backend="reference")
        torch.testing.assert_close(cross_attention(query, (k, v), backend="triton"), expected)


def test_changed_saved_tensor_is_noticed():
    (query, key, value), call = masked()
    for _ in range(2):
        out = outputs([query, key, value], call, "triton", False)[0]
        with torch.no_grad():
            key.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


def test_errors_are_the_usual_ones():
    query, key = torch.randn(1, 2, 20, 8), torch.randn(1, 2, 19, 8)
    for _ in range(2):
        with pytest.raises(ValueError, match="key of sources\\[0\\] must have the query's head dim 8, got 7"):
            cross_attention(query, (key[..., :7], key), backend="triton")
        with pytest.raises(TypeError, match="scale must be a number"):
            cross_attention(query, (key, key), scale="1", backend="triton")
        with pytest.raises(ValueError, match="needs fusion='decoupled'"):
            cross_attention(query, Source(key, key, gate=1.0), backend="triton")


@pytest.mark.parametrize("build", BUILDS)
def test_nothing_of_a_call_is_kept(build):
    """Neither memory nor graphs: a node that lives on ties the gradients of later calls to its stream."""
    tensors, call = build()
    kept = []
    for seed in range(2):
        tensors = [torch.randn_like(t).requires_grad_() for t in tensors]
        found = outputs(tensors, call, "triton", True)
        gradients(found, tensors, seed)
        kept += map(weakref.ref, (*tensors, *found))
    del tensors, found
    gc.collect()
    assert not any(ref() is not None for ref in kept)


def test_plans_are_forgotten(monkeypatch):
    monkeypatch.setattr(triton_direct, "_MOST_PLANS", 3)
    for rows in range(1, 8):
        cross_attention(torch.randn(1, 1, rows, 8), (torch.randn(1, 1, 5, 8),) * 2, backend="triton")
    assert 0 < len(triton_direct._plans) <= 3
