"""A book read to its end: a progress bar, memory that stays flat, and a state on disk to go on from.

    reading = read(model, ids, "war-and-peace.safetensors")     # Ctrl-C, and the same call again: it goes on
    model.generate(None, state=reading.state, max_new_tokens=200)
"""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Int
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.utils import _pytree as pytree

from hmlab import atomic
from hmlab.wrappers.hmt.config import State
from hmlab.wrappers.hmt.network import HMT
from hmlab.wrappers.hmt.saving import own_state

# Seconds between two states on disk.
KEPT_EVERY = 30.0
SEGMENTS_PER_CALL = 16


class Reading(NamedTuple):
    """state: behind the last token. tokens: read, per row. loss: mean nats per predicted token. seconds: of reading,
    the interrupted calls' too."""

    state: State
    tokens: int
    loss: float
    seconds: float


@torch.no_grad()
def read(hmt: HMT, ids: Int[Tensor, "batch time"], path: str | Path | None = None, *, show: bool = True) -> Reading:
    """Read all of `ids`, or what is left of them behind the state in the file `path`, which is kept as it goes.

    show: draw a progress bar on the error stream. Ctrl-C leaves a file from which the same call goes on. Raises
    ValueError for a file that belongs to another text or wrapper.
    """
    if ids.ndim != 2 or not ids.shape[1]:
        raise ValueError(f"ids: expected [batch, time] with at least one token, got {list(ids.shape)}")
    path, ids = None if path is None else Path(path), ids.long()
    about = {"text": _digest(ids), "wrapper": _fingerprint(hmt)}
    state, begin, total, seconds = _restore(hmt, len(ids), path, about)
    training, length = hmt.training, hmt.config.segment_length
    hmt.eval()
    last = clock = time.monotonic()

    def keep() -> None:
        if path is not None:
            _keep(state, path, {**about, "tokens": begin, "nats": total, "seconds": seconds + time.monotonic() - clock})

    with Progress(TextColumn("reading"), BarColumn(), MofNCompleteColumn(), TextColumn("tokens"),
                  TimeRemainingColumn(), console=Console(stderr=True), disable=not show) as bar:  # fmt: skip
        task = bar.add_task("reading", total=ids.shape[1], completed=begin)
        try:
            while begin < ids.shape[1]:
                end = min(begin + SEGMENTS_PER_CALL * length, ids.shape[1])
                # What follows the call's last token is looked at, not read.
                part, state = _call(hmt, ids[:, begin:end], ids[:, begin + 1 : end + 1], state)
                begin, total = end, total + part
                bar.update(task, completed=begin)
                if time.monotonic() - last > KEPT_EVERY:
                    keep()
                    last = time.monotonic()
        finally:
            # In a notebook a bar is not drawn once more where it ends.
            bar.refresh()
            hmt.train(training)
            keep()
    predicted = max(ids.shape[0] * (ids.shape[1] - 1), 1)
    return Reading(state, begin, total / predicted, seconds + time.monotonic() - clock)


def _call(hmt: HMT, ids: Tensor, following: Tensor, state: State) -> tuple[float, State]:
    """Sum of the nats of the tokens that follow each of `ids`, as far as there are any, and the state behind."""
    layout, state, call = hmt._call(ids, None, state, None)
    targets = torch.full_like(ids, -100)
    targets[:, : following.shape[1]] = following
    total, state = call(layout.place(targets, -100), None)
    return float(total), state


def _fingerprint(hmt: HMT) -> str:
    """Of the configuration and the weights, of the backbone's the first few numbers of each: there may be billions."""
    found = hashlib.sha256(repr(hmt.config).encode())
    for name, value in hmt.state_dict().items():
        few = value if name in own_state(hmt) else value.flatten()[:8]
        found.update(name.encode() + _digest(few.float()).encode())
    return found.hexdigest()[:16]


def _digest(*tensors: Tensor) -> str:
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(str(list(tensor.shape)).encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def _keep(state: State, path: Path, facts: dict[str, object]) -> None:
    from safetensors.torch import save

    leaves = {pytree.keystr(k): v.detach().cpu().contiguous().clone()
              for k, v in pytree.tree_flatten_with_path(state)[0]}  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_bytes(path, save(leaves, {"reading": json.dumps(facts)}))


def _restore(hmt: HMT, batch: int, path: Path | None, about: dict[str, str]) -> tuple[State, int, float, float]:
    from safetensors import safe_open

    from hmlab.memory import load_state

    blank = hmt.init_state(batch)
    if path is None or not path.exists():
        return blank, 0, 0.0, 0.0
    with safe_open(path, "pt") as file:
        facts = json.loads((file.metadata() or {}).get("reading", "{}"))
    for key, name in (("text", "text"), ("wrapper", "model")):
        if facts.get(key) != about[key]:
            raise ValueError(f"path: expected a file that does not exist or belongs to this {name}, got {path.name}")
    return load_state(blank, path), facts["tokens"], facts["nats"], facts["seconds"]
