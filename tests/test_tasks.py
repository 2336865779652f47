"""Every synthetic task keeps one contract: it says where its answers come from, and nothing else gives them away."""

import functools
import importlib
import json
import math
from itertools import islice, pairwise

import pytest
import torch

from hmlab import tasks
from hmlab.encodings import from_json
from hmlab.memories import attention
from hmlab.model import Config as Model
from hmlab.run import Experiment, run
from hmlab.runs import Store
from hmlab.tasks import (
    ancestors,
    brackets,
    chains,
    crossref,
    indexing,
    induction,
    inference,
    joint_recall,
    listops,
    mqar,
    needle,
    order,
    selective_copy,
)
from hmlab.tasks.streams import Stream, pack
from hmlab.train import Config as Training

# Small forms of every task of drawn streams, so that chance is reached often and a batch takes milliseconds.
SMALL = {
    "mqar": mqar.Config(batch=8, context=40, pairs=5, vocab=16),
    "joint_recall": joint_recall.Config(batch=8, contexts=3, keys=4, values=5, names=6),
    "parity-answer": indexing.Config(form="answer", batch=64, length=(1, 9)),
    "parity-scratchpad": indexing.Config(form="scratchpad", batch=16, length=(1, 9)),
    "parity-interleaved": indexing.Config(form="interleaved", batch=16, length=(3, 9)),
    "parity-mnemonic": indexing.Config(form="mnemonic", batch=16, length=(1, 9), letters=4),
    "access": indexing.Config(form="access", batch=64, length=(1, 9), values=5),
    "chains": chains.Config(batch=64, context=40, chains=3, hops=(1, 4), names=14, values=5, filler=3),
    "chains-backward": chains.Config(batch=64, context=32, chains=4, hops=(3, 3), order="backward", values=5),
    "selective_copy": selective_copy.Config(batch=8, context=30, items=6, values=5),
    "induction": induction.Config(batch=64, context=20, values=5),
    "brackets": brackets.Config(batch=16, context=20, kinds=3, depth=(2, 5)),
    "listops": listops.Config(batch=64, context=64, depth=(0, 2), most=3),
    "ancestors": ancestors.Config(batch=64, nodes=8, k=(1, 3), names=9),
    "ancestors-nested": ancestors.Config(batch=64, form="nested", nodes=8, k=(1, 2), names=9),
    "order": order.Config(batch=64, context=40, segment=3, distance=(3, 18), events=30),
    "inference": inference.Config(batch=64, lines=3, length=4, items=14),
    "needle": needle.Config(batch=32, lengths=(140, 200), digits=3, depths=5),
    "crossref": crossref.Config(batch=64, context=50, sections=6, hops=(0, 3), numbers=8, values=5, filler=3),
}
ANSWERS = 2000


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(params=SMALL)
def data(request):
    return SMALL[request.param].open()


def same(first: tasks.Batch, second: tasks.Batch) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True) if isinstance(a, torch.Tensor))


def inside(right: int, of: int, chance: float) -> bool:
    """Whether so many are a likely outcome of so many draws: within 4.5 deviations of the binomial mean, which happens
    by accident in one of some 100,000 tests."""
    return abs(right - of * chance) <= 4.5 * math.sqrt(of * chance * (1 - chance))


@functools.cache
def questions(config) -> list[tasks.Batch]:
    """Batches with `ANSWERS` questions in all."""
    drawn, count = [], 0
    for batch in config.open().batches("valid", generator(1)):
        drawn.append(batch)
        count += int(batch.mask.sum())
        if count >= ANSWERS:
            return drawn


def test_a_batch_is_what_it_says(data):
    config = data.config
    for batch in islice(data.batches("train", generator()), 8):
        shape = batch.tokens.shape
        assert shape[0] == config.batch and shape[1] <= config.context
        assert batch.targets.shape == batch.mask.shape == batch.oracle.shape == shape
        said = batch.valid if batch.valid is not None else torch.ones_like(batch.mask)
        assert torch.equal(batch.tokens[:, 1:], batch.targets[:, :-1])
        assert batch.mask.any(1).all() and said[batch.mask].all()
        assert (~said[:, 1:] | said[:, :-1]).all()  # padding is at the end
        assert torch.equal(batch.oracle >= 0, batch.mask)
        assert (batch.oracle <= torch.arange(shape[1])).all()  # nothing is read ahead
        if batch.support is not None:
            assert torch.equal(batch.support[:, 0], batch.oracle[batch.mask])
            assert (batch.support <= batch.mask.nonzero()[:, 1:]).all()
        for stream in (batch.tokens, batch.targets):
            assert stream.min() >= 0 and stream.max() < data.vocab_size
        assert batch.slices and all(len(label) == config.batch for label in batch.slices.values())


def test_the_oracle_is_always_right(data):
    for batch in questions(data.config):
        assert torch.equal(data.oracle_answers(batch), batch.targets[batch.mask])


def test_with_shuffled_memory_the_oracle_is_at_chance(data):
    right = count = 0
    for batch in questions(data.config):
        right += int((data.oracle_answers(batch, shuffled=True) == batch.targets[batch.mask]).sum())
        count += int(batch.mask.sum())
    assert inside(right, count, data.config.chance), (right / count, data.config.chance)


def test_every_token_of_a_large_draw_is_used(data):
    """A vocabulary larger than what is drawn would make chance, and a model's size, other than they are said to be."""
    if isinstance(data, needle.NeedleData):
        pytest.skip("its vocabulary is that of a text, of which few windows are drawn")
    seen = torch.cat([torch.cat((b.tokens, b.targets[:, -1:]), 1).flatten() for b in questions(data.config)])
    assert len(seen.unique()) == data.vocab_size


def test_the_generators_state_is_all_there_is(data):
    source = generator(3)
    batches = data.batches("train", source)
    next(batches)
    state, before = source.get_state(), torch.get_rng_state()
    expected = next(batches)
    source.set_state(state)
    assert same(expected, next(batches))
    resumed = generator()
    resumed.set_state(state)
    assert same(expected, next(data.config.open().batches("train", resumed)))
    assert not same(expected, next(batches))
    assert torch.equal(before, torch.get_rng_state())


def test_workers_draw_apart_and_each_the_same_again(data):
    first, again, other = (
        next(data.batches("train", tasks.generator(seed=5, worker=worker))) for worker in (0, 0, 1)
    )
    assert same(first, again) and not same(first, other)


def test_evaluation_is_fixed_and_apart_from_training(data):
    first, again = (list(data.evaluation_batches("valid", 2, 0)) for _ in range(2))
    assert len(first) == 2 and all(same(*pair) for pair in zip(first, again, strict=True))
    assert not same(first[0], next(data.batches("train", generator(0))))
    assert not same(first[0], next(data.evaluation_batches("test", 1, 0)))
    with pytest.raises(ValueError, match="split: expected train or valid or test, got 'dev'"):
        data.batches("dev", generator())


def test_a_record_and_an_encoding_can_be_written(data):
    facts = json.loads(json.dumps(data.provenance()))
    assert facts["vocab_size"] == data.vocab_size == data.encoding.vocab_size
    assert from_json(data.encoding.to_json()) == data.encoding
    assert data.provenance() == type(data.config)(**vars(data.config)).open().provenance()


def test_a_batch_of_none_is_refused(data):
    with pytest.raises(ValueError, match="batch: expected at least 1, got 0"):
        type(data.config)(**{**vars(data.config), "batch": 0})


def test_a_run_trains_on_it_and_reads_its_experiment_back(tmp_path):
    task = indexing.Config(form="access", batch=4, length=(2, 5), values=3)
    model = Model(vocab=task.vocab_size, dim=16, layers=1, memory=attention.Config(dim=16, heads=2))
    training = Training(steps=3, evaluate_every=3, evaluate_batches=1)
    experiment = Experiment(model=model, task=task, training=training, name="access")
    assert Experiment.from_dict(json.loads(json.dumps(experiment.to_dict()))) == experiment
    done = run(experiment, Store(tmp_path), device="cpu")
    assert done.info["state"] == "finished" and done.info["corpus"]["vocab_size"] == task.vocab_size


def test_tasks_are_listed_with_what_they_are():
    small = {type(config).__module__.rpartition(".")[2] for config in SMALL.values()}
    assert small | {"language", "recall", "segments"} <= set(tasks.names())
    assert "streams" not in tasks.names() and tasks.names() == sorted(tasks.names())
    for name in tasks.names():
        assert tasks.config(name) is importlib.import_module(f"hmlab.tasks.{name}").Config
        assert 10 < len(tasks.summary(name)) <= 120
    with pytest.raises(ValueError, match=r"name: expected .*mqar.*, got 'mqra'"):
        tasks.config("mqra")


def test_a_stream_that_is_too_long_is_refused():
    stream = Stream()
    stream.say(1, 2)
    stream.ask(2, 1)
    assert pack([stream], 4).valid.tolist() == [[True, True, True, False]]
    assert pack([stream], 2).valid is None
    with pytest.raises(ValueError, match=r"streams: expected at most context \+ 1 \(2\) tokens, got 3"):
        pack([stream], 1)


def test_mqar_asks_every_key_once_and_early_ones_more_often():
    data = mqar.Config(batch=500, context=128, pairs=4, vocab=64, power=0.01).open()
    batch = next(data.batches("train", generator()))
    keys = batch.tokens[:, :8:2]
    assert batch.mask.sum(1).eq(4).all() and (keys < 32).all() and (batch.tokens[:, 1:8:2] >= 32).all()
    for row in range(20):
        asked = batch.tokens[row, batch.mask[row]]
        assert sorted(asked.tolist()) == sorted(keys[row].tolist()) and len(asked.unique()) == 4
        assert all((batch.tokens[row] == key).sum() == 2 for key in asked)
    slots = (batch.mask.nonzero()[:, 1] - 8) // 2
    first = torch.tensor([(slots == slot).double().mean() for slot in (0, 9)])
    assert first[0] > 4 * first[1] > 0
    one = mqar.Config(batch=4000, context=40, pairs=1, vocab=16, power=0.3).open()
    gaps = (next(one.batches("train", generator())).mask.nonzero()[:, 1] - 2) // 2
    weight = torch.arange(1, 20, dtype=torch.float64) ** (0.3 - 1)
    for slot in (0, 3, 18):
        assert inside(int((gaps == slot).sum()), 4000, float(weight[slot] / weight.sum()))


def test_mqar_refuses_what_does_not_fit():
    assert mqar.Config(context=127, pairs=32, vocab=64).open().config.pairs == 32
    with pytest.raises(ValueError, match="pairs: expected at most 32 in 127 tokens, got 33"):
        mqar.Config(context=127, pairs=33)
    with pytest.raises(ValueError, match=r"vocab: expected an even number, at least 2 pairs \(32\), got 31"):
        mqar.Config(vocab=31)


def test_joint_recall_says_a_whole_table_twice():
    config = joint_recall.Config(batch=4, contexts=3, keys=4, values=5, names=6)
    batch = next(config.open().batches("train", generator()))
    stream = torch.cat((batch.tokens, batch.targets[:, -1:]), 1)
    assert batch.valid is None and stream.shape == (4, 2 * (1 + 3 * 9))
    for row in stream.tolist():
        first, second = (
            {(part[i], part[j]): part[j + 1] for i in range(0, 27, 9) for j in range(i + 1, i + 9, 2)}
            for part in (row[1:28], row[29:])
        )
        assert first == second and len(first) == 12 and row[0] == 0 and row[28] == 1
        assert row[1:28] != row[29:]
        values = {key: {first[told] for told in first if told[1] == key} for _, key in first}
        assert max(map(len, values.values())) > 1  # the key alone does not tell
    assert batch.mask.sum(1).eq(12).all()
    with pytest.raises(ValueError, match=r"names: expected at least contexts and keys \(17\), got 16"):
        joint_recall.Config(keys=17)


FORMS = {
    "answer": ([1, 0, 1, 2, 0], [3]),
    "scratchpad": ([1, 0, 1, 2, 1, 1, 0], [3, 4, 5]),
    "interleaved": ([1, 1, 0, 1, 1, 0], [2, 4]),
}


@pytest.mark.parametrize("form", FORMS)
def test_parity_is_written_as_documented(form):
    stream, asked = FORMS[form]
    batches = indexing.Config(form=form, length=(3, 3)).open().batches("train", generator())
    rows = {}
    for batch in islice(batches, 20):
        for row, last, mask in zip(batch.tokens.tolist(), batch.targets[:, -1], batch.mask, strict=True):
            rows[(*row, int(last))] = mask.nonzero().flatten().tolist()
    assert rows[tuple(stream)] == asked and len(rows) == 8


def test_a_mnemonic_names_its_bit():
    batch = next(indexing.Config(form="mnemonic", length=(4, 4), letters=4).open().batches("train", generator()))
    for row, last in zip(batch.tokens.tolist(), batch.targets[:, -1].tolist(), strict=True):
        parts = [[whole[i : i + 3] for i in range(0, 12, 3)] for whole in (row[:12], [*row[13:], last])]
        assert row[12] == 2 and len({tuple(part[:2]) for part in parts[0]}) == 4
        parity = 0
        for (*anchor, bit), (*again, said) in zip(*parts, strict=True):
            parity ^= bit
            assert anchor == again and said == parity and min(anchor) >= 3


def test_an_index_means_the_same_at_every_length():
    short, long = (indexing.Config(form="access", length=length, longest=60, values=5).open()
                   for length in ((1, 20), (21, 60)))  # fmt: skip
    assert short.vocab_size == long.vocab_size == 1 + 5 + 60
    for data in (short, long):
        batch = next(data.batches("train", generator()))
        assert torch.equal(batch.tokens[batch.mask] - 6, batch.oracle[batch.mask])
        assert (batch.slices["length"] == batch.mask.nonzero()[:, 1] - 1).all()
        assert data.config.length[0] <= batch.slices["length"].min()
        assert batch.slices["length"].max() <= data.config.length[1]


def test_index_forms_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match=r"length: expected least and most, 1 <= least <= most, got \(0, 4\)"):
        indexing.Config(length=(0, 4))
    with pytest.raises(ValueError, match=r"length: expected at least 2, .* got \(1, 20\)"):
        indexing.Config(form="interleaved")
    with pytest.raises(ValueError, match=r"longest: expected at least the most of length \(20\), got 19"):
        indexing.Config(longest=19)
    with pytest.raises(ValueError, match="letters: expected enough for 20 n-grams of 2, got 4"):
        indexing.Config(form="mnemonic", letters=4)


@pytest.mark.parametrize("order", chains.ORDERS)
def test_a_chain_is_followed_link_by_link(order):
    data = chains.Config(context=80, chains=3, hops=(1, 4), order=order).open()
    for batch in islice(data.batches("train", generator()), 5):
        for row, (stream, hops) in enumerate(zip(batch.tokens.tolist(), batch.slices["hops"].tolist(), strict=True)):
            assert stream[-3] == 0 and stream[-1] == 1
            at, places = stream[-2], []
            while at < 2 + 32:
                (place,) = [i for i in range(len(stream) - 3) if stream[i] == at and (not i or stream[i - 1] != 0)
                            and stream[i + 1] < 2 + 32 + 16 and i + 1 in batch.support[row]]  # fmt: skip
                places.append(place + 1)
                at = stream[place + 1]
            assert at == batch.targets[row, -1] and len(places) == hops
            assert places[::-1] == batch.support[row, :hops].tolist()
            assert order == "shuffled" or places == sorted(places, reverse=order == "backward")
            assert batch.slices["distance"][row] == 80 - places[-1]


@pytest.mark.unchecked
@pytest.mark.parametrize(("module", "field", "known"), [
    (indexing, "form", "answer or scratchpad or interleaved or mnemonic or access"),
    (ancestors, "form", "edges or nested"), (chains, "order", "shuffled or forward or backward"),
])  # fmt: skip
def test_a_form_that_no_task_has_is_refused(module, field, known):
    with pytest.raises(ValueError, match=f"{field}: expected {known}, got 'other'"):
        module.Config(**{field: "other"})


def test_chains_refuse_what_does_not_fit():
    assert chains.Config(context=2 * 16 + 3).open().config.context == 35
    with pytest.raises(ValueError, match="context: expected at least 35 for 16 links, got 34"):
        chains.Config(context=34)
    with pytest.raises(ValueError, match=r"names: expected at least chains x most hops \(36\), got 32"):
        chains.Config(chains=9)


def test_selective_copies_keep_their_order():
    batch = next(selective_copy.Config(context=40, items=6).open().batches("train", generator()))
    for row, targets in zip(batch.tokens, batch.targets, strict=True):
        assert row[34] == 1 and torch.equal(row[:34][row[:34] >= 2], targets[34:])
    assert batch.mask.sum(1).eq(6).all()
    full = next(selective_copy.Config(context=12, items=6).open().batches("train", generator()))
    assert (full.tokens[:, :6] >= 2).all()
    with pytest.raises(ValueError, match=r"context: expected at least twice the items \(12\), got 11"):
        selective_copy.Config(context=11, items=6)


def test_the_special_token_comes_twice_and_anywhere():
    batch = next(induction.Config(batch=500, context=10, values=4).open().batches("train", generator()))
    assert (batch.tokens == 4).sum(1).eq(2).all() and (batch.tokens[:, -1] == 4).all()
    assert batch.slices["distance"].unique().tolist() == list(range(2, 10))
    with pytest.raises(ValueError, match="context: expected at least 3, got 2"):
        induction.Config(context=2)


OPENING, CLOSING = {1: 4, 2: 5, 3: 6}, {4, 5, 6}


def test_brackets_are_closed_innermost_first():
    data = brackets.Config(batch=50, context=20, kinds=3, depth=(2, 5)).open()
    batch, deepest, walks = next(data.batches("train", generator())), 0, []
    for row, answer, depth in zip(batch.tokens.tolist(), batch.targets, batch.slices["depth"].tolist(), strict=True):
        opened, end = [], row.index(0)
        for token in row[:end]:
            if token in OPENING:
                opened.append(OPENING[token])
            else:
                assert opened.pop() == token
            deepest = max(deepest, len(opened))
        assert len(opened) == depth and answer[end : end + depth].tolist() == opened[::-1]
        walks.append(tuple(token in OPENING for token in row[:end]))
    assert deepest == 5 and len(set(walks)) > 40
    with pytest.raises(ValueError, match=r"context: expected at least twice the most depth \(16\), got 15"):
        brackets.Config(context=15)


def test_all_ways_to_nest_are_equally_likely():
    # 4 tokens before the mark, 2 deep at their end and never more: (((), ()(( and ( )( are not; ()(( is, (() ( is.
    data = brackets.Config(batch=4000, context=6, kinds=1, depth=(2, 2)).open()
    walks = (next(data.batches("train", generator())).tokens[:, :4] == 1).tolist()
    ways = {(True, False, True, True), (True, True, False, True)}
    assert {tuple(walk) for walk in walks} == ways
    assert inside(sum(tuple(walk) == (True, False, True, True) for walk in walks), 4000, 1 / 2)


def test_listops_come_to_their_value():
    assert listops.value([10, 2, 9, 11, 4, 7, 14, 0, 14]) == 9
    assert listops.value([13, 10, 2, 9, 11, 4, 7, 14, 0, 14, 5, 14]) == 4
    assert listops.value([12, 3, 1, 8, 14]) == 3 and listops.value([12, 4, 1, 8, 2, 14]) == 2
    config = listops.Config(batch=300, context=64, depth=(1, 2), most=3, nested=0.5, least=8)
    batch = next(config.open().batches("train", generator()))
    for row, depth, length in zip(batch.tokens.tolist(), *(batch.slices[n].tolist() for n in ("depth", "length")),
                                  strict=True):  # fmt: skip
        level = [row[: at + 1] for at in range(length)]
        level = [sum(10 <= token <= 13 for token in part) - part.count(14) for part in level]
        assert level[-1] == 0 and min(level[:-1]) == 1 and max(level) == depth + 1 and row[length] == 15
        assert 8 <= length <= 63
    counts = torch.bincount(batch.targets[batch.mask], minlength=10)
    assert all(inside(int(count), 300, 0.1) for count in counts)
    with pytest.raises(ValueError, match="context: expected room for an expression 3 deep with 4 arguments"):
        next(listops.Config(context=8, depth=(3, 3)).open().batches("train", generator()))


@pytest.mark.parametrize("form", ancestors.FORMS)
def test_an_ancestor_is_k_steps_up(form):
    batch = next(ancestors.Config(form=form, nodes=12, k=(1, 4)).open().batches("train", generator()))
    first_number = 2 if form == "edges" else 4
    for row, answer, k in zip(batch.tokens.tolist(), batch.targets[:, -1], batch.slices["k"].tolist(), strict=True):
        *tree, question, number, node, equals = row
        parent, line = {}, []
        if form == "edges":
            parent = dict(zip(tree[::2], tree[1::2], strict=True))
        else:
            for token, after in pairwise(tree):
                if token == 2:
                    parent[after] = line[-1] if line else None
                    line.append(after)
                elif token == 3:
                    line.pop()
        assert (question, equals) == (0, 1) and number == first_number + k - 1
        assert len(parent) == (11 if form == "edges" else 12)
        for _ in range(k):
            node = parent[node]
        assert node == answer
    assert set(batch.slices["k"].tolist()) == {1, 2, 3, 4}
    with pytest.raises(ValueError, match=r"k: expected least and most, 1 <= least <= most < nodes \(4\), got \(1, 4\)"):
        ancestors.Config(nodes=4)


def test_the_earlier_segment_is_the_answer():
    data = order.Config(batch=200, context=60, segment=3, distance=(5, 30)).open()
    batch = next(data.batches("train", generator()))
    for row, answer, apart in zip(batch.tokens.tolist(), batch.targets[:, -1].tolist(),
                                  batch.slices["distance"].tolist(), strict=True):  # fmt: skip
        text, question = row[:50], row[50:]
        assert len(set(text)) == 50 and question[0] == 2 and (question[1], question[5], question[9]) == (0, 1, 3)
        a, b = text.index(question[2]), text.index(question[6])
        assert text[a : a + 3] == question[2:5] and text[b : b + 3] == question[6:9]
        assert abs(a - b) == apart and answer == (0 if a < b else 1) and 5 <= apart <= 30
    assert inside(int((batch.targets[:, -1] == 0).sum()), 200, 1 / 2)
    assert order.Config(context=416).text == 404
    with pytest.raises(ValueError, match="context: expected at least 416 for 400 events between segments of 4, got"):
        order.Config(context=415)
    with pytest.raises(ValueError, match=r"distance: .* segment \(4\) <= least <= most, got \(3, 9\)"):
        order.Config(distance=(3, 9))


def test_the_match_is_linked_and_the_lure_is_not():
    batch = next(inference.Config(batch=100, lines=3, length=4).open().batches("train", generator()))
    asked = zip(batch.tokens.tolist(), batch.targets[:, -1], batch.slices["hops"].tolist(), strict=True)
    for row, answer, hops in asked:
        shown, (question, cue, colon, one, first, two, second, equals) = row[:-8], row[-8:]
        assert (question, colon, one, two, equals) == (2, 3, 5, 6, 4)
        linked = {frozenset(shown[i + 1 : i + 3]) for i in range(0, len(shown), 4)}
        reached, before = {cue}, set()
        for _ in range(hops):
            beside = set().union(*(pair for pair in linked if pair & reached))
            reached, before = beside - reached - before, before | reached
        match, lure = (first, second) if answer == 5 else (second, first)
        line = before | reached
        for _ in range(3 - hops):
            line |= set().union(*(pair for pair in linked if pair & line))
        assert match in reached and len(line) == 4 and lure not in line and len(linked) == 9
        assert hops == 1 or frozenset((cue, match)) not in linked
    assert set(batch.slices["hops"].tolist()) == {1, 2, 3}
    with pytest.raises(ValueError, match="length: expected at least 2, got 1"):
        inference.Config(length=1)


def test_references_lead_to_the_value():
    data = crossref.Config(batch=100, context=103, sections=6, hops=(0, 3)).open()
    batch, back = next(data.batches("train", generator())), 0
    assert batch.valid is None
    for row, answer, hops, backward in zip(batch.tokens.tolist(), batch.targets[:, -1], batch.slices["hops"].tolist(),
                                           batch.slices["backward"].tolist(), strict=True):  # fmt: skip
        document, (question, number, colon) = row[:-3], row[-3:]
        assert (question, colon) == (3, 4) and document.count(0) == 6
        notes, where = {}, {}
        for i, (mark, token) in enumerate(pairwise(document)):
            if mark == 0:
                section, where[token] = token, i
            elif mark in (1, 2):
                assert section not in notes
                notes[section] = (mark, token)
        steps, seen = 0, 0
        while notes[number][0] == 1:
            steps, seen, number = steps + 1, seen + (where[notes[number][1]] < where[number]), notes[number][1]
        assert steps == hops and seen == backward and notes[number][1] == answer and len(notes) == 6
        back += backward
    assert back > 0
    with pytest.raises(ValueError, match="context: expected at least 35 for 8 sections, got 34"):
        crossref.Config(context=34)
    with pytest.raises(ValueError, match=r"hops: .* 0 <= least <= most < sections \(8\), got \(0, 8\)"):
        crossref.Config(hops=(0, 8))
    with pytest.raises(ValueError, match=r"numbers: expected at least sections \(8\), got 7"):
        crossref.Config(numbers=7)


def test_a_needle_lies_where_its_depth_says():
    data = needle.Config(batch=100, lengths=(400, 700), depths=5, digits=4).open()
    seen = set()
    for batch in islice(data.batches("train", generator()), 4):
        length = batch.tokens.shape[1]
        stream = torch.cat((batch.tokens, batch.targets[:, -1:]), 1)
        for row, depth, place in zip(stream, batch.slices["depth"].tolist(), batch.oracle[:, -1].tolist(), strict=True):
            text = data.encoding.decode(row.numpy())
            key = text[-4:]
            said = f"\nThe pass key is {key}. Remember it. {key} is the pass key.\n"
            assert key.isdigit() and text.count(said) == 1
            assert text.endswith(f"\nWhat is the pass key? The pass key is {key}")
            hay, at = text.replace(said, "")[: -len("\nWhat is the pass key? The pass key is 1234")], text.index(said)
            assert text[place - 3 : place + 1] == key and depth in (0, 0.25, 0.5, 0.75, 1)
            wanted = round(depth * len(hay))
            blank = max(hay[:wanted].rfind(" "), hay[:wanted].rfind("\n"))
            assert at == (wanted if wanted == len(hay) or blank < 0 else blank + 1)
            seen.add((length, depth))
        assert batch.slices["length"].eq(length).all()
    assert len(seen) == 10


def test_haystacks_are_of_their_own_split(tmp_path):
    for split, letter in (("train", "a"), ("valid", "b")):
        (tmp_path / f"{split}.txt").write_text(letter * 3000)
    data = needle.Config(batch=4, lengths=(200,), corpus=str(tmp_path)).open()
    texts = {split: data.encoding.decode(next(data.batches(split, generator())).tokens[0].numpy())
             for split in ("train", "valid")}  # fmt: skip
    assert "aaaaaaaaaa" in texts["train"] and "bbbbbbbbbb" in texts["valid"]
    assert "bbb" not in texts["train"] and "aaa" not in texts["valid"]
    with pytest.raises(ValueError, match="split: expected train or valid, got 'test'"):
        data.batches("test", generator())
    with pytest.raises(ValueError, match=r"lengths: expected at least one, none below 104, got \(103,\)"):
        needle.Config(lengths=(103,))
