"""Full causal attention with a cache of all keys and values.

Source: Vaswani et al. 2017, Attention Is All You Need (arXiv 1706.03762); rotary positions: Su et al. 2021 (RoFormer,
arXiv 2104.09864).

    q_t, k_t, v_t = split(W_qkv x_t + b),   q, k rotated by the position in the document
    y_t = W_o concat_h( Σ_{j ≤ t} softmax_j(c · q_t · k_j) v_j ) + b_o,   c = D^-0.5 (scale="head") or E^-0.5 ("dim")

Symbols: E `dim`, H `heads`, D = E / H, W_qkv `qkv`, W_o `output`.
Units: `attention` (recorded) is a share of 1. A state of t tokens holds 2·t·E numbers and a counter.
Errors: `ValueError` naming the field of `Config`, or the argument of a call, that is not what was expected.
Deviations: decoder only, one document may follow another in a row; learned absolute positions belong to the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from hmlab.layers import Documents, check_heads, merge_heads, observe_attention, rotate, split_heads
from hmlab.memory import Memory


class State(NamedTuple):
    """keys, values: one slot per token consumed; the last `position` of a row are its current document's, slots
    before them are never read. position: tokens consumed in the current document."""

    keys: Float[Tensor, "batch heads slots head_dim"]
    values: Float[Tensor, "batch heads slots head_dim"]
    position: Int[Tensor, "batch"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """dim: E. heads: H. rotary, rotary_base: rotary positions and their slowest wavelength / 2π. scale: of the scores,
    by the width of a head or of x. qkv_bias, output_bias: whether the projections have one."""

    dim: int
    heads: int = 4
    rotary: bool = True
    rotary_base: float = 10000.0
    scale: Literal["head", "dim"] = "head"
    qkv_bias: bool = True
    output_bias: bool = True

    def __post_init__(self) -> None:
        check_heads(self.dim, self.heads, rotary=self.rotary)
        if self.rotary_base <= 1:
            raise ValueError(f"rotary_base: expected more than 1, got {self.rotary_base}")
        if self.scale not in ("head", "dim"):
            raise ValueError(f"scale: expected head or dim, got {self.scale!r}")

    def build(self) -> Attention:
        return Attention(self)


class Attention(Memory):
    """Every token attends to itself and to all tokens of its document before it."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, self.dim, self.heads = config, config.dim, config.heads
        self.scale = (config.dim if config.scale == "dim" else config.dim // config.heads) ** -0.5
        self.qkv = nn.Linear(config.dim, 3 * config.dim, bias=config.qkv_bias)
        self.output = nn.Linear(config.dim, config.dim, bias=config.output_bias)

    def init_state(self, batch, *, device=None, dtype=None):
        like = self.qkv.weight
        empty = like.new_zeros(batch, self.heads, 0, self.dim // self.heads, device=device, dtype=dtype)
        return State(empty, empty.clone(), torch.zeros(batch, dtype=torch.int64, device=empty.device))

    def forward(self, x, state=None, *, tokens=None, reset=None, valid=None):
        self.check_input(x, tokens, reset, valid, state)
        if state is None:
            state = self.init_state(len(x), device=x.device, dtype=x.dtype)
        if not x.shape[1]:
            return x, state
        documents = Documents(state.position, reset, valid, x.shape[1])
        q, k, v = (split_heads(t, self.heads) for t in self.qkv(documents.pack(x)).chunk(3, -1))
        if self.config.rotary:
            q, k = (rotate(t, documents.position, self.config.rotary_base) for t in (q, k))
        held = state.keys.shape[2]
        keys, values = torch.cat((state.keys.to(k.dtype), k), 2), torch.cat((state.values.to(v.dtype), v), 2)
        # Packed rows end in padding, which causality alone hides: a mask is for what lies before.
        mask = self._mask(documents, held) if held or reset is not None else None
        y = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, is_causal=mask is None, scale=self.scale)
        observe_attention(lambda: q @ keys.mT * self.scale, lambda: self._mask(documents, held), documents,
                          lambda: documents.times(held))
        y = documents.unpack(self.output(merge_heads(y)))
        slots = keys.shape[2]
        if valid is not None:
            keys, values = documents.latest(keys, slots), documents.latest(values, slots)
        return y, State(keys, values, documents.end)

    def _mask(self, documents: Documents, held: int) -> Tensor:
        key_number = torch.cat((documents.held(held), documents.number), 1)
        same = documents.number[:, :, None] == key_number[:, None]
        return (same & torch.ones_like(same[0]).tril(held))[:, None]
