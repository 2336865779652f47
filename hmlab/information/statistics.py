"""Running counts of hashed tokens and pairs along rows of text, per document, continued from call to call.

What has been counted up to any token is found without walking through the tokens: the occurrences of all buckets are
sorted once, and a span of time is then two binary searches; O(time · log time) work, O(time) memory. Counts are
integers, so nothing depends on how a sequence is split.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int, Num, Shaped
from torch import Tensor

# Odd constants of splitmix64 (Steele, Lea & Flood 2014), as signed integers.
_MIX = (-7046029254386353131, -4658895280553007687, -7723592293110705685)


class Statistics(NamedTuple):
    """unigrams, bigrams: counts per bucket in the current document, the newest generation first. position: tokens
    consumed of the document. recent: its last `segment` tokens, the newest last, -1 where there is none."""

    unigrams: Int[Tensor, "batch generations table"]
    bigrams: Int[Tensor, "batch generations bigram_table"]
    position: Int[Tensor, "batch"]
    recent: Int[Tensor, "batch segment"]


def hash_pair(first: Int[Tensor, "*shape"], second: Int[Tensor, "*shape"], buckets: int) -> Int[Tensor, "*shape"]:
    """Bucket of an ordered pair of ids: splitmix64's mixing, in integers that wrap around."""
    x = first * _MIX[0] + second
    for multiplier in _MIX[1:]:
        x = (x ^ (x >> 29)) * multiplier
    return (x ^ (x >> 32)) % buckets


class Occurrences:
    """How often buckets occur in spans of time."""

    def __init__(self, bucket: Int[Tensor, "batch time"], present: Bool[Tensor, "batch time"]) -> None:
        self._stride = bucket.shape[1] + 1
        time = torch.arange(bucket.shape[1], device=bucket.device)
        # Absent ones sort before all others and are never asked for.
        self._codes = torch.where(present, bucket * self._stride + time, -1).sort(1).values

    def count(self, bucket: Int[Tensor, "batch asked"], start: Int[Tensor, "batch asked"],
              end: Int[Tensor, "batch asked"]) -> Int[Tensor, "batch asked"]:
        first, last = (torch.searchsorted(self._codes, bucket * self._stride + t) for t in (start, end))
        return last - first


class Generations(NamedTuple):
    """What is counted at each time: all since `start`, and since `older` with weight `weight`.

    turned: generations begun in the call since the document was, so that 0 counts what the statistics hold, and 1
    counts it as older; 2 or more for a document that began in the call.
    """

    start: Int[Tensor, "batch times"]
    older: Int[Tensor, "batch times"]
    turned: Int[Tensor, "batch times"]
    weight: Num[Tensor, "batch times"]


class Stream:
    """The tokens of a call, behind the recent tokens of the statistics that it continues.

    Time is an index that begins with those recent tokens: the call's first token has time `segment`. Per token of the
    call `[batch, time]`: time; document: when its document began, 0 if before the call; part: when the part of its
    segment began that lies in its document; previous: time of the token before it, -1 for a document's first token;
    counted: whether it is of the document that its segment ends in.
    """

    def __init__(self, tokens: Int[Tensor, "batch time"], held: Statistics, horizon: int | None = None,
                 reset: Bool[Tensor, "batch time"] | None = None, valid: Bool[Tensor, "batch time"] | None = None
                 ) -> None:
        self.held, self.segment = held, held.recent.shape[1]
        never = torch.zeros_like(tokens, dtype=torch.bool)
        self.tokens = torch.cat((held.recent, tokens), 1)
        self.present = torch.cat((held.recent >= 0, ~never if valid is None else valid), 1)
        # All times have one entry more than the tokens: it stands for whatever comes after the call.
        begins = F.pad(never if reset is None else reset, (self.segment, 1))
        time = torch.arange(begins.shape[1], device=tokens.device).expand(begins.shape)
        document = torch.where(begins, time, 0).cummax(1).values
        part = torch.maximum(time // self.segment * self.segment, document)
        self._number = F.pad(self.present.cumsum(1), (1, 0))
        held_position = held.position[:, None] - self._number[:, self.segment, None]
        position = self.number(document, part) + torch.where(document == 0, held_position, 0)
        generations = self._generations(time, document, position, horizon)
        previous = F.pad(torch.where(self.present, time[:, :-1], -1).cummax(1).values, (1, 0), value=-1)
        previous = torch.where(previous < document, -1, previous)

        call = slice(self.segment, -1)
        self.time, self.document, self.part, self.previous = (t[:, call] for t in (time, document, part, previous))
        self.counted = self.present[:, self.segment :] & (self.document == self.at_segment_end(self.document))
        self.generations = Generations(*(t[:, call] for t in generations))
        self._after = Generations(*(t[:, -1:] for t in generations))
        # A copy: a view would keep the positions of all tokens alive in the statistics.
        self._last_document, self._end = document[:, -1:], position[:, -1].clone()

    def _generations(self, time: Tensor, document: Tensor, position: Tensor, horizon: int | None) -> Generations:
        turns, weight = torch.zeros_like(time, dtype=torch.bool), torch.ones_like(position)
        if horizon is not None:
            later = (position // horizon).diff(dim=1)[:, self.segment :] > 0
            turns, weight = F.pad(later, (self.segment + 1, 0)), 1 - position % horizon / horizon
        start = torch.where(turns | (time == document), time, self.segment).cummax(1).values.clamp(min=self.segment)
        older = torch.where(turns, F.pad(start[:, :-1], (1, 0)), time).gather(1, start)
        return Generations(start, older, torch.where(document == 0, turns.cumsum(1), 2), weight)

    def cut(self, x: Shaped[Tensor, "batch time"]) -> Shaped[Tensor, "batch segments segment"]:
        return x.unflatten(1, (x.shape[1] // self.segment, self.segment))

    def at_segment_end(self, x: Shaped[Tensor, "batch time"]) -> Shaped[Tensor, "batch time"]:
        """The last value of each segment, at all its tokens."""
        cut = self.cut(x)
        return cut[..., -1:].expand_as(cut).flatten(1)

    def previous_tokens(self) -> Int[Tensor, "batch time"]:
        """The token before each, and whatever token before a document's first."""
        return self.tokens.gather(1, self.previous.clamp(min=0))

    def number(self, start: Int[Tensor, "batch asked"], end: Int[Tensor, "batch asked"]) -> Int[Tensor, "batch asked"]:
        """Tokens in spans of time, whatever they are."""
        return self._number.gather(1, end) - self._number.gather(1, start)

    def recent_start(self) -> Int[Tensor, "batch time"]:
        """Since when there have been no more than `segment` tokens up to `part`, in the same document."""
        full = torch.searchsorted(self._number, self._number.gather(1, self.part) - self.segment)
        return torch.maximum(full, self.document)

    def running_total(self, end: Int[Tensor, "batch time"]) -> Num[Tensor, "batch time"]:
        """Tokens of the document counted before `end`."""
        held = self.held.unigrams.sum(-1)
        return self._running(self.number, lambda generation: held[:, generation, None], end)

    def running(self, occurrences: Occurrences, table: Int[Tensor, "batch generations table"],
                bucket: Int[Tensor, "batch time"], end: Int[Tensor, "batch time"]) -> Num[Tensor, "batch time"]:
        """Occurrences of each token's bucket in its document counted before `end`, table: those before the call."""

        def count(start: Tensor, end: Tensor) -> Tensor:
            return occurrences.count(bucket, start, end)

        return self._running(count, lambda generation: table[:, generation].gather(1, bucket), end)

    def _running(self, count: Callable[[Tensor, Tensor], Tensor], held: Callable[[int], Tensor], end: Tensor) -> Tensor:
        start, older, turned, weight = self.generations
        now = count(start, end) + torch.where(turned == 0, held(0), 0)
        if self.held.unigrams.shape[1] == 1:
            return now
        before = torch.where(turned == 0, held(1), torch.where(turned == 1, held(0), 0))
        return now + weight * (count(older, start) + before)

    def previous_weight(self) -> Num[Tensor, "batch time"]:
        """What the token before each weighs in its counts."""
        start, _, turned, weight = self.generations
        held_newest = (turned == 0) & (self.held.unigrams[:, 0].sum(-1, keepdim=True) > 0)
        return torch.where(torch.where(self.previous < self.segment, held_newest, self.previous >= start), 1, weight)

    def update(self, table: Int[Tensor, "batch generations table"], bucket: Int[Tensor, "batch time"],
               present: Bool[Tensor, "batch time"]) -> Int[Tensor, "batch generations table"]:
        """The table after the call."""
        start, older, turned, _ = self._after
        shifted, turned = F.pad(table[:, :-1], (0, 0, 1, 0)), turned[..., None]
        table = torch.where(turned == 0, table, torch.where(turned == 1, shifted, 0))
        present = present & (self.time >= older)
        place = bucket + table.shape[2] * (self.time < start)
        return table.flatten(1).scatter_add(1, torch.where(present, place, 0), present.long()).view_as(table)

    def after(self, unigrams: Tensor, bigrams: Tensor) -> Statistics:
        """The statistics after the call, with updated tables."""
        time = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        kept = torch.where(self.present & (time >= self._last_document), time, -1)
        kept = kept.topk(self.segment, dim=1).values.flip(1)
        recent = torch.where(kept < 0, -1, self.tokens.gather(1, kept.clamp(min=0)))
        return Statistics(unigrams, bigrams, self._end, recent)
