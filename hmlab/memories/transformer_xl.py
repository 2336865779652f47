"""Transformer-XL: segments that also read the hidden states of what came before them, at relative positions.

Source: Dai et al. 2019, Transformer-XL (arXiv 1901.02860), sections 3.2 and 3.3.

    token i of a document lies in segment floor(i / S) and sees j with floor(i / S)·S - M <= j <= i
    x̃_j = x_j in the segment of i, stop_gradient(x_j) before it
    s_ij = ( (q_i + u)·k_j + (q_i + v)·W_r R_{i-j} ) / sqrt(D),   q_i = W_q x_i,  k_j, w_j = W_kv x̃_j
    y_i = W_o concat_h( Σ_j softmax_j(s_ij) w_j ),   R_d = (sin(d·ω), cos(d·ω)),  ω_n = 10000^(-2n/E)

Symbols: E `dim`, H `heads`, D = E / H, S `segment`, M `memory`, u `content_bias`, v `position_bias`, W_r `relative`.
Units: `attention` (recorded) is a share of 1. The state holds (M + S - 1)·E numbers and a counter, always.
Errors: `ValueError` naming the field of `Config`, or the argument of a call, that is not what was expected.
Deviations: segments lie at multiples of S in each document and not where the calls are cut, so that any chunking gives
the same values and the same gradients; a call may hold many segments. What is remembered are the inputs of this layer
(after the model's norm), where the paper keeps them before. u and v belong to the layer and are not shared.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from hmlab.layers import (
    Documents,
    blocks,
    check_heads,
    check_positive,
    merge_heads,
    observe_attention,
    split_heads,
)  # fmt: skip
from hmlab.memory import Memory


class State(NamedTuple):
    """hidden: x of the last M + S - 1 tokens, the newest last; gradients flow to the current segment only. position:
    tokens consumed in the current document; slots it has not reached yet are never read."""

    hidden: Float[Tensor, "batch slots dim"]
    position: Int[Tensor, "batch"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """dim: E. heads: H. segment: S. memory: M, hidden states before the segment that stay visible."""

    dim: int
    heads: int = 4
    segment: int = 64
    memory: int = 64

    def __post_init__(self) -> None:
        check_heads(self.dim, self.heads)
        if self.dim % 2:
            raise ValueError(f"dim: expected an even number for sines and cosines, got {self.dim}")
        check_positive(self, "segment", "memory")

    def build(self) -> TransformerXL:
        return TransformerXL(self)


class TransformerXL(Memory):
    """Attention over the segment so far and over the memory before it."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, self.dim, self.heads = config, config.dim, config.heads
        dim, heads = config.dim, config.heads
        self.q = nn.Linear(dim, dim, bias=False)
        self.kv = nn.Linear(dim, 2 * dim, bias=False)
        self.relative = nn.Linear(dim, dim, bias=False)
        self.content_bias = nn.Parameter(torch.zeros(heads, dim // heads))
        self.position_bias = nn.Parameter(torch.zeros(heads, dim // heads))
        self.output = nn.Linear(dim, dim, bias=False)

    def init_state(self, batch, *, device=None, dtype=None):
        slots = self.config.memory + self.config.segment - 1
        hidden = self.q.weight.new_zeros(batch, slots, self.dim, device=device, dtype=dtype)
        return State(hidden, torch.zeros(batch, dtype=torch.int64, device=hidden.device))

    def forward(self, x, state=None, *, tokens=None, reset=None, valid=None):
        self.check_input(x, tokens, reset, valid, state)
        # Where every row begins its document, blocks of queries are segments.
        aligned = state is None and reset is None
        if state is None:
            state = self.init_state(len(x), device=x.device, dtype=x.dtype)
        if not x.shape[1]:
            return x, state
        documents = Documents(state.position, reset, valid, x.shape[1])
        x = documents.pack(x)
        hidden = torch.cat((state.hidden.to(x.dtype), x), 1)
        y = self._attend(x, hidden, documents, aligned)
        self._observe(x, hidden, documents)
        y = documents.unpack(self.output(merge_heads(y)))
        return y, State(documents.latest(hidden, state.hidden.shape[1]), documents.end)

    def _attend(self, x: Float[Tensor, "batch time dim"], hidden: Float[Tensor, "batch slots dim"],
                documents: Documents, aligned: bool) -> Float[Tensor, "batch heads time head_dim"]:
        """In blocks of queries. A block sees each slot twice: as its own segment's, with gradient, and as an older
        one's, without; a mask tells which. `lead` slots before a block, at most, are of its segment; of a block's own
        slots, `inside` may belong to a segment that is over for the later ones."""
        time, memory = documents.time, self.config.memory
        block = min(self.config.segment, time)
        lead, inside = (0, 0) if aligned else (self.config.segment - 1, block - 1)
        reach = memory + lead
        fill, before = -time % block, hidden.shape[1] - time
        hidden = F.pad(hidden[:, before - reach :], (0, 0, 0, fill))
        old, own = slice(reach + inside), slice(memory, None)

        number = F.pad(torch.cat((documents.held(reach), documents.number), 1), (0, fill), value=-1)
        held = documents.start[:, None] + torch.arange(-reach, 0, device=x.device)
        position = F.pad(torch.cat((held, documents.position), 1), (0, fill), value=-1)
        number, position = (t.unfold(1, reach + block, block) for t in (number, position))
        is_own, is_old = self._visible(number[..., reach:], position[..., reach:], number, position)
        visible = torch.cat((is_old[..., old], is_own[..., own]), -1)

        def windows(hidden: Tensor, part: slice) -> list[Tensor]:
            split = (split_heads(t, self.heads) for t in self.kv(hidden).chunk(2, -1))
            return [blocks(t, reach + block, block)[..., part, :] for t in split]

        keys, values = (torch.cat(t, -2) for t in zip(windows(hidden.detach(), old), windows(hidden, own), strict=True))
        q = blocks(F.pad(split_heads(self.q(x), self.heads), (0, 0, 0, fill)), block, block)
        relative = self._relative(torch.arange(reach + block - 1, -block - 1, -1, device=x.device), x)
        far = (q + self.position_bias[:, None, None]) @ relative.mT[:, None] * q.shape[-1] ** -0.5
        # Row i begins at distance reach + i: shifting each row by one more turns distances into slots.
        width = far.shape[-1]
        far = far.flatten(-2)[..., block - 1 : block * width - 1].unflatten(-1, (block, width - 1))
        far = far[..., : reach + block]
        bias = torch.cat((far[..., old], far[..., own]), -1).masked_fill(~visible[:, None], -torch.inf)
        q = q + self.content_bias[:, None, None]
        q, keys, values, bias = (rearrange(t, "batch heads blocks size dim -> (batch blocks) heads size dim")
                                 for t in (q, keys, values, bias))  # fmt: skip
        y = F.scaled_dot_product_attention(q, keys, values, attn_mask=bias)
        return rearrange(y, "(b blocks) heads size dim -> b heads (blocks size) dim", b=len(x))[:, :, :time]

    def _visible(self, number: Int[Tensor, "*batch time"], position: Int[Tensor, "*batch time"],
                 key_number: Int[Tensor, "*batch slots"], key_position: Int[Tensor, "*batch slots"],
                 ) -> tuple[Bool[Tensor, "*batch time slots"], Bool[Tensor, "*batch time slots"]]:
        """What a token sees of its own segment, and of the memory before it."""
        same = number[..., None] == key_number[..., None, :]
        position, key_position = position[..., None], key_position[..., None, :]
        begin = position - position % self.config.segment
        own = same & (key_position >= begin) & (key_position <= position)
        return own, same & (key_position < begin) & (key_position >= begin - self.config.memory)

    def _sinusoid(self, distance: Int[Tensor, "distances"], like: Tensor) -> Float[Tensor, "distances dim"]:
        precise = torch.promote_types(like.dtype, torch.float32)
        power = torch.arange(0, self.dim, 2, device=like.device, dtype=precise) / self.dim
        angle = distance[:, None] * 10000.0**-power
        return torch.cat((angle.sin(), angle.cos()), -1).to(like.dtype)

    def _relative(self, distance: Int[Tensor, "distances"], like: Tensor) -> Float[Tensor, "heads distances head_dim"]:
        return split_heads(self.relative(self._sinusoid(distance, like))[None], self.heads)[0]

    def step(self, x, state, *, tokens=None):
        """W_k, W_v and W_r are applied to the one query and the one sum, not to all that is remembered."""
        if type(self.kv) is not nn.Linear or type(self.relative) is not nn.Linear:
            return super().step(x, state, tokens=tokens)  # an adapter round one (LoRA) shows in its calls alone
        self.check_input(x[:, None], None if tokens is None else tokens[:, None], state=state)
        hidden = torch.cat((state.hidden.to(x.dtype), x[:, None]), 1)
        distance = torch.arange(hidden.shape[1] - 1, -1, -1, device=x.device)
        position, key_position = state.position[:, None], state.position[:, None] - distance
        # Slots before the document have positions below 0, which no token sees.
        number = torch.where(key_position < 0, -1, 0)
        own, old = (t[:, 0] for t in self._visible(torch.zeros_like(position), position, number, key_position))
        read = torch.where(own[..., None], hidden, hidden.detach())
        width = self.dim // self.heads
        w_k, w_v = self.kv.weight.unflatten(0, (2, self.heads, width)).unbind(0)
        w_r = self.relative.weight.unflatten(0, (self.heads, width))
        q = self.q(x).unflatten(-1, (self.heads, width))
        near = torch.einsum("bhd,hde,bne->bhn", q + self.content_bias, w_k, read)
        far = torch.einsum("bhd,hde,ne->bhn", q + self.position_bias, w_r, self._sinusoid(distance, x))
        scores = ((near + far) * width**-0.5).masked_fill(~(own | old)[:, None], -torch.inf)
        y = torch.einsum("bhn,bne,hde->bhd", scores.softmax(-1), read, w_v)
        self._observe(x[:, None], hidden, Documents(state.position, None, None, 1))
        return self.output(y.flatten(1)), State(hidden[:, 1:].clone(), state.position + 1)

    def _observe(self, x: Tensor, hidden: Tensor, documents: Documents) -> None:
        held, time = hidden.shape[1] - documents.time, documents.time

        def scores() -> Tensor:
            q, k = split_heads(self.q(x), self.heads), split_heads(self.kv(hidden)[..., : self.dim], self.heads)
            slot = torch.arange(held + time, device=x.device)
            relative = self._relative(slot, x)
            distance = (held + slot[:time, None] - slot).clamp(min=0).expand(*q.shape[:3], -1)
            far = ((q + self.position_bias[:, None]) @ relative.mT).gather(-1, distance)
            return ((q + self.content_bias[:, None]) @ k.mT + far) * q.shape[-1] ** -0.5

        def mask() -> Tensor:
            number = torch.cat((documents.held(held), documents.number), 1)
            position = documents.start[:, None] + torch.arange(-held, 0, device=x.device)
            position = torch.cat((position, documents.position), 1)
            own, old = self._visible(documents.number, documents.position, number, position)
            return (own | old)[:, None]

        observe_attention(scores, mask, documents, lambda: documents.times(held))
