"""A tree index: vectors are halved at the median along one direction, each half again along the next.

    level l of the path = [d_l · x > median of the vectors that share the first l levels]

A code is the path, its first level in the lowest bit. There is one direction for each level of a tree, orthonormal
and random: a k-d tree in randomly turned axes (Silpa-Anan & Hartley 2008); one threshold for each node. Other
directions are given to `fit`: trained normals, or the leading components of a PCA put before the tree.

    P[level agrees] = 1 - θ / π      for x, y with independent N(0, 1) coordinates of correlation cos θ

since such coordinates are independent along orthonormal directions with medians 0 at every node. For other data it
is an approximation. Before `fit` all thresholds are 0, the medians of any symmetric distribution.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int32
from torch import Tensor

from hmlab.hashing.family import Family, check_probes, project
from hmlab.layers import check_positive


@dataclass(frozen=True, kw_only=True)
class Config:
    """dim: of the vectors, at least `bits`. heads: trees of their own for each head, or 1: shared. tables: trees.
    bits: depth, 24 at most."""

    dim: int
    heads: int = 1
    tables: int = 4
    bits: int = 8

    def __post_init__(self) -> None:
        check_positive(self, "dim", "heads", "tables", "bits")
        if self.bits > min(24, self.dim):
            raise ValueError(f"bits: expected at most {min(24, self.dim)} (24 and dim), got {self.bits}")

    def build(self) -> Tree:
        return Tree(self)


class Tree(Family):
    """direction `[heads, tables, bits, dim]`. threshold: of the nodes `[heads, tables, 2^bits - 1]`; those of level l
    begin at 2^l - 1, in the order of their paths."""

    similarity = "angle"

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, self.tables, self.bits = config, config.tables, config.bits
        drawn = torch.randn(config.heads, config.tables, config.dim, config.bits)
        self.register_buffer("direction", torch.linalg.qr(drawn).Q.mT.contiguous())
        self.register_buffer("threshold", torch.zeros(config.heads, config.tables, 2**config.bits - 1))

    @torch.no_grad()
    def fit(self, x: Float[Tensor, "batch time heads dim"], *,
            directions: Float[Tensor, "heads_or_1 tables bits dim"] | None = None) -> Tree:
        """Put the thresholds at the medians of these vectors, in place; returns the tree.

        Every leaf then holds ⌊n / 2^bits⌋ or ⌈n / 2^bits⌉ of the n vectors whose projections differ. directions: to
        use from now on. Raises ValueError by argument.
        """
        if directions is not None:
            if directions.shape != self.direction.shape:
                raise ValueError(f"directions: expected {list(self.direction.shape)}, got {list(directions.shape)}")
            self.direction.copy_(directions)
        projection = project(x.detach(), self.direction)
        heads = self.config.heads
        # Shared trees are built from the vectors of all heads.
        projection = projection.flatten(0, 1).transpose(0, 1) if heads > 1 else projection.flatten(0, 2)[None]
        projection = projection.permute(0, 2, 3, 1)  # heads, tables, bits, vectors
        count = projection.shape[-1]
        if count < 2**self.bits:
            raise ValueError(f"x: expected at least 2^bits = {2**self.bits} vectors, got {count}")
        path = torch.zeros_like(projection[:, :, 0], dtype=torch.int64)
        for level in range(self.bits):
            value, nodes = projection[:, :, level], 2**level
            order = value.argsort(dim=-1, stable=True)
            order = order.gather(-1, path.gather(-1, order).argsort(dim=-1, stable=True))
            size = torch.zeros(*path.shape[:2], nodes, dtype=torch.int64, device=path.device)
            size.scatter_add_(-1, path, torch.ones_like(path))
            middle = size.cumsum(-1) - size // 2  # where the upper half of each node begins
            ranked = value.gather(-1, order)
            threshold = ranked.gather(-1, middle - 1).lerp(ranked.gather(-1, middle), 0.5)
            self.threshold[..., nodes - 1 : 2 * nodes - 1] = threshold.to(self.threshold.dtype)
            place = torch.empty_like(order).scatter_(-1, order, torch.arange(count, device=x.device).expand_as(order))
            path = path + nodes * (place >= middle.gather(-1, path))
        return self

    def codes(self, x: Float[Tensor, "batch time heads dim"], *, probes: int = 1
              ) -> Int32[Tensor, "batch time heads tables {probes}"]:
        """The leaf of each vector, then the leaves beyond the `probes - 1` walls on its path nearest to it.

        Behind a wall the path goes on as the vector would there. probes: bits + 1 at most.
        """
        check_probes(probes, self.bits + 1)
        projection = project(x.detach(), self.direction)
        heads, tables = projection.shape[2:4]
        tree = torch.arange(self.threshold.shape[0] * tables, device=x.device).view(-1, tables)
        first = (tree * (2**self.bits - 1)).expand(heads, -1)[..., None]
        # One descent for the leaf itself, and one for each wall to cross.
        crosses = torch.arange(-1, self.bits if probes > 1 else 0, device=x.device)
        path = torch.zeros(*projection.shape[:4], len(crosses), dtype=torch.int64, device=x.device)
        margin = []
        for level in range(self.bits):
            threshold = self.threshold.flatten()[first + 2**level - 1 + path].to(projection.dtype)
            signed = projection[..., level, None] - threshold
            margin.append(signed[..., 0].abs())
            upper = (signed > 0) ^ (crosses == level)
            path = path + 2**level * upper
        nearest = torch.stack(margin, -1).argsort(dim=-1, stable=True)[..., : probes - 1]
        return torch.cat((path[..., :1], path[..., 1:].gather(-1, nearest)), -1).int() if probes > 1 else path.int()

    def hash_probability(self, similarity):
        return 1 - similarity / math.pi
