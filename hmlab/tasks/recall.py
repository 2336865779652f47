"""Recall: a value planted far back beside its key is read back when the key comes again.

    data = Config(context=512, pairs=8, distance=(2, 400)).open()
    for batch in data.batches("train", torch.Generator().manual_seed(0)): ...
    answers(model, data.evaluation_batches("valid", 8, seed=0))     # distance and correctness of every answer

A stream of `context` + 1 tokens is filler with `pairs` keys in it, each followed by its value, twice:

    filler … key value … filler … key value … filler
             s   s+1              s+d

The first is the planting, the second the question (the key) with its answer (the value). Only answers count: `mask`
is True at s + d, whose target is the value, and `oracle` holds s + 1, the place of the planted value. Keys of one
stream are distinct, values need not be. The distance d, in tokens, is log-uniform over whole numbers, and the place
s uniform over what the pairs before it left free, so one stream may ask near and far. (In a very full stream far pairs
find a place less often than near ones.)

Models begin to look keys up only after many answers, and pairs give few. `form="copy"` gives many: a passage of d
random tokens said again and again, each token after the first saying an answer. Some hundred steps on streams of 48
tokens teach the look-up; pairs at growing contexts then teach the task.

Chance is 1 / `values` (pairs), 1 / `vocab_size` (copy). Sources: the needle or passkey test of long-context models
(Mohtashami and Jaggi 2023, Landmark Attention, arXiv 2305.16300) in the form of associative recall (Arora et al. 2023,
Zoology, arXiv 2312.04927); copying as what look-up grows from: Olsson et al. 2022, In-context Learning and Induction
Heads (arXiv 2209.11895). Errors: ValueError naming the field or argument.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import torch
import xarray as xr
from jaxtyping import Bool, Int64
from torch import Tensor, nn

from hmlab import corpora
from hmlab.corpora import SPLITS, Corpus
from hmlab.encodings import CharacterEncoding, characters
from hmlab.tasks import Batch

# Keys and values are written as characters from here on that the filler has none of.
FIRST_SIGN = 0x4E00
# A stream so full that pairs find no place is drawn anew this often.
DRAWS = 100


@dataclass(frozen=True, kw_only=True)
class Config:
    """form: pairs, or copy of random passages (see above). batch: streams in a batch. context: tokens in a stream.
    pairs: keys planted and asked in each. distance: least and most tokens from a key to its question, or of a passage;
    equal for a fixed distance. keys, values: how many there are to draw
    from. filler: letters of uniformly random filler. corpus: a name of `corpora.catalogue()` or a path; its text, by
    characters and begun anywhere, is the filler in place of random letters. Text shorter than a stream begins again.
    """

    form: Literal["pairs", "copy"] = "pairs"
    batch: int = 16
    context: int = 512
    pairs: int = 8
    distance: tuple[int, int] = (2, 256)
    keys: int = 64
    values: int = 64
    filler: int = 64
    corpus: str | None = None

    def __post_init__(self) -> None:
        if self.form not in ("pairs", "copy"):
            raise ValueError(f"form: expected pairs or copy, got {self.form!r}")
        for name in ("batch", "context", "pairs", "keys", "values", "filler"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.keys < self.pairs:
            raise ValueError(f"keys: expected at least pairs ({self.pairs}), got {self.keys}")
        if 4 * self.pairs > self.context + 1:
            most = (self.context + 1) // 4
            raise ValueError(f"pairs: expected at most {most} in {self.context} tokens, got {self.pairs}")
        if not 2 <= self.distance[0] <= self.distance[1] < self.context:
            raise ValueError(
                f"distance: expected least and most, 2 <= least <= most < context ({self.context}), got {self.distance}"
            )

    def open(self, data: str | Path | None = None) -> RecallData:
        """Load and encode the filler; `data` is a folder that is looked into first. Raises `corpora.CorpusError`."""
        corpus = None if self.corpus is None else corpora.load(self.corpus, data=data)
        if corpus is None:
            text = "".join(map(chr, range(ord("a"), ord("a") + self.filler)))
        else:
            text = "".join(corpus.splits.values())
        signs = _signs(self.keys + self.values, set(text))
        encoding = characters(text + signs)
        ids = torch.from_numpy(encoding.encode(signs)).long()
        texts = dict.fromkeys(SPLITS, text) if corpus is None else corpus.splits
        fillers = {split: torch.from_numpy(encoding.encode(text)).long() for split, text in texts.items()}
        return RecallData(
            config=self, corpus=corpus, encoding=encoding, fillers=fillers,
            keys=ids[: self.keys], values=ids[self.keys :],
        )  # fmt: skip


def _signs(count: int, taken: set[str]) -> str:
    """The first `count` characters of the block of signs that are not taken."""
    free = (chr(point) for point in range(FIRST_SIGN, FIRST_SIGN + count + len(taken)))
    return "".join(islice((sign for sign in free if sign not in taken), count))


@dataclass(frozen=True, kw_only=True, eq=False)
class RecallData:
    """Streams to draw. fillers: the letters (random filler) or the text of each split, as ids. keys, values: ids."""

    config: Config
    corpus: Corpus | None
    encoding: CharacterEncoding
    fillers: dict[str, Int64[Tensor, "time"]]
    keys: Int64[Tensor, "keys"]
    values: Int64[Tensor, "values"]

    @property
    def vocab_size(self) -> int:
        """Number of ids of the encoding."""
        return self.encoding.vocab_size

    def batches(self, split: str, generator: torch.Generator) -> Iterator[Batch]:
        """Streams without end; a batch depends on nothing but the state of `generator` (on the CPU).

        Splits of random filler differ in nothing. Raises `ValueError` at once for a split that is not there.
        """
        if split not in self.fillers or not len(self.fillers[split]):
            known = " or ".join(name for name, text in self.fillers.items() if len(text))
            raise ValueError(f"split: expected {known}, got {split!r}")
        return self._copies(generator) if self.config.form == "copy" else self._pairs(self.fillers[split], generator)

    def evaluation_batches(self, split: str, count: int, seed: int) -> Iterator[Batch]:
        """`count` batches, always the same for a split and a seed, and none that a training with that seed draws."""
        # The digest, since a generator with the seed itself would repeat the training's first batches.
        digest = hashlib.sha256(f"recall {split} {seed}".encode()).digest()
        return islice(self.batches(split, torch.Generator().manual_seed(int.from_bytes(digest[:4]))), count)

    def provenance(self) -> dict:
        """What this is, for a run's record; `tokens` are those of filler to draw from. It names no place here."""
        encoding = hashlib.sha256(self.encoding.to_json().encode()).hexdigest()
        facts = {"encoding": "character", "encoding_sha256": encoding, "vocab_size": self.vocab_size}
        facts["tokens"] = {split: len(filler) for split, filler in self.fillers.items()}
        if self.corpus is None:
            return {"corpus": "random", "sha256": encoding, "licence": "none needed", "source": __name__, **facts}
        corpus = {name: getattr(self.corpus, name) for name in ("sha256", "licence", "source", "division")}
        return {"corpus": self.corpus.name, **corpus, **facts}

    def _copies(self, generator: torch.Generator) -> Iterator[Batch]:
        config, time = self.config, torch.arange(self.config.context + 1)
        while True:
            length = self._distances(config.batch, 1, generator)
            drawn = torch.randint(self.vocab_size, (config.batch, len(time)), generator=generator)
            stream = drawn.gather(1, time % length)
            mask = time[1:] >= length
            oracle = torch.where(mask, time[1:] - length, -1)
            yield Batch(stream[:, :-1].contiguous(), stream[:, 1:].contiguous(), mask, oracle=oracle)

    def _pairs(self, filler: Int64[Tensor, "time"], generator: torch.Generator) -> Iterator[Batch]:
        config = self.config
        rows = torch.arange(config.batch)[:, None]
        while True:
            stream = self._fill(filler, generator)
            start, distance = self._places(generator)
            order = torch.rand(config.batch, config.keys, generator=generator).argsort(1)
            key = self.keys[order[:, : config.pairs]]
            value = self.values[torch.randint(config.values, key.shape, generator=generator)]
            question = start + distance
            for place in (start, question):
                stream[rows, place], stream[rows, place + 1] = key, value
            mask = torch.zeros(config.batch, config.context, dtype=torch.bool)
            mask[rows, question] = True
            oracle = torch.full((config.batch, config.context), -1)
            oracle[rows, question] = start + 1
            yield Batch(stream[:, :-1].contiguous(), stream[:, 1:].contiguous(), mask, oracle=oracle)

    def _fill(self, filler: Int64[Tensor, "time"], generator: torch.Generator) -> Int64[Tensor, "batch stream"]:
        batch, length = self.config.batch, self.config.context + 1
        if self.corpus is None:
            return filler[torch.randint(len(filler), (batch, length), generator=generator)]
        begin = torch.randint(len(filler), (batch, 1), generator=generator)
        return filler[(begin + torch.arange(length)) % len(filler)]

    def _places(
        self, generator: torch.Generator
    ) -> tuple[Int64[Tensor, "batch pairs"], Int64[Tensor, "batch pairs"]]:
        """Where each key is planted and how far on it is asked, so that no two places overlap."""
        config = self.config
        start = torch.zeros(config.batch, config.pairs, dtype=torch.int64)
        distance, rows = start.clone(), torch.arange(config.batch)
        for _ in range(DRAWS):
            start[rows], distance[rows], fits = self._draw(len(rows), generator)
            rows = rows[~fits]
            if not len(rows):
                return start, distance
        raise ValueError(
            f"pairs: expected few enough for {config.context} tokens at distances {config.distance}, got {config.pairs}"
        )

    def _draw(
        self, rows: int, generator: torch.Generator
    ) -> tuple[Int64[Tensor, "rows pairs"], Int64[Tensor, "rows pairs"], Bool[Tensor, "rows"]]:
        """Starts, distances, and whether all of a row fits; pair after pair on what those before it left free."""
        distance = self._distances(rows, self.config.pairs, generator)
        taken = torch.zeros(rows, self.config.context + 1, dtype=torch.bool)
        starts, row, fits = [], torch.arange(rows), torch.ones(rows, dtype=torch.bool)
        for ahead in distance.T:
            free = _free(taken, ahead)
            start, fits = _one_of(free, generator), fits & free.any(1)
            for place in (start, start + 1, start + ahead, start + ahead + 1):
                taken[row, place] = True
            starts.append(start)
        return torch.stack(starts, 1), distance, fits

    def _distances(self, rows: int, count: int, generator: torch.Generator) -> Int64[Tensor, "{rows} {count}"]:
        least, most = self.config.distance
        share = torch.rand(rows, count, generator=generator, dtype=torch.float64)
        # Whole number d has the share ln((d + 1) / d) of ln((most + 1) / least).
        return (least * (share * math.log((most + 1) / least)).exp()).long().clamp(least, most)


def _free(taken: Bool[Tensor, "batch stream"], ahead: Int64[Tensor, "batch"]) -> Bool[Tensor, "batch time"]:
    """Starts that leave both tokens, and both tokens `ahead` of them, on free places of the stream."""
    two = ~(taken[:, :-1] | taken[:, 1:])
    later = torch.arange(two.shape[1]) + ahead[:, None]
    inside = later < two.shape[1]
    return two & inside & two.gather(1, later.clamp(max=two.shape[1] - 1))


def _one_of(free: Bool[Tensor, "batch time"], generator: torch.Generator) -> Int64[Tensor, "batch"]:
    """One of the free places of each row, with equal chance."""
    chosen = (torch.rand(len(free), generator=generator, dtype=torch.float64) * free.sum(1)).long()
    return (free.cumsum(1) > chosen[:, None]).long().argmax(1)


@torch.no_grad()
def answers(model: nn.Module, batches: Iterable[Batch], *, chunk: int = 4096) -> xr.Dataset:
    """Every answer of a language model, streams fed through `model(tokens, state)` in chunks.

    Memory is bounded by the model's state, one chunk's logits and the tokens of a batch, so a stream may have a
    million. Dimension `answer`; `distance`: tokens from key to question; `correct`: whether the likeliest token is the
    value; `loss`: nats. Disturbs neither the model's mode nor any generator.
    """
    if chunk < 1:
        raise ValueError(f"chunk: expected at least 1, got {chunk}")
    device, training = next(model.parameters()).device, model.training
    distances, corrects, losses = [], [], []
    model.eval()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for batch in batches:
            if batch.oracle is None:
                raise ValueError("batches: expected batches with an oracle, got one without")
            time = torch.arange(batch.tokens.shape[1])
            distances.append((time - batch.oracle)[batch.mask] + 1)
            number = (batch.mask.flatten().cumsum(0) - 1).view_as(batch.mask)  # of each answer, row after row
            correct, loss = torch.zeros(len(distances[-1]), dtype=torch.bool), torch.zeros(len(distances[-1]))
            state = None
            for part in time.split(chunk):
                logits, state = model(batch.tokens[:, part].to(device), state)
                mask = batch.mask[:, part]
                logits, target = logits[mask.to(device)].float(), batch.targets[:, part][mask].to(device)
                place = number[:, part][mask]
                correct[place] = (logits.argmax(-1) == target).cpu()
                loss[place] = nn.functional.cross_entropy(logits, target, reduction="none").cpu()
            corrects.append(correct)
            losses.append(loss)
    model.train(training)
    if not distances:
        raise ValueError("batches: expected at least one batch, got none")
    columns = {"distance": distances, "correct": corrects, "loss": losses}
    found = xr.Dataset({name: ("answer", torch.cat(parts).numpy()) for name, parts in columns.items()})
    found["distance"].attrs["units"], found["loss"].attrs["units"] = "tokens", "nats"
    return found


def accuracy(found: xr.Dataset) -> xr.Dataset:
    """Share of right answers by octave of distance: `accuracy` and `answers` over `distance`, the least of each octave
    (a power of two); octaves without an answer are left out. `found`: of `answers`."""
    # frexp is exact where log2 rounds: 2^(exponent - 1) <= distance < 2^exponent.
    _, exponent = torch.frexp(torch.from_numpy(found["distance"].values).double())
    octaves = found.assign_coords(distance=("answer", (2 ** (exponent.long() - 1)).numpy())).groupby("distance")
    return xr.Dataset({"accuracy": octaves.mean()["correct"], "answers": octaves.count()["correct"]})
