"""What a call builds of the tree, from what, and what is kept of it: the bookkeeping between calls."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hmlab_kernels.tree_attention import Level
from hmlab_kernels.tree_build import IMPLEMENTATIONS, STAGED, tree_build, tree_levels
from jaxtyping import Float, Int
from torch import Tensor

from .summarizer import Summarizer


@dataclass(frozen=True)
class Tree:
    """The tree of one call: `arity` children per node, of which the summarizer also sees `kernel - arity` older."""

    arity: int
    kernel: int
    position: Int[Tensor, "batch time"]  # 1-based in the document, 0 at padding
    start: int | None  # tokens before this call where all rows agree and no document begins inside; else None

    def build(self, x: Float[Tensor, "batch time dim"], carried: Float[Tensor, "batch nodes dim"] | None, levels: int,
              summarizer: Summarizer, impl: str | None) -> tuple[Float[Tensor, "rows dim"], list[Level]]:
        """Nodes of level 1 .. `levels`, and where they lie. carried: the last kernel − 1 nodes of each level so far,
        from the tokens on, None at first. impl: of `tree_build` where it has it for this summarizer."""
        taps, bias, deeper, norm = (None if w is None else w.to(x.dtype) for w in summarizer.multiplied_out())
        ragged = self.start is None
        form = {"arity": self.arity, "kernel": self.kernel, "levels": levels, "start": self.start or 0}
        nodes = tree_build(
            x, taps, bias, deeper=deeper, norm=norm, position=self.position if ragged else None,
            carried=None if carried is None else carried.to(x.dtype),
            impl=impl if impl in (STAGED if summarizer.staged else IMPLEMENTATIONS) else None, **form,
        )  # fmt: skip
        places = tree_levels(
            *x.shape[:2], banks=summarizer.banks, expansion=summarizer.expansion, ragged=ragged,
            carried=carried is not None, **form,
        )  # fmt: skip
        return nodes, places

    def last_tokens(self, x: Float[Tensor, "batch time dim"], own: Float[Tensor, "batch kept dim"]
                    ) -> Float[Tensor, "batch kept dim"]:
        """The last kernel − 1 tokens after the call. own: those before it."""
        keep, time = self.kernel - 1, x.shape[1]
        if self.start is not None:
            return x[:, time - keep :].clone() if time >= keep else torch.cat([own[:, time:].to(x.dtype), x], 1)
        seen = (self.position > 0).cumsum(1)  # padding keeps no place among the tokens
        back = seen[:, -1:] - torch.arange(keep - 1, -1, -1, device=x.device)  # 1-based among this call's, else before
        place = torch.searchsorted(seen, back).clamp(max=time - 1)
        before = _take(own.to(x.dtype), (back + keep - 1).clamp(0, keep - 1))
        return torch.where((back > 0)[..., None], _take(x, place), before)

    def last_nodes(self, nodes: Float[Tensor, "rows dim"], levels: list[Level], end: Int[Tensor, "batch"]
                   ) -> Float[Tensor, "batch kept dim"]:
        """The last kernel − 1 nodes of each level after the call, zero where there are none yet.

        end: position after the call."""
        batch, keep, device = end.shape[0], self.kernel - 1, nodes.device
        if not levels:
            return nodes.new_empty(batch, 0, nodes.shape[1])
        row = torch.arange(batch, device=device)
        if self.start is not None:  # the last of each table, wherever the tokens end
            last = [
                (level.offset + max(level.batch - keep + n, 0) + slot * level.slot, level.batch, level.batch - keep + n)
                for level in levels for n in range(keep) for slot in range(level.slots)
            ]  # fmt: skip
            first, stride, place = torch.tensor(last, device=device).unbind(1)
            kept = nodes[first + row[:, None] * stride]
            return torch.where((place >= 0)[:, None], kept, 0) if keep > 1 else kept
        rows, exists = [], []
        for i, level in enumerate(levels, 1):
            span = self.arity**i
            done = ((self.position % span == 0) & (self.position > 0)).sum(1)
            slot = torch.arange(level.slots, device=device) * level.slot
            age = torch.arange(keep - 1, -1, -1, device=device)
            place = (level.carry - 1 + done[:, None] - age).clamp(min=0) + row[:, None] * level.batch
            rows.append((level.offset + place[..., None] + slot).flatten(1))
            exists.append((age < (end // span)[:, None]).repeat_interleave(level.slots, 1))
        return torch.where(torch.cat(exists, 1)[..., None], nodes[torch.cat(rows, 1)], 0)


def _take(x: Float[Tensor, "batch time dim"], index: Int[Tensor, "batch some"]) -> Float[Tensor, "batch some dim"]:
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))
