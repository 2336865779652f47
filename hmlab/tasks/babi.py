"""bAbI in books: the facts of a short story are hidden among the sentences of a book, then one question is asked.

    data = Config(task=2, context=4096, books="gutenberg-books").open()

    … sentences of a book … Mary got the milk. … sentences … John moved to the bedroom. … sentences …
    Question: Where is the milk?
    Answer: bathroom

A row is one question with all facts that its story tells before it, in their order, each at a uniformly drawn end of a
sentence of a stretch of the book that fills the stream up to `context`. Task 1 is answered by one fact, 2 by two, 3 by
three. The characters of the answer are what is asked; `oracle` holds their places in the supporting fact that says the
word; `support` adds the first character of each other supporting fact. Questions whose facts do not fit are left out.

Splits: of tasks 1 and 2, the last tenth of the training stories is for validation; task 3 has validation stories of its
own, of which those that are training stories as well are left out. The book text is that of the same split.

Sources: Weston et al. 2015, Towards AI-Complete Question Answering (tasks 1 to 3); the facts in books: Kuratov et al.
2024, BABILong (arXiv 2406.10149), there PG-19 and tokens of a language model, here other books and characters, so
figures are not comparable.

Chance is 1 / 6 for a word (there are six places; `streams.whole` scores words). Slices: `facts`, `distance` (characters
from the answer's place in its fact to the end). Errors: ValueError naming the field or argument, `corpora.CorpusError`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from hmlab import corpora
from hmlab.corpora import Corpus, CorpusError
from hmlab.encodings import CharacterEncoding, characters
from hmlab.layers import check_positive
from hmlab.tasks import Batch
from hmlab.tasks.streams import Stream, Streams, corpus_facts, pack

SENTENCE_END = re.compile(r"[.!?][\"'”’)]*\s+")
WORD = r"\b{}\b"
LINE = re.compile(r"(\d+) (.*)")
ASK = "\nQuestion: {}\nAnswer: "
PLACES = 6
# Stories of tasks 1 and 2 that are for validation: one in so many.
VALID_SHARE = 10


class Question(NamedTuple):
    """facts: sentences told before. support: which of them the answer depends on, first the one that says it."""

    facts: tuple[str, ...]
    question: str
    answer: str
    support: tuple[int, ...]

    @property
    def length(self) -> int:
        """Characters without those of the book."""
        return sum(len(fact) + 1 for fact in self.facts) + len(ASK.format(self.question)) + len(self.answer)


@dataclass(frozen=True, kw_only=True)
class Config:
    """task: 1, 2 or 3. batch: questions in a batch. context: characters of a stream. books: a name of
    `corpora.catalogue()`, or a path, of the text to hide the facts in."""

    task: Literal[1, 2, 3] = 1
    batch: int = 16
    context: int = 4096
    books: str = "gutenberg-books"

    def __post_init__(self) -> None:
        if self.task not in (1, 2, 3):
            raise ValueError(f"task: expected 1, 2 or 3, got {self.task}")
        check_positive(self, "batch", "context")

    @property
    def chance(self) -> float:
        """Share of right words of who names any place."""
        return 1 / PLACES

    def open(self, data: str | Path | None = None) -> BabiData:
        """Load stories and books; `data` is a folder that is looked into first. Raises `corpora.CorpusError`."""
        corpus = corpora.load(f"babi-qa{self.task}", data=data)
        told = {split: stories(text) for split, text in corpus.splits.items() if text}
        if "valid" not in told:
            cut = len(told["train"]) - len(told["train"]) // VALID_SHARE
            told["train"], told["valid"] = told["train"][:cut], told["train"][cut:]
        told["valid"] = [story for story in told["valid"] if story not in told["train"]]
        questions = {split: [question for story in told[split] for question in story] for split in corpora.SPLITS}
        least = 1 + min(question.length for found in questions.values() for question in found)
        if self.context < least:
            raise ValueError(f"context: expected at least {least}, the shortest question of task {self.task}, "
                             f"got {self.context}")  # fmt: skip
        questions = {split: [question for question in found if question.length < self.context]
                     for split, found in questions.items()}  # fmt: skip
        return BabiData(self, corpus, corpora.load(self.books, data=data), questions)


def stories(text: str) -> list[list[Question]]:
    """The stories of a file of bAbI, each its questions. Raises `corpora.CorpusError`."""
    found: list[list[Question]] = []
    for number, line in enumerate(text.splitlines(), 1):
        match = LINE.fullmatch(line)
        if not match:
            raise CorpusError(f"babi: expected a number and a sentence in line {number}, found {line!r}")
        if match[1] == "1":
            found.append([])
            facts: dict[int, str] = {}
        asked, *rest = match[2].split("\t")
        if not rest:
            facts[int(match[1])] = asked.strip()
            continue
        answer, support = rest[0], [list(facts).index(int(n)) for n in rest[1].split()]
        told = tuple(facts.values())
        # The last of them that says the word first.
        word = re.compile(WORD.format(answer))
        says = [i for i in support if word.search(told[i])]
        if not says:
            raise CorpusError(f"babi: expected a supporting fact with {answer!r} in line {number}, found none")
        order = (says[-1], *(i for i in support if i != says[-1]))
        found[-1].append(Question(told, asked.strip(), answer, order))
    return found


@dataclass(frozen=True, eq=False)
class BabiData(Streams):
    """Questions to draw, by split, and the books to hide their facts in."""

    config: Config
    corpus: Corpus
    books: Corpus
    questions: Mapping[str, list[Question]]

    @property
    def splits(self) -> tuple[str, ...]:
        """Those with questions that fit and book text to fill a stream."""
        texts = self.books.splits
        return tuple(s for s in corpora.SPLITS if self.questions[s] and len(texts.get(s, "")) > self.config.context)

    @cached_property
    def encoding(self) -> CharacterEncoding:
        return characters("".join((*self.corpus.splits.values(), *self.books.splits.values(), ASK)))

    def provenance(self) -> Mapping[str, object]:
        questions = {split: len(found) for split, found in self.questions.items()}
        return {**corpus_facts(self.corpus), "books": corpus_facts(self.books), "vocab_size": self.vocab_size,
                "questions": questions}  # fmt: skip

    def draw(self, split: str, generator: torch.Generator) -> Batch:
        def below(count: int, size: int) -> list[int]:
            return torch.randint(count, (size,), generator=generator).tolist()

        asked = [self.questions[split][i] for i in below(len(self.questions[split]), self.config.batch)]
        ends, book, streams = self._ends[split], self.books.splits[split], []
        for question in asked:
            room = self.config.context + 1 - question.length
            # Stretches begin where a sentence does, if they then end before the book.
            start = ends[below(max(1, int(torch.searchsorted(ends, len(book) - room, right=True))), 1)[0]].item()
            first, after = torch.searchsorted(ends, torch.tensor([start, start + room]), right=True).tolist()
            inside = [start, *ends[first:after].tolist()]
            cuts = [inside[i] for i in sorted(below(len(inside), len(question.facts)))]
            streams.append(self._written(question, book, [start, *cuts, start + room]))
        return pack(streams, self.config.context)

    def _written(self, question: Question, book: str, cuts: list[int]) -> Stream:
        """The question's facts at the inner ones of the cuts of a book."""
        parts, places, length = [], [], 0
        for (start, end), fact in zip(pairwise(cuts), (*question.facts, None), strict=True):
            places.append(length + end - start)
            parts += [book[start:end]] if fact is None else [book[start:end], fact, " "]
            length = sum(map(len, parts))
        text = "".join((*parts, ASK.format(question.question)))
        fact = question.support[0]
        said = places[fact] + re.search(WORD.format(question.answer), question.facts[fact]).start()
        stream = Stream(labels={"facts": len(question.facts), "distance": len(text) - said})
        stream.say(*self.encoding.encode(text).tolist())
        for i, character in enumerate(self.encoding.encode(question.answer).tolist()):
            stream.ask(character, said + i, *(places[at] for at in question.support[1:]))
        return stream

    @cached_property
    def _ends(self) -> Mapping[str, torch.Tensor]:
        """Where sentences of each split's books begin."""
        return {split: torch.tensor([0, *(found.end() for found in SENTENCE_END.finditer(text))])
                for split, text in self.books.splits.items()}  # fmt: skip
