"""What each case was built to reach, and whether rows reach it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from tabulate import tabulate

FORWARD, BACKWARD = ("forward",), ("backward",)
BOTH = (*FORWARD, *BACKWARD)

_COMPILED = ("*-compile",)
_MATRIX = ("broadcast", "cdist", "gram", "three-blocks")  # eager PyTorch that builds the kernel matrix
_LOOPS = ("blocked", "blocked-sweep")
_KEOPS = ("pykeops",)
_TORCH = ("sdpa*", "plain", "flex")
_EVERY = ("*",)


@dataclass(frozen=True)
class Aim:
    """One figure that was set for a case.

    Args:
        cases: pattern of the names of cases.
        modes: of `benchmarks.cases.MODES`.
        least: so many times as fast as the fastest of the ``peers`` that ran; if these are empty, a rate or a limit:
        peers: patterns of providers.
        seconds: or no slower than this.
        extra: or no more bytes beside the results, at the peak.
    """

    cases: str
    modes: tuple[str, ...]
    least: float | None = None
    peers: tuple[str, ...] = ()
    seconds: float | None = None
    extra: float | None = None

    def __post_init__(self) -> None:
        if [self.least, self.seconds, self.extra].count(None) != 2 or (self.least is None) == bool(self.peers):
            raise ValueError(f"an aim is one of least (with peers), seconds and extra, got {self}")


# For two cores with AVX-512 and AMX (mel: AVX-512). Elsewhere they say how far another machine is from that.
CPU = (
    Aim("whisper-8x30s", FORWARD, 15, ("torchaudio",)),
    Aim("whisper-8x30s", FORWARD, 7, _COMPILED),
    Aim("mfcc-*-32x10s", FORWARD, 10, ("torchaudio",)),
    Aim("mel2048-4x30s", FORWARD, 8, ("torchaudio", "librosa")),
    Aim("mel2048-4x30s", FORWARD, 5, _COMPILED),
    Aim("kaldi-*-32x10s", FORWARD, 12, ("torchaudio",)),
    Aim("kaldi-*-32x10s", FORWARD, 40, ("kaldi-native-fbank",)),
    Aim("logmel-256x1s", FORWARD, 12, ("torchaudio",)),
    *(
        Aim(name, BACKWARD, 10, ("torchaudio",))
        for name in ("whisper-8x30s", "mfcc-*-32x10s", "mel2048-4x30s", "kaldi-*-32x10s", "logmel-256x1s")
    ),
    Aim("mmd-dan-4096x256", BOTH, 20, _MATRIX),
    Aim("mmd-dan-4096x256", BOTH, 4, ("three-blocks-compile",)),
    Aim("mmd-dan-4096x256", FORWARD, 3, _LOOPS),
    Aim("mmd-dan-4096x256", BACKWARD, 2.5, _LOOPS),
    Aim("mmd-dan-4096x64", BOTH, 40, _MATRIX),
    Aim("mmd-dan-4096x64", BOTH, 6, ("three-blocks-compile",)),
    Aim("mmd-dan-4096x64", BOTH, 4, _LOOPS),
    Aim("mmd-dan-1024x64", BOTH, 15, _MATRIX),
    Aim("mmd-dan-1024x64", BOTH, 5, ("three-blocks-compile",)),
    Aim("mmd-dan-1024x64", FORWARD, 4, _LOOPS),
    Aim("mmd-dan-1024x64", BACKWARD, 3, _LOOPS),
    Aim("mmd-gauss-4096x2", BOTH, 5, (*_KEOPS, "geomloss-online")),
    Aim("mmd-gauss-4096x2", BOTH, 3, ("cdist",)),
    Aim("mmd-dan-1024x768", BOTH, 20, _KEOPS),
    Aim("mmd-dan-1024x768", BOTH, 1.8, _LOOPS),
    Aim("mmd-dan-64x256", BACKWARD, 4, ("reference",)),
    Aim("mmd-dan-65536x256", BACKWARD, extra=300e6),
    Aim("mmd-test-2048x64", FORWARD, 20, ("permutation-gather",)),
    Aim("mmd-cka-8192", FORWARD, 5, ("cka-products",)),
    Aim("fusion-sd-77", FORWARD, 2, _TORCH),
    Aim("fusion-sd-77-bfloat16", FORWARD, 2.5, _TORCH),
    *(Aim(name, BACKWARD, 1.7, _TORCH) for name in ("fusion-sd-77", "fusion-sd-77-bfloat16")),
    Aim("fusion-ip-77-*", FORWARD, 2, _TORCH),
    Aim("fusion-ip-77-*", BACKWARD, 1.7, _TORCH),
    Aim("fusion-joint-77-257-1500*", BOTH, 1.2, _TORCH),
    Aim("fusion-qformer-257", BOTH, 1.3, _TORCH),
    *(Aim(f"fusion-{name}*", BOTH, 1.5, _TORCH) for name in ("pool-16384", "latents-65536", "mult-375")),
    Aim("fusion-mha-448x1500", BOTH, 1.6, ("torch-mha",)),
    Aim("fusion-mha-448x1500-bfloat16", BOTH, 3, ("torch-mha",)),
    *(
        Aim(f"fusion-{name}", BOTH, 0.97, ("sdpa",))
        for name in (
            "qformer-257-bfloat16",
            "sd-16384x77-bfloat16",
            "sd-1024x77",
            "ltx-*",
            "mllama-1601",
            "whisper-*",
            "perceiver-2048",
        )
    ),
)

# For one H200. 512 × 30 s are 1.54 M frames.
GPU = (
    Aim("gpu-logmel-512x30s", FORWARD, seconds=512 * 3001 / 1e9),
    Aim("gpu-logmel-512x30s", BOTH, 5, ("torchaudio",)),
    Aim("gpu-logmel-512x30s", FORWARD, 3, _COMPILED),
    Aim("gpu-whisper-1x30s", FORWARD, seconds=40e-6),
    Aim("gpu-dan-16384x64", BOTH, 10, _EVERY),
    Aim("gpu-dan-16384x768", BOTH, 5, _EVERY),
    *(Aim(f"gpu-dan-{n}x{d}", BACKWARD, 6, ("reference",)) for n in (64, 256) for d in (256, 2048)),
    Aim("gpu-test-16384x64", FORWARD, seconds=20e-3),
    Aim("gpu-kid-50000x2048", FORWARD, seconds=0.3),
    Aim("gpu-sd15-ip", BOTH, 3, _TORCH),
    Aim("gpu-sdxl-ip-plus", BOTH, 2, _TORCH),
    Aim("gpu-ltx-a2v", BOTH, 2, _TORCH),
    Aim("gpu-qformer", BOTH, 2, _TORCH),
    Aim("gpu-mult", BOTH, 3, _TORCH),
    Aim("gpu-mllama", BOTH, 1.1, _TORCH),
    *(
        Aim(f"gpu-{name}", BOTH, 0.97, _TORCH)
        for name in ("sd15", "ltx-v2a", "whisper-decoder", "siglip-pool", "joint-2048", "long-4096")
    ),
)


@dataclass(frozen=True)
class Verdict:
    """An aim in one case and mode, and what was measured there."""

    aim: Aim
    case: str
    mode: str
    wanted: str
    found: str
    met: bool
    fastest: str = ""  # of the peers


def verdicts(rows: Sequence[dict[str, Any]], aims: Sequence[Aim] = (*CPU, *GPU)) -> list[Verdict]:
    """Every aim that the rows of one run say something about, case by case.

    An aim beside peers takes the fastest of those that ran, so it needs one.
    """
    groups: dict[tuple[str, str], dict[str, dict]] = {}
    for row in rows:
        if "median" in row:
            groups.setdefault((row["case"], row["mode"]), {})[row["provider"]] = row
    found = (
        _verdict(aim, case, mode, providers)
        for (case, mode), providers in groups.items()
        for aim in aims
        if "mmfast" in providers and mode in aim.modes and fnmatchcase(case, aim.cases)
    )
    return [verdict for verdict in found if verdict is not None]


def _verdict(aim: Aim, case: str, mode: str, providers: dict[str, dict]) -> Verdict | None:
    ours = providers["mmfast"]
    if aim.least is not None:
        peers = [
            row
            for name, row in providers.items()
            if name != "mmfast" and any(fnmatchcase(name, pattern) for pattern in aim.peers)
        ]
        if not peers:
            return None
        fastest = min(peers, key=lambda row: row["median"])
        ratio = fastest["median"] / ours["median"]
        met = ratio >= aim.least
        return Verdict(aim, case, mode, f"{aim.least:g}×", f"{ratio:.3g}×", met, fastest["provider"])
    if aim.seconds is not None:
        found = ours["median"]
        return Verdict(aim, case, mode, f"{aim.seconds * 1e3:.3g} ms", f"{found * 1e3:.3g} ms", found <= aim.seconds)
    found = (ours.get("memory") or {}).get("extra")
    if found is None:
        return None
    return Verdict(aim, case, mode, f"{aim.extra / 1e6:.3g} MB", f"{found / 1e6:.3g} MB", found <= aim.extra)


def table(found: Sequence[Verdict]) -> str:
    """The verdicts on one run as a Markdown table, and how many are met."""
    lines = [(v.case, v.mode, v.fastest, v.wanted, v.found, "met" if v.met else "**not met**") for v in found]
    headers = ("case", "mode", "fastest of its peers", "aim", "measured", "verdict")
    return f"{_markdown(lines, headers)}\n\n{_met(found)}"


def comparison(runs: dict[str, Sequence[Verdict]]) -> str:
    """The verdicts on several runs, by their names: a column each, what falls short in bold."""
    cells: dict[tuple[str, str, Aim], dict[str, str]] = {}
    wanted = {}
    for name, found in runs.items():
        for v in found:
            key = (v.case, v.mode, v.aim)
            wanted[key] = v.wanted
            cells.setdefault(key, {})[name] = v.found if v.met else f"**{v.found}**"
    lines = [
        (case, mode, ", ".join(aim.peers), wanted[case, mode, aim], *(cell.get(name, "") for name in runs))
        for (case, mode, aim), cell in cells.items()
    ]
    lines.append(("", "", "", "", *map(_met, runs.values())))
    return _markdown(lines, ("case", "mode", "peers", "aim", *runs))


def _met(found: Sequence[Verdict]) -> str:
    return f"{sum(v.met for v in found)} of {len(found)} met"


def _markdown(lines: Sequence[Sequence[str]], headers: Sequence[str]) -> str:
    return tabulate(lines, headers, tablefmt="pipe", disable_numparse=True)
