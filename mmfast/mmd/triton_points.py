"""Features in the form the Triton kernels take them, and the sizes of their tiles."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmfast._launch import launch_as_given
from mmfast.mmd import triton_prepare, triton_tuning
from mmfast.mmd.reference import middle
from mmfast.mmd.terms import DOT, L1, METRIC, ROOTS
from mmfast.mmd.triton_tuning import Sizes

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

FEW = 16  # features up to which squared distances are summed difference by difference
MAX_SCALE = 60
_TRITON = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32, torch.float64: tl.float64}

# How a layer's pairs are measured.
BY_PRODUCTS, NEAR_EXACT, BY_DIFFERENCES, BY_L1, BY_DOT = range(5)


def triton_type(dtype: torch.dtype) -> tl.dtype:
    return _TRITON[dtype]


@dataclass(frozen=True)
class Format:
    """What points and kept tiles are stored in: ``type`` in ``parts``; ``raw`` neither centred nor scaled."""

    type: torch.dtype
    parts: int
    kept_parts: int
    compute: torch.dtype
    raw: bool = False
    scaled: bool = False

    @property
    def rounds(self) -> bool:
        return self.parts == 1 and not self.raw and self.type != torch.float64


def format_of(dtypes: Sequence[torch.dtype], precision: str) -> Format:
    """float16 parts for float32, half precisions as they are, float64 in float64."""
    kinds = set(dtypes)
    compute = torch.float64 if torch.float64 in kinds else torch.float32
    if compute == torch.float64:
        return Format(torch.float64, 1, 1, compute)
    if len(kinds) == 1 and torch.float32 not in kinds:
        return Format(dtypes[0], 1, 2, compute, raw=True)
    if precision == "bfloat16":
        return Format(torch.bfloat16, 1, 1, compute)
    parts = 2 if precision == "float32" else 1
    return Format(torch.float16, parts, parts, compute, scaled=True)


@dataclass(frozen=True)
class Layout:
    """The layers of a kernel, or of two kernels of the same points: ``second`` is the first layer of the second one."""

    dims: tuple[int, ...]
    families: tuple[int, ...]
    begins: tuple[int, ...]  # of each layer's terms, and their number
    second: int
    order: tuple[int, ...]  # of the rows of the parameters

    @property
    def layers(self) -> int:
        return len(self.dims)

    @property
    def how(self) -> tuple[int, ...]:
        return tuple(self._how(layer) for layer in range(self.layers))

    def terms(self, layer: int) -> tuple[int, ...]:
        return self.families[self.begins[layer] : self.begins[layer + 1]]

    def _how(self, layer: int) -> int:
        families = self.terms(layer)
        metric = METRIC[families[0]]
        if metric == DOT:
            return BY_DOT
        if metric == L1:
            return BY_L1
        if self.dims[layer] <= FEW:
            return BY_DIFFERENCES
        return NEAR_EXACT if any(f in ROOTS for f in families) else BY_PRODUCTS

    @property
    def ladders(self) -> tuple[bool, ...]:
        """Layers whose terms are exponentials of the same measure, of which one may give the others."""
        return tuple(set(self.terms(layer)) <= {0} or set(self.terms(layer)) <= {6} for layer in range(self.layers))


def layout(*kernels: tuple[Sequence[int], Sequence[int], Sequence[int]]) -> Layout:
    """From (dims, families, layers) of one kernel, or of two."""
    dims, families, begins, order, seen = [], [], [0], [], 0
    for kernel_dims, kernel_families, kernel_layers in kernels:
        for layer in range(len(kernel_dims)):
            rows = [t for t, of in enumerate(kernel_layers) if of == layer]
            order += [seen + t for t in rows]
            families += [kernel_families[t] for t in rows]
            begins.append(len(families))
        dims += kernel_dims
        seen += len(kernel_families)
    second = len(kernels[0][0])
    return Layout(tuple(dims), tuple(families), tuple(begins), second, tuple(order))


@dataclass
class Points:
    """Prepared rows: of one sample, or of two, the second from row ``second`` on."""

    hi: Tensor
    lo: Tensor
    norms: Tensor
    cols: Tensor
    rows: int
    width: int
    n: int
    second: int
    m: int
    widths: tuple[int, ...]

    @property
    def segments(self) -> tuple[int, int, int]:
        return self.n, self.second, self.m


@dataclass
class Scales:
    """What is taken from the points, ``mean`` (b, D), and multiplied: ``scales``, ``inverses``, ``factors`` (b, L)."""

    mean: Tensor
    scales: Tensor
    inverses: Tensor
    factors: Tensor
    centred: tuple[bool, ...]


def scales_of(samples: Sequence[Tensor], dims: Sequence[int], how: Sequence[int], kind: Format, sizes: Sizes) -> Scales:
    """Of samples (b, n, D) whose pairs are looked at together."""
    b, device, layers = samples[0].shape[0], samples[0].device, len(dims)
    centred = tuple(not kind.raw and h in (BY_PRODUCTS, NEAR_EXACT, BY_DIFFERENCES) for h in how)
    total = sum(dims)
    if any(centred):
        mean = middle(samples, kind.compute)[:, 0]
        if not all(centred):
            parts = mean.split(list(dims), 1)
            mean = torch.cat([p if c else torch.zeros_like(p) for p, c in zip(parts, centred, strict=True)], 1)
    else:
        mean = torch.zeros(b, total, dtype=kind.compute, device=device)
    mean = mean.contiguous()
    if not kind.scaled:
        ones = torch.ones(b, layers, dtype=kind.compute, device=device)
        return Scales(mean, ones, ones, ones, centred)
    blocks = [triton.cdiv(s.shape[1], sizes.block) for s in samples]
    most = torch.empty(b, layers, sum(blocks), dtype=kind.compute, device=device)
    for i, (s, many) in enumerate(zip(samples, blocks, strict=True)):
        if many:
            launch_as_given(
                triton_prepare.extents, (many * b,),
                (s, mean, most, s.shape[1], *s.stride(), many, sum(blocks[:i]), sum(blocks)),
                dict(DIMS=tuple(dims), BLOCK=sizes.block, STEP=sizes.step, ACC=triton_type(kind.compute)),
            )  # fmt: skip
    scales, inverses, factors = (torch.empty(b, layers, dtype=kind.compute, device=device) for _ in range(3))
    if scales.numel():
        launch_as_given(
            triton_prepare.powers,
            (b * layers,),
            (most, scales, inverses, factors, sum(blocks)),
            dict(MOST=MAX_SCALE, LANES=16 if INTERPRETED else 1024),
        )
    return Scales(mean, scales, inverses, factors, centred)


def padded(count: int, block: int) -> int:
    return -(-count // block) * block


def allocate(
    b: int, n: int, m: int, dims: Sequence[int], how: Sequence[int], kind: Format, sizes: Sizes, device
) -> Points:
    """Room for rows of one sample, or of two with m > 0."""
    widths = tuple(padded(max(d, 1), sizes.step) for d in dims)
    second = padded(n, sizes.block)
    rows, width = second + padded(m, sizes.block), sum(widths)

    def empty(*shape: int, dtype: torch.dtype = kind.type) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    hi = empty(b, rows, width)
    lo = empty(b, rows, width) if kind.parts == 2 else hi
    norms = empty(b, len(dims), rows, dtype=kind.compute)
    cols = norms
    if any(h in (NEAR_EXACT, BY_DIFFERENCES, BY_L1) for h in how):
        cols = empty(b, sum(dims), rows, dtype=kind.compute)
    return Points(hi, lo, norms, cols, rows, width, n, second, m, widths)


def fill(
    points: Points, x: Tensor, first: int, scales: Scales, dims: Sequence[int], kind: Format, sizes: Sizes,
    before: tuple[int, int] = (0, 0),
) -> None:  # fmt: skip
    """Prepares the rows of ``x`` from row ``first`` on: ``before``: the layers and the columns that others take."""
    b, n = x.shape[:2]
    if not n:
        return
    layer, column = before
    widths = points.widths[layer : layer + len(dims)]
    blocks = triton.cdiv(n, sizes.block)
    cols = points.cols is not points.norms
    launch_as_given(
        triton_prepare.prepare, (blocks * b,),
        (
            x, scales.mean, scales.scales, points.hi, points.lo, points.norms, points.cols, n, *x.stride(), first,
            points.rows, points.width, sum(points.widths[:layer]), points.cols.shape[1], column, points.norms.shape[1],
            layer, blocks,
        ),
        dict(
            DIMS=tuple(dims), WIDTHS=widths, CENTRED=scales.centred, SPLIT=kind.parts, OWN=kind.rounds, COLS=cols,
            BLOCK=sizes.block, STEP=sizes.step, TYPE=triton_type(kind.type), ACC=triton_type(kind.compute),
        ),
    )  # fmt: skip


_forced: Sizes | None = None


def use(sizes: Sizes | None) -> None:
    """These sizes for everything, or again those of the table: for `mmfast tune mmd` and tests."""
    global _forced
    _forced = sizes


def sizes_for(x: Tensor, width: int, kind: Format) -> Sizes:
    return _forced or triton_tuning.sizes(x.device, width, kind.type, kind.parts)
