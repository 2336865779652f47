"""Vectors as small integers.

Source: Jacob et al. 2018 (arXiv 1712.05877), symmetric: without a zero point.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from hmlab.codecs.codec import Code, WholeSegment
from hmlab.codecs.packing import pack, unpack


class Quantisation(WholeSegment):
    """Symmetric integers: x ≈ s · round(x / s), s = max|x| / (2^(bits - 1) - 1) over a token's or a channel's numbers.

    The error is at most s / 2. Rounding is to the nearest, ties to even; it passes no gradient.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """bits: of a number, 2 to 8, packed without gaps. scale: one for each token (row) of a head, or one for each
        channel of a head, in a segment."""

        bits: int = 8
        scale: Literal["token", "channel"] = "token"

        def __post_init__(self) -> None:
            if not 2 <= self.bits <= 8:
                raise ValueError(f"bits: expected 2 to 8, got {self.bits}")
            if self.scale not in ("token", "channel"):
                raise ValueError(f"scale: expected 'token' or 'channel', got {self.scale!r}")

        def build(self) -> Quantisation:
            return Quantisation(self)

    class Side(NamedTuple):
        """keys, values: scales. width: numbers in a row."""

        keys: Float[Tensor, "batch segments rows_or_1 kv_heads dim_or_1"]
        values: Float[Tensor, "batch segments rows_or_1 kv_heads dim_or_1"]
        width: int

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.highest = 2 ** (config.bits - 1) - 1

    def _encode(self, k, v, slots):
        scales = [x.abs().amax(-1 if self.config.scale == "token" else 2, keepdim=True) / self.highest for x in (k, v)]
        return Code(*map(self._integers, (k, v), scales), self.Side(*scales, k.shape[-1]))

    def _integers(self, x: Tensor, scale: Tensor) -> UInt8[Tensor, "batch segments rows kv_heads bytes"]:
        whole = (x / torch.where(scale > 0, scale, 1)).round().clamp(-self.highest, self.highest)
        return pack(whole.int() + self.highest, self.config.bits)

    def reconstruct(self, code):
        return tuple((unpack(x, self.config.bits, code.side.width) - self.highest).to(scale.dtype) * scale
                     for x, scale in zip(code[:2], code.side[:2], strict=True))  # fmt: skip
