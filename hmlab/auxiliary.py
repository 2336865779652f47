"""Losses that memories ask for beside the task's: a memory `add`s, the training loop `collect`s.

    with collect() as losses:
        logits, _ = model(tokens)
    loss = cross_entropy(logits, targets) + sum(losses.values())

Adding is a no-op unless somebody collects, so that a forward pass outside of training computes none of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from jaxtyping import Float
from torch import Tensor

_active: ContextVar[dict[str, Tensor] | None] = ContextVar("hmlab_auxiliary", default=None)


@contextmanager
def collect() -> Iterator[dict[str, Tensor]]:
    """Collect what is added inside, by name; what several layers add under one name is summed."""
    losses: dict[str, Tensor] = {}
    token = _active.set(losses)
    try:
        yield losses
    finally:
        _active.reset(token)


def collecting() -> bool:
    """Whether an added loss would be kept now."""
    return not torch.compiler.is_compiling() and _active.get() is not None


def add(name: str, loss: Callable[[], Float[Tensor, ""]]) -> None:
    """Add a loss, in nats per target or what is weighed against them; it is computed only if somebody collects."""
    if collecting():
        losses = _active.get()
        value = loss()
        losses[name] = losses[name] + value if name in losses else value
