"""Language modelling batches: what is in them, and that nothing but the generator decides it."""

import json
from itertools import islice

import pytest
import torch

from hmlab import corpora
from hmlab.tasks import Batch, language


@pytest.fixture
def counted(tmp_path):
    """A corpus whose characters are all distinct, so that a token tells its position in its split."""
    path = tmp_path / "counted.txt"
    path.write_text("".join(map(chr, range(0x4E00, 0x4E00 + 1000))), encoding="utf-8")
    return language.Config(corpus=str(path), batch=3, context=7).open()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def equal(first: Batch, second: Batch) -> bool:
    return torch.equal(first.tokens, second.tokens) and torch.equal(first.targets, second.targets)


def test_targets_are_the_next_tokens_of_the_split(counted):
    for split, (start, end) in {"train": (0, 900), "valid": (900, 950), "test": (950, 1000)}.items():
        for batch in islice(counted.batches(split, generator()), 100):
            assert batch.tokens.shape == batch.targets.shape == batch.mask.shape == (3, 7)
            assert batch.tokens.dtype == batch.targets.dtype == torch.int64
            assert batch.mask.dtype == torch.bool and batch.mask.all()
            assert torch.equal(batch.targets, batch.tokens + 1)
            assert torch.equal(batch.tokens, batch.tokens[:, :1] + torch.arange(7))
            assert start <= batch.tokens.min() and batch.targets.max() < end
            assert batch.reset is None and batch.valid is None and batch.oracle is None and not batch.slices


def test_windows_begin_everywhere_with_equal_chance(counted):
    # 43 starts, 30,000 draws: each count is binomial with mean 698, standard deviation 26.
    draws = torch.cat([batch.tokens[:, 0] for batch in islice(counted.batches("valid", generator()), 10_000)])
    counts = torch.bincount(draws - 900)
    assert len(counts) == 50 - 7
    assert counts.min() > 560 and counts.max() < 840


def test_the_generators_state_is_all_there_is(counted):
    source = generator(3)
    batches = counted.batches("train", source)
    list(islice(batches, 5))
    state = source.get_state()
    expected = list(islice(batches, 4))
    # A new iterator of newly opened data, with a generator put to that state.
    resumed = generator()
    resumed.set_state(state)
    again = counted.config.open().batches("train", resumed)
    assert all(equal(*pair) for pair in zip(expected, islice(again, 4), strict=True))
    # The same iterator, set back.
    source.set_state(state)
    assert all(equal(*pair) for pair in zip(expected, islice(batches, 4), strict=True))
    assert not equal(expected[0], expected[1])


def test_the_global_generator_is_left_alone(counted):
    before = torch.get_rng_state()
    next(counted.batches("train", generator()))
    list(counted.evaluation_batches("valid", 2, seed=1))
    assert torch.equal(before, torch.get_rng_state())


def test_evaluation_batches_are_fixed_by_their_seed(counted):
    first, again = (list(counted.evaluation_batches("valid", 5, seed=1)) for _ in range(2))
    assert len(first) == 5
    assert all(equal(*pair) for pair in zip(first, again, strict=True))
    assert not equal(first[0], next(counted.evaluation_batches("valid", 5, seed=2)))


def test_the_embedded_corpus_needs_nothing_else(monkeypatch):
    monkeypatch.delenv("HMLAB_DATA", raising=False)
    data = language.Config(context=32, batch=2).open()
    text = data.corpus.splits["train"]
    batch = next(data.batches("train", generator()))
    assert data.encoding.decode(batch.tokens[0].numpy()) in text
    assert data.vocab_size == len(set("".join(data.corpus.splits.values())))


def test_bpe_is_trained_on_the_training_text(tmp_path):
    (tmp_path / "train.txt").write_text("abab cdcd " * 50)
    (tmp_path / "valid.txt").write_text("xyxy " * 500)
    data = language.Config(corpus=str(tmp_path), encoding="bpe", vocab_size=258, context=4).open()
    assert data.vocab_size == 258
    assert len(data.tokens["train"]) < len(data.corpus.splits["train"])
    assert len(data.tokens["valid"]) == len(data.corpus.splits["valid"])


def test_units_turn_tokens_into_characters_and_bytes(tmp_path):
    path = tmp_path / "own.txt"
    path.write_text("aé" * 1000, encoding="utf-8")
    assert language.Config(corpus=str(path)).open().units_per_token("train") == (1.0, 1.5)
    by_bytes = language.Config(corpus=str(path), encoding="byte").open()
    assert by_bytes.units_per_token("train") == pytest.approx((2 / 3, 1.0))


def test_provenance_can_be_written_and_names_no_place_of_this_machine(counted, tmp_path):
    facts = json.loads(json.dumps(counted.provenance()))
    assert facts["sha256"] == counted.corpus.sha256
    assert facts["tokens"] == {"train": 900, "valid": 50, "test": 50}
    assert facts["vocab_size"] == 1000
    assert str(tmp_path) not in json.dumps(facts)


def test_a_split_that_is_not_there_is_refused_at_once(counted):
    with pytest.raises(ValueError, match=r"split: expected train or valid or test .*got 'dev'"):
        counted.batches("dev", generator())


def test_a_window_longer_than_the_split_is_refused_at_once(counted, tmp_path):
    path = tmp_path / "counted.txt"
    exact = language.Config(corpus=str(path), batch=2, context=49).open()
    batch = next(exact.batches("valid", generator()))
    assert torch.equal(batch.tokens[0], torch.arange(900, 949))
    longer = language.Config(corpus=str(path), batch=2, context=50).open()
    with pytest.raises(ValueError, match=r"context: expected less than the 50 tokens of split 'valid'.*got 50"):
        longer.batches("valid", generator())
    with pytest.raises(ValueError, match="context: expected less than"):
        longer.evaluation_batches("valid", 1, seed=0)


@pytest.mark.parametrize("field", ["batch", "context"])
def test_sizes_below_one_are_refused(field):
    with pytest.raises(ValueError, match=f"{field}: expected 1 or more, got 0"):
        language.Config(**{field: 0})


def test_an_unknown_corpus_is_refused_when_opened():
    with pytest.raises(corpora.CorpusError, match="did you mean 'python'"):
        language.Config(corpus="pyton").open()


def test_a_batch_moves_with_its_labels():
    ids = torch.zeros(2, 3, dtype=torch.int64)
    batch = Batch(ids, ids, ids.bool(), slices={"distance": torch.tensor([1, 2])}).to("meta")
    assert {batch.tokens.device.type, batch.mask.device.type, batch.slices["distance"].device.type} == {"meta"}
    assert batch.reset is None
