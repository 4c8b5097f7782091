"""pytest-benchmark entries of the fusion cases, as `test_mel_benchmark` has them of the mel cases."""

from __future__ import annotations

import pytest
import torch

from benchmarks import cases, providers, suite

QUICK_PROVIDERS = ("mmfast", "reference", "sdpa", "plain", "torch-mha", "block-sdpa")


def pytest_generate_tests(metafunc):
    full = metafunc.config.getoption("--full")
    triples = [
        pytest.param(case, provider, mode, id=f"{case.name}-{provider.name}-{mode}")
        for case in cases.select(["fusion"])
        for mode in case.modes
        for provider in providers.every().values()
        if provider.supports(case, mode) and (full or provider.name in QUICK_PROVIDERS)
    ]
    metafunc.parametrize(("case", "provider", "mode"), triples)


def test_fusion(benchmark, request, case, provider, mode):
    if reason := provider.missing("cpu"):
        pytest.skip(reason)
    full = request.config.getoption("--full")
    if not full:
        case = case.small()
    inputs, upstream = case.inputs(seed=0), case.upstream(seed=0)
    call = provider.build(case, "cpu").call(mode, inputs, upstream)
    gold = case.gold(inputs, upstream if mode == "backward" else None)
    results = call()
    error = suite.errors(results[:-1] if isinstance(gold, tuple) else results[0], gold)
    benchmark.group = f"{case.name} {mode}"
    benchmark.extra_info.update(provider=provider.name, version=provider.version(), shape=case.shape, error=error)
    if full:
        benchmark(call)
    else:
        benchmark.pedantic(call, rounds=3, warmup_rounds=1)
    assert error["relative_l2"] < (1e-4 if case.dtype == torch.float32 else 0.05)
