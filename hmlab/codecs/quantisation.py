"""Vectors as small integers.

Source: Jacob et al. 2018 (arXiv 1712.05877), symmetric: without a zero point.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from hmlab.codecs.codec import Code, WholeSegment
from hmlab.codecs.packing import pack, unpack


class Quantisation(WholeSegment):
    """Symmetric integers: x ≈ s · round(x / s), s = max|x| / (2^(bits - 1) - 1) over a token's or a channel's numbers.

    The error is at most s / 2. Rounding is to the nearest, ties to even; it passes no gradient.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """bits: of a number, 2 to 8; those of a head in a segment are packed without gaps. scale: one for each token
        (row), or one for each channel, of a head in a segment."""

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
        """keys, values: scales. rows, width: of the vectors."""

        keys: Float[Tensor, "batch segments rows_or_1 kv_heads dim_or_1"]
        values: Float[Tensor, "batch segments rows_or_1 kv_heads dim_or_1"]
        rows: int
        width: int

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.highest = 2 ** (config.bits - 1) - 1

    def _encode(self, k, v, slots):
        scales = [x.abs().amax(-1 if self.config.scale == "token" else 2, keepdim=True) / self.highest for x in (k, v)]
        return Code(*map(self._integers, (k, v), scales), self.Side(*scales, k.shape[2], k.shape[4]))

    def _integers(self, x: Tensor, scale: Tensor) -> UInt8[Tensor, "batch segments 1 kv_heads bytes"]:
        whole = (x / torch.where(scale > 0, scale, 1)).round().clamp(-self.highest, self.highest)
        return pack(rearrange(whole.int() + self.highest, "b s t h d -> b s 1 h (t d)"), self.config.bits)

    def reconstruct(self, code):
        *scales, rows, width = code.side
        return tuple(self._numbers(x, rows, width).to(scale.dtype) * scale
                     for x, scale in zip(code[:2], scales, strict=True))  # fmt: skip

    def _numbers(self, packed: Tensor, rows: int, width: int) -> Int[Tensor, "batch segments {rows} kv_heads {width}"]:
        whole = unpack(packed, self.config.bits, rows * width) - self.highest
        return rearrange(whole, "b s 1 h (t d) -> b s t h d", t=rows)
