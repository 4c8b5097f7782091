"""`mmfast extract`: audio files and folders → one safetensors file of features each."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import hashlib
import importlib
import os
import re
import stat
import sys
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

import mmfast
from mmfast import _backend
from mmfast.mel import MelConfig, extract

# What `--features` names. Lengths are in samples, so another `--sample-rate` changes their duration.
PRESETS: dict[str, dict[str, Any]] = {
    # torchaudio.transforms.MFCC() with its defaults, top_db per clip
    "mfcc": {
        "sample_rate": 16000, "n_fft": 400, "hop_length": 200, "n_mels": 128, "n_mfcc": 40,
        "log": "db", "log_floor": 1e-10, "top_db": 80.0,
    },
    # 80 natural-log mel energies every 10 ms
    "logmel": {
        "sample_rate": 16000, "n_fft": 400, "hop_length": 160, "n_mels": 80, "log": "ln", "log_floor": 1e-10,
    },
    # Kaldi's compute-fbank-feats --dither=0 --num-mel-bins=80, on its scale of 16-bit integers
    "fbank": {
        "sample_rate": 16000, "n_fft": 512, "win_length": 400, "hop_length": 160, "framing": "valid",
        "window": "povey", "window_periodic": False, "window_position": "start",
        "input_scale": 32768.0, "remove_dc": True, "preemphasis": 0.97,
        "n_mels": 80, "f_min": 20.0, "mel_scale": "kaldi",
        "log": "ln", "log_floor": 2.0**-23, "layout": "time_feature",
    },
    # openai-whisper's log_mel_spectrogram of the whole clip, neither padded nor cut to 30 s
    "whisper": {
        "sample_rate": 16000, "n_fft": 400, "hop_length": 160, "drop_last": True,
        "n_mels": 80, "mel_scale": "slaney", "mel_norm": "slaney",
        "log": "log10", "log_floor": 1e-10, "top_db": 8.0, "output_offset": 4.0, "output_scale": 0.25,
    },
}  # fmt: skip

# Taken from folders. Those that libsndfile cannot decode are reported, so that no recording is left out in silence.
_AUDIO = """wav wave flac ogg oga opus mp3 aif aiff aifc au snd caf w64 rf64 sph nist voc ircam sf avr paf pvf svx
    m4a m4b mp4 aac wma amr ape wv mka webm ac3 dts mp2 mpc tta ra 3gp"""
AUDIO_SUFFIXES = frozenset("." + name for name in _AUDIO.split())
_SUFFIX = ".safetensors"
_UNKNOWN_SIZE = 0x7FFF0000  # WAV written to a pipe announces a size from here up


class UsageError(Exception):
    """Nothing was done: the command does not say what to do. Exit code 2."""


class ClipError(Exception):
    """One file cannot be extracted; the message is the reason."""


@dataclass(frozen=True)
class Clip:
    """An input, its path relative to the argument it was found under, and its output."""

    source: Path
    name: str
    target: Path


@dataclass
class Report:
    """What a run did."""

    written: int = 0
    skipped: int = 0
    seconds: float = 0.0
    failures: list[tuple[str, str]] = field(default_factory=list)


def configuration(features: str, sample_rate: float | None = None, settings: Iterable[str] = ()) -> MelConfig:
    """The configuration of a preset with ``key=value`` changes; raises `UsageError`."""
    if features not in PRESETS:
        raise UsageError(f"--features must be one of {', '.join(PRESETS)}, got {features!r}")
    fields = dict(PRESETS[features])
    if sample_rate is not None:
        fields["sample_rate"] = sample_rate
    known = [f.name for f in dataclasses.fields(MelConfig)]
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise UsageError(f"--set takes key=value, got {setting!r}")
        if key not in known:
            near = difflib.get_close_matches(key, known, n=3)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise UsageError(f"--set: MelConfig has no field {key!r}{hint}")
        fields[key] = _value(text)
    try:
        return MelConfig(**fields)
    except (TypeError, ValueError) as error:
        raise UsageError(f"the configuration is not valid: {error}") from error


def _value(text: str) -> Any:
    words = {"none": None, "null": None, "true": True, "false": False}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


def find(paths: Iterable[str | os.PathLike], out: str | os.PathLike) -> tuple[list[Clip], list[tuple[str, str]]]:
    """Clips of files and folders (recursively), sorted by name, and what could not be listed, with the reason.

    From a folder come the files with an audio suffix, each named by its path below the folder, also those behind links
    to other folders; a file given by itself is always taken. The features of ``a/b.wav`` go to
    ``out/a/b.wav.safetensors``.

    Raises:
        UsageError: two different inputs would go to one output.
    """
    clips: dict[str, Clip] = {}
    failures: list[tuple[str, str]] = []
    for path in map(Path, paths):
        if path.is_dir():
            refused = lambda error: failures.append((str(error.filename), error.strerror or str(error)))  # noqa: E731
            found = [f for f in _below(path, refused) if f.suffix.lower() in AUDIO_SUFFIXES]
            pairs = [(f, f.relative_to(path)) for f in found]
        else:
            pairs = [(path, Path(path.name))]
        for source, relative in pairs:
            name = _printable(relative.as_posix())  # safetensors opens no other
            other = clips.setdefault(name, Clip(source, name, Path(out, name + _SUFFIX)))
            if other.source != source and other.source.resolve() != source.resolve():
                raise UsageError(
                    f"{other.source} and {source} would both go to {other.target}; give each its own --out"
                )
    return [clips[name] for name in sorted(clips)], failures


def _below(folder: Path, refused: Callable[[OSError], None], around: frozenset[str] = frozenset()) -> Iterator[Path]:
    """The files below a folder; a link to a folder that it stands in leads nowhere new."""
    real = os.path.realpath(folder)
    if real in around:
        return
    try:
        names = os.listdir(folder)
    except OSError as error:
        refused(error)
        return
    for path in (folder / name for name in names):
        if os.path.isdir(path):
            yield from _below(path, refused, around | {real})
        else:
            yield path


def share(clips: Sequence[Clip], rank: int, world_size: int) -> list[Clip]:
    """The clips of one of ``world_size`` processes: disjoint, together all, the same wherever it is computed.

    Neighbours in name order tend to be alike in length; ordering by a hash of the name first evens the shares out.
    """
    key = lambda clip: hashlib.blake2b(clip.name.encode()).digest()  # noqa: E731
    mine = sorted(clips, key=key)[rank::world_size]
    return sorted(mine, key=lambda clip: clip.name)


def is_done(clip: Clip, config: MelConfig) -> bool:
    """Whether the output is complete, no older than its source, and of this configuration and source."""
    from safetensors import SafetensorError, safe_open

    try:
        source, target = clip.source.stat(), clip.target.stat()
        with safe_open(clip.target, "pt") as file:
            metadata = file.metadata() or {}
            complete = "features" in file.keys()  # noqa: SIM118  (not a mapping)
    except (OSError, SafetensorError):
        return False
    want = {"config": config.key, "source": clip.name, "source_bytes": str(source.st_size)}
    return complete and target.st_mtime_ns >= source.st_mtime_ns and want.items() <= metadata.items()


def _printable(name: str) -> str:
    """A file name, whose bytes need not be text, as text."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def probe(clip: Clip) -> float:
    """Seconds that the header announces; raises `ClipError`."""
    import soundfile

    try:
        if not stat.S_ISREG(os.stat(clip.source).st_mode):
            raise ClipError("not a regular file")
        with open(clip.source, "rb"):  # libsndfile does not say why it cannot open a file
            pass
        with soundfile.SoundFile(_plain(clip.source)) as file:
            if file.frames == 0:
                raise ClipError("empty: no samples")
            return file.frames / file.samplerate
    except OSError as error:
        raise ClipError(f"cannot be read: {error.strerror or error}") from error
    except (soundfile.SoundFileError, TypeError, ValueError) as error:
        raise ClipError(f"damaged, or not a format that libsndfile decodes: {_reason(error)}") from error


def decode(clip: Clip, sample_rate: float) -> tuple[np.ndarray, int]:
    """Samples of a clip, float32, the mean of its channels, at ``sample_rate``, and the rate of the file.

    Raises:
        ClipError: damaged, shorter than its header says, empty, or with samples that are not finite.
    """
    import soundfile

    try:
        with soundfile.SoundFile(_plain(clip.source)) as file:
            rate, announced = file.samplerate, file.frames
            cut = _is_cut(file)
            samples = file.read(dtype="float32", always_2d=True)
    except (OSError, MemoryError, soundfile.SoundFileError, TypeError, ValueError) as error:
        raise ClipError(f"damaged: {_reason(error)}") from error
    if cut:
        raise ClipError(f"damaged: the file ends before its data does, after {len(samples)} samples")
    if len(samples) < announced:
        raise ClipError(f"damaged: {len(samples)} of {announced} samples could be decoded")
    if len(samples) == 0:
        raise ClipError("empty: no samples")
    mono = samples[:, 0] if samples.shape[1] == 1 else samples.mean(axis=1)
    if not np.isfinite(mono).all():
        raise ClipError("damaged: it has samples that are NaN or infinite")
    if rate != sample_rate:
        mono = _resample(mono, rate, sample_rate)
    return np.ascontiguousarray(mono, dtype=np.float32), rate


def _plain(path: Path) -> str | bytes:
    """A path as soundfile takes it; as bytes where names are bytes that need not be text."""
    return os.fsencode(path) if os.name == "posix" else str(path)


def _is_cut(file) -> bool:
    """A WAV file whose data chunk announces more bytes than there are: libsndfile reads on as if it were whole."""
    if file.format not in ("WAV", "WAVEX"):
        return False
    chunk = re.search(r"^data : (\d+) \(should be (\d+)\)", file.extra_info, re.MULTILINE)
    return chunk is not None and int(chunk[2]) < int(chunk[1]) < _UNKNOWN_SIZE


def _reason(error: BaseException) -> str:
    text = str(getattr(error, "error_string", "") or error).strip().rstrip(".")
    return text.removeprefix("Error : ") or type(error).__name__


def _resample(samples: np.ndarray, rate: float, wanted: float) -> np.ndarray:
    try:
        import soxr
    except ImportError as error:
        reason = f"at {rate:g} Hz; resampling to {wanted:g} Hz needs soxr: pip install 'mmfast[audio]'"
        raise ClipError(reason) from error
    return soxr.resample(samples, rate, wanted, quality="HQ")


def batches(clips: Iterable[tuple[Clip, float]], seconds: float) -> list[list[Clip]]:
    """Clips with their durations → batches of similar ones, at most ``seconds`` after padding, or a single clip."""
    made: list[list[Clip]] = []
    for clip, duration in sorted(clips, key=lambda pair: (pair[1], pair[0].name)):
        # Ascending: this clip is the longest so far, the length that the others are padded to.
        if not made or duration * (len(made[-1]) + 1) > seconds:
            made.append([])
        made[-1].append(clip)
    return made


def write(path: Path, features: torch.Tensor, metadata: dict[str, str]) -> None:
    """A safetensors file that is there whole or not at all."""
    from safetensors.torch import save

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        temporary.write_bytes(save({"features": features.contiguous()}, metadata))
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


class Extraction:
    """One run over a list of clips."""

    def __init__(
        self, config: MelConfig, *, batch_seconds: float, num_workers: int, backend: str | None = None
    ) -> None:
        self.config = config
        self.batch_seconds = batch_seconds
        self.num_workers = num_workers
        self.backend = backend
        self.report = Report()

    def run(self, clips: Sequence[Clip], *, overwrite: bool = False, position: int = 0) -> Report:
        """Extract ``clips`` except those done; a clip that fails is noted and costs nothing else."""
        from tqdm import tqdm

        # None: where stderr is no terminal; it may also be closed.
        bar = {"disable": None if sys.stderr else True, "unit": "clip", "position": position, "dynamic_ncols": True}
        pool = ThreadPoolExecutor(self.num_workers, thread_name_prefix="mmfast-decode")
        try:
            done = [False] * len(clips) if overwrite else pool.map(self._is_done, clips)
            todo = [clip for clip, there in zip(clips, done, strict=True) if not there]
            self.report.skipped = len(clips) - len(todo)
            probed = []
            for clip, result in tqdm(self._each(pool, probe, todo), "headers", len(todo), leave=False, **bar):
                if not isinstance(result, ClipError):
                    probed.append((clip, result))
            with tqdm(desc="extract", total=len(probed), **bar) as progress:
                for batch in self._decoded(pool, batches(probed, self.batch_seconds)):
                    self._extract(batch)
                    progress.update(len(batch))
                    progress.set_postfix(written=self.report.written, failed=len(self.report.failures))
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
        return self.report

    def _is_done(self, clip: Clip) -> bool:
        return is_done(clip, self.config)

    def _each(self, pool, function, clips) -> Iterator[tuple[Clip, Any]]:
        """Each clip with the function's result, or the `ClipError`, which is noted."""
        futures = [pool.submit(function, clip) for clip in clips]
        for clip, future in zip(clips, futures, strict=True):
            yield clip, self._result(clip, future)

    def _result(self, clip: Clip, future: Future) -> Any:
        try:
            return future.result()
        except ClipError as error:
            return self._fail(clip, error)
        except Exception as error:  # a decoder may raise anything; it is this clip's trouble alone
            return self._fail(clip, ClipError(f"{type(error).__name__}: {error}"))

    def _fail(self, clip: Clip, error: ClipError) -> ClipError:
        self.report.failures.append((str(clip.source), str(error)))
        return error

    def _decoded(self, pool, planned: list[list[Clip]]) -> Iterator[list[tuple[Clip, Any]]]:
        """Batches of clips with their decoded samples (or error), two batches ahead of whoever takes them."""
        ahead: deque[list[tuple[Clip, Future]]] = deque()
        for batch in planned:
            ahead.append([(clip, pool.submit(decode, clip, self.config.sample_rate)) for clip in batch])
            if len(ahead) > 2:
                yield [(clip, self._result(clip, future)) for clip, future in ahead.popleft()]
        while ahead:
            yield [(clip, self._result(clip, future)) for clip, future in ahead.popleft()]

    def _extract(self, batch: list[tuple[Clip, Any]]) -> None:
        ready = []
        for clip, result in batch:
            if isinstance(result, ClipError):
                continue
            if self.config.frame_count(len(result[0])) == 0:
                at = f"{len(result[0])} samples at {self.config.sample_rate:g} Hz"
                self._fail(clip, ClipError(f"too short: {at} make no frame"))
            else:
                ready.append((clip, *result))
        if not ready:
            return
        try:
            features = self._features([samples for _, samples, _ in ready])
        except Exception as error:
            if len(ready) > 1:  # perhaps only together too much
                for clip, samples, rate in ready:
                    self._extract([(clip, (samples, rate))])
            else:
                self._fail(ready[0][0], ClipError(f"{type(error).__name__}: {error}"))
            return
        for (clip, samples, rate), tensor in zip(ready, features, strict=True):
            self._write(clip, len(samples), rate, tensor)

    def _features(self, clips: list[np.ndarray]) -> list[torch.Tensor]:
        lengths = torch.tensor([len(samples) for samples in clips])
        waveform = torch.zeros(len(clips), int(lengths.max()))
        for row, samples in zip(waveform, clips, strict=True):
            row[: len(samples)] = torch.from_numpy(samples)
        with torch.no_grad():
            features, counts = extract(waveform, self.config, lengths=lengths, backend=self.backend)
        time = -1 if self.config.layout == "feature_time" else -2
        return [item.narrow(time, 0, count) for item, count in zip(features, counts.tolist(), strict=True)]

    def _write(self, clip: Clip, samples: int, rate: int, features: torch.Tensor) -> None:
        try:
            metadata = {
                "config": self.config.key,
                "source": clip.name,
                "source_bytes": str(clip.source.stat().st_size),
                "source_sample_rate": str(rate),
                "sample_rate": f"{self.config.sample_rate:g}",
                "samples": str(samples),
                "mmfast": mmfast.__version__,
            }
            write(clip.target, features, metadata)
        except OSError as error:
            self._fail(clip, ClipError(f"{clip.target} cannot be written: {error.strerror or error}"))
            return
        self.report.written += 1
        self.report.seconds += samples / self.config.sample_rate


def ranks(environment=os.environ) -> tuple[int, int]:
    """``(rank, world_size)`` as torchrun sets them; ``(0, 1)`` without it."""
    try:
        rank, world_size = int(environment.get("RANK", 0)), int(environment.get("WORLD_SIZE", 1))
    except ValueError as error:
        raise UsageError(f"RANK and WORLD_SIZE must be integers: {error}") from error
    if not 0 <= rank < world_size:
        raise UsageError(f"RANK must be in [0, WORLD_SIZE), got RANK={rank}, WORLD_SIZE={world_size}")
    return rank, world_size


def require_libraries() -> None:
    try:
        for name in ("safetensors", "soundfile", "tqdm"):
            importlib.import_module(name)
    except (ImportError, OSError) as error:  # soundfile raises OSError where libsndfile is missing
        raise UsageError(f"needs soundfile, safetensors and tqdm: pip install 'mmfast[audio]' ({error})") from error


def main(options) -> int:
    """Runs the command with the parsed ``options`` of `mmfast.cli`; returns the exit code: 0, or 1 where files failed.

    Raises:
        UsageError: before anything is done.
    """
    require_libraries()
    if not options.batch_seconds > 0:  # nor NaN
        raise UsageError(f"--batch-seconds must be positive, got {options.batch_seconds:g}")
    if options.num_workers < 1:
        raise UsageError(f"--num-workers must be at least 1, got {options.num_workers}")
    config = configuration(options.features, options.sample_rate, options.set)
    try:
        _backend.choose("mel", torch.device("cpu"), options.backend)
    except (ImportError, ValueError) as error:
        raise UsageError(str(error)) from error
    if _printable(options.out) != options.out:
        raise UsageError(f"--out must be text in UTF-8, for safetensors opens no other, got {_printable(options.out)}")
    rank, world_size = ranks()
    clips, failures = find(options.paths, options.out)
    if not clips and not failures:
        raise UsageError(f"no audio files in {', '.join(map(_printable, options.paths))}")
    try:
        Path(options.out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {options.out} cannot be made: {error.strerror or error}") from error
    work = Extraction(
        config, batch_seconds=options.batch_seconds, num_workers=options.num_workers, backend=options.backend
    )
    work.report.failures = failures if rank == 0 else []
    try:
        report = work.run(share(clips, rank, world_size), overwrite=options.overwrite, position=rank)
    finally:
        _print(work.report, options, f"rank {rank}: " if world_size > 1 else "")
    return 1 if report.failures else 0


def _print(report: Report, options, prefix: str) -> None:
    written = f"{report.written} written to {options.out} ({report.seconds / 60:.1f} minutes of sound)"
    counts = f"{report.skipped} already there, {len(report.failures)} failed"
    print(f"{prefix}{options.features}: {written}, {counts}", flush=True)
    for name, reason in sorted(report.failures):
        print(f"{prefix}failed: {_printable(name)}: {reason}", file=sys.stderr, flush=True)
