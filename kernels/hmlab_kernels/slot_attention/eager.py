"""Slot attention in vectorised PyTorch on any device: some sets at a time, so that what is gathered stays in cache.

Sums into a slot's gradient use index_add, which is not deterministic on CUDA.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from . import places
from ._merge import merge

# Elements of keys gathered at once: for caches on a CPU, for full launches elsewhere.
_GATHERED = {"cpu": 1 << 20}
_GATHERED_ELSEWHERE = 1 << 24
# From this many queries per set on, PyTorch's own CPU kernel beats products and a softmax.
_FLASH_ROWS = 32


class _Chunk(NamedTuple):
    """Some sets. tokens: their queries on the packed axis, a slice where every set is whole, else [sets, query_block]
    beside `inside` (which of them there are). slots: rows of the flat keys [sets, groups, slots read], 0 where there
    is none. mask: what to add to the scores, [sets, groups, rows or 1, slots read], None if nothing. unread: slots
    that no query of their set reads, [sets, groups, slots read], None if there are none: they must reach no sum."""

    tokens: slice | Tensor
    inside: Tensor | None
    slots: Tensor
    mask: Tensor | None
    unread: Tensor | None

    def gather(self, flat: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows of the flat keys or values [sets, groups, slots read, dim]."""
        read = flat[self.slots].to(dtype)
        return read if self.unread is None else read.masked_fill_(self.unread[..., None], 0)


def forward(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor, bias: Tensor | None, visible: Tensor | None,
    start: Tensor | None, cu_seqlens: Tensor | None, cu_slots: Tensor | None, out_w: Tensor | None,
    lse_w: Tensor | None, query_block: int, slot_block: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    wide = torch.promote_types(q.dtype, torch.float32)
    out, lse = q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=wide)
    groups = index.shape[2]
    flat_k, flat_v = k.reshape(-1, k.shape[3]), v.reshape(-1, v.shape[3])
    flat_q, flat_out, flat_lse, flat_out_w, flat_lse_w = _flat(q, out, lse, out_w, lse_w)
    for chunk in _chunks(q, k, index, bias, visible, start, cu_seqlens, cu_slots, query_block, slot_block):
        queries = _rows(flat_q, chunk, groups, query_block).to(wide)
        keys, values = chunk.gather(flat_k, wide), chunk.gather(flat_v, wide)
        read, total = _attend(queries, keys, values, chunk.mask, scale)
        if out_w is not None:
            out_rows, lse_rows = (_rows(x, chunk, groups, query_block) for x in (flat_out_w, flat_lse_w))
            read, total = merge(read, total, out_rows.to(wide), lse_rows)
        _store(flat_out, chunk, read, query_block)
        _store(flat_lse, chunk, total, query_block)
    return out, lse


def backward(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor, bias: Tensor | None, visible: Tensor | None,
    start: Tensor | None, cu_seqlens: Tensor | None, cu_slots: Tensor | None, out_w: Tensor | None,
    lse_w: Tensor | None, query_block: int, slot_block: int, scale: float,
    out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    wide = torch.promote_types(q.dtype, torch.float32)
    groups = index.shape[2]
    grad_q = q.new_empty(q.shape)
    grad_k, grad_v = (x.new_zeros(x.shape, dtype=wide) for x in (k, v))
    grad_bias = q.new_empty(0) if bias is None else bias.new_zeros(bias.shape)
    grad_out_w, grad_lse_w = (q.new_empty(0) if x is None else x.new_empty(x.shape) for x in (out_w, lse_w))
    flat_k, flat_v = k.reshape(-1, k.shape[3]), v.reshape(-1, v.shape[3])
    flat_q, flat_lse, flat_out_w, flat_lse_w, flat_grad_out, flat_grad_lse = _flat(
        q, lse, out_w, lse_w, grad_out, grad_lse
    )
    flat_grad_q = grad_q.flatten(0, 1)
    if out_w is not None:
        flat_grad_out_w, flat_grad_lse_w = _flat(grad_out_w, grad_lse_w)
    for chunk in _chunks(q, k, index, bias, visible, start, cu_seqlens, cu_slots, query_block, slot_block):
        queries, given = (_rows(x, chunk, groups, query_block).to(wide) for x in (flat_q, flat_grad_out))
        base, grad_total = (_rows(x, chunk, groups, query_block) for x in (flat_lse, flat_grad_lse))
        base = torch.where(base == -torch.inf, torch.inf, base)
        if chunk.inside is not None:  # a row that is no query of the set has no weight
            inside = _by_group(chunk.inside[..., None].expand(-1, -1, q.shape[2]), groups)
            base = base.masked_fill(~inside, torch.inf)
        keys, values = chunk.gather(flat_k, wide), chunk.gather(flat_v, wide)
        weight = (_scores(queries, keys, chunk.mask, scale) - base[..., None]).exp()
        grad_weight = given @ values.mT
        # given · out, from what went into out: half types round out itself too coarsely.
        delta = (weight * grad_weight).sum(-1) - grad_total
        if out_w is not None:
            value, score = (_rows(x, chunk, groups, query_block) for x in (flat_out_w, flat_lse_w))
            share, grad_share = (score - base).exp(), (given * value).sum(-1)
            delta = delta + share * grad_share
            _store(flat_grad_out_w, chunk, share[..., None] * given, query_block)
            _store(flat_grad_lse_w, chunk, share * (grad_share - delta), query_block)
        grad_score = weight * (grad_weight - delta[..., None])
        _store(flat_grad_q, chunk, scale * (grad_score @ keys), query_block)
        slots = chunk.slots.flatten()
        grad_k.view(flat_k.shape).index_add_(0, slots, (scale * (grad_score.mT @ queries)).flatten(0, 2))
        grad_v.view(flat_v.shape).index_add_(0, slots, (weight.mT @ given).flatten(0, 2))
        if bias is not None:
            grad_bias.view(-1).index_add_(0, slots, grad_score.sum(2).flatten())
    return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype), grad_bias, grad_out_w, grad_lse_w


def _flat(*tensors: Tensor | None) -> list[Tensor | None]:
    """Batch and time as one axis, once and for all: of some strides this is a copy."""
    return [None if x is None else x.flatten(0, 1) for x in tensors]


def _chunks(q: Tensor, k: Tensor, index: Tensor, bias: Tensor | None, visible: Tensor | None, start: Tensor | None,
            cu_seqlens: Tensor | None, cu_slots: Tensor | None, query_block: int, slot_block: int
            ) -> Iterator[_Chunk]:
    where = places.find(q, k, index, start, cu_seqlens, cu_slots, query_block)
    if q.shape[0] * q.shape[1] == 0:
        return
    groups, kv_heads = index.shape[2], k.shape[2]
    share = q.shape[2] // groups
    index = index.flatten(0, 1)
    bias, visible = (None if x is None else x.flatten() for x in (bias, visible))
    if k.shape[1] == 0:  # nothing to gather
        index = index[..., :0]
    reads = index.shape[-1] * slot_block
    per_set = groups * max(reads, query_block * share) * q.shape[3]
    many = max(1, _GATHERED.get(q.device.type, _GATHERED_ELSEWHERE) // per_set)
    number = torch.arange(len(index), device=q.device) - where.first_set[where.sequence]
    first = number * query_block - (0 if start is None else (start % query_block)[where.sequence])
    lengths, slot_counts = where.queries.bounds.diff(), where.slots.bounds.diff()
    within_block = torch.arange(slot_block, device=q.device)
    within_set = torch.arange(query_block, device=q.device)
    kv_head = torch.arange(groups, device=q.device)[:, None] // (groups // kv_heads)
    on_cpu = q.device.type == "cpu"
    for i in range(0, len(index), many):
        sequence, entry = where.sequence[i : i + many], index[i : i + many, ..., None].long()
        query = first[i : i + many, None] + within_set
        inside = (query >= 0) & (query < lengths[sequence, None])
        slot = (entry * slot_block + within_block).flatten(2)
        exists = ((entry >= 0).expand(*entry.shape[:-1], slot_block).flatten(2)) & (
            slot < slot_counts[sequence, None, None]
        )
        slot = torch.where(exists, slot + where.slots.bounds[sequence, None, None], 0)
        rows = slot * kv_heads + kv_head
        mask = None
        if bias is not None:
            mask = bias[rows].masked_fill(~exists, -torch.inf)[:, :, None]
        elif not (on_cpu and exists.all()):
            mask = torch.zeros_like(exists, dtype=torch.promote_types(q.dtype, torch.float32))
            mask = mask.masked_fill_(~exists, -torch.inf)[:, :, None]
        if visible is not None and reads:
            hidden = query[:, None, :, None] < visible[slot][:, :, None]
            if mask is None:
                mask = torch.zeros((), dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
            mask = torch.where(hidden, -torch.inf, mask).repeat_interleave(share, 2)
        unread = None if mask is None else (mask == -torch.inf).all(2)
        tokens = query + where.queries.bounds[sequence, None]
        if on_cpu and inside.all():
            yield _Chunk(slice(int(tokens[0, 0]), int(tokens[-1, -1]) + 1), None, rows, mask, unread)
        elif not on_cpu or inside.any():
            yield _Chunk(torch.where(inside, tokens, 0), inside, rows, mask, unread)


def _rows(x: Tensor, chunk: _Chunk, groups: int, query_block: int) -> Tensor:
    """The chunk's rows of x [tokens, heads, ...] as [sets, groups, query_block · heads of a group, ...]."""
    x = x[chunk.tokens]
    return _by_group(x.unflatten(0, (-1, query_block)) if chunk.inside is None else x, groups)


def _by_group(x: Tensor, groups: int) -> Tensor:
    return x.unflatten(2, (groups, -1)).movedim(2, 1).flatten(2, 3)


def _store(x: Tensor, chunk: _Chunk, rows: Tensor, query_block: int) -> None:
    """The opposite of `_rows`, into x [tokens, heads, ...]."""
    rows = rows.unflatten(2, (query_block, -1)).movedim(1, 2).flatten(2, 3)
    if chunk.inside is None:
        x[chunk.tokens].unflatten(0, (-1, query_block)).copy_(rows)
    else:
        x[chunk.tokens[chunk.inside]] = rows[chunk.inside].to(x.dtype)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """out and log-sum-exp of rows [sets, groups, rows, dim] over their slots."""
    if k.shape[2] == 0:
        return torch.zeros_like(q), q.new_full(q.shape[:-1], -torch.inf)
    if q.device.type == "cpu" and q.shape[2] >= _FLASH_ROWS:
        if mask is not None:
            mask = mask.expand(*q.shape[:3], k.shape[2])
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, False, attn_mask=mask, scale=scale
        )
        if mask is not None:
            empty = (mask == -torch.inf).all(-1)
            out, lse = out.masked_fill(empty[..., None], 0), lse.masked_fill(empty, -torch.inf)
        return out, lse
    score = _scores(q, k, mask, scale)
    lse = torch.logsumexp(score, -1)
    return (score - torch.where(lse == -torch.inf, torch.inf, lse)[..., None]).exp() @ v, lse


def _scores(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    score = (q @ k.mT).mul_(scale)
    return score if mask is None else score.add_(mask)
