"""Where the nodes of a summary tree lie in one flat table of rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


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


def check_levels(levels: Sequence[Level], rows: int, arity: int) -> None:
    """Raises ValueError unless the levels are whole numbers that place nodes in a table of so many rows."""
    if arity ** len(levels) >= 2**63:
        raise ValueError(f"levels: expected spans of less than 2^63 tokens, got {len(levels)} levels of arity {arity}")
    for i, level in enumerate(levels, 1):
        if len(level) != 6 or not all(isinstance(field, (int, torch.SymInt)) for field in level):
            raise ValueError(f"levels: expected the 6 whole numbers of a Level, got {level!r} as level {i}")
        offset, *steps, slots, carry = level
        if min(*level) < 0 or max(*steps, carry) >= 2**31:
            raise ValueError(f"levels: expected fields from 0 to 2^31 - 1, got {level!r} as level {i}")
        if not 1 <= slots <= 2**16:
            raise ValueError(f"levels: expected 1 to 65536 slots, got {slots} in level {i}")
        if offset > rows:
            raise ValueError(f"levels: expected an offset within the {rows} rows of nodes, got {offset} in level {i}")


def check_position(position: Tensor) -> None:
    """Raises ValueError where positions are no positions. Reads them, so only where that needs no wait: on the CPU."""
    if position.device.type == "cpu" and position.numel():
        low, high = (int(end) for end in position.aminmax())
        if low < 0 or high >= 2**31:
            raise ValueError(f"position: expected 0 to 2^31 - 1, got {low} to {high}")


def not_held(rows: int) -> ValueError:
    """What is wrong with positions that see a node outside a table of so many rows."""
    return ValueError(f"position: reads a node that `nodes` does not hold (of {rows} rows, placed as `levels` tells; a "
                      "document continued from an earlier call needs carry)")  # fmt: skip


def flatten(levels: Sequence[Level]) -> list[int]:
    return [value for level in levels for value in level]


def unflatten(values: Sequence[int]) -> list[Level]:
    return [Level(*values[i : i + 6]) for i in range(0, len(values), 6)]


def completed(position: Int[Tensor, "batch time"], span: int) -> Int[Tensor, "batch time"]:
    """Nodes of `span` tokens each that were completed in this call up to each position, over all documents."""
    position = position.long()  # a span may be more than a narrow type holds
    return ((position % span == 0) & (position > 0)).cumsum(1)


def visible_rows(
    position: Int[Tensor, "batch time"], level: Level, span: int
) -> tuple[Int[Tensor, "batch time slots"], Tensor]:
    """Rows that each position reads of a level, and whether it sees the level at all (a row is else 0). A row is
    negative where the node is older than the call and not carried."""
    sees = position.long() >= span
    node = torch.where(sees, completed(position, span) + level.carry - 1, 0)
    batch = torch.arange(position.shape[0], device=position.device)[:, None, None] * level.batch
    slot = torch.arange(level.slots, device=position.device) * level.slot
    rows = torch.where(node[..., None] < 0, -1, level.offset + batch + node[..., None] * level.node + slot)
    return torch.where(sees[..., None], rows, 0), sees
