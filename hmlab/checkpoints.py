"""Checkpoints: a folder per moment, named by its step, without pickle; the newest is the one that counts.

A new one takes its place by a rename before the older ones go, so there is always a whole one.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from hmlab import atomic, pretrained
from hmlab.encodings import Encoding
from hmlab.model import LanguageModel

MODEL = "model.safetensors"


def save(folder: Path, model: LanguageModel, encoding: Encoding, provenance: Mapping[str, Any],
         tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Path:
    """Write a checkpoint and remove those before it.

    model, encoding, provenance: as for `hmlab.pretrained.save`. tensors, facts: what
    `hmlab.progress.Progress.state` gives.
    """
    from safetensors.torch import save_file

    path = folder / f"{facts['step']:08d}"
    if not path.exists():
        with atomic.new_folder(path) as partial:
            pretrained.save(partial / MODEL, model, encoding, provenance)
            # Tensors that share storage are refused by the format.
            save_file({key: t.detach().cpu().contiguous().clone() for key, t in tensors.items()},
                      partial / "training.safetensors")
            atomic.write_json(partial / "training.json", dict(facts))
    for older in all_of(folder):
        if older != path:
            shutil.rmtree(older)
    return path


def all_of(folder: Path) -> list[Path]:
    """The whole checkpoints in a folder, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_dir() and path.name.isdecimal())


def load(path: Path) -> tuple[LanguageModel, dict[str, Tensor], dict[str, Any]]:
    """Model, tensors and facts as they were saved."""
    from safetensors.torch import load_file

    model = pretrained.load(path / MODEL).model
    facts = json.loads((path / "training.json").read_text(encoding="utf-8"))
    return model, load_file(path / "training.safetensors"), facts
