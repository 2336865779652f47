"""Tree building in vectorised PyTorch on any device: level by level, all rows of a level in one product.

Deterministic on a CPU; on CUDA too, as no sum meets an element twice in one call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .plan import Plan


def forward(leaves: Tensor, taps: Tensor, bias: Tensor, deeper: Tensor | None, norm: Tensor | None,
            carried: Tensor | None, position: Tensor | None, plan: Plan) -> Tensor:
    first, flat = plan.begin(leaves, carried)
    index = plan.children(position) if position is not None else [None] * plan.depth
    below = first[None]
    for level, (table, places) in enumerate(zip(plan.tables(flat), index, strict=True), 1):
        if plan.new(level):
            x = _children(below, level, places, taps, plan)
            z = _stages(_mix(x, taps, bias, plan), deeper)[-1]
            table[:, :, plan.carry :] = _normalised(z, norm).view(plan.slots(level), plan.batch, -1, plan.dim)
        below = table
    return flat


def backward(grad: Tensor, flat: Tensor, leaves: Tensor, taps: Tensor, bias: Tensor, deeper: Tensor | None,
             norm: Tensor | None, carried: Tensor | None, position: Tensor | None, plan: Plan) -> tuple[Tensor, ...]:
    first = plan.leaves(leaves, carried)
    grad_first, grad_flat = torch.zeros_like(first), grad.clone(memory_format=torch.contiguous_format)
    grad_taps, grad_bias = torch.zeros_like(taps), torch.zeros_like(bias)
    grad_deeper = torch.zeros_like(deeper) if deeper is not None else bias.new_empty(0)
    grad_norm = torch.zeros_like(norm) if norm is not None else bias.new_empty(0)
    index = plan.children(position) if position is not None else [None] * plan.depth
    tables, grads = [first[None], *plan.tables(flat)], [grad_first[None], *plan.tables(grad_flat)]
    for level in range(plan.depth, 0, -1):
        if not plan.new(level):
            continue
        x = _children(tables[level - 1], level, index[level - 1], taps, plan)
        g = grads[level][:, :, plan.carry :].reshape(-1, plan.banks, plan.batch * plan.new(level), plan.dim)
        if deeper is not None or norm is not None:
            g = _stages_backward(_stages(_mix(x, taps, bias, plan), deeper), g, deeper, norm, grad_deeper, grad_norm)
        grad_bias += g.sum((0, 2))
        grad_x = torch.zeros_like(x)
        for tap in range(1 + plan.expansion):
            part = g[tap : tap + len(x)]
            grad_taps[tap] += (x.mT @ part).sum(0)
            by_bank = part @ taps[tap].mT
            grad_x += by_bank if x.shape[1] == plan.banks else by_bank.sum(1, keepdim=True)
        _add_to_children(grads[level - 1], grad_x, level, index[level - 1], plan)
    grad_leaves, grad_carried = plan.end(grad_first, grad_flat, carried)
    return grad_leaves, grad_taps, grad_bias, grad_deeper, grad_norm, grad_carried


def _children(below: Tensor, level: int, places: Tensor | None, taps: Tensor, plan: Plan) -> Tensor:
    """The children of all new nodes side by side: `[slots, banks or 1, batch * new, width]`; banks that share what
    they read (leaves, or all of the banks) have one copy of it."""
    new, kernel, dim = plan.new(level), plan.kernel, plan.dim
    if places is None:
        low = plan.low(level)
        run = below[:, :, low : low + (new - 1) * plan.arity + kernel]
        x = run.unfold(2, kernel, plan.arity).transpose(-1, -2) if kernel > plan.arity else run
    else:
        x = below.gather(2, places.clamp(min=0).flatten(1)[None, :, :, None].expand(len(below), -1, -1, dim))
        x = x.unflatten(2, (new, kernel)) * (places >= 0)[None, ..., None]
    x = x.reshape(len(below), plan.batch * new, kernel * dim)
    x = x[:, None] if level == 1 else x.unflatten(0, (-1, plan.banks))
    if taps.shape[2] > kernel * dim:
        x = x.expand(-1, plan.banks, -1, -1).transpose(1, 2).flatten(2)[:, None]
    return x


def _add_to_children(grad_below: Tensor, grad_x: Tensor, level: int, places: Tensor | None, plan: Plan) -> None:
    """The reverse of `_children`. One child of each node at a time: no two of them are the same."""
    new, low = plan.new(level), plan.low(level)
    if grad_x.shape[-1] > plan.kernel * plan.dim:
        grad_x = grad_x[:, 0].unflatten(-1, (plan.banks, -1)).transpose(1, 2)
        grad_x = grad_x.sum(1, keepdim=True) if level == 1 else grad_x
    grad_x = grad_x.reshape(len(grad_below), plan.batch, new, plan.kernel, plan.dim)
    for child in range(plan.kernel):
        part = grad_x[:, :, :, child]
        if places is None:
            at = low + child
            grad_below[:, :, at : at + (new - 1) * plan.arity + 1 : plan.arity] += part
        else:
            place = places[None, :, :, child, None].expand(len(part), -1, -1, plan.dim)
            grad_below.scatter_add_(2, place.clamp(min=0), torch.where(place >= 0, part, 0))


def _mix(x: Tensor, taps: Tensor, bias: Tensor, plan: Plan) -> Tensor:
    """`[slots + expansion, banks, items, dim]`: tap j of the expander carries a slot j places up."""
    slots, items = x.shape[0], x.shape[2]
    if slots == 1 and plan.expansion == 0:  # one product with the bias inside
        return torch.baddbmm(bias[:, None], x[0].expand(plan.banks, -1, -1), taps[0])[None]
    mixed = bias[:, None].expand(slots + plan.expansion, -1, items, -1).contiguous()
    for tap in range(1 + plan.expansion):
        mixed[tap : tap + slots] += x @ taps[tap]
    return mixed


def _stages(z: Tensor, deeper: Tensor | None) -> list[Tensor]:
    """The linear part's result and what each further stage makes of it."""
    stages = [z]
    for weight in deeper if deeper is not None else ():
        stages.append(torch.nn.functional.silu(stages[-1]) @ weight)
    return stages


def _normalised(z: Tensor, norm: Tensor | None) -> Tensor:
    return z if norm is None else torch.nn.functional.rms_norm(z, z.shape[-1:], norm, torch.finfo(z.dtype).eps)


def _stages_backward(stages: list[Tensor], g: Tensor, deeper: Tensor | None, norm: Tensor | None, grad_deeper: Tensor,
                     grad_norm: Tensor) -> Tensor:
    """The gradient of the linear part's result; those of the weights are added in place."""
    if norm is not None:
        z = stages[-1]
        inverse = (z.square().mean(-1, keepdim=True) + torch.finfo(z.dtype).eps).rsqrt()
        grad_norm += (g * z * inverse).sum((0, 1, 2))
        g = g * norm
        g = inverse * (g - z * inverse.square() * (g * z).mean(-1, keepdim=True))
    for stage in range(len(stages) - 2, -1, -1):
        z, gate = stages[stage], torch.sigmoid(stages[stage])
        grad_deeper[stage] += ((z * gate).mT @ g).sum(0)
        g = (g @ deeper[stage].mT) * gate * (1 + z * (1 - gate))
    return g
