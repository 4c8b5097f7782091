"""Launches the kernels of quadratic forms of few features: five for a value, whatever the rows, and one for gradients.

All that depends on nothing but shapes is found once, in a `Plan`; see `mmfast.mmd.triton_narrow`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from mmfast import _backend
from mmfast._backend import on_device_of
from mmfast._launch import key_at, launch
from mmfast.mmd import small, triton_narrow, triton_settle, triton_tuning
from mmfast.mmd.bandwidth import least_length
from mmfast.mmd.triton_launch import processors
from mmfast.mmd.triton_points import (
    BY_DOT,
    BY_PRODUCTS,
    INTERPRETED,
    MAX_SCALE,
    Format,
    Layout,
    format_of,
    layout,
    padded,
    triton_type,
)
from mmfast.mmd.triton_small_launch import Launch, piece

MOST_FEATURES = 128
_BLOCK = 16 if INTERPRETED else 64  # rows that a program looks at at once
_LANES = 512 if INTERPRETED else 8192  # numbers of blocks of rows that one program looks at at once
_PARTS = 3 if INTERPRETED else 128  # of all rows, each surveyed by a program
_LONGEST = 2 if INTERPRETED else 128  # blocks of columns that are added up in one gradient
_CUT = 2 if INTERPRETED else 16  # blocks of columns from which on a strip is worth cutting
_SURVEYED, _SURVEY_WARPS = (16, 4) if INTERPRETED else (128, 8)  # rows that the survey looks at at once
_LEAST = least_length(torch.float32)


def takes(plan: Layout, kind: Format) -> bool:
    """One layer of few features, whose pairs are measured by products on tensor cores."""
    return (
        plan.layers == 1
        and plan.how[0] in (BY_PRODUCTS, BY_DOT)
        and plan.dims[0] <= MOST_FEATURES
        and kind.compute != torch.float64
    )


@dataclass(frozen=True)
class Sizes:
    """Of `narrow`: rows and columns of a program's tiles, options, and how many programs share a multiprocessor.

    With three stages points are on their way while pairs are evaluated; with two their loads come after them.
    """

    rows: int
    cols: int
    warps: int
    stages: int
    registers: int | None
    programs: int


_used: dict[bool, Sizes] = {}
_PAIR_ROWS, _PULL_ROWS, _PAIR_COLS, _PAIR_WIDTH = 192, 128, 128, 64  # of csrc/mmd/mmd_pairs.h and mmd_pairs_gradient.h
_PAIR_LEAST, _PAIR_MOST = 4096, 2**21  # points; their tiles are counted in 32 bits
_PAIR_SIZES = Sizes(64, 64, 4, 1, None, 4)  # of what is left to `narrow`
_PULL_SIZES = Sizes(_PULL_ROWS, 64, 8, 3, 128, 1)  # and with gradients, though one of the others' programs is alone
_pairs_wanted: dict[bool, bool] = {}


def use_pairs(values: bool | None, gradients: bool | None = None) -> None:
    """Leaves tiles to csrc/mmd/mmd_pairs.h, and with gradients to mmd_pairs_gradient.h, or keeps them, where None does
    as `mmfast tune mmd` has found."""
    _pairs_wanted.clear()
    _pairs_wanted.update((keep, way) for keep, way in ((False, values), (True, gradients)) if way is not None)
    _forget()


@functools.cache
def has_pairs(device: torch.device) -> bool:
    """Whether the extension has these kernels, which no sm_90 but its own can run."""
    return device.type == "cuda" and hasattr(_backend._C, "mmd_pairs") and _backend._C.mmd_has_pairs(device.index or 0)


def _leaves_pairs(
    of: Layout, kind: Format, width: int, terms: int, points: int, device: torch.device, keep: bool
) -> bool:
    """Off where nobody has measured: it is on for a GPU on which it has been the faster one, and right."""
    ladder = of.ladders[0] and terms <= triton_narrow.MOST_POWERS.value
    if not ladder or width != _PAIR_WIDTH or kind.type != torch.float16 or kind.parts != 2:
        return False
    if not _PAIR_LEAST <= points <= _PAIR_MOST or not has_pairs(device):
        return False
    return _pairs_wanted[keep] if keep in _pairs_wanted else triton_tuning.pairs(device, keep)


def use(value: Sizes | None, gradient: Sizes | None) -> None:
    """Takes these sizes in place of the table's, which None takes again: for measurements, with nothing in flight."""
    _used.clear()
    _used.update((keep, sizes) for keep, sizes in ((False, value), (True, gradient)) if sizes is not None)
    _forget()


def _forget() -> None:
    """Plans, and who had one by a kernel's numbers; a kernel keeps its own."""
    plan.cache_clear()
    small.forget()


def _sizes(width: int, gradient: bool, old: bool) -> Sizes:
    """``old``: before sm_90, where tensor cores take their operands from registers.

    Measured on an H200, 16 384 + 16 384 points of 64 features, µs: 524 for the value; 531 in tiles of 64 × 128 by four
    warps and of 64 × 64 by four programs, 591 by three, 620 in tiles of 128 × 128. With gradients 1803; 1721 in tiles
    of 64 × 64 by three programs, whose gradients differ by 1.2e-5, 1984 by four, 1919 by two, 2021 in tiles of 64 × 32.
    Rows' points from registers gained nothing (541; 1809).
    """
    if gradient in _used:
        return _used[gradient]
    if INTERPRETED:
        return Sizes(32, 16, 4, 1, None, 2)
    if width <= 64 and not (old and gradient):
        return Sizes(128, 64, 8, 3, 128, 2)
    return Sizes(64, 64, 4, 3 if width <= 64 else 2, None, 2)


def _strips(tiles: tuple[int, int], strip: int, gradient: bool) -> tuple[int, int, tuple[int, int], tuple[int, int]]:
    """Tiles of a long strip and of a short one, and how many of both there are of each sample, for ``tiles`` columns.

    Multiprocessors end apart by about a strip's time. So a part of the columns is cut small, and begun last: of each
    sample a quarter, or one strip where each costs a gradient to be added up.
    """
    most = max(tiles)
    if strip < _CUT:
        return strip, strip, tuple(triton.cdiv(t, strip) for t in tiles), (0, 0)
    short = max(1, strip // 4)
    rest = most - (short if gradient else max(short, most // 4))
    if rest <= 0:
        return short, short, tuple(triton.cdiv(t, short) for t in tiles), (0, 0)
    count = triton.cdiv(rest, strip)
    long = max(short, triton.cdiv(rest, count))
    longs = tuple(max(0, triton.cdiv(t - (most - rest), long)) for t in tiles)
    shorts = tuple(max(0, triton.cdiv(t - k * long, short)) for t, k in zip(tiles, longs, strict=True))
    return long, short, longs, shorts


@functools.cache
def _old(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0)


@dataclass(frozen=True, eq=False)
class Plan:
    """Of a batch: its launches, and where in the room that they share things begin, in bytes.

    What is left for the gradient is a room of its own: ``table`` (b, T, 4), and from ``grads`` on (strips, b, rows,
    width).
    """

    survey: Launch
    settle: Launch
    arrange: Launch
    narrow: Launch
    combine: Launch
    pieces: tuple[tuple[torch.dtype, tuple[int, ...], int], ...]  # dtype, shape and begin
    end: int
    table: tuple[int, int, int]
    grads: int
    parts: tuple[int, int, int, int]
    kept: int
    second: int
    pairs: tuple[int, ...]  # what csrc/mmd/mmd_pairs.h is told, if it has the tiles of values
    pulls: tuple[int, ...]  # and mmd_pairs_gradient.h, if it has those with gradients

    def scratch(self, room: Tensor) -> list[Tensor]:
        """``columns``, ``squares``, ``mean``, ``numbers``, ``hi``, ``lo``, ``norms``, ``totals``, ``pairs`` and
        ``done``."""
        return [piece(room, dtype, begin, *shape) for dtype, shape, begin in self.pieces]

    def of_gradient(self, room: Tensor) -> tuple[Tensor, Tensor]:
        """``table`` and ``grads``."""
        return piece(room, torch.float64, 0, *self.table), piece(room, torch.float32, self.grads, *self.parts)


@functools.lru_cache(maxsize=1024)
def plan(
    shape: tuple[int, int, int, int], strides: tuple[int, ...], dtype: torch.dtype, device: torch.device,
    families: tuple[int, ...], precision: str, counts: tuple[int, ...], keep: bool, all_sums: bool, diagonal: bool,
) -> Plan:  # fmt: skip
    """Of ``shape`` (b, n, m, d), and the strides of both samples; ``counts`` as `mmfast.mmd.small` has them."""
    b, n, m, d = shape
    of = layout(((d,), families, (0,) * len(families)))
    kind = format_of([dtype], precision)
    dot = of.how[0] == BY_DOT
    width, terms = max(16, triton.next_power_of_2(d)), len(families)
    leaves = not dot and _leaves_pairs(of, kind, width, terms, n + m, device, keep)
    by_pairs, by_pulls = leaves and not keep, leaves and keep
    sizes = (_PULL_SIZES if keep else _PAIR_SIZES) if leaves else _sizes(width, keep, _old(device))
    rows, cols = sizes.rows, sizes.cols
    tall, wide = (_PULL_ROWS if keep else _PAIR_ROWS) // rows, _PAIR_COLS // cols
    side = math.lcm(tall * rows, wide * cols) if leaves else max(rows, cols)
    options = {"num_warps": sizes.warps, "num_stages": sizes.stages, "maxnreg": sizes.registers}
    second = padded(n, side)
    every = second + padded(m, side)
    row_tiles, col_tiles, split = every // rows, every // cols, second // cols
    if keep:
        # As few as keep everyone at work: each leaves a gradient to be added up.
        slots = 2 if INTERPRETED else sizes.programs * processors(device)
        least = max(2, triton.cdiv(col_tiles, _LONGEST))
        wanted = min(range(least, least + 32), key=lambda s: (-(-b * row_tiles * s // slots) / s + 0.01 * s, s))
    else:
        # Enough to keep everyone at work, of which some end early.
        wanted = 2 if INTERPRETED else -(-16 * sizes.programs * processors(device) // max(1, b * row_tiles))
    strip = max(1, -(-col_tiles // wanted))
    if by_pairs:  # few tiles are left in a row
        long, short, (long_x, long_y), (short_x, short_y) = col_tiles, 1, (1, 1), (0, 0)
    elif by_pulls:  # whole tiles, each strip as long
        long, short, (short_x, short_y) = padded(strip, wide), 1, (0, 0)
        long_x, long_y = triton.cdiv(split, long), triton.cdiv(col_tiles - split, long)
    else:
        long, short, (long_x, long_y), (short_x, short_y) = _strips((split, col_tiles - split), strip, keep)
    shares = max(1, processors(device) // b) if by_pairs else 0
    strips = long_x + long_y + short_x + short_y
    each = padded(triton.cdiv(n + m, max(1, _PARTS // b)), _BLOCK)
    blocks_x = triton.cdiv(n, each)
    blocks = blocks_x + triton.cdiv(m, each)
    room = padded(7 + 4 * terms, 16)

    find, centred = counts[3] > 0, not kind.raw and not dot
    types, whole = {"DIM": d, "WIDTH": width}, {"CHUNKS": 1}
    tile = {"FAMILIES": families, "LADDER": of.ladders[0], "DOT": dot}
    parts = {"SPLIT": kind.parts, "TYPE": triton_type(kind.type)}
    points = (torch.float32, torch.float64, torch.float32, torch.float32, kind.type, kind.type, torch.float32)
    shapes = (
        (b, blocks, 4, width), (b, blocks), (b, width), (b, room), (b, every, width),
        (b, every, width) if kind.parts == 2 else (0,), (b, every), (b, row_tiles, strips), (b, shares, 3),
        (b, row_tiles, strips) if by_pulls else (0,),
    )  # fmt: skip
    pieces, end = [], 0
    for piece_type, piece_shape in zip((*points, torch.float64, torch.float64, torch.int32), shapes, strict=True):
        pieces.append((piece_type, piece_shape, end))
        size = piece_type.itemsize
        for side in piece_shape:
            size *= side
        end += padded(size, 16)  # each begins where Triton looks for it
    of_table = padded(8 * b * 4 * terms, 16)
    grads = (strips, b, every, width) if keep else (0, 1, 1, 1)
    size = grads[0] * grads[1] * grads[2] * grads[3] * 4
    return Plan(
        Launch(
            (blocks * b,), (n, m, *strides, blocks_x, blocks, each),
            {"FIND": find, **types, **whole, "BLOCK": _SURVEYED, "num_warps": _SURVEY_WARPS},
        ),
        Launch(
            (b,), (n, m, blocks_x, blocks, each, room, *counts),
            {
                **tile, "FIND": find, "LEAST": _LEAST, "CENTRED": centred, "SCALED": kind.scaled, "MOST": MAX_SCALE,
                **types, "LANES": _LANES // width, "num_warps": 16,
            },
        ),
        Launch(
            (every // _BLOCK * b,), (n, m, *strides, second, every, every // _BLOCK, room),
            {
                "CENTRED": centred, "SPLIT": kind.parts, "OWN": kind.rounds, **types, **whole, "COPIES": 0,
                "BLOCK": _BLOCK, "TYPE": parts["TYPE"], "num_warps": 4,
            },
        ),
        Launch(
            (row_tiles * strips * b,),
            (every, n, second, m, row_tiles, col_tiles, split, strips, long_x, long_y, short_x, b, long, short, room),
            {
                **tile, "GRAD": keep, "ALL": all_sums, "OWN": kind.raw, **parts,
                "KEEP_SPLIT": kind.kept_parts, "ROWS": rows, "COLS": cols, "WIDTH": width, "UPCAST": INTERPRETED,
                "TALL": tall if leaves else 0, "WIDE": wide if leaves else 0, **options,
            },
        ),
        Launch(
            (b,), (n, m, row_tiles, strips, second // rows, long_x, long_y, short_x, shares),
            {
                "COUNT": terms, "DIAGONAL": diagonal, "PAIRS": by_pairs, "LANES": 16 if INTERPRETED else 1024,
                "num_warps": 8,
            },
        ),
        tuple(pieces), end, (b, terms, 4), of_table, grads, of_table + size, second,
        (n, m, second, every, room, terms, shares, b, all_sums) if by_pairs else (),
        (n, m, second, every, room, terms, strips, long_x, long // wide, b, all_sums) if by_pulls else (),
    )  # fmt: skip


def forward(p: Plan, x: Tensor, y: Tensor, given: Tensor, coefs: Tensor, value: Tensor, sums: Tensor) -> Tensor:
    """Fills ``value`` and ``sums``; returns what the gradient needs, `Plan.of_gradient`."""
    room = torch.empty(p.end, dtype=torch.uint8, device=x.device)
    kept = torch.empty(p.kept, dtype=torch.uint8, device=x.device)
    begin, table = room.data_ptr(), kept.data_ptr()
    columns, squares, mean, numbers, hi, lo, norms, totals, pairs, done = (begin + at for _, _, at in p.pieces)
    at_x, at_y, at_given, at_coefs = x.data_ptr(), y.data_ptr(), given.data_ptr(), coefs.data_ptr()
    key = key_at(p, at_x, at_y, at_given, at_coefs)
    views = []

    def of(*names: int) -> list[Tensor]:
        """Tensors, where somebody looks at them; from 10 on what is kept."""
        if not views:
            views.extend((*p.scratch(room), *p.of_gradient(kept)))
        return [views[name] for name in names]

    to = p.survey
    launch(
        triton_settle.survey, to.grid, lambda: (x, y, *of(0, 1), *to.numbers), to.constants, key,
        (at_x, at_y, columns, squares, *to.numbers),
    )  # fmt: skip
    settle = p.settle
    launch(
        triton_settle.settle, settle.grid, lambda: (*of(0, 1), given, *of(2, 3, 10), *settle.numbers),
        settle.constants, key, (columns, squares, at_given, mean, numbers, table, *settle.numbers),
    )  # fmt: skip
    arrange = p.arrange
    launch(
        triton_settle.arrange, arrange.grid, lambda: (x, y, *of(2, 3, 4, 5, 6), *arrange.numbers), arrange.constants,
        key, (at_x, at_y, mean, numbers, hi, lo, norms, *arrange.numbers),
    )  # fmt: skip
    if p.pairs:
        _backend._C.mmd_pairs(hi, lo, norms, numbers, table, at_coefs, pairs, *p.pairs)
    if p.pulls:
        addresses = hi, lo, norms, numbers, table, at_coefs, totals, table + p.grads, done
        _backend._C.mmd_pairs_gradient(*addresses, *p.pulls)
    narrow = p.narrow
    launch(
        triton_narrow.narrow, narrow.grid, lambda: (*of(4, 5, 6, 3, 10), coefs, *of(7, 11, 9), *narrow.numbers),
        narrow.constants, key,
        (hi, lo, norms, numbers, table, at_coefs, totals, table + p.grads, done, *narrow.numbers),
    )  # fmt: skip
    combine = p.combine
    launch(
        triton_narrow.combine, combine.grid, lambda: (*of(7, 8), coefs, *of(10), sums, value, *combine.numbers),
        combine.constants, (key, value.dtype),
        (totals, pairs, at_coefs, table, sums.data_ptr(), value.data_ptr(), *combine.numbers),
    )  # fmt: skip
    return kept


def backward(
    p: Plan, kept: Tensor, by: Tensor | None, like_x: Tensor, like_y: Tensor, need: Sequence[bool],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of (b, n, d) and (b, m, d), times ``by`` (b) where it is given; empty where not needed."""
    grad_x, grad_y = (
        torch.empty(like.shape if needed else (0,), dtype=dtype, device=like.device)
        for like, needed in ((like_x, need[0]), (like_y, need[1]))
    )
    _, b, rows, width = p.parts
    (n, d), m = like_x.shape[-2:], like_y.shape[-2]
    first, last = 0 if need[0] else p.second // _BLOCK, (rows if need[1] else p.second) // _BLOCK
    blocks = last - first
    numbers = n, m, p.second, rows, p.parts[0], b, 0 if by is None or not by.dim() else by.stride(0), first, blocks
    grads, at = kept.data_ptr() + p.grads, kept if by is None else by
    launch(
        triton_narrow.finish, (blocks * b,), lambda: (p.of_gradient(kept)[1], at, grad_x, grad_y, *numbers),
        {"BY": by is not None, "DIM": d, "WIDTH": width, "BLOCK": _BLOCK, "num_warps": 4},
        (p, need[0], need[1], dtype, at.dtype, numbers[6], at.data_ptr() & 15),
        (grads, at.data_ptr(), grad_x.data_ptr(), grad_y.data_ptr(), *numbers),
    )  # fmt: skip
    return grad_x, grad_y


def quadratic(
    x: Tensor, y: Tensor, coefs: Tensor, params: Tensor, families: Sequence[int], precision: str, need: Sequence[bool],
    all_sums: bool, way: tuple[Callable, Callable, Callable] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Of batches: the value (b,), its sums (b, 3) over pairs with i != j, and its gradients, empty where not needed.

    ``way``: other functions than `plan`, `forward` and `backward` here.
    """
    find, compute, differentiate = way or (plan, forward, backward)
    x, y = x.detach(), y.detach()
    (b, n, d), m, device = x.shape, y.shape[1], x.device
    keep = bool(need[0] or need[1])
    strides = *x.stride(), *y.stride()
    p = find(
        (b, n, m, d), strides, x.dtype, device, tuple(families), precision, (0, 0, 0, 0), keep, all_sums, False
    )  # fmt: skip
    sums = torch.empty(b, 3, dtype=torch.float64, device=device)
    value = torch.empty(b, dtype=torch.float64, device=device)
    with on_device_of(x):
        kept = compute(p, x, y, params, coefs, value, sums)
        if keep:
            return value, sums, *differentiate(p, kept, None, x, y, need, torch.float32)
    return value, sums, *(torch.empty(0, dtype=torch.float32, device=device) for _ in range(2))
