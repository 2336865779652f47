"""The specification of slot attention, one query and head at a time, in plain differentiable PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _packing
from . import places


def slot_attention(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor, bias: Tensor | None, visible: Tensor | None,
    start: Tensor | None, cu_seqlens: Tensor | None, cu_slots: Tensor | None, out_w: Tensor | None,
    lse_w: Tensor | None, query_block: int, slot_block: int, scale: float, _impl: str = "reference",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dtype = torch.promote_types(q.dtype, torch.float32)
    batch, time, heads, _ = q.shape
    sets, groups = index.shape[1:3]
    query_bounds = _packing.sequences(batch, time, cu_seqlens, q.device).bounds.tolist()
    slot_bounds = _packing.sequences(batch, k.shape[1], cu_slots, q.device, name="cu_slots").bounds.tolist()
    if cu_seqlens is not None and start is None:
        places.check_sets(sets, cu_seqlens, query_block)
    queries, keys, values = (x.to(dtype).flatten(0, 1) for x in (q, k, v))
    entries = index.flatten(0, 1).tolist()
    outputs, sums, next_set = [], [], 0
    for s in range(len(query_bounds) - 1):
        length, slots = query_bounds[s + 1] - query_bounds[s], slot_bounds[s + 1] - slot_bounds[s]
        origin = 0 if start is None else int(start[s])
        if cu_seqlens is None:
            next_set = s * sets
        for i in range(length):
            number = (origin + i) // query_block - origin // query_block
            for h in range(heads):
                group, kv_head = h // (heads // groups), h // (heads // k.shape[2])
                scores, read = [], []
                for e in entries[next_set + number][group]:
                    for n in range(e * slot_block, (e + 1) * slot_block) if e >= 0 else ():
                        if n >= slots or (visible is not None and i < visible.flatten()[slot_bounds[s] + n]):
                            continue
                        row = slot_bounds[s] + n, kv_head
                        mass = 0 if bias is None else bias.flatten(0, 1)[row]
                        if mass > -torch.inf:
                            scores.append(scale * (queries[query_bounds[s] + i, h] * keys[row]).sum() + mass)
                            read.append(values[row])
                if lse_w is not None and lse_w.flatten(0, 1)[query_bounds[s] + i, h] > -torch.inf:
                    scores.append(lse_w.flatten(0, 1)[query_bounds[s] + i, h])
                    read.append(out_w.to(dtype).flatten(0, 1)[query_bounds[s] + i, h])
                if scores:
                    score = torch.stack(scores)
                    outputs.append(torch.softmax(score, 0) @ torch.stack(read))
                    sums.append(torch.logsumexp(score, 0))
                else:
                    outputs.append(queries.new_zeros(q.shape[-1]))
                    sums.append(queries.new_full((), -torch.inf))
        if cu_seqlens is not None and length:
            next_set += (origin + length - 1) // query_block - origin // query_block + 1
    if not outputs:
        return q.new_zeros(q.shape), queries.new_zeros(q.shape[:3])
    return torch.stack(outputs).view(q.shape).to(q.dtype), torch.stack(sums).view(q.shape[:3])
