"""The specification of compressed segments, one segment and head at a time, in plain differentiable PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def compress_segments(k: Tensor, v: Tensor, queries: Tensor, count: Tensor, first: Tensor | None, starts: list[int],
                      segment: int, scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
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
                left_out = 0 if first is None else min(max(int(first[b, g]), 0), segment)
                keys, values = (x[b, start + left_out : start + segment, h] for x in (k, v))
                empty = 0  # slots before the first that holds anything
                if m == segment:
                    mean = torch.eye(segment - left_out, dtype=sums, device=k.device)
                    mass = torch.ones_like(place[left_out:])
                    empty = left_out
                else:
                    log_share = torch.log_softmax(scale * keys @ queries[h, :m].T, 1)
                    mean = torch.softmax(log_share, 0).T  # [m, tokens]: share / mass
                    mass = log_share.exp().sum(0)
                means = (mean @ keys, mean @ values, mass, mean @ place[left_out:])
                kept.append([_padded(x, empty, most) for x in means])
    shape = (batch, len(starts), heads, most)
    if not kept:
        slots, masses = k.new_zeros(*shape, dim), k.new_zeros(shape)
        all_k, all_v, mass, position = slots, slots.clone(), masses, masses.clone()
    else:
        all_k, all_v, mass, position = (torch.stack(x).unflatten(0, shape[:3]) for x in zip(*kept, strict=True))
    # heads between most and dim, as a cache of tokens has them
    return all_k.transpose(2, 3).to(dtype), all_v.transpose(2, 3).to(dtype), mass.mT, position.mT


def _padded(x: Tensor, before: int, most: int) -> Tensor:
    """x after `before` rows of zeros, and further ones up to `most` in all."""
    zeros = x.new_zeros(most - len(x), *x.shape[1:])
    return torch.cat([zeros[:before], x, zeros[before:]])
