"""What only the CUDA kernels promise: no wait for the device, graphs, streams, repeatable gradients."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, TUNED

from mmfast import _backend
from mmfast.mel import MelConfig, extract, tables

pytestmark = pytest.mark.cuda

# One of each kind of kernel; also what compute-sanitizer runs.
_NAMES = ["whisper", "mfcc_db", "mel_2048", "mel_4096", "kaldi_mfcc", "n_fft_401", "n_fft_101", "energy_append"]
FEW = [CASES[name] for name in _NAMES]


@pytest.fixture(autouse=True)
def _built_for_cuda():
    assert "cuda" in _backend.OPS["mel"], "the extension was built without CUDA"


def run(case, waveform, lengths=None):
    """Features and the waveform's gradient."""
    waveform = waveform.clone().requires_grad_()
    out = extract(waveform, case.config, lengths=lengths, backend="cuda")
    out = out if lengths is None else out[0]
    upstream = torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out)
    return out.detach(), torch.autograd.grad(out, waveform, upstream)[0]


@pytest.mark.parametrize("case", FEW, ids=lambda case: case.name)
def test_same_bits_every_time(case):
    waveform = case.waveform().cuda()
    first = run(case, waveform)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, run(case, waveform), strict=True))


@pytest.mark.parametrize("case", FEW, ids=lambda case: case.name)
def test_ragged(case):
    """Each row gives what its own samples give alone, and nothing waits for the device."""
    waveform = case.waveform().cuda().flatten(0, -2)
    lengths = torch.full((len(waveform),), waveform.shape[1] * 2 // 3, device="cuda")
    lengths[0] = waveform.shape[1]
    config = case.config if case.config.top_db is None else case.config.replace(top_db_scope="item")
    torch.cuda.synchronize()
    extract(waveform, config, backend="cuda")  # plans and tables are uploaded
    torch.cuda.set_sync_debug_mode("error")
    try:
        out, counts = extract(waveform, config, lengths=lengths, backend="cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    time = 1 if config.layout == "time_feature" else 2
    for row, length in enumerate(lengths.tolist()):
        alone = extract(waveform[row, :length], config, backend="cuda")
        assert counts[row] == alone.shape[time - 1]
        assert torch.equal(out[row].narrow(time - 1, 0, alone.shape[time - 1]), alone)
        rest = out[row].narrow(time - 1, alone.shape[time - 1], out.shape[time] - alone.shape[time - 1])
        assert (rest == config.fill).all()


@pytest.mark.parametrize("case", TUNED, ids=lambda case: case.name)
def test_graph(case):
    """Captured once, replayed on other samples."""
    waveform = case.waveform().cuda()
    run(case, waveform)  # plans are uploaded
    static = waveform.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(case, static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(case, static)
    other = waveform.flip(-1) * 0.5
    static.copy_(other)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, run(case, other), strict=True))


@pytest.mark.parametrize("warm", ["short", "operators"])
def test_graph_of_the_short_way(warm):
    """Captured where it is ready; where it is not, as the operators, which are."""
    config = CASES["whisper"].config.replace(fill=1.0 if warm == "short" else 2.0)  # not seen by other tests
    static = torch.randn(1, 48000, device="cuda", requires_grad=True)

    def step(waveform, backend=None):
        out = extract(waveform, config, backend=backend)
        return out.detach(), torch.autograd.grad(out, waveform, torch.ones_like(out))[0]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(static, None if warm == "short" else "cuda")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(static)
    other = static.detach().flip(-1) * 0.5
    with torch.no_grad():
        static.copy_(other)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, step(other.requires_grad_()), strict=True))


def test_streams():
    """Streams at work at the same time do not share scratch or half-made tables."""
    case = CASES["whisper"]
    waveform = case.waveform().cuda()
    expected = run(case, waveform)[0]
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    results = []
    for stream in streams * 3:
        with torch.cuda.stream(stream):
            results.append(extract(waveform, case.config, backend="cuda"))
    torch.cuda.synchronize()
    assert all(torch.equal(result, expected) for result in results)


def test_changed_filters_are_seen():
    config = MelConfig(n_mels=20)
    waveform = torch.randn(2, 4000, device="cuda")
    filters = tables.filters(config).float().cuda()
    before = extract(waveform, config, filters=filters, backend="cuda")
    filters.mul_(2)
    after = extract(waveform, config, filters=filters, backend="cuda")
    torch.testing.assert_close(after, 2 * before)


def test_large_batch():
    """More tiles than run at once, and more of a group than one block searches for its maximum."""
    config = CASES["whisper"].config
    waveform = torch.randn(200, 60000, device="cuda")
    waveform[150, 30000] = 50
    out = extract(waveform, config, backend="cuda")
    expected = extract(waveform, config, backend="reference")
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
