"""The memory manager: three tiers behind one write and one read, token by token, nothing trained and nothing hidden.

    manager = Config(heads=4, dim=32, window=256, segment=64).build()
    manager.write(k, v)                     # k, v [batch, time, heads, dim], in chunks of any size
    reading = manager.read(q)               # q [batch, heads, dim], the newest token's, the scale folded in
    manager.counters.hit_rate               # per row and tier
    before = manager.state                  # a value: set it again to fork or to resume

    score = q·k̂ + log mass                  tokens have mass 1
    out = Σ softmax(score) v̂                one softmax over sinks, window, and slots retrieved from both tiers below

Every token is in one place: among the sinks, in the window, in slots of the medium tier, or in slots on disk; without a
store what the medium tier evicts is gone. A segment becomes slots when the window has passed it, as many as `ratio`
says. All that adapts does so then, from what was written and read before: places, promotions, buckets, statistics.

    medium tier   candidates from the buckets of several hash tables, ranked by their true scores, the best `picks`
    disk tier     the best `picks` by the store's index, ranked likewise; wanted slots come back at the next segment
    recovery      confidence below `confident`: all tables, `deep_probes` each, no gate and no limit by `recall`
                  doubt above `doubtful`: tokens in place of the slots of the `finer` most doubtful segments

`reading` defines confidence and doubt; `storage` what is held. A tier answers a query if it supplies at least half of
the query's attention: `hits` and `misses` count that for each head. Queries that the first tier does not answer are
short-term misses.

Source: Akbar 2025, HARMONY, `MemoryManager`. Deviations: the paper's read returns the content of the first tier that
hits, which is `read_first_hit`; `read` attends to all tiers at once. Keys have no rotary phase here.
Units: seconds, bytes read (vectors alone), positions in tokens. Errors: ValueError naming the argument.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Int32, Int64
from torch import Tensor, nn

from hmlab.codecs import MeanPool, Quantisation
from hmlab.codecs.codec import Codec
from hmlab.hashing import Family, hyperplane
from hmlab.information import DENSITIES, DensityConfig, Statistics, segment_density, spectral_entropy
from hmlab.layers import check_positive
from hmlab.memories.harmony.reading import (
    Attribution,
    Calibration,
    FineStorage,
    FineTokens,
    LookupConfig,
    Part,
    Retrieved,
    Tables,
    at_each_head,
    attend,
    attribution,
    joined,
    log_rest,
    strata,
)
from hmlab.memories.harmony.storage import (
    NOTHING,
    CompressedStorage,
    DiskView,
    Eviction,
    FixedRatio,
    Held,
    Ratio,
    ShortTermBuffer,
    compress,
    place,
    promote,
)
from hmlab.stores.persistent import PersistentMemory
from hmlab.stores.search import Found
from hmlab.stores.tiers import FirstInFirstOut, Traffic, eviction_order

TIERS = ("short", "medium", "disk")
SHORT, MEDIUM, DISK = range(3)


class State(NamedTuple):
    """All that a manager holds. position: tokens written. repairs: reads of a head that probed deeper, and reads that
    read tokens."""

    position: Int64[Tensor, "batch"]
    short: ShortTermBuffer
    medium: CompressedStorage
    tables: Tables
    disk: DiskView
    fine: FineTokens | tuple[()]
    statistics: Statistics | tuple[()]
    ratio: Any
    traffic: Traffic
    repairs: Int64[Tensor, "batch 2"]


class Reading(NamedTuple):
    """What a read gives. hit_share: of the attention, by tier. tier: of the largest share. confidence: after recovery.
    doubt: before it, the largest of the segments held as tokens. retrieved: places in the medium tier, and stored:
    numbers on disk, -1 beyond those there are. deepened: probed deeper. refined: segments read as tokens, or -1."""

    out: Float[Tensor, "batch heads dim"]
    lse: Float[Tensor, "batch heads"]
    hit_share: Float[Tensor, "batch heads tiers"]
    tier: Int64[Tensor, "batch heads"]
    confidence: Float[Tensor, "batch heads"]
    doubt: Float[Tensor, "batch heads"]
    retrieved: Int64[Tensor, "batch heads picks"]
    stored: Int64[Tensor, "batch heads picks"]
    deepened: Bool[Tensor, "batch heads"]
    refined: Int64[Tensor, "batch finer"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """heads, dim: of keys and values. window: W. segment: S. sinks: A, fewer than S.

    capacity: slots of the medium tier. density: one of `DENSITIES` but "cross_entropy"; all but "spectral" need tokens.
    picks: slots retrieved from each tier. lookup: how they are found in the medium tier.
    samples: slots drawn for the confidence. confident: below it probe deeper; 0: never. fine: segments held as tokens,
    finer: at most so many are read as tokens, where doubt is above doubtful; reach: c in `reading`.
    promote: slots that can come back from disk at a segment, margin: by which their worth must exceed another's.
    hit_cosine: of a key that is a hit to `read_first_hit`.
    """

    heads: int
    dim: int
    window: int = 256
    segment: int = 64
    sinks: int = 4
    capacity: int = 1024
    density: str = "spectral"
    picks: int = 16
    lookup: LookupConfig = field(default_factory=LookupConfig)
    samples: int = 32
    confident: float = 0.0
    fine: int = 0
    finer: int = 1
    doubtful: float = 0.5
    reach: float = 0.7
    promote: int = 0
    margin: float = 0.0
    hit_cosine: float = 0.5

    def __post_init__(self) -> None:
        check_positive(self, "heads", "dim", "window", "segment", "capacity", "picks", "samples", "finer")
        if not 0 <= self.sinks < self.segment:
            raise ValueError(f"sinks: expected 0 to segment - 1 ({self.segment - 1}), got {self.sinks}")
        if self.density not in DENSITIES or self.density == "cross_entropy":
            names = ", ".join(name for name in DENSITIES if name != "cross_entropy")
            raise ValueError(f"density: expected one of {names}, got {self.density!r}")
        for name in ("confident", "doubtful", "reach"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected a share from 0 to 1, got {getattr(self, name)}")
        for name in ("fine", "promote", "margin"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected at least 0, got {getattr(self, name)}")

    def build(self, *, codec: Codec | None = None, family: Family | None = None, ratio: Ratio | None = None,
              eviction: Eviction | None = None, store: PersistentMemory | None = None, fine_codec: Codec | None = None
              ) -> MemoryManager:
        """The parts, where None is: mean pooling, random hyperplanes (4 tables), one slot for 16 tokens,
        first-in-first-out, no disk, int8."""
        return MemoryManager(self, codec=codec, family=family, ratio=ratio, eviction=eviction, store=store,
                             fine_codec=fine_codec)  # fmt: skip


class MemoryManager(nn.Module):
    """`write` and `read`; no gradients. `state` is None before the first write and may be set to any state."""

    def __init__(self, config: Config, *, codec: Codec | None = None, family: Family | None = None,
                 ratio: Ratio | None = None, eviction: Eviction | None = None, store: PersistentMemory | None = None,
                 fine_codec: Codec | None = None) -> None:  # fmt: skip
        super().__init__()
        c = self.config = config
        self.codec = MeanPool() if codec is None else codec
        self.family = hyperplane.Config(dim=c.dim, heads=c.heads).build() if family is None else family
        self.ratio = FixedRatio() if ratio is None else ratio
        self.eviction = FirstInFirstOut() if eviction is None else eviction
        self.store, self.lookup = store, c.lookup.build(self.family)
        fine_codec = Quantisation.Config().build() if fine_codec is None else fine_codec
        self.fine = FineStorage(fine_codec, c.fine, c.segment, c.sinks, c.heads, c.dim, c.reach) if c.fine else None
        if store is not None and store.shape[:2] != (c.dim, c.heads):
            held = store.shape
            raise ValueError(f"store: expected dim {c.dim} and heads {c.heads}, got {held.dim} and {held.heads}")
        if c.promote and store is None:
            raise ValueError(f"promote: expected 0 without a store, got {c.promote}")
        self.statistics = DensityConfig(densities=(c.density,), segment=c.segment)
        self.state: State | None = None

    def init_state(self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
                   ) -> State:
        """Nothing written."""
        c = self.config
        like = torch.zeros(batch, c.heads, c.dim, device=device, dtype=dtype)
        medium = CompressedStorage.empty(like, c.capacity, self.family.tables)
        zero = torch.zeros(batch, dtype=torch.int64, device=device)
        return State(
            zero, ShortTermBuffer.empty(like, c.window + c.segment - 1, c.sinks), medium,
            self.lookup.init_state(medium, c.segment),
            DiskView.empty(batch, c.promote, device=device), self.fine.init_state(like) if self.fine else (),
            self.statistics.init_statistics(batch, device=device) if c.density != "spectral" else (),
            self.ratio.init_state(batch, device=device), Traffic.empty(batch, len(TIERS), device=device),
            zero[:, None].repeat(1, 2),
        )  # fmt: skip

    @property
    def counters(self) -> Traffic:
        """Hits, misses, seconds and bytes read, by row and tier; `hit_rate`."""
        return self._held().traffic

    @torch.no_grad()
    def write(self, k: Float[Tensor, "batch time heads dim"], v: Float[Tensor, "batch time heads dim"],
              tokens: Int[Tensor, "batch time"] | None = None) -> None:
        """Take tokens in. Chunks of any size do what token by token does. tokens: ids, which densities count."""
        c = self.config
        for name, x in (("k", k), ("v", v)):
            if x.ndim != 4 or x.shape[2:] != (c.heads, c.dim) or x.shape != k.shape or not x.is_floating_point():
                raise ValueError(f"{name}: expected floats [batch, time, {c.heads}, {c.dim}], got {x.dtype} "
                                 f"{list(x.shape)}")  # fmt: skip
        if tokens is None and c.density != "spectral":
            raise ValueError(f"tokens: expected ids, which the density {c.density!r} counts, got None")
        if tokens is not None and tokens.shape != k.shape[:2]:
            raise ValueError(f"tokens: expected {list(k.shape[:2])}, got {list(tokens.shape)}")
        if self.state is None:
            self.state = self.init_state(len(k), device=k.device, dtype=k.dtype)
        if len(k) != len(self.state.position):
            raise ValueError(f"k: expected {len(self.state.position)} rows, as the state has, got {len(k)}")
        tokens = torch.zeros(k.shape[:2], dtype=torch.int64, device=k.device) if tokens is None else tokens
        position, end = self._position, self._position + k.shape[1]
        while position < end:
            gone = self._window_start(position) // c.segment
            leaves_at = (gone + 1) * c.segment + c.window - 1  # the position whose window begins behind segment `gone`
            if position == leaves_at:
                self._pass_on(gone)
                leaves_at += c.segment
            count = min(leaves_at, end) - position
            new = [x[:, position - end :][:, :count] for x in (k, v, tokens)]
            self._update(short=self.state.short.write(*new, position), position=self.state.position + count)
            position += count

    @torch.no_grad()
    def read(self, q: Float[Tensor, "batch heads dim"], *, exact: bool = False, picks: int | None = None) -> Reading:
        """Attend as the newest token to all tiers. exact: rank all slots instead of those that the buckets name.
        picks: that of the configuration if None. Counts, but changes nothing that a later read sees before the next
        segment."""
        c, q = self.config, self._checked(q)
        picks = c.picks if picks is None else picks
        if picks < 1:
            raise ValueError(f"picks: expected at least 1, got {picks}")
        seconds = [0.0] * len(TIERS)
        with _timed(seconds, SHORT, q.device):
            short = self._short(q)
        with _timed(seconds, MEDIUM, q.device):
            found = self._retrieve(q, picks, exact=exact)
            low = self._confidence(q, found, c.samples) < c.confident
            if exact:
                low = torch.zeros_like(low)
            if low.any():
                deep = self._retrieve(q, picks, deep=True)
                found = Retrieved(*(torch.where(low.view(*low.shape, *(1,) * (new.ndim - 2)), new, old)
                                    for new, old in zip(deep, found, strict=True)))  # fmt: skip
            medium = self._medium(q, found, None)
        with _timed(seconds, DISK, q.device):
            stored = self._stored(q, picks, exact=exact)
            disk = attend(stored.score, stored.values)
        with _timed(seconds, MEDIUM, q.device):
            refined = torch.full((len(q), c.finer), -1, device=q.device)
            doubt = torch.zeros_like(short.lse)
            if self.fine:
                doubts = self.fine.doubt(self.state.fine, self.state.medium, q, joined(short, medium, disk)[1])
                doubt = doubts.amax(-1)
                worst = doubts.amax(1).topk(min(c.finer, c.fine))
                refined[:, : worst.indices.shape[1]] = worst.indices.masked_fill(worst.values <= c.doubtful, -1)
                if (refined >= 0).any():
                    medium = self._medium(q, found, refined)
        out, lse = joined(short, medium, disk)
        share = torch.stack([part.lse for part in (short, medium, disk)], -1).sub(lse[..., None]).exp()
        confidence = self._confidence(q, found, c.samples, refined, medium.lse)
        self._count(found, medium, stored, disk, lse, share, low, refined, seconds)
        segments = self._segments(refined)
        return Reading(out, lse, share, share.argmax(-1), confidence, doubt, found.index, stored.number, low, segments)

    @torch.no_grad()
    def read_first_hit(self, q: Float[Tensor, "batch heads dim"]) -> tuple[Tensor, Tensor]:
        """The paper's read: the content of the first tier that hits, and nothing else; and which tier that was.

        A tier hits if the best of what it would read has a cosine of at least `hit_cosine` with the query. Softmax over
        what that tier holds (window and sinks) or retrieves; zero, and tier -1, where no tier hits. Counts nothing.
        """
        c, q = self.config, self._checked(q)
        found, stored = self._retrieve(q, c.picks), self._stored(q, c.picks, exact=False)
        window = self._window()[0].transpose(1, 2)
        parts = self._short(q), self._medium(q, found, None), attend(stored.score, stored.values)
        keys = window, at_each_head(self.state.medium.slots.k, found.index), stored.keys
        out, tier = torch.zeros_like(q), torch.full(q.shape[:2], -1, device=q.device)
        for number, (part, key) in enumerate(zip(parts, keys, strict=True)):
            cosine = torch.nn.functional.cosine_similarity(q[:, :, None], key.to(q.dtype), dim=-1)
            hits = (cosine >= c.hit_cosine) & (part.score[..., : key.shape[2]] > -torch.inf)
            first = hits.any(-1) & (tier < 0)
            out, tier = out.where(~first[..., None], part.out), tier.masked_fill(first, number)
        return out, tier

    @torch.no_grad()
    def calibration(self, q: Float[Tensor, "batch heads dim"]) -> Calibration:
        """Confidence of a plain read, without recovery, beside what it estimates: the share of the medium tier's
        attention that was retrieved."""
        c, q = self.config, self._checked(q)
        found = self._retrieve(q, c.picks)
        return Calibration(*(self._confidence(q, found, count) for count in (c.samples, c.capacity)))

    @torch.no_grad()
    def attribute(self, q: Float[Tensor, "batch heads dim"], *, tolerance: float = 0.01) -> Attribution:
        """Why a plain read, without recovery, is wrong: replays it with exact retrieval, and with tokens for slots."""
        c, q = self.config, self._checked(q)
        short = self._short(q)
        stored = self._stored(q, c.picks, exact=True)  # the same in all: what the disk lacks is not examined
        disk = attend(stored.score, stored.values)
        hashed, best, every = self._retrieve(q, c.picks), *(
            self._retrieve(q, picks, exact=True) for picks in (c.picks, c.capacity))  # fmt: skip
        tokens = None
        if self.fine:
            whole = self.fine.whole(self.state.fine, self.state.medium)
            tokens = torch.arange(c.fine, device=q.device).expand_as(whole).masked_fill(~whole, -1)
        outs = [joined(short, self._medium(q, found, chosen), disk)[0]
                for found, chosen in ((hashed, None), (best, None), (hashed, tokens), (every, tokens))]  # fmt: skip
        return attribution(*outs, tolerance)

    @property
    def _position(self) -> int:
        return int(self.state.position[0])

    def _window_start(self, position: int) -> int:
        """Of the window of the last of `position` tokens."""
        return max(0, (position - self.config.window) // self.config.segment * self.config.segment)

    def _held(self) -> State:
        if self.state is None:
            raise ValueError("state: expected a write, or a state to be set, before this; got None")
        return self.state

    def _update(self, **fields: Any) -> None:
        self.state = self.state._replace(**fields)

    def _checked(self, q: Tensor) -> Tensor:
        """Queries in at least float32."""
        expected = [len(self._held().position), self.config.heads, self.config.dim]
        if list(q.shape) != expected or not q.is_floating_point():
            raise ValueError(f"q: expected floats {expected}, got {q.dtype} {list(q.shape)}")
        if not self._position:
            raise ValueError("state: expected at least one token written, got none")
        return q.to(torch.promote_types(q.dtype, torch.float32))

    def _window(self) -> tuple[Tensor, Tensor]:
        return self.state.short.read(self._window_start(self._position), self._position)

    def _short(self, q: Tensor) -> Part:
        k, v = (x.transpose(1, 2).to(q.dtype) for x in self._window())
        return attend(torch.einsum("bhd,bhnd->bhn", q, k), v)

    def _retrieve(self, q: Tensor, picks: int, *, exact: bool = False, deep: bool = False) -> Retrieved:
        medium, tables = self.state.medium, self.state.tables
        if exact:
            return self.lookup.best(medium, tables, q, picks)
        return self.lookup.hashed(medium, tables, q, picks, deep=deep)

    def _medium(self, q: Tensor, found: Retrieved, refined: Tensor | None) -> Part:
        """Attention to the retrieved slots; to the tokens of refined segments (by index, -1 for none) in place of any
        of their slots."""
        slots = self.state.medium.slots
        score, v = found.score, at_each_head(slots.v, found.index).to(q.dtype)
        if refined is not None:
            k, more, there = self.fine.tokens(self.state.fine, refined)
            score = score.masked_fill(self._is_refined(found.index, refined), -torch.inf)
            fine = torch.einsum("bhd,bnhd->bhn", q, k.to(q.dtype)).masked_fill(~there[:, None], -torch.inf)
            score, v = torch.cat((score, fine), -1), torch.cat((v, more.transpose(1, 2).to(q.dtype)), 2)
        return attend(score, v)

    def _segments(self, refined: Tensor) -> Int64[Tensor, "batch finer"]:
        """Numbers of refined segments."""
        if not self.fine:
            return refined
        return self.state.fine.segment.gather(1, refined.clamp(min=0)).masked_fill(refined < 0, -1)

    def _is_refined(self, index: Tensor, refined: Tensor) -> Bool[Tensor, "batch heads picks"]:
        """Whether the slots in these places belong to segments that are read as tokens."""
        segment = self.state.medium.slots.segment[:, None].expand(-1, index.shape[1], -1).gather(2, index.clamp(min=0))
        return ((segment[..., None] == self._segments(refined)[:, None, None]) & (index >= 0)[..., None]).any(-1)

    def _confidence(self, q: Tensor, found: Retrieved, samples: int, refined: Tensor | None = None,
                    lse: Tensor | None = None) -> Float[Tensor, "batch heads"]:
        """Of what was read in the medium tier, whose log-sum-exp is `lse`; 1 if nothing else is held."""
        medium = self.state.medium
        drawn, size = strata(medium.usage.held.sum(1), samples, self._position)
        drawn = drawn.clamp(max=self.config.capacity - 1)  # where the last strata are empty
        slots = medium.slots.at(drawn)
        score = torch.einsum("bhd,bnhd->bhn", q, slots.k.to(q.dtype)) + slots.mass.log().transpose(1, 2)
        if refined is not None:
            everywhere = drawn[:, None].expand(-1, q.shape[1], -1)
            score = score.masked_fill(self._is_refined(everywhere, refined), -torch.inf)
        rest = log_rest(score, drawn, size, found.index)
        lse = found.score.logsumexp(-1) if lse is None else lse
        return torch.sigmoid(lse - rest).where(rest > -torch.inf, 1)

    def _stored(self, q: Tensor, picks: int, *, exact: bool) -> Found:
        if self.store is None:
            none = q.new_zeros(*q.shape[:2], 0)
            return Found(none.long(), none, none[..., None].expand(*none.shape, q.shape[-1]),
                         none[..., None].expand(*none.shape, q.shape[-1]), none, none)  # fmt: skip
        return self.state.disk.search(self.store, q, picks, self.state.medium.slots.number, exact=exact)

    def _count(self, found: Retrieved, medium: Part, stored: Found, disk: Part, lse: Tensor, share: Tensor,
               low: Tensor, refined: Tensor, seconds: list[float]) -> None:
        """Take a read into the counters of slots and tiers."""
        c, state = self.config, self.state
        picked = medium.score[..., : found.index.shape[-1]]
        mass = (picked - lse[..., None]).exp().flatten(1)
        usage = state.medium.usage.read(found.index.flatten(1), mass, state.position - 1)
        asked = torch.cat((state.tables.asked[:, 1:], found.codes[:, None]), 1)
        view = state.disk
        if c.promote:
            view = view.want(stored.number.flatten(1), (stored.score - lse[..., None]).exp().flatten(1))
        vector, traffic = c.dim * state.short.k.element_size(), state.traffic
        window = torch.full_like(state.position, self._window()[0].shape[1] * c.heads)
        keys = found.candidates.sum(1) + c.samples * c.heads
        values, rows = (found.index >= 0).sum((1, 2)), (stored.number >= 0).sum((1, 2))
        tokens = 0
        if self.fine:
            keys = keys + (state.fine.place >= 0).sum((1, 2)) * c.heads
            tokens = (refined >= 0).sum(1) * self.fine.bytes(state.fine)
        read = 2 * window * vector, (keys + values) * vector + tokens, 2 * rows * vector
        for tier, count in enumerate(read):
            if tier < DISK or self.store is not None:
                traffic = traffic.add(tier, share[..., tier] >= 0.5, seconds=seconds[tier], bytes=count)
        repairs = state.repairs + torch.stack((low.sum(1), (refined >= 0).any(1).long()), 1)
        medium = state.medium._replace(usage=usage)
        tables = state.tables._replace(asked=asked)
        self._update(medium=medium, tables=tables, disk=view, traffic=traffic, repairs=repairs)

    def _pass_on(self, number: int) -> None:
        """Segment `number` becomes slots; what they drive out goes to disk; what reads wanted from there comes back."""
        c, state, now = self.config, self.state, self.state.position
        first = number * c.segment
        k, v, tokens = state.short.span(first, first + c.segment)
        density, statistics = self._density(k, tokens)
        begin = c.sinks if number == 0 else 0
        counts, ratio = self.ratio(k[:, begin:], v[:, begin:], density, state.ratio)
        *code, there = compress(self.codec, k[:, begin:], v[:, begin:], counts)
        if there.shape[1] > c.capacity:
            raise ValueError(f"ratio: expected at most the medium tier's {c.capacity} slots, got {there.shape[1]}")
        none = torch.full(there.shape, -1, device=k.device)
        slots = Held(*code[:3], code[3].double() + first + begin, self._codes(code[0]),
                     torch.full_like(none, number), density[:, None].expand(there.shape), none)  # fmt: skip
        usage = state.medium.usage
        order = eviction_order(self.eviction(usage, now), usage)
        at = order[:, : there.shape[1]].masked_fill(~there, -1)
        medium, disk, evicted = place(state.medium, state.disk, self.store, at, slots, now)
        written = [slots.codes.masked_fill(~there[..., None, None], NOTHING)]
        fine = self.fine.write(state.fine, number, k, v, slots, at) if self.fine else ()
        if c.promote:
            medium, disk, out, back = promote(medium, disk, self.store, self.eviction, self._codes, now, c.margin)
            evicted, written = torch.cat((evicted, out), 1), [*written, back]
        tables = self.lookup.update(state.tables, medium, torch.cat(written, 1), evicted)
        self._update(medium=medium, disk=disk, fine=fine, tables=tables, ratio=ratio, statistics=statistics)

    def _codes(self, k: Float[Tensor, "batch slots heads dim"]) -> Int32[Tensor, "batch slots heads tables"]:
        return self.family.codes(k)[..., 0]

    def _density(self, k: Tensor, tokens: Tensor) -> tuple[Float[Tensor, "batch"], Statistics | tuple[()]]:
        """Of a segment, in bits, and the statistics after it."""
        if self.config.density == "spectral":
            return spectral_entropy(k.transpose(1, 2)).mean(1), ()
        density, statistics = segment_density(tokens, self.state.statistics, self.statistics)
        return density[:, 0, 0], statistics


@contextmanager
def _timed(seconds: list[float], tier: int, device: torch.device) -> Iterator[None]:
    """Add what the block takes, the work that it gave to a device included."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda *_: None
    wait(device)
    began = time.perf_counter()
    yield
    wait(device)
    seconds[tier] += time.perf_counter() - began
