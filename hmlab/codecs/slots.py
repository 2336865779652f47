"""Codecs in which a slot stands for several tokens: learned nested slots, means, strided convolutions, clusters.

Sources: learned slots: `hmlab_kernels.compress_segments`; mean pooling and strided convolution: Rae et al. 2019,
Compressive Transformers (arXiv 1911.05507); k-means: Lloyd 1982, Least Squares Quantization in PCM.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from einops import rearrange, reduce, repeat
from hmlab_kernels import compress_segments
from hmlab_kernels.compress_segments import Slots
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from hmlab.codecs.codec import Code, Codec, Segments, check_heads
from hmlab.codecs.packing import pack, unpack, width_of
from hmlab.layers import check_positive


class Assigned(NamedTuple):
    """Which slot stands for each token: packed slot numbers. segment: tokens."""

    slot: UInt8[Tensor, "batch segments kv_heads bytes"]
    segment: int


def _assign(tokens: Tensor, slots: Tensor) -> Int[Tensor, "batch segments kv_heads segment"]:
    """The nearest slot of each token; both `[batch, segments, rows, kv_heads, dim]`. The first of several nearest."""
    tokens, slots = (x.detach().transpose(2, 3) for x in (tokens, slots))
    # ‖x‖² is the same for all slots of a token.
    return (slots.square().sum(-1)[..., None, :] - 2 * tokens @ slots.mT).argmin(-1)


def _assigned(index: Tensor, slots: int) -> Assigned:
    return Assigned(pack(index, width_of(slots)), index.shape[-1])


def _slot_of(side: Assigned, slots: int) -> Int[Tensor, "batch segments kv_heads segment"]:
    return unpack(side.slot, width_of(slots), side.segment).long()


def _spread(slots: Tensor, index: Tensor) -> Segments:
    """Every token gets the vector of its slot."""
    index = rearrange(index, "batch segments heads token -> batch segments token heads 1")
    return slots.gather(2, index.expand(*index.shape[:-1], slots.shape[-1]))


class LearnedSlots(Codec):
    """Nested learned slots: tokens share themselves out over the first m learned queries (`compress_segments`).

    slots: m. Fewer slots use a prefix of the same queries and are computed again, so no mass is lost. A token's
    nearest slot stands for it in `reconstruct`, at log2(m) bits each.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """dim: of a head. most: slots of the finest code."""

        dim: int
        kv_heads: int
        most: int

        def __post_init__(self) -> None:
            check_positive(self, "dim", "kv_heads", "most")

        def build(self) -> LearnedSlots:
            return LearnedSlots(self)

    class Side(NamedTuple):
        """mass, position: of the slots. assigned: as in `Assigned`."""

        mass: Float[Tensor, "batch segments slots kv_heads"]
        position: Float[Tensor, "batch segments slots kv_heads"]
        assigned: Assigned

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.queries = nn.Parameter(torch.randn(config.kv_heads, config.most, config.dim))

    def most(self, segment, kv_heads, dim):
        check_heads(self.config, kv_heads, dim)
        return min(segment, self.config.most)

    def _encode(self, k, v, slots):
        batch, segments, segment = k.shape[:3]
        count = torch.full((batch, segments, 1), slots, device=k.device)
        queries = self.queries[:, :slots].to(k.dtype)
        kept = compress_segments(k.flatten(1, 2), v.flatten(1, 2), queries, count, segment=segment)
        index = _assign(torch.cat((k, v), -1), torch.cat((kept.k, kept.v), -1))
        return Code(kept.k, kept.v, self.Side(kept.mass, kept.position, _assigned(index, slots)))

    def decode(self, code):
        return Slots(code.k, code.v, code.side.mass, code.side.position)

    def reconstruct(self, code):
        index = _slot_of(code.side.assigned, code.k.shape[2])
        return _spread(code.k, index), _spread(code.v, index)


class _Strided(Codec):
    """Slot j stands for the stride of tokens j·S/m … (j + 1)·S/m - 1. side: S."""

    def most(self, segment, kv_heads, dim):
        return segment

    def _encode(self, k, v, slots):
        segment = k.shape[2]
        if segment % slots:
            raise ValueError(f"slots: expected a divisor of the segment's {segment} tokens, got {slots}")
        return Code(*self._pool(*(x.unflatten(2, (slots, -1)) for x in (k, v))), (segment,))

    def decode(self, code):
        (segment,), slots = code.side, code.k.shape[2]
        mass = code.k.new_full(code.k.shape[:-1], segment / slots,
                               dtype=torch.promote_types(code.k.dtype, torch.float32))  # fmt: skip
        place = torch.arange(slots, device=mass.device, dtype=mass.dtype) * (segment / slots)
        return Slots(code.k, code.v, mass, (place + (segment / slots - 1) / 2)[:, None].expand_as(mass))

    def reconstruct(self, code):
        stride = code.side[0] // code.k.shape[2]
        return tuple(repeat(x, "b s m h d -> b s (m r) h d", r=stride) for x in code[:2])


class MeanPool(_Strided):
    """Means of S/m tokens in a row. slots: m, a divisor of the segment."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Nothing to choose."""

        def build(self) -> MeanPool:
            return MeanPool()

    def _pool(self, k, v):
        return (reduce(x, "b s m r h d -> b s m h d", "mean") for x in (k, v))


class StridedConvolution(_Strided):
    """A learned convolution of kernel and stride S/m, one for each ratio; it begins as mean pooling.

    k̂_j = Σ_r W_r k_{j·S/m + r}. slots: m, a segment's tokens over one of the ratios.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """dim: of a head. ratios: tokens of one slot."""

        dim: int
        kv_heads: int
        ratios: tuple[int, ...] = (4, 8, 16, 32, 64)

        def __post_init__(self) -> None:
            check_positive(self, "dim", "kv_heads")
            if not self.ratios or min(self.ratios) < 1:
                raise ValueError(f"ratios: expected at least one, all at least 1, got {self.ratios}")

        def build(self) -> StridedConvolution:
            return StridedConvolution(self)

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        mean = torch.eye(config.dim).expand(2, config.kv_heads, config.dim, config.dim)
        self.kernels = nn.ParameterDict(
            {str(r): nn.Parameter(repeat(mean / r, "kv h d e -> kv r h d e", r=r).clone()) for r in config.ratios}
        )

    def most(self, segment, kv_heads, dim):
        check_heads(self.config, kv_heads, dim)
        return segment

    def _pool(self, k, v):
        ratio = k.shape[3]
        if ratio not in self.config.ratios:
            raise ValueError(f"slots: expected a ratio in {self.config.ratios}, got {ratio} tokens for a slot")
        kernel = self.kernels[str(ratio)].to(k.dtype)
        return (torch.einsum("bsmrhd,rhde->bsmhe", x, w) for x, w in zip((k, v), kernel, strict=True))


class KMeans(Codec):
    """Lloyd's clusters of a segment's (key, value) pairs, for each head, from evenly spaced tokens.

    slots: clusters. Mass is the tokens of a cluster; one that lost them all keeps its place, with mass 0.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """steps: of Lloyd's iteration."""

        steps: int = 10

        def __post_init__(self) -> None:
            check_positive(self, "steps")

        def build(self) -> KMeans:
            return KMeans(self)

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config

    def most(self, segment, kv_heads, dim):
        return segment

    def _encode(self, k, v, slots):
        segment, dim = k.shape[2], k.shape[-1]
        tokens = torch.cat((k, v), -1).to(torch.promote_types(k.dtype, torch.float32))
        means = tokens[:, :, torch.arange(slots, device=k.device) * segment // slots]
        for _ in range(self.config.steps):
            index = _assign(tokens, means)
            mass = _masses(index, slots, tokens.dtype)
            total = torch.zeros_like(means).scatter_add(2, index.transpose(2, 3)[..., None].expand_as(tokens), tokens)
            means = torch.where(mass[..., None] > 0, total / mass.clamp(min=1)[..., None], means)
        means = means.to(k.dtype)
        return Code(means[..., :dim], means[..., dim:], _assigned(_assign(tokens, means.to(tokens.dtype)), slots))

    def decode(self, code):
        slots = code.k.shape[2]
        index = _slot_of(code.side, slots)
        dtype = torch.promote_types(code.k.dtype, torch.float32)
        mass = _masses(index, slots, dtype)
        place = torch.arange(code.side.segment, device=mass.device, dtype=dtype).expand(index.shape)
        total = torch.zeros_like(mass).scatter_add(2, index.transpose(2, 3), place.transpose(2, 3))
        return Slots(code.k, code.v, mass, total / mass.clamp(min=1))

    def reconstruct(self, code):
        index = _slot_of(code.side, code.k.shape[2])
        return _spread(code.k, index), _spread(code.v, index)


def _masses(index: Tensor, slots: int, dtype: torch.dtype) -> Float[Tensor, "batch segments slots kv_heads"]:
    index = index.transpose(2, 3)
    mass = torch.zeros(*index.shape[:2], slots, index.shape[3], device=index.device, dtype=dtype)
    return mass.scatter_add(2, index, torch.ones_like(index, dtype=dtype))
