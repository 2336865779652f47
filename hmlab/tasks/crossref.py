"""Cross-reference: a section says "see section 7", and section 7, before or after it, holds what was asked.

    data = Config(context=256, sections=8, hops=(0, 2)).open()

    § 3 … filler … see 7 … § 7 … filler … = v … § 1 … filler …   ? 3 : v

A document has `sections` sections, numbered by distinct numbers in random order, with filler of as equal length as
`context` allows. Somewhere in its filler each section has one note: `see` and a number, or `=` and a value. The
question names a section; its answer lies h references further, h uniform over `hops`. The sections on the way are a
random choice; every other section has a value of its own or refers to one that has, so that values and references
stand beside those asked for. `oracle` holds the place of the value, `support` then those of the references, the last
one first.

Source: the cross-reference questions of long-document benchmarks, which HARMONY's abstract names; the form is ours.
Chance is 1 / `values`. Slices: `hops`, `backward` (how many of the references lead back). Units: tokens. Errors:
ValueError naming the field or argument.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import pairwise

from hmlab.layers import check_positive
from hmlab.tasks.streams import Stream, WrittenStreams

# Ids of the marks; numbers, values and filler follow.
SECTION, SEE, IS, QUESTION, COLON, FIRST = range(6)


@dataclass(frozen=True, kw_only=True)
class Config:
    """batch: streams in a batch. context: tokens in a stream. sections: of a document. hops: least and most references
    from the section named to the value. numbers, values, filler: how many tokens there are of each kind."""

    batch: int = 16
    context: int = 256
    sections: int = 8
    hops: tuple[int, int] = (0, 2)
    numbers: int = 32
    values: int = 16
    filler: int = 16

    def __post_init__(self) -> None:
        check_positive(self, "batch", "sections", "values", "filler")
        if not 0 <= self.hops[0] <= self.hops[1] < self.sections:
            raise ValueError(f"hops: expected least and most, 0 <= least <= most < sections ({self.sections}), "
                             f"got {self.hops}")  # fmt: skip
        if self.numbers < self.sections:
            raise ValueError(f"numbers: expected at least sections ({self.sections}), got {self.numbers}")
        if self.context < 4 * self.sections + 3:
            raise ValueError(f"context: expected at least {4 * self.sections + 3} for {self.sections} sections, "
                             f"got {self.context}")  # fmt: skip

    @property
    def vocab_size(self) -> int:
        """Marks, numbers, values, filler."""
        return FIRST + self.numbers + self.values + self.filler

    @property
    def chance(self) -> float:
        """Share of right answers of who names any value."""
        return 1 / self.values

    def open(self) -> CrossReferenceData:
        return CrossReferenceData(self)


@dataclass(frozen=True, eq=False)
class CrossReferenceData(WrittenStreams):
    """Streams to draw; splits differ in nothing but their draws."""

    config: Config

    def stream(self, source: random.Random) -> Stream:
        config = self.config
        value, filler = FIRST + config.numbers, FIRST + config.numbers + config.values
        number = source.sample(range(FIRST, value), config.sections)
        hops = source.randint(*config.hops)
        way = source.sample(range(config.sections), hops + 1)
        # Section -> the section it refers to; None: it has a value.
        leads: dict[int, int | None] = {**dict(pairwise(way)), way[-1]: None}
        for section in source.sample(range(config.sections), config.sections):
            if section not in leads:
                ends = [at for at, to in leads.items() if to is None]
                leads[section] = source.choice(ends) if source.random() < hops / (hops + 1) else None
        stream, told = Stream(), {}
        length = config.context - 3 - 4 * config.sections
        for section in range(config.sections):
            stream.say(SECTION, number[section])
            words = [source.randrange(filler, self.vocab_size)
                     for _ in range(length * (section + 1) // config.sections - length * section // config.sections)]
            before, to = source.randint(0, len(words)), leads[section]
            stream.say(*words[:before])
            said = source.randrange(value, filler) if to is None else number[to]
            told[section] = stream.say(IS if to is None else SEE, said) + 1
            stream.say(*words[before:])
        stream.say(QUESTION, number[way[0]], COLON)
        stream.ask(stream.tokens[told[way[-1]]], *(told[section] for section in reversed(way)))
        back = sum(to < at for at, to in pairwise(way))
        stream.labels = {"hops": hops, "backward": back}
        return stream
