"""What an observer sees of the hierarchy: every observation of `hmlab.record`'s vocabulary that it has.

    density_bits, ratio (batch, time)            of a segment, at its last token; NaN elsewhere
    bucket (batch, time, heads, tables)          the code that each query looked up first
    retrieval_index, retrieval_score, provenance (batch, time, heads, picks)
                                                 the slots read, numbered in the document; their scores; and the first
                                                 token, by its position in the document, of the segment each came from
    confidence (batch, time, heads)              estimated share of the attention mass that was read
    hit_share (batch, time, heads, tiers)        shares of the attention of sinks, window and slots
    tier (batch, time, heads)                    which of these has the largest share
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from hmlab.layers import Documents
from hmlab.memories.harmony.state import State, rows_at
from hmlab.record import observe, recording_is_on

if TYPE_CHECKING:
    from hmlab.memories.harmony.hierarchy import Hierarchy, Reading
    from hmlab.memories.harmony.medium_term import Written

TIERS = ("sinks", "window", "slots")
_DIMS = {
    "density_bits": (), "ratio": (), "bucket": ("heads", "tables"), "retrieval_index": ("heads", "picks"),
    "retrieval_score": ("heads", "picks"), "provenance": ("heads", "picks"), "confidence": ("heads",),
    "hit_share": ("heads", "tiers"), "tier": ("heads",),
}  # fmt: skip


def show(seen: dict[str, Tensor], documents: Documents) -> None:
    """Observe what was seen, rows of the call again. NaN and -1 stand where there is nothing, padding included."""
    for name, value in seen.items():
        none = -1 if not value.is_floating_point() else torch.nan
        if documents.valid is not None:
            valid = documents.valid.reshape(*documents.valid.shape, *(1,) * (value.ndim - 2))
            value = torch.where(valid, documents.unpack(value), none)
        coords = {"tiers": ("tiers", TIERS)} if "tiers" in _DIMS[name] else None
        observe(name, value, ("batch", "time", *_DIMS[name]), coords=coords)


def at_ends(value: Tensor, complete: Tensor, filled: Tensor, time: int, size: int) -> Float[Tensor, "rows time"]:
    """A value of each whole segment `[rows, segments]` at the token that ends it. filled: tokens of the first segment
    that came before the call."""
    token = torch.arange(time, device=filled.device) + filled[:, None]
    segment = (token // size).clamp(max=value.shape[1] - 1)
    ends = ((token + 1) % size == 0) & complete.gather(1, segment)
    return torch.where(ends, value.gather(1, segment).float(), torch.nan)


def shares(sinks: Float[Tensor, "rows time heads"], near: Float[Tensor, "rows time heads"],
           whole: Float[Tensor, "rows time heads"]) -> Float[Tensor, "rows time heads tiers"]:
    """Of log-sum-exps: of the sinks beyond the window, of sinks and window, of all."""
    sink, both = (sinks - whole).exp(), (near - whole).exp()
    return torch.stack((sink, (both - sink).clamp(min=0), (1 - both).clamp(min=0)), -1)


def per_head(value: Tensor, heads: int) -> Tensor:
    """What a group of heads shares `[rows, time, groups, ...]`, for each of them."""
    return value.repeat_interleave(heads // value.shape[2], 2)


def seen(**values: Callable[[], Any]) -> dict[str, Tensor]:
    """The observations that are wanted."""
    with torch.no_grad():
        return {name: value() for name, value in values.items() if recording_is_on(name)}


def look(hierarchy: Hierarchy, reading: Reading, written: Written, held: State, sink_keys: Tensor) -> dict[str, Tensor]:
    """What is wanted of one call, for every token of its rows."""
    if not any(map(recording_is_on, _DIMS)):  # never under torch.compile, which cannot trace a cache
        return {}
    c, made, retriever, heads = hierarchy.config, written.made, hierarchy.retriever, hierarchy.heads
    rows, time = reading.q.shape[:2]
    number = torch.arange(time, device=reading.q.device)

    def ends(value: Tensor | None) -> Tensor:
        if made is None or value is None:
            return torch.full((rows, time), torch.nan, device=number.device)
        return at_ends(value, made.complete, held.position % c.segment, time, c.segment)

    @functools.cache
    def picked() -> Tensor:
        """Slots of each query, -1 for none."""
        if reading.index is None or c.retrieval == "all":
            return torch.full((rows, time, heads, c.picks), -1, device=number.device)
        index = reading.index
        if reading.block is not None:
            own = (held.position[:, None] + number) // c.query_block - (held.position // c.query_block)[:, None]
            index = rows_at(index, own)
        return per_head(index, heads).long()

    def of_slots(field: Tensor, none: int) -> Tensor:
        index = picked()
        found = rows_at(field, index.clamp(min=0).flatten(1)).view(index.shape) if field.shape[1] else index
        return torch.where(index >= 0, found, none)

    def score() -> Tensor:
        index, slots = picked(), written.slots
        if not slots.slot_segment.shape[1]:
            return torch.full(index.shape, torch.nan, device=number.device)
        scores = retriever.scores(reading.slot_q, slots.slot_keys, slots.slot_bias, index)
        return torch.where(index >= 0, scores, torch.nan)

    def bucket() -> Tensor:
        if retriever.family is None or c.family == "minhash":
            return torch.full((rows, time, heads, 0), -1, device=number.device)
        return retriever.query_codes(reading.slot_q, 1)[..., 0]

    def confidence() -> Tensor:
        if reading.index is None or c.retrieval == "all":
            return torch.ones_like(reading.lse)
        missed = retriever.missed(reading.slot_q, written.slots.slot_keys, written.slots.slot_bias,
                                       reading.available, reading.oldest, picked(), held.position[:, None] + number)
        return torch.sigmoid(reading.lse - missed)

    @functools.cache
    def share() -> Tensor:
        reach = (held.position[:, None] + number - c.window + 1).clamp(min=0) // c.segment * c.segment
        beyond = torch.arange(c.sinks, device=number.device) < reach[..., None]
        of_sinks = torch.einsum("bthed,bshd->bthes", reading.q.unflatten(2, (hierarchy.kv_heads, -1)).float(),
                                sink_keys.float()).flatten(2, 3)  # fmt: skip
        of_sinks = of_sinks.masked_fill(~beyond[:, :, None], -torch.inf).logsumexp(-1)
        return shares(of_sinks, reading.near, reading.lse)

    dropped = held.dropped[:, None, None, None]
    return seen(
        density_bits=lambda: ends(None if made is None else made.compressed.density),
        ratio=lambda: ends(None if made is None else made.compressed.ratio),
        bucket=bucket,
        retrieval_index=lambda: torch.where(picked() >= 0, picked() + dropped, -1),
        retrieval_score=score,
        provenance=lambda: of_slots(written.slots.slot_segment * c.segment, -1),
        confidence=confidence, hit_share=share, tier=lambda: share().argmax(-1),
    )  # fmt: skip
