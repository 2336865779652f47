"""Tree attention in Triton: a tile of positions attends over the few nodes that it reads, as dense masked attention.

The nodes that TILE neighbouring positions of one row read are few: of each level the one that is the last when the
tile begins, and those completed inside, together about TILE + levels. They are listed once per tile (`listing.py`), in
the order level, node, slot; a program then takes one tile and head, reads every listed node once, and leaves the
products to the matrix units. A node is seen by a run of neighbouring positions, so an interval says who reads it.

Deterministic. In the backward pass a node that only one tile reads is written by it. The first and the last node of
each level may be shared with the tiles beside it: their sums go to a table of edges, float32
`[tiles, (first, last), slots of all levels, 2, heads, dim]`, whose runs `_add_runs` adds in order, GROUP tiles at a
time, then GROUP groups at a time: a node that thousands of tiles read costs a few launches, not a long chain.

A NaN in a node reaches every position of a tile that lists it. A node that the table does not hold is not read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _launch
from .._launch import dot
from .levels import Level
from .listing import Listed, field, list_nodes

GROUP = 32
_LOG2E = tl.constexpr(1.4426950408889634)


class Tile(NamedTuple):
    """positions: per program. nodes: listed nodes per step of its loop. registers: at most, per thread."""

    positions: int
    nodes: int
    warps: int
    stages: int
    registers: int = 255


def tile_of(dim: int, itemsize: int, *, backward: bool) -> Tile:
    """Block sizes for heads of a dim: what the registers and 227 KiB of shared memory hold."""
    dim = _launch.block_dim(dim)
    if itemsize == 4:  # no matrix units: products in registers
        return Tile(64, 32, 4, 1) if dim <= 32 else Tile(32, 32, 8, 1) if dim <= 128 else Tile(16, 16, 8, 1)
    if dim <= 128:  # 16 warps on a multiprocessor in the forward pass, 8 in the backward
        return Tile(64, 32, 4, 2) if backward else Tile(64, 32, 8 if dim == 128 else 4, 3, registers=128)
    return Tile(64, 32, 8, 2) if dim <= 256 else Tile(32, 32, 8, 1) if dim <= 512 else Tile(16, 16, 8, 1)


def forward(own: Tensor, nodes: Tensor, position: Tensor, levels: Sequence[Level], arity: int, scale: float
            ) -> tuple[Tensor, Tensor]:
    batch, time, _, heads, dim = own.shape
    out = own.new_empty(batch, time, heads, dim)
    lse = own.new_empty(batch, time, heads, dtype=torch.float32)
    if not out.numel():
        return out, lse
    own, nodes = _launch.unit_stride(own), _launch.unit_stride(nodes)
    tile = tile_of(dim, own.element_size(), backward=False)
    with _launch.on(own):
        listed = list_nodes(position, levels, arity, tile.positions, len(nodes))
        _forward[(batch * listed.tiles * heads,)](
            own, *own.stride()[:-1], nodes, *nodes.stride()[:-1], position, *position.stride(), listed.rows,
            listed.marks, listed.many, out, lse, scale, time, listed.tiles, heads, listed.room, dim,
            TILE=tile.positions, NODES=tile.nodes, DIM=_launch.block_dim(dim), num_warps=tile.warps,
            num_stages=tile.stages, maxnreg=tile.registers,
        )  # fmt: skip
    return out, lse


def backward(own: Tensor, nodes: Tensor, position: Tensor, levels: Sequence[Level], arity: int, scale: float,
             out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor, Tensor]:
    batch, time, _, heads, dim = own.shape
    grad_own, grad_nodes = own.new_empty(own.shape), nodes.new_zeros(nodes.shape)
    if not own.numel():
        return grad_own, grad_nodes
    own, nodes, grad_out = (_launch.unit_stride(x) for x in (own, nodes, grad_out))
    tile = tile_of(dim, own.element_size(), backward=True)
    with _launch.on(own):
        listed = list_nodes(position, levels, arity, tile.positions, len(nodes))
        edges = own.new_empty(batch * listed.tiles, 2, listed.slots, 2, heads, dim, dtype=torch.float32)
        _backward[(batch * listed.tiles * heads,)](
            own, *own.stride()[:-1], nodes, *nodes.stride()[:-1], position, *position.stride(), listed.rows,
            listed.marks, listed.many, lse.contiguous(), grad_out, *grad_out.stride()[:-1],
            grad_lse.contiguous(), grad_own, grad_nodes, edges, scale, time, listed.tiles, heads, listed.room,
            listed.slots, dim, TILE=tile.positions, NODES=tile.nodes, DIM=_launch.block_dim(dim),
            num_warps=tile.warps, num_stages=tile.stages, maxnreg=tile.registers,
        )  # fmt: skip
        _add_edges(edges, listed, grad_nodes, batch)
    return grad_own, grad_nodes


def _add_edges(edges: Tensor, listed: Listed, grad_nodes: Tensor, batch: int) -> None:
    if not listed.slots:
        return
    width, entries, step = edges.shape[3:].numel(), listed.tiles, 1
    block = min(512, triton.next_power_of_2(width))
    while True:
        groups = triton.cdiv(entries, GROUP)
        sums = edges if groups == 1 else edges.new_empty(batch * groups, *edges.shape[1:])
        _add_runs[(batch * groups * listed.slots * triton.cdiv(width, block),)](
            edges, sums, listed.before, listed.table, grad_nodes, listed.tiles, entries, groups, step, listed.slots,
            width, len(grad_nodes), GROUP=GROUP, BLOCK=block, LEVELS=listed.table.shape[1], LAST=groups == 1,
        )  # fmt: skip
        if groups == 1:
            return
        edges, entries, step = sums, groups, step * GROUP


@triton.jit
def _listed(rows, marks, n, c, here, p, nodes, nodes_r, nodes_c, d, dim, room, NODES: tl.constexpr):
    """The listed nodes from c on: rows, edges, visibility [TILE, NODES], queries and values [NODES, DIM]."""
    j = c + tl.arange(0, NODES)
    inside = j < n
    row = tl.load(rows + j, mask=inside, other=-1)
    begin = tl.load(marks + j, mask=inside, other=0)
    end = tl.load(marks + room + j, mask=inside, other=0)
    span = tl.load(marks + 2 * room + j, mask=inside, other=0)
    edge = tl.load(marks + 3 * room + j, mask=inside, other=-1)
    visible = (here[:, None] >= begin[None, :]) & (here[:, None] < end[None, :]) & (p[:, None] >= span[None, :])
    there = (row >= 0)[:, None] & (d < dim)[None, :]
    node = nodes + row[:, None] * nodes_r + d[None, :]
    query = tl.load(node, mask=there, other=0)
    value = tl.load(node + nodes_c, mask=there, other=0)
    return row, edge, visible & (row >= 0)[None, :], query, value


@triton.jit
def _forward(own, own_b, own_t, own_c, own_h, nodes, nodes_r, nodes_c, nodes_h, position, position_b, position_t,
             rows, marks, many, out, lse, scale, time, tiles, heads, room, dim,
             TILE: tl.constexpr, NODES: tl.constexpr, DIM: tl.constexpr):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    at, h = program // heads, program % heads
    b, tile = at // tiles, at % tiles
    here = tl.arange(0, TILE)
    d = tl.arange(0, DIM)
    t = tile * TILE + here
    p = tl.load(position + b * position_b + t * position_t, mask=t < time, other=0).to(tl.int32)
    # What padding holds, even NaN, is not read.
    inside = (p > 0)[:, None] & (d < dim)[None, :]
    own += b * own_b + h * own_h + t[:, None] * own_t + d[None, :]
    q = tl.load(own, mask=inside, other=0).to(tl.float32)
    k = tl.load(own + own_c, mask=inside, other=0)
    acc = tl.load(own + 2 * own_c, mask=inside, other=0).to(tl.float32)
    scale *= _LOG2E  # exponentials to the base 2
    top = tl.sum(q * k.to(tl.float32), 1) * scale
    total = tl.full([TILE], 1.0, tl.float32)

    n = tl.load(many + at)
    rows += at * room
    marks += at * 4 * room
    nodes += h * nodes_h
    for c in range(0, n, NODES):
        _, _, visible, query, value = _listed(rows, marks, n, c, here, p, nodes, nodes_r, nodes_c, d, dim, room, NODES)
        score = tl.where(visible, dot(k, tl.trans(query)) * scale, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, 1))
        weight = tl.exp2(score - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weight, 1)
        acc = acc * shrink[:, None] + dot(weight.to(value.dtype), value)
        top = new_top
    acc = acc / total[:, None]
    place = (b * time + t) * heads + h
    tl.store(out + place[:, None] * dim + d[None, :], acc.to(out.dtype.element_ty),
             mask=(t < time)[:, None] & (d < dim)[None, :])  # fmt: skip
    tl.store(lse + place, tl.where(p > 0, (top + tl.log2(total)) / _LOG2E, float("-inf")), mask=t < time)


@triton.jit
def _backward(own, own_b, own_t, own_c, own_h, nodes, nodes_r, nodes_c, nodes_h, position, position_b, position_t,
              rows, marks, many, lse, grad_out, grad_out_b, grad_out_t, grad_out_h, grad_lse, grad_own,
              grad_nodes, edges, scale, time, tiles, heads, room, held, dim,
              TILE: tl.constexpr, NODES: tl.constexpr, DIM: tl.constexpr):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    at, h = program // heads, program % heads
    b, tile = at // tiles, at % tiles
    here = tl.arange(0, TILE)
    d = tl.arange(0, DIM)
    t = tile * TILE + here
    p = tl.load(position + b * position_b + t * position_t, mask=t < time, other=0).to(tl.int32)
    inside = (p > 0)[:, None] & (d < dim)[None, :]
    place = (b * time + t) * heads + h
    grad = tl.load(grad_out + b * grad_out_b + h * grad_out_h + t[:, None] * grad_out_t + d[None, :],
                   mask=inside, other=0)  # fmt: skip
    own += b * own_b + h * own_h + t[:, None] * own_t + d[None, :]
    q = tl.load(own, mask=inside, other=0).to(tl.float32)
    k = tl.load(own + own_c, mask=inside, other=0)
    v = tl.load(own + 2 * own_c, mask=inside, other=0).to(tl.float32)
    base = tl.load(lse + place, mask=p > 0, other=0) * _LOG2E
    weight_own = tl.where(p > 0, tl.exp2(tl.sum(q * k.to(tl.float32), 1) * scale * _LOG2E - base), 0)
    slope_own = tl.sum(grad.to(tl.float32) * v, 1)

    n = tl.load(many + at)
    rows += at * room
    marks += at * 4 * room
    nodes += h * nodes_h
    # The mean slope, summed anew: out has lost too many digits where it is of half precision, and what follows is
    # the difference of slopes and their mean.
    delta = weight_own * slope_own - tl.load(grad_lse + place, mask=p > 0, other=0)
    for c in range(0, n, NODES):
        _, _, visible, query, value = _listed(rows, marks, n, c, here, p, nodes, nodes_r, nodes_c, d, dim, room, NODES)
        score = tl.where(visible, dot(k, tl.trans(query)) * (scale * _LOG2E), float("-inf"))
        delta += tl.sum(tl.exp2(score - base[:, None]) * dot(grad, tl.trans(value)), 1)

    slope_own = scale * weight_own * (slope_own - delta)
    kept = (t < time)[:, None] & (d < dim)[None, :]
    width = heads * dim
    to_own = grad_own + (b * time + t)[:, None] * 3 * width + h * dim + d[None, :]
    tl.store(to_own, (slope_own[:, None] * k.to(tl.float32)).to(grad_own.dtype.element_ty), mask=kept)
    tl.store(to_own + 2 * width, (weight_own[:, None] * grad.to(tl.float32)).to(grad_own.dtype.element_ty), mask=kept)
    grad_key = slope_own[:, None] * tl.load(own, mask=inside, other=0).to(tl.float32)
    edges += at * 4 * held * width + h * dim
    for c in range(0, n, NODES):
        row, edge, visible, query, value = _listed(
            rows, marks, n, c, here, p, nodes, nodes_r, nodes_c, d, dim, room, NODES
        )
        score = tl.where(visible, dot(k, tl.trans(query)) * (scale * _LOG2E), float("-inf"))
        weight = tl.exp2(score - base[:, None])
        slope = (scale * weight * (dot(grad, tl.trans(value)) - delta[:, None])).to(k.dtype)
        grad_key += dot(slope, query)
        # Transposed, the wide side is the one that the matrix units want wide.
        grad_query = tl.trans(dot(tl.trans(k), slope))
        grad_value = tl.trans(dot(tl.trans(grad), weight.to(k.dtype)))
        alone = ((row >= 0) & (edge < 0))[:, None] & (d < dim)[None, :]
        to_node = grad_nodes + row[:, None] * 2 * width + h * dim + d[None, :]
        tl.store(to_node, grad_query.to(grad_nodes.dtype.element_ty), mask=alone)
        tl.store(to_node + width, grad_value.to(grad_nodes.dtype.element_ty), mask=alone)
        shared = (edge >= 0)[:, None] & (d < dim)[None, :]
        to_edge = edges + edge.to(tl.int64)[:, None] * 2 * width + d[None, :]
        tl.store(to_edge, grad_query, mask=shared)
        tl.store(to_edge + width, grad_value, mask=shared)
    tl.store(to_own + width, grad_key.to(grad_own.dtype.element_ty), mask=kept)


@triton.jit
def _pick(table, index, level, LEVELS: tl.constexpr):
    every = tl.arange(0, LEVELS)
    return tl.sum(tl.where(every == level, field(table, index, every, LEVELS), 0), 0)


@triton.jit
def _add_runs(edges, sums, before, table, grad_nodes, tiles, entries, groups, step, held, width, count,
              GROUP: tl.constexpr, BLOCK: tl.constexpr, LEVELS: tl.constexpr, LAST: tl.constexpr):  # fmt: skip
    """Add what GROUP neighbouring entries, of `step` tiles each, hold of one slot of one level. Nodes that begin and
    end among them are finished; the first and the last become the edges of the group, unless it is the only one."""
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(width, BLOCK)
    at, m = program // blocks // held, program // blocks % held
    b, group = at // groups, at % groups
    x = program % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = x < width
    level = tl.sum((field(table, 7, tl.arange(0, LEVELS), LEVELS) <= m).to(tl.int32), 0) - 1
    node_step = _pick(table, 2, level, LEVELS)
    base = _pick(table, 0, level, LEVELS) + b * _pick(table, 1, level, LEVELS)
    base += (m - _pick(table, 7, level, LEVELS)) * _pick(table, 3, level, LEVELS)
    base += (_pick(table, 5, level, LEVELS) - 1) * node_step  # the row of the node that earlier calls left
    oldest = 1 - _pick(table, 5, level, LEVELS)  # completed nodes from which there is one to see
    before += (b * LEVELS + level) * (tiles + 1)
    e = group * GROUP
    start = tl.load(before + e * step)
    high = start
    acc = tl.zeros([BLOCK], tl.float32)
    first = sums + ((b * groups + group) * 2 * held + m) * width + x
    for _ in range(GROUP):
        low = high
        high = tl.load(before + tl.minimum((e + 1) * step, tiles))
        held_here = edges + ((b * entries + e) * 2 * held + m) * width + x
        acc += tl.load(held_here, mask=inside & (e < entries), other=0)
        ends = high > low
        row = base + low * node_step
        if LAST:
            tl.store(grad_nodes + row * width + x, acc.to(grad_nodes.dtype.element_ty),
                     mask=inside & ends & (low >= oldest) & (row < count))  # fmt: skip
        else:
            tl.store(first, acc, mask=inside & ends & (low == start))
            tl.store(grad_nodes + row * width + x, acc.to(grad_nodes.dtype.element_ty),
                     mask=inside & ends & (low > start) & (row < count))  # fmt: skip
        last = tl.load(held_here + held * width, mask=inside & ends, other=0)
        acc = tl.where(ends, last, acc)
        e += 1
    if LAST:
        row = base + high * node_step
        tl.store(grad_nodes + row * width + x, acc.to(grad_nodes.dtype.element_ty),
                 mask=inside & (high >= oldest) & (row < count))  # fmt: skip
    else:
        tl.store(first + tl.where(high > start, held * width, 0), acc, mask=inside)
