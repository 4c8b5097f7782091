"""Sizes of the launches of `triton_short`: tiles of keys, blocks of queries, how many programs there are and what each
holds."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from mmfast.fusion._inputs import Source
from mmfast.fusion.routes_cuda import power_of_two, tiles_of
from mmfast.fusion.triton_tiles import capability, multiprocessors, roomy, shared_memory

SUM = 6  # blocks of queries that take as long as it takes to write and add up the sums of a program, by bytes
KEPT = 128  # keys of a softmax whose scores, or weights and gradients, are kept in registers until their sum is known


def widths_together(layout: dict) -> list[int]:
    """For each tile the widths of its softmax added up."""
    tiles = list(zip(layout["WIDE"], layout["FIRST"], strict=True))
    return [sum(w for w, f in tiles if f == of) for of in layout["FIRST"]]


def lay_out(query: Tensor, sources: Sequence[Source], joint: bool) -> dict:
    """The tiles of all sources in a row: their source, start, width, whether all of their keys certainly exist, and the
    first and last tile of their softmax."""
    of, start, width, full = [], [], [], []
    for j, source in enumerate(sources):
        for s, w in tiles_of(source.key.shape[2], query.dtype):
            of.append(j)
            start.append(s)
            width.append(w)
            full.append(source.lengths is None and s + w <= source.key.shape[2])
    together = [list(range(len(of))) if joint else [t for t, other in enumerate(of) if other == j] for j in of]
    return {
        "OF": tuple(of),
        "START": tuple(start),
        "WIDE": tuple(width),
        "FULL": tuple(full),
        "FIRST": tuple(tiles[0] for tiles in together),
        "LAST": tuple(tiles[-1] for tiles in together),
        "BD": power_of_two(query.shape[3]),
        "BV": power_of_two(sources[0].value.shape[3]),
    }


def grid_of(query: Tensor, batch: int, block: int, programs: int) -> tuple[int, int]:
    """(chunks, blocks in each) of the queries of one head: about ``programs`` programs in all, if they are so many."""
    heads, rows = query.shape[1:3]
    of = triton.cdiv(rows, block)
    blocks = triton.cdiv(of, min(of, triton.cdiv(programs, batch * heads)))
    return triton.cdiv(of, blocks), blocks


def grid_of_sums(query: Tensor, batch: int, block: int, programs: int) -> tuple[int, int]:
    """The same where ``programs`` run at once, and each writes sums that are added up, in the time of some blocks."""
    heads, rows = query.shape[1:3]
    extra = SUM if query.dtype != torch.float32 else min(SUM, 1)  # where products are three a block takes long
    return soonest(triton.cdiv(rows, block), batch * heads, programs, extra)


@cache
def soonest(of: int, items: int, programs: int, extra: int) -> tuple[int, int]:
    def in_turn(chunks: int) -> int:
        return triton.cdiv(items * chunks, programs) * (triton.cdiv(of, chunks) + (chunks > 1) * extra)

    blocks = triton.cdiv(of, min(range(1, min(of, 64) + 1), key=in_turn))
    return triton.cdiv(of, blocks), blocks


def holds(query: Tensor, block: int) -> bool:
    """Whether a program holds keys and values, or reads them for each block of queries, from a cache.

    Matrix units that read their operands from shared memory (Hopper's, in half precisions, of 64 rows at least) leave
    them there; others want them in registers, in each warp, where there is no room for all of them.
    """
    return query.dtype != torch.float32 and block >= 64 and capability(query.device) >= (9, 0)


def _block(query: Tensor, largest: int) -> int:
    return min(largest, power_of_two(query.shape[2]))


def shared_bytes(
    layout: dict, size: int, block: int, held: bool, stages: int, backward: bool, saved: bool = False
) -> int:
    """Bytes of shared memory that a kernel takes at most, of elements of ``size`` bytes, read off compiled kernels.

    A loop in several stages has all that it reads in memory, once for each stage but the last: rows of queries and, if
    they are not held, of keys and values, although these stay the same. In one stage nothing is held twice, and less
    than this is taken.
    """
    wide, widest = layout["BD"] + layout["BV"], max(layout["WIDE"], default=0)
    of_keys = sum(layout["WIDE"]) * wide
    passing = block * (wide + saved * layout["BV"] if backward else layout["BD"])
    ahead = max(stages - 1, 1)
    total = ahead * passing + (1 if held else ahead) * of_keys
    if not (held and backward):  # operands in other forms: of a tile of keys and values, of queries
        total += 2 * widest * max(layout["BD"], layout["BV"]) + block * (wide if backward else layout["BD"])
    if backward:  # weights and their gradients
        total += 2 * block * widest
    return total * size + 1024  # sums of rows


def stages_for(query: Tensor, layout: dict, block: int, most: int, backward: bool, saved: bool = False) -> int:
    """As many as there is shared memory for, up to ``most``."""
    held, size = holds(query, block), query.element_size()
    while most > 1 and shared_bytes(layout, size, block, held, most, backward, saved) > shared_memory(query.device):
        most -= 1
    return most


class Sizes(NamedTuple):
    """Of a launch: rows of a block, programs in all, warps, stages and registers of a thread, if they are limited."""

    block: int
    programs: int
    warps: int
    stages: int
    registers: int | None = None


def forward_sizes(query: Tensor, layout: dict, lean: bool) -> Sizes:
    """``lean``: nothing is added to scores that would need registers of its own.

    Measured on an H100 for SD 1.5, SDXL and LTX-2, µs, without a limit of registers, which left three programs to a
    multiprocessor: of 2 or 8 programs and 3 stages 51, 59, 85, 38 and 55, 64, 86, 36; with 2 stages and 8 programs 60,
    63, 98, 36; blocks of 128 rows are no better anywhere. Of the same instructions in 128 registers four run at once.
    """
    block, at_once = _block(query, 64), multiprocessors(query.device)
    wide = max(widths_together(layout), default=0)
    if lean and holds(query, block) and max(layout["BD"], layout["BV"]) <= 64 and wide <= KEPT:
        held = 2 * 64 * (2 * sum(layout["WIDE"]) + block)  # keys, values, and the output on its way to its rows
        for stages in (3, 2):  # blocks of queries
            if held + stages * 2 * 64 * block <= 56 * 1024:
                return Sizes(block, 4 * at_once, 4, stages, 128)
    programs = (8 if max(layout["WIDE"], default=0) == 128 else 2) * at_once
    return Sizes(block, programs, 4, stages_for(query, layout, block, 3, False))


def backward_sizes(query: Tensor, layout: dict, saved: bool) -> Sizes:
    """Of programs those that run at once; ``saved``: the output is.

    As above: 2 stages take 148 µs instead of 175 for SD 1.5, 82 instead of 91 for LTX-2, but 281 instead of 231 for two
    softmaxes, whose tiles are computed at once.
    """
    # Eight warps only where both products of a tile, by queries and by keys, have 128 rows: of 64, one group of four
    # warps would compute what the other does.
    wide = layout["BD"] + layout["BV"]
    block = 64 if wide <= (256 if query.dtype != torch.float32 else 128) else 32
    if block == 64 and max(layout["WIDE"], default=0) == 128 and roomy(query.device):
        block = 128
    block = _block(query, block)
    programs = multiprocessors(query.device) * (1 if block == 128 else 2)
    stages = stages_for(query, layout, block, 2 if saved or block == 128 else 1, True, saved)
    return Sizes(block, programs, 8 if block == 128 else 4, stages)
