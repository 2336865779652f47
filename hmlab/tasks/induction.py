"""Induction: what followed the special token the first time it came?

    data = Config(context=256).open()

    a c b … S d … a b S  →  d           S the special token, d any other

Tokens are uniform and independent over `values`. The special token stands at a uniform place and once more at the end,
where the token that followed it is the answer; `oracle` holds that token's place. Trained at one context and tested at
others, it shows whether the look-up depends on the length.

Source: the induction heads of Olsson et al. 2022 (arXiv 2209.11895), in the form of Gu and Dao 2023, Mamba (arXiv
2312.00752), section 4.1, where values = 16, trained at context = 256 and tested up to 2^20. (Whole passages said again
and again are `hmlab.tasks.recall` with form="copy".)

Chance is 1 / `values`. Slices: `distance` (tokens from the answer's first place to its second). Units: tokens. Errors:
ValueError naming the field or argument.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hmlab.layers import check_positive
from hmlab.tasks import Batch
from hmlab.tasks.streams import Streams


@dataclass(frozen=True, kw_only=True)
class Config:
    """batch: streams in a batch. context: tokens in a stream. values: how many ordinary tokens there are."""

    batch: int = 16
    context: int = 256
    values: int = 16

    def __post_init__(self) -> None:
        check_positive(self, "batch", "values")
        if self.context < 3:
            raise ValueError(f"context: expected at least 3, got {self.context}")

    @property
    def vocab_size(self) -> int:
        """Values, then the special token."""
        return self.values + 1

    @property
    def chance(self) -> float:
        """Share of right answers of who names any ordinary token."""
        return 1 / self.values

    def open(self) -> InductionData:
        return InductionData(self)


@dataclass(frozen=True, eq=False)
class InductionData(Streams):
    """Streams to draw; splits differ in nothing but their draws."""

    config: Config

    def draw(self, split: str, generator: torch.Generator) -> Batch:
        config, rows = self.config, torch.arange(self.config.batch)
        stream = torch.randint(config.values, (config.batch, config.context + 1), generator=generator)
        place = torch.randint(config.context - 2, (config.batch,), generator=generator)
        stream[rows, place] = stream[:, -2] = config.values
        stream[:, -1] = stream[rows, place + 1]
        mask = torch.zeros(config.batch, config.context, dtype=torch.bool)
        mask[:, -1] = True
        oracle = torch.full(mask.shape, -1)
        oracle[:, -1] = place + 1
        return Batch(stream[:, :-1].contiguous(), stream[:, 1:].contiguous(), mask, oracle=oracle,
                     slices={"distance": config.context - (place + 1)})  # fmt: skip
