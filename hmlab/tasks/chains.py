"""Multi-hop chains: links from name to name, told in any order, are followed to the value at the end.

    data = Config(chains=4, hops=(1, 4), order="shuffled").open()

Each of `chains` chains has h links, h uniform over `hops` and the same for all chains of a stream, so that its length
gives nothing away. A link is a name and what it leads to, the last one's a value; links stand among filler:

    … a→b …  y→z …  b→v …  z→w …  ? a : v        order "shuffled"; "forward" or "backward" along each chain

One chain is asked for by its first name. `oracle` holds the place of the value, `support` those of all that the chain's
links lead to, the last link first. Names of a stream are distinct, values are uniform and independent.

Source: pointer chasing, as in the variable tracking of RULER (Hsieh et al. 2024) and the chained facts of long-context
benchmarks; the form is ours. Chance is 1 / `values`. Slices: `hops`, `distance` (tokens from the value's place to the
answer's). Units: tokens. Errors: ValueError naming the field or argument.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

from hmlab.layers import check_positive
from hmlab.tasks.streams import Stream, WrittenStreams

ORDERS = ("shuffled", "forward", "backward")
# Ids of the marks; names, values and filler follow.
QUESTION, COLON, FIRST = 0, 1, 2


@dataclass(frozen=True, kw_only=True)
class Config:
    """batch: streams in a batch. context: tokens in a stream. chains: in each. hops: least and most links of a chain.
    order: of the links of one chain. names, values, filler: how many tokens there are of each kind."""

    batch: int = 16
    context: int = 64
    chains: int = 4
    hops: tuple[int, int] = (1, 4)
    order: Literal["shuffled", "forward", "backward"] = "shuffled"
    names: int = 32
    values: int = 16
    filler: int = 16

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise ValueError(f"order: expected {' or '.join(ORDERS)}, got {self.order!r}")
        check_positive(self, "batch", "context", "chains", "values", "filler")
        if not 1 <= self.hops[0] <= self.hops[1]:
            raise ValueError(f"hops: expected least and most, 1 <= least <= most, got {self.hops}")
        links = self.chains * self.hops[1]
        if self.names < links:
            raise ValueError(f"names: expected at least chains x most hops ({links}), got {self.names}")
        if self.context < 2 * links + 3:
            raise ValueError(f"context: expected at least {2 * links + 3} for {links} links, got {self.context}")

    @property
    def vocab_size(self) -> int:
        """Two marks, names, values, filler."""
        return FIRST + self.names + self.values + self.filler

    @property
    def chance(self) -> float:
        """Share of right answers of who names any value."""
        return 1 / self.values

    def open(self) -> ChainsData:
        return ChainsData(self)


@dataclass(frozen=True, eq=False)
class ChainsData(WrittenStreams):
    """Streams to draw; splits differ in nothing but their draws."""

    config: Config

    def stream(self, source: random.Random) -> Stream:
        config, value, filler = self.config, FIRST + self.config.names, FIRST + self.config.names + self.config.values
        hops = source.randint(*config.hops)
        names = source.sample(range(FIRST, value), config.chains * hops)
        chains = [[*names[i * hops : (i + 1) * hops], source.randrange(value, filler)] for i in range(config.chains)]
        # Which chain has a link next, over all links: a shuffle keeps each chain's own order.
        turns = [i for i in range(config.chains) for _ in range(hops)]
        source.shuffle(turns)
        links = [self._ordered(hops, source) for _ in chains]
        stream, told, rest = Stream(), {}, config.context - 3 - 2 * len(turns)
        # The gaps before, between and after the links share the filler evenly by chance.
        gaps = sorted(source.randrange(rest) for _ in turns) if rest else [0] * len(turns)
        gaps = [after - before for before, after in zip([0, *gaps], [*gaps, rest], strict=True)]
        for chain, gap in zip(turns, gaps[:-1], strict=True):
            stream.say(*(source.randrange(filler, self.vocab_size) for _ in range(gap)))
            link = links[chain].pop()
            told[chain, link] = stream.say(*chains[chain][link : link + 2]) + 1
        stream.say(*(source.randrange(filler, self.vocab_size) for _ in range(gaps[-1])))
        asked = source.randrange(config.chains)
        stream.say(QUESTION, chains[asked][0], COLON)
        place = stream.ask(chains[asked][-1], *(told[asked, link] for link in reversed(range(hops))))
        stream.labels = {"hops": hops, "distance": place - told[asked, hops - 1]}
        return stream

    def _ordered(self, hops: int, source: random.Random) -> list[int]:
        """Numbers of a chain's links, the one to tell first at the end."""
        links = list(range(hops))
        if self.config.order == "shuffled":
            source.shuffle(links)
        return links if self.config.order != "forward" else links[::-1]
