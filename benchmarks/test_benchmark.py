"""pytest-benchmark entries of all cases: ``pytest benchmarks/``, with ``--full`` at full size and with all peers.

Times of one provider after another, for pytest-benchmark's own storage and comparison; published figures come from
``python -m benchmarks``, which interleaves the providers.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks import cases, providers, suite

QUICK_PROVIDERS = {
    "mel": ("mmfast", "reference", "torchaudio"),
    "mmd": ("mmfast", "reference", "three-blocks", "blocked-sweep", "permutation-gather", "cka-elementwise"),
    "fusion": ("mmfast", "reference", "sdpa", "plain", "torch-mha", "block-sdpa"),
}
TOLERANCE = {"mel": 1e-4, "mmd": 1e-3, "fusion": 1e-4}


def pytest_generate_tests(metafunc):
    full = metafunc.config.getoption("--full")
    triples = [
        pytest.param(case, provider, mode, id=f"{case.name}-{provider.name}-{mode}")
        for case in cases.select()
        for mode in case.modes
        for provider in providers.every().values()
        if provider.supports(case, mode) and (full or provider.name in QUICK_PROVIDERS[case.slice])
    ]
    metafunc.parametrize(("case", "provider", "mode"), triples)


def test_case(benchmark, request, case, provider, mode):
    if reason := provider.missing("cpu"):
        pytest.skip(reason)
    full = request.config.getoption("--full")
    case = case if full else case.small()
    inputs, upstream = case.inputs(seed=0), case.upstream(seed=0)
    call = provider.build(case, "cpu").call(mode, inputs, upstream)
    gold = case.gold(inputs, upstream if mode == "backward" else None)  # None where it would not fit
    results = call()
    error = None if gold is None else suite.errors(results[:-1] if isinstance(gold, tuple) else results[0], gold)
    benchmark.group = f"{case.name} {mode}"
    benchmark.extra_info.update(provider=provider.name, version=provider.version(), shape=case.shape, error=error)
    if full:
        benchmark(call)
    else:
        benchmark.pedantic(call, rounds=3, warmup_rounds=1)
    half = getattr(case, "dtype", torch.float32) != torch.float32
    assert error is None or error["relative_l2"] < (0.05 if half else TOLERANCE[case.slice])
