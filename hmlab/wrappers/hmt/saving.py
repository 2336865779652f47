"""A wrapper on disk: its own parameters as one safetensors file, the backbone beside it if wanted.

    FOLDER/hmt.safetensors     T, memory, W_q, W_k, temperature; the configuration in the header
    FOLDER/adapter/            adapters inside the backbone (LoRA), where there are any
    FOLDER/backbone/           the backbone, with include_backbone=True

Errors: ValueError for a folder that holds something else, or a backbone that it does not fit.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from hmlab import atomic
from hmlab.model import LanguageModel
from hmlab.registry import from_fields
from hmlab.wrappers.hmt.config import Config

if TYPE_CHECKING:
    from hmlab.wrappers.hmt.network import HMT

FILE, FORMAT = "hmt.safetensors", "hmlab-hmt-1"


def own_state(hmt: HMT) -> dict[str, Tensor]:
    """The wrapper's parameters by name, without the backbone's."""
    return {name: value for name, value in hmt.state_dict().items() if not name.startswith("backbone.")}


def save_pretrained(self: HMT, folder: str | Path, include_backbone: bool = False) -> None:
    """Write the wrapper into a folder; adapters inside the backbone are the wrapper's too."""
    from safetensors.torch import save

    folder, adapted = Path(folder), hasattr(self.backbone, "peft_config")
    if adapted and include_backbone:
        raise ValueError("include_backbone: expected False for a backbone with adapters, which are written alone "
                         "(merge them into it first with merge_and_unload), got True")  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    if adapted:
        self.backbone.save_pretrained(str(folder / "adapter"), safe_serialization=True)
    if include_backbone:
        _as_transformers(self.backbone).save_pretrained(str(folder / "backbone"))
    header = {"format": FORMAT, "width": str(self.reader.width), "config": json.dumps(asdict(self.config))}
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in own_state(self).items()}
    atomic.write_bytes(folder / FILE, save(tensors, header))


def from_pretrained(cls: type[HMT], folder: str | Path, backbone: nn.Module | None = None) -> HMT:
    """What `save_pretrained` wrote, round a backbone, or round the one that was written with it."""
    from safetensors import safe_open

    folder = Path(folder)
    if not (folder / FILE).is_file():
        raise ValueError(f"folder: expected {FILE} in it, got {folder} without")
    with safe_open(folder / FILE, "pt") as file:
        header = file.metadata() or {}
        if header.get("format") != FORMAT:
            raise ValueError(f"folder: expected the format {FORMAT}, got {header.get('format')!r}")
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    if backbone is None:
        backbone = _backbone(folder)
    if (folder / "adapter").is_dir():
        from peft import PeftModel

        if hasattr(backbone, "peft_config"):
            raise ValueError("backbone: expected one without adapters, which the folder has, got one with")
        # One that has a name lies in a folder of that name.
        (place,) = (found.parent for found in (folder / "adapter").rglob("adapter_config.json"))
        name = "default" if place.name == "adapter" else place.name
        backbone = PeftModel.from_pretrained(backbone, str(place), adapter_name=name, is_trainable=True)
    hmt = cls(backbone, from_fields(Config, json.loads(header["config"])))
    if int(header["width"]) != hmt.reader.width:
        raise ValueError(f"backbone: expected width {header['width']}, got {hmt.reader.width}")
    own = own_state(hmt)
    hmt.load_state_dict({**hmt.state_dict(), **{name: tensors[name].to(own[name].device) for name in own}})
    return hmt.eval()


def _as_transformers(backbone: nn.Module) -> Any:
    from hmlab import hf

    return hf.as_causal_lm(backbone) if isinstance(backbone, LanguageModel) else backbone


def _backbone(folder: Path) -> Any:
    if not (folder / "backbone").is_dir():
        raise ValueError(f"backbone: expected a model, since {folder.name} holds none, got None")
    from transformers import AutoModelForCausalLM

    from hmlab import hf

    model = AutoModelForCausalLM.from_pretrained(folder / "backbone", use_safetensors=True, local_files_only=True)
    return hf.as_language_model(model) if model.config.model_type == "hmlab" else model
