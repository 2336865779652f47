"""The specification of hash codes, one vector and one table at a time, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def hash_codes(x: Tensor, weight: Tensor, threshold: Tensor | None, normalise: bool, family: str,
               probes: int) -> Tensor:
    batch, time, heads, _ = x.shape
    tables = weight.shape[1]
    dtype = torch.promote_types(x.dtype, torch.float32)
    codes = torch.empty(batch, time, heads, tables, probes, dtype=torch.int32, device=x.device)
    for b in range(batch):
        for t in range(time):
            for h in range(heads):
                vector = x[b, t, h].to(dtype)
                if normalise and vector.norm() > 0:
                    vector = vector / vector.norm()
                for n in range(tables):
                    projection = weight[h % len(weight), n].to(dtype) @ vector
                    if threshold is not None:
                        projection = projection - threshold[h % len(threshold), n]
                    code = _hyperplane if family == "hyperplane" else _cross_polytope
                    codes[b, t, h, n] = torch.tensor(code(projection.tolist(), probes))
    return codes


def _hyperplane(signed: list[float], probes: int) -> list[int]:
    code = sum(1 << i for i, value in enumerate(signed) if value > 0)
    least_certain = sorted(range(len(signed)), key=lambda i: abs(signed[i]))  # sorted keeps the order of equals
    return [code, *(code ^ (1 << i) for i in least_certain[: probes - 1])]


def _cross_polytope(coordinates: list[float], probes: int) -> list[int]:
    bits = len(coordinates)
    largest = sorted(range(bits), key=lambda i: -abs(coordinates[i]))
    return [i + bits if coordinates[i] < 0 else i for i in largest[:probes]]
