"""One document a row: documents packed into the rows of a call, taken apart and put back.

The hierarchy counts segments, windows and slots from the beginning of a document. So every document of a call becomes
a row of its own, as long as the longest of them: first those that go on from the state, then those that begin here.
Where only shapes are known, as under torch.compile, there are rows for as many documents as there are tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor
from torch.utils import _pytree as pytree

from hmlab.layers import Documents
from hmlab.memories.harmony.state import only_shapes


class Rows:
    """start: tokens consumed of the document that each row of the state is in. reset, valid: of a call.

    going: length of the document that goes on, per batch row `[batch]`. row, first, length: of each document that
    begins here `[documents]`: its batch row, where it begins there once padding lies at the end, and its tokens.
    """

    def __init__(self, start: Int[Tensor, "batch"], reset: Bool[Tensor, "batch time"] | None,
                 valid: Bool[Tensor, "batch time"] | None, time: int) -> None:
        self.documents = Documents(start, reset, valid, time)
        self.ragged = reset is not None or valid is not None
        number, batch = self.documents.number, len(start)
        if reset is None:
            self.going, self.begin = self.documents.count, None
            return
        lengths = torch.zeros(batch, time + 2, dtype=torch.int64, device=start.device)
        # Padding, number -1, is counted in the last place and left out.
        lengths = lengths.scatter_add(1, torch.where(number < 0, time + 1, number), torch.ones_like(number))[:, :-1]
        firsts = lengths.cumsum(1) - lengths
        self.going, last = lengths[:, 0], self.documents.last
        if only_shapes(start):
            each = torch.full_like(last, time)
            documents = batch * time
            self.longest = time
            self.row = torch.arange(batch, device=start.device)[:, None].expand(batch, time).flatten()
        else:
            each, documents = last, int(last.sum())
            self.row = torch.arange(batch, device=start.device).repeat_interleave(last, output_size=documents)
        self.before = each.cumsum(0) - each
        nth = torch.arange(documents, device=start.device) - self.before[self.row] + 1
        self.first, self.length = firsts[self.row, nth], lengths[self.row, nth]
        if not only_shapes(start):
            self.longest = max(1, int(self.length.max())) if documents else 1
        self.begin = documents

    def beginning(self, x: Shaped[Tensor, "batch time *rest"]) -> Shaped[Tensor, "documents longest *rest"]:
        """The documents that begin here; what lies beyond the end of one is anything."""
        place = self.first[:, None] + torch.arange(self.longest, device=x.device)
        place = place.clamp(max=max(x.shape[1] - 1, 0)) + self.row[:, None] * x.shape[1]
        return x.flatten(0, 1)[place]

    def join(self, going: Shaped[Tensor, "batch time *rest"], beginning: Shaped[Tensor, "documents longest *rest"]
             ) -> Shaped[Tensor, "batch time *rest"]:
        """Tokens back where they were, padding at the end of the rows still."""
        if not self.begin:
            return going
        number = self.documents.number
        batch, time = number.shape
        document = (self.before[:, None] + number - 1).clamp(0, self.begin - 1)
        within = torch.arange(time, device=number.device) - self.first[document]
        place = document * self.longest + within.clamp(0, self.longest - 1)
        begun = beginning.flatten(0, 1)[place]
        new = (number > 0).reshape(batch, time, *(1,) * (going.ndim - 2))
        return torch.where(new, begun, going)

    def last(self, going: Any, beginning: Any) -> Any:
        """The state of the document that each row ends in."""
        if not self.begin:
            return going
        last = self.documents.last
        document = (self.before + last - 1).clamp(0, self.begin - 1)

        def choose(a: Tensor, b: Tensor) -> Tensor:
            return torch.where((last > 0).reshape(-1, *(1,) * (a.ndim - 1)), b[document], a)

        return pytree.tree_map(choose, going, beginning)
