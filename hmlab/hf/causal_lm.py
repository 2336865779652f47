"""Every memory of hmlab as an `AutoModelForCausalLM` of transformers.

    model = as_causal_lm(language_model)       # or a `hmlab.model.Config`, or a checkpoint: "logmem-32"
    model.save_pretrained(folder)              # safetensors and config.json
    AutoModelForCausalLM.from_pretrained(folder)          # where `hmlab.hf` has been imported
    as_language_model(model)                   # the LanguageModel inside, the same object

`generate()` streams: the prompt in parallel (in pieces with `prefill_chunk_size`), then one `step` of the memories per
token; their states are the cache, never computed again, and beams choose rows by each memory's own `reorder`.

Positions are the memories' own: they count the tokens of a document and no padding. attention_mask [batch, past + time]
may be False anywhere, on either side or between tokens. position_ids, if given, must run on by one or begin again at 0,
which says where a packed row's next document begins; what they count from is not looked at.

loss: transformers' (`loss_function`, shifted; `num_items_in_batch`). In training mode, plus what the memories ask for
besides (`hmlab.auxiliary`), per target as in `hmlab.train`, unless somebody is collecting that outside.

Limits: no weights but safetensors; head and embedding are not tied; no maps of attention or hidden states of layers
(`hmlab.record.record` shows what memories observe); no decoding that takes tokens back (assisted generation);
activation checkpointing only for memories that ask for no loss of their own.
Errors: `ValueError` by the argument's name.
"""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from hmlab import auxiliary, pretrained
from hmlab.hf.attention import documents
from hmlab.hf.cache import HierarchyLayer
from hmlab.hf.configuration import HmlabConfig
from hmlab.model import Config, LanguageModel, State


class ModelLayer(HierarchyLayer):
    """The state of a whole language model, as the one layer of a `DynamicCache`."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = weakref.ref(model)  # a copy of a cache is no copy of the model

    def advance(self, state: State, tokens: int) -> None:
        """The state after as many tokens more."""
        self.state, self._tokens, self.is_initialized = state, self._tokens + tokens, True

    def reorder_cache(self, beam_idx: Int[Tensor, "rows"]) -> None:
        if self.state is not None:
            position, layers = self.state
            blocks = zip(self.model().blocks, layers, strict=True)
            layers = tuple(block.memory.reorder(state, beam_idx) for block, state in blocks)
            self.state = State(position.index_select(0, beam_idx.to(position.device)), layers)


class HmlabForCausalLM(PreTrainedModel, GenerationMixin):
    """A `LanguageModel` with the interface of transformers. model: one that exists, of the configuration's shape."""

    config_class = HmlabConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True

    def __init__(self, config: HmlabConfig, model: LanguageModel | None = None) -> None:
        super().__init__(config)
        self.model = config.model_config().build() if model is None else model
        self.gradient_checkpointing = False
        # Its weights are what the memories' constructors made them.
        self._is_hf_initialized = not any(p.is_meta for p in self.parameters())
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *given: Any, use_safetensors: bool | None = None,
                        **named: Any) -> Any:
        """As in transformers. Weights that are not in safetensors are not read."""
        if use_safetensors is False:
            raise ValueError("use_safetensors: expected True, weights in pickles are not read, got False")
        return super().from_pretrained(pretrained_model_name_or_path, *given, use_safetensors=True, **named)

    @can_return_tuple
    def forward(
        self,
        input_ids: Int[Tensor, "batch time"] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Int[Tensor, "_ time"] | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Float[Tensor, "batch time dim"] | None = None,
        labels: Int[Tensor, "batch time"] | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of the next token after each, or after the last `logits_to_keep`, 0 for all.

        inputs_embeds: in the place of ids, for memories that count none. kwargs: of the loss function.
        """
        for name in ("output_attentions", "output_hidden_states"):
            if kwargs.pop(name, None):
                raise ValueError(f"{name}: expected False (hmlab.record.record shows what memories observe), got True")
        if (input_ids is None) == (inputs_embeds is None):
            got = "neither" if input_ids is None else "both"
            raise ValueError(f"input_ids: expected these or inputs_embeds, got {got}")
        batch, time = (inputs_embeds if input_ids is None else input_ids).shape[:2]
        layer, cache = self._layer(past_key_values, use_cache)
        seen, state = (0, None) if layer is None else (layer.get_seq_length(), layer.state)
        valid, reset = _places(batch, time, seen, attention_mask, position_ids)
        asks = self.training and labels is not None and not auxiliary.collecting()
        with auxiliary.collect() if asks else nullcontext({}) as asked:
            if input_ids is not None and time == 1 and state is not None and valid is None and reset is None:
                logits, state = self.model.step(input_ids[:, 0], state)
                logits = logits[:, None]
                logits = logits if isinstance(logits_to_keep, int) else logits[:, logits_to_keep]
            else:
                x = self.model.embedding(input_ids) if inputs_embeds is None else inputs_embeds
                hidden, state = self.model.hidden(x, state, tokens=input_ids, reset=reset, valid=valid)
                kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
                logits = self.model.head(hidden[:, kept])
        if layer is not None:
            layer.advance(state, time)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.model.config.vocab, **kwargs)
            loss = loss + self._asked(asked, labels, kwargs.get("num_items_in_batch")) if asked else loss
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)

    def resize_token_embeddings(self, *given: Any, **named: Any) -> nn.Embedding:
        """As in transformers; memories that count ids know no vocabulary."""
        embedding = super().resize_token_embeddings(*given, **named)
        self.model.config = dataclasses.replace(self.model.config, vocab=embedding.num_embeddings)
        return embedding

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embedding = value

    def get_output_embeddings(self) -> nn.Module:
        return self.model.head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.model.head = new_embeddings

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """What came from no file, buffers that are not kept among it, becomes what the constructors make it."""
        missing = [] if self._is_hf_initialized else [
            (name, t) for name, t in _tensors(self) if not getattr(t, "_is_hf_initialized", False)]  # fmt: skip
        if missing:
            made = dict(_tensors(self.config.model_config().build()))
            for name, t in missing:
                t.copy_(made[name.removeprefix("model.")])
        self._is_hf_initialized = True

    def _set_gradient_checkpointing(self, enable: bool = True, gradient_checkpointing_func: Callable = checkpoint,
                                    every_n_layers: int = 1) -> None:
        self.gradient_checkpointing = enable
        for number, block in enumerate(self.model.blocks):
            vars(block).pop("forward", None)
            if enable and number % every_n_layers == 0:
                block.forward = functools.partial(gradient_checkpointing_func, block.forward)

    def _layer(self, cache: Cache | None, use_cache: bool | None) -> tuple[ModelLayer | None, Cache | None]:
        """Where the call's state is kept, and the cache that it is a layer of."""
        use = self.config.use_cache and not (self.training and self.gradient_checkpointing)
        if cache is None and (use if use_cache is None else use_cache):
            cache = DynamicCache()
        if cache is None:
            return None, None
        expected = "past_key_values: expected a DynamicCache, empty or filled by this model, got"
        if type(cache) is not DynamicCache:
            raise ValueError(f"{expected} {type(cache).__name__}")
        if not (cache.layers and isinstance(cache.layers[0], ModelLayer)):
            if cache.get_seq_length() or cache.offloading:
                raise ValueError(f"{expected} one with {'offloading' if cache.offloading else 'keys and values'}")
            cache.layers, cache.layer_class_to_replicate = [ModelLayer(self.model)], None
        if cache.layers[0].model() is not self.model:
            raise ValueError(f"{expected} one that another model filled")
        return cache.layers[0], cache

    def _asked(self, asked: dict[str, Tensor], labels: Tensor, items: Tensor | int | None) -> Tensor:
        """What memories ask for, once per target: of a step of several batches, this one's share."""
        if self.gradient_checkpointing:
            raise ValueError(f"gradient_checkpointing: expected False for memories that ask for losses of their own "
                             f"({', '.join(asked)}), since a second pass asks otherwise, got True")  # fmt: skip
        return sum(asked.values()) * (1 if items is None else (labels[:, 1:] != -100).sum() / items)


def as_causal_lm(model: LanguageModel | Config | str | Path) -> HmlabForCausalLM:
    """A model for transformers round a language model, which stays the same object; or round a new one of that
    configuration; or round a checkpoint by name or path, as in `hmlab.pretrained.load`."""
    if isinstance(model, str | Path):
        model = pretrained.load(model).model
    elif isinstance(model, Config):
        model = model.build()
    elif not isinstance(model, LanguageModel):
        raise ValueError(f"model: expected a LanguageModel, its Config or a checkpoint, got {type(model).__name__}")
    training = model.training
    return HmlabForCausalLM(HmlabConfig.of(model.config), model).train(training)


def as_language_model(model: PreTrainedModel) -> LanguageModel:
    """The language model inside, the same object with the same weights."""
    if not isinstance(model, HmlabForCausalLM):
        raise ValueError(f"model: expected a HmlabForCausalLM, got {type(model).__name__}")
    return model.model


def _places(batch: int, time: int, seen: int, attention_mask: Tensor | None, position_ids: Tensor | None
            ) -> tuple[Bool[Tensor, "batch time"] | None, Bool[Tensor, "batch time"] | None]:
    """Which of the new tokens are not padding, None if all; where documents begin behind others, None if nowhere."""
    if attention_mask is not None and attention_mask.shape != (batch, seen + time):
        raise ValueError(f"attention_mask: expected [{batch}, {seen + time}], False at padding, past tokens included "
                         f"(a mask of pairs cannot be served), got {list(attention_mask.shape)}")  # fmt: skip
    reset = None if position_ids is None else documents(position_ids.expand(batch, -1), attention_mask, seen)
    valid = None if attention_mask is None else attention_mask[:, seen:].bool()
    return None if valid is None or valid.all() else valid, reset


def _tensors(module: nn.Module) -> chain[tuple[str, Tensor]]:
    """All parameters and buffers by name."""
    return chain(module.named_parameters(), module.named_buffers())


AutoConfig.register("hmlab", HmlabConfig, exist_ok=True)
AutoModelForCausalLM.register(HmlabConfig, HmlabForCausalLM, exist_ok=True)
