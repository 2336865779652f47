"""The loop over segments. `hmlab.wrappers.memorizing` tells what is computed."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from hmlab import atomic, memory
from hmlab.hf.attachment import attentions, decoder_of, shape
from hmlab.hf.attention import own_implementation
from hmlab.registry import from_fields

from . import attention
from .lookup import Config, Lookup, State, written

_FILE, _FORMAT = "memorizing.safetensors", "hmlab-memorizing-1"


class Output(NamedTuple):
    """loss: mean over labels, in nats; logits: zero at padding, None where labels were given."""

    loss: Float[Tensor, ""] | None
    logits: Float[Tensor, "batch time vocab"] | None
    state: State


class MemorizingTransformer(nn.Module):
    """backbone: a causal language model of transformers, used, not copied. It goes on working by itself; `unwrap` takes
    out of it what the wrapper put in."""

    Config = Config

    def __init__(self, backbone: PreTrainedModel, config: Config | None = None) -> None:
        super().__init__()
        self.config = config = Config() if config is None else config
        decoder = decoder_of(backbone)
        if hasattr(decoder, "_hmlab_attachment") or hasattr(decoder, "_hmlab_memorizing"):
            raise ValueError("backbone: expected one without a hierarchy or another memory, got one with")
        modules, heads = attentions(backbone), shape(backbone)
        self.layer = min(3 * len(modules) // 4, len(modules) - 1) if config.layer is None else config.layer
        if self.layer >= len(modules):
            raise ValueError(f"layer: expected 0 to {len(modules) - 1}, the backbone's layers, got {self.layer}")
        learned = getattr(decoder, "embed_positions", None)
        if learned is not None and config.segment_length > backbone.config.max_position_embeddings:
            raise ValueError(f"segment_length: expected at most {backbone.config.max_position_embeddings}, the "
                             f"backbone's positions, got {config.segment_length}")  # fmt: skip
        self.backbone, self._heads = backbone, heads
        weight = next(modules[self.layer].parameters())
        self.lookup = Lookup(config, heads=heads["heads"], head_dim=heads["head_dim"]).to(weight.device)
        own_implementation(modules[self.layer], attention.NAME)
        tell = functools.partial(attention.tell, decoder.config)
        hooks = (tell if number == self.layer else attention.leave_alone for number in range(len(modules)))
        decoder._hmlab_memorizing = tuple(module.register_forward_pre_hook(hook, with_kwargs=True)
                                          for module, hook in zip(modules, hooks, strict=True))  # fmt: skip
        self.train(backbone.training)

    def forward(
        self,
        input_ids: Int[Tensor, "batch time"],
        attention_mask: Int[Tensor, "batch time"] | Bool[Tensor, "batch time"] | None = None,
        labels: Int[Tensor, "batch time"] | None = None,
        state: State | None = None,
    ) -> Output:
        """Read on behind `state`, in a new segment.

        attention_mask: of these tokens, 0 at padding. labels: the ids themselves, as in transformers, -100 where none
        counts; the last one of a segment is predicted by the segment before. Raises ValueError naming the argument.
        """
        order, valid, state = self._call(input_ids, attention_mask, state)
        if labels is None:
            logits = []
            state = self._read(input_ids, order, valid, state, lambda hidden, place: logits.append(self._head(hidden)))
            whole = torch.cat(logits, 1)
            return Output(None, whole if order is None else _unpacked(whole, attention_mask.bool()), state)
        if labels.shape != input_ids.shape:
            raise ValueError(f"labels: expected {list(input_ids.shape)}, as input_ids has, got {list(labels.shape)}")
        labels = labels.long()
        packed = (labels if order is None else labels.gather(1, order)).masked_fill(~valid, -100)
        targets = F.pad(packed[:, 1:], (0, 1), value=-100)
        losses = [torch.zeros((), device=input_ids.device)]

        def take(hidden: Tensor, place: slice) -> None:
            counts = targets[:, place] != -100
            logits = self._head(hidden[counts]).float()
            losses.append(F.cross_entropy(logits, targets[:, place][counts], reduction="sum"))

        state = self._read(input_ids, order, valid, state, take)
        return Output(sum(losses) / (targets != -100).sum().clamp(min=1), None, state)

    @torch.no_grad()
    def prefill(
        self,
        input_ids: Int[Tensor, "batch time"],
        attention_mask: Int[Tensor, "batch time"] | Bool[Tensor, "batch time"] | None = None,
        state: State | None = None,
    ) -> State:
        """The state behind a text of any length: nothing else is kept, and no logits are made."""
        order, valid, state = self._call(input_ids, attention_mask, state)
        return self._read(input_ids, order, valid, state, lambda hidden, place: None)

    def init_state(self, batch: int) -> State:
        """Before the first token."""
        weight, heads = next(self.backbone.parameters()), self._heads
        empty = torch.zeros(batch, heads["kv_heads"], self.config.size, heads["head_dim"], device=weight.device,
                            dtype=self.backbone.dtype)  # fmt: skip
        return State(empty, empty, torch.zeros(batch, dtype=torch.int64, device=weight.device))

    def memory_parameters(self) -> list[nn.Parameter]:
        """The wrapper's own parameters."""
        return list(self.lookup.parameters())

    state_bytes = staticmethod(memory.state_bytes)
    reorder = staticmethod(memory.reorder)

    def unwrap(self) -> PreTrainedModel:
        """The backbone as it was, its weights as they are now. The wrapper is of no use afterwards."""
        decoder = decoder_of(self.backbone)
        for hook in decoder._hmlab_memorizing:
            hook.remove()
        del decoder._hmlab_memorizing
        attentions(self.backbone)[self.layer].config = decoder.config
        return self.backbone

    def save_pretrained(self, folder: str | Path, include_backbone: bool = False) -> None:
        """Write configuration and own parameters into a folder, as one safetensors file, and the backbone beside it if
        wanted."""
        from safetensors.torch import save

        header = {"format": _FORMAT, "family": self.backbone.config.model_type,
                  "config": json.dumps(asdict(self.config))}  # fmt: skip
        tensors = {name: t.detach().cpu().contiguous().clone() for name, t in self.lookup.state_dict().items()}
        Path(folder).mkdir(parents=True, exist_ok=True)
        atomic.write_bytes(Path(folder) / _FILE, save(tensors, header))
        if include_backbone:
            self.backbone.save_pretrained(folder)

    @classmethod
    def from_pretrained(cls, folder: str | Path, backbone: PreTrainedModel) -> MemorizingTransformer:
        """What `save_pretrained` wrote, round a backbone of the same shape. Raises ValueError if it does not fit."""
        from safetensors import safe_open

        with safe_open(Path(folder) / _FILE, "pt") as file:
            header = file.metadata() or {}
            if header.get("format") != _FORMAT:
                raise ValueError(f"folder: expected the format {_FORMAT}, got {header.get('format')!r}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        family = backbone.config.model_type
        if header["family"] != family:
            raise ValueError(f"backbone: expected one of the family {header['family']}, got {family}")
        if len(tensors["gate"]) != shape(backbone)["heads"]:
            raise ValueError(f"backbone: expected {len(tensors['gate'])} heads, got {shape(backbone)['heads']}")
        model = cls(backbone, from_fields(Config, json.loads(header["config"])))
        model.lookup.load_state_dict(tensors)
        return model

    def _call(self, ids: Tensor, attention_mask: Tensor | None, state: State | None
              ) -> tuple[Tensor | None, Tensor, State]:
        """Check a call; the order that packs its rows, which packed places hold tokens, and the state before it."""
        if ids.ndim != 2 or ids.is_floating_point() or not ids.shape[1]:
            raise ValueError(f"input_ids: expected integers [batch, time], got {ids.dtype} {list(ids.shape)}")
        state = self.init_state(len(ids)) if state is None else state
        if len(state.count) != len(ids):
            raise ValueError(f"state: expected {len(ids)} rows, as input_ids has, got {len(state.count)}")
        if attention_mask is not None and attention_mask.shape != ids.shape:
            raise ValueError(f"attention_mask: expected {list(ids.shape)}, the new tokens only, "
                             f"got {list(attention_mask.shape)}")  # fmt: skip
        if attention_mask is None or attention_mask.all():
            return None, torch.ones_like(ids, dtype=torch.bool), state
        order = torch.argsort(~attention_mask.bool(), dim=1, stable=True)
        return order, attention_mask.bool().gather(1, order), state

    def _read(self, ids: Tensor, order: Tensor | None, valid: Tensor, state: State,
              take: Callable[[Tensor, slice], None]) -> State:
        """The state behind the tokens. take: is given each segment's hidden states, and its place among the packed
        tokens."""
        packed = (ids if order is None else ids.gather(1, order)).masked_fill(~valid, 0)
        for begin in range(0, packed.shape[1], self.config.segment_length):
            place = slice(begin, begin + self.config.segment_length)
            here, held = packed[:, place], valid[:, place]
            reading = attention.Reading(self.lookup, state, held)
            # Padding lies behind the tokens, which do not see it: no mask is needed.
            out = self.backbone.base_model(
                here, position_ids=torch.arange(here.shape[1], device=here.device)[None], use_cache=False,
                memorizing=reading,
            )  # fmt: skip
            state = written(state, *reading.written, held)
            take(out.last_hidden_state, place)
        return state

    def _head(self, hidden: Tensor) -> Tensor:
        return self.backbone.get_output_embeddings()(hidden)


def _unpacked(x: Float[Tensor, "batch time width"], valid: Bool[Tensor, "batch time"]
              ) -> Float[Tensor, "batch time width"]:
    """Where the tokens came from; zero at padding."""
    place = (valid.cumsum(1) - 1).clamp(min=0)
    return x.gather(1, place[..., None].expand(-1, -1, x.shape[2])) * valid[..., None]
