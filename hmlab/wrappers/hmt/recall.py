"""The search of the long-term memory: one query a segment over the memories of at most N closed ones.

    weights = softmax(W_q S · W_k M_i / sqrt(h))        or, key_norm:  softmax(exp(s) cos(W_q S, W_k M_i))
    P = sum_i weights_i M_i                              the memories themselves are the values

Always in float32, its weights too, whatever the backbone runs in. W_k begins equal to W_q, so that the search begins as
one for what is alike: with two random projections the first gradients are noise.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from hmlab.record import Observed, observe

# exp(s) at the beginning: a cosine of 1 against one of 0 is worth e^8.
FIRST_SCALE = 8.0


class Recall(Observed, nn.Module):
    """A call is a segment: `time` of its recordings counts segments.

    Observes `recall_weight` [batch, time, slots, memories], one for all memories of a slot or one each, and
    `provenance` [batch, time, slots], the number of the segment whose memory a slot holds (-1: none).
    """

    def __init__(self, width: int, dim: int, *, key_norm: bool, each: bool) -> None:
        super().__init__()
        self.query = nn.Linear(width, dim, bias=False, dtype=torch.float32)
        self.key = nn.Linear(width, dim, bias=False, dtype=torch.float32)
        with torch.no_grad():
            self.key.weight.copy_(self.query.weight)
        self.scale = nn.Parameter(torch.tensor(math.log(FIRST_SCALE))) if key_norm else None
        self.each = each

    def keys(self, memories: Float[Tensor, "batch *slots memories width"]) -> Float[Tensor, "batch *slots keys dim"]:
        """Keys of memories: one, of their mean, or one each."""
        memories = memories.float()
        with torch.autocast(memories.device.type, enabled=False):
            keys = F.linear(memories if self.each else memories.mean(-2, keepdim=True), self.key.weight.float())
        return keys if self.scale is None else F.normalize(keys, dim=-1)

    def forward(
        self,
        summary: Float[Tensor, "batch 1 width"],
        cache: Float[Tensor, "batch slots memories width"],
        keys: Float[Tensor, "batch slots keys dim"],
        count: Int[Tensor, "batch"],
        searching: Bool[Tensor, "batch"],
    ) -> tuple[Float[Tensor, "batch memories width"], Float[Tensor, "batch slots keys"]]:
        """P and the logarithms of the weights; count: segments closed; rows that are not searching are not shown.

        P of a row that holds nothing is 0.
        """
        with torch.autocast(summary.device.type, enabled=False):
            return self._search(summary.float(), cache, keys, count, searching)

    def _search(self, summary: Tensor, cache: Tensor, keys: Tensor, count: Tensor, searching: Tensor
                ) -> tuple[Tensor, Tensor]:
        query = F.linear(summary, self.query.weight.float())[:, 0]
        query = query / math.sqrt(query.shape[-1]) if self.scale is None else F.normalize(query, dim=-1)
        scores = torch.einsum("bh,bskh->bsk", query.to(keys.device), keys.float())
        if self.scale is not None:
            scores = scores * self.scale.float().exp().to(scores.device)
        slots = cache.shape[1]
        held = torch.arange(slots, device=cache.device) < count.to(cache.device)[:, None]
        # A row without memories: its weights are of nothing, but finite, and so are its gradients.
        shown = held | ~held.any(1, keepdim=True)
        logs = scores.masked_fill(~shown[..., None], -math.inf).log_softmax(1) if slots else scores
        weights = logs.exp() * held[..., None]
        prompt = torch.einsum("bsk,bsmd->bmd" if weights.shape[2] == 1 else "bsm,bsmd->bmd", weights, cache.float())
        observe("recall_weight", lambda: weights.masked_fill(~(held & searching.to(held.device)[:, None])[..., None],
                                                            math.nan)[:, None],
                ("batch", "time", "slots", "memories"))  # fmt: skip
        observe("provenance", lambda: sources(count, slots)[:, None], ("batch", "time", "slots"))
        return prompt.to(summary.device), logs


def sources(count: Int[Tensor, "batch"], slots: int) -> Int[Tensor, "batch slots"]:
    """Number of the segment whose memory each slot of the ring holds, -1 for none. slots: N, or fewer so far."""
    slot = torch.arange(slots, device=count.device)
    count = count[:, None]
    return torch.where(slot < count, slot + (count - 1 - slot) // max(slots, 1) * slots, -1)
