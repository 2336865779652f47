"""Weights of HMT's authors, as their training script saves them, in our wrapper.

    …memory_cell.model.*     the backbone
    …mem, …memory            T [1, width], P of the first segment [memories, width]
    …wq.weight, …wk.weight   W_q, W_k [recall_dim, width]

They search with plain products, so the configuration has `key_norm=False`; with `query="prefix"` the logits are theirs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from hmlab.wrappers.hmt.network import HMT

_OURS = {"mem": "summary", "memory": "memory", "wq.weight": "recall.query.weight", "wk.weight": "recall.key.weight"}
_BACKBONE = "memory_cell.model."


@torch.no_grad()
def load_authors(self: HMT, weights: Mapping[str, Tensor] | str | Path) -> HMT:
    """Take over the authors' weights: a state dictionary, or the path of a safetensors file.

    (`torch.load(path, weights_only=True)` makes a state dictionary of their `.bin` files without running what is in
    them.) The backbone's weights are taken where they are there. Raises ValueError, the wrapper as it was, naming what
    is missing or of another shape.
    """
    if self.config.query == "none" or self.config.key_norm:
        raise ValueError("config: expected key_norm=False and a query, as the authors' recall has, got "
                         f"key_norm={self.config.key_norm}, query={self.config.query!r}")  # fmt: skip
    if isinstance(weights, str | Path):
        from safetensors.torch import load_file

        weights = load_file(weights)
    found: dict[str, Tensor] = {}
    backbone = {name.partition(_BACKBONE)[2]: value for name, value in weights.items() if _BACKBONE in name}
    for theirs, ours in _OURS.items():
        held = [value for name, value in weights.items()
                if _BACKBONE not in name and (name == theirs or name.endswith(f".{theirs}"))]  # fmt: skip
        expected = self.get_parameter(ours)
        if len(held) != 1:
            raise ValueError(f"weights: expected one tensor called {theirs}, got {len(held)}")
        value = held[0].reshape(-1, held[0].shape[-1])
        if value.shape != expected.shape:
            raise ValueError(f"weights: expected {theirs} {list(expected.shape)}, got {list(value.shape)}")
        found[ours] = value
    if backbone:
        own = self.reader.model.state_dict()
        wrong = [name for name, value in own.items()
                 if name not in backbone or backbone[name].shape != value.shape]  # fmt: skip
        # A head that is tied to the embedding may have been left out.
        wrong = [name for name in wrong if own[name].data_ptr() != self.reader.weight.data_ptr()]
        if wrong:
            raise ValueError(f"weights: expected the backbone's {len(own)} tensors, {wrong[0]} is missing or has "
                             "another shape")  # fmt: skip
        self.reader.model.load_state_dict(backbone, strict=False)
    for name, value in found.items():
        self.get_parameter(name).copy_(value)
    return self
