"""The tokens of a call as the segments see them, and the summaries that are made of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hmlab.wrappers.hmt.backbone import Reader

if TYPE_CHECKING:
    from hmlab.wrappers.hmt.network import HMT


class Texts:
    """The tokens of a call by segments, the one before the call first `[batch, 1 + segments, length]`.

    Where gradients are wanted they are embedded once: each look-up's backward pass makes a whole table.
    """

    def __init__(self, reader: Reader, ids: Int[Tensor, "batch pieces length"]) -> None:
        self._reader, self.ids = reader, ids
        self._embedded = reader.embed(ids) if torch.is_grad_enabled() else None

    def embedded(self, pieces: int | slice, columns: slice, chosen: Tensor | None = None) -> Tensor:
        """Some columns of one piece, or of those of several that are chosen."""
        taken = self.ids if self._embedded is None else self._embedded
        taken = taken[:, pieces, columns] if chosen is None else taken[:, pieces, columns][chosen]
        return self._reader.embed(taken) if self._embedded is None else taken


class Summaries:
    """S of the segments of a call, made in passes of several segments; rows that need none are left out."""

    def __init__(self, hmt: HMT, texts: Texts, fresh: Tensor, wanted: Bool[Tensor, "batch segments"], query: str
                 ) -> None:
        self._hmt, self._texts, self._wanted, self._made = hmt, texts, wanted, {}
        excerpt, self._own = hmt.config.excerpt, query == "prefix"
        self._columns = slice(excerpt) if self._own else slice(hmt.config.segment_length - excerpt, None)
        self._valid = None
        if self._own:  # of a segment that ends early, the same share
            share = (hmt.config.fraction * fresh.sum(-1, keepdim=True)).long().clamp(min=1)
            self._valid = torch.arange(excerpt, device=fresh.device) < share.clamp(max=excerpt)

    def of(self, n: int) -> Float[Tensor, "batch 1 width"]:
        """S of each row's n-th segment; 0 for rows that need none."""
        if n not in self._made:
            self._make(n)
        return self._made.pop(n)

    def _make(self, n: int) -> None:
        hmt, wanted = self._hmt, self._wanted[:, n : n + self._hmt.config.representations]
        if not wanted.any():
            self._made[n] = hmt.memory.new_zeros(len(wanted), 1, hmt.reader.width)
            return
        chosen, own = slice(n, n + wanted.shape[1]), int(self._own)
        x = self._texts.embedded(slice(chosen.start + own, chosen.stop + own), self._columns, wanted)
        t = hmt.summary.to(x.dtype).expand(len(x), 1, -1)
        valid = None
        if self._valid is not None:
            there = self._valid[:, chosen][wanted]
            if not there.all():
                ends = there.new_ones(len(there), 1)
                valid = torch.cat((ends, there, ends), 1)
        hidden, _ = hmt.through(torch.cat((t, x, t), 1), valid)
        found = hidden[:, -1]
        rows = found.new_zeros(*wanted.shape, found.shape[1])
        rows = rows.masked_scatter(wanted[..., None], found) if not wanted.all() else found.view_as(rows)
        for i in range(wanted.shape[1]):
            self._made[n + i] = rows[:, i : i + 1]
