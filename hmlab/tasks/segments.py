"""Facts and questions in segments: what must a model that reads segment by segment carry from one to the next?

    data = Config(segments=16, pairs=8, distance=(1, 12)).open()
    for batch in data.batches("train", torch.Generator().manual_seed(0)): ...
    answers(model, data.evaluation_batches("valid", 4, seed=0))     # distance and correctness of every answer

A stream is `segments` segments of `length` tokens of random filler. `form="pairs"`: facts, a key and its value, are
planted in the first half of segments and asked for once, d segments later (f the fact's segment):

    segment f           = filler … key value … filler
    segment f + d - 1   = filler … filler ? key
    segment f + d       = : value filler …                    d = 0: … key value … ? key : value …   in one segment

The key stands at the end of the segment before the answer, so that a search by the last segment's tail can find it. The
colon's target is the value; only answers count (`mask`), and `oracle` holds the place of the value in the last fact of
that key. Keys of a stream are distinct, values need not be. d + 1 is log-uniform over whole numbers. With `copies` a
fact is planted in so many segments, the last of them d segments before the answer.

`form="copy"`: every segment holds a fact, and the targets of the next one's two first tokens are its key and its value,
which the stream does not say. A memory that is taught by pairs alone may keep values without their keys, since who asks
for the last fact needs no key; this teaches both.

`form="majority"`: every segment holds one of two marks, and the target of the first token of every second segment is
the mark that most segments before it hold (of an odd number, so there is no tie). The answer is not said in the stream,
and `oracle` is -1: all segments matter alike. Who knows the last mark only is right as often as `last_mark` says.

Chance is 1 / `values` (pairs, values of copy), 1 / `keys` (keys of copy), 1 / 2 (majority). Sources: multi-query
associative recall (Arora et al. 2023, Zoology, arXiv 2312.04927), cut into segments. Units: distances in segments,
places in tokens. Errors: ValueError naming the field or argument.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Literal

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from hmlab.layers import check_positive
from hmlab.tasks import Batch

SPLITS = ("train", "valid", "test")
# The least segment that holds an answer, a fact, a question of its own and the next one's key.
LEAST_LENGTH = 14
# A stream so full that pairs find no place is drawn anew this often.
DRAWS = 100


@dataclass(frozen=True, kw_only=True)
class Config:
    """form: pairs, copy or majority (see above). batch: streams in a batch. segments: in a stream. length: tokens of a
    segment. pairs: facts planted and asked for in each stream. distance: least and most segments from a fact to its
    answer. copies: segments that a fact is planted in. keys, values, filler: how many tokens there are of each kind."""

    form: Literal["pairs", "copy", "majority"] = "pairs"
    batch: int = 16
    segments: int = 8
    length: int = 32
    pairs: int = 4
    distance: tuple[int, int] = (1, 6)
    copies: int = 1
    keys: int = 64
    values: int = 32
    filler: int = 16

    def __post_init__(self) -> None:
        if self.form not in ("pairs", "copy", "majority"):
            raise ValueError(f"form: expected pairs, copy or majority, got {self.form!r}")
        check_positive(self, "batch", "segments", "pairs", "copies", "keys", "values", "filler")
        if self.length < LEAST_LENGTH:
            raise ValueError(f"length: expected at least {LEAST_LENGTH}, got {self.length}")
        if self.values < 2:
            raise ValueError(f"values: expected at least 2, got {self.values}")
        if self.keys < self.pairs:
            raise ValueError(f"keys: expected at least pairs ({self.pairs}), got {self.keys}")
        if self.form != "pairs" and self.segments < 2:
            raise ValueError(f"segments: expected at least 2, the second asks first, got {self.segments}")
        if self.form == "pairs" and not 0 <= self.distance[0] <= self.distance[1] < self.segments:
            raise ValueError(f"distance: expected least and most, 0 <= least <= most < segments ({self.segments}), "
                             f"got {self.distance}")  # fmt: skip

    @property
    def vocab_size(self) -> int:
        """Filler, keys, values, then the question mark and the colon."""
        return self.filler + self.keys + self.values + 2

    @property
    def chance(self) -> float:
        """Share of right answers of who guesses."""
        chances = {"pairs": 1 / self.values, "copy": (1 / self.keys + 1 / self.values) / 2, "majority": 1 / 2}
        return chances[self.form]

    def open(self) -> SegmentsData:
        return SegmentsData(self)


@dataclass(frozen=True, eq=False)
class SegmentsData:
    """Streams to draw; splits differ in nothing but their draws."""

    config: Config

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def first_key(self) -> int:
        """Ids below are filler; keys follow, then values."""
        return self.config.filler

    @property
    def first_value(self) -> int:
        return self.config.filler + self.config.keys

    @property
    def question(self) -> int:
        """Id of the question mark; the colon's is one more."""
        return self.config.filler + self.config.keys + self.config.values

    def batches(self, split: str, generator: torch.Generator) -> Iterator[Batch]:
        """Streams without end; a batch depends on nothing but the state of `generator` (on the CPU)."""
        if split not in SPLITS:
            raise ValueError(f"split: expected {' or '.join(SPLITS)}, got {split!r}")
        return {"pairs": self._pairs, "copy": self._copies, "majority": self._majority}[self.config.form](generator)

    def evaluation_batches(self, split: str, count: int, seed: int) -> Iterator[Batch]:
        """`count` batches, always the same for a split and a seed, and none that a training with that seed draws."""
        # The digest, since a generator with the seed itself would repeat the training's first batches.
        digest = hashlib.sha256(f"segments {split} {seed}".encode()).digest()
        return islice(self.batches(split, torch.Generator().manual_seed(int.from_bytes(digest[:4]))), count)

    def provenance(self) -> dict:
        """What this is, for a run's record."""
        digest = hashlib.sha256(repr(sorted(asdict(self.config).items())).encode()).hexdigest()
        return {"corpus": "random", "sha256": digest, "licence": "none needed", "source": __name__,
                "vocab_size": self.vocab_size}  # fmt: skip

    def _pairs(self, generator: torch.Generator) -> Iterator[Batch]:
        config, length = self.config, self.config.length
        rows = torch.arange(config.batch)[:, None]
        while True:
            stream = self._filler(generator)
            facts, answers = self._places(generator)
            order = torch.rand(config.batch, config.keys, generator=generator).argsort(1)
            key = self.first_key + order[:, : config.pairs]
            value = self.first_value + torch.randint(config.values, key.shape, generator=generator)
            inside = facts[:, :, -1] == answers
            at = facts * length + self._offsets(facts.shape, 2, length // 2 - 2, generator)
            own = answers * length + self._offsets(answers.shape, length // 2, length - 6, generator)
            place = torch.where(inside, own + 2, answers * length)  # of the colon
            mark = torch.where(inside, own, answers * length - 2)
            stream[rows[..., None], at] = key[..., None]
            stream[rows[..., None], at + 1] = value[..., None]
            stream[rows, mark], stream[rows, mark + 1] = torch.full_like(key, self.question), key
            stream[rows, place], stream[rows, place + 1] = torch.full_like(key, self.question + 1), value
            mask = torch.zeros(config.batch, config.segments * length, dtype=torch.bool)
            mask[rows, place] = True
            oracle = torch.full(mask.shape, -1)
            oracle[rows, place] = at[:, :, -1] + 1
            yield Batch(stream[:, :-1].contiguous(), stream[:, 1:].contiguous(), mask, oracle=oracle)

    def _copies(self, generator: torch.Generator) -> Iterator[Batch]:
        config, length = self.config, self.config.length
        rows, first = torch.arange(config.batch)[:, None], torch.arange(config.segments) * length
        while True:
            stream = self._filler(generator)
            shape = (config.batch, config.segments)
            key = self.first_key + torch.randint(config.keys, shape, generator=generator)
            value = self.first_value + torch.randint(config.values, shape, generator=generator)
            at = first + self._offsets(torch.Size(shape), 2, length // 2 - 2, generator)
            stream[rows, at], stream[rows, at + 1] = key, value
            mask = torch.zeros(config.batch, config.segments * length, dtype=torch.bool)
            oracle, asked = torch.full(mask.shape, -1), first[1:]
            stream[:, asked], stream[:, asked + 1] = self.question + 1, self.question + 1
            targets = stream[:, 1:].clone()
            for place, said in enumerate((key, value)):
                targets[:, asked + place] = said[:, :-1]
                oracle[:, asked + place] = at[:, :-1] + place
                mask[:, asked + place] = True
            yield Batch(stream[:, :-1].contiguous(), targets, mask, oracle=oracle)

    def _majority(self, generator: torch.Generator) -> Iterator[Batch]:
        config, length = self.config, self.config.length
        rows, first = torch.arange(config.batch)[:, None], torch.arange(config.segments) * length
        while True:
            stream = self._filler(generator)
            mark = torch.randint(2, (config.batch, config.segments), generator=generator)
            stream[rows, first + self._offsets(mark.shape, 2, length // 2 - 1, generator)] = self.first_value + mark
            most = (2 * mark.cumsum(1) > torch.arange(1, config.segments + 1)).long()
            targets, asked = stream[:, 1:].clone(), torch.arange(1, config.segments, 2)
            targets[:, asked * length] = self.first_value + most[:, asked - 1]
            stream[:, asked * length] = self.question
            mask = torch.zeros(targets.shape, dtype=torch.bool)
            mask[:, asked * length] = True
            yield Batch(stream[:, :-1].contiguous(), targets, mask, oracle=torch.full(mask.shape, -1))

    def _filler(self, generator: torch.Generator) -> Int64[Tensor, "batch stream"]:
        shape = (self.config.batch, self.config.segments * self.config.length + 1)
        return torch.randint(self.config.filler, shape, generator=generator)

    def _offsets(self, shape: torch.Size, least: int, most: int, generator: torch.Generator) -> Int64[Tensor, "..."]:
        return torch.randint(least, most + 1, shape, generator=generator)

    def _places(self, generator: torch.Generator
                ) -> tuple[Int64[Tensor, "batch pairs copies"], Int64[Tensor, "batch pairs"]]:
        """Segments of each pair's facts, in order, and of its answer: a segment holds one of either at most."""
        config = self.config
        facts = torch.zeros(config.batch, config.pairs, config.copies, dtype=torch.int64)
        answers, rows = facts[:, :, 0].clone(), torch.arange(config.batch)
        for _ in range(DRAWS):
            facts[rows], answers[rows], fits = self._draw(len(rows), generator)
            rows = rows[~fits]
            if not len(rows):
                return facts, answers
        raise ValueError(f"pairs: expected few enough for {config.segments} segments at distances {config.distance} "
                         f"with {config.copies} copies, got {config.pairs}")  # fmt: skip

    def _draw(self, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Bool[Tensor, "rows"]]:
        """Facts, answers, and whether all of a row fits; pair after pair on what those before it left free."""
        config, row, number = self.config, torch.arange(rows), torch.arange(self.config.segments)
        planted = torch.zeros(rows, config.segments, dtype=torch.bool)
        asked, fits = planted.clone(), torch.ones(rows, dtype=torch.bool)
        least, most = (distance + 1 for distance in config.distance)
        facts, answers = [], []
        for _ in range(config.pairs):
            share = torch.rand(rows, generator=generator, dtype=torch.float64)
            ahead = (least * (share * math.log((most + 1) / least)).exp()).long().clamp(least, most) - 1
            later = number + ahead[:, None]
            free = ~planted & (later < config.segments) & ~asked.gather(1, later.clamp(max=config.segments - 1))
            chosen = []
            for copy in range(config.copies):
                free = free if not copy else ~planted & (number < chosen[0][:, None])
                fits = fits & free.any(1)
                chosen.append(_one_of(free, generator))
                planted[row, chosen[-1]] = True
            answer = (chosen[0] + ahead).clamp(max=config.segments - 1)
            asked[row, answer] = True
            facts.append(torch.stack(chosen, 1).sort(1).values)
            answers.append(answer)
        return torch.stack(facts, 1), torch.stack(answers, 1), fits


def last_mark(segments: int) -> float:
    """Share of right answers, in streams of `form="majority"`, of who names the last mark. segments: in a stream."""
    # Of 2 i + 1 marks the last is in the majority if the others tie or lean its way.
    shares = [1 / 2 + math.exp(math.lgamma(2 * i + 1) - 2 * math.lgamma(i + 1) - 2 * i * math.log(2)) / 2
              for i in range(segments // 2)]  # fmt: skip
    return sum(shares) / len(shares)


def _one_of(free: Bool[Tensor, "batch places"], generator: torch.Generator) -> Int64[Tensor, "batch"]:
    """One of the free places of each row, with equal chance."""
    chosen = (torch.rand(len(free), generator=generator, dtype=torch.float64) * free.sum(1)).long()
    return (free.cumsum(1) > chosen[:, None]).long().argmax(1)
