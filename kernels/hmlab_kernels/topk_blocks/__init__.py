"""Which blocks of slots each set of queries reads: those that get the largest votes.

    vote(c, g, n) = log Σ_t Σ_h Σ_j exp(scale · q_th · k_j + bias_j)

over the voters t of set c, the heads h of group g and those slots j of block n that set c may read. With
`query_block` 1 a set is one query, its own voter. With Q > 1 a set is a block of Q queries, counted from the first of
the sequence, and its voters are the queries of the block before: nothing leaks from inside the block, and the first
block picks nothing. A set may read the slots that its first query may: those visible to it and not too old for it.

Ours; the sharing of a block's picks is the specification of HARMONY's point 9. Not differentiable.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .. import _checks, _dispatch
from . import eager, reference, sets

__all__ = ["IMPLEMENTATIONS", "OUTPUTS", "topk_blocks"]

IMPLEMENTATIONS = ("fused", "eager", "reference")
OUTPUTS = ("index", "score")


def topk_blocks(
    q: Float[Tensor, "batch time heads dim"],
    k: Float[Tensor, "batch slots kv_heads dim"],
    *,
    picks: int,
    bias: Float[Tensor, "batch slots kv_heads"] | None = None,
    visible: Int[Tensor, "batch slots"] | None = None,
    oldest: Int[Tensor, "batch time"] | None = None,
    groups: int | None = None,
    query_block: int = 1,
    slot_block: int = 1,
    cu_seqlens: Int[Tensor, "sequences_and_one"] | None = None,
    cu_slots: Int[Tensor, "sequences_and_one"] | None = None,
    scale: float | None = None,
    impl: str | None = None,
) -> tuple[Int[Tensor, "batch sets groups picks"], Float[Tensor, "batch sets groups picks"]]:
    """The `picks` blocks of `slot_block` slots with the largest votes of each set, and the votes.

    visible: the first query, by its number in the sequence, that may read a slot; all may if None. oldest: the first
    slot of its sequence that query t may read, as where slots are forgotten first in, first out; any if None. groups:
    how many sets of blocks the heads share; it divides heads and is a multiple of kv_heads (heads if None). scale:
    dim^-0.5 if None. impl: one of `IMPLEMENTATIONS`; None takes the device's default.
    Slots that are too old do not vote for their block; `slot_attention` reads a picked block whole, so with `oldest`
    take a slot_block of 1 where blocks may be partly too old.
    Returns index (int32) and score (at least float32), votes descending, equal ones by block; -1 and -inf where a set
    has fewer blocks. A vote that is NaN counts as -inf: such a block is never picked. The sets axis is ceil(time /
    query_block) long. Packed sequences: the sets of all follow one another, blocks are counted from each sequence's
    first slot, and the axis has the fixed length floor((time + sequences · (query_block - 1)) / query_block), with -1
    and -inf in what is left over.
    Deterministic. Raises ValueError by argument.
    """
    _check(q, k, bias, visible, oldest, cu_seqlens, cu_slots)
    heads, dim = q.shape[2:]
    kv_heads = k.shape[2]
    groups = heads if groups is None else groups
    if groups < 1 or heads % groups or groups % kv_heads:
        raise ValueError(f"groups: expected a divisor of {heads} heads, multiple of {kv_heads} kv heads, got {groups}")
    _checks.check_integers(picks=picks, query_block=query_block, slot_block=slot_block)
    for name, value in (("picks", picks), ("query_block", query_block), ("slot_block", slot_block)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    impl = _dispatch.choose("topk_blocks", impl, q.device.type, IMPLEMENTATIONS, q.dtype)
    scale = dim**-0.5 if scale is None else scale
    q, k, bias = q.detach(), k.detach(), None if bias is None else bias.detach()
    arguments = (q, k, bias, visible, oldest, cu_seqlens, cu_slots, picks, groups, query_block, slot_block, scale)
    if impl == "reference":
        return reference.topk_blocks(*arguments)
    return torch.ops.hmlab.topk_blocks(*arguments, impl)


def _check(q: Tensor, k: Tensor, bias: Tensor | None, visible: Tensor | None, oldest: Tensor | None,
           cu_seqlens: Tensor | None, cu_slots: Tensor | None) -> None:
    _checks.check_queries_and_slots(q, k, bias, cu_seqlens, cu_slots)
    if visible is not None and (visible.shape != k.shape[:2] or visible.is_floating_point()):
        raise ValueError(f"visible: expected integers {list(k.shape[:2])}, got {visible.dtype} {list(visible.shape)}")
    if oldest is not None and (
        oldest.shape != q.shape[:2] or oldest.is_floating_point() or oldest.dtype == torch.bool
    ):
        raise ValueError(f"oldest: expected integers {list(q.shape[:2])}, got {oldest.dtype} {list(oldest.shape)}")
    _checks.check_same_device(q, visible=visible, oldest=oldest)


@torch.library.custom_op("hmlab::topk_blocks", mutates_args=())
def _forward(q: Tensor, k: Tensor, bias: Tensor | None, visible: Tensor | None, oldest: Tensor | None,
             cu_seqlens: Tensor | None, cu_slots: Tensor | None, picks: int, groups: int, query_block: int,
             slot_block: int, scale: float, impl: str) -> tuple[Tensor, Tensor]:
    arguments = (q, k, bias, visible, oldest, cu_seqlens, cu_slots, picks, groups, query_block, slot_block, scale)
    if impl == "eager":
        return eager.forward(*arguments)
    from . import fused  # triton may be missing

    return fused.forward(*arguments)


@_forward.register_fake
def _(q, k, bias, visible, oldest, cu_seqlens, cu_slots, picks, groups, query_block, slot_block, scale, impl):
    documents = 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shape = (q.shape[0], sets.allocated(q.shape[1], documents, query_block), groups, picks)
    score = q.new_empty(shape, dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty(shape, dtype=torch.int32), score


def _flops(q: tuple, k: tuple, *_, **__) -> int:
    # Every query with every slot; what visibility takes away is not known from shapes.
    batch, time, heads, dim = q
    return 2 * batch * time * k[1] * heads * dim


def _register_flops() -> None:
    from torch.utils.flop_counter import register_flop_formula

    register_flop_formula(torch.ops.hmlab.topk_blocks)(_flops)


_register_flops()
