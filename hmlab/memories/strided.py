"""Strided sparse attention: half of the heads look at what is near, half at every l-th token.

Source: Child et al. 2019, Generating Long Sequences with Sparse Transformers (arXiv 1904.10509), section 4.3, the
strided pattern with the two patterns on different heads (equation 8; the variant that splits heads).

    near heads:     token i sees j with i - l <= j <= i
    strided heads:  token i sees j <= i with (i - j) mod l = 0
    y_i = W_o concat_h( Σ_j softmax_j(q_i · k_j / sqrt(D)) v_j ) + b_o

Symbols: E `dim`, H `heads` (the first floor(H / 2) near), D = E / H, l `stride`. Only tokens of i's document are seen.
Units: `attention` (recorded) is a share of 1. A state of t tokens holds 2·D·(l·near + t·strided) numbers, a counter.
Errors: `ValueError` naming the field of `Config`, or the argument of a call, that is not what was expected.
Deviations: rotary positions, as all attention baselines here have them, where the paper learns an embedding of the
row and the column; no sparse residual initialisation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from hmlab.layers import (
    Documents,
    check_heads,
    check_positive,
    local_attention,
    merge_heads,
    observe_attention,
    rotate,
    split_heads,
)  # fmt: skip
from hmlab.memory import Memory


class State(NamedTuple):
    """near_keys, near_values: of the last l tokens, for the near heads. keys, values: of every token consumed, for the
    strided heads; of both, the last `position` slots of a row are its current document's, the others are never read.
    position: tokens consumed in the current document."""

    near_keys: Float[Tensor, "batch near stride head_dim"]
    near_values: Float[Tensor, "batch near stride head_dim"]
    keys: Float[Tensor, "batch strided slots head_dim"]
    values: Float[Tensor, "batch strided slots head_dim"]
    position: Int[Tensor, "batch"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """dim: E. heads: H, at least 2. stride: l, about the square root of the context. rotary_base: slowest wavelength /
    2π. qkv_bias, output_bias: of the projections."""

    dim: int
    heads: int = 4
    stride: int = 32
    rotary_base: float = 10000.0
    qkv_bias: bool = True
    output_bias: bool = True

    def __post_init__(self) -> None:
        if self.heads < 2:
            raise ValueError(f"heads: expected at least 2, one near and one strided, got {self.heads}")
        check_heads(self.dim, self.heads, rotary=True)
        check_positive(self, "stride")
        if self.rotary_base <= 1:
            raise ValueError(f"rotary_base: expected more than 1, got {self.rotary_base}")

    def build(self) -> StridedAttention:
        return StridedAttention(self)


class StridedAttention(Memory):
    """Near heads and strided heads: two tokens of a document are at most two steps apart."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, self.dim, self.heads = config, config.dim, config.heads
        self.near = config.heads // 2
        self.qkv = nn.Linear(config.dim, 3 * config.dim, bias=config.qkv_bias)
        self.output = nn.Linear(config.dim, config.dim, bias=config.output_bias)

    def init_state(self, batch, *, device=None, dtype=None):
        def zeros(heads: int, slots: int) -> Tensor:
            return self.qkv.weight.new_zeros(batch, heads, slots, self.dim // self.heads, device=device, dtype=dtype)

        near, far, stride = self.near, self.heads - self.near, self.config.stride
        position = torch.zeros(batch, dtype=torch.int64, device=device or self.qkv.weight.device)
        return State(zeros(near, stride), zeros(near, stride), zeros(far, 0), zeros(far, 0), position)

    def forward(self, x, state=None, *, tokens=None, reset=None, valid=None):
        self.check_input(x, tokens, reset, valid, state)
        if state is None:
            state = self.init_state(len(x), device=x.device, dtype=x.dtype)
        if not x.shape[1]:
            return x, state
        documents = Documents(state.position, reset, valid, x.shape[1])
        q, (near_keys, near_values), (keys, values) = self._project(documents.pack(x), documents.position, state)
        near = local_attention(q[:, : self.near], near_keys, near_values, documents)
        plain = reset is None and not state.keys.shape[2]
        strided = self._columns(q[:, self.near :], keys, values, None if plain else documents)
        self._observe(q, near_keys, keys, documents)
        y = documents.unpack(self.output(merge_heads(torch.cat((near, strided), 1))))
        slots, stride = keys.shape[2], self.config.stride
        near_keys, near_values = documents.latest(near_keys, stride), documents.latest(near_values, stride)
        if valid is not None:
            keys, values = documents.latest(keys, slots), documents.latest(values, slots)
        return y, State(near_keys, near_values, keys, values, documents.end)

    def step(self, x, state, *, tokens=None):
        self.check_input(x[:, None], None if tokens is None else tokens[:, None], state=state)
        documents = Documents(state.position, None, None, 1)
        q, (near_keys, near_values), (keys, values) = self._project(x[:, None], documents.position, state)
        near = local_attention(q[:, : self.near], near_keys, near_values, documents)
        stride, slots = self.config.stride, keys.shape[2]
        column = slice((slots - 1) % stride, None, stride)  # the only one that the newest token is in
        mask = torch.cat((documents.held(slots - 1), documents.number), 1)[:, None, None, column] == 0
        strided = F.scaled_dot_product_attention(
            q[:, self.near :], keys[:, :, column], values[:, :, column], attn_mask=mask
        )
        self._observe(q, near_keys, keys, documents)
        y = self.output(merge_heads(torch.cat((near, strided), 1)))[:, 0]
        return y, State(near_keys[:, :, 1:].clone(), near_values[:, :, 1:].clone(), keys, values, documents.end)

    def _project(self, x: Tensor, position: Tensor, state: State) -> tuple:
        """Queries of all heads; keys and values of the near heads, and of the strided heads, behind those held."""
        q, k, v = (split_heads(t, self.heads) for t in self.qkv(x).chunk(3, -1))
        q, k = (rotate(t, position, self.config.rotary_base) for t in (q, k))
        near = [torch.cat((held.to(new.dtype), new[:, : self.near]), 2)
                for held, new in ((state.near_keys, k), (state.near_values, v))]  # fmt: skip
        strided = [torch.cat((held.to(new.dtype), new[:, self.near :]), 2)
                   for held, new in ((state.keys, k), (state.values, v))]  # fmt: skip
        return q, near, strided

    def _columns(self, q: Tensor, keys: Tensor, values: Tensor, documents: Documents | None) -> Tensor:
        """Tokens written in rows of l: each attends up its own column. documents: None where there is one, and all of
        it is in this call, so that being causal is mask enough."""
        stride, batch, time, slots = self.config.stride, len(q), q.shape[2], keys.shape[2]
        held = slots - time
        fill, lead = -slots % stride, held % stride
        q = F.pad(q, (0, 0, lead, fill))
        keys, values = F.pad(keys, (0, 0, 0, fill)), F.pad(values, (0, 0, 0, fill))
        columns = "batch heads (rows stride) dim -> (batch stride) heads rows dim"
        q, keys, values = (rearrange(t, columns, stride=stride) for t in (q, keys, values))
        mask = None
        if documents is not None:
            number = F.pad(torch.cat((documents.held(held), documents.number), 1), (0, fill), value=-1)
            number = rearrange(number, "batch (rows stride) -> (batch stride) rows", stride=stride)
            above = number.shape[1] - q.shape[2]
            own = torch.eye(number.shape[1], dtype=torch.bool, device=q.device)[above:]
            causal = torch.ones_like(own).tril(above)
            # Its own place is visible to a query even where it is filling, or it would divide by zero.
            mask = ((number[:, above:, None] == number[:, None]) & causal | own)[:, None]
        y = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, is_causal=mask is None)
        y = rearrange(y, "(batch stride) heads rows dim -> batch heads (rows stride) dim", batch=batch)
        return y[:, :, lead : lead + time]

    def _observe(self, q: Tensor, near_keys: Tensor, keys: Tensor, documents: Documents) -> None:
        stride, time = self.config.stride, documents.time
        held = keys.shape[2] - time

        def scores() -> Tensor:
            # The near heads hold l slots before the call, the strided ones all: brought to the same length.
            slots = max(held, stride) + time
            near, far = (F.pad(t, (0, 0, slots - t.shape[2], 0)) for t in (near_keys, keys))
            return q @ torch.cat((near, far), 1).mT * (self.dim // self.heads) ** -0.5

        def mask() -> Tensor:
            slots = max(held, stride)
            number = torch.cat((documents.held(slots), documents.number), 1)
            same = documents.number[:, None, :, None] == number[:, None, None]
            distance = torch.arange(slots, slots + time)[:, None] - torch.arange(slots + time)
            patterns = torch.stack(((distance <= stride), (distance % stride == 0))).to(q.device)
            heads = torch.tensor([0] * self.near + [1] * (self.heads - self.near), device=q.device)
            return same & (patterns & (distance >= 0).to(q.device))[heads]

        observe_attention(scores, mask, documents, lambda: documents.times(max(held, stride)))
