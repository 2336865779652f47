"""What the Triton launchers share: memory layout, block sizes, and the products of tiles. Imported by fused.py only."""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def dot(a, b):
    """a @ b of two tiles (each side at least 16), summed in float32; float32 operands stay exact, never tf32."""
    if INTERPRETED:  # Triton's interpreter would multiply the integers that hold a bfloat16
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


def block_dim(dim: int) -> int:
    """Width of a tile that holds a head's dim: a power of two, at least 16, the least that a product of tiles takes."""
    return max(16, triton.next_power_of_2(dim))


def unit_stride(x: Tensor) -> Tensor:
    """x with neighbouring elements of its last axis side by side; kernels take all other strides as they are."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def on(x: Tensor) -> torch.cuda.device_of:
    """Launch on the device that holds x, whichever is current; nothing on a CPU."""
    return torch.cuda.device_of(x)
