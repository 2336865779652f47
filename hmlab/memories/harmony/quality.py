"""How well codes find what a query needs: recall and precision against the work they cost.

    relevant(q)  = the smallest set of slots that holds `share` of the mass that q gives to all slots it may read
    retrieved(q) = the smallest set of candidates that holds `share` of the mass of all candidates
    recall = |relevant ∩ retrieved| / |relevant|,   precision = |relevant ∩ retrieved| / |retrieved|
    work = candidates / slots that may be read

Candidates are what has an equal code in some table, probes included, ranked by true scores. A query without candidates
has recall 0 and no precision. Means over the queries that may read at least `least` slots, and over heads.
Source: Akbar 2025, HARMONY, which claims a precision of 93 % and a recall of 89 % without defining them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hmlab.hashing import Family
from hmlab.memories.harmony.network import Harmony

if TYPE_CHECKING:
    import xarray as xr


@torch.no_grad()
def retrieval_quality(
    memory: Harmony, x: Float[Tensor, "batch time dim"], families: Mapping[str, Family], *,
    tokens: Int[Tensor, "batch time"] | None = None, tables: Sequence[int] = (1, 2, 4, 8),
    probes: Sequence[int] = (1, 2, 4), queries: int = 256, share: float = 0.9, least: int = 16, seed: int = 0,
) -> xr.Dataset:
    """Recall, precision and work (tables, probes, family) of a memory's own queries and slots over the input x.

    families: by name; with tables of each key head, as many as the most of `tables`. queries: of a row, drawn at random
    from `seed`. Raises ValueError by argument.
    """
    import xarray as xr

    if not 0 < share <= 1:
        raise ValueError(f"share: expected above 0 and at most 1, got {share}")
    h, c = memory.hierarchy, memory.config
    if c.retrieval == "none":
        raise ValueError("memory: expected one that makes slots, got retrieval 'none'")
    if tokens is None and c.of_tokens:
        raise ValueError("tokens: expected ids, which the memory's densities count, got None")
    for name, family in families.items():
        if max(tables) > family.tables or min(tables) < 1:
            raise ValueError(f"tables: expected 1 to {family.tables}, as family {name!r} has, got {list(tables)}")
    if queries < 1 or least < 1:
        raise ValueError(f"queries, least: expected at least 1, got {queries} and {least}")
    q, k, v = memory.project(x)
    held = h.init_state(len(x), device=x.device, dtype=x.dtype)
    written = h.medium_term.write(k, v, tokens, held, None, memory.rotate, memory.log_scale.exp(), h.retriever,
                                  fresh=True)  # fmt: skip
    if written.made is None:
        raise ValueError(f"x: expected at least a segment of {c.segment} tokens, got {x.shape[1]}")
    made = written.made
    kept = (torch.arange(c.most, device=x.device) < made.compressed.count[..., None]).flatten(1)
    readable = (made.slots.slot_segment + 1) * c.segment + c.window - 1
    generator = torch.Generator().manual_seed(seed)
    time = torch.randperm(x.shape[1], generator=generator)[:queries].sort().values.to(x.device)
    visible = kept[:, None] & (readable[:, None] <= time[:, None])
    time = time[(visible.sum(-1) >= least).all(0)]
    if not len(time):
        raise ValueError(f"least: expected queries that may read that many slots, got none that may read {least}")
    visible = (kept[:, None] & (readable[:, None] <= time[:, None]))[:, :, None].expand(-1, -1, h.heads, -1)
    each = h.heads // h.kv_heads
    position = torch.arange(x.shape[1], device=x.device, dtype=torch.float64)
    turned = memory.rotate(q, position.expand(len(x), -1)[..., None])
    asked = (turned if c.phase else q)[:, time]
    score = torch.einsum("btked,bskd->btkes", asked.unflatten(2, (-1, each)), made.slots.slot_keys).flatten(2, 3)
    score = score + made.slots.slot_bias.repeat_interleave(each, 2).transpose(1, 2)[:, None]
    relevant = _smallest(score.masked_fill(~visible, -torch.inf), share)
    found: dict[str, list] = {"recall": [], "precision": [], "work": []}
    for family in families.values():
        slots = family.codes(made.slots.slot_keys)[..., 0]
        grouped = asked.unflatten(2, (-1, each)).transpose(2, 3).flatten(1, 2)  # heads of a key head share its tables
        for number in tables:
            for probe in probes:
                codes = family.codes(grouped, probes=probe).unflatten(1, (len(time), each))
                codes = codes.transpose(2, 3).flatten(2, 3)
                candidate = _equal(codes[..., :number, :], slots[..., :number].repeat_interleave(each, 2)) & visible
                retrieved = _smallest(score.masked_fill(~candidate, -torch.inf), share)
                both = (relevant & retrieved).sum(-1).double()
                some = retrieved.any(-1)
                found["recall"].append((both / relevant.sum(-1)).mean().item())
                found["precision"].append((both[some] / retrieved.sum(-1)[some]).mean().item())
                found["work"].append((candidate.sum(-1) / visible.sum(-1)).double().mean().item())
    shape = (len(families), len(tables), len(probes))
    data = {name: (("family", "tables", "probes"), torch.tensor(values).view(shape).numpy())
            for name, values in found.items()}  # fmt: skip
    dataset = xr.Dataset(data, {"family": list(families), "tables": list(tables), "probes": list(probes)})
    readable = float(visible[:, :, 0].sum(-1).float().mean())
    return dataset.assign_attrs(share=share, queries=len(time), readable_slots=readable,
                                relevant_slots=float(relevant.sum(-1).float().mean()))  # fmt: skip


def _smallest(score: Float[Tensor, "*sets slots"], share: float) -> Bool[Tensor, "*sets slots"]:
    """The fewest slots that hold a share of the softmax's mass; none where all scores are -inf."""
    best, order = score.sort(dim=-1, descending=True)
    mass = (best - best[..., :1]).nan_to_num(nan=-torch.inf).exp().double()
    mass = mass / mass.sum(-1, keepdim=True).clamp(min=torch.finfo(mass.dtype).tiny)
    taken = (mass.cumsum(-1) - mass < share) & (mass > 0)
    return torch.zeros_like(taken).scatter(-1, order, taken)


def _equal(queries: Int[Tensor, "batch time heads tables probes"], slots: Int[Tensor, "batch slots heads tables"]
           ) -> Bool[Tensor, "batch time heads slots"]:
    """Which slots have one of the codes that a query looks up, in some table."""
    found = torch.zeros(*queries.shape[:3], slots.shape[1], dtype=torch.bool, device=queries.device)
    for table in range(queries.shape[3]):
        own = slots[..., table].transpose(1, 2)[:, None]
        for probe in range(queries.shape[4]):
            found |= queries[..., table, probe, None] == own
    return found
