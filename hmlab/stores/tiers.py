"""Which slots leave a tier, which come back, and what each tier did: rules over counters, all of them values.

Sources: first-in-first-out, LRU and LFU: Silberschatz, Galvin and Gagne, Operating System Concepts, chapter on page
replacement; priority scores: Akbar 2025, HARMONY, Priority Scoring Mechanisms; learned: Song et al. 2020, Learning
Relaxed Belady (NSDI), with the listwise loss of Cao et al. 2007, Learning to Rank (ICML).

A rule gives every slot of a tier a score, the higher the longer it is kept. Slots leave in the order of

    (score, written, place), the lowest first

so equal scores leave first-in-first-out, and the order is the same on every machine. Nothing here looks at the future
(but the loss of `Learned`, which is told it), nor at another row of the batch.
Units: times in tokens, counted from the beginning of the document; mass in shares of a query's attention, summed over
reads; density in bits per token. Errors: ValueError naming the argument.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn


class Usage(NamedTuple):
    """Counters of the slots of one tier. written: when a slot came in, −1 where the place is free. last_read: −1 if
    never. reads: how often it was among what a query retrieved. mass: attention that it received."""

    written: Int[Tensor, "batch slots"]
    last_read: Int[Tensor, "batch slots"]
    reads: Int[Tensor, "batch slots"]
    mass: Float[Tensor, "batch slots"]
    density: Float[Tensor, "batch slots"]

    @classmethod
    def empty(cls, batch: int, slots: int, *, device: torch.device | str | None = None,
              dtype: torch.dtype | None = None) -> Usage:
        """The counters of a tier that holds nothing."""
        none = torch.full((batch, slots), -1, device=device)
        zero = torch.zeros(batch, slots, device=device, dtype=dtype)
        return cls(none, none.clone(), torch.zeros_like(none), zero, zero.clone())

    @property
    def held(self) -> Bool[Tensor, "batch slots"]:
        return self.written >= 0

    def write(self, place: Int[Tensor, "batch new"], density: Float[Tensor, "batch new"], now: Int[Tensor, "batch"]
              ) -> Usage:
        """Counters after slots came into places, of each row different ones; −1 writes nothing."""
        def put(counter: Tensor, value: Tensor | int) -> Tensor:
            value = value if isinstance(value, Tensor) else counter.new_full((), value)
            return _padded(counter).scatter(1, _or_last(place, counter), value.to(counter.dtype).expand(place.shape)
                                            )[:, :-1]  # fmt: skip

        return Usage(put(self.written, now[:, None]), put(self.last_read, -1), put(self.reads, 0), put(self.mass, 0),
                     put(self.density, density))  # fmt: skip

    def read(self, place: Int[Tensor, "batch read"], mass: Float[Tensor, "batch read"], now: Int[Tensor, "batch"]
             ) -> Usage:
        """Counters after slots were retrieved and received that attention; −1 for none, a place may come twice."""
        index = _or_last(place, self.mass)
        reads = _padded(self.reads).scatter_add(1, index, torch.ones_like(index))[:, :-1]
        total = _padded(self.mass).scatter_add(1, index, mass.to(self.mass.dtype))[:, :-1]
        return self._replace(reads=reads, mass=total, last_read=self.last_read.where(reads == self.reads, now[:, None]))


class Policy(Protocol):
    """How long slots deserve to be kept."""

    def __call__(self, usage: Usage, now: Int[Tensor, "batch"]) -> Float[Tensor, "batch slots"]:
        """A score of every slot, the higher the longer it is kept; of free places, anything."""
        ...


@dataclass(frozen=True)
class FirstInFirstOut:
    """The oldest leaves first: the one rule for which streaming equals the parallel form."""

    def __call__(self, usage: Usage, now: Int[Tensor, "batch"]) -> Float[Tensor, "batch slots"]:
        return usage.written.double()


@dataclass(frozen=True)
class LeastRecentlyUsed:
    """What was neither read nor written for longest leaves first."""

    def __call__(self, usage: Usage, now: Int[Tensor, "batch"]) -> Float[Tensor, "batch slots"]:
        return torch.maximum(usage.written, usage.last_read).double()


@dataclass(frozen=True)
class LeastFrequentlyUsed:
    """What was read least often leaves first."""

    def __call__(self, usage: Usage, now: Int[Tensor, "batch"]) -> Float[Tensor, "batch slots"]:
        return usage.reads.double()


@dataclass(frozen=True, kw_only=True)
class Priority:
    """A weighted sum of three shares, each of the row's total over the slots held, so that units cancel.

        score = attention · mass/Σ mass + density · bits/Σ bits + relevance · rate/Σ rate
        rate = (reads + 1) / (now − written + half_life) · 2^(−idle / half_life)

    rate: reads per token that are to be expected, the posterior mean of a Poisson rate (Gelman et al., Bayesian Data
    Analysis, §2.6) whose prior saw one read in `half_life` tokens, halved for every `half_life` since the slot was
    last read or written.
    """

    attention: float = 1.0
    density: float = 1.0
    relevance: float = 1.0
    half_life: float = 4096.0

    def __post_init__(self) -> None:
        for name in ("attention", "density", "relevance"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected at least 0, got {getattr(self, name)}")
        if self.half_life <= 0:
            raise ValueError(f"half_life: expected more than 0, got {self.half_life}")

    def __call__(self, usage: Usage, now: Int[Tensor, "batch"]) -> Float[Tensor, "batch slots"]:
        age, idle = _ages(usage, now)
        rate = (usage.reads + 1) / (age + self.half_life) * torch.exp2(-idle / self.half_life)

        def share(x: Tensor) -> Tensor:
            x = x.double().where(usage.held, 0)
            return x / x.sum(1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)

        return (self.attention * share(usage.mass) + self.density * share(usage.density)
                + self.relevance * share(rate))  # fmt: skip


class Learned(nn.Module):
    """A small network over the counters, trained to know which slots will be read.

        score = MLP(log(1 + age), log(1 + idle), log(1 + reads), log(1 + mass), density)
    """

    def __init__(self, hidden: int = 16) -> None:
        super().__init__()
        if hidden < 1:
            raise ValueError(f"hidden: expected at least 1, got {hidden}")
        self.network = nn.Sequential(nn.Linear(5, hidden), nn.GELU(), nn.Linear(hidden, 1))

    def forward(self, usage: Usage, now: Int[Tensor, "batch"]) -> Float[Tensor, "batch slots"]:
        counts = [counter.log1p() for counter in (*_ages(usage, now), usage.reads.double(), usage.mass.double())]
        features = torch.stack((*counts, usage.density.double()), -1)
        return self.network(features.to(self.network[0].weight.dtype))[..., 0]

    def loss(self, usage: Usage, now: Int[Tensor, "batch"], future: Float[Tensor, "batch slots"]
             ) -> Float[Tensor, ""]:
        """−Σ p log softmax(score), p the share of the attention that each slot will receive (`future`, at least 0):
        nats, mean over the rows in which any slot will be read."""
        future = future.where(usage.held, 0)
        total = future.sum(1, keepdim=True)
        score = self(usage, now).masked_fill(~usage.held, -torch.inf).log_softmax(1)
        share = future / total.where(total > 0, 1)
        rows = (share * score.masked_fill(~usage.held, 0)).sum(1)
        return -rows.sum() / (total > 0).sum().clamp(min=1)


def eviction_order(score: Float[Tensor, "batch slots"], usage: Usage) -> Int[Tensor, "batch slots"]:
    """Places in the order in which they are to be used for new slots: free ones, then what a policy scores lowest."""
    order = usage.written.argsort(dim=1, stable=True)
    by_score = score.masked_fill(~usage.held, -torch.inf).gather(1, order).argsort(dim=1, stable=True)
    order = order.gather(1, by_score)
    return order.gather(1, usage.held.gather(1, order).long().argsort(dim=1, stable=True))


class Swaps(NamedTuple):
    """Exchanges between two tiers, the most worthwhile first; places are −1 where there is nothing to exchange."""

    up: Int[Tensor, "batch swaps"]
    down: Int[Tensor, "batch swaps"]


def promotions(upper: Float[Tensor, "batch slots"], upper_usage: Usage, lower: Float[Tensor, "batch candidates"],
               most: int, *, margin: float = 0.0) -> Swaps:
    """Which candidates of a lower tier go up, and whose places in the upper tier they take.

    upper: the policy's scores. lower: scores of the candidates on the same scale, −inf for none. The best candidate
    takes the first place in the order of eviction, the next the next, as long as it scores more than `margin` above
    what it drives out (a free place costs nothing). margin: keeps slots of equal worth from going to and fro.
    """
    if most < 0:
        raise ValueError(f"most: expected at least 0, got {most}")
    if margin < 0:
        raise ValueError(f"margin: expected at least 0, got {margin}")
    most = min(most, upper.shape[1], lower.shape[1])
    down = eviction_order(upper, upper_usage)[:, :most]
    best = lower.sort(dim=1, descending=True, stable=True)
    cost = upper.masked_fill(~upper_usage.held, -torch.inf).gather(1, down)
    worth = best.values[:, :most] > cost + margin
    return Swaps(best.indices[:, :most].where(worth, -1), down.where(worth, -1))


class Traffic(NamedTuple):
    """What each tier of each row was asked for: queries that it answered or did not, seconds and bytes it took."""

    hits: Int[Tensor, "batch tiers"]
    misses: Int[Tensor, "batch tiers"]
    seconds: Float[Tensor, "batch tiers"]
    bytes: Int[Tensor, "batch tiers"]

    @classmethod
    def empty(cls, batch: int, tiers: int, *, device: torch.device | str | None = None) -> Traffic:
        count = torch.zeros(batch, tiers, dtype=torch.int64, device=device)
        return cls(count, count.clone(), count.double(), count.clone())

    def add(self, tier: int, hit: Bool[Tensor, "batch queries"], *, seconds: float = 0.0,
            bytes: Int[Tensor, "batch"] | int = 0) -> Traffic:
        """After one more read of a tier. seconds: that it took, for which every row waited. bytes: read, per row."""
        asked = torch.arange(self.hits.shape[1], device=self.hits.device) == tier
        new = (hit.sum(1), (~hit).sum(1), torch.full_like(self.seconds[:, 0], seconds),
               torch.as_tensor(bytes, device=self.bytes.device).expand(len(hit)))  # fmt: skip
        return Traffic(*(held + amount[:, None] * asked for held, amount in zip(self, new, strict=True)))

    @property
    def hit_rate(self) -> Float[Tensor, "batch tiers"]:
        """Share of queries that a tier answered; NaN where it was not asked."""
        return self.hits / (self.hits + self.misses)


def _ages(usage: Usage, now: Int[Tensor, "batch"]) -> tuple[Float[Tensor, "batch slots"], Float[Tensor, "batch slots"]]:
    """Tokens since each slot was written, and since it was last written or read; 0 for free places."""
    since = [now[:, None] - when for when in (usage.written, torch.maximum(usage.written, usage.last_read))]
    return tuple(tokens.where(usage.held, 0).double() for tokens in since)


def _padded(counter: Tensor) -> Tensor:
    """With one place more, for what goes nowhere."""
    return torch.cat((counter, counter[:, :1]), 1) if counter.shape[1] else counter.new_zeros(len(counter), 1)


def _or_last(place: Tensor, counter: Tensor) -> Tensor:
    return place.where(place >= 0, counter.shape[1])
