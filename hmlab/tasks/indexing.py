"""Access by index: parity of bits in four formats, and direct a[i], of lengths beyond those of training.

    data = Config(form="scratchpad", length=(1, 20)).open()          # train;  length=(21, 60) to test

n bits are drawn, n uniform over `length`; s_t is the parity of the first t bits.

    answer       b1 b2 … bn = s_n
    scratchpad   b1 b2 … bn = s1 s2 … sn              step t needs bit number t, which only its index names
    interleaved  b1 s1 b2 s2 … bn sn                  each bit beside its parity: nothing to index
    mnemonic     M1 b1 M2 b2 … Mn bn = M1 s1 M2 s2 …  a random n-gram Mt names bit t: content in place of an index
    access       a1 a2 … an = i a_i                   a_i one of `values`; i uniform

Only parities (or a_i) are answers; bits and n-grams that come again are given, and so is the first parity beside its
bit, which it equals. The n-grams of a stream are distinct.
`support` holds the bit or value itself first (all bits for `answer`), then the parity before it where there is one
that is not the last token. Rows shorter than the longest are padded.

Source: Ebrahimi, Panchal and Memisevic 2024, Your Context Is Not an Array: Unveiling Random Access Limitations in
Transformers. Deviation: there a mnemonic scratchpad writes its n-grams by itself; here they are given, so that the
parities alone are measured.

Chance is 1 / 2 for parity, 1 / `values` for access. Slices: `length`, in bits or values. Errors: ValueError naming the
field or argument.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Int64
from torch import Tensor

from hmlab.layers import check_positive
from hmlab.tasks.streams import Stream, WrittenStreams

FORMS = ("answer", "scratchpad", "interleaved", "mnemonic", "access")
# Ids of the equals sign beside the bits 0 and 1, and of the first letter; those of access: the sign, values, indices.
EQUALS, LETTER = 2, 3
ACCESS_EQUALS, VALUE = 0, 1


@dataclass(frozen=True, kw_only=True)
class Config:
    """form: see above. batch: streams in a batch. length: least and most bits or values. longest: the most that any
    Config of the same model has, so that training and test share a vocabulary; None for the most of this one. anchor,
    letters: tokens of an n-gram, and how many they are drawn from. values: of access."""

    form: Literal["answer", "scratchpad", "interleaved", "mnemonic", "access"] = "scratchpad"
    batch: int = 16
    length: tuple[int, int] = (1, 20)
    longest: int | None = None
    anchor: int = 2
    letters: int = 16
    values: int = 16

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise ValueError(f"form: expected {' or '.join(FORMS)}, got {self.form!r}")
        check_positive(self, "batch", "anchor", "letters", "values")
        if not 1 <= self.length[0] <= self.length[1]:
            raise ValueError(f"length: expected least and most, 1 <= least <= most, got {self.length}")
        if self.form == "interleaved" and self.length[0] < 2:
            raise ValueError(f"length: expected at least 2, the second bit is the first asked, got {self.length}")
        if self.longest is not None and self.longest < self.length[1]:
            raise ValueError(f"longest: expected at least the most of length ({self.length[1]}), got {self.longest}")
        if self.form == "mnemonic" and self.letters**self.anchor < self.length[1]:
            raise ValueError(f"letters: expected enough for {self.length[1]} n-grams of {self.anchor}, "
                             f"got {self.letters}")  # fmt: skip

    @property
    def context(self) -> int:
        """Tokens of the longest stream, whose last answer is a target only."""
        most = self.length[1]
        tokens = {"answer": most + 1, "scratchpad": 2 * most, "interleaved": 2 * most - 1,
                  "mnemonic": 2 * most * (self.anchor + 1), "access": most + 2}  # fmt: skip
        return tokens[self.form]

    @property
    def vocab_size(self) -> int:
        """Bits, the sign (not when interleaved), letters (mnemonic); or the sign, values and indices (access)."""
        if self.form == "access":
            return VALUE + self.values + (self.longest or self.length[1])
        return {"interleaved": EQUALS, "mnemonic": LETTER + self.letters}.get(self.form, LETTER)

    @property
    def chance(self) -> float:
        """Share of right answers of who guesses."""
        return 1 / self.values if self.form == "access" else 1 / 2

    def open(self) -> IndexingData:
        return IndexingData(self)


@dataclass(frozen=True, eq=False)
class IndexingData(WrittenStreams):
    """Streams to draw; splits differ in nothing but their draws."""

    config: Config

    def stream(self, source: random.Random) -> Stream:
        length = source.randint(*self.config.length)
        stream = Stream(labels={"length": length})
        if self.config.form == "access":
            self._access(stream, length, source)
            return stream
        bits = [source.randrange(2) for _ in range(length)]
        write = {"answer": self._answer, "scratchpad": self._scratchpad, "interleaved": self._interleaved,
                 "mnemonic": self._mnemonic}  # fmt: skip
        write[self.config.form](stream, bits, source)
        return stream

    def answer(self, last: Int64[Tensor, "answers"], read: Int64[Tensor, "answers reads"]
               ) -> Int64[Tensor, "answers"]:
        if self.config.form == "access":
            return read[:, 0]
        # What is not a bit, such as the mark before the first parity, counts as 0.
        return ((read == 1).sum(1) + (last == 1)) % 2

    def _access(self, stream: Stream, length: int, source: random.Random) -> None:
        first = VALUE + self.config.values
        values = [source.randrange(VALUE, first) for _ in range(length)]
        index = source.randrange(length)
        place = stream.say(*values)
        stream.say(ACCESS_EQUALS, first + index)
        stream.ask(values[index], place + index)

    def _answer(self, stream: Stream, bits: list[int], source: random.Random) -> None:
        place = stream.say(*bits)
        stream.say(EQUALS)
        stream.ask(sum(bits) % 2, *range(place, place + len(bits)))

    def _scratchpad(self, stream: Stream, bits: list[int], source: random.Random) -> None:
        place = stream.say(*bits)
        stream.say(EQUALS)
        for t in range(len(bits)):
            stream.ask(sum(bits[: t + 1]) % 2, place + t)

    def _interleaved(self, stream: Stream, bits: list[int], source: random.Random) -> None:
        before = stream.say(bits[0], bits[0]) + 1
        for t, bit in enumerate(bits[1:], 1):
            stream.say(bit)
            before = stream.ask(sum(bits[: t + 1]) % 2, before)

    def _mnemonic(self, stream: Stream, bits: list[int], source: random.Random) -> None:
        config = self.config
        numbers = source.sample(range(config.letters**config.anchor), len(bits))
        anchors = [[LETTER + number // config.letters**digit % config.letters for digit in range(config.anchor)]
                   for number in numbers]  # fmt: skip
        places = [stream.say(*anchor, bit) + config.anchor for anchor, bit in zip(anchors, bits, strict=True)]
        before = stream.say(EQUALS)
        for t, (anchor, place) in enumerate(zip(anchors, places, strict=True)):
            stream.say(*anchor)
            before = stream.ask(sum(bits[: t + 1]) % 2, place, before)
