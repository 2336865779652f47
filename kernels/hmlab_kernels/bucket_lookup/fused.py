"""The bucket lookup in Triton: one program per few queries and head, from code to ranked slots without a pass between.

A lane per table and probe runs the binary search; its bucket's run of keys becomes columns of candidates, which are
sorted to drop duplicates, scored against gathered rows of k, and ranked. What it costs is mostly those rows.
Deterministic.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _packing
from .._launch import block_dim, on, unit_stride
from ..topk_blocks import ranking

_NO_SLOT = tl.constexpr(2**31 - 1)
# Beyond, the columns of one query would no longer fit in registers.
_MOST_CANDIDATES = 256


def sizes(lanes: int, each: int, dim: int, picks: int) -> dict[str, int]:
    """Sizes of a tile: some 256 candidates, with as many features of their keys at a time as stay in registers."""
    lane = triton.next_power_of_2(lanes)
    keep = max(2, triton.next_power_of_2(picks))
    run = max(triton.next_power_of_2(each), triton.cdiv(keep, lane))
    columns = lane * run
    queries = max(1, 256 // columns)
    return {
        "QUERIES": queries,
        "LANES": lane,
        "RUN": run,
        "KEEP": keep,
        "FEATURES": min(block_dim(dim), max(8, 8192 // (queries * columns))),
    }


def forward(q: Tensor, codes: Tensor, k: Tensor, keys: Tensor, bias: Tensor | None, available: Tensor | None,
            oldest: Tensor | None, cu_seqlens: Tensor | None, cu_slots: Tensor | None, picks: int, candidates: int,
            scale: float) -> tuple[Tensor, Tensor, Tensor]:
    if candidates > _MOST_CANDIDATES:
        raise ValueError(f"candidates: 'fused' expected at most {_MOST_CANDIDATES}, got {candidates}")
    batch, time, heads, dim = q.shape
    tables, probes = codes.shape[3:]
    each = candidates // (tables * probes)
    owner = None
    if cu_seqlens is not None:
        bounds = _packing.sequences(batch, time, cu_seqlens, q.device).bounds
        cu_slots = _packing.sequences(batch, k.shape[1], cu_slots, q.device, name="cu_slots").bounds
        owner = torch.searchsorted(bounds[1:].contiguous(), torch.arange(time, device=q.device), right=True)
    index = torch.full((batch, time, heads, picks), -1, dtype=torch.int32, device=q.device)
    score = torch.full(index.shape, -torch.inf, dtype=torch.float32, device=q.device)
    found = index.new_zeros(index.shape[:-1])
    if not index.numel() or not k.numel():
        return index, score, found
    q, k, keys = unit_stride(q), unit_stride(k), unit_stride(keys)
    size = sizes(tables * probes, each, dim, picks)
    with on(q):
        _lookup[(triton.cdiv(batch * time, size["QUERIES"]), heads)](
            q, codes, k, keys, bias, available, oldest, owner, cu_slots, index, score, found, scale, batch * time, time,
            k.shape[1], k.shape[1].bit_length(), heads // k.shape[2], dim, picks, each, tables * probes, probes,
            *q.stride()[:3], *codes.stride(), *k.stride()[:3], *keys.stride()[:3],
            *(bias.stride() if bias is not None else (0, 0, 0)),
            *(available.stride() if available is not None else (0, 0)),
            *(oldest.stride() if oldest is not None else (0, 0)),
            HAS_BIAS=bias is not None, HAS_AVAILABLE=available is not None, HAS_OLDEST=oldest is not None,
            PACKED=owner is not None, **size, num_warps=4,
        )  # fmt: skip
    return index, score, found


@triton.jit
def _lookup(
    q, codes, k, keys, bias, available, oldest, owner, cu_slots, index, score, found, scale, tokens, time, slots,
    search_steps, group_heads, dim, picks, each, lanes, probes, q_row, q_time, q_head, code_row, code_time, code_head,
    code_table, code_probe, k_row, k_slot, k_head, key_row, key_head, key_table, bias_row, bias_slot, bias_head,
    available_row, available_time, oldest_row, oldest_time, HAS_BIAS: tl.constexpr, HAS_AVAILABLE: tl.constexpr,
    HAS_OLDEST: tl.constexpr, PACKED: tl.constexpr, QUERIES: tl.constexpr, LANES: tl.constexpr, RUN: tl.constexpr,
    KEEP: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    COLUMNS: tl.constexpr = LANES * RUN
    token = tl.program_id(0).to(tl.int64) * QUERIES + tl.arange(0, QUERIES)
    real = token < tokens
    row, at = token // time, token % time
    head = tl.program_id(1).to(tl.int64)
    kv_head = head // group_heads
    if PACKED:
        sequence = tl.load(owner + token, mask=real, other=0)
        first = tl.load(cu_slots + sequence, mask=real, other=0)
        last = tl.load(cu_slots + sequence + 1, mask=real, other=0)
    else:
        first = tl.zeros([QUERIES], tl.int64)
        last = first + slots
    limit = last - first
    if HAS_AVAILABLE:
        may = tl.load(available + row * available_row + at * available_time, mask=real, other=0).to(tl.int64)
        limit = tl.minimum(limit, tl.maximum(may, 0))

    # The bucket's slots that may be read end where the first that may not would be.
    lane = tl.arange(0, LANES)
    asks = real[:, None] & (lane < lanes)[None, :]
    table = (lane // probes).to(tl.int64)
    code_at = (row * code_row + at * code_time + head * code_head)[:, None]
    code_at += (table * code_table + (lane % probes).to(tl.int64) * code_probe)[None, :]
    code = tl.load(codes + code_at, mask=asks, other=0).to(tl.int64)
    bound = (code << 32) + limit[:, None]
    base = keys + (row * key_row + kv_head * key_head)[:, None] + (table * key_table)[None, :]
    low = tl.broadcast_to(first[:, None], [QUERIES, LANES])
    high = tl.broadcast_to(last[:, None], [QUERIES, LANES])
    for _ in range(0, search_steps):
        middle = (low + high) // 2
        open_ = asks & (low < high)
        below = open_ & (tl.load(base + middle, mask=open_, other=0) < bound)
        low = tl.where(below, middle + 1, low)
        high = tl.where(below, high, middle)

    newest = tl.arange(0, RUN)
    place = low[:, :, None] - 1 - newest[None, None, :].to(tl.int64)
    inside = asks[:, :, None] & (place >= first[:, None, None]) & (newest < each)[None, None, :]
    key = tl.load(base[:, :, None] + place, mask=inside, other=0)
    named = key & 0xFFFFFFFF
    member = inside & ((key >> 32) == code[:, :, None]) & (named < limit[:, None, None])
    if HAS_OLDEST:  # the newest were taken first, so nothing that may be read was passed over
        least = tl.load(oldest + row * oldest_row + at * oldest_time, mask=real, other=0)
        member = member & (named >= least.to(tl.int64)[:, None, None])
    slot = tl.where(member, named.to(tl.int32), _NO_SLOT)

    # Equal neighbours of the sorted candidates came from several tables.
    slot = tl.sort(tl.reshape(slot, [QUERIES, COLUMNS]))
    column = tl.arange(0, COLUMNS)[None, :]
    before = tl.gather(slot, tl.broadcast_to(tl.maximum(column - 1, 0), [QUERIES, COLUMNS]), axis=1)
    fresh = (slot != _NO_SLOT) & ((column == 0) | (slot != before))
    tl.store(found + token * tl.num_programs(1) + head, tl.sum(fresh.to(tl.int32), 1), mask=real)

    x = tl.zeros([QUERIES, COLUMNS], tl.float32)
    at_slot = first[:, None] + slot
    key_at = row[:, None] * k_row + at_slot * k_slot + kv_head * k_head
    for start in range(0, dim, FEATURES):
        feature = start + tl.arange(0, FEATURES)
        query = tl.load(
            q + (row * q_row + at * q_time + head * q_head)[:, None] + feature[None, :],
            mask=real[:, None] & (feature < dim)[None, :], other=0.0,
        )  # fmt: skip
        read = tl.load(
            k + key_at[:, :, None] + feature[None, None, :],
            mask=fresh[:, :, None] & (feature < dim)[None, None, :], other=0.0,
        )  # fmt: skip
        x += tl.sum(read.to(tl.float32) * query.to(tl.float32)[:, None, :], 2)
    x = x * scale
    if HAS_BIAS:
        bias_at = row[:, None] * bias_row + at_slot * bias_slot + kv_head * bias_head
        x += tl.load(bias + bias_at, mask=fresh, other=0.0).to(tl.float32)
    best = tl.topk(ranking.pack(tl.where(fresh, x, float("-inf")), slot), KEEP)
    rank = tl.arange(0, KEEP)[None, :]
    to = (token * tl.num_programs(1) + head)[:, None] * picks + rank
    wanted = real[:, None] & (rank < picks)
    tl.store(index + to, ranking.place(best), mask=wanted)
    tl.store(score + to, ranking.score(best), mask=wanted)
