"""The specification of the bucket lookup, one query at a time, in plain PyTorch."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..topk_blocks import sets


def bucket_lookup(q: Tensor, codes: Tensor, k: Tensor, keys: Tensor, bias: Tensor | None, available: Tensor | None,
                  oldest: Tensor | None, cu_seqlens: Tensor | None, cu_slots: Tensor | None, picks: int,
                  candidates: int, scale: float
                  ) -> tuple[Int[Tensor, "batch time heads picks"], Float[Tensor, "batch time heads picks"],
                             Int[Tensor, "batch time heads"]]:  # fmt: skip
    dtype = torch.promote_types(q.dtype, torch.float32)
    q, k = q.to(dtype), k.to(dtype)
    batch, time, heads, _ = q.shape
    slots, kv_heads = k.shape[1:3]
    tables, probes = codes.shape[3:]
    each = candidates // (tables * probes)
    index = torch.full((batch, time, heads, picks), -1, dtype=torch.int32, device=q.device)
    score = q.new_full(index.shape, -torch.inf)
    found = index.new_zeros(index.shape[:-1])
    for row, at, of in sets.sequences(batch, time, slots, cu_seqlens, cu_slots):
        for head in range(heads):
            kv = head * kv_heads // heads
            own_keys = keys[row, kv, :, of].tolist()
            entries = [[(key >> 32, key & 0xFFFFFFFF) for key in table] for table in own_keys]  # code, slot; in order
            for t in range(at.start, at.stop):
                limit = of.stop - of.start
                if available is not None:
                    limit = min(limit, int(available[row, t]))
                least = 0 if oldest is None else int(oldest[row, t])
                chosen = set()
                for table in range(tables):
                    for code in codes[row, t, head, table].tolist():
                        members = [slot for own, slot in entries[table] if own == code and least <= slot < limit]
                        chosen.update(members[-each:])
                found[row, t, head] = len(chosen)
                chosen = sorted(chosen)
                if not chosen:
                    continue
                at_slots = torch.tensor(chosen, device=q.device) + of.start
                terms = k[row, at_slots, kv] @ q[row, t, head] * scale
                if bias is not None:
                    terms = terms + bias[row, at_slots, kv].to(dtype)
                terms = terms.masked_fill(terms.isnan(), -torch.inf)
                # A stable sort leaves equal scores in the order of their slots.
                best, order = terms.sort(descending=True, stable=True)
                best, order = best[:picks], order[:picks]
                score[row, t, head, : len(best)] = best
                slot = (at_slots[order] - of.start).to(torch.int32)
                index[row, t, head, : len(best)] = torch.where(best > -torch.inf, slot, -1)
    return index, score, found
