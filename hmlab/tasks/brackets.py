"""Nested brackets: an unfinished text of brackets of several kinds is closed, the innermost first.

    data = Config(context=64, kinds=4, depth=(1, 8)).open()

    [ ( ) { [ ] | } ]          | the mark after which what is still open is closed: the answers

How many stay open, d, is uniform over `depth`; which tokens of the text open and which close is uniform among all ways
that end d deep and never go above the most of `depth`. Kinds are uniform and
independent. Every token after the mark is an answer, and `oracle` holds the place of the bracket that it closes, whose
kind no other place tells. Rows are padded by one token where the
lengths ask for it.

Source: the Dyck languages D(k, m) of Hewitt et al. 2020, RNNs can generate bounded hierarchical languages with optimal
memory (arXiv 2010.07515). Deviation: there a closing bracket may be followed by an opening one, so it is judged among
closing ones alone; here all that is asked is determined.

Chance is 1 / `kinds`. Slices: `depth`. Units: tokens. Errors: ValueError naming the field or argument.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cached_property

from jaxtyping import Int64
from torch import Tensor

from hmlab.layers import check_positive
from hmlab.tasks.streams import Stream, WrittenStreams

MARK, FIRST = 0, 1


@dataclass(frozen=True, kw_only=True)
class Config:
    """batch: streams in a batch. context: tokens in a stream. kinds: of brackets. depth: least and most brackets left
    open; the most is that of the whole text."""

    batch: int = 16
    context: int = 64
    kinds: int = 4
    depth: tuple[int, int] = (1, 8)

    def __post_init__(self) -> None:
        check_positive(self, "batch", "context", "kinds")
        if not 1 <= self.depth[0] <= self.depth[1]:
            raise ValueError(f"depth: expected least and most, 1 <= least <= most, got {self.depth}")
        if self.context < 2 * self.depth[1]:
            raise ValueError(f"context: expected at least twice the most depth ({2 * self.depth[1]}), "
                             f"got {self.context}")  # fmt: skip

    @property
    def vocab_size(self) -> int:
        """The mark, opening brackets, closing ones."""
        return FIRST + 2 * self.kinds

    @property
    def chance(self) -> float:
        """Share of right answers of who names any closing bracket."""
        return 1 / self.kinds

    def open(self) -> BracketsData:
        return BracketsData(self)


@dataclass(frozen=True, eq=False)
class BracketsData(WrittenStreams):
    """Streams to draw; splits differ in nothing but their draws."""

    config: Config

    def stream(self, source: random.Random) -> Stream:
        config, stream, opened = self.config, Stream(), []
        depth = source.randint(*config.depth)
        left = config.context - depth  # tokens before the mark
        left -= (left - depth) % 2
        walks = self._walks(depth, left)
        while left:
            left -= 1
            # In proportion to the ways to go on after opening and after closing: the walk is uniform among all.
            up, down = walks[left][len(opened) + 2], walks[left][len(opened)]
            if source.random() * (up + down) < up:
                kind = source.randrange(config.kinds)
                opened.append((kind, stream.say(FIRST + kind)))
            else:
                kind, _ = opened.pop()
                stream.say(FIRST + config.kinds + kind)
        stream.say(MARK)
        for kind, place in reversed(opened):
            stream.ask(FIRST + config.kinds + kind, place)
        stream.labels = {"depth": depth}
        return stream

    def answer(self, last: Int64[Tensor, "answers"], read: Int64[Tensor, "answers reads"]
               ) -> Int64[Tensor, "answers"]:
        return read[:, 0] + self.config.kinds

    def _walks(self, end: int, steps: int) -> list[list[float]]:
        """For each number of steps left, up to `steps`: of the walks to height `end` that stay between 0 and the most
        depth, the share that begins at each height, from -1 (none) to one above the most (none)."""
        walks = self._known.setdefault(end, [])
        if not walks:
            walks.append([float(height == end) for height in range(-1, self.config.depth[1] + 2)])
        while len(walks) <= steps:
            ways = [before + after for before, after in zip(walks[-1], walks[-1][2:], strict=False)]
            total = sum(ways)
            walks.append([0.0, *(way / total for way in ways), 0.0])
        return walks

    @cached_property
    def _known(self) -> dict[int, list[list[float]]]:
        """Walks by their end, kept for the next stream."""
        return {}
