"""Trained models as single safetensors files: weights, and configuration, encoding and provenance in the header.

The small ones that come with hmlab lie in `data/checkpoints`; `load("logmem-32")` finds them by name.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from hmlab.assets import assets_root
from hmlab.model import LanguageModel
from hmlab.registry import UnknownName, from_dict, to_dict

_FORMAT = "hmlab-model-1"


class Pretrained(NamedTuple):
    """model: in evaluation mode. encoding: the one it was trained with. provenance: how it came to be."""

    model: LanguageModel
    encoding: Any
    provenance: dict[str, Any]


def names() -> list[str]:
    """Names of the models that come with hmlab."""
    return sorted(path.stem for path in (assets_root() / "data" / "checkpoints").glob("*.safetensors"))


def save(path: str | Path, model: LanguageModel, encoding: Any, provenance: Mapping[str, Any]) -> None:
    """Write a model, atomically: the file is there whole or not at all."""
    from safetensors.torch import save_file

    path = Path(path)
    header = {
        "format": _FORMAT,
        "model": json.dumps(to_dict(model.config)),
        "encoding": encoding.to_json(),
        "provenance": json.dumps(dict(provenance)),
    }
    partial = path.with_name(path.name + ".partial")
    save_file({name: value.detach().contiguous() for name, value in model.state_dict().items()}, partial, header)
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)


def load(name_or_path: str | Path) -> Pretrained:
    """Read a model by the name of one that comes with hmlab, or by path.

    Raises UnknownName for a name that is neither, ValueError for a file of another format.
    """
    from safetensors import safe_open

    from hmlab.encodings import from_json

    path = Path(name_or_path)
    if not path.exists():
        path = assets_root() / "data" / "checkpoints" / f"{name_or_path}.safetensors"
    if not path.exists():
        raise UnknownName("model file", str(name_or_path), names())
    with safe_open(path, "pt") as file:
        header = file.metadata() or {}
        if header.get("format") != _FORMAT:
            raise ValueError(f"{path.name}: expected a model in the format {_FORMAT}, got {header.get('format')!r}")
        weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    model = from_dict(json.loads(header["model"])).build()
    model.load_state_dict(weights)
    return Pretrained(model.eval(), from_json(header["encoding"]), json.loads(header["provenance"]))
