"""What transformers calls in an attached model: attention, and the hooks that bring it what it needs.

transformers gives an attention function rotated queries and keys, and neither the cache nor the token ids. So

- a hook before the decoder makes the cache ours, where a layer is, and adds one argument, a `Call`, which the layers
  pass on.
- a hook before each attention with a hierarchy hands it cos = 1 and sin = 0. It computes q and k as ever, with its own
  projections, norms and biases, and leaves them unrotated, to the bit; the hierarchy rotates what it reads. A
  configuration of its own, a copy, names our attention function.
- a hook before each attention that stays takes the `Call` away, and nothing else: model, mask and rotation are its own.

Rotation by position p (Su et al. 2021, RoFormer, in the halves' order of Llama), over the first 2F channels:

    [a, b] -> s · [a cos(pω) − b sin(pω), b cos(pω) + a sin(pω)]      ω = `inv_freq` [F], s = `attention_scaling`

Angles are computed in float64: positions of slots are means, not integers, and in float32 an angle at 10^6 is off by
up to 0.03. Positions count the tokens of the document and no padding.
Errors: `ValueError` naming the argument that cannot be served.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache
from transformers.cache_utils import Cache

from hmlab.hf.cache import HierarchyLayer, adopt
from hmlab.memory import document_positions

NAME = "hmlab-harmony"


class Call(NamedTuple):
    """What the hierarchies must know of a call of the model. Of what is None there is none. valid: which of the new
    tokens are not padding; None if all are."""

    cache: Cache | None
    valid: Bool[Tensor, "batch time"] | None
    tokens: Int[Tensor, "batch time"] | None
    reset: Bool[Tensor, "batch time"] | None
    rotate: Callable | None


def attention(
    module: nn.Module,
    query: Float[Tensor, "batch heads time head_dim"],
    key: Float[Tensor, "batch kv_heads time head_dim"],
    value: Float[Tensor, "batch kv_heads time head_dim"],
    attention_mask: Any,
    scaling: float,
    dropout: float = 0.0,
    *,
    harmony: Call,
    **kwargs: Any,
) -> tuple[Float[Tensor, "batch time heads head_dim"], None]:
    """Registered as `AttentionInterface`. query, key: unrotated, of the new tokens, as are values. attention_mask: of
    the layers that attend to all of the past, not looked at."""
    check_dropout(dropout)
    q, k, v = (rearrange(x, "batch heads time dim -> batch time heads dim") for x in (query * scaling, key, value))
    layer = None if harmony.cache is None else harmony.cache.layers[module.layer_idx]
    out, state = module.hierarchy(q, k, v, None if layer is None else layer.state, tokens=harmony.tokens,
                                  reset=harmony.reset, valid=harmony.valid, rotate=harmony.rotate)  # fmt: skip
    if layer is not None:
        layer.state = state
    return out, None


def check_dropout(dropout: float) -> None:
    """Refuse attention dropout."""
    if dropout:
        raise ValueError(f"attention_dropout: expected 0, a hierarchy has no attention weights to drop, got {dropout}")


def own_implementation(module: nn.Module, name: str) -> None:
    """Let one attention module call the attention that is registered under a name, by a configuration of its own."""
    module.config = copy.copy(module.config)
    module.config._attn_implementation = name


def rotate(rotary: nn.Module, x: Float[Tensor, "batch n heads head_dim"], position: Float[Tensor, "batch n #heads"]
           ) -> Float[Tensor, "batch n heads head_dim"]:
    """Turn x as the model's rotary embedding would turn it at that position, which need not be an integer."""
    angle = position.double()[..., None] * rotary.inv_freq.to(position.device, torch.float64)
    cos, sin = ((wave(angle) * rotary.attention_scaling).to(x.dtype) for wave in (torch.cos, torch.sin))
    half = cos.shape[-1]
    a, b, rest = x.split((half, half, x.shape[-1] - 2 * half), -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), -1)


def leave_unrotated(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Forward pre-hook of an attention with a hierarchy: rotation by nothing."""
    if kwargs.get("position_embeddings") is None:  # a family whose positions are in its embeddings
        return args, kwargs
    cos, sin = kwargs["position_embeddings"]
    return args, kwargs | {"position_embeddings": (torch.ones_like(cos), torch.zeros_like(sin))}


def leave_alone(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Forward pre-hook of an attention that stays: it is called as it would be without hierarchies elsewhere."""
    return args, {name: value for name, value in kwargs.items() if name != "harmony"}


def prepare(decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Forward pre-hook of the decoder: refuse what cannot be served, make the cache ours, add the `Call`."""
    kwargs = dict(zip(_parameters(type(decoder)), args, strict=False)) | kwargs
    tokens, attention_mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
    x = kwargs.get("inputs_embeds") if tokens is None else tokens
    if x is None:
        return (), kwargs  # the model says what is missing
    if kwargs.get("output_attentions"):
        raise ValueError("output_attentions: expected False, a hierarchy has no map of all weights "
                         "(hmlab.record.record shows what it reads)")  # fmt: skip
    if kwargs.get("is_causal") is False:
        raise ValueError("is_causal: expected True, a hierarchy reads the past only, got False")
    cache = _cache(decoder, kwargs)
    time, seen = x.shape[1], 0 if cache is None else cache.get_seq_length()
    if attention_mask is not None and getattr(attention_mask, "shape", None) != (len(x), seen + time):
        got = list(attention_mask.shape) if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
        raise ValueError(f"attention_mask: expected [{len(x)}, {seen + time}], False at padding, past tokens included "
                         f"(a mask of pairs cannot be served), got {got}")  # fmt: skip
    rotary, reset = getattr(decoder, "rotary_emb", None), None
    if rotary is not None:
        if kwargs.get("position_ids") is not None:
            reset = documents(kwargs["position_ids"].expand(len(x), -1), attention_mask, seen)
        elif attention_mask is not None:
            _check_padding(attention_mask.bool())
    for layer in cache.layers if cache is not None else ():
        if isinstance(layer, HierarchyLayer):
            layer.announce(time)
    valid = None if attention_mask is None else attention_mask[:, seen:].to(x.device, torch.bool)
    valid = None if valid is None or valid.all() else valid
    turn = None if rotary is None else functools.partial(rotate, rotary)
    return (), kwargs | {"past_key_values": cache, "harmony": Call(cache, valid, tokens, reset, turn)}


def _cache(decoder: nn.Module, kwargs: dict[str, Any]) -> Cache | None:
    """The cache of the call: the one given, or, if one is wanted, the one the model would make."""
    cache, use = kwargs.get("past_key_values"), kwargs.get("use_cache")
    if decoder.training and decoder.gradient_checkpointing:
        # Layers are run twice then. transformers leaves out a cache of its own making as well.
        if cache is not None:
            raise ValueError("past_key_values: expected None under gradient checkpointing, got a cache")
        return None
    if cache is None and (decoder.config.use_cache if use is None else use):
        cache = DynamicCache()
    chosen = decoder._hmlab_attachment.layers
    return None if cache is None else adopt(cache, [number in chosen for number in range(len(decoder.layers))])


def _check_padding(valid: Bool[Tensor, "batch all"]) -> None:
    """Refuse gaps between tokens where the model numbers them, padding included: a slot's tokens follow one another."""
    if ((valid[:, 1:] & ~valid[:, :-1]).sum(1) + valid[:, 0] > 1).any():
        raise ValueError("attention_mask: expected padding before or behind the tokens, got some between them "
                         "(with position_ids that do not count it, it may be there)")  # fmt: skip


def documents(position: Int[Tensor, "batch time"], attention_mask: Tensor | None, seen: int
               ) -> Bool[Tensor, "batch time"] | None:
    """Where documents begin behind others in a packed row: where the position is 0 again; None if nowhere.

    Raises ValueError if positions run otherwise than on by one.
    """
    valid = torch.ones_like(position, dtype=torch.bool) if attention_mask is None else attention_mask[:, seen:].bool()
    reset = (position == 0) & valid
    before = position.gather(1, valid.int().argmax(1, keepdim=True))[:, 0]
    counted, _ = document_positions(before, reset, valid, position.shape[1])
    if ((counted - 1 != position) & valid).any():
        raise ValueError("position_ids: expected each one behind the last, or 0 where a document begins, "
                         "got others")  # fmt: skip
    if not seen:  # nothing lies before a row's first token
        reset = reset & (valid.cumsum(1) > 1)
    return reset if reset.any() else None


@functools.cache
def _parameters(decoder: type) -> tuple[str, ...]:
    return tuple(inspect.signature(decoder.forward).parameters)[1:]


AttentionInterface.register(NAME, attention)
