"""Errors and where they come from: the same weights, other choices.

    loss of the model as it is      what there is
    with exact retrieval            without collisions and misses of the codes
    with ratio 1, everything read   without compression either: causal attention with the same projections

The difference of the first two is the codes' error, of the last two that of compression and of reading only some.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from hmlab.memories.harmony.config import HierarchyConfig
from hmlab.memories.harmony.network import Harmony

Model = TypeVar("Model", bound=nn.Module)


def replay(model: Model, **choices: Any) -> Model:
    """A copy of a model, or of a memory, whose HARMONY memories make other choices with the same weights.

    choices: fields of `HierarchyConfig`. What the new choices need and the weights do not have is drawn anew;
    projections and what compresses are always kept, as far as the ratios use it. Raises ValueError by field, or if
    there is no such memory.
    """
    if isinstance(model, Harmony):
        return _changed(model, choices)
    model = copy.deepcopy(model)
    parents = [(parent, name) for parent in model.modules() for name, child in parent.named_children()
               if isinstance(child, Harmony)]  # fmt: skip
    if not parents:
        raise ValueError(f"model: expected one with a HARMONY memory, got {type(model).__name__} without")
    for parent, name in parents:
        setattr(parent, name, _changed(getattr(parent, name), choices))
    return model


def _changed(memory: Harmony, choices: dict[str, Any]) -> Harmony:
    known = {field.name for field in dataclasses.fields(HierarchyConfig)}
    for name in choices:
        if name not in known:
            raise ValueError(f"{name}: expected one of the hierarchy's choices ({', '.join(sorted(known))})")
    weight = memory.query.weight
    with torch.random.fork_rng([]):
        other = dataclasses.replace(memory.config, **choices).build()
    other = other.to(weight.device, weight.dtype).train(memory.training)
    trained = {name: parameter.requires_grad for name, parameter in memory.named_parameters()}
    for name, parameter in other.named_parameters():
        parameter.requires_grad_(trained.get(name, True))
    held, wanted = memory.state_dict(), other.state_dict()
    for name, value in wanted.items():
        old = held.get(name)
        if old is not None and old.shape == value.shape:
            value.copy_(old)
        elif old is not None and name.endswith("compressor.queries"):  # fewer or more slots of the same queries
            most = min(old.shape[1], value.shape[1])
            value[:, :most] = old[:, :most]
    return other


class Attribution(NamedTuple):
    """Nats per token of the next token's cross-entropy, under each replay."""

    as_is: Float[Tensor, "batch time"]
    exact: Float[Tensor, "batch time"]
    uncompressed: Float[Tensor, "batch time"]

    @property
    def collisions(self) -> Float[Tensor, "batch time"]:
        """What codes cost that did not find the best slots."""
        return self.as_is - self.exact

    @property
    def compression(self) -> Float[Tensor, "batch time"]:
        """What slots cost that stand for several tokens, and reading only the best of them."""
        return self.exact - self.uncompressed


@torch.no_grad()
def attribute(model: nn.Module, tokens: Int[Tensor, "batch time"], targets: Int[Tensor, "batch time"]) -> Attribution:
    """The loss of a language model with HARMONY memories, and what it is without their errors."""
    exact = replay(model, retrieval="exact")
    room = max(tokens.shape[1], *(m.config.capacity for m in model.modules() if isinstance(m, Harmony)))
    uncompressed = replay(model, retrieval="all", ratios=(1,), budget=1.0, capacity=room, phase=True)
    losses = []
    for one in (model, exact, uncompressed):
        training = one.training
        logits, _ = one.eval()(tokens)
        one.train(training)
        losses.append(F.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none"))
    return Attribution(*losses)
