"""Small integers at the bits they need, without gaps."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Int, UInt8
from torch import Tensor


def width_of(count: int) -> int:
    """Bits that tell `count` things apart."""
    return (count - 1).bit_length()


def pack(x: Int[Tensor, "*rows count"], width: int) -> UInt8[Tensor, "*rows bytes"]:
    """Integers 0 to 2^width - 1, each row at `width` bits each, filled up to whole bytes."""
    unit = math.gcd(width, 8)
    pieces = _split(x.int(), unit, width // unit)
    return _join(F.pad(pieces, (0, -pieces.shape[-1] % (8 // unit))), unit, 8 // unit).to(torch.uint8)


def unpack(packed: UInt8[Tensor, "*rows bytes"], width: int, count: int) -> Int[Tensor, "*rows {count}"]:
    """The integers that `pack` packed."""
    if not width:
        return packed.new_zeros(*packed.shape[:-1], count, dtype=torch.int32)
    unit = math.gcd(width, 8)
    pieces = _split(packed.int(), unit, 8 // unit)
    return _join(pieces[..., : count * width // unit], unit, width // unit)


def _split(x: Tensor, unit: int, count: int) -> Tensor:
    """Each number as `count` numbers of `unit` bits, the lowest first."""
    shift = unit * torch.arange(count, device=x.device, dtype=torch.int32)
    return ((x[..., None] >> shift) & (2**unit - 1)).flatten(-2)


def _join(pieces: Tensor, unit: int, count: int) -> Tensor:
    shift = unit * torch.arange(count, device=pieces.device, dtype=torch.int32)
    return (pieces.unflatten(-1, (pieces.shape[-1] // count, count)) << shift).sum(-1, dtype=torch.int32)
