"""The run store: what a run leaves on disk, and that nothing on disk is ever half of something."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hmlab import checkpoints, control, metrics, pretrained, registry, runs, train
from hmlab.metrics import VARIABLES, Writer
from hmlab.run import Experiment, run, start
from hmlab.runs import NoSpace, Run, RunBusy, Store, StoreError, UnknownRun, parse_bytes
from hmlab.tasks import language

TASK = language.Config(batch=2, context=12)
EXPERIMENT = Experiment(
    name="tiny",
    model=registry.model_config("logmem", dim=8, vocab=TASK.open().vocab_size, layers=1),
    task=TASK,
    training=train.Config(steps=6, evaluate_every=3, evaluate_batches=1),
)
TIMING = ["elapsed", "tokens_per_second", "memory_bytes"]


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setattr(control, "POLL_SECONDS", 0.0)
    return Store(tmp_path / "runs")


def at(step: int, act: Callable[[], object]) -> Callable[[train.Metrics], None]:
    """Calls `act` once a step is done."""

    def on_metrics(done: train.Metrics) -> None:
        if done.step == step:
            act()

    return on_metrics


def same_numbers(one: Run, other: Run) -> bool:
    curves = [run.metrics().drop_vars(TIMING) for run in (one, other)]
    parameters = [list(run.model().parameters()) for run in (one, other)]
    return curves[0].identical(curves[1]) and all(torch.equal(a, b) for a, b in zip(*parameters, strict=True))


def test_a_run_tells_what_it_was(store: Store) -> None:
    done = run(EXPERIMENT, store)
    info = done.info
    assert done.id == info["id"] == f"tiny-{EXPERIMENT.hash()}-s0"
    assert info["state"] == "finished"
    assert (info["step"], info["steps"], info["seed"], info["error"], info["pid"]) == (6, 6, 0, None, os.getpid())
    model = EXPERIMENT.model.build()
    assert info["parameters"] == sum(p.numel() for p in model.parameters())
    assert info["parameter_bytes"] == 4 * info["parameters"]
    assert info["state_bytes"] == model.state_bytes(model(torch.zeros(1, 12, dtype=torch.int64))[1])
    assert info["implementations"].keys() == {"tree_build", "tree_attention"}
    assert info["corpus"] == TASK.open().provenance()
    assert info["versions"]["torch"] == torch.__version__
    assert info["threads"] == torch.get_num_threads()
    assert info["peak_memory_bytes"] > 10_000_000
    assert info["duration"] > 0
    assert Experiment.from_dict(info["experiment"]) == EXPERIMENT
    assert [line.id for line in store.list()] == [done.id]
    assert not done.locked()
    assert done.encoding.decode(done.encoding.encode("import this")) == "import this"
    assert pretrained.load(done.checkpoint() / "model.safetensors").provenance["run"] == done.id


def test_metrics_are_those_of_the_loop(store: Store) -> None:
    written = run(EXPERIMENT, store).metrics()
    torch.manual_seed(0)
    loop = list(train.train(EXPERIMENT.model.build(), TASK.open(), EXPERIMENT.training, seed=0))
    assert dict(written.sizes) == {"step": 6}
    assert list(written.data_vars) == list(VARIABLES)
    assert written["step"].values.tolist() == [1, 2, 3, 4, 5, 6]
    for name in written.data_vars:
        dtype, long_name, units = VARIABLES[name]
        assert written[name].attrs == {"long_name": long_name, "units": units}
        assert written[name].dtype == dtype
        if name not in TIMING:
            np.testing.assert_array_equal(written[name], [getattr(m, name) for m in loop])
    assert np.isfinite(written["valid_loss"].values).tolist() == [False, False, True, False, False, True]
    assert (written["elapsed"].diff("step") > 0).all()


def test_a_finished_run_is_not_trained_again(store: Store) -> None:
    first = run(EXPERIMENT, store)
    again = run(replace(EXPERIMENT, name="another"), store, on_metrics=lambda m: pytest.fail("it trained"))
    assert again.id == first.id
    assert run(replace(EXPERIMENT, seed=1), store).id != first.id
    assert len(store.ids()) == 2


@pytest.mark.parametrize("step", [1, 4])
def test_stopped_and_resumed_is_as_if_never_stopped(store: Store, tmp_path: Path, step: int) -> None:
    stopped = run(EXPERIMENT, store, on_metrics=at(step, lambda: store.request(EXPERIMENT.id, "stop")))
    assert (stopped.info["state"], stopped.info["step"]) == ("interrupted", step)
    assert stopped.metrics()["step"].values.tolist() == list(range(1, step + 1))
    seen = []
    resumed = run(EXPERIMENT, store, on_metrics=lambda m: seen.append(m.step))
    assert seen == list(range(step + 1, 7))
    assert [begun["step"] for begun in resumed.info["starts"]] == [0, step]
    assert same_numbers(resumed, run(EXPERIMENT, Store(tmp_path / "other")))


def test_metrics_beyond_the_checkpoint_are_forgotten(store: Store) -> None:
    def fail() -> None:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        run(EXPERIMENT, store, on_metrics=at(4, fail))
    broken = store.open(EXPERIMENT.id)
    assert (broken.info["state"], broken.info["error"]) == ("failed", "RuntimeError: a bug")
    assert broken.metrics().sizes["step"] == 4
    lengths = []
    run(EXPERIMENT, store, on_metrics=at(1, lambda: lengths.append(broken.metrics().sizes["step"])))
    assert lengths[0] <= 1
    assert broken.metrics().sizes["step"] == 6


def test_pause_and_resume(store: Store) -> None:
    states = []

    def resume() -> None:
        while store.open(EXPERIMENT.id).info["state"] != "paused":
            time.sleep(0.01)
        states.append(store.open(EXPERIMENT.id).info["step"])
        store.request(EXPERIMENT.id, "resume")

    other = threading.Thread(target=resume)

    def pause() -> None:
        store.request(EXPERIMENT.id, "pause")
        other.start()

    done = run(EXPERIMENT, store, on_metrics=at(2, pause))
    other.join()
    assert states == [2]
    assert done.info["state"] == "finished"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_with_a_checkpoint(store: Store, number: signal.Signals) -> None:
    usual = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        run(EXPERIMENT, store, on_metrics=at(3, lambda: os.kill(os.getpid(), number)))
    left = store.open(EXPERIMENT.id)
    assert (left.info["state"], left.info["error"], left.checkpoint().name) == ("interrupted", None, "00000003")
    assert signal.getsignal(number) is usual


def test_one_process_at_a_time(store: Store) -> None:
    def others() -> None:
        assert store.open(EXPERIMENT.id).info["state"] == "running"
        for act in (lambda: run(EXPERIMENT, store), lambda: store.delete(EXPERIMENT.id)):
            with pytest.raises(RunBusy, match=rf"{EXPERIMENT.id}: .* process {os.getpid()} on "):
                act()

    run(EXPERIMENT, store, on_metrics=at(2, others))
    store.delete(EXPERIMENT.id)
    assert store.ids() == []
    assert list(store.folder.iterdir()) == []


def test_a_writer_that_died_counts_as_interrupted(store: Store) -> None:
    done = run(EXPERIMENT, store)
    done.update(state="running")
    assert done.info["state"] == "interrupted"
    assert store.list()[0].state == "interrupted"
    with pytest.raises(StoreError, match="not running"):
        store.request(done.id, "stop")


def test_an_unstable_run_says_where(store: Store) -> None:
    wild = replace(EXPERIMENT, training=replace(EXPERIMENT.training, learning_rate=3e38))
    with pytest.raises(ArithmeticError):
        run(wild, store)
    info = store.open(wild.id).info
    assert info["state"] == "failed"
    assert info["error"].startswith("Instability: step 2: the ")


def test_a_disk_without_room_is_refused_before_anything_is_written(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=runs.SPARE_BYTES - 1))
    with pytest.raises(NoSpace, match=r"^disk nearly full: .* MB free"):
        run(EXPERIMENT, store)
    assert list(store.folder.iterdir()) == []


def test_the_quota(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    done = run(EXPERIMENT, store)
    files = sum(path.stat().st_size for path in done.folder.rglob("*") if path.is_file())
    assert store.usage() == files
    monkeypatch.setenv("HMLAB_QUOTA", f"{files - 1}B")
    with pytest.raises(NoSpace, match=r"^run store full: .* HMLAB_QUOTA allows"):
        run(replace(EXPERIMENT, seed=1), store)
    assert store.ids() == [done.id]
    monkeypatch.setenv("HMLAB_QUOTA", f"{files}B")
    run(replace(EXPERIMENT, seed=1), store)


def test_sizes() -> None:
    assert parse_bytes("20GB") == 20 * 10**9
    assert parse_bytes("1.5 gib") == 3 * 2**29
    assert parse_bytes("100") == 100
    with pytest.raises(ValueError, match=r"^HMLAB_QUOTA: expected a size such as 20GB, got 'many'"):
        parse_bytes("many")


@pytest.mark.parametrize("free", [0, runs.SPARE_BYTES + 1])  # nothing, and too little for a checkpoint
def test_a_disk_that_fills_fails_the_run(store: Store, monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    fill = at(3, lambda: monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free)))
    with pytest.raises(NoSpace, match=r"^disk nearly full"):
        run(EXPERIMENT, store, on_metrics=fill)
    info = store.open(EXPERIMENT.id).info
    assert info["state"] == "failed"
    assert info["error"].startswith("NoSpace: disk nearly full")


def test_a_disk_without_a_single_byte_leaves_nothing_that_looks_finished(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    fill = at(3, lambda: monkeypatch.setattr(os, "fsync", full))
    with pytest.raises(NoSpace, match=f"^disk full: run {EXPERIMENT.id} failed"):
        run(EXPERIMENT, store, on_metrics=fill, checkpoint_seconds=0.0)
    left = store.open(EXPERIMENT.id)
    assert left.info["state"] == "interrupted"
    assert left.checkpoint().name == "00000002"
    assert list(left.folder.rglob("*.partial")) == []
    monkeypatch.undo()
    assert run(EXPERIMENT, store).info["state"] == "finished"


def test_a_checkpoint_that_fails_leaves_the_one_before(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: Path, *args: object) -> None:
        path.write_bytes(b"half")
        raise RuntimeError("broken")

    spoil = at(3, lambda: monkeypatch.setattr(pretrained, "save", broken))
    with pytest.raises(RuntimeError):
        run(EXPERIMENT, store, on_metrics=spoil, checkpoint_seconds=0.0)
    left = store.open(EXPERIMENT.id)
    assert [path.name for path in (left.folder / "checkpoint").iterdir()] == ["00000002"]
    left.model()


def test_leftovers_of_a_killed_process_are_swept(store: Store) -> None:
    run(EXPERIMENT, store, on_metrics=at(2, lambda: store.request(EXPERIMENT.id, "stop")))
    left = store.open(EXPERIMENT.id)
    partial = left.folder / "checkpoint" / "00000003.abcdef01.partial"
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"half")
    (left.folder / "metrics.zarr" / "loss" / "c" / "0.0123.partial").write_bytes(b"half")
    done = run(EXPERIMENT, store)
    assert list(done.folder.rglob("*.partial")) == []
    assert [path.name for path in checkpoints.all_of(done.folder / "checkpoint")] == ["00000006"]


def test_compare_aligns_on_the_step(store: Store) -> None:
    short = replace(EXPERIMENT, training=replace(EXPERIMENT.training, steps=4), seed=3)
    ids = [run(EXPERIMENT, store).id, run(short, store).id]
    together = store.compare(ids)
    assert dict(together.sizes) == {"run": 2, "step": 6}
    assert together["run"].values.tolist() == ids
    assert together["loss"].attrs == {"long_name": "training loss", "units": "nats/token"}
    for id in ids:
        own = store.open(id).metrics()
        np.testing.assert_array_equal(together["loss"].sel(run=id).dropna("step"), own["loss"])
        np.testing.assert_array_equal(together["tokens"].sel(run=id).dropna("step"), own["tokens"])
    assert np.isnan(together["loss"].values[1, 4:]).all()


def test_unknown_names(store: Store) -> None:
    run(EXPERIMENT, store)
    with pytest.raises(UnknownRun, match=f"no run 'tiny-s0' .* did you mean {EXPERIMENT.id}"):
        store.open("tiny-s0")
    (store.folder / "not-a-run").mkdir()
    assert store.ids() == [EXPERIMENT.id]


@pytest.mark.parametrize("part", ["model", "task", "training"])
def test_an_unknown_field_of_a_stored_experiment_is_named(store: Store, part: str) -> None:
    stopped = run(EXPERIMENT, store, on_metrics=at(2, lambda: store.request(EXPERIMENT.id, "stop")))
    experiment = stopped.info["experiment"]
    experiment[part]["colour"] = 1
    stopped.update(experiment=experiment)
    with pytest.raises(ValueError, match="'colour'"):
        run(EXPERIMENT, store)


def test_a_corpus_that_changed_is_refused(store: Store, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("abcdefgh\n" * 200, encoding="utf-8")
    task = replace(TASK, corpus=str(text))
    model = registry.model_config("logmem", dim=8, vocab=9, layers=1)
    own = replace(EXPERIMENT, task=task, model=model)
    run(own, store, on_metrics=at(2, lambda: store.request(own.id, "stop")))
    text.write_text("abcdefhg\n" * 200, encoding="utf-8")
    with pytest.raises(StoreError, match="the corpus has changed"):
        run(own, store)


def test_a_model_of_another_vocabulary_is_refused(store: Store) -> None:
    with pytest.raises(ValueError, match=r"^model: expected vocab \d+, the task's, got 5$"):
        run(replace(EXPERIMENT, model=replace(EXPERIMENT.model, vocab=5)), store)


def test_what_cannot_begin_leaves_no_run(store: Store) -> None:
    vocab = EXPERIMENT.model.vocab
    short = registry.model_config("gpt2-paper", dim=8, vocab=vocab, layers=1, settings={"context": "4"})
    with pytest.raises(ValueError, match="at most context"):
        run(replace(EXPERIMENT, model=short), store)
    assert store.list() == []


def test_the_hash_is_of_the_configuration_alone() -> None:
    hashes = {
        EXPERIMENT.hash(),
        replace(EXPERIMENT, name="b", seed=4).hash(),
        replace(EXPERIMENT, training=replace(EXPERIMENT.training, betas=(0.9, 0.99))).hash(),
        replace(EXPERIMENT, task=replace(TASK, context=13)).hash(),
        replace(EXPERIMENT, model=replace(EXPERIMENT.model, ffn="square")).hash(),
    }
    assert len(hashes) == 4
    assert Experiment.from_dict(json.loads(json.dumps(EXPERIMENT.to_dict()))) == EXPERIMENT


def test_start_runs_it_in_another_process(store: Store) -> None:
    process = start(EXPERIMENT, store)
    assert process.wait(timeout=120) == 0, (store.folder / EXPERIMENT.id / "output.txt").read_text()
    info = store.open(EXPERIMENT.id).info
    assert (info["state"], info["pid"]) == ("finished", process.pid)


def row(step: int) -> dict[str, float | int]:
    return {"step": step, **{name: np.dtype(what[0]).type(step) for name, what in VARIABLES.items()}}


def test_readers_never_see_half_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "CHUNK", 4)
    path, lengths, write = tmp_path / "metrics.zarr", [], Writer._write

    def look_after(writer: Writer, chunk: Path, rows: np.ndarray) -> None:
        write(writer, chunk, rows)
        seen = metrics.read(path)
        lengths.append(seen.sizes["step"])
        for name in ["step", *seen.data_vars]:
            np.testing.assert_array_equal(seen[name], np.arange(1, lengths[-1] + 1))

    monkeypatch.setattr(Writer, "_write", look_after)
    writer = Writer(path, steps=9)
    for step in range(1, 10):
        writer.add(row(step))
        if step in (2, 3, 7):
            writer.flush()
    writer.flush()
    assert sorted(set(lengths)) == [0, 2, 3, 4, 7, 8, 9]
    assert lengths == sorted(lengths)


@pytest.mark.parametrize("kept", [0, 3, 4, 8, 9])
def test_a_writer_goes_on_where_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: int) -> None:
    monkeypatch.setattr(metrics, "CHUNK", 4)
    path = tmp_path / "metrics.zarr"
    writer = Writer(path, steps=10)
    for step in range(1, 10):
        writer.add({**row(step), "valid_loss": 99.0})
    writer.flush()
    (path / "step").rename(path / "gone")
    writer.add({**row(10), "valid_loss": 99.0})
    with pytest.raises(FileNotFoundError):  # it dies before it has written the step
        writer.flush()
    (path / "gone").rename(path / "step")
    assert metrics.rows(path) == 9
    writer = Writer(path, steps=10, kept=kept)
    assert metrics.rows(path) == kept
    for step in range(kept + 1, 11):
        writer.add({**row(step), "valid_loss": math.nan})
    writer.flush()
    seen = metrics.read(path)
    assert seen["loss"].values.tolist() == list(range(1, 11))
    np.testing.assert_array_equal(seen["valid_loss"], [99.0] * kept + [math.nan] * (10 - kept))
    with pytest.raises(ValueError, match=r"^kept: expected at most the 10 rows"):
        Writer(path, steps=10, kept=11)
