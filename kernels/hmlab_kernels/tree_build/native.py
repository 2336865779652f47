"""Tree building on the CPU in C++ (native.cpp): all levels in one call. Linear summarizers only."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from .. import _native
from .plan import Plan

_SOURCE = Path(__file__).with_name("native.cpp")


def forward(leaves: Tensor, taps: Tensor, bias: Tensor, deeper: None, norm: None, carried: Tensor | None,
            position: Tensor | None, plan: Plan) -> Tensor:
    first, flat = plan.begin(leaves, carried)
    _call("forward", plan, taps, position, first, taps.contiguous(), bias.contiguous(), flat)
    return flat


def backward(grad: Tensor, flat: Tensor, leaves: Tensor, taps: Tensor, bias: Tensor, deeper: None, norm: None,
             carried: Tensor | None, position: Tensor | None, plan: Plan) -> tuple[Tensor, ...]:
    first, grad_first = plan.leaves(leaves, carried), leaves.new_zeros(plan.batch, plan.carry + plan.time, plan.dim)
    grad_flat = grad.clone(memory_format=torch.contiguous_format)
    grad_taps, grad_bias = leaves.new_zeros(taps.shape), leaves.new_zeros(bias.shape)
    _call("backward", plan, taps, position, first, taps.contiguous(), flat, grad_flat, grad_first, grad_taps, grad_bias)
    grad_leaves, grad_carried = plan.end(grad_first, grad_flat, carried)
    return grad_leaves, grad_taps, grad_bias, leaves.new_empty(0), leaves.new_empty(0), grad_carried


def _call(form: str, plan: Plan, taps: Tensor, position: Tensor | None, *tensors: Tensor) -> None:
    if plan.depth == 0 or plan.batch == 0:
        return
    sources = taps.shape[2] // (plan.kernel * plan.dim)
    sizes = [plan.batch, plan.dim, plan.banks, plan.expansion, sources, plan.arity, plan.kernel, plan.depth]
    nodes = plan.carry + plan.time
    table = [0, nodes, 1, plan.batch * nodes, 1, plan.carry, plan.time, 0]
    for i, level in enumerate(plan.levels(), 1):
        table += [*level, plan.new(i), plan.low(i)]
    index = None
    if position is not None:
        index = torch.cat([places.flatten() for places in plan.children(position)])
    function = getattr(_native.library(_SOURCE), f"tree_build_{form}_{str(taps.dtype).removeprefix('torch.')}")
    function(
        (ctypes.c_int64 * len(sizes))(*sizes), (ctypes.c_int64 * len(table))(*table),
        None if index is None else _pointer(index), *map(_pointer, tensors),
    )  # fmt: skip


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())
