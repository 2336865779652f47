"""Tree building: all levels of a summary tree from its leaves, in one call.

    z_j = b_k + Σ_tap concat_c(child_c[slot j − tap, bank k]) · W[tap, k]        (slots out of range are absent)
    z_j = silu(z_j) · V[stage, k]  for each stage,    node[slot j, bank k] = rmsnorm(z_j) · g  where there is a norm

Level 0 is the leaves, one slot that all banks share; node m of level i has as its children nodes
m·arity + arity − kernel .. m·arity + arity − 1 of level i − 1 (zeros before the first), so that nodes of level i have
1 + i·expansion slots per bank. One set of weights serves all levels. Every summarizer of Logarithmic Memory Networks
(arXiv 2501.07905, sections 3.2, 3.5, 3.7, 6.1 and 6.2) is of this form once constant factors are multiplied out.

Stages after the linear one (deeper, norm) have the implementations of `STAGED` only; the default is then eager.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .. import _dispatch
from .._checks import check_integers, check_same_device
from ..tree_attention.levels import FLOATS, INTEGERS, Level
from . import eager, native, plan, reference
from .plan import depth

__all__ = ["IMPLEMENTATIONS", "STAGED", "depth", "tree_build", "tree_levels"]

IMPLEMENTATIONS = ("native", "fused", "eager", "reference")
STAGED = ("eager", "reference")
OUTPUTS = ("out",)


def tree_build(
    leaves: Float[Tensor, "batch time dim"],
    taps: Float[Tensor, "taps banks width dim"],
    bias: Float[Tensor, "banks dim"],
    *,
    deeper: Float[Tensor, "stages banks dim dim"] | None = None,
    norm: Float[Tensor, "dim"] | None = None,
    arity: int = 2,
    kernel: int | None = None,
    levels: int | None = None,
    start: int = 0,
    position: Int[Tensor, "batch time"] | None = None,
    carried: Float[Tensor, "batch nodes dim"] | None = None,
    impl: str | None = None,
) -> Float[Tensor, "rows dim"]:
    """Nodes of levels 1 .. levels, in rows as `tree_levels` tells; what `tree_attention` reads.

    taps: width kernel·dim (child-major) where a bank reads itself, banks·kernel·dim (bank-major) where each reads all.
    kernel: children that a node sees, arity if None. levels: as many as can be complete by the call's length, if None.
    start: leaves before this call, in all rows alike. position: 1-based position of each leaf in its document, 0 at
    padding, where rows differ; places that no node fills then hold the summary of zeros. On the CPU positions that
    complete more nodes than rising ones do are an error; on CUDA those nodes are left out. carried: the last kernel − 1
    nodes of earlier calls, level by level from the leaves on, oldest first, slot by slot; levels that it lacks, or
    None, count as zeros. impl: one of `IMPLEMENTATIONS`; None takes the device's default.
    Sums run in float32 or better; every implementation is deterministic. Raises ValueError by argument.
    """
    kernel = arity if kernel is None else kernel
    _check(leaves, taps, bias, deeper, norm, arity, kernel, start, position, carried)
    levels = depth(start + leaves.shape[1], arity) if levels is None else levels
    _check_levels(levels, arity)
    staged = deeper is not None or norm is not None
    if staged and impl in IMPLEMENTATIONS and impl not in STAGED:
        raise ValueError(f"impl: tree_build with deeper or norm expected one of {list(STAGED)}, got {impl!r}")
    available = STAGED if staged else IMPLEMENTATIONS
    impl = _dispatch.choose("tree_build", impl, leaves.device.type, available, leaves.dtype)
    if impl == "reference":
        made = plan.make(leaves, taps, carried, position, arity, kernel, start, levels)
        return reference.tree_build(leaves, taps, bias, deeper, norm, carried, position, made).to(leaves.dtype)
    # Half precision is read as such by fused; elsewhere the whole tree is summed in float32.
    dtype = leaves.dtype if impl == "fused" else torch.promote_types(leaves.dtype, torch.float32)
    given = (None if x is None else x.to(dtype) for x in (leaves, taps, bias, deeper, norm, carried))
    return torch.ops.hmlab.tree_build(*given, position, arity, kernel, start, levels, impl).to(leaves.dtype)


def tree_levels(batch: int, time: int, *, banks: int, expansion: int = 0, arity: int = 2, kernel: int | None = None,
                levels: int | None = None, start: int = 0, ragged: bool = False, carried: bool = False) -> list[Level]:
    """Where `tree_build` puts each level. ragged: it is given positions; carried: it is given nodes."""
    kernel = arity if kernel is None else kernel
    levels = depth(start + time, arity) if levels is None else levels
    _check_levels(levels, arity)
    carry = plan.carry_of(arity, kernel, start, carried, ragged)
    return plan.Plan(batch, time, 0, banks, expansion, arity, kernel, start, levels, carry, ragged).levels()


def _check_levels(levels: int, arity: int) -> None:
    check_integers(levels=levels)
    if levels < 0 or arity**levels >= 2**63:
        raise ValueError(f"levels: expected at least 0, and spans of less than 2^63 leaves, got {levels} levels of "
                         f"arity {arity}")  # fmt: skip


def _check(leaves: Tensor, taps: Tensor, bias: Tensor, deeper: Tensor | None, norm: Tensor | None, arity: int,
           kernel: int, start: int, position: Tensor | None, carried: Tensor | None) -> None:
    if leaves.ndim != 3:
        raise ValueError(f"leaves: expected [batch, time, dim], got {list(leaves.shape)}")
    batch, time, dim = leaves.shape
    check_integers(arity=arity, kernel=kernel, start=start)
    if leaves.dtype not in FLOATS:
        raise ValueError(f"leaves: expected one of {list(FLOATS)}, got {leaves.dtype}")
    if dim == 0:
        raise ValueError("leaves: expected a dim of at least 1, got 0")
    if arity < 2:
        raise ValueError(f"arity: expected at least 2, got {arity}")
    if kernel < arity:
        raise ValueError(f"kernel: expected at least arity ({arity}), got {kernel}")
    widths = (kernel * dim, taps.shape[1] * kernel * dim) if taps.ndim == 4 else ()
    if taps.ndim != 4 or 0 in taps.shape or taps.shape[3] != dim or taps.shape[2] not in widths:
        raise ValueError(f"taps: expected [taps, banks, {kernel * dim} or banks times that, {dim}], "
                         f"got {list(taps.shape)}")  # fmt: skip
    banks = taps.shape[1]
    expected = {"bias": (bias, [banks, dim]), "norm": (norm, [dim]), "position": (position, [batch, time])}
    if deeper is not None:
        expected["deeper"] = deeper, [deeper.shape[0], banks, dim, dim]
    for name, (given, shape) in expected.items():
        if given is not None and list(given.shape) != shape:
            raise ValueError(f"{name}: expected {shape}, got {list(given.shape)}")
    weights = {"taps": taps, "bias": bias, "deeper": deeper, "norm": norm, "carried": carried}
    for name, given in weights.items():
        if given is not None and given.dtype != leaves.dtype:
            raise ValueError(f"{name}: expected leaves' dtype {leaves.dtype}, got {given.dtype}")
    if position is not None and position.dtype not in INTEGERS:
        raise ValueError(f"position: expected integers, one of {list(INTEGERS)}, got {position.dtype}")
    check_same_device(leaves, position=position, **weights)
    if start < 0 or start >= 2**62 or (start and position is not None):
        raise ValueError(f"start: expected at least 0, and 0 where position is given, got {start}")
    if carried is not None:
        if carried.ndim != 3 or carried.shape[0] != batch or carried.shape[2] != dim:
            raise ValueError(f"carried: expected [{batch}, nodes, {dim}], got {list(carried.shape)}")
        left, level = carried.shape[1], 0
        while left > 0:
            left -= (kernel - 1) * (banks * (1 + level * (taps.shape[0] - 1)) if level else 1)
            level += 1
        if left < 0:
            raise ValueError(f"carried: expected {kernel - 1} nodes of each level, level by level with all of their "
                             f"slots, got {carried.shape[1]} vectors")  # fmt: skip


def _form(impl: str):
    if impl == "fused":
        from . import fused

        return fused
    return {"native": native, "eager": eager}[impl]


@torch.library.custom_op("hmlab::tree_build", mutates_args=())
def _forward(leaves: Tensor, taps: Tensor, bias: Tensor, deeper: Tensor | None, norm: Tensor | None,
             carried: Tensor | None, position: Tensor | None, arity: int, kernel: int, start: int, levels: int,
             impl: str) -> Tensor:
    made = plan.make(leaves, taps, carried, position, arity, kernel, start, levels)
    return _form(impl).forward(leaves, taps, bias, deeper, norm, carried, position, made)


@_forward.register_fake
def _(leaves, taps, bias, deeper, norm, carried, position, arity, kernel, start, levels, impl):
    made = plan.make(leaves, taps, carried, position, arity, kernel, start, levels)
    return leaves.new_empty(made.rows, made.dim)


@torch.library.custom_op("hmlab::tree_build_backward", mutates_args=())
def _backward(grad: Tensor, nodes: Tensor, leaves: Tensor, taps: Tensor, bias: Tensor, deeper: Tensor | None,
              norm: Tensor | None, carried: Tensor | None, position: Tensor | None, arity: int, kernel: int, start: int,
              levels: int, impl: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    made = plan.make(leaves, taps, carried, position, arity, kernel, start, levels)
    return _form(impl).backward(grad, nodes, leaves, taps, bias, deeper, norm, carried, position, made)


@_backward.register_fake
def _(grad, nodes, leaves, taps, bias, deeper, norm, carried, position, arity, kernel, start, levels, impl):
    absent = leaves.new_empty(0)
    return tuple(absent.new_empty(0) if x is None else x.new_empty(x.shape)
                 for x in (leaves, taps, bias, deeper, norm, carried))  # fmt: skip


def _save(ctx, inputs, output):
    *tensors, ctx.arity, ctx.kernel, ctx.start, ctx.levels, ctx.impl = inputs
    ctx.save_for_backward(output, *tensors)


def _gradient(ctx, grad):
    saved = ctx.saved_tensors  # activation checkpointing gives them once
    grads = torch.ops.hmlab.tree_build_backward(grad, *saved, ctx.arity, ctx.kernel, ctx.start, ctx.levels, ctx.impl)
    present = saved[1:7]
    return *(g if x is not None else None for g, x in zip(grads, present, strict=True)), *([None] * 6)


_forward.register_autograd(_gradient, setup_context=_save)


def _flops(leaves: Sequence[int], taps: Sequence[int], bias, deeper, norm, carried, position, arity: int, kernel: int,
           start: int, levels: int, *_, **__) -> int:
    # Per slot of each new node one product with each tap, and one with each deeper stage.
    batch, time, dim = leaves
    stages = 0 if deeper is None else deeper[0]
    made = plan.Plan(batch, time, dim, taps[1], taps[0] - 1, arity, kernel, start, levels, 0, position is not None)
    products = [2 * batch * made.new(i) * (
        made.slots(i - 1) * (taps[1] if i == 1 else 1) * taps[0] * taps[2] * dim + made.slots(i) * stages * dim * dim
    ) for i in range(1, levels + 1)]  # fmt: skip
    return sum(products)


def _backward_flops(grad, nodes, *shapes, **keywords) -> int:
    return 2 * _flops(*shapes, **keywords)


def _register_flops() -> None:
    from torch.utils.flop_counter import register_flop_formula

    register_flop_formula(torch.ops.hmlab.tree_build)(_flops)
    register_flop_formula(torch.ops.hmlab.tree_build_backward)(_backward_flops)


_register_flops()
