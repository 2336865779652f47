"""One step of tree attention in Triton: one launch, a program per row and head, every node read once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _launch


def forward(own: Tensor, nodes: Tensor, sees: Tensor, scale: float) -> Tensor:
    batch, _, heads, dim = own.shape
    out = own.new_empty(batch, heads, dim)
    if not out.numel():
        return out
    own, nodes = _launch.unit_stride(own), _launch.unit_stride(nodes)
    count, width = nodes.shape[1], _launch.block_dim(dim)
    # About 4096 numbers at a time, as many as the registers of four warps hold twice.
    step = max(1, min(triton.next_power_of_2(max(count, 1)), 4096 // width))
    with _launch.on(own):
        _step[(batch * heads,)](
            own, *own.stride()[:-1], nodes, *nodes.stride()[:-1], sees.view(torch.uint8), *sees.stride(), out, scale,
            heads, count, dim, NODES=step, DIM=width, num_warps=4,
        )  # fmt: skip
    return out


@triton.jit
def _step(own, own_b, own_c, own_h, nodes, nodes_b, nodes_n, nodes_c, nodes_h, sees, sees_b, sees_n, out, scale,
          heads, count, dim, NODES: tl.constexpr, DIM: tl.constexpr):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    b, h = program // heads, program % heads
    d = tl.arange(0, DIM)
    real = d < dim
    own += b * own_b + h * own_h + d
    key = tl.load(own + own_c, mask=real, other=0).to(tl.float32)
    acc = tl.load(own + 2 * own_c, mask=real, other=0).to(tl.float32)
    top = tl.sum(tl.load(own, mask=real, other=0).to(tl.float32) * key, 0) * scale
    total = tl.full([], 1.0, tl.float32)
    for c in range(0, count, NODES):
        n = (c + tl.arange(0, NODES)).to(tl.int64)
        seen = tl.load(sees + b * sees_b + n * sees_n, mask=n < count, other=0) != 0
        there = seen[:, None] & real[None, :]
        node = nodes + b * nodes_b + h * nodes_h + n[:, None] * nodes_n + d[None, :]
        query = tl.load(node, mask=there, other=0).to(tl.float32)
        value = tl.load(node + nodes_c, mask=there, other=0).to(tl.float32)
        score = tl.where(seen, tl.sum(query * key[None, :], 1) * scale, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, 0))
        weight = tl.exp(score - new_top)
        shrink = tl.exp(top - new_top)
        total = total * shrink + tl.sum(weight, 0)
        acc = acc * shrink + tl.sum(weight[:, None] * value, 0)
        top = new_top
    tl.store(out + program * dim + d, (acc / total).to(out.dtype.element_ty), mask=real)
