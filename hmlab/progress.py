"""Where a training stands: what goes into a checkpoint, and comes back from it bit for bit."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hmlab.diagnosis import Watch


class Progress:
    """All that a training consists of besides data and parameters; `train` advances it in place.

    Making one seeds the generators of Python, numpy and torch. `state` and `restore` are the way to a
    checkpoint and back, between two steps.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, *, seed: int = 0) -> None:
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        self.model = model
        self.optimizer = optimizer
        self.generator = torch.Generator().manual_seed(seed)  # draws the training batches
        self.watch = Watch()
        self.step = 0
        self.tokens = 0
        self.elapsed = 0.0
        self.tokens_per_second = math.nan

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors (not copied) and JSON-able facts: optimizer, random generators, counters, recent past."""
        tensors = {"random/torch": torch.get_rng_state(), "random/data": self.generator.get_state()}
        if torch.cuda.is_available():
            tensors |= {f"random/cuda{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
        for name, parameter in self.model.named_parameters():
            state = self.optimizer.state.get(parameter, {})
            tensors |= {f"optimizer/{name}/{key}": value for key, value in state.items()}
        past, watch = self.watch.state()
        tensors |= {f"watch/{name}": tensor for name, tensor in past.items()}
        kind, keys, *rest = np.random.get_state()
        facts = {
            "step": self.step, "tokens": self.tokens, "elapsed": self.elapsed,
            "watch": watch, "python": random.getstate(), "numpy": [kind, keys.tolist(), *rest],
        }  # fmt: skip
        return tensors, facts

    def restore(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Go on from what `state` gave; the model's parameters must already be those of that moment."""
        for name, parameter in self.model.named_parameters():
            prefix = f"optimizer/{name}/"
            self.optimizer.state[parameter] = {
                key.removeprefix(prefix): tensor.to(parameter.device, copy=True)
                for key, tensor in tensors.items()
                if key.startswith(prefix)
            }
        device = next(self.model.parameters()).device
        past = {key.removeprefix("watch/"): t for key, t in tensors.items() if key.startswith("watch/")}
        self.watch.restore(past, facts["watch"], device)
        self.step, self.tokens, self.elapsed = facts["step"], facts["tokens"], facts["elapsed"]
        version, keys, gauss = facts["python"]
        random.setstate((version, tuple(keys), gauss))
        np.random.set_state(tuple(facts["numpy"]))
        torch.set_rng_state(tensors["random/torch"])
        self.generator.set_state(tensors["random/data"])
        for i in range(torch.cuda.device_count()):
            if f"random/cuda{i}" in tensors:
                torch.cuda.set_rng_state(tensors[f"random/cuda{i}"], i)
