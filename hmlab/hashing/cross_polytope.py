"""Cross-polytopes: an elementary hash is the vertex ±e_i of a randomly turned cross-polytope nearest to x.

    hash = argmax_i |w_i · x|, plus `rows` if that coordinate is negative      w_i ~ N(0, I), i < rows
    P[hash agrees] = 2 m ∫∫_{u, v > 0} φ_ρ(u, v) G_ρ(u, v)^(m - 1) du dv       m = rows, ρ = cos θ
    G_ρ(u, v) = P[|U| ≤ u, |V| ≤ v]                                            U, V standard normal of correlation ρ

Source: Andoni et al. 2015 (arXiv 1509.02897), who give the limit ln 1/P = θ'^2 / (4 - θ'^2) ln m with θ' the distance
of the unit vectors. The exact law above holds because rows are independent Gaussians instead of a rotation's, which
for a dim well above `rows` are nearly the same. G comes from Plackett's ∂G/∂ρ = 2 φ_ρ(u, v) - 2 φ_ρ(u, -v)
with ρ = sin α (Drezner & Wesolowsky 1990); the integrals are taken to 1e-6 from an angle of 0.01 on.

A code is the number whose digits are `bits` such hashes. A probe replaces one of them by the coordinate of next
rank; the smallest gap between the two comes first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from hmlab_kernels.hash_codes import hash_codes, margins
from jaxtyping import Float, Int32
from torch import Tensor

from hmlab.hashing.family import PRIME, Family, check_probes, check_similarity, normal_cdf, quadrature, with_probes
from hmlab.layers import check_positive

# Standard deviations beyond which a normal density is 0 in float64 sums.
_REACH = 8.5


@dataclass(frozen=True, kw_only=True)
class Config:
    """dim: of the vectors. heads: tables of their own for each head, or 1: shared. rows: coordinates of a
    cross-polytope, 256 at most. bits: cross-polytopes to a code, (2 rows)^bits codes, fewer than 2^31."""

    dim: int
    heads: int = 1
    tables: int = 4
    bits: int = 1
    rows: int = 64

    def __post_init__(self) -> None:
        check_positive(self, "dim", "heads", "tables", "bits", "rows")
        if self.rows > 256:
            raise ValueError(f"rows: expected at most 256, got {self.rows}")
        if (2 * self.rows) ** self.bits >= PRIME:
            raise ValueError(f"bits: expected (2 rows)^bits below 2^31, got {2 * self.rows}^{self.bits}")

    def build(self) -> CrossPolytope:
        return CrossPolytope(self)


class CrossPolytope(Family):
    """weight: rows of the cross-polytopes `[heads, tables · bits, rows, dim]`."""

    similarity = "angle"

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, self.tables, self.bits = config, config.tables, config.bits
        shape = (config.heads, config.tables * config.bits, config.rows, config.dim)
        self.register_buffer("weight", torch.randn(shape))

    def codes(self, x: Float[Tensor, "batch time heads dim"], *, probes: int = 1
              ) -> Int32[Tensor, "batch time heads tables {probes}"]:
        """The code of each vector, then `probes - 1` neighbours, 1 + bits · (rows - 1) in all at most."""
        rows, weight = self.config.rows, self.weight.to(x.dtype)
        check_probes(probes, 1 + self.bits * (rows - 1))
        ranks = min(probes, rows)
        ranked = hash_codes(x, weight, family="cross_polytope", probes=ranks)
        if self.bits == 1:
            return ranked
        ranked = ranked.unflatten(-2, (self.tables, self.bits)).long()
        place = (2 * rows) ** torch.arange(self.bits, device=x.device)
        gap = x.new_zeros(*ranked.shape[:-1], 0)
        if probes > 1:
            gap = self._gaps(margins(x.detach(), weight), ranks)
        return with_probes(ranked[..., 0], ranked[..., 1:], gap, place, probes)

    def hash_probability(self, similarity):
        angle = similarity.double().clamp(max=math.pi)[..., None, None]
        rho, apart = angle.cos(), angle.sin()
        node, weight = quadrature(96, similarity)
        u = (node + 1)[:, None] * _REACH / 2
        # v = ρ u + sin θ z; v > 0 bounds z from below.
        low = (-rho * u / apart).clamp(-_REACH, _REACH)
        z = low + (_REACH - low) * (node + 1) / 2
        v = (rho * u + apart * z).clamp(min=0)
        density = torch.exp(-(u**2 + z**2) / 2) / (2 * math.pi)
        area = weight[:, None] * (_REACH / 2) * weight * (_REACH - low) / 2
        rows = self.config.rows
        inside = _both_within(u, v, rho) ** (rows - 1)
        return (2 * rows * (density * inside * area).sum((-1, -2))).clamp(0, 1).to(similarity.dtype)


    def probe_probability(self, x: Float[Tensor, "batch time heads dim"], angle: float, *, probes: int = 1
                          ) -> Float[Tensor, "batch time heads tables {probes}"]:
        """Given the coordinates of x, the probability that a vector at that angle has the code of each of x's probes.

        Vertex i wins with probability ∫_{v > 0} N(v; ρ |u_i|, sin² θ) Π_{j ≠ i} P[|V_j| ≤ v] dv over the draw of the
        rows across x, V_j ~ N(ρ |u_j|, sin² θ). Holds probes · rows · 64 numbers per hash. Raises ValueError.
        """
        rows = self.config.rows
        check_probes(probes, 1 + self.bits * (rows - 1))
        check_similarity("angle", torch.tensor(angle))
        ranks = min(probes, rows)
        coordinate = margins(x.detach(), self.weight.to(x.dtype))
        rho, apart = math.cos(angle), max(math.sin(angle), 1e-6)
        order = coordinate.sort(dim=-1, descending=True, stable=True).indices[..., :ranks]
        mean = rho * coordinate / apart  # all in units of sin θ
        winner = mean.gather(-1, order)
        node, weight = (part.to(mean.dtype) for part in quadrature(64, mean))
        low = (-winner).clamp(-_REACH, _REACH)[..., None]
        z = low + (_REACH - low) * (node + 1) / 2
        v = (winner[..., None] + z).clamp(min=0)[..., None]
        within = normal_cdf(v - mean[..., None, None, :]) - normal_cdf(-v - mean[..., None, None, :])
        others = order[..., None, None] != torch.arange(rows, device=x.device)
        density = torch.exp(-(z**2) / 2) / math.sqrt(2 * math.pi) * weight * (_REACH - low) / 2
        wins = (density * torch.where(others, within, 1).prod(-1)).sum(-1)
        wins = wins.unflatten(-2, (self.tables, self.bits))
        code = wins[..., 0].prod(-1, keepdim=True)
        odds = wins[..., 1:] / wins[..., :1].clamp(min=torch.finfo(wins.dtype).tiny)
        cheapest = self._gaps(coordinate, ranks).flatten(-2).argsort(dim=-1, stable=True)[..., : probes - 1]
        return torch.cat((code, code * odds.flatten(-2).gather(-1, cheapest)), -1)

    def _gaps(self, coordinate: Float[Tensor, "batch time heads hashes rows"], ranks: int
              ) -> Float[Tensor, "batch time heads tables bits others"]:
        """How far the coordinate of each further rank falls short of the largest."""
        largest = coordinate.sort(dim=-1, descending=True).values[..., :ranks]
        return (largest[..., :1] - largest[..., 1:]).unflatten(-2, (self.tables, self.bits))


def _both_within(u: Float[Tensor, "*#any"], v: Float[Tensor, "*any"], rho: Float[Tensor, "*#any"]
                 ) -> Float[Tensor, "*any"]:
    """P[|U| ≤ u, |V| ≤ v] for standard normal U, V of correlation rho."""
    end = rho.clamp(-1, 1).asin()
    total = (1 - 2 * normal_cdf(-u)) * (1 - 2 * normal_cdf(-v))
    square, product = u**2 + v**2, 2 * u * v
    for node, weight in zip(*(part.tolist() for part in quadrature(48, v)), strict=True):
        alpha = end * (node + 1) / 2
        spread, cross = 2 * alpha.cos() ** 2, product * alpha.sin()
        density = torch.exp((cross - square) / spread) - torch.exp(-(cross + square) / spread)
        total = total + weight * end / 2 * density / math.pi
    return total.clamp(0, 1)
