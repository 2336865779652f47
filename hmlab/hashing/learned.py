"""Learned hyperplanes: the code [w_i · x̂ > t_i] with normals and thresholds that are trained.

    soft code      c_i = tanh((w_i · x̂ - t_i) / τ),                 x̂ = x / ‖x‖
    straight       sign(w_i · x̂ - t_i) forward, the slope of c_i backward
    retrieval      -Σ_j a_j log softmax_j(log Σ_tables exp(β Σ_bits c_query · c_slot_j))      a: attention of the query
    balance        mean over bits of (mean over vectors of c_i)²            0: every bit halves the vectors
    decorrelation  mean over pairs of bits of (mean over vectors of c_i c_j)²

Each bit in which a slot's code differs costs a factor exp(-2β) of the odds that its table finds it, so the first loss
is the cross-entropy of what the tables find against where the attention's mass lies. Sources: straight-through slopes
(Bengio et al. 2013, arXiv 1308.3432); the regularisers of spectral hashing (Weiss et al. 2008); the loss is ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from hmlab_kernels.hash_codes import hash_codes
from jaxtyping import Bool, Float, Int32
from torch import Tensor, nn

from hmlab.hashing import hyperplane
from hmlab.hashing.family import normal_cdf, project


@dataclass(frozen=True, kw_only=True)
class Config(hyperplane.Config):
    """As of random hyperplanes. temperature: τ, in units of w · x̂, which is about N(0, 1) before training."""

    temperature: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.temperature > 0:
            raise ValueError(f"temperature: expected a positive number, got {self.temperature}")

    def build(self) -> Learned:
        return Learned(self)


class Learned(hyperplane.Hyperplane):
    """weight: normals `[heads, tables, bits, dim]`. threshold: `[heads, tables, bits]`, 0 before training.

    The laws of random hyperplanes hold before training and are only a yardstick after it: trained normals depend on
    the vectors. `recall_curve` measures what they reach.
    """

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        drawn = self.weight
        del self.weight
        self.weight = nn.Parameter(drawn)
        self.threshold = nn.Parameter(torch.zeros(drawn.shape[:-1]))

    def codes(self, x: Float[Tensor, "batch time heads dim"], *, probes: int = 1
              ) -> Int32[Tensor, "batch time heads tables {probes}"]:
        """The code of each vector, then `probes - 1` neighbours, likeliest first; nothing to differentiate."""
        return hash_codes(x, self.weight.to(x.dtype), threshold=self.threshold.to(x.dtype), probes=probes)

    def soft_codes(self, x: Float[Tensor, "batch time heads dim"], *, straight: bool = False
                   ) -> Float[Tensor, "batch time heads tables bits"]:
        """c in (-1, 1) for each bit, in at least float32; ±1 with its slope if straight. Differentiable."""
        signed = self._along(x) - self.threshold
        soft = torch.tanh(signed / self.config.temperature)
        if not straight:
            return soft
        return torch.where(signed > 0, 1.0, -1.0).to(soft.dtype) + soft - soft.detach()

    def _certainty(self, x, angle):
        """For learned normals, over the direction of the neighbour: w · y ~ N(cos θ w · x, sin² θ ‖w⊥‖² / (dim - 1)),
        w⊥ being what of w is orthogonal to x; bits independent where normals are orthogonal and dim is large."""
        along = self._along(x).detach()
        square = self.weight.detach().square().sum(-1).to(along.dtype)
        spread = ((square - along**2).clamp(min=0) / max(self.config.dim - 1, 1)).sqrt() * math.sin(angle)
        threshold = self.threshold.detach().to(along.dtype)
        side = torch.where(along > threshold, 1.0, -1.0).to(along.dtype)
        behind = side * (threshold - math.cos(angle) * along)
        return (along - threshold).abs(), normal_cdf(behind / spread.clamp(min=torch.finfo(along.dtype).tiny))

    def _along(self, x: Float[Tensor, "batch time heads dim"]) -> Float[Tensor, "batch time heads tables bits"]:
        return project(torch.nn.functional.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1),
                       self.weight)  # fmt: skip


def retrieval_loss(
    query: Float[Tensor, "batch time heads tables bits"],
    slots: Float[Tensor, "batch slots heads tables bits"],
    attention: Float[Tensor, "batch time heads slots"],
    *,
    visible: Bool[Tensor, "batch time slots"] | None = None,
    scale: float = 1.0,
) -> Float[Tensor, ""]:
    """Pull each query's codes to those of the slots that hold its attention mass, in nats per unit of mass.

    query, slots: soft or straight codes. attention: mass on each slot, not differentiated; 0 where not visible.
    visible: slots that a query may read; all if None. scale: β. 0 where there is no mass at all.
    """
    logits = scale * torch.einsum("bthni,bshni->bhnts", query, slots)
    logits = logits.logsumexp(2)
    if visible is not None:
        # A finite number: a query that sees nothing would make NaN of infinities.
        logits = logits.masked_fill(~visible[:, None], torch.finfo(logits.dtype).min)
    mass = attention.detach().transpose(1, 2).to(logits.dtype)
    return -(mass * logits.log_softmax(-1)).sum() / mass.sum().clamp(min=torch.finfo(mass.dtype).tiny)


def balance(codes: Float[Tensor, "*vectors heads tables bits"]) -> Float[Tensor, ""]:
    """How far the bits are from halving the vectors: 0 (even) to 1 (constant)."""
    return codes.flatten(end_dim=-4).mean(0).square().mean()


def decorrelation(codes: Float[Tensor, "*vectors heads tables bits"]) -> Float[Tensor, ""]:
    """How far the bits of a table repeat one another: 0 (uncorrelated) to 1 (all equal or opposite)."""
    codes = codes.flatten(end_dim=-4)
    bits = codes.shape[-1]
    product = torch.einsum("vhni,vhnj->hnij", codes, codes) / len(codes)
    pairs = ~torch.eye(bits, dtype=torch.bool, device=codes.device)
    return product[..., pairs].square().mean() if bits > 1 else product.sum() * 0


def code_churn(before: Int32[Tensor, "*vectors tables probes"], after: Int32[Tensor, "*vectors tables probes"]
               ) -> Float[Tensor, ""]:
    """Share of codes (first probes) that a change of the weights has changed: the slots that would be looked up in
    a wrong bucket were the tables not rebuilt."""
    return (before[..., 0] != after[..., 0]).float().mean()
