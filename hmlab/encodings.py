"""Text to token ids and back: characters, bytes, or byte-pair encoding (BPE).

    encoding = build("character", text)
    ids = encoding.encode("To be")              # int32 [time]
    encoding.decode(ids)                        # "To be"

`decode(encode(text)) == text` for every text that can be encoded. Ids run from 0 to `vocab_size` - 1; there
are no special tokens. `to_json` and `from_json` carry an encoding into a checkpoint and back.
"""

import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32

Kind = Literal["character", "byte", "bpe"]
Ids = Sequence[int] | np.ndarray
PIECE = 1 << 16
_WORD_END = re.compile(r"\S(?=[ \n])")


class EncodingError(ValueError):
    """A text or an id that an encoding cannot take, or an encoding that cannot be built."""


@runtime_checkable
class Encoding(Protocol):
    """What models and views use of an encoding."""

    @property
    def vocab_size(self) -> int:
        """Number of ids."""

    def encode(self, text: str) -> Int32[np.ndarray, "time"]:
        """The text's ids. Raises `EncodingError`."""

    def decode(self, ids: Ids) -> str:
        """The text of these ids, which may be any (a model's samples). Raises `EncodingError`."""

    def to_json(self) -> str:
        """All that `from_json` needs to build the same encoding."""


@dataclass(frozen=True)
class CharacterEncoding:
    """One id for each character of an alphabet, in the order of the code points."""

    alphabet: str

    def __post_init__(self) -> None:
        if not self.alphabet or self.alphabet != "".join(sorted(set(self.alphabet))):
            raise EncodingError("alphabet: expected distinct characters in the order of their code points")

    @property
    def vocab_size(self) -> int:
        return len(self.alphabet)

    @cached_property
    def _ids(self) -> np.ndarray:
        """Id of every code point, -1 where it is not in the alphabet."""
        ids = np.full(sys.maxunicode + 1, -1, np.int32)
        ids[_code_points(self.alphabet)] = np.arange(self.vocab_size)
        return ids

    def encode(self, text: str) -> Int32[np.ndarray, "time"]:
        ids = self._ids[_code_points(text)]
        strange = np.flatnonzero(ids < 0)
        if strange.size:
            character = text[strange[0]]
            raise EncodingError(
                f"text: expected the {self.vocab_size} characters of this encoding, found {character!r} "
                f"(U+{ord(character):04X}) at position {strange[0]}"
            )
        return ids

    def decode(self, ids: Ids) -> str:
        points = _code_points(self.alphabet)[_checked(ids, self.vocab_size)]
        return points.tobytes().decode("utf-32-le", "surrogatepass")

    def to_json(self) -> str:
        return json.dumps({"kind": "character", "alphabet": self.alphabet})


@dataclass(frozen=True)
class ByteEncoding:
    """The bytes of the text as UTF-8. Bytes that are not UTF-8 (samples may be) are decoded to U+FFFD."""

    vocab_size = 256

    def encode(self, text: str) -> Int32[np.ndarray, "time"]:
        return np.frombuffer(_utf8(text), np.uint8).astype(np.int32)

    def decode(self, ids: Ids) -> str:
        return _checked(ids, self.vocab_size).astype(np.uint8).tobytes().decode("utf-8", "replace")

    def to_json(self) -> str:
        return json.dumps({"kind": "byte"})


@dataclass(frozen=True)
class BPEEncoding:
    """Byte-level byte-pair encoding (GPT-2's kind) by the `tokenizers` library.

    `model` is the tokenizer as that library writes it (JSON). All 256 bytes are in the vocabulary, so any
    text can be encoded; incomplete UTF-8 (samples may be) is decoded to U+FFFD.
    """

    model: str

    @cached_property
    def _tokenizer(self):
        return _tokenizers().Tokenizer.from_str(self.model)

    @cached_property
    def vocab_size(self) -> int:
        return self._tokenizer.get_vocab_size()

    def encode(self, text: str) -> Int32[np.ndarray, "time"]:
        _utf8(text)
        pieces = (self._tokenizer.encode(piece, add_special_tokens=False).ids for piece in _pieces(text))
        return np.concatenate([np.zeros(0, np.int32), *(np.array(ids, np.int32) for ids in pieces)])

    def decode(self, ids: Ids) -> str:
        return self._tokenizer.decode(_checked(ids, self.vocab_size).tolist(), skip_special_tokens=False)

    def to_json(self) -> str:
        return json.dumps({"kind": "bpe", "model": self.model})


def build(kind: Kind, text: str, vocab_size: int | None = None) -> Encoding:
    """The encoding of that kind for `text`: its characters, or BPE trained on it.

    vocab_size: for `bpe` the number of tokens, 257 at least; fixed by the text for `character` and 256 for
    `byte`, where it must be None or agree. Raises `EncodingError`.
    """
    if kind == "bpe":
        return bpe(text, vocab_size)
    if kind not in ("character", "byte"):
        raise EncodingError(f"kind: expected 'character', 'byte' or 'bpe', got {kind!r}")
    encoding = characters(text) if kind == "character" else ByteEncoding()
    if vocab_size not in (None, encoding.vocab_size):
        raise EncodingError(
            f"vocab_size: expected None or {encoding.vocab_size} for {kind!r} on this text, got {vocab_size}"
        )
    return encoding


def characters(text: str) -> CharacterEncoding:
    """The encoding whose alphabet is the characters of `text`."""
    return CharacterEncoding("".join(sorted(set(text))))


def bpe(text: str, vocab_size: int | None) -> BPEEncoding:
    """BPE with `vocab_size` tokens trained on `text`: the same text and size give the same encoding."""
    if not isinstance(vocab_size, int) or vocab_size <= 256:
        raise EncodingError(f"vocab_size: expected more than 256 (the bytes) for 'bpe', got {vocab_size}")
    _utf8(text)
    library = _tokenizers()
    level = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = level
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=level.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(_pieces(text), trainer)
    if tokenizer.get_vocab_size() < vocab_size:
        raise EncodingError(
            f"vocab_size: expected at most {tokenizer.get_vocab_size()} for 'bpe' on so short a text, got {vocab_size}"
        )
    return BPEEncoding(tokenizer.to_str())


def from_json(text: str) -> Encoding:
    """The encoding that `to_json` wrote. Raises `EncodingError`."""
    match json.loads(text):
        case {"kind": "character", "alphabet": str(alphabet)}:
            return CharacterEncoding(alphabet)
        case {"kind": "byte"}:
            return ByteEncoding()
        case {"kind": "bpe", "model": str(model)}:
            return BPEEncoding(model)
        case other:
            raise EncodingError(f"text: expected what an encoding's to_json wrote, got {str(other)[:80]!r}")


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


def _checked(ids: Ids, vocab_size: int) -> np.ndarray:
    checked = np.asarray(ids)
    if checked.size == 0:
        return np.zeros(0, np.int64)
    if checked.ndim != 1 or checked.dtype.kind not in "iu":
        raise EncodingError(f"ids: expected integers [time], got {checked.dtype} {list(checked.shape)}")
    strange = np.flatnonzero((checked < 0) | (checked >= vocab_size))
    if strange.size:
        raise EncodingError(f"ids: expected 0 to {vocab_size - 1}, got {checked[strange[0]]} at position {strange[0]}")
    return checked


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise EncodingError(
            f"text: expected characters, found half a surrogate pair (U+{ord(text[error.start]):04X}) at "
            f"position {error.start}"
        ) from error


def _pieces(text: str) -> Iterator[str]:
    """The text in pieces whose encodings join to that of the whole, so that a long text needs little memory.

    A blank or newline after a visible character always begins a new word of the byte-level splitter, which
    never looks back; pieces are cut there.
    """
    start = 0
    while start < len(text):
        word_end = _WORD_END.search(text, start + PIECE)
        end = word_end.end() if word_end else len(text)
        yield text[start:end]
        start = end


def _tokenizers():
    try:
        import tokenizers
    except ImportError as error:
        raise EncodingError(
            "kind: 'bpe' needs the library tokenizers, which is not installed; pip install 'hmlab[text]'"
        ) from error
    return tokenizers
