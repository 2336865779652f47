"""The ledger: every claim is in it, verdicts follow from numbers alone, and what was registered cannot be edited."""

import importlib.util
import json
import shutil
import subprocess

import numpy as np
import pytest
import typer.testing
import xarray as xr

from hmlab import claims as ledger
from hmlab import notebooks, results
from hmlab.assets import assets_root
from hmlab.claims import ClaimError, History, HistoryError, Missing, Region, Tables, drift, judge
from hmlab.claims.measure import evaluate
from hmlab.claims.schema import Claim
from hmlab.claims.verdict import judge_one, placed
from hmlab.cli import app

ENTRIES = ledger.load()
REACH = {"devices": 1.0, "trained_parameters": 1e6, "pretrained_parameters": 0.0, "energy_meters": 0.0,
         "hardware_counters": 0.0}  # fmt: skip
LOSSES = {"ours": [1.0, 1.1, 1.2], "again": [1.02, 1.09, 1.21], "theirs": [1.5, 1.7, 1.65]}


def entry(**fields):
    """An entry that needs nothing but a test."""
    plain = {"id": "L1", "paper": "LMN", "place": "1", "says": "What is tested in this place.", "kind": "ordering",
             "quantity": "loss less theirs", "accept": {"high": 0.0}}  # fmt: skip
    return Claim.model_validate(plain | fields)


def loss(model, **fields):
    return {"result": "losses", "column": "loss", "where": {"model": model}, "seeds": "seed"} | fields


def less(a, b):
    return {"difference": [loss(a), loss(b)]}


@pytest.fixture
def tables(tmp_path):
    """Losses of three models and seeds; times of four lengths, n^1.5 exactly, and of one with A/A noise of 10 %."""
    losses = xr.Dataset({"loss": (("model", "seed"), list(LOSSES.values()))},
                        {"model": list(LOSSES), "seed": [0, 1, 2]})  # fmt: skip
    length = np.array([10, 100, 1000, 10000])
    times = xr.Dataset(
        {"seconds": ("case", length**1.5), "length": ("case", length), "noise": ("case", [0.1] * 4),
         "low": ("case", length**1.5 * 0.99), "high": ("case", length**1.5 * 1.01)},
        {"case": ["a", "b", "c", "d"]},
    )  # fmt: skip
    return kept(tmp_path, losses=losses, times=times)


def kept(folder, **datasets):
    for name, dataset in datasets.items():
        (folder / "results").mkdir(exist_ok=True)
        results.save(name, dataset, {"commit": "abc"}, folder=folder / "results")
    return Tables(folder)


@pytest.fixture(scope="module")
def verdicts():
    return judge(ENTRIES)


def test_every_claim_of_the_three_papers_is_there():
    counted = [claim for claim in ENTRIES if claim.of is None and claim.paper != "control"]
    wanted = [f"{letter}{n}" for letter, last in (("L", 90), ("H", 122), ("M", 27)) for n in range(1, last + 1)]
    assert sorted(claim.id for claim in counted) == sorted(wanted)
    assert ledger.published_count(ENTRIES) == 239
    assert [sum(claim.paper == paper for claim in counted) for paper in ("LMN", "HARMONY", "HMT")] == [90, 122, 27]
    assert sum(claim.background for claim in counted) == 54


def test_kinds_and_stances_are_those_of_the_count():
    counted = [claim for claim in ENTRIES if claim.of is None and claim.paper != "control"]
    kinds = {kind: sum(claim.kind == kind for claim in counted) for kind in ("existence", "value")}
    assert kinds["existence"] == 18 and kinds["value"] >= 24
    assert sum(claim.kind == "value" and claim.place.startswith("Table 1") for claim in counted) == 24
    expected = {claim.id for claim in counted if claim.stance == "expected"}
    assert {"H84", "H99"} <= expected and not expected & {"H6", "L60", "M1"}


def test_printed_values_are_the_published_table_and_in_the_middle_of_their_region():
    table = results.published("lmn_table1")
    rows = [("parameters", 36), ("train_loss", 37), ("valid_loss", 38)]
    order = [(dim, model) for dim in (32, 128) for model in ("gpt2-paper", "logmem", "tinylogmem", "expsum")]
    known = {claim.id: claim for claim in ENTRIES}
    for number, (dim, model) in enumerate(order):
        for column, first in rows:
            claim = known[f"L{first + 3 * number}"]
            assert claim.published.value == float(table[column].sel(dim=dim, model=model)), claim.id
            assert sum(claim.accept.bounds) / 2 == pytest.approx(claim.published.value), claim.id


def test_controls_get_the_verdicts_that_a_sound_ledger_gives(verdicts):
    controls = [claim for claim in ENTRIES if claim.expected]
    assert {claim.expected for claim in controls} >= {"reproduced", "contradicted", "inconclusive", "not attempted"}
    for claim in controls:
        assert verdicts[claim.id].word == claim.expected, claim.id


def test_counts_have_all_claims_as_denominator(verdicts):
    found = ledger.counts(ENTRIES, verdicts)
    assert sum(found.values()) == 239
    assert sum(verdicts[c.id].computed for c in ENTRIES if c.of is None and c.paper != "control") >= 80
    assert sum(sum(ledger.counts(ENTRIES, verdicts, paper).values()) for paper in ledger.ledger.PAPERS) == 239


def test_what_is_run_smaller_never_says_reproduced_alone(verdicts):
    for claim in ENTRIES:
        verdict = verdicts[claim.id]
        if verdict.computed and not claim.scale.full:
            assert verdict.text.endswith("at our scale"), claim.id
        assert verdict.computed == bool(verdict.sources) or not verdict.computed, claim.id


def test_registered_verdicts_follow_from_the_stored_results(verdicts):
    history = History()
    assert {held["claim"] for held in history.entries} >= {claim.id for claim in ENTRIES if claim.paper != "control"}
    assert drift(ENTRIES, verdicts, history) == []


def test_nothing_that_was_committed_left_the_history():
    path = History().path
    show = ["git", "-C", str(path.parent), "show", f"HEAD:./{path.name}"]
    done = subprocess.run(show, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("the history is in no commit")
    assert path.read_text(encoding="utf-8").startswith(done.stdout)


def test_what_a_claim_is_run_by_exists():
    for claim in ENTRIES:
        if claim.run is None:
            continue
        if claim.run.notebook is not None:
            notebook = notebooks.read(notebooks.find(claim.run.notebook))
            for values in (claim.run.quick, claim.run.full):
                notebook.check(values)
        command = (claim.run.command or "").split()
        if command[:2] == ["python", "-m"]:
            assert importlib.util.find_spec(command[2]), claim.id


@pytest.mark.parametrize(("low", "high", "word"), [
    (0.5, 0.6, "reproduced"), (0.0, 1.0, "reproduced"), (-0.1, 0.5, "direction only"), (0.9, 1.1, "inconclusive"),
    (-0.4, -0.2, "direction only"), (-0.6, 0.5, "inconclusive"), (-0.9, -0.6, "contradicted"),
    (1.1, 1.2, "contradicted"),
])  # fmt: skip
def test_words_are_where_the_interval_lies(low, high, word):
    assert placed(low, high, Region(low=0.0, high=1.0), Region(low=-0.5, high=1.0)) == word


def test_an_interval_of_nothing_is_no_verdict():
    with pytest.raises(ValueError, match="interval"):
        placed(float("nan"), float("nan"), Region(low=0.0))


def test_differences_are_taken_seed_by_seed(tables):
    sample = evaluate(entry(test=[{"quantity": less("ours", "theirs")}]).test[0].quantity, tables)
    assert sample.values == pytest.approx({"0": -0.5, "1": -0.6, "2": -0.45})
    assert sample.interval() == pytest.approx((-0.6, -0.45))  # of three seeds, from the least to the greatest
    assert sample.interval(0.1) == pytest.approx((-0.7, -0.35))
    assert sample.p_value == 0.25  # two of eight signs


def test_many_seeds_give_the_interval_of_the_mean(tmp_path):
    values = np.random.default_rng(1).normal(2.0, 1.0, 400)
    tables = kept(tmp_path, losses=xr.Dataset({"loss": (("model", "seed"), values[None])},
                                              {"model": ["ours"], "seed": np.arange(400)}))  # fmt: skip
    low, high = evaluate(entry(test=[{"quantity": loss("ours")}]).test[0].quantity, tables).interval()
    half = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)


@pytest.mark.parametrize(("quantity", "word"), [
    (less("ours", "theirs"), "reproduced"), (less("theirs", "ours"), "contradicted"),
    (less("again", "ours"), "inconclusive"), (less("ours", "nobody's"), "not attempted"),
    ({"difference": [{"result": "no_such", "column": "loss"}, loss("ours")]}, "not attempted"),
])  # fmt: skip
def test_a_planted_truth_passes_and_a_planted_falsehood_does_not(tables, quantity, word):
    verdict = judge_one(entry(test=[{"quantity": quantity}]), tables, REACH)
    assert verdict.word == word
    assert verdict.at_our_scale == verdict.computed


def test_a_difference_within_the_noise_is_inconclusive(tables):
    within = {"quantity": less("ours", "theirs"), "noise": {"of": {"difference": [loss("ours"), {"number": 0.4}]}}}
    verdict = judge_one(entry(test=[within]), tables, REACH)
    assert verdict.word == "inconclusive" and verdict.deciding.noise == pytest.approx(0.8)
    spread = {"quantity": less("ours", "theirs"), "noise": {"of": loss("ours"), "by": "spread"}}
    assert judge_one(entry(test=[spread]), tables, REACH).deciding.noise == pytest.approx(0.2)


def test_the_worst_test_decides(tables):
    pairs = (("ours", "theirs"), ("theirs", "ours"), ("ours", "nobody"))
    good, bad, none = ({"quantity": less(*pair)} for pair in pairs)
    assert judge_one(entry(test=[good, good]), tables, REACH).word == "reproduced"
    assert judge_one(entry(test=[good, none]), tables, REACH).word == "not attempted"
    assert judge_one(entry(test=[good, none, bad]), tables, REACH).word == "contradicted"


def test_exponents_know_the_line_and_their_scatter(tables):
    rows = {"result": "times", "column": "seconds", "reduce": "exponent", "along": "length"}
    sample = evaluate(entry(test=[{"quantity": rows}]).test[0].quantity, tables)
    assert sample.mean == pytest.approx(1.5) and sample.half < 1e-6
    wide = evaluate(entry(test=[{"quantity": rows | {"quartiles": ["low", "high"]}}]).test[0].quantity, tables)
    x = np.log([10, 100, 1000, 10000])
    x -= x.mean()
    want = 1.96 * np.log(1.01 / 0.99) / 1.349 / np.sqrt(x @ x)
    assert wide.half == pytest.approx(want, rel=1e-3)


def test_noise_of_two_times_adds_up_in_their_ratio(tables):
    parts = [{"result": "times", "column": "seconds", "where": {"case": case}, "noise": "noise"} for case in "ba"]
    sample = evaluate(entry(test=[{"quantity": {"ratio": parts}}]).test[0].quantity, tables)
    assert sample.mean == pytest.approx(10**1.5) and sample.noise == pytest.approx(0.2 * 10**1.5)


@pytest.mark.parametrize(("fields", "want"), [
    ({"reduce": "mean"}, np.mean(list(LOSSES.values()))), ({"reduce": "least"}, 1.0), ({"reduce": "most"}, 1.7),
    ({"reduce": "spread"}, 1.7), ({"reduce": "at", "along": "seed", "at": 0.5, "where": {"model": "ours"}}, 1.05),
    ({"reduce": "mean", "where": {"seed": {"least": 1, "most": 1}}}, (1.1 + 1.09 + 1.7) / 3),
    ({"reduce": "most", "by": ["model"]}, (1.2 + 1.21 + 1.7) / 3), ({"where": {"model": "ours", "seed": 2}}, 1.2),
])  # fmt: skip
def test_rows_become_one_number(tables, fields, want):
    rows = {"result": "losses", "column": "loss"} | fields
    assert evaluate(entry(test=[{"quantity": rows}]).test[0].quantity, tables).mean == pytest.approx(want)


def test_two_numbers_where_one_is_asked_for_are_no_number(tables):
    with pytest.raises(ClaimError, match=r"L1: losses: expected one loss where model is ours, got 3"):
        judge_one(entry(test=[{"quantity": loss("ours", seeds=None)}]), tables, REACH)


def test_a_row_of_a_list_that_is_not_there_is_missing(tables):
    rows = loss("ours", where={"model": ["ours", "nobody's"]}, reduce="least")
    with pytest.raises(Missing, match="nobody's"):
        evaluate(entry(test=[{"quantity": rows}]).test[0].quantity, tables)


def test_two_points_are_no_exponent(tables):
    rows = {"result": "times", "column": "seconds", "reduce": "exponent", "along": "length"}
    two = rows | {"where": {"length": {"most": 100}}}
    assert judge_one(entry(test=[{"quantity": two}]), tables, REACH).word == "not attempted"
    with pytest.raises(ClaimError, match="each row at a noise of its own"):
        judge_one(entry(test=[{"quantity": rows | {"along": "noise"}}]), tables, REACH)


@pytest.mark.parametrize(("quantity", "message"), [
    (loss("ours", column="los"), "expected a column of .*got 'los'"),
    ({"function": "parameter"}, "did you mean parameters"),
    ({"function": "parameters", "arguments": {"modle": "logmem"}}, "parameters: .*"),
])  # fmt: skip
def test_a_query_that_cannot_be_right_is_refused(tables, quantity, message):
    with pytest.raises(ClaimError, match=message):
        judge_one(entry(test=[{"quantity": quantity}]), tables, REACH)


def test_what_is_beyond_reach_is_blocked_and_not_a_day_longer():
    far = entry(scale={"needs": {"devices": 8.0}})
    assert judge_one(far, Tables(), REACH).word == "blocked by scale"
    assert judge_one(far, Tables(), REACH | {"devices": 8.0}).word == "not attempted"


@pytest.mark.parametrize(("text", "message"), [
    ('verdict = "reproduced"', "L1.verdict: Extra inputs are not permitted"),
    ("acept = { low = 1.0 }", "L1.acept: Extra inputs"),
    ('accept = { low = "1" }', "L1.accept.low: Input should be a valid number"),
    ("accept = { low = 2.0, high = 1.0 }", "low <= high"),
    ("test = [{ quantity = { result = 'a', column = 'b', code = 'c' } }]", "code: Extra inputs"),
    ("test = [{ quantity = { code = '1 + 1' } }]", "quantity"),
    ("scale = { needs = { luck = 1.0 } }", "luck"),
    ('expected = "reproduced"', "expected names the verdict of a control"),
])  # fmt: skip
def test_the_schema_refuses_what_it_does_not_know(tmp_path, text, message):
    accept = "" if text.startswith("accept") else "accept = { low = 1.0 }"
    (tmp_path / "one.toml").write_text(f'paper = "LMN"\n[[claim]]\nid = "L1"\nplace = "1"\nkind = "value"\n'
                                       f'says = "What is tested in this place."\nquantity = "q"\n{accept}\n{text}\n')
    with pytest.raises(ClaimError, match=message):
        ledger.load(tmp_path)


def test_no_claim_without_a_region(tmp_path):
    (tmp_path / "one.toml").write_text('paper = "LMN"\n[[claim]]\nid = "L1"\nplace = "1"\nkind = "value"\n'
                                       'says = "What is tested in this place."\n')  # fmt: skip
    with pytest.raises(ClaimError, match="a quantity and an accepted region"):
        ledger.load(tmp_path)


def test_an_id_twice_is_refused(tmp_path):
    for name in ("a", "b"):
        shutil.copy(assets_root() / "data" / "claims" / "controls.toml", tmp_path / f"{name}.toml")
    with pytest.raises(ClaimError, match="C1: expected one entry, got two"):
        ledger.load(tmp_path)


@pytest.fixture
def registered(tables, tmp_path):
    """Three entries whose verdicts stand in a history."""
    entries = [entry(id=f"L{n}", test=[{"quantity": less(*pair)}])
               for n, pair in enumerate((("ours", "theirs"), ("theirs", "ours"), ("again", "ours")), 1)]  # fmt: skip
    history = History(tmp_path / "history.jsonl")
    assert history.record(entries, judge(entries, tables, REACH)) == ["L1", "L2", "L3"]
    return entries, history


def test_only_changes_are_added(registered, tables, tmp_path):
    entries, history = registered
    before = history.path.read_bytes()
    again = History(history.path)
    assert again.record(entries, judge(entries, tables, REACH)) == []
    assert history.path.read_bytes() == before and len(again.entries) == 3
    assert drift(entries, judge(entries, tables, REACH), again) == []
    worse = xr.Dataset({"loss": (("model", "seed"), [[1.9, 1.9, 1.9], [1.0, 1.1, 1.2], [1.5, 1.7, 1.65]])},
                       {"model": ["ours", "again", "theirs"], "seed": [0, 1, 2]})  # fmt: skip
    now = judge(entries, kept(tmp_path, losses=worse), REACH)
    assert [(gone.claim, gone.registered, gone.now, gone.changed) for gone in drift(entries, now, again)] == [
        ("L1", "reproduced at our scale", "contradicted at our scale", ("results/losses",)),
        ("L2", "contradicted at our scale", "reproduced at our scale", ("results/losses",)),
        ("L3", "inconclusive at our scale", "reproduced at our scale", ("results/losses",)),
    ]
    assert again.record(entries, now) == ["L1", "L2", "L3"]
    assert history.path.read_bytes().startswith(before) and drift(entries, now, History(history.path)) == []


def test_a_moved_region_shows(registered, tables):
    entries, history = registered
    moved = [entry(id="L1", accept={"high": 0.1}, test=[{"quantity": less("ours", "theirs")}]), *entries[1:]]
    found = drift(moved, judge(moved, tables, REACH), history)
    assert [(gone.claim, gone.registered == gone.now, gone.changed) for gone in found] == [("L1", True, ("entry",))]


def test_a_region_cannot_move_unseen_before_there_are_numbers(tables, tmp_path):
    planned = [entry(test=[{"quantity": less("ours", "nobody")}])]
    history = History(tmp_path / "history.jsonl")
    assert history.record(planned, judge(planned, tables, REACH)) == ["L1"]
    assert drift(planned, judge(planned, tables, REACH), history) == []
    moved = [entry(accept={"high": 9.0}, test=[{"quantity": less("ours", "nobody")}])]
    assert [gone.changed for gone in drift(moved, judge(moved, tables, REACH), history)] == [("entry",)]
    more = xr.Dataset({"loss": (("model", "seed"), [[1.0, 1.1, 1.2], [1.5, 1.7, 1.65]])},
                      {"model": ["ours", "nobody"], "seed": [0, 1, 2]})  # fmt: skip
    now = judge(planned, kept(tmp_path, losses=more), REACH)
    assert now["L1"].computed and drift(planned, now, history) == []
    assert history.record(planned, now) == ["L1"] and len(history.entries) == 2


def test_an_entry_that_was_registered_cannot_leave(registered, tables):
    entries, history = registered
    found = drift(entries[1:], judge(entries[1:], tables, REACH), history)
    assert [(gone.claim, gone.now) for gone in found] == [("L1", "no such entry")]


def test_a_result_that_went_missing_shows(registered, tmp_path):
    entries, history = registered
    (tmp_path / "empty").mkdir()
    found = drift(entries, judge(entries, Tables(tmp_path / "empty"), REACH), history)
    assert [gone.now for gone in found] == ["not attempted"] * 3


@pytest.mark.parametrize("edit", [
    lambda lines: [lines[0].replace("reproduced", "contradicted"), *lines[1:]],
    lambda lines: [*lines[:2], lines[2].replace('"seeds": 3', '"seeds": 9')],
    lambda lines: [lines[0], lines[2]],
    lambda lines: lines[1:],
    lambda lines: [lines[1], lines[0], lines[2]],
    lambda lines: [*lines[:2], "{}"],
    lambda lines: [*lines[:2], lines[2][:-10]],
])  # fmt: skip
def test_the_history_refuses_edits(registered, edit):
    path = registered[1].path
    lines = path.read_text().splitlines()
    edited = edit(lines)
    assert edited != lines
    path.write_text("\n".join(edited) + "\n")
    with pytest.raises(HistoryError, match="line"):
        History(path)


def command(*arguments, status=0):
    result = typer.testing.CliRunner().invoke(app, ["claims", *arguments])
    assert result.exit_code == status, (result.output, result.stderr, result.exception)
    return result


def test_the_command_prints_json_and_nothing_else():
    shown = json.loads(command("L39", "L68", "--json").stdout)
    assert [(c["id"], c["verdict"]) for c in shown["claims"]] == [("L39", "reproduced"), ("L68", "contradicted")]
    assert shown["total"] == 2 and shown["published"] == 239 and shown["counts"]["reproduced"] == 1
    assert shown["claims"][0]["tests"][0]["value"] == 71489 and shown["drift"] == []
    chosen = json.loads(command("L39", "L68", "--verdict", "contradicted", "--json").stdout)
    assert [claim["id"] for claim in chosen["claims"]] == ["L68"]


def test_the_command_prints_an_entry_with_its_tests():
    text = command("L61").stdout
    assert "direction only" in text and "1.2745" in text and "E = 128" in text and "1 of 1 claims" in text


@pytest.mark.parametrize("arguments", [
    ("L390",), ("--paper", "LMM"), ("--verdict", "reproducd"), ("L39", "--paper", "HMT")
])  # fmt: skip
def test_the_command_refuses_what_is_not_there(arguments):
    assert command(*arguments, status=2).stderr.startswith("hmlab: ")


def test_the_command_fails_when_a_registered_verdict_does_not_follow(monkeypatch, tmp_path):
    path = tmp_path / "history.jsonl"
    chosen = [claim for claim in ENTRIES if claim.id in ("L39", "L68")]
    false = {claim.id: verdict for claim, verdict in zip(chosen, reversed(judge(chosen).values()), strict=True)}
    History(path).record(chosen, false)
    monkeypatch.setattr(ledger, "History", lambda: History(path))
    told = command("L39", "L68", status=1).stderr
    assert "L39: registered as contradicted, now reproduced" in told and "L68" in told
    command("L39", "L68", "--record")
    assert command("L39", "L68").stderr == "" and len(History(path).entries) == 4


def test_the_command_fails_when_a_control_does(monkeypatch):
    broken = [claim.model_copy(update={"accept": Region(low=0.0)}) if claim.id == "C2" else claim for claim in ENTRIES]
    monkeypatch.setattr(ledger, "load", lambda: broken)
    assert "control C2: expected contradicted, computed reproduced" in command("C2", status=1).stderr
