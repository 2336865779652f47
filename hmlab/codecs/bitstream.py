"""Codes as bits: what is written, and reading it again."""

from __future__ import annotations

from typing import NamedTuple


class Encoded(NamedTuple):
    """data: the code, filled up to whole bytes with zeros. bits: of it all. header_bits: of what comes before the
    tokens. tokens: how many there are."""

    data: bytes
    bits: int
    header_bits: int
    tokens: int


def fixed(number: int, width: int) -> str:
    """A number's binary digits, filled up to a width with zeros; none at width 0."""
    return format(number, f"0{width}b") if width else ""


def delta(number: int) -> str:
    """Elias's δ code of a number from 1: the length of its length in zeros, its length, its digits after the first."""
    digits = format(number, "b")
    length = format(len(digits), "b")
    return "0" * (len(length) - 1) + length + digits[1:]


def written(header: str, payload: str, tokens: int) -> Encoded:
    """Digits of a header and of what follows it, as bytes."""
    bits = header + payload
    data = int(bits + "0" * (-len(bits) % 8), 2).to_bytes(-(-len(bits) // 8), "big")
    return Encoded(data, len(bits), len(header), tokens)


class Bits:
    """A code, read bit by bit."""

    def __init__(self, encoded: Encoded) -> None:
        whole = 8 * len(encoded.data)
        if not 0 < encoded.bits <= whole:
            raise ValueError(f"encoded: expected 1 to {whole} bits for {len(encoded.data)} bytes, got {encoded.bits}")
        self._tokens = encoded.tokens
        self._digits = fixed(int.from_bytes(encoded.data, "big"), whole)[: encoded.bits]
        self._place = 0

    def take(self, width: int = 1) -> str:
        """The next digits."""
        self._place += width
        if self._place > len(self._digits):
            raise ValueError(f"encoded: ends early, at {len(self._digits)} bits")
        return self._digits[self._place - width : self._place]

    def fixed(self, width: int) -> int:
        """A number that `fixed` wrote."""
        return int(self.take(width), 2) if width else 0

    def delta(self, most: int | None = None) -> int:
        """A number that `delta` wrote, at most `most`."""
        zeros = 0
        while self.take() == "0":
            zeros += 1
        length = int("1" + self.take(zeros), 2)
        number = int("1" + self.take(length - 1), 2)
        if most is not None and number > most:
            raise ValueError(f"encoded: expected a number up to {most}, found {number}")
        return number

    def count(self) -> int:
        """The number of tokens, which a header begins with."""
        count = self.delta() - 1
        if count != self._tokens:
            raise ValueError(f"encoded: expected a header of {self._tokens} tokens, found {count}")
        return count

    def word(self, words: dict[str, int]) -> int:
        """What the next word of a prefix code stands for."""
        word = ""
        while word not in words:
            word += self.take()
        return words[word]
