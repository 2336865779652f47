"""Recall: keys and answers stand where the batch says, any distance is reached, and answers are measured rightly."""

import json
import math
from itertools import islice

import pytest
import torch
from torch import nn

from hmlab.encodings import from_json
from hmlab.memories import attention
from hmlab.model import Config as Model
from hmlab.run import Experiment, run
from hmlab.runs import Store
from hmlab.tasks import recall
from hmlab.train import Config as Training


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small(**fields) -> recall.Config:
    return recall.Config(**{"batch": 4, "context": 96, "pairs": 3, "distance": (2, 60), **fields})


@pytest.fixture
def text(tmp_path):
    """A corpus of 1,000 different characters, some of those that keys would be written with among them."""
    path = tmp_path / "counted.txt"
    path.write_text("".join(map(chr, range(recall.FIRST_SIGN, recall.FIRST_SIGN + 1000))), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("corpus", [None, "text"])
def test_an_answer_is_the_value_beside_the_key_at_its_first_place(corpus, text):
    data = small(corpus=corpus and text).open()
    for batch in islice(data.batches("train", generator()), 50):
        assert batch.tokens.shape == batch.targets.shape == batch.mask.shape == batch.oracle.shape == (4, 96)
        assert torch.equal(batch.tokens[:, 1:], batch.targets[:, :-1])
        assert batch.mask.sum(1).tolist() == [3] * 4
        assert torch.equal(batch.oracle >= 0, batch.mask)
        for row, question in batch.mask.nonzero().tolist():
            stream, value = batch.tokens[row], int(batch.oracle[row, question])
            assert stream[value] == batch.targets[row, question] and stream[value] in data.values
            assert stream[value - 1] == stream[question] and stream[question] in data.keys
            assert (stream == stream[question]).nonzero().flatten().tolist() == [value - 1, question]
            assert 2 <= question - (value - 1) <= 60


def test_a_copied_passage_is_asked_from_its_second_saying_on():
    data = small(form="copy", distance=(5, 20)).open()
    lengths = set()
    for batch in islice(data.batches("train", generator()), 50):
        assert torch.equal(batch.tokens[:, 1:], batch.targets[:, :-1])
        for row in range(4):
            first = int(batch.mask[row].nonzero()[0])
            lengths.add(length := first + 1)
            assert batch.mask[row, first:].all() and torch.equal(batch.oracle[row] >= 0, batch.mask[row])
            assert torch.equal(batch.oracle[row, first:], torch.arange(96 - first))
            assert torch.equal(batch.tokens[row][batch.oracle[row, first:]], batch.targets[row, first:])
            assert len(batch.tokens[row, :length].unique()) > length // 2
    assert min(lengths) == 5 and max(lengths) == 20
    found = recall.answers(Oracle(data.vocab_size, reach=10), data.evaluation_batches("valid", 2, 0))
    assert set(found.distance.values) <= lengths and (found.correct | (found.distance > 10)).mean() > 0.8


@pytest.mark.parametrize("corpus", [None, "text"])
def test_all_but_keys_and_values_is_filler(corpus, text):
    data = small(corpus=corpus and text).open()
    batch = next(data.batches("train", generator()))
    signs = torch.cat((data.keys, data.values))
    assert len(signs.unique()) == 128 and data.vocab_size == 128 + (1000 if corpus else 64)
    assert not torch.isin(data.fillers["train"], signs).any()
    planted = torch.isin(batch.tokens, signs)
    assert all(10 <= count <= 12 for count in planted.sum(1))  # an answer at the end is in the targets only
    if corpus:
        first = batch.tokens[~planted].unique()
        assert first.max() < 1000 and len(first) > 200


def test_text_shorter_than_the_stream_begins_again(text):
    data = small(corpus=text, context=300, pairs=1).open()
    batch = next(data.batches("valid", generator()))
    assert len(data.fillers["valid"]) < 300
    assert torch.isin(batch.tokens, torch.cat((data.fillers["valid"], data.keys, data.values))).all()


def test_distances_are_log_uniform_and_starts_reach_everywhere():
    data = small(context=128, pairs=1, batch=1000, distance=(2, 100)).open()
    batch = next(data.batches("train", generator()))
    question, value = batch.mask.nonzero()[:, 1], batch.oracle[batch.mask]
    distance = question - value + 1
    for least, most in ((2, 4), (5, 20), (21, 100)):
        share = math.log((most + 1) / least) / math.log(101 / 2)
        seen = ((distance >= least) & (distance <= most)).double().mean()
        assert abs(seen - share) < 5 * math.sqrt(share * (1 - share) / 1000)
    assert value.min() == 1 and question.max() == 127


def test_the_fixed_distance_that_fills_the_stream():
    batch = next(small(context=50, pairs=1, distance=(49, 49)).open().batches("valid", generator()))
    assert batch.mask.nonzero()[:, 1].tolist() == [49] * 4 and batch.oracle[:, 49].tolist() == [1] * 4


def test_a_full_stream_is_drawn_until_all_pairs_have_a_place():
    data = small(context=64, pairs=12, distance=(2, 40), batch=100).open()
    for batch in islice(data.batches("train", generator()), 5):
        assert (batch.mask.sum(1) == 12).all()
        value = batch.oracle.masked_fill(~batch.mask, 0)
        assert torch.equal(batch.tokens.gather(1, value)[batch.mask], batch.targets[batch.mask])


def test_pairs_that_never_fit_are_refused():
    data = small(context=50, pairs=2, distance=(49, 49)).open()
    with pytest.raises(ValueError, match=r"pairs: expected few enough for 50 tokens at distances \(49, 49\), got 2"):
        next(data.batches("train", generator()))


def test_the_generators_state_is_all_there_is():
    data, source = small().open(), generator(3)
    batches = data.batches("train", source)
    next(batches)
    state = source.get_state()
    expected = next(batches)
    source.set_state(state)
    before = torch.get_rng_state()
    assert all(torch.equal(a, b) for a, b in zip(expected[:3], next(batches)[:3], strict=True))
    assert torch.equal(before, torch.get_rng_state())


def test_evaluation_is_fixed_and_apart_from_training():
    data = small().open()
    first, again = (torch.stack([b.tokens for b in data.evaluation_batches("valid", 3, 0)]) for _ in range(2))
    assert first.shape == (3, 4, 96) and torch.equal(first, again)
    assert not torch.equal(first[0], next(data.batches("train", generator(0))).tokens)
    assert not torch.equal(first[0], next(data.evaluation_batches("train", 1, 0)).tokens)


class Oracle(nn.Module):
    """Remembers the token after each token; answers rightly where the key lies at most `reach` tokens back."""

    def __init__(self, vocab: int, reach: int) -> None:
        super().__init__()
        self.vocab, self.reach, self.weight = vocab, reach, nn.Parameter(torch.zeros(()))

    def forward(self, tokens, state=None):
        past = tokens if state is None else torch.cat((state, tokens), 1)
        logits = torch.zeros(*tokens.shape, self.vocab)
        for row, stream in enumerate(past.tolist()):
            for time in range(past.shape[1] - tokens.shape[1], past.shape[1]):
                before = [j for j in range(max(0, time - self.reach), time) if stream[j] == stream[time]]
                if before:
                    logits[row, time - past.shape[1], stream[before[-1] + 1]] = 1
        return logits, past


@pytest.mark.parametrize("chunk", [1, 7, 96, 1000])
def test_answers_are_counted_by_distance(chunk):
    data = small().open()
    model = Oracle(data.vocab_size, reach=16).train()
    found = recall.answers(model, data.evaluation_batches("valid", 4, 0), chunk=chunk)
    assert found.sizes == {"answer": 4 * 4 * 3} and model.training
    assert (found.correct == (found.distance <= 16)).all()
    right = math.log(data.vocab_size - 1 + math.e) - 1
    assert found.loss.where(found.correct, drop=True).values == pytest.approx(right)
    octaves = recall.accuracy(found)
    assert octaves.distance.values.tolist() == [2, 4, 8, 16, 32]
    assert octaves.accuracy.sel(distance=[2, 4, 8, 32]).values.tolist() == [1, 1, 1, 0]
    assert int(octaves.answers.sum()) == found.sizes["answer"]


def test_a_language_model_is_streamed_as_it_reads_whole():
    data = small(context=64, pairs=2, distance=(2, 40)).open()
    model = Model(vocab=data.vocab_size, dim=16, layers=1, memory=attention.Config(dim=16, heads=2)).build()
    whole, parts = (recall.answers(model, data.evaluation_batches("valid", 2, 0), chunk=chunk) for chunk in (64, 5))
    assert parts.loss.values == pytest.approx(whole.loss.values, abs=1e-4)
    assert parts.distance.equals(whole.distance)


def test_a_run_trains_on_it_and_takes_its_checkpoint_up_again(tmp_path):
    task = small(context=32, pairs=1, distance=(2, 8), keys=4, values=4, filler=4)
    model = Model(vocab=12, dim=16, layers=2, memory=attention.Config(dim=16, heads=2))
    training = Training(steps=40, learning_rate=1e-2, evaluate_every=40, evaluate_batches=4)
    experiment = Experiment(model=model, task=task, training=training, name="recall")
    assert Experiment.from_dict(json.loads(json.dumps(experiment.to_dict()))) == experiment
    done = run(experiment, Store(tmp_path), device="cpu")
    assert done.info["state"] == "finished" and done.info["corpus"]["vocab_size"] == 12


@pytest.mark.parametrize("corpus", [None, "text"])
def test_provenance_can_be_written_and_the_encoding_read_back(corpus, text, tmp_path):
    data = small(corpus=corpus and text).open()
    facts = json.loads(json.dumps(data.provenance()))
    assert facts["tokens"]["valid"] == len(data.fillers["valid"])
    assert facts["vocab_size"] == data.vocab_size and str(tmp_path) not in json.dumps(facts)
    assert from_json(data.encoding.to_json()) == data.encoding


@pytest.mark.parametrize("field", ["batch", "context", "pairs", "keys", "values", "filler"])
def test_sizes_below_one_are_refused(field):
    with pytest.raises(ValueError, match=f"{field}: expected at least 1, got 0"):
        small(**{field: 0})


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"keys: expected at least pairs \(3\), got 2"):
        small(keys=2)
    for distance in ((1, 5), (5, 4), (2, 96)):
        with pytest.raises(ValueError, match=r"distance: .* most < context \(96\), got"):
            small(distance=distance)
    with pytest.raises(ValueError, match="pairs: expected at most 24 in 96 tokens, got 25"):
        small(pairs=25)
    with pytest.raises(ValueError, match=r"split: expected train or valid or test, got 'dev'"):
        small().open().batches("dev", generator())
    with pytest.raises(ValueError, match="chunk: expected at least 1, got 0"):
        recall.answers(nn.Linear(1, 1), [], chunk=0)
    with pytest.raises(ValueError, match="batches: expected at least one batch, got none"):
        recall.answers(nn.Linear(1, 1), [])
