"""The benchmarks of the mmd slice: peers compute what float64 says, and rows and reports hold what they promise."""

from __future__ import annotations

import dataclasses
import itertools
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("tabulate")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

from benchmarks import __main__ as command
from benchmarks import cases, compare, machine, mmd_cases, providers, report, suite
from benchmarks.peers import mmd_blocked, mmd_torch

ALL = providers.every()
MMD = cases.select(["mmd"])
COMPILED = ("three-blocks-compile", "blocked-compile")
# Of a value that a sum of kernels leaves after cancellation, float32 sums keep about 1e-4, as eager PyTorch has them;
# a bandwidth, a diagonal or a factor of the estimator that was wrong would change it by 1e-2 and more.
TOLERANCE = {"forward": 3e-4, "backward": 1e-5}


def results_and_gold(provider, case, mode):
    inputs, upstream = case.inputs(seed=1), case.upstream(seed=1)
    results = provider.build(case, "cpu").call(mode, inputs, upstream)()
    gold = case.gold(inputs, upstream if mode == "backward" else None)
    return (results[:-1] if isinstance(gold, tuple) else results[0]), gold


PAIRS = [
    pytest.param(case, ALL[name], mode, id=f"{case.name}-{name}-{mode}")
    for case in MMD
    for name in ("mmfast", "reference", *case.peers)
    for mode in case.modes
    if name not in COMPILED and ALL[name].supports(case, mode) and getattr(case, "exact", True)
]


@pytest.mark.peer
@pytest.mark.parametrize(("case", "provider", "mode"), PAIRS)
def test_provider_agrees_with_gold(case, provider, mode):
    if reason := provider.missing("cpu"):
        pytest.skip(reason)
    results, gold = results_and_gold(provider, case.small(), mode)
    assert suite.errors(results, gold)["relative_l2"] < TOLERANCE[mode]


@pytest.mark.parametrize("estimator", ["unbiased", "biased"])
@pytest.mark.parametrize("name", ["three-blocks", "blocked", "blocked-sweep"])
def test_blocks_that_do_not_fill_a_tile(monkeypatch, name, estimator):
    """Several tiles on each side, the last one short."""
    monkeypatch.setattr(mmd_blocked, "BLOCK", 32)
    case = dataclasses.replace(cases.CASES["mmd-dan-64x256"], n=83, d=12, estimator=estimator)
    for mode in case.modes:
        results, gold = results_and_gold(ALL[name], case, mode)
        assert suite.errors(results, gold)["relative_l2"] < TOLERANCE[mode]


@pytest.mark.parametrize("same", [False, True])
@pytest.mark.parametrize("rungs", [1, 5])
def test_compiled_tiles_agree_with_those_in_place(rungs, same):
    """What is compiled computes the same numbers before it is compiled."""
    x = torch.randn(40, 6)
    a, b = mmd_torch.left(x, 0.05), mmd_torch.right(x, 0.05)
    buffers = mmd_blocked._Buffers()
    torch.testing.assert_close(mmd_blocked._forward_tile(a, b, rungs, same), buffers.forward(a, b, rungs, same))
    torch.testing.assert_close(
        mmd_blocked._gradient_tile(a, b, b, rungs, same), buffers.gradient(a, b, b, rungs, same), rtol=1e-5, atol=1e-3
    )


@pytest.mark.slow
@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_provider_agrees_with_gold(name, mode):
    torch._dynamo.reset()
    results, gold = results_and_gold(ALL[name], cases.CASES["mmd-dan-64x256"].small(), mode)
    assert suite.errors(results, gold)["relative_l2"] < TOLERANCE[mode]


@pytest.mark.parametrize("estimator", ["unbiased", "biased"])
@pytest.mark.parametrize("sigma", [None, 0.7])
def test_gold_is_the_definition(monkeypatch, sigma, estimator):
    """Tiles against sums over all pairs, written out, and autograd through them."""
    monkeypatch.setattr(mmd_cases, "_EXACT", 8)
    case = mmd_cases.MMDCase("x", 21, 3, (), sigma=sigma, estimator=estimator)
    x, y = (t.double().requires_grad_() for t in case.inputs(seed=2))
    n = case.n

    def squares(a, b):
        return torch.stack([torch.stack([(p - q).square().sum() for q in b]) for p in a])

    z = torch.cat((x, y)).detach()
    mean = sum((p - q).square().sum() for p, q in itertools.permutations(z, 2)) / (2 * n * (2 * n - 1))
    widths = [2 * sigma**2] if sigma else [mean * 2.0**i for i in range(-2, 3)]
    xx, yy, xy = (sum(torch.exp(-squares(a, b) / w) for w in widths) for a, b in ((x, x), (y, y), (x, y)))
    if estimator == "biased":
        value = (xx + yy - 2 * xy).mean()
    else:
        value = (xx.sum() - xx.trace() + yy.sum() - yy.trace()) / (n * (n - 1)) - 2 * xy.mean()
    torch.testing.assert_close(case.gold((x, y)), value.detach())
    gradients = torch.autograd.grad(value, (x, y))
    torch.testing.assert_close(case.gold((x, y), torch.ones(())), gradients)


def test_gold_of_cka_is_the_definition(monkeypatch):
    monkeypatch.setattr(mmd_cases, "_EXACT", 7)
    case = mmd_cases.CKACase("x", 25, 6, (), d_y=3)
    x, y = (t.double() for t in case.inputs(seed=0))
    centring = torch.eye(25).double() - 1 / 25
    k, other = (
        centring @ torch.exp(-torch.cdist(z, z).square() / (2 * sigma**2)) @ centring
        for z, sigma in zip((x, y), case.sigmas, strict=True)
    )
    expected = (k @ other).trace() / ((k @ k).trace() * (other @ other).trace()).sqrt()
    torch.testing.assert_close(case.gold((x, y)), expected)
    assert 0.05 < expected < 0.95  # neither independent nor equal: a wrong kernel would show


def test_the_same_permutations_give_the_same_p_value():
    case = dataclasses.replace(cases.CASES["mmd-test-2048x64"], n=64, permutations=200)
    statistics = {}
    for name in ("mmfast", "reference", "permutation-gather"):
        if ALL[name].missing("cpu") is None:
            statistics[name], gold = results_and_gold(ALL[name], case, "forward")
    assert {case.p_value(s) for s in statistics.values()} == {case.p_value(gold)}
    assert 0.01 < case.p_value(gold) < 0.99


def test_work_counts_follow_the_formulas():
    case = mmd_cases.MMDCase("x", 10, 7, ())
    assert case.pairs == 190  # 45 in x, 45 in y, 100 across
    assert case.work("forward") == (190 * (14 + 8), 4 * 20 * 7)
    assert case.work("backward") == (190 * (42 + 8), 2 * 4 * 20 * 7)
    assert mmd_cases.MMDCase("x", 10, 7, (), sigma=1.0).work("forward")[0] == 190 * 14
    assert mmd_cases.CKACase("x", 10, 7, (), d_y=3).pairs == 45


def test_large_case_has_a_row_without_an_error_and_no_reference():
    case = cases.CASES["mmd-dan-65536x256"]
    assert not ALL["reference"].supports(case, "backward") and ALL["mmfast"].supports(case, "backward")
    little = dataclasses.replace(case, n=32, d=4, reference=True)
    settings = suite.Settings(rounds=1, calls=1, pause=0, memory=())
    rows = list(suite.run([little], [ALL["reference"]], settings, progress=False, roof={"gflops": 1, "gbytes": 1}))
    assert [(row["mode"], row["error"], row["pairs"]) for row in rows] == [("backward", None, 32 * 63)]
    assert "pairs/s" in report.tables(rows)


def test_quick_suite_end_to_end(tmp_path):
    arguments = (
        "mmd --cases mmd-smoke-64x8 --quick --rounds 2 --pause 0 --providers reference,gram,blocked --memory gram"
    )
    assert command.main([*arguments.split(), "--out", str(tmp_path)]) == 0
    rows = compare.read(tmp_path / "rows.jsonl")
    assert {(row["mode"], row["provider"]) for row in rows} == {
        (mode, name) for mode in cases.MODES for name in ("reference", "gram", "blocked")
    }
    for row in rows:
        assert row["slice"] == "mmd" and row["x"] == row["y"] == [64, 8] and row["pairs"] == 64 * 127
        assert 0 < row["error"]["relative_l2"] < TOLERANCE[row["mode"]]
        if sys.platform == "linux":
            others = row["others_cpu"]
            assert others is None or 0 <= others <= 1  # None: all was over within a tick of the clock
        if row["provider"] == "gram":
            assert row["memory"]["output"] == 4 + (row["mode"] == "backward") * 2 * 4 * 64 * 8
    assert "mmd-smoke-64x8" in (tmp_path / "report.md").read_text()


def test_share_of_others_leaves_this_process_out():
    # Of 4 + 2 seconds on all CPUs 3 + 2 were busy, 2 + 1 with this process.
    assert machine.share_of_others([np.array([4.0, 3.0, 2.0]), np.array([2.0, 2.0, 1.0])]) == pytest.approx(
        1 / 3, abs=1e-3
    )
    assert machine.share_of_others([np.array([4.0, 1.9, 2.0])]) == 0  # the two clocks tick apart
    assert machine.share_of_others([]) is None


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_cpu_seconds_count_this_process():
    before = machine.cpu_seconds()
    end = before[2] + 0.2
    while machine.cpu_seconds()[2] < end:
        torch.randn(1000).exp()
    passed, busy, own = machine.cpu_seconds() - before
    tick = 0.01  # on a machine with nothing idle the first two are equal, but for the rounding of differences
    assert passed + tick > busy >= own - 0.05 and own > 0.2 - tick


def test_errors_of_tuples_are_of_all_entries_together():
    gold = (torch.tensor([1.0, 2.0]).double(), torch.tensor([[4.0]]).double())
    found = suite.errors((torch.tensor([1.0, 2.0]), torch.tensor([[4.4]])), gold)
    assert found["max_relative"] == pytest.approx(0.1, rel=1e-5)
    with pytest.raises(ValueError, match=r"shape \(1, 1\), got \(1,\)"):
        suite.errors((gold[0], torch.zeros(1)), gold)
