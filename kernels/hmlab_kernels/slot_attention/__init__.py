"""Slot attention: every query attends over the slots of a few picked slot blocks.

    score_tn = scale · q_t · k_n + bias_n,   out_t = Σ_n softmax(score_t)_n v_n,   lse_t = log Σ_n exp(score_tn)

over the slots n of the query's set that it may see; an empty set gives 0 and −inf. The bias is the logarithm of a
slot's mass, the number of tokens it stands for (−inf: none, never read).

Which query reads which set: `query_block` consecutive queries share one, blocks lying at absolute positions of the
document, so query i of a sequence reads set floor((start + i) / query_block) − floor(start / query_block) of its
sequence; and the heads of a head group share one, `groups` groups of neighbouring heads, each within one kv head.
An entry e of a set stands for the slots e·slot_block .. (e + 1)·slot_block − 1 of the sequence, of which those that
do not exist are left out; −1 stands for none. An entry given twice counts twice: not to do so is the caller's duty.
Source: Akbar 2025, HARMONY, the read of the compressed tier, with the log-sum-exp merge of the tiers in place.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .. import _checks, _dispatch, _packing
from . import eager, native, reference
from ._merge import merge

__all__ = ["IMPLEMENTATIONS", "merge", "slot_attention"]

IMPLEMENTATIONS = ("native", "fused", "eager", "reference")
OUTPUTS = ("out", "lse")


def slot_attention(
    q: Float[Tensor, "batch time heads dim"],
    k: Float[Tensor, "batch slots kv_heads dim"],
    v: Float[Tensor, "batch slots kv_heads dim"],
    index: Int[Tensor, "batch sets groups picks"],
    *,
    bias: Float[Tensor, "batch slots kv_heads"] | None = None,
    visible: Int[Tensor, "batch slots"] | None = None,
    query_block: int = 1,
    slot_block: int = 1,
    start: Int[Tensor, "sequences"] | None = None,
    cu_seqlens: Int[Tensor, "sequences_and_one"] | None = None,
    cu_slots: Int[Tensor, "sequences_and_one"] | None = None,
    joined: tuple[Float[Tensor, "batch time heads dim"], Float[Tensor, "batch time heads"]] | None = None,
    scale: float | None = None,
    impl: str | None = None,
) -> tuple[Float[Tensor, "batch time heads dim"], Float[Tensor, "batch time heads"]]:
    """Attend to picked slots; with `joined`, in one softmax with what another attention has read.

    index: slot blocks of each set, counted from the sequence's first slot. groups divides heads and is a multiple of
    kv_heads. A sequence has floor((start + length − 1) / query_block) − floor(start / query_block) + 1 sets, none if
    empty. In a batch more may be allocated; packed, the sets of all sequences follow one another without a gap. That
    there are enough is checked if start is None and is the caller's duty otherwise.
    bias: float32 (float64 with float64 inputs). visible: the first query of the sequence, by its number in this call,
    that may read a slot; 0 or less: all. start: document position of each sequence's first query, at least 0.
    cu_seqlens, cu_slots: where the queries and slots of packed sequences begin; both or neither, the batch being 1.
    joined: out and lse of another attention over the same queries (out 0 where lse is −inf), merged as by `merge`.
    scale: dim^-0.5 if None. impl: one of `IMPLEMENTATIONS`; None takes the device's default.
    Returns out in q's dtype and lse in float32 (float64 for float64). Differentiable in q, k, v, bias and joined, and
    through lse. fused is deterministic; eager is, except for its backward on CUDA. Raises ValueError by argument.
    """
    _check(q, k, v, index, bias, visible, query_block, slot_block, start, cu_seqlens, cu_slots, joined)
    impl = _dispatch.choose("slot_attention", impl, q.device.type, IMPLEMENTATIONS, q.dtype)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    slot_block = min(slot_block, max(k.shape[1], 1))  # a block of all slots is as wide as one can be
    form = reference.slot_attention if impl == "reference" else torch.ops.hmlab.slot_attention
    return form(q, k, v, index, bias, visible, start, cu_seqlens, cu_slots, *(joined or (None, None)),
                query_block, slot_block, scale, impl)  # fmt: skip


def _check(q, k, v, index, bias, visible, query_block, slot_block, start, cu_seqlens, cu_slots, joined) -> None:
    if q.ndim != 4 or not 1 <= q.shape[-1] <= 512:
        raise ValueError(f"q: expected [batch, time, heads, dim] with a dim of 1 to 512, got {list(q.shape)}")
    batch, time, heads, dim = q.shape
    if not q.is_floating_point():
        raise ValueError(f"q: expected floating point, got {q.dtype}")
    if k.ndim != 4 or k.shape[0] != batch or k.shape[3] != dim:
        raise ValueError(f"k: expected [{batch}, slots, kv_heads, {dim}], got {list(k.shape)}")
    slots, kv_heads = k.shape[1:3]
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"k: expected a number of heads that divides q's {heads}, got {kv_heads}")
    if v.shape != k.shape:
        raise ValueError(f"v: expected k's shape {list(k.shape)}, got {list(v.shape)}")
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise ValueError(f"{name}: expected q's dtype {q.dtype}, got {x.dtype}")
    if index.ndim != 4 or index.shape[0] != batch:
        raise ValueError(f"index: expected [{batch}, sets, groups, picks], got {list(index.shape)}")
    groups = index.shape[2]
    if groups < 1 or heads % groups or groups % kv_heads:
        raise ValueError(
            f"index: expected groups that divide the {heads} heads and are a multiple of the {kv_heads} kv heads, "
            f"got {groups}"
        )
    _checks.check_integers(query_block=query_block, slot_block=slot_block)
    _checks.check_same_device(q, k=k, v=v, index=index, bias=bias, visible=visible, start=start)
    for name, length in (("query_block", query_block), ("slot_block", slot_block)):
        if length < 1:
            raise ValueError(f"{name}: expected at least 1, got {length}")
    wide = torch.promote_types(q.dtype, torch.float32)
    if bias is not None and (bias.shape != k.shape[:3] or bias.dtype != wide):
        raise ValueError(f"bias: expected {wide} of {list(k.shape[:3])}, got {bias.dtype} of {list(bias.shape)}")
    if visible is not None and visible.shape != (batch, slots):
        raise ValueError(f"visible: expected {[batch, slots]}, got {list(visible.shape)}")
    if (cu_seqlens is None) != (cu_slots is None):
        missing = "cu_seqlens" if cu_seqlens is None else "cu_slots"
        raise ValueError(f"{missing}: expected cu_seqlens and cu_slots together, got None")
    _packing.check_cu_seqlens("cu_seqlens", cu_seqlens, batch)
    _packing.check_cu_seqlens("cu_slots", cu_slots, batch)
    if cu_seqlens is not None and cu_slots.shape != cu_seqlens.shape:
        raise ValueError(f"cu_slots: expected cu_seqlens' {cu_seqlens.shape[0]} bounds, got {cu_slots.shape[0]}")
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if start is not None and start.shape != (sequences,):
        raise ValueError(f"start: expected [{sequences}], got {list(start.shape)}")
    if cu_seqlens is None and start is None and index.shape[1] < -(-time // query_block):
        raise ValueError(f"index: expected at least {-(-time // query_block)} sets, got {index.shape[1]}")
    for name, x in (("index", index), ("visible", visible), ("start", start)):
        if x is not None and x.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{name}: expected int32 or int64, got {x.dtype}")
    if joined is not None:
        out, lse = joined
        for part in joined:
            _checks.check_same_device(q, joined=part)
        if out.shape != q.shape:
            raise ValueError(f"joined: expected out of q's shape {list(q.shape)}, got {list(out.shape)}")
        if lse.shape != q.shape[:3]:
            raise ValueError(f"joined: expected lse of {list(q.shape[:3])}, got {list(lse.shape)}")
        if out.dtype != q.dtype or lse.dtype != wide:
            raise ValueError(f"joined: expected out in {q.dtype} and lse in {wide}, got {out.dtype} and {lse.dtype}")


def _form(impl: str):
    if impl != "fused":
        return {"native": native, "eager": eager}[impl]
    from . import fused  # needs triton

    return fused


@torch.library.custom_op("hmlab::slot_attention", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor, bias: Tensor | None, visible: Tensor | None,
    start: Tensor | None, cu_seqlens: Tensor | None, cu_slots: Tensor | None, out_w: Tensor | None,
    lse_w: Tensor | None, query_block: int, slot_block: int, scale: float, impl: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _form(impl).forward(q, k, v, index, bias, visible, start, cu_seqlens, cu_slots, out_w, lse_w,
                               query_block, slot_block, scale)  # fmt: skip


@_forward.register_fake
def _(q, *_):
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))


@torch.library.custom_op("hmlab::slot_attention_backward", mutates_args=())
def _backward(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor, bias: Tensor | None, visible: Tensor | None,
    start: Tensor | None, cu_seqlens: Tensor | None, cu_slots: Tensor | None, out_w: Tensor | None,
    lse_w: Tensor | None, query_block: int, slot_block: int, scale: float, impl: str,
    out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, bias, out_w, lse_w; without elements where the argument is None."""
    return _form(impl).backward(q, k, v, index, bias, visible, start, cu_seqlens, cu_slots, out_w, lse_w,
                                query_block, slot_block, scale, out, lse, grad_out, grad_lse)  # fmt: skip


@_backward.register_fake
def _(q, k, v, index, bias, visible, start, cu_seqlens, cu_slots, out_w, lse_w, *_):
    return tuple(q.new_empty(0) if x is None else x.new_empty(x.shape) for x in (q, k, v, bias, out_w, lse_w))


def _save(ctx, inputs, output):
    *tensors, ctx.query_block, ctx.slot_block, ctx.scale, ctx.impl = inputs
    ctx.save_for_backward(*tensors, *output)


def _gradient(ctx, grad_out, grad_lse):
    *tensors, out, lse = ctx.saved_tensors
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    grad_lse = torch.zeros_like(lse) if grad_lse is None else grad_lse
    gradients = torch.ops.hmlab.slot_attention_backward(
        *tensors, ctx.query_block, ctx.slot_block, ctx.scale, ctx.impl, out, lse, grad_out, grad_lse
    )
    q, k, v, bias, out_w, lse_w = gradients
    bias = None if tensors[4] is None else bias
    out_w, lse_w = (None, None) if tensors[9] is None else (out_w, lse_w)
    return q, k, v, None, bias, None, None, None, None, out_w, lse_w, None, None, None, None


_forward.register_autograd(_gradient, setup_context=_save)


def _flops(q: tuple, k: tuple, v: tuple, index: tuple, *arguments, **_) -> int:
    # A product with the key and one with the value, two flops each, for every slot that an entry can stand for.
    slot_block = arguments[8]
    return 4 * q[0] * q[1] * q[2] * q[3] * index[3] * slot_block


def _backward_flops(*shapes, **keywords) -> int:
    return _flops(*shapes, **keywords) * 5 // 2


def _register_flops() -> None:
    from torch.utils.flop_counter import register_flop_formula

    register_flop_formula(torch.ops.hmlab.slot_attention)(_flops)
    register_flop_formula(torch.ops.hmlab.slot_attention_backward)(_backward_flops)


_register_flops()
