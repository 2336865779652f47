"""Tree attention: every position attends over its own token and the last complete node of each tree level.

    score_n = scale · q_n · k_t,   out_t = Σ_n softmax(score)_n v_n,   n over the nodes visible at t

The key is the position's own, queries and values belong to the nodes (equivalently, one query against many keys).
Level i (from 1) is visible from position arity^i on; what is read of it is its last node that ends at or before
the position. Source: Logarithmic Memory Networks (arXiv 2501.07905), section 3.4.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .. import _dispatch
from .._checks import check_integers, check_same_device
from . import eager, native, reference
from .levels import FLOATS, INTEGERS, Level, check_levels, flatten, unflatten
from .step import STEP_IMPLEMENTATIONS, tree_attention_step

__all__ = [
    "IMPLEMENTATIONS",
    "STEP_IMPLEMENTATIONS",
    "Level",
    "attention_weights",
    "tree_attention",
    "tree_attention_step",
]

IMPLEMENTATIONS = ("native", "fused", "eager", "reference")
OUTPUTS = ("out", "lse")
_WIDEST_FUSED = 2048  # bytes of a head: more do not fit the memory that a block of threads shares


def tree_attention(
    own: Float[Tensor, "batch time 3 heads dim"],
    nodes: Float[Tensor, "rows 2 heads dim"],
    position: Int[Tensor, "batch time"],
    levels: Sequence[Level],
    *,
    arity: int = 2,
    scale: float | None = None,
    impl: str | None = None,
) -> tuple[Float[Tensor, "batch time heads dim"], Float[Tensor, "batch time heads"]]:
    """Read the summary tree at every position.

    own: query, key and value of each token. nodes: query and value of every node, rows as `levels` describe.
    position: 1-based position in the document; 0 at padding, where out is 0 and the log-sum-exp −inf. One that reads
    a node outside `nodes` is an error in forms for the CPU; on CUDA, and in fused, it does not see that node.
    scale: dim^-0.5 if None. impl: one of `IMPLEMENTATIONS`; None takes the device's default. fused is there for heads
    of up to 2048 bytes.
    Returns out in own's dtype and the log-sum-exp of the scores (at least float32). Sums run in float32 or better.
    native and fused are deterministic; eager is, except for its backward on CUDA. Raises ValueError by argument.
    """
    _check(own, nodes, position, levels, arity)
    wide = own.shape[-1] * own.element_size() > _WIDEST_FUSED
    available = tuple(name for name in IMPLEMENTATIONS if not (wide and name == "fused"))
    impl = _dispatch.choose("tree_attention", impl, own.device.type, available, own.dtype)
    scale = own.shape[-1] ** -0.5 if scale is None else scale
    if impl == "reference":
        out, lse = reference.tree_attention(own, nodes, position, levels, arity, scale)
    else:
        # fused reads half precision as it lies in memory; all sum in float32.
        dtype = own.dtype if impl == "fused" else torch.promote_types(own.dtype, torch.float32)
        out, lse = torch.ops.hmlab.tree_attention(
            own.to(dtype), nodes.to(dtype), position, flatten(levels), arity, scale, impl
        )
    return out.to(own.dtype), lse


def attention_weights(own: Tensor, nodes: Tensor, position: Tensor, levels: Sequence[Level], *, arity: int = 2,
                      scale: float | None = None) -> Float[Tensor, "batch time heads node"]:
    """The weights that `tree_attention` gives, materialised: for looking, on short sequences."""
    _check(own, nodes, position, levels, arity)
    scale = own.shape[-1] ** -0.5 if scale is None else scale
    return eager.weights(own.float(), nodes.float(), position, levels, arity, scale)


def _check(own: Tensor, nodes: Tensor, position: Tensor, levels: Sequence[Level], arity: int) -> None:
    """What can be said without reading `position`."""
    if own.ndim != 5 or own.shape[2] != 3:
        raise ValueError(f"own: expected [batch, time, 3, heads, dim], got {list(own.shape)}")
    if own.dtype not in FLOATS:
        raise ValueError(f"own: expected one of {list(FLOATS)}, got {own.dtype}")
    if nodes.ndim != 4 or nodes.shape[1:] != (2, *own.shape[3:]):
        raise ValueError(f"nodes: expected [rows, 2, {own.shape[3]}, {own.shape[4]}], got {list(nodes.shape)}")
    if nodes.dtype != own.dtype:
        raise ValueError(f"nodes: expected own's dtype {own.dtype}, got {nodes.dtype}")
    if own.shape[-1] == 0:
        raise ValueError("own: expected a head dim of at least 1, got 0")
    if own.shape[-1] > 1024:
        raise ValueError(f"own: expected a head dim of at most 1024, got {own.shape[-1]}")
    if position.shape != own.shape[:2]:
        raise ValueError(f"position: expected {list(own.shape[:2])}, got {list(position.shape)}")
    if position.dtype not in INTEGERS:
        raise ValueError(f"position: expected integers, one of {list(INTEGERS)}, got {position.dtype}")
    check_same_device(own, nodes=nodes, position=position)
    check_integers(arity=arity)
    if not 2 <= arity < 2**31:
        raise ValueError(f"arity: expected at least 2 and at most 2^31 - 1, got {arity}")
    check_levels(levels, nodes.shape[0], arity)


def _form(impl: str) -> ModuleType:
    if impl == "fused":  # needs triton
        return importlib.import_module(f"{__name__}.fused")
    return {"native": native, "eager": eager}[impl]


@torch.library.custom_op("hmlab::tree_attention", mutates_args=())
def _forward(own: Tensor, nodes: Tensor, position: Tensor, levels: list[int], arity: int, scale: float,
             impl: str) -> tuple[Tensor, Tensor]:
    return _form(impl).forward(own, nodes, position, unflatten(levels), arity, scale)


@_forward.register_fake
def _(own, nodes, position, levels, arity, scale, impl):
    batch, time, _, heads, dim = own.shape
    dtype = torch.promote_types(own.dtype, torch.float32)
    return own.new_empty(batch, time, heads, dim), own.new_empty(batch, time, heads, dtype=dtype)


@torch.library.custom_op("hmlab::tree_attention_backward", mutates_args=())
def _backward(own: Tensor, nodes: Tensor, position: Tensor, levels: list[int], arity: int, scale: float, impl: str,
              out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor, Tensor]:
    return _form(impl).backward(
        own, nodes, position, unflatten(levels), arity, scale, out, lse, grad_out, grad_lse
    )


@_backward.register_fake
def _(own, nodes, position, levels, arity, scale, impl, out, lse, grad_out, grad_lse):
    return own.new_empty(own.shape), nodes.new_empty(nodes.shape)


def _save(ctx, inputs, output):
    own, nodes, position, ctx.levels, ctx.arity, ctx.scale, ctx.impl = inputs
    ctx.save_for_backward(own, nodes, position, *output)


def _gradient(ctx, grad_out, grad_lse):
    own, nodes, position, out, lse = ctx.saved_tensors
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    grad_lse = torch.zeros_like(lse) if grad_lse is None else grad_lse
    grad_own, grad_nodes = torch.ops.hmlab.tree_attention_backward(
        own, nodes, position, ctx.levels, ctx.arity, ctx.scale, ctx.impl, out, lse, grad_out, grad_lse
    )
    return grad_own, grad_nodes, None, None, None, None, None


_forward.register_autograd(_gradient, setup_context=_save)


def _flops(own: tuple, nodes: tuple, position: tuple, levels: list[int], *_, **__) -> int:
    # A product with the query and one with the value, two flops each, for every node that could be visible.
    batch, time, _, heads, dim = own
    return 4 * batch * time * heads * dim * (1 + sum(level.slots for level in unflatten(levels)))


def _backward_flops(*shapes, **keywords) -> int:
    return _flops(*shapes, **keywords) * 5 // 2


def _register_flops() -> None:
    from torch.utils.flop_counter import register_flop_formula

    register_flop_formula(torch.ops.hmlab.tree_attention)(_flops)
    register_flop_formula(torch.ops.hmlab.tree_attention_backward)(_backward_flops)


_register_flops()
