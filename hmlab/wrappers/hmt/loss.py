"""Cross-entropy of a head's logits that are never there all at once.

The logits of a few hundred tokens are made, turned into the gradients of hidden states and weights, and forgotten: the
backward pass then only scales what the forward pass found. A head of another kind than `nn.Linear` (one with adapters)
has its logits made again in the backward pass instead.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

CHUNK = 512  # tokens whose logits are there at a time


def cross_entropy(hidden: Float[Tensor, "tokens width"], head: nn.Module, targets: Int[Tensor, "tokens"]
                  ) -> Float[Tensor, ""]:
    """Sum over tokens, in nats."""
    if type(head) is nn.Linear:
        return _Linear.apply(hidden, head.weight, head.bias, targets)

    def part(hidden: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(head(hidden).float(), targets, reduction="sum")

    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    for piece in zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True):
        total = total + checkpoint(part, *piece, use_reentrant=False)
    return total


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        wanted = ctx.needs_input_grad[:3]
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grads = [torch.zeros_like(x, dtype=torch.float32) if want else None
                 for x, want in zip((hidden, weight, bias), wanted, strict=True)]  # fmt: skip
        for begin in range(0, len(hidden), CHUNK):
            rows = slice(begin, begin + CHUNK)
            h, target = hidden[rows], targets[rows]
            logits = F.linear(h, weight, bias).float()
            top = logits.amax(1, keepdim=True)
            logits.sub_(top)
            picked = logits.gather(1, target[:, None])[:, 0]
            logits.exp_()
            total = logits.sum(1, keepdim=True)
            loss += (total[:, 0].log() - picked).sum()
            if not any(wanted):
                continue
            grad = logits.div_(total)
            grad.scatter_add_(1, target[:, None], grad.new_full((len(h), 1), -1.0))
            low = grad.to(h.dtype)
            if wanted[0]:
                grads[0][rows] = low @ weight.to(h.dtype)
            if wanted[1]:
                grads[1].add_(low.T @ h)
            if wanted[2]:
                grads[2] += grad.sum(0)
        ctx.save_for_backward(*grads)
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, scale: Tensor) -> tuple[Tensor | None, ...]:
        grads = (None if grad is None else (grad * scale).to(dtype)
                 for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True))  # fmt: skip
        return *grads, None
