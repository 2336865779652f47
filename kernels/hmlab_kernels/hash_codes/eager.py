"""Hash codes in vectorised PyTorch on any device: projections of some tokens at a time, with the tokens innermost."""

from __future__ import annotations

from collections.abc import Iterator

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
    for p, least in enumerate(_ascending(signed.abs_(), probes - 1), 1):
        codes[:, :, p] = codes[:, :, 0] ^ (1 << least[:, :, 0].int())
    return codes


def _cross_polytope(coordinates: Tensor, probes: int) -> Tensor:
    bits = coordinates.shape[2]
    largest = _ascending(-coordinates.abs(), probes)
    return torch.cat([i + bits * (coordinates.gather(2, i) < 0) for i in largest], 2).int()


def _ascending(values: Tensor, number: int) -> Iterator[Tensor]:
    """Indices along axis 2 of the least value, the next and so on, lower indices first among equals; uses values up.

    Reductions without indices are what a CPU does many at a time: faster than a sort or argmin for a few of them.
    """
    size = values.shape[2]
    rank = (255 - torch.arange(size, device=values.device)).to(torch.uint8)[:, None]
    for _ in range(number):
        least = (values == values.amin(2, keepdim=True)).view(torch.uint8)
        index = (255 - (least * rank).amax(2, keepdim=True)).long().clamp_(max=size - 1)
        yield index
        values.scatter_(2, index, torch.inf)
