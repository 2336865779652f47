"""Small integers at the bits they need, without gaps."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Int, UInt8
from torch import Tensor


def width_of(count: int) -> int:
    """Bits that tell `count` things apart."""
    return (count - 1).bit_length()


def pack(x: Int[Tensor, "*rows count"], width: int) -> UInt8[Tensor, "*rows bytes"]:
    """Integers 0 to 2^width - 1, each row at `width` bits each, filled up to whole bytes."""
    bit = (x.int()[..., None] >> torch.arange(width, device=x.device, dtype=torch.int32)) & 1
    bit = F.pad(bit.flatten(-2), (0, -x.shape[-1] * width % 8)).unflatten(-1, (-1, 8))
    return (bit << torch.arange(8, device=x.device, dtype=torch.int32)).sum(-1).to(torch.uint8)


def unpack(packed: UInt8[Tensor, "*rows bytes"], width: int, count: int) -> Int[Tensor, "*rows {count}"]:
    """The integers that `pack` packed."""
    bit = (packed.int()[..., None] >> torch.arange(8, device=packed.device, dtype=torch.int32)) & 1
    bit = bit.flatten(-2)[..., : count * width].reshape(*packed.shape[:-1], count, width)
    return (bit << torch.arange(width, device=packed.device, dtype=torch.int32)).sum(-1)
