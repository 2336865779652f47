"""Where sets lie: which sequence, and which of its queries, a set serves."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from .. import _packing


class Places(NamedTuple):
    """Sequences of queries and of slots on their packed axes; the sequence of each set, and the first set of each
    sequence. Sets beyond a sequence's last query serve none."""

    queries: _packing.Sequences
    slots: _packing.Sequences
    sequence: Int[Tensor, "sets"]
    first_set: Int[Tensor, "sequences"]


def check_start(q: Tensor, index: Tensor, start: Tensor | None, cu_seqlens: Tensor | None, query_block: int) -> None:
    """Raises ValueError for a negative start and for too few sets, where reading the values needs no waiting."""
    if start is None or start.device.type != "cpu" or not start.numel():
        return
    if int(start.min()) < 0:
        raise ValueError(f"start: expected at least 0, got {int(start.min())}")
    needed = int((start % query_block + q.shape[1] - 1).max()) // query_block + 1
    if cu_seqlens is None and q.shape[1] and index.shape[1] < needed:
        raise ValueError(f"index: expected at least {needed} sets, got {index.shape[1]}")


def find(q: Tensor, k: Tensor, index: Tensor, start: Tensor | None, cu_seqlens: Tensor | None,
         cu_slots: Tensor | None, query_block: int) -> Places:
    """Raises ValueError where the bounds are none, or where packed sequences that start at 0 have too few sets."""
    batch, sets = index.shape[:2]
    queries = _packing.sequences(batch, q.shape[1], cu_seqlens, q.device)
    slots = _packing.sequences(batch, k.shape[1], cu_slots, q.device, name="cu_slots")
    check_start(q, index, start, cu_seqlens, query_block)
    if cu_seqlens is None:
        sequence = torch.arange(batch * sets, device=q.device) // max(sets, 1)
        return Places(queries, slots, sequence, torch.arange(batch, device=q.device) * sets)
    lengths = queries.bounds.diff()
    phase = 0 if start is None else start.to(lengths) % query_block
    counts = torch.where(lengths > 0, (phase + lengths - 1) // query_block + 1, 0)
    ends = counts.cumsum(0)
    if start is None:
        check_sets(sets, cu_seqlens, query_block)
    sequence = torch.searchsorted(ends, torch.arange(sets, device=q.device), right=True)
    return Places(queries, slots, sequence.clamp(max=max(queries.count - 1, 0)), ends - counts)


def check_sets(sets: int, cu_seqlens: Tensor, query_block: int) -> None:
    """Raises ValueError where packed sequences, each beginning with a block, have too few sets."""
    needed = sum(-(-length // query_block) for length in cu_seqlens.diff().tolist())
    if sets < needed:
        raise ValueError(f"index: expected at least {needed} sets, got {sets}")
