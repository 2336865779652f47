"""HARMONY's hierarchy in the place of attention in models of transformers (source: Akbar 2025, HARMONY).

    attach(model, HierarchyConfig(window=256, ratios=(16,)))     # the same object, its attention replaced
    model(**batch)   model.generate(**prompt)                    # as before, with a state that does not grow
    save(model, folder)   load(model, folder)                    # the parameters that came with the hierarchy
    detach(model)                                                # the model as it was

Families: Llama, Qwen2, Qwen3, GPT-NeoX, OPT. Their own weights stay in use and in place: the hierarchy gets the
queries, keys and values that attention would get, before they are rotated, and stands below each attention module as
`hierarchy`, so its parameters are the model's (optimizers and `state_dict` see them). With `ratios=(1,),
retrieval="all"` the model computes what it computed before, to rounding.

Training: by the model's loss and what `hmlab.auxiliary.collect` gathers in the forward pass, everything or
`hierarchies(model)` alone. With activation checkpointing, which runs layers twice, the backward pass belongs inside
`collect` as well, and the price of a slot moves twice a step. Without training: `HierarchyConfig(policy="density",
codec="mean_pool", family="hyperplane", sinks=0)`, or other codecs and families that learn nothing.

How: `hmlab.hf.attention` is registered with transformers' `AttentionInterface` and `AttentionMaskInterface`; it states
why nothing of a model's code is replaced. `hmlab.hf.cache` holds the states.
Limits: attention over the whole past in every layer (no sliding layers); rotary frequencies that do not depend on
the length; padding masks, not custom ones; positions that run on by one, or begin again at 0 with a new document; no
attention dropout; caches that begin as `DynamicCache`; no decoding that takes tokens back (assisted generation).
Errors: `ValueError` naming what was expected.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from hmlab import atomic
from hmlab.hf import attention
from hmlab.memories.harmony import Hierarchy, HierarchyConfig
from hmlab.record import Observed
from hmlab.registry import from_fields

# Families by `config.model_type`, and what their layers call their attention.
FAMILIES = {"llama": "self_attn", "qwen2": "self_attn", "qwen3": "self_attn", "gpt_neox": "attention",
            "opt": "self_attn"}  # fmt: skip
# Kinds of rotary embedding whose frequencies stay what they are.
ROTARY = ("default", "linear", "llama3", "proportional", "yarn")

_FILE, _FORMAT = "hierarchy.safetensors", "hmlab-hierarchy-1"


class Attached(Observed, Hierarchy):
    """A hierarchy that is a layer of recordings itself, since it stands in no memory of ours."""

    def forward(self, q, *given, **named):
        return super().forward(q, *given, **named)


class _Attachment(NamedTuple):
    """What `detach` takes back. implementation: of attention, before."""

    config: HierarchyConfig
    implementation: str
    hooks: tuple[RemovableHandle, ...]


def attach(model: PreTrainedModel, config: HierarchyConfig) -> PreTrainedModel:
    """Replace the attention of every layer by a hierarchy; returns the model, which is changed in place.

    Raises ValueError for a model that cannot be served or is attached already.
    """
    decoder = _decoder(model)
    if type(config) is not HierarchyConfig:
        raise ValueError(f"config: expected a HierarchyConfig, got {type(config).__name__}")
    if hasattr(decoder, "_hmlab_attachment"):
        raise ValueError("model: expected one without a hierarchy (detach it first), got one with")
    _check(decoder)
    heads = model.config.num_attention_heads
    for module in _attentions(decoder):
        hierarchy = Attached(
            config, heads=heads, kv_heads=getattr(model.config, "num_key_value_heads", heads),
            head_dim=getattr(model.config, "head_dim", None) or model.config.hidden_size // heads, unit_keys=False,
        )  # fmt: skip
        weight = next(module.parameters())
        module.hierarchy = hierarchy.to(weight.device, model.dtype).train(module.training)
    hooks = [decoder.register_forward_pre_hook(attention.prepare, with_kwargs=True)]
    if hasattr(decoder, "rotary_emb"):
        hooks.append(decoder.rotary_emb.register_forward_hook(attention.leave_unrotated))
    decoder._hmlab_attachment = _Attachment(config, model.config._attn_implementation, tuple(hooks))
    attention.register()
    model.set_attn_implementation(attention.NAME)
    return model


def detach(model: PreTrainedModel) -> PreTrainedModel:
    """Take the hierarchies out again; the model is what it was before `attach`, its weights as they are now."""
    decoder, attachment = _decoder(model), _attachment(model)
    for hook in attachment.hooks:
        hook.remove()
    for module in _attentions(decoder):
        del module.hierarchy
    del decoder._hmlab_attachment
    model.set_attn_implementation(attachment.implementation)
    return model


def hierarchies(model: PreTrainedModel) -> nn.ModuleList:
    """The hierarchies of an attached model, the first layer's first: to freeze, to train alone, to look into."""
    _attachment(model)
    return nn.ModuleList(module.hierarchy for module in _attentions(_decoder(model)))


def save(model: PreTrainedModel, folder: str | Path) -> None:
    """Write the hierarchies' configuration and parameters into a folder, as one safetensors file.

    The model's own weights are not in it: if they were trained as well, `model.save_pretrained` keeps them, in the same
    folder if you like.
    """
    from safetensors.torch import save as to_bytes

    header = {"format": _FORMAT, "family": model.config.model_type,
              "config": json.dumps(asdict(_attachment(model).config))}  # fmt: skip
    tensors = {name: t.detach().cpu().contiguous().clone() for name, t in hierarchies(model).state_dict().items()}
    Path(folder).mkdir(parents=True, exist_ok=True)
    atomic.write_bytes(Path(folder) / _FILE, to_bytes(tensors, header))


def load(model: PreTrainedModel, folder: str | Path) -> PreTrainedModel:
    """Attach the hierarchies that `save` wrote. Raises ValueError, the model as it was, if they do not fit."""
    from safetensors import safe_open

    with safe_open(Path(folder) / _FILE, "pt") as file:
        header = file.metadata() or {}
        if header.get("format") != _FORMAT:
            raise ValueError(f"folder: expected hierarchies in the format {_FORMAT}, got {header.get('format')!r}")
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    if header["family"] != model.config.model_type:
        raise ValueError(f"model: expected one of the family {header['family']}, got {model.config.model_type}")
    attach(model, from_fields(HierarchyConfig, json.loads(header["config"])))
    try:
        hierarchies(model).load_state_dict(tensors)
    except RuntimeError as error:
        detach(model)
        raise ValueError(f"model: expected one that the hierarchies in {_FILE} fit; {error}") from None
    return model


def _decoder(model: PreTrainedModel) -> nn.Module:
    """The module whose layers hold the attention."""
    family = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if family not in FAMILIES:
        raise ValueError(f"model: expected one of the families {', '.join(FAMILIES)}, got {family}")
    return getattr(model.base_model, "decoder", model.base_model)


def _attentions(decoder: nn.Module) -> list[nn.Module]:
    return [layer.get_submodule(FAMILIES[decoder.config.model_type]) for layer in decoder.layers]


def _attachment(model: PreTrainedModel) -> _Attachment:
    attachment = getattr(_decoder(model), "_hmlab_attachment", None)
    if attachment is None:
        raise ValueError("model: expected one with a hierarchy (attach it first), got one without")
    return attachment


def _check(decoder: nn.Module) -> None:
    """Refuse models whose attention is not what a hierarchy stands for."""
    config = decoder.config
    others = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if others:
        raise ValueError(f"config.layer_types: expected full_attention in every layer, got {', '.join(sorted(others))}")
    if not getattr(config, "is_causal", True):
        raise ValueError("config.is_causal: expected True, a hierarchy reads the past only, got False")
    rope_type = getattr(getattr(decoder, "rotary_emb", None), "rope_type", "default")
    if rope_type not in ROTARY:
        raise ValueError(f"config.rope_parameters: expected a rope_type among {', '.join(ROTARY)} (whose frequencies "
                         f"do not depend on the length), got {rope_type}")  # fmt: skip
