"""Two attentions over the same queries as one."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def merge(
    out_a: Float[Tensor, "*rows dim"],
    lse_a: Float[Tensor, "*rows"],
    out_b: Float[Tensor, "*rows dim"],
    lse_b: Float[Tensor, "*rows"],
) -> tuple[Float[Tensor, "*rows dim"], Float[Tensor, "*rows"]]:
    """What one softmax over the keys of both would have read: lse = log(exp(lse_a) + exp(lse_b)), out weighted alike.

    An empty set has lse −inf and out 0. Differentiable in all four; −inf carries no gradient.
    """
    top = torch.maximum(lse_a, lse_b).detach()
    top = torch.where(top == -torch.inf, 0, top)
    share_a, share_b = (lse_a - top).exp(), (lse_b - top).exp()
    total = share_a + share_b
    safe = torch.where(total > 0, total, 1)
    out = (share_a / safe)[..., None] * out_a + (share_b / safe)[..., None] * out_b
    return out.to(out_a.dtype), torch.where(total > 0, top + safe.log(), -torch.inf)
