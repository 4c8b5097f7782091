"""The benchmark suite: peers compute what the reference computes, rows are complete, a regression is seen."""

from __future__ import annotations

import copy
import dataclasses
import json
import xml.etree.ElementTree
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("tabulate")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

from benchmarks import __main__ as command
from benchmarks import cases, compare, machine, memory, prepare, providers, readme_bench, report, roofline, suite

ALL = providers.every()
MEL = cases.select(["mel"]) + cases.select(["mel"], "smoke-2x0.2s")
ROOF = {"gflops": 100.0, "gbytes": 10.0}
COMPILED = ("reference-compile", "stft-compile")
# float32 against float64. torchaudio's filter banks are themselves built in float32, which costs some 1e-6 of the
# largest feature, on a CPU whose logarithms torch rounds otherwise (AVX2) 1.2e-5, and 1e-5 of the largest gradient; a
# wrong window, scale, norm, floor or maximum costs 1e-3 and more.
TOLERANCE = {"forward": 1e-5, "backward": 5e-5}
TOLERANCE_OF_PEERS = {"forward": 5e-5, "backward": 5e-5}


def small(case: cases.MelCase) -> cases.MelCase:
    return dataclasses.replace(case, batch=2, seconds=0.5)


def error_of(provider, case, mode: str) -> float:
    waveform, upstream = case.inputs(seed=1), case.upstream(seed=1)
    result = provider.build(case, "cpu").call(mode, waveform, upstream)()[0]
    return suite.errors(result, case.gold(waveform, upstream if mode == "backward" else None))["max_relative"]


PAIRS = [
    pytest.param(case, ALL[name], mode, id=f"{case.name}-{name}-{mode}")
    for case in MEL
    for name in ("mmfast", "reference", *case.peers)
    for mode in cases.MODES
    if name not in COMPILED and ALL[name].supports(case, mode)
]


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore:At least one mel filterbank has all zero values")
@pytest.mark.parametrize(("case", "provider", "mode"), PAIRS)
def test_provider_agrees_with_gold(case, provider, mode):
    if reason := provider.missing("cpu"):
        pytest.skip(reason)
    tolerance = TOLERANCE if provider.name in ("mmfast", "reference") else TOLERANCE_OF_PEERS
    assert error_of(provider, small(case), mode) < tolerance[mode]


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_provider_agrees_with_gold(name):
    case = small(cases.CASES["mfcc-db-32x10s"])
    x, upstream = case.inputs(seed=1), case.upstream(seed=1)
    torch._dynamo.reset()
    gradient, features = ALL[name].build(case, "cpu").call("backward", x, upstream)()
    assert suite.errors(features, case.gold(x))["max_relative"] < TOLERANCE["forward"]
    assert suite.errors(gradient, case.gold(x, upstream))["max_relative"] < TOLERANCE["backward"]


@pytest.mark.parametrize("case", MEL, ids=lambda case: case.name)
def test_stft_pipeline_agrees_with_gold(case):
    """What is compiled computes the same numbers before it is compiled."""
    if "stft-compile" not in case.peers:
        pytest.skip("framed otherwise")
    from benchmarks.peers.torch_compile import stft_pipeline

    case = small(case)
    x = case.inputs(seed=1)
    tables = {name: table.float() for name, table in case.tables().items()}
    assert suite.errors(stft_pipeline(x, case.config, **tables), case.gold(x))["max_relative"] < TOLERANCE["forward"]


def test_every_peer_is_named_in_a_case_and_known():
    named = {name for case in cases.CASES.values() for name in case.peers}
    assert named == set(ALL) - {"mmfast", "reference"}


@pytest.mark.parametrize("name", ["whisper-8x30s", "mfcc-db-32x10s"])
def test_signal_meets_the_top_db_floor_and_its_scope(name):
    """Otherwise the agreement of peers would say nothing about either."""
    case = small(cases.CASES[name])
    x = case.inputs(seed=1)
    x[1] *= 1e-3  # the second clip alone has a lower maximum
    gold = case.gold(x)
    for change in ({"top_db_scope": "item"}, {"top_db": None, "top_db_scope": "item"}):
        other = dataclasses.replace(case, config=case.config.replace(**change)).gold(x)
        assert suite.errors(other, gold)["max_relative"] > 100 * TOLERANCE["forward"]


def test_work_counts_follow_the_formulas():
    def frame(config, mode="forward"):
        case = cases.MelCase("x", 1, 1, config, ())
        return tuple(value / case.frames for value in case.work(mode))

    # n = 400: 400 + 2.5·400·log2 400 + 7·201 = 10451; 4·160 + 4·80 = 960 bytes.
    config = cases.CASES["whisper-8x30s"].config
    assert frame(config) == pytest.approx((10451, 960), rel=1e-4)
    # DCT 80 × 40 after a top_db: 6400 more operations; 4·160 + 8·80 + 4·40 = 1440 bytes.
    assert frame(config.replace(n_mfcc=40)) == pytest.approx((16851, 1440), rel=1e-4)
    flops, moved = frame(cases.CASES["logmel-256x1s"].config, "backward")
    assert flops == pytest.approx(3.1 * 10451, rel=1e-4)
    assert moved == pytest.approx(960 + 8 * 160 + 4 * 80)


def test_select_cases_and_providers():
    assert [c.name for c in cases.select(["mel"], "kaldi-*")] == ["kaldi-fbank80-32x10s", "kaldi-mfcc13-32x10s"]
    assert "smoke-2x0.2s" not in {c.name for c in cases.select()}
    assert [c.name for c in cases.select(None, "smoke-2x0.2s")] == ["smoke-2x0.2s"]
    with pytest.raises(ValueError, match="--cases: nothing matches 'whisperer'"):
        cases.select(None, "whisperer")
    with pytest.raises(ValueError, match="slice must be one of fusion, mel, mmd, got 'smell'"):
        cases.select(["smell"])
    with pytest.raises(ValueError, match="--providers: nothing matches 'nobody'"):
        providers.select("reference,nobody")


def test_native_provider_is_skipped_with_the_reason(monkeypatch):
    monkeypatch.setenv("MMFAST_BACKEND", "reference")
    available, missing = providers.select("mmfast,reference")
    assert [p.name for p in available] == ["reference"]
    assert missing == {"mmfast": "backend reference: asked for by MMFAST_BACKEND"}


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory) -> tuple[int, Path]:
    out = tmp_path_factory.mktemp("out")
    arguments = "mel --cases smoke-2x0.2s --quick --rounds 3 --pause 0 --providers reference --memory reference"
    return command.main([*arguments.split(), "--out", str(out)]), out


def test_quick_suite_end_to_end(quick_run):
    code, out = quick_run
    assert code == 0
    rows = compare.read(out / "rows.jsonl")
    assert [(row["case"], row["mode"], row["provider"]) for row in rows] == [
        ("smoke-2x0.2s", "forward", "reference"),
        ("smoke-2x0.2s", "backward", "reference"),
    ]
    for row in rows:
        times = np.concatenate(row["rounds"])
        assert len(row["rounds"]) == 3 and row["n"] == len(times) >= 3
        assert row["median"] == np.median(times) and row["p20"] <= row["median"] <= row["p80"]
        assert 0 < row["error"]["relative_l2"] < 1e-5
        assert 0 < row["roof_fraction"] < 1
        assert row["memory"]["output"] == 4 * 2 * 80 * 21 + (row["mode"] == "backward") * 4 * 2 * 3200
        assert row["machine"]["torch"] == torch.__version__ and row["machine"]["threads"] == torch.get_num_threads()
        assert row["seed"] == 0 and row["frames"] == 42 and row["roofline"]["gflops"] > 0
    text = (out / "report.md").read_text()
    assert "### forward + backward" in text and "| smoke-2x0.2s | reference" in text
    for mode in cases.MODES:
        root = xml.etree.ElementTree.parse(out / f"{mode}.svg").getroot()
        words = " ".join(element.text or "" for element in root.iter("{http://www.w3.org/2000/svg}text"))
        assert "smoke-2x0.2s" in words and "reference" in words


def test_rows_come_back_from_the_file_as_a_report(quick_run, tmp_path):
    _, out = quick_run
    assert command.main(["--report", str(out / "rows.jsonl"), "--out", str(tmp_path)]) == 0
    assert (tmp_path / "report.md").read_text() == (out / "report.md").read_text()
    assert (tmp_path / "forward.svg").read_text() == (out / "forward.svg").read_text()


class Broken(providers.Provider):
    name, package, module = "broken", "torch", "torch"

    def __init__(self, forward):
        self.forward = forward

    def supports(self, case, mode):
        return True

    def build(self, case, device):
        return providers.Runner(self.forward)


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lambda x: 1 / 0, "ZeroDivisionError: division by zero"),
        (lambda x: x, "ValueError: the result must have the shape (2, 80, 21), got (2, 3200)"),
    ],
)
def test_failing_provider_costs_the_others_nothing(forward, reason):
    settings = suite.Settings(rounds=1, calls=1, pause=0, memory=(), modes=("forward",))
    chosen = [Broken(forward), ALL["reference"]]
    rows = list(suite.run([cases.CASES["smoke-2x0.2s"]], chosen, settings, progress=False, roof=ROOF))
    assert [(row["provider"], row.get("failed")) for row in rows] == [("reference", None), ("broken", reason)]
    assert f"smoke-2x0.2s forward broken: {reason}" in report.tables(rows)


def test_what_compiles_is_called_ahead_in_processes(monkeypatch, capfd):
    """Each mode of each provider that can, whatever another one does; a case that cannot be made says so."""
    modes = []

    class Counted(Broken):
        def __init__(self):
            super().__init__(lambda x: modes.append(x.requires_grad) or x)

    class Failing(Broken):
        def __init__(self):
            super().__init__(lambda x: 1 / 0)

    monkeypatch.setattr(providers, "every", lambda: {"failing": Failing(), "counted": Counted()})
    prepare.one("cpu", "forward,backward", "failing,counted", "smoke-2x0.2s")
    assert modes == [False, True]
    prepare.ahead([cases.CASES["smoke-2x0.2s"]], [ALL["reference"]], ("forward",), "cpu", 1)
    assert capfd.readouterr().err == ""
    prepare.ahead([SimpleNamespace(name="nowhere")], [ALL["reference"]], ("forward",), "cpu", 1)
    assert "nowhere: not prepared" in capfd.readouterr().err


def test_wrong_numbers_show_in_the_error_column():
    case = cases.CASES["smoke-2x0.2s"]
    settings = suite.Settings(rounds=1, calls=1, pause=0, memory=(), modes=("forward",))
    wrong = Broken(lambda x: case.compute(x, "reference") * 1.01)
    (row,) = suite.run([case], [wrong], settings, progress=False, roof=ROOF)
    assert row["error"]["max_relative"] == pytest.approx(0.01, rel=1e-3)


def test_slow_provider_stops_at_its_budget_but_not_before_the_least_rounds():
    turn = lambda name: suite._Turn(ALL[name], lambda: (torch.zeros(1),), {}, 0.0)  # noqa: E731
    case = cases.CASES["smoke-2x0.2s"]
    slow, fast = turn("reference"), turn("mmfast")
    slow.spent = 100.0
    bar = suite.tqdm(disable=True)
    settings = suite.Settings(rounds=6, calls=2, pause=0, budget=1.0, least_rounds=3)
    suite._interleave([slow, fast], settings, case, "forward", bar)
    assert (len(slow.rounds), len(fast.rounds)) == (3, 6)
    assert all(len(times) <= 2 for times in fast.rounds)


def made_up(scale: float = 1.0, spread: float = 0.02) -> list[dict]:
    rng = np.random.default_rng(5)
    rounds = [[scale * 0.01 * (1 + spread * rng.standard_normal()) for _ in range(6)] for _ in range(8)]
    times = np.concatenate(rounds)
    row = {
        "slice": "mel",
        "case": "made-up",
        "mode": "forward",
        "provider": "mmfast",
        "device": "cpu",
        "shape": "1 × 1 s, 400/160/80",
        "frames": 100,
        "median": float(np.median(times)),
        "p20": float(np.quantile(times, 0.2)),
        "p80": float(np.quantile(times, 0.8)),
        "n": len(times),
        "error": {"max_relative": 1e-7, "relative_l2": 1e-8},
        "memory": None,
        "gflops": 10.0,
        "roof_fraction": 0.5,
        "rounds": rounds,
        "machine": machine.describe(),
        "roofline": ROOF,
    }
    return [row, row | {"provider": "torchaudio", "median": 0.1, "p20": 0.09, "p80": 0.12}]


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_compare_sees_a_regression_and_passes_an_equal_pair(tmp_path, capsys):
    before = write(tmp_path / "a", made_up())
    slower = write(tmp_path / "b", made_up(1.3))
    assert command.main(["--compare", before, before]) == 0
    assert command.main(["--compare", before, slower]) == 1
    assert command.main(["--compare", slower, before]) == 0
    assert command.main(["--compare", before, slower, "--tolerance", "0.4"]) == 0
    output = capsys.readouterr().out
    assert "1.300" in output and "slower" in output and "faster" in output


def test_compare_counts_only_the_providers_asked_for(tmp_path):
    before, after = made_up(), made_up()
    after[1] = copy.deepcopy(after[1]) | {"rounds": [[t * 2 for t in times] for times in after[1]["rounds"]]}
    files = [write(tmp_path / "a", before), write(tmp_path / "b", after)]
    assert command.main(["--compare", *files]) == 1
    assert command.main(["--compare", *files, "--providers", "mmfast"]) == 0


def test_compare_draws_whole_rounds():
    """Half of the rounds slower by a quarter: the rounds disagree, so the interval is wide, many calls or not."""
    before, after = made_up(), copy.deepcopy(made_up())
    after[0]["rounds"] = [[t * (1.25 if i % 2 else 1.0) for t in times] for i, times in enumerate(after[0]["rounds"])]
    after[0]["median"] = float(np.median(np.concatenate(after[0]["rounds"])))
    change = compare.changes(before, after, "mmfast")[0]
    assert change.ratio > 1.05 and change.low < 1.03 and change.high > 1.2
    assert not change.regressed(0.05)


def test_compare_rejects_files_without_a_common_row(tmp_path, capsys):
    first, second = write(tmp_path / "a", made_up()), write(tmp_path / "b", [])
    with pytest.raises(SystemExit) as stop:
        command.main(["--compare", first, second])
    assert stop.value.code == 2 and "no row in common" in capsys.readouterr().err
    (tmp_path / "c").write_text("{}\nnot json\n")
    with pytest.raises(ValueError, match="c:2: not JSON"):
        compare.read(tmp_path / "c")


def test_report_puts_the_fastest_first_and_ratios_against_mmfast():
    table = report.tables(made_up()[::-1])
    ours, theirs = (line for line in table.splitlines() if "| mmfast " in line or "| torchaudio " in line)
    assert ours.startswith("| made-up") and "| 1 " in ours
    assert theirs.split("|")[6].strip() == f"{0.1 / made_up()[0]['median']:.3g}"


def test_plot_text_reads_on_light_and_dark_pages(tmp_path):
    """WCAG contrast of the text with white and with GitHub's dark background; no background of its own."""

    def luminance(colour):
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))

    for page in ("#ffffff", "#0d1117"):
        low, high = sorted((luminance(report._TEXT), luminance(page)))
        assert (high + 0.05) / (low + 0.05) > 3.9
    (path,) = report.plots(made_up(), tmp_path)
    root = xml.etree.ElementTree.parse(path).getroot()
    svg = "{http://www.w3.org/2000/svg}"
    styles = [element.get("style", "") for element in root.iter(f"{svg}text")]
    assert styles and all(report._TEXT in style for style in styles)
    patch = next(g for g in root.iter(f"{svg}g") if g.get("id") == "patch_1")
    assert all("fill: none" in p.get("style", "") for p in patch.iter(f"{svg}path"))


def test_peak_memory_of_the_reference_holds_its_spectrogram():
    """The reference allocates at least the complex spectrum of 4 × 30 s; what it returns does not count."""
    case = cases.CASES["mel2048-4x30s"]
    peak = memory.in_fresh_process(case.name, "reference", "forward", 1, 0)
    assert peak["output"] == 4 * 128 * case.frames
    if peak["method"] == "VmHWM":
        spectrum = case.frames * 1025 * 8
        assert spectrum < peak["extra"] < 8 * spectrum


def test_memory_of_a_failing_process_says_why():
    assert "KeyError" in memory.in_fresh_process("no-such-case", "reference", "forward", 1, 0)["error"]


@pytest.mark.cuda
def test_peak_memory_on_a_gpu_is_the_allocators():
    case = cases.CASES["mel2048-4x30s"]
    settings = suite.Settings(rounds=1, calls=1, memory=("ref*",), modes=("forward",), device="cuda")
    chosen = [ALL["mmfast"], ALL["reference"]]
    of = {row["provider"]: row["memory"] for row in suite.run([case], chosen, settings, progress=False, roof=ROOF)}
    spectrum = case.frames * 1025 * 8
    assert of["mmfast"] is None and of["reference"]["output"] == 4 * 128 * case.frames
    assert spectrum < of["reference"]["extra"] < 8 * spectrum


def test_machine_and_roofline():
    described = machine.describe()
    assert described["cpu"] and described["memory_gib"] > 0 and described["threads"] >= 1
    assert described["torch"] in machine.sentence(described)
    roof = roofline.measure(size=256, megabytes=8, repeats=1)
    assert roof["gflops"] > 0 and roof["gbytes"] > 0
    # 10 Gflop at 100 GFLOP/s need 0.1 s, 3 GB at 10 GB/s 0.3 s: taking 0.6 s is half of the roof.
    assert roofline.fraction(0.6, 10e9, 3e9, ROOF) == pytest.approx(0.5)


def test_thp_starts_again_once(monkeypatch):
    started = []
    monkeypatch.setattr(command.os, "execv", lambda *a: started.append(a) or (_ for _ in ()).throw(SystemExit(0)))
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE", raising=False)
    with pytest.raises(SystemExit):
        command.main(["--thp", "--list"])
    assert started[0][1][1:] == ["-m", "benchmarks", "--thp", "--list"]
    assert command.main(["--thp", "--list"]) == 0  # set by the first
    assert len(started) == 1


def speech(count: int = 5) -> list[np.ndarray]:
    generator = torch.Generator().manual_seed(3)
    return [cases.speech_like(1, 6000 + 1777 * i, 16000, generator)[0].numpy() for i in range(count)]


@pytest.mark.parametrize("name", readme_bench.FEATURES)
def test_agreement_of_a_right_op_and_disagreement_of_a_wrong_one(monkeypatch, name):
    config = readme_bench.FEATURES[name]
    right = readme_bench.agreement(name, config, speech(), native=True, batch=2)
    assert right.agrees and right.clips == 5
    assert right.frames == sum(config.frame_count(len(clip)) for clip in speech())

    def wrong(change):
        def extract(x, config, lengths, backend=None):
            features, counts = readme_bench_extract(x, config, lengths=lengths, backend="reference")
            return (features, counts) if backend == "reference" else (change(features), counts)

        monkeypatch.setattr(readme_bench, "extract", extract)
        return readme_bench.agreement(name, config, speech(), native=True, batch=2)

    readme_bench_extract = readme_bench.extract
    assert not wrong(lambda f: f * (1 + 1e-3)).agrees
    nan = wrong(lambda f: f.index_fill(-1, torch.tensor([3]), torch.nan))
    assert not nan.agrees and nan.fused == np.inf
    assert "NO" in readme_bench.agreement_table([nan])


def test_agreement_without_the_fused_op_says_so():
    config = readme_bench.FEATURES["MFCC"]
    alone = readme_bench.agreement("MFCC", config, speech(), native=False)
    assert alone.agrees and alone.fused is None and 0 < alone.reference_gold < 1e-3 * alone.scale
    assert "not built" in readme_bench.agreement_table([alone])


def test_speech_case_cuts_the_recording():
    stream = torch.arange(5000.0)
    case = readme_bench.speech_case(cases.CASES["smoke-2x0.2s"], stream)
    x = case.inputs(seed=0)
    assert x.shape == (2, 3200)
    assert torch.equal(x.flatten()[:5000], stream) and torch.equal(x.flatten()[5000:], stream[:1400])
    assert not torch.equal(case.inputs(seed=1), x)
