"""Gated linear recurrence: a matrix per head that forgets, channel by channel, as the input says.

Source: Yang et al. 2024, Gated Linear Attention Transformers with Hardware-Efficient Training (arXiv 2312.06635),
equation 3 and section 4.4.

    S_t = diag(α_t) S_{t-1} + k_t v_t^T,   α_t = sigmoid(W_2 W_1 x_t + b)^(1/τ)
    o_t = S_t^T q_t,   y_t = W_o ( concat_h(LN(o_t)) ⊙ swish(W_r x_t + b_r) )

Symbols: E `dim`, H `heads`, D_k = E / 2H, D_v = E / H, S `State.total`, W_1 `gate_down`, W_2 and b `gate_up` (their
rank R `gate_rank`), τ `temperature`, W_r `swish`, LN `norm`, C `chunk`.
Units: `gate` (recorded) is α, a share of 1; `state_norm` is the Frobenius norm of S over all heads, in units of k·v.
The state holds E²/2H numbers, always.
Errors: `ValueError` naming the field of `Config`, or the argument of a call, that is not what was expected.
Deviations: inside a chunk the paper multiplies by exp of growing sums of log α, which overflows when gates close, and
repairs it by a second level of chunks. Here a chunk is halved again and again, and the right half reads the left one
across the border between them: only decays up to it and from it on are needed, all at most 1. S is float32 or better.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from hmlab.layers import (
    Documents,
    check_heads,
    check_positive,
    chunked,
    in_chunks,
    linear_scan,
    observe_state_norm,
    split_heads,
)  # fmt: skip
from hmlab.memory import Memory
from hmlab.record import observe


class State(NamedTuple):
    """total: S, the decayed sum of k v^T over the document so far."""

    total: Float[Tensor, "batch heads key value"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """dim: E. heads: H. gate_rank: R. temperature: τ, the larger, the longer it remembers at first. chunk: C, tokens
    that meet each other directly in the parallel form, a power of two."""

    dim: int
    heads: int = 4
    gate_rank: int = 16
    temperature: float = 16.0
    chunk: int = 64

    def __post_init__(self) -> None:
        check_heads(self.dim, self.heads)
        if self.dim // self.heads % 2:
            raise ValueError(f"dim: expected an even number per head, got {self.dim} for {self.heads} heads")
        check_positive(self, "gate_rank", "chunk")
        if self.temperature <= 0:
            raise ValueError(f"temperature: expected more than 0, got {self.temperature}")
        if self.chunk & (self.chunk - 1):
            raise ValueError(f"chunk: expected a power of two, got {self.chunk}")

    def build(self) -> GatedLinear:
        return GatedLinear(self)


class GatedLinear(Memory):
    """Gated linear attention, by chunks or by steps."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, self.dim, self.heads = config, config.dim, config.heads
        dim, keys = config.dim, config.dim // 2
        self.qk = nn.Linear(dim, 2 * keys, bias=False)
        self.v = nn.Linear(dim, dim, bias=False)
        self.gate_down = nn.Linear(dim, config.gate_rank, bias=False)
        self.gate_up = nn.Linear(config.gate_rank, keys)
        self.norm = nn.LayerNorm(dim // config.heads)
        self.swish = nn.Linear(dim, dim)
        self.output = nn.Linear(dim, dim, bias=False)

    def init_state(self, batch, *, device=None, dtype=None):
        like, width = self.v.weight, self.dim // self.heads
        dtype = torch.promote_types(dtype or like.dtype, torch.float32)
        return State(torch.zeros(batch, self.heads, width // 2, width, device=device or like.device, dtype=dtype))

    def forward(self, x, state=None, *, tokens=None, reset=None, valid=None):
        self.check_input(x, tokens, reset, valid, state)
        if state is None:
            state = self.init_state(len(x), device=x.device, dtype=x.dtype)
        time = x.shape[1]
        if not time:
            return x, state
        documents = Documents(torch.zeros(len(x), dtype=torch.int64, device=x.device), reset, valid, time)
        x = documents.pack(x)
        q, k, v, decay = self._project(x, state)
        decay = torch.where((documents.number < 0)[:, None, :, None], 0, decay)
        observe("gate", lambda: documents.unpack(decay.exp().transpose(1, 2)), ("batch", "time", "heads", "dim"))
        observe_state_norm(documents, state.total, k, v, decay.exp())

        number, before, after = chunked(documents, self.config.chunk)
        q, k, v, decay = (in_chunks(t, *number.shape[1:]) for t in (q, k, v, decay))
        until = decay.cumsum(-2)
        writer = torch.where((number == after[..., None])[:, :, None, :, None], k * _rest(decay).exp(), 0)
        reader = torch.where((number == before[..., None])[:, :, None, :, None], q * until.exp(), 0)
        keep = torch.where((before == after)[:, :, None, None], until[..., -1, :].exp(), 0)
        held, total = linear_scan(keep[..., None], writer.mT @ v, state.total)
        of_head = number[:, :, None].expand(-1, -1, self.heads, -1).flatten(0, 2)
        within = _within(*(t.flatten(0, 2) for t in (q, k, v, decay)), of_head)
        read = (within.unflatten(0, q.shape[:3]) + reader @ held).transpose(2, 3).flatten(1, 2)[:, :time]
        y = documents.unpack(self._output(read, x))
        # A document that began at padding has no tokens yet: nothing is remembered of the one before it.
        return y, State(torch.where((after[:, -1] == documents.last)[:, None, None, None], total, 0))

    def step(self, x, state, *, tokens=None):
        self.check_input(x[:, None], None if tokens is None else tokens[:, None], state=state)
        q, k, v, decay = self._project(x[:, None], state)
        total = decay.exp().mT * state.total + k.mT @ v
        observe("gate", lambda: decay.exp().transpose(1, 2), ("batch", "time", "heads", "dim"))
        observe("state_norm", lambda: total.flatten(1).norm(dim=1)[:, None], ("batch", "time"))
        return self._output((q @ total).transpose(1, 2), x[:, None])[:, 0], State(total)

    def _project(self, x: Tensor, state: State) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v and log α, each `[batch, heads, time, ...]`."""
        gate = self.gate_up(self.gate_down(x))
        q, k, v, gate = (split_heads(t, self.heads).to(state.total.dtype)
                         for t in (*self.qk(x).chunk(2, -1), self.v(x), gate))  # fmt: skip
        return q, k, v, F.logsigmoid(gate) / self.config.temperature

    def _output(self, read: Float[Tensor, "batch time heads value"], x: Float[Tensor, "batch time dim"]) -> Tensor:
        return self.output(self.norm(read.to(x.dtype)).flatten(2) * F.silu(self.swish(x)))


def _rest(decay: Float[Tensor, "*lead size key"]) -> Float[Tensor, "*lead size key"]:
    """Log decay from after each token to the end. A sum of its own: a difference of sums would lose digits."""
    later = F.pad(decay[..., 1:, :], (0, 0, 0, 1))
    return later.flip(-2).cumsum(-2).flip(-2)


def _within(q: Float[Tensor, "chunks chunk key"], k: Float[Tensor, "chunks chunk key"],
            v: Float[Tensor, "chunks chunk value"], decay: Float[Tensor, "chunks chunk key"],
            number: Int[Tensor, "chunks chunk"]) -> Float[Tensor, "chunks chunk value"]:
    """What each token reads from those before it in its chunk, and from itself."""
    read, size = (q * k).sum(-1, keepdim=True) * v, 1
    while size < q.shape[1]:
        (_, q_right), (k_left, _), (v_left, _), (left, right) = (
            t.unflatten(1, (-1, 2, size)).unbind(2) for t in (q, k, v, decay)
        )
        scores = (q_right * right.cumsum(-2).exp()) @ (k_left * _rest(left).exp()).mT
        before, here = number.unflatten(1, (-1, 2, size)).unbind(2)
        across = torch.where(here[..., :, None] == before[..., None, :], scores, 0) @ v_left
        read = read + torch.stack((torch.zeros_like(across), across), 2).flatten(1, 3)
        size *= 2
    return read
