"""Soft addressing by a Gaussian mixture: an address is a component, read as far as it is responsible for the vector.

    log p(x) = log Σ_k π_k N(x; μ_k, diag σ_k²),      r_k(x) = π_k N(x; μ_k, diag σ_k²) / p(x)

`codes` are the components of largest responsibility; `sampled_codes` draws them from it, and then two vectors have
the same first code with probability Σ_k r_k(x) r_k(y), their overlap. Trained by gradient on -log p(x), or fitted by
expectation–maximisation (EM). Source: Bishop 2006, "Pattern Recognition and Machine Learning", § 9.2; draws without
replacement by Gumbel noise (Kool et al. 2019, arXiv 1903.06059).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int32
from torch import Tensor, nn

from hmlab.hashing.family import Family, check_probes, project
from hmlab.layers import check_positive


@dataclass(frozen=True, kw_only=True)
class Config:
    """dim: of the vectors. heads: mixtures of their own for each head, or 1: shared. tables: independent mixtures.
    components: K, the buckets of a table. least_variance: below which no variance falls, in squared units of x."""

    dim: int
    heads: int = 1
    tables: int = 1
    components: int = 64
    least_variance: float = 1e-4

    def __post_init__(self) -> None:
        check_positive(self, "dim", "heads", "tables", "components")
        if not self.least_variance > 0:
            raise ValueError(f"least_variance: expected a positive number, got {self.least_variance}")

    def build(self) -> Mixture:
        return Mixture(self)


class Mixture(Family):
    """mean, log_variance: μ and log σ² `[heads, tables, K, dim]`. logit: log π but for a constant `[heads, tables, K]`.
    """

    similarity = "overlap"
    bits = 1

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, self.tables = config, config.tables
        shape = (config.heads, config.tables, config.components)
        self.mean = nn.Parameter(torch.randn(*shape, config.dim))
        self.log_variance = nn.Parameter(torch.zeros(*shape, config.dim))
        self.logit = nn.Parameter(torch.zeros(shape))

    def log_joint(self, x: Float[Tensor, "batch time heads dim"]
                  ) -> Float[Tensor, "batch time heads tables components"]:
        """log π_k N(x; μ_k, σ_k²) in at least float32. Differentiable."""
        variance = self.log_variance.exp().clamp(min=self.config.least_variance)
        # (x - μ)² / σ² multiplied out, so that no [.., components, dim] is held.
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        distance = project(x.square(), 1 / variance) - 2 * project(x, self.mean / variance)
        constant = (self.mean.square() / variance + variance.log() + math.log(2 * math.pi)).sum(-1)
        return self.logit.log_softmax(-1) - (distance + constant) / 2

    def log_likelihood(self, x: Float[Tensor, "batch time heads dim"]) -> Float[Tensor, "batch time heads tables"]:
        """log p(x) in nats. Differentiable."""
        return self.log_joint(x).logsumexp(-1)

    def responsibilities(self, x: Float[Tensor, "batch time heads dim"]
                         ) -> Float[Tensor, "batch time heads tables components"]:
        """r, which sum to 1. Differentiable."""
        return self.log_joint(x).softmax(-1)

    def codes(self, x: Float[Tensor, "batch time heads dim"], *, probes: int = 1
              ) -> Int32[Tensor, "batch time heads tables {probes}"]:
        """The components of largest responsibility, K at most."""
        check_probes(probes, self.config.components)
        return self.log_joint(x.detach()).topk(probes, -1).indices.int()

    def sampled_codes(self, x: Float[Tensor, "batch time heads dim"], *, probes: int = 1
                      ) -> Int32[Tensor, "batch time heads tables {probes}"]:
        """Different components drawn from the responsibilities, by torch's generator."""
        check_probes(probes, self.config.components)
        joint = self.log_joint(x.detach())
        gumbel = -torch.empty_like(joint).exponential_().log()
        return (joint + gumbel).topk(probes, -1).indices.int()

    def hash_probability(self, similarity):
        return similarity

    @torch.no_grad()
    def fit(self, x: Float[Tensor, "batch time heads dim"], *, steps: int = 20) -> Float[Tensor, "steps_and_one"]:
        """Draw the means from x, then EM in place. Returns the mean log-likelihood before and after every step,
        which never falls but where least_variance holds a variance up. Raises ValueError by argument."""
        heads, tables, components, dim = self.mean.shape
        if x.ndim != 4 or heads not in (1, x.shape[2]) or x.shape[3] != dim:
            heads_wanted = "heads" if heads == 1 else heads
            raise ValueError(f"x: expected [batch, time, {heads_wanted}, {dim}], got {list(x.shape)}")
        x = x.to(self.mean.dtype)
        # Shared mixtures are fitted to the vectors of all heads.
        x = x.reshape(1, -1, heads, dim)
        if x.shape[1] < components:
            raise ValueError(f"x: expected at least {components} vectors, one to a component, got {x.shape[1]}")
        drawn = torch.rand(heads, tables, x.shape[1], device=x.device).topk(components, -1).indices
        vectors = x[0].transpose(0, 1)  # heads, vectors, dim
        head = torch.arange(heads, device=x.device)[:, None, None]
        self.mean.copy_(vectors[head, drawn])
        self.log_variance.copy_(vectors.var(1, correction=0).log()[:, None, None].expand_as(self.mean))
        self.logit.zero_()
        course = []
        for _ in range(steps):
            joint = self.log_joint(x)[0]
            course.append(joint.logsumexp(-1).mean())
            share = joint.softmax(-1)
            mass = share.sum(0)
            some = mass.clamp(min=torch.finfo(mass.dtype).eps)[..., None]
            mean = torch.einsum("vhnk,hvd->hnkd", share, vectors) / some
            square = torch.einsum("vhnk,hvd->hnkd", share, vectors.square()) / some
            variance = (square - mean.square()).clamp(min=self.config.least_variance)
            # A component that no vector belongs to stays where it was.
            alive = mass[..., None] > torch.finfo(mass.dtype).eps
            self.mean.copy_(torch.where(alive, mean, self.mean))
            self.log_variance.copy_(torch.where(alive, variance.log(), self.log_variance))
            self.logit.copy_(some[..., 0].log())
        return torch.stack((*course, self.log_joint(x).logsumexp(-1).mean()))
