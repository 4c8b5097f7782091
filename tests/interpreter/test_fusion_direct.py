"""The short way of attention on the device: recorded launches made again give what the long way gives, and notice what
they must not pass over."""

from __future__ import annotations

import gc
import threading
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
    tensors = [randn(2, 2, 1, 8), randn(2, 2, 600, 8), randn(2, 2, 600, 8)]
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
    plans = [plan for plan in triton_direct._plans.values() if plan is not None]
    assert len(plans) == 2
    assert all(isinstance(plan.forward, recording.Recording) for plan in plans)
    assert sum(len(plan.backward) for plan in plans) == 1
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


@pytest.mark.parametrize("build", BUILDS)
def test_plan_that_is_told_again(build):
    """A node of the extension that outlives its plan has its text."""
    tensors, call = build()
    out = outputs(tensors, call, "triton", True)[0].detach()  # whose graph would keep the plan
    (plan,) = triton_direct._plans.values()
    query, sources, _ = call(tensors)
    given = triton_direct._called(query, sources, "joint", None, False, True, False)[1]
    with torch.no_grad():
        _, lse = plan.compute(given, [x.data_ptr() for x in given])
        args = torch.randn_like(out), None, given, out if plan.joint else None, lse
        expected = plan.differentiate(*args)
        number = -1 if plan.native_backward is None else plan.native_backward.number
        text = plan.text
        del plan
        triton_direct._plans.clear()
        gc.collect()
        assert number not in triton_direct._alive
        found = triton_direct.differentiate(number, text, *args)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_plans_are_forgotten(monkeypatch):
    monkeypatch.setattr(triton_direct, "_MOST_PLANS", 3)
    for rows in range(1, 8):
        cross_attention(torch.randn(1, 1, rows, 8), (torch.randn(1, 1, 5, 8),) * 2, backend="triton")
    assert 0 < len(triton_direct._plans) <= 3


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s._replace(key=s.key[0]), "key of sources\\[0\\] must be \\(B, H_kv, S, D\\)"),
        (lambda s: s._replace(value=s.value[0]), "value of sources\\[0\\] must be \\(B, H_kv, S, D_v\\)"),
        (lambda s: s._replace(mask=torch.ones(19)), "mask of sources\\[0\\] must have 2 to 4 dimensions"),
        (lambda s: s._replace(bias=torch.tensor(1.0)), "bias of sources\\[0\\] must have 2 to 4 dimensions"),
        (lambda s: s._replace(gate=torch.ones(1)), "gate of sources\\[0\\] must be \\(\\), \\(2,\\) or"),
        (lambda s: s._replace(gate=torch.ones(2, 1, 1)), "gate of sources\\[0\\] must be \\(\\), \\(2,\\) or"),
    ],
)
def test_dimensions_are_no_fewer_than_said(change, message):
    query, key = torch.randn(1, 2, 20, 8), torch.randn(1, 2, 19, 8)
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            cross_attention(query, change(Source(key, key)), fusion="decoupled", backend="triton")


def test_the_same_tensor_as_mask_and_gate():
    """What a tensor is made of depends on what it is given as."""
    query, key, both = torch.randn(2, 2, 3, 8), torch.randn(2, 2, 3, 8), torch.randn(2, 2, 3, 1)
    source = Source(key, key, mask=both, gate=both)
    ours, expected = (cross_attention(query, source, fusion="decoupled", backend=b) for b in ("triton", "reference"))
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("build", BUILDS)
def test_nothing_is_kept_alive(build):
    tensors, call = build()
    tensors = [t.detach().clone().requires_grad_() for t in tensors]
    gradients(outputs(tensors, call, "triton", True), tensors, 0)
    alive = [weakref.ref(t) for t in tensors]
    del tensors
    gc.collect()
    assert triton_direct._plans and not any(ref() is not None for ref in alive)
    for plan in triton_direct._plans.values():
        for one in (plan.forward, *plan.backward.values()):
            assert not one or not any(tensors_of(call.fill) for call in one.calls)


def tensors_of(function):
    """Tensors that a closure holds, in lists and tuples too."""
    todo, found = [cell.cell_contents for cell in function.__closure__], []
    while todo:
        x = todo.pop()
        found += [x] if isinstance(x, torch.Tensor) else []
        todo += x if isinstance(x, (list, tuple)) else [c.cell_contents for c in getattr(x, "__closure__", None) or ()]
    return found


def test_gradients_that_are_no_plain_memory():
    """Marked as negated, or zero without memory: neither is read as if it were what lies there."""
    tensors, call = adapter()
    negated = torch.randn(2, 2, 20, 8, dtype=torch.complex64).conj().imag
    assert negated.is_neg()
    zero = torch._efficientzerotensor(negated.shape)
    for _ in range(2):
        for grad in (negated, zero):
            found, expected = (
                torch.autograd.grad(outputs(tensors, call, backend, False)[0], tensors, given)
                for backend, given in (("triton", grad), ("reference", torch.zeros(negated.shape) + grad))
            )
            torch.testing.assert_close(found, expected, atol=5e-5, rtol=5e-5)


def test_layouts_of_gradients_are_forgotten(monkeypatch):
    monkeypatch.setattr(triton_direct, "_MOST_LAYOUTS", 2)
    (query, key, value), call = masked()
    for pad in range(5):
        out = outputs([query, key, value], call, "triton", False)[0]
        grad = torch.randn(*out.shape[:3], 8 + pad)[..., :8]
        expected = torch.autograd.grad(outputs([query, key, value], call, "reference", False)[0], query, grad)
        torch.testing.assert_close(torch.autograd.grad(out, query, grad), expected, atol=5e-5, rtol=5e-5)
    assert all(len(plan.backward) <= 2 for plan in triton_direct._plans.values())


def test_a_first_call_that_fails(monkeypatch):
    """The next one is recorded, and no recorder is left behind."""
    tensors, call = joint()

    def fail(*_, **__):
        raise MemoryError

    for name in ("forward", "launched_backward"):
        with monkeypatch.context() as patch:
            patch.setattr(triton_direct.triton, name, fail)
            with pytest.raises(MemoryError):
                gradients(outputs(tensors, call, "triton", True), tensors, 0)
        assert getattr(recording._local, "recorder", None) is None
    for _ in range(2):
        ours, expected = (outputs(tensors, call, backend, True) for backend in ("triton", "reference"))
        torch.testing.assert_close(ours, expected, atol=2e-5, rtol=2e-5)
    (plan,) = triton_direct._plans.values()
    assert isinstance(plan.forward, recording.Recording)


def test_threads_record_for_themselves():
    """The interpreter runs in one thread at a time: here another one only asks for memory and computes otherwise."""
    tensors, call = joint()

    def elsewhere():
        recording.room(tensors[0], (3,))
        recording.spoil()

    def run():
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        return triton_direct.triton.forward(*inputs)

    outputs(tensors, call, "triton", True)
    (plan,) = triton_direct._plans.values()
    inputs = *plan._inputs(tensors), *plan.options
    with torch.no_grad():
        result, made = recording.record(run, tensors)
    assert isinstance(made, recording.Recording) and len(made.rooms) == len(plan.forward.rooms)
    torch.testing.assert_close(made.again(tensors, [t.data_ptr() for t in tensors]), result)


def test_first_seen_without_gradients():
    """What was recorded where nothing is followed serves calls that are, and what inference mode made is none."""
    tensors, call = joint()
    with torch.inference_mode():
        given = [t.detach().clone() for t in tensors]
        outputs(given, call, "triton", True)
    ours, expected = (outputs(given, call, backend, True) for backend in ("triton", "reference"))
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=2e-5)
    assert not any(t.is_inference() for t in ours)
    ours, expected = (
        gradients(outputs(tensors, call, backend, True), tensors, 0) for backend in ("triton", "reference")
    )
    torch.testing.assert_close(ours, expected, atol=5e-5, rtol=5e-5)
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        outputs([tensors[0], *given[1:]], call, "triton", True)


def test_saved_tensors_go_through_hooks():
    """And come back in another layout."""
    tensors, call = masked()

    def elsewhere(x):
        return x.transpose(0, -1).contiguous().transpose(0, -1) if x.is_floating_point() else x

    for _ in range(2):
        with torch.autograd.graph.saved_tensors_hooks(elsewhere, lambda x: x):
            ours = gradients(outputs(tensors, call, "triton", True), tensors, 0)
        expected = gradients(outputs(tensors, call, "reference", True), tensors, 0)
        torch.testing.assert_close(ours, expected, atol=5e-5, rtol=5e-5)


def test_written_out_attention():
    """Sources with heads of their own, and a gate whose gradient exceeds what its output's dtype holds."""
    query, half = torch.randn(1, 4, 64, 8).half().requires_grad_(), torch.ones(1, 2, 5, 8).half()
    full, gate = torch.ones(1, 4, 5, 8).half(), torch.ones(1, 1, 1, 1).requires_grad_()
    sources = [Source(full, full), Source(half, half, gate=gate), Source(full, full, gate=-0.5)]
    out = triton_direct._Composed(query, sources, 0.3, False)([query, full, full, half, half, gate, full, full], []).out
    assert out.dtype == torch.float16
    torch.testing.assert_close(out, torch.full_like(out, 1.5))
    (grad,) = torch.autograd.grad(out, gate, torch.full_like(out, 100))
    torch.testing.assert_close(grad.squeeze(), torch.tensor(100.0 * out.numel()))


def test_without_triton(monkeypatch):
    """Nothing goes past the choice of who computes."""
    monkeypatch.setattr(triton_direct._backend, "_TRITON", False)
    tensors, call = joint()
    query, sources, _ = call(tensors)
    assert triton_direct.attention(query, sources, "joint", None, False, False, "triton") is None
