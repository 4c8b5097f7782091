"""The benchmarks of the fusion slice: peers compute what float64 says, gradients too; rows hold what they promise."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

pytest.importorskip("tabulate")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

from benchmarks import __main__ as command
from benchmarks import cases, compare, fusion_cases, providers, report, roofline, suite

ALL = providers.every()
FUSION = cases.select(["fusion"])
SMOKE = cases.CASES["fusion-smoke"]
COMPILED = ("plain-compile", "attention-reference-compile", "flex", "torch-mha-compile", "block-compile")
MASKED = ("fusion-flamingo-3x64", "fusion-idefics2-4900", "fusion-mllama-1601")
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 0.03}


def results_and_gold(provider, case, mode):
    inputs, upstream = case.inputs(seed=1), case.upstream(seed=1)
    results = provider.build(case, "cpu").call(mode, inputs, upstream)()
    gold = case.gold(inputs, upstream if mode == "backward" else None)
    return (results[:-1] if isinstance(gold, tuple) else results[0]), gold


def assert_agrees(provider, case, mode):
    """Each gradient for itself: a large one hides nothing of a small one."""
    results, gold = results_and_gold(provider, case, mode)
    pairs = zip(results, gold, strict=True) if isinstance(gold, tuple) else [(results, gold)]
    for result, expected in pairs:
        assert result.dtype == case.dtype
        assert suite.errors(result, expected)["relative_l2"] < TOLERANCE[case.dtype]


PAIRS = [
    pytest.param(case, ALL[name], id=f"{case.name}-{name}")
    for case in (*FUSION, SMOKE)
    for name in ("mmfast", "reference", *case.peers)
    if name not in COMPILED
    and ALL[name].missing("cpu") is None
    and (case.dtype == torch.float32 or name != "reference")
]


@pytest.mark.peer
@pytest.mark.parametrize(("case", "provider"), PAIRS)
def test_provider_agrees_with_gold(case, provider):
    for mode in case.modes:
        assert_agrees(provider, case.small(), mode)


@pytest.mark.parametrize("name", ["fusion-ip-77-4", *MASKED])
def test_compiled_peers_before_they_are_compiled(monkeypatch, name):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    for provider in ("plain-compile", "attention-reference-compile"):
        for mode in fusion_cases.MODES:
            assert_agrees(ALL[provider], cases.CASES[name].small(), mode)


def test_backends_of_the_gpu_before_they_meet_one():
    case = cases.CASES["fusion-ip-77-4-bfloat16"]
    for name in ("sdpa-cudnn", "sdpa-flash", "sdpa-efficient"):
        assert ALL[name].missing("cpu") == "runs on cuda only" and ALL[name].supports(case, "backward")
    runs = {name: ALL[name].runs(cases.CASES["fusion-ip-77-4"], "cuda") for name in case.peers if name[:5] == "sdpa-"}
    assert runs == {"sdpa-cudnn": False, "sdpa-flash": False, "sdpa-efficient": True}
    assert not ALL["sdpa-flash"].runs(cases.CASES["fusion-mllama-1601-bfloat16"], "cuda")
    assert_agrees(ALL["sdpa-flash"], case.small(), "backward")  # the CPU has one of the same name


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, case, mode",
    [
        ("plain-compile", "fusion-ip-77-4", "backward"),
        ("flex", "fusion-ip-77-4", "forward"),
        ("torch-mha-compile", "fusion-mha-448x1500", "backward"),
    ],
)
def test_compiled_provider_agrees_with_gold(name, case, mode):
    torch._dynamo.reset()
    assert_agrees(ALL[name], cases.CASES[case].small(), mode)


@pytest.mark.parametrize("name", ["fusion-smoke", *MASKED])
def test_gold_is_the_definition(name):
    """Against the formula for one query at a time."""
    case = dataclasses.replace(cases.CASES[name].small(), heads=8 if name.endswith("1601") else 4, rows=9, kv_heads=2)
    inputs = case.inputs(seed=3)
    query, pairs, gates = case.parts([t.double() for t in inputs])
    out, masks = case.gold(inputs), fusion_cases.allowed(case, "cpu")
    for b in range(case.batch):
        for h in range(case.heads):
            for i in range(case.rows):
                weights, values = [], []
                for (key, value), mask in zip(pairs, masks, strict=True):
                    may = torch.ones(key.shape[2], dtype=torch.bool)
                    if mask is not None:
                        may = mask.expand(case.batch, 1, case.rows, -1)[b, 0, i]
                    head = h // (case.heads // 2)
                    scores = [float(query[b, h, i] @ k) / math.sqrt(case.dim) for k in key[b, head][may]]
                    weights.append([math.exp(s) for s in scores])
                    values.append(value[b, head][may])
                if case.fusion == "joint":
                    total = sum(map(sum, weights)) or 1.0
                    totals = [total] * len(pairs)
                else:
                    totals = [sum(w) for w in weights]
                expected = torch.zeros(case.value_dim or case.dim, dtype=torch.float64)
                for j, (w, v) in enumerate(zip(weights, values, strict=True)):
                    gate = (
                        gates[j].expand(case.batch, case.heads, case.rows, 1)[b, h, i]
                        if torch.is_tensor(gates[j])
                        else 1
                    )
                    expected += gate * (torch.tensor(w, dtype=torch.float64) @ v) / totals[j]
                torch.testing.assert_close(out[b, h, i], expected)


def test_masks_hide_what_they_say():
    images = cases.CASES["fusion-flamingo-3x64"]
    seen = torch.cat([m[..., 0] for m in fusion_cases.allowed(images, "cpu")], 1)
    assert seen[0].sum(0).max() == 1 and not seen[0, :, 0].any() and seen.any(2).all()
    assert images.pairs == 4 * 8 * 64 * int(seen.sum())
    lengths = cases.CASES["fusion-idefics2-4900"]
    (_, first), (_, second) = fusion_cases.source_masks(lengths, "cpu")
    assert first.tolist() == [4900, 1225] and second is None
    tiles = cases.CASES["fusion-mllama-1601"]
    ((mask, _),) = fusion_cases.source_masks(tiles, "cpu")
    assert mask.shape == (1, 1, 128, 1601) and mask.dtype == torch.float32
    hidden = mask[0, 0] < 0
    assert not torch.equal(hidden[0], hidden[-1]) and abs(float(hidden.float().mean()) - 1 / 3) < 1e-2


def test_work_counts_follow_the_formulas():
    case = fusion_cases.AttentionCase("x", 2, 3, 5, 7, (11, 4), (), value_dim=6, shared_query=True)
    assert case.pairs == 2 * 3 * 7 * 15
    q, k, v, o = 7 * 3 * 5, 2 * 15 * 3 * 5, 2 * 15 * 3 * 6, 2 * 7 * 3 * 6
    assert case.work("forward") == (case.pairs * 2 * 11, 4 * (q + k + v + o))
    assert case.work("backward") == (case.pairs * 2 * (11 + 3 * 5 + 2 * 6), 4 * (3 * (q + k + v) + 3 * o))
    half = case.with_dtype(torch.bfloat16)
    assert half.work("forward")[1] * 2 == case.work("forward")[1] and half.name == "x-bfloat16"
    mha = fusion_cases.ModuleCase("x", 2, 3, 4, 5, (6,), ())
    flops, moved = mha.work("forward")
    assert flops == 2 * (5 + 6) * 2 * 2 * 12 * 12 + 4 * 4 * 2 * 3 * 5 * 6  # q and out, k and v; scores and output
    assert moved == 4 * (2 * 12 * (5 + 6 + 5) + 4 * 12 * 12 + 2 * 5 * 6)


def test_roof_of_a_dtype():
    roof = roofline.measure(size=64, megabytes=1, repeats=1, dtypes=["float32", "bfloat16"])
    assert set(roof) == {"gflops", "gflops_bfloat16", "gbytes"}
    roof = {"gflops": 1.0, "gflops_bfloat16": 4.0, "gbytes": 1.0}
    assert roofline.fraction(2.0, 1e9, 0, roof) == 0.5
    assert roofline.fraction(2.0, 1e9, 0, roof, "bfloat16") == 0.125
    assert roofline.fraction(2.0, 1e9, 0, roof, "float16") == 0.5  # not measured
    assert roofline.fraction(2.0, 1e9, 0, roof | {"gflops_bfloat16": 0.2}, "bfloat16") == 0.5  # better in float32


def test_mmfast_has_more_than_the_reference():
    assert all(ALL["mmfast"].runs(case, "cpu") for case in FUSION)


def test_quick_suite_end_to_end(tmp_path):
    arguments = (
        "fusion --cases fusion-smoke --quick --rounds 2 --pause 0 --providers mmfast,reference,sdpa,plain --memory sdpa"
    )
    assert command.main([*arguments.split(), "--out", str(tmp_path)]) == 0
    rows = compare.read(tmp_path / "rows.jsonl")
    assert {(row["mode"], row["provider"]) for row in rows} == {
        (mode, name) for mode in fusion_cases.MODES for name in ("mmfast", "reference", "sdpa", "plain")
    }
    for row in rows:
        assert row["slice"] == "fusion" and row["keys"] == [7, 5] and row["pairs"] == SMOKE.pairs
        assert 0 < row["error"]["relative_l2"] < 1e-5 and row["work"][row["mode"]]["operations"] > 0
        if row["provider"] == "sdpa":
            inputs = sum(t.numel() for t in SMOKE.inputs(0))
            assert row["memory"]["output"] == 4 * (2 * 2 * 20 * 8 + (row["mode"] == "backward") * inputs)
    assert "pairs/s" in report.tables(rows)
