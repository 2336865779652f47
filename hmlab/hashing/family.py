"""What hash families have in common: laws of collision, and codes made of several elementary hashes."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float, Int, Int32, Int64
from torch import Tensor, nn

Similarity = Literal["angle", "distance", "jaccard", "overlap"]
_RANGE = {"angle": math.pi, "distance": math.inf, "jaccard": 1.0, "overlap": 1.0}

# The Mersenne prime 2^31 - 1: the product of two residues fits int64, a residue fits int32.
PRIME = (1 << 31) - 1


class Family(nn.Module, ABC):
    """Hash tables of one kind. A table's code is made of `bits` elementary hashes and collides when all of them do.

    similarity: what the law of collision is a function of: the angle between vectors (radians, 0 to π), their
    Euclidean distance, the Jaccard similarity of sets, or the overlap Σ_k r_k(x) r_k(y) of responsibilities.
    Subclasses define `codes` and `hash_probability`, and set `tables` and `bits`. What is drawn at random comes from
    torch's generator and is fixed from then on; it moves and is saved with the module.
    """

    similarity: ClassVar[Similarity]
    tables: int
    bits: int

    @abstractmethod
    def hash_probability(self, similarity: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
        """Probability that one elementary hash of two items agrees, over the draw of the hash."""

    def collision_probability(self, similarity: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
        """Probability that two items have the same code in one table: p^bits. Raises ValueError by argument."""
        check_similarity(self.similarity, similarity)
        return self.hash_probability(similarity) ** self.bits

    def recall(self, similarity: Float[Tensor, "*any"], tables: int | None = None, bits: int | None = None
               ) -> Float[Tensor, "*any"]:
        """Probability of the same code in at least one of the tables: 1 - (1 - p^bits)^tables (Indyk & Motwani 1998).

        tables, bits: the family's own if None. Raises ValueError by argument.
        """
        check_similarity(self.similarity, similarity)
        tables, bits = self.tables if tables is None else tables, self.bits if bits is None else bits
        for name, value in (("tables", tables), ("bits", bits)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        return -torch.expm1(tables * torch.log1p(-self.hash_probability(similarity) ** bits))


def check_similarity(kind: Similarity, similarity: Tensor) -> None:
    """Refuse values that no two items can have; π may be rounded up."""
    most = _RANGE[kind]
    if similarity.numel() and not ((similarity >= 0) & (similarity <= most * (1 + 1e-6))).all():
        low, high = similarity.min().item(), similarity.max().item()
        raise ValueError(f"similarity: expected {kind} in [0, {most:.4g}], got {low:.4g} to {high:.4g}")


def check_probes(probes: int, most: int) -> None:
    if not 1 <= probes <= most:
        raise ValueError(f"probes: expected 1 to {most}, got {probes}")


def project(x: Float[Tensor, "batch time heads dim"], weight: Float[Tensor, "heads_or_1 *shape dim"]
            ) -> Float[Tensor, "batch time heads *shape"]:
    """x along each row of weight, of its own head or shared by all, in at least float32."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if x.ndim != 4 or x.shape[-1] != weight.shape[-1] or len(weight) not in (1, x.shape[2]):
        heads = "heads" if len(weight) == 1 else len(weight)
        raise ValueError(f"x: expected [batch, time, {heads}, {weight.shape[-1]}], got {list(x.shape)}")
    flat = weight.to(x.dtype).expand(x.shape[2], *weight.shape[1:]).flatten(1, -2)
    return torch.einsum("bthd,hrd->bthr", x, flat).unflatten(-1, weight.shape[1:-1])


def combined(hashes: Int64[Tensor, "*items bits"], place: Int64[Tensor, "*places bits"]) -> Int64[Tensor, "*items"]:
    """One code of several hashes: Σ_i place_i · hash_i mod 2^31 - 1 (Carter & Wegman 1979).

    With random places two different tuples have the same code with probability 2^-31; with the places of a number
    system below 2^31 - 1 never.
    """
    return (hashes.remainder(PRIME) * place % PRIME).sum(-1) % PRIME


def with_probes(
    hashes: Int64[Tensor, "*items bits"],
    others: Int64[Tensor, "*items bits others"],
    cost: Float[Tensor, "*items bits others"],
    place: Int64[Tensor, "*places bits"],
    probes: int,
) -> Int32[Tensor, "*items {probes}"]:
    """The combined code, then those with one hash replaced by another that it nearly was, least cost first."""
    code = combined(hashes, place)[..., None]
    if probes == 1:
        return code.int()
    change = (others - hashes[..., None]).remainder(PRIME) * place[..., None] % PRIME
    order = cost.flatten(-2).argsort(dim=-1, stable=True)[..., : probes - 1]
    return torch.cat((code, (code + change.flatten(-2).gather(-1, order)) % PRIME), -1).int()


def distinct(codes: Int[Tensor, "*items probes"]) -> Int[Tensor, "*items probes"]:
    """Codes in the same order, those that an earlier probe has already named moved to the end."""
    same = codes[..., :, None] == codes[..., None, :]
    repeated = same.tril(-1).any(-1)
    return codes.gather(-1, repeated.to(torch.uint8).argsort(dim=-1, stable=True))


def normal_cdf(x: Tensor) -> Tensor:
    """Φ, accurate in the lower tail."""
    return 0.5 * torch.erfc(-x / math.sqrt(2))


def quadrature(nodes: int, like: Tensor) -> tuple[Float[Tensor, "nodes"], Float[Tensor, "nodes"]]:
    """Gauss–Legendre nodes and weights on [-1, 1] in float64, on the device of `like`."""
    x, weight = np.polynomial.legendre.leggauss(nodes)
    return torch.from_numpy(x).to(like.device), torch.from_numpy(weight).to(like.device)
