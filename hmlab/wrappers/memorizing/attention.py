"""What transformers calls in the layer that looks: attention, and the hooks that bring it what it needs."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .lookup import Lookup, State

NAME = "hmlab-memorizing"


class Reading:
    """What the layer is told of one segment, and what it tells: written, the segment's keys and values. lookup None:
    somebody uses the backbone by itself."""

    def __init__(self, lookup: Lookup | None = None, state: State | None = None,
                 valid: Bool[Tensor, "batch time"] | None = None) -> None:
        self.lookup, self.state, self.valid = lookup, state, valid
        self.implementation = ""
        self.rotation: tuple[Tensor, Tensor] | None = None
        self.written: tuple[Tensor, Tensor] | None = None


def attention(
    module: nn.Module,
    query: Float[Tensor, "batch heads time head_dim"],
    key: Float[Tensor, "batch kv_heads all head_dim"],
    value: Float[Tensor, "batch kv_heads all head_dim"],
    attention_mask: Any,
    *given: Any,
    memorizing: Reading,
    **named: Any,
) -> tuple[Float[Tensor, "batch time heads head_dim"], Any]:
    """Registered as `AttentionInterface`: the attention that the model would have, and the memory beside it."""
    eager = sys.modules[type(module).__module__].eager_attention_forward
    usual = ALL_ATTENTION_FUNCTIONS.get_interface(memorizing.implementation, eager)
    local, weights = usual(module, query, key, value, attention_mask, *given, **named)
    if memorizing.lookup is None:
        return local, weights
    q, k = (F.normalize(unrotated(x, memorizing.rotation), dim=-1) for x in (query, key))
    memorizing.written = k.detach(), value.detach()
    return memorizing.lookup(q.transpose(1, 2), local, memorizing.state, memorizing.valid), weights


def tell(config: Any, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Forward pre-hook of the layer that looks: which attention the model has, and the rotation, to be taken back."""
    reading = kwargs.get("memorizing", Reading())
    reading.implementation, reading.rotation = config._attn_implementation, kwargs.get("position_embeddings")
    return args, kwargs | {"memorizing": reading}


def leave_alone(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Forward pre-hook of the others."""
    return args, {name: value for name, value in kwargs.items() if name != "memorizing"}


def unrotated(x: Float[Tensor, "batch heads time head_dim"], rotation: tuple[Tensor, Tensor] | None
               ) -> Float[Tensor, "batch heads time head_dim"]:
    """What was there before rotation (`hmlab.hf.attention`): turned back, and the scale taken off."""
    if rotation is None:
        return x
    cos, sin = (wave[:, None, :, : wave.shape[-1] // 2].float() for wave in rotation)
    half = cos.shape[-1]
    a, b, rest = x.split((half, half, x.shape[-1] - 2 * half), -1)
    norm = cos.square() + sin.square()
    return torch.cat(((a * cos + b * sin) / norm, (b * cos - a * sin) / norm, rest), -1).to(x.dtype)


AttentionInterface.register(NAME, attention)
