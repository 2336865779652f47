"""p-stable hashing (E2LSH): an elementary hash is the cell of width w on a random line into which x falls.

    hash_i = ⌊(a_i · x + b_i) / w⌋                    a_i ~ N(0, I), b_i uniform on [0, w)
    P[hash agrees] = 1 - 2 Φ(-r) - 2 / (√(2π) r) (1 - exp(-r² / 2)),    r = w / c, c the Euclidean distance

Source: Datar et al. 2004, "Locality-sensitive hashing scheme based on p-stable distributions", Gaussian case. Probes
after Lv et al. 2007: one hash moved to a neighbouring cell, the nearest cell wall first. Cells are combined into a
31-bit code by a random linear form, so different cells share a code with probability 2^-31.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int32, Int64
from torch import Tensor

from hmlab.hashing.family import PRIME, Family, check_probes, check_similarity, normal_cdf, project, with_probes
from hmlab.layers import check_positive


@dataclass(frozen=True, kw_only=True)
class Config:
    """dim: of the vectors. heads: tables of their own for each head, or 1: shared. bits: lines to a code.
    width: w, in the units of x."""

    dim: int
    heads: int = 1
    tables: int = 4
    bits: int = 8
    width: float = 1.0

    def __post_init__(self) -> None:
        check_positive(self, "dim", "heads", "tables", "bits")
        if not 0 < self.width < math.inf:
            raise ValueError(f"width: expected a positive number, got {self.width}")

    def build(self) -> PStable:
        return PStable(self)


class PStable(Family):
    """weight: directions of the lines `[heads, tables, bits, dim]`. shift: b / w `[heads, tables, bits]`."""

    similarity = "distance"

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, self.tables, self.bits = config, config.tables, config.bits
        shape = (config.heads, config.tables, config.bits)
        self.register_buffer("weight", torch.randn(*shape, config.dim))
        self.register_buffer("shift", torch.rand(shape))
        self.register_buffer("place", torch.randint(1, PRIME, shape))

    def codes(self, x: Float[Tensor, "batch time heads dim"], *, probes: int = 1
              ) -> Int32[Tensor, "batch time heads tables {probes}"]:
        """The code of each vector, then `probes - 1` neighbours, 1 + 2 · bits in all at most, nearest first."""
        check_probes(probes, 1 + 2 * self.bits)
        cell, rest = self._cells(x)
        others = torch.stack((cell - 1, cell + 1), -1)
        return with_probes(cell, others, torch.stack((rest, 1 - rest), -1), self.place, probes)

    def hash_probability(self, similarity):
        # At distance 0 the ratio is infinite; the largest number of the type leads to the same limit.
        ratio = (self.config.width / similarity).clamp(max=torch.finfo(similarity.dtype).max ** 0.5 / 2)
        missed = -torch.expm1(-(ratio**2) / 2) * 2 / (math.sqrt(2 * math.pi) * ratio)
        return 1 - 2 * normal_cdf(-ratio) - missed

    def probe_probability(self, x: Float[Tensor, "batch time heads dim"], distance: float, *, probes: int = 1
                          ) -> Float[Tensor, "batch time heads tables {probes}"]:
        """Given where x lies in its cells, the probability that a vector at that distance has each of x's probes.

        a · (y - x) ~ N(0, distance²), independently over the lines. Raises ValueError by argument.
        """
        check_probes(probes, 1 + 2 * self.bits)
        check_similarity("distance", torch.tensor(distance))
        rest = self._cells(x)[1]
        spread = max(distance / self.config.width, torch.finfo(rest.dtype).tiny)
        # Probability of the cell below, of the same cell and of the cell above, for each line.
        wall = torch.stack([normal_cdf((edge - rest) / spread) for edge in (-1, 0, 1, 2)], -1)
        below, same, above = wall.diff(dim=-1).unbind(-1)
        code = same.log().sum(-1, keepdim=True).exp()
        order = torch.stack((rest, 1 - rest), -1).flatten(-2).argsort(dim=-1, stable=True)[..., : probes - 1]
        odds = (torch.stack((below, above), -1) / same[..., None]).flatten(-2)
        return torch.cat((code, code * odds.gather(-1, order)), -1)

    def _cells(self, x: Float[Tensor, "batch time heads dim"]
               ) -> tuple[Int64[Tensor, "batch time heads tables bits"], Float[Tensor, "batch time heads tables bits"]]:
        """Number of the cell on each line, and how far into it x lies, 0 to 1."""
        position = project(x.detach(), self.weight)
        position = position / self.config.width + self.shift.to(position.dtype)
        cell = position.floor()
        return cell.long(), position - cell
