"""Measures of information on given distributions, in bits, differentiable.

Source: Cover & Thomas, Elements of Information Theory, 2nd ed., chapters 2 and 7; Jensen–Shannon: Lin 1991, Divergence
Measures Based on the Shannon Entropy.

    H(X) = - Σ p log2 p                            D(P‖Q) = Σ p log2(p / q)
    H(Y|X) = H(X, Y) - H(X)                        H(P, Q) = - Σ p log2 q = H(P) + D(P‖Q)
    I(X; Y) = D(p(x, y) ‖ p(x) p(y))               JS(P, Q) = ½ D(P‖M) + ½ D(Q‖M), M = ½ (P + Q)

Distributions are given as weights that are at least 0 and not all 0: probabilities or counts, normalised here.
0 log 0 = 0, and the gradient with respect to a probability of 0 is taken as 0 where the true one is infinite.
Errors: `ValueError` naming the argument.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor


def normalised(name: str, weights: Shaped[Tensor, "*batch outcomes"], axes: int = 1
               ) -> Float[Tensor, "*batch outcomes"]:
    """Weights divided by their sum over the last `axes` axes; refused, as `name`, if they are no distribution."""
    if weights.ndim < axes:
        raise ValueError(f"{name}: expected at least {axes} axes, got {list(weights.shape)}")
    if not weights.is_floating_point():
        weights = weights.to(torch.get_default_dtype())
    total = weights.sum(tuple(range(-axes, 0)), keepdim=True)
    # Values cannot be looked at while a graph is traced.
    if not torch.compiler.is_compiling():
        proper = (weights >= 0).all() & ((total > 0) & total.isfinite()).all()
        if not proper:
            raise ValueError(f"{name}: expected finite weights of at least 0 with a sum above 0, got "
                             f"a minimum of {weights.min().item() if weights.numel() else math.nan:g} and "
                             f"a smallest sum of {total.min().item() if total.numel() else math.nan:g}")  # fmt: skip
    return weights / total


def _log2(p: Tensor, where: Tensor) -> Tensor:
    """log2 p where `where` holds, 0 with gradient 0 elsewhere."""
    return torch.where(where, p, 1).log2()


def _relative(p: Tensor, q: Tensor) -> Tensor:
    """p log2(p / q), the terms of D(P‖Q)."""
    return p * (_log2(p, p > 0) - _log2(q, p > 0))


def entropy(p: Shaped[Tensor, "*batch outcomes"]) -> Float[Tensor, "*batch"]:
    """H(X), between 0 and log2(outcomes)."""
    p = normalised("p", p)
    return -(p * _log2(p, p > 0)).sum(-1)


def conditional_entropy(joint: Shaped[Tensor, "*batch x y"]) -> Float[Tensor, "*batch"]:
    """H(Y|X) of joint weights of x (rows) and y (columns)."""
    joint = normalised("joint", joint, axes=2)
    x = joint.sum(-1, keepdim=True).expand_as(joint)
    return -(joint * (_log2(joint, joint > 0) - _log2(x, joint > 0))).sum((-2, -1))


def mutual_information(joint: Shaped[Tensor, "*batch x y"]) -> Float[Tensor, "*batch"]:
    """I(X; Y) of joint weights of x (rows) and y (columns)."""
    joint = normalised("joint", joint, axes=2)
    return _relative(joint, joint.sum(-1, keepdim=True) * joint.sum(-2, keepdim=True)).sum((-2, -1))


def read_information(weights: Shaped[Tensor, "*batch reads slots"]) -> Float[Tensor, "*batch slots"]:
    """What each slot adds to the mutual information between who reads and what is read.

    weights: attention of each read over the slots, so that p(read, slot) is their share of all attention. The sum over
    slots is I(read; slot); a slot that every read uses alike adds 0, however much it is used. Not causal: it scores a
    slot by the reads that came later.
    """
    joint = normalised("weights", weights, axes=2)
    return _relative(joint, joint.sum(-1, keepdim=True) * joint.sum(-2, keepdim=True)).sum(-2)


def _pair(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    if p.shape[-1:] != q.shape[-1:]:
        raise ValueError(f"q: expected as many outcomes as p ({p.shape[-1]}), got {list(q.shape)}")
    return normalised("p", p), normalised("q", q)


def kl_divergence(p: Shaped[Tensor, "*#batch outcomes"], q: Shaped[Tensor, "*#batch outcomes"]) -> Float[Tensor, "..."]:
    """D(P‖Q); infinite where P has an outcome that Q has not."""
    p, q = _pair(p, q)
    return _relative(p, q).sum(-1)


def cross_entropy(p: Shaped[Tensor, "*#batch outcomes"], q: Shaped[Tensor, "*#batch outcomes"]) -> Float[Tensor, "..."]:
    """H(P, Q), bits per outcome of P in a code made for Q; infinite where P has an outcome that Q has not."""
    p, q = _pair(p, q)
    return -(p * _log2(q, p > 0)).sum(-1)


def js_divergence(p: Shaped[Tensor, "*#batch outcomes"], q: Shaped[Tensor, "*#batch outcomes"]) -> Float[Tensor, "..."]:
    """JS(P, Q), between 0 (equal) and 1 (nothing in common)."""
    p, q = _pair(p, q)
    mean = (p + q) / 2
    return (_relative(p, mean) + _relative(q, mean)).sum(-1) / 2


def perplexity(bits: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """2^bits: the number of equally likely outcomes with that entropy, or cross-entropy."""
    return torch.exp2(bits)


def prediction_bits(logits: Float[Tensor, "*batch classes"], targets: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """Cross-entropy of each prediction, - log2 softmax(logits)[target].

    A head with fewer classes than there are targets predicts the target modulo its classes.
    """
    if targets.shape != logits.shape[:-1]:
        raise ValueError(f"targets: expected {list(logits.shape[:-1])}, as logits have, got {list(targets.shape)}")
    logits = logits if logits.dtype == torch.float64 else logits.float()
    nats = F.cross_entropy(logits.flatten(0, -2), targets.flatten() % logits.shape[-1], reduction="none")
    return nats.view(targets.shape) / math.log(2)


def spectral_entropy(keys: Float[Tensor, "*batch segment dim"], order: int = 1) -> Float[Tensor, "*batch"]:
    """Entropy of the normalised eigenvalues of the keys' Gram matrix, between 0 and log2(min(segment, dim)).

        p_i = λ_i(K Kᵀ) / tr(K Kᵀ)       order 1: - Σ p_i log2 p_i       order 2: - log2 Σ p_i²

    Order 1 is von Neumann's entropy of K Kᵀ / tr(K Kᵀ); order 2 is Rényi's, never above it, and needs no eigenvalues:
    Σ p_i² = ‖K Kᵀ‖² / tr(K Kᵀ)². Source: Giraldo, Rao & Príncipe 2015 (arXiv 1211.2459). K Kᵀ and Kᵀ K have the same
    eigenvalues but for zeros, so the smaller is taken. A row of zeros changes nothing; keys that are all 0 have
    entropy 0. The gradient passes through eigenvalues alone, and is finite where they are equal.
    """
    if order not in (1, 2):
        raise ValueError(f"order: expected 1 or 2, got {order}")
    keys = keys if keys.dtype == torch.float64 else keys.float()
    # Entropy knows no scale: at unit length the squares below can neither overflow nor vanish.
    scale = keys.detach().abs().amax((-2, -1), keepdim=True)
    keys = keys / torch.where(scale > 0, scale, 1)
    gram = keys @ keys.mT if keys.shape[-2] <= keys.shape[-1] else keys.mT @ keys
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    nothing = trace == 0
    trace = torch.where(nothing, 1, trace)
    if order == 2:
        return -_log2(gram.square().sum((-2, -1)) / trace.square(), ~nothing)
    # Rounding can leave an eigenvalue of 0 a little below it.
    p = torch.linalg.eigvalsh(gram).clamp(min=0) / trace[..., None]
    return -(p * _log2(p, p > 0)).sum(-1)
