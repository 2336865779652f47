"""Joint recall: a table of contexts, keys and values; the same key has another value in another context.

    data = Config(contexts=6, keys=6).open()

A stream says the whole table, then asks for all of it; contexts, and the keys of each, come in random order each time:

    start  c3 k2 v k5 v …  c1 k5 v k2 v …  | again  c1 k2 v k5 v …  c3 k5 v …

Contexts and keys of a stream are distinct draws from `names` of each; the value of each context and key is uniform and
independent. In the second saying every value is an answer (`mask`); `oracle` holds its place in the first. Who looks
up the key without the context finds `contexts` values and is right about once in that many.

Source: the joint-recall task of Overcoming Long-Context Limitations of State-Space Models via Context-Dependent Sparse
Attention (HAX), with 16 values and 5 to 16 contexts and keys.

Chance is 1 / `values`. Slices: `contexts`, `keys`. Units: tokens. Errors: ValueError naming the field or argument.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from hmlab.layers import check_positive
from hmlab.tasks.streams import Stream, WrittenStreams


@dataclass(frozen=True, kw_only=True)
class Config:
    """batch: streams in a batch. contexts, keys: rows and columns of the table. values: how many there are to draw
    from. names: how many contexts, and how many keys, there are to draw from."""

    batch: int = 16
    contexts: int = 6
    keys: int = 6
    values: int = 16
    names: int = 16

    def __post_init__(self) -> None:
        check_positive(self, "batch", "contexts", "keys", "values")
        if self.names < max(self.contexts, self.keys):
            most = max(self.contexts, self.keys)
            raise ValueError(f"names: expected at least contexts and keys ({most}), got {self.names}")

    @property
    def context(self) -> int:
        """Tokens in a stream: two tables with a mark before each, the last value a target only."""
        return 2 * (1 + self.contexts * (1 + 2 * self.keys)) - 1

    @property
    def vocab_size(self) -> int:
        """Two marks, contexts, keys, values."""
        return 2 + 2 * self.names + self.values

    @property
    def chance(self) -> float:
        """Share of right answers of who names any value."""
        return 1 / self.values

    def open(self) -> JointRecallData:
        return JointRecallData(self)


@dataclass(frozen=True, eq=False)
class JointRecallData(WrittenStreams):
    """Streams to draw; splits differ in nothing but their draws."""

    config: Config

    def stream(self, source: random.Random) -> Stream:
        config = self.config
        contexts = source.sample(range(2, 2 + config.names), config.contexts)
        keys = source.sample(range(2 + config.names, 2 + 2 * config.names), config.keys)
        first = 2 + 2 * config.names
        table = {(c, k): first + source.randrange(config.values) for c in contexts for k in keys}
        stream = Stream(labels={"contexts": config.contexts, "keys": config.keys})
        stream.say(0)
        told = {}
        for context in source.sample(contexts, len(contexts)):
            stream.say(context)
            for key in source.sample(keys, len(keys)):
                told[context, key] = stream.say(key, table[context, key]) + 1
        stream.say(1)
        for context in source.sample(contexts, len(contexts)):
            stream.say(context)
            for key in source.sample(keys, len(keys)):
                stream.say(key)
                stream.ask(table[context, key], told[context, key])
        return stream
