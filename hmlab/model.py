"""A causal language model round any memory: embedding, blocks, norm, head.

    x = x + memory(norm1(x)),   x = x + feedforward(norm2(x)),   logits = head(norm(x))

What differs between published recipes (norm, feed-forward, learned positions) is a field of `Config`; what the
model remembers by is `Config.memory`, the configuration of any `hmlab.memory.Memory`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from hmlab.memory import Memory, document_positions, reorder, state_bytes


class State(NamedTuple):
    """position: tokens consumed in the current document `[batch]`; layers: the state of each layer's memory."""

    position: Int[Tensor, "batch"]
    layers: tuple[Any, ...]


@dataclass(frozen=True, kw_only=True)
class Config:
    """vocab: token ids. dim: width. memory: configuration of each layer's memory (same dim). layers: blocks.

    ffn: wide (dim → ffn_factor·dim → dim), gated (the same with a product of two inputs), square (dim → dim → dim) or
    tied (square with one shared matrix). context: number of learned absolute positions, 0 for none.
    """

    vocab: int
    dim: int
    memory: Any
    layers: int = 4
    ffn: Literal["wide", "gated", "square", "tied"] = "wide"
    ffn_factor: int = 4
    activation: Literal["silu", "relu", "gelu"] = "silu"
    norm: Literal["rms", "layer"] = "rms"
    final_norm: Literal["rms", "layer"] = "layer"
    context: int = 0
    head_bias: bool = True
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name, least in (("vocab", 1), ("dim", 1), ("layers", 0), ("ffn_factor", 1), ("context", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        named = {"ffn": _FEEDFORWARD, "activation": _ACTIVATIONS, "norm": _NORMS, "final_norm": _NORMS}
        for name, choices in named.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: expected one of {list(choices)}, got {getattr(self, name)!r}")
        if self.memory.dim != self.dim:
            raise ValueError(f"memory: expected dim {self.dim}, got {self.memory.dim}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: expected 0 <= dropout < 1, got {self.dropout}")

    def build(self) -> LanguageModel:
        return LanguageModel(self)


class Gated(nn.Module):
    """dim → hidden twice, one of them through the activation, their product → dim."""

    def __init__(self, dim: int, hidden: int, activation: nn.Module) -> None:
        super().__init__()
        self.rise, self.activation, self.fall = nn.Linear(dim, 2 * hidden), activation, nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.rise(x).chunk(2, -1)
        return self.fall(self.activation(gate) * value)


class Tied(nn.Module):
    """One matrix before and after the activation."""

    def __init__(self, dim: int, activation: nn.Module) -> None:
        super().__init__()
        self.linear, self.activation = nn.Linear(dim, dim), activation

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.activation(self.linear(x)))


_ACTIVATIONS = {"silu": nn.SiLU, "relu": nn.ReLU, "gelu": nn.GELU}
_NORMS = {"rms": nn.RMSNorm, "layer": nn.LayerNorm}
_FEEDFORWARD = {
    "wide": lambda dim, factor, act: nn.Sequential(nn.Linear(dim, factor * dim), act, nn.Linear(factor * dim, dim)),
    "gated": lambda dim, factor, act: Gated(dim, factor * dim, act),
    "square": lambda dim, factor, act: nn.Sequential(nn.Linear(dim, dim), act, nn.Linear(dim, dim)),
    "tied": lambda dim, factor, act: Tied(dim, act),
}


class Block(nn.Module):
    """One layer: a memory and a feed-forward, each behind a norm and beside a residual."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.norm1, self.norm2 = _NORMS[config.norm](config.dim), _NORMS[config.norm](config.dim)
        self.memory: Memory = config.memory.build()
        activation = _ACTIVATIONS[config.activation]()
        self.feedforward = _FEEDFORWARD[config.ffn](config.dim, config.ffn_factor, activation)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, state: Any, **given: Tensor | None) -> tuple[Tensor, Any]:
        y, state = self.memory(self.norm1(x), state, **given)
        return self._rest(x, y), state

    def step(self, x: Tensor, state: Any, tokens: Tensor) -> tuple[Tensor, Any]:
        y, state = self.memory.step(self.norm1(x), state, tokens=tokens)
        return self._rest(x, y), state

    def _rest(self, x: Tensor, y: Tensor) -> Tensor:
        x = x + self.dropout(y)
        return x + self.dropout(self.feedforward(self.norm2(x)))


class LanguageModel(nn.Module):
    """Tokens in, logits out, with a state between calls; the same three forms as a memory."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab, config.dim)
        self.positions = nn.Embedding(config.context, config.dim) if config.context else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = _NORMS[config.final_norm](config.dim)
        self.head = nn.Linear(config.dim, config.vocab, bias=config.head_bias)

    def forward(
        self,
        tokens: Int[Tensor, "batch time"],
        state: State | None = None,
        *,
        reset: Bool[Tensor, "batch time"] | None = None,
        valid: Bool[Tensor, "batch time"] | None = None,
    ) -> tuple[Float[Tensor, "batch time vocab"], State]:
        """Logits of the next token after each, and the state after the last. reset, valid: as in `Memory.forward`."""
        if tokens.ndim != 2 or tokens.is_floating_point():
            raise ValueError(f"tokens: expected integers [batch, time], got {tokens.dtype} {list(tokens.shape)}")
        hidden, state = self.hidden(self.embedding(tokens), state, tokens=tokens, reset=reset, valid=valid)
        return self.head(hidden), state

    def hidden(
        self,
        x: Float[Tensor, "batch time dim"],
        state: State | None = None,
        *,
        tokens: Int[Tensor, "batch time"] | None = None,
        reset: Bool[Tensor, "batch time"] | None = None,
        valid: Bool[Tensor, "batch time"] | None = None,
    ) -> tuple[Float[Tensor, "batch time dim"], State]:
        """What the head reads, from embeddings instead of tokens: `embedding(tokens)`, or vectors of one's own.

        tokens: for memories that count ids; those refuse a call without.
        """
        first = torch.zeros(len(x), dtype=torch.int64, device=x.device) if state is None else state.position
        position, end = document_positions(first, reset, valid, x.shape[1])
        x = self._place(x, position)
        layers = []
        for block, before in zip(self.blocks, state.layers if state else [None] * len(self.blocks), strict=True):
            x, after = block(x, before, tokens=tokens, reset=reset, valid=valid)
            layers.append(after)
        return self.norm(x), State(end, tuple(layers))

    def step(self, tokens: Int[Tensor, "batch"], state: State) -> tuple[Float[Tensor, "batch vocab"], State]:
        """Logits after one more token per row."""
        position = state.position + 1
        x = self._place(self.embedding(tokens), position)
        layers = []
        for block, before in zip(self.blocks, state.layers, strict=True):
            x, after = block.step(x, before, tokens)
            layers.append(after)
        return self.head(self.norm(x)), State(position, tuple(layers))

    def init_state(self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
                   ) -> State:
        device, dtype = device or self.head.weight.device, dtype or self.head.weight.dtype
        layers = tuple(b.memory.init_state(batch, device=device, dtype=dtype) for b in self.blocks)
        return State(torch.zeros(batch, dtype=torch.int64, device=device), layers)

    def state_bytes(self, state: State) -> int:
        return state_bytes(state)

    def reorder(self, state: State, rows: Int[Tensor, "rows"]) -> State:
        return reorder(state, rows)

    def memory_parameters(self) -> list[nn.Parameter]:
        """Parameters that lie inside memories."""
        return [p for block in self.blocks for p in block.memory.parameters()]

    def _place(self, x: Tensor, position: Tensor) -> Tensor:
        if self.positions is None:
            return x
        if not torch.compiler.is_compiling() and position.numel() and int(position.max()) > self.config.context:
            raise ValueError(
                f"tokens: expected at most context ({self.config.context}) tokens in a document, "
                f"got {int(position.max())}; this model has learned absolute positions"
            )
        return x + self.positions((position - 1).clamp(min=0))


def parameters(model: nn.Module) -> int:
    """Number of trained numbers, shared ones counted once."""
    return sum(p.numel() for p in model.parameters())


def enough_tokens(model: nn.Module, time: int) -> int:
    """Tokens after which a count of operations per token, or of bytes of state, is what it is after `time`.

    A recurrent network costs the same at every token, and PyTorch counts it step by step; all others take `time`.
    """
    return min(time, 64) if any(isinstance(module, nn.RNNBase) for module in model.modules()) else time


def flops(config: Config, time: int) -> float:
    """Floating-point operations per token of a forward pass over `time` tokens, counted by PyTorch's flop counter.

    A multiply-add counts two. Element-wise work is not counted. Attention is counted as it is computed: a causal
    kernel that skips half of the products is still counted whole.
    """
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        model = config.build()
        time = enough_tokens(model, time)
        tokens = torch.zeros(1, time, dtype=torch.int64)
    counter = FlopCounterMode(display=False)
    model.positions = None  # its check reads values, which meta tensors have not; a look-up costs no flops
    with counter, torch.no_grad():
        model(tokens)
    return counter.get_total_flops() / time


@torch.no_grad()
def sample(
    model: LanguageModel,
    prompt: Int[Tensor, "batch time"],
    tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Int[Tensor, "batch"]]:
    """Continue a prompt, one token per row at a time: the prompt in parallel, then step by step.

    temperature: divides the logits; 0 takes the likeliest token. top_k: keep only the k likeliest.
    """
    if prompt.ndim != 2 or prompt.shape[1] == 0:
        raise ValueError(f"prompt: expected [batch, time] with at least one token, got {list(prompt.shape)}")
    if temperature < 0:
        raise ValueError(f"temperature: expected 0 or more, got {temperature}")
    if top_k is not None and not 1 <= top_k <= model.config.vocab:
        raise ValueError(f"top_k: expected 1 to {model.config.vocab}, got {top_k}")
    logits, state = model(prompt)
    logits = logits[:, -1]
    for number in range(tokens):
        if top_k is not None:
            least = logits.topk(top_k).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        if temperature == 0:
            chosen = logits.argmax(-1)
        else:
            chosen = torch.multinomial((logits.float() / temperature).softmax(-1), 1, generator=generator)[:, 0]
        yield chosen
        if number + 1 < tokens:
            logits, state = model.step(chosen, state)
