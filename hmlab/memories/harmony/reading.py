"""What a read is made of: finding slots, knowing how sure one may be of them, and tokens held to read again.

    candidates = ∪ over tables and probes of the newest `per_bucket` slots in the bucket of that code; the best are read
    confidence = Z / (Z + Ẑ)        Z = Σ exp(score) over the slots retrieved,  Ẑ an estimate over the tier's other ones
    Ẑ = Σ_i size_i · exp(score_i) · [i was not retrieved]    one slot i drawn from each of equal strata of the places

Ẑ is unbiased, whatever was retrieved, but the more peaked the scores are the longer its tail: most draws are below the
mean, and confidence is then mostly too high. A query that wants one slot and misses it is noticed all the same, since
what it retrieves is no better than what is drawn; one that finds one of two is not.

A slot may hide a token. With k̂ the mean and ρ the radius of a slot, the largest distance from it of the segment's
tokens that it is the nearest slot of, and n the longest key so far, any such token has, for a reach c of 1,

    q·k ≤ B = min(q·k̂ + c |q| ρ, |q| n)               (ball bound: Ram & Gray 2012, arXiv 1202.6101)
    doubt = X / (X + Z_all),   X = max over slots (exp B - mass exp(q·k̂))⁺,   Z_all over all that was read

so doubt below `doubtful` then proves that no hidden token has that share of the attention. In dim dimensions a token
that lies anywhere about its slot has q·(k - k̂) > c |q| ρ with probability below exp(-dim c² / 2), but a key that the
query is after, orthogonal to its slot's mean, has c = 1/√2: with that c, doubt is about what is sought, not chance.

The radius is what discriminates. Spread alone, 1 - |k̂|² of unit keys, does not: 63 equal keys and one orthogonal to
them have the spread of 64 keys with a little noise. By second order both lack |q|² (1 - |k̂|²) / (2 dim) of log mass,
too little for the first, whose sum one token rules; and k·k̂ ≥ 1 - mass (1 - |k̂|²) / 2, which spread proves, excludes
nothing for the second.

Source: Akbar 2025, HARMONY, which names collisions and over-compression as the causes of error; the estimates are ours.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from hmlab_kernels.bucket_lookup import Buckets, bucket_lookup
from hmlab_kernels.bucket_lookup import buckets as sorted_by_bucket
from hmlab_kernels.slot_attention import merge
from jaxtyping import Float, Int, Int32, Int64
from torch import Tensor
from torch.utils import _pytree as pytree

from hmlab.codecs.codec import Codec, WholeSegment
from hmlab.hashing import NOWHERE, Family, buckets, enough_probes, kept
from hmlab.layers import check_positive
from hmlab.memories.harmony.storage import CompressedStorage, Held

CAUSES = ("none", "collision", "over-compression", "neither")


class Part(NamedTuple):
    """Attention to some keys: their scores, and what a softmax over them alone reads."""

    score: Float[Tensor, "batch heads keys"]
    out: Float[Tensor, "batch heads dim"]
    lse: Float[Tensor, "batch heads"]


def attend(score: Float[Tensor, "batch heads keys"], v: Float[Tensor, "batch heads keys dim"]) -> Part:
    """Keys of score -inf do not exist; without any, out is 0 and lse -inf."""
    lse = score.logsumexp(-1)
    weight = (score - lse.where(lse > -torch.inf, 0)[..., None]).exp()
    return Part(score, torch.einsum("bhn,bhnd->bhd", weight, v.to(weight.dtype)), lse)


def joined(*parts: Part) -> tuple[Float[Tensor, "batch heads dim"], Float[Tensor, "batch heads"]]:
    """One softmax over all."""
    out, lse = parts[0][1:]
    for part in parts[1:]:
        out, lse = merge(out, lse, part.out, part.lse)
    return out, lse


def at_each_head(x: Float[Tensor, "batch slots heads dim"], index: Int64[Tensor, "batch heads picks"]
                 ) -> Float[Tensor, "batch heads picks dim"]:
    """The slots that each head names, in places of its own."""
    row = torch.arange(len(index), device=index.device)[:, None, None]
    return x[row, index.clamp(min=0), torch.arange(index.shape[1], device=index.device)[:, None]]


class Retrieved(NamedTuple):
    """index: places, -1 for none. codes: looked up, `NOWHERE` for none. candidates: whose keys were read."""

    index: Int64[Tensor, "batch heads picks"]
    score: Float[Tensor, "batch heads picks"]
    codes: Int32[Tensor, "batch heads tables probes"]
    candidates: Int64[Tensor, "batch heads"]


class Tables(NamedTuple):
    """divided: how the tables are divided into buckets. index: the slots, sorted by bucket. asked: codes that reads
    since the last segment boundary looked up, the newest of them."""

    divided: buckets.State
    index: Buckets
    asked: Int32[Tensor, "batch reads heads tables probes"]


@dataclass(frozen=True, kw_only=True)
class LookupConfig:
    """tables: looked up at first, None: all of the family. probes, deep_probes: buckets looked up in a table, at first
    and when confidence is low. per_bucket: newest slots read of each; with fewer than `buckets.most_load`, older slots
    of a full bucket are not found. recall, angle: probe each query only until a slot at that angle (radians) is found
    with probability `recall`; None: always all probes. gate: share of past probes whose buckets are looked up, None:
    all buckets. buckets: how they divide."""

    tables: int | None = None
    probes: int = 2
    deep_probes: int = 4
    per_bucket: int = 64
    recall: float | None = None
    angle: float = 0.5
    gate: float | None = None
    buckets: buckets.Config = field(default_factory=lambda: buckets.Config(bits=8))

    def __post_init__(self) -> None:
        check_positive(self, "probes", "per_bucket")
        if self.deep_probes < self.probes:
            raise ValueError(f"deep_probes: expected at least probes ({self.probes}), got {self.deep_probes}")
        for name in ("gate", "recall"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"{name}: expected a share above 0 and at most 1, got {value}")

    def build(self, family: Family) -> Lookup:
        return Lookup(self, family)


class Lookup:
    """Finds the slots of the medium tier that a query scores highest: among those in its buckets, or among all."""

    def __init__(self, config: LookupConfig, family: Family) -> None:
        self.config, self.family, self.divide = config, family, config.buckets.build()
        self.tables = family.tables if config.tables is None else config.tables
        if not 1 <= self.tables <= family.tables:
            raise ValueError(f"tables: expected 1 to the family's {family.tables}, got {config.tables}")
        if config.recall is not None and not hasattr(family, "probe_probability"):
            raise ValueError(f"recall: expected a family that knows the probability of its probes, "
                             f"got {type(family).__name__}")  # fmt: skip

    def init_state(self, medium: CompressedStorage, reads: int) -> Tables:
        """reads: whose codes are remembered until the next segment."""
        codes = medium.slots.codes
        batch, _, heads, tables = codes.shape
        asked = codes.new_full((batch, reads, heads, tables, self.config.deep_probes), NOWHERE)
        divided = self.divide.init_state(batch, heads, tables, device=codes.device)
        return Tables(divided, sorted_by_bucket(codes), asked)

    def update(self, state: Tables, medium: CompressedStorage, written: Int[Tensor, "batch new heads tables"],
               evicted: Int[Tensor, "batch old heads tables"]) -> Tables:
        """After a segment, which wrote and evicted slots of these codes (negative: nothing)."""
        divided = self.divide.update(state.divided, written=written, evicted=evicted, probed=state.asked)
        index = sorted_by_bucket(self.divide.of(divided, medium.slots.codes))
        return Tables(divided, index, torch.full_like(state.asked, NOWHERE))

    def best(self, medium: CompressedStorage, state: Tables, q: Float[Tensor, "batch heads dim"], picks: int
             ) -> Retrieved:
        """The best of all slots."""
        score = torch.einsum("bhd,bnhd->bhn", q, medium.slots.k.to(q.dtype)) + medium.bias.transpose(1, 2)
        best = score.topk(min(picks, score.shape[-1]))
        index = best.indices.masked_fill(best.values == -torch.inf, -1)
        return Retrieved(index, best.values, torch.full_like(state.asked[:, 0], NOWHERE), (score > -torch.inf).sum(-1))

    def hashed(self, medium: CompressedStorage, state: Tables, q: Float[Tensor, "batch heads dim"], picks: int, *,
               deep: bool = False) -> Retrieved:
        """The best of the slots in the query's buckets. deep: all tables, more probes, no gate, no limit by recall."""
        c, slots = self.config, medium.slots
        tables, probes = (self.family.tables, c.deep_probes) if deep else (self.tables, c.probes)
        asked = self.family.codes(q[:, None], probes=probes)[..., :tables, :]
        if c.recall is not None and not deep:
            chance = self.family.probe_probability(q[:, None], c.angle, probes=probes)[..., :tables, :]
            asked = kept(asked, enough_probes(chance, c.recall)[0])
        if c.gate is not None and not deep:
            asked = self.divide.gate(state.divided, asked, share=c.gate)
        codes = torch.full_like(state.asked[:, 0], NOWHERE)
        codes[:, :, :tables, :probes] = asked[:, 0]
        index = Buckets(state.index.keys[:, :, :tables].contiguous())
        found = bucket_lookup(q[:, None].to(slots.k.dtype), self.divide.of(state.divided, asked), slots.k, index,
                              picks=min(picks, slots.k.shape[1]), candidates=c.per_bucket * tables * probes,
                              bias=medium.bias, scale=1.0)  # fmt: skip
        return Retrieved(found.index[:, 0].long(), found.score[:, 0].to(q.dtype), codes, found.found[:, 0].long())


class Calibration(NamedTuple):
    """Confidence as estimated, and the share of the slots' mass that was really retrieved."""

    estimated: Float[Tensor, "batch heads"]
    true: Float[Tensor, "batch heads"]


class Attribution(NamedTuple):
    """error: |out - reference| / |reference|, the reference reading all slots, as tokens where those are held. exact:
    the same after a replay with the best slots, as many as before. fine: with the same slots, but tokens for slots
    where they are held. cause: index into `CAUSES`: the replay that removes more of an error above the tolerance, if it
    removes at least half. Of what nobody holds any more (tokens that are slots only), nothing is said."""

    error: Float[Tensor, "batch heads"]
    exact: Float[Tensor, "batch heads"]
    fine: Float[Tensor, "batch heads"]
    cause: Int64[Tensor, "batch heads"]


def attribution(read: Float[Tensor, "batch heads dim"], exact: Float[Tensor, "batch heads dim"],
                fine: Float[Tensor, "batch heads dim"], reference: Float[Tensor, "batch heads dim"], tolerance: float
                ) -> Attribution:
    """Which of two replays explains how far a read is from the reference."""
    size = reference.norm(dim=-1).clamp(min=torch.finfo(reference.dtype).tiny)
    error, after_exact, after_fine = ((out - reference).norm(dim=-1) / size for out in (read, exact, fine))
    better = torch.where(after_exact <= after_fine, CAUSES.index("collision"), CAUSES.index("over-compression"))
    explained = torch.minimum(after_exact, after_fine) <= error / 2
    cause = torch.where(error > tolerance, torch.where(explained, better, CAUSES.index("neither")), 0)
    return Attribution(error, after_exact, after_fine, cause)


def strata(held: Int[Tensor, "batch"], samples: int, seed: int
           ) -> tuple[Int64[Tensor, "batch {samples}"], Int64[Tensor, "batch {samples}"]]:
    """One of the first `held` places from each of `samples` equal strata, and the sizes of these (0: an empty one).

    The same for a seed on every device; with as many samples as places, every place once.
    """
    edge = torch.arange(samples + 1, device=held.device) * held[:, None] // samples
    size = edge.diff(dim=1)
    chance = torch.rand(samples, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return edge[:, :-1] + (chance.to(held.device) * size).long(), size


def log_rest(score: Float[Tensor, "batch heads samples"], place: Int64[Tensor, "batch samples"],
             size: Int64[Tensor, "batch samples"], retrieved: Int64[Tensor, "batch heads picks"]
             ) -> Float[Tensor, "batch heads"]:
    """log Ẑ, from the scores of one place of each stratum."""
    known = (place[:, None, :, None] == retrieved[:, :, None]).any(-1)
    return (score + size[:, None].log()).masked_fill(known, -torch.inf).logsumexp(-1)


class FineTokens(NamedTuple):
    """Of the last segments that became slots: their tokens' code, and which places the slots went to, -1 beyond those
    there are. radius: ρ of each slot. longest: n."""

    code: tuple[Tensor, ...]
    segment: Int64[Tensor, "batch fine"]
    place: Int64[Tensor, "batch fine most"]
    radius: Float[Tensor, "batch fine most heads"]
    longest: Float[Tensor, "batch heads"]


class FineStorage:
    """Keeps the tokens of the last `segments` segments through a codec whose slots are the tokens, such as int8."""

    def __init__(self, codec: Codec, segments: int, segment: int, sinks: int, heads: int, dim: int,
                 reach: float) -> None:
        if not isinstance(codec, WholeSegment):
            raise ValueError(f"fine_codec: expected a codec that keeps every token, got {type(codec).__name__}")
        self.codec, self.segments, self.segment, self.sinks, self.reach = codec, segments, segment, sinks, reach
        zeros = torch.zeros(1, 1, segment, heads, dim)
        leaves, self._form = pytree.tree_flatten(codec.encode(zeros, zeros))
        self._sizes = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]

    def init_state(self, like: Float[Tensor, "batch heads dim"]) -> FineTokens:
        batch, heads, dim = like.shape
        zeros = like.new_zeros(batch, self.segments, self.segment, heads, dim)
        none = torch.full((batch, self.segments), -1, device=like.device)
        radius = like.new_zeros(batch, self.segments, self.segment, heads)
        return FineTokens(self._encode(zeros, zeros), none, none[..., None].repeat(1, 1, self.segment), radius,
                          like.new_zeros(batch, heads))  # fmt: skip

    def write(self, state: FineTokens, number: int, k: Float[Tensor, "batch segment heads dim"],
              v: Float[Tensor, "batch segment heads dim"], slots: Held, place: Int[Tensor, "batch slots"]
              ) -> FineTokens:
        """After segment `number`, sinks included, became slots in these places."""
        at = torch.tensor([number % self.segments], device=k.device)
        new = self._encode(k[:, None], v[:, None])
        code = tuple(held.index_copy(1, at, leaf) for held, leaf in zip(state.code, new, strict=True))
        tokens = k[:, self.sinks :] if number == 0 else k
        spare = (0, self.segment - place.shape[1])
        radius = torch.nn.functional.pad(radii(tokens, slots), (0, 0, *spare))
        return FineTokens(
            code, state.segment.index_fill(1, at, number),
            state.place.index_copy(1, at, torch.nn.functional.pad(place, spare, value=-1)[:, None]),
            state.radius.index_copy(1, at, radius[:, None].to(state.radius.dtype)),
            torch.maximum(state.longest, tokens.norm(dim=-1).amax(1)),
        )  # fmt: skip

    def bytes(self, state: FineTokens) -> int:
        """Of one segment of one row."""
        return sum(leaf[0, 0].numel() * leaf.element_size() for leaf in state.code)

    def whole(self, state: FineTokens, medium: CompressedStorage) -> Tensor:
        """Which of the segments have all their slots still in the medium tier, where they were put `[batch, fine]`."""
        place = state.place.flatten(1)
        there = medium.slots.segment.gather(1, place.clamp(min=0)).view(state.place.shape) == state.segment[..., None]
        return (there | (state.place < 0)).all(-1) & (state.segment >= 0)

    def doubt(self, state: FineTokens, medium: CompressedStorage, q: Float[Tensor, "batch heads dim"],
              lse: Float[Tensor, "batch heads"]) -> Float[Tensor, "batch heads fine"]:
        """The share that a token hidden in the slots of each segment may have, beside all that was read (`lse`)."""
        slots = medium.slots.at(state.place.flatten(1))
        mean = torch.einsum("bhd,bnhd->bnh", q, slots.k.to(q.dtype))
        size = q.norm(dim=-1)[:, None]
        bound = torch.minimum(mean + self.reach * size * state.radius.flatten(1, 2), size * state.longest[:, None])
        own = mean + slots.mass.log()
        hides = (bound > own) & (slots.mass > 0) & (state.place.flatten(1) >= 0)[..., None]
        excess = (bound + torch.log(-torch.expm1(own - bound))).where(hides, -torch.inf)
        excess = excess.unflatten(1, state.place.shape[1:]).amax(2).transpose(1, 2)
        return torch.sigmoid(excess - lse[..., None]).where(self.whole(state, medium)[:, None], 0)

    def tokens(self, state: FineTokens, chosen: Int[Tensor, "batch chosen"]) -> tuple[Tensor, Tensor, Tensor]:
        """k, v `[batch, chosen · segment, heads, dim]` of some segments, by their index, and which of these tokens a
        slot stands for: not the sinks, and nothing where the index is -1."""
        row = torch.arange(len(chosen), device=chosen.device)[:, None]
        held = iter(state.code)
        leaves = [next(held)[row, chosen.clamp(min=0)] if size is None else size for size in self._sizes]
        k, v = self.codec.reconstruct(pytree.tree_unflatten(leaves, self._form))
        number = state.segment.gather(1, chosen.clamp(min=0))[..., None]
        position = number * self.segment + torch.arange(self.segment, device=chosen.device)
        there = (chosen >= 0)[..., None] & (position >= self.sinks)
        return k.flatten(1, 2), v.flatten(1, 2), there.flatten(1)

    def _encode(self, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        """The tensors of the code; the sizes in it are always the same."""
        return tuple(leaf for leaf in pytree.tree_leaves(self.codec.encode(k, v)) if isinstance(leaf, Tensor))


def radii(k: Float[Tensor, "batch time heads dim"], slots: Held) -> Float[Tensor, "batch slots heads"]:
    """ρ: the largest distance from each slot of the tokens that it is the nearest slot of; 0 of those of no mass."""
    tokens, means = (x.transpose(1, 2).to(torch.promote_types(x.dtype, torch.float32)) for x in (k, slots.k))
    # Not by |a|² - 2 a·b + |b|²: a slot that is a token is at a distance of 0 from it.
    far = torch.cdist(tokens, means, compute_mode="donot_use_mm_for_euclid_dist")
    near = far.masked_fill((slots.mass <= 0).transpose(1, 2)[:, :, None], torch.inf).min(-1)
    radius = far.new_zeros(means.shape[:-1]).scatter_reduce(-1, near.indices, near.values, "amax")
    return radius.transpose(1, 2)
