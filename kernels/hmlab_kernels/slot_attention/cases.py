"""Inputs of slot attention shared by parity, benchmarks and notebooks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from .. import bench
from ..parity import Case, Draw


def inputs(
    draw: Draw, batch: int, time: int, slots: int, heads: int, dim: int, *, kv_heads: int = 0, groups: int = 0,
    picks: int = 3, query_block: int = 1, slot_block: int = 1, start: Sequence[int] | None = None, sets: int = 0,
    bias: bool = True, visible: bool = False, joined: bool = False, documents: Sequence[tuple[int, int]] = (),
    holes: bool = False,
) -> dict:  # fmt: skip
    """A call on random numbers. documents: queries and slots of each packed sequence; holes: some entries are −1 and
    one set (its joined part with it) is empty."""
    kv_heads, groups = kv_heads or heads, groups or heads
    lengths = [n for n, _ in documents] or [time] * batch
    phases = [s % query_block for s in start or [0] * len(lengths)]
    counts = [-(-(p + n) // query_block) if n else 0 for p, n in zip(phases, lengths, strict=True)]
    sets = sets or (sum(counts) if documents else max(counts, default=0))
    # Distinct blocks per set, some of them beyond the last slot.
    blocks = -(-max([n for _, n in documents] or [slots]) // slot_block) + 1
    order = draw.uniform(batch, sets, groups, max(blocks, picks), dtype=torch.float64).argsort(-1)
    index = order[..., :picks].int()
    if holes:
        index = torch.where(draw.uniform(*index.shape, dtype=torch.float64) < 0.3, -1, index)
        index[:, :1] = -1
    wide = torch.promote_types(draw.dtype, torch.float32)
    made = {
        "q": draw.normal(batch, time, heads, dim),
        "k": draw.normal(batch, slots, kv_heads, dim),
        "v": draw.normal(batch, slots, kv_heads, dim),
        "index": index,
        "query_block": query_block,
        "slot_block": slot_block,
    }
    if bias:
        made["bias"] = draw.normal(batch, slots, kv_heads).to(wide)
    if visible:
        made["visible"] = draw.integers(-2, max(lengths, default=0) + 1, batch, slots).int()
    if start is not None:
        made["start"] = draw.tensor(start)
    if documents:
        made["cu_seqlens"] = _bounds(draw, lengths)
        made["cu_slots"] = _bounds(draw, [n for _, n in documents])
    if joined:
        lse = draw.normal(batch, time, heads).to(wide)
        out = draw.normal(batch, time, heads, dim)
        if holes:
            lse[:, :1] = -torch.inf
            out[:, :1] = 0
        made["joined"] = (out, lse)
    return made


def _bounds(draw: Draw, lengths: Sequence[int]):
    return draw.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()]).int()


def _strided(draw: Draw) -> dict:
    made = inputs(draw, 2, 9, 11, 2, 16, query_block=4, slot_block=2, visible=True, joined=True)
    made["q"] = draw.normal(2, 2, 9, 16).transpose(1, 2)
    made["k"] = draw.normal(2, 2, 11, 16).transpose(1, 2)
    made["v"] = draw.normal(2, 11, 2, 16, 2)[..., 0]
    made["bias"] = made["bias"].mT.contiguous().mT
    made["visible"] = made["visible"].mT.contiguous().mT
    out, lse = made["joined"]
    made["joined"] = (out.transpose(1, 2).contiguous().transpose(1, 2), lse.mT.contiguous().mT)
    return made


def _massless(draw: Draw) -> dict:
    """Slots of no mass, and a query that reads nothing else."""
    made = inputs(draw, 1, 6, 8, 2, 16, query_block=2, picks=4)
    made["bias"][:, ::2] = -torch.inf
    made["index"][:, :1] = 2 * torch.arange(4, dtype=torch.int32, device=draw.device)
    return made


_SLOTS = ("q", "k", "v")
_ALL = ("q", "k", "v", "bias")
_DOCUMENTS = ((5, 3), (0, 4), (1, 0), (9, 6), (0, 0), (4, 1))
CASES = [
    Case("one query", lambda d: inputs(d, 1, 1, 4, 1, 16), _ALL),
    Case("no query", lambda d: inputs(d, 2, 0, 4, 2, 16), _ALL),
    Case("no slots", lambda d: inputs(d, 2, 5, 0, 2, 16, query_block=2), _ALL),
    Case("no picks", lambda d: inputs(d, 1, 5, 6, 2, 16, picks=0), _ALL),
    Case("own sets", lambda d: inputs(d, 2, 5, 9, 2, 20, slot_block=2), _ALL),
    Case("sets of a kv head", lambda d: inputs(d, 1, 7, 12, 4, 16, kv_heads=2, groups=2, slot_block=4), _ALL),
    Case("groups within a kv head", lambda d: inputs(d, 1, 6, 12, 4, 16, kv_heads=1, groups=2, query_block=2), _ALL),
    Case("own sets, one kv head", lambda d: inputs(d, 1, 6, 9, 4, 16, kv_heads=1, slot_block=2), _ALL),
    Case("blocks of 4", lambda d: inputs(d, 2, 11, 10, 2, 16, query_block=4, sets=5, bias=False), _SLOTS),
    Case("blocks of 16", lambda d: inputs(d, 1, 37, 26, 2, 80, query_block=16, slot_block=4, kv_heads=1), _ALL),
    Case("whole blocks", lambda d: inputs(d, 2, 64, 40, 2, 16, query_block=32, slot_block=8, bias=False), _SLOTS),
    Case("wide blocks", lambda d: inputs(d, 1, 150, 90, 2, 16, query_block=75, slot_block=40, kv_heads=1, groups=1,
                                         visible=True), _ALL),  # fmt: skip
    Case("started inside a block", lambda d: inputs(d, 2, 9, 10, 2, 16, query_block=4, start=(3, 6)), _ALL),
    Case("visible from inside a block", lambda d: inputs(d, 2, 10, 12, 2, 16, query_block=4, slot_block=3, bias=False,
                                                         visible=True, start=(5, 4)), _SLOTS),  # fmt: skip
    Case("holes, empty sets", lambda d: inputs(d, 2, 7, 12, 2, 16, query_block=2, slot_block=2, holes=True), _ALL),
    Case("no mass", _massless, _SLOTS),
    Case("joined", lambda d: inputs(d, 2, 9, 12, 4, 16, kv_heads=2, query_block=4, slot_block=2, joined=True), _ALL),
    Case("joined, holes", lambda d: inputs(d, 1, 6, 8, 2, 20, holes=True, joined=True, visible=True), _ALL),
    Case("joined to no slots", lambda d: inputs(d, 1, 5, 0, 2, 16, holes=True, joined=True), _ALL),
    Case("packed", lambda d: inputs(d, 1, 19, 14, 2, 16, query_block=4, slot_block=2, documents=_DOCUMENTS,
                                    visible=True), _ALL),  # fmt: skip
    Case("packed, started, joined", lambda d: inputs(d, 1, 19, 14, 2, 16, query_block=4, documents=_DOCUMENTS,
                                                     start=(1, 7, 2, 3, 0, 9), joined=True, sets=12), _ALL),  # fmt: skip
    Case("packed, nothing", lambda d: inputs(d, 1, 0, 0, 2, 16, documents=((0, 0),)), _ALL),
    Case("wide head", lambda d: inputs(d, 1, 5, 18, 1, 256, query_block=3, slot_block=4), _ALL),
    Case("strided", _strided, _ALL),
]


def tiles(inputs: dict) -> dict[str, tuple[int, ...]]:
    """What one program of the fused form writes: some queries of a set, the heads of a group."""
    heads, dim = inputs["q"].shape[2:]
    share = heads // inputs["index"].shape[2]
    queries = min(inputs["query_block"], max(1, 64 // share))
    return {"out": (1, queries, share, dim), "lse": (1, queries, share)}
