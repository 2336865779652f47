"""Tree attention in vectorised PyTorch on any device: one level at a time, with a running softmax.

Nothing of size time × levels × dim is held, in the forward or the backward pass; the backward recomputes the
scores level by level. Sums into a node's gradient use index_add, which is not deterministic on CUDA.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .levels import Level, visible_rows


def forward(own: Tensor, nodes: Tensor, position: Tensor, levels: Sequence[Level], arity: int,
            scale: float) -> tuple[Tensor, Tensor]:
    query, key, value = own.unbind(2)
    pad = (position == 0)[..., None]
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
    pad = (position == 0)[..., None]
    base = torch.where(pad, torch.inf, lse)
    delta = (grad_out * out).sum(-1) - torch.where(pad, 0, grad_lse)
    weight = ((query * key).sum(-1) * scale - base).exp()
    d_score = scale * weight * ((grad_out * value).sum(-1) - delta)
    grad_key = d_score[..., None] * query
    grad_nodes = nodes.new_zeros(nodes.shape)
    for rows, _, score, read in _levels(key, nodes, position, levels, arity, scale):
        p = (score - base[:, :, None]).exp()
        ds = scale * p * (torch.einsum("bthd,btshd->btsh", grad_out, read[:, :, :, 1]) - delta[:, :, None])
        grad_key = grad_key + torch.einsum("btsh,btshd->bthd", ds, read[:, :, :, 0])
        grad_read = torch.stack([ds[..., None] * key[:, :, None], p[..., None] * grad_out[:, :, None]], 3)
        grad_nodes.index_add_(0, rows.flatten(), grad_read.flatten(0, 2))
    grad_own = torch.stack([d_score[..., None] * key, grad_key, weight[..., None] * grad_out], 2)
    return grad_own, grad_nodes


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
    """Per level: rows [batch, time, slots], sees, scores [batch, time, slots, heads] (-inf unseen), what was read."""
    for i, level in enumerate(levels):
        rows, sees = visible_rows(position, level, arity ** (i + 1))
        read = nodes[rows]  # [batch, time, slots, 2, heads, dim]
        score = torch.einsum("bthd,btshd->btsh", key, read[:, :, :, 0]) * scale
        yield rows, sees, score.masked_fill(~sees[..., None, None], -torch.inf), read
