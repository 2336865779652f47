"""Hash codes in vectorised PyTorch on any device: projections of some tokens at a time, with the tokens innermost."""

from __future__ import annotations

import torch
from torch import Tensor

# Projections held at once; on a CPU they then stay in its caches.
_ELEMENTS = {"cpu": 1 << 19}
_ELEMENTS_ELSEWHERE = 1 << 25


def forward(x: Tensor, weight: Tensor, threshold: Tensor | None, normalise: bool, family: str, probes: int) -> Tensor:
    batch, time, heads, _ = x.shape
    _, tables, bits, _ = weight.shape
    dtype = torch.promote_types(x.dtype, torch.float32)
    codes = x.new_empty(batch * time, heads, tables, probes, dtype=torch.int32)
    rows = weight.to(dtype).flatten(1, 2).expand(heads, -1, -1)
    tokens = x.flatten(0, 1)
    step = max(1, _ELEMENTS.get(x.device.type, _ELEMENTS_ELSEWHERE) // (heads * tables * bits))
    for start in range(0, batch * time, step):
        part = tokens[start : start + step].to(dtype)
        signed = torch.bmm(rows, part.permute(1, 2, 0)).view(heads, tables, bits, -1)
        if family == "hyperplane":
            # Without a threshold the norm changes neither a sign nor the order of the margins.
            if threshold is not None:
                if normalise:
                    norm = part.norm(dim=-1).T[:, None, None]  # [heads, 1, 1, tokens]
                    signed = signed / torch.where(norm > 0, norm, 1)
                signed = signed - threshold[..., None]
            code = _hyperplane(signed, probes)
        else:
            code = _cross_polytope(signed, probes)
        codes[start : start + step] = code.permute(3, 0, 1, 2)
    return codes.view(batch, time, heads, tables, probes)


def _hyperplane(signed: Tensor, probes: int) -> Tensor:
    heads, tables, bits, tokens = signed.shape
    codes = signed.new_zeros(heads, tables, probes, tokens, dtype=torch.int32)
    for i in range(bits):
        codes[:, :, 0].add_(signed[:, :, i] > 0, alpha=1 << i)
    if probes > 1:
        order = signed.abs().argsort(dim=2, stable=True)[:, :, : probes - 1]
        codes[:, :, 1:] = codes[:, :, :1] ^ (1 << order).int()
    return codes


def _cross_polytope(coordinates: Tensor, probes: int) -> Tensor:
    bits = coordinates.shape[2]
    size = coordinates.abs()
    if probes == 1:
        order = size.argmax(2, keepdim=True)
    else:
        order = size.argsort(dim=2, descending=True, stable=True)[:, :, :probes]
    return (order + bits * (coordinates.gather(2, order) < 0)).int()
