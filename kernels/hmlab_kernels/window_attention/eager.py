"""Window attention in vectorised PyTorch on any device: blocks of queries, each against one slab of keys.

A slab is what any window of the block may hold. Deep inside a sequence the slabs are overlapping views of the keys,
equally far apart, and share one mask; blocks near an end gather theirs and have masks of their own. Sinks are a
second, small set of keys, merged by log-sum-exp. Only some blocks' scores are held at a time; the backward pass
recomputes them. Sums into gathered keys use index_add, which is not deterministic on CUDA.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .layout import Layout

_BLOCK = 64  # queries
_SCORES = 1 << 22  # held at a time, for all heads of one group


class Run(NamedTuple):
    """Rows `first + step·n + i` for n < count, i < width, as a view."""

    first: int
    count: int
    step: int
    width: int


class Part(NamedTuple):
    """Some blocks of queries and the keys they read. Rows [blocks, width] of the packed axes, -1 where there is none
    (or a Run); sees, sees_sinks: [blocks or 1, queries, keys]."""

    queries: Run | Tensor
    keys: Run | Tensor
    sinks: Tensor
    sees: Tensor
    sees_sinks: Tensor


def forward(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(q.dtype, torch.float32)
    out = q.new_empty(q.shape)
    lse = q.new_empty(q.shape[:3], dtype=dtype)
    k, v = _packed(k), _packed(v)
    groups = q.shape[2] // k.shape[1]
    by_group = [_packed(x).unflatten(1, (-1, groups)) for x in (q, out, lse[..., None])]
    for part in _parts(layout, k.shape[1], q.device):
        keys, values = _take(k, part.keys).to(dtype), _take(v, part.keys).to(dtype)
        sink_keys, sink_values = _take(k, part.sinks).to(dtype), _take(v, part.sinks).to(dtype)
        for g in range(groups):
            queries, its_out, its_lse = (x[:, :, g] for x in by_group)
            query = _take(queries, part.queries).to(dtype)
            result, top = _attend(query, keys, values, part.sees, scale)
            if layout.sinks:
                more, its_top = _plain(query, sink_keys, sink_values, part.sees_sinks, scale)
                both = torch.logaddexp(top, its_top)
                base = _finite(both)
                result = result * (top - base).exp()[..., None] + more * (its_top - base).exp()[..., None]
                top = both
            _put(its_out, part.queries, result)
            _put(its_lse, part.queries, top[..., None])
    return out, lse


def backward(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float, out: Tensor, lse: Tensor,
             grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dtype = lse.dtype
    grad_q = q.new_empty(q.shape)
    grad_k, grad_v = (x.new_zeros(x.shape[0] * x.shape[1], *x.shape[2:], dtype=dtype) for x in (k, v))
    shapes = k.shape, v.shape
    k, v = _packed(k), _packed(v)
    groups = q.shape[2] // k.shape[1]
    by_group = [
        _packed(x).unflatten(1, (-1, groups)) for x in (q, out, grad_out, lse[..., None], grad_lse[..., None], grad_q)
    ]
    for part in _parts(layout, k.shape[1], q.device):
        sets = [(part.keys, part.sees)] + [(part.sinks, part.sees_sinks)] * bool(layout.sinks)
        read = [(_take(k, rows).to(dtype), _take(v, rows).to(dtype)) for rows, _ in sets]
        for g in range(groups):
            *taken, its_grad = (x[:, :, g] for x in by_group)
            query, result, grad, top, grad_top = (_take(x, part.queries).to(dtype) for x in taken)
            delta = (grad * result).sum(-1, keepdim=True) - grad_top
            grad_query = torch.zeros_like(query)
            for (rows, sees), (key, value) in zip(sets, read, strict=True):
                score = (query @ key.mT * scale).masked_fill_(~sees[:, None], -torch.inf)
                weight = score.sub_(_finite(top)).exp_()
                d_score = (grad @ value.mT).sub_(delta).mul_(weight).mul_(scale)
                grad_query += d_score @ key
                _add(grad_k, rows, d_score.mT @ query)
                _add(grad_v, rows, weight.mT @ grad)
            _put(its_grad, part.queries, grad_query)
    return grad_q, grad_k.view(shapes[0]).to(q.dtype), grad_v.view(shapes[1]).to(q.dtype)


def _packed(x: Tensor) -> Tensor:
    x = x.flatten(0, 1)
    return x if x.stride(-1) == 1 else x.contiguous()


def _finite(x: Tensor) -> Tensor:
    # A query that sees nothing has −inf; anything finite in its place keeps exp(−inf − x) at 0.
    return x.masked_fill(x == -torch.inf, 0)


def _attend(query: Tensor, key: Tensor, value: Tensor, sees: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Out [blocks, heads, queries, dim] and log-sum-exp [blocks, heads, queries] over the keys a mask shows."""
    if query.device.type != "cpu":
        return _plain(query, key, value, sees, scale)
    mask = torch.zeros(sees.shape, dtype=query.dtype).masked_fill_(~sees, -torch.inf)[:, None]
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, False, attn_mask=mask, scale=scale
    )
    return out, lse.masked_fill(~sees.any(-1)[:, None], -torch.inf)  # it gives 0 for an empty set


def _plain(query: Tensor, key: Tensor, value: Tensor, sees: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    score = (query @ key.mT * scale).masked_fill_(~sees[:, None], -torch.inf)
    lse = score.logsumexp(-1)
    return score.sub_(_finite(lse)[..., None]).exp_() @ value, lse


def _take(x: Tensor, rows: Run | Tensor) -> Tensor:
    """[blocks, heads, width, dim] of x [rows, heads, dim]; 0 where there is no row, whatever memory holds."""
    if isinstance(rows, Run):
        return _view(x, rows)
    return x[rows.clamp(min=0)].masked_fill_((rows < 0)[..., None, None], 0).transpose(1, 2)


def _put(x: Tensor, rows: Run | Tensor, value: Tensor) -> None:
    if isinstance(rows, Run):
        _view(x, rows).copy_(value)
    else:
        held = rows >= 0
        x[rows[held]] = value.transpose(1, 2)[held].to(x.dtype)


def _add(x: Tensor, rows: Run | Tensor, value: Tensor) -> None:
    if isinstance(rows, Run):
        # Slabs overlap, but pieces of them no wider than their distance do not.
        for begin in range(0, rows.width, rows.step):
            width = min(rows.step, rows.width - begin)
            piece = Run(rows.first + begin, rows.count, rows.step, width)
            _view(x, piece).add_(value[:, :, begin : begin + width])
    else:
        value = value.sum_to_size(rows.shape[0], *value.shape[1:])
        x.index_add_(0, rows.clamp(min=0).flatten(), value.transpose(1, 2).flatten(0, 1))


def _view(x: Tensor, run: Run) -> Tensor:
    held = x[run.first : run.first + (run.count - 1) * run.step + run.width]
    return held.unfold(0, run.width, run.step).transpose(2, 3)


def _parts(layout: Layout, kv_heads: int, device: torch.device) -> Iterator[Part]:
    spans = layout.spans()
    block = max(1, min(_BLOCK, max((span.queries for span in spans), default=1)))
    width = block + layout.reach
    most = max(1, _SCORES // (kv_heads * block * (width + layout.sinks)))  # blocks in a part
    # Blocks whose windows begin equally far into a segment share a mask.
    period = math.lcm(block, layout.segment) // block
    ends = []  # of sequences: blocks whose mask is their own
    for span in spans:
        blocks = -(-span.queries // block)
        # From here on every window is whole and every sink lies before it.
        whole = layout.reach + max(span.first, layout.sinks)
        inner = range(max(0, -(-(whole - span.position) // block)), span.queries // block)
        ends += [(span, b) for b in range(blocks) if b not in inner]
        for phase in inner[:period]:
            same = inner[phase - inner.start :: period]
            mask = _masks(layout, block, [(span, phase)], device)[3:]
            for i in range(0, len(same), most):
                count, step = len(same[i : i + most]), period * block
                query = same[i] * block
                key = span.key + layout.lead + span.position + query - layout.reach - span.first
                sinks = span.key + torch.arange(layout.sinks, device=device)[None]
                yield Part(Run(span.query + query, count, step, block), Run(key, count, step, width), sinks, *mask)
    for i in range(0, len(ends), most):
        yield Part(*_masks(layout, block, ends[i : i + most], device))


def _masks(layout: Layout, block: int, blocks: list, device: torch.device) -> tuple[Tensor, ...]:
    """Rows and masks, in a Part's order, of (sequence, number of block) each."""
    ends = [(s.query + b * block, s.queries - b * block, s.position + b * block, s.key, s.first) for s, b in blocks]
    query, many, position, key, first = torch.tensor(ends, device=device)[:, :, None].unbind(1)
    i = torch.arange(block, device=device)
    p = position + i  # [blocks, queries]
    x = position - layout.reach + torch.arange(block + layout.reach, device=device)  # [blocks, keys]
    begin = layout.window_start(p)
    sees = (x[:, None] >= torch.maximum(begin, first)[..., None]) & (x[:, None] <= p[..., None])
    sink = torch.arange(layout.sinks, device=device)
    held = i < many
    sees, sees_sinks = sees & held[..., None], (sink < begin[..., None]) & held[..., None]
    queries = torch.where(held, query + i, -1)
    keys = torch.where(sees.any(1), key + layout.lead + x - first, -1)
    sinks = torch.where(sees_sinks.any(1), key + sink, -1)
    return queries, keys, sinks, sees, sees_sinks
