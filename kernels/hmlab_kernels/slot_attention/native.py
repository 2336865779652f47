"""Slot attention on the CPU in C++ (native.cpp over _tile.hpp): no copy of a slot is made for its readers."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from .. import _native
from . import places

_SOURCE = Path(__file__).with_name("native.cpp")


def forward(q: Tensor, k: Tensor, v: Tensor, index: Tensor, bias: Tensor | None, visible: Tensor | None,
            start: Tensor | None, cu_seqlens: Tensor | None, cu_slots: Tensor | None, out_w: Tensor | None,
            lse_w: Tensor | None, query_block: int, slot_block: int, scale: float) -> tuple[Tensor, Tensor]:
    dtype = _native.wide(q.dtype)
    where = places.find(q, k, index, start, cu_seqlens, cu_slots, query_block)
    out, lse = q.new_empty(q.shape, dtype=dtype), q.new_empty(q.shape[:3], dtype=dtype)
    joined = [None if x is None else x.to(dtype).contiguous() for x in (out_w, lse_w)]
    _call("forward", q, k, v, index, bias, visible, start, where, query_block, slot_block, scale, *joined, out, lse)
    return out.to(q.dtype), lse


def backward(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor, bias: Tensor | None, visible: Tensor | None,
    start: Tensor | None, cu_seqlens: Tensor | None, cu_slots: Tensor | None, out_w: Tensor | None,
    lse_w: Tensor | None, query_block: int, slot_block: int, scale: float, out: Tensor, lse: Tensor,
    grad_out: Tensor, grad_lse: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    dtype = _native.wide(q.dtype)
    where = places.find(q, k, index, start, cu_seqlens, cu_slots, query_block)
    grad_out = grad_out.to(dtype).contiguous()
    delta = ((grad_out * out).sum(-1) - grad_lse).contiguous()
    grads = [x.new_empty(x.shape, dtype=dtype) for x in (q, k, v)] + [k.new_empty(k.shape[:3], dtype=dtype)]
    _call("backward", q, k, v, index, bias, visible, start, where, query_block, slot_block, scale,
          lse.contiguous(), delta, grad_out, *_readers(index, where, k.shape[2], slot_block), *grads)  # fmt: skip
    grad_q, grad_k, grad_v, grad_bias = grads
    if out_w is None:
        joined = q.new_empty(0), lse.new_empty(0)
    else:
        share = torch.where(lse_w == -torch.inf, 0, (lse_w - lse).exp())
        grad_lse_w = share * ((grad_out * out_w).sum(-1) - delta)
        joined = (share[..., None] * grad_out).to(out_w.dtype), grad_lse_w.to(lse_w.dtype)
    grad_bias = q.new_empty(0) if bias is None else grad_bias.to(bias.dtype)
    return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype), grad_bias, *joined


def _readers(index: Tensor, where: places.Places, kv_heads: int, slot_block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which sets and groups (entry = set · groups + group) picked each slot block, sorted by block and kv head: the
    first block of each sequence, and where the entries of each (block, kv head) begin."""
    groups = index.shape[2]
    blocks = (where.slots.bounds.diff() + slot_block - 1) // slot_block
    begin = torch.cat([blocks.new_zeros(1), blocks.cumsum(0)])
    flat = index.flatten(0, 1).to(torch.int64)
    group = torch.arange(groups)[:, None]
    entry = (torch.arange(flat.shape[0])[:, None, None] * groups + group).expand_as(flat)
    if not flat.numel() or not where.slots.count:
        entries = flat.new_empty(0)
        return begin, flat.new_zeros(int(begin[-1]) * kv_heads + 1), entries
    exists = (flat >= 0) & (flat < blocks[where.sequence][:, None, None])
    cell = (begin[where.sequence][:, None, None] + flat) * kv_heads + group // (groups // kv_heads)
    cell, order = cell[exists].sort(stable=True)
    offset = torch.searchsorted(cell, torch.arange(int(begin[-1]) * kv_heads + 1))
    return begin, offset, entry[exists][order].contiguous()


def _call(form: str, q: Tensor, k: Tensor, v: Tensor, index: Tensor, bias: Tensor | None, visible: Tensor | None,
          start: Tensor | None, where: places.Places, query_block: int, slot_block: int, scale: float,
          *rest: Tensor | None) -> None:
    dtype = _native.wide(q.dtype)
    heads, dim = q.shape[2:]
    groups, picks = index.shape[2:]
    q, k, v = (_native.packed(x, dtype) for x in (q, k, v))
    sizes = [where.queries.count, heads, k.shape[1], dim, groups, picks, query_block, slot_block,
             *q.stride()[:2], *k.stride()[:2], *v.stride()[:2]]  # fmt: skip
    start, visible = (None if x is None else x.to(torch.int64).contiguous() for x in (start, visible))
    if visible is not None:  # far from overflowing, and as late as any query
        visible = visible.clamp(-1, q.shape[0])
    if index.dtype == torch.int64:  # what int32 cannot hold names no block
        index = torch.where(index < 2**31, index, -1)
    bias = None if bias is None else bias.to(dtype).contiguous()
    _native.call(_SOURCE, f"slot_attention_{form}_{str(dtype).removeprefix('torch.')}", sizes,
                 where.queries.bounds, where.slots.bounds, where.first_set.contiguous(), start, visible,
                 index.to(torch.int32).contiguous(), q, k, v, bias, float(scale), *rest)  # fmt: skip
