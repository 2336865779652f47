"""ListOps: nested lists of digits under maximum, minimum, median and sum modulo 10 are evaluated.

    data = Config(depth=(1, 3), most=4).open()

    [SM [MAX 2 9 [MIN 4 7 ] 0 ] 5 ] = 4

An expression d deep (d uniform over `depth`) is an operator with 2 to `most` arguments, of which one is an expression
d - 1 deep and each other one, with chance `nested`, an expression of less depth, else a digit. The median of an even
number of arguments is the lower of the two in the middle. The value is the only answer; `support` holds the whole
expression, its last digit first.

The outermost operator is a sum modulo 10 with one uniform digit as its last argument, so that every value is equally
likely: with maximum and minimum outermost, who knows the operator alone does better than chance. `least` tokens at
least and `context` at most, else the expression is drawn anew. Rows are padded.

Source: Nangia and Bowman 2018, ListOps (arXiv 1804.06028); Long Range Arena (arXiv 2011.04006) has expressions of 500
to 2000 tokens, 10 deep, with 10 arguments at most. Deviations: the outermost operator, as said, and the depth drawn.

Chance is 1 / 10. Slices: `depth`, `length` (tokens of the expression). Errors: ValueError naming the field or argument.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Int64
from torch import Tensor

from hmlab.layers import check_positive
from hmlab.tasks.streams import Stream, WrittenStreams

# Ids 0 to 9 are the digits, then the operators, a closing bracket and the equals sign.
MAXIMUM, MINIMUM, MEDIAN, SUM, CLOSE, EQUALS = range(10, 16)
OPERATORS = {
    MAXIMUM: max,
    MINIMUM: min,
    MEDIAN: lambda found: sorted(found)[(len(found) - 1) // 2],
    SUM: lambda found: sum(found) % 10,
}
DRAWS = 1000


@dataclass(frozen=True, kw_only=True)
class Config:
    """batch: streams in a batch. context: tokens in a stream. depth: least and most lists within lists below the
    outermost sum. most: arguments of a list. nested: share of lists among arguments that could be digits. least: tokens
    of an expression."""

    batch: int = 16
    context: int = 128
    depth: tuple[int, int] = (1, 3)
    most: int = 4
    nested: float = 0.25
    least: int = 1

    def __post_init__(self) -> None:
        check_positive(self, "batch", "context", "least")
        if not 0 <= self.depth[0] <= self.depth[1]:
            raise ValueError(f"depth: expected least and most, 0 <= least <= most, got {self.depth}")
        if self.most < 2:
            raise ValueError(f"most: expected at least 2, got {self.most}")
        if not 0 <= self.nested <= 1:
            raise ValueError(f"nested: expected 0 to 1, got {self.nested}")

    @property
    def vocab_size(self) -> int:
        """Digits, operators, the closing bracket, the equals sign."""
        return EQUALS + 1

    @property
    def chance(self) -> float:
        """Share of right answers of who names any digit."""
        return 1 / 10

    def open(self) -> ListOpsData:
        return ListOpsData(self)


@dataclass(frozen=True, eq=False)
class ListOpsData(WrittenStreams):
    """Streams to draw; splits differ in nothing but their draws."""

    config: Config

    def stream(self, source: random.Random) -> Stream:
        depth = source.randint(*self.config.depth)
        for _ in range(DRAWS):
            tokens = [SUM, *self._expression(depth, source), source.randrange(10), CLOSE]
            if self.config.least <= len(tokens) <= self.config.context - 1:
                break
        else:
            raise ValueError(f"context: expected room for an expression {depth} deep with {self.config.most} arguments "
                             f"and {self.config.least} tokens, got {self.config.context}")  # fmt: skip
        stream = Stream(labels={"depth": depth, "length": len(tokens)})
        stream.say(*tokens, EQUALS)
        stream.ask(value(tokens), len(tokens) - 2, *range(len(tokens) - 2), len(tokens) - 1)
        return stream

    def answer(self, last: Int64[Tensor, "answers"], read: Int64[Tensor, "answers reads"]
               ) -> Int64[Tensor, "answers"]:
        rows = ([token for token in row if token >= 0] for row in read.tolist())
        return torch.tensor([value([*row[1:-1], row[0], row[-1]]) for row in rows])

    def _expression(self, depth: int, source: random.Random) -> list[int]:
        """The tokens of an expression, or of a digit, which is 0 deep."""
        if not depth:
            return [source.randrange(10)]
        depths = [source.randrange(depth) if source.random() < self.config.nested else 0
                  for _ in range(source.randint(2, self.config.most))]  # fmt: skip
        depths[source.randrange(len(depths))] = depth - 1
        parts = [token for inner in depths for token in self._expression(inner, source)]
        return [source.choice(list(OPERATORS)), *parts, CLOSE]


def value(tokens: list[int]) -> int:
    """The digit that an expression comes to."""
    return _value(iter(tokens))


def _value(tokens: Iterator[int]) -> int:
    token = next(tokens)
    if token not in OPERATORS:
        return token
    found = []
    while (inner := _value(tokens)) != CLOSE:
        found.append(inner)
    return OPERATORS[token](found)
