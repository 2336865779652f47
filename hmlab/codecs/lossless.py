"""Lossless codes of token sequences: Huffman static and adaptive, repeated phrases, LZW.

    encoded = Huffman().encode([3, 1, 4, 1, 5])
    Huffman().decode(encoded)               # array([3, 1, 4, 1, 5])
    encoded.bits, bits_per_token(encoded)

Ids are any integers 0 to 2^63 - 1. A code tells all that it takes to decode it, the number of tokens and the alphabet
included (`header_bits`). Numbers without a bound are in Elias's δ code (1975).

Sources: Huffman 1952, in the canonical form of Schwartz and Kallick 1964; adaptive: algorithm FGK (Faller 1973,
Gallager 1978, Knuth 1985, Dynamic Huffman Coding); Welch 1984, A Technique for High-Performance Data Compression.
Errors: `ValueError` naming the argument: ids out of range, a code that ends early or that is none of the codec's.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Protocol

import numpy as np
from jaxtyping import Int64

from hmlab.codecs.adaptive import FGKTree
from hmlab.codecs.bitstream import Bits, Encoded, delta, fixed, written

Ids = Sequence[int] | np.ndarray


class TokenCodec(Protocol):
    """`decode(encode(tokens))` is `tokens`, always."""

    def encode(self, tokens: Ids) -> Encoded: ...

    def decode(self, encoded: Encoded) -> Int64[np.ndarray, "time"]: ...


def bits_per_token(encoded: Encoded) -> float:
    """Bits of the whole code over its tokens; NaN where there are none."""
    return encoded.bits / encoded.tokens if encoded.tokens else float("nan")


@dataclass(frozen=True, kw_only=True)
class Huffman:
    """The optimal prefix code of the sequence's own counts; the header holds the code lengths.

    H ≤ bits a token < H + 1 (header aside), H the entropy of the counts. One kind of token takes no bits.
    """

    def encode(self, tokens: Ids) -> Encoded:
        alphabet, ranks = _checked(tokens)
        lengths = _code_lengths(np.bincount(ranks, minlength=len(alphabet)).tolist())
        header = _header(ranks, alphabet) + "".join(delta(length + 1) for length in lengths)
        words = {rank: word for word, rank in _canonical(lengths).items()}
        return written(header, "".join(words[rank] for rank in ranks.tolist()), len(ranks))

    def decode(self, encoded: Encoded) -> Int64[np.ndarray, "time"]:
        bits = Bits(encoded)
        count, alphabet = _read_header(bits)
        words = _canonical([bits.delta() - 1 for _ in alphabet])
        ranks = [bits.word(words) for _ in range(count)]
        return np.array(alphabet, np.int64)[ranks]


@dataclass(frozen=True, kw_only=True)
class AdaptiveHuffman:
    """One pass: the prefix code of the counts so far (algorithm FGK), so there is no alphabet to send ahead.

    A new token is the word of "not yet seen" and its δ code. Without those, at most twice the bits of the static code
    and one a token (Vitter 1987, Design and Analysis of Dynamic Huffman Codes).
    """

    def encode(self, tokens: Ids) -> Encoded:
        alphabet, ranks = _checked(tokens)
        tree, words = FGKTree(), []
        for token in np.array(alphabet, np.int64)[ranks].tolist():
            words.append(tree.word(token) if token in tree else tree.word(None) + delta(token + 1))
            tree.count(token)
        return written(delta(len(ranks) + 1), "".join(words), len(ranks))

    def decode(self, encoded: Encoded) -> Int64[np.ndarray, "time"]:
        bits = Bits(encoded)
        tree, tokens = FGKTree(), []
        for _ in range(bits.count()):
            token = tree.read(bits.take)
            tokens.append(bits.delta(2**63) - 1 if token is None else token)
            tree.count(tokens[-1])
        return np.array(tokens, np.int64)


@dataclass(frozen=True, kw_only=True)
class RunLength:
    """Phrases that repeat at once: length, repeats and the tokens once; what does not repeat is a phrase of one repeat.

    From left to right, the phrase whose repeats leave out most tokens. phrase: tokens of the longest that is sought.
    """

    phrase: int = 16

    def __post_init__(self) -> None:
        if self.phrase < 1:
            raise ValueError(f"phrase: expected at least 1 token, got {self.phrase}")

    def encode(self, tokens: Ids) -> Encoded:
        alphabet, ranks = _checked(tokens)
        width = max(len(alphabet) - 1, 0).bit_length()
        words, listed = [], ranks.tolist()
        for start, length, repeats in self._phrases(ranks):
            words += [delta(length), delta(repeats), *(fixed(r, width) for r in listed[start : start + length])]
        return written(_header(ranks, alphabet), "".join(words), len(ranks))

    def _phrases(self, ranks: np.ndarray) -> list[tuple[int, int, int]]:
        """Start, length and repeats of the phrases that the sequence is."""
        time = len(ranks)
        repeats = np.ones((min(self.phrase, time // 2), time), np.int64)
        for length, row in enumerate(repeats, 1):
            differs = np.flatnonzero(np.append(ranks[length:] != ranks[:-length], True))
            start = np.arange(time - length + 1)
            # As many tokens in a row as equal the one `length` further on, from each start.
            row[: len(start)] = (differs[np.searchsorted(differs, start)] - start) // length + 1
        length = np.arange(1, len(repeats) + 1)[:, None]
        saved = (repeats - 1) * length
        best = saved.argmax(0) if len(saved) else np.zeros(time, np.int64)
        phrases, plain, place = [], 0, 0
        while place < time:
            row = best[place]
            # A repeated token or two cost as much as they save where they break a plain phrase.
            if len(saved) and saved[row, place] > 2:
                phrases += [(plain, place - plain, 1)] if plain < place else []
                phrases.append((place, int(row) + 1, int(repeats[row, place])))
                place += (int(row) + 1) * int(repeats[row, place])
                plain = place
            else:
                place += 1
        return phrases + ([(plain, time - plain, 1)] if plain < time else [])

    def decode(self, encoded: Encoded) -> Int64[np.ndarray, "time"]:
        bits = Bits(encoded)
        count, alphabet = _read_header(bits)
        width = max(len(alphabet) - 1, 0).bit_length()
        ranks: list[int] = []
        while len(ranks) < count:
            length, repeats = bits.delta(), bits.delta()
            if len(ranks) + length * repeats > count:
                raise ValueError(f"encoded: expected {count} tokens, found more")
            ranks += [_below(bits.fixed(width), len(alphabet)) for _ in range(length)] * repeats
        return np.array(alphabet, np.int64)[ranks]


@dataclass(frozen=True, kw_only=True)
class LZW:
    """A dictionary of phrases that grows by one with every word; it begins as the alphabet.

    A word is a number of the dictionary at that moment, at as many bits as that takes.
    """

    def encode(self, tokens: Ids) -> Encoded:
        alphabet, ranks = _checked(tokens)
        known: dict[tuple[int, int], int] = {}  # (number of a phrase, next token) -> number of the longer phrase
        words, size, phrase = [], len(alphabet), None
        for rank in ranks.tolist():
            if phrase is None:
                phrase = rank
            elif (phrase, rank) in known:
                phrase = known[phrase, rank]
            else:
                words.append(fixed(phrase, (size - 1).bit_length()))
                known[phrase, rank] = size
                size, phrase = size + 1, rank
        if phrase is not None:
            words.append(fixed(phrase, (size - 1).bit_length()))
        return written(_header(ranks, alphabet), "".join(words), len(ranks))

    def decode(self, encoded: Encoded) -> Int64[np.ndarray, "time"]:
        bits = Bits(encoded)
        count, alphabet = _read_header(bits)
        phrases = [(rank,) for rank in range(len(alphabet))]
        ranks: list[int] = []
        last: tuple[int, ...] = ()
        while len(ranks) < count:
            # The encoder's dictionary is one phrase ahead: it knows what this word begins with.
            size = len(phrases) + bool(last)
            number = _below(bits.fixed((size - 1).bit_length()), size)
            phrase = phrases[number] if number < len(phrases) else (*last, last[0])
            if last:
                phrases.append((*last, phrase[0]))
            ranks += phrase
            last = phrase
        if len(ranks) > count:
            raise ValueError(f"encoded: expected {count} tokens, found more")
        return np.array(alphabet, np.int64)[ranks]


TOKEN_CODECS: dict[str, type[TokenCodec]] = {
    "huffman": Huffman, "adaptive-huffman": AdaptiveHuffman, "run-length": RunLength, "lzw": LZW,
}  # fmt: skip


def _checked(tokens: Ids) -> tuple[list[int], np.ndarray]:
    """The alphabet, ascending, and each token's rank in it."""
    ids = np.asarray(tokens) if len(tokens) else np.empty(0, np.int64)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise ValueError(f"tokens: expected a sequence of integers below 2^63, got {ids.dtype} of shape {ids.shape}")
    if ids.size and (ids.min() < 0 or int(ids.max()) >= 2**63):
        raise ValueError(f"tokens: expected integers 0 to 2^63 - 1, got {ids.min() if ids.min() < 0 else ids.max()}")
    alphabet, ranks = np.unique(ids, return_inverse=True)
    return alphabet.tolist(), ranks


def _code_lengths(counts: list[int]) -> list[int]:
    """Bits of each symbol's word in an optimal prefix code (Huffman 1952), balanced where counts tie."""
    heap = [(count, 0, (rank,)) for rank, count in enumerate(counts)]
    heapq.heapify(heap)
    lengths = [0] * len(counts)
    while len(heap) > 1:
        (a, deep_a, left), (b, deep_b, right) = heapq.heappop(heap), heapq.heappop(heap)
        for rank in left + right:
            lengths[rank] += 1
        heapq.heappush(heap, (a + b, max(deep_a, deep_b) + 1, left + right))
    return lengths


def _canonical(lengths: list[int]) -> dict[str, int]:
    """Words to ranks: words ascend with length, then rank, so the lengths alone tell them."""
    words, word, last = {}, 0, 0
    for length, rank in sorted((length, rank) for rank, length in enumerate(lengths)):
        word <<= length - last
        words[fixed(word, length)] = rank
        word, last = word + 1, length
    return words


def _header(ranks: np.ndarray, alphabet: list[int]) -> str:
    """Number of tokens, size of the alphabet, the gaps between its ids."""
    gaps = [b - a for a, b in pairwise([-1, *alphabet])]
    return "".join(map(delta, (len(ranks) + 1, len(alphabet) + 1, *gaps)))


def _read_header(bits: Bits) -> tuple[int, list[int]]:
    count, symbols = bits.count(), bits.delta() - 1
    alphabet = [following - 1 for following in accumulate(bits.delta(2**63) for _ in range(symbols))]
    _below(alphabet[-1] if alphabet else 0, 2**63)
    return count, alphabet


def _below(number: int, size: int) -> int:
    if number >= size:
        raise ValueError(f"encoded: expected a number below {size}, found {number}")
    return number
