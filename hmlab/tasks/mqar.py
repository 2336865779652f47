"""Multi-query associative recall: pairs first, then every key once more, at a gap drawn from a power law.

    data = Config(context=128, pairs=16, vocab=8192).open()

A stream is `pairs` keys, each followed by its value, then slots of two tokens. Each key comes again in a slot of its
own, followed by its value, the answer; the other slots are filler:

    k1 v1 k2 v2 … kn vn | filler … k2 v2 … filler … k1 v1 …
    0                2n   slot g begins at 2n + 2g, g = 0, 1, …

Slots are drawn one after the other without replacement, slot g with weight (g + 1)^(power - 1), so most questions come
early and some late. Keys of a stream are distinct tokens of the lower half of the vocabulary, values distinct ones of
the upper half. `oracle` holds the place of the value.

Source: Arora et al. 2023, Zoology (arXiv 2312.04927), where vocab = 8192, power = 0.01, context = 64 to 512, pairs = 4
to 64. Deviations: filler is drawn from the values alone, so that no key is followed by something else in between, and
the answer follows its question in the stream, as in a text, where there it is a target only.

Chance is 2 / vocab. Slices: `pairs`. Units: tokens. Errors: ValueError naming the field or argument.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hmlab.layers import check_positive
from hmlab.tasks import Batch
from hmlab.tasks.streams import Streams


@dataclass(frozen=True, kw_only=True)
class Config:
    """batch: streams in a batch. context: tokens in a stream. pairs: keys planted and asked in each. vocab: tokens,
    half of them keys and half values. power: of the law of the gaps, above."""

    batch: int = 16
    context: int = 128
    pairs: int = 16
    vocab: int = 8192
    power: float = 0.01

    def __post_init__(self) -> None:
        check_positive(self, "batch", "context", "pairs")
        if 4 * self.pairs > self.context + 1:
            raise ValueError(
                f"pairs: expected at most {(self.context + 1) // 4} in {self.context} tokens, got {self.pairs}"
            )
        if self.vocab % 2 or self.vocab < 2 * self.pairs:
            raise ValueError(f"vocab: expected an even number, at least 2 pairs ({2 * self.pairs}), got {self.vocab}")

    @property
    def vocab_size(self) -> int:
        """Keys, then values."""
        return self.vocab

    @property
    def chance(self) -> float:
        """Share of right answers of who names any value."""
        return 2 / self.vocab

    def open(self) -> MqarData:
        return MqarData(self)


@dataclass(frozen=True, eq=False)
class MqarData(Streams):
    """Streams to draw; splits differ in nothing but their draws."""

    config: Config

    def draw(self, split: str, generator: torch.Generator) -> Batch:
        config, half = self.config, self.config.vocab // 2
        rows, number = torch.arange(config.batch)[:, None], torch.arange(config.pairs)
        key, value = (torch.rand(config.batch, half, generator=generator).argsort(1)[:, : config.pairs] for _ in "kv")
        stream = half + torch.randint(half, (config.batch, config.context + 1), generator=generator)
        slots = torch.arange(1, (config.context + 1) // 2 - config.pairs + 1, dtype=torch.float64)
        # The largest of log weight + Gumbel noise are draws without replacement, in order.
        uniform = torch.rand(config.batch, len(slots), generator=generator, dtype=torch.float64)
        noisy = (config.power - 1) * slots.log() - (-uniform.clamp(min=1e-300).log()).log()
        question = 2 * config.pairs + 2 * noisy.topk(config.pairs, 1).indices
        for place in (2 * number.expand_as(key), question):
            stream[rows, place], stream[rows, place + 1] = key, half + value
        mask = torch.zeros(config.batch, config.context, dtype=torch.bool)
        mask[rows, question] = True
        oracle = torch.full(mask.shape, -1)
        oracle[rows, question] = 2 * number + 1
        return Batch(stream[:, :-1].contiguous(), stream[:, 1:].contiguous(), mask, oracle=oracle,
                     slices={"pairs": torch.full((config.batch,), config.pairs)})  # fmt: skip
