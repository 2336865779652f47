"""What the hierarchy remembers: a short-term buffer, compressed storage, and what the choices hang on."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from hmlab_kernels.bucket_lookup import buckets
from jaxtyping import Float, Int, Int32
from torch import Tensor

from hmlab.hashing import NOWHERE
from hmlab.information import Statistics

# Turns `[batch, n, heads, dim]` by float64 positions `[batch, n, heads or 1]`.
Rotate = Callable[[Tensor, Tensor], Tensor]
# The segment of a place without a slot: no query comes that late.
NEVER = 2**48
# What the fields with room for slots hold where there is none.
EMPTY = {"slot_keys": 0, "slot_values": 0, "slot_mass": 0, "slot_bias": -torch.inf, "slot_place": 0,
         "slot_segment": NEVER, "codes": NOWHERE}  # fmt: skip


class State(NamedTuple):
    """Per row, of the document it is in; the newest last everywhere.

    Short term. keys, values: of the last W + S - 2 tokens, keys rotated. sink_keys, sink_values: of the first tokens.
    segment_keys: unrotated, of the last S - 1 tokens, of which those of the unfinished segment matter; segment_tokens:
    their ids.
    Medium term. slot_keys (rotated, if slots have a phase), slot_values; slot_mass: tokens that a slot stands for;
    slot_bias: what is added to its score; slot_place: mean place of its tokens in the segment; slot_segment: the
    segment's number in the document. slots: how many are there; dropped: how many were forgotten. codes, buckets: by
    which hashing finds them.
    Choices. statistics: of tokens; moments: of densities; topic: codes of the last whole segment's ids (MinHash);
    voters: queries of the block under way, or of the last if none is; sets: the slots that this block
    reads. position: tokens consumed.
    """

    keys: Float[Tensor, "batch reach kv_heads dim"]
    values: Float[Tensor, "batch reach kv_heads dim"]
    sink_keys: Float[Tensor, "batch sinks kv_heads dim"]
    sink_values: Float[Tensor, "batch sinks kv_heads dim"]
    segment_keys: Float[Tensor, "batch unfinished kv_heads dim"]
    segment_tokens: Int[Tensor, "batch unfinished"]
    slot_keys: Float[Tensor, "batch room kv_heads dim"]
    slot_values: Float[Tensor, "batch room kv_heads dim"]
    slot_mass: Float[Tensor, "batch room kv_heads"]
    slot_bias: Float[Tensor, "batch room kv_heads"]
    slot_place: Float[Tensor, "batch room kv_heads"]
    slot_segment: Int[Tensor, "batch room"]
    slots: Int[Tensor, "batch"]
    dropped: Int[Tensor, "batch"]
    codes: Int32[Tensor, "batch room kv_heads tables"]
    buckets: Int[Tensor, "batch kv_heads tables room"]
    statistics: Statistics
    moments: Float[Tensor, "batch 2"]
    topic: Int32[Tensor, "batch tables probes"]
    voters: Float[Tensor, "batch query_block heads dim"]
    sets: Int[Tensor, "batch groups picks"]
    position: Int[Tensor, "batch"]


class Slots(NamedTuple):
    """The medium term while a call is under way: the fields of `State` of these names, and how many are there."""

    slot_keys: Tensor
    slot_values: Tensor
    slot_mass: Tensor
    slot_bias: Tensor
    slot_place: Tensor
    slot_segment: Tensor
    codes: Tensor

    @classmethod
    def of(cls, state: State) -> Slots:
        return cls(*(getattr(state, name) for name in cls._fields))

    def gather(self, index: Int[Tensor, "batch chosen"]) -> Slots:
        return Slots(*(rows_at(field, index) for field in self))


def only_shapes(x: Tensor) -> bool:
    """Whether values cannot be looked at: under torch.compile, and on the meta device."""
    return torch.compiler.is_compiling() or x.is_meta


def rows_at(x: Tensor, index: Int[Tensor, "batch chosen"]) -> Tensor:
    """`[batch, n, ...]` to `[batch, chosen, ...]`, row by row."""
    row = torch.arange(len(x), device=x.device)[:, None] * x.shape[1]
    return x.flatten(0, 1).index_select(0, (row + index).flatten()).unflatten(0, index.shape)  # copies whole rows


def latest(x: Tensor, count: Int[Tensor, "batch"] | None, keep: int) -> Tensor:
    """The last `keep` of the first `keep` + count entries of every row; count None: of all."""
    if count is None:
        return x[:, x.shape[1] - keep :].clone()
    return rows_at(x, torch.arange(keep, device=x.device) + count[:, None])


def with_room(state: State, room: int) -> State:
    """The state with empty places for that many slots in all, if it has fewer."""
    more = room - state.slot_segment.shape[1]
    if more <= 0:
        return state
    fields = {}
    for name, none in EMPTY.items():
        x = getattr(state, name)
        fields[name] = torch.cat((x, x.new_full((x.shape[0], more, *x.shape[2:]), none)), 1)
    if state.buckets.shape[-2]:
        fields["buckets"] = buckets(fields["codes"]).keys
    return state._replace(**fields)
