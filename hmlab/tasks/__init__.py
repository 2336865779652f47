"""What models are trained and judged on. Every task gives `Batch`es; training and views know only these.

A task is a module of this package with a `Config`, whose `open()` gives its data:

    data = tasks.config("mqar")(context=128, pairs=16).open()
    for batch in data.batches("train", tasks.generator(seed=0, worker=3)): ...
"""

from __future__ import annotations

import hashlib
import importlib
import pkgutil
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
    is unknown. support: for each target that counts, row after row, all positions that it depends on, that of `oracle`
    first and -1 after the last; None if there is never more than that one.
    """

    tokens: Int64[Tensor, "batch time"]
    targets: Int64[Tensor, "batch time"]
    mask: Bool[Tensor, "batch time"]
    reset: Bool[Tensor, "batch time"] | None = None
    valid: Bool[Tensor, "batch time"] | None = None
    slices: Mapping[str, Shaped[Tensor, "batch"]] = MappingProxyType({})
    oracle: Int64[Tensor, "batch time"] | None = None
    support: Int64[Tensor, "answers reads"] | None = None

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        moved = (part.to(device) if isinstance(part, Tensor) else part for part in self)
        return Batch(*moved)._replace(slices={name: label.to(device) for name, label in self.slices.items()})


def names() -> list[str]:
    """Every task of this package, in the order of the alphabet."""
    found = (module.name for module in pkgutil.iter_modules(__path__))
    return sorted(name for name in found if hasattr(importlib.import_module(f"{__name__}.{name}"), "Config"))


def config(name: str) -> type:
    """The Config class of a task. Raises ValueError for a name that no task has."""
    if name not in names():
        raise ValueError(f"name: expected {', '.join(names())}, got {name!r}")
    return importlib.import_module(f"{__name__}.{name}").Config


def summary(name: str) -> str:
    """The first line of a task's documentation."""
    return (importlib.import_module(config(name).__module__).__doc__ or "").strip().partition("\n")[0]


def generator(*, seed: int, worker: int = 0) -> torch.Generator:
    """A generator of its own for each worker that draws batches of a task: the same for a seed and a worker."""
    digest = hashlib.sha256(f"{seed} {worker}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)
