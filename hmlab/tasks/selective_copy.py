"""Selective copying: the few tokens that matter, scattered among blanks, are said again in their order.

    data = Config(context=256, items=16).open()

    . . x . . . y . z . . … | x y z          . the blank, | the mark after which the items come again

`items` tokens, uniform and independent over `values`, stand at places drawn without replacement, so that how far each
lies behind its answer depends on the content and not on the position: a fixed convolution cannot do it. Every item
after the mark is an answer, and `oracle` holds its first place.

Source: Gu and Dao 2023, Mamba (arXiv 2312.00752), section 4.1, after Arjovsky et al. 2016, Unitary Evolution Recurrent
Neural Networks, where context = 4096, items = 16, values = 16. Deviation: there the answers are read off at marks; here
each follows in the stream, as in a text.

Chance is 1 / `values`. Slices: `items`. Units: tokens. Errors: ValueError naming the field or argument.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hmlab.layers import check_positive
from hmlab.tasks import Batch
from hmlab.tasks.streams import Streams

BLANK, MARK, FIRST = 0, 1, 2


@dataclass(frozen=True, kw_only=True)
class Config:
    """batch: streams in a batch. context: tokens in a stream. items: to be copied. values: how many there are to draw
    from."""

    batch: int = 16
    context: int = 256
    items: int = 16
    values: int = 16

    def __post_init__(self) -> None:
        check_positive(self, "batch", "context", "items", "values")
        if self.context < 2 * self.items:
            raise ValueError(f"context: expected at least twice the items ({2 * self.items}), got {self.context}")

    @property
    def vocab_size(self) -> int:
        """The blank, the mark, values."""
        return FIRST + self.values

    @property
    def chance(self) -> float:
        """Share of right answers of who names any value."""
        return 1 / self.values

    def open(self) -> SelectiveCopyData:
        return SelectiveCopyData(self)


@dataclass(frozen=True, eq=False)
class SelectiveCopyData(Streams):
    """Streams to draw; splits differ in nothing but their draws."""

    config: Config

    def draw(self, split: str, generator: torch.Generator) -> Batch:
        config, blank = self.config, self.config.context - self.config.items  # where the mark stands
        rows = torch.arange(config.batch)[:, None]
        place = torch.rand(config.batch, blank, generator=generator).argsort(1)[:, : config.items].sort(1).values
        item = torch.randint(FIRST, self.vocab_size, place.shape, generator=generator)
        stream = torch.full((config.batch, config.context + 1), BLANK)
        stream[rows, place], stream[:, blank], stream[:, blank + 1 :] = item, MARK, item
        mask = torch.zeros(config.batch, config.context, dtype=torch.bool)
        mask[:, blank:] = True
        oracle = torch.full(mask.shape, -1)
        oracle[:, blank:] = place
        return Batch(stream[:, :-1].contiguous(), stream[:, 1:].contiguous(), mask, oracle=oracle,
                     slices={"items": torch.full((config.batch,), config.items)})  # fmt: skip
