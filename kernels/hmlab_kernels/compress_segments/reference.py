"""The specification of compressed segments, one segment and head at a time, in plain differentiable PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def compress_segments(k: Tensor, v: Tensor, queries: Tensor, count: Tensor, starts: list[int], segment: int,
                      scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, _, heads, dim = k.shape
    most = queries.shape[1]
    dtype, sums = k.dtype, torch.promote_types(k.dtype, torch.float32)
    k, v, queries = k.to(sums), v.to(sums), queries.to(sums)
    place = torch.arange(segment, dtype=sums, device=k.device)
    kept = []
    for b in range(batch):
        for g, start in enumerate(starts):
            for h in range(heads):
                m = min(max(int(count[b, g, h]), 0), most)
                keys, values = k[b, start : start + segment, h], v[b, start : start + segment, h]
                if m == segment:
                    mean = torch.eye(segment, dtype=sums, device=k.device)
                    mass = torch.ones_like(place)
                else:
                    log_share = torch.log_softmax(scale * keys @ queries[h, :m].T, 1)
                    mean = torch.softmax(log_share, 0).T  # [m, segment]: share / mass
                    mass = log_share.exp().sum(0)
                kept.append([_padded(x, most) for x in (mean @ keys, mean @ values, mass, mean @ place)])
    shape = (batch, len(starts), heads, most)
    if not kept:
        slots, masses = k.new_zeros(*shape, dim), k.new_zeros(shape)
        all_k, all_v, mass, position = slots, slots.clone(), masses, masses.clone()
    else:
        all_k, all_v, mass, position = (torch.stack(x).unflatten(0, shape[:3]) for x in zip(*kept, strict=True))
    # heads between most and dim, as a cache of tokens has them
    return all_k.transpose(2, 3).to(dtype), all_v.transpose(2, 3).to(dtype), mass.mT, position.mT


def _padded(x: Tensor, most: int) -> Tensor:
    """x and rows of zeros, `most` in all."""
    return torch.cat([x, x.new_zeros(most - len(x), *x.shape[1:])])
