"""Sequences packed along one axis: the one form in which implementations see a batch of them.

A batch `[batch, time, ...]` is a packing of equal sequences; `cu_seqlens` marks unequal ones in a batch of one.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor


class Sequences(NamedTuple):
    """Sequence s holds tokens `bounds[s] .. bounds[s + 1] - 1` of the packed axis; `longest` is the most it holds."""

    bounds: Int[Tensor, "sequences_and_one"]
    longest: int

    @property
    def count(self) -> int:
        return self.bounds.shape[0] - 1


def check_cu_seqlens(name: str, cu_seqlens: Tensor | None, batch: int) -> None:
    """What can be said of `cu_seqlens` without reading it (so that torch.compile can trace it)."""
    if cu_seqlens is None:
        return
    if not isinstance(cu_seqlens, Tensor):
        raise ValueError(f"{name}: expected a tensor of integers, got {type(cu_seqlens).__name__}")
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        got = f"{cu_seqlens.dtype} of shape {list(cu_seqlens.shape)}"
        raise ValueError(f"{name}: expected a vector of integers, int32 or int64, got {got}")
    if batch != 1:
        raise ValueError(f"{name}: expected a batch of 1 with packed sequences, got a batch of {batch}")


def sequences(batch: int, time: int, cu_seqlens: Tensor | None, device: torch.device, *,
              name: str = "cu_seqlens") -> Sequences:
    """Where the sequences of a batch lie once its first two axes are one. Reads `cu_seqlens` back to the host.

    Raises ValueError unless `cu_seqlens` rises from 0 to `time`.
    """
    if cu_seqlens is None:
        return Sequences(torch.arange(batch + 1, device=device) * time, time)
    ends = cu_seqlens.tolist()
    lengths = [b - a for a, b in pairwise(ends)]
    if ends[0] != 0 or ends[-1] != time or min(lengths, default=0) < 0:
        raise ValueError(f"{name}: expected to rise from 0 to {time}, got {ends[:8]}{' ...' if len(ends) > 8 else ''}")
    return Sequences(cu_seqlens.to(device=device, dtype=torch.int64).contiguous(), max(lengths, default=0))
