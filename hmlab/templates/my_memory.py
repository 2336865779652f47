"""A leaky integrator: the smallest complete memory. Copy this file, rename it, replace the equation.

Equation (per channel; a is learned, between 0 and 1):

    h_t = a * h_{t-1} + (1 - a) * (W_in x_t)        h_0 = 0
    y_t = W_out h_t

Symbols: a `decay` (the sigmoid of the parameter `logit`), h `State.total`, W_in `write`, W_out `read`.
Units: `state_norm` (recorded) is the Euclidean norm of h, in units of the input.
Errors: `ValueError` naming x, tokens, reset or valid where their shape or type is not what `Memory` asks for.
Source: write here where the equation comes from, and where the code departs from it.

To prove it:

    python my_memory.py

To see it in every command and view, name it in the `pyproject.toml` of your package and install that:

    [project.entry-points."hmlab.memories"]
    my_memory = "my_package.my_memory:Config"
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hmlab.memory import Memory
from hmlab.record import observe


class State(NamedTuple):
    """All that is remembered; tensors only, batch first. A memory that counts tokens keeps the count here too."""

    total: Float[Tensor, "batch dim"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """dim: width of x and y. decay: share of h that is kept per token at the start of training."""

    dim: int
    decay: float = 0.9

    def __post_init__(self):
        if self.dim < 1:
            raise ValueError(f"dim: expected at least 1, got {self.dim}")
        if not 0 < self.decay < 1:
            raise ValueError(f"decay: expected a number between 0 and 1, got {self.decay}")

    def build(self) -> MyMemory:
        return MyMemory(self)


class MyMemory(Memory):
    def __init__(self, config: Config):
        super().__init__()
        self.dim = config.dim
        self.write = nn.Linear(config.dim, config.dim, bias=False)
        self.read = nn.Linear(config.dim, config.dim, bias=False)
        self.logit = nn.Parameter(torch.logit(torch.full((config.dim,), config.decay)))

    def init_state(self, batch, *, device=None, dtype=None):
        return State(self.logit.new_zeros(batch, self.dim, device=device, dtype=dtype))

    def forward(self, x, state=None, *, tokens=None, reset=None, valid=None):
        self.check_input(x, tokens, reset, valid, state)
        if state is None:
            state = self.init_state(len(x), device=x.device, dtype=x.dtype)
        decay = torch.sigmoid(self.logit)
        if valid is not None:  # before anything is computed from it: padding may hold anything, NaN included
            x = x.masked_fill(~valid[..., None], 0)
        written = (1 - decay) * self.write(x)
        keep = decay.expand_as(written)
        if valid is not None:  # padding keeps everything
            keep = keep.masked_fill(~valid[..., None], 1)
        if reset is not None:  # a document begins: nothing is kept
            keep = keep.masked_fill(reset[..., None], 0)
        total = scan(keep, written, state.total)
        observe("state_norm", lambda: total.norm(dim=-1), ("batch", "time"))
        y = self.read(total)
        if valid is not None:
            y = y.masked_fill(~valid[..., None], 0)
        # A slice would hold the storage of every token alive: the last one is copied.
        return y, State(total[:, -1].clone()) if x.shape[1] else state

    def step(self, x, state, *, tokens=None):
        """Optional: `Memory.step` calls `forward` with one token, which is right but slower."""
        self.check_input(x[:, None], None if tokens is None else tokens[:, None], state=state)
        decay = torch.sigmoid(self.logit)
        total = decay * state.total + (1 - decay) * self.write(x)
        observe("state_norm", lambda: total.norm(dim=-1)[:, None], ("batch", "time"))
        return self.read(total), State(total)


def scan(keep: Float[Tensor, "batch time dim"], written: Float[Tensor, "batch time dim"],
         start: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch time dim"]:
    """h_t = keep_t * h_{t-1} + written_t for all t at once, by doubling: log2(time) passes."""
    shift = 1
    while shift < keep.shape[1]:
        # Entry t covers the `shift` tokens up to t; joined with entry t - shift it covers twice as many.
        earlier = nn.functional.pad(written[:, :-shift], (0, 0, shift, 0))
        written = written + keep * earlier
        keep = keep * nn.functional.pad(keep[:, :-shift], (0, 0, shift, 0), value=1.0)
        shift *= 2
    return written + keep * start[:, None]


if __name__ == "__main__":
    from hmlab.testing import check_memory

    print(check_memory(Config(dim=16)))
