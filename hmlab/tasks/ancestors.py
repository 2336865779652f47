"""The k-th ancestor in a tree that is written out: memory of a hierarchy, and how many steps up it leads.

    data = Config(nodes=16, k=(1, 4), form="edges").open()

    edges    x a  b a  y x  …  ? 2 y = a          a node and its parent, all nodes but the root in random order
    nested   ( a ( x ( y ) ) ( b ) )  ? 2 y = a   each node in brackets with its children, in random order

A tree of `nodes` nodes is a path from the root to a node as deep as the most of `k`, to which further nodes are added
one by one below uniformly drawn ones. Names are a random choice among `names`. k is uniform over `k`, the node uniform
among those at least k deep. `oracle` holds the place of the ancestor's name (in edges: as the parent of the one
before), `support` those of all ancestors on the way, the last one first.

Source: HiBench (hierarchical structure reasoning), whose trees and questions these are; the k-th ancestor alone, since
its difficulty is one number. Chance is 1 / `names`. Slices: `k`. Errors: ValueError naming the field or argument.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

from hmlab.layers import check_positive
from hmlab.tasks.streams import Stream, WrittenStreams

FORMS = ("edges", "nested")
# Ids of the marks; the numbers k, then names follow.
QUESTION, EQUALS, OPEN, CLOSE = 0, 1, 2, 3


@dataclass(frozen=True, kw_only=True)
class Config:
    """form: see above. batch: streams in a batch. nodes: of a tree. k: least and most steps up. names: to draw from."""

    form: Literal["edges", "nested"] = "edges"
    batch: int = 16
    nodes: int = 16
    k: tuple[int, int] = (1, 4)
    names: int = 32

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise ValueError(f"form: expected {' or '.join(FORMS)}, got {self.form!r}")
        check_positive(self, "batch")
        if not 1 <= self.k[0] <= self.k[1] < self.nodes:
            raise ValueError(
                f"k: expected least and most, 1 <= least <= most < nodes ({self.nodes}), got {self.k}"
            )
        if self.names < self.nodes:
            raise ValueError(f"names: expected at least nodes ({self.nodes}), got {self.names}")

    @property
    def context(self) -> int:
        """Tokens in a stream: the tree, then the question; the answer is a target only."""
        return (2 * (self.nodes - 1) if self.form == "edges" else 3 * self.nodes) + 4

    @property
    def vocab_size(self) -> int:
        """Two marks, brackets (nested), numbers, names."""
        return self.first_number + self.k[1] + self.names

    @property
    def first_number(self) -> int:
        """Id of k = 1."""
        return OPEN if self.form == "edges" else CLOSE + 1

    @property
    def chance(self) -> float:
        """Share of right answers of who names any node."""
        return 1 / self.names

    def open(self) -> AncestorsData:
        return AncestorsData(self)


@dataclass(frozen=True, eq=False)
class AncestorsData(WrittenStreams):
    """Streams to draw; splits differ in nothing but their draws."""

    config: Config

    def stream(self, source: random.Random) -> Stream:
        config, stream = self.config, Stream()
        first = config.first_number + config.k[1]
        name = source.sample(range(first, first + config.names), config.nodes)
        # The root is node 0; a node's parent has a lower number.
        parent = [node - 1 if node <= config.k[1] else source.randrange(node) for node in range(config.nodes)]
        write = self._edges if config.form == "edges" else self._nested
        places = write(stream, parent, name, source)
        steps = source.randint(*config.k)
        lines = [_line(node, parent) for node in range(config.nodes)]
        line = source.choice([line for line in lines if len(line) > steps])[: steps + 1]
        stream.say(QUESTION, config.first_number + steps - 1, name[line[0]], EQUALS)
        # Told of a node in edges: its parent. In brackets: itself.
        told = [places[node] for node in (line[:-1] if config.form == "edges" else line[1:])]
        stream.ask(name[line[-1]], *reversed(told))
        stream.labels = {"k": steps}
        return stream

    def _edges(self, stream: Stream, parent: list[int], name: list[int], source: random.Random) -> dict[int, int]:
        nodes = range(1, len(parent))
        return {node: stream.say(name[node], name[parent[node]]) + 1 for node in source.sample(nodes, len(nodes))}

    def _nested(self, stream: Stream, parent: list[int], name: list[int], source: random.Random) -> dict[int, int]:
        children: dict[int, list[int]] = {node: [] for node in range(len(parent))}
        for node in source.sample(range(1, len(parent)), len(parent) - 1):
            children[parent[node]].append(node)
        places, left = {}, [0]
        while left:
            node = left.pop()
            if node < 0:  # all below it is written
                stream.say(CLOSE)
                continue
            places[node] = stream.say(OPEN, name[node]) + 1
            left += [-1, *children[node]]
        return places


def _line(node: int, parent: list[int]) -> list[int]:
    """A node and its ancestors up to the root, node 0."""
    found = [node]
    while found[-1]:
        found.append(parent[found[-1]])
    return found
