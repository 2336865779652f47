"""The specification of tree building, one node at a time, in plain differentiable PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from .plan import Plan


def tree_build(leaves: Tensor, taps: Tensor, bias: Tensor, deeper: Tensor | None, norm: Tensor | None,
               carried: Tensor | None, position: Tensor | None, plan: Plan) -> Tensor:
    dtype = torch.promote_types(leaves.dtype, torch.float32)
    leaves, taps, bias, deeper, norm, carried = (
        None if x is None else x.to(dtype) for x in (leaves, taps, bias, deeper, norm, carried)
    )
    if position is None:
        position = torch.arange(plan.start + 1, plan.start + plan.time + 1).expand(plan.batch, -1)
    weights = taps, bias, deeper, norm
    rows = [_row(leaves[b], carried[b] if carried is not None else None, position[b].tolist(), weights, plan)
            for b in range(plan.batch)]  # fmt: skip
    flat = [
        node[slot]
        for level in range(plan.depth)
        for slot in range(plan.slots(level + 1))
        for row in rows
        for node in row[level]
    ]
    return torch.stack(flat) if flat else leaves.new_zeros(plan.rows, plan.dim)


def _row(leaves: Tensor, carried: Tensor | None, position: list[int], weights: tuple, plan: Plan) -> list[list[Tensor]]:
    """The tables of one row of the batch: per level a list of nodes `[slots, dim]`."""
    nothing = [leaves.new_zeros(plan.slots(level), plan.dim) for level in range(plan.depth + 1)]
    recent = [[zero] * plan.kernel for zero in nothing]  # the youngest nodes of the document, oldest first
    at = 0
    for level in range(plan.depth + 1):
        for _ in range(plan.kernel - 1):
            if carried is not None and at + plan.slots(level) <= len(carried):
                recent[level].append(carried[at : at + plan.slots(level)])
                at += plan.slots(level)
    tables = [list(nodes[len(nodes) - plan.carry :]) for nodes in recent[1:]]
    for leaf, t in zip(leaves, position, strict=True):
        if not 0 <= t < 2**31:
            raise ValueError(f"position: expected 0 to 2^31 - 1, got {t}")
        if t == 0:  # padding holds no place
            continue
        if t == 1:
            recent = [[zero] * plan.kernel for zero in nothing]
        recent[0].append(leaf[None])
        for level in range(1, plan.depth + 1):
            if t % plan.arity**level:
                break
            recent[level].append(_summarise(recent[level - 1][-plan.kernel :], weights, plan))
            tables[level - 1].append(recent[level][-1])
    for level, table in enumerate(tables, 1):  # places that no node fills hold the summary of nothing
        if len(table) > plan.carry + plan.new(level):
            raise plan.crowded(level)
        while len(table) < plan.carry + plan.new(level):
            table.append(_summarise([nothing[level - 1]] * plan.kernel, weights, plan))
    return tables


def _summarise(children: list[Tensor], weights: tuple, plan: Plan) -> Tensor:
    taps, bias, deeper, norm = weights
    below = len(children[0])
    shared = below == 1 and plan.banks > 1  # leaves
    before = 1 if shared else below // plan.banks
    node = []
    for slot in range(before + plan.expansion):
        for bank in range(plan.banks):
            z = bias[bank]
            for tap in range(1 + plan.expansion):
                if not 0 <= slot - tap < before:
                    continue
                sources = [bank] if taps.shape[2] == plan.kernel * plan.dim else range(plan.banks)
                places = [0 if shared else (slot - tap) * plan.banks + source for source in sources]
                z = z + torch.cat([child[place] for place in places for child in children]) @ taps[tap, bank]
            for stage in deeper if deeper is not None else ():
                z = torch.nn.functional.silu(z) @ stage[bank]
            if norm is not None:
                z = torch.nn.functional.rms_norm(z, z.shape, norm, torch.finfo(z.dtype).eps)
            node.append(z)
    return torch.stack(node)
