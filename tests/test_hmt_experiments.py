"""HMT's experiments in seconds: interrupted they go on to the same table, and what they count is counted rightly."""

import itertools
import json
import os
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
import xarray as xr
from safetensors.torch import load_file

from hmlab import encodings, pretrained, results
from hmlab import model as models
from hmlab.assets import assets_root
from hmlab.experiments import hmt_entries, hmt_latency, hmt_probe, hmt_recall, hmt_tasks, hmt_text
from hmlab.record import record
from hmlab.tasks import segments
from hmlab.wrappers.hmt import HMT, Recall
from hmlab.wrappers.hmt.evaluation import losses, perplexities
from hmlab.wrappers.hmt.training import Windows

TASKS = hmt_tasks.Setting(
    width=16, layers=1, heads=2, mlp=16, length=16, sensory=4, fraction=0.25, measured=4, farthest=12, asked=6,
    pairs=(hmt_tasks.Phase("copy", 3, 2, 2, recall=False), hmt_tasks.Phase("pairs", 4, 2, 2)),
    majority=(hmt_tasks.Phase("majority", 4, 2, 2),),
)  # fmt: skip
RECALL = hmt_recall.Setting(
    models=TASKS, tokens=((320, 2),), asked=8, cache_sizes=(3, 15),
    ranked=TASKS.streams(batch=2, segments=36, pairs=6, distance=(2, 30), copies=3),
)  # fmt: skip
LATENCY = hmt_latency.Setting(widths=(8, 16), memories=(3, 40), repeats=5, tokens=2000, every=1000, cache_sizes=(2, 9),
                              width=8, segment_length=50)  # fmt: skip


def told(after):
    """A `say` that interrupts at its `after`-th message."""
    count = itertools.count(1)

    def say(message: str) -> None:
        if next(count) == after:
            raise KeyboardInterrupt

    return say


def quiet(message: str) -> None:
    pass


@pytest.fixture(autouse=True)
def few_questions(monkeypatch):
    """Of streams that take no time."""
    monkeypatch.setattr(hmt_tasks, "QUESTIONS", {"near": ("pairs", 0, 1), "far": ("pairs", 2, 48),
                                                 "majority of 8": ("majority", 8, 8)})  # fmt: skip


@pytest.fixture
def hmt():
    torch.manual_seed(0)
    return TASKS.model("HMT").eval()


@pytest.mark.parametrize("after", [2, 5])
def test_tasks_go_on_where_they_were_interrupted(tmp_path, after):
    names = ["HMT, rewarded", "HMT, shuffled"]
    whole = hmt_tasks.run(TASKS, names, [0], tmp_path / "whole", quiet)
    with pytest.raises(KeyboardInterrupt):
        hmt_tasks.run(TASKS, names, [0], tmp_path / "parts", told(after))
    done = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "parts").iterdir() if path.is_file()}
    again = hmt_tasks.run(TASKS, names, [0], tmp_path / "parts", quiet)
    xr.testing.assert_identical(whole, again)
    for name, changed in done.items():
        assert (tmp_path / "parts" / name).stat().st_mtime_ns == changed, f"{name} was made again"


def test_tasks_table_holds_what_its_columns_say(tmp_path):
    names = list(hmt_tasks.MODELS)
    found = hmt_tasks.run(TASKS, names, [0], tmp_path, quiet)
    assert found["accuracy"].dims == ("model", "seed", "question")
    assert ((found["low"] <= found["accuracy"]) & (found["accuracy"] <= found["high"])).all()
    answers = found["answers"].sel(seed=0)
    assert (answers == answers[0]).all()  # of every model the same
    pairs = [question for question, (form, _, _) in hmt_tasks.QUESTIONS.items() if form == "pairs"]
    assert (answers.sel(question=pairs).sum("question") == TASKS.measured * TASKS.asked).all()
    assert (answers.sel(question="majority of 8") == TASKS.measured * 4).all()
    assert (found["chance"].sel(question=pairs) == 1 / 16).all()
    held = found["state_bytes"].sel(seed=0, question="far")
    assert held.sel(model="HMT") > held.sel(model="RMT") > held.sel(model="segments")
    results.save("table", found, {"made": "here"}, folder=tmp_path)


def test_all_models_have_as_many_parameters():
    setting = hmt_tasks.Setting()
    sizes = {name: models.parameters(setting.model(name)) for name in hmt_tasks.MODELS}
    for name, size in sizes.items():
        assert abs(size / sizes["HMT"] - 1) < 0.05, f"{name} has {size} of {sizes['HMT']}"


def test_every_model_sees_the_same_batches(tmp_path):
    seen = {}
    for name in ("HMT", "RMT", "window 64"):
        torch.manual_seed(0)
        model, seen[name] = TASKS.model(name), []
        embedding = model.get_submodule("embedding" if name.startswith("window") else "backbone.model.embed_tokens")
        data = segments.SegmentsData._filler
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(segments.SegmentsData, "_filler", lambda self, generator, name=name, data=data:
                          seen[name].append(data(self, generator)) or seen[name][-1])  # fmt: skip
            for _ in hmt_tasks._steps(TASKS, model, "pairs", 3, tmp_path / name):
                pass
        assert embedding.weight.requires_grad
    for name in ("RMT", "window 64"):
        assert len(seen[name]) == len(seen["HMT"])
        assert all(torch.equal(*pair) for pair in zip(seen["HMT"], seen[name], strict=True))


def test_answers_are_those_of_one_call(hmt):
    config = TASKS.streams(batch=3, segments=7, pairs=3, distance=(0, 6))
    [batch] = config.open().evaluation_batches("valid", 1, 0)
    distance, correct, held = hmt_tasks.answers(hmt, [batch], 16, chunk=2)
    with torch.no_grad():
        out = hmt(batch.tokens)
    assert torch.equal(correct, (out.logits.argmax(-1) == batch.targets)[batch.mask])
    rows, places = batch.mask.nonzero(as_tuple=True)
    expected = [int(p) // 16 - int(batch.oracle[r, p]) // 16 for r, p in zip(rows, places, strict=True)]
    assert distance.tolist() == expected
    assert held * 3 == hmt.state_bytes(out.state)


def test_shuffled_memories_are_found_alike_and_read_otherwise(hmt):
    ids = torch.randint(66, (2, 6 * 16), generator=torch.Generator().manual_seed(1))
    seen = []
    for how in (nullcontext(), hmt_tasks.shuffled(hmt), nullcontext()):
        with how, torch.no_grad(), record(hmt, ["recall_weight"]) as recording:
            logits = hmt(ids).logits
        seen.append((logits, torch.from_numpy(recording.dataset()["recall_weight"].values)))
    (plain, weights), (mixed, found), (after, _) = seen
    # The third segment is the first that has two memories to choose from.
    assert torch.equal(weights[0, :, 2, :2], found[0, :, 2, :2]) and not weights[0, :, 2, :2].isnan().any()
    assert torch.equal(plain[:, :32], mixed[:, :32]) and not torch.equal(plain[:, 48:], mixed[:, 48:])
    assert torch.equal(plain, after)


def test_rankings_are_those_of_the_state(hmt):
    config = RECALL.ranked
    [batch] = config.open().evaluation_batches("valid", 1, 5)
    ranker = hmt_recall.Ranker(hmt, batch, 16, 0)
    ranker.read()
    assert ranker.relevant == [3] * 12 and all(len(ranker.found[name]) == 12 for name in hmt_recall.RANKINGS)
    # By hand, from states of whole segments: questions in the order in which they are asked.
    order = sorted((int(place) // 16, int(row)) for row, place in batch.mask.nonzero())
    for (n, row), found, weight in zip(order, ranker.found["recall"], ranker.weight, strict=True):
        with torch.no_grad():
            state = hmt.prefill(batch.tokens[row : row + 1, : n * 16])
            tail = hmt.reader.embed(batch.tokens[row : row + 1, n * 16 - 4 : n * 16])
            summary = hmt.reader.read(torch.cat((hmt.summary[None], tail, hmt.summary[None]), 1))[0][0, -1]
            query = F.normalize(hmt.recall.query(summary), dim=-1)
            keys = F.normalize(hmt.recall.key(state.cache[0, :, 0]), dim=-1)
            scores = hmt.recall.scale.exp() * (keys @ query)
        relevant = torch.zeros(n, dtype=torch.bool)
        fact = batch.oracle[row, n * 16]
        said = batch.tokens[row, fact - 1 : fact + 1]
        for i in range(n - 1):
            text = batch.tokens[row, i * 16 : (i + 1) * 16]
            relevant[i] = ((text[:-1] == said[0]) & (text[1:] == said[1])).any()
        best = scores[: n - 1].topk(min(30, n - 1)).indices
        assert torch.equal(relevant[best], found[: len(best)]) and not found[len(best) :].any()
        assert weight == pytest.approx(float(scores.softmax(0)[relevant].sum()), abs=1e-5)
    assert batch.tokens.shape[1] > hmt_recall.CHUNK * 16  # more than one call


def test_precision_and_recall_count_the_relevant(hmt):
    rows = hmt_recall.rank(RECALL, hmt, 5)
    exact, chance = rows["kNN, embeddings"], rows["random"]
    # The key is a word of the three segments that say the fact, and of no other but the last, which is left out.
    assert exact["recall"] == pytest.approx([1 / 3, 1, 1, 1]) and exact["precision"] == pytest.approx([1, 1, 0.3, 0.1])
    assert rows["questions"] == 12 and 0 < rows["weight"] < 1
    assert chance["recall"][0] < 1 / 3 and chance["recall"] == sorted(chance["recall"])


def test_retrieval_and_cache_go_on_where_they_were_interrupted(tmp_path):
    for measured in (hmt_recall.retrieval, hmt_recall.cache):
        whole = measured(RECALL, ["HMT"], [0], tmp_path / "whole", quiet)
        with pytest.raises(KeyboardInterrupt):
            measured(RECALL, ["HMT"], [0], tmp_path / "parts", told(2 if measured is hmt_recall.cache else 1))
        again = measured(RECALL, ["HMT"], [0], tmp_path / "parts", quiet)
        drop = [name for name in ("cpu_seconds",) if name in whole]
        xr.testing.assert_identical(whole.drop_vars(drop), again.drop_vars(drop))
    assert (again["answers"].sum("distance") == 2 * RECALL.asked).all()
    held = again["state_bytes"].sel(model="HMT", seed=0, tokens=320).max("distance")
    assert held.sel(cache="3") < held.sel(cache="15") == held.sel(cache="15, shuffled")
    assert held.sel(cache="15") - held.sel(cache="3") == 12 * 2 * 16 * 4
    results.save("table", again, {"made": "here"}, folder=tmp_path)


def test_a_cache_of_another_size_has_the_same_weights(tmp_path):
    small, large = (RECALL.hmt("HMT", 0, tmp_path, size, quiet) for size in (3, 15))
    for name, value in small.state_dict().items():
        assert torch.equal(value, large.state_dict()[name]), name
    assert (small.config.cache_size, large.config.cache_size) == (3, 15)


def test_every_place_recalls_the_same(monkeypatch):
    torch.manual_seed(0)
    recall = Recall(16, 16, key_norm=True, each=False)
    summary, cache = torch.randn(1, 1, 16), torch.randn(1, 30, 1, 16)
    with torch.no_grad(), hmt_latency.places(recall, summary, cache, "cpu", 2**20) as found:
        assert set(found) == {"device", "disk, warm", "disk, cold", "store"}
        expected = found["device"].call()
        for name, place in found.items():
            for _ in range(2):
                place.before()
                torch.testing.assert_close(place.call(), expected, rtol=1e-5, atol=1e-6, msg=name)
        monkeypatch.setattr(hmt_latency, "NEAREST", 3)
        assert not torch.allclose(found["store"].call(), expected)


def test_dropped_pages_are_read_from_the_disk_again(tmp_path):
    cache, keys = torch.randn(1, 4096, 1, 64), torch.randn(1, 4096, 1, 64)
    mapped = hmt_latency.Mapped(tmp_path, cache, keys)
    taken = []
    for drop in (False, True, False):
        if drop:
            mapped.drop()
        before = hmt_latency.disk_bytes_read()
        assert torch.equal(mapped.cache, cache) and torch.equal(mapped.keys, keys)
        taken.append(hmt_latency.disk_bytes_read() - before)
    if not os.major(tmp_path.stat().st_dev):
        pytest.skip("the folder's file system has no device under it")
    assert taken[0] == taken[2] == 0 and taken[1] >= 2 * cache.nbytes


def test_latency_is_measured_where_it_can_be(tmp_path):
    found = hmt_latency.latency(LATENCY, quiet, "cpu")
    there = found["median"].sel(place=["device", "disk, warm", "disk, cold", "store"])
    assert (there > 0).all() and found["median"].sel(place="host").isnull().all()
    assert found.attrs["not_measured"] == ["host"]
    assert ((found["low"] <= found["median"]) | found["median"].isnull()).all()
    assert (found["bytes"].sel(width=16, memories=40, place="device") == 4 * 16 * (16 + 80)).all()
    narrow = hmt_latency.latency(replace(LATENCY, largest=4 * 8 * (8 + 80), stored=0), quiet, "cpu")
    assert narrow["median"].sel(width=16, memories=40).isnull().all()
    assert narrow["median"].sel(place="store").isnull().all()
    results.save("table", found, {"made": "here"}, folder=tmp_path)


def test_reading_holds_no_more_than_its_cache(tmp_path):
    found = hmt_latency.read(LATENCY, tmp_path, quiet)
    xr.testing.assert_identical(found, hmt_latency.read(LATENCY, tmp_path, quiet))  # kept, its times too
    assert found["tokens"].values.tolist() == [1000, 2000]
    assert found["held"].values.tolist() == [[2, 2], [9, 9]]
    assert (found["state_bytes"].sel(tokens=1000) == found["state_bytes"].sel(tokens=2000)).all()
    assert (found["cpu_seconds"].diff("tokens") > 0).all() and (found["peak_bytes"] >= 0).all()
    results.save("table", found, {"made": "here"}, folder=tmp_path)


TEXT = hmt_text.Setting(vocab=300, width=16, layers=1, heads=2, segment=8, sensory=2, cache=8, segments=3, batch=2,
                        alone=(3, 2), stages=(2, 2), streams=2)  # fmt: skip
ENTRIES = hmt_entries.Setting(piece=2, streams=4, segments=8, ablated=4)
PROBE = hmt_probe.Setting(segments=8, fitted=6, streams=4, seen=2)


@pytest.fixture
def small_text(tmp_path, monkeypatch):
    """`hmt_text` on a made text, at histories that take no time."""
    lines = [f"line {number} of {number * number % 97} in the text\n" for number in range(3000)]
    (tmp_path / "made.txt").write_text("".join(lines))
    monkeypatch.setattr(hmt_text, "HISTORY", (0, 1, 2, 4))
    return replace(TEXT, corpus=str(tmp_path / "made.txt"))


@pytest.fixture
def recalling():
    """An HMT whose weights nobody trained, but large enough to matter, and a text."""
    torch.manual_seed(0)
    hmt = TEXT.build("hmt previous").eval()
    with torch.no_grad():
        for parameter in hmt.backbone.parameters():
            parameter.mul_(10 if parameter.ndim > 1 else 1)
    return hmt, torch.randint(300, (3, 8 * 8 + 1))


@pytest.mark.parametrize("after", [1, 3, 5])
def test_text_goes_on_where_it_was_interrupted(tmp_path, small_text, after):
    names = ["segment", "sensory", "hmt previous", "hmt previous, read none"]
    whole = hmt_text.run(small_text, names, [0, 1], tmp_path / "whole", quiet)
    with pytest.raises(KeyboardInterrupt):
        hmt_text.run(small_text, names, [0, 1], tmp_path / "parts", told(after))
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "parts").rglob("*.safetensors")}
    again = hmt_text.run(small_text, names, [0, 1], tmp_path / "parts", quiet)
    xr.testing.assert_identical(whole.drop_vars("cpu_seconds"), again.drop_vars("cpu_seconds"))
    for path, changed in done.items():
        assert path.stat().st_mtime_ns == changed, f"{path.parent.name} was trained again"


def test_variants_read_the_same_windows_from_the_same_weights_on(tmp_path, small_text, monkeypatch):
    read, drawn = [], Windows.batches

    def batches(self, split, generator):
        for batch in drawn(self, split, generator):
            if split == "train" and self.context == 24:
                read[-1].append(batch.tokens)
            yield batch

    monkeypatch.setattr(Windows, "batches", batches)
    tokens = {"train": torch.arange(6000) % 299, "valid": torch.arange(900) % 299}
    rate = 1e-4
    setting = replace(small_text, learning_rate=rate, alone=(40, 2), stages=(1, 1))
    backbones = {}
    for variant in hmt_text.VARIANTS:
        read.append([])
        backbones[variant] = hmt_text.trained(setting, variant, 0, tokens, tmp_path, quiet).backbone.state_dict()
    first, *rest = read
    assert len(first) == 4  # of each stage what it learned from and what its last step was evaluated on
    for variant, seen in zip(list(hmt_text.VARIANTS)[1:], rest, strict=True):
        same = all(torch.equal(a, b) for a, b in zip(first, seen, strict=True))
        assert same == (variant != "segment again")
    torch.manual_seed(0)
    untrained = setting.build("segment").backbone.state_dict()
    alone = load_file(tmp_path / "alone-0" / "training.safetensors")
    moved = {name: alone[f"model/backbone.{name}"] for name in untrained}
    assert max((moved[name] - untrained[name]).abs().max() for name in moved) > 5 * rate
    for variant, weights in backbones.items():
        # A step of Adam moves no weight by more than its rate, decay aside.
        assert all((weights[name] - moved[name]).abs().max() < 2.1 * rate for name in moved), variant


def test_losses_are_sorted_by_history_and_place(small_text):
    hmt = small_text.build("hmt prefix")
    each = torch.arange(5.0)[:, None] * 100 + torch.arange(8.0)  # segment n, place p: 100 n + p
    found = hmt_text.by_history(each.flatten()[None], hmt)
    assert hmt.config.excerpt == 4
    assert found["first"] == [1, 101, 201, 351, 251]  # places 0 to 2; segments 0, 1, 2, 3 to 4, and 1 to 4
    assert found["rest"] == [5, 105, 205, 355, 255]
    assert found["all"] == [3.5, 103.5, 203.5, 353.5, 253.5]
    assert [found[name][0] for name in ("0 to 0", "1 to 1", "2 to 3", "4 to 7")] == [0, 1, 2.5, 5.5]


def test_readings_are_the_same_weights_under_another_query(tmp_path, small_text):
    """Against `perplexities`, which reads the same text on its own way."""
    names = ["hmt prefix", "hmt prefix, read previous", "hmt prefix, read none"]
    found = hmt_text.run(small_text, names, [0], tmp_path, quiet).sel(seed=0)
    tokens = hmt_text.opened(small_text).tokens
    text = hmt_text.held_out(tokens, small_text.streams, 5 * small_text.segment)
    hmt = hmt_text.trained(small_text, "hmt prefix", 0, tokens, tmp_path, quiet)
    nats = perplexities(hmt, text)["nats"].isel(segment=slice(1, None)).mean(("batch", "segment"))
    for name in names:
        for part in ("first", "rest"):
            expected = float(nats.sel(query=hmt_text.READINGS[name].query, part=part))
            assert float(found["mean"].sel(reading=name, places=part)) == pytest.approx(expected, rel=1e-5)
    assert len(set(found["mean"].sel(places="all").values.tolist())) == 3
    assert (found["added"] == hmt.memory.numel() + 16 + 2 * 16 * 16 + 1).all()


def test_both_hmts_are_written_and_read_back(tmp_path, small_text):
    hmt_text.export(small_text, 0, tmp_path, tmp_path / "out", quiet)
    data = hmt_text.opened(small_text)
    text = hmt_text.held_out(data.tokens, 1, 4 * small_text.segment)
    for query in ("previous", "prefix"):
        trained = hmt_text.trained(small_text, f"hmt {query}", 0, data.tokens, tmp_path, quiet)
        back = HMT.from_pretrained(tmp_path / "out" / query)
        assert back.config == trained.config and back.query == query
        torch.testing.assert_close(losses(back, text), losses(trained, text), rtol=0, atol=0)
    encoding = encodings.from_json((tmp_path / "out" / "encoding.json").read_text())
    assert encoding.decode(data.tokens["valid"][:50].numpy()) == data.encoding.decode(data.tokens["valid"][:50].numpy())
    about = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert about["setting"]["width"] == small_text.width and about["corpus"]["corpus"] == data.corpus.name


def test_trained_hmts_that_come_with_hmlab_read_english():
    folder = assets_root() / "data" / "checkpoints" / "hmt"
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 4_000_000
    assert "hmt" not in pretrained.names()
    encoding = encodings.from_json((folder / "encoding.json").read_text())
    text = ("The old man sat by the window of his room, and looked at the rain. He had not slept, and his daughter, "
            "who had come from the town to see him, thought that he was ill. But he said that he was very well, and "
            "that he would go out as soon as the sun was there. 'You will not,' said she; and she took his hand. 'I "
            "have been out in worse than this, my dear, before you were born; and so was your mother.' She "
            "said nothing more, but brought him his coat and his hat, and went with him to the door.")  # fmt: skip
    ids = torch.from_numpy(encoding.encode(text)).long()[None]
    for query in ("previous", "prefix"):
        hmt = HMT.from_pretrained(folder / query)
        assert hmt.config.query == query and ids.shape[1] > 2 * hmt.config.segment_length
        assert losses(hmt, ids).mean() < 4.5  # 6.9 if it knew nothing
        assert losses(hmt, ids.flip(1)).mean() > 5.5


def test_what_lies_inside_the_noise_is_not_clear():
    mean = {"segment": [4.0, 4.1], "segment again": [4.02, 4.09], "far better": [3.5, 3.6], "better once": [3.9, 4.09],
            "worse": [4.1, 4.2], "both ways": [3.9, 4.2]}  # fmt: skip
    table = xr.Dataset({"mean": (("reading", "seed", "places"), np.array(list(mean.values()))[..., None])},
                       {"reading": list(mean), "seed": [0, 1], "places": ["all"]})  # fmt: skip
    found = hmt_text.differences(table)
    assert float(found["noise"].squeeze()) == pytest.approx(0.02)
    assert found["gain"].sel(reading="far better").squeeze().values == pytest.approx([0.5, 0.5])
    clear = {name: bool(found["clear"].sel(reading=name).squeeze()) for name in mean}
    assert clear == {"segment": False, "segment again": False, "far better": True, "better once": False,
                     "worse": True, "both ways": False}  # fmt: skip
    lines = []
    hmt_text.told(table.assign_coords(places=["all"]).reindex(places=["all", "first", "rest"]), lines.append)
    [better] = [line for line in lines if "far better" in line]
    [once] = [line for line in lines if "better once" in line]
    assert "all +0.5000," in better and "all +0.0550 (noise: 0.0200)" in once


@pytest.mark.parametrize("experiment, setting, after", [(hmt_entries, ENTRIES, 2), (hmt_probe, PROBE, 3)])
def test_trained_memories_are_looked_at_once(tmp_path, small_text, monkeypatch, experiment, setting, after):
    monkeypatch.setattr(hmt_entries, "SHUFFLES", 20)
    setting, models, seeds = replace(setting, text=small_text), list(experiment.MODELS[:2]), [0, 1]
    whole = experiment.run(setting, models, seeds, tmp_path / "whole", quiet)
    with pytest.raises(KeyboardInterrupt):
        experiment.run(setting, models, seeds, tmp_path / "parts", told(after))
    again = experiment.run(setting, models, seeds, tmp_path / "parts", quiet)
    xr.testing.assert_identical(whole, again)
    assert whole.to_array().notnull().all()
    results.save("memory", whole, {"made": "here"}, folder=tmp_path)
    kept = results.load("memory", folder=tmp_path)
    for name, values in whole.items():
        back = kept[name].isel({dim: 0 for dim in kept[name].dims if dim not in values.dims}).reindex_like(values)
        np.testing.assert_allclose(back.transpose(*values.dims).values, values.values, rtol=1e-12)
    if experiment is hmt_entries:
        assert whole["mass_uniform"].sel(model="hmt prefix", seed=0).values == pytest.approx(
            np.full(4, np.mean([1 / 4, 1 / 5, 1 / 6, 1 / 7])))  # fmt: skip


def test_texts_alternate_and_weights_on_the_query_s_text_are_counted():
    first, second = torch.arange(12)[None], torch.arange(100, 112)[None]
    woven = hmt_entries.interleaved(first, second, 2)
    assert woven[0].tolist() == [0, 1, 100, 101, 2, 3, 102, 103, 4, 5, 104, 105]
    # Pieces of 2 segments: texts A A B B A A B B. Of the prefix, segment 4 is the first with both behind it.
    counts, same = hmt_entries.sides(8, 2, "prefix")
    assert counts.any(1).tolist() == [False] * 4 + [True] * 4
    assert (counts & same)[5].nonzero()[:, 0].tolist() == [0, 1] and counts[5].sum() == 4
    # The previous segment's tail: segment 4 still asks with B's words, whose own piece does not count.
    counts, same = hmt_entries.sides(8, 2, "previous")
    assert not counts[4].any() and (counts & same)[6].nonzero()[:, 0].tolist() == [0, 1]
    equal = torch.ones(1, 8, 8)
    assert hmt_entries.same_share(equal, counts, same) == pytest.approx((2 / 4 + 2 / 4 + 2 / 6) / 3)
    assert hmt_entries.same_share(same.double()[None], counts, same) == 1
    assert hmt_entries.same_share((~same).double()[None] + 1e-12, counts, same) == pytest.approx(0, abs=1e-9)


def test_weights_are_the_recall_s_own_and_lie_at_their_distance(recalling):
    hmt, ids = recalling
    weights = hmt_entries.recall_weights(hmt, ids)
    assert weights.shape == (3, 8, 8) and not weights.triu().any()
    torch.testing.assert_close(weights[:, 1:].sum(2), torch.ones(3, 7, dtype=torch.float64), rtol=0, atol=1e-6)
    with record(hmt.recall) as recording:
        losses(hmt, ids)
    seen = recording.dataset()["recall_weight"].isel(layer=0, memories=0, time=5)
    assert weights[1, 5, :5].numpy() == pytest.approx(seen.isel(batch=1).values[:5])
    found = hmt_entries.by_distance(weights)
    assert found[1] == pytest.approx(float(torch.stack([weights[:, n, n - 2].mean() for n in range(4, 8)]).mean()))


def test_ablation_leaves_an_entry_out_and_no_other(recalling):
    """Against P made by hand from the other memories, and the backbone read by itself."""
    hmt, ids = recalling
    at, length, k = 5, 8, 2
    weights, rises = hmt_entries.ablation(hmt, ids, at)
    state = hmt.prefill(ids[:, : at * length])
    embed = hmt.backbone.get_input_embeddings()
    begin, targets = at * length, ids[:, at * length + 1 : (at + 1) * length + 1]

    def nats(weight):
        prompt = torch.einsum("bs,bsd->bd", weight, state.cache[:, :at, 0])[:, None]
        x = torch.cat((prompt, embed(ids[:, begin - k : begin + length]), prompt), 1)
        logits = hmt.backbone(inputs_embeds=x).logits[:, 1 + k : 1 + k + length].double()
        return F.cross_entropy(logits.transpose(1, 2), targets, reduction="none").mean(1)

    with torch.no_grad():
        whole = nats(weights.float())
        for entry in range(at):
            left = weights.clone()
            left[:, entry] = 0
            expected = nats((left / left.sum(1, keepdim=True)).float()) - whole
            # Losses near 5.7 in float32, of which the difference is taken.
            torch.testing.assert_close(rises[:, entry], expected, rtol=0, atol=4e-6)
    assert rises.abs().max() > 4e-5


def test_statistics_agree_with_scipy():
    torch.manual_seed(0)
    first, second = torch.randn(5, 12), torch.randn(5, 12)
    found = hmt_entries.rank_correlation(first, second)
    assert found.tolist() == pytest.approx([scipy.stats.spearmanr(a, b).statistic
                                            for a, b in zip(first, second, strict=True)])  # fmt: skip
    scores, present = torch.randn(40, 3).double(), torch.rand(40, 3) < 0.4
    expected = [scipy.stats.mannwhitneyu(scores[present[:, n], n], scores[~present[:, n], n]).statistic
                / float(present[:, n].sum() * (~present[:, n]).sum()) for n in range(3)]  # fmt: skip
    assert hmt_probe.auc(scores, present, 1) == pytest.approx(np.mean(expected))
    present[:, 0] = False
    assert hmt_probe.auc(scores, present, 1) == pytest.approx(np.mean(expected[1:]))  # a token that nobody holds


def test_shuffles_find_what_is_there_and_nothing_else():
    torch.manual_seed(1)
    weights = torch.rand(8, 20)
    noisy = weights + 0.5 * torch.rand(8, 20)
    correlation, chance = hmt_entries.shuffled(weights, noisy, 0)
    assert correlation > 0.5 and chance == pytest.approx(1 / (1 + hmt_entries.SHUFFLES))
    assert hmt_entries.shuffled(weights, torch.rand(8, 20), 0)[1] > 0.01


def test_probe_reads_what_an_embedding_holds():
    torch.manual_seed(2)
    ids = torch.randint(20, (10, 30 * 9))
    early, middle, late = hmt_probe.bags(ids, 9, 20)
    held = ids.unflatten(1, (30, 9))
    for third, begin in ((early, 0), (middle, 3), (late, 6)):
        assert all(third[3, 7, token] == (token in held[3, 7, begin : begin + 3]) for token in range(20))
    # Embeddings that hold the late third, mixed, and nothing of the early one.
    x = late.flatten(0, 1).double() @ torch.randn(20, 20, dtype=torch.float64)
    known, unknown = (hmt_probe.auc(x[200:] @ weight + bias, y.flatten(0, 1)[200:], 5)
                      for y in (late, early)
                      for weight, bias in [hmt_probe.ridge(x[:200], y.flatten(0, 1)[:200])])  # fmt: skip
    assert known > 0.999 and 0.4 < unknown < 0.6


def test_embeddings_are_those_of_the_segments(recalling):
    hmt, ids = recalling
    found = hmt_probe.embeddings(hmt, ids)
    assert found.shape == (3, 8, 16)
    torch.testing.assert_close(found[:, 2], hmt.prefill(ids[:, :24]).cache[:, 2, 0])
    with pytest.raises(ValueError, match="at most 8 segments"):
        hmt_probe.embeddings(hmt, torch.cat((ids, ids), 1))
