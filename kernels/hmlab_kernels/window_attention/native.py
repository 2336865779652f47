"""Window attention on the CPU in C++ (native.cpp over _tile.hpp): nothing is held but a tile of scores."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from .. import _native
from .layout import Layout

_SOURCE = Path(__file__).with_name("native.cpp")


def forward(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float) -> tuple[Tensor, Tensor]:
    dtype = _native.wide(q.dtype)
    out, lse = q.new_empty(q.shape, dtype=dtype), q.new_empty(q.shape[:3], dtype=dtype)
    _call("forward", q, k, v, layout, scale, out, lse)
    return out.to(q.dtype), lse


def backward(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float, out: Tensor, lse: Tensor,
             grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dtype = _native.wide(q.dtype)
    grad_out = grad_out.to(dtype).contiguous()
    delta = ((grad_out * out).sum(-1) - grad_lse).contiguous()
    grads = tuple(x.new_empty(x.shape, dtype=dtype) for x in (q, k, v))
    _call("backward", q, k, v, layout, scale, lse.contiguous(), delta, grad_out, *grads)
    return tuple(grad.to(q.dtype) for grad in grads)


def _call(form: str, q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float, *rest: Tensor) -> None:
    dtype = _native.wide(q.dtype)
    heads, dim = q.shape[2:]
    queries, keys = layout.sequences(q.device)
    q, k, v = (_native.packed(x, dtype) for x in (q, k, v))
    far = 1 << 40  # beyond any position, and far from overflowing
    window, sinks, segment = (min(n, far) for n in (layout.window, layout.sinks, layout.segment))
    sizes = [queries.count, heads, k.shape[1], dim, window, sinks, segment,
             layout.start is not None, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2]]  # fmt: skip
    start = None if layout.start is None else layout.start.to(torch.int64).contiguous()
    _native.call(_SOURCE, f"window_attention_{form}_{str(dtype).removeprefix('torch.')}", sizes,
                 queries.bounds, keys.bounds, start, q, k, v, float(scale), *rest)  # fmt: skip
