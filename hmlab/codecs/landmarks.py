"""Some tokens of a segment as they are, and one slot for all the others.

    kept: the m - 1 tokens whose value is farthest from the segment's mean value, of each head
    last slot: mean key and value of the others, mass S - m + 1

What a query copies is one token; a mean of several hides it, a token kept does not. With m = S nothing is lost. The
selection is ours; keeping what stands out: Zhang et al. 2023, H2O (arXiv 2306.14048), by attention received there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from hmlab_kernels.compress_segments import Slots
from jaxtyping import Int, UInt8
from torch import Tensor

from hmlab.codecs.codec import Code, Codec
from hmlab.codecs.packing import pack, unpack, width_of


class Landmarks(Codec):
    """slots: m, of which m - 1 are tokens, in their order, and the last is the rest."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Nothing to choose."""

        def build(self) -> Landmarks:
            return Landmarks()

    class Side(NamedTuple):
        """token: packed places of the tokens kept. segment: tokens of all."""

        token: UInt8[Tensor, "batch segments kv_heads bytes"]
        segment: int

    def most(self, segment, kv_heads, dim):
        return segment

    def _encode(self, k, v, slots):
        wide = torch.promote_types(v.dtype, torch.float32)
        distance = torch.linalg.vector_norm(v.detach().to(wide) - v.detach().to(wide).mean(2, keepdim=True), dim=-1)
        index = distance.topk(slots - 1, 2).indices.sort(2).values
        rest = torch.ones_like(distance).scatter(2, index, 0.0)[..., None]
        rows = [torch.cat((x.gather(2, index[..., None].expand(*index.shape, x.shape[-1])),
                           ((x.to(wide) * rest).sum(2, keepdim=True) / rest.sum(2, keepdim=True)).to(x.dtype)), 2)
                for x in (k, v)]  # fmt: skip
        return Code(*rows, self.Side(pack(index.transpose(2, 3), width_of(k.shape[2])), k.shape[2]))

    def _kept(self, code: Code) -> Int[Tensor, "batch segments kept kv_heads"]:
        return unpack(code.side.token, width_of(code.side.segment), code.k.shape[2] - 1).transpose(2, 3).long()

    def decode(self, code):
        segment, kept = code.side.segment, self._kept(code)
        wide = torch.promote_types(code.k.dtype, torch.float32)
        others = segment - kept.shape[2]
        place = (segment * (segment - 1) // 2 - kept.sum(2, keepdim=True)).to(wide) / others
        mass = torch.cat((torch.ones_like(kept), torch.full_like(kept.sum(2, keepdim=True), others)), 2)
        return Slots(code.k, code.v, mass.to(wide), torch.cat((kept.to(wide), place), 2))

    def reconstruct(self, code):
        index = self._kept(code)[..., None]
        return tuple(x[:, :, -1:].expand(*x.shape[:2], code.side.segment, *x.shape[3:])
                     .scatter(2, index.expand_as(x[:, :, :-1]), x[:, :, :-1]) for x in code[:2])  # fmt: skip
