"""The best slots for each query among those that share a bucket with it in one of several hash tables.

    candidates(t, h) = ∪ over tables and probes: the newest m slots available to t in the bucket of that code,
    m = floor(candidates / (tables · probes));   score_j = scale · q_th · k_j + bias_j,   best `picks` of these

A bucket is a run of the table's sorted keys, found by binary search: O(log slots) per table and probe, whatever the
number of slots. Duplicates over tables and probes are dropped, the rest is ranked by its true scores.

Source: HARMONY's LSHRetriever; the sorted form and the cap are ours. Not differentiable.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .. import _checks, _dispatch
from . import eager, native, reference
from .table import Buckets, buckets

__all__ = ["IMPLEMENTATIONS", "OUTPUTS", "Buckets", "Found", "bucket_lookup", "buckets"]

IMPLEMENTATIONS = ("native", "fused", "eager", "reference")
OUTPUTS = ("index", "score", "found")


class Found(NamedTuple):
    """index: the best slots, -1 beyond those there are; score: theirs, descending, -inf beyond; found: how many
    different slots were candidates."""

    index: Int[Tensor, "batch time heads picks"]
    score: Float[Tensor, "batch time heads picks"]
    found: Int[Tensor, "batch time heads"]


def bucket_lookup(
    q: Float[Tensor, "batch time heads dim"],
    codes: Int[Tensor, "batch time heads tables probes"],
    k: Float[Tensor, "batch slots kv_heads dim"],
    buckets: Buckets,
    *,
    picks: int,
    candidates: int,
    bias: Float[Tensor, "batch slots kv_heads"] | None = None,
    available: Int[Tensor, "batch time"] | None = None,
    oldest: Int[Tensor, "batch time"] | None = None,
    cu_seqlens: Int[Tensor, "sequences_and_one"] | None = None,
    cu_slots: Int[Tensor, "sequences_and_one"] | None = None,
    scale: float | None = None,
    impl: str | None = None,
) -> Found:
    """Look up the buckets of `codes` (int32, per table the codes to probe), rank what they hold, return the best.

    buckets: what `buckets` made of the slots' codes, with the same cu_slots. available: query t may read the slots
    0 .. available[t] - 1 of its sequence; all if None. oldest: and of these none before oldest[t], as where slots are
    forgotten first in, first out; the others are no candidates and are not counted. scale: dim^-0.5 if None. impl: one
    of `IMPLEMENTATIONS`; None takes the device's default. Equal scores rank by slot, slots count from their sequence's
    first. A score that is NaN counts as -inf, which is never picked; a key that names a slot which is not there is
    ignored. Returns index and found in int32, score in at least float32. Deterministic. Raises ValueError by argument.
    """
    _check(q, codes, k, buckets.keys, bias, available, oldest, cu_seqlens, cu_slots)
    tables, probes = codes.shape[3:]
    _checks.check_integers(picks=picks, candidates=candidates)
    if picks < 1:
        raise ValueError(f"picks: expected at least 1, got {picks}")
    if candidates < tables * probes:
        raise ValueError(f"candidates: expected one for each of {tables} tables x {probes} probes, got {candidates}")
    impl = _dispatch.choose("bucket_lookup", impl, q.device.type, IMPLEMENTATIONS, q.dtype)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, bias = q.detach(), k.detach(), None if bias is None else bias.detach()
    arguments = (q, codes, k, buckets.keys, bias, available, oldest, cu_seqlens, cu_slots, picks, candidates, scale)
    if impl == "reference":
        return Found(*reference.bucket_lookup(*arguments))
    return Found(*torch.ops.hmlab.bucket_lookup(*arguments, impl))


def _check(q: Tensor, codes: Tensor, k: Tensor, keys: Tensor, bias: Tensor | None, available: Tensor | None,
           oldest: Tensor | None, cu_seqlens: Tensor | None, cu_slots: Tensor | None) -> None:
    _checks.check_queries_and_slots(q, k, bias, cu_seqlens, cu_slots)
    if codes.ndim != 5 or codes.shape[:3] != q.shape[:3] or codes.dtype != torch.int32 or 0 in codes.shape[3:]:
        raise ValueError(
            f"codes: expected int32 {[*q.shape[:3]]} + [tables, probes], got {codes.dtype} {list(codes.shape)}"
        )
    shape = [q.shape[0], k.shape[2], codes.shape[3], k.shape[1]]
    if list(keys.shape) != shape or keys.dtype != torch.int64:
        raise ValueError(f"buckets: expected int64 keys {shape}, got {keys.dtype} {list(keys.shape)}")
    if available is not None and (available.shape != q.shape[:2] or available.is_floating_point()):
        raise ValueError(
            f"available: expected integers {list(q.shape[:2])}, got {available.dtype} {list(available.shape)}"
        )
    if oldest is not None and (
        oldest.shape != q.shape[:2] or oldest.is_floating_point() or oldest.dtype == torch.bool
    ):
        raise ValueError(f"oldest: expected integers {list(q.shape[:2])}, got {oldest.dtype} {list(oldest.shape)}")
    _checks.check_same_device(q, codes=codes, buckets=keys, available=available, oldest=oldest)


@torch.library.custom_op("hmlab::bucket_lookup", mutates_args=())
def _forward(q: Tensor, codes: Tensor, k: Tensor, keys: Tensor, bias: Tensor | None, available: Tensor | None,
             oldest: Tensor | None, cu_seqlens: Tensor | None, cu_slots: Tensor | None, picks: int, candidates: int,
             scale: float, impl: str) -> tuple[Tensor, Tensor, Tensor]:
    arguments = (q, codes, k, keys, bias, available, oldest, cu_seqlens, cu_slots, picks, candidates, scale)
    if impl != "fused":
        return {"native": native, "eager": eager}[impl].forward(*arguments)
    from . import fused  # triton may be missing

    return fused.forward(*arguments)


@_forward.register_fake
def _(q, codes, k, keys, bias, available, oldest, cu_seqlens, cu_slots, picks, candidates, scale, impl):
    index = q.new_empty((*q.shape[:3], picks), dtype=torch.int32)
    score = q.new_empty(index.shape, dtype=torch.promote_types(q.dtype, torch.float32))
    return index, score, index.new_empty(q.shape[:3])


def _flops(q: tuple, codes: tuple, k: tuple, keys: tuple, bias, available, oldest, cu_seqlens, cu_slots, picks: int,
           candidates: int, *_, **__) -> int:
    # The true scores of as many candidates as there may be.
    batch, time, heads, dim = q
    return 2 * batch * time * heads * candidates * dim


def _register_flops() -> None:
    from torch.utils.flop_counter import register_flop_formula

    register_flop_formula(torch.ops.hmlab.bucket_lookup)(_flops)


_register_flops()
