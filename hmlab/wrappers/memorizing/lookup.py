"""The memory itself: its configuration, its state, the search. Equations and source: the package's docstring."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from hmlab.layers import check_positive
from hmlab.record import Observed, observe

SEARCHED = 1024  # pairs whose scores are there at a time


@dataclass(frozen=True, kw_only=True)
class Config:
    """layer: the one that looks, from 0; None for three quarters of the depth, as in the paper. picks: pairs that a
    query reads. size: pairs held per row and head of keys. segment_length: tokens. gate: its bias at first."""

    layer: int | None = None
    picks: int = 32
    size: int = 8192
    segment_length: int = 512
    gate: float = -2.0

    def __post_init__(self) -> None:
        check_positive(self, "picks", "size", "segment_length")
        if self.layer is not None and self.layer < 0:
            raise ValueError(f"layer: expected 0 or more or None, got {self.layer}")


class State(NamedTuple):
    """The newest last, zero where nothing is yet. keys: of norm 1, unrotated. count: tokens that the row has read."""

    keys: Float[Tensor, "batch kv_heads size head_dim"]
    values: Float[Tensor, "batch kv_heads size head_dim"]
    count: Int[Tensor, "batch"]


class Lookup(Observed, nn.Module):
    """The memory's side of the layer, with all of the wrapper's own parameters, in float32."""

    def __init__(self, config: Config, *, heads: int, head_dim: int) -> None:
        super().__init__()
        self.picks = config.picks
        self.gate = nn.Parameter(torch.full((heads,), config.gate))
        self.log_scale = nn.Parameter(torch.full((heads,), math.log(head_dim) / 2))

    def forward(
        self,
        q: Float[Tensor, "batch time heads head_dim"],
        local: Float[Tensor, "batch time heads head_dim"],
        state: State,
        valid: Bool[Tensor, "batch time"],
    ) -> Float[Tensor, "batch time heads head_dim"]:
        """q: of norm 1. Rows that hold nothing get `local` back."""
        if not state.count.any():
            return local
        batch, time = q.shape[:2]
        groups, size = state.keys.shape[1:3]
        held = state.count.clamp(max=size)
        some = (held > 0)[:, None, None, None]
        # [batch, groups, queries, dim]: all queries that search the same keys.
        grouped = q.unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)
        index = self._search(grouped.detach(), state.keys, size - held)
        row = torch.arange(batch * groups, device=q.device).view(batch, groups, 1, 1) * size
        keys, values = (t.flatten(0, 2)[row + index] for t in (state.keys, state.values))
        scale = self.log_scale.exp().view(groups, -1).repeat_interleave(time, 1)
        score = torch.einsum("bgqd,bgqkd->bgqk", grouped, keys).float() * scale[..., None]
        found = index >= (size - held)[:, None, None, None]
        weight = score.masked_fill(~found & some, -torch.inf).softmax(-1)
        read = torch.einsum("bgqk,bgqkd->bgqd", weight.to(values.dtype), values)

        def by_head(x: Tensor) -> Tensor:
            return x.unflatten(2, (-1, time)).flatten(1, 2).transpose(1, 2)

        gate = torch.sigmoid(self.gate)[:, None]
        mixed = (gate * by_head(read) + (1 - gate) * local).to(local.dtype)
        dims, seen = ("batch", "time", "heads", "picks"), valid[..., None, None] & by_head(found)
        token = by_head(index) - size + state.count[:, None, None, None]
        observe("retrieval_index", lambda: token.masked_fill(~seen, -1), dims)
        observe("retrieval_score", lambda: by_head(score).masked_fill(~seen, torch.nan), dims)
        observe("gate", lambda: gate[:, 0].where(seen.any(-1), torch.nan), dims[:3])
        return torch.where(some, mixed, local)

    @torch.no_grad()
    def _search(self, q: Float[Tensor, "batch groups queries dim"], keys: Float[Tensor, "batch groups size dim"],
                first: Int[Tensor, "batch"]) -> Int[Tensor, "batch groups queries picks"]:
        """Places of the pairs with the largest scores, the best first, from place `first` on; where there are fewer,
        some before it."""
        size, best, places = keys.shape[2], None, None
        for begin in range(0, size, SEARCHED):
            part = keys[:, :, begin : begin + SEARCHED]
            place = torch.arange(begin, begin + part.shape[2], device=q.device)
            score = (q @ part.mT).masked_fill((place < first[:, None])[:, None, None], -torch.inf)
            place = place.expand(score.shape)
            if best is not None:
                score, place = torch.cat((best, score), -1), torch.cat((places, place), -1)
            best, order = score.topk(min(self.picks, score.shape[-1]), -1)
            places = place.gather(-1, order)
        return places


def written(state: State, keys: Tensor, values: Tensor, valid: Bool[Tensor, "batch time"]) -> State:
    """The state with the tokens of a segment behind it, padding left out, the oldest forgotten."""
    count, size = valid.sum(1), state.keys.shape[2]
    place = torch.arange(size, device=count.device) + count[:, None]

    def latest(old: Tensor, new: Tensor) -> Tensor:
        both = torch.cat((old, new.to(old.dtype)), 2)
        return both.gather(2, place[:, None, :, None].expand(-1, both.shape[1], -1, both.shape[3]))

    return State(latest(state.keys, keys), latest(state.values, values), state.count + count)
