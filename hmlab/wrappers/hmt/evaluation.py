"""How well a wrapped model predicts a text, by what searches its memory and by how much it has read.

`perplexities` reports the published query beside the honest one: of the first `fraction` of a segment the former has
seen the tokens that it predicts, of the rest it has not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from hmlab.wrappers.hmt.network import HMT

if TYPE_CHECKING:
    import xarray as xr

# Segments whose logits are there at a time.
SEGMENTS_PER_CALL = 4


@torch.no_grad()
def losses(hmt: HMT, ids: Int[Tensor, "batch time"], *, query: str | None = None,
           progress: Callable[[int, int], object] | None = None) -> Float[Tensor, "batch predicted"]:
    """Nats of each token but the first, in whole segments of the text; what is left behind them is not read."""
    length, found, state = hmt.config.segment_length, [], None
    count = (ids.shape[1] - 1) // length
    if count < 1:
        raise ValueError(f"ids: expected more than a segment ({length} tokens), got {ids.shape[1]}")
    ids, training = ids.long(), hmt.training
    hmt.eval()
    for begin in range(0, count, SEGMENTS_PER_CALL):
        part = slice(begin * length, min(begin + SEGMENTS_PER_CALL, count) * length)
        out = hmt(ids[:, part], state=state, query=query)
        state, targets = out.state, ids[:, part.start + 1 : part.stop + 1]
        found.append(F.cross_entropy(out.logits.float().flatten(0, 1), targets.flatten(), reduction="none")
                     .view(targets.shape))  # fmt: skip
        if progress is not None:
            progress(part.stop, count * length)
    hmt.train(training)
    return torch.cat(found, 1)


def perplexities(hmt: HMT, ids: Int[Tensor, "batch time"], *, queries: Sequence[str] | None = None) -> xr.Dataset:
    """Losses and perplexities of a text under several queries, the weights as they are.

    `nats` (query, batch, segment, part): mean over the tokens of a segment; part: "first" are the places that the
    published query is made of, "rest" those behind. `perplexity` (query, part): over all of the text, part also "all".
    """
    import xarray as xr

    if queries is None:
        queries = ("none",) if hmt.config.query == "none" else ("previous", "prefix", "none")
    length, excerpt = hmt.config.segment_length, hmt.config.excerpt
    # The token at place p of a segment predicts the one at p + 1: the query has seen targets up to its own end.
    seen = excerpt - 1
    each = {query: losses(hmt, ids, query=query).unflatten(1, (-1, length)) for query in queries}
    parts = {"first": slice(0, seen), "rest": slice(seen, None), "all": slice(None)}
    nats = [[each[query][..., parts[part]].mean(-1).tolist() for part in ("first", "rest")] for query in queries]
    means = [[math.exp(each[query][..., where].mean()) if where != slice(0, 0) else math.nan
              for where in parts.values()] for query in queries]  # fmt: skip
    dataset = xr.Dataset(
        {"nats": (("query", "part", "batch", "segment"), nats),
         "perplexity": (("query", "parts"), means)},
        {"query": list(queries), "part": ["first", "rest"], "parts": list(parts)},
    )  # fmt: skip
    dataset["nats"].attrs.update(long_name="loss", units="nats per token")
    dataset["perplexity"].attrs.update(long_name="perplexity", units="1")
    return dataset
