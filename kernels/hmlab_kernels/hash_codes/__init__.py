"""Hash codes: short integers that are equal, with good odds, for vectors of similar direction.

    hyperplane      code = Σ_i 2^i [w_i · x̂ > threshold_i]                      i over the bits of a table
    cross_polytope  code = argmax_i |w_i · x̂|, plus `bits` if that coordinate is negative

x̂ = x / ‖x‖ (x itself without `normalise`; 0 for a zero vector). After the code itself come its `probes`, the codes
next in likelihood (multi-probe): the hyperplane code with its p-th least certain bit flipped, the certainty of a bit
being |w_i · x̂ − threshold_i|; the p-th largest coordinate of the cross-polytope. Ties go to the lower index.
Sources: Charikar 2002; Andoni et al. 2015 (arXiv 1509.02897); Lv et al. 2007 for the probes.

Integers: nothing to differentiate. Sums run in float32, so a bit whose margin is within their rounding may differ
between implementations and devices, and two probes whose margins do may change places; `margins` tells how far off
that is.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int32
from torch import Tensor

from .. import _checks, _dispatch
from . import eager, reference

__all__ = ["IMPLEMENTATIONS", "hash_codes", "margins"]

IMPLEMENTATIONS = ("fused", "eager", "reference")
OUTPUTS = ("out",)
# The most bits of a family: those of a positive int32; the coordinates that a tile of the fused form holds.
_MOST_BITS = {"hyperplane": 31, "cross_polytope": 256}


def hash_codes(
    x: Float[Tensor, "batch time heads dim"],
    weight: Float[Tensor, "heads_or_1 tables bits dim"],
    *,
    threshold: Float[Tensor, "heads_or_1 tables bits"] | None = None,
    normalise: bool = True,
    family: Literal["hyperplane", "cross_polytope"] = "hyperplane",
    probes: int = 1,
    impl: str | None = None,
) -> Int32[Tensor, "batch time heads tables probes"]:
    """Codes of every vector in every table: the code itself, then `probes - 1` neighbours, likeliest first.

    weight: normals of the hyperplanes, or rows of the rotation, in x's dtype; one set of tables for all heads or one
    for each. threshold: of each hyperplane, in x's dtype or float32; 0 if None. impl: one of `IMPLEMENTATIONS`; None
    takes the device's default. All are deterministic; none is differentiable. Raises ValueError by argument.
    """
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(f"x: expected [batch, time, heads, dim] of floats, got {x.dtype} of shape {list(x.shape)}")
    heads, dim = x.shape[2:]
    if heads < 1 or dim < 1:
        raise ValueError(f"x: expected at least 1 head of at least 1 dim, got {list(x.shape)}")
    if weight.ndim != 4 or weight.shape[0] not in (1, heads) or weight.shape[3] != dim:
        raise ValueError(f"weight: expected [{heads} or 1, tables, bits, {dim}], got {list(weight.shape)}")
    if weight.dtype != x.dtype:
        raise ValueError(f"weight: expected x's dtype {x.dtype}, got {weight.dtype}")
    if family not in _MOST_BITS:
        raise ValueError(f"family: expected one of {list(_MOST_BITS)}, got {family!r}")
    tables, bits = weight.shape[1:3]
    if tables < 1 or not 1 <= bits <= _MOST_BITS[family]:
        raise ValueError(
            f"weight: {family} expected at least 1 table of 1 to {_MOST_BITS[family]} bits, got {tables} of {bits}"
        )
    _checks.check_integers(probes=probes)
    _checks.check_same_device(x, weight=weight, threshold=threshold)
    most = bits + (family == "hyperplane")
    if not 1 <= probes <= most:
        raise ValueError(f"probes: {family} with {bits} bits expected 1 to {most}, got {probes}")
    if threshold is not None:
        if family != "hyperplane":
            raise ValueError(f"threshold: {family} expected None, got a tensor")
        if threshold.ndim != 3 or threshold.shape[0] not in (1, heads) or threshold.shape[1:] != (tables, bits):
            raise ValueError(f"threshold: expected [{heads} or 1, {tables}, {bits}], got {list(threshold.shape)}")
        if threshold.dtype not in (x.dtype, torch.float32):
            raise ValueError(f"threshold: expected x's dtype {x.dtype} or float32, got {threshold.dtype}")
        threshold = threshold.detach()
    impl = _dispatch.choose("hash_codes", impl, x.device.type, IMPLEMENTATIONS, x.dtype)
    x, weight = x.detach(), weight.detach()
    if impl == "reference":
        return reference.hash_codes(x, weight, threshold, normalise, family, probes)
    return torch.ops.hmlab.hash_codes(x, weight, threshold, normalise, family, probes, impl)


def margins(x: Float[Tensor, "batch time heads dim"], weight: Float[Tensor, "heads_or_1 tables bits dim"], *,
            threshold: Float[Tensor, "heads_or_1 tables bits"] | None = None, normalise: bool = True
            ) -> Float[Tensor, "batch time heads tables bits"]:
    """|w · x̂ − threshold|: how far each bit of a code is from the other side, or each coordinate from zero.

    Plain differentiable PyTorch in at least float32; it holds what `hash_codes` never writes. Raises ValueError for an
    x of integers.
    """
    if not x.is_floating_point():
        raise ValueError(f"x: expected floats, got {x.dtype}")
    dtype = torch.promote_types(x.dtype, torch.float32)
    x, weight = x.to(dtype), weight.to(dtype).expand(x.shape[2], -1, -1, -1)
    if normalise:
        x = torch.nn.functional.normalize(x, dim=-1, eps=torch.finfo(dtype).tiny)
    projection = torch.einsum("bthd,hnid->bthni", x, weight)
    return (projection if threshold is None else projection - threshold).abs()


@torch.library.custom_op("hmlab::hash_codes", mutates_args=())
def _forward(x: Tensor, weight: Tensor, threshold: Tensor | None, normalise: bool, family: str, probes: int,
             impl: str) -> Tensor:
    if impl == "fused":
        from . import fused as form
    else:
        form = eager
    return form.forward(x, weight, threshold, normalise, family, probes)


@_forward.register_fake
def _(x, weight, threshold, normalise, family, probes, impl):
    return x.new_empty(*x.shape[:3], weight.shape[1], probes, dtype=torch.int32)


def _flops(x: tuple, weight: tuple, *_, **__) -> int:
    batch, time, heads, dim = x
    return 2 * batch * time * heads * dim * weight[1] * weight[2]


def _register_flops() -> None:
    from torch.utils.flop_counter import register_flop_formula

    register_flop_formula(torch.ops.hmlab.hash_codes)(_flops)


_register_flops()
