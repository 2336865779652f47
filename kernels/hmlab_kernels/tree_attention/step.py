"""One step of tree attention: one token against the nodes that its state holds, as `tree_attention` at its position.

    score_n = scale · q_n · k,   out = Σ_n softmax(score)_n v_n,   n over the own token and the nodes that it sees

Where the full form finds each level's last node among all, here the state holds just those: `sees` says of which
levels (and of a batch's rows, which) there is one yet. The own token is always seen.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from .. import _dispatch

STEP_IMPLEMENTATIONS = ("fused", "eager", "reference")


def tree_attention_step(
    own: Float[Tensor, "batch 3 heads dim"],
    nodes: Float[Tensor, "batch count 2 heads dim"],
    sees: Bool[Tensor, "batch count"],
    *,
    scale: float | None = None,
    impl: str | None = None,
) -> Float[Tensor, "batch heads dim"]:
    """Read the state's nodes with one token.

    own: query, key and value of the token. nodes: query and value of each node held, in any order. sees: which of
    them count; what the others hold is finite and weighs nothing. scale: dim^-0.5 if None. impl: one of
    `STEP_IMPLEMENTATIONS`; None takes the device's default. Returns out in own's dtype; sums run in float32 or better
    in reference and fused. There is no log-sum-exp: `scaled_dot_product_attention`, the quickest way there is on a
    CPU, gives none. Raises ValueError by argument.
    """
    if own.ndim != 4 or own.shape[1] != 3:
        raise ValueError(f"own: expected [batch, 3, heads, dim], got {list(own.shape)}")
    batch, _, heads, dim = own.shape
    if nodes.ndim != 5 or nodes.shape[0] != batch or nodes.shape[2:] != (2, heads, dim):
        raise ValueError(f"nodes: expected [{batch}, count, 2, {heads}, {dim}], got {list(nodes.shape)}")
    if nodes.dtype != own.dtype:
        raise ValueError(f"nodes: expected own's dtype {own.dtype}, got {nodes.dtype}")
    if sees.shape != nodes.shape[:2] or sees.dtype != torch.bool:
        raise ValueError(f"sees: expected bool {list(nodes.shape[:2])}, got {sees.dtype} {list(sees.shape)}")
    impl = _dispatch.choose("tree_attention_step", impl, own.device.type, STEP_IMPLEMENTATIONS, own.dtype)
    scale = dim**-0.5 if scale is None else scale
    if impl == "fused":
        return torch.ops.hmlab.tree_attention_step(own, nodes, sees, scale)
    return (_eager if impl == "eager" else _reference)(own, nodes, sees, scale)


def _reference(own: Tensor, nodes: Tensor, sees: Tensor, scale: float) -> Tensor:
    dtype = torch.promote_types(own.dtype, torch.float32)
    outputs = []
    for (query, key, value), held, seen in zip(own.to(dtype), nodes.to(dtype), sees.tolist(), strict=True):
        visible = [(query, value), *(node.unbind() for node, s in zip(held, seen, strict=True) if s)]
        score = torch.stack([(q * key).sum(-1) * scale for q, _ in visible])  # [visible nodes, heads]
        outputs.append((torch.softmax(score, 0)[..., None] * torch.stack([v for _, v in visible])).sum(0))
    return torch.stack(outputs).to(own.dtype) if outputs else own.new_zeros(own[:, 0].shape)


def _eager(own: Tensor, nodes: Tensor, sees: Tensor, scale: float) -> Tensor:
    # One query, the token's key, against the queries of the nodes: the roles are swapped, the sum is the same.
    read = torch.cat([own[:, None, ::2], nodes], 1).permute(2, 0, 3, 1, 4)  # [2, batch, heads, 1 + count, dim]
    mask = F.pad(sees, (1, 0), value=True)[:, None, None]
    out = F.scaled_dot_product_attention(own[:, 1, :, None], read[0], read[1], attn_mask=mask, scale=scale)
    return out[:, :, 0].contiguous()


@torch.library.custom_op("hmlab::tree_attention_step", mutates_args=())
def _fused(own: Tensor, nodes: Tensor, sees: Tensor, scale: float) -> Tensor:
    from . import step_fused  # needs triton

    return step_fused.forward(own, nodes, sees, scale)


@_fused.register_fake
def _(own, nodes, sees, scale):
    batch, _, heads, dim = own.shape
    return own.new_empty(batch, heads, dim)


@torch.library.custom_op("hmlab::tree_attention_step_backward", mutates_args=())
def _backward(own: Tensor, nodes: Tensor, sees: Tensor, scale: float, grad_out: Tensor) -> tuple[Tensor, Tensor]:
    # The state is small: its gradient is a few products in float32.
    query, key, value = own.float().unbind(1)
    queries = torch.cat([query[:, None], nodes[:, :, 0].float()], 1)
    values = torch.cat([value[:, None], nodes[:, :, 1].float()], 1)
    score = torch.einsum("bnhd,bhd->bnh", queries, key) * scale
    score[:, 1:].masked_fill_(~sees[..., None], -torch.inf)
    weight, grad_out = score.softmax(1), grad_out.float()
    slope = torch.einsum("bnhd,bhd->bnh", values, grad_out)
    slope = scale * weight * (slope - (weight * slope).sum(1, keepdim=True))
    grad = torch.stack([slope[..., None] * key[:, None], weight[..., None] * grad_out[:, None]], 2)
    grad_key = torch.einsum("bnh,bnhd->bhd", slope, queries)
    grad_own = torch.stack([grad[:, 0, 0], grad_key, grad[:, 0, 1]], 1)
    return grad_own.to(own.dtype), grad[:, 1:].to(nodes.dtype, copy=True, memory_format=torch.contiguous_format)


@_backward.register_fake
def _(own, nodes, sees, scale, grad_out):
    return own.new_empty(own.shape), nodes.new_empty(nodes.shape)


def _save(ctx, inputs, output):
    own, nodes, sees, ctx.scale = inputs
    ctx.save_for_backward(own, nodes, sees)


def _gradient(ctx, grad_out):
    return *torch.ops.hmlab.tree_attention_step_backward(*ctx.saved_tensors, ctx.scale, grad_out), None, None


_fused.register_autograd(_gradient, setup_context=_save)


def _flops(own: tuple, nodes: tuple, *_, **__) -> int:
    batch, count, _, heads, dim = nodes
    return 4 * batch * (1 + count) * heads * dim


def _register_flops() -> None:
    from torch.utils.flop_counter import register_flop_formula

    register_flop_formula(torch.ops.hmlab.tree_attention_step)(_flops)
    register_flop_formula(torch.ops.hmlab.tree_attention_step_backward)(
        lambda *shapes, **keywords: _flops(*shapes, **keywords) * 5 // 2
    )


_register_flops()
