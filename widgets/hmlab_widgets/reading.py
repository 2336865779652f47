"""A text read by a model, with all that its memories observed: what the inspector shows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import xarray as xr

from hmlab import pretrained
from hmlab.record import record
from hmlab.runs import Store

if TYPE_CHECKING:
    from hmlab.pretrained import Pretrained

MOST = 2000  # tokens of one reading


@dataclass
class Reading:
    """recording: the observations. probabilities: of the next token, dims time, token. pieces: text of each token."""

    model: Pretrained
    tokens: torch.Tensor
    pieces: list[str]
    recording: xr.Dataset | None
    probabilities: xr.DataArray
    _bytes: dict[int, int] = field(default_factory=dict)

    def state_bytes(self, time: int) -> int:
        """Bytes of state after the token at `time`."""
        if time not in self._bytes:
            with torch.no_grad():
                _, state = self.model.model(self.tokens[:, : time + 1])
            self._bytes[time] = self.model.model.state_bytes(state)
        return self._bytes[time]

    def surprise(self, time: int) -> float | None:
        """Bits by which the token after `time` surprised the model; None at the end."""
        if time + 1 >= len(self.pieces):
            return None
        odds = self.probabilities.values[time, int(self.tokens[0, time + 1])]
        return float(-torch.log2(torch.tensor(odds)))


def sources(store: Store) -> dict[str, str]:
    """What can be inspected, label to key: the models that come with hmlab, then runs that have a checkpoint."""
    found = {f"{name} (comes with hmlab)": f"model:{name}" for name in pretrained.names()}
    for info in store.list():
        if info.step:
            found[f"run {info.id} (step {info.step:,})"] = f"run:{info.id}"
    return found


def load(key: str, store: Store) -> Pretrained:
    """A model by its key from `sources`. Raises UnknownName, UnknownRun."""
    kind, _, name = key.partition(":")
    return store.open(name).pretrained() if kind == "run" else pretrained.load(name)


def read(model: Pretrained, text: str) -> Reading:
    """Read a text, at most `MOST` tokens of it. Raises ValueError: nothing to read, or characters not known."""
    ids = torch.from_numpy(model.encoding.encode(text)).long()[:MOST]
    if not len(ids):
        raise ValueError("text: expected at least one token, got none")
    if model.model.config.context:  # learned positions end somewhere
        ids = ids[: model.model.config.context]
    with torch.no_grad(), record(model.model) as recording:
        logits, _ = model.model(ids[None])
    try:
        seen = recording.dataset()
    except RuntimeError:  # a memory that observes nothing
        seen = None
    pieces = [model.encoding.decode(ids[n : n + 1].numpy()) for n in range(len(ids))]
    vocabulary = [model.encoding.decode(torch.tensor([n]).numpy()) for n in range(model.encoding.vocab_size)]
    probabilities = xr.DataArray(
        logits[0].float().softmax(-1).numpy(), dims=("time", "token"), coords={"piece": ("token", vocabulary)}
    )
    return Reading(model, ids[None], pieces, seen, probabilities)
