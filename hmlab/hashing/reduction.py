"""Fewer dimensions before hashing: a random projection, or principal components.

    random projection     y = R x / √m                 R_ij ~ N(0, 1), m rows (Johnson & Lindenstrauss 1984)
    principal components  y_i = e_i · (x - mean)       e_i: eigenvectors of the covariance, largest variance first

`Reduced` puts either before any family; hashing then costs m instead of dim numbers to a hash. Its laws are those of
the family at the similarity of the reduced vectors, averaged over the draw of R:

    distance:  c χ_m / √m
    angle:     the correlation of m pairs of standard normals of correlation cos θ and known mean. In Fisher's
               z = artanh cos, with ζ that of the original angle, its density is proportional to
               cosh z · cosh(z - ζ)^-m ∫_0^{π/2} cos^(2m-1) ψ / √(a cos² ψ + sin² ψ) dψ,
               a = 2 cosh ζ cosh z / cosh(z - ζ)

the latter from Hotelling 1953, "New light on the correlation coefficient", eq. 25, with the integration variable
changed so that the integrand is smooth. Principal components leave vectors of the span of the kept ones as they are
(apart from the mean, which turns angles), and for others there is no law without the data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int32
from torch import Tensor, nn

from hmlab.hashing.family import Family, Similarity, check_similarity, project, quadrature
from hmlab.layers import check_positive


@dataclass(frozen=True, kw_only=True)
class RandomProjectionConfig:
    """dim: before, reduced: after, at least 2. heads: a projection of its own for each head, or 1: shared."""

    dim: int
    reduced: int
    heads: int = 1

    def __post_init__(self) -> None:
        check_positive(self, "dim", "heads")
        if self.reduced < 2:
            raise ValueError(f"reduced: expected at least 2, got {self.reduced}")

    def build(self) -> RandomProjection:
        return RandomProjection(self)


class RandomProjection(nn.Module):
    """weight: R / √m `[heads, reduced, dim]`."""

    def __init__(self, config: RandomProjectionConfig) -> None:
        super().__init__()
        self.config, self.reduced = config, config.reduced
        drawn = torch.randn(config.heads, config.reduced, config.dim)
        self.register_buffer("weight", drawn / math.sqrt(config.reduced))

    def forward(self, x: Float[Tensor, "batch time heads dim"]) -> Float[Tensor, "batch time heads reduced"]:
        return project(x, self.weight).to(x.dtype)

    def spread(self, similarity: Float[Tensor, "*any"], kind: Similarity
               ) -> tuple[Float[Tensor, "*any nodes"], Float[Tensor, "*any nodes"]]:
        """Similarities that vectors may have once reduced, and their probabilities (nodes of a quadrature)."""
        m = self.reduced
        given = similarity.double()[..., None]
        node, weight = quadrature(192, given)
        if kind == "distance":
            low, high = max(0.0, math.sqrt(m) - 9), math.sqrt(m) + 9
            chi = low + (high - low) * (node + 1) / 2
            density = ((m - 1) * chi.log() - (chi**2 - m) / 2 - (m - 1) / 2 * math.log(m)).exp()
            values, mass = given * chi / math.sqrt(m), (density * weight).expand(*given.shape[:-1], -1)
        elif kind == "angle":
            # Below 1e-6 from equal or opposite, hashes do not tell the difference.
            zeta = given.clamp(1e-6, math.pi - 1e-6).cos().atanh()
            off = node * math.acosh(1e17 ** (1 / (m - 1)))
            z = zeta + off
            ratio = 2 * zeta.cosh() * z.cosh() / off.cosh()
            turn, turn_weight = quadrature(64, given)
            psi = (turn + 1) * math.pi / 4
            inner = psi.cos() ** (2 * m - 1) / (ratio[..., None] * psi.cos() ** 2 + psi.sin() ** 2).sqrt()
            # cosh z and cosh(z - ζ)^-m may each leave the range of floats where their product does not.
            log_density = z.abs() + torch.log1p((-2 * z.abs()).exp()) - m * off.cosh().log()
            mass = (log_density - log_density.amax(-1, keepdim=True)).exp() * (inner @ turn_weight) * weight
            values = 2 * (-z).exp().atan()
        else:
            raise ValueError(f"kind: expected angle or distance, got {kind!r}")
        return values.to(similarity.dtype), (mass / mass.sum(-1, keepdim=True)).to(similarity.dtype)


@dataclass(frozen=True, kw_only=True)
class PCAConfig:
    """dim: before, reduced: after, at most dim. heads: components of their own for each head, or 1: shared."""

    dim: int
    reduced: int
    heads: int = 1

    def __post_init__(self) -> None:
        check_positive(self, "dim", "reduced", "heads")
        if self.reduced > self.dim:
            raise ValueError(f"reduced: expected at most dim ({self.dim}), got {self.reduced}")

    def build(self) -> PCA:
        return PCA(self)


class PCA(nn.Module):
    """components `[heads, reduced, dim]`, mean `[heads, dim]`: the first axes and 0 before `fit`."""

    def __init__(self, config: PCAConfig) -> None:
        super().__init__()
        self.config, self.reduced = config, config.reduced
        axes = torch.eye(config.reduced, config.dim).expand(config.heads, -1, -1)
        self.register_buffer("components", axes.clone())
        self.register_buffer("mean", torch.zeros(config.heads, config.dim))

    def forward(self, x: Float[Tensor, "batch time heads dim"]) -> Float[Tensor, "batch time heads reduced"]:
        return project(x - self.mean.to(x.dtype), self.components).to(x.dtype)

    @torch.no_grad()
    def fit(self, x: Float[Tensor, "batch time heads dim"]) -> Float[Tensor, "heads_or_1 dim"]:
        """Take mean and components from these vectors, in place; the largest entry of a component is positive.

        Returns the share of the variance along every component of x, largest first; the kept ones come first.
        """
        heads, dim = self.mean.shape
        if x.ndim != 4 or heads not in (1, x.shape[2]) or x.shape[3] != dim or not x.numel():
            raise ValueError(f"x: expected [batch, time, {'heads' if heads == 1 else heads}, {dim}], got "
                             f"{list(x.shape)}")  # fmt: skip
        # Shared components are fitted to the vectors of all heads.
        vectors = x.double().reshape(-1, heads, dim).transpose(0, 1)
        mean = vectors.mean(1)
        centred = vectors - mean[:, None]
        variance, axes = torch.linalg.eigh(centred.mT @ centred / vectors.shape[1])
        variance, axes = variance.flip(-1).clamp(min=0), axes.mT.flip(-2)
        largest = axes.gather(-1, axes.abs().argmax(-1, keepdim=True))
        self.mean.copy_(mean)
        self.components.copy_((axes * largest.sign())[:, : self.reduced])
        return (variance / variance.sum(-1, keepdim=True)).to(x.dtype)

    def spread(self, similarity: Float[Tensor, "*any"], kind: Similarity
               ) -> tuple[Float[Tensor, "*any 1"], Float[Tensor, "*any 1"]]:
        """The similarity itself: right for vectors of the span of the components."""
        return similarity[..., None], torch.ones_like(similarity)[..., None]


class Reduced(Family):
    """A family that hashes reduced vectors. reduction: maps `[batch, time, heads, dim]` to fewer dim.

    Its laws are of the vectors given, for a pair fixed before R is drawn; an overlap is that of the reduced vectors.
    """

    def __init__(self, reduction: RandomProjection | PCA, family: Family) -> None:
        super().__init__()
        if reduction.reduced != family.config.dim:
            raise ValueError(f"family: expected one of dim {reduction.reduced}, got {family.config.dim}")
        self.reduction, self.family = reduction, family
        self.similarity, self.tables, self.bits = family.similarity, family.tables, family.bits

    def codes(self, x: Float[Tensor, "batch time heads dim"], *, probes: int = 1
              ) -> Int32[Tensor, "batch time heads tables {probes}"]:
        """The family's codes of the reduced vectors."""
        return self.family.codes(self.reduction(x), probes=probes)

    def soft_codes(self, x: Float[Tensor, "batch time heads dim"], *, straight: bool = False
                   ) -> Float[Tensor, "batch time heads tables bits"]:
        """A learned family's soft codes of the reduced vectors."""
        return self.family.soft_codes(self.reduction(x), straight=straight)

    def hash_probability(self, similarity):
        return self._average(self.family.hash_probability, similarity)

    def collision_probability(self, similarity):
        return self._average(self.family.collision_probability, similarity)

    def recall(self, similarity, tables=None, bits=None):
        # All tables hash the same reduced vectors, so they agree more often than independent ones.
        return self._average(lambda s: self.family.recall(s, tables, bits), similarity)

    def _average(self, law, similarity: Tensor) -> Tensor:
        check_similarity(self.similarity, similarity)
        if self.similarity == "overlap":
            return law(similarity)
        values, probability = self.reduction.spread(similarity, self.similarity)
        return (law(values) * probability).sum(-1)
