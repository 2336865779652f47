"""PubMedQA: does the abstract of a medical paper answer its title's question with yes, no or maybe?

    data = Config(context=4096).open()
    score({record.id: guess(prompt(record)) for record in data.records["test"]}, data.truth)

A row is a prompt and its answer, by characters:

    Context: the abstract without its conclusion
    Question: the title
    Answer: yes

The answer's characters are what is asked; its first one tells the three apart. Of an abstract that does not fit, the
beginning is left out. Rows are padded. The test set are the 500 papers of the official list; of the other 500, every
tenth, in the order of the papers' numbers, is for validation and the rest for training (the authors have ten folds
instead). The question, the abstract and nothing else is shown ("reasoning-required").

Source: Jin et al. 2019, PubMedQA (arXiv 1909.06146); measures are theirs, accuracy and macro-F1. Of the test papers
276 are yes, 169 no, 55 maybe: who always says yes has an accuracy of 0.552.

Chance is 1 / 3 of the three words. Slices: `answer` (0 yes, 1 no, 2 maybe), `length` (characters of the whole prompt).
`oracle` is None: nobody marked where the answer stands. Errors: ValueError naming the field or argument,
`corpora.CorpusError`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch

from hmlab import corpora
from hmlab.corpora import Corpus, CorpusError
from hmlab.encodings import CharacterEncoding, characters
from hmlab.layers import check_positive
from hmlab.tasks import Batch
from hmlab.tasks.streams import Streams, corpus_facts

ANSWERS = ("yes", "no", "maybe")
START, REST = "Context: ", "\nQuestion: {}\nAnswer: "
# Papers outside the test set that are for validation: one in so many.
VALID_SHARE = 10


class Record(NamedTuple):
    """One paper. id: its number in PubMed. conclusion: the long answer, which is not shown."""

    id: str
    question: str
    abstract: str
    conclusion: str
    answer: str


def prompt(record: Record, longest: int | None = None) -> str:
    """What a model reads before the answer: `longest` characters at most, by leaving out the abstract's beginning.

    Raises ValueError where not even the question fits.
    """
    rest = REST.format(record.question)
    room = len(record.abstract) if longest is None else longest - len(START) - len(rest)
    if room < 0:
        raise ValueError(f"longest: expected at least {len(START) + len(rest)} for paper {record.id}, got {longest}")
    return START + record.abstract[max(0, len(record.abstract) - room) :] + rest


def score(answers: Mapping[str, str], truth: Mapping[str, str]) -> dict[str, float]:
    """`accuracy`, and `macro_f1`: the mean over the three answers of 2 right / (given + true).

    answers, truth: the answer by the paper's number. Raises ValueError for papers without an answer or without truth,
    and for what is not one of the three.
    """
    if answers.keys() != truth.keys() or not truth:
        raise ValueError(f"answers: expected those of the {len(truth)} papers, "
                         f"got {len(answers.keys() & truth.keys())} of them and {len(answers.keys() - truth.keys())} "
                         "of others")  # fmt: skip
    strange = {*answers.values(), *truth.values()}.difference(ANSWERS)
    if strange:
        raise ValueError(f"answers: expected {' or '.join(ANSWERS)}, got {min(strange)!r}")
    right = [answers[paper] for paper, answer in truth.items() if answers[paper] == answer]
    given, true = list(answers.values()), list(truth.values())
    counts = {a: given.count(a) + true.count(a) for a in ANSWERS}
    f1 = [2 * right.count(a) / counts[a] if counts[a] else 0.0 for a in ANSWERS]
    return {"accuracy": len(right) / len(truth), "macro_f1": sum(f1) / len(ANSWERS)}


@dataclass(frozen=True, kw_only=True)
class Config:
    """batch: papers in a batch. context: characters of a stream."""

    batch: int = 16
    context: int = 4096

    def __post_init__(self) -> None:
        check_positive(self, "batch", "context")

    @property
    def chance(self) -> float:
        """Share of right words of who names any of the three."""
        return 1 / len(ANSWERS)

    def open(self, data: str | Path | None = None) -> PubMedQaData:
        """Load the papers; `data` is a folder that is looked into first. Raises `corpora.CorpusError`."""
        corpus = corpora.load("pubmedqa", data=data)
        told, truth = (json.loads(corpus.splits[split]) for split in ("train", "test"))
        papers = {number: Record(number, paper["QUESTION"], "\n".join(paper["CONTEXTS"]), paper["LONG_ANSWER"],
                                 paper["final_decision"]) for number, paper in told.items()}  # fmt: skip
        if any(number not in papers or papers[number].answer != answer for number, answer in truth.items()):
            raise CorpusError("corpus 'pubmedqa': expected the test labels to be those of the papers, found others")
        others = [papers[number] for number in sorted(papers.keys() - truth.keys(), key=int)]
        records = {"train": [r for i, r in enumerate(others) if i % VALID_SHARE], "valid": others[::VALID_SHARE],
                   "test": [papers[number] for number in truth]}  # fmt: skip
        for record in papers.values():
            prompt(record, self.context - max(map(len, ANSWERS)) + 1)
        return PubMedQaData(self, corpus, records)


@dataclass(frozen=True, eq=False)
class PubMedQaData(Streams):
    """Papers to draw, by split."""

    config: Config
    corpus: Corpus
    records: Mapping[str, list[Record]]

    @property
    def truth(self) -> dict[str, str]:
        """The answers of the official test, by the paper's number."""
        return {record.id: record.answer for record in self.records["test"]}

    @cached_property
    def encoding(self) -> CharacterEncoding:
        papers = [record for records in self.records.values() for record in records]
        return characters("".join((*(prompt(record) for record in papers), *ANSWERS)))

    def provenance(self) -> Mapping[str, object]:
        papers = {split: len(records) for split, records in self.records.items()}
        return {**corpus_facts(self.corpus), "division": "the official test; one in ten of the others for validation",
                "papers": papers, "vocab_size": self.vocab_size}  # fmt: skip

    def draw(self, split: str, generator: torch.Generator) -> Batch:
        records = self.records[split]
        chosen = torch.randint(len(records), (self.config.batch,), generator=generator).tolist()
        return self.batch([records[i] for i in chosen])

    def batch(self, records: list[Record]) -> Batch:
        """These papers as rows, for those who score a split paper by paper."""
        tokens = torch.zeros(len(records), self.config.context + 1, dtype=torch.int64)
        mask = torch.zeros(len(records), self.config.context, dtype=torch.bool)
        valid = mask.clone()
        for row, record in enumerate(records):
            shown = prompt(record, self.config.context + 1 - len(record.answer))
            ids = torch.from_numpy(self.encoding.encode(shown + record.answer)).long()
            tokens[row, : len(ids)], valid[row, : len(ids)] = ids, True
            mask[row, len(shown) - 1 : len(ids) - 1] = True
        lengths = torch.tensor([len(prompt(record)) for record in records])
        answers = torch.tensor([ANSWERS.index(record.answer) for record in records])
        return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), mask,
                     valid=None if valid.all() else valid, slices={"answer": answers, "length": lengths})  # fmt: skip
