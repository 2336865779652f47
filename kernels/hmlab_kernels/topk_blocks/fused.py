"""Block votes in Triton: one pass over the slots per tile of sets, keeping the best blocks so far in registers.

Rows of a tile are the voters and heads of its sets; their scores come from one product with a tile of slots, and are
summed over voters, heads and the slots of a block at once. Nothing of size sets × blocks is written. Where there are
few sets, the slots are divided among programs and a second kernel merges their best. Deterministic.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _packing
from .._launch import block_dim, dot, on, unit_stride
from . import ranking, sets

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Programs that fill a large GPU twice; with fewer the slots are divided.
_PROGRAMS = 264
_MOST_SPLITS = 16


def sizes(count: int, members: int, dim: int, slot_block: int, picks: int) -> dict[str, int]:
    """Sizes of a tile. count: sets of a sequence; members: voters x heads of a set.

    128 rows read each slot often enough for its bytes to hide behind the work; with 64 slots, scores and operands
    stay in registers and shared memory. Wider heads get less of both.
    """
    width = block_dim(dim)
    most_rows = max(16, min(128, 128 * 128 // width))
    columns = max(16, min(64, 64 * 128 // width))
    rows = min(most_rows, triton.next_power_of_2(members))
    part = min(columns, triton.next_power_of_2(slot_block))
    blocks = columns // part
    keep = max(2, triton.next_power_of_2(picks))
    # As many sets as fill the rows; fewer where their rankings would not stay in registers.
    tile_sets = min(triton.next_power_of_2(max(count, 1)), most_rows // rows, 4096 // blocks, 2048 // keep)
    return {
        "SETS": max(1, 16 // rows, tile_sets),
        "ROWS": rows,
        "ROW_TILES": triton.cdiv(members, rows),
        "BLOCKS": blocks,
        "PART": part,
        "PARTS": triton.cdiv(slot_block, part),
        "KEEP": keep,
        "BLOCK_DIM": width,
    }


def forward(q: Tensor, k: Tensor, bias: Tensor | None, visible: Tensor | None, oldest: Tensor | None,
            cu_seqlens: Tensor | None, cu_slots: Tensor | None, picks: int, groups: int, query_block: int,
            slot_block: int, scale: float) -> tuple[Tensor, Tensor]:
    batch, time, heads, dim = q.shape
    slots, kv_heads = k.shape[1:3]
    packed = cu_seqlens is not None
    queries = _packing.sequences(batch, time, cu_seqlens, q.device)
    documents = queries.count if packed else 1
    count = sets.allocated(time, documents, query_block)
    index = torch.full((batch, count, groups, picks), -1, dtype=torch.int32, device=q.device)
    score = torch.full(index.shape, -torch.inf, dtype=torch.float32, device=q.device)
    keys = _packing.sequences(batch, slots, cu_slots, q.device, name="cu_slots")
    if not index.numel() or not k.numel():
        return index, score
    size = sizes(count, query_block * (heads // groups), dim, slot_block, picks)
    tiles = _tiles(queries.bounds, keys.bounds, visible, batch, count, size["SETS"], query_block, packed)
    q, k = unit_stride(q), unit_stride(k)
    slot_tiles = triton.cdiv(triton.cdiv(keys.longest, slot_block), size["BLOCKS"])
    splits = max(1, min(_PROGRAMS // (tiles.shape[0] * groups), slot_tiles // 2, _MOST_SPLITS))
    best = None
    if splits > 1:
        best = torch.empty(batch * count, groups, splits, size["KEEP"], dtype=torch.int64, device=q.device)
        best.fill_(ranking.EMPTY.value)
    with on(q):
        _votes[(tiles.shape[0], groups, splits)](
            q, k, bias, visible, oldest, tiles, index, score, best, scale, picks, dim,
            *q.stride()[:3], *k.stride()[:3], *(bias.stride() if bias is not None else (0, 0, 0)),
            *(visible.stride() if visible is not None else (0, 0)),
            *(oldest.stride() if oldest is not None else (0, 0)),
            QUERY_BLOCK=query_block, SLOT_BLOCK=slot_block, GROUP_HEADS=heads // groups,
            KV_GROUPS=groups // kv_heads, HAS_BIAS=bias is not None, HAS_VISIBLE=visible is not None,
            HAS_OLDEST=oldest is not None, SPLIT=splits > 1, **size,
            num_warps=8 if size["SETS"] * size["ROWS"] == 128 else 4,
        )  # fmt: skip
        if splits > 1:
            _merge[(batch * count * groups,)](
                best, index, score, splits, picks, SPLITS=triton.next_power_of_2(splits), KEEP=size["KEEP"], num_warps=1
            )
    return index, score


def _tiles(queries: Tensor, keys: Tensor, visible: Tensor | None, batch: int, count: int, tile_sets: int,
           query_block: int, packed: bool) -> Tensor:
    """What a program must know of its tile: batch row; first query and first slot of its sequence on their axes;
    number of its first set; how many sets; where they go in the output; how many slots hold all that may be read."""
    each = -(-queries.diff() // query_block)
    ends = (-(-each // tile_sets)).cumsum(0)
    at = torch.arange(batch * sets.allocated(count, queries.shape[0] - 1 if packed else 1, tile_sets),
                      device=queries.device)  # fmt: skip
    sequence = torch.searchsorted(ends, at, right=True)
    spare = sequence >= each.shape[0]  # packed tiles are as many as could be needed
    sequence = sequence.clamp(max=each.shape[0] - 1)
    first = tile_sets * (at - ends[sequence]) + tile_sets * -(-each[sequence] // tile_sets)
    holds = torch.where(spare, 0, (each[sequence] - first).clamp(max=tile_sets))
    reach = keys.diff()[sequence]
    if visible is not None:
        reach = sets.reach(visible.flatten(), keys, sequence, query_block * (first + holds - 1))
    reach = torch.where(holds > 0, reach, 0)
    row, begin, slot = (at * 0, queries[sequence], keys[sequence]) if packed else (sequence, at * 0, at * 0)
    output = (each.cumsum(0) - each)[sequence] + first
    return torch.stack([row, begin, slot, first, holds, output, reach], 1)


@triton.jit
def _votes(
    q, k, bias, visible, oldest, tiles, index, score, best_out, scale, picks, dim,
    q_row, q_time, q_head, k_row, k_slot, k_head, bias_row, bias_slot, bias_head, visible_row, visible_slot,
    oldest_row, oldest_time, QUERY_BLOCK: tl.constexpr, SLOT_BLOCK: tl.constexpr, GROUP_HEADS: tl.constexpr,
    KV_GROUPS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_VISIBLE: tl.constexpr, HAS_OLDEST: tl.constexpr,
    SPLIT: tl.constexpr, SETS: tl.constexpr, ROWS: tl.constexpr, ROW_TILES: tl.constexpr, BLOCKS: tl.constexpr,
    PART: tl.constexpr, PARTS: tl.constexpr, KEEP: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    # Later tiles read more slots: they start first.
    info = tiles + (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64) * 7
    row, begin, begin_slot = tl.load(info), tl.load(info + 1), tl.load(info + 2)
    first, holds, output = tl.load(info + 3), tl.load(info + 4), tl.load(info + 5)
    reach = tl.load(info + 6).to(tl.int32)
    group = tl.program_id(1).to(tl.int64)
    kv_head = group // KV_GROUPS
    k += row * k_row + begin_slot * k_slot + kv_head * k_head
    if HAS_BIAS:
        bias += row * bias_row + begin_slot * bias_slot + kv_head * bias_head
    if HAS_VISIBLE:
        visible += row * visible_row + begin_slot * visible_slot
    # The voters of a block of queries are the block before; the first has none.
    BEHIND: tl.constexpr = 0 if QUERY_BLOCK == 1 else 1
    q += row * q_row + (begin + (first - BEHIND) * QUERY_BLOCK) * q_time + group * GROUP_HEADS * q_head

    rows = tl.arange(0, SETS * ROWS)
    of_set = rows // ROWS
    has_voters = (of_set < holds) & (first + of_set >= BEHIND)
    from_query = QUERY_BLOCK * (first + of_set)  # what this query may read, the set may
    features = tl.arange(0, BLOCK_DIM)
    columns = tl.arange(0, BLOCKS * PART)

    member = rows % ROWS
    voter = of_set * QUERY_BLOCK + member // GROUP_HEADS
    votes = has_voters & (member < QUERY_BLOCK * GROUP_HEADS)
    if ROW_TILES == 1:  # the same rows at every step
        query = _query(q, voter, member % GROUP_HEADS, votes, q_time, q_head, dim, BLOCK_DIM)
    steps = tl.cdiv(tl.cdiv(reach, SLOT_BLOCK), BLOCKS)
    skipped = 0
    if HAS_OLDEST:
        at = oldest + row * oldest_row + (begin + from_query) * oldest_time
        least = tl.load(at, mask=of_set < holds, other=0).to(tl.int64)
        # Steps whose slots are too old for all sets are left out.
        skipped = tl.maximum(tl.min(tl.where(of_set < holds, least, 2**31), 0), 0) // (SLOT_BLOCK * BLOCKS)
        skipped = tl.minimum(skipped, steps).to(tl.int32)
    share = tl.cdiv(steps - skipped, tl.num_programs(2))
    start = skipped + tl.program_id(2) * share
    best = tl.full([SETS, KEEP], ranking.EMPTY, tl.int64)
    for step in range(start, tl.minimum(start + share, steps)):
        top = tl.full([SETS, BLOCKS], float("-inf"), tl.float32)
        total = tl.zeros([SETS, BLOCKS], tl.float32)
        for turn in range(0, ROW_TILES * PARTS):
            if ROW_TILES > 1:
                member = (turn // PARTS) * ROWS + rows % ROWS
                voter = of_set * QUERY_BLOCK + member // GROUP_HEADS
                votes = has_voters & (member < QUERY_BLOCK * GROUP_HEADS)
                query = _query(q, voter, member % GROUP_HEADS, votes, q_time, q_head, dim, BLOCK_DIM)
            within = (turn % PARTS) * PART + columns % PART
            slot = (step * BLOCKS + columns // PART) * SLOT_BLOCK + within
            there = (within < SLOT_BLOCK) & (slot < reach)
            key = tl.load(
                k + slot.to(tl.int64)[None, :] * k_slot + features[:, None],
                mask=there[None, :] & (features < dim)[:, None], other=0.0,
            )  # fmt: skip
            x = dot(query, key) * (scale * LOG2E)
            if HAS_BIAS:
                extra = tl.load(bias + slot.to(tl.int64) * bias_slot, mask=there, other=0.0).to(tl.float32)
                x += extra[None, :] * LOG2E
            seen = votes[:, None] & there[None, :]
            if HAS_VISIBLE:
                since = tl.load(visible + slot.to(tl.int64) * visible_slot, mask=there, other=0)
                seen = seen & (since[None, :] <= from_query[:, None])
            if HAS_OLDEST:
                seen = seen & (slot[None, :] >= least[:, None])
            x = tl.reshape(tl.where(seen, x, float("-inf")), [SETS, ROWS, BLOCKS, PART])
            higher = tl.maximum(top, tl.max(tl.max(x, 3), 1))
            base = tl.where(higher == float("-inf"), 0.0, higher)
            power = tl.exp2(x - base[:, None, :, None])
            # At least 1 from the first slot on.
            total = total * tl.exp2(top - base) + tl.sum(tl.sum(power, 3), 1)
            top = higher
        vote = tl.where(total > 0, (top + tl.log2(tl.maximum(total, 1.0))) * LN2, float("-inf"))
        block = step * BLOCKS + tl.arange(0, BLOCKS)
        new = ranking.pack(vote, tl.broadcast_to(block[None, :], [SETS, BLOCKS]))
        best = ranking.keep_best(best, new)

    number = tl.arange(0, SETS)
    rank = KEEP - 1 - tl.arange(0, KEEP)  # `best` rises
    to = (output + number)[:, None] * tl.num_programs(1) + group
    real = (number < holds)[:, None]
    if SPLIT:
        to = (to * tl.num_programs(2) + tl.program_id(2)) * KEEP + rank[None, :]
        tl.store(best_out + to, best, mask=real)
    else:
        to = to * picks + rank[None, :]
        wanted = real & (rank < picks)[None, :]
        tl.store(index + to, ranking.place(best), mask=wanted)
        tl.store(score + to, ranking.score(best), mask=wanted)


@triton.jit
def _query(q, voter, head, votes, q_time, q_head, dim, BLOCK_DIM: tl.constexpr):
    """Rows of a tile: a head of a voter each, zeros where there is none."""
    features = tl.arange(0, BLOCK_DIM)
    at = voter.to(tl.int64) * q_time + head.to(tl.int64) * q_head
    return tl.load(q + at[:, None] + features[None, :], mask=votes[:, None] & (features < dim)[None, :], other=0.0)


@triton.jit
def _merge(best_in, index, score, splits, picks, SPLITS: tl.constexpr, KEEP: tl.constexpr):
    """The best of what the programs of one set and group kept, each KEEP."""
    program = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, SPLITS * KEEP)[None, :]
    kept = tl.load(best_in + program * splits * KEEP + at, mask=at < splits * KEEP, other=ranking.EMPTY)
    best = tl.topk(kept, KEEP)
    rank = tl.arange(0, KEEP)[None, :]
    tl.store(index + program * picks + rank, ranking.place(best), mask=rank < picks)
    tl.store(score + program * picks + rank, ranking.score(best), mask=rank < picks)
