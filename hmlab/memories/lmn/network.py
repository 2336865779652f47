"""The memory itself: configuration, state, and its two modes. Equations and source: the package's docstring."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from hmlab_kernels.tree_attention import (
    STEP_IMPLEMENTATIONS,
    attention_weights,
    tree_attention,
    tree_attention_step,
)
from hmlab_kernels.tree_build import depth
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from hmlab.memory import Memory, document_positions
from hmlab.record import call_start, observe

from .summarizer import Mixing, Summarizer
from .tree import Tree

_NO_ROOM = "state: compiled calls need room in it, call memory.reserve(state, tokens) first"

class State(NamedTuple):
    """position: tokens consumed in the current document `[batch]`. own: the last kernel − 1 inputs
    `[batch, kernel - 1, dim]`. nodes: the last kernel − 1 nodes of each level, level by level, oldest first, slot by
    slot `[batch, levels·(kernel - 1)·slots, dim]`."""

    position: Int[Tensor, "batch"]
    own: Float[Tensor, "batch kept dim"]
    nodes: Float[Tensor, "batch nodes dim"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """dim: E. heads: H. banks: K. arity: children per node. kernel: children the summarizer sees (arity if None; more
    overlap). expansion: slots added per level (ExpSum). mixing, depth, normalise, branch_position: the summarizer
    (see `Summarizer`; branch_position None: on from arity 4). impl: of tree attention, and of tree building where that
    has it for this summarizer; None for the device's default.
    """

    dim: int
    heads: int = 4
    banks: int = 2
    arity: int = 2
    kernel: int | None = None
    expansion: int = 0
    mixing: Mixing = "linear"
    depth: int = 1
    normalise: bool = False
    branch_position: bool | None = None
    impl: str | None = None

    def __post_init__(self) -> None:
        for name, least in (("dim", 1), ("heads", 1), ("banks", 1), ("arity", 2), ("expansion", 0), ("depth", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        if self.dim % self.heads:
            raise ValueError(f"dim: expected a multiple of heads ({self.heads}), got {self.dim}")
        if self.kernel is not None and self.kernel < self.arity:
            raise ValueError(f"kernel: expected at least arity ({self.arity}), got {self.kernel}")
        if self.mixing not in ("linear", "depthwise", "full"):
            raise ValueError(f"mixing: expected linear, depthwise or full, got {self.mixing!r}")

    def build(self) -> LogarithmicMemory:
        return LogarithmicMemory(self)


class LogarithmicMemory(Memory):
    """The tree and its attention, without norm, feed-forward or residual."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, self.dim = config, config.dim
        self.kernel = config.kernel or config.arity
        branch = config.arity > 3 if config.branch_position is None else config.branch_position
        self.summarizer = Summarizer(
            config.dim, banks=config.banks, kernel=self.kernel, expansion=config.expansion, mixing=config.mixing,
            depth=config.depth, normalise=config.normalise, branch_position=branch,
        )  # fmt: skip
        self.qkv = nn.Linear(config.dim, 3 * config.dim)
        self.out_proj = nn.Linear(config.dim, config.dim)

    def slots(self, level: int) -> int:
        """Vectors that one node of a level holds, all banks together."""
        return 1 if level == 0 else self.config.banks * (1 + level * self.config.expansion)

    def init_state(self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
                   ) -> State:
        factory = {"device": device or self.qkv.weight.device, "dtype": dtype or self.qkv.weight.dtype}
        own = torch.zeros(batch, self.kernel - 1, self.dim, **factory)
        position = torch.zeros(batch, dtype=torch.int64, device=factory["device"])
        return State(position, own, own.new_zeros(batch, 0, self.dim))

    def reserve(self, state: State, tokens: int) -> State:
        levels = depth(int(state.position.amax()) + tokens, self.config.arity)
        extra = sum(self.slots(i) for i in range(1, levels + 1)) * (self.kernel - 1) - state.nodes.shape[1]
        return state._replace(nodes=F.pad(state.nodes, (0, 0, 0, max(extra, 0))))

    def forward(self, x, state=None, *, tokens=None, reset=None, valid=None):
        self.check_input(x, tokens, reset, valid, state)
        batch, time, _ = x.shape
        if time == 0:
            return x, self.init_state(batch, device=x.device, dtype=x.dtype) if state is None else state
        if valid is not None:  # what padding holds, even NaN, must reach no sum
            x = torch.where(valid[..., None], x, 0)
        tree, levels, end, kept = self._plan(x, state, reset, valid)
        before = self.init_state(batch, device=x.device, dtype=x.dtype) if state is None else state
        carried = None if state is None else torch.cat(self._held(state), 1)
        flat, places = tree.build(x, carried, levels, self.summarizer, self.config.impl)
        own, nodes = self._project(x, flat)
        read, _ = tree_attention(own, nodes, tree.position, places, arity=self.config.arity, impl=self.config.impl)
        y = self.out_proj(read.flatten(2))
        if valid is not None:
            y = y * valid[..., None]
        self._observe(
            lambda: attention_weights(own, nodes, tree.position, places, arity=self.config.arity), tree.position, levels
        )
        return y, State(end.clone(), tree.last_tokens(x, before.own), tree.last_nodes(flat, places[:kept], end))

    def step(self, x, state, *, tokens=None):
        self.check_input(x[:, None], state=state)
        arity, keep = self.config.arity, self.kernel - 1
        position = state.position + 1
        # Level by level, tokens first: [slots, batch, kernel - 1, dim].
        tables = [
            held.unflatten(1, (keep, self.slots(level))).permute(2, 0, 1, 3)
            for level, held in enumerate(self._held(state))
        ]
        if torch.compiler.is_compiling():
            completing = len(tables) - 1
            torch._assert_async((position < arity ** (completing + 1)).all(), _NO_ROOM)
        else:
            completing = self._completing(position)
        # A level completes only where the one below it does, from its kernel - 1 youngest nodes and the new one.
        new = x[None, :, None]
        updated = [torch.cat([tables[0], new], 2)[:, :, 1:]]
        for level in range(1, completing + 1):
            children = torch.cat([tables[level - 1], new], 2)
            new = self.summarizer(children.to(x.dtype))[:, :, None]
            old = tables[level] if level < len(tables) else new.new_zeros(*new.shape[:2], keep, self.dim)
            done = (position % arity**level == 0)[:, None, None]
            updated.append(torch.where(done, torch.cat([old, new], 2)[:, :, 1:], old))
        tables = updated + tables[completing + 1 :]
        levels = len(tables) - 1

        flat = torch.cat([table[:, :, -1] for table in tables[1:]]) if levels else x.new_empty(0, *x.shape)
        own, nodes = self._project(x[:, None], flat.transpose(0, 1))
        seen = [position >= arity**level for level in range(1, levels + 1) for _ in range(self.slots(level))]
        sees = torch.stack(seen, 1) if seen else position.new_empty(len(x), 0, dtype=torch.bool)
        impl = self.config.impl if self.config.impl in STEP_IMPLEMENTATIONS else None
        read = tree_attention_step(own[:, 0], nodes, sees, impl=impl)
        self._observe(lambda: _weights(own[:, 0], nodes, sees)[:, None], position[:, None], levels)
        return self.out_proj(read.flatten(1)), _state(position, tables)

    def _plan(self, x: Tensor, state: State | None, reset: Tensor | None, valid: Tensor | None):
        """The tree of this call, its levels, the positions after it, and the levels the new state keeps."""
        batch, time, _ = x.shape
        arity, start = self.config.arity, None
        first = x.new_zeros(batch, dtype=torch.int64) if state is None else state.position
        uniform = reset is None and valid is None
        if uniform and state is None:
            start = 0
        elif uniform and not torch.compiler.is_compiling():
            low, high = torch.stack(torch.aminmax(state.position)).tolist() if batch else (0, 0)
            start = low if low == high else None
        position, end = document_positions(first, reset, valid, time)
        if start is not None:
            levels = kept = depth(start + time, arity)
        elif torch.compiler.is_compiling():  # the counter cannot be read: the state's room is all there is
            levels = kept = max(depth(time, arity), 0 if state is None else len(self._held(state)) - 1)
            torch._assert_async((position < arity ** (levels + 1)).all(), _NO_ROOM)
        else:
            last = int(end.amax()) if batch else 0
            levels, kept = depth(max(int(position.amax()) if batch else 0, last), arity), depth(last, arity)
        return Tree(arity, self.kernel, position, start), levels, end, kept

    def _completing(self, position: Tensor) -> int:
        """Highest level that any row completes at its position."""
        completing = 0
        for t in set(position.tolist()):
            while t % self.config.arity ** (completing + 1) == 0:
                completing += 1
        return completing

    def _held(self, state: State) -> list[Tensor]:
        """The state's nodes by level, tokens first: `[batch, (kernel - 1)·slots, dim]`, oldest first, slot by slot."""
        held, at, keep = [state.own], 0, self.kernel - 1
        while at < state.nodes.shape[1]:
            size = self.slots(len(held)) * keep
            held.append(state.nodes[:, at : at + size])
            at += size
        if self.kernel > self.config.arity:  # only overlapping kernels read places that no node has filled yet
            age = torch.arange(keep - 1, -1, -1, device=state.own.device)
            for level, nodes in enumerate(held):
                filled = age < (state.position // self.config.arity**level)[:, None]
                held[level] = nodes * filled.repeat_interleave(self.slots(level), 1)[..., None]
        return held

    def _project(self, x: Tensor, flat: Tensor) -> tuple[Tensor, Tensor]:
        """Query, key, value of tokens; query and value of nodes, once per node and not once per reader."""
        weight, bias, (E, H) = self.qkv.weight, self.qkv.bias, (self.dim, self.config.heads)
        own = self.qkv(x).unflatten(-1, (3, H, -1))
        if type(self.qkv) is not nn.Linear:  # an adapter round it (LoRA) shows in its calls alone
            return own, self.qkv(flat).unflatten(-1, (3, H, -1))[..., ::2, :, :]
        nodes = F.linear(flat, torch.cat([weight[:E], weight[2 * E :]]), torch.cat([bias[:E], bias[2 * E :]]))
        return own, nodes.unflatten(-1, (2, H, -1))

    def _observe(self, weights: Callable[[], Tensor], position: Tensor, levels: int) -> None:
        dims, arity = ("batch", "time", "node"), self.config.arity
        labels = [(i, k % self.config.banks) for i in range(levels + 1) for k in range(self.slots(i))]
        coords = {"level": ("node", [i for i, _ in labels]), "bank": ("node", [k for _, k in labels])}

        def span(edge: int) -> Tensor:
            # A document's tokens are consecutive in the stream where padding does not part them.
            time = call_start() + torch.arange(position.shape[1], device=position.device)
            spans = []
            for level, _ in labels:
                size = arity**level
                last = time - position % size + 1  # the end of the last complete node
                sees = (position >= size) & (position > 0)
                spans.append(torch.where(sees, last - size if edge == 0 else last, -1))
            return torch.stack(spans, -1)

        observe("attention", weights, ("batch", "time", "heads", "node"), coords=coords)
        observe("span_start", lambda: span(0), dims, coords=coords)
        observe("span_end", lambda: span(1), dims, coords=coords)


def _state(position: Tensor, tables: list[Tensor]) -> State:
    """Copies, so that the state holds no storage larger than itself."""
    own = tables[0][0].clone()
    flat = [table.permute(1, 2, 0, 3).flatten(1, 2) for table in tables[1:]]
    return State(position.clone(), own, torch.cat(flat, 1) if flat else own.new_empty(len(own), 0, own.shape[-1]))


def _weights(
    own: Float[Tensor, "batch 3 heads dim"], nodes: Float[Tensor, "batch count 2 heads dim"],
    sees: Bool[Tensor, "batch count"],
) -> Float[Tensor, "batch heads node"]:
    queries = torch.cat([own[:, :1], nodes[:, :, 0]], 1)
    score = torch.einsum("bhd,bnhd->bhn", own[:, 1].float(), queries.float()) * own.shape[-1] ** -0.5
    return score.masked_fill(~F.pad(sees, (1, 0), value=True)[:, None], -torch.inf).softmax(-1)
