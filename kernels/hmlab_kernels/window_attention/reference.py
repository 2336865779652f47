"""The specification of window attention, one query at a time, in plain differentiable PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from .layout import Layout


def window_attention(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(q.dtype, torch.float32)
    heads, kv_heads = q.shape[2], k.shape[2]
    queries = q.to(dtype).flatten(0, 1)
    # Query head h reads kv head h // (heads // kv_heads).
    keys, values = (x.to(dtype).flatten(0, 1).repeat_interleave(heads // kv_heads, 1) for x in (k, v))
    outputs, sums = [], []
    for span in layout.spans():
        for i in range(span.queries):
            position = span.position + i
            begin = max(position - layout.window + 1, 0) // layout.segment * layout.segment
            sinks = [span.key + j for j in range(min(layout.sinks, begin))]
            window = [span.key + layout.lead + p - span.first for p in range(max(begin, span.first), position + 1)]
            rows = torch.tensor(sinks + window, dtype=torch.int64, device=q.device)
            if not len(rows):
                outputs.append(torch.zeros_like(queries[0]))
                sums.append(torch.full_like(queries[0, :, 0], -torch.inf))
                continue
            score = (queries[span.query + i] * keys[rows]).sum(-1) * scale  # [rows, heads]
            outputs.append((torch.softmax(score, 0)[..., None] * values[rows]).sum(0))
            sums.append(torch.logsumexp(score, 0))
    if not outputs:
        return q.new_zeros(q.shape), q.new_zeros(q.shape[:3], dtype=dtype)
    return torch.stack(outputs).view(q.shape).to(q.dtype), torch.stack(sums).view(q.shape[:3])
