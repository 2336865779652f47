"""What HMT asks of a causal language model: embed, read embeddings inside a segment, and turn hidden states to logits.

    reader = reader_of(model)
    hidden, past = reader.read(x, valid, opening, past)      # x [batch, time, width] -> the same, and where it ended

Three kinds: models of transformers that attend (their keys and values are the past), the Mamba family (states of its
layers) and `hmlab.model.LanguageModel`. A past is a tree of tensors, batch first, and a value. Rows stand at their own
places: padding may lie anywhere, `opening` rows forget what they have read before, `closing` rows need no past later.

Positions count a segment's own places, from 0, and are given to the model explicitly.
Errors: ValueError for models that cannot be served so.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hmlab.model import LanguageModel

# What some models do to the logits behind their head; a wrapper that calls the head alone would leave it out.
_BEHIND_THE_HEAD = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")


@runtime_checkable
class Reader(Protocol):
    """width: of embeddings and hidden states. weight: of the embedding, which tells device and type."""

    width: int

    @property
    def weight(self) -> Tensor: ...

    def embed(self, ids: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape width"]: ...

    def head(self) -> nn.Module: ...

    def read(self, x: Float[Tensor, "batch time width"], valid: Bool[Tensor, "batch time"] | None = None,
             opening: Bool[Tensor, "batch"] | None = None, closing: Bool[Tensor, "batch"] | None = None,
             past: Any = None, keep: bool = False) -> tuple[Float[Tensor, "batch time width"], Any]:
        """Read on. valid, opening, closing: None for all of it. keep: whether the past is wanted afterwards."""

    def empty(self, batch: int) -> Any:
        """The past at the beginning of a segment."""


def reader_of(model: nn.Module, places: int) -> Reader:
    """The reader for a model, which will read `places` positions at most. Raises ValueError if there is none."""
    if getattr(getattr(model, "config", None), "model_type", None) == "hmlab":
        from hmlab.hf import as_language_model

        model = as_language_model(model)
    if isinstance(model, LanguageModel):
        if 0 < model.config.context < places:
            raise ValueError(_too_long(places, model.config.context))
        return NativeReader(model)
    if hasattr(model, "peft_config"):
        if any(config.is_prompt_learning for config in model.peft_config.values()):
            raise ValueError("backbone: expected adapters inside the layers (such as LoRA), got prompt learning, whose "
                             "virtual tokens a wrapper that gives embeddings would leave out")  # fmt: skip
        model = model.get_base_model()
    if not all(hasattr(model, name) for name in ("get_input_embeddings", "get_output_embeddings", "base_model")):
        raise ValueError(f"backbone: expected a causal language model of transformers or hmlab's LanguageModel, "
                         f"got {type(model).__name__}")  # fmt: skip
    if any(hasattr(module, "_hmlab_attachment") for module in model.modules()):
        raise ValueError("backbone: expected the model's own attention (hf.detach it first), got memories in its place")
    if model.get_output_embeddings() is None:
        raise ValueError(f"backbone: expected a model with a head, got {type(model).__name__} without any")
    changed = [name for name in _BEHIND_THE_HEAD if getattr(model.config, name, None) not in (None, 1, 1.0)]
    if changed or not _head_is_all(model):
        raise ValueError(f"backbone: expected logits as the head gives them, got {type(model).__name__}, which does "
                         f"more to them {changed or ''}")  # fmt: skip
    from transformers import DynamicCache
    from transformers.cache_utils import LinearAttentionCacheLayerMixin

    layers = DynamicCache(config=model.config).layers
    recurrent = {isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers}
    if recurrent == {True, False}:
        raise ValueError(f"backbone: expected layers of one kind, got {type(model).__name__}, which mixes attention "
                         "and recurrence")  # fmt: skip
    if recurrent == {True}:
        return RecurrentReader(model)
    if "position_ids" not in inspect.signature(model.base_model.forward).parameters:
        raise ValueError(f"backbone: expected a model that takes position_ids, got {type(model).__name__}")
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and longest < places:
        raise ValueError(_too_long(places, longest))
    return AttentionReader(model)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode, and as it was afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@torch.no_grad()
def _head_is_all(model: Any) -> bool:
    """Whether the model's logits are its head's of its last hidden state: of one token, it costs as little."""
    if model.get_input_embeddings().weight.device.type == "meta":
        return True
    ids = torch.zeros(1, 1, dtype=torch.int64, device=model.get_input_embeddings().weight.device)
    with evaluating(model):
        alone = model.get_output_embeddings()(model.base_model(ids)[0])
        return torch.allclose(model(ids).logits.float(), alone.float(), rtol=1e-3, atol=1e-5)


def _too_long(places: int, context: int) -> str:
    return (f"segment_length: expected segment_length + sensory + 2 memories <= {context}, the backbone's positions, "
            f"got {places}")  # fmt: skip


class NativeReader:
    """`hmlab.model.LanguageModel`, whose memories take padding and the beginnings of documents as they are."""

    def __init__(self, model: LanguageModel) -> None:
        self.model, self.width = model, model.config.dim

    @property
    def weight(self) -> Tensor:
        return self.model.embedding.weight

    def embed(self, ids: Tensor) -> Tensor:
        return self.model.embedding(ids)

    def head(self) -> nn.Module:
        return self.model.head

    def read(self, x: Tensor, valid: Tensor | None = None, opening: Tensor | None = None,
             closing: Tensor | None = None, past: Any = None, keep: bool = False) -> tuple[Tensor, Any]:
        if opening is None:
            past, reset = None, None
        else:
            reset = x.new_zeros(x.shape[:2], dtype=torch.bool)
            reset[:, 0] = opening
        hidden, past = self.model.hidden(x, past, reset=reset, valid=valid)
        return hidden, past if keep else None

    def empty(self, batch: int) -> Any:
        return self.model.init_state(batch)


class _Transformer:
    """What both kinds of transformers' models share."""

    def __init__(self, model: Any) -> None:
        self.model, self.width = model, model.get_input_embeddings().weight.shape[-1]
        self._blank: Any = None

    @property
    def weight(self) -> Tensor:
        return self.model.get_input_embeddings().weight

    def empty(self, batch: int) -> Any:
        if self._blank is None:
            # One token tells the shapes.
            x = self.weight.new_zeros(1, 1, self.width)
            with torch.no_grad(), evaluating(self.model):
                _, past = self.read(x, keep=True)
            self._blank = pytree.tree_map(lambda leaf: torch.zeros_like(leaf, device="meta"), past)

        def blank(leaf: Tensor) -> Tensor:
            shape = [batch, *leaf.shape[1:]]
            if self.grows and leaf.ndim == 4:
                shape[2] = 0
            return torch.zeros(shape, dtype=leaf.dtype, device=self.weight.device)

        return pytree.tree_map(blank, self._blank)

    def embed(self, ids: Tensor) -> Tensor:
        # Called as the module it is, so that adapters on it and scaling inside it count.
        return self.model.get_input_embeddings()(ids)

    def head(self) -> nn.Module:
        return self.model.get_output_embeddings()

    grows: bool  # whether the past has a column for each token


class Columns(NamedTuple):
    """Keys and values of each layer `[batch, heads, columns, dim]`, each row's last `length` of them held: what comes
    next stands right behind, so that layers that see a window of columns see as many tokens."""

    layers: tuple[tuple[Tensor, Tensor], ...]
    length: Int[Tensor, "batch"]


class AttentionReader(_Transformer):
    """A model that attends. Rows are packed together, right behind what they have read."""

    grows = True

    def read(self, x: Tensor, valid: Tensor | None = None, opening: Tensor | None = None,
             closing: Tensor | None = None, past: Columns | None = None, keep: bool = False
             ) -> tuple[Tensor, Columns | None]:
        batch, time = x.shape[:2]
        length = torch.zeros(batch, dtype=torch.int64, device=x.device)
        if past is not None and opening is not None:
            length = past.length.masked_fill(opening, 0)
        held = int(length.max()) if past is not None else 0
        if valid is not None and valid.all():
            valid = None
        if valid is None:
            packed, count = x, torch.full_like(length, time)
        else:
            order, count = torch.argsort(~valid, dim=1, stable=True), valid.sum(1)
            packed = _columns(x, order[:, : max(int(count.max()), 1)])
        width = packed.shape[1]
        # Rows without a token here read one that nobody looks at, since a query must see something.
        mask = _held(length, count.clamp(min=1), held, width)
        cache = self._cache(past, held) if held or keep else None
        out = self.model.base_model(
            inputs_embeds=packed, attention_mask=None if mask.all() else mask.long(),
            position_ids=length[:, None] + torch.arange(width, device=x.device), past_key_values=cache,
            use_cache=cache is not None,
        )  # fmt: skip
        hidden = out.last_hidden_state
        if valid is not None:
            hidden = _columns(hidden, (valid.cumsum(1) - 1).clamp(0)).where(valid[..., None], 0)
        if not keep:
            return hidden, None
        if not cache.layers:
            raise ValueError("backbone: expected one that keeps its past where a text ends inside a segment, got one "
                             "under its own gradient checkpointing (HMT.Config(checkpoint='segments') is another "
                             "way)")  # fmt: skip
        return hidden, self._kept(cache, length, count, closing, held, width)

    def _cache(self, past: Columns | None, held: int) -> Any:
        from transformers import DynamicCache

        # Not by the model's configuration: layers with sliding windows would drop columns that masks count on.
        cache = DynamicCache()
        for number, (k, v) in enumerate(past.layers if held else ()):
            cache.update(*(x[:, :, x.shape[2] - held :] for x in (k, v)), number)
        return cache

    def _kept(self, cache: Any, length: Tensor, count: Tensor, closing: Tensor | None, held: int, width: int
              ) -> Columns:
        mask, length = _held(length, count, held, width), length + count
        if closing is not None:
            length = length.masked_fill(closing, 0)
        first = held + width - int(length.max())
        order = torch.argsort(mask.int(), dim=1, stable=True)[:, first:]
        straight = bool((order == torch.arange(first, held + width, device=order.device)).all())

        def kept(x: Tensor) -> Tensor:
            if straight:
                return x[:, :, first:]
            return x.gather(2, order[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))

        return Columns(tuple((kept(layer.keys), kept(layer.values)) for layer in cache.layers), length)


class RecurrentReader(_Transformer):
    """The Mamba family: each layer's convolution and recurrent states are the past.

    A segment is read at once. What comes behind is read token by token, since these models of transformers begin the
    recurrence anew when they are given several; and rows at different places are read one by one, since padding would
    move the states on.
    """

    grows = False

    def read(self, x: Tensor, valid: Tensor | None = None, opening: Tensor | None = None,
             closing: Tensor | None = None, past: tuple | None = None, keep: bool = False
             ) -> tuple[Tensor, tuple | None]:
        batch = len(x)
        beginning = opening is None or bool(opening.all())
        together = (valid is None or bool((valid == valid[:1]).all())) and (beginning or not bool(opening.any()))
        if together:
            at = None if valid is None else valid[0]
            here = x if at is None else x[:, at]
            if not here.shape[1]:
                return torch.zeros_like(x), past if keep else None
            read, past = self._row(here, None if beginning else past, keep)
            if at is None:
                return read, past
            hidden = torch.zeros_like(x)
            hidden[:, at] = read
            return hidden, past

        def row(tree: Any, n: int) -> Any:
            return None if tree is None else pytree.tree_map(lambda leaf: leaf[n : n + 1], tree)

        rows = [self.read(x[n : n + 1], row(valid, n), row(opening, n), None, row(past, n), keep)
                for n in range(batch)]  # fmt: skip
        if not keep:
            return torch.cat([hidden for hidden, _ in rows]), None
        blank = self.empty(1)
        pasts = [blank if row is None else row for _, row in rows]
        return torch.cat([hidden for hidden, _ in rows]), pytree.tree_map(lambda *leaves: torch.cat(leaves), *pasts)

    def _row(self, x: Tensor, past: tuple | None, keep: bool) -> tuple[Tensor, tuple | None]:
        from transformers import DynamicCache

        if past is None and not keep:
            return self.model.base_model(inputs_embeds=x, use_cache=False).last_hidden_state, None
        if past is not None and torch.is_grad_enabled():
            raise ValueError("state: expected whole segments where gradients are wanted (a recurrent backbone goes on "
                             "inside a segment without them only), got a segment under way")  # fmt: skip
        cache = DynamicCache(config=self.model.config)
        if past is not None:
            for number, (convolution, recurrent) in enumerate(past):
                cache.update_conv_state(convolution.clone(), number)
                cache.update_recurrent_state(recurrent, number)
        pieces = (x,) if past is None else x.split(1, 1)
        read = [self.model.base_model(inputs_embeds=piece, cache_params=cache, use_cache=True).last_hidden_state
                for piece in pieces]  # fmt: skip
        layers = tuple((layer.conv_states[0], layer.recurrent_states[0]) for layer in cache.layers)
        return torch.cat(read, 1), layers if keep else None


def _held(length: Int[Tensor, "batch"], count: Int[Tensor, "batch"], held: int, width: int
          ) -> Bool[Tensor, "batch columns"]:
    """Which of `held` columns and `width` behind them hold a token: the last `length` of the former, the first `count`
    of the latter."""
    at = torch.arange(held + width, device=length.device)
    return torch.where(at < held, at >= held - length[:, None], at - held < count[:, None])


def _columns(x: Float[Tensor, "batch time width"], index: Int[Tensor, "batch chosen"]
             ) -> Float[Tensor, "batch chosen width"]:
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))
