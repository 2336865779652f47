"""A needle in real text: a pass key is told somewhere in a long text and asked for at its end.

    data = Config(lengths=(1024, 4096), depths=11, corpus="haystack-essays").open()

    … real text … The pass key is 60273. Remember it. 60273 is the pass key. … real text …
    What is the pass key? The pass key is 60273

A batch has one of `lengths`, drawn uniformly, so that a score is over depth x length. The text begins anywhere in its
split. Depth is one of `depths` shares of the text from 0 (at its beginning) to 1 (before the question), uniform; the
needle goes to the nearest word's beginning before that place. The digits are uniform and independent; each is an
answer, and `oracle` holds its place in the first sentence. `streams.whole` says whether all of a key is right.

Sources: the pass key of Mohtashami and Jaggi 2023, Landmark Attention (arXiv 2305.16300), whose text repeats one
sentence; depth x length in real essays: Kamradt 2023, Needle In A Haystack. By characters, so that a model of any size
can be trained for it.

Chance is 1 / 10 for a digit. Slices: `depth` (a share), `length`. Units: characters, which are tokens. Errors:
ValueError naming the field or argument, `corpora.CorpusError`.
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
from hmlab.corpora import Corpus
from hmlab.encodings import CharacterEncoding, characters
from hmlab.layers import check_positive
from hmlab.tasks import Batch
from hmlab.tasks.streams import Streams, corpus_facts

NEEDLE = "\nThe pass key is {key}. Remember it. {key} is the pass key.\n"
QUESTION = "\nWhat is the pass key? The pass key is "
DIGITS = "0123456789"


@dataclass(frozen=True, kw_only=True)
class Config:
    """batch: streams in a batch. lengths: characters of a stream, those that batches draw from. depths: how many there
    are to draw from. digits: of a key. corpus: a name of `corpora.catalogue()` or a path."""

    batch: int = 16
    lengths: tuple[int, ...] = (1024,)
    depths: int = 11
    digits: int = 5
    corpus: str = "python"

    def __post_init__(self) -> None:
        check_positive(self, "batch", "depths", "digits")
        least = len(NEEDLE.format(key="0" * self.digits)) + len(QUESTION) + self.digits
        if not self.lengths or min(self.lengths) < least:
            raise ValueError(f"lengths: expected at least one, none below {least}, got {self.lengths}")

    @property
    def context(self) -> int:
        """Tokens of the longest stream."""
        return max(self.lengths)

    @property
    def chance(self) -> float:
        """Share of right digits of who names any digit."""
        return 1 / len(DIGITS)

    def open(self, data: str | Path | None = None) -> NeedleData:
        """Load and encode the text; `data` is a folder that is looked into first. Raises `corpora.CorpusError`."""
        return NeedleData(self, corpora.load(self.corpus, data=data))


@dataclass(frozen=True, eq=False)
class NeedleData(Streams):
    """Streams to draw, from the text of each split."""

    config: Config
    corpus: Corpus

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(split for split, text in self.corpus.splits.items() if text)

    @cached_property
    def encoding(self) -> CharacterEncoding:
        return characters("".join(self.corpus.splits.values()) + NEEDLE + QUESTION + DIGITS)

    def provenance(self) -> Mapping[str, object]:
        return {**corpus_facts(self.corpus), "vocab_size": self.vocab_size}

    def draw(self, split: str, generator: torch.Generator) -> Batch:
        config, text = self.config, self._texts[split]
        length = config.lengths[int(torch.randint(len(config.lengths), (), generator=generator))]
        level = torch.randint(config.depths, (config.batch,), generator=generator)
        depth = level / max(1, config.depths - 1)
        keys = torch.randint(len(DIGITS), (config.batch, config.digits), generator=generator)
        start = torch.randint(len(text), (config.batch,), generator=generator)
        rows, first = [], []
        for key, share, begin in zip(keys.tolist(), depth.tolist(), start.tolist(), strict=True):
            written = "".join(DIGITS[digit] for digit in key)
            needle = self._encoded(NEEDLE.format(key=written))
            question = self._encoded(QUESTION + written)
            room = length + 1 - len(needle) - len(question)
            hay = text[(begin + torch.arange(room)) % len(text)]
            place = self._word(hay, round(share * room))
            rows.append(torch.cat((hay[:place], needle, hay[place:], question)))
            first.append(place + NEEDLE.index("{key}"))
        stream = torch.stack(rows)
        mask = torch.zeros(config.batch, length, dtype=torch.bool)
        mask[:, -config.digits :] = True
        oracle = torch.full(mask.shape, -1)
        oracle[:, -config.digits :] = torch.tensor(first)[:, None] + torch.arange(config.digits)
        return Batch(stream[:, :-1].contiguous(), stream[:, 1:].contiguous(), mask, oracle=oracle,
                     slices={"depth": depth, "length": torch.full_like(level, length)})  # fmt: skip

    @cached_property
    def _texts(self) -> dict[str, Int64[Tensor, "time"]]:
        return {split: self._encoded(self.corpus.splits[split]) for split in self.splits}

    @cached_property
    def _blanks(self) -> Int64[Tensor, "blanks"]:
        return self._encoded(" \n")

    def _encoded(self, text: str) -> Int64[Tensor, "{len(text)}"]:
        return torch.from_numpy(self.encoding.encode(text)).long()

    def _word(self, text: Int64[Tensor, "time"], place: int) -> int:
        """The last place up to `place` that follows a blank; `place` where it or the end is one, or there is none."""
        if place == len(text):
            return place
        after = torch.isin(text[:place], self._blanks).nonzero()
        return int(after[-1]) + 1 if len(after) else place
