"""Experiments in seconds: interrupted they go on to the same table, and what they count is counted rightly."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
import xarray as xr

from hmlab import results
from hmlab.experiments import far_context, far_recall, retrieval
from hmlab.tasks import recall

RECALL = far_recall.Setting(
    dim=16, window=16, segment=16, ratio=4, shared=1, pairs=4, spread=128, distances=(64, 256), chunk=100,
    phases=((recall.Config(form="copy", context=16, batch=2, pairs=2, distance=(6, 8)), 3),
            (recall.Config(context=64, batch=2, pairs=2, distance=(2, 50)), 3)),
    codes=(recall.Config(context=96, batch=2, pairs=2, distance=(40, 80)), 2),
)  # fmt: skip
CONTEXT = far_context.Setting(
    vocab=300, dim=16, window=16, segment=64, evaluated=4,
    phases=(far_context.Phase(context=16, batch=2, steps=3, repeated=1.0, passage=12),
            far_context.Phase(context=128, batch=2, steps=3, repeated=0.5, passage=12),
            far_context.Phase(context=256, batch=2, steps=3, cosine=True)),
)  # fmt: skip


def told(after: int):
    """A `say` that interrupts at its `after`-th message."""
    count = itertools.count(1)

    def say(message: str) -> None:
        if next(count) == after:
            raise KeyboardInterrupt

    return say


def quiet(message: str) -> None:
    pass


@pytest.fixture
def small_context(tmp_path, monkeypatch):
    """`far_context` on a made text, at lengths that take no time."""
    text = "".join(f"line {number} of {number * number % 97} in the text\n" for number in range(6000))
    (tmp_path / "made.txt").write_text(text)
    for name, value in {"BOUNDS": (0, 128, 256), "FAR": 128, "LENGTHS": (256, 512)}.items():
        monkeypatch.setattr(far_context, name, value)
    return replace(CONTEXT, corpus=str(tmp_path / "made.txt"))


@pytest.fixture
def small_capacity(monkeypatch):
    """Two capacities of which one forgets on the way."""
    monkeypatch.setitem(far_recall.MEMORIES, "8 slots", far_recall.Measured("hierarchy", {"capacity": 8}, 256))


@pytest.mark.parametrize("after", [2, 4, 6])
def test_far_recall_goes_on_where_it_was_interrupted(tmp_path, after):
    memories = ["8192 slots", "full"]
    whole = far_recall.run(RECALL, memories, [0], tmp_path / "whole", quiet)
    with pytest.raises(KeyboardInterrupt):
        far_recall.run(RECALL, memories, [0], tmp_path / "parts", told(after))
    done = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "parts").iterdir()}
    again = far_recall.run(RECALL, memories, [0], tmp_path / "parts", quiet)
    xr.testing.assert_identical(whole.drop_vars("cpu_seconds"), again.drop_vars("cpu_seconds"))
    for name, changed in done.items():
        assert (tmp_path / "parts" / name).stat().st_mtime_ns == changed, f"{name} was made again"


def test_far_recall_counts_what_is_held(tmp_path, small_capacity):
    found = far_recall.run(RECALL, ["window", "8 slots", "8192 slots", "full"], [0, 1], tmp_path, quiet)
    assert found["accuracy"].dims == ("memory", "seed", "distance") and (found["answers"] == RECALL.pairs).all()
    assert ((found["low"] <= found["accuracy"]) & (found["accuracy"] <= found["high"])).all()
    segments = (found["distance"] + RECALL.spread) // RECALL.segment
    assert (found["slots"].sel(memory="window") == 0).all()
    assert (found["slots"].sel(memory="8192 slots") == segments * RECALL.segment // RECALL.ratio).all()
    size = found["state_bytes"]
    for flat in ("window", "8 slots"):
        assert (size.sel(memory=flat) == size.sel(memory=flat)[0, 0]).all()
    for grows in ("8192 slots", "full"):
        assert (size.sel(memory=grows).diff("distance") > 0).all()


def test_far_recall_leaves_out_what_is_too_far(tmp_path, monkeypatch):
    monkeypatch.setitem(far_recall.MEMORIES, "window", far_recall.Measured("hierarchy", {"retrieval": "none"}, 64))
    found = far_recall.run(RECALL, ["window"], [0], tmp_path, quiet)
    assert found["answers"].isnull().values.tolist() == [[[False, True]]]
    path = results.save("table", found, {"made": "here"}, folder=tmp_path)
    assert len(path.read_text().splitlines()) == 2


def test_codes_are_taught_and_nothing_else_changes():
    torch.manual_seed(0)
    model = RECALL.model("hierarchy")
    taught = far_recall.with_codes(RECALL, model, 0, quiet).state_dict()
    torch.manual_seed(0)
    untaught = far_recall.hashed(RECALL, model).state_dict()
    changed = {name for name, value in taught.items() if not torch.equal(value, untaught[name])}
    assert changed and all("retriever.family" in name for name in changed)
    assert all(torch.equal(value, taught[name]) for name, value in model.state_dict().items())


def test_all_memories_go_on_from_the_same_weights(tmp_path):
    """Within the window, where no slot is read, the hierarchy and full attention are the same function."""
    only = replace(RECALL, phases=RECALL.phases[:1] * 2)
    hierarchy, full = (far_recall.trained(only, name, 0, tmp_path, quiet) for name in ("hierarchy", "full"))
    for name, value in full.state_dict().items():
        if "medium_term" in name:  # decays with the weights where slots are made, and is not read
            continue
        torch.testing.assert_close(hierarchy.state_dict()[name], value, msg=name)


def test_wilson_is_wilsons():
    """Newcombe 1998 (Statistics in Medicine 17, table I, method 3): 81 of 263, 15 of 148, 0 of 20, 1 of 29."""
    for right, answers, low, high in (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611):
        np.testing.assert_allclose(far_recall.wilson(right, answers), (low, high), atol=5e-5)
    np.testing.assert_allclose(far_recall.wilson(1, 29), (0.0061, 0.1718), atol=5e-5)


@pytest.mark.parametrize("after", [1, 2])
def test_far_context_goes_on_where_it_was_interrupted(tmp_path, small_context, after):
    memories = ["window", "ratio 4", "full"]
    whole = far_context.run(small_context, memories, [0], tmp_path / "whole", quiet)
    with pytest.raises(KeyboardInterrupt):
        far_context.run(small_context, memories, [0], tmp_path / "parts", told(after))
    again = far_context.run(small_context, memories, [0], tmp_path / "parts", quiet)
    xr.testing.assert_identical(whole.drop_vars("cpu_seconds"), again.drop_vars("cpu_seconds"))


def test_far_context_has_losses_by_position_and_length(tmp_path, small_context):
    found = far_context.run(small_context, ["full", "window", "ratio 4"], [0, 1], tmp_path, quiet)
    assert found["far"].dims == ("memory", "seed")
    assert found["by_length"].dims == ("memory", "seed", "length") and found["length"].values.tolist() == [256, 512]
    assert found["by_position"].dims == ("memory", "seed", "position")
    assert found["by_position"].notnull().all() and found["by_length"].notnull().all()
    np.testing.assert_allclose(found["far"], found["by_position"].sel(position=128), rtol=1e-5)
    assert found["ratio"].sel(memory="ratio 4").values.tolist() == pytest.approx([4.0, 4.0], rel=0.1)


def test_retrieval_measures_every_layer_and_needs_trained_models(tmp_path, small_context, monkeypatch):
    sizes = {"STEPS": 3, "CONTEXT": 1024, "TEXTS": 2, "TABLES": (1, 4), "PROBES": (1, 7)}
    for name, value in sizes.items():
        monkeypatch.setattr(retrieval, name, value)
    with pytest.raises(FileNotFoundError, match=r"folder: expected ratio-4-0\.safetensors"):
        retrieval.run(["ratio 4"], [0], tmp_path, quiet, small_context)
    far_context.run(small_context, ["full", "ratio 4"], [0], tmp_path, quiet)
    found = retrieval.run(["ratio 4"], [0], tmp_path, quiet, small_context)
    assert dict(found["recall"].sizes) == {"memory": 1, "seed": 1, "layer": 2, "family": 2, "tables": 2, "probes": 2}
    work, recalled = (found[name].isel(memory=0, seed=0) for name in ("work", "recall"))
    assert (work.diff("tables") > 0).all() and (work.diff("probes") > 0).all()
    assert ((recalled >= 0) & (recalled <= 1)).all() and (recalled.diff("probes") >= 0).all()


@pytest.mark.parametrize("module", [far_context, far_recall, retrieval])
def test_unknown_memories_are_refused(module, capsys):
    with pytest.raises(SystemExit) as refused:
        module.main(["--memories", "window", "palace"])
    assert refused.value.code == 2 and "palace" in capsys.readouterr().err


def test_the_command_writes_a_table_with_its_origin(tmp_path, monkeypatch):
    monkeypatch.setattr(far_recall, "Setting", lambda distances: replace(RECALL, distances=distances))
    arguments = ["--memories", "window", "--seeds", "3", "--distances", "256", "64", "--folder", str(tmp_path / "kept")]
    assert far_recall.main([*arguments, "--output", str(tmp_path / "table.csv")]) == 0
    table = (tmp_path / "table.csv").read_text().splitlines()
    assert table[0].startswith("memory,seed,distance,accuracy,low,high,answers,state_bytes,slots")
    assert [line.split(",")[:3] for line in table[1:]] == [["window", "3", "64"], ["window", "3", "256"]]
    origin = (tmp_path / "table.json").read_text()
    assert '"commit"' in origin and '"chance": 0.015625' in origin and '"corpus"' in origin
