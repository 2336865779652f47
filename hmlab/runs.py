"""The run store: a folder of runs, each a folder with `run.json`, `metrics.zarr` and `checkpoint`.

    store = Store()                        # ./runs, or what HMLAB_RUNS says
    for info in store.list(): ...
    store.open("logmem-0123456789ab-s0").metrics()     # xarray.Dataset, also while the run goes on

Whoever trains a run holds its lock, which the kernel takes back when the process dies: a run that says it is
running while nobody holds the lock was killed, and counts as interrupted.
"""

from __future__ import annotations

import difflib
import errno
import fcntl
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hmlab import atomic, checkpoints, metrics, pretrained
from hmlab.control import REQUESTS, Request
from hmlab.encodings import Encoding
from hmlab.model import LanguageModel
from hmlab.registry import UnknownName

if TYPE_CHECKING:
    import xarray as xr

State = Literal["running", "paused", "finished", "interrupted", "failed"]
QUOTA = "20GB"
# A run stops while there is still room to say so.
SPARE_BYTES = 100_000_000
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12} | {"KI": 2**10, "MI": 2**20, "GI": 2**30}


class StoreError(RuntimeError):
    """The store cannot do what was asked; the message is one line for the user."""


class UnknownRun(StoreError):
    """There is no such run."""


class RunBusy(StoreError):
    """Another process trains the run."""


class NoSpace(StoreError):
    """The quota is used up, or the disk is nearly full."""


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """One line about a run. Times are ISO 8601, UTC."""

    id: str
    name: str
    hash: str
    seed: int
    state: State
    step: int
    steps: int
    started: str
    updated: str
    parameters: int
    device: str
    error: str | None


class Run:
    """One run on disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.id = folder.name

    @property
    def info(self) -> dict[str, Any]:
        """What `run.json` says, corrected where its writer died before it could."""
        stored = json.loads((self.folder / "run.json").read_text(encoding="utf-8"))
        if stored["state"] in ("running", "paused"):
            if not self.locked():
                # It may have ended between the two looks.
                stored = json.loads((self.folder / "run.json").read_text(encoding="utf-8"))
                if stored["state"] in ("running", "paused"):
                    stored["state"] = "interrupted"
            stored["step"] = metrics.rows(self.folder / "metrics.zarr")
        return stored

    def metrics(self) -> xr.Dataset:
        """All steps so far; variables along `step` as in `hmlab.metrics.VARIABLES`."""
        return metrics.read(self.folder / "metrics.zarr")

    def checkpoint(self) -> Path:
        """Folder of the newest checkpoint; UnknownRun when there is none yet."""
        found = checkpoints.all_of(self.folder / "checkpoint")
        if not found:
            raise UnknownRun(f"run {self.id}: no checkpoint has been written yet")
        return found[-1]

    def pretrained(self) -> pretrained.Pretrained:
        """Model, encoding and provenance of the newest checkpoint, on the CPU."""
        while True:
            path = self.checkpoint()
            try:
                return pretrained.load(path / checkpoints.MODEL)
            except (FileNotFoundError, UnknownName):
                # The training run has replaced it meanwhile.
                if path == self.checkpoint():
                    raise

    def model(self) -> LanguageModel:
        """The model with the parameters of the newest checkpoint, on the CPU."""
        return self.pretrained().model

    @property
    def encoding(self) -> Encoding:
        """What turns text into the model's tokens and back."""
        return self.pretrained().encoding

    def update(self, **fields: Any) -> None:
        """Change fields of `run.json`; only for who holds the lock."""
        path = self.folder / "run.json"
        stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"id": self.id}
        atomic.write_json(path, {**stored, **fields, "updated": now()})

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Be the only one who writes this run; RunBusy when another process is."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("a+", encoding="utf-8") as handle:
            # A reader who asks `locked` holds it for an instant.
            for attempt in range(10):
                if _flock(handle, fcntl.LOCK_EX):
                    break
                time.sleep(0.01 * attempt)
            else:
                handle.seek(0)
                raise RunBusy(f"run {self.id}: it is being trained by {handle.read() or 'another process'}")
            handle.truncate(0)
            handle.write(f"process {os.getpid()} on {socket.gethostname()}")
            handle.flush()
            yield

    def locked(self) -> bool:
        """Whether some process trains this run now."""
        try:
            with (self.folder / "lock").open(encoding="utf-8") as handle:
                return not _flock(handle, fcntl.LOCK_SH)
        except FileNotFoundError:
            return False


class Store:
    """The runs in a folder: the one given, or HMLAB_RUNS, or `./runs`."""

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = Path(folder or os.environ.get("HMLAB_RUNS") or "runs")

    def ids(self) -> list[str]:
        """Of all runs, in the order of the alphabet."""
        return sorted(path.parent.name for path in self.folder.glob("[!.]*/run.json"))

    def list(self) -> list[RunInfo]:
        """All runs, the newest first."""
        found = [self.open(id).info for id in self.ids()]
        lines = [RunInfo(**{name: info[name] for name in RunInfo.__dataclass_fields__}) for info in found]
        return sorted(lines, key=lambda line: line.started, reverse=True)

    def open(self, id: str) -> Run:
        """The run with that id; UnknownRun with near misses when there is none."""
        ids = self.ids()
        if id not in ids:
            near = difflib.get_close_matches(id, ids, n=3, cutoff=0.4)
            hint = f"; did you mean {' or '.join(near)}?" if near else f"; there are {len(ids)} runs"
            raise UnknownRun(f"id: no run {id!r} in {self.folder}{hint}")
        return Run(self.folder / id)

    def find(self, hash: str, seed: int) -> Run | None:
        """The run of a configuration and a seed, whatever its name."""
        found = [id for id in self.ids() if id.endswith(f"-{hash}-s{seed}")]
        return Run(self.folder / found[0]) if found else None

    def compare(self, ids: Sequence[str]) -> xr.Dataset:
        """The metrics of several runs side by side, dims `run`, `step`; NaN where a run has no such step."""
        import xarray as xr

        if not ids:
            raise ValueError("ids: expected one run or more, got none")
        datasets = [self.open(id).metrics() for id in ids]
        # Integers cannot say that there is nothing.
        datasets = [dataset.astype("float64") for dataset in datasets]
        together = xr.concat(datasets, xr.Variable("run", list(ids)), join="outer", combine_attrs="override")
        together["step"].attrs = datasets[0]["step"].attrs
        return together

    def delete(self, id: str) -> None:
        """Remove a run; RunBusy when it is being trained."""
        run = self.open(id)
        with run.lock():
            # Out of sight at once, whatever happens while the files go.
            hidden = self.folder / f".{id}.partial"
            run.folder.rename(hidden)
            shutil.rmtree(hidden)

    def request(self, id: str, request: Request) -> None:
        """Ask a running run to stop (it makes a checkpoint first), to pause or to resume."""
        if request not in REQUESTS:
            raise ValueError(f"request: expected {' or '.join(REQUESTS)}, got {request!r}")
        run = self.open(id)
        if not run.locked():
            raise StoreError(f"run {id}: it is not running, so it cannot {request}")
        atomic.write_bytes(run.folder / "request", request.encode())

    def usage(self) -> int:
        """Bytes that the files of all runs take."""
        total = 0
        for folder, _, files in os.walk(self.folder):
            for file in files:
                try:
                    total += os.lstat(os.path.join(folder, file)).st_size
                except FileNotFoundError:
                    continue  # replaced while we looked
        return total

    def check_space(self, needed: int = 0) -> None:
        """Raise NoSpace when the disk has no room for `needed` bytes and a little more."""
        self.folder.mkdir(parents=True, exist_ok=True)
        free, needed = shutil.disk_usage(self.folder).free, needed + SPARE_BYTES
        if free < needed:
            megabytes = f"{free / 1e6:.0f} MB free for {self.folder}, {needed / 1e6:.0f} MB needed"
            raise NoSpace(f"disk nearly full: {megabytes}")

    def check_quota(self) -> None:
        """Raise NoSpace when the store holds more than HMLAB_QUOTA (20GB) allows."""
        used, limit = self.usage(), parse_bytes(os.environ.get("HMLAB_QUOTA") or QUOTA)
        if used > limit:
            gigabytes = f"{self.folder} holds {used / 1e9:.2f} GB, HMLAB_QUOTA allows {limit / 1e9:.2f} GB"
            raise NoSpace(f"run store full: {gigabytes}; delete runs or raise it")


def parse_bytes(text: str) -> int:
    """Bytes in "20GB", "500 MB", "1.5GiB" or "1000"."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]I|[KMGT]?)B?\s*", text.upper())
    if match is None:
        raise ValueError(f"HMLAB_QUOTA: expected a size such as 20GB, got {text!r}")
    return int(float(match[1]) * UNITS[match[2]])


def now() -> str:
    """The time, ISO 8601 in UTC."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def is_full(error: BaseException) -> bool:
    """Whether it says that the disk, or the user's share of it, was full."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return "No space left on device" in str(error)  # safetensors has no errno


def _flock(handle: Any, kind: int) -> bool:
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
