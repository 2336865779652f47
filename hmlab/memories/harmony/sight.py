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

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hmlab.layers import Documents
from hmlab.record import observe, recording_is_on

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
