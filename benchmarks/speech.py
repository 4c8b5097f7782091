"""Real speech for the benchmarks and tests: prompts from Debian packages, fetched by ``python -m benchmarks.speech``.

`asterisk-core-sounds-{en,es,fr,it,ru}-wav` hold 2,831 recorded telephone prompts of four speakers in five languages
(8 kHz, 131 minutes; CC BY-SA 3.0, it and ru CC BY 3.0), `alsa-utils` nine clips at 48 kHz. They are kept in
``.cache/speech`` of the source tree, or in ``speech`` below ``MMFAST_CACHE``, and never become part of the project.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

Clip = tuple[str, np.ndarray, int]  # name, float32 samples, sample rate in Hz


@dataclass(frozen=True)
class Package:
    """A Debian package, its file for where apt is not at hand, and how the paths end that are kept of it."""

    name: str
    path: str
    sha256: str
    endings: tuple[str, ...] = (".wav",)


_SOUNDS = "pool/main/a/asterisk-core-sounds/asterisk-core-sounds-{}-wav_1.6.1-1_all.deb"
_HASHES = {
    _SOUNDS.format("en"): "2be3ea287d83299d143815fa804f11179a75b7affd4a758b98b55f5afc18a35d",
    _SOUNDS.format("es"): "9283a09a6d56fccdcc2bcfe86c48f0f844289cfbd46a3184d8785a6f7f569903",
    _SOUNDS.format("fr"): "8d4e1bc32ed5ba7fbda40841ca1825ed20cc6232724a473c90f8bb0e53e6073e",
    _SOUNDS.format("it"): "5a26638089e134b8ac39363fe249c5c93c50cd8bfdc9b2499ae61ec4a35e2fcb",
    _SOUNDS.format("ru"): "ccbfaebfa450b7a9ddf644ae0f3d1e9017d5df7c0aebe816e946345589d38201",
    "pool/main/a/alsa-utils/alsa-utils_1.2.8-1_amd64.deb": (
        "fb24eb1a318228b974efbef726190dd90c6106a208814a3ee8f5d69b91ee0ba4"
    ),
}
PACKAGES = tuple(Package(PurePosixPath(path).name.split("_")[0], path, sha256) for path, sha256 in _HASHES.items())
ARCHIVE = os.environ.get("MMFAST_DEBIAN_MIRROR", "")  # of a mirror, up to and with its "/debian/"
_COMPLETE = ".complete"


class Unavailable(Exception):
    """The recordings cannot be had; the message says why."""


def cache_dir() -> Path:
    """Where the recordings are kept."""
    root = os.environ.get("MMFAST_CACHE")
    return (Path(root) if root else Path(__file__).resolve().parent.parent / ".cache") / "speech"


def fetch(
    cache: Path | None = None,
    say: Callable[[str], None] = lambda text: None,
    packages: Sequence[Package] | None = None,
) -> Path:
    """Put the files of all packages into the cache, unless they are there; returns the cache.

    Raises:
        Unavailable: naming each way that was tried and how it failed.
    """
    cache = cache or cache_dir()
    cache.mkdir(parents=True, exist_ok=True)
    for package in PACKAGES if packages is None else packages:
        if (cache / package.name / _COMPLETE).exists():
            say(f"{package.name}: in {cache}")
            continue
        with tempfile.TemporaryDirectory(dir=cache, prefix=".fetch-") as scratch:
            deb, origin = download(package, Path(scratch))
            unpacked = Path(scratch, "unpacked")
            count = unpack(deb, unpacked, package.endings)
            if count == 0:
                raise Unavailable(f"{deb.name} ({origin}) holds no files *{', *'.join(package.endings)}")
            (unpacked / _COMPLETE).write_text(f"{deb.name}\n")
            shutil.rmtree(cache / package.name, ignore_errors=True)
            os.replace(unpacked, cache / package.name)
        say(f"{package.name}: {count} files from {deb.name} ({origin})")
    return cache


def download(package: Package, folder: Path) -> tuple[Path, str]:
    """The package as a file in ``folder``, and its origin: apt (signed), else a mirror and the known hash."""
    tried = []
    if shutil.which("apt-get"):
        for refresh in (False, True):
            if refresh and getattr(os, "geteuid", lambda: 1)() != 0:
                break  # only root may update the lists
            if refresh:
                _call(["apt-get", "-qq", "update"], folder)
            error = _call(["apt-get", "-qq", "download", package.name], folder)
            found = sorted(folder.glob("*.deb"))
            if error is None and found:
                return found[0], "apt"
            tried.append(f"apt-get download: {error or 'no file'}")
    if not ARCHIVE:
        tried.append("MMFAST_DEBIAN_MIRROR is not set: without apt-get it has to name a mirror of Debian's archive")
        raise Unavailable(f"{package.name} cannot be fetched: " + "; ".join(tried))
    target = folder / PurePosixPath(package.path).name
    try:
        with urllib.request.urlopen(ARCHIVE + package.path, timeout=60) as response, target.open("wb") as file:
            shutil.copyfileobj(response, file)
    except OSError as error:
        tried.append(f"{ARCHIVE}{package.path}: {error}")
        raise Unavailable(f"{package.name} cannot be fetched: " + "; ".join(tried)) from error
    digest = hashlib.sha256(target.read_bytes()).hexdigest()
    if digest != package.sha256:
        raise Unavailable(f"{target.name} from {ARCHIVE} has SHA-256 {digest}, expected {package.sha256}")
    return target, ARCHIVE


def _call(command: list[str], folder: Path) -> str | None:
    """Runs a command in ``folder``; what it said where it failed."""
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    said = done.stderr.strip().splitlines()
    return None if done.returncode == 0 else (said[-1] if said else f"exit code {done.returncode}")


def unpack(deb: Path, folder: Path, endings: tuple[str, ...] = (".wav",)) -> int:
    """Write files of a Debian package below ``folder``, without the path they share; returns their number."""
    if shutil.which("dpkg-deb"):
        with tempfile.TemporaryDirectory(dir=deb.parent) as scratch:
            error = _call(["dpkg-deb", "-x", str(deb.resolve()), scratch], deb.parent)
            if error is not None:
                raise Unavailable(f"{deb.name} cannot be unpacked: {error}")
            root = Path(scratch)
            wanted = [p for p in sorted(root.rglob("*")) if p.as_posix().endswith(endings)]
            files = {p.relative_to(root): p for p in wanted if p.is_file() and not p.is_symlink()}
            return _place({PurePosixPath(path.as_posix()): file.read_bytes for path, file in files.items()}, folder)
    return unpack_without_dpkg(deb, folder, endings)


def unpack_without_dpkg(deb: Path, folder: Path, endings: tuple[str, ...] = (".wav",)) -> int:
    """`unpack` with Python alone."""
    members = {name: data for name, data in _read_ar(deb.read_bytes()) if name.startswith("data.tar")}
    if len(members) != 1:
        raise Unavailable(f"{deb.name} is not a Debian package: it has {len(members)} members data.tar.*, not one")
    ((name, data),) = members.items()
    try:
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            files = {}
            for member in archive:
                path = PurePosixPath(member.name)
                if (
                    member.isfile()
                    and member.name.endswith(endings)
                    and not path.is_absolute()
                    and ".." not in path.parts
                ):
                    files[path] = archive.extractfile(member).read
            return _place(files, folder)
    except tarfile.TarError as error:
        raise Unavailable(f"{name} of {deb.name} cannot be unpacked without dpkg-deb: {error}") from error


def _read_ar(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Members of an ar archive: headers of 60 bytes (0-15 name, 48-57 decimal size), data padded to even sizes."""
    if not data.startswith(b"!<arch>\n"):
        raise Unavailable("not a Debian package: it does not begin as an ar archive")
    at = 8
    while at + 60 <= len(data):
        header = data[at : at + 60]
        if header[58:] != b"`\n":
            raise Unavailable("not a Debian package: a damaged ar header")
        size = int(header[48:58])
        yield header[:16].decode("ascii").strip().rstrip("/"), data[at + 60 : at + 60 + size]
        at += 60 + size + size % 2


def _place(files: dict[PurePosixPath, Callable[[], bytes]], folder: Path) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    if not files:
        return 0
    common = os.path.commonpath([path.parent.as_posix() for path in files])
    for path, read in files.items():
        target = folder / path.relative_to(common)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(read())
    return len(files)


def is_cached(cache: Path | None = None, packages: Sequence[Package] | None = None) -> bool:
    """Whether all packages are there."""
    packages = PACKAGES if packages is None else packages
    return all(((cache or cache_dir()) / package.name / _COMPLETE).exists() for package in packages)


def files(cache: Path | None = None) -> list[Path]:
    """The wav files of the cache in a fixed order."""
    cache = cache or cache_dir()
    found = [path for package in PACKAGES for path in (cache / package.name).rglob("*.wav")]
    return sorted(found, key=lambda path: path.as_posix())


def load_speech(
    min_seconds: float = 0.0,
    limit: int | None = None,
    sample_rate: int | None = None,
    *,
    max_seconds: float = float("inf"),
    cache: Path | None = None,
) -> list[Clip]:
    """Cached recordings as ``(name, samples, rate)``: float32 in [-1, 1], mono, at their own rate or ``sample_rate``.

    Clips last at least ``min_seconds`` and at most ``max_seconds``; clips without samples are left out. With ``limit``
    they are that many, spread evenly over packages and folders, always the same.

    Raises:
        Unavailable: the cache is not filled; ``python -m benchmarks.speech`` fills it.
    """
    import soundfile

    cache = cache or cache_dir()
    if not is_cached(cache):
        raise Unavailable(f"no recorded speech in {cache}: run 'make speech' (python -m benchmarks.speech)")
    fitting = []
    for path in files(cache):
        info = soundfile.info(path)
        if info.frames and min_seconds <= info.frames / info.samplerate <= max_seconds:
            fitting.append(path)
    if limit is not None and limit < len(fitting):
        fitting = [fitting[i * len(fitting) // limit] for i in range(limit)]
    clips = []
    for path in fitting:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
        mono = samples.mean(axis=1)
        if sample_rate is not None and sample_rate != rate:
            import soxr

            mono, rate = soxr.resample(mono, rate, sample_rate), sample_rate
        clips.append((path.relative_to(cache).as_posix(), np.ascontiguousarray(mono, dtype=np.float32), rate))
    return clips


def generated_speech_like(count: int, seconds: float, sample_rate: int = 16000, seed: int = 0) -> list[Clip]:
    """Signals with the build of speech, not speech: ``count`` clips of ``seconds``, peak 0.5.

    Voiced syllables (harmonics of a gliding pitch under moving formants), hissing consonants and pauses, four a second.
    The same arguments give the same clips.
    """
    length = round(seconds * sample_rate)
    made = (_utterance(np.random.default_rng([seed, index]), length, sample_rate) for index in range(count))
    return [(f"generated/{seed}-{index:04d}", samples, sample_rate) for index, samples in enumerate(made)]


def _utterance(rng: np.random.Generator, length: int, sample_rate: int) -> np.ndarray:
    syllables = max(1, round(4 * length / sample_rate))
    place = np.arange(length) * (syllables / max(1, length))  # in syllables

    def glide(low: float, high: float) -> np.ndarray:
        return np.interp(place, np.arange(syllables + 1), rng.uniform(low, high, syllables + 1))

    base = rng.uniform(90, 220)  # Hz, a man's to a woman's voice
    pitch = base * glide(0.8, 1.25)
    phase = 2 * np.pi * np.cumsum(pitch) / sample_rate
    formants = [(glide(300, 850), 90.0), (glide(900, 2300), 140.0), (glide(2300, 3200), 220.0)]
    voiced = np.zeros(length)
    for harmonic in range(1, int(min(5000.0, sample_rate / 2) / (base * 1.25))):
        weight = sum(1 / (1 + ((harmonic * pitch - centre) / width) ** 2) for centre, width in formants)
        voiced += weight * np.sin(harmonic * phase) / np.sqrt(harmonic)
    hiss = np.diff(rng.standard_normal(length + 1))
    kind = rng.choice(3, size=syllables, p=[0.7, 0.15, 0.15])[place.astype(int)]  # voiced, hiss, pause
    sound = np.select([kind == 0, kind == 1], [voiced, 0.3 * hiss], 0.0) * np.sqrt(np.sin(np.pi * (place % 1.0)))
    sound += 1e-4 * rng.standard_normal(length)
    return (0.5 * sound / np.abs(sound).max(initial=1e-9)).astype(np.float32)


def speech(
    min_seconds: float = 0.0,
    limit: int = 64,
    sample_rate: int = 16000,
    *,
    max_seconds: float = float("inf"),
    cache: Path | None = None,
) -> tuple[list[Clip], str]:
    """Recorded clips if they are cached or can be fetched, else generated ones; and a sentence saying which."""
    try:
        clips = load_speech(min_seconds, limit, sample_rate, max_seconds=max_seconds, cache=fetch(cache))
    except (Unavailable, OSError) as error:
        clips = generated_speech_like(limit, max(min_seconds, min(3.0, max_seconds)), sample_rate)
        return clips, f"{len(clips)} generated signals, not speech: the recordings cannot be had ({error})"
    minutes = sum(len(samples) / rate for _, samples, rate in clips) / 60
    return clips, f"{len(clips)} clips of recorded speech from Debian's packages, {minutes:.1f} minutes"


def main(argv: list[str] | None = None) -> int:
    description = "Fetch recorded speech from Debian's packages."
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speech", description=description)
    parser.add_argument("--cache", type=Path, metavar="DIR", help="default: .cache/speech, or speech in MMFAST_CACHE")
    options = parser.parse_args(argv)
    try:
        cache = fetch(options.cache, say=lambda text: print(text, flush=True))
    except (Unavailable, OSError) as error:
        print(f"No recorded speech: {error}\nThe benchmarks will use generated signals and say so.", file=sys.stderr)
        return 1
    print(f"{len(files(cache))} clips in {cache}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
