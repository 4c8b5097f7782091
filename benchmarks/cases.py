"""The benchmark cases: a name, a shape, what is computed, and which peers compute the same numbers.

A slice adds a class with the methods of `MelCase` and its cases to `CASES`; the suite asks a case for nothing else.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial

import torch

from benchmarks.fusion_cases import FUSION_CASES
from benchmarks.mmd_cases import MMD_CASES
from mmfast.mel import MelConfig, extract, tables

MODES = ("forward", "backward")


@dataclass(frozen=True)
class MelCase:
    """Features of ``batch`` clips of ``seconds`` s.

    Args:
        peers: names of the providers, besides mmfast's own, that compute the same numbers; the tests check it.
        default: part of a run that names no case.
        gpu: of a GPU's size: part of such a run on one, and only there.
        same_shapes_as: a case in `CASES` with the same shapes and configuration, if this one is not there itself.
    """

    name: str
    batch: int
    seconds: float
    config: MelConfig
    peers: tuple[str, ...]
    default: bool = True
    gpu: bool = False
    same_shapes_as: str | None = None
    slice = "mel"
    modes = MODES
    reference = True

    @property
    def samples(self) -> int:
        """Samples of a clip."""
        return round(self.seconds * self.config.sample_rate)

    @property
    def frames(self) -> int:
        """Frames of the batch."""
        return self.batch * self.config.frame_count(self.samples)

    def facts(self) -> dict[str, float]:
        """What a row says of the size."""
        return {"batch": self.batch, "seconds": self.seconds, "frames": self.frames}

    @property
    def shape(self) -> str:
        """What a table prints."""
        c = self.config
        sizes = [c.n_fft, c.hop_length, c.n_mels] + ([c.n_mfcc] if c.n_mfcc else [])
        return f"{self.batch} × {self.seconds:g} s, {'/'.join(map(str, sizes))}"

    def small(self):
        """The same of two short clips, for tests."""
        return replace(self, batch=min(self.batch, 2), seconds=min(self.seconds, 1.0))

    def inputs(self, seed: int, device: str = "cpu") -> torch.Tensor:
        """The waveforms, ``(batch, samples)`` float32."""
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.name}/{seed}".encode()))
        different = min(self.batch, 32)  # a large batch repeats them: it would take longer to invent than to measure
        signals = speech_like(different, self.samples, self.config.sample_rate, generator).to(device)
        return signals.repeat(-(-self.batch // different), 1)[: self.batch]

    def upstream(self, seed: int, device: str = "cpu") -> torch.Tensor:
        """The gradient that arrives at the features."""
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.name}/{seed}/upstream".encode()))
        shape = (self.batch, self.config.n_features, self.config.frame_count(self.samples))
        if self.config.layout == "time_feature":
            shape = (shape[0], shape[2], shape[1])
        return torch.randn(shape, generator=generator).to(device)

    def compute(self, waveform: torch.Tensor, backend: str | None = None, **given: torch.Tensor) -> torch.Tensor:
        """The features from mmfast, with its own tables or those ``given``."""
        return extract(waveform, self.config, backend=backend, **given)

    def tables(self) -> dict[str, torch.Tensor]:
        """The float64 tables of the configuration, under the names of `extract`'s arguments."""
        names = ["window", *(["filters"] if self.config.filters else []), *(["dct"] if self.config.n_mfcc else [])]
        return {name: getattr(tables, name)(self.config) for name in names}

    def gold(self, waveform: torch.Tensor, upstream: torch.Tensor | None = None) -> torch.Tensor:
        """The float64 features, or with ``upstream`` the float64 gradient of the waveform, from the reference."""
        x = waveform.detach().double()
        if upstream is None:
            return self.compute(x, "reference")
        x.requires_grad_()
        return torch.autograd.grad(self.compute(x, "reference"), x, upstream.double())[0]

    def work(self, mode: str) -> tuple[float, float]:
        r"""Floating point operations and bytes that the fused op needs for one call.

        A frame of ``n`` points, hop ``H``, ``F = n // 2 + 1`` bins, ``M`` filters and ``C`` cepstra takes ``n``
        operations for the window, ``2.5 n log2 n`` for the real FFT, ``3 F`` for the power, ``4 F`` for the filters (at
        most two a bin) and ``2 M C`` for the DCT; logarithms are not counted. It reads ``4 H`` bytes and writes ``4`` a
        feature; a ``top_db`` followed by a DCT writes and reads the ``M`` log values once more. The backward recomputes
        the frame and applies the adjoint, 2.1 times the forward; it reads the waveform and the gradient and writes the
        waveform's gradient.
        """
        c = self.config
        flops = c.n_fft + 2.5 * c.n_fft * math.log2(c.n_fft) + 3 * c.n_freqs
        flops += 4 * c.n_freqs if c.filters else 0
        flops += 2 * c.n_mels * c.n_mfcc if c.n_mfcc else 0
        moved = 4 * c.hop_length + 4 * c.n_features + (8 * c.n_mels if c.n_mfcc and c.top_db is not None else 0)
        if mode == "backward":
            flops *= 3.1
            moved += 8 * c.hop_length + 4 * c.n_features
        return flops * self.frames, moved * self.frames


def speech_like(batch: int, samples: int, sample_rate: float, generator: torch.Generator) -> torch.Tensor:
    """Voiced syllables, breath noise and pauses down to 16-bit rounding: the range that floors and ``top_db`` meet."""
    t = torch.arange(samples) / sample_rate
    uniform = partial(torch.rand, batch, 1, generator=generator)
    pitch = 90 + 140 * uniform()
    phase = 2 * math.pi * (pitch * t + 3 * torch.sin(2 * math.pi * (2 + 3 * uniform()) * t))
    voiced = torch.zeros(batch, samples)
    for harmonic in range(1, 13):
        voiced += torch.sin(harmonic * phase) / harmonic * (1 + torch.cos(2 * math.pi * uniform() * harmonic / 6))
    noise = torch.randn(batch, samples, generator=generator)
    syllables = torch.sin(math.pi * ((2.5 + 2 * uniform()) * t + uniform())).clamp(min=0) ** 2
    pauses = (torch.sin(2 * math.pi * (0.4 * t + uniform())) > -0.6).float()
    return (pauses * syllables * (0.08 * voiced + 0.02 * noise) + 1e-5 * noise).contiguous()


_TORCHAUDIO = ("torchaudio", "stft-compile", "reference-compile")
_WHISPER = MelConfig(
    n_fft=400,
    hop_length=160,
    n_mels=80,
    mel_scale="slaney",
    mel_norm="slaney",
    drop_last=True,
    log="log10",
    log_floor=1e-10,
    top_db=8.0,
    top_db_scope="batch",
    output_offset=4.0,
    output_scale=0.25,
)
_MFCC = MelConfig(
    n_fft=400, hop_length=200, n_mels=128, n_mfcc=40, log="db", log_floor=1e-10, top_db=80.0, top_db_scope="channels"
)
_MEL2048 = MelConfig(sample_rate=22050, n_fft=2048, hop_length=512, n_mels=128, mel_scale="slaney", mel_norm="slaney")
_LOGMEL = MelConfig(n_fft=400, hop_length=160, n_mels=80, log="ln", log_offset=1e-6)
_KALDI = MelConfig(
    n_fft=512,
    win_length=400,
    hop_length=160,
    framing="valid",
    window="povey",
    window_periodic=False,
    window_position="start",
    remove_dc=True,
    preemphasis=0.97,
    mel_scale="kaldi",
    f_min=20.0,
    n_mels=80,
    log="ln",
    log_floor=2.0**-23,
    layout="time_feature",
)
_KALDI_PEERS = ("torchaudio", "reference-compile", "kaldi-native-fbank")

_MEL_CASES = (
    MelCase("whisper-8x30s", 8, 30, _WHISPER, (*_TORCHAUDIO, "openai-whisper")),
    MelCase(
        "whisper-item-8x30s",
        8,
        30,
        _WHISPER.replace(top_db_scope="item"),
        (*_TORCHAUDIO, "transformers", "transformers-core"),
    ),
    MelCase("mfcc-db-32x10s", 32, 10, _MFCC, _TORCHAUDIO),
    MelCase(
        "mfcc-log-32x10s",
        32,
        10,
        _MFCC.replace(log="ln", log_floor=0.0, log_offset=1e-6, top_db=None, top_db_scope="item"),
        _TORCHAUDIO,
    ),
    MelCase("mel2048-4x30s", 4, 30, _MEL2048, (*_TORCHAUDIO, "librosa", "nnaudio")),
    MelCase("kaldi-fbank80-32x10s", 32, 10, _KALDI, _KALDI_PEERS),
    MelCase("kaldi-mfcc13-32x10s", 32, 10, _KALDI.replace(n_mels=23, n_mfcc=13, lifter=22.0), _KALDI_PEERS),
    MelCase("logmel-256x1s", 256, 1, _LOGMEL, (*_TORCHAUDIO, "nnaudio")),
    MelCase("logmel-1x1s", 1, 1, _LOGMEL, (*_TORCHAUDIO, "librosa", "nnaudio")),
    MelCase(
        "logmel1024-16x10s",
        16,
        10,
        MelConfig(n_fft=1024, hop_length=256, n_mels=80, log="ln", log_offset=1e-6),
        (*_TORCHAUDIO, "nnaudio"),
    ),
    MelCase(
        "logmel4096-16x10s",
        16,
        10,
        MelConfig(n_fft=4096, hop_length=1024, n_mels=128, log="ln", log_offset=1e-6),
        _TORCHAUDIO,
    ),
    MelCase("gpu-logmel-512x30s", 512, 30, _LOGMEL, (*_TORCHAUDIO, "nnaudio"), gpu=True),
    MelCase("gpu-whisper-64x30s", 64, 30, _WHISPER, _TORCHAUDIO, gpu=True),
    MelCase("gpu-whisper-1x30s", 1, 30, _WHISPER, _TORCHAUDIO, gpu=True),
    MelCase("gpu-logmel-1x1s", 1, 1, _LOGMEL, (*_TORCHAUDIO, "nnaudio"), gpu=True),
    MelCase("gpu-mfcc-db-512x10s", 512, 10, _MFCC, _TORCHAUDIO, gpu=True),
    MelCase("gpu-mel2048-128x30s", 128, 30, _MEL2048, (*_TORCHAUDIO, "nnaudio"), gpu=True),
    MelCase("gpu-kaldi-fbank80-256x10s", 256, 10, _KALDI, ("torchaudio", "reference-compile"), gpu=True),
    MelCase("smoke-2x0.2s", 2, 0.2, _LOGMEL, (*_TORCHAUDIO, "librosa", "nnaudio"), default=False),
)

CASES = {case.name: case for case in (*_MEL_CASES, *MMD_CASES, *FUSION_CASES)}


def select(slices: list[str] | None = None, glob: str | None = None, device: str = "cpu") -> list:
    """Cases of the ``slices`` (all without any) whose names match ``glob``: comma-separated shell patterns.

    Without any, those that are meant for the ``device``.

    Raises:
        ValueError: a slice without cases, or a pattern without a match.
    """
    known = {case.slice for case in CASES.values()}
    for name in slices or ():
        if name not in known:
            raise ValueError(f"slice must be one of {', '.join(sorted(known))}, got {name!r}")
    of_slices = [case for case in CASES.values() if not slices or case.slice in slices]
    if glob is None:
        return [case for case in of_slices if case.default and case.gpu == device.startswith("cuda")]
    patterns = glob.split(",")
    for pattern in patterns:
        if not any(fnmatchcase(case.name, pattern) for case in of_slices):
            names = ", ".join(case.name for case in of_slices)
            raise ValueError(f"--cases: nothing matches {pattern!r}; cases: {names}")
    return [
        case
        for case in of_slices
        if any(case.name == p or (case.default and fnmatchcase(case.name, p)) for p in patterns)
    ]
