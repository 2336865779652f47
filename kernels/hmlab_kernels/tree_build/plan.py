"""Sizes and places of a summary tree: from shapes alone, except for the children of unequal rows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from ..tree_attention.levels import Level, check_position, completed


def depth(position: int, arity: int) -> int:
    """floor(log_arity(position)): how many levels hold a complete node at a position; 0 at position 0."""
    levels = 0
    while position >= arity:
        position //= arity
        levels += 1
    return levels


class Plan(NamedTuple):
    """The tree of one call. The table of a level holds, per slot and row of the batch, `carry` nodes of earlier calls
    (oldest first) and then the new ones; level 0 holds the leaves. ragged: rows differ, as their positions tell;
    else all have seen `start` leaves before."""

    batch: int
    time: int
    dim: int
    banks: int
    expansion: int
    arity: int
    kernel: int
    start: int
    depth: int
    carry: int
    ragged: bool

    def slots(self, level: int) -> int:
        """Vectors of one node, all banks together; the banks share the leaves."""
        return 1 if level == 0 else self.banks * (1 + level * self.expansion)

    def new(self, level: int) -> int:
        """Nodes per row that this call completes; where rows differ, the most that any can."""
        span = self.arity**level
        if self.ragged:
            return -(-self.time // span)
        return (self.start + self.time) // span - self.start // span

    def low(self, level: int) -> int:
        """Where the first child of the first new node lies in the table below, if rows agree."""
        span = self.arity**level
        before = self.start // (span // self.arity)
        return self.carry + self.start // span * self.arity + self.arity - self.kernel - before

    def levels(self) -> list[Level]:
        """Where levels 1 .. depth lie in the flat table: slot by slot, row by row, node by node."""
        levels, offset = [], 0
        for i in range(1, self.depth + 1):
            nodes, slots = self.carry + self.new(i), self.slots(i)
            levels.append(Level(offset, nodes, 1, self.batch * nodes, slots, self.carry))
            offset += slots * self.batch * nodes
        return levels

    @property
    def rows(self) -> int:
        return sum(self.slots(i) * self.batch * (self.carry + self.new(i)) for i in range(1, self.depth + 1))

    def tables(self, flat: Tensor) -> list[Tensor]:
        """Views `[slots, batch, nodes, dim]` of levels 1 .. depth."""
        tables = []
        for offset, nodes, _, slot, slots, _ in self.levels():
            tables.append(flat[offset : offset + slots * slot].view(slots, self.batch, nodes, self.dim))
        return tables

    def begin(self, leaves: Tensor, carried: Tensor | None) -> tuple[Tensor, Tensor]:
        """The table of level 0, `[batch, carry + time, dim]`, and the flat table with the earlier nodes in place."""
        flat = leaves.new_empty(self.rows, self.dim)
        if self.carry:
            for table, held in zip(self.tables(flat), self._carried(carried)[1:], strict=True):
                table[:, :, : self.carry] = 0 if held is None else held
        return self.leaves(leaves, carried), flat

    def leaves(self, leaves: Tensor, carried: Tensor | None) -> Tensor:
        """The table of level 0, `[batch, carry + time, dim]`."""
        if self.carry == 0:
            return leaves.contiguous()
        held = leaves.new_zeros(self.batch, self.carry, self.dim)
        if carried is not None and carried.shape[1]:
            held = carried[:, : self.carry]
        return torch.cat([held, leaves], 1)

    def end(self, grad_first: Tensor, grad_flat: Tensor, carried: Tensor | None) -> tuple[Tensor, Tensor]:
        """The reverse of `begin`: gradients of leaves and of `carried` (empty where there was none)."""
        grad_carried = grad_first.new_zeros((0,) if carried is None else carried.shape)
        if self.carry == 0:
            return grad_first, grad_carried
        if carried is not None:
            tables = [grad_first[None], *self.tables(grad_flat)]
            for table, held in zip(tables, self._carried(grad_carried), strict=True):
                if held is not None:
                    held.copy_(table[:, :, : self.carry])
        return grad_first[:, self.carry :].contiguous(), grad_carried

    def crowded(self, level: int) -> ValueError:
        return ValueError(f"position: expected at most {self.new(level)} nodes of level {level} in {self.time} tokens, "
                          "as positions that rise by one complete; got more")  # fmt: skip

    def _carried(self, carried: Tensor | None) -> list[Tensor | None]:
        """Level by level the nodes of earlier calls, `[slots, batch, carry, dim]`; None where there are none."""
        held, at = [], 0
        for level in range(self.depth + 1):
            size = self.slots(level) * (self.kernel - 1)
            if carried is None or at + size > carried.shape[1]:
                held.append(None)
                continue
            part = carried[:, at : at + size].unflatten(1, (self.kernel - 1, self.slots(level)))
            held.append(part.permute(2, 0, 1, 3))
            at += size
        return held

    def children(self, position: Int[Tensor, "batch time"]) -> list[Int[Tensor, "batch new kernel"]]:
        """Per level, where rows differ, the places of each new node's children in the table below; −1: there is none.

        Looks up when each node was completed, and which nodes below were the youngest then. On the CPU positions that
        complete more nodes than there is room for are an error; elsewhere those nodes are left out."""
        if self.time == 0:
            return [position.new_zeros(self.batch, 0, self.kernel, dtype=torch.int64) for _ in range(self.depth)]
        check_position(position)
        position = position.long()
        age = torch.arange(self.kernel - 1, -1, -1, device=position.device)
        below, found = completed(position, 1), []
        for level in range(1, self.depth + 1):
            span = self.arity**level
            done = completed(position, span)
            if position.device.type == "cpu" and (done[:, -1:] > self.new(level)).any():
                raise self.crowded(level)
            number = torch.arange(1, self.new(level) + 1, device=position.device).expand(self.batch, -1).contiguous()
            when = torch.searchsorted(done, number).clamp(max=self.time - 1)
            youngest = self.carry - 1 + below.gather(1, when)
            known = position.gather(1, when) // (span // self.arity)  # nodes below in that document so far
            index = youngest[..., None] - age
            if level == 1:  # padding keeps no place among the leaves
                leaf = torch.searchsorted(below, (index - self.carry + 1).flatten(1)).view_as(index)
                index = torch.where(index < self.carry, index, self.carry + leaf.clamp(max=self.time - 1))
            exists = (number <= done[:, -1:])[..., None] & (age < known[..., None]) & (index >= 0)
            exists &= index < self.carry + self.new(level - 1)
            found.append(torch.where(exists, index, -1))
            below = done
        return found


def make(leaves: Tensor, taps: Tensor, carried: Tensor | None, position: Tensor | None, arity: int, kernel: int,
         start: int, levels: int) -> Plan:
    """The plan of a call from what it is given."""
    batch, time, dim = leaves.shape
    carry = carry_of(arity, kernel, start, carried is not None, position is not None)
    return Plan(batch, time, dim, taps.shape[1], taps.shape[0] - 1, arity, kernel, start, levels, carry,
                position is not None)  # fmt: skip


def carry_of(arity: int, kernel: int, start: int, carried: bool, ragged: bool) -> int:
    """Places at the front of each table. At the beginning only an overlapping kernel needs them, for zeros; where
    rows differ, children that there are none of have no place."""
    if carried or start:
        return kernel - 1
    return 0 if ragged else kernel - arity
