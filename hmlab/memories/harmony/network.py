"""HARMONY as a memory: projections with normalised queries and keys round the hierarchy."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from hmlab.layers import check_heads, rotation
from hmlab.memories.harmony.config import HierarchyConfig
from hmlab.memories.harmony.hierarchy import Hierarchy
from hmlab.memory import Memory


@dataclass(frozen=True, kw_only=True)
class Config(HierarchyConfig):
    """dim: E. heads: of queries. kv_heads: of keys and values, a divisor of heads; None: as many. rotary_base: slowest
    wavelength / 2π; None: no positions. bias: of the projections."""

    dim: int
    heads: int = 4
    kv_heads: int | None = None
    rotary_base: float | None = 10000.0
    bias: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_heads(self.dim, self.heads, rotary=self.rotary_base is not None)
        if self.kv_heads is not None and (self.kv_heads < 1 or self.heads % self.kv_heads):
            raise ValueError(f"kv_heads: expected a divisor of heads ({self.heads}), got {self.kv_heads}")
        if self.rotary_base is not None and self.rotary_base <= 1:
            raise ValueError(f"rotary_base: expected more than 1 or None, got {self.rotary_base}")

    def build(self) -> Harmony:
        return Harmony(self)


class Harmony(Memory):
    """Attention whose past is a window, compressed segments behind it, and hashed addressing into them."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, self.dim = config, config.dim
        kv_heads, head_dim = config.kv_heads or config.heads, config.dim // config.heads
        self.query = nn.Linear(config.dim, config.dim, bias=config.bias)
        self.key_value = nn.Linear(config.dim, 2 * kv_heads * head_dim, bias=config.bias)
        self.output = nn.Linear(config.dim, config.dim, bias=config.bias)
        # Scores of random directions then have a variance of 1.
        self.log_scale = nn.Parameter(torch.full((kv_heads,), math.log(head_dim) / 2))
        self.hierarchy = Hierarchy(config, heads=config.heads, kv_heads=kv_heads, head_dim=head_dim)

    def init_state(self, batch, *, device=None, dtype=None):
        weight = self.query.weight
        return self.hierarchy.init_state(batch, device=device or weight.device, dtype=dtype or weight.dtype)

    def reserve(self, state, tokens):
        return self.hierarchy.reserve(state, tokens)

    def forward(self, x, state=None, *, tokens=None, reset=None, valid=None):
        self.check_input(x, tokens, reset, valid, state)
        if valid is not None:  # whatever it holds, NaN even, must not reach the weights' gradients
            x = torch.where(valid[..., None], x, 0)
        q, k, v = self.project(x)
        y, state = self.hierarchy(q, k, v, state, tokens=tokens, reset=reset, valid=valid, rotate=self.rotate,
                                  norm=self.log_scale.exp())  # fmt: skip
        y = self.output(y.flatten(2))
        return y if valid is None else torch.where(valid[..., None], y, 0), state

    def project(self, x: Float[Tensor, "batch time dim"]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries `[batch, time, heads, head_dim]`, keys and values of the key heads; what the hierarchy is given."""
        h = self.hierarchy
        q = F.normalize(self.query(x).unflatten(-1, (h.heads, -1)), dim=-1)
        q = q * self.log_scale.exp().repeat_interleave(h.heads // h.kv_heads)[:, None]
        k, v = self.key_value(x).unflatten(-1, (2, h.kv_heads, -1)).unbind(2)
        return q.to(k.dtype), F.normalize(k, dim=-1), v

    def rotate(self, x: Float[Tensor, "batch n heads dim"], position: Float[Tensor, "batch n heads_or_1"]) -> Tensor:
        """The rotary phase of positions; x itself without them."""
        return rotation(x, position, self.config.rotary_base) if self.config.rotary_base else x
