"""Tree attention in vectorised PyTorch on any device: one level at a time, with a running softmax.

Nothing of size time × levels × dim is held, in the forward or the backward pass; the backward recomputes the
scores level by level. Sums into a node's gradient use index_add, which is not deterministic on CUDA.

On the CPU a position that reads a node outside the table is an error; elsewhere, where to ask would mean to wait for
the device, it does not see that node.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .levels import Level, check_position, not_held, visible_rows


def forward(own: Tensor, nodes: Tensor, position: Tensor, levels: Sequence[Level], arity: int,
            scale: float) -> tuple[Tensor, Tensor]:
    query, key, value = own.unbind(2)
    pad = (position <= 0)[..., None]
    top = ((query * key).sum(-1) * scale).masked_fill(pad, -torch.inf)
    total = torch.where(pad, 0, torch.ones_like(top))
    out = value * total[..., None]
    for _, _, score, read in _levels(key, nodes, position, levels, arity, scale):
        new_top = torch.maximum(top, score.amax(2))
        base = torch.where(pad, 0, new_top)
        weight = (score - base[:, :, None]).exp()  # [batch, time, slots, heads]
        shrink = (top - base).exp()
        total = total * shrink + weight.sum(2)
        out = out * shrink[..., None] + torch.einsum("btsh,btshd->bthd", weight, read[:, :, :, 1])
        top = new_top
    safe = torch.where(pad, 1, total)
    return out / safe[..., None], torch.where(pad, -torch.inf, top + safe.log())


def backward(own: Tensor, nodes: Tensor, position: Tensor, levels: Sequence[Level], arity: int, scale: float,
             out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor, Tensor]:
    query, key, value = own.unbind(2)
    pad = (position <= 0)[..., None]
    base = torch.where(pad, torch.inf, lse)
    delta = (grad_out * out).sum(-1) - torch.where(pad, 0, grad_lse)
    weight = ((query * key).sum(-1) * scale - base).exp()
    d_score = scale * weight * ((grad_out * value).sum(-1) - delta)
    grad_key = d_score[..., None] * query
    grad_nodes = nodes.new_zeros(max(1, len(nodes)), *nodes.shape[1:])
    for rows, _, score, read in _levels(key, nodes, position, levels, arity, scale):
        p = (score - base[:, :, None]).exp()
        ds = scale * p * (torch.einsum("bthd,btshd->btsh", grad_out, read[:, :, :, 1]) - delta[:, :, None])
        grad_key = grad_key + torch.einsum("btsh,btshd->bthd", ds, read[:, :, :, 0])
        grad_read = torch.stack([ds[..., None] * key[:, :, None], p[..., None] * grad_out[:, :, None]], 3)
        grad_nodes.index_add_(0, rows.flatten(), grad_read.flatten(0, 2))
    grad_own = torch.stack([d_score[..., None] * key, grad_key, weight[..., None] * grad_out], 2)
    return grad_own, grad_nodes[: len(nodes)]


def weights(own: Tensor, nodes: Tensor, position: Tensor, levels: Sequence[Level], arity: int,
            scale: float) -> Tensor:
    """The attention weights `[batch, time, heads, node]`: own token first, then level by level, slot by slot."""
    query, key, _ = own.unbind(2)
    scores = [((query * key).sum(-1) * scale)[:, :, None]]
    scores += [score for *_, score, _ in _levels(key, nodes, position, levels, arity, scale)]
    weight = torch.softmax(torch.cat(scores, 2), 2) * (position > 0)[..., None, None]
    return weight.transpose(2, 3)


def _levels(key: Tensor, nodes: Tensor, position: Tensor, levels: Sequence[Level], arity: int, scale: float
            ) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Per level: rows and sees [batch, time, slots], scores [batch, time, slots, heads] (-inf unseen), what is read."""
    check_position(position)
    count = len(nodes)
    nodes = nodes if count else nodes.new_zeros(1, *nodes.shape[1:])  # what is not seen reads row 0
    for i, level in enumerate(levels):
        rows, sees = visible_rows(position, level, arity ** (i + 1))
        sees, held = sees[..., None], (rows >= 0) & (rows < count)
        if position.device.type == "cpu" and (sees & ~held).any():
            raise not_held(count)
        sees = sees & held
        rows = torch.where(sees, rows, 0)
        read = nodes[rows]  # [batch, time, slots, 2, heads, dim]
        score = torch.einsum("bthd,btshd->btsh", key, read[:, :, :, 0]) * scale
        yield rows, sees, score.masked_fill(~sees[..., None], -torch.inf), read
