"""Codecs that keep some tokens or heads as they are and drop the others, by norm.

Source: pruning by magnitude, of channels there: Molchanov et al. 2017 (arXiv 1611.06440).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from hmlab_kernels.compress_segments import Slots
from jaxtyping import Int, UInt8
from torch import Tensor

from hmlab.codecs.codec import Code, Codec
from hmlab.codecs.packing import pack, unpack, width_of


@dataclass(frozen=True, kw_only=True)
class _Norm:
    """by: whose Euclidean norm decides."""

    by: Literal["keys", "values"] = "values"

    def __post_init__(self) -> None:
        if self.by not in ("keys", "values"):
            raise ValueError(f"by: expected 'keys' or 'values', got {self.by!r}")

    def norm(self, k: Tensor, v: Tensor, *axes: int) -> Tensor:
        x = k if self.by == "keys" else v
        return torch.linalg.vector_norm(x, dim=axes, dtype=torch.promote_types(x.dtype, torch.float32))


class TokenPruning(Codec):
    """The tokens of greatest norm of each head, in their order. slots: tokens kept; the others are zero and have no
    mass."""

    class Config(_Norm):
        def build(self) -> TokenPruning:
            return TokenPruning(self)

    class Side(NamedTuple):
        """token: packed places of the tokens kept. segment: tokens of all."""

        token: UInt8[Tensor, "batch segments kv_heads bytes"]
        segment: int

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config

    def most(self, segment, kv_heads, dim):
        return segment

    def _encode(self, k, v, slots):
        index = self.config.norm(k, v, -1).topk(slots, 2).indices.sort(2).values
        packed = pack(index.transpose(2, 3), width_of(k.shape[2]))
        return Code(*(x.gather(2, index[..., None].expand(*index.shape, x.shape[-1])) for x in (k, v)),
                    self.Side(packed, k.shape[2]))  # fmt: skip

    def _kept(self, code: Code) -> Int[Tensor, "batch segments slots kv_heads"]:
        return unpack(code.side.token, width_of(code.side.segment), code.k.shape[2]).transpose(2, 3)

    def decode(self, code):
        position = self._kept(code).to(torch.promote_types(code.k.dtype, torch.float32))
        return Slots(code.k, code.v, torch.ones_like(position), position)

    def reconstruct(self, code):
        index = self._kept(code).long()[..., None]
        return tuple(x.new_zeros(*x.shape[:2], code.side.segment, *x.shape[3:]).scatter(2, index.expand_as(x), x)
                     for x in code[:2])  # fmt: skip


class HeadPruning(Codec):
    """The heads of greatest norm of each segment. slots: heads kept; the others are zero and have no mass."""

    class Config(_Norm):
        def build(self) -> HeadPruning:
            return HeadPruning(self)

    class Side(NamedTuple):
        """head: packed numbers of the heads kept. heads: of all."""

        head: UInt8[Tensor, "batch segments bytes"]
        heads: int

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config

    def most(self, segment, kv_heads, dim):
        return kv_heads

    def _encode(self, k, v, slots):
        heads = k.shape[3]
        index = self.config.norm(k, v, 2, 4).topk(slots, 2).indices.sort(2).values
        kept = (x.gather(3, _heads(index, x.shape)) for x in (k, v))
        return Code(*kept, self.Side(pack(index, width_of(heads)), heads))

    def _kept(self, code: Code) -> Int[Tensor, "batch segments kept"]:
        return unpack(code.side.head, width_of(code.side.heads), code.k.shape[3]).long()

    def decode(self, code):
        slots = super().decode(code)
        mass = torch.zeros_like(slots.mass)
        index = self._kept(code)[:, :, None].expand(-1, -1, mass.shape[2], -1)
        return slots._replace(mass=mass.scatter(3, index, 1.0))

    def reconstruct(self, code):
        index, heads = self._kept(code), code.side.heads
        return tuple(x.new_zeros(*x.shape[:3], heads, x.shape[4]).scatter(3, _heads(index, x.shape), x)
                     for x in code[:2])  # fmt: skip


def _heads(index: Int[Tensor, "batch segments kept"], shape: torch.Size) -> Tensor:
    return index[:, :, None, :, None].expand(-1, -1, shape[2], -1, shape[4])
