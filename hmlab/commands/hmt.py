"""`hmlab show hmt`: what a Hierarchical Memory Transformer adds to a backbone, without making either."""

from __future__ import annotations

import json as json_
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from hmlab.commands.output import print_json, print_table, size
from hmlab.commands.settings import Refusal, user_values

PANEL = "Of hmt"
_ITEMS = {"float32": 4, "bfloat16": 2}  # bytes of a number


def _option(help: str, **more: Any) -> Any:
    return typer.Option(help=help, rich_help_panel=PANEL, **more)


Width = Annotated[int | None, _option("Width of the backbone's input embeddings.")]
RecallWidth = Annotated[int | None, _option("Width of W_q and W_k.", show_default="the width")]
BackboneParameters = Annotated[int | None, _option("Parameters of the backbone.")]
Memories = Annotated[int, _option("Memory embeddings of a segment.")]
CacheSize = Annotated[int, _option("Segments whose memories are kept.")]
SegmentLength = Annotated[int, _option("Tokens of a segment, its own.")]
Sensory = Annotated[int, _option("Tokens repeated from the segment before.")]
TransformersConfig = Annotated[
    Path | None,
    _option("A model's config.json, in the place of --width and --backbone-parameters.", metavar="FILE.json"),
]


class Backbone(NamedTuple):
    """segment_kv: numbers in the keys and values of one segment, None where they were not counted."""

    width: int
    parameters: int
    segment_kv: int | None = None


def show_hmt(*, width: int | None, recall_width: int | None, backbone_parameters: int | None, memories: int,
             cache_size: int, segment_length: int, sensory: int, transformers_config: Path | None, json: bool) -> None:
    from hmlab.wrappers.hmt.sizes import added_parameters, cache_bytes, segment_tokens

    with user_values():
        tokens = segment_tokens(segment_length, sensory, memories)
    backbone = _backbone(width, backbone_parameters, transformers_config, tokens)
    recall_width = backbone.width if recall_width is None else recall_width
    with user_values():
        added = added_parameters(backbone.width, recall_width, memories)
        cache = {dtype: cache_bytes(backbone.width, memories, cache_size, item) for dtype, item in _ITEMS.items()}
    facts = {
        "name": "hmt",
        "width": backbone.width,
        "recall_width": recall_width,
        "memories": memories,
        "backbone_parameters": backbone.parameters,
        "added_parameters": added,
        "added_percent": 100 * added / backbone.parameters,
        "cache_size": cache_size,
        "cache_bytes": cache,
        "segment_tokens": tokens,
    }
    if backbone.segment_kv is not None:
        facts["segment_kv_bytes"] = {dtype: backbone.segment_kv * item for dtype, item in _ITEMS.items()}
    if json:
        print_json(facts)
        return
    rows = []
    for name, value in facts.items():
        if isinstance(value, dict):
            rows += [(f"{name.replace('_', ' ')}, {dtype}", size(bytes_)) for dtype, bytes_ in value.items()]
        elif name != "name":
            rows.append((name.replace("_", " "), value))
    print_table(["hmt", ""], rows)


def _backbone(width: int | None, parameters: int | None, file: Path | None, tokens: int) -> Backbone:
    given = {"--width": width, "--backbone-parameters": parameters}
    if file is not None:
        double = [option for option, value in given.items() if value is not None]
        if double:
            raise Refusal(f"--transformers-config: tells what {' and '.join(double)} would; give one or the other")
        return _read(file, tokens)
    missing = [option for option, value in given.items() if value is None]
    if missing:
        raise Refusal(f"show hmt: expected {' and '.join(missing)}, or --transformers-config FILE.json, got neither"
                      if len(missing) == 2 else f"show hmt: expected {missing[0]} as well, got none")  # fmt: skip
    for option, value in given.items():
        if value < 1:
            raise Refusal(f"{option}: expected 1 or more, got {value}")
    return Backbone(width, parameters)


def _read(file: Path, tokens: int) -> Backbone:
    """What a config.json says, counted on a model without weights; tied weights count once."""
    option = "--transformers-config"
    if not file.is_file():
        raise Refusal(f"{option}: there is no file {file}")
    try:
        fields = json_.loads(file.read_text())
    except ValueError as error:
        raise Refusal(f"{option}: expected JSON, {file} is none: {error}") from error
    import torch
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

    family = fields.get("model_type") if isinstance(fields, dict) else None
    if not isinstance(family, str):
        raise Refusal(f"{option}: expected a configuration of transformers, {file} has no model_type")
    if family not in CONFIG_MAPPING or CONFIG_MAPPING[family] not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise Refusal(f"{option}: expected a causal language model of transformers, {file} is of model_type {family!r}")
    try:
        config = CONFIG_MAPPING[family].from_dict(fields)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # each family refuses in its own way
        raise Refusal(f"{option}: {family} does not take what {file} says: {error}") from error
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Backbone(model.get_input_embeddings().embedding_dim, parameters, _kv_numbers(model, tokens))


def _kv_numbers(model: Any, tokens: int) -> int | None:
    """What a model on the meta device keeps of that many tokens, counted after it has read them."""
    import torch
    from torch.utils import _pytree as pytree

    try:
        with torch.device("meta"), torch.no_grad():
            cache = model(torch.zeros(1, tokens, dtype=torch.int64), use_cache=True).past_key_values
        kept = [leaf for layer in cache.layers for leaf in pytree.tree_leaves(vars(layer))]
    except Exception:  # a model that looks at values, of which there are none
        return None
    return sum(leaf.numel() for leaf in kept if isinstance(leaf, torch.Tensor))
