"""Compressed segments in Triton: one program per segment and head, which holds all the tokens of its segment.

Slots and dims go through the program in tiles; with up to 32 slots (64 for segments of up to 64 tokens) and 128 dims
the loops over tiles have one round, and then the compiler leaves nothing computed or read twice. The backward pass
recomputes the shares from k and queries. There a program takes several segments one after another and adds up its own
part of the queries' gradient; the parts are summed in a fixed order, so that no atomics are needed: deterministic.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _launch

_PROGRAMS = 4096  # of the backward pass, about: a few for every place on the largest GPUs, and few parts to sum


def blocks(segment: int, most: int, dim: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Slots, tokens and dims of a program's tiles."""
    tokens = max(16, triton.next_power_of_2(segment))
    # Half a dozen tiles [slots, tokens] are live at once: 32 KiB of each at most, and of keys and values.
    slots = min(64 if tokens <= 64 else 32, max(16, triton.next_power_of_2(most)))
    return slots, tokens, min(_launch.block_dim(dim), 128, 32768 // (tokens * dtype.itemsize))


def forward(k: Tensor, v: Tensor, queries: Tensor, count: Tensor, first: Tensor | None, starts: Tensor, segment: int,
            scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, _, heads, dim = k.shape
    segments, most = len(starts), queries.shape[1]
    shape = (batch, segments, most, heads)
    slots_k, slots_v = (k.new_empty(*shape, dim) for _ in range(2))
    mass, position = (k.new_empty(shape, dtype=torch.float32) for _ in range(2))
    if slots_k.numel():
        k, v, queries = (_launch.unit_stride(x) for x in (k, v, queries))
        with _launch.on(k):
            _forward[batch * segments, heads](
                k, v, queries, count, first, starts, slots_k, slots_v, mass, position, segments, heads, scale,
                *k.stride()[:3], *v.stride()[:3], *queries.stride()[:2], *count.stride(), *_strides(first),
                HAS_FIRST=first is not None, **_sizes(segment, most, dim, k.dtype, 1),
            )  # fmt: skip
    return slots_k, slots_v, mass, position


def backward(k: Tensor, v: Tensor, queries: Tensor, count: Tensor, first: Tensor | None, starts: Tensor, segment: int,
             scale: float, grad_k: Tensor, grad_v: Tensor, grad_mass: Tensor, grad_position: Tensor
             ) -> tuple[Tensor, Tensor, Tensor]:
    batch, time, heads, dim = k.shape
    segments, most = len(starts), queries.shape[1]
    # Tokens of unfinished tails belong to no program.
    new = torch.empty if segments * segment == time else torch.zeros
    into_k, into_v = (new(k.shape, dtype=k.dtype, device=k.device) for _ in range(2))
    if not batch * segments * heads:
        return into_k, into_v, queries.new_zeros(queries.shape)
    each = triton.cdiv(batch * segments * heads, _PROGRAMS)
    parts = k.new_empty(triton.cdiv(batch * segments, each), heads, most, dim, dtype=torch.float32)
    k, v, queries = (_launch.unit_stride(x) for x in (k, v, queries))
    with _launch.on(k):
        _backward[parts.shape[0], heads](
            k, v, queries, count, first, starts, grad_k.contiguous(), grad_v.contiguous(), grad_mass.contiguous(),
            grad_position.contiguous(), into_k, into_v, parts, batch * segments, segments, time, heads, each, scale,
            *k.stride()[:3], *v.stride()[:3], *queries.stride()[:2], *count.stride(), *_strides(first),
            HAS_FIRST=first is not None, **_sizes(segment, most, dim, k.dtype, 2),
        )  # fmt: skip
    return into_k, into_v, parts.sum(0).to(queries.dtype)


def _strides(first: Tensor | None) -> tuple[int, int]:
    return (0, 0) if first is None else first.stride()


def _sizes(segment: int, most: int, dim: int, dtype: torch.dtype, accumulators: int) -> dict[str, int]:
    slots, tokens, dims = blocks(segment, most, dim, dtype)
    # The backward pass accumulates twice as much: more warps keep it in registers.
    warps = accumulators * (4 if tokens <= 64 else 8)
    return {"SEGMENT": segment, "MOST": most, "DIM": dim, "SLOTS": slots, "TOKENS": tokens, "BLOCK_DIM": dims,
            "num_warps": warps, "num_stages": 1}  # fmt: skip


@triton.jit
def _forward(
    k, v, queries, count, left_out, starts, slots_k, slots_v, mass, position, segments, heads, scale,
    k_batch, k_time, k_head, v_batch, v_time, v_head, query_head, query_slot, count_batch, count_segment, count_head,
    left_batch, left_segment, HAS_FIRST: tl.constexpr, SEGMENT: tl.constexpr, MOST: tl.constexpr, DIM: tl.constexpr,
    SLOTS: tl.constexpr, TOKENS: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    batch, g = n // segments, n % segments
    start = tl.load(starts + g)
    k += batch * k_batch + start * k_time + head * k_head
    v += batch * v_batch + start * v_time + head * v_head
    queries += head * query_head
    kept = _kept(count + batch * count_batch + g * count_segment + head * count_head, MOST)
    begin = _begin(left_out + batch * left_batch + g * left_segment) if HAS_FIRST else 0
    log_total = _log_total(
        k, k_time, queries, query_slot, begin, kept, scale, SEGMENT, MOST, DIM, SLOTS, TOKENS, BLOCK_DIM
    )
    token = tl.arange(0, TOKENS)
    for first in range(0, MOST, SLOTS):
        slot = first + tl.arange(0, SLOTS)
        logits = _logits(
            k, k_time, queries, query_slot, first, begin, kept, scale, SEGMENT, MOST, DIM, SLOTS, TOKENS, BLOCK_DIM
        )
        _, mean, total = _shares(logits, log_total, first, begin, kept, SEGMENT, SLOTS, TOKENS)
        row = (n * MOST + slot) * heads + head
        tl.store(mass + row, total, mask=slot < MOST)
        tl.store(position + row, tl.sum(mean * token.to(tl.float32)[None, :], 1), mask=slot < MOST)
        for lowest in range(0, DIM, BLOCK_DIM):
            keys = _tokens(k, k_time, begin, kept, lowest, SEGMENT, TOKENS, DIM, BLOCK_DIM)
            values = _tokens(v, v_time, begin, kept, lowest, SEGMENT, TOKENS, DIM, BLOCK_DIM)
            dim = lowest + tl.arange(0, BLOCK_DIM)
            place = row[:, None] * DIM + dim[None, :]
            inside = (slot < MOST)[:, None] & (dim < DIM)[None, :]
            shares = mean.to(keys.dtype)
            # Filled, as no share is small enough to take a NaN away.
            full = _held(slot, begin, kept, SEGMENT)[:, None]
            tl.store(slots_k + place, tl.where(full, _launch.dot(shares, keys), 0.0).to(keys.dtype), mask=inside)
            tl.store(slots_v + place, tl.where(full, _launch.dot(shares, values), 0.0).to(keys.dtype), mask=inside)


@triton.jit
def _backward(
    k, v, queries, count, left_out, starts, grad_k, grad_v, grad_mass, grad_position, into_k, into_v, parts,
    number, segments, time, heads, each, scale,
    k_batch, k_time, k_head, v_batch, v_time, v_head, query_head, query_slot, count_batch, count_segment, count_head,
    left_batch, left_segment, HAS_FIRST: tl.constexpr, SEGMENT: tl.constexpr, MOST: tl.constexpr, DIM: tl.constexpr,
    SLOTS: tl.constexpr, TOKENS: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    queries += head * query_head
    parts += (part * heads + head) * (MOST * DIM)
    first_segment = part * each
    ONE_TILE: tl.constexpr = (MOST <= SLOTS) and (DIM <= BLOCK_DIM)
    into_queries = tl.zeros([SLOTS, BLOCK_DIM], tl.float32)  # of the only tile; else they are added up in memory
    for n in range(first_segment, tl.minimum(first_segment + each, number)):
        batch, g = n // segments, n % segments
        start = tl.load(starts + g)
        keys_at = k + batch * k_batch + start * k_time + head * k_head
        values_at = v + batch * v_batch + start * v_time + head * v_head
        kept = _kept(count + batch * count_batch + g * count_segment + head * count_head, MOST)
        begin = _begin(left_out + batch * left_batch + g * left_segment) if HAS_FIRST else 0
        slots_at = n * MOST * heads + head
        log_total = _log_total(
            keys_at, k_time, queries, query_slot, begin, kept, scale, SEGMENT, MOST, DIM, SLOTS, TOKENS, BLOCK_DIM
        )
        handed = tl.zeros([TOKENS], tl.float32)
        for first in range(0, MOST, SLOTS):
            by_log, _, _ = _by_log_share(
                keys_at, k_time, values_at, v_time, queries, query_slot, grad_k, grad_v, grad_mass, grad_position,
                slots_at, heads, log_total, first, begin, kept, scale, SEGMENT, MOST, DIM, SLOTS, TOKENS, BLOCK_DIM,
            )  # fmt: skip
            handed += tl.sum(by_log, 0)
        for lowest in range(0, DIM, BLOCK_DIM):
            dim = lowest + tl.arange(0, BLOCK_DIM)
            keys = _tokens(keys_at, k_time, begin, kept, lowest, SEGMENT, TOKENS, DIM, BLOCK_DIM)
            of_keys = tl.zeros([TOKENS, BLOCK_DIM], tl.float32)
            of_values = tl.zeros([TOKENS, BLOCK_DIM], tl.float32)
            for first in range(0, MOST, SLOTS):
                by_log, share, mean = _by_log_share(
                    keys_at, k_time, values_at, v_time, queries, query_slot, grad_k, grad_v, grad_mass, grad_position,
                    slots_at, heads, log_total, first, begin, kept, scale, SEGMENT, MOST, DIM, SLOTS, TOKENS, BLOCK_DIM,
                )  # fmt: skip
                # The identity does not move with its logits.
                slot = first + tl.arange(0, SLOTS)
                held = _held(slot, begin, kept, SEGMENT)
                moves = (held & (kept != SEGMENT))[:, None]
                by_logit = tl.where(moves, scale * (by_log - share * handed[None, :]), 0.0).to(keys.dtype)
                mean = tl.trans(mean).to(keys.dtype)
                from_k = _tile(grad_k + slots_at * DIM, heads * DIM, slot, held, lowest, DIM, BLOCK_DIM)
                from_v = _tile(grad_v + slots_at * DIM, heads * DIM, slot, held, lowest, DIM, BLOCK_DIM)
                query = _tile(queries, query_slot, slot, held, lowest, DIM, BLOCK_DIM)
                of_keys += _launch.dot(mean, from_k)
                of_keys += _launch.dot(tl.trans(by_logit), query)
                of_values += _launch.dot(mean, from_v)
                of_queries = tl.where(moves, _launch.dot(by_logit, keys), 0.0)
                if ONE_TILE:
                    into_queries += of_queries
                else:
                    place = parts + slot[:, None] * DIM + dim[None, :]
                    inside = (slot < MOST)[:, None] & (dim < DIM)[None, :]
                    so_far = tl.load(place, mask=inside & (n > first_segment), other=0.0)
                    tl.store(place, so_far + of_queries, mask=inside)
                    tl.debug_barrier()  # other threads may read it for the next segment
            token = tl.arange(0, TOKENS)
            row = (batch * time + start + token) * heads + head
            place = row[:, None] * DIM + dim[None, :]
            inside = (token < SEGMENT)[:, None] & (dim < DIM)[None, :]
            tl.store(into_k + place, of_keys.to(keys.dtype), mask=inside)
            tl.store(into_v + place, of_values.to(keys.dtype), mask=inside)
    if ONE_TILE:
        slot, dim = tl.arange(0, SLOTS), tl.arange(0, BLOCK_DIM)
        place = parts + slot[:, None] * DIM + dim[None, :]
        tl.store(place, into_queries, mask=(slot < MOST)[:, None] & (dim < DIM)[None, :])


@triton.jit
def _kept(count, MOST: tl.constexpr):
    return tl.minimum(tl.maximum(tl.load(count).to(tl.int64), 0), MOST).to(tl.int32)


@triton.jit
def _begin(left_out):
    """The first token that hands out mass."""
    return tl.maximum(tl.load(left_out).to(tl.int64), 0).to(tl.int32)


@triton.jit
def _held(slot, begin, kept, SEGMENT: tl.constexpr):
    """Which slots hold anything: those kept; of the identity, whose slots are tokens, those of tokens that are read."""
    return (slot < kept) & ((slot >= begin) | (kept != SEGMENT))


@triton.jit
def _tile(base, stride, row, wanted, lowest, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """The wanted of some rows, dims from `lowest`; zeros elsewhere and from dim `DIM` on."""
    dim = lowest + tl.arange(0, BLOCK_DIM)
    place = row.to(tl.int64)[:, None] * stride + dim[None, :]
    return tl.load(base + place, mask=wanted[:, None] & (dim < DIM)[None, :], other=0.0)


@triton.jit
def _tokens(
    base, stride, begin, kept, lowest, SEGMENT: tl.constexpr, TOKENS: tl.constexpr, DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """The tokens of a segment from `begin`; not read, but zeros, before that and where nothing is kept of it."""
    token = tl.arange(0, TOKENS)
    return _tile(base, stride, token, (token >= begin) & (token < SEGMENT) & (kept > 0), lowest, DIM, BLOCK_DIM)


@triton.jit
def _logits(
    k, k_time, queries, query_slot, first, begin, kept, scale, SEGMENT: tl.constexpr, MOST: tl.constexpr,
    DIM: tl.constexpr, SLOTS: tl.constexpr, TOKENS: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """[slots, tokens], −inf in slots that hold nothing."""
    slot = first + tl.arange(0, SLOTS)
    held = _held(slot, begin, kept, SEGMENT)
    logits = tl.zeros([SLOTS, TOKENS], tl.float32)
    for lowest in range(0, DIM, BLOCK_DIM):
        query = _tile(queries, query_slot, slot, held, lowest, DIM, BLOCK_DIM)
        keys = _tokens(k, k_time, begin, kept, lowest, SEGMENT, TOKENS, DIM, BLOCK_DIM)
        logits += _launch.dot(query, tl.trans(keys))
    return tl.where(held[:, None], logits * scale, float("-inf"))


@triton.jit
def _log_total(
    k, k_time, queries, query_slot, begin, kept, scale, SEGMENT: tl.constexpr, MOST: tl.constexpr, DIM: tl.constexpr,
    SLOTS: tl.constexpr, TOKENS: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp over the kept slots of each token's logits; 0 if none is kept."""
    top = tl.full([TOKENS], float("-inf"), tl.float32)
    total = tl.zeros([TOKENS], tl.float32)
    for first in range(0, MOST, SLOTS):
        logits = _logits(
            k, k_time, queries, query_slot, first, begin, kept, scale, SEGMENT, MOST, DIM, SLOTS, TOKENS, BLOCK_DIM
        )
        higher = tl.maximum(top, tl.max(logits, 0))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(top - base) + tl.sum(tl.exp(logits - base[None, :]), 0)
        top = higher
    return tl.where(total > 0, top + tl.log(tl.where(total > 0, total, 1.0)), 0.0)


@triton.jit
def _shares(
    logits, log_total, first, begin, kept, SEGMENT: tl.constexpr, SLOTS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """A and A / mass [slots, tokens], and the mass."""
    slot = first + tl.arange(0, SLOTS)
    token = tl.arange(0, TOKENS)
    held = _held(slot, begin, kept, SEGMENT)
    shared = held[:, None] & ((token >= begin) & (token < SEGMENT))[None, :]
    log_share = tl.where(shared, logits - log_total[None, :], float("-inf"))
    top = tl.max(log_share, 1)
    top = tl.where(top == float("-inf"), 0.0, top)
    mean = tl.exp(log_share - top[:, None])
    total = tl.sum(mean, 1)
    mean = mean / tl.where(total > 0, total, 1.0)[:, None]
    mass = total * tl.exp(top)
    identity = kept == SEGMENT
    same = (slot[:, None] == token[None, :]) & shared
    mean = tl.where(identity, tl.where(same, 1.0, 0.0), mean)
    mass = tl.where(identity, tl.where(held, 1.0, 0.0), mass)
    return tl.exp(log_share), mean, mass


@triton.jit
def _by_log_share(
    k, k_time, v, v_time, queries, query_slot, grad_k, grad_v, grad_mass, grad_position, slots_at, heads, log_total,
    first, begin, kept, scale, SEGMENT: tl.constexpr, MOST: tl.constexpr, DIM: tl.constexpr,
    SLOTS: tl.constexpr, TOKENS: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """Gradient by log A [slots, tokens], through the mean over tokens and the mass; A, and A / mass."""
    logits = _logits(
        k, k_time, queries, query_slot, first, begin, kept, scale, SEGMENT, MOST, DIM, SLOTS, TOKENS, BLOCK_DIM
    )
    share, mean, _ = _shares(logits, log_total, first, begin, kept, SEGMENT, SLOTS, TOKENS)
    slot = first + tl.arange(0, SLOTS)
    held = _held(slot, begin, kept, SEGMENT)
    row = slots_at + slot * heads
    by_mass = tl.load(grad_mass + row, mask=held, other=0.0)
    by_position = tl.load(grad_position + row, mask=held, other=0.0)
    pull = by_position[:, None] * tl.arange(0, TOKENS).to(tl.float32)[None, :]
    for lowest in range(0, DIM, BLOCK_DIM):
        from_k = _tile(grad_k + slots_at * DIM, heads * DIM, slot, held, lowest, DIM, BLOCK_DIM)
        keys = _tokens(k, k_time, begin, kept, lowest, SEGMENT, TOKENS, DIM, BLOCK_DIM)
        pull += _launch.dot(from_k, tl.trans(keys))
        from_v = _tile(grad_v + slots_at * DIM, heads * DIM, slot, held, lowest, DIM, BLOCK_DIM)
        values = _tokens(v, v_time, begin, kept, lowest, SEGMENT, TOKENS, DIM, BLOCK_DIM)
        pull += _launch.dot(from_v, tl.trans(values))
    by_log = mean * (pull - tl.sum(mean * pull, 1)[:, None]) + share * by_mass[:, None]
    return tl.where(held[:, None], by_log, 0.0), share, mean
