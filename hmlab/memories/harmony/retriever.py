"""Which slots a query reads: candidates by equal codes, ranked by true scores; or by votes of queries that share.

    candidates(q) = ∪ over tables, probes of the slots with that code      (`hmlab_kernels.bucket_lookup`)
    vote(slot) = log Σ exp(score) over the queries and heads of a set that found it; the best `picks` votes win

Source: Akbar 2025, HARMONY, `LSHRetriever`. A set of several queries is chosen by the queries of the block before it,
so a question at the end of a prompt fetches only from the next block on.
"""

from __future__ import annotations

import torch
from einops import rearrange
from hmlab_kernels.bucket_lookup import Buckets, bucket_lookup
from hmlab_kernels.topk_blocks import topk_blocks
from jaxtyping import Bool, Float, Int, Int32
from torch import Tensor, nn

from hmlab import hashing
from hmlab.hashing import balance, decorrelation, retrieval_loss
from hmlab.memories.harmony.config import HierarchyConfig

CHUNK = 256  # queries whose slots are gathered at a time


class LSHRetriever(nn.Module):
    """Codes of queries and slots, and what a set of queries picks."""

    def __init__(self, config: HierarchyConfig, *, heads: int, kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.config, self.heads, self.kv_heads = config, heads, kv_heads
        self.groups = heads if config.sharing == "none" else kv_heads
        self.family = _family(config, kv_heads, head_dim)

    def slot_codes(self, keys: Float[Tensor, "batch slots kv_heads dim"]
                   ) -> Int32[Tensor, "batch slots kv_heads tables"]:
        return self.family.codes(keys)[..., 0]

    def query_codes(self, q: Float[Tensor, "batch time heads dim"], probes: int
                    ) -> Int32[Tensor, "batch time heads tables {probes}"]:
        """Codes to look up; the heads of a key head share its tables."""
        time, each = q.shape[1], self.heads // self.kv_heads
        q = rearrange(q, "batch time (kv each) dim -> batch (time each) kv dim", kv=self.kv_heads)
        codes = self.family.codes(q, probes=probes)
        return rearrange(codes, "batch (time each) kv tables probes -> batch time (kv each) tables probes",
                         time=time, each=each)  # fmt: skip

    def nearest(
        self, q: Float[Tensor, "batch time heads dim"], keys: Tensor, bias: Tensor, visible: Int[Tensor, "batch slots"],
        oldest: Int[Tensor, "batch time"], query_block: int,
    ) -> Int[Tensor, "batch sets groups picks"]:
        """The best slots of each set by the true scores of all."""
        index, _ = topk_blocks(q, keys, picks=self.config.picks, bias=bias, visible=visible, oldest=oldest,
                               groups=self.groups, query_block=query_block, scale=1.0)  # fmt: skip
        return index

    def hashed(
        self, q: Float[Tensor, "batch time heads dim"], keys: Tensor, bias: Tensor, buckets: Buckets,
        available: Int[Tensor, "batch time"], oldest: Int[Tensor, "batch time"],
        topic: Int32[Tensor, "batch time tables probes"], position: Tensor, voters: int,
    ) -> Int[Tensor, "batch sets groups picks"]:
        """The best slots by equal codes. topic: MinHash's. voters: queries in a row that choose together."""
        c = self.config

        def found(probes: int) -> tuple[Tensor, Tensor]:
            if c.family == "minhash":
                codes = topic[:, :, None].expand(-1, -1, self.heads, -1, -1).contiguous()
            else:
                codes = self.query_codes(q, probes)
            index, score, _ = bucket_lookup(q, codes, keys, buckets, picks=c.picks, bias=bias, available=available,
                                            candidates=c.candidates * codes.shape[-1] // c.probes, oldest=oldest,
                                            scale=1.0)  # fmt: skip
            return index, score

        index, score = found(c.probes)
        if c.fallback and c.family != "minhash":
            missed = self.missed(q, keys, bias, available, oldest, index, position)
            doubtful = torch.sigmoid(score.logsumexp(-1) - missed) < c.fallback
            deep, deep_score = found(min(max(c.probes, c.bits + 1), c.most_probes))
            index = torch.where(doubtful[..., None], deep, index)
            score = torch.where(doubtful[..., None], deep_score, score)
        if voters == 1 and self.groups == self.heads:
            return index
        index, score = (rearrange(t, "batch (sets voters) (groups each) picks -> batch sets groups (voters each picks)",
                                  voters=voters, groups=self.groups) for t in (index, score))  # fmt: skip
        return elect(index, score, c.picks)

    def scores(self, q: Float[Tensor, "batch time heads dim"], keys: Tensor, bias: Tensor,
               index: Int[Tensor, "batch time heads n"]) -> Float[Tensor, "batch time heads n"]:
        """True scores of the slots that each head names; of slot 0 where it names none."""
        wide, batch, time = bias.dtype, *q.shape[:2]
        head = torch.arange(self.heads, device=q.device)[:, None] // (self.heads // self.kv_heads)
        row = torch.arange(batch, device=q.device)[:, None, None, None]
        parts = []
        for some in torch.arange(time, device=q.device).split(CHUNK):
            place = index[:, some].clamp(min=0)
            read = keys[row, place, head].to(wide)
            parts.append((read * q[:, some, :, None].to(wide)).sum(-1) + bias[row, place, head])
        return torch.cat(parts, 1)

    def missed(
        self, q: Tensor, keys: Tensor, bias: Tensor, available: Int[Tensor, "batch time"],
        oldest: Int[Tensor, "batch time"], index: Int[Tensor, "batch time heads picks"], position: Tensor,
    ) -> Float[Tensor, "batch time heads"]:
        """Estimated log Σ exp(score) of the readable slots that were not picked, from a few drawn by position."""
        number = (available - oldest)[:, :, None]
        drawn = torch.arange(self.config.confidence, device=q.device)
        # Consecutive multiples of the golden ratio's inverse fill an interval evenly; positions shift them.
        share = ((position[:, :, None].double() * 0.7548776662466927 + drawn * 0.6180339887498949) % 1.0)
        place = oldest[:, :, None] + torch.minimum((share * number).long(), (number - 1).clamp(min=0))
        place = place[:, :, None].expand(-1, -1, self.heads, -1)
        score = self.scores(q, keys, bias, place)
        other = torch.ones_like(score, dtype=torch.bool)
        for pick in index.unbind(-1):
            other &= place != pick[..., None]
        other &= number[..., None] > 0
        rest = (number - (index >= 0).sum(-1)).clamp(min=0) / other.sum(-1).clamp(min=1)
        return torch.where(other, score, -torch.inf).logsumexp(-1) + rest.log()

    def loss(
        self, q: Float[Tensor, "batch time heads dim"], lse: Float[Tensor, "batch time heads"],
        keys: Float[Tensor, "batch slots kv_heads dim"], bias: Float[Tensor, "batch slots kv_heads"],
        visible: Bool[Tensor, "batch time slots"],
    ) -> Float[Tensor, ""]:
        """What teaches codes: a query's, to be those of the slots with its attention; all, to be even and different.

        lse: of all that the query read, so that a query that needs no slots teaches little.
        """
        each = self.heads // self.kv_heads
        asked = rearrange(q, "batch time (kv each) dim -> batch (time each) kv dim", kv=self.kv_heads)
        q, lse = (x.unflatten(2, (-1, each)).float() for x in (q, lse))
        score = torch.einsum("btked,bskd->bstke", q, keys.float()) + bias[:, :, None, :, None]
        share = torch.where(visible.transpose(1, 2)[..., None, None], (score - lse[:, None]).exp(), 0)
        share = rearrange(share.clamp(max=1), "batch slots time kv each -> batch (time each) kv slots")
        queries, slots = self.family.soft_codes(asked), self.family.soft_codes(keys)
        seen = visible.repeat_interleave(each, 1)
        pull = retrieval_loss(queries, slots, share, visible=seen)
        codes = torch.cat((queries.flatten(0, 1), slots.flatten(0, 1)[visible.any(1).flatten()]))
        return pull + balance(codes) + decorrelation(codes)


def elect(index: Int[Tensor, "*sets found"], score: Float[Tensor, "*sets found"], picks: int
          ) -> Int[Tensor, "*sets {picks}"]:
    """The `picks` slots with the largest log Σ exp(score), of those found; -1 where there are fewer.

    A slot is named once for every voter that found it; -1 names none.
    """
    slot, order = index.sort(dim=-1, stable=True)
    score = score.gather(-1, order)
    first = torch.nn.functional.pad(slot[..., 1:] != slot[..., :-1], (1, 0), value=True)
    group = first.long().cumsum(-1) - 1
    top = score.amax(-1, keepdim=True)
    top = torch.where(top.isfinite(), top, 0)
    votes = torch.zeros_like(score).scatter_add(-1, group, (score - top).exp())
    votes = torch.where(first & (slot >= 0), votes.gather(-1, group), 0)
    best, place = votes.sort(dim=-1, descending=True, stable=True)
    chosen = torch.where(best > 0, slot.gather(-1, place), -1)[..., :picks]
    return torch.nn.functional.pad(chosen, (0, max(0, picks - chosen.shape[-1])), value=-1)


def _family(c: HierarchyConfig, kv_heads: int, dim: int) -> nn.Module | None:
    if c.retrieval != "hash":
        return None
    shape = {"dim": c.reduced or dim, "heads": kv_heads, "tables": c.tables}
    match c.family:
        case "minhash":
            return hashing.minhash.Config(tables=c.tables, bits=c.bits).build()
        case "mixture":
            family = hashing.mixture.Config(components=2**c.bits, **shape).build()
        case "cross_polytope":
            # As many codes as the bits of the other families give: 2 rows of one polytope.
            family = hashing.cross_polytope.Config(bits=1, rows=2 ** max(c.bits - 1, 0), **shape).build()
        case _:
            family = getattr(hashing, c.family).Config(bits=c.bits, **shape).build()
    if not c.reduced:
        return family
    projection = hashing.reduction.RandomProjectionConfig(dim=dim, reduced=c.reduced, heads=kv_heads).build()
    return hashing.Reduced(projection, family)
