"""Inputs of tree attention shared by parity, benchmarks and notebooks."""

from __future__ import annotations

from collections.abc import Sequence

from ..parity import Case, Draw
from .levels import Level


def whole_tree(batch: int, time: int, *, arity: int = 2, slots: int = 1, carry: int = 0) -> tuple[list[Level], int]:
    """Where the levels of a tree over `time` tokens lie, slot by slot, and how many rows there are."""
    levels, offset, span = [], 0, arity
    while span <= time + carry * arity:
        nodes = carry + time // span
        levels.append(Level(offset, nodes, 1, batch * nodes, slots, carry))
        offset += slots * batch * nodes
        span *= arity
    return levels, offset


def inputs(draw: Draw, batch: int, time: int, heads: int, dim: int, *, arity: int = 2, slots: int = 1,
           documents: Sequence[int] = (), padding: int = 0) -> dict:
    """A call on random numbers. documents: lengths of the documents of each row (one of `time` if empty); padding:
    tokens at the end of each row that hold none."""
    levels, rows = whole_tree(batch, time, arity=arity, slots=slots)
    lengths = list(documents) or [time - padding]
    position = [t + 1 for length in lengths for t in range(length)] + [0] * padding
    return {
        "own": draw.normal(batch, time, 3, heads, dim),
        "nodes": draw.normal(rows, 2, heads, dim),
        "position": draw.tensor([position] * batch).reshape(batch, time),
        "levels": levels,
        "arity": arity,
    }


def _strided(draw: Draw) -> dict:
    made = inputs(draw, 2, 21, 2, 16)
    made["own"] = draw.normal(2, 3, 2, 21, 16).permute(0, 3, 1, 2, 4)
    made["nodes"] = draw.normal(*made["nodes"].shape, 2)[..., 0]
    return made


_BOTH = ("own", "nodes")
CASES = [
    Case("one token", lambda d: inputs(d, 1, 1, 1, 16), _BOTH),
    Case("no token", lambda d: inputs(d, 2, 0, 2, 16), _BOTH),
    Case("odd length, odd dim", lambda d: inputs(d, 2, 77, 2, 20), _BOTH),
    Case("two banks", lambda d: inputs(d, 1, 40, 1, 32, slots=2), _BOTH),
    Case("four children", lambda d: inputs(d, 1, 70, 2, 16, arity=4), _BOTH),
    Case("packed documents, padding", lambda d: inputs(d, 2, 64, 1, 16, documents=(5, 1, 33, 16), padding=9), _BOTH),
    Case("wide head", lambda d: inputs(d, 1, 9, 1, 256), _BOTH),
    Case("strided", _strided, _BOTH),
]
