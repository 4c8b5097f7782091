"""Which engine computes which shape on the GPU.

A call is of one kind (`kind_of`), in half precision or float32, with or without gradients, and for each of these the
table names engines in order of preference; the first that can (`able`) does it:

    short       `triton_short`: all keys on chip, one pass over the queries
    split       `triton_split`: split over the keys, for few queries
    skip        `triton_skip`: all sources in one pass, only tiles of keys that masks and lengths leave
    tiny        `tiny`: heads of a few features in float32, where the extension has kernels for CUDA
    flash, efficient, cudnn     `merged`: torch's kernel for each source, merged through the log-sum-exps
    sdpa        scaled_dot_product_attention itself
    reference   plain PyTorch

The table below is reasoned from bytes and operations, and for most kinds measured on an H100 or H200
(benchmarks/results). ``mmfast tune fusion`` measures all of it on the GPU at hand (`tune`), and keeps the result for
that GPU, torch and Triton; it is read when that GPU is first used.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfast import _backend
from mmfast.fusion._inputs import Source, batch_of, keys_and_values, positive_scale

RESIDENT = (
    36864  # elements of keys and values in their tiles: 144 accumulators for each of 256 threads, 144 KB in float32
)
FEW_QUERIES = 64  # rows that one tile of the product holds
TINY_FEATURES, TINY_QUERIES = 16, 32  # of "tiny": at most, at least (a warp)
_HAS_TINY = hasattr(_backend._C, "fusion_tiny_forward")


class Key(NamedTuple):
    """A row of the table."""

    kind: str
    half: bool
    gradients: bool


_BY_KIND = {
    # A flash kernel pays for 128 or 192 keys, a launch for each source, and in its backward for dQ in memory.
    "few keys, one source": ("short", "sdpa", "flash"),
    "few keys, several sources": ("short", "flash"),
    "few keys, decoupled": ("short", "flash"),
    # Few queries: with one source flash splits the keys by itself in half precision, as fast as "split", in one call.
    "few queries": ("sdpa", "split", "flash"),
    # Long: what is limited by the matrix units belongs to those who come closest to their rate.
    "long, one source": ("sdpa", "flash"),
    # "efficient" visits every key and reads the mask for every head; "flash" is that too, but for lengths alone.
    "long, masked": ("skip", "flash"),
    # Flash takes a launch and a merge for each source, and backward sums of dQ in memory: 1.3 times as long as one
    # Triton kernel that was measured forward, 1.5 times as long in all as cuDNN with all sources side by side.
    "long, several sources": ("skip", "flash"),
    # Tiles of the matrix unit are mostly padding; in half precision, of one product and not three, they still win.
    "tiny heads": ("tiny", "short", "sdpa", "flash"),
}
TABLE: dict[Key, tuple[str, ...]] = {
    Key(kind, half, gradients): engines
    for kind, engines in _BY_KIND.items()
    for half in (True, False)
    for gradients in (True, False)
    if not (kind == "tiny heads" and half)
}
for _gradients in (True, False):  # in float32 sdpa is "efficient", which takes twice as long as "split"
    TABLE[Key("few queries", False, _gradients)] = ("split", "flash")


# ---- Kinds of calls


def power_of_two(n: int, least: int = 16) -> int:
    power = least
    while power < n:  # a compiler that traces this with unknown sizes knows no bit_length
        power *= 2
    return power


def tiles_of(keys: int, dtype: torch.dtype) -> list[tuple[int, int]]:
    """(start, width) of tiles that cover the keys with little to spare: 77 → 64 + 16, 126 → 128; at most 64 in float32.

    In float32, where a product is three, wider ones do not leave enough registers.
    """
    widest = 64 if dtype == torch.float32 else 128
    tiles, start = [], 0
    while start < keys:
        width = min(widest, power_of_two(keys - start))
        if width > 16 and keys - start < 0.8 * width:
            width //= 2
        tiles.append((start, width))
        start += width
    return tiles


def resident(query: Tensor, sources: Sequence[Source]) -> int:
    """Elements of keys and values in their tiles, to compare with `RESIDENT`."""
    keys = [s.key.shape[2] for s in sources]
    if sum(keys) > RESIDENT // 32:  # a tile has at least 16 + 16 features: no need to cut them
        return RESIDENT + 1
    rows = sum(width for n in keys for _, width in tiles_of(n, query.dtype))
    return rows * (power_of_two(query.shape[3]) + power_of_two(sources[0].value.shape[3]))


def fits(query: Tensor, sources: Sequence[Source]) -> bool:
    """Whether all keys and values stay on chip; in float32, where products are three of parts, half as many."""
    return resident(query, sources) <= (RESIDENT // 2 if query.dtype == torch.float32 else RESIDENT)


def folds(query: Tensor, sources: Sequence[Source], batch: int) -> tuple[int, int]:
    """How much of the batch, and how many heads, share keys and so are rows of one product."""
    alone = all(s.key.shape[0] == s.value.shape[0] == 1 and s.lengths is None for s in sources)
    groups = {query.shape[1] // s.key.shape[1] for s in sources}
    return batch if alone else 1, groups.pop() if len(groups) == 1 else 1


def is_tiny(query: Tensor, sources: Sequence[Source]) -> bool:
    """Whether heads, source and number of queries are for "tiny"."""
    only = sources[0]
    bare = len(sources) == 1 and only.mask is None and only.bias is None and only.gate is None
    if not bare or query.dtype != torch.float32 or query.shape[2] < TINY_QUERIES:
        return False
    if max(query.shape[3], only.value.shape[3]) > TINY_FEATURES:
        return False
    whole = all(x.shape[0] == query.shape[0] and x.shape[1] == query.shape[1] for x in (only.key, only.value))
    return whole and query.shape[0] * query.shape[1] * max(query.shape[2], only.key.shape[2]) < 2**31


def kind_of(query: Tensor, sources: Sequence[Source], fusion: str, tiny: bool = True) -> str:
    """The kind of a call, a row of the table; without ``tiny`` where there was no kernel for tiny heads."""
    several = len(sources) > 1
    decoupled = fusion == "decoupled" and (several or sources[0].gate is not None)
    tiny = tiny and is_tiny(query, sources)
    if fits(query, sources):
        if tiny:
            return "tiny heads"
        if decoupled:
            return "few keys, decoupled"
        return "few keys, several sources" if several else "few keys, one source"
    if query.shape[2] <= FEW_QUERIES:
        shared, group = folds(query, sources, batch_of(query, list(sources)))
        if query.shape[2] * shared * group <= FEW_QUERIES:
            return "few queries"
    if tiny:
        return "tiny heads"
    if any(x is not None for s in sources for x in (s.mask, s.bias, s.lengths)):
        return "long, masked"
    return "long, several sources" if several else "long, one source"


def able(engine: str, query: Tensor, sources: Sequence[Source], fusion: str, lse: bool) -> bool:
    """Whether ``engine`` can do what `mmfast.fusion.triton.can` allows."""
    if engine == "short":
        return fits(query, sources)
    if engine == "sdpa":  # with masks its kernels do not agree on what a row without keys is
        only = sources[0]
        plain = only.mask is None and only.bias is None and only.lengths is None and only.gate is None
        few = query.shape[2] <= FEW_QUERIES  # which may be rows of one product where they share keys, and not in sdpa
        shared = few and folds(query, sources, batch_of(query, list(sources))) != (1, 1)
        return len(sources) == 1 and plain and not lse and only.key.shape[2] > 0 and not shared
    if engine == "tiny":
        return _HAS_TINY and query.device.type == "cuda" and is_tiny(query, sources)
    if engine == "skip":  # in float32, of three products, no faster than "efficient"
        masked = any(x is not None for s in sources for x in (s.mask, s.bias, s.lengths))
        wide = max(query.shape[3], sources[0].value.shape[3])  # more features leave no room for blocks of 128 queries
        return query.dtype != torch.float32 and (masked or (fusion == "joint" and wide <= 128))
    if engine in ("efficient", "cudnn", "flash"):
        return query.device.type == "cuda"
    return True


@torch.compiler.assume_constant_result
def engines_for(kind: str, half: bool, gradients: bool, device: str, index: int) -> tuple[str, ...]:
    """A row of the table; where nothing was measured, without what is not made for this GPU."""
    measured = device == "cuda" and _measured(index)
    engines = TABLE[Key(kind, half, gradients)]
    if device == "cuda" and not measured and torch.cuda.get_device_capability(index) < (9, 0):
        if gradients:
            # The operands of all products of the backward do not fit the registers then: it spills 12 KB a thread.
            engines = tuple(e for e in engines if e != "short")
        if kind == "long, several sources":
            # Blocks of 128 queries need Hopper's matrix units and memory; with smaller ones flash is the faster.
            engines = tuple(e for e in engines if e != "skip")
    return engines


def choose(query: Tensor, sources: Sequence[Source], fusion: str, lse: bool, plain: bool = True) -> str:
    """The engine for a call; ``lse``: its log-sum-exp is asked for; ``plain``: neither causal nor to be summed."""
    gradients = torch.is_grad_enabled() and (
        query.requires_grad
        or any(s.key.requires_grad or s.value.requires_grad for s in sources)
        or any(isinstance(s.gate, Tensor) and s.gate.requires_grad for s in sources)
    )
    tiny = plain and able("tiny", query, sources, fusion, lse)
    kind, device = kind_of(query, sources, fusion, tiny), query.device
    for engine in engines_for(kind, query.dtype != torch.float32, gradients, device.type, device.index or 0):
        if able(engine, query, sources, fusion, lse):
            return engine
    return "flash" if query.device.type == "cuda" else "cpu"


# ---- Measured tables


class Case(NamedTuple):
    """What stands for a kind in `tune`: sizes of models in use."""

    kind: str
    batch: int
    heads: int
    rows: int
    dim: int
    keys: tuple[int, ...]
    fusion: str = "joint"
    masked: bool = False


CASES = (
    Case("few keys, one source", 16, 8, 4096, 40, (77,)),
    Case("few keys, one source", 1, 32, 6144, 64, (126,)),
    Case("few keys, several sources", 16, 10, 4096, 64, (77, 16)),
    Case("few keys, decoupled", 16, 8, 4096, 40, (77, 4), "decoupled"),
    Case("few keys, decoupled", 16, 20, 1024, 64, (77, 16), "decoupled"),
    Case("few queries", 64, 12, 32, 64, (577,)),
    Case("few queries", 8, 20, 1, 64, (1500,)),
    Case("long, one source", 2, 24, 4096, 64, (4429,)),
    Case("long, masked", 4, 32, 1024, 128, (6404,), "joint", True),
    Case("long, several sources", 2, 24, 4096, 64, (4096, 333)),
    Case("tiny heads", 24, 5, 500, 6, (500,)),
    Case("tiny heads", 24, 5, 500, 12, (500,)),
)
CANDIDATES = ("tiny", "short", "split", "skip", "flash", "efficient", "cudnn", "sdpa")


def cache_file(index: int | None = None) -> Path:
    """Where the table measured on this GPU, with this torch and Triton, is kept."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    name = f"fusion-{torch.cuda.get_device_name(index)}-torch{torch.__version__}-triton{triton}"
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "mmfast" / (re.sub(r"[^A-Za-z0-9.+-]+", "-", name) + ".json")


def read(path: Path) -> None:
    """Puts a measured table in place of the reasoned one; what it does not know stays."""
    for row in json.loads(path.read_text())["table"]:
        key = Key(row["kind"], row["half"], row["gradients"])
        if key in TABLE and row["engines"] and set(row["engines"]) <= {*CANDIDATES, "reference"}:
            TABLE[key] = tuple(row["engines"])


def tune(seconds: Callable[[Case, bool, bool, str], float | None], report: Callable[[str], None] = print) -> list[dict]:
    """The table by measurement: for each row the engines by the geometric mean of their times over its cases.

    ``seconds(case, half, gradients, engine)`` is a time, or None where the engine cannot do the case.
    """
    rows = []
    for key in TABLE:
        cases = [c for c in CASES if c.kind == key.kind]
        means = {}
        for engine in CANDIDATES:
            times = [seconds(case, key.half, key.gradients, engine) for case in cases]
            if all(t is not None for t in times):
                means[engine] = torch.tensor(times, dtype=torch.float64).log().mean().exp().item()
        engines = sorted(means, key=means.get)
        # After the fastest one those that the reasoned table has: what the fastest cannot do, somebody must.
        engines += [e for e in TABLE[key] if e not in engines]
        rows.append({"kind": key.kind, "half": key.half, "gradients": key.gradients, "engines": engines})
        precision = "half" if key.half else "float32"
        times = ", ".join(f"{e} {1e6 * means[e]:.0f} µs" for e in engines if e in means)
        report(f"{key.kind:<27} {precision:<8} {'training' if key.gradients else 'forward':<9} {times}")
    return rows


def measure(case: Case, half: bool, gradients: bool, engine: str, rounds: int = 20) -> float | None:
    """Seconds of a case on the GPU, the median of ``rounds``; None where the engine cannot do it."""
    from mmfast.fusion import triton as fused

    dtype = torch.bfloat16 if half else torch.float32

    def randn(rows: int) -> Tensor:
        x = torch.randn(case.batch, rows, case.heads, case.dim, device="cuda", dtype=dtype)
        return x.transpose(1, 2).requires_grad_(gradients)

    query = randn(case.rows)
    lengths = torch.arange(1, case.batch + 1, device="cuda") * case.keys[0] // case.batch if case.masked else None
    sources = [Source(randn(n), randn(n), lengths=lengths) for n in case.keys]
    if case.fusion == "decoupled":
        sources[1:] = [s._replace(gate=0.5) for s in sources[1:]]
    if not able(engine, query, sources, case.fusion, False):
        return None
    tensors = [query, *keys_and_values(sources)]
    incoming = torch.randn_like(query)

    def call() -> None:
        out = fused.run(engine, query, sources, fusion=case.fusion, scale=case.dim**-0.5, is_causal=False).out
        if gradients:
            torch.autograd.grad(out, tensors, incoming)

    times = []
    try:
        for _ in range(3 + rounds):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            stop.record()
            stop.synchronize()
            times.append(start.elapsed_time(stop) / 1e3)
    except RuntimeError:  # a kernel that this GPU or torch does not have, or one that needs more memory than there is
        return None
    return sorted(times[3:])[rounds // 2]


def to_json(device: str, table: list[dict]) -> str:
    return json.dumps({"device": device, "table": table}, indent=1) + "\n"


def tune_here(report: Callable[[str], None] = print) -> Path:
    """Measures the table on the current GPU and keeps it.

    Raises:
        RuntimeError: there is no GPU.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("mmfast tune fusion needs a GPU that torch can use")
    path = cache_file()
    table = tune(measure, report)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(to_json(torch.cuda.get_device_name(), table))
    _measured.cache_clear()
    return path


def sdpa(query: Tensor, source: Source, scale: float, is_causal: bool) -> Tensor:
    batch = batch_of(query, [source])
    query, scale, _ = positive_scale(query, scale)
    query, key, value = (x.expand(batch, -1, -1, -1) for x in (query, source.key, source.value))
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, is_causal=is_causal, scale=scale, enable_gqa=grouped)


@cache
def _measured(index: int) -> bool:
    """Reads the table measured on this GPU, if there is one, when it is first asked for: importing asks no GPU."""
    path = cache_file(index)
    try:
        if path.exists():
            read(path)
            return True
    except (OSError, ValueError, KeyError, TypeError) as error:
        warnings.warn(f"the table of `mmfast tune fusion` cannot be read: {error}", stacklevel=2)
    return False
