"""Block votes in vectorised PyTorch on any device, some sets at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from . import sets

# Scores held at once: few enough for a CPU's cache to serve the passes over them.
_SCORES = 1 << 20


def forward(q: Tensor, k: Tensor, bias: Tensor | None, visible: Tensor | None, oldest: Tensor | None,
            cu_seqlens: Tensor | None, cu_slots: Tensor | None, picks: int, groups: int, query_block: int,
            slot_block: int, scale: float) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(q.dtype, torch.float32)
    batch, time = q.shape[:2]
    documents = 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    rows = sets.allocated(time, documents, query_block)
    index = torch.full((batch, rows, groups, picks), -1, dtype=torch.int32, device=q.device)
    score = torch.full(index.shape, -torch.inf, dtype=dtype, device=q.device)
    done = 0
    for row, at, of in sets.sequences(batch, time, k.shape[1], cu_seqlens, cu_slots):
        done = 0 if cu_seqlens is None else done
        count = -(-(at.stop - at.start) // query_block)
        if count and of.stop > of.start:
            _sequence(
                q[row, at].to(dtype), k[row, of].to(dtype), None if bias is None else bias[row, of].to(dtype),
                None if visible is None else visible[row, of],
                None if oldest is None else oldest[row, at][::query_block], query_block, slot_block, scale,
                index[row, done : done + count], score[row, done : done + count],
            )  # fmt: skip
        done += count
    return index, score


def _sequence(q: Tensor, k: Tensor, bias: Tensor | None, visible: Tensor | None, oldest: Tensor | None,
              query_block: int, slot_block: int, scale: float, index: Tensor, score: Tensor) -> None:
    """Write the picks of one sequence's sets; oldest: of each set."""
    slots = k.shape[0]
    count, picks = index.shape[0], index.shape[-1]
    firsts = torch.arange(count, device=q.device) * query_block
    begins, ends = [0] * count, [slots] * count
    if oldest is not None:
        begins = oldest.clamp(0, slots).tolist()
    if visible is not None:
        one = torch.zeros_like(firsts)
        ends = sets.reach(visible, torch.tensor([0, slots], device=q.device), one, firsts).tolist()
    behind = 0 if query_block == 1 else 1  # the voters lie one block behind; the first block has none
    chunk = max(1, _SCORES // (query_block * q.shape[1] * slots))
    for a in range(behind, count, chunk):
        b = min(a + chunk, count)
        skipped = min(begins[a:b]) // slot_block  # blocks too old for all
        begin, end = skipped * slot_block, min(-(-ends[b - 1] // slot_block) * slot_block, slots)
        if begin >= end:
            continue
        hidden = []
        if visible is not None:
            hidden.append(visible[begin:end, None] > firsts[a:b])
        if oldest is not None:
            hidden.append(torch.arange(begin, end, device=q.device)[:, None] < oldest[a:b])
        voters = q[(a - behind) * query_block : (b - behind) * query_block].unflatten(0, (b - a, query_block))
        votes = _votes(
            voters, k[begin:end], None if bias is None else bias[begin:end], hidden, index.shape[1], slot_block, scale
        )
        # A stable sort leaves equal votes in the order of their blocks.
        best, order = votes.sort(dim=-1, descending=True, stable=True)
        best, order = best[..., :picks], order[..., :picks]
        score[a:b, :, : best.shape[-1]] = best
        index[a:b, :, : best.shape[-1]] = torch.where(best > -torch.inf, order + skipped, -1)


def _votes(voters: Tensor, k: Tensor, bias: Tensor | None, hidden: list[Tensor], groups: int, slot_block: int,
           scale: float) -> Tensor:
    """[sets, voters, heads, dim], [slots, kv_heads, dim] -> [sets, groups, blocks]; hidden: each [slots, sets]."""
    count, each, heads, _ = voters.shape
    slots, kv_heads = k.shape[:2]
    blocks = -(-slots // slot_block)
    rows = (voters * scale).unflatten(2, (kv_heads, -1)).permute(2, 4, 0, 1, 3).flatten(2)  # [kv_heads, dim, rows]
    padding = blocks * slot_block - slots
    keys = torch.nn.functional.pad(k.transpose(0, 1), (0, 0, 0, padding))
    # Slots before rows: sums over the slots of a block then run over whole rows.
    score = keys @ rows
    if bias is not None:
        score[:, :slots] += bias.T[..., None]
    for mask in hidden:
        score[:, :slots].unflatten(2, (count, -1)).masked_fill_(mask[None, :, :, None], -torch.inf)
    score[:, slots:] = -torch.inf
    score = score.unflatten(1, (blocks, slot_block)).logsumexp(2)
    score = score.view(kv_heads, blocks, count, each, groups // kv_heads, heads // groups).logsumexp((3, 5))
    score.masked_fill_(score.isnan(), -torch.inf)  # a sort would put it first
    return score.permute(2, 0, 3, 1).flatten(1, 2)
