"""Where the tokens of a call stand in their rows' segments.

A row is what it holds of the segment under way and the call's tokens behind it, padding left out, cut into segments:

    segment 0, 1, 2, …    of each row: its (count + 0)th, (count + 1)th, … segment
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int, Shaped
from torch import Tensor


class Layout:
    """filled: tokens that the segment under way holds before the call `[batch]`. fresh: which places of the segments
    the call's tokens take `[batch, segments, length]`. ends_open: rows that end inside a segment, last: the segment
    they end in `[batch]`. valid: False at padding, None if there is none."""

    def __init__(self, valid: Bool[Tensor, "batch time"] | None, held: Int[Tensor, "batch"], batch: int, time: int,
                 length: int) -> None:
        self._length, self.valid = length, valid
        self.time = time
        self.filled = held.where(held < length, 0)
        if valid is None:
            self.tokens = torch.full_like(held, time)
            self._order = None
        else:
            self.tokens = valid.sum(1)
            self._order = torch.argsort(~valid, dim=1, stable=True)
        self.end = self.filled + self.tokens
        self.segments = -(-int(self.end.where(self.tokens > 0, 0).max()) // length) if batch else 0
        at = torch.arange(self.segments * length, device=held.device)
        fresh = (at >= self.filled[:, None]) & (at < self.end[:, None])
        self.fresh = fresh.view(batch, self.segments, length)
        self.ends_open = self.end % length > 0
        self.last = (self.end - 1) // length

    def pack(self, x: Shaped[Tensor, "batch time"]) -> Shaped[Tensor, "batch time"]:
        """The call's tokens, padding behind them."""
        return x if self._order is None else x.gather(1, self._order)

    def place(self, packed: Shaped[Tensor, "batch time"], blank: int, held: Shaped[Tensor, "batch length"] | None = None
              ) -> Shaped[Tensor, "batch segments length"]:
        """Something of each token, where it stands; of tokens that were there before, `held`."""
        batch, time = packed.shape
        if not self.segments:
            return packed.new_zeros(batch, 0, self._length)
        if not self.filled.any() and time == self.segments * self._length:
            row = packed
        else:
            row = packed.new_full((batch, self.segments * self._length + time), blank)
            row = row.scatter(1, self.filled[:, None] + torch.arange(time, device=packed.device), packed)
            row = row[:, : self.segments * self._length]
        row = row.reshape(self.fresh.shape).masked_fill(~self.fresh, blank)
        if held is not None and self.segments:
            before = torch.arange(self._length, device=packed.device) < self.filled[:, None]
            row = torch.cat((torch.where(before, held, row[:, 0])[:, None], row[:, 1:]), 1)
        return row

    def places(self) -> Int[Tensor, "batch time"]:
        """Of each of the call's tokens, where it came in, its place in the row; of padding, that of a token near it."""
        if self.valid is None:
            return self.filled[:, None] + torch.arange(self.time, device=self.filled.device)
        return self.filled[:, None] + (self.valid.cumsum(1) - 1).clamp(min=0)

    def shifted(self, labels: Int[Tensor, "batch time"]) -> Int[Tensor, "batch segments length"]:
        """Of each token the label of the next one, which the logits at its place are for; -100 for none."""
        packed = self.pack(labels)
        behind = torch.arange(packed.shape[1], device=packed.device) >= self.tokens[:, None]
        packed = F.pad(packed.masked_fill(behind, -100)[:, 1:], (0, 1), value=-100)
        return self.place(packed, -100)
