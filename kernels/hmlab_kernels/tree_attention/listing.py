"""Which nodes each tile of positions reads, listed in three small launches for all heads of the kernels in fused.py."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .levels import Level

_NEVER = 2**31 - 1  # the span of a level that is not there; no position reaches it


class Listed(NamedTuple):
    """Per tile of each row, the nodes it reads: `rows` (-1: none to read), and in `marks` the first position that sees
    the node, the first that no longer does, the level's span, and the node's place among the tile's edges (-1: only
    this tile reads it); `many` of them. before: nodes completed before each tile, `[batch, levels, tiles + 1]`."""

    rows: Tensor
    marks: Tensor
    many: Tensor
    before: Tensor
    table: Tensor
    tiles: int
    slots: int
    room: int


def list_nodes(position: Tensor, levels: Sequence[Level], arity: int, size: int, count: int) -> Listed:
    """Count what each tile completes, add up along the tiles, then write each tile's list. Nodes outside a table of
    `count` rows are not read."""
    batch, time = position.shape
    tiles, slots = triton.cdiv(time, size), sum(level.slots for level in levels)
    # A bound whatever the positions say; what lies behind the listed nodes is never touched.
    room = slots * (1 + size)
    table = _table(tuple(levels), arity, position.device)
    ints = {"dtype": torch.int32, "device": position.device}
    before = torch.empty(batch, table.shape[1], tiles + 1, **ints)
    shared = {"TILE": size, "LEVELS": table.shape[1]}
    _count[(batch * tiles,)](position, *position.stride(), table, before, time, tiles, **shared)
    before = before.cumsum(2, dtype=torch.int32)
    rows = torch.empty(batch * tiles, room, dtype=torch.int64, device=position.device)
    marks, many = torch.empty(batch * tiles, 4, room, **ints), torch.empty(batch * tiles, **ints)
    _columns[(batch * tiles,)](
        position, *position.stride(), table, before, rows, marks, many, time, tiles, room, slots, count,
        max((level.slots for level in levels), default=0), **shared,
    )  # fmt: skip
    return Listed(rows, marks, many, before, table, tiles, slots, room)


@lru_cache(maxsize=64)
def _table(levels: tuple[Level, ...], arity: int, device: torch.device) -> Tensor:
    """The fields of every level, its span, and how many slots the levels below it hold: `[8, levels]`."""
    columns, slots = [], 0
    for i, level in enumerate(levels):
        columns.append((*level, min(arity ** (i + 1), _NEVER), slots))
        slots += level.slots
    missing = triton.next_power_of_2(max(len(levels), 2)) - len(levels)
    columns += [(0, 0, 0, 0, 0, 0, _NEVER, slots)] * missing
    return torch.tensor(columns, dtype=torch.int64).T.contiguous().to(device, non_blocking=True)


@triton.jit
def field(table, index, level, LEVELS: tl.constexpr):
    """One field of `_table`: 0 to 5 as in Level, 6 the span, 7 the slots of the levels below."""
    return tl.load(table + index * LEVELS + level)


@triton.jit
def _completes(position, position_b, position_t, table, b, t, time, LEVELS: tl.constexpr):
    """Positions [TILE] in their documents, spans [LEVELS], and 1 where a position completes a node [TILE, LEVELS]."""
    p = tl.load(position + b * position_b + t * position_t, mask=t < time, other=0).to(tl.int32)
    span = field(table, 6, tl.arange(0, LEVELS), LEVELS).to(tl.int32)
    return p, span, ((p[:, None] % span[None, :] == 0) & (p[:, None] > 0)).to(tl.int32)


@triton.jit
def _count(position, position_b, position_t, table, counts, time, tiles, TILE: tl.constexpr, LEVELS: tl.constexpr):
    at = tl.program_id(0).to(tl.int64)
    b, tile = at // tiles, at % tiles
    level = tl.arange(0, LEVELS)
    t = tile * TILE + tl.arange(0, TILE)
    _, _, done = _completes(position, position_b, position_t, table, b, t, time, LEVELS)
    to = counts + (b * LEVELS + level) * (tiles + 1) + tile
    tl.store(to + 1, tl.sum(done, 0))
    tl.store(to, tl.zeros([LEVELS], tl.int32), mask=(tile + level * 0) == 0)


@triton.jit
def _columns(position, position_b, position_t, table, before, rows, marks, many, time, tiles, room, held, count, most,
             TILE: tl.constexpr, LEVELS: tl.constexpr):  # fmt: skip
    at = tl.program_id(0).to(tl.int64)
    b, tile = at // tiles, at % tiles
    level = tl.arange(0, LEVELS)
    here = tl.arange(0, TILE)
    p, span, done = _completes(position, position_b, position_t, table, b, tile * TILE + here, time, LEVELS)
    rank = tl.cumsum(done, 0)  # nodes completed in this tile so far
    new = tl.sum(done, 0)
    slots = field(table, 4, level, LEVELS).to(tl.int32)
    below = field(table, 7, level, LEVELS).to(tl.int32)
    start = tl.cumsum(slots * (1 + new), 0) - slots * (1 + new)
    tl.store(many + at, tl.sum(slots * (1 + new), 0))

    step = field(table, 2, level, LEVELS)
    base = field(table, 0, level, LEVELS) + b * field(table, 1, level, LEVELS)
    stride = field(table, 3, level, LEVELS)
    old = field(table, 5, level, LEVELS) - 1 + tl.load(before + (b * LEVELS + level) * (tiles + 1) + tile)
    # The node from before the tile; where there is none, or only another document's, its row is not read.
    sees = tl.max(((rank == 0) & (p[:, None] >= span[None, :])).to(tl.int32), 0)
    is_read = (sees > 0) & (old >= 0)
    t = here[:, None] + tl.zeros([TILE, LEVELS], tl.int32)
    rows += at * room
    begins = marks + at * 4 * room
    ends, spans, edges = begins + room, begins + 2 * room, begins + 3 * room
    for s in range(most):
        holds = s < slots
        first = start + s
        left = base + old * step + s * stride
        tl.store(rows + first, tl.where(is_read & (left < count), left, -1), mask=holds)
        tl.store(begins + first, tl.zeros([LEVELS], tl.int32), mask=holds)
        tl.store(ends + first + new * slots, tl.zeros([LEVELS], tl.int32) + TILE, mask=holds)
        tl.store(spans + first, span, mask=holds)
        tl.store(edges + first, below + s, mask=holds)
        column = first[None, :] + rank * slots[None, :]
        stored = (done > 0) & holds[None, :]
        node = base[None, :] + (old[None, :] + rank) * step[None, :] + s * stride[None, :]
        last = (held + below + s)[None, :]
        tl.store(rows + column, tl.where(node < count, node, -1), mask=stored)
        tl.store(begins + column, t, mask=stored)
        tl.store(ends + column - slots[None, :], t, mask=stored)
        tl.store(spans + column, span[None, :] + t * 0, mask=stored)
        tl.store(edges + column, tl.where(rank == new[None, :], last, -1), mask=stored)
