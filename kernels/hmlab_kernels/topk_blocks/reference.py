"""The specification of the block votes, one set, group and block at a time, in plain PyTorch."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from . import sets


def topk_blocks(q: Tensor, k: Tensor, bias: Tensor | None, visible: Tensor | None, oldest: Tensor | None,
                cu_seqlens: Tensor | None, cu_slots: Tensor | None, picks: int, groups: int, query_block: int,
                slot_block: int, scale: float
                ) -> tuple[Int[Tensor, "batch sets groups picks"], Float[Tensor, "batch sets groups picks"]]:
    every = votes(q, k, bias, visible, oldest, cu_seqlens, cu_slots, groups, query_block, slot_block, scale)
    index = torch.full((*every.shape[:-1], picks), -1, dtype=torch.int32, device=q.device)
    score = every.new_full(index.shape, -torch.inf)
    # A stable sort leaves equal votes in the order of their blocks.
    best, order = every.sort(dim=-1, descending=True, stable=True)
    best, order = best[..., :picks], order[..., :picks]
    score[..., : best.shape[-1]] = best
    index[..., : best.shape[-1]] = torch.where(best > -torch.inf, order, -1)
    return index, score


def votes(q: Tensor, k: Tensor, bias: Tensor | None, visible: Tensor | None, oldest: Tensor | None,
          cu_seqlens: Tensor | None, cu_slots: Tensor | None, groups: int, query_block: int, slot_block: int,
          scale: float) -> Float[Tensor, "batch sets groups blocks"]:
    """The vote of every set for every block of its sequence, -inf where there is none."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    q, k = q.to(dtype), k.to(dtype)
    batch, time, heads, _ = q.shape
    slots, kv_heads = k.shape[1:3]
    documents = 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    rows = sets.allocated(time, documents, query_block)
    every = q.new_full((batch, rows, groups, -(-slots // slot_block)), -torch.inf)
    done = 0
    for row, at, of in sets.sequences(batch, time, slots, cu_seqlens, cu_slots):
        done = 0 if cu_seqlens is None else done
        for first in range(0, at.stop - at.start, query_block):
            least = 0 if oldest is None else int(oldest[row, at.start + first])
            voters = range(first, first + 1) if query_block == 1 else range(max(first - query_block, 0), first)
            for group in range(groups):
                members = range(group * heads // groups, (group + 1) * heads // groups)
                for block in range(-(-(of.stop - of.start) // slot_block)):
                    terms = [
                        q[row, at.start + t, h] @ k[row, of.start + j, h * kv_heads // heads] * scale
                        + (0 if bias is None else bias[row, of.start + j, h * kv_heads // heads].to(dtype))
                        for j in range(block * slot_block, min((block + 1) * slot_block, of.stop - of.start))
                        if j >= least and (visible is None or visible[row, of.start + j] <= first)
                        for t in voters
                        for h in members
                    ]
                    if terms:
                        vote = torch.stack(terms).logsumexp(0)
                        every[row, done, group, block] = torch.where(vote.isnan(), -torch.inf, vote)
            done += 1
    return every
