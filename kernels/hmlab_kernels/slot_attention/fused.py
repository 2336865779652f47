"""Slot attention in Triton, for CUDA.

Forward and the gradients of queries: a program per set, head group and tile of its rows (row = query of the set, head
of the group), which gathers the picked slots tile by tile under a running softmax. The joined attention is where that
softmax starts, so it is read once and costs no pass of its own. Gradients of slots: the index is inverted by a sort,
then a program per tile of a slot block and kv head walks the sets that picked it. No atomics: deterministic, at the
price that a block which every set picked is the work of one program.

Tiles of rows × slots go through the matrix units; a set with a single row (own sets, own heads) reads each slot for
one product only and is summed directly. Inputs of all strides but the last are read in place.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from .. import _launch
from . import kernels, places


def rows_per_tile(rows: int, dim: int, itemsize: int) -> int:
    """Rows of sets that a program holds at once; 1 where that is all of a set's. float32 is multiplied exactly, out of
    registers, and has room for few."""
    if rows == 1:
        return 1
    most = (128 if dim <= 64 else 64 if dim <= 256 else 32) if itemsize == 2 else 32 if dim <= 128 else 16
    return min(max(16, triton.next_power_of_2(rows)), most)


def _slots_per_tile(slots: int, dim: int, itemsize: int) -> int:
    most = 64 if dim * itemsize <= 256 else 32 if dim * itemsize <= 512 else 16
    return min(max(16, triton.next_power_of_2(slots)), most)


def forward(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor, bias: Tensor | None, visible: Tensor | None,
    start: Tensor | None, cu_seqlens: Tensor | None, cu_slots: Tensor | None, out_w: Tensor | None,
    lse_w: Tensor | None, query_block: int, slot_block: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out, lse = q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)
    call = _Call(q, k, v, index, bias, visible, start, cu_seqlens, cu_slots, out_w, lse_w, query_block, slot_block)
    if out.numel():
        with _launch.on(q):
            kernels.forward[call.grid](
                *call.tensors, out, lse, *call.strides, *call.sizes, scale, **call.constants, JOINED=out_w is not None
            )
    return out, lse


def backward(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor, bias: Tensor | None, visible: Tensor | None,
    start: Tensor | None, cu_seqlens: Tensor | None, cu_slots: Tensor | None, out_w: Tensor | None,
    lse_w: Tensor | None, query_block: int, slot_block: int, scale: float,
    out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    gradients = tuple(q.new_empty(0) if x is None else x.new_empty(x.shape) for x in (q, k, v, bias, out_w, lse_w))
    grad_q, grad_k, grad_v, grad_bias, grad_out_w, grad_lse_w = gradients
    if not out.numel():
        return tuple(g.zero_() for g in gradients)
    call = _Call(q, k, v, index, bias, visible, start, cu_seqlens, cu_slots, out_w, lse_w, query_block, slot_block)
    grad_out, grad_lse = _launch.unit_stride(grad_out), grad_lse.contiguous()
    given_strides = _strides(grad_out, call.packed)
    delta = torch.empty_like(lse)
    with _launch.on(q):
        kernels.backward_queries[call.grid](
            *call.tensors, out, lse, grad_out, grad_lse, grad_q, grad_out_w, grad_lse_w, delta,
            *call.strides, *given_strides, *call.sizes, scale, **call.constants, JOINED=out_w is not None,
        )  # fmt: skip
        if k.numel():
            call.backward_slots(lse, delta, grad_out, given_strides, grad_k, grad_v, grad_bias, scale)
    return gradients


class _Call:
    """A call's arguments as the kernels take them."""

    def __init__(self, q, k, v, index, bias, visible, start, cu_seqlens, cu_slots, out_w, lse_w, query_block,
                 slot_block) -> None:  # fmt: skip
        self.packed = cu_seqlens is not None
        places.check_start(q, index, start, cu_seqlens, query_block)
        sequence_of = first_set = None
        if self.packed:
            where = places.find(q, k, index, start, cu_seqlens, cu_slots, query_block)
            cu_seqlens, cu_slots = where.queries.bounds, where.slots.bounds
            sequence_of, first_set = where.sequence, where.first_set
        q, k, v = (_launch.unit_stride(x) for x in (q, k, v))
        out_w = None if out_w is None else _launch.unit_stride(out_w)
        index, bias, visible, start, lse_w = (
            None if x is None else x.contiguous() for x in (index, bias, visible, start, lse_w)
        )
        tables = cu_seqlens, cu_slots, sequence_of, first_set
        self.tensors = (q, k, v, index, bias, visible, start, *tables, out_w, lse_w)
        self.strides = tuple(stride for x in (q, k, v, out_w) for stride in _strides(x, self.packed))
        (_, time, heads, dim), (slots, kv_heads) = q.shape, k.shape[1:3]
        batch, sets, groups, picks = index.shape
        share = heads // groups
        itemsize = q.element_size()
        rows = rows_per_tile(query_block * share, dim, itemsize)
        row_tiles = triton.cdiv(query_block * share, rows)
        self.grid = batch * sets * row_tiles, groups
        # Without slots there is nothing to load from: not even a masked address.
        reads = picks * slot_block if slots else 0
        self.sizes = time, slots, sets, groups, heads, kv_heads, reads, row_tiles
        self.constants = {
            "DIM": dim, "QUERY_BLOCK": query_block, "SLOT_BLOCK": slot_block, "SHARE": share, "ROWS": rows,
            "SLOTS": _slots_per_tile(picks * slot_block, dim, itemsize), "BLOCK_D": _launch.block_dim(dim),
            "BIASED": bias is not None, "HIDING": visible is not None, "STARTED": start is not None,
            "PACKED": self.packed, **_schedule(rows, dim, itemsize),
        }  # fmt: skip

    def backward_slots(self, lse, delta, grad_out, given_strides, grad_k, grad_v, grad_bias, scale) -> None:
        q, k, v, index, bias, visible, start, cu_seqlens, cu_slots, sequence_of, first_set, *_ = self.tensors
        time, slots, sets, groups, heads, kv_heads, *_ = self.sizes
        dim, itemsize, slot_block = q.shape[3], q.element_size(), self.constants["SLOT_BLOCK"]
        per_tile = min(32, _slots_per_tile(slot_block, dim, itemsize))  # two sums are held
        slot_tiles = triton.cdiv(slot_block, per_tile)
        rows = min(64 if dim <= 128 else 32, rows_per_tile(64, dim, itemsize))  # of many sets
        blocks = triton.cdiv(slots, slot_block)
        block_sequence = first_block = None
        if self.packed:
            counts = (cu_slots.diff() + slot_block - 1) // slot_block
            ends = counts.cumsum(0)
            first_block = ends - counts
            all_blocks = slots // slot_block + len(counts)  # as many or more, known without reading the counts
            block_sequence = torch.searchsorted(ends, torch.arange(all_blocks, device=q.device), right=True)
            block_sequence.clamp_(max=len(counts) - 1)
            first, limit = (x[sequence_of, None, None] for x in (first_block, counts))
        else:
            all_blocks = q.shape[0] * blocks
            first, limit = (torch.arange(q.shape[0], device=q.device) * blocks)[:, None, None, None], blocks
        order, offsets = _inverted(index, first, limit, all_blocks, kv_heads)
        constants = self.constants | {"ROWS": rows, "SLOTS": per_tile} | _schedule(rows, dim, itemsize)
        kernels.backward_slots[all_blocks * slot_tiles, kv_heads](
            q, k, v, bias, visible, start, cu_seqlens, cu_slots, sequence_of, first_set, block_sequence, first_block,
            order, offsets, lse, delta, grad_out, grad_k, grad_v, grad_bias, *self.strides[:9], *given_strides,
            time, slots, sets, groups, heads, kv_heads, index.shape[3], blocks, slot_tiles, scale, **constants,
        )  # fmt: skip


def _inverted(index: Tensor, first: Tensor, limit: Tensor | int, blocks: int, kv_heads: int) -> tuple[Tensor, Tensor]:
    """Which entries of the flat index picked a slot block for a kv head: order[offsets[block · kv_heads + kv_head]:]
    up to the next offset, ascending. first, limit: the sequence's first block, and how many it has."""
    total = blocks * kv_heads
    kind = torch.int32 if total < 2**31 - 1 else torch.int64
    groups = index.shape[2]
    kv_head = torch.arange(groups, device=index.device)[:, None] // (groups // kv_heads)
    picker = torch.where((index >= 0) & (index < limit), (first + index) * kv_heads + kv_head, total).to(kind)
    found, order = picker.flatten().sort(stable=True)
    return order, torch.searchsorted(found, torch.arange(total + 1, device=index.device, dtype=kind))


def _strides(x: Tensor | None, packed: bool) -> tuple[int, int, int]:
    """From one sequence's beginning to the next unit of it, token to token, head to head."""
    if x is None:
        return 0, 0, 0
    return x.stride(1) if packed else x.stride(0), x.stride(1), x.stride(2)


def _schedule(rows: int, dim: int, itemsize: int) -> dict[str, int]:
    # Two tiles in flight where shared memory takes them.
    return {"num_warps": 8 if rows >= 128 else 4, "num_stages": 2 if itemsize == 2 or dim <= 64 else 1}
