"""Random hyperplanes: bit i of a code is [w_i · x > 0], w_i ~ N(0, I).

    P[bit agrees] = 1 - θ / π        θ: angle between the vectors, radians

Source: Charikar 2002, "Similarity estimation techniques from rounding algorithms"; probes (one bit flipped, least
margin first) after Lv et al. 2007. The probability of each probe given the query's own margins is ours:
for y at angle θ from a unit x, w · y = cos θ (w · x) + sin θ g with g ~ N(0, 1) independent of w · x, so bit i of y
differs with probability Φ(-|w_i · x| cot θ), independently over the bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from hmlab_kernels.hash_codes import hash_codes, margins
from jaxtyping import Float, Int32
from torch import Tensor

from hmlab.hashing.family import Family, check_probes, check_similarity, normal_cdf
from hmlab.layers import check_positive


@dataclass(frozen=True, kw_only=True)
class Config:
    """dim: of the vectors. heads: tables of their own for each head, or 1: shared. bits: of a code, 31 at most."""

    dim: int
    heads: int = 1
    tables: int = 4
    bits: int = 8

    def __post_init__(self) -> None:
        check_positive(self, "dim", "heads", "tables", "bits")
        if self.bits > 31:
            raise ValueError(f"bits: expected at most 31, got {self.bits}")

    def build(self) -> Hyperplane:
        return Hyperplane(self)


class Hyperplane(Family):
    """weight: normals of the hyperplanes `[heads, tables, bits, dim]`."""

    similarity = "angle"

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, self.tables, self.bits = config, config.tables, config.bits
        self.register_buffer("weight", torch.randn(config.heads, config.tables, config.bits, config.dim))

    def codes(self, x: Float[Tensor, "batch time heads dim"], *, probes: int = 1
              ) -> Int32[Tensor, "batch time heads tables {probes}"]:
        """The code of each vector, then `probes - 1` neighbours (bits + 1 in all at most), likeliest first."""
        return hash_codes(x, self.weight.to(x.dtype), probes=probes)

    def hash_probability(self, similarity):
        return 1 - similarity / math.pi

    def probe_probability(self, x: Float[Tensor, "batch time heads dim"], angle: float, *, probes: int = 1
                          ) -> Float[Tensor, "batch time heads tables {probes}"]:
        """Given the margins of x, the probability that a vector at that angle has the code of each of x's probes.

        Over the draw of the hyperplanes across x; probes as in `codes`. Raises ValueError by argument.
        """
        check_probes(probes, self.bits + 1)
        check_similarity("angle", torch.tensor(angle))
        margin, differs = self._certainty(x, angle)
        differs = differs.clamp(max=1 - torch.finfo(differs.dtype).eps)
        same = (1 - differs).log().sum(-1, keepdim=True).exp()
        flipped = margin.sort(dim=-1, stable=True).indices[..., : probes - 1]
        odds = differs / (1 - differs)
        return torch.cat((same, same * odds.gather(-1, flipped)), -1)

    def _certainty(self, x: Float[Tensor, "batch time heads dim"], angle: float
                   ) -> tuple[Float[Tensor, "batch time heads tables bits"],
                              Float[Tensor, "batch time heads tables bits"]]:  # fmt: skip
        """The margin of each bit of x, and the probability that a vector at that angle has another."""
        margin = margins(x.detach(), self.weight.to(x.dtype))
        return margin, normal_cdf(-margin / math.tan(angle)) if angle else torch.zeros_like(margin)
