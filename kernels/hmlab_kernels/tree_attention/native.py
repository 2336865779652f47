"""Tree attention on the CPU in C++ (native.cpp): reads each node once from cache, no intermediate of any size."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from .. import _native
from .levels import Level, check_position, flatten, not_held

_SOURCE = Path(__file__).with_name("native.cpp")


def forward(own: Tensor, nodes: Tensor, position: Tensor, levels: Sequence[Level], arity: int,
            scale: float) -> tuple[Tensor, Tensor]:
    own, nodes = own.contiguous(), nodes.contiguous()
    out = torch.empty_like(own[:, :, 0], memory_format=torch.contiguous_format)
    lse = own.new_empty(out.shape[:-1])
    _call("forward", own, nodes, position, levels, arity, own, nodes, scale, out, lse)
    return out, lse


def backward(own: Tensor, nodes: Tensor, position: Tensor, levels: Sequence[Level], arity: int, scale: float,
             out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor, Tensor]:
    own, nodes = own.contiguous(), nodes.contiguous()
    grad_own, grad_nodes = torch.empty_like(own), torch.zeros_like(nodes)
    _call("backward", own, nodes, position, levels, arity, own, nodes, scale, out.contiguous(), lse.contiguous(),
          grad_out.contiguous(), grad_lse.contiguous(), grad_own, grad_nodes)
    return grad_own, grad_nodes


def _call(form: str, own: Tensor, nodes: Tensor, position: Tensor, levels: Sequence[Level], arity: int,
          *arguments) -> None:
    batch, time, _, heads, dim = own.shape
    if own.numel() == 0:
        return
    check_position(position)
    sizes = [batch, time, heads, dim, len(levels), arity, len(nodes)]
    table = flatten(levels)
    position = position.to(torch.int32).contiguous()
    function = getattr(_native.library(_SOURCE), f"tree_attention_{form}_{str(own.dtype).removeprefix('torch.')}")
    function.restype = ctypes.c_bool
    held = function(
        (ctypes.c_int64 * len(sizes))(*sizes), (ctypes.c_int64 * len(table))(*table), _pointer(position),
        *(_pointer(a) if isinstance(a, Tensor) else ctypes.c_double(a) for a in arguments),
    )  # fmt: skip
    if not held:
        raise not_held(len(nodes))


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())
