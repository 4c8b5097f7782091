"""The command line on real audio files: what it writes, resumes, reports and returns."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import mmfast
from mmfast import cli
from mmfast import extract as command
from mmfast.mel import MelConfig, extract

soundfile = pytest.importorskip("soundfile")
safetensors = pytest.importorskip("safetensors")
pytest.importorskip("tqdm")


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MMFAST_BACKEND"):
        monkeypatch.delenv(name, raising=False)


def sound(seconds, rate=16000, channels=1, seed=0):
    rng = np.random.default_rng(seed)
    shape = (round(seconds * rate),) if channels == 1 else (round(seconds * rate), channels)
    return (0.1 * rng.standard_normal(shape)).astype(np.float32)


def put(path, samples, rate=16000, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, rate, **options)
    return path


@pytest.fixture
def corpus(tmp_path):
    """A folder of five clips in three formats, and a text file that is none of our business."""
    folder = tmp_path / "in"
    put(folder / "a.wav", sound(0.5, seed=1))
    put(folder / "deep" / "b.flac", sound(1.25, channels=2, seed=2))
    put(folder / "deep" / "er" / "c.ogg", sound(0.7, seed=3))
    put(folder / "deep" / "d.WAV", sound(0.3, seed=4), subtype="FLOAT")
    put(folder / "e.wav", sound(0.9, seed=5))
    (folder / "notes.txt").write_text("not audio")
    return folder


NAMES = ["a.wav", "deep/b.flac", "deep/d.WAV", "deep/er/c.ogg", "e.wav"]


def run(*arguments):
    return cli.main(["extract", *map(str, arguments)])


def outputs(out):
    return sorted(p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file())


def read(path):
    with safetensors.safe_open(path, "pt") as file:
        return file.get_tensor("features"), file.metadata()


def expected(path, config):
    samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    mono = samples.mean(axis=1)
    if rate != config.sample_rate:
        import soxr

        mono = soxr.resample(mono, rate, config.sample_rate)
    return extract(torch.from_numpy(mono), config)


def stamps(out):
    return {p: p.stat().st_mtime_ns for p in out.rglob("*.safetensors")}


def age(*folders):
    """Make every file an hour older, so that what is written next is newer on any file system."""
    for path in (p for folder in folders for p in folder.rglob("*") if p.is_file()):
        at = path.stat().st_mtime_ns - 3600 * 10**9
        os.utime(path, ns=(at, at))


@pytest.mark.parametrize("features", list(command.PRESETS))
@pytest.mark.parametrize("batch_seconds", [0.1, 2.0, 1000.0])
def test_writes_what_extract_gives_for_each_file(corpus, tmp_path, capsys, features, batch_seconds):
    out = tmp_path / "out"
    assert run(corpus, "--features", features, "--out", out, "--batch-seconds", batch_seconds) == 0
    assert outputs(out) == [name + ".safetensors" for name in NAMES]
    config = MelConfig(**command.PRESETS[features])
    for name in NAMES:
        tensor, _ = read(out / (name + ".safetensors"))
        want = expected(corpus / name, config)
        assert tensor.shape == want.shape
        torch.testing.assert_close(tensor, want, rtol=1e-4, atol=1e-3)
    said = capsys.readouterr()
    assert f"{features}: 5 written" in said.out
    assert "failed:" not in said.err


def test_metadata_round_trip(corpus, tmp_path):
    out = tmp_path / "out"
    assert run(corpus, "--features", "logmel", "--out", out, "--set", "n_mels=23", "--set", "mel_scale=slaney") == 0
    tensor, metadata = read(out / "deep/b.flac.safetensors")
    config = MelConfig.from_key(metadata["config"])
    assert config == MelConfig(**{**command.PRESETS["logmel"], "n_mels": 23, "mel_scale": "slaney"})
    assert tensor.shape == (23, config.frame_count(int(metadata["samples"])))
    assert metadata["source"] == "deep/b.flac"
    assert metadata["source_bytes"] == str((corpus / "deep/b.flac").stat().st_size)
    assert metadata["source_sample_rate"] == metadata["sample_rate"] == "16000"
    assert metadata["samples"] == "20000"
    assert metadata["mmfast"] == mmfast.__version__


@pytest.mark.parametrize("rate, wanted", [(8000, None), (48000, None), (16000, 8000)])
def test_resamples(tmp_path, rate, wanted):
    pytest.importorskip("soxr")
    path = put(tmp_path / "tone.wav", 0.5 * np.sin(2 * np.pi * 1000 * np.arange(rate) / rate), rate)
    out = tmp_path / "out"
    options = ["--sample-rate", wanted] if wanted else []
    assert run(path, "--features", "logmel", "--out", out, *options) == 0
    tensor, metadata = read(out / "tone.wav.safetensors")
    config = MelConfig.from_key(metadata["config"])
    assert config.sample_rate == (wanted or 16000)
    assert metadata["source_sample_rate"] == str(rate)
    assert int(metadata["samples"]) == config.sample_rate
    # 1 kHz is loudest in the filter around 1 kHz, whatever the file's rate.
    edges = np.linspace(0, 2595 * np.log10(1 + config.sample_rate / 2 / 700), 82)
    centres = 700 * (10 ** (edges[1:-1] / 2595) - 1)
    assert abs(centres[int(tensor[:, 20:-20].mean(dim=1).argmax())] - 1000) < 60


def test_done_files_are_left_alone(corpus, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = (corpus, "--features", "logmel", "--out", out)
    assert run(*arguments) == 0
    age(corpus, out)
    before = stamps(out)
    assert run(*arguments) == 0
    assert stamps(out) == before
    assert "0 written" in (said := capsys.readouterr().out.splitlines()[-1]) and "5 already there" in said
    assert run(*arguments, "--overwrite") == 0
    assert all(after > before[path] for path, after in stamps(out).items())


def test_what_is_not_done_is_done_again(corpus, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = (corpus, "--features", "logmel", "--out", out)
    assert run(*arguments) == 0
    age(corpus, out)
    # gone; cut; another source of the same name; a source touched since
    (out / "a.wav.safetensors").unlink()
    whole = read(out / "deep/b.flac.safetensors")[0].clone()
    (out / "deep/b.flac.safetensors").write_bytes((out / "deep/b.flac.safetensors").read_bytes()[:-100])
    put(corpus / "e.wav", sound(0.4, seed=9))
    os.utime(corpus / "deep/d.WAV")
    before = stamps(out)
    assert run(*arguments) == 0
    assert "4 written" in (said := capsys.readouterr().out.splitlines()[-1]) and "1 already there" in said
    assert stamps(out)[out / "deep/er/c.ogg.safetensors"] == before[out / "deep/er/c.ogg.safetensors"]
    torch.testing.assert_close(read(out / "deep/b.flac.safetensors")[0], whole, rtol=1e-5, atol=1e-5)
    assert read(out / "e.wav.safetensors")[1]["samples"] == "6400"
    assert run(*arguments, "--set", "n_mels=40") == 0  # another configuration
    assert "5 written" in capsys.readouterr().out
    assert all(read(path)[0].shape[0] == 40 for path in stamps(out))


def bad_files(folder):
    """Inputs that cannot be extracted, each with words of the reason."""
    whole = put(folder / "whole.flac", sound(2.0)).read_bytes()
    wave = put(folder / "whole.wav", sound(2.0)).read_bytes()
    (folder / "cut.flac").write_bytes(whole[: len(whole) // 2])
    (folder / "cut.wav").write_bytes(wave[: len(wave) // 2])
    (folder / "noise.wav").write_bytes(b"this is not a wave file" * 50)
    (folder / "none.wav").write_bytes(b"")
    (folder / "music.m4a").write_bytes(b"\0\0\0\x20ftypM4A " + bytes(200))
    put(folder / "empty.wav", np.zeros(0, np.float32))
    put(folder / "short.wav", np.zeros(90, np.float32))
    put(folder / "nan.wav", np.array([0.0, np.nan] * 4000, np.float32), subtype="FLOAT")
    (folder / "dangling.wav").symlink_to(folder / "gone.wav")
    os.mkfifo(folder / "pipe.wav")
    return {
        "cut.flac": "damaged",
        "cut.wav": "the file ends before its data does",
        "noise.wav": "not a format that libsndfile decodes",
        "none.wav": "not a format that libsndfile decodes",
        "music.m4a": "not a format that libsndfile decodes",
        "empty.wav": "empty: no samples",
        "short.wav": "too short: 90 samples",
        "nan.wav": "NaN or infinite",
        "dangling.wav": "No such file",
        "pipe.wav": "not a regular file",
    }


@pytest.mark.parametrize("batch_seconds", [1, 1000])
def test_bad_files_cost_nothing_else(tmp_path, capsys, batch_seconds):
    reasons = bad_files(tmp_path / "in")
    out = tmp_path / "out"
    code = run(
        tmp_path / "in", tmp_path / "typo.wav", "--features", "mfcc", "--out", out, "--batch-seconds", batch_seconds
    )
    assert code == 1
    assert outputs(out) == ["whole.flac.safetensors", "whole.wav.safetensors"]
    said = capsys.readouterr()
    assert f"mfcc: 2 written to {out}" in said.out
    lines = [line for line in said.err.splitlines() if line.startswith("failed: ")]
    assert len(lines) == len(reasons) + 1
    for name, reason in {**reasons, "typo.wav": "No such file"}.items():
        (line,) = [line for line in lines if f"/{name}: " in line]
        assert reason in line
    assert read(out / "whole.wav.safetensors")[0].isfinite().all()


def test_a_wave_of_unknown_length_is_whole(tmp_path):
    """Programs that write to a pipe cannot know the length and announce the largest."""
    wave = bytearray(put(tmp_path / "pipe.wav", sound(0.5)).read_bytes())
    at = wave.index(b"data") + 4
    wave[at : at + 4] = b"\xff\xff\xff\xff"
    (tmp_path / "pipe.wav").write_bytes(wave)
    assert run(tmp_path / "pipe.wav", "--features", "mfcc", "--out", tmp_path / "out") == 0
    assert read(tmp_path / "out/pipe.wav.safetensors")[1]["samples"] == "8000"


def test_unreadable_files_and_folders(corpus, tmp_path, capsys):
    (corpus / "a.wav").chmod(0)
    if os.access(corpus / "a.wav", os.R_OK):
        pytest.skip("root may read everything")
    (corpus / "deep" / "er").chmod(0)
    try:
        assert run(corpus, "--features", "mfcc", "--out", tmp_path / "out") == 1
    finally:
        (corpus / "deep" / "er").chmod(0o755)
    assert len(outputs(tmp_path / "out")) == 3
    lines = [line for line in capsys.readouterr().err.splitlines() if "Permission denied" in line]
    assert len(lines) == 2


def test_open_that_is_refused_is_reported(corpus, tmp_path, capsys, monkeypatch):
    """As above, for whoever runs the tests as root."""

    def refuse(path, *arguments):
        if str(path).endswith("a.wav"):
            raise PermissionError(13, "Permission denied", str(path))
        return open(path, *arguments)

    monkeypatch.setattr(command, "open", refuse, raising=False)
    assert run(corpus, "--features", "mfcc", "--out", tmp_path / "out") == 1
    assert len(outputs(tmp_path / "out")) == 4
    assert "a.wav: cannot be read: Permission denied" in capsys.readouterr().err


def test_output_that_cannot_be_written_is_reported(corpus, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "deep").write_text("a file where a folder has to be")
    assert run(corpus, "--features", "mfcc", "--out", out) == 1
    assert outputs(out) == ["a.wav.safetensors", "deep", "e.wav.safetensors"]
    assert capsys.readouterr().err.count("cannot be written") == 3


def test_names_that_are_not_text(tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    name = os.fsdecode(b"caf\xe9.wav")
    try:
        (folder / name).write_bytes(put(tmp_path / "x.wav", sound(0.3)).read_bytes())
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    (folder / os.fsdecode(b"\xff.wav")).write_bytes(b"damaged")
    arguments = (folder, "--features", "mfcc", "--out", tmp_path / "out")
    assert run(*arguments) == 1
    assert outputs(tmp_path / "out") == [r"caf\xe9.wav.safetensors"]
    assert read(tmp_path / "out" / r"caf\xe9.wav.safetensors")[1]["source"] == r"caf\xe9.wav"
    assert run(*arguments) == 1
    said = capsys.readouterr()
    assert "1 already there" in said.out.splitlines()[-1]
    assert r"\xff.wav: damaged" in said.err
    # An output folder of such a name: safetensors would not find what is there, and do all of it again each time.
    assert run(folder, "--features", "mfcc", "--out", tmp_path / os.fsdecode(b"out\xff")) == 2
    assert r"--out must be text in UTF-8" in capsys.readouterr().err
    (tmp_path / os.fsdecode(b"empty\xff")).mkdir()
    assert run(tmp_path / os.fsdecode(b"empty\xff"), "--features", "mfcc", "--out", tmp_path / "out") == 2
    assert r"empty\xff" in capsys.readouterr().err


def test_links_to_folders_are_followed(corpus, tmp_path):
    put(tmp_path / "elsewhere" / "f.wav", sound(0.4))
    (corpus / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(corpus / "deep")
    (corpus / "deep" / "er" / "round").symlink_to(tmp_path / "elsewhere")
    (corpus / "deep" / "top").symlink_to(corpus)
    clips, failures = command.find([corpus], tmp_path / "out")
    names = {clip.name for clip in clips}
    assert failures == [] and names >= {*NAMES, "linked/f.wav", "linked/back/b.flac", "deep/er/round/f.wav"}
    assert len(names) == len(clips) < 20


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_the_files(tmp_path, monkeypatch, world_size):
    folder, out = tmp_path / "in", tmp_path / "out"
    for i in range(13):
        put(folder / f"{i % 3}" / f"{i:02d}.wav", sound(0.2 + 0.01 * i, seed=i))
    put(folder / "empty.wav", sound(0))
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    seen, codes = [], []
    for rank in range(world_size):
        monkeypatch.setenv("RANK", str(rank))
        before = set(outputs(out))
        codes.append(run(folder, "--features", "mfcc", "--out", out))
        seen.append(set(outputs(out)) - before)
    assert sorted(codes) == [0] * (world_size - 1) + [1]  # one of them had the empty file
    assert sum(map(len, seen)) == len(set().union(*seen)) == 13
    assert min(map(len, seen)) >= 13 // world_size - 1
    # Started again when some are done, each still keeps to its own share.
    for path in list(out.rglob("*.safetensors"))[::2]:
        path.unlink()
    missing = 13 - len(outputs(out))
    monkeypatch.setenv("RANK", "0")
    run(folder, "--features", "mfcc", "--out", out)
    assert set(outputs(out)) >= seen[0]
    assert 13 - len(outputs(out)) <= missing
    assert not (set(outputs(out)) - seen[0]) - set().union(*seen[1:])


@given(st.lists(st.text("abcdef/.", min_size=1, max_size=8), unique=True, max_size=60), st.integers(1, 9))
def test_shares_are_disjoint_and_complete(names, world_size):
    clips = [command.Clip(Path(name), name, Path("out", name)) for name in sorted(names)]
    shares = [command.share(clips, rank, world_size) for rank in range(world_size)]
    assert sorted((clip for part in shares for clip in part), key=lambda clip: clip.name) == clips
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert shares == [command.share(clips[::-1], rank, world_size) for rank in range(world_size)]


@given(st.lists(st.floats(0.01, 50), max_size=60), st.floats(0.5, 100))
def test_batches_are_bounded(durations, seconds):
    clips = [(command.Clip(Path(str(i)), str(i), Path(str(i))), d) for i, d in enumerate(durations)]
    made = command.batches(clips, seconds)
    assert sorted(clip.name for batch in made for clip in batch) == sorted(clip.name for clip, _ in clips)
    length = {clip: duration for clip, duration in clips}
    for batch in made:
        assert len(batch) == 1 or max(length[c] for c in batch) * len(batch) <= seconds
    flat = [length[clip] for batch in made for clip in batch]
    assert flat == sorted(flat)


def test_few_clips_are_decoded_ahead(corpus, monkeypatch):
    decoded = []
    monkeypatch.setattr(
        command, "decode", lambda clip, rate: decoded.append(clip) or (np.zeros(8000, np.float32), rate)
    )
    work = command.Extraction(MelConfig(), batch_seconds=1.0, num_workers=2)
    clips = [command.Clip(Path(f"{i}"), f"{i}", Path(f"{i}")) for i in range(40)]
    with command.ThreadPoolExecutor(2) as pool:
        for taken, batch in enumerate(work._decoded(pool, [clips[i : i + 4] for i in range(0, 40, 4)]), 1):
            assert len(batch) == 4
            assert len(decoded) <= 4 * (taken + 2)
    assert sorted(decoded, key=lambda c: int(c.name)) == clips


def test_interrupted_run_leaves_whole_files_and_is_resumed(corpus, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    arguments = (corpus, "--features", "mfcc", "--out", out, "--batch-seconds", 0.1)
    replace, calls = os.replace, []

    def interrupted(source, target):
        calls.append(target)
        if len(calls) == 3:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", interrupted)
    assert run(*arguments) == 130
    said = capsys.readouterr()
    assert "interrupted" in said.err and "mfcc: 2 written" in said.out
    assert len(outputs(out)) == 2  # and no temporary files
    assert all(read(out / name)[0].isfinite().all() for name in outputs(out))
    monkeypatch.setattr(os, "replace", replace)
    assert run(*arguments) == 0
    assert "3 written" in (said := capsys.readouterr().out) and "2 already there" in said
    assert outputs(out) == [name + ".safetensors" for name in NAMES]


def test_terminated_run_leaves_whole_files(corpus, tmp_path, monkeypatch):
    write, out = command.write, tmp_path / "out"

    def terminated(path, *rest):
        write(path, *rest)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(command, "write", terminated)
    assert run(corpus, "--features", "mfcc", "--out", out, "--batch-seconds", 0.1) == 130
    assert signal.getsignal(signal.SIGTERM) is before
    assert len(outputs(out)) == 1


def test_full_disk_leaves_no_part_of_a_file(corpus, tmp_path, capsys, monkeypatch):
    write_bytes = Path.write_bytes

    def full(path, data):
        write_bytes(path, data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert run(corpus, "--features", "mfcc", "--out", tmp_path / "out") == 1
    assert outputs(tmp_path / "out") == []
    assert capsys.readouterr().err.count("No space left on device") == 5


def test_batch_that_fails_is_tried_clip_by_clip(corpus, tmp_path, capsys, monkeypatch):
    def fussy(waveform, *arguments, **options):
        if len(waveform) > 1 or waveform.shape[-1] == 14400:
            raise RuntimeError("out of memory, say")
        return extract(waveform, *arguments, **options)

    monkeypatch.setattr(command, "extract", fussy)
    assert run(corpus, "--features", "mfcc", "--out", tmp_path / "out") == 1
    assert len(outputs(tmp_path / "out")) == 4
    assert "e.wav: RuntimeError: out of memory, say" in capsys.readouterr().err


def test_same_file_twice_is_one(corpus, tmp_path, capsys):
    assert run(corpus, corpus / "a.wav", corpus / ".", "--features", "mfcc", "--out", tmp_path / "out") == 0
    assert "5 written" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options, message",
    [
        (["--set", "n_mels"], "--set takes key=value"),
        (["--set", "nmels=3"], "did you mean n_mels"),
        (["--set", "n_mels=many"], "n_mels must be an integer"),
        (["--set", "f_max=9000"], "f_max"),
        (["--set", "n_mels=10"], "n_mfcc must be at most n_mels"),
        (["--sample-rate", "-1"], "sample_rate must be positive"),
        (["--batch-seconds", "0"], "--batch-seconds must be positive"),
        (["--batch-seconds", "nan"], "--batch-seconds must be positive"),
        (["--num-workers", "0"], "--num-workers must be at least 1"),
        (["--backend", "cuda"], "has no mel kernels for tensors on cpu"),
    ],
)
def test_wrong_usage(corpus, tmp_path, capsys, options, message):
    assert run(corpus, "--features", "mfcc", "--out", tmp_path / "out", *options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [[], ["extract"], ["extract", "x", "--features", "cqt", "--out", "y"], ["fly"]])
def test_wrong_command_line(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert "usage: mmfast" in capsys.readouterr().err


def test_wrong_usage_of_paths_and_ranks(corpus, tmp_path, capsys, monkeypatch):
    put(tmp_path / "other" / "a.wav", sound(0.5))
    assert run(corpus, tmp_path / "other", "--features", "mfcc", "--out", tmp_path / "out") == 2
    assert "would both go to" in capsys.readouterr().err
    (tmp_path / "nothing").mkdir()
    assert run(tmp_path / "nothing", "--features", "mfcc", "--out", tmp_path / "out") == 2
    assert "no audio files in" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert run(corpus, "--features", "mfcc", "--out", tmp_path / "file") == 2
    assert "cannot be made" in capsys.readouterr().err
    for rank, size in (("2", "2"), ("-1", "2"), ("one", "2")):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", size)
        assert run(corpus, "--features", "mfcc", "--out", tmp_path / "out") == 2
        assert "RANK" in capsys.readouterr().err


def test_missing_library_is_named(corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "soundfile", None)
    assert run(corpus, "--features", "mfcc", "--out", tmp_path / "out") == 2
    assert "pip install 'mmfast[audio]'" in capsys.readouterr().err


def test_missing_resampler_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "soxr", None)
    put(tmp_path / "in/a.wav", sound(0.5, rate=8000), 8000)
    put(tmp_path / "in/b.wav", sound(0.5))
    assert run(tmp_path / "in", "--features", "mfcc", "--out", tmp_path / "out") == 1
    assert "needs soxr: pip install 'mmfast[audio]'" in capsys.readouterr().err
    assert outputs(tmp_path / "out") == ["b.wav.safetensors"]


@pytest.mark.parametrize(
    "text, value",
    [
        ("3", 3),
        ("1e-5", 1e-5),
        ("none", None),
        ("True", True),
        ("false", False),
        ("slaney", "slaney"),
        ("(1, 2)", (1, 2)),
    ],
)
def test_values_of_settings(text, value):
    got = command._value(text)
    assert got == value and type(got) is type(value)


def test_preset_mfcc_is_that_of_torchaudio(tmp_path):
    torchaudio = pytest.importorskip("torchaudio")
    samples = torch.from_numpy(sound(1.0))
    want = torchaudio.transforms.MFCC()(samples)
    torch.testing.assert_close(extract(samples, command.configuration("mfcc")), want, rtol=1e-4, atol=1e-3)


def test_preset_fbank_is_that_of_kaldi():
    knf = pytest.importorskip("kaldi_native_fbank")
    samples = sound(1.0)
    options = knf.FbankOptions()
    options.frame_opts.dither = 0
    options.mel_opts.num_bins = 80
    online = knf.OnlineFbank(options)
    online.accept_waveform(16000, (samples * 32768).tolist())
    online.input_finished()
    want = torch.from_numpy(np.stack([online.get_frame(i) for i in range(online.num_frames_ready)]))
    got = extract(torch.from_numpy(samples), command.configuration("fbank"))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)


def test_preset_whisper_is_that_of_openai():
    whisper = pytest.importorskip("whisper")
    samples = torch.from_numpy(sound(1.0))
    want = whisper.log_mel_spectrogram(samples)
    torch.testing.assert_close(extract(samples, command.configuration("whisper")), want, rtol=1e-4, atol=1e-4)


def test_preset_logmel_is_its_formula():
    samples = torch.from_numpy(sound(1.0)).double()
    config = command.configuration("logmel")
    spectrum = torch.stft(samples, 400, 160, window=torch.hann_window(400, dtype=torch.float64), return_complex=True)
    hz = torch.linspace(0, 8000, 201, dtype=torch.float64)
    edges = 700 * (10 ** (torch.linspace(0, 2595 * np.log10(1 + 8000 / 700), 82, dtype=torch.float64) / 2595) - 1)
    rise = (hz - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    fall = (edges[2:, None] - hz) / (edges[2:] - edges[1:-1])[:, None]
    mel = torch.minimum(rise, fall).clamp(min=0) @ spectrum.abs().square()
    torch.testing.assert_close(extract(samples, config), mel.clamp(min=1e-10).log(), rtol=1e-4, atol=1e-4)


def test_info(capsys):
    assert cli.main(["info"]) == 0
    said = capsys.readouterr().out
    assert mmfast.__version__ in said and torch.__version__ in said and "mel" in said


def mmfast_command(*arguments, **options):
    return subprocess.run([sys.executable, "-m", "mmfast", *map(str, arguments)], stderr=subprocess.PIPE, **options)


def test_output_that_the_encoding_does_not_have(corpus, tmp_path):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    arguments = ("extract", corpus / "a.wav", "--features", "mfcc", "--out", tmp_path / "aus\u00dfen")
    done = mmfast_command(*arguments, env=environment, stdout=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (0, b"")
    assert rb"aus\xdfen (0.0 minutes of sound), 0 already there" in done.stdout


def test_output_that_nobody_reads():
    read, write = os.pipe()
    os.close(read)
    done = mmfast_command("info", stdout=write)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


def test_extracts_without_a_stderr(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)  # as where it is closed
    assert run(corpus, "--features", "mfcc", "--out", tmp_path / "out") == 0
    assert len(outputs(tmp_path / "out")) == 5


def test_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "mmfast", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"mmfast {mmfast.__version__}\n"
