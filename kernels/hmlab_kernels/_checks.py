"""What the public functions refuse alike."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _packing


def check_same_device(first: Tensor, **others: Tensor | None) -> None:
    """Raises ValueError naming the argument that lies elsewhere: a C++ or Triton form would read a foreign address."""
    for name, x in others.items():
        if x is not None and x.device != first.device:
            raise ValueError(f"{name}: expected a tensor on {first.device}, got one on {x.device}")


def check_integers(**sizes: int) -> None:
    """Raises ValueError naming the argument that is no whole number."""
    for name, value in sizes.items():
        if not isinstance(value, (int, torch.SymInt)) or isinstance(value, bool):
            raise ValueError(f"{name}: expected a whole number, got {value!r}")


def check_queries_and_slots(q: Tensor, k: Tensor, bias: Tensor | None, cu_seqlens: Tensor | None,
                            cu_slots: Tensor | None) -> None:
    """Queries `[batch, time, heads, dim]`, slots `[batch, slots, kv_heads, dim]` with their bias, packed or not.

    Raises ValueError naming the argument."""
    if q.ndim != 4 or not q.is_floating_point():
        raise ValueError(f"q: expected floats [batch, time, heads, dim], got {q.dtype} {list(q.shape)}")
    batch, _, heads, dim = q.shape
    if heads < 1 or dim < 1:
        raise ValueError(f"q: expected at least 1 head of at least 1 dim, got {list(q.shape)}")
    if k.ndim != 4 or k.shape[0] != batch or k.shape[3] != dim:
        raise ValueError(f"k: expected [{batch}, slots, kv_heads, {dim}], got {list(k.shape)}")
    if k.shape[2] < 1 or heads % k.shape[2]:
        raise ValueError(f"k: expected kv heads that divide {heads} heads, got {k.shape[2]}")
    if k.dtype != q.dtype:
        raise ValueError(f"k: expected q's dtype {q.dtype}, got {k.dtype}")
    if bias is not None and (bias.shape != k.shape[:3] or not bias.is_floating_point()):
        raise ValueError(f"bias: expected floats {list(k.shape[:3])}, got {bias.dtype} {list(bias.shape)}")
    check_same_device(q, k=k, bias=bias)
    _packing.check_cu_seqlens("cu_seqlens", cu_seqlens, batch)
    _packing.check_cu_seqlens("cu_slots", cu_slots, batch)
    if (cu_seqlens is None) != (cu_slots is None) or (cu_slots is not None and cu_slots.shape != cu_seqlens.shape):
        got = ["None" if cu is None else list(cu.shape) for cu in (cu_seqlens, cu_slots)]
        raise ValueError(f"cu_slots: expected one bound for each of cu_seqlens, got shapes {got[1]} and {got[0]}")
