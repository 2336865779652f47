"""Linear attention: the softmax replaced by a kernel, so that all of the past is one matrix per head.

Source: Katharopoulos et al. 2020, Transformers are RNNs (arXiv 2006.16236), equations 9 to 12 and 16 to 20.

    S_t = S_{t-1} + φ(k_t) v_t^T,   z_t = z_{t-1} + φ(k_t),   φ(x) = elu(x) + 1
    y_t = W_o concat_h( S_t^T φ(q_t) / (φ(q_t) · z_t + ε) ) + b_o

Symbols: E `dim`, H `heads`, D = E / H, S `State.total`, z `State.normaliser`, C `chunk`.
Units: `state_norm` (recorded) is the Frobenius norm of S over all heads, in units of v. The state holds E·(D + 1)
numbers, always.
Errors: `ValueError` naming the field of `Config`, or the argument of a call, that is not what was expected.
Deviations: in parallel, tokens meet in chunks of C and chunks through their sums, where the paper takes one cumulative
sum over all tokens. S and z are float32 or better whatever x is, since they grow with every token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
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

EPSILON = 1e-6


class State(NamedTuple):
    """total: sum of φ(k) v^T over the document so far. normaliser: sum of φ(k)."""

    total: Float[Tensor, "batch heads key value"]
    normaliser: Float[Tensor, "batch heads key"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """dim: E. heads: H. chunk: C, tokens that meet each other directly in the parallel form. qkv_bias, output_bias:
    whether the projections have one."""

    dim: int
    heads: int = 4
    chunk: int = 64
    qkv_bias: bool = True
    output_bias: bool = True

    def __post_init__(self) -> None:
        check_heads(self.dim, self.heads)
        check_positive(self, "chunk")

    def build(self) -> LinearAttention:
        return LinearAttention(self)


class LinearAttention(Memory):
    """Attention with the kernel elu + 1, by chunks or by steps."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, self.dim, self.heads = config, config.dim, config.heads
        self.qkv = nn.Linear(config.dim, 3 * config.dim, bias=config.qkv_bias)
        self.output = nn.Linear(config.dim, config.dim, bias=config.output_bias)

    def init_state(self, batch, *, device=None, dtype=None):
        like, width = self.qkv.weight, self.dim // self.heads
        dtype = torch.promote_types(dtype or like.dtype, torch.float32)
        total = torch.zeros(batch, self.heads, width, width, device=device or like.device, dtype=dtype)
        return State(total, total[..., 0].clone())

    def forward(self, x, state=None, *, tokens=None, reset=None, valid=None):
        self.check_input(x, tokens, reset, valid, state)
        if state is None:
            state = self.init_state(len(x), device=x.device, dtype=x.dtype)
        time = x.shape[1]
        if not time:
            return x, state
        documents = Documents(torch.zeros(len(x), dtype=torch.int64, device=x.device), reset, valid, time)
        q, k, v = self._project(documents.pack(x), state)
        observe_state_norm(documents, state.total, k, v[..., :-1])

        number, before, after = chunked(documents, self.config.chunk)
        q, k, v = (in_chunks(t, *number.shape[1:]) for t in (q, k, v))
        same = (number[..., :, None] == number[..., None, :]).tril()[:, :, None]
        written = torch.where((number == after[..., None])[:, :, None, :, None], k, 0).mT @ v
        keep = (before == after).to(written.dtype)[:, :, None, None, None]
        held, total = linear_scan(keep, written, torch.cat((state.total, state.normaliser[..., None]), -1))
        reader = torch.where((number == before[..., None])[:, :, None, :, None], q, 0)
        read = torch.where(same, q @ k.mT, 0) @ v + reader @ held
        read = read.transpose(2, 3).flatten(1, 2)[:, :time]
        y = documents.unpack(self._output(read, x.dtype))
        # A document that began at padding has no tokens yet: nothing is remembered of the one before it.
        total = torch.where((after[:, -1] == documents.last)[:, None, None, None], total, 0)
        return y, self._state(total)

    def step(self, x, state, *, tokens=None):
        self.check_input(x[:, None], None if tokens is None else tokens[:, None], state=state)
        q, k, v = self._project(x[:, None], state)
        total = torch.cat((state.total, state.normaliser[..., None]), -1) + k.mT @ v
        state = self._state(total)
        observe("state_norm", lambda: state.total.flatten(1).norm(dim=1)[:, None], ("batch", "time"))
        return self._output((q @ total).transpose(1, 2), x.dtype)[:, 0], state

    def _project(self, x: Tensor, state: State) -> tuple[Tensor, Tensor, Tensor]:
        """φ(q), φ(k), and v with a last channel of ones, so that S and z are summed as one matrix."""
        q, k, v = (split_heads(t, self.heads).to(state.total.dtype) for t in self.qkv(x).chunk(3, -1))
        return F.elu(q) + 1, F.elu(k) + 1, F.pad(v, (0, 1), value=1.0)

    def _output(self, read: Tensor, dtype: torch.dtype) -> Tensor:
        return self.output((read[..., :-1] / (read[..., -1:] + EPSILON)).flatten(2).to(dtype))

    def _state(self, total: Tensor) -> State:
        return State(total[..., :-1].clone(), total[..., -1].clone())
