"""Paired associative inference: A goes with B, B with C; which of two goes with A, though never shown beside it?

    data = Config(lines=4, length=3).open()

    ( b a ) ( c b ) ( y x ) ( z y ) …  ? a : 1 z 2 c = 2

`lines` lines of `length` items each (A, B, C, …) are shown as pairs of neighbours, pairs of all lines in random order
and the two of a pair in either. The question names the first item of a line, then two items h links along, the match of
its own line and the lure of another, in either order; the answer is the match's number. h = 1 asks for a pair that was
shown, h = 2 and more for one that was not; h is uniform over 1 to `length` - 1. `oracle` holds the place of the match
in the pair that links it, `support` then that of option 1 and of each link before.

Source: Banino et al. 2020, MEMO: A Deep Network for Flexible Combination of Episodic Memories, with A-B-C to A-B-C-D-E;
there items are images and a pair is one memory; here they are tokens, all distinct.

Chance is 1 / 2. Slices: `hops`. Units: tokens. Errors: ValueError naming the field or argument.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from jaxtyping import Int64
from torch import Tensor

from hmlab.layers import check_positive
from hmlab.tasks.streams import Stream, WrittenStreams

# Ids of the marks and of the two options; items follow.
OPEN, CLOSE, QUESTION, COLON, EQUALS, ONE, TWO, FIRST = range(8)


@dataclass(frozen=True, kw_only=True)
class Config:
    """batch: streams in a batch. lines: of items. length: items in a line. items: how many there are to draw from."""

    batch: int = 16
    lines: int = 4
    length: int = 3
    items: int = 64

    def __post_init__(self) -> None:
        check_positive(self, "batch")
        for name in ("lines", "length"):
            if getattr(self, name) < 2:
                raise ValueError(f"{name}: expected at least 2, got {getattr(self, name)}")
        if self.items < self.lines * self.length:
            raise ValueError(f"items: expected at least lines x length ({self.lines * self.length}), got {self.items}")

    @property
    def context(self) -> int:
        """Tokens in a stream: pairs, then the question; the answer is a target only."""
        return 4 * self.lines * (self.length - 1) + 8

    @property
    def vocab_size(self) -> int:
        """Marks, the two numbers, items."""
        return FIRST + self.items

    @property
    def chance(self) -> float:
        """Share of right answers of who guesses."""
        return 1 / 2

    def open(self) -> InferenceData:
        return InferenceData(self)


@dataclass(frozen=True, eq=False)
class InferenceData(WrittenStreams):
    """Streams to draw; splits differ in nothing but their draws."""

    config: Config

    def stream(self, source: random.Random) -> Stream:
        config, stream, told = self.config, Stream(), {}
        items = source.sample(range(FIRST, self.vocab_size), config.lines * config.length)
        lines = [items[i : i + config.length] for i in range(0, len(items), config.length)]
        pairs = [(line, link) for line in range(config.lines) for link in range(config.length - 1)]
        for line, link in source.sample(pairs, len(pairs)):
            stream.say(OPEN)
            two = [link, link + 1]
            source.shuffle(two)
            place = stream.say(*(lines[line][at] for at in two))
            told[line, link] = place + two.index(link + 1)
            stream.say(CLOSE)
        hops = source.randrange(1, config.length)
        line, other = source.sample(range(config.lines), 2)
        match, options = lines[line][hops], [lines[line][hops], lines[other][hops]]
        source.shuffle(options)
        stream.say(QUESTION, lines[line][0], COLON)
        shown = stream.say(ONE, options[0], TWO, options[1], EQUALS) + 1
        links = [told[line, link] for link in reversed(range(hops))]
        stream.ask(ONE if options[0] == match else TWO, links[0], shown, *links[1:])
        stream.labels = {"hops": hops}
        return stream

    def answer(self, last: Int64[Tensor, "answers"], read: Int64[Tensor, "answers reads"]
               ) -> Int64[Tensor, "answers"]:
        return torch.where(read[:, 0] == read[:, 1], ONE, TWO)
