"""Temporal order (SORT): of two segments of a text, which came first?

    data = Config(context=512, segment=4, distance=(4, 400)).open()

    e17 e3 … e8 e5 e1 e9 … e2 e11 e4 e6 … | A e2 e11 e4 e6 B e8 e5 e1 e9 =  B

The text is a sequence of events, no event twice. Two segments of `segment` events are drawn, d events apart from first
event to first event: d is log-uniform over whole numbers of `distance`, their place uniform. They are shown as A and B,
which is which by chance, and the answer is the label of the earlier one. `oracle` holds the place of the earlier
segment in the text, `support` also that of A's first event in the question: whether the two agree is the answer.

Source: Pink et al. 2024, Assessing Episodic Memory in LLMs with Sequence Order Recall Tasks (SORT); there the texts are
books, and the segments sentences. Chance is 1 / 2. Slices: `distance`. Units: events, which are tokens. Errors:
ValueError naming the field or argument.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch
from jaxtyping import Int64
from torch import Tensor

from hmlab.layers import check_positive
from hmlab.tasks.streams import Stream, WrittenStreams

# Ids of the marks; events follow.
A, B, END, EQUALS, FIRST = 0, 1, 2, 3, 4


@dataclass(frozen=True, kw_only=True)
class Config:
    """batch: streams in a batch. context: tokens in a stream. segment: events in a segment. distance: least and most
    events from one segment's first event to the other's. events: how many there are to draw from; None for as many
    as the text has."""

    batch: int = 16
    context: int = 512
    segment: int = 4
    distance: tuple[int, int] = (4, 400)
    events: int | None = None

    def __post_init__(self) -> None:
        check_positive(self, "batch", "segment")
        if not self.segment <= self.distance[0] <= self.distance[1]:
            raise ValueError(f"distance: expected least and most, segment ({self.segment}) <= least <= most, "
                             f"got {self.distance}")  # fmt: skip
        least = self.distance[1] + 3 * self.segment + 4
        if self.context < least:
            raise ValueError(f"context: expected at least {least} for {self.distance[1]} events between segments of "
                             f"{self.segment}, got {self.context}")  # fmt: skip
        if self.events is not None and self.events < self.text:
            raise ValueError(f"events: expected at least those of the text ({self.text}), got {self.events}")

    @property
    def text(self) -> int:
        """Events of the text."""
        return self.context - 4 - 2 * self.segment

    @property
    def vocab_size(self) -> int:
        """Four marks, events."""
        return FIRST + (self.events or self.text)

    @property
    def chance(self) -> float:
        """Share of right answers of who guesses."""
        return 1 / 2

    def open(self) -> OrderData:
        return OrderData(self)


@dataclass(frozen=True, eq=False)
class OrderData(WrittenStreams):
    """Streams to draw; splits differ in nothing but their draws."""

    config: Config

    def stream(self, source: random.Random) -> Stream:
        config = self.config
        least, most = config.distance
        # Whole number d has the share ln((d + 1) / d) of ln((most + 1) / least).
        distance = min(int(least * math.exp(source.random() * math.log((most + 1) / least))), most)
        stream = Stream(labels={"distance": distance})
        text = source.sample(range(FIRST, self.vocab_size), config.text)
        stream.say(*text)
        early = source.randrange(config.text - config.segment - distance + 1)
        places = [early, early + distance]
        source.shuffle(places)
        segments = [text[place : place + config.segment] for place in places]
        stream.say(END)
        shown = stream.say(A, *segments[0]) + 1
        stream.say(B, *segments[1], EQUALS)
        stream.ask(A if places[0] == early else B, early, shown)
        return stream

    def answer(self, last: Int64[Tensor, "answers"], read: Int64[Tensor, "answers reads"]
               ) -> Int64[Tensor, "answers"]:
        return torch.where(read[:, 0] == read[:, 1], A, B)
