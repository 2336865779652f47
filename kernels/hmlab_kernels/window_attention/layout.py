"""Which keys each query reads: positions in documents, and the rows where they lie."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import _packing


class Span(NamedTuple):
    """One sequence: its queries lie from row `query` on, its keys from row `key` on, of the packed axes.

    first: position of its first contiguous key, which is row `key + lead`. position: of its first query.
    """

    query: int
    queries: int
    key: int
    keys: int
    first: int
    position: int


class Layout(NamedTuple):
    """The arguments that say which keys a query reads; batch, time and keys are sizes of q and k."""

    batch: int
    time: int
    keys: int
    window: int
    sinks: int
    segment: int
    start: Tensor | None
    cu_seqlens: Tensor | None
    cu_keys: Tensor | None

    @property
    def lead(self) -> int:
        """Separate keys before the contiguous ones of each sequence."""
        return 0 if self.start is None else self.sinks

    @property
    def reach(self) -> int:
        """The most that a window extends before its query, over keys that exist."""
        return min(self.window + self.segment - 2, self.keys)

    def window_start(self, position: Tensor) -> Tensor:
        return (position - self.window + 1).clamp(min=0) // self.segment * self.segment

    def sequences(self, device: torch.device) -> tuple[_packing.Sequences, _packing.Sequences]:
        """Queries and keys of the sequences, bounds contiguous. Reads cu_seqlens and cu_keys; raises ValueError."""
        queries = _packing.sequences(self.batch, self.time, self.cu_seqlens, device)
        if self.cu_seqlens is not None and self.cu_keys is None:
            keys = queries
        else:
            keys = _packing.sequences(self.batch, self.keys, self.cu_keys, device, name="cu_keys")
        if self.cu_seqlens is not None and (self.lead or self.cu_keys is not None):
            many, held = queries.bounds.diff(), keys.bounds.diff() - self.lead
            few = ((many > 0) & (held < many)).nonzero().flatten().tolist()
            if few:
                raise ValueError(
                    f"cu_keys: expected as many keys as queries after the {self.lead} separate sinks of each sequence, "
                    f"got {int(held[few[0]])} and {int(many[few[0]])} in sequence {few[0]}"
                )
        return tuple(each._replace(bounds=each.bounds.contiguous()) for each in (queries, keys))

    def spans(self) -> list[Span]:
        """The sequences, on the host."""
        queries, keys = (each.bounds.tolist() for each in self.sequences(torch.device("cpu")))
        firsts = [0] * (len(queries) - 1) if self.start is None else self.start.tolist()
        return [
            Span(q, q_end - q, k, k_end - k, first, first + k_end - k - self.lead - (q_end - q))
            for q, q_end, k, k_end, first in zip(queries, queries[1:], keys, keys[1:], firsts, strict=False)
        ]
