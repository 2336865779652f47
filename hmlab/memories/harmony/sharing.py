"""Sets of slots that a block of queries shares: who votes for them, and when they may be chosen.

Blocks of Q queries lie at absolute positions of the document. The set of a block is chosen when it begins, by the
queries of the block before, from what its first query may read; so nothing leaks from inside the block, and a question
at the end of a prompt fetches only at the next block. What lies between two calls is in the state: the set of the block
under way and its queries so far.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hmlab.memories.harmony.state import State, rows_at


class Blocks:
    """The blocks that a call's queries lie in. start: position of each row's first query. first: number in the call of
    the first query of each block `[rows, sets]`, negative for one that was under way."""

    def __init__(self, held: State, time: int, size: int, *, fresh: bool) -> None:
        self.held, self.time, self.size, self.start = held, time, size, held.position
        self.under_way = held.position % size
        self.sets = -(-time // size) if fresh else (time + size - 2) // size + 1
        self.first = torch.arange(self.sets, device=self.start.device) * size - self.under_way[:, None]

    @property
    def positions(self) -> Float[Tensor, "rows aligned"]:
        """Where in the document the voters stand."""
        begin = self.start - self.under_way - self.size
        return (begin[:, None] + torch.arange((self.sets + 1) * self.size, device=begin.device)).double()

    def voters(self, q: Float[Tensor, "rows time heads dim"]) -> Float[Tensor, "rows aligned heads dim"]:
        """The queries from the block before the first one on, each block whole; beyond the last query, anything."""
        place = torch.arange((self.sets + 1) * self.size, device=q.device) - self.size
        within = place - self.under_way[:, None]
        place = torch.where(place < 0, place + self.size, torch.where(within < 0, place, self.size + within))
        return rows_at(torch.cat((self.held.voters.to(q.dtype), q), 1), place.clamp(max=self.size + self.time - 1))

    def complete(self, index: Int[Tensor, "rows sets groups picks"]) -> Int[Tensor, "rows sets groups picks"]:
        """The sets chosen, but that of a block under way, which was chosen when it began."""
        going = (torch.arange(self.sets, device=index.device) == 0) & (self.under_way > 0)[:, None]
        return torch.where(going[..., None, None], self.held.sets[:, None].to(index.dtype), index)

    def state(self, index: Tensor, voters: Tensor, length: Int[Tensor, "rows"] | None, dropped: Int[Tensor, "rows"]
              ) -> dict[str, Tensor]:
        """The state's fields after the call. dropped: slots forgotten since the sets were chosen."""
        count = torch.full_like(self.start, self.time) if length is None else length
        end = self.start + count
        last = torch.div(end - 1, self.size, rounding_mode="floor")
        block = last - self.start // self.size
        chosen = rows_at(index, block.clamp(0, self.sets - 1)[:, None])[:, 0].to(self.held.sets.dtype)
        chosen = torch.where((count > 0)[:, None, None], chosen, self.held.sets) - dropped[:, None, None]
        place = (block + 1) * self.size
        place = place[:, None] + torch.arange(self.size, device=place.device)
        return {"sets": chosen.clamp(min=-1), "voters": rows_at(voters, place)}
