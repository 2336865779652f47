"""The Triton kernels of slot attention; `fused` says what they do and launches them."""

from __future__ import annotations

import math

import triton
import triton.language as tl

from .. import _launch

LOG2E = tl.constexpr(math.log2(math.e))  # the softmax runs in powers of 2
LN2 = tl.constexpr(math.log(2))


@triton.jit
def _sequence(set_, sets, sequence_of, first_set, start, cu_seqlens, time,
              QUERY_BLOCK: tl.constexpr, STARTED: tl.constexpr, PACKED: tl.constexpr):  # fmt: skip
    """Of sets: the sequence, where it begins (its batch row or, packed, its first token), its length, and the number
    of the set's first query in it (below 0 where the sequence starts inside the block)."""
    if PACKED:
        sequence = tl.load(sequence_of + set_)
        begin = tl.load(cu_seqlens + sequence)
        length = tl.load(cu_seqlens + sequence + 1) - begin
        first = (set_ - tl.load(first_set + sequence)) * QUERY_BLOCK
    else:
        sequence = set_ // sets
        begin = sequence
        length = sequence * 0 + time
        first = (set_ - sequence * sets) * QUERY_BLOCK
    if STARTED:
        first -= tl.load(start + sequence) % QUERY_BLOCK
    return sequence, begin, length, first


@triton.jit
def _slot_range(sequence, cu_slots, slots, PACKED: tl.constexpr):
    """Where a sequence's slots begin (batch row or, packed, first slot) and how many there are."""
    if PACKED:
        begin = tl.load(cu_slots + sequence)
        count = tl.load(cu_slots + sequence + 1) - begin
    else:
        begin = sequence
        count = sequence * 0 + slots
    return begin, count


@triton.jit
def _picked(entries, n, reads, count, SLOT_BLOCK: tl.constexpr):
    """The slots that places n of a set stand for, and whether there are any."""
    entry = tl.load(entries + n // SLOT_BLOCK, mask=n < reads, other=-1).to(tl.int64)
    slot = entry * SLOT_BLOCK + n % SLOT_BLOCK
    exists = (entry >= 0) & (slot < count)
    return tl.where(exists, slot, 0), exists


@triton.jit
def _read_at_all(exists, flat_slot, kv_head, kv_heads, query, is_row, bias, visible, BIASED: tl.constexpr,
                 HIDING: tl.constexpr):  # fmt: skip
    """Of the slots of a tile, those with mass that some row of it may see: what the others hold is not loaded."""
    if BIASED:
        mass = tl.load(bias + flat_slot * kv_heads + kv_head, mask=exists, other=float("-inf"))
        exists = exists & (mass > float("-inf"))
    if HIDING:
        latest = tl.max(tl.where(is_row, query, -1), 0)
        exists = exists & (tl.load(visible + flat_slot, mask=exists, other=0) <= latest)
    return exists


@triton.jit
def _outer(a, b):
    """a @ b^T of tiles [rows, dim], [slots, dim]; summed directly for a single row."""
    if a.shape[0] == 1:
        return tl.sum(a.to(tl.float32) * b.to(tl.float32), 1)[None, :]
    else:
        return _launch.dot(a, tl.trans(b))


@triton.jit
def _weigh(weight, x):
    """weight @ x of tiles [rows, slots], [slots, dim]; summed directly for a single row."""
    if weight.shape[0] == 1:
        return tl.sum(tl.trans(weight) * x.to(tl.float32), 0)[None, :]
    else:
        return _launch.dot(weight.to(x.dtype), x)


@triton.jit
def _rows(tile, group, begin, length, first, time, heads, QUERY_BLOCK: tl.constexpr, SHARE: tl.constexpr,
          ROWS: tl.constexpr, PACKED: tl.constexpr):  # fmt: skip
    """Of a tile of a set's rows: query, head, whether there is one, and its place in what is [tokens, heads]."""
    row = tile * ROWS + tl.arange(0, ROWS)
    query = first + row // SHARE
    head = group * SHARE + row % SHARE
    token = (begin if PACKED else begin * time) + query
    return query, head, (row < QUERY_BLOCK * SHARE) & (query >= 0) & (query < length), token * heads + head


@triton.jit
def _scores(queries, keys, query, is_row, flat_slot, exists, kv_head, kv_heads, bias, visible, scale,
            BIASED: tl.constexpr, HIDING: tl.constexpr):  # fmt: skip
    """In powers of 2, −inf where a row does not see a slot."""
    score = _outer(queries, keys) * (scale * LOG2E)
    if BIASED:
        score += (tl.load(bias + flat_slot * kv_heads + kv_head, mask=exists, other=0) * LOG2E)[None, :]
    sees = is_row[:, None] & exists[None, :]
    if HIDING:
        sees = sees & (query[:, None] >= tl.load(visible + flat_slot, mask=exists, other=0)[None, :])
    return tl.where(sees, score, float("-inf"))


@triton.jit
def forward(
    q, k, v, index, bias, visible, start, cu_seqlens, cu_slots, sequence_of, first_set, out_w, lse_w, out, lse,
    q_s, q_t, q_h, k_s, k_n, k_h, v_s, v_n, v_h, w_s, w_t, w_h,
    time, slots, sets, groups, heads, kv_heads, reads, row_tiles, scale,
    DIM: tl.constexpr, QUERY_BLOCK: tl.constexpr, SLOT_BLOCK: tl.constexpr, SHARE: tl.constexpr, ROWS: tl.constexpr,
    SLOTS: tl.constexpr, BLOCK_D: tl.constexpr, BIASED: tl.constexpr, HIDING: tl.constexpr, STARTED: tl.constexpr,
    PACKED: tl.constexpr, JOINED: tl.constexpr,
):  # fmt: skip
    set_ = (tl.program_id(0) // row_tiles).to(tl.int64)
    group = tl.program_id(1).to(tl.int64)
    sequence, begin, length, first = _sequence(
        set_, sets, sequence_of, first_set, start, cu_seqlens, time, QUERY_BLOCK, STARTED, PACKED
    )
    slot_begin, count = _slot_range(sequence, cu_slots, slots, PACKED)
    query, head, is_row, flat = _rows(
        tl.program_id(0) % row_tiles, group, begin, length, first, time, heads, QUERY_BLOCK, SHARE, ROWS, PACKED
    )
    kv_head = group * kv_heads // groups
    column = tl.arange(0, BLOCK_D)
    is_dim = column < DIM
    inside = is_row[:, None] & is_dim[None, :]
    queries = tl.load(q + (begin * q_s + query * q_t + head * q_h)[:, None] + column[None, :], mask=inside, other=0)
    if JOINED:
        top = tl.load(lse_w + flat, mask=is_row, other=float("-inf")) * LOG2E
        total = tl.where(top > float("-inf"), 1.0, 0.0)
        read = tl.load(
            out_w + (begin * w_s + query * w_t + head * w_h)[:, None] + column[None, :],
            mask=inside & (total > 0)[:, None], other=0,
        ).to(tl.float32)  # fmt: skip
    else:
        top = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        read = tl.zeros([ROWS, BLOCK_D], tl.float32)
    entries = index + (set_ * groups + group) * (reads // SLOT_BLOCK)
    keys_at = k + slot_begin * k_s + kv_head * k_h
    values_at = v + slot_begin * v_s + kv_head * v_h
    flat_slots = slot_begin if PACKED else slot_begin * slots
    for n in range(0, reads, SLOTS):
        slot, exists = _picked(entries, n + tl.arange(0, SLOTS), reads, count, SLOT_BLOCK)
        exists = _read_at_all(exists, flat_slots + slot, kv_head, kv_heads, query, is_row, bias, visible, BIASED,
                              HIDING)  # fmt: skip
        is_key = exists[:, None] & is_dim[None, :]
        keys = tl.load(keys_at + (slot * k_n)[:, None] + column[None, :], mask=is_key, other=0)
        score = _scores(queries, keys, query, is_row, flat_slots + slot, exists, kv_head, kv_heads, bias, visible,
                        scale, BIASED, HIDING)  # fmt: skip
        new_top = tl.maximum(top, tl.max(score, 1))
        base = tl.where(new_top > float("-inf"), new_top, 0.0)
        weight = tl.exp2(score - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(weight, 1)
        values = tl.load(values_at + (slot * v_n)[:, None] + column[None, :], mask=is_key, other=0)
        read = read * shrink[:, None] + _weigh(weight, values)
        top = new_top
    safe = tl.where(total > 0, total, 1.0)
    read = read / safe[:, None]
    tl.store(out + (flat * DIM)[:, None] + column[None, :], read.to(out.dtype.element_ty), mask=inside)
    tl.store(lse + flat, tl.where(total > 0, (top + tl.log2(safe)) * LN2, float("-inf")), mask=is_row)


@triton.jit
def backward_queries(
    q, k, v, index, bias, visible, start, cu_seqlens, cu_slots, sequence_of, first_set, out_w, lse_w, out, lse,
    grad_out, grad_lse, grad_q, grad_out_w, grad_lse_w, delta,
    q_s, q_t, q_h, k_s, k_n, k_h, v_s, v_n, v_h, w_s, w_t, w_h, g_s, g_t, g_h,
    time, slots, sets, groups, heads, kv_heads, reads, row_tiles, scale,
    DIM: tl.constexpr, QUERY_BLOCK: tl.constexpr, SLOT_BLOCK: tl.constexpr, SHARE: tl.constexpr, ROWS: tl.constexpr,
    SLOTS: tl.constexpr, BLOCK_D: tl.constexpr, BIASED: tl.constexpr, HIDING: tl.constexpr, STARTED: tl.constexpr,
    PACKED: tl.constexpr, JOINED: tl.constexpr,
):  # fmt: skip
    set_ = (tl.program_id(0) // row_tiles).to(tl.int64)
    group = tl.program_id(1).to(tl.int64)
    sequence, begin, length, first = _sequence(
        set_, sets, sequence_of, first_set, start, cu_seqlens, time, QUERY_BLOCK, STARTED, PACKED
    )
    slot_begin, count = _slot_range(sequence, cu_slots, slots, PACKED)
    query, head, is_row, flat = _rows(
        tl.program_id(0) % row_tiles, group, begin, length, first, time, heads, QUERY_BLOCK, SHARE, ROWS, PACKED
    )
    kv_head = group * kv_heads // groups
    column = tl.arange(0, BLOCK_D)
    is_dim = column < DIM
    inside = is_row[:, None] & is_dim[None, :]
    at = (flat * DIM)[:, None] + column[None, :]
    queries = tl.load(q + (begin * q_s + query * q_t + head * q_h)[:, None] + column[None, :], mask=inside, other=0)
    given = tl.load(
        grad_out + (begin * g_s + query * g_t + head * g_h)[:, None] + column[None, :], mask=inside, other=0
    )
    product = tl.sum(given.to(tl.float32) * tl.load(out + at, mask=inside, other=0).to(tl.float32), 1)
    shift = product - tl.load(grad_lse + flat, mask=is_row, other=0)
    tl.store(delta + flat, shift, mask=is_row)
    base = tl.load(lse + flat, mask=is_row, other=float("-inf")) * LOG2E
    base = tl.where(base > float("-inf"), base, float("inf"))  # an empty set gives no weight
    if JOINED:
        share = tl.exp2(tl.load(lse_w + flat, mask=is_row, other=float("-inf")) * LOG2E - base)
        value = tl.load(
            out_w + (begin * w_s + query * w_t + head * w_h)[:, None] + column[None, :],
            mask=inside & (share > 0)[:, None], other=0,
        ).to(tl.float32)  # fmt: skip
        grad_share = tl.sum(given.to(tl.float32) * value, 1)
        tl.store(grad_lse_w + flat, share * (grad_share - shift), mask=is_row)
        grad_value = share[:, None] * given.to(tl.float32)
        tl.store(grad_out_w + at, grad_value.to(grad_out_w.dtype.element_ty), mask=inside)
    entries = index + (set_ * groups + group) * (reads // SLOT_BLOCK)
    keys_at = k + slot_begin * k_s + kv_head * k_h
    values_at = v + slot_begin * v_s + kv_head * v_h
    flat_slots = slot_begin if PACKED else slot_begin * slots
    result = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for n in range(0, reads, SLOTS):
        slot, exists = _picked(entries, n + tl.arange(0, SLOTS), reads, count, SLOT_BLOCK)
        exists = _read_at_all(exists, flat_slots + slot, kv_head, kv_heads, query, is_row, bias, visible, BIASED,
                              HIDING)  # fmt: skip
        is_key = exists[:, None] & is_dim[None, :]
        keys = tl.load(keys_at + (slot * k_n)[:, None] + column[None, :], mask=is_key, other=0)
        values = tl.load(values_at + (slot * v_n)[:, None] + column[None, :], mask=is_key, other=0)
        score = _scores(queries, keys, query, is_row, flat_slots + slot, exists, kv_head, kv_heads, bias, visible,
                        scale, BIASED, HIDING)  # fmt: skip
        weight = tl.exp2(score - base[:, None])
        result += _weigh(weight * (_outer(given, values) - shift[:, None]), keys)
    tl.store(grad_q + at, (result * scale).to(grad_q.dtype.element_ty), mask=inside)


@triton.jit
def backward_slots(
    q, k, v, bias, visible, start, cu_seqlens, cu_slots, sequence_of, first_set, block_sequence, first_block,
    order, offsets, lse, delta, grad_out, grad_k, grad_v, grad_bias,
    q_s, q_t, q_h, k_s, k_n, k_h, v_s, v_n, v_h, g_s, g_t, g_h,
    time, slots, sets, groups, heads, kv_heads, picks, blocks, slot_tiles, scale,
    DIM: tl.constexpr, QUERY_BLOCK: tl.constexpr, SLOT_BLOCK: tl.constexpr, SHARE: tl.constexpr, ROWS: tl.constexpr,
    SLOTS: tl.constexpr, BLOCK_D: tl.constexpr, BIASED: tl.constexpr, HIDING: tl.constexpr, STARTED: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    block = (tl.program_id(0) // slot_tiles).to(tl.int64)
    kv_head = tl.program_id(1).to(tl.int64)
    if PACKED:
        of = tl.load(block_sequence + block)
        place = block - tl.load(first_block + of)
    else:
        of = block // blocks
        place = block - of * blocks
    slot_begin, count = _slot_range(of, cu_slots, slots, PACKED)
    within = (tl.program_id(0) % slot_tiles) * SLOTS + tl.arange(0, SLOTS)
    slot = place * SLOT_BLOCK + within
    exists = (within < SLOT_BLOCK) & (slot < count)
    column = tl.arange(0, BLOCK_D)
    is_dim = column < DIM
    is_key = exists[:, None] & is_dim[None, :]
    flat_slot = ((slot_begin if PACKED else slot_begin * slots) + slot) * kv_heads + kv_head
    massive = exists
    if BIASED:
        mass = tl.load(bias + flat_slot, mask=exists, other=0) * LOG2E
        massive = exists & (mass > float("-inf"))
    keys_at = slot_begin * k_s + slot * k_n + kv_head * k_h
    values_at = slot_begin * v_s + slot * v_n + kv_head * v_h
    loaded = massive[:, None] & is_dim[None, :]
    keys = tl.load(k + keys_at[:, None] + column[None, :], mask=loaded, other=0)
    values = tl.load(v + values_at[:, None] + column[None, :], mask=loaded, other=0)
    if HIDING:
        since = tl.load(visible + (slot_begin if PACKED else slot_begin * slots) + slot, mask=exists, other=0)
    result_k = tl.zeros([SLOTS, BLOCK_D], tl.float32)
    result_v = tl.zeros([SLOTS, BLOCK_D], tl.float32)
    result_bias = tl.zeros([SLOTS], tl.float32)
    low = tl.load(offsets + block * kv_heads + kv_head)
    rows = (tl.load(offsets + block * kv_heads + kv_head + 1) - low) * (QUERY_BLOCK * SHARE)
    for n in range(0, rows, ROWS):
        row = n + tl.arange(0, ROWS)
        entry = tl.load(order + low + row // (QUERY_BLOCK * SHARE), mask=row < rows, other=0)
        set_ = entry // (groups * picks)
        group = entry // picks % groups
        _, begin, length, first = _sequence(
            set_, sets, sequence_of, first_set, start, cu_seqlens, time, QUERY_BLOCK, STARTED, PACKED
        )
        query = first + row % (QUERY_BLOCK * SHARE) // SHARE
        head = group * SHARE + row % SHARE
        is_row = (row < rows) & (query >= 0) & (query < length)
        inside = is_row[:, None] & is_dim[None, :]
        flat = ((begin if PACKED else begin * time) + query) * heads + head
        queries = tl.load(q + (begin * q_s + query * q_t + head * q_h)[:, None] + column[None, :], mask=inside, other=0)
        given = tl.load(
            grad_out + (begin * g_s + query * g_t + head * g_h)[:, None] + column[None, :], mask=inside, other=0
        )
        base = tl.load(lse + flat, mask=is_row, other=float("-inf")) * LOG2E
        base = tl.where(base > float("-inf"), base, float("inf"))
        shift = tl.load(delta + flat, mask=is_row, other=0)
        score = _launch.dot(keys, tl.trans(queries)) * (scale * LOG2E)  # [slots, rows], so that no sum needs a turn
        if BIASED:
            score += mass[:, None]
        sees = exists[:, None] & is_row[None, :]
        if HIDING:
            sees = sees & (query[None, :] >= since[:, None])
        weight = tl.exp2(tl.where(sees, score, float("-inf")) - base[None, :])
        result_v += _launch.dot(weight.to(given.dtype), given)
        # A weight of 0 may belong to a slot that is never read, whatever it holds.
        grad_score = tl.where(weight > 0, weight * (_launch.dot(values, tl.trans(given)) - shift[None, :]), 0.0)
        result_k += _launch.dot(grad_score.to(queries.dtype), queries)
        if BIASED:
            result_bias += tl.sum(grad_score, 1)
    at = (flat_slot * DIM)[:, None] + column[None, :]
    tl.store(grad_k + at, (result_k * scale).to(grad_k.dtype.element_ty), mask=is_key)
    tl.store(grad_v + at, result_v.to(grad_v.dtype.element_ty), mask=is_key)
    if BIASED:
        tl.store(grad_bias + flat_slot, result_bias, mask=exists)
