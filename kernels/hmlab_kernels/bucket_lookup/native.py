"""The bucket lookup on the CPU in C++ (native.cpp): no copy of a key is made for its readers."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from .. import _native
from ..topk_blocks import sets

_SOURCE = Path(__file__).with_name("native.cpp")


def forward(q: Tensor, codes: Tensor, k: Tensor, keys: Tensor, bias: Tensor | None, available: Tensor | None,
            oldest: Tensor | None, cu_seqlens: Tensor | None, cu_slots: Tensor | None, picks: int, candidates: int,
            scale: float) -> tuple[Tensor, Tensor, Tensor]:
    batch, time, heads, dim = q.shape
    slots, kv_heads = k.shape[1:3]
    tables, probes = codes.shape[3:]
    dtype = _native.wide(q.dtype)
    index = torch.full((batch, time, heads, picks), -1, dtype=torch.int32)
    score, found = torch.full(index.shape, -torch.inf, dtype=dtype), index.new_zeros(index.shape[:-1])
    bounds = [(row, row * time + at.start, row * time + at.stop, row * slots + of.start, row * slots + of.stop)
              for row, at, of in sets.sequences(batch, time, slots, cu_seqlens, cu_slots)
              if at.start < at.stop and of.start < of.stop]  # fmt: skip
    q, k = (_native.packed(x, dtype) for x in (q, k))
    available, oldest = (None if x is None else x.to(torch.int64).contiguous() for x in (available, oldest))
    bias = None if bias is None else bias.to(dtype).contiguous()
    sizes = [len(bounds), heads, kv_heads, dim, tables, probes, slots, picks, candidates // (tables * probes),
             *q.stride()[:2], *k.stride()[:2]]  # fmt: skip
    _native.call(_SOURCE, f"bucket_lookup_{str(dtype).removeprefix('torch.')}", sizes, torch.tensor(bounds),
                 codes.contiguous(), keys.contiguous(), available, oldest, q, k, bias, float(scale), index, score,
                 found)  # fmt: skip
    return index, score, found
