"""Ranking in Triton by one 64-bit number: the score above, the place below, so that no two are equal.

Larger is better; equal scores rank by the lower place. Needs triton; imported by fused.py only.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Below every number that `pack` gives.
EMPTY = tl.constexpr(-(2**63))


@triton.jit
def pack(score, place):
    """float32 scores and int32 places, not negative, as int64 in the order of rank; EMPTY where it is -inf or NaN."""
    bits = score.to(tl.int32, bitcast=True)
    rising = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)  # negative floats count downwards
    packed = (rising << 32) | (0x7FFFFFFF - place).to(tl.int64)
    return tl.where(score > float("-inf"), packed, EMPTY)


@triton.jit
def score(packed):
    rising = (packed >> 32).to(tl.int32)
    bits = tl.where(rising < 0, rising ^ 0x7FFFFFFF, rising)
    return tl.where(packed == EMPTY, float("-inf"), bits.to(tl.float32, bitcast=True))


@triton.jit
def place(packed):
    return tl.where(packed == EMPTY, -1, 0x7FFFFFFF - (packed & 0xFFFFFFFF).to(tl.int32))


@triton.jit
def keep_best(best, new):
    """The best of two tiles' rows, as many as `best` is wide, rising from left to right as in `best`; widths are
    powers of two."""
    rows: tl.constexpr = best.shape[0]
    keep: tl.constexpr = best.shape[1]
    wide: tl.constexpr = new.shape[1]
    if wide < keep:
        falling = tl.sort(new, descending=True)
        ahead = tl.arange(0, keep // wide)[None, :, None] == 0
        falling = tl.reshape(tl.where(ahead, falling[:, None, :], EMPTY), [rows, keep])
    else:
        falling = tl.topk(new, keep)
    # Of a rising and a falling row the larger of each pair are the best of both, in an order that one merge sorts.
    return tl.bitonic_merge(tl.maximum(best, falling))
