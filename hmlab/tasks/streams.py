"""What tasks of drawn streams share: one way to write a stream, to draw batches of them, and to ask the oracle.

    stream = Stream()
    place = stream.say(key, value)              # tokens go to the end; the place of the first of them
    stream.say(key)
    stream.ask(value, place + 1)                # the next token is an answer, said by the token at this place

A stream of up to `context` + 1 tokens gives `context` tokens and, one further, their targets. Only answers count
(`mask`). `oracle` holds the first of the places given to `ask`, and `support` all of them where there are several.
A shorter stream is padded with id 0 at its end, where `valid` is False.

The oracle knows a task's rule, and of a stream the last token before the answer and the tokens at `support` (`oracle`
where that is None): it is always right, or the batch is wrong. With shuffled memory it is given, for every answer,
what it would read for one of the next row: then it is right by chance only, or the answer leaks from elsewhere.

Units: places in tokens. Errors: ValueError naming the argument.
"""

from __future__ import annotations

import hashlib
import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import islice
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from hmlab.corpora import SPLITS, Corpus
from hmlab.encodings import CharacterEncoding
from hmlab.tasks import Batch

# Ids are written as the characters from here on: one sign each, for a model's samples and its checkpoint.
FIRST_SIGN = 0x4E00
SURROGATES = range(0xD800, 0xE000)


@dataclass
class Stream:
    """One row as it is written. tokens: ids so far. asked: the places that answers depend on, by the place of the
    token before the answer. labels: the row's slices."""

    tokens: list[int] = field(default_factory=list)
    asked: dict[int, tuple[int, ...]] = field(default_factory=dict)
    labels: dict[str, int | float] = field(default_factory=dict)

    def say(self, *tokens: int) -> int:
        """Write tokens; gives the place of the first."""
        self.tokens += tokens
        return len(self.tokens) - len(tokens)

    def ask(self, answer: int, *support: int) -> int:
        """Write an answer that depends on the tokens at `support`; gives its place."""
        self.asked[len(self.tokens) - 1] = support
        return self.say(answer)


def pack(streams: Sequence[Stream], context: int) -> Batch:
    """Streams as the rows of a batch of `context` tokens."""
    longest = max(len(stream.tokens) for stream in streams)
    if longest > context + 1:
        raise ValueError(f"streams: expected at most context + 1 ({context + 1}) tokens, got {longest}")
    tokens = torch.zeros(len(streams), context + 1, dtype=torch.int64)
    valid = torch.zeros(len(streams), context, dtype=torch.bool)
    oracle = torch.full((len(streams), context), -1)
    for row, stream in enumerate(streams):
        tokens[row, : len(stream.tokens)] = torch.tensor(stream.tokens)
        valid[row, : len(stream.tokens)] = True
        oracle[row, list(stream.asked)] = torch.tensor([places[0] for places in stream.asked.values()])
    support = [places for stream in streams for places in stream.asked.values()]
    reads = max(map(len, support))
    return Batch(
        tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), oracle >= 0,
        valid=None if valid.all() else valid, oracle=oracle,
        support=torch.tensor([[*places, *[-1] * (reads - len(places))] for places in support]) if reads > 1 else None,
        slices={name: torch.tensor([stream.labels[name] for stream in streams]) for name in streams[0].labels},
    )  # fmt: skip


@runtime_checkable
class Drawing(Protocol):
    """What a task's Config has, with `vocab_size` where ids are not characters of a text. chance: share of right
    answers of who knows the possible ones and guesses."""

    batch: int

    @property
    def context(self) -> int: ...
    @property
    def chance(self) -> float: ...


@dataclass(frozen=True, eq=False)
class Streams(ABC):
    """A task's data: streams to draw. Splits that are not those of a text differ in nothing but their draws."""

    config: Drawing

    @property
    def splits(self) -> tuple[str, ...]:
        return SPLITS

    @property
    def vocab_size(self) -> int:
        """Number of ids of the encoding."""
        return self.encoding.vocab_size

    @cached_property
    def encoding(self) -> CharacterEncoding:
        """A sign for each id, or the characters of a text."""
        count = self.config.vocab_size
        points = (p for p in range(FIRST_SIGN, FIRST_SIGN + count + len(SURROGATES)) if p not in SURROGATES)
        return CharacterEncoding("".join(map(chr, islice(points, count))))

    def batches(self, split: str, generator: torch.Generator) -> Iterator[Batch]:
        """Streams without end; a batch depends on nothing but the state of `generator` (on the CPU)."""
        if split not in self.splits:
            raise ValueError(f"split: expected {' or '.join(self.splits)}, got {split!r}")
        return self._batches(split, generator)

    def evaluation_batches(self, split: str, count: int, seed: int) -> Iterator[Batch]:
        """`count` batches, always the same for a split and a seed, and none that a training with that seed draws."""
        # The digest, since a generator with the seed itself would repeat the training's first batches.
        digest = hashlib.sha256(f"{type(self).__module__} {split} {seed}".encode()).digest()
        return islice(self.batches(split, torch.Generator().manual_seed(int.from_bytes(digest[:4]))), count)

    def provenance(self) -> Mapping[str, object]:
        """What this is, for a run's record."""
        digest = hashlib.sha256(repr(sorted(asdict(self.config).items())).encode()).hexdigest()
        return {"corpus": "random", "sha256": digest, "licence": "none needed", "source": type(self).__module__,
                "vocab_size": self.vocab_size}  # fmt: skip

    def oracle_answers(self, batch: Batch, *, shuffled: bool = False) -> Int64[Tensor, "answers"]:
        """The oracle's answer to every question, row after row. shuffled: with the memory of the next row (see above;
        of two rows or more)."""
        if batch.oracle is None:
            raise ValueError("batch: expected one with an oracle, got one without")
        rows, times = batch.mask.nonzero(as_tuple=True)
        places = batch.oracle[rows, times][:, None] if batch.support is None else batch.support
        read = batch.tokens[rows[:, None], places.clamp(min=0)].masked_fill(places < 0, -1)
        if shuffled:
            count = batch.mask.sum(1)
            first = count.cumsum(0) - count
            other = (rows + 1) % len(count)
            read = read[first[other] + (torch.arange(len(rows)) - first[rows]) % count[other]]
        return self.answer(batch.tokens[rows, times], read)

    def answer(self, last: Int64[Tensor, "answers"], read: Int64[Tensor, "answers reads"]
               ) -> Int64[Tensor, "answers"]:
        """The task's rule: answers from the last tokens before them and what was read (-1: nothing more)."""
        return read[:, 0]

    @abstractmethod
    def draw(self, split: str, generator: torch.Generator) -> Batch:
        """One batch."""

    def _batches(self, split: str, generator: torch.Generator) -> Iterator[Batch]:
        while True:
            yield self.draw(split, generator)


def whole(batch: Batch, answers: Int64[Tensor, "answers"]) -> Bool[Tensor, "batch"]:
    """Whether all answers of a row are right, as a word is only if all its characters are."""
    wrong = torch.zeros_like(batch.mask)
    wrong[batch.mask] = answers != batch.targets[batch.mask]
    return ~wrong.any(1)


def corpus_facts(corpus: Corpus) -> dict[str, str]:
    """What text this is, for a run's record. It names no place on this machine."""
    facts = {name: getattr(corpus, name) for name in ("sha256", "licence", "source", "division")}
    return {"corpus": corpus.name, **facts}


class WrittenStreams(Streams):
    """Streams that are written one by one, token after token."""

    @abstractmethod
    def stream(self, source: random.Random) -> Stream:
        """One stream, from the draws of `source`."""

    def draw(self, split: str, generator: torch.Generator) -> Batch:
        source = random.Random(int(torch.randint(1 << 62, (), generator=generator)))
        return pack([self.stream(source) for _ in range(self.config.batch)], self.config.context)
