"""From an experiment to a stored run: found if it is finished, resumed if it was broken off, else begun.

    run(Experiment(name="logmem", model=..., task=..., training=...), Store())
    start(experiment, store)        # the same in a process of its own
    python -m hmlab.run --experiment experiment.json --store runs
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import hmlab_kernels
import torch

from hmlab import atomic, checkpoints, provenance, registry
from hmlab import model as models
from hmlab import train as training
from hmlab.control import Control
from hmlab.metrics import Pace, Writer
from hmlab.progress import Progress
from hmlab.registry import from_fields
from hmlab.runs import NoSpace, Run, Store, StoreError, is_full, now

# A checkpoint is made this often, but costs at most this share of the time.
CHECKPOINT_SECONDS = 30.0
CHECKPOINT_SHARE = 0.005
# Spikes beyond this many are in the metrics only.
EVENTS = 200


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Everything that decides a run's numbers, on one device with one version of the code."""

    model: models.Config
    task: Any
    training: training.Config
    seed: int = 0
    name: str = "run"

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", self.name):
            raise ValueError(f"name: expected up to 64 letters, digits, '.', '_' or '-', got {self.name!r}")
        if self.seed < 0:
            raise ValueError(f"seed: expected 0 or more, got {self.seed}")

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able values."""
        task = {"name": type(self.task).__module__.removeprefix("hmlab.tasks."), **asdict(self.task)}
        return {
            "name": self.name,
            "seed": self.seed,
            "model": registry.to_dict(self.model),
            "task": task,
            "training": asdict(self.training),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Experiment:
        """The reverse of `to_dict`. Raises ValueError naming a field that is unknown or missing."""
        task = dict(values["task"])
        name = task.pop("name")
        module = f"hmlab.tasks.{name}"
        if not name.isidentifier() or importlib.util.find_spec(module) is None:
            raise ValueError(f"task: no task is called {name!r}")
        built = {
            "model": registry.from_dict(values["model"]),
            "task": from_fields(importlib.import_module(module).Config, task),
            "training": from_fields(training.Config, values["training"]),
        }
        return from_fields(cls, {**values, **built})

    def hash(self) -> str:
        """12 hexadecimal digits that name the configuration, whatever its seed and name."""
        values = {key: value for key, value in self.to_dict().items() if key not in ("name", "seed")}
        canonical = json.dumps(values, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:12]

    @property
    def id(self) -> str:
        """What its run is called in a store."""
        return f"{self.name}-{self.hash()}-s{self.seed}"


def run(
    experiment: Experiment,
    store: Store | None = None,
    *,
    on_metrics: Callable[[training.Metrics], object] | None = None,
    device: torch.device | str | None = None,
    checkpoint_seconds: float | None = None,
) -> Run:
    """Train until the experiment is finished, or take the run that is.

    on_metrics: called after every step. device: CUDA where there is one. checkpoint_seconds: time between
    checkpoints, 0 for one after every step; None chooses a time that costs next to nothing.

    Ctrl-C and SIGTERM end the run after the step under way, with a checkpoint and a KeyboardInterrupt. So does
    `Store.request(id, "stop")`, but the run is returned. Raises RunBusy, NoSpace and StoreError; what opening
    the task's data raises; and `Instability`. What ended a run that had begun is in its `run.json` too.
    """
    store = store or Store()
    found = store.find(experiment.hash(), experiment.seed)
    if found is not None and found.info["state"] == "finished":
        return found
    store.check_space()
    store.check_quota()
    data = experiment.task.open()
    if data.vocab_size != experiment.model.vocab:
        raise ValueError(f"model: expected vocab {data.vocab_size}, the task's, got {experiment.model.vocab}")
    target, device = found or Run(store.folder / experiment.id), _device(device)
    with target.lock(), Control(target.folder / "request") as control:
        atomic.sweep(target.folder)
        try:
            trainer = _Trainer(experiment, data, store, target, device)
            trainer.train(control, on_metrics, checkpoint_seconds)
        except BaseException as cause:
            error = cause
            if is_full(cause):
                error = NoSpace(f"disk full: run {target.id} failed; its last checkpoint is whole")
            stopped = isinstance(error, KeyboardInterrupt)
            line = None if stopped else f"{type(error).__name__}: {error}"
            if (target.folder / "run.json").exists():  # it had begun
                # Without room for even this, the run ends without a lock: it reads as interrupted.
                with suppress(OSError):
                    target.update(state="interrupted" if stopped else "failed", error=line)
            if error is cause:
                raise
            raise error from cause
    return target


class _Trainer:
    """The work of one process on one run, whose lock it holds."""

    def __init__(
        self, experiment: Experiment, data: Any, store: Store, target: Run, device: torch.device
    ) -> None:
        self._experiment, self._data, self._store, self._target = experiment, data, store, target
        self._device = device
        hmlab_kernels.reset_used()
        stored = target.info if (target.folder / "run.json").exists() else {}
        if stored:
            _check_same(stored, experiment, data.provenance())
        existing = checkpoints.all_of(target.folder / "checkpoint")
        if existing:
            model, tensors, facts = checkpoints.load(existing[-1])
        else:
            torch.manual_seed(experiment.seed)
            model = experiment.model.build()
        self._model = model.to(device)
        state_bytes = self._state_bytes()  # before the random generators are set
        self._progress: Progress = training.begin(self._model, experiment.training, seed=experiment.seed)
        if existing:
            self._progress.restore(tensors, facts)
        self._bytes = sum(p.numel() * p.element_size() for p in model.parameters())
        self._events = [e for e in stored.get("events", []) if e["step"] <= self._progress.step]
        self._begin(stored, state_bytes)

    def _begin(self, stored: Mapping[str, Any], state_bytes: int) -> None:
        self._where = provenance.provenance(self._device)
        time, experiment = now(), self._experiment
        begun = {"time": time, "step": self._progress.step}
        begun |= {key: self._where[key] for key in ("commit", "dirty", "device")}
        self._target.update(
            state="running", error=None, pid=os.getpid(), started=stored.get("started", time),
            name=experiment.name, hash=experiment.hash(), seed=experiment.seed, experiment=experiment.to_dict(),
            step=self._progress.step, steps=experiment.training.steps, events=self._events,
            parameters=models.parameters(self._model), parameter_bytes=self._bytes,
            state_bytes=state_bytes, corpus=self._data.provenance(),
            starts=[*stored.get("starts", []), begun], **self._where,
        )  # fmt: skip

    def train(
        self,
        control: Control,
        on_metrics: Callable[[training.Metrics], object] | None,
        checkpoint_seconds: float | None,
    ) -> None:
        recipe = self._experiment.training
        seconds = CHECKPOINT_SECONDS if checkpoint_seconds is None else checkpoint_seconds
        pace = Pace(seconds, CHECKPOINT_SHARE if checkpoint_seconds is None else math.inf)
        writer = Writer(self._target.folder / "metrics.zarr", steps=recipe.steps, kept=self._progress.step)
        try:
            for metrics in training.train(self._model, self._data, recipe, progress=self._progress):
                writer.add(vars(metrics))
                self._events += [asdict(spike) for spike in metrics.spikes[: EVENTS - len(self._events)]]
                if on_metrics is not None:
                    on_metrics(metrics)
                if metrics.step == recipe.steps:
                    break
                if control.due():
                    self._store.check_space()
                    request = control.request()
                    if request == "pause":
                        self._keep(writer, state="paused")
                        request = control.wait()
                        self._target.update(state="running")
                    if request == "stop":
                        self._keep(writer, state="interrupted")
                        if control.interrupted:
                            raise KeyboardInterrupt
                        return
                if pace.due():
                    with pace.spending():
                        self._keep(writer)
        except Exception as error:
            if not is_full(error):
                writer.flush()
            raise
        self._keep(writer, state="finished")

    def _keep(self, writer: Writer, **fields: Any) -> None:
        """Put on disk all that there is up to this step, then say so."""
        self._store.check_space(needed=4 * self._bytes)
        writer.flush(durable=True)
        tensors, facts = self._progress.state()
        origin = {"run": self._target.id, "step": facts["step"], "seed": self._experiment.seed, **self._where}
        origin["corpus"] = self._data.provenance()
        folder = self._target.folder / "checkpoint"
        checkpoints.save(folder, self._model, self._data.encoding, origin, tensors, facts)
        self._target.update(
            step=facts["step"], duration=facts["elapsed"], events=self._events,
            implementations=hmlab_kernels.used(), peak_memory_bytes=provenance.peak_memory(self._device), **fields,
        )  # fmt: skip

    @torch.no_grad()
    def _state_bytes(self) -> int:
        """What the model remembers of one window, in bytes."""
        tokens = next(self._data.evaluation_batches("valid", 1, 0)).tokens[:1].to(self._device)
        return self._model.state_bytes(self._model.eval()(tokens)[1])


def _check_same(stored: Mapping[str, Any], experiment: Experiment, corpus: Mapping[str, Any]) -> None:
    """Refuse to go on with what was begun as something else."""
    if Experiment.from_dict(stored["experiment"]).hash() != experiment.hash():
        raise StoreError(f"run {stored['id']}: its run.json holds another experiment")
    for key in ("sha256", "encoding_sha256"):
        if corpus[key] != stored["corpus"][key]:
            change = f"{key} was {stored['corpus'][key][:12]}, is {corpus[key][:12]}"
            raise StoreError(f"run {stored['id']}: the corpus has changed ({change}); delete the run to begin again")


def _device(device: torch.device | str | None) -> torch.device:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: expected cpu, there is no CUDA here, got cuda")
    return device


def start(experiment: Experiment, store: Store | None = None) -> subprocess.Popen:
    """Run the experiment in a process of its own; what that prints is in the run's `output.txt`."""
    store = store or Store()
    target = store.find(experiment.hash(), experiment.seed) or Run(store.folder / experiment.id)
    target.folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "hmlab.run", "--experiment", "-", "--store", str(store.folder.resolve())]
    with (target.folder / "output.txt").open("wb") as output:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT)
    # If it has failed already, its output says why.
    with suppress(BrokenPipeError), process.stdin as given:
        given.write(json.dumps(experiment.to_dict()).encode())
    return process


def main(arguments: list[str] | None = None) -> int:
    """`python -m hmlab.run`: run one experiment; 0 when it finished or was asked to stop, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m hmlab.run", description="Run one experiment.")
    parser.add_argument("--experiment", required=True, help="JSON file of Experiment.to_dict(); - reads stdin")
    parser.add_argument("--store", type=Path, help="folder of the runs (HMLAB_RUNS or ./runs)")
    parser.add_argument("--device", help="cpu or cuda")
    parser.add_argument("--checkpoint-seconds", type=float, help="time between checkpoints")
    given = parser.parse_args(arguments)
    try:
        text = sys.stdin.read() if given.experiment == "-" else Path(given.experiment).read_text("utf-8")
        experiment = Experiment.from_dict(json.loads(text))
        run(experiment, Store(given.store), device=given.device, checkpoint_seconds=given.checkpoint_seconds)
    except KeyboardInterrupt:
        return 130
    except (OSError, ValueError, RuntimeError, ArithmeticError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
