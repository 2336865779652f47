"""The bucket lookup in vectorised PyTorch on any device, some queries at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from ..topk_blocks import sets

# Numbers of gathered keys held at once: few enough for a CPU's cache.
_GATHERED = 1 << 19


def forward(q: Tensor, codes: Tensor, k: Tensor, keys: Tensor, bias: Tensor | None, available: Tensor | None,
            oldest: Tensor | None, cu_seqlens: Tensor | None, cu_slots: Tensor | None, picks: int, candidates: int,
            scale: float) -> tuple[Tensor, Tensor, Tensor]:
    batch, time, heads, dim = q.shape
    index = torch.full((batch, time, heads, picks), -1, dtype=torch.int32, device=q.device)
    score = torch.full(index.shape, -torch.inf, dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    found = index.new_zeros(index.shape[:-1])
    chunk = max(1, _GATHERED // max(1, heads * candidates * dim))
    for row, at, of in sets.sequences(batch, time, k.shape[1], cu_seqlens, cu_slots):
        if of.start == of.stop:
            continue
        own_keys, own_k = keys[row, :, :, of].contiguous(), k[row, of].flatten(0, 1)
        own_bias = None if bias is None else bias[row, of].flatten()
        for a in range(at.start, at.stop, chunk):
            t = slice(a, min(a + chunk, at.stop))
            limit = None if available is None else available[row, t]
            least = None if oldest is None else oldest[row, t]
            slots = _candidates(codes[row, t], own_keys, limit, least, candidates)
            _rank(q[row, t], slots, own_k, own_bias, keys.shape[1], scale, index[row, t], score[row, t], found[row, t])
    return index, score, found


def _candidates(codes: Tensor, keys: Tensor, limit: Tensor | None, least: Tensor | None, candidates: int) -> Tensor:
    """[queries, heads, candidates] slots, least <= slot < limit, rising, each once; the number of slots where there is
    no further one."""
    queries, heads, tables, probes = codes.shape
    kv_heads, _, slots = keys.shape
    each = candidates // (tables * probes)
    codes = codes.view(queries, kv_heads, -1, tables, probes).permute(1, 3, 0, 2, 4).long()
    limit = torch.full((queries,), slots, device=codes.device) if limit is None else limit.long().clamp(0, slots)
    bound = (codes << 32) + limit[:, None, None]
    # The bucket's slots that may be read lie just before where the first that may not would be.
    end = torch.searchsorted(keys, bound.flatten(2).contiguous()).view(bound.shape)
    place = end[..., None] - torch.arange(1, each + 1, device=keys.device)
    key = keys.gather(2, place.clamp(min=0).flatten(2)).view(place.shape)
    slot = key & 0xFFFFFFFF
    member = (place >= 0) & ((key >> 32) == codes[..., None]) & (slot < limit[:, None, None, None])
    if least is not None:  # the newest were taken first, so nothing that may be read was passed over
        member &= slot >= least[:, None, None, None]
    slot = torch.where(member, slot, slots).permute(2, 0, 3, 1, 4, 5).reshape(queries, heads, -1)
    slot = slot.sort(dim=-1).values
    slot[..., 1:].masked_fill_(slot[..., 1:] == slot[..., :-1].clone(), slots)
    return slot


def _rank(q: Tensor, slots: Tensor, k: Tensor, bias: Tensor | None, kv_heads: int, scale: float, index: Tensor,
          score: Tensor, found: Tensor) -> None:
    """Write the best of the candidates of some queries; k: [slots * kv_heads, dim]."""
    queries, heads, count = slots.shape
    some = slots < k.shape[0] // kv_heads
    found.copy_(some.sum(-1))
    kv_head = torch.arange(heads, device=k.device) * kv_heads // heads
    rows = torch.where(some, slots * kv_heads + kv_head[:, None], 0).flatten()
    dtype = score.dtype
    read = k.index_select(0, rows).view(queries * heads, count, -1).to(dtype)
    x = torch.bmm(read, (q.to(dtype) * scale).reshape(queries * heads, -1, 1)).view(slots.shape)
    if bias is not None:
        x = x + bias[rows].view(slots.shape)
    # A stable sort leaves equal scores in the order of their slots.
    best, order = x.masked_fill(~some | x.isnan(), -torch.inf).sort(dim=-1, descending=True, stable=True)
    best, order = best[..., : index.shape[-1]], order[..., : index.shape[-1]]
    index[..., : best.shape[-1]] = torch.where(best > -torch.inf, slots.gather(-1, order), -1)
    score[..., : best.shape[-1]] = best
