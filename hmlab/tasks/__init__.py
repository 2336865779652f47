"""What models are trained and judged on. Every task gives `Batch`es; training and views know only these."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int64, Shaped
from torch import Tensor


class Batch(NamedTuple):
    """Sequences with what to predict.

    tokens: ids that the model reads. targets: the id to predict at each position. mask: which targets count.
    reset: True at the first token of a document; None if each row is one document. valid: False at padding;
    None if there is none. slices: labels of each sequence to report results by, such as its difficulty.
    oracle: for each position, the position that holds what the target depends on, -1 for none; None if that
    is unknown.
    """

    tokens: Int64[Tensor, "batch time"]
    targets: Int64[Tensor, "batch time"]
    mask: Bool[Tensor, "batch time"]
    reset: Bool[Tensor, "batch time"] | None = None
    valid: Bool[Tensor, "batch time"] | None = None
    slices: Mapping[str, Shaped[Tensor, "batch"]] = MappingProxyType({})
    oracle: Int64[Tensor, "batch time"] | None = None

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        moved = (part.to(device) if isinstance(part, Tensor) else part for part in self)
        return Batch(*moved)._replace(slices={name: label.to(device) for name, label in self.slices.items()})
