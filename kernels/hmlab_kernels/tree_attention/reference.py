"""The specification of tree attention, one position at a time, in plain differentiable PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .levels import Level, not_held


def tree_attention(own: Tensor, nodes: Tensor, position: Tensor, levels: Sequence[Level], arity: int,
                   scale: float) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(own.dtype, torch.float32)
    own, nodes = own.to(dtype), nodes.to(dtype)
    outputs, sums = [], []
    for b in range(own.shape[0]):
        done = [0] * len(levels)
        for t, token in zip(position[b].tolist(), own[b], strict=True):
            query, key, value = token  # [heads, dim] each
            if not 0 <= t < 2**31:
                raise ValueError(f"position: expected 0 to 2^31 - 1, got {t}")
            if t == 0:  # padding reads nothing
                outputs.append(torch.zeros_like(value))
                sums.append(torch.full_like(value[:, 0], -torch.inf))
                continue
            queries, values = [query], [value]
            for i, level in enumerate(levels):
                span = arity ** (i + 1)
                if t % span == 0:
                    done[i] += 1
                if t >= span:
                    node = level.carry - 1 + done[i]
                    for s in range(level.slots):
                        row = level.offset + b * level.batch + node * level.node + s * level.slot
                        if node < 0 or row >= len(nodes):
                            raise not_held(len(nodes))
                        queries.append(nodes[row, 0])
                        values.append(nodes[row, 1])
            score = (torch.stack(queries) * key).sum(-1) * scale  # [visible nodes, heads]
            outputs.append((torch.softmax(score, 0)[..., None] * torch.stack(values)).sum(0))
            sums.append(torch.logsumexp(score, 0))
    batch, time, _, heads, dim = own.shape
    if not outputs:
        return own.new_zeros(batch, time, heads, dim), own.new_zeros(batch, time, heads)
    return torch.stack(outputs).view(batch, time, heads, dim), torch.stack(sums).view(batch, time, heads)
