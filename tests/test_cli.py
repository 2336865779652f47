"""The command: what programs read from it, what people do with it, and how it refuses."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer.testing

from hmlab.cli import app
from hmlab.commands.output import plain
from hmlab.commands.training import _pieces
from hmlab.encodings import ByteEncoding

TINY = ["train", "logmem", "--dim", "8", "--layers", "1", "--set", "heads=1", "--batch", "2", "--context", "16"]
TINY += ["--evaluate-every", "2", "--evaluate-batches", "1"]


def hmlab(*arguments: str, status: int = 0, **options):
    """Run the command in this process; stdout and stderr apart."""
    result = typer.testing.CliRunner().invoke(app, list(map(str, arguments)), **options)
    assert result.exit_code == status, (result.exit_code, result.stderr, result.exception)
    return result


def refused(*arguments: str, status: int = 2) -> str:
    """The one line on stderr that says why the command does not do it."""
    result = hmlab(*arguments, status=status)
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("hmlab: ")
    return line


def process(*arguments: str, **settings: str) -> subprocess.Popen:
    """The real command in a process of its own, on one thread: tiny models are slow on several."""
    command = [sys.executable, "-m", "hmlab", *map(str, arguments)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **settings}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def test_help_is_quick_because_nothing_heavy_is_imported():
    program = "import sys; from hmlab.cli import app; print(*sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "numpy", "xarray", "zarr", "pydantic", "papermill", "panel", "plotly"} & set(loaded)


def test_version_and_help():
    from hmlab import __version__

    assert hmlab("--version").stdout == f"hmlab {__version__}\n"
    for command in ("list", "show", "train", "sample", "run", "reproduce", "lab", "serve", "bench", "doctor", "check"):
        assert "Usage: " in hmlab(command, "--help").stdout


PUBLISHED = [
    ("logmem", 32, [], 71489),
    ("tinylogmem", 32, ["--set", "ffn=tied"], 42305),
    ("expsum", 32, [], 71489),
    ("gpt2-paper", 32, [], 71105),
    ("logmem", 128, [], 1072193),
    ("tinylogmem", 128, [], 677441),
    ("expsum", 128, [], 1072193),
    ("gpt2-paper", 128, ["--set", "context=256"], 841281),
]


@pytest.mark.parametrize(("name", "dim", "settings", "count"), PUBLISHED)
def test_show_gives_the_published_parameter_counts(name, dim, settings, count):
    shown = json.loads(hmlab("show", name, "--dim", dim, "--vocab", 65, *settings, "--time", 4, "--json").stdout)
    assert shown["parameters"] == count
    assert shown["parameter_bytes"] == 4 * count


def test_show_measures_the_state_that_is_really_held():
    def state_bytes(name: str, time: int) -> int:
        shown = hmlab("show", name, "--dim", 8, "--layers", 2, "--set", "heads=1", "--time", time, "--json").stdout
        return json.loads(shown)["state_bytes"]

    from hmlab import registry

    for name in ("logmem", "attention"):
        model = registry.model_config(name, dim=8, vocab=65, layers=2, settings={"heads": "1"}).build()
        with torch.no_grad():
            _, state = model(torch.zeros(1, 1500, dtype=torch.int64))
        assert state_bytes(name, 1500) == model.state_bytes(state)
    assert state_bytes("attention", 64) - state_bytes("attention", 32) == 2 * 2 * 32 * 8 * 4


def test_show_for_people_says_the_same():
    table = hmlab("show", "logmem", "--dim", 32, "--time", 4).stdout
    assert "71 489" in table
    assert "memory.banks" in table


def test_list_names_everything():
    listed = json.loads(hmlab("list", "--json").stdout)
    assert {"lmn", "attention", "recurrent"} <= {row["name"] for row in listed["memories"]}
    assert {"logmem", "gpt2-paper"} <= {row["name"] for row in listed["presets"]}
    assert {"python", "tinyshakespeare"} <= {row["name"] for row in listed["corpora"]}
    assert {"hmt", "rmt", "memorizing"} == {row["name"] for row in listed["wrappers"]}
    assert {"mqar", "babi", "language"} <= {row["name"] for row in listed["tasks"]}
    assert set(listed) == {"memories", "wrappers", "presets", "tasks", "corpora", "notebooks", "checkpoints",
                           "dashboards"}  # fmt: skip
    assert all(row["about"] for row in listed["memories"])
    assert "transformer-xl" in hmlab("list").stdout


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["show", "logmen"], "logmem"),
        (["show", "logmem", "--set", "fnn=tied"], "ffn"),
        (["show", "logmem", "--set", "bank=2"], "banks"),
        (["show", "logmem", "--set", "ffn=tiny"], "tied"),
        (["show", "logmem", "--set", "ffn"], "KEY=VALUE"),
        (["show", "logmem", "--dim", "0"], "dim"),
        (["show", "logmem", "--dim", "x"], "--dim"),
        (["show", "gpt2-paper", "--time", "600"], "context"),
        (["show", "logmem", "--dmi", "3"], "--dim"),
        (["sho", "logmem"], "sho"),
        (["train", "logmem", "--corpus", "tinyshakespear"], "tinyshakespeare"),
        (["train", "logmem", "--set", "training.clp=1"], "training.clip"),
        (["train", "logmem", "--steps", "0"], "steps"),
        (["corpora", "download", "enwik"], "enwik8"),
        (["bench", "lmn-forwards"], "lmn-forward"),
        (["check", "windo"], "window"),
        (["check", "nosuch.py"], "nosuch.py"),
        (["new-memory", "my-memory.py"], "my_memory.py"),
        (["run", "no_such_notebook"], "no_such_notebook"),
    ],
)
@pytest.mark.unchecked
def test_what_cannot_be_is_refused_in_one_line_that_helps(arguments, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert expected in refused(*arguments)
    assert list(tmp_path.iterdir()) == []


def test_unexpected_errors_are_one_line_and_a_traceback_only_on_request(tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text("raise LookupError('lost\\nand found')")
    line = refused("check", broken, status=1)
    assert "LookupError: lost and found" in line
    assert "HMLAB_DEBUG=1" in line
    found = process("check", broken, HMLAB_DEBUG="1")
    _, errors = found.communicate(timeout=60)
    assert found.returncode == 1
    assert "broken.py" in errors
    assert "Traceback" in errors


def test_a_run_is_trained_found_again_compared_sampled_and_deleted(tmp_path):
    store = ["--runs", tmp_path]
    lines = [json.loads(line) for line in hmlab(*TINY, "--steps", 4, *store, "--json").stdout.splitlines()]
    assert [line["step"] for line in lines[:-1]] == [1, 2, 3, 4]
    assert lines[0]["valid_loss"] is None
    assert lines[1]["valid_loss"] > 0
    run = lines[-1]
    assert (run["state"], run["step"]) == ("finished", 4)

    (again,) = hmlab(*TINY, "--steps", 4, *store, "--json").stdout.splitlines()
    assert json.loads(again) == run
    other = hmlab(*TINY, "--steps", 4, "--seed", 1, "--set", "training.clip=0.5", *store).stdout.strip()
    assert other != run["id"]

    assert {row["id"] for row in json.loads(hmlab("runs", "list", *store, "--json").stdout)} == {run["id"], other}
    shown = json.loads(hmlab("runs", "show", other, *store, "--json").stdout)
    assert shown["experiment"]["training"]["clip"] == 0.5
    assert shown["last"]["valid_loss"] > 0
    compared = json.loads(hmlab("runs", "compare", run["id"], other, *store, "--json").stdout)
    assert [row["run"] for row in compared] == [run["id"], other]
    assert compared[0]["loss"] == lines[3]["loss"]
    for arguments in (["list"], ["show", other], ["compare", run["id"], other]):
        assert run["id"] in hmlab("runs", *arguments, *store).stdout or arguments[0] == "show"

    def sample(*arguments: str) -> str:
        return hmlab("sample", run["id"], "--prompt", "def ", "--tokens", 20, *store, *arguments).stdout

    assert sample().startswith("def ")
    assert len(sample()) == len("def ") + 20 + 1
    assert sample() == sample()
    assert sample() != sample("--seed", "1")
    assert sample("--temperature", "0") == sample("--temperature", "0", "--seed", "1")
    assert "top_k" in hmlab("sample", run["id"], "--top-k", 0, *store, status=2).stderr
    assert run["id"] in refused("sample", run["id"][:-1], *store)

    hmlab("runs", "delete", other, *store, input="n\n", status=1)
    hmlab("runs", "delete", other, *store, "--yes")
    assert [row["id"] for row in json.loads(hmlab("runs", "list", *store, "--json").stdout)] == [run["id"]]
    assert run["id"] in refused("runs", "show", run["id"][:-1], *store)


def test_models_that_come_with_hmlab_write_and_other_files_do_not(tmp_path):
    listed = json.loads(hmlab("list", "--json").stdout)["checkpoints"]
    assert listed
    for row in listed:
        assert hmlab("sample", row["name"], "--prompt", "The", "--tokens", 5).stdout.startswith("The")
    (tmp_path / "text.safetensors").write_text("no model")
    assert "text.safetensors" in refused("sample", tmp_path / "text.safetensors")
    assert listed[0]["name"] in refused("sample", listed[0]["name"] + "0")


def test_an_interrupted_run_is_kept_and_the_same_command_goes_on(tmp_path):
    arguments = [*TINY, "--steps", 400, "--evaluate-every", 400, "--runs", tmp_path, "--json"]
    first = process(*arguments)
    first.stdout.readline()
    first.send_signal(signal.SIGINT)
    output, errors = first.communicate(timeout=120)
    assert first.returncode == 130, errors
    assert "the same command goes on" in errors
    stopped = json.loads(output.splitlines()[-1])
    assert stopped["state"] == "interrupted"
    second = process(*arguments)
    output, errors = second.communicate(timeout=120)
    lines = [json.loads(line) for line in output.splitlines()]
    assert lines[0]["step"] == stopped["step"] + 1
    assert (lines[-1]["id"], lines[-1]["state"]) == (stopped["id"], "finished")


def test_a_memory_of_ones_own_is_begun_and_proven(tmp_path):
    file = tmp_path / "mine.py"
    some = ["--only", "step", "--only", "future"]
    assert "hmlab check" in hmlab("new-memory", file).stdout
    assert "mine.py" in refused("new-memory", file)
    points = json.loads(hmlab("check", f"{file}:Config", "--dim", 3, *some, "--json").stdout)["points"]
    assert {"step", "future"} == {line["point"] for line in points}
    assert "keeps the contract" in hmlab("check", file, "--only", "shapes").stdout
    assert "Config" in refused("check", f"{file}:Confg")
    assert "future" in refused("check", file, "--only", "futures")
    # A memory that reads the next token breaks the contract, and the command says where.
    text = file.read_text()
    assert "written = (1 - decay) * self.write(x)" in text
    file.write_text(text.replace("self.write(x)\n", "self.write(x.roll(-1, 1))\n", 1))
    assert "future" in refused("check", file, *some, status=1)


def test_doctor_reports_every_check():
    result = typer.testing.CliRunner().invoke(app, ["doctor", "--json"])
    checks = json.loads(result.stdout)
    assert {"python", "torch"} <= {check["name"] for check in checks}
    assert result.exit_code == any(check["status"] == "fail" for check in checks)


def test_tokens_are_printed_when_their_character_is_complete():
    text = "aé€😀b"
    assert list(_pieces(ByteEncoding(), iter(text.encode()))) == list(text)
    assert "".join(_pieces(ByteEncoding(), iter(b"a\xe2\x82"))) == "a\ufffd"
    assert "".join(_pieces(ByteEncoding(), iter(b"\xff\xff\xff\xffab"))).endswith("ab")


def test_json_has_no_nan_and_no_paths():
    import numpy as np

    value = {"a": float("nan"), "b": [np.float32(2), float("inf")], "c": Path("x"), "d": (1, None, True)}
    assert plain(value) == {"a": None, "b": [2.0, None], "c": "x", "d": [1, None, True]}
    assert json.loads(json.dumps(plain(value), allow_nan=False)) == plain(value)


def test_measurements_become_rows_and_are_kept(tmp_path):
    from hmlab_kernels.bench import Case, measure

    from hmlab import results
    from hmlab.commands.bench import _rows, _save

    cases = [
        Case("one", {"ours": lambda: None, "theirs": lambda: sum(range(999))}, 1, 1),
        Case("two", {"theirs": int}, 1, 1),
    ]
    measured = measure(cases, seconds=0.0)
    rows = _rows(measured)
    assert [(row["case"], row["candidate"]) for row in rows] == [("one", "ours"), ("one", "theirs"), ("two", "theirs")]
    assert [rows[0]["times_first"], rows[2]["times_first"]] == [1, 1]
    assert rows[1]["times_first"] == pytest.approx(rows[1]["median"] / rows[0]["median"])
    _save(measured, tmp_path / "kept.csv", "cpu")
    kept = results._read(tmp_path, "kept")
    assert plain(_rows(kept)) == plain(rows)  # NaN is not itself
    assert kept.attrs["provenance"]["commit"] and kept.attrs["provenance"]["threads"]
    assert "kept.zarr" in refused("bench", "lmn-forward", "--save", tmp_path / "kept.zarr")
