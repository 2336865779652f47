"""Facts in segments: the stream says what the oracle says it does, and answers are what a reader of it would count."""

import itertools
from collections import Counter

import pytest
import torch

from hmlab.tasks import segments
from hmlab.tasks.segments import Config, last_mark


def drawn(config, seed=0, count=4):
    return list(itertools.islice(config.open().batches("train", torch.Generator().manual_seed(seed)), count))


def asked(batch, length):
    """Row, place of the colon, key, value and fact's place of every answer."""
    for row, place in batch.mask.nonzero().tolist():
        inside = place % length != 0
        yield (row, place, int(batch.tokens[row, place - 1]), int(batch.targets[row, place]),
               int(batch.oracle[row, place]), inside)  # fmt: skip


@pytest.mark.parametrize("distance", [(0, 0), (1, 1), (0, 9), (3, 9)])
def test_the_oracle_holds_the_value_beside_its_key(distance):
    config = Config(batch=5, segments=11, length=17, pairs=4, distance=distance)
    data, seen = config.open(), Counter()
    for batch in drawn(config):
        assert batch.tokens.shape == (5, 11 * 17) and int(batch.mask.sum()) == 5 * 4
        assert torch.equal(batch.tokens[:, 1:], batch.targets[:, :-1])
        for row, place, key, value, fact, inside in asked(batch, 17):
            assert data.first_key <= key < data.first_value <= value < data.question
            assert batch.tokens[row, place] == data.question + 1 and batch.tokens[row, place - 2] == data.question
            assert batch.tokens[row, fact] == value and batch.tokens[row, fact - 1] == key and fact < place
            apart = place // 17 - fact // 17
            assert distance[0] <= apart <= distance[1] and inside == (apart == 0)
            assert (batch.tokens[row] == key).sum() == 2
            seen[apart] += 1
        assert (batch.oracle[~batch.mask] == -1).all()
    assert set(seen) >= {distance[0], distance[1]}


def test_facts_stand_in_the_first_half_and_questions_at_the_end():
    """So that the tail of a segment, which searches, never holds the fact that is searched."""
    config = Config(batch=8, segments=9, length=32, pairs=5, distance=(1, 7))
    for batch in drawn(config):
        for row, place, key, _, fact, _ in asked(batch, 32):
            assert 1 <= fact % 32 - 1 <= 14 and place % 32 == 0
            assert batch.tokens[row, place - 1] == key


def test_copies_say_the_same_and_the_oracle_is_the_last():
    config = Config(batch=4, segments=30, pairs=4, distance=(2, 12), copies=3)
    for batch in drawn(config):
        for row, place, key, value, fact, _ in asked(batch, config.length):
            tokens = batch.tokens[row]
            said = ((tokens[:-1] == key) & (tokens[1:] == value)).nonzero()[:, 0]
            assert len(said) == 3 and int(said.max()) + 1 == fact
            assert len({int(at) // config.length for at in said}) == 3 and fact < place


def test_majority_counts_the_marks_before():
    config = Config(form="majority", batch=6, segments=10, length=15)
    data = config.open()
    for batch in drawn(config):
        assert batch.mask.nonzero()[:, 1].unique().tolist() == [15 * n for n in (1, 3, 5, 7, 9)]
        for row, place in batch.mask.nonzero().tolist():
            before = batch.tokens[row, :place]
            marks = before[(before >= data.first_value) & (before < data.question)] - data.first_value
            assert len(marks) == place // 15 and int(marks.max()) <= 1
            assert batch.targets[row, place] - data.first_value == int(2 * marks.sum() > len(marks))
            assert batch.tokens[row, place + 1] < data.first_key  # what is asked for is not said


def test_copies_ask_for_the_fact_of_the_segment_before():
    config = Config(form="copy", batch=5, segments=6, length=15)
    data = config.open()
    for batch in drawn(config):
        assert batch.mask.nonzero()[:, 1].unique().tolist() == [15 * n + i for n in range(1, 6) for i in (0, 1)]
        for row, place in batch.mask.nonzero().tolist():
            fact = int(batch.oracle[row, place])
            assert fact // 15 == place // 15 - 1 and batch.targets[row, place] == batch.tokens[row, fact]
            assert batch.tokens[row, place] == data.question + 1
            key = fact - place % 15
            assert data.first_key <= batch.tokens[row, key] < data.first_value <= batch.tokens[row, key + 1]
        facts = (batch.tokens >= data.first_key) & (batch.tokens < data.question)
        assert int(facts.sum()) == 5 * 6 * 2  # what is asked for is not said


def test_who_names_the_last_mark_is_as_often_right_as_said():
    config = Config(form="majority", batch=400, segments=8, length=15)
    [batch] = drawn(config, count=1)
    data, right = config.open(), []
    for row, place in batch.mask.nonzero().tolist():
        before = batch.tokens[row, :place]
        right.append(bool(before[(before >= data.first_value) & (before < data.question)][-1]
                          == batch.targets[row, place]))  # fmt: skip
    # After 1, 3, 5 and 7 marks: 1, 3/4, 11/16, 21/32 by counting.
    assert last_mark(8) == pytest.approx((1 + 3 / 4 + 11 / 16 + 21 / 32) / 4, abs=1e-12)
    spread = 3 * (last_mark(8) * (1 - last_mark(8)) / len(right)) ** 0.5
    assert abs(sum(right) / len(right) - last_mark(8)) < spread


def test_distances_are_log_uniform():
    config = Config(batch=500, segments=600, length=14, pairs=1, distance=(0, 62))
    found = Counter()
    for batch in drawn(config, count=4):
        for _, place, _, _, fact, _ in asked(batch, 14):
            found[(place // 14 - fact // 14 + 1).bit_length() - 1] += 1
    # d + 1 in 1, 2-3, 4-7, ..., 32-63: six octaves of equal chance.
    assert set(found) == set(range(6))
    for octave in found:
        assert abs(found[octave] / 2000 - 1 / 6) < 4 * (5 / 36 / 2000) ** 0.5


@pytest.mark.parametrize("form", ["pairs", "copy", "majority"])
def test_draws_depend_on_the_generator_alone(form):
    config = Config(form=form, batch=2, segments=6, pairs=2, distance=(1, 4))
    for one, two in zip(drawn(config, 3), drawn(config, 3), strict=True):
        assert torch.equal(one.tokens, two.tokens) and torch.equal(one.oracle, two.oracle)
    assert not torch.equal(drawn(config, 3)[0].tokens, drawn(config, 4)[0].tokens)
    data = config.open()
    [kept] = data.evaluation_batches("valid", 1, 3)
    assert torch.equal(kept.tokens, next(data.evaluation_batches("valid", 1, 3)).tokens)
    assert not torch.equal(kept.tokens, drawn(config, 3)[0].tokens)
    assert not torch.equal(kept.tokens, next(data.evaluation_batches("test", 1, 3)).tokens)


@pytest.mark.unchecked
@pytest.mark.parametrize(("fields", "name"), [
    ({"form": "near"}, "form"), ({"length": 13}, "length"), ({"pairs": 0}, "pairs"), ({"values": 1}, "values"),
    ({"pairs": 9, "keys": 8}, "keys"), ({"distance": (2, 8)}, "distance"), ({"distance": (3, 2)}, "distance"),
    ({"form": "majority", "segments": 1}, "segments"),
])  # fmt: skip
def test_a_wrong_field_is_named(fields, name):
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        Config(**fields)


def test_too_many_pairs_and_unknown_splits_are_refused():
    with pytest.raises(ValueError, match=r"^pairs: expected few enough"):
        drawn(Config(segments=4, pairs=4, distance=(1, 3)), count=1)
    with pytest.raises(ValueError, match=r"^split: expected"):
        Config().open().batches("dev", torch.Generator())
    assert segments.Config().chance == 1 / 32 and Config(form="majority").chance == 1 / 2
