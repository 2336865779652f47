"""Which nodes a call completes, from which children, and what is kept of them: the bookkeeping of the tree.

A level's table holds, per row of the batch, the `carry` youngest nodes of earlier calls (oldest first) and then
the nodes that this call completes: `[slots, batch, carry + new, dim]`. Level 0 holds the tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from hmlab_kernels.tree_attention import Level
from hmlab_kernels.tree_attention.levels import completed
from jaxtyping import Float, Int
from torch import Tensor

Table = Float[Tensor, "_slots batch _nodes dim"]  # levels differ in both


def depth(position: int, arity: int) -> int:
    """floor(log_arity(position)): how many levels hold a complete node at a position; 0 at position 0."""
    levels = 0
    while position >= arity:
        position //= arity
        levels += 1
    return levels


@dataclass(frozen=True)
class Tree:
    """The tree of one call: `arity` children per node, of which the summarizer also sees `kernel - arity` older."""

    arity: int
    kernel: int
    position: Int[Tensor, "batch time"]  # 1-based in the document, 0 at padding
    start: int | None  # tokens before this call where all rows agree and no document begins inside; else None

    def build(self, x: Float[Tensor, "batch time dim"], carried: list[Table] | None, levels: int,
              summarise: Callable[[Tensor], Tensor]) -> list[Table]:
        """Tables of level 0 .. `levels`. carried: the last kernel − 1 nodes of each level so far, None at first."""
        carry = self.carry(carried)
        if self.start is None:  # padding keeps no place among the tokens
            order = (self.position == 0).long().argsort(dim=1, stable=True)
            x = x.gather(1, order[..., None].expand_as(x))
        tables = [_joined(carried, 0, x[None], carry)]
        for level in range(1, levels + 1):
            children = self._children(tables[-1], level, carry)
            slots = None
            if children.shape[2]:
                slots = summarise(children)
            tables.append(_joined(carried, level, slots, carry))
        return tables

    def carry(self, carried: list[Table] | None) -> int:
        # At the beginning only an overlapping kernel needs (zero) nodes before the first.
        return self.kernel - 1 if carried is not None or self.start is None else self.kernel - self.arity

    def _children(self, table: Table, level: int, carry: int) -> Float[Tensor, "slots batch new kernel dim"]:
        span = self.arity**level
        if self.start is not None:
            end = self.start + self.position.shape[1]
            first, last = self.start // span, end // span
            if first == last:
                return table.new_empty(*table.shape[:2], 0, self.kernel, table.shape[-1])
            before = self.start // (span // self.arity)
            low = carry + first * self.arity + self.arity - self.kernel - before
            run = table[:, :, low : low + (last - first - 1) * self.arity + self.kernel]
            if self.kernel == self.arity:
                return run.unflatten(2, (last - first, self.arity))
            return run.unfold(2, self.kernel, self.arity).transpose(-1, -2)
        # Rows differ: look up when each new node was completed, and the children that were youngest then.
        time = self.position.shape[1]
        done = completed(self.position, span)
        new = -(-time // span)  # no row can complete more
        number = torch.arange(1, new + 1, device=done.device).expand(len(done), -1).contiguous()
        when = torch.searchsorted(done.contiguous(), number).clamp(max=max(time - 1, 0))
        youngest = carry - 1 + completed(self.position, span // self.arity).gather(1, when)
        age = torch.arange(self.kernel - 1, -1, -1, device=done.device)
        index = (youngest[..., None] - age).clamp(min=0)  # [batch, new, kernel]
        children = _take(table, index.flatten(1)).unflatten(2, (new, self.kernel))
        if self.kernel > self.arity:  # an overlapping kernel must not see the document before
            known = self.position.gather(1, when) // (span // self.arity)
            children = children * (age < known[..., None])[..., None]
        return children

    def kept(self, table: Table, level: int, end: Int[Tensor, "batch"], carry: int
             ) -> Float[Tensor, "slots batch kept dim"]:
        """The last kernel − 1 nodes of a level after the call, zero where there are none yet: the next `carried`."""
        keep = self.kernel - 1
        if self.start is not None:
            tail = table[:, :, max(table.shape[2] - keep, 0) :]
            return torch.nn.functional.pad(tail, (0, 0, keep - tail.shape[2], 0))
        span = self.arity**level
        youngest = carry - 1 + ((self.position % span == 0) & (self.position > 0)).sum(1)
        age = torch.arange(keep - 1, -1, -1, device=table.device)
        index = (youngest[:, None] - age).clamp(min=0)
        exists = age < (end // span)[:, None]
        return torch.where(exists[..., None], _take(table, index), 0)


def _joined(carried: list[Table] | None, level: int, new: Tensor | None, carry: int) -> Table:
    old = carried[level] if carried is not None and level < len(carried) else None
    if old is None:
        return new if carry == 0 else torch.nn.functional.pad(new, (0, 0, carry, 0))
    return old if new is None else torch.cat([old.to(new.dtype), new], 2)


def _take(table: Table, index: Int[Tensor, "batch some"]) -> Float[Tensor, "slots batch some dim"]:
    """Nodes by their place in the table, per row."""
    return table.gather(2, index[None, :, :, None].expand(table.shape[0], -1, -1, table.shape[-1]))


def rows(tables: list[Table], carry: int) -> tuple[Float[Tensor, "rows dim"], list[Level]]:
    """All tables of level 1 and above as one list of rows, and where each level lies in it."""
    levels, offset = [], 0
    for table in tables[1:]:
        slots, batch, nodes, _ = table.shape
        levels.append(Level(offset, nodes, 1, batch * nodes, slots, carry))
        offset += slots * batch * nodes
    flat = [table.flatten(0, 2) for table in tables[1:]]
    return torch.cat(flat) if flat else tables[0].new_empty(0, tables[0].shape[-1]), levels
