"""Buckets as sorted numbers: a hash table that a binary search reads."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from .. import _packing


class Buckets(NamedTuple):
    """Per table, the slots of each sequence sorted by code, then by number: `keys` holds code · 2^32 + slot.

    A bucket is a run of neighbouring keys, oldest slot first. Slots count from the first of their sequence.
    """

    keys: Int[Tensor, "batch kv_heads tables slots"]


def buckets(codes: Int[Tensor, "batch slots kv_heads tables"], *,
            cu_slots: Int[Tensor, "sequences_and_one"] | None = None) -> Buckets:
    """Sort slots into buckets by their codes (int32). cu_slots: where the slots of packed sequences begin and end.

    Reads `cu_slots` back to the host. Raises ValueError by argument.
    """
    if codes.ndim != 4 or codes.dtype != torch.int32:
        got = f"{codes.dtype} {list(codes.shape)}"
        raise ValueError(f"codes: expected int32 [batch, slots, kv_heads, tables], got {got}")
    _packing.check_cu_seqlens("cu_slots", cu_slots, codes.shape[0])
    if cu_slots is not None:
        cu_slots = _packing.sequences(1, codes.shape[1], cu_slots, codes.device, name="cu_slots").bounds
    codes = codes.permute(0, 2, 3, 1).long()
    number = torch.arange(codes.shape[-1], device=codes.device)
    if cu_slots is None:
        return Buckets(((codes << 32) + number).sort(dim=-1).values)
    owner = torch.searchsorted(cu_slots[1:], number, right=True)
    keys, order = ((codes << 32) + number - cu_slots[owner]).sort(dim=-1, stable=True)
    # Sorted by sequence in turn, with its order kept, every sequence's keys lie where its slots do.
    return Buckets(keys.gather(-1, owner[order].argsort(dim=-1, stable=True)))
