"""A run that is killed again and again ends with the same bits as one that was left alone."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from safetensors.torch import load_file

from hmlab import metrics, registry, train
from hmlab.run import Experiment
from hmlab.runs import Run, Store
from hmlab.tasks import language

KILLS = 5
TASK = language.Config(batch=2, context=16)
EXPERIMENT = Experiment(
    name="killed",
    # With dropout the numbers depend on every random generator being where it was.
    model=registry.model_config(
        "logmem", dim=8, vocab=TASK.open().vocab_size, layers=2, settings={"dropout": "0.1"}
    ),
    task=TASK,
    training=train.Config(steps=300, evaluate_every=50, evaluate_batches=1, clip=1.0, warmup=20, schedule="cosine"),
    seed=3,
)


def begin(store: Store, *options: str) -> subprocess.Popen:
    file = store.folder / "experiment.json"
    store.folder.mkdir(exist_ok=True)
    file.write_text(json.dumps(EXPERIMENT.to_dict()), encoding="utf-8")
    command = [sys.executable, "-m", "hmlab.run", "--experiment", str(file), "--store", str(store.folder), *options]
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})


def checkpoint(run: Run) -> tuple[dict, dict]:
    """All tensors of the run's checkpoint, and its facts but for the time it took."""
    folder = run.checkpoint()
    tensors = {}
    for name in ("model", "training"):
        tensors |= {f"{name}/{key}": t for key, t in load_file(folder / f"{name}.safetensors").items()}
    facts = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    return tensors, {key: value for key, value in facts.items() if key != "elapsed"}


def test_killed_five_times_ends_bit_equal(tmp_path: Path) -> None:
    alone, killed = Store(tmp_path / "alone"), Store(tmp_path / "killed")
    chance = random.Random(0)
    run = Run(killed.folder / EXPERIMENT.id)
    path = run.folder / "metrics.zarr"
    for _ in range(KILLS):
        target = metrics.rows(path) + chance.randrange(3, 20)
        process = begin(killed, "--checkpoint-seconds", "0.05")
        while metrics.rows(path) < target:
            assert process.poll() is None, "it ended before it was killed"
            time.sleep(0.02)
        time.sleep(chance.uniform(0, 0.05))  # not always right after a row was written
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert run.info["state"] == "interrupted"
    for store in (killed, alone):
        assert begin(store).wait() == 0
    whole = alone.open(EXPERIMENT.id)
    assert run.info["state"] == whole.info["state"] == "finished"
    assert len(run.info["starts"]) == KILLS + 1
    steps = [begun["step"] for begun in run.info["starts"]]
    assert steps == sorted(set(steps)), "each process should have got further than the one before"
    timing = ["elapsed", "tokens_per_second", "memory_bytes"]
    assert run.metrics().drop_vars(timing).identical(whole.metrics().drop_vars(timing))
    (tensors, facts), (expected_tensors, expected_facts) = checkpoint(run), checkpoint(whole)
    assert facts == expected_facts
    assert tensors.keys() == expected_tensors.keys()
    assert all((tensors[key] == expected_tensors[key]).all() for key in tensors)
