"""What the tiers of a streaming memory hold: tokens as they are, slots in places, and the view of a store on disk.

Source: Akbar 2025, HARMONY, `ShortTermBuffer` and `CompressedStorage`; `PersistentMemory` is in `hmlab.stores`.

    window of position t     positions first(t) .. t,  first(t) = max(0, S · floor((t - W + 1) / S))
    segment n                positions n·S .. (n + 1)·S - 1 but for the A sinks, compressed when first(t) has passed it

Symbols: W `window`, S `segment`, A `sinks`. All classes are values: a method returns a new one, and the tensors of the
old one stay as they are. All rows of a batch have read equally many tokens. Units: positions and mass in tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor

from hmlab.codecs.codec import Codec
from hmlab.stores.layout import Slots
from hmlab.stores.persistent import Cursor, PersistentMemory
from hmlab.stores.search import Found
from hmlab.stores.tiers import Usage, promotions

NOTHING = -1
"""The code of a free place: no bucket has it and no query asks for it."""
Eviction = Callable[[Usage, Tensor], Tensor]
"""A `hmlab.stores.tiers.Policy`."""


class ShortTermBuffer(NamedTuple):
    """A ring of the last W + S - 1 tokens, position p in place p mod (W + S - 1), and the first A tokens."""

    k: Float[Tensor, "batch places heads dim"]
    v: Float[Tensor, "batch places heads dim"]
    tokens: Int64[Tensor, "batch places"]
    sink_k: Float[Tensor, "batch sinks heads dim"]
    sink_v: Float[Tensor, "batch sinks heads dim"]

    @classmethod
    def empty(cls, like: Float[Tensor, "batch heads dim"], places: int, sinks: int) -> ShortTermBuffer:
        """Nothing, in the dtype and on the device of `like`."""
        batch, *rest = like.shape
        ring, sink = like.new_zeros(batch, places, *rest), like.new_zeros(batch, sinks, *rest)
        tokens = torch.zeros(batch, places, dtype=torch.int64, device=like.device)
        return cls(ring, ring.clone(), tokens, sink, sink.clone())

    def write(self, k: Float[Tensor, "batch time heads dim"], v: Float[Tensor, "batch time heads dim"],
              tokens: Int[Tensor, "batch time"], position: int) -> ShortTermBuffer:
        """With the tokens of positions `position`, `position` + 1, ...; no more of them than there are places."""
        sinks, time = self.sink_k.shape[1], k.shape[1]
        place = self._places(position, position + time)
        new = [held.index_copy(1, place, x.to(held.dtype)) for held, x in zip(self[:3], (k, v, tokens), strict=True)]
        kept = range(position, min(position + time, sinks))
        if not kept:
            return ShortTermBuffer(*new, self.sink_k, self.sink_v)
        at = torch.arange(kept.start, kept.stop, device=k.device)
        return ShortTermBuffer(*new, *(held.index_copy(1, at, x[:, : len(kept)].to(held.dtype))
                                       for held, x in ((self.sink_k, k), (self.sink_v, v))))  # fmt: skip

    def span(self, first: int, end: int) -> tuple[Tensor, Tensor, Tensor]:
        """k, v and tokens of positions first .. end - 1."""
        place = self._places(first, end)
        return tuple(held.index_select(1, place) for held in self[:3])

    def read(self, first: int, end: int) -> tuple[Tensor, Tensor]:
        """k, v of the window first .. end - 1, and before it the sinks that lie outside."""
        k, v, _ = self.span(first, end)
        return (k, v) if first == 0 else (torch.cat((self.sink_k, k), 1), torch.cat((self.sink_v, v), 1))

    def _places(self, first: int, end: int) -> Int64[Tensor, "positions"]:
        return torch.arange(first, end, device=self.k.device) % self.k.shape[1]


class Held(NamedTuple):
    """Slots, row by row. codes: of their keys, one per hash table. number: that of a slot which has come back from the
    disk, where it still lies; -1 of one that never was there."""

    k: Float[Tensor, "batch slots heads dim"]
    v: Float[Tensor, "batch slots heads dim"]
    mass: Float[Tensor, "batch slots heads"]
    position: Float[Tensor, "batch slots heads"]
    codes: Int[Tensor, "batch slots heads tables"]
    segment: Int64[Tensor, "batch slots"]
    density: Float[Tensor, "batch slots"]
    number: Int64[Tensor, "batch slots"]

    def at(self, place: Int[Tensor, "batch chosen"]) -> Held:
        """The slots in these places; of a place below 0 whatever lies in the first."""
        row = torch.arange(len(place), device=place.device)[:, None]
        return Held(*(held[row, place.clamp(min=0)] for held in self))

    def put(self, place: Int[Tensor, "batch chosen"], slots: Held) -> Held:
        """With slots in these places, in each row different ones; a place below 0 takes nothing."""
        row, chosen = (place >= 0).nonzero(as_tuple=True)
        at = place[row, chosen]
        return Held(*(held.index_put((row, at), new[row, chosen].to(held.dtype))
                      for held, new in zip(self, slots, strict=True)))  # fmt: skip


class CompressedStorage(NamedTuple):
    """The medium tier: slots in a fixed number of places, and what reads have done with each."""

    slots: Held
    usage: Usage

    @classmethod
    def empty(cls, like: Float[Tensor, "batch heads dim"], places: int, tables: int) -> CompressedStorage:
        batch, heads, _ = like.shape
        vectors = like.new_zeros(batch, places, *like.shape[1:])
        mass = like.new_zeros(batch, places, heads, dtype=torch.promote_types(like.dtype, torch.float32))
        codes = torch.full((batch, places, heads, tables), NOTHING, dtype=torch.int32, device=like.device)
        none = torch.full((batch, places), -1, device=like.device)
        density = torch.zeros(batch, places, dtype=torch.float64, device=like.device)
        slots = Held(vectors, vectors.clone(), mass, mass.double(), codes, none, density, none.clone())
        return cls(slots, Usage.empty(batch, places, device=like.device, dtype=mass.dtype))

    def write(self, place: Int[Tensor, "batch new"], slots: Held, now: Int[Tensor, "batch"]) -> CompressedStorage:
        return CompressedStorage(self.slots.put(place, slots), self.usage.write(place, slots.density, now))

    def leaving(self, place: Int[Tensor, "batch new"]) -> tuple[Held, Bool[Tensor, "batch new"]]:
        """What new slots would drive out of these places, and which of it is something."""
        return self.slots.at(place), self.usage.held.gather(1, place.clamp(min=0)) & (place >= 0)

    @property
    def bias(self) -> Float[Tensor, "batch slots heads"]:
        """log mass, -inf where there is nothing."""
        return self.slots.mass.log().masked_fill(~self.usage.held[..., None], -torch.inf)


def compress(codec: Codec, k: Float[Tensor, "batch segment heads dim"], v: Float[Tensor, "batch segment heads dim"],
             slots: Int[Tensor, "batch"]) -> tuple[Tensor, Tensor, Tensor, Tensor, Bool[Tensor, "batch most"]]:
    """k̂, v̂, mass, mean place in the segment, and which of them there are, one segment a row, each with its own number
    of slots: the largest divisor of the segment up to that, which codecs of strides need where sinks shorten it."""
    time, parts = k.shape[1], {}
    for wanted in slots.unique().tolist():
        if not 1 <= wanted <= time:
            raise ValueError(f"ratio: expected 1 to {time} slots for a segment, got {wanted}")
        count = max(n for n in range(1, wanted + 1) if time % n == 0)
        rows = (slots == wanted).nonzero()[:, 0]
        parts[wanted] = rows, codec.decode(codec.encode(k[rows, None], v[rows, None], count))
    most = max(code.k.shape[2] for _, code in parts.values())
    fields, there = [], torch.zeros(len(k), most, dtype=torch.bool, device=k.device)
    for name in ("k", "v", "mass", "position"):
        like = getattr(next(iter(parts.values()))[1], name)
        field = like.new_zeros(len(k), most, *like.shape[3:])
        for rows, code in parts.values():
            field[rows, : code.k.shape[2]] = getattr(code, name)[:, 0]
            there[rows, : code.k.shape[2]] = True
        fields.append(field)
    return *fields, there


class DiskView(NamedTuple):
    """What each row sees of a store, and the slots there that reads since the last segment boundary want back.

    branch, watermark: the row's `Cursor`. number: -1 for none. reads, mass: as in `Usage`, of these reads alone.
    """

    branch: Int64[Tensor, "batch"]
    watermark: Int64[Tensor, "batch"]
    number: Int64[Tensor, "batch wanted"]
    reads: Int64[Tensor, "batch wanted"]
    mass: Float[Tensor, "batch wanted"]

    @classmethod
    def empty(cls, batch: int, wanted: int, *, device: torch.device | str | None = None) -> DiskView:
        zero = torch.zeros(batch, dtype=torch.int64, device=device)
        number = torch.full((batch, wanted), -1, device=device)
        return cls(zero, zero.clone(), number, torch.zeros_like(number), torch.zeros_like(number).double())

    def cursor(self, row: int) -> Cursor:
        return Cursor(int(self.branch[row]), int(self.watermark[row]))

    def append(self, store: PersistentMemory, slots: Held, leaves: Bool[Tensor, "batch slots"]) -> DiskView:
        """With the slots that leave the tier above. One that came from the disk is not written again."""
        branch, watermark = self.branch.clone(), self.watermark.clone()
        leaves = leaves & (slots.number < 0)
        for row in range(len(branch)):
            out = Held(*(field[row, leaves[row]] for field in slots))
            document = torch.full_like(out.segment, row)
            written = Slots(out.k, out.v, out.mass, out.position, out.density, document, out.segment)
            branch[row], watermark[row] = store.append(written, self.cursor(row))
        return self._replace(branch=branch, watermark=watermark)

    def search(self, store: PersistentMemory, q: Float[Tensor, "batch heads dim"], k: int,
               hidden: Int64[Tensor, "batch places"], *, exact: bool) -> Found:
        """The best k slots of each row and head, but for hidden ones: those that lie in the tier above as well."""
        rows = []
        for row, asked in enumerate(q):
            above = hidden[row][hidden[row] >= 0]
            # Hidden slots can take at most as many of the first places as there are.
            found = store.search(asked[None], k + len(above), self.cursor(row), exact=exact)
            score = found.score.masked_fill(torch.isin(found.number, above), -torch.inf)
            best = score.topk(k, dim=-1)
            taken = [field.gather(-1, best.indices) for field in (found.number, found.mass, found.position)]
            index = best.indices[..., None].expand(*best.indices.shape, q.shape[-1])
            vectors = [field.gather(-2, index) for field in (found.keys, found.values)]
            number = taken[0].masked_fill(best.values == -torch.inf, -1)
            rows.append(Found(number, best.values, *vectors, *taken[1:]))
        return Found(*(torch.cat(fields) for fields in zip(*rows, strict=True)))

    def load(self, store: PersistentMemory, like: Held) -> Held:
        """The wanted slots, anything where there is none; codes as in `like`, those of other slots."""
        held = like.at(torch.zeros_like(self.number))
        for row, number in enumerate(self.number):
            there = number >= 0
            if not there.any():
                continue
            slots = store.read(number[there], self.cursor(row))
            fields = (slots.keys, slots.values, *slots[2:5], slots.segment)
            for name, stored in zip(("k", "v", "mass", "position", "density", "segment"), fields, strict=True):
                field = getattr(held, name)
                field[row, there] = stored.to(field)
        return held._replace(number=self.number)

    def want(self, number: Int64[Tensor, "batch read"], mass: Float[Tensor, "batch read"]) -> DiskView:
        """After a read: of the slots wanted so far and those that it found, the ones with most attention."""
        most = self.number.shape[1]
        every = torch.cat((self.number, number), 1)
        counts = torch.cat((self.reads, torch.ones_like(number)), 1), torch.cat((self.mass, mass.double()), 1)
        new = DiskView.empty(len(number), most, device=number.device)
        for row, numbers in enumerate(every):
            distinct, place = numbers[numbers >= 0].unique(return_inverse=True)
            reads, total = (x.new_zeros(len(distinct)).index_add(0, place, x[row, numbers >= 0]) for x in counts)
            best = total.argsort(descending=True, stable=True)[:most]
            for field, values in zip(new[2:], (distinct, reads, total), strict=True):
                field[row, : len(best)] = values[best]
        return self._replace(number=new.number, reads=new.reads, mass=new.mass)


def place(medium: CompressedStorage, disk: DiskView, store: PersistentMemory | None, at: Int[Tensor, "batch new"],
          slots: Held, now: Int[Tensor, "batch"]) -> tuple[CompressedStorage, DiskView, Tensor]:
    """Slots into places of the medium tier (-1: none). What lay there goes to disk; its codes are returned."""
    out, leaves = medium.leaving(at)
    if store is not None:
        disk = disk.append(store, out, leaves)
    return medium.write(at, slots, now), disk, out.codes.masked_fill(~leaves[..., None, None], NOTHING)


def promote(medium: CompressedStorage, disk: DiskView, store: PersistentMemory, eviction: Eviction,
            codes: Callable[[Tensor], Tensor], now: Int[Tensor, "batch"], margin: float
            ) -> tuple[CompressedStorage, DiskView, Tensor, Tensor]:
    """Exchange wanted slots with those that are worth less; the codes of what went, and of what came.

    A slot from the disk is judged as if it had come in now, with the reads that it had since the last segment.
    """
    arrival, there = now[:, None].expand_as(disk.number), disk.number >= 0
    wanted = disk.load(store, medium.slots)
    wanted = wanted._replace(codes=codes(wanted.k))
    usage = medium.usage
    mass, density = disk.mass.to(usage.mass), wanted.density.to(usage.density)
    new = Usage(arrival.where(there, -1), arrival, disk.reads, mass, density)
    # Scored together: a rule may weigh a slot by its share of the total.
    worth = eviction(Usage(*(torch.cat(counters, 1) for counters in zip(usage, new, strict=True))), now)
    most, places = disk.number.shape[1], usage.written.shape[1]
    lower = worth[:, places:].masked_fill(~there, -torch.inf)
    swaps = promotions(worth[:, :places], usage, lower, most, margin=margin)
    back = wanted.at(swaps.up)
    medium, disk, evicted = place(medium, disk, store, swaps.down, back, now)
    mass = mass.gather(1, swaps.up.clamp(min=0))
    medium = medium._replace(usage=medium.usage.read(swaps.down, mass, now))
    none = DiskView.empty(len(now), most, device=now.device)
    came = back.codes.masked_fill((swaps.up < 0)[..., None, None], NOTHING)
    return medium, none._replace(branch=disk.branch, watermark=disk.watermark), evicted, came


@runtime_checkable
class Ratio(Protocol):
    """How many slots a segment gets. What it learns from the past is in a state of tensors, batch first."""

    def init_state(self, batch: int, *, device: torch.device | str | None = None) -> Any: ...

    def __call__(self, k: Float[Tensor, "batch segment heads dim"], v: Float[Tensor, "batch segment heads dim"],
                 density: Float[Tensor, "batch"], state: Any) -> tuple[Int[Tensor, "batch"], Any]:
        """Slots of each row's segment, and the state after it."""
        ...


@dataclass(frozen=True)
class FixedRatio:
    """One slot for every `ratio` tokens."""

    ratio: int = 16

    def __post_init__(self) -> None:
        if self.ratio < 1:
            raise ValueError(f"ratio: expected at least 1, got {self.ratio}")

    def init_state(self, batch: int, *, device: torch.device | str | None = None) -> tuple[()]:
        return ()

    def __call__(self, k, v, density, state):
        return torch.full_like(density, max(1, k.shape[1] // self.ratio), dtype=torch.int64), state


class Spent(NamedTuple):
    """mean, square: of the densities so far, the latter about the mean and summed. debt: slots beyond the budget so
    far, in segments' budgets."""

    count: Int64[Tensor, "batch"]
    mean: Float[Tensor, "batch"]
    square: Float[Tensor, "batch"]
    debt: Float[Tensor, "batch"]


@dataclass(frozen=True, kw_only=True)
class DensityRatio:
    """The denser a segment is beside those before it, the more slots; on average `ratio` tokens for one.

        log2 slots = log2(S / ratio) + gain · (density - mean) / deviation - debt / patience,  to the nearest ratio's

    mean, deviation and debt are of the segments before. The debt that makes even the densest segments take the fewest
    slots is finite, so the debt is bounded and the mean number of slots meets the budget as 1 / segments.
    """

    ratio: float | int = 16
    ratios: tuple[int, ...] = (4, 8, 16, 32, 64)
    gain: float | int = 1
    patience: float | int = 8

    def __post_init__(self) -> None:
        if not self.ratios or min(self.ratios) < 1:
            raise ValueError(f"ratios: expected at least one, all at least 1, got {self.ratios}")
        if not min(self.ratios) <= self.ratio <= max(self.ratios):
            raise ValueError(f"ratio: expected one between those of {self.ratios}, got {self.ratio}")
        if self.gain < 0 or self.patience <= 0:
            name, value = ("gain", self.gain) if self.gain < 0 else ("patience", self.patience)
            raise ValueError(f"{name}: expected a positive number, got {value}")

    def init_state(self, batch: int, *, device: torch.device | str | None = None) -> Spent:
        zero = torch.zeros(batch, dtype=torch.float64, device=device)
        return Spent(zero.long(), zero, zero.clone(), zero.clone())

    def __call__(self, k, v, density, state):
        time, density = k.shape[1], density.double()
        counts = torch.tensor([max(1, time // ratio) for ratio in self.ratios], device=density.device)
        deviation = (state.square / state.count.clamp(min=1)).sqrt()
        surprise = torch.where(deviation > 0, (density - state.mean) / deviation.where(deviation > 0, 1), 0)
        wanted = math.log2(time / self.ratio) + self.gain * surprise - state.debt / self.patience
        slots = counts[(counts.double().log2() - wanted[:, None]).abs().argmin(1)]
        count, off = state.count + 1, density - state.mean
        mean = state.mean + off / count
        debt = state.debt + slots * self.ratio / time - 1
        return slots, Spent(count, mean, state.square + off * (density - mean), debt)
