"""`hmlab list`: what there is. `hmlab show`: what a configuration costs."""

from __future__ import annotations

import math
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from hmlab.commands import hmt
from hmlab.commands.corpora import rows_of_corpora
from hmlab.commands.output import Json, flat, print_json, print_table, size
from hmlab.commands.settings import Refusal, Settings, pairs, user_values

DEFAULT_TIME = 512
WRAPPERS = {
    "hmt": "Hierarchical Memory Transformer: segments, and a search among the memories of past ones; `hmlab show hmt`",
    "rmt": "Recurrent Memory Transformer: HMT with query=\"none\", a segment's memory goes to the next one alone",
    "memorizing": "Memorizing Transformer: one layer looks past keys and values up",
}


def list_all(json: Json = False) -> None:
    """Memories, wrappers, presets, tasks, corpora, notebooks, checkpoints and dashboards."""
    everything = {
        "memories": _memories(),
        "wrappers": [{"name": name, "about": about} for name, about in WRAPPERS.items()],
        "presets": _presets(),
        "tasks": _tasks(),
        "corpora": rows_of_corpora(),
        "notebooks": _notebooks(),
        "checkpoints": _checkpoints(),
        "dashboards": _dashboards(),
    }
    if json:
        print_json(everything)
        return
    for title, rows in everything.items():
        columns = list(rows[0]) if rows else ["none"]
        print_table(columns, [list(_short(row).values()) for row in rows], title=title.capitalize())
        print()


class ShowCommand(TyperCommand):
    """Refuses what would be passed over: options of hmt for a model, those of a model for hmt."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        rest = super().parse_args(ctx, args)
        name = ctx.params.get("name")
        for option in self.params:
            if option.name in ("name", "json") or ctx.get_parameter_source(option.name).name != "COMMANDLINE":
                continue
            of_hmt = getattr(option, "rich_help_panel", None) == hmt.PANEL
            if of_hmt != (name == "hmt"):
                kind = "hmt" if of_hmt else "presets and memories"
                raise Refusal(f"{option.opts[0]}: an option of {kind}, got {name}")
        return rest


def show(
    name: Annotated[str, typer.Argument(help="A preset, a memory or hmt; `hmlab list` names them.")],
    dim: Annotated[int, typer.Option(help="Width of the model.")] = 128,
    vocab: Annotated[int, typer.Option(help="Size of the vocabulary.")] = 65,
    layers: Annotated[int, typer.Option(help="Number of blocks.")] = 4,
    settings: Settings = [],  # noqa: B006
    time: Annotated[
        int | None,
        typer.Option(help="Tokens read before the state is measured.", show_default="512, or a shorter context"),
    ] = None,
    width: hmt.Width = None,
    recall_width: hmt.RecallWidth = None,
    backbone_parameters: hmt.BackboneParameters = None,
    memories: hmt.Memories = 1,
    cache_size: hmt.CacheSize = 300,
    segment_length: hmt.SegmentLength = 256,
    sensory: hmt.Sensory = 32,
    transformers_config: hmt.TransformersConfig = None,
    json: Json = False,
) -> None:
    """Parameters, bytes and operations of a model, counted on the model itself after it has read TIME tokens.

    Of hmt: what it adds to a backbone, by arithmetic.
    """
    if name == "hmt":
        hmt.show_hmt(width=width, recall_width=recall_width, backbone_parameters=backbone_parameters,
                     memories=memories, cache_size=cache_size, segment_length=segment_length, sensory=sensory,
                     transformers_config=transformers_config, json=json)  # fmt: skip
        return
    import torch

    from hmlab import model as models
    from hmlab import registry

    with user_values():
        config = registry.model_config(name, dim=dim, vocab=vocab, layers=layers, settings=pairs(settings, "--set"))
    longest = config.context or math.inf
    time = time if time is not None else min(longest, DEFAULT_TIME)
    if not 1 <= time <= longest:
        raise Refusal(f"--time: expected 1 to {longest} (context) tokens, got {time}")
    # On the meta device tensors have shapes and no content, so that a million tokens cost nothing.
    with torch.device("meta"), torch.no_grad():
        model = config.build()
        parameters, parameter_bytes = models.parameters(model), sum(p.nbytes for p in model.parameters())
        model.positions = None  # which are looked up by value; they leave no trace in the state
        _, state = model(torch.zeros(1, models.enough_tokens(model, time), dtype=torch.int64))
    flops = models.flops(config, time)
    facts = {
        "name": name,
        "parameters": parameters,
        "parameter_bytes": parameter_bytes,
        "time": time,
        "state_bytes": model.state_bytes(state),
        "flops_per_token": flops,
        "config": registry.to_dict(config),
    }
    if json:
        print_json(facts)
        return
    rows = [
        ("parameters", facts["parameters"]),
        ("parameter bytes", size(facts["parameter_bytes"])),
        (f"state bytes after {time} tokens", size(facts["state_bytes"])),
        ("flops per token", round(flops)),
        *flat(facts["config"]),
    ]
    print_table([name, ""], rows)


def _short(row: dict) -> dict:
    """A row whose description ends after the first sentence."""
    about = row.get("about", "").partition(". ")[0].rstrip(".")
    return {**row, "about": about} if about else row


def _memories() -> list[dict]:
    from hmlab import registry

    return [{"name": name, "about": _about(config)} for name, config in registry.memory_configs().items()]


def _about(config: type) -> str:
    """The first line of the module that a memory's Config is taken from: its own, or the package that shows it."""
    own = sys.modules[config.__module__]
    package = sys.modules.get(config.__module__.rpartition(".")[0])
    shown = package if getattr(package, config.__name__, None) is config else own
    return (shown.__doc__ or "").strip().partition("\n")[0]


def _presets() -> list[dict]:
    from hmlab import registry

    return [{"name": name, "about": preset.summary} for name, preset in registry.PRESETS.items()]


def _tasks() -> list[dict]:
    from hmlab import tasks

    return [{"name": name, "about": tasks.summary(name)} for name in tasks.names()]


def _notebooks() -> list[dict]:
    from hmlab import notebooks

    return [{"name": n.name, "title": n.title, "forms": list(n.forms)} for n in notebooks.available()]


def _checkpoints() -> list[dict]:
    from hmlab import pretrained

    return [{"name": name} for name in pretrained.names()]


def _dashboards() -> list[dict]:
    from hmlab.lab import dashboards_in

    return [{"name": dashboard.name, "title": dashboard.title} for dashboard in dashboards_in()]
