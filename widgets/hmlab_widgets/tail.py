"""Following runs on disk: what has changed since the last look is read again, and nothing else.

    tail = Tail(store.open(id))
    if tail.poll():
        tail.info, tail.metrics
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from hmlab.runs import Run, Store

POINTS = 1000
RECENT = 50
LIVE = ("running", "paused")


class Tail:
    """One run: `info` (its `run.json`) and `metrics` as they were at the last `poll` that returned True."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.info: dict[str, Any] = {}
        self.metrics: xr.Dataset | None = None
        self._info_stamp: tuple | None = None
        self._rows_stamp: tuple | None = None

    def poll(self) -> bool:
        """Read what has changed; whether anything had. FileNotFoundError once the run is deleted."""
        return any([self.poll_info(), self._poll_metrics()])

    def poll_info(self) -> bool:
        """The same for `info` alone."""
        # The stamp is taken before the reading: what changes in between is seen at the next poll.
        stamp = (_modified(self.run.folder / "run.json"), self.run.locked())
        if stamp == self._info_stamp:
            return False
        self.info, self._info_stamp = self.run.info, stamp
        return True

    def _poll_metrics(self) -> bool:
        chunks = self.run.folder / "metrics.zarr" / "step" / "c"
        stamp = tuple(sorted((e.name, e.stat().st_mtime_ns) for e in os.scandir(chunks))) if chunks.is_dir() else ()
        if stamp == self._rows_stamp:
            return False
        self.metrics, self._rows_stamp = self.run.metrics(), stamp
        return True


class Listing:
    """The `run.json` of all runs of a store, the newest run first; `poll` reads those that have changed."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._tails: dict[str, Tail] = {}
        self.infos: list[dict[str, Any]] = []

    def poll(self) -> bool:
        """Whether anything has changed."""
        before = list(self._tails)
        self._tails = {id: self._tails.get(id) or Tail(Run(self._store.folder / id)) for id in self._store.ids()}
        changed = before != list(self._tails)
        for id in list(self._tails):
            try:
                changed |= self._tails[id].poll_info()
            except FileNotFoundError:
                del self._tails[id]
        if changed:
            self.infos = sorted((t.info for t in self._tails.values()), key=lambda i: i["started"], reverse=True)
        return changed


@dataclass(frozen=True, kw_only=True)
class Standing:
    """Where a run stands. Losses in nats/token; seconds_left is None unless it is running and can be told."""

    step: int
    steps: int
    loss: float
    valid_loss: float
    best_valid_loss: float
    gradient_norm: float
    tokens_per_second: float
    memory_bytes: int
    elapsed: float
    seconds_left: float | None


def standing(info: dict[str, Any], metrics: xr.Dataset) -> Standing:
    """The newest numbers; NaN for those there are none of yet. `loss` is the mean of the last batches."""
    rows = metrics.sizes["step"]
    recent = metrics.isel(step=slice(max(rows - RECENT, 0), rows))
    valid = metrics["valid_loss"].values
    valid = valid[np.isfinite(valid)]

    def last(name: str) -> float:
        return metrics[name].values[-1].item() if rows else np.nan

    left = None
    if info["state"] == "running" and recent.sizes["step"] > 1:
        elapsed = recent["elapsed"].values
        left = float((elapsed[-1] - elapsed[0]) / (len(elapsed) - 1) * (info["steps"] - rows))
    return Standing(
        step=rows, steps=info["steps"],
        loss=float(recent["loss"].mean()) if rows else np.nan,
        valid_loss=float(valid[-1]) if len(valid) else np.nan,
        best_valid_loss=float(valid.min()) if len(valid) else np.nan,
        gradient_norm=last("gradient_norm"), tokens_per_second=last("tokens_per_second"),
        memory_bytes=int(last("memory_bytes")) if rows else 0, elapsed=last("elapsed"), seconds_left=left,
    )  # fmt: skip


def side_by_side(metrics: dict[str, xr.Dataset], points: int = POINTS) -> xr.Dataset:
    """Metrics of several runs, thinned, under the labels given: dims run, step. Without any run, without steps."""
    thin = [thinned(dataset, points) for dataset in metrics.values()]
    together = xr.concat(thin, xr.Variable("run", list(metrics)), join="outer", combine_attrs="override")
    together["step"].attrs = thin[0]["step"].attrs
    return together


def thinned(metrics: xr.Dataset, points: int = POINTS) -> xr.Dataset:
    """At most about `points` rows: means over equal stretches of steps, each at its last step."""
    metrics = metrics.astype("float64")
    block = -(-metrics.sizes["step"] // points)
    if block < 2:
        return metrics
    return metrics.coarsen(step=block, boundary="pad", coord_func="max").mean()


def _modified(path) -> int:
    return os.stat(path).st_mtime_ns
