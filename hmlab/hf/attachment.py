"""Hierarchies put into a model, taken out, saved and loaded; `hmlab.hf` tells what they do there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from hmlab import atomic
from hmlab.hf import attention, logarithmic
from hmlab.memories import lmn
from hmlab.memories.harmony import Hierarchy, HierarchyConfig
from hmlab.record import Observed
from hmlab.registry import from_fields

# Families by `config.model_type`, and what their layers call their attention.
FAMILIES = {"llama": "self_attn", "qwen2": "self_attn", "qwen3": "self_attn", "gpt_neox": "attention",
            "opt": "self_attn"}  # fmt: skip
# Kinds of rotary embedding whose frequencies stay what they are.
ROTARY = ("default", "linear", "llama3", "proportional", "yarn")
# What can stand in a layer, by the name that a saved file has for it.
KINDS = {"hierarchy": HierarchyConfig, "lmn": lmn.Config}

_FILE, _FORMAT = "hierarchy.safetensors", "hmlab-hierarchy-2"


class Attached(Observed, Hierarchy):
    """A hierarchy that is a layer of recordings itself, since it stands in no memory of ours."""

    def forward(self, q, *given, **named):
        return super().forward(q, *given, **named)


class _Attachment(NamedTuple):
    """What `detach` takes back. layers: what stands where. implementation: of attention, before; None if it is in use
    yet."""

    layers: dict[int, HierarchyConfig | lmn.Config]
    implementation: str | None
    hooks: tuple[RemovableHandle, ...]


def window(tokens: int) -> HierarchyConfig:
    """Attention to the last so many tokens, the newest included: a hierarchy without slots, sinks or parameters."""
    return HierarchyConfig(window=tokens, segment=1, sinks=0, ratios=(1,), budget=1.0, retrieval="none",
                           policy="density", codec="mean_pool", family="hyperplane", densities=())  # fmt: skip


def attach(
    model: PreTrainedModel,
    config: HierarchyConfig | lmn.Config | Mapping[int, HierarchyConfig | lmn.Config],
) -> PreTrainedModel:
    """Replace the attention of the layers in a mapping, by number from 0, or of every layer; returns the model, which
    is changed in place.

    Raises ValueError for a model that cannot be served or is attached already.
    """
    layers = layers_of(model, config)
    decoder, hooks = decoder_of(model), []
    modules, heads = attentions(model), shape(model)
    for number, module in enumerate(modules):
        if number not in layers:
            hooks.append(module.register_forward_pre_hook(attention.leave_alone, with_kwargs=True))
            continue
        if isinstance(layers[number], HierarchyConfig):
            hierarchy = Attached(layers[number], **heads, unit_keys=False)
            attention.own_implementation(module, attention.NAME)
            hooks.append(module.register_forward_pre_hook(attention.leave_unrotated, with_kwargs=True))
        else:
            hierarchy = logarithmic.build(layers[number], module, **heads)
            logarithmic.place(module)
        weight = next(module.parameters())
        module.hierarchy = hierarchy.to(weight.device, model.dtype).train(module.training)
    hooks.append(decoder.register_forward_pre_hook(attention.prepare, with_kwargs=True))
    implementation = None
    if len(layers) == len(modules):  # no layer wants a mask of all pairs
        implementation = model.config._attn_implementation
        model.set_attn_implementation(attention.NAME)
    decoder._hmlab_attachment = _Attachment(layers, implementation, tuple(hooks))
    return model


def layers_of(
    model: PreTrainedModel, config: HierarchyConfig | lmn.Config | Mapping[int, HierarchyConfig | lmn.Config],
) -> dict[int, HierarchyConfig | lmn.Config]:
    """What `attach` would put where. Raises ValueError as it does."""
    decoder = decoder_of(model)
    if hasattr(decoder, "_hmlab_attachment"):
        raise ValueError("model: expected one without a hierarchy (detach it first), got one with")
    _check(decoder)
    depth, heads = len(decoder.layers), shape(model)
    layers = dict(sorted(config.items())) if isinstance(config, Mapping) else dict.fromkeys(range(depth), config)
    if not layers or not set(layers) <= set(range(depth)):
        raise ValueError(f"config: expected layers among 0 to {depth - 1}, got {list(layers)}")
    modules = attentions(model)
    for number, one in layers.items():
        if type(one) not in KINDS.values():
            raise ValueError(f"config: expected a HierarchyConfig, got {type(one).__name__} (an lmn.Config serves as "
                             "well, and a mapping from layers to these)")  # fmt: skip
        if isinstance(one, lmn.Config):
            logarithmic.check(one, modules[number], width=model.config.hidden_size, **heads)
    return layers


def detach(model: PreTrainedModel) -> PreTrainedModel:
    """Take the hierarchies out again; the model is what it was before `attach`, its weights as they are now."""
    decoder, attachment = decoder_of(model), _attachment(model)
    for hook in attachment.hooks:
        hook.remove()
    modules = attentions(model)
    for number in attachment.layers:
        module = modules[number]
        del module.hierarchy
        module.config = decoder.config
        vars(module).pop("forward", None)
    del decoder._hmlab_attachment
    if attachment.implementation is not None:
        model.set_attn_implementation(attachment.implementation)
    return model


def hierarchies(model: PreTrainedModel) -> nn.ModuleList:
    """What was attached, the first layer's first: to freeze, to train alone, to look into."""
    modules = attentions(model)
    return nn.ModuleList(modules[number].hierarchy for number in _attachment(model).layers)


def save(model: PreTrainedModel, folder: str | Path, include_model: bool = False) -> None:
    """Write what was attached, configuration and parameters, into a folder, as one safetensors file.

    include_model: the model's own weights beside it, and nothing else, by `save_pretrained`.
    """
    from safetensors.torch import save as to_bytes

    names = {kind: name for name, kind in KINDS.items()}
    layers = {number: {"kind": names[type(one)]} | asdict(one) for number, one in _attachment(model).layers.items()}
    header = {"format": _FORMAT, "family": model.config.model_type, "depth": str(len(decoder_of(model).layers)),
              "layers": json.dumps(layers)}  # fmt: skip
    tensors = {name: t.detach().cpu().contiguous().clone() for name, t in hierarchies(model).state_dict().items()}
    Path(folder).mkdir(parents=True, exist_ok=True)
    atomic.write_bytes(Path(folder) / _FILE, to_bytes(tensors, header))
    if include_model:
        own = {name: t for name, t in model.state_dict().items() if ".hierarchy." not in name}
        model.save_pretrained(folder, state_dict=own)


def load(model: PreTrainedModel, folder: str | Path) -> PreTrainedModel:
    """Attach what `save` wrote. Raises ValueError, the model as it was, if it does not fit."""
    from safetensors import safe_open

    with safe_open(Path(folder) / _FILE, "pt") as file:
        header = file.metadata() or {}
        if header.get("format") != _FORMAT:
            raise ValueError(f"folder: expected hierarchies in the format {_FORMAT}, got {header.get('format')!r}")
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    if header["family"] != model.config.model_type:
        raise ValueError(f"model: expected one of the family {header['family']}, got {model.config.model_type}")
    if int(header["depth"]) != len(decoder_of(model).layers):
        raise ValueError(f"model: expected one that the hierarchies in {_FILE} fit; they are of {header['depth']} "
                         f"layers, it has {len(decoder_of(model).layers)}")  # fmt: skip
    layers = json.loads(header["layers"])
    attach(model, {int(number): from_fields(KINDS[one.pop("kind")], one) for number, one in layers.items()})
    try:
        hierarchies(model).load_state_dict(tensors)
    except RuntimeError as error:
        detach(model)
        raise ValueError(f"model: expected one that the hierarchies in {_FILE} fit; {error}") from None
    return model


def attentions(model: PreTrainedModel) -> list[nn.Module]:
    """The attention of each layer."""
    return [layer.get_submodule(FAMILIES[model.config.model_type]) for layer in decoder_of(model).layers]


def shape(model: PreTrainedModel) -> dict[str, int]:
    """The attention's heads."""
    config, heads = model.config, model.config.num_attention_heads
    return {"heads": heads, "kv_heads": getattr(config, "num_key_value_heads", heads),
            "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads}  # fmt: skip


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """The module whose layers hold the attention."""
    family = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if family not in FAMILIES:
        raise ValueError(f"model: expected one of the families {', '.join(FAMILIES)}, got {family}")
    return getattr(model.base_model, "decoder", model.base_model)


def _attachment(model: PreTrainedModel) -> _Attachment:
    attachment = getattr(decoder_of(model), "_hmlab_attachment", None)
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
