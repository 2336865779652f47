"""Entropy, conditional entropy and mutual information from counts of samples, in bits, with their standard errors.

N samples fall n_i times on outcome i; K outcomes are seen.

    plug-in         H = - Σ (n_i / N) ln(n_i / N), too small by about (K - 1) / 2N
    Miller–Madow    plug-in + (K - 1) / 2N                             Miller 1955
    Grassberger     H = ψ(N) - (1 / N) Σ n_i G(n_i),                   Grassberger 2003 (arXiv physics/0307138),
                    G(n) = ψ(n) + ½ (-1)^n (ψ((n + 1) / 2) - ψ(n / 2))

in nats, divided by ln 2. Grassberger's is the default: where many outcomes are seen rarely or never, as words are,
Miller–Madow leaves most of the bias, and his about half of that. Chao & Shen's (2003) leaves less under Zipf's law, but
overshoots elsewhere and falls back to the plug-in's bias once no outcome is single. No correction knows of outcomes
that the samples are too few to hint at. Deviation: ψ(N) for Grassberger's ln N, as in Schürmann 2004
(arXiv cond-mat/0403192, ξ = ½), which is right for a fixed N; with ln N two outcomes have a bias of the plug-in's size.

    H(Y|X) = H(X, Y) - H(X)          I(X; Y) = H(X) + H(Y) - H(X, Y), each H estimated; a corrected I may be negative

Counts are integers of at least 0; results are float64. Errors: `ValueError` naming the argument.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

# Entries of the tables that a jackknife looks at together.
JACKKNIFE_ENTRIES = 2**22


def joint_counts(*samples: Int[Tensor, "samples"]) -> Int[Tensor, "..."]:
    """How often each combination of values occurs: one axis per variable, its seen values in ascending order."""
    if not samples or any(s.is_floating_point() or s.ndim != 1 or s.shape != samples[0].shape for s in samples):
        came = [f"{s.dtype} {list(s.shape)}" for s in samples]
        raise ValueError(f"samples: expected one or more 1-d integer tensors of equal length, got {came}")
    cell, shape = torch.zeros_like(samples[0], dtype=torch.int64), []
    for sample in samples:
        values, index = sample.unique(return_inverse=True)
        shape.append(len(values))
        cell = cell * len(values) + index
    return cell.bincount(minlength=math.prod(shape)).view(shape)


def _checked(name: str, counts: Tensor, axes: int) -> tuple[Tensor, Tensor]:
    """Counts in float64, the last `axes` axes made one, and their sum."""
    if counts.is_floating_point() or counts.ndim < axes:
        came = f"{counts.dtype} {list(counts.shape)}"
        raise ValueError(f"{name}: expected integers with at least {axes} axes, got {came}")
    n = counts.flatten(-axes).double()
    total = n.sum(-1)
    if not ((n >= 0).all() & (total > 0).all()):
        raise ValueError(f"{name}: expected counts of at least 0 with a sum above 0, got a minimum of "
                         f"{counts.min().item() if counts.numel() else 'nothing'}")  # fmt: skip
    return n, total


def _plug_in(n: Tensor, total: Tensor) -> Tensor:
    return total.log() - torch.xlogy(n, n).sum(-1) / total


def _miller_madow(n: Tensor, total: Tensor) -> Tensor:
    return _plug_in(n, total) + ((n > 0).sum(-1) - 1) / (2 * total)


def _grassberger(n: Tensor, total: Tensor) -> Tensor:
    seen = torch.where(n > 0, n, 1)
    sign = 1 - 2 * (seen % 2)
    g = torch.digamma(seen) + sign * (torch.digamma((seen + 1) / 2) - torch.digamma(seen / 2)) / 2
    return torch.digamma(total) - (n * g).sum(-1) / total


ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "plug-in": _plug_in, "miller-madow": _miller_madow, "grassberger": _grassberger,
}  # fmt: skip


def _estimate(name: str, counts: Tensor, axes: int, method: str) -> Tensor:
    if method not in ESTIMATORS:
        raise ValueError(f"method: expected one of {', '.join(ESTIMATORS)}, got {method!r}")
    return ESTIMATORS[method](*_checked(name, counts, axes)) / math.log(2)


def estimate_entropy(counts: Int[Tensor, "*batch outcomes"], method: str = "grassberger") -> Float[Tensor, "*batch"]:
    """H(X) of what the counts are samples of."""
    return _estimate("counts", counts, 1, method)


def estimate_conditional_entropy(joint: Int[Tensor, "*batch x y"], method: str = "grassberger"
                                 ) -> Float[Tensor, "*batch"]:
    """H(Y|X) of what the joint counts of x (rows) and y (columns) are samples of."""
    return _estimate("joint", joint, 2, method) - _estimate("joint", joint.sum(-1), 1, method)


def estimate_mutual_information(joint: Int[Tensor, "*batch x y"], method: str = "grassberger"
                                ) -> Float[Tensor, "*batch"]:
    """I(X; Y) of what the joint counts of x (rows) and y (columns) are samples of."""
    return _estimate("joint", joint.sum(-2), 1, method) - estimate_conditional_entropy(joint, method)


def standard_error(estimate: Callable[[Tensor], Tensor], counts: Int[Tensor, "*table"]) -> Float[Tensor, ""]:
    """Jackknife standard error of an estimate from one table of counts (Efron & Stein 1981).

        se² = (N - 1) / N · Σ_i n_i (θ_i - θ̄)², θ̄ = Σ_i n_i θ_i / N, θ_i: the estimate without one sample of cell i

    estimate: a function of tables `[batch, *table]`, smooth in the counts, for instance
    `partial(estimate_entropy, method="miller-madow")`; not Grassberger's, whose alternating terms a jackknife takes for
    scatter, twice too much and more. At least two samples. It tells the scatter of the estimate, not its bias.
    """
    total = counts.sum()
    if counts.is_floating_point() or total < 2:
        raise ValueError(f"counts: expected integers with a sum of at least 2, got {counts.dtype} with {total.item()}")
    cells = counts.flatten().nonzero().flatten()
    without = []
    for some in cells.split(max(1, JACKKNIFE_ENTRIES // counts.numel())):
        tables = counts.flatten().repeat(len(some), 1)
        tables[torch.arange(len(some), device=some.device), some] -= 1
        without.append(estimate(tables.view(-1, *counts.shape)))
    theta, n = torch.cat(without), counts.flatten()[cells]
    mean = (n * theta).sum() / total
    return ((total - 1) / total * (n * (theta - mean).square()).sum()).sqrt()
