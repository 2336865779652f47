"""Sliding-window attention, with or without attention sinks.

Source: the window: Beltagy et al. 2020, Longformer (arXiv 2004.05150), causal; the sinks: Xiao et al. 2023, Efficient
Streaming Language Models with Attention Sinks (arXiv 2309.17453).

    y_t = W_o concat_h( Σ_j softmax_j(q_t · k_j / sqrt(D)) v_j ) + b_o
    over the tokens j of the document with t - W < j <= t, or j < A (counted from 0)

Symbols: E `dim`, H `heads`, D = E / H, W `window`, A `sinks`. q, k rotated by the position in the document.
Units: `attention` (recorded) is a share of 1. The state holds 2·(W - 1 + A)·E numbers and a counter, always.
Errors: `ValueError` naming the field of `Config`, or the argument of a call, that is not what was expected.
Deviations: sinks keep the positions they have in the document, where StreamingLLM counts positions in its cache; so
the parallel form and the step agree. The window does not count the sinks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hmlab.layers import (
    Documents,
    Far,
    check_heads,
    check_positive,
    local_attention,
    merge_heads,
    observe_attention,
    rotate,
    slots_at,
    split_heads,
)  # fmt: skip
from hmlab.memory import Memory


class State(NamedTuple):
    """keys, values: of the last W - 1 tokens, the newest last. sink_keys, sink_values: of the document's first A
    tokens. position: tokens consumed in the current document; slots it has not reached yet are never read."""

    keys: Float[Tensor, "batch heads reach head_dim"]
    values: Float[Tensor, "batch heads reach head_dim"]
    sink_keys: Float[Tensor, "batch heads sinks head_dim"]
    sink_values: Float[Tensor, "batch heads sinks head_dim"]
    position: Int[Tensor, "batch"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """dim: E. heads: H. window: W, tokens that each token sees, itself included. sinks: A, first tokens of the document
    that stay visible. rotary_base: slowest wavelength / 2π. qkv_bias, output_bias: of the projections."""

    dim: int
    heads: int = 4
    window: int = 128
    sinks: int = 0
    rotary_base: float = 10000.0
    qkv_bias: bool = True
    output_bias: bool = True

    def __post_init__(self) -> None:
        check_heads(self.dim, self.heads, rotary=True)
        check_positive(self, "window")
        if self.sinks < 0:
            raise ValueError(f"sinks: expected at least 0, got {self.sinks}")
        if self.rotary_base <= 1:
            raise ValueError(f"rotary_base: expected more than 1, got {self.rotary_base}")

    def build(self) -> WindowAttention:
        return WindowAttention(self)


class WindowAttention(Memory):
    """Every token attends to the last W tokens and the first A of its document."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, self.dim, self.heads = config, config.dim, config.heads
        self.qkv = nn.Linear(config.dim, 3 * config.dim, bias=config.qkv_bias)
        self.output = nn.Linear(config.dim, config.dim, bias=config.output_bias)

    def init_state(self, batch, *, device=None, dtype=None):
        def zeros(slots: int) -> Tensor:
            shape = (batch, self.heads, slots, self.dim // self.heads)
            return self.qkv.weight.new_zeros(shape, device=device, dtype=dtype)

        near, sinks = self.config.window - 1, self.config.sinks
        position = torch.zeros(batch, dtype=torch.int64, device=device or self.qkv.weight.device)
        return State(zeros(near), zeros(near), zeros(sinks), zeros(sinks), position)

    def forward(self, x, state=None, *, tokens=None, reset=None, valid=None):
        self.check_input(x, tokens, reset, valid, state)
        if state is None:
            state = self.init_state(len(x), device=x.device, dtype=x.dtype)
        time, reach = x.shape[1], self.config.window - 1
        if not time:
            return x, state
        documents = Documents(state.position, reset, valid, time)
        q, k, v = (split_heads(t, self.heads) for t in self.qkv(documents.pack(x)).chunk(3, -1))
        q, k = (rotate(t, documents.position, self.config.rotary_base) for t in (q, k))
        keys, values = torch.cat((state.keys.to(k.dtype), k), 2), torch.cat((state.values.to(v.dtype), v), 2)
        sinks, far = (state.sink_keys, state.sink_values), None
        if self.config.sinks:
            # Places to take a document's first tokens from: the sinks of the state, then the tokens of this call.
            sources = [torch.cat((held.to(new.dtype), new), 2) for held, new in zip(sinks, (k, v), strict=True)]
            far = self._far(sources, documents)
            kept = self._places(documents.count - documents.end, time)
            sinks = tuple(slots_at(source, kept) for source in sources)
        y = local_attention(q, keys, values, documents, far)
        self._observe(q, torch.cat((state.sink_keys.to(k.dtype), keys), 2), documents)
        y = documents.unpack(self.output(merge_heads(y)))
        return y, State(documents.latest(keys, reach), documents.latest(values, reach), *sinks, documents.end)

    def _places(self, first: Int[Tensor, "*batch"], time: int) -> Int[Tensor, "*batch sinks"]:
        """Where the sinks of documents lie that begin at token `first` of the call (before it, where negative)."""
        sink = torch.arange(self.config.sinks, device=first.device)
        token = first[..., None] + sink
        return torch.where(token < 0, sink, self.config.sinks + token).clamp(max=self.config.sinks + time - 1)

    def _far(self, sources: list[Tensor], documents: Documents) -> Far:
        """Sinks beyond the window. Only the document that a block of queries begins in is old enough to have some:
        one that begins inside the block lies in the windows of all its queries."""
        time, window = documents.time, self.config.window
        block = min(window, time)
        number, position = documents.number[:, ::block], documents.position[:, ::block]
        first = torch.arange(0, time, block, device=number.device) - position
        places = self._places(first, time)
        keys, values = (slots_at(t, places.flatten(1)).unflatten(2, places.shape[1:]) for t in sources)
        fill = (0, -time % block)
        queries = torch.nn.functional.pad(documents.number, fill, value=-1).unfold(1, block, block)
        ages = torch.nn.functional.pad(documents.position, fill, value=-1).unfold(1, block, block)
        beyond = ages[..., None] - torch.arange(self.config.sinks, device=ages.device) >= window
        return Far(keys, values, beyond & (queries == number[..., None])[..., None])

    def _observe(self, q: Tensor, keys: Tensor, documents: Documents) -> None:
        """keys: the sinks of the state, its last tokens, the tokens of this call."""
        sinks, reach = self.config.sinks, self.config.window - 1

        def mask() -> Tensor:
            device, start = q.device, documents.start[:, None]
            sink = torch.arange(sinks, device=device).expand(len(q), sinks)
            place = torch.cat((sink, start + torch.arange(-reach, 0, device=device), documents.position), 1)
            number = torch.cat((torch.where(sink < start, 0, -1), documents.held(reach), documents.number), 1)
            distance = documents.position[:, :, None] - place[:, None]
            same = documents.number[:, :, None] == number[:, None]
            near, far = (distance < self.config.window), (place < sinks)[:, None] & (distance >= self.config.window)
            # A sink that the last tokens of the state hold as well is read from its own slot.
            from_sink = torch.arange(place.shape[1], device=device) < sinks
            from_held = ~from_sink & (torch.arange(place.shape[1], device=device) < sinks + reach)
            return (same & (distance >= 0) & (near & ~from_sink | far & ~from_held))[:, None]

        def times() -> Tensor:
            sink = documents.times()[:, :1] - documents.position[:, :1] + torch.arange(sinks, device=q.device)
            return torch.cat((sink, documents.times(reach)), 1)

        scale = (self.dim // self.heads) ** -0.5
        observe_attention(lambda: q @ keys.mT * scale, mask, documents, times)
