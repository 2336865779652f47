"""Compressed segments: every whole segment of keys and values as the mass-weighted means of a few slots.

    A_ij = softmax_{j < m}(scale · k_i · query_j)           each token i of a segment hands out mass 1
    mass_j = Σ_i A_ij,   k̂_j = Σ_i A_ij k_i / mass_j,   v̂_j and position_j likewise (of v_i and of i)

m = count of the segment and head. Slots of a smaller m use the first of the same queries, so a ratio is changed by
recomputing a prefix, which loses no mass. m = segment is the identity: slot j is token j, with mass 1. m = 0 keeps
nothing. A slot j ≥ m is zero throughout, and so are the gradients through it, whatever the segment holds. A / mass is a
softmax over the tokens of log A, and is computed as one: the means of a slot that nobody wants stay defined when its
mass underflows to 0.

The `first` tokens of a segment may be kept elsewhere, as attention sinks are: they hand out no mass and are not read.
In the identity the slots j < first are then zero, as slots j ≥ m are. A segment of which no token is left keeps
nothing.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .. import _checks, _dispatch, _packing
from . import eager, reference

__all__ = ["IMPLEMENTATIONS", "Slots", "compress_segments"]

IMPLEMENTATIONS = ("fused", "eager", "reference")
MOST_TOKENS = 256  # of a segment: a tile of the fused form holds them all


class Slots(NamedTuple):
    """What is kept of each segment. position: mean place of a slot's tokens in the segment, from 0."""

    k: Float[Tensor, "batch segments most kv_heads dim"]
    v: Float[Tensor, "batch segments most kv_heads dim"]
    mass: Float[Tensor, "batch segments most kv_heads"]
    position: Float[Tensor, "batch segments most kv_heads"]


OUTPUTS = Slots._fields


def compress_segments(
    k: Float[Tensor, "batch time kv_heads dim"],
    v: Float[Tensor, "batch time kv_heads dim"],
    queries: Float[Tensor, "kv_heads most dim"],
    count: Int[Tensor, "batch segments kv_heads_or_1"],
    *,
    segment: int,
    scale: float | None = None,
    first: Int[Tensor, "batch segments"] | None = None,
    cu_seqlens: Int[Tensor, "sequences_and_one"] | None = None,
    impl: str | None = None,
) -> Slots:
    """Compress every whole segment of a sequence into the first `count` slots; an unfinished tail makes none.

    segments: time // segment of each row; of packed sequences those of all, one sequence after another, each aligned
    to the beginning of its own. count: how many slots of a segment (and head) are kept, clipped to 0 .. most. segment:
    tokens in one, at most 256; most at most segment. scale: dim^-0.5 if None. first: how many tokens of a segment, from
    its first, are left out, clipped to 0 .. segment; none if None. impl: one of `IMPLEMENTATIONS`; None takes the
    device's default. Differentiable in k, v and queries, from all four outputs.

    Returns k and v in k's dtype, mass and position in at least float32, as sums run. Every implementation is
    deterministic. Raises ValueError by argument.
    """
    if k.ndim != 4 or not k.is_floating_point():
        raise ValueError(f"k: expected [batch, time, kv_heads, dim] of floats, got {k.dtype} of shape {list(k.shape)}")
    batch, time, heads, dim = k.shape
    if heads < 1 or dim < 1:
        raise ValueError(f"k: expected at least 1 kv head of at least 1 dim, got {list(k.shape)}")
    if v.shape != k.shape or v.dtype != k.dtype:
        raise ValueError(f"v: expected {k.dtype} {list(k.shape)} as k is, got {v.dtype} {list(v.shape)}")
    _checks.check_integers(segment=segment)
    if not 1 <= segment <= MOST_TOKENS:
        raise ValueError(f"segment: expected 1 to {MOST_TOKENS}, got {segment}")
    if queries.ndim != 3 or queries.shape[0] != heads or queries.shape[2] != dim:
        raise ValueError(f"queries: expected [{heads}, most, {dim}], got {list(queries.shape)}")
    if not 1 <= queries.shape[1] <= segment:
        raise ValueError(f"queries: expected 1 to {segment} for a segment of {segment}, got {queries.shape[1]}")
    if queries.dtype != k.dtype:
        raise ValueError(f"queries: expected k's dtype {k.dtype}, got {queries.dtype}")
    _checks.check_same_device(k, v=v, queries=queries, count=count)
    _packing.check_cu_seqlens("cu_seqlens", cu_seqlens, batch)
    if count.is_floating_point() or count.dtype == torch.bool:
        raise ValueError(f"count: expected integers, got {count.dtype}")
    if count.ndim != 3 or count.shape[0] != batch or count.shape[2] not in (1, heads) or (
        cu_seqlens is None and count.shape[1] != time // segment
    ):
        segments = time // segment if cu_seqlens is None else "segments"
        raise ValueError(f"count: expected [{batch}, {segments}, {heads} or 1], got {list(count.shape)}")
    if first is not None and (
        first.shape != count.shape[:2] or first.is_floating_point() or first.dtype == torch.bool
    ):
        raise ValueError(f"first: expected integers {list(count.shape[:2])}, got {first.dtype} {list(first.shape)}")
    if first is not None and first.device != k.device:
        raise ValueError(f"first: expected a tensor on {k.device}, got one on {first.device}")
    impl = _dispatch.choose("compress_segments", impl, k.device.type, IMPLEMENTATIONS, k.dtype)
    scale = dim**-0.5 if scale is None else scale
    if first is not None:
        count = count.masked_fill((first >= segment)[..., None], 0)
    count = count.expand(-1, -1, heads)
    if impl == "reference":
        starts = segment_starts(k, count, segment, cu_seqlens)
        return Slots(*reference.compress_segments(k, v, queries, count, first, starts.tolist(), segment, scale))
    *slots, _ = torch.ops.hmlab.compress_segments(k, v, queries, count, first, segment, scale, cu_seqlens, impl)
    return Slots(*slots)


def segment_starts(k: Tensor, count: Tensor, segment: int, cu_seqlens: Tensor | None) -> Int[Tensor, "segments"]:
    """First token of every segment, the same in all rows. Reads `cu_seqlens` back to the host."""
    batch, time = k.shape[:2]
    if cu_seqlens is None:
        return torch.arange(time // segment, device=k.device) * segment
    bounds = _packing.sequences(batch, time, cu_seqlens, torch.device("cpu")).bounds.tolist()
    starts = [t for a, b in pairwise(bounds) for t in range(a, b - segment + 1, segment)]
    if count.shape[1] != len(starts):
        raise ValueError(f"count: expected {len(starts)} segments for these cu_seqlens, got {count.shape[1]}")
    return torch.tensor(starts, dtype=torch.int64, device=k.device)


def _form(impl: str):
    if impl == "fused":
        from . import fused

        return fused
    return eager


@torch.library.custom_op("hmlab::compress_segments", mutates_args=())
def _forward(k: Tensor, v: Tensor, queries: Tensor, count: Tensor, first: Tensor | None, segment: int, scale: float,
             cu_seqlens: Tensor | None, impl: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    starts = segment_starts(k, count, segment, cu_seqlens)
    return *_form(impl).forward(k, v, queries, count, first, starts, segment, scale), starts


@_forward.register_fake
def _(k, v, queries, count, first, segment, scale, cu_seqlens, impl):
    batch, segments, heads = count.shape
    shape = (batch, segments, queries.shape[1], heads)
    sums = torch.promote_types(k.dtype, torch.float32)
    slots, masses = ([k.new_empty(size, dtype=dtype) for _ in range(2)]
                     for size, dtype in (((*shape, k.shape[3]), k.dtype), (shape, sums)))  # fmt: skip
    return *slots, *masses, count.new_empty(segments, dtype=torch.int64)


@torch.library.custom_op("hmlab::compress_segments_backward", mutates_args=())
def _backward(k: Tensor, v: Tensor, queries: Tensor, count: Tensor, first: Tensor | None, starts: Tensor, segment: int,
              scale: float, impl: str, grad_k: Tensor, grad_v: Tensor, grad_mass: Tensor, grad_position: Tensor
              ) -> tuple[Tensor, Tensor, Tensor]:
    return _form(impl).backward(
        k, v, queries, count, first, starts, segment, scale, grad_k, grad_v, grad_mass, grad_position
    )


@_backward.register_fake
def _(k, v, queries, *_):
    return k.new_empty(k.shape), v.new_empty(v.shape), queries.new_empty(queries.shape)


def _save(ctx, inputs, output):
    *tensors, ctx.segment, ctx.scale, _, ctx.impl = inputs
    ctx.save_for_backward(*tensors, output[-1])


def _gradient(ctx, *grads):
    found = torch.ops.hmlab.compress_segments_backward(
        *ctx.saved_tensors, ctx.segment, ctx.scale, ctx.impl, *grads[:4]
    )
    return *found, None, None, None, None, None, None


_forward.register_autograd(_gradient, setup_context=_save)


def _flops(k: tuple, v: tuple, queries: tuple, count: tuple, first: tuple | None, segment: int, *_, products: int = 3,
           **__) -> int:
    batch, segments, heads = count
    return 2 * products * batch * segments * segment * heads * queries[1] * queries[2]


def _backward_flops(k: tuple, v: tuple, queries: tuple, count: tuple, first: tuple | None, starts: tuple, segment: int,
                    *_, **__) -> int:
    return _flops(k, v, queries, count, first, segment, products=7)


def _register_flops() -> None:
    from torch.utils.flop_counter import register_flop_formula

    register_flop_formula(torch.ops.hmlab.compress_segments)(_flops)
    register_flop_formula(torch.ops.hmlab.compress_segments_backward)(_backward_flops)


_register_flops()
