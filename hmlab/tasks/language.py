"""Language modelling: predict the next token in windows of real text.

    data = Config(corpus="tinyshakespeare", batch=16, context=512).open()
    for batch in data.batches("train", torch.Generator().manual_seed(0)): ...

A window of `context` + 1 tokens gives `context` tokens and, one further, their targets; every target counts.
Windows begin anywhere in a split with equal chance, as in the LMN paper (arXiv 2501.07905), whose evaluation
(means over random windows) `evaluation_batches` follows with windows that a seed fixes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Int32, Int64
from torch import Tensor

from hmlab import corpora, encodings
from hmlab.corpora import Corpus
from hmlab.encodings import Encoding
from hmlab.tasks import Batch


@dataclass(frozen=True, kw_only=True)
class Config:
    """Which text, encoded how, in windows of which size.

    corpus: a name of `corpora.catalogue()`, or the path of a text file or folder. encoding: the alphabet of
    `character` is that of all splits; `bpe` is trained on the training text. vocab_size: tokens of `bpe`;
    None for the others. batch: windows in a batch. context: tokens in a window.
    """

    corpus: str = "python"
    encoding: encodings.Kind = "character"
    vocab_size: int | None = None
    batch: int = 16
    context: int = 512

    def __post_init__(self) -> None:
        for name in ("batch", "context"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected 1 or more, got {getattr(self, name)}")

    def open(self, data: str | Path | None = None) -> LanguageData:
        """Load and encode the corpus; `data` is a folder that is looked into first.

        Raises `corpora.CorpusError` and `encodings.EncodingError`.
        """
        corpus = corpora.load(self.corpus, data=data)
        text = corpus.splits["train"] if self.encoding == "bpe" else "".join(corpus.splits.values())
        encoding = encodings.build(self.encoding, text, self.vocab_size)
        tokens = {split: torch.from_numpy(encoding.encode(text)) for split, text in corpus.splits.items()}
        return LanguageData(config=self, corpus=corpus, encoding=encoding, tokens=tokens)


class Units(NamedTuple):
    """How much text a token stands for, on average.

    A loss in nats per token is loss / ln 2 / `characters` bits per character, likewise with `bytes` (UTF-8).
    """

    characters: float
    bytes: float


@dataclass(frozen=True, kw_only=True, eq=False)
class LanguageData:
    """A corpus as token ids: `tokens` holds those of each split."""

    config: Config
    corpus: Corpus
    encoding: Encoding
    tokens: dict[str, Int32[Tensor, "time"]]

    @property
    def vocab_size(self) -> int:
        """Number of ids of the encoding."""
        return self.encoding.vocab_size

    def batches(self, split: str, generator: torch.Generator) -> Iterator[Batch]:
        """Random windows without end.

        A batch depends on nothing but the state of `generator` (on the CPU) when it is asked for: put that
        state back, and the same batches follow. Raises `ValueError` for a split that is not there or is
        shorter than a window.
        """
        tokens = self._split(split)
        if len(tokens) <= self.config.context:
            raise ValueError(
                f"context: expected less than the {len(tokens)} tokens of split {split!r} of corpus "
                f"{self.corpus.name!r}, got {self.config.context}"
            )
        return _windows(tokens, self.config.batch, self.config.context, generator)

    def evaluation_batches(self, split: str, count: int, seed: int) -> Iterator[Batch]:
        """`count` batches of random windows, always the same for a seed."""
        return islice(self.batches(split, torch.Generator().manual_seed(seed)), count)

    def units_per_token(self, split: str) -> Units:
        """Characters and bytes for each token of a split, over the whole split."""
        tokens, text = len(self._split(split)), self.corpus.splits[split]
        if not tokens:
            raise ValueError(f"split: expected one with text in corpus {self.corpus.name!r}, got {split!r}")
        return Units(characters=len(text) / tokens, bytes=len(text.encode()) / tokens)

    def provenance(self) -> dict:
        """What text this is, for a run's record. It names no place on this machine."""
        return {
            "corpus": self.corpus.name,
            "sha256": self.corpus.sha256,
            "licence": self.corpus.licence,
            "source": self.corpus.source,
            "division": self.corpus.division,
            "encoding": self.config.encoding,
            "encoding_sha256": hashlib.sha256(self.encoding.to_json().encode()).hexdigest(),
            "vocab_size": self.vocab_size,
            "tokens": {split: len(tokens) for split, tokens in self.tokens.items()},
        }

    def _split(self, split: str) -> Int32[Tensor, "time"]:
        if split not in self.tokens:
            raise ValueError(
                f"split: expected {' or '.join(self.tokens)} for corpus {self.corpus.name!r}, got {split!r}"
            )
        return self.tokens[split]


def _windows(tokens: Int32[Tensor, "time"], batch: int, context: int, generator: torch.Generator) -> Iterator[Batch]:
    every = tokens.unfold(0, context + 1, 1)
    while True:
        starts: Int64[Tensor, "batch"] = torch.randint(len(every), (batch,), generator=generator)
        window = every[starts].long()
        yield Batch(
            tokens=window[:, :-1].contiguous(),
            targets=window[:, 1:].contiguous(),
            mask=torch.ones(batch, context, dtype=torch.bool),
        )
