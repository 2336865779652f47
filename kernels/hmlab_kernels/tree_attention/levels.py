"""Where the nodes of a summary tree lie in one flat table of rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor


class Level(NamedTuple):
    """One level of the tree. Node j, slot s of batch row b is row `offset + b·batch + j·node + s·slot`.

    slots: vectors per node (the banks; more with an expander). carry: nodes at the front that were completed
    before this call, oldest first; the node that a position sees is `carry - 1 + completed so far`.
    """

    offset: int
    batch: int
    node: int
    slot: int
    slots: int
    carry: int


def flatten(levels: Sequence[Level]) -> list[int]:
    return [value for level in levels for value in level]


def unflatten(values: Sequence[int]) -> list[Level]:
    return [Level(*values[i : i + 6]) for i in range(0, len(values), 6)]


def completed(position: Int[Tensor, "batch time"], span: int) -> Int[Tensor, "batch time"]:
    """Nodes of `span` tokens each that were completed in this call up to each position, over all documents."""
    return ((position % span == 0) & (position > 0)).cumsum(1)


def visible_rows(
    position: Int[Tensor, "batch time"], level: Level, span: int
) -> tuple[Int[Tensor, "batch time slots"], Tensor]:
    """Rows that each position reads of a level, and whether it sees the level at all (a row is then 0)."""
    sees = position >= span
    node = torch.where(sees, completed(position, span) + level.carry - 1, 0)
    batch = torch.arange(position.shape[0], device=position.device)[:, None, None] * level.batch
    slot = torch.arange(level.slots, device=position.device) * level.slot
    rows = level.offset + batch + node[..., None] * level.node + slot
    return torch.where(sees[..., None], rows, 0), sees
