"""The contract of every memory: a state goes in and comes out; the parallel form and the step agree.

    y, state = memory(x)                        # x, y [batch, time, dim]
    y, state = memory(more, state)              # goes on where the state ends
    y1, state = memory.step(x1, state)          # one token: x1, y1 [batch, dim]

A state is a NamedTuple of tensors, batch first, counters included. It is a value: a call takes one and returns
a new one. Under `torch.no_grad()` a step may reuse the storage of the state it was given (`clone` it to fork).
`hmlab.testing.check_memory` proves all of it for a memory.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hmlab.record import Observed

State = TypeVar("State", bound=tuple)


class Memory(Observed, nn.Module, ABC):
    """Maps `[batch, time, dim]` to `[batch, time, dim]` causally, with a state between calls.

    Subclasses define `forward` and `init_state`, and `step` where one token can be had cheaper than
    `forward` of one token. They set `self.dim`.
    """

    dim: int

    @abstractmethod
    def forward(
        self,
        x: Float[Tensor, "batch time dim"],
        state: Any | None = None,
        *,
        tokens: Int[Tensor, "batch time"] | None = None,
        reset: Bool[Tensor, "batch time"] | None = None,
        valid: Bool[Tensor, "batch time"] | None = None,
    ) -> tuple[Float[Tensor, "batch time dim"], Any]:
        """Read and write `time` tokens at once.

        state: from an earlier call, None at the beginning. tokens: token ids, for memories that count them.
        reset: True where a document starts, at padding too; nothing before is remembered. valid: False at padding,
        which neither reads nor writes, whatever it holds, and for which y is zero. Returns y and the state after the
        last token.
        """

    @abstractmethod
    def init_state(self, batch: int, *, device: torch.device | str | None = None,
                   dtype: torch.dtype | None = None) -> Any:
        """The state before the first token, for `batch` rows."""

    def step(self, x: Float[Tensor, "batch dim"], state: Any, *, tokens: Int[Tensor, "batch"] | None = None
             ) -> tuple[Float[Tensor, "batch dim"], Any]:
        """Read and write one token; the same as `forward` of it."""
        y, state = self.forward(x[:, None], state, tokens=None if tokens is None else tokens[:, None])
        return y[:, 0], state

    def state_bytes(self, state: Any) -> int:
        """Bytes that the state really holds."""
        return state_bytes(state)

    def reserve(self, state: Any, tokens: int) -> Any:
        """Room in the state for that many more tokens, for compiled calls, which cannot grow a state by its counter.

        Memories whose state grows otherwise, or not at all, return it as it is.
        """
        return state

    def reorder(self, state: Any, rows: Int[Tensor, "rows"]) -> Any:
        """The state with batch rows chosen by index, repeated or left out (beam search)."""
        return reorder(state, rows)

    def check_input(self, x: Tensor, tokens: Tensor | None = None, reset: Tensor | None = None,
                    valid: Tensor | None = None, state: Any | None = None) -> None:
        """Refuse what the contract does not allow, by the argument's name."""
        if x.ndim != 3 or x.shape[-1] != self.dim:
            raise ValueError(f"x: expected [batch, time, {self.dim}], got {list(x.shape)}")
        for name, mask in (("reset", reset), ("valid", valid)):
            if mask is not None and (mask.dtype != torch.bool or mask.shape != x.shape[:2]):
                raise ValueError(f"{name}: expected bool {list(x.shape[:2])}, got {mask.dtype} {list(mask.shape)}")
        if tokens is not None and (tokens.is_floating_point() or tokens.shape != x.shape[:2]):
            raise ValueError(f"tokens: expected integers {list(x.shape[:2])}, got {tokens.dtype} {list(tokens.shape)}")
        for leaf in state if state is not None else ():
            if isinstance(leaf, Tensor) and leaf.shape[0] != x.shape[0]:
                raise ValueError(f"state: expected {x.shape[0]} rows, as x has, got {leaf.shape[0]}")


def document_positions(
    start: Int[Tensor, "batch"], reset: Bool[Tensor, "batch time"] | None, valid: Bool[Tensor, "batch time"] | None,
    time: int,
) -> tuple[Int[Tensor, "batch time"], Int[Tensor, "batch"]]:
    """1-based position of each token in its document, 0 at padding; and the tokens consumed after the last.

    start: tokens of the current document already consumed, per row.
    """
    if valid is None:
        count = torch.arange(1, time + 1, device=start.device).expand(len(start), time)
    else:
        count = valid.cumsum(1)
    position = start[:, None] + count
    if reset is not None:
        # Count from the last reset: what had been counted before it is taken off.
        step = torch.ones_like(count) if valid is None else valid.long()
        before = torch.where(reset, position - step, 0).cummax(1).values
        position = position - before
    end = position[:, -1] if time else start
    return position if valid is None else position * valid, end


def state_bytes(state: Any) -> int:
    """Bytes in all tensors of a state, or of nested states."""
    return sum(t.numel() * t.element_size() for t in pytree.tree_leaves(state) if isinstance(t, Tensor))


def reorder(state: State, rows: Tensor) -> State:
    """Choose rows of every tensor of a state."""
    return pytree.tree_map(lambda t: t.index_select(0, rows.to(t.device)), state)


def detach(state: State) -> State:
    """The same state, cut off from the graph (truncated back-propagation through time)."""
    return pytree.tree_map(lambda t: t.detach(), state)


def clone(state: State) -> State:
    """A copy that later steps cannot touch."""
    return pytree.tree_map(lambda t: t.clone(), state)


def save_state(state: Any, path: str | Path) -> None:
    """Write a state as safetensors, one tensor per leaf, atomically."""
    from safetensors.torch import save

    path = Path(path)
    leaves = {pytree.keystr(k): v.detach().contiguous().clone() for k, v in pytree.tree_flatten_with_path(state)[0]}
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as out:
        out.write(save(leaves))
        out.flush()
        os.fsync(out.fileno())
    partial.replace(path)


def load_state(like: State, path: str | Path) -> State:
    """Read a state of the same structure and on the same device as `like` (`memory.init_state(1)` serves); shapes
    and types come from the file."""
    from safetensors.torch import load_file

    with_paths, spec = pytree.tree_flatten_with_path(like)
    leaves = load_file(path, device=str(with_paths[0][1].device))
    names = [pytree.keystr(k) for k, _ in with_paths]
    if set(names) != set(leaves):
        raise ValueError(f"path: expected a state with {sorted(names)}, {path} holds {sorted(leaves)}")
    return pytree.tree_unflatten([leaves[name] for name in names], spec)
