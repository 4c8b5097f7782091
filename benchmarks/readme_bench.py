"""What ``make bench`` runs: real speech through the reference and the fused op, the check that they agree, the times.

``python -m benchmarks --speech`` is the same with the suite's options. Where the recordings cannot be had it says so
and takes generated signals.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tabulate import tabulate
from tqdm import tqdm

from benchmarks import providers, report, suite
from benchmarks.cases import CASES, MelCase
from mmfast import _backend
from mmfast.mel import MelConfig, extract

RATE = 16000
FEATURES = {
    "MFCC": CASES["mfcc-db-32x10s"].config.replace(top_db_scope="item"),
    "log-mel": CASES["logmel-256x1s"].config,
    "Whisper log-mel": CASES["whisper-item-8x30s"].config,
    "Kaldi fbank": CASES["kaldi-fbank80-32x10s"].config,
}
TIMED = ("mfcc-db-32x10s", "whisper-8x30s", "kaldi-fbank80-32x10s")
# Compilation of every case would take longer than the rest; the full suite has those providers.
PROVIDERS = "mmfast,reference,torchaudio,openai-whisper,kaldi-native-fbank"


@dataclass(frozen=True)
class SpeechCase(MelCase):
    """A case with recorded speech, cut into clips of its length, in place of the generated signal."""

    speech: torch.Tensor | None = None

    def inputs(self, seed: int, device: str = "cpu") -> torch.Tensor:
        needed = self.batch * self.samples
        start = seed * 997 % self.speech.numel()
        stream = self.speech.roll(-start).repeat(-(-needed // self.speech.numel()))
        return stream[:needed].reshape(self.batch, self.samples).to(device)


@dataclass(frozen=True)
class Agreement:
    """Largest absolute difference of one kind of feature over all valid frames of all clips, for one implementation."""

    features: str
    clips: int
    frames: int
    fused: float | None  # fused op and reference, both float32
    fused_gold: float | None  # fused op and the float64 reference
    reference_gold: float
    scale: float  # largest absolute value of the float64 features

    @property
    def allowed(self) -> float:
        """Error that passes: twice the reference's in the same dtype, or 16 roundings of the largest value."""
        return max(2 * self.reference_gold, 16 * torch.finfo(torch.float32).eps * self.scale)

    @property
    def agrees(self) -> bool:
        """Within `allowed`; without the fused op, the reference within 1e-3 of its float64 self's largest value."""
        if self.fused_gold is None:
            return self.reference_gold <= 1e-3 * self.scale
        return self.fused_gold <= self.allowed


def agreement(name: str, config: MelConfig, clips: list[np.ndarray], native: bool, batch: int = 32) -> Agreement:
    """Features of ragged batches of ``clips``: the reference, its float64 self and, if ``native``, the fused op."""
    clips = sorted(clips, key=len)
    worst = {"fused": 0.0, "fused_gold": 0.0, "reference_gold": 0.0, "scale": 0.0}
    frames = 0
    for begin in range(0, len(clips), batch):
        part = clips[begin : begin + batch]
        lengths = torch.tensor([len(clip) for clip in part])
        padded = torch.zeros(len(part), int(lengths.max()))
        for row, clip in zip(padded, part, strict=True):
            row[: len(clip)] = torch.from_numpy(clip)
        gold, counts = extract(padded.double(), config, lengths=lengths, backend="reference")
        expected, _ = extract(padded, config, lengths=lengths, backend="reference")
        frames += int(counts.sum())
        found = {"reference_gold": expected - gold, "scale": gold}
        if native:
            result, result_counts = extract(padded, config, lengths=lengths)
            if not torch.equal(result_counts, counts):
                raise ValueError(f"{name}: the fused op counts other frames than the reference")
            found |= {"fused": result - expected, "fused_gold": result - gold}
        for key, value in found.items():
            # NaN must not pass as small.
            worst[key] = max(worst[key], float(value.abs().nan_to_num(nan=torch.inf).max()))
    fused = {key: worst[key] if native else None for key in ("fused", "fused_gold")}
    return Agreement(name, len(clips), frames, **fused, reference_gold=worst["reference_gold"], scale=worst["scale"])


def run(out: Path, settings: suite.Settings, limit: int = 240, progress: bool = True) -> int:
    """Check, measure, print and write; 1 when the fused op and the reference disagree or a provider failed, else 0."""
    from benchmarks import speech

    clips, sentence = speech.speech(min_seconds=0.5, limit=limit, sample_rate=RATE, max_seconds=10.0)
    backend, reason = _backend.choose("mel", torch.device(settings.device))
    native = backend != "reference"
    print(f"Input: {sentence}.\nBackend: {backend} ({reason}).\n")
    samples = [samples for _, samples, _ in clips]
    names = tqdm(FEATURES.items(), desc="agreement", disable=not progress, file=sys.stderr)
    found = [agreement(name, config, samples, native) for name, config in names]
    print(agreement_table(found))
    disagree = [a.features for a in found if not a.agrees]
    if disagree:
        print(f"\nDISAGREEMENT beyond the tolerance: {', '.join(disagree)}", file=sys.stderr)
        return 1
    stream = torch.from_numpy(np.concatenate(samples))
    cases = [speech_case(CASES[name], stream) for name in TIMED]
    available, missing = providers.select(PROVIDERS, settings.device)
    for name, why in missing.items():
        print(f"skipped {name}: {why}", file=sys.stderr)
    out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    with open(out / "rows.jsonl", "w") as file:
        for row in suite.run(cases, available, settings, progress):
            rows.append(row | {"input": sentence})
            file.write(json.dumps(rows[-1]) + "\n")
    print("\n" + report.tables(rows))
    print("\n".join(map(str, [out / "rows.jsonl", *report.write(rows, out)])))
    return 1 if any("failed" in row for row in rows) else 0


def speech_case(case: MelCase, stream: torch.Tensor) -> SpeechCase:
    """``case`` on ``stream``; its memory is measured under the name of the original, whose shapes it has."""
    return SpeechCase(
        name=f"speech-{case.name}",
        batch=case.batch,
        seconds=case.seconds,
        config=case.config,
        peers=case.peers,
        same_shapes_as=case.name,
        speech=stream,
    )


def agreement_table(found: list[Agreement]) -> str:
    """The agreements as Markdown: largest absolute differences."""
    show = lambda value: "not built" if value is None else f"{value:.2e}"  # noqa: E731
    lines = [
        (
            a.features,
            a.clips,
            a.frames,
            show(a.fused),
            show(a.fused_gold),
            show(a.reference_gold),
            f"{a.scale:.3g}",
            "yes" if a.agrees else "NO",
        )
        for a in found
    ]
    differences = ("fused to reference", "fused to float64", "reference to float64")
    headers = ("features", "clips", "frames", *differences, "largest", "agrees")
    return tabulate(lines, headers, tablefmt="pipe", disable_numparse=True)


def main() -> int:
    """The quick measurement, into benchmarks/out."""
    return run(Path(__file__).resolve().parent / "out", replace(suite.QUICK, budget=1.5))


if __name__ == "__main__":
    sys.exit(main())
