"""Recurrent networks: GRU and LSTM.

Source: Cho et al. 2014 (GRU, arXiv 1406.1078, with the reset gate behind the matrix as in `torch.nn.GRU`); Hochreiter
and Schmidhuber 1997 (LSTM, doi 10.1162/neco.1997.9.8.1735, with forget gates as in `torch.nn.LSTM`).

    GRU:   r, z = σ(W x_t + U h_{t-1} + b),  n = tanh(W_n x_t + b_n + r ⊙ (U_n h_{t-1} + c_n)),
           h_t = (1 - z) ⊙ n + z ⊙ h_{t-1}
    LSTM:  i, f, o = σ(W x_t + U h_{t-1} + b),  g = tanh(W_g x_t + U_g h_{t-1} + b_g),
           c_t = f ⊙ c_{t-1} + i ⊙ g,  h_t = o ⊙ tanh(c_t)
    y_t = h_t of the last layer

Symbols: E `dim` (of x, h and c), h `State.hidden`, c `State.cell`.
Units: `state_norm` (recorded) is the norm of y_t; h lies between -1 and 1. The state holds E numbers per layer (GRU) or
2·E (LSTM), always.
Errors: `ValueError` naming the field of `Config`, or the argument of a call, that is not what was expected.
Deviations: none. torch.compile takes it with `torch._dynamo.config.allow_rnn`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from hmlab.layers import check_positive
from hmlab.memory import Memory
from hmlab.record import observe


class State(NamedTuple):
    """hidden: h of each layer. cell: c of each layer; a GRU has none."""

    hidden: Float[Tensor, "batch layers dim"]
    cell: Float[Tensor, "batch cells dim"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """dim: E. cell: gru or lstm. layers: recurrent layers on top of one another."""

    dim: int
    cell: Literal["gru", "lstm"] = "gru"
    layers: int = 1

    def __post_init__(self) -> None:
        check_positive(self, "dim", "layers")
        if self.cell not in ("gru", "lstm"):
            raise ValueError(f"cell: expected gru or lstm, got {self.cell!r}")

    def build(self) -> Recurrent:
        return Recurrent(self)


class Recurrent(Memory):
    """`torch.nn.GRU` or `torch.nn.LSTM`, which begins anew with each document."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, self.dim = config, config.dim
        network = nn.LSTM if config.cell == "lstm" else nn.GRU
        self.network = network(config.dim, config.dim, config.layers, batch_first=True)

    def init_state(self, batch, *, device=None, dtype=None):
        def zeros(layers: int) -> Tensor:
            return self.network.weight_hh_l0.new_zeros(batch, layers, self.dim, device=device, dtype=dtype)

        return State(zeros(self.config.layers), zeros(self.config.layers if self.config.cell == "lstm" else 0))

    def forward(self, x, state=None, *, tokens=None, reset=None, valid=None):
        self.check_input(x, tokens, reset, valid, state)
        if state is None:
            state = self.init_state(len(x), device=x.device, dtype=x.dtype)
        if not x.shape[1]:
            return x, state
        if reset is None and valid is None:
            y, state = self._run(x, state)
        else:
            y, state = self._masked(x, state, reset, valid)
        observe("state_norm", lambda: y.norm(dim=-1), ("batch", "time"))
        return y, state

    def _run(self, x: Float[Tensor, "batch time dim"], state: State) -> tuple[Float[Tensor, "batch time dim"], State]:
        hidden, cell = (t.transpose(0, 1).contiguous() for t in state)
        if self.config.cell == "gru":
            y, hidden = self.network(x, hidden)
        else:
            y, (hidden, cell) = self.network(x, (hidden, cell))
        return y, State(*(t.transpose(0, 1).clone(memory_format=torch.contiguous_format) for t in (hidden, cell)))

    def _masked(self, x: Float[Tensor, "batch time dim"], state: State, reset: Bool[Tensor, "batch time"] | None,
                valid: Bool[Tensor, "batch time"] | None) -> tuple[Float[Tensor, "batch time dim"], State]:
        """Token by token: the networks of torch cannot begin anew, nor wait, in the middle of a row."""
        outputs = []
        for t, token in enumerate(x.split(1, 1)):  # not slices: each would get a gradient as long as x
            if reset is not None:
                state = State(*(torch.where(reset[:, t, None, None], 0, held) for held in state))
            if valid is None:
                y, state = self._run(token, state)
            else:
                there = valid[:, t, None, None]
                y, after = self._run(torch.where(there, token, 0), state)
                y = torch.where(there, y, 0)
                state = State(*(torch.where(there, new, old) for new, old in zip(after, state, strict=True)))
            outputs.append(y)
        return torch.cat(outputs, 1), state
