"""Genomes: predict the next base in windows of a DNA sequence.

    data = Config(corpus="ecoli", context=4096).open()

The sequences of a FASTA file, without their headers, are cut 90/5/5 into training, validation and test text by their
place, and windows begin anywhere in a split with equal chance. Every base is a target; the ids of A, C, G and T are 0
to 3. With `both_strands` half the windows are read from the other strand: backward, each base replaced by its partner
(A with T, C with G).

Source: next-base modelling of long sequences, as in Nguyen et al. 2023, HyenaDNA (arXiv 2306.15794); the sequences are
NCBI's reference genomes of E. coli K-12 and of phage lambda. Bits per base are a loss in nats / ln 2.

Chance is 1 / 4. Slices: `strand` (1: as written, -1: the other). `oracle` is None. Units: bases. Errors: ValueError
naming the field or argument, `corpora.CorpusError`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from jaxtyping import Int64
from torch import Tensor

from hmlab import corpora
from hmlab.corpora import SPLITS, Corpus, CorpusError
from hmlab.encodings import CharacterEncoding
from hmlab.layers import check_positive
from hmlab.tasks import Batch
from hmlab.tasks.streams import Streams, corpus_facts

BASES = "ACGT"
SHARES = (90, 5, 5)


@dataclass(frozen=True, kw_only=True)
class Config:
    """corpus: a name of `corpora.catalogue()`, or the path of a FASTA file. batch: windows in a batch. context: bases
    in a window. both_strands: see above."""

    corpus: str = "ecoli"
    batch: int = 16
    context: int = 1024
    both_strands: bool = False

    def __post_init__(self) -> None:
        check_positive(self, "batch", "context")

    @property
    def vocab_size(self) -> int:
        """The bases."""
        return len(BASES)

    @property
    def chance(self) -> float:
        """Share of right answers of who names any base."""
        return 1 / len(BASES)

    def open(self, data: str | Path | None = None) -> GenomesData:
        """Load and encode the sequences; `data` is a folder that is looked into first. Raises `corpora.CorpusError`,
        also for a letter that is no base."""
        corpus = corpora.load(self.corpus, data=data)
        lines = "".join(corpus.splits.values()).splitlines()
        bases = "".join(line.strip().upper() for line in lines if not line.startswith((">", ";")))
        strange = sorted(set(bases) - set(BASES))
        if strange or not bases:
            found = f"also {''.join(strange)}" if strange else "none"
            raise CorpusError(f"corpus {corpus.name!r}: expected bases {BASES}, found {found}")
        return GenomesData(self, corpus, bases)


@dataclass(frozen=True, eq=False)
class GenomesData(Streams):
    """Windows to draw. bases: of all sequences, one after the other."""

    config: Config
    corpus: Corpus
    bases: str

    @cached_property
    def encoding(self) -> CharacterEncoding:
        return CharacterEncoding(BASES)

    @cached_property
    def tokens(self) -> dict[str, Int64[Tensor, "time"]]:
        """The bases of each split as ids."""
        ids = torch.from_numpy(self.encoding.encode(self.bases)).long()
        cuts = [len(ids) * sum(SHARES[:i]) // 100 for i in range(len(SHARES) + 1)]
        return {split: ids[cuts[i] : cuts[i + 1]] for i, split in enumerate(SPLITS)}

    def provenance(self) -> Mapping[str, object]:
        shares = ", ".join(f"{split} {share} %" for split, share in zip(SPLITS, SHARES, strict=True))
        facts = {"division": f"{shares} of the bases", "vocab_size": self.vocab_size}
        tokens = {split: len(bases) for split, bases in self.tokens.items()}
        return {**corpus_facts(self.corpus), **facts, "tokens": tokens}

    def draw(self, split: str, generator: torch.Generator) -> Batch:
        bases, config = self.tokens[split], self.config
        if len(bases) <= config.context:
            raise ValueError(f"context: expected less than the {len(bases)} bases of split {split!r} of corpus "
                             f"{self.corpus.name!r}, got {config.context}")  # fmt: skip
        start = torch.randint(len(bases) - config.context, (config.batch, 1), generator=generator)
        window = bases[start + torch.arange(config.context + 1)]
        strand = torch.ones(config.batch, dtype=torch.int64)
        if config.both_strands:
            strand -= 2 * torch.randint(2, (config.batch,), generator=generator)
            # The partner of base i is base 3 - i: A, C, G, T.
            window = torch.where(strand[:, None] > 0, window, 3 - window.flip(1))
        return Batch(window[:, :-1].contiguous(), window[:, 1:].contiguous(),
                     torch.ones(config.batch, config.context, dtype=torch.bool), slices={"strand": strand})  # fmt: skip
