"""A Logarithmic Memory Network in the place of an attention module: which weights become which.

Attention asks with the newest token's query for keys of the past; the LMN scores queries of nodes by the newest token's
key. So roles change with the names:

    attention    q_proj (own token)    k_proj (the past)    v_proj    o_proj
    LMN          key                   query                value     out_proj

- Copied, where the heads' channels add up to the model's width (`fits`): these four, biases with them (0 where the
  model has none); keys and values that heads share, once for each head that shares them. Scores are divided by
  sqrt(head_dim) on both sides.
- New: the summarizer, and all of the LMN where the channels do not add up to the width (Qwen3 with a `head_dim` of its
  own): then nothing means the same. A summarizer of one linear stage starts at the mean of its parts plus its usual
  small random start, which tells the banks apart; any other starts as it does in an LMN.
- Left out: rotation (the LMN tells places by the path through its tree) and Qwen3's norms of queries and keys.

The first token of a document, which sees itself alone, then reads what it read before; later ones do not. The
attention's own weights stay in place, idle, for `detach` and `save_pretrained`.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hmlab.hf.attention import Call, check_dropout
from hmlab.memories import lmn
from hmlab.model import parameters


def check(config: lmn.Config, attention: nn.Module, *, width: int, heads: int, kv_heads: int, head_dim: int) -> None:
    """Refuse an LMN that cannot stand there, or that would leave weights behind that it could take over."""
    if config.dim != width:
        raise ValueError(f"dim: expected {width}, the model's hidden size, got {config.dim}")
    if fits(heads, head_dim, width) and config.heads != heads:
        raise ValueError(f"heads: expected {heads}, as the model has (so that its weights mean the same), "
                         f"got {config.heads}")  # fmt: skip
    if "forward" in vars(attention):
        raise ValueError("model: expected attention that nobody has wrapped, got a forward of the module's own (models "
                         "that accelerate moves between devices cannot be served)")  # fmt: skip


def fits(heads: int, head_dim: int, width: int) -> bool:
    """Whether the attention's projections are copied."""
    return heads * head_dim == width


@torch.no_grad()
def build(config: lmn.Config, attention: nn.Module, *, heads: int, kv_heads: int, head_dim: int
          ) -> lmn.LogarithmicMemory:
    """An LMN that starts from an attention module's weights, in float32 or the default type."""
    memory = config.build()
    if fits(heads, head_dim, config.dim):
        (query, key, value), output = _projections(attention, heads, head_dim)
        for name in ("weight", "bias"):
            getattr(memory.qkv, name).copy_(torch.cat([part[name] for part in (key, query, value)]))
            getattr(memory.out_proj, name).copy_(output[name])
    summarizer = memory.summarizer
    if config.mixing == "linear" and config.depth == 1 and not config.expansion:
        mean = torch.eye(config.dim, device=summarizer.weight.device) / summarizer.kernel
        summarizer.weight += mean.repeat(summarizer.kernel, 1).to(summarizer.weight.dtype)
    return memory


def copied(memory: lmn.LogarithmicMemory, *, heads: int, kv_heads: int, head_dim: int) -> int:
    """Parameters in projections that started from the attention's, biases of 0 among them."""
    return parameters(memory.qkv) + parameters(memory.out_proj) if fits(heads, head_dim, memory.dim) else 0


def place(attention: nn.Module) -> None:
    """Let calls of an attention module go to the LMN below it, `hierarchy`."""
    attention.forward = MethodType(forward, attention)


def forward(self: nn.Module, hidden_states: Float[Tensor, "batch time dim"], *args: Any, harmony: Call, **kwargs: Any
            ) -> tuple[Float[Tensor, "batch time dim"], None]:
    """What an attention module computes then. Looks at the hidden states and the `Call` alone."""
    if self.training:
        check_dropout(self.config.attention_dropout)
    layer = None if harmony.cache is None else harmony.cache.layers[self.layer_idx]
    state = None if layer is None else layer.state
    if state is not None and hidden_states.shape[1] == 1 and harmony.valid is None and harmony.reset is None:
        y, state = self.hierarchy.step(hidden_states[:, 0], state)
        y = y[:, None]
    else:
        y, state = self.hierarchy(hidden_states, state, reset=harmony.reset, valid=harmony.valid)
    if layer is not None:
        layer.read(hidden_states.shape[1])
        layer.state = state
    return y, None


def _projections(attention: nn.Module, heads: int, head_dim: int
                 ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """Weights and biases of queries, keys and values, a part for every head; and of the output."""
    if hasattr(attention, "query_key_value"):  # GPT-NeoX: head by head, q, k and v of each
        fused = attention.query_key_value
        split = {name: t.unflatten(0, (heads, 3, head_dim)).unbind(1) for name, t in _tensors(fused).items()}
        parts = [{name: t[n].flatten(0, 1) for name, t in split.items()} for n in range(3)]
        return parts, _tensors(attention.dense)
    parts = [_tensors(module) for module in (attention.q_proj, attention.k_proj, attention.v_proj)]
    for part in parts:
        for name, t in part.items():
            t = t.unflatten(0, (-1, head_dim))
            part[name] = t.repeat_interleave(heads // len(t), 0).flatten(0, 1)
    return parts, _tensors(attention.o_proj if hasattr(attention, "o_proj") else attention.out_proj)


def _tensors(linear: nn.Linear) -> dict[str, Tensor]:
    bias = linear.weight.new_zeros(len(linear.weight)) if linear.bias is None else linear.bias
    return {"weight": linear.weight, "bias": bias}
