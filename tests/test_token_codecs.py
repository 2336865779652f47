"""Lossless codes of tokens: exact round trips, lengths known from theory, errors."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hmlab.codecs import LZW, TOKEN_CODECS, AdaptiveHuffman, Encoded, Huffman, RunLength, TokenCodec, bits_per_token
from hmlab.codecs.adaptive import FGKTree
from hmlab.codecs.bitstream import Bits, delta

MOST = 2**63 - 1
few = st.lists(st.integers(0, 3), max_size=120)
many = st.lists(st.integers(0, MOST), max_size=30)
repeated = st.builds(lambda a, n, b: a * n + b, few.map(lambda x: x[:9]), st.integers(0, 9), few)
sequences = st.one_of(few, many, repeated, st.lists(st.sampled_from((7, MOST)), max_size=40))
built = [kind() for kind in TOKEN_CODECS.values()] + [RunLength(phrase=1)]
each_codec = pytest.mark.parametrize("codec", built, ids=str)


def _entropy(tokens) -> float:
    return -sum(n / len(tokens) * math.log2(n / len(tokens)) for n in Counter(tokens).values())


def _text(time=4000, seed=0):
    return np.random.default_rng(seed).zipf(1.5, time) % 300


@each_codec
@given(tokens=sequences)
@settings(max_examples=150, deadline=None)
def test_round_trip(codec: TokenCodec, tokens):
    encoded = codec.encode(tokens)
    decoded = codec.decode(encoded)
    assert decoded.dtype == np.int64 and decoded.tolist() == tokens
    assert encoded.tokens == len(tokens) and len(encoded.data) == -(-encoded.bits // 8)
    assert 0 < encoded.header_bits <= encoded.bits
    # What fills the last byte is no part of the code.
    dirty = encoded.data[:-1] + bytes([encoded.data[-1] | (1 << (-encoded.bits % 8)) - 1])
    assert codec.decode(encoded._replace(data=dirty)).tolist() == tokens


@each_codec
@pytest.mark.parametrize("kind", (list, tuple, np.int32, np.uint8, np.uint64))
def test_any_kind_of_integers(codec, kind):
    tokens = _text(200) % 200
    given = kind(tokens.tolist()) if kind in (list, tuple) else tokens.astype(kind)
    assert codec.decode(codec.encode(given)).tolist() == tokens.tolist()


def test_no_tokens_and_one_kind_of_token_take_only_their_header():
    for tokens in ([], [MOST], [5] * 1000):
        for codec in (Huffman(), LZW()) if len(tokens) < 2 else (Huffman(),):
            encoded = codec.encode(tokens)
            assert encoded.bits == encoded.header_bits
    assert math.isnan(bits_per_token(Huffman().encode([])))
    # Elias's δ: 11 for 0 tokens + 1 and no symbol + 1 are one bit each.
    assert Huffman().encode([]) == Encoded(b"\xc0", 2, 2, 0)


@given(st.integers(1, 2**70))
def test_delta_codes_come_back(number):
    word = delta(number)
    size = number.bit_length()
    assert len(word) == size - 1 + 2 * (size.bit_length() - 1) + 1
    data = int(word.ljust(-(-len(word) // 8) * 8, "0"), 2).to_bytes(-(-len(word) // 8), "big")
    assert Bits(Encoded(data, len(word), 0, 0)).delta() == number


def test_delta_codes_known():
    assert [delta(n) for n in (1, 2, 3, 4, 8, 17)] == ["1", "0100", "0101", "01100", "00100000", "001010001"]


@given(st.lists(st.integers(1, 40), min_size=2, max_size=5))
@settings(max_examples=40, deadline=None)
def test_huffman_is_the_shortest_prefix_code(counts):
    tokens = [symbol for symbol, count in enumerate(counts) for _ in range(count)]
    encoded = Huffman().encode(tokens)
    # Kraft: there are prefix codes of just these lengths.
    best = min(sum(n * length for n, length in zip(counts, lengths, strict=True))
               for lengths in itertools.product(range(1, len(counts)), repeat=len(counts))
               if sum(2.0**-length for length in lengths) <= 1)  # fmt: skip
    assert encoded.bits - encoded.header_bits == best


@given(few.filter(lambda x: len(set(x)) > 1))
def test_huffman_is_within_a_bit_of_the_entropy(tokens):
    encoded = Huffman().encode(tokens)
    assert _entropy(tokens) - 1e-9 <= (encoded.bits - encoded.header_bits) / len(tokens) < _entropy(tokens) + 1


def test_huffman_of_powers_of_two_is_the_entropy():
    tokens = [0] * 64 + [1] * 32 + [2] * 16 + [3] * 8 + [4] * 8
    encoded = Huffman().encode(tokens)
    assert encoded.bits - encoded.header_bits == 128 * _entropy(tokens)
    assert bits_per_token(encoded) == encoded.bits / 128


def _known_cost(tree: FGKTree, counts: Counter) -> int:
    return sum(n * len(tree.word(token)) for token, n in counts.items())


@given(st.lists(st.integers(0, 12), max_size=80))
@settings(max_examples=60, deadline=None)
def test_the_tree_is_a_huffman_tree_after_every_token(tokens):
    tree, counts = FGKTree(), Counter()
    for token in tokens:
        tree.count(token)
        counts[token] += 1
        order = tree._order
        weights = [node.weight for node in order]
        assert weights == sorted(weights, reverse=True) and [node.place for node in order] == list(range(len(order)))
        for node in order:
            if node.children:
                assert node.weight == sum(child.weight for child in node.children)
                assert abs(node.children[0].place - node.children[1].place) == 1
                assert all(child.parent is node for child in node.children)
            else:
                assert node.weight == counts[node.token]
        assert _known_cost(tree, counts) == _optimal([0, *counts.values()])


def _optimal(counts: list[int]) -> int:
    """Bits of Huffman's code: the sum of the weights of its inner nodes."""
    heap, total = sorted(counts), 0
    while len(heap) > 1:
        joined = heap[0] + heap[1]
        total += joined
        heap = sorted([joined, *heap[2:]])
    return total


@pytest.mark.parametrize("seed", range(3))
def test_adaptive_huffman_is_near_the_static_code(seed):
    tokens = _text(seed=seed).tolist()
    static, adaptive = Huffman().encode(tokens), AdaptiveHuffman().encode(tokens)
    new = sum(len(delta(token + 1)) for token in set(tokens))
    payload = static.bits - static.header_bits
    assert adaptive.bits - adaptive.header_bits - new <= 2 * payload + len(tokens)  # Vitter 1987
    assert adaptive.bits < 1.1 * static.bits


def test_adaptive_huffman_by_hand():
    """a b a: δ(a + 1); the way to "not yet seen" (1) and δ(b + 1); a, by then a leaf under the root (0 or 1)."""
    encoded = AdaptiveHuffman().encode([0, 1, 0])
    assert encoded.header_bits == len(delta(4)) and encoded.bits - encoded.header_bits == 1 + 1 + 4 + 1


def test_run_length_by_hand():
    tokens = [1, 2] + [5, 6, 7] * 10 + [1]
    encoded = RunLength().encode(tokens)
    items = ((2, 1), (3, 10), (1, 1))  # tokens and repeats of each phrase; 5 symbols at 3 bits
    want = sum(len(delta(length)) + len(delta(repeats)) + 3 * length for length, repeats in items)
    assert encoded.bits - encoded.header_bits == want
    assert RunLength(phrase=2).encode(tokens).bits > encoded.bits


def test_runs_grow_with_the_logarithm():
    sizes = [RunLength().encode([3, 4] * n).bits for n in (10, 100, 1000, 10_000)]
    assert all(0 < b - a < 20 for a, b in itertools.pairwise(sizes))


def test_lzw_by_hand():
    """abababa: a, b, ab, aba; the last is a phrase that the decoder is about to learn."""
    encoded = LZW().encode([0, 1, 0, 1, 0, 1, 0])
    # Dictionaries of 2, 3, 4 and 5 phrases.
    assert encoded.bits - encoded.header_bits == 1 + 2 + 2 + 3
    digits = format(int.from_bytes(encoded.data, "big"), f"0{8 * len(encoded.data)}b")
    assert digits[encoded.header_bits : encoded.bits] == "0" + "01" + "10" + "100"


def test_lzw_learns_what_counts_cannot_tell():
    tokens = list(range(16)) * 200
    assert LZW().encode(tokens).bits < 0.2 * Huffman().encode(tokens).bits


@pytest.mark.parametrize("tokens", ([-1], [0.5], [2**63], [[1, 2]], ["a"], np.array([2**63], np.uint64), [True]))
@pytest.mark.unchecked
@each_codec
def test_tokens_are_checked(codec, tokens):
    with pytest.raises(ValueError, match="tokens: expected"):
        codec.encode(tokens)


@each_codec
def test_a_code_cut_short_is_refused(codec):
    encoded = codec.encode(_text(20))
    for cut in range(1, encoded.bits):
        with pytest.raises(ValueError, match="encoded: "):
            codec.decode(encoded._replace(bits=encoded.bits - cut))


@each_codec
@given(data=st.binary(max_size=12), tokens=st.integers(0, 3))
@settings(max_examples=150, deadline=None)
def test_noise_is_decoded_or_refused(codec, data, tokens):
    noise = Encoded(data, 8 * len(data), 0, tokens)
    try:
        assert codec.decode(noise).ndim == 1
    except ValueError as error:
        assert str(error).startswith("encoded: ")


@pytest.mark.unchecked
def test_settings_are_checked():
    with pytest.raises(ValueError, match="phrase: expected at least 1 token, got 0"):
        RunLength(phrase=0)
