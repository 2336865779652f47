"""Buckets that split and merge by load and by query frequency: a binary tree over the bits of the codes.

A bucket holds the codes that share their lowest `depth` bits; depth differs from bucket to bucket, as in extendible
hashing (Fagin et al. 1979), whose directory of 2^bits entries says how deep the bucket of each code lies. With

    load(node) = slots whose code has the node's bits,    work(node) = load · share of the probes that went there

a node is divided in two if load > most_load or work > most_work, and stays divided while load > least_load or
work > least_work. So after every `update`, in every table:

    every bucket has load ≤ most_load and work ≤ most_work, but for those of full depth, whose codes are equal
    two buckets that could merge (both halves of one node) have load > least_load or work > least_work together

Two buckets lie between one split and the next merge, so a load about a bound does not make buckets flicker. Every
code has exactly one bucket, and slots and queries are sent there by the same directory, so a slot is found by
whoever has its code, whatever the divisions. The rule of division by work and its bounds are ours.

Only `update` changes anything: it is called at segment boundaries with what the segment wrote, evicted and probed.
A new directory moves slots between buckets; sort them anew: `hmlab_kernels.bucket_lookup.buckets(adaptive.of(...))`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float32, Int, Int8, Int32
from torch import Tensor

from hmlab.hashing.probing import NOWHERE
from hmlab.layers import check_positive


class State(NamedTuple):
    """For every code (its lowest bits): depth of its bucket, slots that have it, and probes of late that named it."""

    depth: Int8[Tensor, "batch heads tables codes"]
    load: Int32[Tensor, "batch heads tables codes"]
    probed: Float32[Tensor, "batch heads tables codes"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """bits: of the codes, the lowest of them if they have more; a directory takes 9 · 2^bits bytes per table.
    most_load, least_load: in slots. most_work, least_work: in slots scanned per probe. decay: of the counts of probes
    at every update."""

    bits: int = 10
    most_load: int = 64
    least_load: int = 32
    most_work: float = math.inf
    least_work: float = math.inf
    decay: float = 0.9

    def __post_init__(self) -> None:
        check_positive(self, "bits", "most_load", "most_work")
        if self.bits > 24:
            raise ValueError(f"bits: expected at most 24, got {self.bits}")
        for what in ("load", "work"):
            least, most = getattr(self, f"least_{what}"), getattr(self, f"most_{what}")
            if not 0 <= least <= most:
                raise ValueError(f"least_{what}: expected 0 to most_{what} ({most}), got {least}")
        if not 0 <= self.decay <= 1:
            raise ValueError(f"decay: expected 0 to 1, got {self.decay}")

    def build(self) -> AdaptiveBuckets:
        return AdaptiveBuckets(self)


class AdaptiveBuckets:
    """The rules of division; what is divided is in the state."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def init_state(self, batch: int, heads: int, tables: int, *, device: torch.device | str | None = None) -> State:
        """No slots: one bucket, of depth 0, in every table."""
        shape = (batch, heads, tables, 2**self.config.bits)
        return State(torch.zeros(shape, dtype=torch.int8, device=device),
                     torch.zeros(shape, dtype=torch.int32, device=device),
                     torch.zeros(shape, dtype=torch.float32, device=device))  # fmt: skip

    def update(
        self,
        state: State,
        *,
        written: Int[Tensor, "batch slots heads tables"] | None = None,
        evicted: Int[Tensor, "batch old_slots heads tables"] | None = None,
        probed: Int[Tensor, "batch time heads tables probes"] | None = None,
    ) -> State:
        """The state after a segment: counts what its codes name (negative ones are nothing), splits and merges."""
        load, asked = state.load, state.probed * self.config.decay
        if written is not None:
            load = load + self._count(written[..., None])
        if evicted is not None:
            load = load - self._count(evicted[..., None])
        if probed is not None:
            asked = asked + self._count(probed).float()
        return State(self._depth(state.depth, load, asked), load, asked)

    def of(self, state: State, codes: Int[Tensor, "batch items heads tables *probes"]
           ) -> Int32[Tensor, "batch items heads tables *probes"]:
        """The bucket of each code: its lowest `depth` bits below a leading 1. Negative codes stay as they are."""
        depth = self._read(state.depth, codes).int()
        one = torch.ones_like(depth)
        size = one << depth
        return torch.where(codes < 0, codes, size | (codes & (size - 1))).int()

    def loads(self, state: State) -> Int32[Tensor, "batch heads tables codes"]:
        """Slots in the bucket of each code."""
        return self._of_bucket(state.depth, state.load)

    def gate(self, state: State, codes: Int[Tensor, "batch items heads tables *probes"], *, share: float
             ) -> Int32[Tensor, "batch items heads tables *probes"]:
        """Codes whose bucket is hot; the others become `NOWHERE`, so what lies there is not found.

        Hot are the most probed buckets of a table that together had `share` (0 to 1) of the probes; all of them
        before any probe was counted. Raises ValueError by argument.
        """
        if not 0 < share <= 1:
            raise ValueError(f"share: expected above 0 and at most 1, got {share}")
        asked = self._of_bucket(state.depth, state.probed)
        code = torch.arange(asked.shape[-1], device=asked.device)
        # Every bucket once: by its least code, which is its low bits.
        first = code >> state.depth == 0
        count, order = asked.masked_fill(~first, -1).sort(dim=-1, descending=True, stable=True)
        count = count.clamp(min=0)
        total = count.sum(-1, keepdim=True)
        hot = (count.cumsum(-1) - count < share * total) & (count > 0) | (total == 0)
        hot = torch.zeros_like(hot).scatter(-1, order, hot)
        hot = hot.gather(-1, code & ((1 << state.depth.long()) - 1))
        return torch.where(self._read(hot, codes) | (codes < 0), codes, NOWHERE).int()

    def _count(self, codes: Int[Tensor, "batch items heads tables probes"]
               ) -> Int32[Tensor, "batch heads tables codes"]:
        counts = codes.new_zeros(codes.shape[0], *codes.shape[2:4], 2**self.config.bits, dtype=torch.int32)
        codes = codes.permute(0, 2, 3, 1, 4).flatten(3)
        return counts.scatter_add(-1, codes.long() & counts.shape[-1] - 1, (codes >= 0).int())

    def _depth(self, depth: Tensor, load: Tensor, asked: Tensor) -> Int8[Tensor, "batch heads tables codes"]:
        c = self.config
        total = asked.sum(-1, keepdim=True)
        share = asked / torch.where(total > 0, total, 1)
        new = torch.zeros_like(depth)
        for level in range(c.bits):
            # Codes of one node at this level lie 2^level apart.
            slots, probes = (t.unflatten(-1, (-1, 2**level)).sum(-2) for t in (load, share))
            was = depth.unflatten(-1, (-1, 2**level)).amax(-2) > level
            work = slots * probes
            divided = (slots > c.most_load) | (work > c.most_work)
            divided |= was & ((slots > c.least_load) | (work > c.least_work))
            new = new + divided.repeat(1, 1, 1, 2 ** (c.bits - level)).to(new.dtype)
        return new

    def _of_bucket(self, depth: Tensor, counts: Tensor) -> Tensor:
        """Counts summed over the bucket of each code."""
        sums = torch.zeros_like(counts)
        for level in range(self.config.bits + 1):
            node = counts.unflatten(-1, (-1, 2**level)).sum(-2).to(counts.dtype)
            sums = torch.where(depth == level, node.repeat(1, 1, 1, 2 ** (self.config.bits - level)), sums)
        return sums

    def _read(self, directory: Tensor, codes: Tensor) -> Tensor:
        """The directory's entry of each code, in the shape of the codes."""
        items = codes.movedim(1, 3)
        place = items.flatten(3).long() & directory.shape[-1] - 1
        return directory.gather(-1, place).view(items.shape).movedim(3, 1)
