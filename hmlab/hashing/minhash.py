"""MinHash: sets of token ids whose least elements under random orders agree as often as the sets are similar.

    hash_i(A) = min over a in A of π_i(a),     P[hash agrees] = J(A, B) = |A ∩ B| / |A ∪ B|
    P[same code in some table] = 1 - (1 - J^bits)^tables

Source: Broder 1997, "On the resemblance and containment of documents"; bands after Leskovec, Rajaraman & Ullman,
"Mining of Massive Datasets", ch. 3. π_i is a random polynomial of degree 7 mod 2^31 - 1, an 8-wise independent family
(Wegman & Carter 1981), whose least elements are uniform to within the tests' reach, which those of a linear one are
not on runs of consecutive ids (Indyk 2001). Two ids get the same rank with probability below 2^-28.

A probe replaces the least element of one order by the second least, the smallest second first: that slot is found
whose set lacks the least element.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int, Int32
from torch import Tensor

from hmlab.hashing.family import PRIME, Family, check_probes, combined, with_probes
from hmlab.layers import check_positive

_INDEPENDENCE = 8


@dataclass(frozen=True, kw_only=True)
class Config:
    """tables: bands. bits: least elements that make a code, called rows of a band."""

    tables: int = 8
    bits: int = 4

    def __post_init__(self) -> None:
        check_positive(self, "tables", "bits")

    def build(self) -> MinHash:
        return MinHash(self)


class MinHash(Family):
    """polynomial: coefficients of the orders, highest power first `[8, tables, bits]`."""

    similarity = "jaccard"

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, self.tables, self.bits = config, config.tables, config.bits
        self.register_buffer("polynomial", torch.randint(1, PRIME, (_INDEPENDENCE, config.tables, config.bits)))
        self.register_buffer("place", torch.randint(1, PRIME, (config.tables, config.bits)))

    def codes(self, tokens: Int[Tensor, "batch segments length"], valid: Bool[Tensor, "batch segments length"] | None
              = None, *, probes: int = 1) -> Int32[Tensor, "batch segments 1 tables {probes}"]:
        """The code of each segment's set of ids (0 to 2^31 - 2; any head's), then `probes - 1` neighbours.

        valid: False at padding. probes: bits + 1 at most; a set of one id repeats its code. Equal sets have equal
        codes, whatever the order and number of their ids; a set without ids has code -1.
        """
        check_probes(probes, self.bits + 1)
        if tokens.ndim != 3 or tokens.is_floating_point():
            raise ValueError(f"tokens: expected integers [batch, segments, length], got {tokens.dtype} of shape "
                             f"{list(tokens.shape)}")  # fmt: skip
        if valid is None:
            valid = torch.ones_like(tokens, dtype=torch.bool)
        ids = tokens.masked_fill(~valid, 0).long()[..., None, None]
        rank = self.polynomial[0]
        for coefficient in self.polynomial[1:]:
            rank = (rank * ids + coefficient) % PRIME
        rank = torch.where(valid[..., None, None], rank, PRIME)
        least = rank.amin(2)
        if probes == 1:
            code = combined(least, self.place)[..., None].int()
        else:
            second = torch.where(rank == least[:, :, None], PRIME, rank).amin(2)
            others = torch.where(second == PRIME, least, second)[..., None]
            code = with_probes(least, others, second[..., None].double(), self.place, probes)
        return torch.where(valid.any(2)[..., None, None], code, -1)[:, :, None]

    def hash_probability(self, similarity):
        return similarity
