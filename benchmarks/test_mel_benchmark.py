"""pytest-benchmark entries of the mel cases: ``pytest benchmarks/``, with ``--full`` at full size and with all peers.

Times of one provider after another, for pytest-benchmark's own storage and comparison; published figures come from
``python -m benchmarks``, which interleaves the providers.
"""

from __future__ import annotations

import dataclasses

import pytest

from benchmarks import cases, providers, suite

QUICK_PROVIDERS = ("mmfast", "reference", "torchaudio")


def pytest_generate_tests(metafunc):
    full = metafunc.config.getoption("--full")
    triples = [
        pytest.param(case, provider, mode, id=f"{case.name}-{provider.name}-{mode}")
        for case in cases.select(["mel"])
        for mode in cases.MODES
        for provider in providers.every().values()
        if provider.supports(case, mode) and (full or provider.name in QUICK_PROVIDERS)
    ]
    metafunc.parametrize(("case", "provider", "mode"), triples)


def test_mel(benchmark, request, case, provider, mode):
    if reason := provider.missing("cpu"):
        pytest.skip(reason)
    full = request.config.getoption("--full")
    if not full:
        case = dataclasses.replace(case, batch=min(case.batch, 2), seconds=min(case.seconds, 1.0))
    waveform, upstream = case.inputs(seed=0), case.upstream(seed=0)
    call = provider.build(case, "cpu").call(mode, waveform, upstream)
    error = suite.errors(call()[0], case.gold(waveform, upstream if mode == "backward" else None))
    benchmark.group = f"{case.name} {mode}"
    benchmark.extra_info.update(provider=provider.name, version=provider.version(), shape=case.shape, error=error)
    if full:
        benchmark(call)
    else:
        benchmark.pedantic(call, rounds=3, warmup_rounds=1)
    assert error["relative_l2"] < 1e-4
