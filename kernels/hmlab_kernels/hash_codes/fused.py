"""Hash codes in Triton: one launch, a program per block of tokens and head, projections never written.

A program multiplies its vectors with a tile of tables × bits rows (every table padded to a power of two, so that the
product reshapes into [tokens, tables, bits]) and reduces over the bits. Up to 128 padded rows x is read once; further
tables read it again, from the cache. No atomics: deterministic.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _launch

_ROWS = 128  # of the weight in one tile: an accumulator of 128 × 128 is what 8 warps hold with room to spare


def blocks(tables: int, bits: int, dim: int) -> tuple[int, int, int, int]:
    """Tokens, tables, bits and dims of a program's tiles."""
    padded = triton.next_power_of_2(bits)
    together = min(triton.next_power_of_2(tables), max(1, _ROWS // padded))
    together = max(together, 16 // padded, 1)  # a product of tiles takes 16 rows at least
    tokens = 128 if together * padded <= _ROWS else 64
    return tokens, together, padded, min(_launch.block_dim(dim), 64)


def forward(x: Tensor, weight: Tensor, threshold: Tensor | None, normalise: bool, family: str, probes: int) -> Tensor:
    batch, time, heads, dim = x.shape
    _, tables, bits, _ = weight.shape
    codes = x.new_empty(batch, time, heads, tables, probes, dtype=torch.int32)
    if codes.numel() == 0:
        return codes
    x = _launch.unit_stride(x)
    weight = _launch.unit_stride(weight.expand(heads, -1, -1, -1))
    cuts = weight if threshold is None else _launch.unit_stride(threshold.expand(heads, -1, -1))
    block_tokens, block_tables, block_bits, block_dim = blocks(tables, bits, dim)
    with _launch.on(x):
        _codes[triton.cdiv(batch * time, block_tokens), heads](
            x, weight, cuts, codes, batch * time, time, *x.stride()[:3], *weight.stride()[:3], *cuts.stride()[:2],
            heads, TABLES=tables, BITS=bits, DIM=dim, PROBES=probes, THRESHOLD=threshold is not None,
            NORMALISE=normalise, CROSS_POLYTOPE=family == "cross_polytope", BLOCK_TOKENS=block_tokens,
            BLOCK_TABLES=block_tables, BLOCK_BITS=block_bits, BLOCK_DIM=block_dim,
            num_warps=8 if block_tables * block_bits >= _ROWS or x.dtype == torch.float32 else 4, num_stages=2,
        )  # fmt: skip
    return codes


@triton.jit
def _codes(
    x, weight, threshold, codes, tokens, time, x_batch, x_time, x_head, weight_head, weight_table, weight_bit,
    threshold_head, threshold_table, heads, TABLES: tl.constexpr, BITS: tl.constexpr, DIM: tl.constexpr,
    PROBES: tl.constexpr, THRESHOLD: tl.constexpr, NORMALISE: tl.constexpr, CROSS_POLYTOPE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_TABLES: tl.constexpr, BLOCK_BITS: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    head = tl.program_id(1).to(tl.int64)
    inside = token < tokens
    x += head * x_head + (token // time) * x_batch + (token % time) * x_time
    weight += head * weight_head
    codes += (token * heads + head) * (TABLES * PROBES)
    row = tl.arange(0, BLOCK_TABLES * BLOCK_BITS)
    bit = row % BLOCK_BITS
    for first in range(0, TABLES, BLOCK_TABLES):
        table = first + row // BLOCK_BITS
        real = (table < TABLES) & (bit < BITS)
        signed = tl.zeros([BLOCK_TOKENS, BLOCK_TABLES * BLOCK_BITS], tl.float32)
        square = tl.zeros([BLOCK_TOKENS], tl.float32)
        for start in range(0, DIM, BLOCK_DIM):
            dim = start + tl.arange(0, BLOCK_DIM)
            part = tl.load(x[:, None] + dim[None, :], mask=inside[:, None] & (dim < DIM)[None, :], other=0.0)
            rows = tl.load(
                weight + table.to(tl.int64)[:, None] * weight_table + bit.to(tl.int64)[:, None] * weight_bit
                + dim[None, :],
                mask=real[:, None] & (dim < DIM)[None, :], other=0.0,
            )  # fmt: skip
            signed += _launch.dot(part, tl.trans(rows))
            if THRESHOLD and NORMALISE:
                square += tl.sum(part.to(tl.float32) * part.to(tl.float32), 1)
        # Without a threshold the norm changes neither a sign nor the order of the margins.
        if THRESHOLD:
            if NORMALISE:
                norm = tl.sqrt(square)
                signed = signed / tl.where(norm > 0, norm, 1.0)[:, None]
            cut = tl.load(
                threshold + head * threshold_head + table.to(tl.int64) * threshold_table + bit, mask=real, other=0.0
            )
            signed -= cut.to(tl.float32)[None, :]
        signed = tl.reshape(signed, [BLOCK_TOKENS, BLOCK_TABLES, BLOCK_BITS])
        index = tl.arange(0, BLOCK_BITS)[None, None, :]
        tables = first + tl.arange(0, BLOCK_TABLES)
        target = codes[:, None] + tables.to(tl.int64)[None, :] * PROBES
        stored = inside[:, None] & (tables < TABLES)[None, :]
        # What is left to take, the next the least: certainties of bits, or coordinates from the largest down.
        rank = tl.abs(signed)
        if CROSS_POLYTOPE:
            rank = -rank
        rank = tl.where(index < BITS, rank, float("inf"))
        if CROSS_POLYTOPE:
            for p in range(PROBES):
                least = _first_least(rank, index, BLOCK_BITS)
                taken = index == least[:, :, None]
                negative = tl.max(tl.where(taken & (signed < 0), 1, 0), 2)
                tl.store(target + p, least + BITS * negative, mask=stored)
                rank = tl.where(taken, float("inf"), rank)
        else:
            code = tl.sum(tl.where((signed > 0) & (index < BITS), 1 << index, 0), 2)
            tl.store(target, code, mask=stored)
            for p in range(1, PROBES):
                least = _first_least(rank, index, BLOCK_BITS)
                tl.store(target + p, code ^ (1 << least), mask=stored)
                rank = tl.where(index == least[:, :, None], float("inf"), rank)


@triton.jit
def _first_least(values, index, BLOCK_BITS: tl.constexpr):
    """Index of the least along the last axis, the lowest where several are."""
    return tl.min(tl.where(values == tl.min(values, 2)[:, :, None], index, BLOCK_BITS - 1), 2)
