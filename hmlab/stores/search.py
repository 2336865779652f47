"""The best slots of a view: by the index, which may miss some, or by scoring every one.

    score_qn = q · k̂_n + log mass_n

LanceDB only proposes candidates; what is returned is scored and ordered here, in the precision of the queries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from hmlab.stores.layout import Rows, Shape, columns_of, concatenate

if TYPE_CHECKING:
    import pyarrow as pa

BATCH = 8192  # slots that are scored at once when all are
QUERIES = 256  # that are handed to LanceDB at once


class Found(NamedTuple):
    """The slots with the highest scores, best first, equal ones by number. Where a view has fewer than k slots: number
    −1, score −inf, the rest 0. In the store's dtype, or that of the queries if it is wider; positions in float64."""

    number: Int[Tensor, "queries heads k"]
    score: Float[Tensor, "queries heads k"]
    keys: Float[Tensor, "queries heads k dim"]
    values: Float[Tensor, "queries heads k dim"]
    mass: Float[Tensor, "queries heads k"]
    position: Float[Tensor, "queries heads k"]


class View(NamedTuple):
    """table: LanceDB's. where: SQL that is true of the slots to be seen."""

    table: Any
    shape: Shape
    where: str


def probe(view: View, head: int, queries: Float[Tensor, "queries dim"], k: int, nprobes: int, refine: int
          ) -> tuple[Tensor, ...]:
    """The fields of `Found` for one head, candidates from the index."""
    if not len(queries):
        return scan(view, head, queries, k)
    parts = []
    for asked in queries.split(QUERIES):
        vectors = torch.nn.functional.pad(asked, (0, 1), value=1).to(view.shape.dtype)
        search = view.table.search(list(vectors.numpy()), vector_column_name=f"key_{head}")
        search = search.distance_type("dot").where(view.where, prefilter=True).limit(k).refine_factor(refine)
        search = search.minimum_nprobes(nprobes).maximum_nprobes(0)
        table = search.select([*columns_of(head), "_distance"]).to_arrow()
        # Each query ranks what was found for it: candidates of later queries must not reach earlier ones.
        query, row = _asked_by(table).sort(stable=True)
        place = torch.arange(len(query)) - torch.searchsorted(query, query)
        candidates = torch.full((len(asked), k), -1).index_put((query, place), row)
        parts.append(_rank(asked, candidates, view.shape.rows(table, head), k))
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


def scan(view: View, head: int, queries: Float[Tensor, "queries dim"], k: int) -> tuple[Tensor, ...]:
    """The fields of `Found` for one head, from all slots; holds one batch and the best k of each query."""
    import pyarrow as pa

    best = view.shape.rows(view.shape.schema().empty_table(), head)
    search = view.table.search().where(f"({view.where}) AND mass_{head} > 0").select(columns_of(head))
    for batch in search.to_batches(BATCH):
        best = concatenate((best, view.shape.rows(pa.Table.from_batches([batch]), head)))
        best = Rows(*(column[best.number.argsort()] for column in best))
        score = queries @ best.keys.to(queries.dtype).T + best.mass.to(queries.dtype).log()
        top = score.argsort(dim=1, descending=True, stable=True)[:, :k]
        best = Rows(*(column[top.unique()] for column in best))
    return _rank(queries, torch.arange(len(best.number)).expand(len(queries), -1), best, k)


def _asked_by(table: pa.Table) -> Int[Tensor, "rows"]:
    """The query that each row answers; LanceDB leaves it out if there was only one."""
    if "query_index" not in table.column_names:
        return torch.zeros(len(table), dtype=torch.int64)
    return torch.tensor(table["query_index"].to_numpy().astype(np.int64))


def _rank(queries: Float[Tensor, "queries dim"], candidates: Int[Tensor, "queries candidates"], rows: Rows, k: int
          ) -> tuple[Tensor, ...]:
    """The best k of each query's candidates, which are rows by index, −1 for none."""
    candidates = torch.nn.functional.pad(candidates, (0, max(0, k - candidates.shape[1])), value=-1)
    # One row more, which −1 then names: what stands where nothing was found.
    none = Rows(*(column.new_full((1, *column.shape[1:]), 0) for column in rows))
    rows = concatenate((rows, none._replace(number=none.number - 1)))
    score = (queries[:, None] * rows.keys[candidates]).sum(-1) + rows.mass.to(queries.dtype).log()[candidates]
    by_number = rows.number[candidates].argsort(dim=1)
    order = by_number.gather(1, score.gather(1, by_number).argsort(dim=1, descending=True, stable=True))[:, :k]
    number, *held, position = (column[candidates.gather(1, order)] for column in rows)
    return (number, score.gather(1, order), *(t.to(queries.dtype) for t in held), position)
