"""Names of memories and of published models; configurations from names, settings and stored records.

A researcher's own memory joins under the entry-point group `hmlab.memories`:

    [project.entry-points."hmlab.memories"]
    leaky = "my_package.leaky:Config"
"""

from __future__ import annotations

import difflib
import functools
import importlib
import json
import types
import typing
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from importlib.metadata import entry_points
from typing import Any, Literal

GROUP = "hmlab.memories"
_BUILT_IN = {
    "lmn": "hmlab.memories.lmn:Config",
    "attention": "hmlab.memories.attention:Config",
    "window": "hmlab.memories.window:Config",
    "strided": "hmlab.memories.strided:Config",
    "linear-attention": "hmlab.memories.linear_attention:Config",
    "transformer-xl": "hmlab.memories.transformer_xl:Config",
    "recurrent": "hmlab.memories.recurrent:Config",
    "gated-linear": "hmlab.memories.gated_linear:Config",
    "harmony": "hmlab.memories.harmony:Config",
}


class UnknownName(ValueError):
    """A name that nothing has; the message gives the nearest ones."""

    def __init__(self, kind: str, name: str, known: Collection[str]) -> None:
        near = difflib.get_close_matches(name, known, 3, 0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(sorted(known))}"
        super().__init__(f"{kind}: no {kind} is called {name!r}; {hint}")


@functools.cache
def memory_configs() -> dict[str, type]:
    """Every memory's Config class by name: the library's own, then those of installed packages.

    Raises ValueError when an installed package claims a name that is taken.
    """
    found = {name: _load(target) for name, target in _BUILT_IN.items()}
    for entry in entry_points(group=GROUP):
        if entry.name in found:
            raise ValueError(f"entry point {entry.name!r} ({entry.value}): a memory of that name exists already")
        found[entry.name] = entry.load()
    return found


def memory_config(name: str) -> type:
    """The Config class of a memory."""
    configs = memory_configs()
    if name not in configs:
        raise UnknownName("memory", name, configs)
    return configs[name]


def memory_name(config: Any) -> str:
    """The name under which a memory configuration's class is registered."""
    for name, cls in memory_configs().items():
        if type(config) is cls:
            return name
    raise ValueError(f"config: {type(config).__qualname__} is not registered under the entry-point group {GROUP}")


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A published model: what it says, and the fields in which it differs from the defaults."""

    summary: str
    memory: str
    model_fields: Mapping[str, Any]
    memory_fields: Mapping[str, Any]


_GPT2 = {"norm": "layer", "activation": "relu", "context": 512}
PRESETS: dict[str, Preset] = {
    "logmem": Preset(
        summary="Logarithmic Memory Network, two banks (LMN paper, table 1)",
        memory="lmn", model_fields={}, memory_fields={"banks": 2},
    ),
    "tinylogmem": Preset(
        summary="LogMem whose feed-forward keeps the width; ffn=tied shares its one matrix",
        memory="lmn", model_fields={"ffn": "square"}, memory_fields={"banks": 2},
    ),
    "expsum": Preset(
        summary="LMN with one bank and an expander: level i holds 1 + i slots per node",
        memory="lmn", model_fields={}, memory_fields={"banks": 1, "expansion": 1},
    ),
    "gpt2-paper": Preset(
        summary="The LMN paper's baseline as its authors ran it: learned positions, scores scaled by dim^-0.5",
        memory="attention", model_fields=_GPT2,
        memory_fields={"rotary": False, "scale": "dim", "qkv_bias": False},
    ),
    "transformer": Preset(
        summary="A fair baseline with LogMem's parameters: rotary positions, scores scaled by head_dim^-0.5, gated FFN",
        memory="attention", model_fields={"ffn": "gated"}, memory_fields={},
    ),
    "gru": Preset(
        summary="Gated recurrent units in the place of attention",
        memory="recurrent", model_fields={}, memory_fields={"cell": "gru"},
    ),
    "lstm": Preset(
        summary="Long short-term memory in the place of attention",
        memory="recurrent", model_fields={}, memory_fields={"cell": "lstm"},
    ),
}  # fmt: skip


def model_names() -> list[str]:
    """Everything `model_config` knows: presets first, then memories in the default model."""
    return [*PRESETS, *(name for name in memory_configs() if name not in PRESETS)]


def model_config(name: str, *, dim: int, vocab: int, layers: int = 4, settings: Mapping[str, str] | None = None) -> Any:
    """The configuration of a language model by the name of a preset or of a memory.

    settings: further fields as text, `{"ffn": "tied", "memory.banks": "1"}`; a key without `memory.` may also
    name a field of the memory where the model has none of that name. Raises UnknownName, ValueError by field.
    """
    from hmlab.model import Config

    if name in PRESETS:
        preset = PRESETS[name]
    elif name in memory_configs():
        preset = Preset(summary="", memory=name, model_fields={}, memory_fields={})
    else:
        raise UnknownName("model", name, model_names())
    memory_class = memory_config(preset.memory)
    model_fields: dict[str, Any] = {"dim": dim, "vocab": vocab, "layers": layers, **preset.model_fields}
    memory_fields: dict[str, Any] = dict(preset.memory_fields)
    of_model, of_memory = _field_types(Config), _field_types(memory_class)
    known = [k for k in of_model if k != "memory"] + [f"memory.{k}" for k in of_memory if k != "dim"]
    for key, text in (settings or {}).items():
        field = key.removeprefix("memory.")
        if not key.startswith("memory.") and key in of_model and key != "memory":
            model_fields[key] = parse(key, text, of_model[key])
        elif field in of_memory and field != "dim":
            memory_fields[field] = parse(key, text, of_memory[field])
        else:
            raise UnknownName(f"field of {name}", key, known + [k for k in of_memory if k != "dim"])
    memory = memory_class(dim=model_fields["dim"], **memory_fields)
    return Config(memory=memory, **model_fields)


def parse(key: str, text: str, annotation: Any) -> Any:
    """A field's value from text by the field's type: bool, int, float, str, Literal, or None where allowed."""
    origin, choices = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        if text in choices:
            return text
        raise ValueError(f"{key}: expected one of {', '.join(map(str, choices))}, got {text!r}")
    if origin in (typing.Union, types.UnionType):
        if type(None) in choices and text.lower() in ("none", "null"):
            return None
        annotation = next(c for c in choices if c is not type(None))
        return parse(key, text, annotation)
    if annotation is bool:
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        raise ValueError(f"{key}: expected true or false, got {text!r}")
    if annotation in (int, float, str):
        try:
            return annotation(text)
        except ValueError:
            raise ValueError(f"{key}: expected {annotation.__name__}, got {text!r}") from None
    try:  # tuples and mappings are written as JSON
        return json.loads(text)
    except json.JSONDecodeError:
        raise ValueError(f"{key}: expected JSON for {annotation}, got {text!r}") from None


def to_dict(config: Any) -> dict[str, Any]:
    """A model configuration as JSON-able values; the memory carries its registered name under `name`."""
    values = {f.name: getattr(config, f.name) for f in fields(config)}
    values["memory"] = {"name": memory_name(config.memory), **asdict(config.memory)}
    return values


def from_dict(values: Mapping[str, Any]) -> Any:
    """The reverse of `to_dict`. Raises ValueError naming a field that is unknown or missing."""
    from hmlab.model import Config

    values = dict(values)
    memory = dict(values.pop("memory", {}))
    if "name" not in memory:
        raise ValueError("memory: expected a mapping with the key 'name'")
    built = from_fields(memory_config(memory.pop("name")), memory)
    return from_fields(Config, {**values, "memory": built})


def from_fields(cls: type, values: Mapping[str, Any]) -> Any:
    """A dataclass from stored values. Raises UnknownName or ValueError naming a field that is unknown or missing."""
    known = {f.name: f for f in fields(cls)}
    for key in values:
        if key not in known:
            raise UnknownName(f"field of {cls.__module__}.{cls.__qualname__}", key, known)
    for key, field in known.items():
        if key not in values and field.default is MISSING and field.default_factory is MISSING:
            raise ValueError(f"{key}: missing in the stored configuration of {cls.__module__}.{cls.__qualname__}")
    # JSON turns tuples into lists.
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


@functools.cache
def _field_types(cls: type) -> dict[str, Any]:
    if not is_dataclass(cls):
        raise TypeError(f"{cls!r}: a memory's Config is a dataclass")
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in fields(cls)}


def _load(target: str) -> Callable:
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)
