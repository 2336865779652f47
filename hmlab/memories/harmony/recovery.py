"""How sure a read may be, and what is held to read again with: confidence, doubt, fine tokens, causes of error.

    confidence = Z / (Z + Ẑ)        Z = Σ exp(score) over the slots retrieved,  Ẑ an estimate over the other ones held
    Ẑ = Σ_i size_i · exp(score_i) · [i was not retrieved]    one slot i drawn from each of equal strata of the places

Ẑ is unbiased, whatever was retrieved. It is an average: a single slot of great mass that is neither retrieved nor
drawn stays unseen, but then what was retrieved is no better than what was drawn: confidence is about retrieved / held.

A slot may hide a token. With k̂ the mean and ρ the radius of a slot, the largest distance from it of the segment's
tokens that it is the nearest slot of, and n the longest key so far, any such token has

    q·k ≤ B = min(q·k̂ + |q| ρ, |q| n)                 (ball bound: Ram & Gray 2012, arXiv 1202.6101)
    doubt = X / (X + Z_all),   X = max over slots (exp B - mass exp(q·k̂))⁺,   Z_all over all that was read

so doubt below `doubtful` proves that no hidden token has that share of the attention. The radius is what discriminates.
Spread alone, 1 - |k̂|² of unit keys, does not: 63 equal keys and one orthogonal to them have the spread of 64 keys
with a little noise. By second order both lack |q|² (1 - |k̂|²) / (2 dim) of log mass, too little for the first, whose
sum one token rules; and what spread bounds, k·k̂ ≥ 1 - mass (1 - |k̂|²) / 2, excludes nothing for the second.

Source: Akbar 2025, HARMONY, which names collisions and over-compression as the causes of error; the estimates are ours.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor
from torch.utils import _pytree as pytree

from hmlab.codecs.codec import Codec, WholeSegment
from hmlab.memories.harmony.storage import CompressedStorage, Held

CAUSES = ("none", "collision", "over-compression", "neither")


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

    def __init__(self, codec: Codec, segments: int, segment: int, sinks: int, heads: int, dim: int) -> None:
        if not isinstance(codec, WholeSegment):
            raise ValueError(f"fine_codec: expected a codec that keeps every token, got {type(codec).__name__}")
        self.codec, self.segments, self.segment, self.sinks = codec, segments, segment, sinks
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
        bound = torch.minimum(mean + size * state.radius.flatten(1, 2), size * state.longest[:, None])
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
    tokens, means = k.transpose(1, 2), slots.k.transpose(1, 2).to(k.dtype)
    # Not by |a|² - 2 a·b + |b|²: a slot that is a token is at a distance of 0 from it.
    far = torch.cdist(tokens, means, compute_mode="donot_use_mm_for_euclid_dist")
    near = far.masked_fill((slots.mass <= 0).transpose(1, 2)[:, :, None], torch.inf).min(-1)
    radius = far.new_zeros(means.shape[:-1]).scatter_reduce(-1, near.indices, near.values, "amax")
    return radius.transpose(1, 2)
