"""What a family retrieves for its work, measured against exact search."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from hmlab_kernels.bucket_lookup import bucket_lookup, buckets
from jaxtyping import Float
from torch import Tensor

from hmlab.hashing.family import Family

if TYPE_CHECKING:
    import xarray as xr


@torch.no_grad()
def recall_curve(
    family: Family,
    queries: Float[Tensor, "batch time heads dim"],
    keys: Float[Tensor, "batch slots kv_heads dim"],
    *,
    k: int,
    probes: Sequence[int],
    tables: Sequence[int] | None = None,
    candidates: int,
) -> xr.Dataset:
    """Recall and precision of the k slots retrieved, against the k of largest q · key, for each amount of work.

    The candidates of a query are those of `hmlab_kernels.bucket_lookup`: the union over its first tables and probes,
    at most `candidates`, ranked by true scores; all slots are visible. probes, tables: numbers to measure at; all of
    the family's tables if None. Returns, by tables and probes and averaged over queries: `recall` (retrieved ones
    among the true k, over k), `precision` (over those retrieved, 0 where there are none), `work` (different slots
    scored) and `share` (of the slots). Holds time · slots scores per head. Raises ValueError by argument.
    """
    import xarray as xr

    tables = [family.tables] if tables is None else list(tables)
    probes, slots = list(probes), keys.shape[1]
    if not 1 <= k <= slots:
        raise ValueError(f"k: expected 1 to {slots} slots, got {k}")
    if not probes or min(probes) < 1:
        raise ValueError(f"probes: expected numbers of at least 1, got {probes}")
    if not tables or not 1 <= min(tables) <= max(tables) <= family.tables:
        raise ValueError(f"tables: expected numbers from 1 to {family.tables}, got {tables}")
    asked, held = family.codes(queries, probes=max(probes)), family.codes(keys)[..., 0]
    spread = keys.repeat_interleave(queries.shape[2] // keys.shape[2], 2)
    true = torch.einsum("bthd,bshd->bths", queries, spread).topk(k, -1).indices
    measured = {name: torch.zeros(len(tables), len(probes)) for name in ("recall", "precision", "work")}
    for i, table in enumerate(tables):
        sorted_keys = buckets(held[..., :table].contiguous())
        for j, probe in enumerate(probes):
            found = bucket_lookup(queries, asked[..., :table, :probe].contiguous(), keys, sorted_keys, picks=k,
                                  candidates=candidates, scale=1.0)  # fmt: skip
            right = (found.index[..., None] == true[..., None, :]).any(-1).sum(-1)
            retrieved = (found.index >= 0).sum(-1)
            measured["recall"][i, j] = right.float().mean() / k
            measured["precision"][i, j] = (right / retrieved.clamp(min=1)).mean()
            measured["work"][i, j] = found.found.float().mean()
    measured["share"] = measured["work"] / slots
    variables = {name: (("tables", "probes"), value.numpy()) for name, value in measured.items()}
    return xr.Dataset(variables, {"tables": tables, "probes": probes}, {"k": k, "candidates": candidates})
