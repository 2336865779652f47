"""Which sets of queries there are, and where their sequences lie."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from jaxtyping import Int
from torch import Tensor

from .. import _packing


def allocated(time: int, documents: int, query_block: int) -> int:
    """Rows of the sets axis: ceil(time / query_block) for one sequence; for packed ones the most that any division
    of `time` tokens into so many documents can need, as shapes may not depend on where the documents end."""
    return (time + documents * (query_block - 1)) // query_block


def sequences(batch: int, time: int, slots: int, cu_seqlens: Tensor | None, cu_slots: Tensor | None
              ) -> Iterator[tuple[int, slice, slice]]:
    """Of every sequence: its batch row, and where its queries and its slots lie in that row. Reads to the host."""
    if cu_seqlens is None:
        yield from ((row, slice(0, time), slice(0, slots)) for row in range(batch))
        return
    ends = []
    for name, cu, length in (("cu_seqlens", cu_seqlens, time), ("cu_slots", cu_slots, slots)):
        bounds = _packing.sequences(1, length, cu, cu.device, name=name).bounds.tolist()
        ends.append([slice(a, b) for a, b in pairwise(bounds)])
    yield from ((0, *both) for both in zip(*ends, strict=True))


def reach(visible: Int[Tensor, "slots"], bounds: Int[Tensor, "sequences_and_one"], sequence: Int[Tensor, "asked"],
          query: Int[Tensor, "asked"]) -> Int[Tensor, "asked"]:
    """How many slots, from the sequence's first, hold all that a query may read; `query` by number in its sequence.

    bounds: where each sequence's slots lie. Slots need not become visible in order.
    """
    at = torch.arange(visible.shape[0], device=visible.device)
    owner = torch.searchsorted(bounds[1:].contiguous(), at, right=True)
    first = (owner << 32) + visible.long().clamp(0, 2**31 - 1)
    # The least over what follows only rises, so a binary search finds the last slot that can be read.
    first = first.flip(0).cummin(0).values.flip(0)
    return torch.searchsorted(first, (sequence << 32) + query, right=True) - bounds[sequence]
