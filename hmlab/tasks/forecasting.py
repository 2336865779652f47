"""Long-range forecasting: the next `horizon` values of several series from the `context` values before.

    data = Config(series="ett-h1", context=336, horizon=96).open()
    for windows in data.batches("train", torch.Generator().manual_seed(0)): ...
    data.errors("test", data.seasonal)               # of a forecaster, over every window of a split

Seven channels of an electricity transformer, six loads and the oil temperature (OT), every hour (h1) or quarter of an
hour (m1). The split is by time: 12 months of 30 days to train, then 4 to validate, then 4 to test; what lies after is
left out. A window's future lies in its split, its past may reach back before it. Each channel is normalised by the mean
and the standard deviation (over n) of its training part, and errors are of normalised values.

A batch is `Windows` of real numbers and not a `Batch` of tokens: the published measures are squared and absolute errors
of values, and bins to make tokens of them would put errors of their own into both input and score. So `train.train`,
which is for tokens, does not take this task; a model reads `past` and is trained on `future` directly.

Source: Zhou et al. 2021, Informer (arXiv 2012.07436), and its split as used since (context 336, horizons 96, 192, 336,
720). There is no chance level: `last` (repeat the last value) and `seasonal` (repeat the last day) are what any
forecaster is compared with. Units: standard deviations of the training part. Errors: ValueError naming the field or
argument, `corpora.CorpusError`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from hmlab import corpora
from hmlab.corpora import SPLITS, Corpus, CorpusError
from hmlab.layers import check_positive
from hmlab.tasks.streams import corpus_facts

STEPS_A_DAY = {"ett-h1": 24, "ett-m1": 96}
MONTHS = (12, 4, 4)
DAYS = 30
TARGET = "OT"


class Windows(NamedTuple):
    """past, future: normalised values. start: the row of the file that the first value of the past is in."""

    past: Float[Tensor, "batch context channels"]
    future: Float[Tensor, "batch horizon channels"]
    start: Int64[Tensor, "batch"]


Forecaster = Callable[[Tensor, int], Tensor]
"""The next values `[batch, horizon, channels]` from the past `[batch, context, channels]` and the horizon."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """series: which file. batch: windows in a batch. context, horizon: values that are given, and to be forecast.
    channels: all seven, or the oil temperature alone."""

    series: Literal["ett-h1", "ett-m1"] = "ett-h1"
    batch: int = 16
    context: int = 336
    horizon: int = 96
    channels: Literal["all", "OT"] = "all"

    def __post_init__(self) -> None:
        for name, known in (("series", tuple(STEPS_A_DAY)), ("channels", ("all", TARGET))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: expected {' or '.join(known)}, got {getattr(self, name)!r}")
        check_positive(self, "batch", "context", "horizon")
        month = DAYS * STEPS_A_DAY[self.series]
        if self.horizon > MONTHS[1] * month:
            raise ValueError(f"horizon: expected at most {MONTHS[1] * month}, the validation part, got {self.horizon}")
        if self.context + self.horizon > MONTHS[0] * month:
            raise ValueError(f"context: expected at most {MONTHS[0] * month - self.horizon}, the training part without "
                             f"the horizon, got {self.context}")  # fmt: skip

    def open(self, data: str | Path | None = None) -> ForecastingData:
        """Load and normalise the series; `data` is a folder that is looked into first. Raises `corpora.CorpusError`."""
        corpus = corpora.load(self.series, data=data)
        header, *lines = corpus.splits["train"].splitlines()
        names = header.split(",")[1:]
        rows = sum(MONTHS) * DAYS * STEPS_A_DAY[self.series]
        if TARGET not in names or len(lines) < rows:
            raise CorpusError(f"corpus {corpus.name!r}: expected a column {TARGET} and {rows} rows, found columns "
                              f"{', '.join(names)} and {len(lines)} rows")  # fmt: skip
        read = torch.tensor([[float(value) for value in line.split(",")[1:]] for line in lines[:rows]],
                            dtype=torch.float64)  # fmt: skip
        kept = range(len(names)) if self.channels == "all" else [names.index(TARGET)]
        values = read[:, list(kept)]
        training = values[: MONTHS[0] * DAYS * STEPS_A_DAY[self.series]]
        mean, deviation = training.mean(0), training.std(0, correction=0)
        return ForecastingData(config=self, corpus=corpus, names=tuple(names[i] for i in kept), mean=mean,
                               deviation=deviation, values=((values - mean) / deviation).float())  # fmt: skip


@dataclass(frozen=True, kw_only=True, eq=False)
class ForecastingData:
    """Windows to draw. names: of the channels. mean, deviation: of the training part. values: normalised."""

    config: Config
    corpus: Corpus
    names: tuple[str, ...]
    mean: Float[Tensor, "channels"]
    deviation: Float[Tensor, "channels"]
    values: Float[Tensor, "time channels"]

    def starts(self, split: str) -> range:
        """First rows of all windows of a split. Raises ValueError for a split that is not there."""
        if split not in SPLITS:
            raise ValueError(f"split: expected {' or '.join(SPLITS)}, got {split!r}")
        number, month = SPLITS.index(split), DAYS * STEPS_A_DAY[self.config.series]
        begin, end = sum(MONTHS[:number]) * month, sum(MONTHS[: number + 1]) * month
        first = begin - self.config.context if number else 0
        return range(max(0, first), end - self.config.context - self.config.horizon + 1)

    def batches(self, split: str, generator: torch.Generator) -> Iterator[Windows]:
        """Random windows without end; a batch depends on nothing but the state of `generator` (on the CPU)."""
        return self._random(self.starts(split), generator)

    def evaluation_batches(self, split: str, count: int, seed: int) -> Iterator[Windows]:
        """`count` batches, always the same for a split and a seed, and none that a training with that seed draws."""
        digest = hashlib.sha256(f"{__name__} {split} {seed}".encode()).digest()
        return islice(self.batches(split, torch.Generator().manual_seed(int.from_bytes(digest[:4]))), count)

    def every(self, split: str) -> Iterator[Windows]:
        """All windows of a split, once and in order; the last batch may be smaller."""
        for start in torch.tensor(self.starts(split)).split(self.config.batch):
            yield self._windows(start)

    def errors(self, split: str, forecaster: Forecaster) -> dict[str, float]:
        """Mean squared and mean absolute error over all windows, steps and channels: `mse`, `mae`."""
        squared = absolute = count = 0.0
        with torch.no_grad():
            for past, future, _ in self.every(split):
                apart = (forecaster(past, self.config.horizon) - future).double()
                squared, absolute = squared + float((apart**2).sum()), absolute + float(apart.abs().sum())
                count += apart.numel()
        return {"mse": squared / count, "mae": absolute / count}

    def seasonal(self, past: Float[Tensor, "batch context channels"], horizon: int
                 ) -> Float[Tensor, "batch {horizon} channels"]:
        """The last day again and again."""
        day = STEPS_A_DAY[self.config.series]
        if past.shape[1] < day:
            raise ValueError(f"past: expected at least a day ({day} values), got {past.shape[1]}")
        return past[:, -day:][:, torch.arange(horizon) % day]

    def provenance(self) -> dict[str, object]:
        """What series this is, for a run's record."""
        return {**corpus_facts(self.corpus), "division": "12, 4 and 4 months of 30 days", "channels": list(self.names)}

    def _random(self, starts: range, generator: torch.Generator) -> Iterator[Windows]:
        while True:
            yield self._windows(starts[0] + torch.randint(len(starts), (self.config.batch,), generator=generator))

    def _windows(self, start: Int64[Tensor, "batch"]) -> Windows:
        window = self.values[start[:, None] + torch.arange(self.config.context + self.config.horizon)]
        return Windows(window[:, : self.config.context], window[:, self.config.context :], start)


def last(past: Float[Tensor, "batch context channels"], horizon: int) -> Float[Tensor, "batch {horizon} channels"]:
    """The last value again and again."""
    return past[:, -1:].expand(-1, horizon, -1)
