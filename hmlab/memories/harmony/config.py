"""What can be chosen about the hierarchy."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args, get_origin, get_type_hints

from hmlab.information import DensityConfig
from hmlab.layers import check_positive

Family = Literal["learned", "hyperplane", "cross_polytope", "p_stable", "mixture", "tree", "minhash"]
Codec = Literal["learned", "mean_pool", "strided_convolution", "k_means", "landmarks"]


@dataclass(frozen=True, kw_only=True)
class HierarchyConfig:
    """Units: tokens, slots, bits of a code.

    Short term. window: W; a token sees W to W + S - 1 tokens exactly, itself included. segment: S, at most 256. sinks:
    first tokens of a document that are always seen exactly.
    Medium term. ratios: tokens per slot that the policy chooses from, divisors of the segment. policy: "learned", a
    network on each segment; "density", the denser than the document so far, the finer, for use without training.
    budget: mean ratio to be met. codec: what makes slots of segments. capacity: slots that can be read at a time, the
    oldest are forgotten. phase: slots carry the rotary phase of their mean position. spread: the score of a slot
    allows for the spread of its keys, by amounts that are learned (needs keys of unit norm).
    densities: from `hmlab.information.DENSITIES`; table, bigram_table: buckets that their counts have.
    Addressing. retrieval: "hash", the best of those with equal codes; "exact", the best of all; "all", no choice;
    "none", no slots are made, and what leaves the window is forgotten. picks: slots that a query reads. family: of the
    codes; tables, bits, probes (codes looked up per table), candidates (most that are ranked), reduced (dimensions
    before hashing, by random projection; 0: all).
    sharing: who shares a set of slots: "none", each head of each query has its own; "heads", those of one key head;
    "block", besides these, `query_block` queries in a row, chosen by the block before.
    confidence: slots drawn to estimate what was missed. fallback: below this confidence all probes are looked up.
    Losses in training, as weights. distortion_weight: of the slots' distortion. controller_rate: how fast the price of
    a slot follows the budget. retrieval_weight: of the codes' retrieval loss.
    """

    window: int = 256
    segment: int = 64
    sinks: int = 4
    ratios: tuple[int, ...] = (4, 8, 16, 32, 64)
    policy: Literal["learned", "density"] = "learned"
    budget: float = 16.0
    codec: Codec = "learned"
    capacity: int = 16384
    phase: bool = True
    spread: bool = True
    densities: tuple[str, ...] = ("surprisal", "spectral")
    table: int = 1024
    bigram_table: int = 4096
    retrieval: Literal["hash", "exact", "all", "none"] = "hash"
    picks: int = 32
    family: Family = "learned"
    tables: int = 8
    bits: int = 8
    probes: int = 4
    candidates: int = 512
    reduced: int = 0
    sharing: Literal["none", "heads", "block"] = "none"
    query_block: int = 64
    confidence: int = 16
    fallback: float = 0.0
    distortion_weight: float = 0.1
    controller_rate: float = 0.02
    retrieval_weight: float = 0.1

    def __post_init__(self) -> None:
        check_positive(self, "window", "segment", "capacity", "picks", "tables", "bits", "probes", "query_block",
                       "confidence")  # fmt: skip
        for name, literal in get_type_hints(HierarchyConfig).items():
            choices = get_args(literal) if get_origin(literal) is Literal else ()
            if choices and getattr(self, name) not in choices:
                raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {getattr(self, name)!r}")
        if self.segment > 256:
            raise ValueError(f"segment: expected at most 256, got {self.segment}")
        if not self.ratios or any(r < 1 or self.segment % r for r in self.ratios):
            raise ValueError(f"ratios: expected divisors of the segment ({self.segment}), got {self.ratios}")
        if list(self.ratios) != sorted(set(self.ratios)):
            raise ValueError(f"ratios: expected rising numbers, got {self.ratios}")
        if not self.ratios[0] <= self.budget <= self.ratios[-1] and len(self.ratios) > 1:
            raise ValueError(f"budget: expected {self.ratios[0]} to {self.ratios[-1]}, as ratios allow, "
                             f"got {self.budget}")  # fmt: skip
        for name in ("sinks", "reduced", "distortion_weight", "controller_rate", "retrieval_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected at least 0, got {getattr(self, name)}")
        if self.codec != "learned" and self.sinks:
            raise ValueError(f"sinks: expected 0 with codec {self.codec!r}, which takes whole segments, "
                             f"got {self.sinks}")  # fmt: skip
        if self.candidates < self.tables * self.probes:
            raise ValueError(f"candidates: expected at least tables · probes = {self.tables * self.probes}, "
                             f"got {self.candidates}")  # fmt: skip
        if self.retrieval == "hash" and self.probes > self.most_probes:
            raise ValueError(f"probes: expected at most {self.most_probes} for {self.family} of {self.bits} bits, "
                             f"got {self.probes}")  # fmt: skip
        if not self.budget > 0:
            raise ValueError(f"budget: expected more than 0, got {self.budget}")
        if self.sharing == "block" and self.segment % self.query_block:
            raise ValueError(f"query_block: expected a divisor of the segment ({self.segment}), "
                             f"got {self.query_block}")  # fmt: skip
        if not 0 <= self.fallback <= 1:
            raise ValueError(f"fallback: expected 0 to 1, got {self.fallback}")
        if self.policy == "density" and not self.densities and len(self.ratios) > 1:
            raise ValueError("densities: expected at least one for policy 'density', got none")
        if self.densities:
            self.density()

    def density(self) -> DensityConfig:
        """The densities' own configuration."""
        return DensityConfig(densities=self.densities, segment=self.segment, table=self.table,
                             bigram_table=self.bigram_table, spectral_order=2)  # fmt: skip

    @property
    def of_tokens(self) -> bool:
        """Whether token ids are needed."""
        counted = set(self.densities) - {"spectral"} if len(self.ratios) > 1 and self.retrieval != "none" else set()
        return bool(counted) or (self.retrieval == "hash" and self.family == "minhash")

    @property
    def counts(self) -> list[int]:
        """Slots of a segment at each ratio."""
        return [self.segment // ratio for ratio in self.ratios]

    @property
    def most_probes(self) -> int:
        """Codes that can be looked up in a table."""
        return {"cross_polytope": 2 ** max(self.bits - 1, 0), "mixture": 2**self.bits}.get(self.family, self.bits + 1)

    @property
    def most(self) -> int:
        """Slots of a segment at the finest ratio."""
        return self.segment // self.ratios[0]

    @property
    def reach(self) -> int:
        """Tokens before the newest one that some window holds."""
        return self.window + self.segment - 2

    @property
    def held(self) -> int:
        """The most slots that a state holds: those that can be read, and those of segments still in the window."""
        return self.capacity + (math.ceil((self.window - 1) / self.segment) + 1) * self.most
