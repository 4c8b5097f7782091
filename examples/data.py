"""Real data for the examples: written digits, spoken digits and emoji, from scikit-learn and from Debian's packages.

    what                                    from                                         held out
    1797 written digits, 8 × 8              scikit-learn (UCI, Alpaydin and Kaynak)      the last 540: other writers
    80 spoken digits in 5 languages, 8 kHz  asterisk-core-sounds-*-wav, asterisk-prompt-*  3 of 7 speakers
    1601 emoji, names, groups, subgroups    fonts-noto-color-emoji, unicode-data         a fifth, by whole families

Packages are fetched once, by apt-get, into ``.cache`` of the source tree or into ``MMFAST_CACHE``, and never become
part of the project. ``python examples/data.py`` fetches all of them.
"""

from __future__ import annotations

import argparse
import io
import re
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `benchmarks`, where this file is run as a script

from benchmarks import speech
from benchmarks.speech import Package, Unavailable

RATE, LONGEST = 8000, 8000  # of spoken digits: Hz, samples
LANGUAGES = ("en", "es", "fr", "it", "ru")
_SPOKEN = {
    "es": ("asterisk-prompt-es-co/asterisk-prompt-es-co_0.20070403-2.1_all.deb", "gsm"),
    "fr": ("asterisk-prompt-fr-armelle/asterisk-prompt-fr-armelle_20070613-2.2_all.deb", "gsm"),
    "it": ("asterisk-prompt-it/asterisk-prompt-it-menardi-wav_1.4.22+mm20110907-3.1_all.deb", "wav"),
}
_HASHES = {
    "asterisk-prompt-es-co": "6702696e045514699e87dc8fb70f370717e5df91f821f7bec8dd0df1be008e83",
    "asterisk-prompt-fr-armelle": "162570b1a9b3512a98f06b89f60c7c17cf1b9b52297315adca9a4e5be728bea3",
    "asterisk-prompt-it-menardi-wav": "3094530d98f8758ac275572d59624c41f60969fef883f34f4886d144f3dfeb21",
    "fonts-noto-color-emoji": "a5ab0f69c7938423862320d9aca5dd187b3fd879d6a9a57dd52e17c3fa8d2751",
    "unicode-data": "5efef23bbb1c6a133ecbdd63a2cfa07159ccacf5466a49e2426101c5ecd691fc",
}


def _package(path: str, endings: tuple[str, ...]) -> Package:
    name = path.split("/")[1].split("_")[0]
    first = path[0]
    return Package(name, f"pool/main/{first}/{path}", _HASHES[name], endings)


OTHER_SPEAKERS = {  # those held out
    language: _package(path, tuple(f"/digits/{digit}.{ending}" for digit in range(10)))
    for language, (path, ending) in _SPOKEN.items()
}
EMOJI = (
    _package("fonts-noto-color-emoji/fonts-noto-color-emoji_2.042-0+deb12u1_all.deb", ("/NotoColorEmoji.ttf",)),
    _package("unicode-data/unicode-data_15.0.0-1_all.deb", ("/emoji-test.txt",)),
)


_GSM = {"samplerate": RATE, "format": "RAW", "subtype": "GSM610"}


def folder() -> Path:
    """Where the packages' files are kept."""
    return speech.cache_dir().parent


# Written digits


@dataclass(frozen=True)
class Written:
    """``images`` ``(n, 1, 8, 8)`` from 0 to 1 and ``labels`` ``(n,)``."""

    images: Tensor
    labels: Tensor


def written_digits() -> tuple[Written, Written]:
    """Digits to learn from, and others. The file goes writer by writer, so the end of it is mostly by other writers."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images[:, None].astype(np.float32) / 16)
    labels = torch.from_numpy(digits.target.astype(np.int64))
    return Written(images[:-540], labels[:-540]), Written(images[-540:], labels[-540:])


# Spoken digits


@dataclass(frozen=True)
class Spoken:
    """``waves`` ``(n, 8000)`` of up to a second at 8 kHz, their ``lengths``, ``labels``, and the ``languages``."""

    waves: Tensor
    lengths: Tensor
    labels: Tensor
    languages: list[str]


def spoken_digits(copies: int = 32, seed: int = 0) -> tuple[Spoken, Spoken]:
    """Zero to nine in five languages, and in three of them by speakers that are held out.

    Each recording that is learned from comes in ``copies`` that differ in speed and pitch, tilt of the spectrum, level,
    place and noise; those of the speakers held out are left alone.

    Raises:
        Unavailable: the recordings are not there and cannot be fetched.
    """
    speech.fetch()
    others = speech.fetch(folder() / "examples", packages=list(OTHER_SPEAKERS.values()))
    rng = np.random.default_rng(seed)
    known = [
        (_varied(wave, rng) if copies > 1 else wave, digit, language)
        for language in LANGUAGES
        for digit, wave in enumerate(_read(speech.cache_dir() / f"asterisk-core-sounds-{language}-wav" / "digits"))
        for _ in range(copies)
    ]
    unknown = [
        (wave, digit, language)
        for language, package in OTHER_SPEAKERS.items()
        for digit, wave in enumerate(_read(others / package.name))
    ]
    return _spoken(known), _spoken(unknown)


def _read(directory: Path) -> list[np.ndarray]:
    """The ten digits of a speaker, without the silence around them, at most a second long."""
    import soundfile

    waves = []
    for digit in range(10):
        wav, gsm = directory / f"{digit}.wav", directory / f"{digit}.gsm"
        raw = {} if wav.exists() else {"channels": 1, **_GSM}
        wave, rate = soundfile.read(gsm if raw else wav, dtype="float32", **raw)
        assert rate == RATE, (directory, rate)
        level = np.sqrt(np.convolve(wave**2, np.ones(160) / 160, "same"))
        loud = np.flatnonzero(level > 0.1 * level.max())
        waves.append(wave[max(0, loud[0] - 400) : loud[-1] + 400][:LONGEST])
    return waves


def _varied(wave: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Another speaker, room and line, as far as a few lines can have it; half of the lines are GSM telephones."""
    import soundfile

    speed = rng.uniform(0.7, 1.45)  # of pitch and formants too
    wave = np.interp(np.arange(0, len(wave) - 1, speed), np.arange(len(wave)), wave)
    for _ in range(2):
        wave = np.convolve(wave, [1, rng.uniform(-0.6, 0.6), rng.uniform(-0.3, 0.3)])[: len(wave)]
    wave = wave / (np.abs(wave).max() + 1e-6) * rng.uniform(0.1, 0.9)
    wave = wave + rng.standard_normal(len(wave)) * wave.std() * 10 ** rng.uniform(-2.0, -0.3)
    if rng.random() < 0.5:
        line = io.BytesIO()
        soundfile.write(line, np.clip(wave, -1, 1), **_GSM)
        line.seek(0)
        wave, _ = soundfile.read(line, channels=1, **_GSM)
    return np.pad(wave, rng.integers(0, 800, 2))[:LONGEST].astype(np.float32)


def _spoken(clips: list[tuple[np.ndarray, int, str]]) -> Spoken:
    waves = np.stack([np.pad(wave, (0, LONGEST - len(wave))) for wave, _, _ in clips])
    lengths = torch.tensor([len(wave) for wave, _, _ in clips])
    labels = torch.tensor([digit for _, digit, _ in clips])
    return Spoken(torch.from_numpy(waves.astype(np.float32)), lengths, labels, [language for _, _, language in clips])


def add_noise(x: Tensor, ratio_db: float | Tensor, generator: torch.Generator) -> Tensor:
    """``x`` with white noise of a power that is ``ratio_db`` below that of each item; one ratio or ``(n,)``."""
    noise = torch.randn(x.shape, generator=generator)
    power = x.flatten(1).square().mean(1) * 10 ** (-torch.as_tensor(ratio_db) / 10)
    return x + noise * power.sqrt().view(-1, *(1,) * (x.dim() - 1))


def noisy_pairs(
    written: Written, spoken: Spoken, rows: Tensor, copies: int, ratios: tuple[float, float], generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Images ``rows`` and voices that say the same, in any language, both under noise; and which voices they are.

    The signal over noise of each item is up to 12 dB above or below ``ratios``, so that a model learns that either may
    be of little use. ``spoken`` is the first of `spoken_digits`.
    """
    languages = torch.randint(len(LANGUAGES), rows.shape, generator=generator)
    voices = (languages * 10 + written.labels[rows]) * copies + torch.randint(copies, rows.shape, generator=generator)
    spread = 24 * torch.rand(2, len(rows), generator=generator) - 12
    images = add_noise(written.images[rows], ratios[0] + spread[0], generator)
    return images, add_noise(spoken.waves[voices], ratios[1] + spread[1], generator), voices


@dataclass(frozen=True)
class Pairs:
    """Clean ``images`` and ``noisy`` ones; voices that say the same, ``waves`` with noise and ``clean``; ``labels``."""

    images: Tensor
    noisy: Tensor
    waves: Tensor
    lengths: Tensor
    clean: Tensor
    labels: Tensor


def held_out_pairs(ratios: tuple[float, float]) -> dict[str, Pairs]:
    """Images by other writers with voices of speakers that are known, and of some that are not; noise once for all.

    That of known speakers is new, the recordings are those that copies were made of: each digit was recorded once.
    """
    _, unseen = written_digits()
    pairs = {}
    for name, voices in zip(("known speakers", "new speakers"), spoken_digits(copies=1), strict=True):
        generator = torch.Generator().manual_seed(0)
        speakers = len(voices.labels) // 10
        pick = unseen.labels + 10 * (torch.arange(len(unseen.labels)) % speakers)
        clean = voices.waves[pick]
        noisy = add_noise(unseen.images, ratios[0], generator), add_noise(clean, ratios[1], generator)
        pairs[name] = Pairs(unseen.images, noisy[0], noisy[1], voices.lengths[pick], clean, unseen.labels)
    return pairs


# Emoji


@dataclass(frozen=True)
class Emoji:
    """``images`` ``(n, 3, 32, 32)`` from 0 to 1; ``names``; ``words`` ``(n, W, G)`` (see `as_words`) and how many
    ``lengths`` ``(n,)``; and the number of each one's group ``(n,)`` and subgroup ``(n,)``, with their names.
    """

    images: Tensor
    names: list[str]
    words: Tensor
    lengths: Tensor
    groups: Tensor
    subgroups: Tensor
    group_names: list[str]
    subgroup_names: list[str]

    def __getitem__(self, rows: Tensor) -> Emoji:
        """Some of them."""
        some = [self.names[i] for i in torch.arange(len(self.names))[rows].tolist()]
        parts = (self.words[rows], self.lengths[rows], self.groups[rows], self.subgroups[rows])
        return Emoji(self.images[rows], some, *parts, self.group_names, self.subgroup_names)


# Not taken: flags, whose names all begin with "flag:", components, and skin tones, which are one picture five times.
_SKIPPED = ("Flags", "Component")
# Words in which members of a family differ: the whole family is held out or none of it.
_VARYING = re.compile(
    r"man|woman|person|men|women|people|boy|girl|mx|mrs|red|orange|yellow|green|blue|purple|brown|black|white|"
    r"left|right|up|down|small|medium|large|old|new|first|last"
)


def emoji() -> tuple[Emoji, Emoji]:
    """Those to learn from, and a fifth, whole families (`family`), which are held out.

    Raises:
        Unavailable: the packages are not there and cannot be fetched.
    """
    file = folder() / "examples" / "emoji-32.npz"
    if not file.exists():
        cache = speech.fetch(folder() / "examples", packages=EMOJI)
        _draw(cache / "fonts-noto-color-emoji" / "NotoColorEmoji.ttf", cache / "unicode-data" / "emoji-test.txt", file)
    with np.load(file) as saved:
        pixels, names = saved["images"], saved["names"].tolist()
        groups, subgroups = saved["groups"].tolist(), saved["subgroups"].tolist()
    group_names, subgroup_names = sorted(set(groups)), sorted(set(subgroups))
    words, lengths = as_words(names)
    everything = Emoji(
        torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255,
        names,
        words,
        lengths,
        torch.tensor([group_names.index(group) for group in groups]),
        torch.tensor([subgroup_names.index(subgroup) for subgroup in subgroups]),
        group_names,
        subgroup_names,
    )
    held_out = torch.tensor([zlib.crc32(family(name).encode()) % 4 == 0 for name in names])
    return everything[~held_out], everything[held_out]


def family(name: str) -> str:
    """What near-duplicates share: "woman cook" and "man cook", "red heart" and "blue heart", the clock faces."""
    if re.search(r"o.clock|-thirty", name):
        return "clock"
    if name.startswith(("keycap", "Japanese")):
        return name[:6]
    rest = [word for word in re.findall(r"\w+", name.lower()) if not _VARYING.fullmatch(word)]
    return " ".join(rest) or name


def as_words(names: list[str], most: int = 8, grams: int = 24, buckets: int = 8192) -> tuple[Tensor, Tensor]:
    """Each word as the numbers of its parts, ``(n, most, grams)``, and how many words there are, ``(n,)``.

    Parts are the word and its 3 to 5 neighbouring letters, each in one of ``buckets`` (Bojanowski et al. 2017), so that
    words that were never seen have parts that were; 0 is no part.
    """
    table = torch.zeros(len(names), most, grams, dtype=torch.long)
    lengths = torch.zeros(len(names), dtype=torch.long)
    for row, name in enumerate(names):
        words = re.findall(r"\w+", name.lower())[:most]
        lengths[row] = len(words)
        for place, word in enumerate(words):
            marked = f"<{word}>"
            pieces = [marked] + [marked[i : i + n] for n in (3, 4, 5) for i in range(len(marked) - n + 1)]
            numbers = [1 + zlib.crc32(piece.encode()) % (buckets - 1) for piece in pieces[:grams]]
            table[row, place, : len(numbers)] = torch.tensor(numbers)
    return table, lengths


def _draw(font: Path, listing: Path, target: Path, size: int = 32) -> None:
    """Write the pictures of the font, names, groups and subgroups to ``target``."""
    from fontTools.ttLib import TTFont
    from PIL import Image
    from tqdm import tqdm

    face = TTFont(font)
    glyphs, pictures = face.getBestCmap(), face["CBDT"].strikeData[0]
    joined = {}  # glyphs in a row → the one that stands for them
    for lookup in face["GSUB"].table.LookupList.Lookup:
        for table in (table for table in lookup.SubTable if lookup.LookupType == 4):
            for first, others in table.ligatures.items():
                joined.update({(first, *other.Component): other.LigGlyph for other in others})
    rows = []
    for codes, name, group, subgroup in tqdm(list(_listed(listing)), desc="emoji", leave=False):
        row = tuple(glyphs.get(code) for code in codes if code != 0xFE0F)
        glyph = row[0] if len(row) == 1 else joined.get(row)
        if glyph not in pictures:
            continue
        drawn = Image.open(io.BytesIO(pictures[glyph].imageData)).convert("RGBA")
        side = max(drawn.size)
        canvas = Image.new("RGBA", (side, side), "white")
        canvas.alpha_composite(drawn, ((side - drawn.width) // 2, (side - drawn.height) // 2))
        rows.append((np.asarray(canvas.convert("RGB").resize((size, size), Image.BOX)), name, group, subgroup))
    images, names, groups, subgroups = zip(*rows, strict=True)
    partial = target.with_suffix(".partial.npz")
    np.savez_compressed(partial, images=np.stack(images), names=names, groups=groups, subgroups=subgroups)
    partial.replace(target)


def _listed(listing: Path):
    """Code points, name, group and subgroup of each emoji in ``emoji-test.txt``."""
    group = subgroup = ""
    for line in listing.read_text(encoding="utf-8").splitlines():
        if heading := re.match(r"# (group|subgroup): (.*)", line):
            group, subgroup = (heading[2], "") if heading[1] == "group" else (group, heading[2])
        entry = re.match(r"([0-9A-F ]+); fully-qualified\s+# \S+ E[\d.]+ (.*)", line)
        if entry and group not in _SKIPPED and "skin tone" not in entry[2]:
            yield [int(code, 16) for code in entry[1].split()], entry[2].strip(), group, subgroup


def is_cached() -> bool:
    """Whether nothing has to be fetched."""
    packages = (*OTHER_SPEAKERS.values(), *EMOJI)
    return speech.is_cached() and speech.is_cached(folder() / "examples", packages)


def main(arguments: list[str] | None = None) -> int:
    """Fetches everything, and says what there is."""
    argparse.ArgumentParser(description="Fetches the data of the examples, and says what there is.").parse_args(
        arguments
    )
    try:
        written, spoken, pictures = written_digits(), spoken_digits(copies=1), emoji()
    except (Unavailable, OSError) as error:
        print(f"Not all data can be had: {error}", file=sys.stderr)
        return 1
    print(f"written digits: {len(written[0].labels)} and {len(written[1].labels)} held out")
    print(f"spoken digits: {len(spoken[0].labels)} and {len(spoken[1].labels)} held out")
    print(f"emoji: {len(pictures[0].names)} and {len(pictures[1].names)} held out")
    return 0


if __name__ == "__main__":
    sys.exit(main())
