"""An encoding of hmlab as a tokenizer of transformers: the same ids, and the same text back.

    tokenizer = as_tokenizer(pretrained.load("logmem-32").encoding)
    tokenizer("To be")["input_ids"]   tokenizer.save_pretrained(folder)   AutoTokenizer.from_pretrained(folder)

Characters are words of one character, any other one is an error as it is in the encoding; bytes are GPT-2's alphabet
of 256 characters without merges; byte-pair encodings are what they were, from the library `tokenizers`.
There are no special tokens, and so no padding: `tokenizer.add_special_tokens({"pad_token": "<pad>"})`, then
`model.resize_token_embeddings(len(tokenizer))`. Prompts are padded on the left, as `generate()` has it.
Errors: `ValueError` for an encoding of another kind, or whose alphabet holds half a surrogate pair.
"""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hmlab.encodings import BPEEncoding, ByteEncoding, CharacterEncoding, Encoding


def as_tokenizer(encoding: Encoding) -> PreTrainedTokenizerFast:
    """The tokenizer whose ids are the encoding's."""
    match encoding:
        case CharacterEncoding():
            tokenizer = _characters(encoding.alphabet)
        case ByteEncoding():
            tokenizer = _bytes()
        case BPEEncoding():
            tokenizer = Tokenizer.from_str(encoding.model)
        case _:
            raise ValueError(f"encoding: expected characters, bytes or byte pairs, got {type(encoding).__name__}")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", clean_up_tokenization_spaces=False)


def _characters(alphabet: str) -> Tokenizer:
    strange = [character for character in alphabet if "\ud800" <= character <= "\udfff"]
    if strange:
        raise ValueError(f"encoding: expected characters, got half a surrogate pair (U+{ord(strange[0]):04X})")
    tokenizer = Tokenizer(models.WordLevel({character: number for number, character in enumerate(alphabet)}))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def _bytes() -> Tokenizer:
    # GPT-2's characters for the bytes: those that can be seen stand for themselves, the others for 256 and on.
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in seen]
    vocabulary = {chr(byte): byte for byte in seen} | {chr(256 + n): byte for n, byte in enumerate(hidden)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
