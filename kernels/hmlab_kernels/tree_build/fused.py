"""Tree building in Triton: a level is one launch of tiles of products that read children where they lie.

A launch for each of many small upper levels would cost more than the levels, so the last ones are built by `_top`:
one program per row of the batch and bank goes up (or, for gradients, down) level by level. Deterministic: a child's
gradient is written by one program at a time, and the gradients of the weights are summed in shares (float32 copies of
the weights, as many as the sizes say), added in order. Linear summarizers only.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _launch
from .._launch import dot
from .plan import Plan

TOP_NODES = 16  # a level with no more new nodes per row goes to `_top`, where weights fit the cache of one processor
TOP_DIM = 128
SHARE = 512  # nodes in one share of the gradients of the weights, at least
# Sizes differ from level to level: no kernel is compiled anew for them.
_SIZES = [
    "begin", "batch", "new", "low", "before", "below_at", "below_row", "below_slot", "at", "row", "slot_rows", "carry",
    "child", "children", "first", "last", "span", "start", "time",
]  # fmt: skip


class Tile(NamedTuple):
    """rows: nodes of a tile. columns: of the dim. inner: of the axis summed over. side: of a tile of a weight, and the
    nodes that it takes in at a time."""

    rows: int
    columns: int
    inner: int
    side: int
    warps: int
    stages: int


def tile_of(dim: int, itemsize: int) -> Tile:
    """Block sizes: the accumulator in registers, two or three steps of operands in shared memory."""
    dim = _launch.block_dim(dim)
    if itemsize == 4:  # no matrix units: products in registers
        return Tile(64, min(dim, 64), min(dim, 32), min(dim, 32), 4, 2)
    return Tile(64, min(dim, 128), min(dim, 64), min(dim, 64), 4, 3)


def forward(leaves: Tensor, taps: Tensor, bias: Tensor, deeper: None, norm: None, carried: Tensor | None,
            position: Tensor | None, plan: Plan) -> Tensor:
    first, flat = plan.begin(leaves, carried)
    if not flat.numel():
        return flat
    taps, bias, (index, starts) = taps.contiguous(), bias.contiguous(), _index(plan, position)
    tile, form, top = tile_of(plan.dim, taps.element_size()), _form(plan, taps), _top_from(plan, taps)
    places = _places(plan)
    with _launch.on(flat):
        for i in range(1, min(top, plan.depth + 1)):
            tiles = triton.cdiv(plan.batch * plan.new(i), tile.rows)
            if tiles:
                _level[tiles, plan.slots(i), triton.cdiv(plan.dim, tile.columns)](
                    first if i == 1 else flat, flat, taps, bias, index, starts[i - 1], plan.batch, plan.new(i),
                    plan.low(i), 1 + (i - 1) * plan.expansion, *places[i - 1], *places[i], plan.carry,
                    SHARED=i == 1, ROWS=tile.rows, COLUMNS=tile.columns, INNER=tile.inner, **form,
                    num_warps=tile.warps, num_stages=tile.stages,
                )  # fmt: skip
        if top <= plan.depth:
            _top[plan.batch, plan.banks](
                flat, taps, bias, index, starts[top - 1], top, plan.depth, plan.arity**top, plan.batch, plan.start,
                plan.time, *places[top - 1][:2], *places[top][:2], plan.carry, EXPANSION=plan.expansion,
                ROWS=TOP_NODES, COLUMNS=tile.columns, INNER=tile.inner, **form, num_warps=4, num_stages=1,
            )  # fmt: skip
    return flat


def backward(grad: Tensor, flat: Tensor, leaves: Tensor, taps: Tensor, bias: Tensor, deeper: None, norm: None,
             carried: Tensor | None, position: Tensor | None, plan: Plan) -> tuple[Tensor, ...]:
    first, absent = plan.leaves(leaves, carried), (leaves.new_empty(0), leaves.new_empty(0))
    grad_first, grad = torch.zeros_like(first), grad.clone(memory_format=torch.contiguous_format)
    if not flat.numel():
        grad_leaves, grad_carried = plan.end(grad_first, grad, carried)
        return grad_leaves, taps.new_zeros(taps.shape), bias.new_zeros(bias.shape), *absent, grad_carried
    taps, (index, starts) = taps.contiguous(), _index(plan, position)
    tile, form, top = tile_of(plan.dim, taps.element_size()), _form(plan, taps), _top_from(plan, taps)
    places = _places(plan)
    with _launch.on(flat):
        if top <= plan.depth:
            _top_backward[plan.batch, plan.banks](
                grad, taps, index, starts[-1], top, plan.depth, plan.arity**plan.depth, plan.batch, plan.start,
                plan.time, *places[plan.depth - 1][:2], *places[plan.depth][:2], plan.carry, EXPANSION=plan.expansion,
                ROWS=TOP_NODES, COLUMNS=tile.columns, INNER=tile.inner, **form, num_warps=4, num_stages=1,
            )  # fmt: skip
        for i in range(min(top - 1, plan.depth), 0, -1):
            tiles = triton.cdiv(plan.batch * plan.new(i), tile.rows)
            for child in range(0, plan.kernel if tiles else 0, plan.arity):
                children = min(plan.kernel - child, plan.arity)  # of these no two nodes share one
                _to_children[tiles, plan.slots(i - 1) * children, triton.cdiv(plan.dim, tile.columns)](
                    grad, grad_first if i == 1 else grad, taps, index, starts[i - 1], child, children, plan.batch,
                    plan.new(i), plan.low(i), *places[i - 1], *places[i], plan.carry,
                    SHARED=i == 1, READERS=plan.banks if i == 1 or form["SOURCES"] > 1 else 1,
                    TIMES=form["SOURCES"] if i == 1 else 1, ROWS=tile.rows, COLUMNS=tile.columns, INNER=tile.inner,
                    **form, num_warps=tile.warps, num_stages=tile.stages,
                )  # fmt: skip
        matrices = taps.numel() // plan.dim**2
        rows = sum(plan.batch * plan.new(i) * (1 + i * plan.expansion) for i in range(1, plan.depth + 1))
        shares = max(1, min(rows // SHARE, 64, 2**24 // taps.numel()))
        grad_taps = taps.new_empty(shares, *taps.shape, dtype=torch.float32)
        grad_bias = taps.new_empty(shares, len(taps), *bias.shape, dtype=torch.float32)
        sides = triton.cdiv(plan.dim, tile.side)
        _to_weights[matrices * sides, sides, shares](
            first, flat, grad, index, grad_taps, grad_bias, plan.depth, plan.batch, plan.start, plan.time, plan.carry,
            EXPANSION=plan.expansion, ROWS=tile.side, SIDE=tile.side, **form, num_warps=tile.warps,
            num_stages=tile.stages,
        )  # fmt: skip
    grad_leaves, grad_carried = plan.end(grad_first, grad, carried)
    grad_taps, grad_bias = grad_taps.sum(0).to(taps.dtype), grad_bias.sum((0, 1)).to(bias.dtype)
    return grad_leaves, grad_taps, grad_bias, *absent, grad_carried


def _form(plan: Plan, taps: Tensor) -> dict:
    return {
        "BANKS": plan.banks, "TAPS": 1 + plan.expansion, "SOURCES": taps.shape[2] // (plan.kernel * plan.dim),
        "KERNEL": plan.kernel, "ARITY": plan.arity, "DIM": plan.dim, "RAGGED": plan.ragged,
    }  # fmt: skip


def _top_from(plan: Plan, taps: Tensor) -> int:
    """The first level of those that one launch builds."""
    if plan.dim > TOP_DIM or taps.shape[2] > plan.kernel * plan.dim:
        return plan.depth + 1
    return next((i for i in range(2, plan.depth + 1) if plan.new(i) <= TOP_NODES), plan.depth + 1)


def _places(plan: Plan) -> list[tuple[int, int, int]]:
    """Per level, from the leaves on: first row, nodes per row of the batch, rows per slot."""
    first = plan.carry + plan.time
    return [(0, first, plan.batch * first)] + [(level.offset, level.batch, level.slot) for level in plan.levels()]


def _index(plan: Plan, position: Tensor | None) -> tuple[Tensor | None, list[int]]:
    """The children of all levels, where rows differ, as one list, and where each level's begin."""
    if position is None:
        return None, [0] * plan.depth
    sizes = [plan.batch * plan.new(i) * plan.kernel for i in range(1, plan.depth + 1)]
    index = torch.cat([places.flatten() for places in plan.children(position)])
    return index, [sum(sizes[:i]) for i in range(plan.depth)]


@triton.jit
def _new(span, start, time, RAGGED: tl.constexpr):
    """New nodes per row of a level, as `Plan.new`."""
    new = (start + time) // span - start // span
    if RAGGED:
        new = (time + span - 1) // span
    return new


@triton.jit
def _low(span, start, carry, KERNEL: tl.constexpr, ARITY: tl.constexpr):
    """The place of the first new node's first child, as `Plan.low`."""
    return carry + (start // span) * ARITY + ARITY - KERNEL - start // (span // ARITY)


@triton.jit
def _summarise(below, nodes, taps, bias, index, begin, b, m, valid, bank, slot, column, new, low, before, below_at,
               below_row, below_slot, at, row, slot_rows, carry, BANKS: tl.constexpr, TAPS: tl.constexpr,
               SOURCES: tl.constexpr, KERNEL: tl.constexpr, ARITY: tl.constexpr, DIM: tl.constexpr,
               RAGGED: tl.constexpr, SHARED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
               INNER: tl.constexpr):
    """Slot `slot` of bank `bank` of the new nodes m of rows b: a tile `[ROWS, COLUMNS]`."""
    # What of a node's children lies side by side.
    PARTS: tl.constexpr = KERNEL if RAGGED else 1
    PART: tl.constexpr = DIM if RAGGED else KERNEL * DIM
    n = column + tl.arange(0, COLUMNS)
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    for tap in range(TAPS):
        held = slot - tap
        inside = (held >= 0) & (held < before)
        for source in range(SOURCES):
            of = bank
            if SOURCES > 1:
                of = bank * 0 + source
            child_slot = held * BANKS + of
            if SHARED:
                child_slot = bank * 0
            matrix = (tap * BANKS + bank) * SOURCES + source
            for part in range(PARTS):
                place = low + m * ARITY
                if RAGGED:
                    place = tl.load(index + begin + (b * new + m) * KERNEL + part, mask=valid, other=-1)
                there = valid & inside & (place >= 0)
                child = below_at + child_slot * below_slot + b * below_row + place
                for k0 in range(0, PART, INNER):
                    k = k0 + tl.arange(0, INNER)
                    x = tl.load(below + child[:, None] * DIM + k[None, :], mask=there[:, None] & (k < PART)[None, :],
                                other=0.0)  # fmt: skip
                    w = tl.load(taps + ((matrix * PARTS + part) * PART + k)[:, None] * DIM + n[None, :],
                                mask=(k < PART)[:, None] & (n < DIM)[None, :], other=0.0)  # fmt: skip
                    sums += dot(x, w)
    sums += tl.load(bias + bank * DIM + n, mask=n < DIM, other=0.0).to(tl.float32)[None, :]
    target = at + (slot * BANKS + bank) * slot_rows + b * row + carry + m
    tl.store(nodes + target[:, None] * DIM + n[None, :], sums.to(nodes.dtype.element_ty),
             mask=valid[:, None] & (n < DIM)[None, :])  # fmt: skip


@triton.jit(do_not_specialize=_SIZES)
def _level(below, nodes, taps, bias, index, begin, batch, new, low, before, below_at, below_row, below_slot, at, row,
           slot_rows, carry, BANKS: tl.constexpr, TAPS: tl.constexpr, SOURCES: tl.constexpr, KERNEL: tl.constexpr,
           ARITY: tl.constexpr, DIM: tl.constexpr, RAGGED: tl.constexpr, SHARED: tl.constexpr, ROWS: tl.constexpr,
           COLUMNS: tl.constexpr, INNER: tl.constexpr):
    """Programs: tile of new nodes of all rows of the batch, slot (bank-minor), tile of columns."""
    q = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    slot = tl.program_id(1).to(tl.int64)
    _summarise(below, nodes, taps, bias, index, begin, q // new, q % new, q // new < batch, slot % BANKS, slot // BANKS,
               tl.program_id(2) * COLUMNS, new, low, before, below_at, below_row, below_slot, at, row, slot_rows, carry,
               BANKS, TAPS, SOURCES, KERNEL, ARITY, DIM, RAGGED, SHARED, ROWS, COLUMNS, INNER)  # fmt: skip


@triton.jit(do_not_specialize=_SIZES)
def _top(nodes, taps, bias, index, begin, first, last, span, batch, start, time, below_at, below_row, at, row, carry,
         EXPANSION: tl.constexpr, BANKS: tl.constexpr, TAPS: tl.constexpr, SOURCES: tl.constexpr, KERNEL: tl.constexpr,
         ARITY: tl.constexpr, DIM: tl.constexpr, RAGGED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
         INNER: tl.constexpr):
    """Programs: row of the batch, bank. Levels first .. last, of few nodes each."""
    b = tl.program_id(0).to(tl.int64)
    bank = tl.program_id(1).to(tl.int64)
    zero = bank * 0  # what a loop carries keeps its type
    span, begin = zero + span, zero + begin
    below_at, below_row, at, row = zero + below_at, zero + below_row, zero + at, zero + row
    for level in range(first, last + 1):
        new = _new(span, start, time, RAGGED)
        low = _low(span, start, carry, KERNEL, ARITY)
        before = 1 + (level - 1) * EXPANSION
        for slot in range(before + EXPANSION):
            for m0 in range(0, new, ROWS):
                m = zero + m0 + tl.arange(0, ROWS)
                for column in range(0, DIM, COLUMNS):
                    _summarise(nodes, nodes, taps, bias, index, begin, b, m, m < new, bank, zero + slot, column, new,
                               low, before, below_at, below_row, batch * below_row, at, row, batch * row, carry, BANKS,
                               TAPS, SOURCES, KERNEL, ARITY, DIM, RAGGED, False, ROWS, COLUMNS, INNER)  # fmt: skip
        tl.debug_barrier()  # the next level reads what this one wrote
        begin += batch * new * KERNEL
        below_at = at
        below_row = row
        at += (before + EXPANSION) * BANKS * batch * row
        span *= ARITY
        row = carry + _new(span, start, time, RAGGED)


@triton.jit
def _to_child(grad, grad_below, taps, index, begin, child, b, m, valid, own, slot, column, new, low, below_at,
              below_row, below_slot, at, row, slot_rows, carry, BANKS: tl.constexpr, TAPS: tl.constexpr,
              SOURCES: tl.constexpr, KERNEL: tl.constexpr, ARITY: tl.constexpr, DIM: tl.constexpr,
              RAGGED: tl.constexpr, SHARED: tl.constexpr, READERS: tl.constexpr, TIMES: tl.constexpr,
              ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr):
    """Adds to the gradient of child `child`, slot `slot` of bank `own`, of the new nodes m of rows b. READERS banks
    read it, TIMES times each."""
    d = column + tl.arange(0, COLUMNS)
    place = low + m * ARITY + child
    if RAGGED:
        place = tl.load(index + begin + (b * new + m) * KERNEL + child, mask=valid, other=-1)
    there = (valid & (place >= 0))[:, None] & (d < DIM)[None, :]
    child_slot = slot * BANKS + own
    if SHARED:
        child_slot = slot * 0
    target = grad_below + (below_at + child_slot * below_slot + b * below_row + place)[:, None] * DIM + d[None, :]
    sums = tl.load(target, mask=there, other=0.0).to(tl.float32)
    for tap in range(TAPS):
        for reader in range(READERS):
            bank = own
            if READERS > 1:
                bank = own * 0 + reader
            parent = at + ((slot + tap) * BANKS + bank) * slot_rows + b * row + carry + m
            for again in range(TIMES):
                source = own * 0 + again
                if SOURCES > TIMES:
                    source = own
                matrix = ((tap * BANKS + bank) * SOURCES + source) * KERNEL + child
                for k0 in range(0, DIM, INNER):
                    k = k0 + tl.arange(0, INNER)
                    g = tl.load(grad + parent[:, None] * DIM + k[None, :], mask=valid[:, None] & (k < DIM)[None, :],
                                other=0.0)  # fmt: skip
                    w = tl.load(taps + (matrix * DIM + d)[:, None] * DIM + k[None, :],
                                mask=(d < DIM)[:, None] & (k < DIM)[None, :], other=0.0)  # fmt: skip
                    sums += dot(g, tl.trans(w))
    tl.store(target, sums.to(grad_below.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=_SIZES)
def _to_children(grad, grad_below, taps, index, begin, child, children, batch, new, low, below_at, below_row,
                 below_slot, at, row, slot_rows, carry, BANKS: tl.constexpr, TAPS: tl.constexpr, SOURCES: tl.constexpr,
                 KERNEL: tl.constexpr, ARITY: tl.constexpr, DIM: tl.constexpr, RAGGED: tl.constexpr,
                 SHARED: tl.constexpr, READERS: tl.constexpr, TIMES: tl.constexpr, ROWS: tl.constexpr,
                 COLUMNS: tl.constexpr, INNER: tl.constexpr):
    """Programs: tile of new nodes of all rows of the batch, slot below and child, tile of columns."""
    q = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    pair = tl.program_id(1).to(tl.int64)
    slot = pair // children
    _to_child(grad, grad_below, taps, index, begin, child + pair % children, q // new, q % new, q // new < batch,
              slot % BANKS, slot // BANKS, tl.program_id(2) * COLUMNS, new, low, below_at, below_row, below_slot, at,
              row, slot_rows, carry, BANKS, TAPS, SOURCES, KERNEL, ARITY, DIM, RAGGED, SHARED, READERS, TIMES, ROWS,
              COLUMNS, INNER)  # fmt: skip


@triton.jit(do_not_specialize=_SIZES)
def _top_backward(grad, taps, index, begin, first, last, span, batch, start, time, below_at, below_row, at, row, carry,
                  EXPANSION: tl.constexpr, BANKS: tl.constexpr, TAPS: tl.constexpr, SOURCES: tl.constexpr,
                  KERNEL: tl.constexpr, ARITY: tl.constexpr, DIM: tl.constexpr, RAGGED: tl.constexpr,
                  ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr):
    """Programs: row of the batch, bank. Levels last .. first: the reverse of `_top`."""
    b = tl.program_id(0).to(tl.int64)
    bank = tl.program_id(1).to(tl.int64)
    zero = bank * 0
    span, begin = zero + span, zero + begin
    below_at, below_row, at, row = zero + below_at, zero + below_row, zero + at, zero + row
    for down in range(last + 1 - first):
        new = _new(span, start, time, RAGGED)
        low = _low(span, start, carry, KERNEL, ARITY)
        before = 1 + (last - down - 1) * EXPANSION
        for group in range(0, KERNEL, ARITY):  # of these children no two nodes share one
            for offset in range(ARITY):
                exists = zero + group + offset < KERNEL
                child = tl.minimum(zero + group + offset, KERNEL - 1)
                for slot in range(before):
                    for m0 in range(0, new, ROWS):
                        m = zero + m0 + tl.arange(0, ROWS)
                        for column in range(0, DIM, COLUMNS):
                            _to_child(grad, grad, taps, index, begin, child, b, m, (m < new) & exists, bank,
                                      zero + slot, column, new, low, below_at, below_row, batch * below_row, at, row,
                                      batch * row, carry, BANKS, TAPS, SOURCES, KERNEL, ARITY, DIM, RAGGED, False, 1, 1,
                                      ROWS, COLUMNS, INNER)  # fmt: skip
            tl.debug_barrier()
        span = span // ARITY
        at = below_at
        row = below_row
        below_row = carry + _new(span // ARITY, start, time, RAGGED)
        below_at -= (before - EXPANSION) * BANKS * batch * below_row
        begin -= batch * _new(span, start, time, RAGGED) * KERNEL


@triton.jit
def _add_level(sums, sums_bias, below, grad, index, begin, share, shares, tap, bank, source, child, d, n, batch, new,
               low, before, below_at, below_row, at, row, carry, BANKS: tl.constexpr, SOURCES: tl.constexpr,
               KERNEL: tl.constexpr, ARITY: tl.constexpr, DIM: tl.constexpr, RAGGED: tl.constexpr, SHARED: tl.constexpr,
               ROWS: tl.constexpr):
    """Adds a share of a level's rows to a tile of the gradient of one matrix and to that of the bias."""
    first, last = batch * new * share // shares, batch * new * (share + 1) // shares
    for slot in range(before):
        held = bank * 0 + slot
        of = bank
        if SOURCES > 1:
            of = source
        child_slot = held * BANKS + of
        if SHARED:
            child_slot = bank * 0
        # Of a bias every slot of the level counts once: tap 0 meets the lower ones, the others one more each.
        counts = ((tap == 0) | (held == before - 1)).to(tl.float32)
        for q0 in range(first, last, ROWS):
            q = bank * 0 + q0 + tl.arange(0, ROWS)
            b, m = q // new, q % new
            place = low + m * ARITY + child
            if RAGGED:
                place = tl.load(index + begin + q * KERNEL + child, mask=q < last, other=-1)
            held_at = below_at + child_slot * batch * below_row + b * below_row + place
            x = tl.load(below + held_at[:, None] * DIM + d[None, :],
                        mask=((q < last) & (place >= 0))[:, None] & (d < DIM)[None, :], other=0.0)  # fmt: skip
            parent = at + ((held + tap) * BANKS + bank) * batch * row + b * row + carry + m
            g = tl.load(grad + parent[:, None] * DIM + n[None, :], mask=(q < last)[:, None] & (n < DIM)[None, :],
                        other=0.0)  # fmt: skip
            sums += dot(tl.trans(x), g)
            sums_bias += counts * tl.sum(g.to(tl.float32), 0)
    return sums, sums_bias


@triton.jit(do_not_specialize=_SIZES)
def _to_weights(leaves, nodes, grad, index, grad_taps, grad_bias, last, batch, start, time, carry,
                EXPANSION: tl.constexpr, BANKS: tl.constexpr, TAPS: tl.constexpr, SOURCES: tl.constexpr,
                KERNEL: tl.constexpr, ARITY: tl.constexpr, DIM: tl.constexpr, RAGGED: tl.constexpr, ROWS: tl.constexpr,
                SIDE: tl.constexpr):
    """Programs: matrix (tap, bank, source, child) and tile of its rows, tile of its columns, share of the nodes."""
    tiles: tl.constexpr = (DIM + SIDE - 1) // SIDE
    matrix = tl.program_id(0).to(tl.int64) // tiles
    d = tl.program_id(0) % tiles * SIDE + tl.arange(0, SIDE)
    n = tl.program_id(1) * SIDE + tl.arange(0, SIDE)
    share = tl.program_id(2).to(tl.int64)
    shares = tl.num_programs(2)
    child = matrix % KERNEL
    source = matrix // KERNEL % SOURCES
    bank = matrix // (KERNEL * SOURCES) % BANKS
    tap = matrix // (KERNEL * SOURCES * BANKS)
    zero = share * 0
    sums = tl.zeros([SIDE, SIDE], tl.float32)
    sums_bias = tl.zeros([SIDE], tl.float32)
    span, at = zero + ARITY, zero
    new = _new(span, start, time, RAGGED)
    row = carry + new
    sums, sums_bias = _add_level(sums, sums_bias, leaves, grad, index, zero, share, shares, tap, bank, source, child, d,
                                 n, batch, new, _low(span, start, carry, KERNEL, ARITY), 1, zero, zero + carry + time,
                                 at, row, carry, BANKS, SOURCES, KERNEL, ARITY, DIM, RAGGED, True, ROWS)  # fmt: skip
    begin = batch * new * KERNEL
    for level in range(2, last + 1):
        below_at, below_row, before = at, row, 1 + (level - 1) * EXPANSION
        at += before * BANKS * batch * row
        span *= ARITY
        new = _new(span, start, time, RAGGED)
        row = carry + new
        sums, sums_bias = _add_level(sums, sums_bias, nodes, grad, index, begin, share, shares, tap, bank, source,
                                     child, d, n, batch, new, _low(span, start, carry, KERNEL, ARITY), before, below_at,
                                     below_row, at, row, carry, BANKS, SOURCES, KERNEL, ARITY, DIM, RAGGED, False,
                                     ROWS)  # fmt: skip
        begin += batch * new * KERNEL
    matrices: tl.constexpr = TAPS * BANKS * SOURCES * KERNEL
    target = ((share * matrices + matrix) * DIM + d)[:, None] * DIM + n[None, :]
    tl.store(grad_taps + target, sums, mask=(d < DIM)[:, None] & (n < DIM)[None, :])
    alone = (source == 0) & (child == 0) & (tl.program_id(0) % tiles == 0)
    tl.store(grad_bias + ((share * TAPS + tap) * BANKS + bank) * DIM + n, sums_bias, mask=alone & (n < DIM))
