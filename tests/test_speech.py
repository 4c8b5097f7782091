"""Fetching, unpacking and loading of the recordings, and the signals that stand in for them."""

import hashlib
import http.server
import io
import os
import shutil
import tarfile
import threading
import wave

import numpy as np
import pytest

from benchmarks import speech

soundfile = pytest.importorskip("soundfile")


def wav(samples=1600, rate=8000):
    data = io.BytesIO()
    with wave.open(data, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((np.arange(samples) % 256).astype("<i2").tobytes())
    return data.getvalue()


def ar(*members):
    data = b"!<arch>\n"
    for name, content in members:
        data += f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n".encode() + content
        data += b"\n" * (len(content) % 2)
    return data


def tar(files, mode="w:xz"):
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode=mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            if content is None:
                member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
                archive.addfile(member)
            else:
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return data.getvalue()


SOUNDS = "./usr/share/asterisk/sounds/xx_YY_f_Nobody/"
FILES = {
    SOUNDS + "hello.wav": wav(),
    SOUNDS + "digits/1.wav": wav(801),
    SOUNDS + "digits/2.wav": wav(0),
    "./usr/share/doc/copyright": b"text",
}


def deb(files=FILES, mode="w:xz"):
    suffix = mode.split(":")[1]
    control = tar({"./control": b"Package: tiny\nVersion: 1\nArchitecture: all\nMaintainer: x\nDescription: y\n"})
    name = f"data.tar.{suffix}" if suffix else "data.tar"
    return ar(("debian-binary", b"2.0\n"), ("control.tar.xz", control), (name, tar(files, mode)))


def tree(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


WANTED = {
    "hello.wav": FILES[SOUNDS + "hello.wav"],
    "digits/1.wav": FILES[SOUNDS + "digits/1.wav"],
    "digits/2.wav": FILES[SOUNDS + "digits/2.wav"],
}


def test_members_of_odd_size_are_padded():
    members = [("a", b"one"), ("b", b""), ("c", b"four"), ("d", b"x")]
    assert list(speech._read_ar(ar(*members))) == members


@pytest.mark.parametrize("mode", ["w:xz", "w:gz", "w:"])
def test_unpack_without_dpkg(tmp_path, mode):
    (tmp_path / "tiny.deb").write_bytes(deb(mode=mode))
    assert speech.unpack_without_dpkg(tmp_path / "tiny.deb", tmp_path / "out") == 3
    assert tree(tmp_path / "out") == WANTED


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="no dpkg-deb")
def test_unpack_with_dpkg_is_the_same(tmp_path):
    (tmp_path / "tiny.deb").write_bytes(deb())
    assert speech.unpack(tmp_path / "tiny.deb", tmp_path / "out") == 3
    assert tree(tmp_path / "out") == WANTED


def test_unpack_takes_the_way_without_dpkg_where_there_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr(speech.shutil, "which", lambda name: None)
    (tmp_path / "tiny.deb").write_bytes(deb())
    assert speech.unpack(tmp_path / "tiny.deb", tmp_path / "out") == 3
    assert tree(tmp_path / "out") == WANTED


def test_unpack_stays_in_its_folder(tmp_path):
    files = {**FILES, "./../../evil.wav": wav(), str(tmp_path / "absolute.wav"): wav(), SOUNDS + "link.wav": None}
    (tmp_path / "tiny.deb").write_bytes(deb(files))
    assert speech.unpack_without_dpkg(tmp_path / "tiny.deb", tmp_path / "a" / "b" / "out") == 3
    assert sorted(p.name for p in tmp_path.rglob("*.wav")) == ["1.wav", "2.wav", "hello.wav"]


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"not an archive", "does not begin as an ar archive"),
        (deb()[:8] + b"x" * 100, "damaged ar header"),
        (ar(("debian-binary", b"2.0\n")), "0 members data.tar"),
        (ar(("data.tar.zst", b"\x28\xb5\x2f\xfd" + bytes(50))), "cannot be unpacked without dpkg-deb"),
    ],
)
def test_what_is_no_package_is_refused(tmp_path, data, reason):
    (tmp_path / "bad.deb").write_bytes(data)
    with pytest.raises(speech.Unavailable, match=reason):
        speech.unpack_without_dpkg(tmp_path / "bad.deb", tmp_path / "out")


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """A package archive on this machine with two tiny packages, and no apt."""
    root = tmp_path / "archive"
    (root / "pool").mkdir(parents=True)
    packages = []
    for name in ("one", "two"):
        (root / "pool" / f"{name}_1.deb").write_bytes(deb())
        digest = hashlib.sha256((root / "pool" / f"{name}_1.deb").read_bytes()).hexdigest()
        packages.append(speech.Package(name, f"pool/{name}_1.deb", digest))

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=root)

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(speech, "ARCHIVE", f"http://127.0.0.1:{server.server_port}/")
    monkeypatch.setattr(speech, "PACKAGES", tuple(packages))
    monkeypatch.setattr(speech.shutil, "which", lambda name: None)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    yield root
    server.shutdown()
    server.server_close()


def test_fetch_fills_the_cache_once(archive, tmp_path, capsys):
    cache = tmp_path / "cache"
    assert not speech.is_cached(cache)
    assert speech.main(["--cache", str(cache)]) == 0
    assert speech.is_cached(cache)
    assert f"6 clips in {cache}" in capsys.readouterr().out
    assert [p.relative_to(cache).as_posix() for p in speech.files(cache)] == [
        f"{package}/{name}" for package in ("one", "two") for name in ("digits/1.wav", "digits/2.wav", "hello.wav")
    ]
    assert sorted(os.listdir(cache)) == ["one", "two"]  # nothing else is left
    shutil.rmtree(archive)
    assert speech.fetch(cache) == cache  # from the cache alone


def test_fetch_goes_on_where_it_stopped(archive, tmp_path):
    cache = tmp_path / "cache"
    hidden = (archive / "pool/two_1.deb").rename(archive / "hidden")
    with pytest.raises(speech.Unavailable, match=r"two cannot be fetched: .*404"):
        speech.fetch(cache)
    assert os.listdir(cache) == ["one"]
    hidden.rename(archive / "pool/two_1.deb")
    (archive / "pool/one_1.deb").unlink()  # not needed again
    speech.fetch(cache)
    assert speech.is_cached(cache)


def test_fetch_refuses_another_file(archive, tmp_path):
    (archive / "pool/one_1.deb").write_bytes(deb(mode="w:gz"))
    with pytest.raises(speech.Unavailable, match="has SHA-256"):
        speech.fetch(tmp_path / "cache")
    assert not speech.files(tmp_path / "cache")


def test_without_apt_and_mirror_it_says_what_to_set(archive, tmp_path, monkeypatch):
    monkeypatch.setattr(speech, "ARCHIVE", "")
    with pytest.raises(speech.Unavailable, match="one cannot be fetched: MMFAST_DEBIAN_MIRROR is not set"):
        speech.fetch(tmp_path / "cache")


def test_apt_is_asked_first_and_its_failure_told(archive, tmp_path, monkeypatch):
    calls = []

    def call(command, folder):
        calls.append(command[2])
        if command[2] == "download" and len(calls) > 1:
            shutil.copy(archive / "pool/one_1.deb", folder / "one_2_all.deb")
            return None
        return "E: Unable to locate package" if command[2] == "download" else None

    monkeypatch.setattr(speech.shutil, "which", lambda name: "/usr/bin/" + name)
    monkeypatch.setattr(speech, "_call", call)
    (one, two) = speech.PACKAGES
    monkeypatch.setattr(speech.os, "geteuid", lambda: 0)
    (tmp_path / "a").mkdir()
    deb_file, origin = speech.download(one, tmp_path / "a")
    assert (deb_file.name, origin, calls) == ("one_2_all.deb", "apt", ["download", "update", "download"])
    calls.clear()
    monkeypatch.setattr(speech.os, "geteuid", lambda: 1000)  # may not update; the archive remains
    (tmp_path / "b").mkdir()
    deb_file, origin = speech.download(two, tmp_path / "b")
    assert (deb_file.name, origin, calls) == ("two_1.deb", speech.ARCHIVE, ["download"])
    (archive / "pool/two_1.deb").unlink()
    calls.clear()
    with pytest.raises(speech.Unavailable, match=r"apt-get download: E: Unable to locate package; http.*404"):
        speech.download(two, tmp_path / "b")


def test_cache_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("MMFAST_CACHE", str(tmp_path))
    assert speech.cache_dir() == tmp_path / "speech"
    monkeypatch.delenv("MMFAST_CACHE")
    assert speech.cache_dir().parts[-2:] == (".cache", "speech")
    assert (speech.cache_dir().parent.parent / "benchmarks" / "speech.py").exists()


def test_load_speech(archive, tmp_path):
    cache = speech.fetch(tmp_path / "cache")
    clips = speech.load_speech(cache=cache)
    assert [(name, len(x), rate) for name, x, rate in clips] == [
        (f"{package}/{name}", length, 8000)  # the clip without samples is left out
        for package in ("one", "two")
        for name, length in (("digits/1.wav", 801), ("hello.wav", 1600))
    ]
    assert all(x.dtype == np.float32 and x.flags.c_contiguous for _, x, _ in clips)
    np.testing.assert_array_equal(clips[0][1], (np.arange(801) % 256 / 32768).astype(np.float32))
    assert [name for name, _, _ in speech.load_speech(0.15, cache=cache)] == ["one/hello.wav", "two/hello.wav"]
    assert len(speech.load_speech(max_seconds=0.15, cache=cache)) == 2
    assert [name for name, _, _ in speech.load_speech(limit=2, cache=cache)] == ["one/digits/1.wav", "two/digits/1.wav"]
    assert speech.load_speech(limit=99, cache=cache)[3][0] == "two/hello.wav"
    pytest.importorskip("soxr")
    assert [(len(x), rate) for _, x, rate in speech.load_speech(0.15, sample_rate=16000, cache=cache)] == [
        (3200, 16000)
    ] * 2
    with pytest.raises(speech.Unavailable, match="make speech"):
        speech.load_speech(cache=tmp_path / "elsewhere")


def test_speech_says_what_it_is(archive, tmp_path):
    pytest.importorskip("soxr")
    clips, origin = speech.speech(limit=3, cache=tmp_path / "cache")
    assert len(clips) == 3 and clips[0][0].startswith("one/")
    assert "3 clips of recorded speech" in origin
    shutil.rmtree(archive)
    clips, origin = speech.speech(limit=5, max_seconds=2, sample_rate=8000, cache=tmp_path / "elsewhere")
    assert "5 generated signals, not speech" in origin and "cannot be fetched" in origin
    assert [(len(x), rate) for _, x, rate in clips] == [(16000, 8000)] * 5
    assert speech.main(["--cache", str(tmp_path / "elsewhere")]) == 1


@pytest.mark.parametrize("rate", [8000, 16000, 48000])
def test_generated_signals(rate):
    clips = speech.generated_speech_like(4, 2.0, rate, seed=3)
    again = speech.generated_speech_like(2, 2.0, rate, seed=3)
    assert all(np.array_equal(a[1], b[1]) for a, b in zip(clips[:2], again, strict=True))
    assert not np.array_equal(clips[0][1], clips[1][1])
    assert not np.array_equal(clips[0][1], speech.generated_speech_like(1, 2.0, rate, seed=4)[0][1])
    for _, x, sr in clips:
        assert sr == rate and x.dtype == np.float32 and len(x) == 2 * rate
        assert np.isfinite(x).all() and abs(np.abs(x).max() - 0.5) < 1e-6
    # As in speech: syllables rise and fall (a wide range of levels), and most power lies below 4 kHz.
    x = np.concatenate([x for _, x, _ in clips])
    levels = 10 * np.log10((x.reshape(-1, rate // 50) ** 2).mean(axis=1))
    assert np.percentile(levels, 95) - np.percentile(levels, 5) > 20
    power = np.abs(np.fft.rfft(x)) ** 2
    assert power[np.fft.rfftfreq(len(x), 1 / rate) < 4000].sum() > 0.8 * power.sum()


@pytest.mark.parametrize("seconds", [0.0, 1 / 8000, 0.01, 0.13])
def test_generated_signals_may_be_short(seconds):
    ((_, x, _),) = speech.generated_speech_like(1, seconds, 8000)
    assert len(x) == round(seconds * 8000) and np.isfinite(x).all()


@pytest.mark.skipif(not speech.is_cached(), reason="no recorded speech; make speech fetches it")
def test_recorded_speech():
    files = speech.files()
    assert len(files) == 2840
    clips = speech.load_speech(min_seconds=1.0, limit=40)
    assert len(clips) == 40
    assert {name.split("/")[0] for name, _, _ in clips} >= {
        f"asterisk-core-sounds-{x}-wav" for x in ("en", "es", "fr", "it", "ru")
    }
    for _, x, rate in clips:
        assert rate in (8000, 48000) and len(x) >= rate and np.abs(x).max() <= 1 and np.abs(x).max() > 0
