"""Codecs composed."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from hmlab.codecs.codec import Code, Codec


class Chain(Codec):
    """Codecs one after another: each codes the vectors of the code before it, whose side information stays.

    slots: of the first codec, whose slots are decoded. For example means kept as 8-bit integers:

        Chain.Config(stages=(MeanPool.Config(), Quantisation.Config(bits=8))).build()

    A codec that cannot take the vectors of the one before it (integers are an end) raises when it is called.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """stages: configurations of the codecs. slots: of the stages after the first; None, and those not given, take
        as many as there can be."""

        stages: tuple
        slots: tuple[int | None, ...] = ()

        def __post_init__(self) -> None:
            if not self.stages:
                raise ValueError("stages: expected at least one codec, got none")
            if len(self.slots) >= len(self.stages):
                raise ValueError(f"slots: expected at most {len(self.stages) - 1}, one for each stage after the first, "
                                 f"got {len(self.slots)}")  # fmt: skip

        def build(self) -> Chain:
            return Chain(self)

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stage.build() for stage in config.stages)
        self.slots = config.slots + (None,) * (len(config.stages) - 1 - len(config.slots))

    def most(self, segment, kv_heads, dim):
        return self.stages[0].most(segment, kv_heads, dim)

    def encode(self, k, v, slots=None):
        sides = []
        for stage, count in zip(self.stages, (slots, *self.slots), strict=True):
            k, v, side = stage.encode(k, v, count)
            sides.append(side)
        return Code(k, v, tuple(sides))

    def _first(self, code: Code) -> Code:
        """The code of the first stage."""
        k, v, sides = code
        for stage, side in zip(self.stages[:0:-1], sides[:0:-1], strict=True):
            k, v = stage.reconstruct(Code(k, v, side))
        return Code(k, v, sides[0])

    def decode(self, code):
        return self.stages[0].decode(self._first(code))

    def reconstruct(self, code):
        return self.stages[0].reconstruct(self._first(code))
