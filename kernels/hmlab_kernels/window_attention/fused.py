"""Window attention in Triton, in the manner of flash attention: a program per block of queries (or keys) and head.

The forward pass and the queries' gradient walk over the keys from the first window's start to the diagonal; the
keys' gradient walks over the queries that see a block. Sinks are seen by all later queries of their sequence: their
gradient is divided among a bounded number of programs, each of which walks over its run of queries and leaves one part
in a buffer, summed afterwards. No atomics: deterministic.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._launch import block_dim, dot, on, unit_stride
from .layout import Layout

_PARTS = 256  # of the sinks' gradient, of a row of the batch: enough programs for a large GPU, and little memory
_ROWS, _COLUMNS = 64, 128  # of these parts, summed at a time
_FAR = 1 << 29  # more than any position, so that sums of a few stay within 32 bits


class Sizes(NamedTuple):
    """Of a tile of scores; how it is launched."""

    queries: int
    keys: int
    warps: int
    stages: int


def block_sizes(q: Tensor, queries: int, keys: int, backward: bool = False) -> Sizes:
    """Tiles for q's dim and dtype; queries, keys: the most that a sequence has.

    Short windows want short tiles (what lies outside a window is computed in vain), tensor cores want long ones.
    """
    width, wide = block_dim(q.shape[-1]), q.dtype == torch.float32
    if wide:  # no tensor cores: what counts is that a tile fits the registers
        sizes = Sizes(16, 16, 4, 1) if width > 128 else Sizes(32, 32, 4, 2)
    elif width > 128:
        sizes = Sizes(64, 64, 8, 1 if backward else 2)
    elif backward:
        sizes = Sizes(64, 64, 4, 2)
    else:
        sizes = Sizes(128, 64, 8 if width > 64 else 4, 3)
    if queries < sizes.queries:
        sizes = sizes._replace(queries=block_dim(queries), warps=4)
    return sizes._replace(keys=min(sizes.keys, block_dim(keys)))


@triton.jit
def _place(pid, table, blocks, PACKED: tl.constexpr):
    """Sequence, and number of the block in it, of a program."""
    if PACKED:
        sequence = tl.load(table + 2 * pid)
        block = tl.load(table + 2 * pid + 1)
    else:
        sequence = pid // blocks
        block = pid % blocks
    return sequence, block


@triton.jit
def _span(sequence, cu_seqlens, cu_keys, start, time, keys, lead, PACKED: tl.constexpr, STREAMED: tl.constexpr):
    """Batch row; first query, queries; first key, keys; positions of the first contiguous key, of the first query."""
    nothing = sequence * 0
    if PACKED:
        row = nothing.to(tl.int64)
        query = tl.load(cu_seqlens + sequence).to(tl.int64)
        queries = (tl.load(cu_seqlens + sequence + 1) - query).to(tl.int32)
        key = tl.load(cu_keys + sequence).to(tl.int64)
        held = (tl.load(cu_keys + sequence + 1) - key).to(tl.int32)
    else:
        row = sequence.to(tl.int64)
        query = nothing.to(tl.int64)
        queries = nothing + time
        key = nothing.to(tl.int64)
        held = nothing + keys
    first = nothing
    if STREAMED:
        first = tl.load(start + sequence).to(tl.int32)
    return row, query, queries, key, held, first, first + held - lead - queries


@triton.jit
def _begin(position, window, segment):
    return tl.maximum(position - window + 1, 0) // segment * segment


@triton.jit
def _load(base, rows, stride, columns, inside, DIM: tl.constexpr):
    """Rows of a matrix; 0 outside it."""
    offsets = (rows.to(tl.int64) * stride)[:, None] + columns[None, :]
    return tl.load(base + offsets, mask=inside[:, None] & (columns < DIM)[None, :], other=0.0)


@triton.jit
def _store(base, rows, columns, inside, tile, DIM: tl.constexpr):
    """Rows of a contiguous matrix."""
    offsets = (rows.to(tl.int64) * DIM)[:, None] + columns[None, :]
    tl.store(base + offsets, tile.to(base.dtype.element_ty), mask=inside[:, None] & (columns < DIM)[None, :])


@triton.jit
def _attend(query, key, value, sees, scale, acc, top, total):
    """One more tile of keys in the running softmax (base 2)."""
    score = tl.where(sees, dot(query, tl.trans(key)) * scale, float("-inf"))
    new = tl.maximum(top, tl.max(score, 1))
    base = tl.where(new == float("-inf"), 0.0, new)
    weight = tl.exp2(score - base[:, None])
    shrink = tl.exp2(top - base)
    total = total * shrink + tl.sum(weight, 1)
    acc = acc * shrink[:, None] + dot(weight.to(value.dtype), value)
    return acc, new, total


@triton.jit
def _forward_kernel(
    q, k, v, out, lse, table, cu_seqlens, cu_keys, start,
    q_row, q_time, q_head, k_row, k_time, k_head, v_row, v_time, v_head,
    time, keys, blocks, window, sinks, segment, lead, scale,
    PACKED: tl.constexpr, STREAMED: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    # The query heads of a group are neighbours in the grid, so that they find one another's keys in the cache.
    pid = tl.program_id(0)
    kv_head = tl.program_id(1).to(tl.int64)
    head = kv_head * GROUP + pid % GROUP
    heads = tl.num_programs(1) * GROUP
    sequence, block = _place(pid // GROUP, table, blocks, PACKED)
    row, query_row, queries, key_row, _, first, position = _span(
        sequence, cu_seqlens, cu_keys, start, time, keys, lead, PACKED, STREAMED)  # fmt: skip
    i = block * QUERIES + tl.arange(0, QUERIES)
    p = position + i
    begin = _begin(p, window, segment)
    columns = tl.arange(0, WIDTH)
    inside = i < queries
    query = _load(q + row * q_row + query_row * q_time + head * q_head, i, q_time, columns, inside, DIM)
    k += row * k_row + key_row * k_time + kv_head * k_head
    v += row * v_row + key_row * v_time + kv_head * v_head
    acc = tl.zeros([QUERIES, WIDTH], tl.float32)
    top = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    low = position + block * QUERIES
    high = tl.minimum(low + QUERIES, position + queries)  # this block's positions end before it
    if SINKS > 0:
        reached = tl.where(high > low, tl.minimum(_begin(high - 1, window, segment), sinks), 0)
        for j0 in range(0, reached, SINKS):
            j = j0 + tl.arange(0, SINKS)
            key = _load(k, j, k_time, columns, j < reached, DIM)
            value = _load(v, j, v_time, columns, j < reached, DIM)
            sees = (j[None, :] < begin[:, None]) & (j < reached)[None, :]
            acc, top, total = _attend(query, key, value, sees, scale, acc, top, total)
    for x0 in range(tl.maximum(_begin(low, window, segment), first), high, KEYS):
        x = x0 + tl.arange(0, KEYS)
        key = _load(k, x - first + lead, k_time, columns, x < high, DIM)
        value = _load(v, x - first + lead, v_time, columns, x < high, DIM)
        sees = (x[None, :] >= begin[:, None]) & (x[None, :] <= p[:, None])
        acc, top, total = _attend(query, key, value, sees, scale, acc, top, total)
    empty = total == 0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    token = row * time + query_row + i
    _store(out, token * heads + head, columns, inside, acc, DIM)
    # A query that sees nothing has top −inf already.
    total = (top + tl.log2(tl.where(empty, 1.0, total))) * 0.6931471805599453
    tl.store(lse + token * heads + head, total, mask=inside)


@triton.jit
def _score_gradient(query, key, value, grad, sees, scale, lse, delta):
    """Gradients of the scores (but for the scale) of a tile, [queries, keys]."""
    weight = tl.where(sees, tl.exp2(dot(query, tl.trans(key)) * scale - lse[:, None]), 0.0)
    return weight * (dot(grad, tl.trans(value)) - delta[:, None])


@triton.jit
def _add_key_gradient(query, key, value, grad, sees, scale, lse, delta, d_key, d_value):
    """What a tile of queries adds to the gradients of keys (but for the scale) and values; sees: [keys, queries]."""
    weight = tl.where(sees, tl.exp2(dot(key, tl.trans(query)) * scale - lse[None, :]), 0.0)
    d_score = weight * (dot(value, tl.trans(grad)) - delta[None, :])
    return d_key + dot(d_score.to(query.dtype), query), d_value + dot(weight.to(grad.dtype), grad)


@triton.jit
def _query_gradient_kernel(
    q, k, v, out, lse, grad_out, grad_lse, grad_q, saved, table, cu_seqlens, cu_keys, start,
    q_row, q_time, q_head, k_row, k_time, k_head, v_row, v_time, v_head, g_row, g_time, g_head,
    time, keys, blocks, tokens, window, sinks, segment, lead, scale, out_scale,
    PACKED: tl.constexpr, STREAMED: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    kv_head = tl.program_id(1).to(tl.int64)
    head = kv_head * GROUP + pid % GROUP
    heads = tl.num_programs(1) * GROUP
    sequence, block = _place(pid // GROUP, table, blocks, PACKED)
    row, query_row, queries, key_row, _, first, position = _span(
        sequence, cu_seqlens, cu_keys, start, time, keys, lead, PACKED, STREAMED)  # fmt: skip
    i = block * QUERIES + tl.arange(0, QUERIES)
    p = position + i
    begin = _begin(p, window, segment)
    columns = tl.arange(0, WIDTH)
    inside = i < queries
    query = _load(q + row * q_row + query_row * q_time + head * q_head, i, q_time, columns, inside, DIM)
    grad = _load(grad_out + row * g_row + query_row * g_time + head * g_head, i, g_time, columns, inside, DIM)
    token = row * time + query_row + i
    result = _load(out, token * heads + head, DIM, columns, inside, DIM)
    sums = tl.load(lse + token * heads + head, mask=inside, other=0.0)
    empty = sums == float("-inf")
    delta = tl.sum(grad.to(tl.float32) * result.to(tl.float32), 1)
    delta = tl.where(empty, 0.0, delta - tl.load(grad_lse + token * heads + head, mask=inside, other=0.0))
    sums = tl.where(empty, 0.0, sums * 1.4426950408889634)
    # Kept head by head for the keys' gradient, which reads them again and again.
    tl.store(saved + head * tokens + token, sums, mask=inside)
    tl.store(saved + (heads + head) * tokens + token, delta, mask=inside)
    k += row * k_row + key_row * k_time + kv_head * k_head
    v += row * v_row + key_row * v_time + kv_head * v_head
    acc = tl.zeros([QUERIES, WIDTH], tl.float32)
    low = position + block * QUERIES
    high = tl.minimum(low + QUERIES, position + queries)
    if SINKS > 0:
        reached = tl.where(high > low, tl.minimum(_begin(high - 1, window, segment), sinks), 0)
        for j0 in range(0, reached, SINKS):
            j = j0 + tl.arange(0, SINKS)
            key = _load(k, j, k_time, columns, j < reached, DIM)
            value = _load(v, j, v_time, columns, j < reached, DIM)
            sees = (j[None, :] < begin[:, None]) & (j < reached)[None, :]
            d_score = _score_gradient(query, key, value, grad, sees, scale, sums, delta)
            acc += dot(d_score.to(key.dtype), key)
    for x0 in range(tl.maximum(_begin(low, window, segment), first), high, KEYS):
        x = x0 + tl.arange(0, KEYS)
        key = _load(k, x - first + lead, k_time, columns, x < high, DIM)
        value = _load(v, x - first + lead, v_time, columns, x < high, DIM)
        sees = (x[None, :] >= begin[:, None]) & (x[None, :] <= p[:, None])
        d_score = _score_gradient(query, key, value, grad, sees, scale, sums, delta)
        acc += dot(d_score.to(key.dtype), key)
    _store(grad_q, token * heads + head, columns, inside, acc * out_scale, DIM)


@triton.jit
def _sink_gradient_kernel(
    q, k, v, grad_out, saved, parts, table, cu_seqlens, cu_keys, start,
    q_row, q_time, q_head, k_row, k_time, k_head, v_row, v_time, v_head, g_row, g_time, g_head,
    time, keys, blocks, span, tokens, window, sinks, segment, lead, scale,
    PACKED: tl.constexpr, STREAMED: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """What `span` queries of the heads of a group add to the gradients of a tile of sinks."""
    # The tiles of sinks are neighbours in the grid, so that they find one another's queries in the cache.
    tiles = tl.cdiv(sinks, SINKS)
    part = tl.program_id(0) // tiles
    j = tl.program_id(0) % tiles * SINKS + tl.arange(0, SINKS)
    kv_head = tl.program_id(1).to(tl.int64)
    kv_heads = tl.num_programs(1)
    sequence, block = _place(part, table, blocks, PACKED)
    row, query_row, queries, key_row, _, _, position = _span(
        sequence, cu_seqlens, cu_keys, start, time, keys, lead, PACKED, STREAMED)  # fmt: skip
    # Up to the end of the first segment, windows reach back to the beginning and no sink lies before them.
    low = tl.maximum(block * span, window - 1 + segment - position)
    high = tl.minimum(block * span + span, queries)
    many = tl.cdiv(tl.maximum(high - low, 0), QUERIES)
    reached = tl.where(many > 0, tl.minimum(_begin(position + high - 1, window, segment), sinks), 0)
    columns = tl.arange(0, WIDTH)
    key = _load(k + row * k_row + key_row * k_time + kv_head * k_head, j, k_time, columns, j < reached, DIM)
    value = _load(v + row * v_row + key_row * v_time + kv_head * v_head, j, v_time, columns, j < reached, DIM)
    d_key = tl.zeros([SINKS, WIDTH], tl.float32)
    d_value = tl.zeros([SINKS, WIDTH], tl.float32)
    q += row * q_row + query_row * q_time
    grad_out += row * g_row + query_row * g_time
    for step in range(0, many * GROUP):
        head = kv_head * GROUP + step // many
        i = low + step % many * QUERIES + tl.arange(0, QUERIES)
        inside = i < high
        query = _load(q + head * q_head, i, q_time, columns, inside, DIM)
        grad = _load(grad_out + head * g_head, i, g_time, columns, inside, DIM)
        token = row * time + query_row + i
        sums = tl.load(saved + head * tokens + token, mask=inside, other=0.0)
        delta = tl.load(saved + (kv_heads * GROUP + head) * tokens + token, mask=inside, other=0.0)
        begin = _begin(position + i, window, segment)
        sees = (j[:, None] < begin[None, :]) & (j < reached)[:, None] & inside[None, :]
        d_key, d_value = _add_key_gradient(query, key, value, grad, sees, scale, sums, delta, d_key, d_value)
    parts += (part.to(tl.int64) * kv_heads + kv_head) * (2 * sinks * DIM)
    _store(parts, j, columns, j < sinks, d_key, DIM)
    _store(parts, j + sinks, columns, j < sinks, d_value, DIM)


@triton.jit
def _sink_sum_kernel(parts, sums, cu_seqlens, firsts, time, blocks, span, size, PACKED: tl.constexpr,
                     ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """The sinks' gradients of a sequence and kv head: the sum of their parts."""
    sequence = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    kv_heads = tl.num_programs(1)
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    if PACKED:
        queries = (tl.load(cu_seqlens + sequence + 1) - tl.load(cu_seqlens + sequence)).to(tl.int32)
        first = tl.load(firsts + sequence).to(tl.int64)
    else:
        queries = tl.program_id(0) * 0 + time
        first = sequence * blocks
    many = tl.cdiv(queries, span)
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for r0 in range(0, many, ROWS):
        r = r0 + tl.arange(0, ROWS)
        place = (first + r) * kv_heads + kv_head
        mask = (r < many)[:, None] & (column < size)[None, :]
        acc += tl.load(parts + (place * size)[:, None] + column[None, :], mask=mask, other=0.0)
    tl.store(sums + (sequence * kv_heads + kv_head) * size + column, tl.sum(acc, 0), mask=column < size)


@triton.jit
def _key_gradient_kernel(
    q, k, v, grad_out, grad_k, grad_v, saved, sink_sums, table, cu_seqlens, cu_keys, start,
    q_row, q_time, q_head, k_row, k_time, k_head, v_row, v_time, v_head, g_row, g_time, g_head,
    time, keys, blocks, tokens, window, sinks, segment, lead, scale, out_scale,
    PACKED: tl.constexpr, STREAMED: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    kv_head = tl.program_id(1).to(tl.int64)
    kv_heads = tl.num_programs(1)
    sequence, block = _place(tl.program_id(0), table, blocks, PACKED)
    row, query_row, queries, key_row, held, first, position = _span(
        sequence, cu_seqlens, cu_keys, start, time, keys, lead, PACKED, STREAMED)  # fmt: skip
    r = block * KEYS + tl.arange(0, KEYS)  # rows among the sequence's keys
    columns = tl.arange(0, WIDTH)
    x = first + r - lead
    read = (r >= lead) & (r < held) & (x >= 0)
    x = tl.where(read, x, -1)  # before every window
    key = _load(k + row * k_row + key_row * k_time + kv_head * k_head, r, k_time, columns, read, DIM)
    value = _load(v + row * v_row + key_row * v_time + kv_head * v_head, r, v_time, columns, read, DIM)
    d_key = tl.zeros([KEYS, WIDTH], tl.float32)
    d_value = tl.zeros([KEYS, WIDTH], tl.float32)
    # Queries see these keys from the first key's own on, until the window starts after the segment of the last.
    low = tl.maximum(first + tl.maximum(block * KEYS - lead, 0), position)
    last = tl.maximum(first + tl.minimum(block * KEYS + KEYS, held) - 1 - lead, 0)
    high = tl.minimum((last // segment + 1) * segment + window - 1, position + queries)
    many = tl.cdiv(tl.maximum(high - low, 0), QUERIES)
    q += row * q_row + query_row * q_time
    grad_out += row * g_row + query_row * g_time
    for step in range(0, many * GROUP):
        head = kv_head * GROUP + step // many
        i = low - position + step % many * QUERIES + tl.arange(0, QUERIES)
        p = position + i
        inside = i < queries
        query = _load(q + head * q_head, i, q_time, columns, inside, DIM)
        grad = _load(grad_out + head * g_head, i, g_time, columns, inside, DIM)
        token = row * time + query_row + i
        sums = tl.load(saved + head * tokens + token, mask=inside, other=0.0)
        delta = tl.load(saved + (kv_heads * GROUP + head) * tokens + token, mask=inside, other=0.0)
        begin = _begin(p, window, segment)
        sees = (x[:, None] >= begin[None, :]) & (x[:, None] <= p[None, :]) & inside[None, :]
        d_key, d_value = _add_key_gradient(query, key, value, grad, sees, scale, sums, delta, d_key, d_value)
    if SINKS > 0:
        sink_sums += (sequence.to(tl.int64) * kv_heads + kv_head) * (2 * sinks * DIM)
        d_key += _load(sink_sums, r, DIM, columns, (r < sinks) & (r < held), DIM)
        d_value += _load(sink_sums, r + sinks, DIM, columns, (r < sinks) & (r < held), DIM)
    place = (row * keys + key_row + r) * kv_heads + kv_head
    _store(grad_k, place, columns, r < held, d_key * out_scale, DIM)
    _store(grad_v, place, columns, r < held, d_value, DIM)


class _Blocks(NamedTuple):
    """Programs over the blocks of all sequences. table: (sequence, block in it) of each where sequences are packed,
    some past a sequence's end; per_sequence: where all are equal; firsts: the program where each sequence begins."""

    programs: int
    table: Tensor | None
    per_sequence: int
    firsts: Tensor | None


def _blocks(batch: int, time: int, bounds: Tensor | None, size: int) -> _Blocks:
    if bounds is None:
        many = triton.cdiv(time, size)
        return _Blocks(batch * many, None, many, None)
    many = (bounds.diff() + size - 1) // size
    ends = many.cumsum(0)
    programs = time // size + len(many)  # at least what is needed, and known without asking the device
    program = torch.arange(programs, device=bounds.device)
    sequence = torch.searchsorted(ends, program, right=True).clamp(max=len(many) - 1)
    firsts = ends - many
    return _Blocks(programs, torch.stack([sequence, program - firsts[sequence]], 1).int(), 1, firsts)


class _Call(NamedTuple):
    """What the launches of one call share; bounds: cu_seqlens, cu_keys (None where sequences are equal) and start."""

    bounds: tuple[Tensor | None, ...]
    sizes: Sizes
    strides: tuple[int, ...]
    options: tuple[int, ...]  # window, sinks, segment, lead
    constants: dict


def _prepare(q: Tensor, k: Tensor, v: Tensor, layout: Layout, backward: bool) -> _Call:
    packed, dim = layout.cu_seqlens is not None, q.shape[-1]
    bounds, longest = (None, None), (layout.time, layout.keys)
    if packed:
        queries, keys = layout.sequences(q.device)
        bounds, longest = (queries.bounds, keys.bounds), (queries.longest, keys.longest)
    start = None if layout.start is None else layout.start.to(q.device).contiguous()
    sizes = block_sizes(q, *longest, backward)
    constants = {
        "PACKED": packed, "STREAMED": layout.start is not None, "GROUP": q.shape[2] // k.shape[2], "DIM": dim,
        "WIDTH": block_dim(dim), "QUERIES": sizes.queries, "KEYS": sizes.keys,
        "SINKS": min(32, block_dim(layout.sinks)) if layout.sinks else 0,
        "num_warps": sizes.warps, "num_stages": sizes.stages,
    }  # fmt: skip
    strides = tuple(stride for x in (q, k, v) for stride in x.stride()[:3])
    options = min(layout.window, _FAR), layout.sinks, min(layout.segment, _FAR), layout.lead
    return _Call((*bounds, start), sizes, strides, options, constants)


def forward(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float) -> tuple[Tensor, Tensor]:
    q, k, v = (unit_stride(x) for x in (q, k, v))
    out = q.new_empty(q.shape)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    call = _prepare(q, k, v, layout, backward=False)
    if out.numel() == 0:
        return out, lse
    blocks = _blocks(layout.batch, layout.time, call.bounds[0], call.sizes.queries)
    with on(q):
        _forward_kernel[blocks.programs * call.constants["GROUP"], k.shape[2]](
            q, k, v, out, lse, blocks.table, *call.bounds, *call.strides,
            layout.time, layout.keys, blocks.per_sequence, *call.options, scale / math.log(2), **call.constants,
        )  # fmt: skip
    return out, lse


def backward(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float, out: Tensor, lse: Tensor,
             grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, grad_out = (unit_stride(x) for x in (q, k, v, grad_out))
    grad_q, grad_k, grad_v = (x.new_empty(x.shape) for x in (q, k, v))
    if q.numel() == 0:
        return grad_q, grad_k.zero_(), grad_v.zero_()
    call = _prepare(q, k, v, layout, backward=True)
    batch, time, heads, dim = q.shape
    kv_heads, sinks = k.shape[2], layout.sinks
    rows = _blocks(batch, time, call.bounds[0], call.sizes.queries)
    columns = _blocks(batch, layout.keys, call.bounds[1], call.sizes.keys)
    saved = q.new_empty(2, heads, batch * time, dtype=torch.float32)  # log-sum-exp (base 2) and delta
    sink_sums = None
    strides = *call.strides, *grad_out.stride()[:3]
    options = batch * time, *call.options, scale / math.log(2)
    with on(q):
        _query_gradient_kernel[rows.programs * call.constants["GROUP"], kv_heads](
            q, k, v, out.contiguous(), lse.contiguous(), grad_out, grad_lse.contiguous(), grad_q, saved,
            rows.table, *call.bounds, *strides, time, layout.keys, rows.per_sequence, *options, scale,
            **call.constants,
        )  # fmt: skip
        if sinks:
            size = 2 * sinks * dim
            # As many queries to a part that a row of the batch, whatever its sequences, has about _PARTS of them.
            span = call.sizes.queries * triton.cdiv(time, call.sizes.queries * _PARTS)
            runs = _blocks(batch, time, call.bounds[0], span)
            tile = min(call.sizes.keys, block_dim(sinks))
            parts = q.new_empty(runs.programs, kv_heads, size, dtype=torch.float32)
            sequences = batch if call.bounds[0] is None else len(call.bounds[0]) - 1
            sink_sums = q.new_empty(sequences, kv_heads, size, dtype=torch.float32)
            _sink_gradient_kernel[runs.programs * triton.cdiv(sinks, tile), kv_heads](
                q, k, v, grad_out, saved, parts, runs.table, *call.bounds, *strides, time, layout.keys,
                runs.per_sequence, span, *options, **call.constants | {"SINKS": tile},
            )  # fmt: skip
            _sink_sum_kernel[sequences, kv_heads, triton.cdiv(size, _COLUMNS)](
                parts, sink_sums, call.bounds[0], runs.firsts, time, runs.per_sequence, span, size,
                call.constants["PACKED"], _ROWS, _COLUMNS,
            )  # fmt: skip
        _key_gradient_kernel[columns.programs, kv_heads](
            q, k, v, grad_out, grad_k, grad_v, saved, sink_sums, columns.table, *call.bounds, *strides,
            time, layout.keys, columns.per_sequence, *options, scale, **call.constants,
        )  # fmt: skip
    return grad_q, grad_k, grad_v
