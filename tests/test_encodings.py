"""Encodings: exact round trips, refusals that say what and where, and the same encoding every time."""

import functools
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hmlab import corpora, encodings
from hmlab.encodings import BPEEncoding, ByteEncoding, CharacterEncoding, EncodingError

WORDS = "the cat sat on the mat, the dog sat on the log; isn't it?\n" * 20 + "naïve café 12 345\n\n"
SIZE = 285
pieces = ["the", " cat", " ", "  ", "\n", "\t", "\u2003", "\x1c", "isn't", ",", "?!", "12", "é", "🐍"]
texts = st.text() | st.lists(st.sampled_from(pieces)).map("".join)


@functools.cache
def trained() -> BPEEncoding:
    return encodings.bpe(WORDS, SIZE)


@settings(deadline=None)
@given(texts)
def test_bytes_and_bpe_give_every_text_back(text):
    for encoding in (ByteEncoding(), trained()):
        ids = encoding.encode(text)
        assert ids.dtype == np.int32 and ids.ndim == 1
        assert encoding.decode(ids) == text
        assert ids.size == 0 or (ids.min() >= 0 and ids.max() < encoding.vocab_size)


@settings(deadline=None)
@given(st.text(min_size=1), st.data())
def test_characters_give_every_text_of_their_alphabet_back(text, data):
    encoding = encodings.characters(text)
    other = data.draw(st.text(alphabet=sorted(set(text))))
    assert encoding.vocab_size == len(set(text))
    assert encoding.decode(encoding.encode(other)) == other
    assert encoding.encode(other).tolist() == [sorted(set(text)).index(character) for character in other]


@settings(deadline=None)
@given(texts.filter(bool))
def test_json_gives_the_same_encoding_back(text):
    for encoding in (encodings.characters(text), ByteEncoding(), trained()):
        again = encodings.from_json(encoding.to_json())
        assert again == encoding
        assert np.array_equal(again.encode(text), encoding.encode(text))


@settings(deadline=None)
@given(texts, st.integers(0, 9))
def test_bpe_of_pieces_is_bpe_of_the_whole(text, size):
    whole = trained().encode(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encodings, "PIECE", size)
        assert np.array_equal(trained().encode(text), whole)


def test_a_long_text_is_encoded_in_pieces():
    text = WORDS * 200
    parts = list(encodings._pieces(text))
    assert "".join(parts) == text
    assert len(parts) > 2 and max(map(len, parts)) < encodings.PIECE + 100


def test_characters_name_the_one_they_do_not_know():
    encoding = encodings.characters("abc")
    with pytest.raises(EncodingError, match=r"3 characters.*found 'é' \(U\+00E9\) at position 2"):
        encoding.encode("abéz")


def test_a_half_surrogate_pair_is_named():
    for encoding in (ByteEncoding(), trained()):
        with pytest.raises(EncodingError, match=r"U\+D800\) at position 3"):
            encoding.encode("abc\ud800")


def test_ids_outside_the_vocabulary_are_named():
    for encoding in (encodings.characters("abc"), ByteEncoding(), trained()):
        size = encoding.vocab_size
        assert encoding.decode([]) == ""
        for strange in (-1, size):
            with pytest.raises(EncodingError, match=rf"expected 0 to {size - 1}, got {strange} at position 1"):
                encoding.decode([0, strange])
        with pytest.raises(EncodingError, match=r"expected integers \[time\], got float64"):
            encoding.decode(np.array([0.5]))
        with pytest.raises(EncodingError, match=r"expected integers \[time\], got int64 \[1, 2\]"):
            encoding.decode(np.zeros((1, 2), np.int64))


def test_samples_that_are_not_utf8_are_decoded_all_the_same():
    half = ByteEncoding().encode("é")[:1]
    assert ByteEncoding().decode(half) == "\ufffd"
    assert "\ufffd" in trained().decode(trained().encode("🐍")[:1])


def test_bpe_merges_what_is_frequent():
    encoding = trained()
    assert encoding.vocab_size == SIZE
    assert len(encoding.encode(" the")) == 1
    assert len(encoding.encode(WORDS)) < len(WORDS.encode()) / 2


def test_bpe_is_the_same_in_every_process():
    command = f"from hmlab import encodings; print(encodings.bpe({WORDS!r}, {SIZE}).to_json())"
    environment = {
        **os.environ,
        "PYTHONHASHSEED": "7",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    again = subprocess.run([sys.executable, "-c", command], env=environment, capture_output=True, text=True)
    assert again.stdout.rstrip("\n") == trained().to_json(), again.stderr


def test_a_text_too_short_for_the_vocabulary_is_refused():
    with pytest.raises(EncodingError, match=r"vocab_size: expected at most 258 .*got 1000"):
        encodings.bpe("aaaa", 1000)


def test_build_makes_each_kind():
    assert isinstance(encodings.build("character", WORDS), CharacterEncoding)
    assert isinstance(encodings.build("byte", WORDS, 256), ByteEncoding)
    assert encodings.build("bpe", WORDS, SIZE) == trained()


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("kind", "size", "message"),
    [
        ("word", None, "kind: expected 'character', 'byte' or 'bpe', got 'word'"),
        ("byte", 257, "vocab_size: expected None or 256 for 'byte'"),
        ("character", 3, "vocab_size: expected None or"),
        ("bpe", None, "vocab_size: expected more than 256 .*got None"),
        ("bpe", 256, "vocab_size: expected more than 256 .*got 256"),
    ],
)
def test_build_refuses_what_no_encoding_is(kind, size, message):
    with pytest.raises(EncodingError, match=message):
        encodings.build(kind, WORDS, size)


def test_an_alphabet_is_distinct_and_in_order():
    for alphabet in ("", "ba", "aa"):
        with pytest.raises(EncodingError, match="alphabet: expected distinct characters"):
            CharacterEncoding(alphabet)


@pytest.mark.parametrize("text", ['{"kind": "word"}', "[]", '{"kind": "character"}'])
def test_what_to_json_did_not_write_is_refused(text):
    with pytest.raises(EncodingError, match="expected what an encoding's to_json wrote"):
        encodings.from_json(text)


@pytest.mark.skipif(not os.environ.get("HMLAB_DATA"), reason="HMLAB_DATA is not set: no Tiny Shakespeare here")
def test_tiny_shakespeare_has_65_characters():
    text = "".join(corpora.load("tinyshakespeare").splits.values())
    encoding = encodings.characters(text)
    assert encoding.vocab_size == 65
    assert encoding.decode(encoding.encode(text)) == text
