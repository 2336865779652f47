"""Tasks on real data: what is read from the files, and that it stands in the streams where they say."""

import os
from itertools import islice

import pytest
import torch

from hmlab import corpora
from hmlab.corpora import CorpusError
from hmlab.tasks import babi, forecasting, generator, genomes, pubmedqa
from hmlab.tasks.streams import whole

needs_data = pytest.mark.skipif(
    not os.environ.get("HMLAB_DATA"), reason="HMLAB_DATA is not set: the real corpora are not here"
)

STORY = """1 Mary got the milk.
2 John moved to the bedroom.
3 Where is John? \tbedroom\t2
4 Mary travelled to the hallway.
5 Where is the milk? \thallway\t1 4
1 Sandra went to the office.
2 Where is Sandra?\toffice\t1
"""


def same(first, second) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True) if isinstance(a, torch.Tensor))


def check_draws(data) -> None:
    """Batches depend on the generator's state alone, evaluation is apart from training, a record can be written."""
    first, again, other = (next(data.batches("train", generator(seed=1, worker=worker))) for worker in (0, 0, 1))
    assert same(first, again) and not same(first, other)
    (fixed,), (repeated,) = (list(data.evaluation_batches("train", 1, 0)) for _ in range(2))
    assert same(fixed, repeated) and not same(fixed, next(data.batches("train", torch.Generator().manual_seed(0))))
    assert os.environ.get("HMLAB_DATA", "/nowhere") not in str(data.provenance())
    with pytest.raises(ValueError, match="split: expected train or valid or test, got 'dev'"):
        data.batches("dev", torch.Generator())


def test_stories_are_read_with_what_supports_each_answer():
    (first, second), (third,) = babi.stories(STORY)
    facts = ("Mary got the milk.", "John moved to the bedroom.")
    assert first == babi.Question(facts, "Where is John?", "bedroom", (1,))
    assert second.facts[2] == "Mary travelled to the hallway." and second.support == (2, 0)
    assert third.facts == ("Sandra went to the office.",) and third.length == 26 + 1 + 11 + 16 + 9 + 6
    with pytest.raises(CorpusError, match="expected a number and a sentence in line 2, found 'Mary'"):
        babi.stories("1 Mary got the milk.\nMary")
    with pytest.raises(CorpusError, match="expected a supporting fact with 'office' in line 2, found none"):
        babi.stories("1 Mary got the milk.\n2 Where is Mary?\toffice\t1")


@needs_data
@pytest.mark.parametrize(("task", "questions", "context"), [(1, (9000, 1000, 1000), 900), (2, (9000, 1000, 1000), 3000),
                                                            (3, (1000, 925, 1000), 12_000)])  # fmt: skip
def test_facts_stand_in_the_book_in_their_order(task, questions, context):
    data = babi.Config(task=task, batch=8, context=context, books="python").open()
    whole_task = corpora.load(f"babi-qa{task}").splits
    assert [len(data.questions[split]) for split in corpora.SPLITS] == list(questions)
    assert sum(text.count("?") for text in whole_task.values()) == sum(questions) + (75 if task == 3 else 0)
    for split in corpora.SPLITS:
        batch = next(data.batches(split, torch.Generator().manual_seed(0)))
        answers = data.oracle_answers(batch)
        assert torch.equal(answers, batch.targets[batch.mask]) and whole(batch, answers).all()
        assert whole(batch, data.oracle_answers(batch, shuffled=True)).double().mean() < 0.7
        assert torch.equal(batch.tokens[:, 1:], batch.targets[:, :-1]) and batch.tokens.shape == (8, context)
        stream = torch.cat((batch.tokens, batch.targets[:, -1:]), 1)
        told = {(q.question, q.answer, q.facts): q for q in data.questions[split]}
        for row, text in enumerate(map(data.encoding.decode, stream.numpy())):
            book, _, asked = text.rpartition("\nQuestion: ")
            question, answer = asked.split("\nAnswer: ")
            at, facts = 0, None
            for (named, said, sentences), found in told.items():
                if (named, said) == (question, answer) and len(sentences) == batch.slices["facts"][row]:
                    at = 0
                    for sentence in sentences:
                        at = book.find(f"{sentence} ", at) + 1
                        if not at:
                            break
                    if at:
                        facts, rest = found, book
                        for sentence in sentences:
                            rest = rest.replace(f"{sentence} ", "", 1)
                        break
            assert facts is not None and rest in data.books.splits[split]
            assert len(text) - len(answer) - int(batch.oracle[row][batch.mask[row]][0]) == batch.slices["distance"][row]
    assert batch.support is None if task == 1 else (batch.support >= 0).sum(1).eq(task).all()
    check_draws(data)


@needs_data
def test_questions_that_do_not_fit_are_left_out():
    data, every = (babi.Config(task=2, batch=4, context=context, books="python").open() for context in (200, 5000))
    fitting = [question for question in every.questions["train"] if question.length < 200]
    assert data.questions["train"] == fitting and 0 < len(fitting) < len(every.questions["train"]) == 9000
    assert next(data.batches("train", torch.Generator())).tokens.shape == (4, 200)
    least = 1 + min(question.length for found in every.questions.values() for question in found)
    with pytest.raises(ValueError, match=f"context: expected at least {least}, the shortest question of task 2"):
        babi.Config(task=2, context=50, books="python").open()


@pytest.fixture
def fasta(tmp_path):
    path = tmp_path / "made.fa"
    path.write_text(">one\n" + "ACGT" * 100 + "\nACGTA\n>two\n" + "GGTTCA\n" * 100)
    return str(path)


def test_genomes_are_read_without_headers_and_cut_in_place(fasta):
    data = genomes.Config(corpus=fasta, batch=200, context=20).open()
    assert data.bases == "ACGT" * 101 + "A" + "GGTTCA" * 100
    assert {split: len(bases) for split, bases in data.tokens.items()} == {"train": 904, "valid": 50, "test": 51}
    assert data.encoding.decode(torch.cat(list(data.tokens.values())).numpy()) == data.bases
    batch = next(data.batches("train", torch.Generator().manual_seed(0)))
    assert batch.mask.all() and (batch.slices["strand"] == 1).all()
    for row, last in zip(batch.tokens, batch.targets[:, -1:], strict=True):
        assert data.encoding.decode(torch.cat((row, last)).numpy()) in data.bases[:904]
    check_draws(data)
    with pytest.raises(ValueError, match=r"context: expected less than the 50 bases of split 'valid'.*, got 50"):
        next(genomes.Config(corpus=fasta, context=50).open().batches("valid", torch.Generator()))


def test_the_other_strand_is_read_backward_with_partners(fasta):
    data = genomes.Config(corpus=fasta, batch=400, context=20, both_strands=True).open()
    partner = str.maketrans("ACGT", "TGCA")
    batch = next(data.batches("train", torch.Generator().manual_seed(0)))
    for row, last, strand in zip(batch.tokens, batch.targets[:, -1:], batch.slices["strand"].tolist(), strict=True):
        read = data.encoding.decode(torch.cat((row, last)).numpy())
        assert (read if strand == 1 else read[::-1].translate(partner)) in data.bases[:904]
    assert 140 < int((batch.slices["strand"] == -1).sum()) < 260


def test_what_is_no_genome_is_refused(tmp_path):
    path = tmp_path / "protein.fa"
    path.write_text(">one\nMKVACGT")
    with pytest.raises(CorpusError, match=r"corpus 'protein\.fa': expected bases ACGT, found also KMV"):
        genomes.Config(corpus=str(path)).open()


@needs_data
def test_real_genomes_have_their_known_counts():
    ecoli, phage = (genomes.Config(corpus=name).open() for name in ("ecoli", "lambda"))
    assert torch.bincount(torch.cat(list(ecoli.tokens.values()))).tolist() == [1142742, 1180091, 1177437, 1141382]
    assert torch.bincount(torch.cat(list(phage.tokens.values()))).tolist() == [12334, 11362, 12820, 11986]


@needs_data
def test_series_are_cut_by_months_and_normalised_by_training():
    data = forecasting.Config(context=336, horizon=96).open()
    assert data.names == ("HUFL", "HULL", "MUFL", "MULL", "LUFL", "LULL", "OT") and data.values.shape == (14_400, 7)
    training = data.values[:8640].double()
    assert training.mean(0).abs().max() < 1e-6 and (training.std(0, correction=0) - 1).abs().max() < 1e-6
    assert (data.values.mean(0).abs() > 0.01).all()
    # The first row of the file, by hand.
    assert torch.allclose((data.values[0] * data.deviation + data.mean)[[0, 6]].float(), torch.tensor([5.827, 30.531]))
    # The future of no window leaves its split.
    assert [len(data.starts(split)) for split in corpora.SPLITS] == [8209, 2785, 2785]
    ends = {split: (data.starts(split)[0] + 336, data.starts(split)[-1] + 336 + 96) for split in corpora.SPLITS}
    assert ends == {"train": (336, 8640), "valid": (8640, 11_520), "test": (11_520, 14_400)}
    windows = next(data.batches("valid", torch.Generator().manual_seed(0)))
    for past, future, start in zip(*windows, strict=True):
        assert torch.equal(torch.cat((past, future)), data.values[start : start + 336 + 96])
    assert torch.equal(torch.cat([w.start for w in data.every("test")]), torch.tensor(data.starts("test")))
    check_draws(data)


@needs_data
def test_the_plain_forecasts_have_their_errors():
    data = forecasting.Config(context=48, horizon=24, channels="OT", batch=512).open()
    windows = next(data.batches("test", torch.Generator().manual_seed(0)))
    assert torch.equal(data.seasonal(windows.past, 50)[:, [0, 24, 48]], windows.past[:, [24, 24, 24]])
    assert torch.equal(forecasting.last(windows.past, 3), windows.past[:, [-1, -1, -1]])
    found = data.errors("test", forecasting.last)
    series, starts = data.values[:, 0].double(), data.starts("test")
    apart = torch.stack([series[s + 48 : s + 72] - series[s + 47] for s in starts])
    assert found["mse"] == pytest.approx(float((apart**2).mean()))
    assert found["mae"] == pytest.approx(float(apart.abs().mean()))
    assert data.errors("test", lambda past, horizon: torch.zeros(len(past), horizon, 1))["mse"] > found["mse"]
    with pytest.raises(ValueError, match=r"past: expected at least a day \(24 values\), got 23"):
        data.seasonal(windows.past[:, :23], 5)


@pytest.mark.unchecked
def test_what_no_task_has_is_refused():
    with pytest.raises(ValueError, match="task: expected 1, 2 or 3, got 4"):
        babi.Config(task=4)
    with pytest.raises(ValueError, match="series: expected ett-h1 or ett-m1, got 'ett-h2'"):
        forecasting.Config(series="ett-h2")
    with pytest.raises(ValueError, match="channels: expected all or OT, got 'HUFL'"):
        forecasting.Config(channels="HUFL")


def test_forecasting_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="horizon: expected at most 2880, the validation part, got 2881"):
        forecasting.Config(horizon=2881)
    with pytest.raises(ValueError, match="context: expected at most 8544, the training part without the horizon, got"):
        forecasting.Config(context=8545)


def test_pubmedqa_scores_as_published():
    truth = {"1": "yes", "2": "yes", "3": "no", "4": "maybe"}
    found = pubmedqa.score({"1": "yes", "2": "no", "3": "no", "4": "yes"}, truth)
    # F1 of yes 2·1 / (2 + 2), of no 2·1 / (2 + 1), of maybe 0.
    assert found == {"accuracy": 0.5, "macro_f1": pytest.approx((1 / 2 + 2 / 3) / 3)}
    assert pubmedqa.score(truth, truth) == {"accuracy": 1, "macro_f1": 1}
    with pytest.raises(ValueError, match="answers: expected those of the 4 papers, got 1 of them and 1 of others"):
        pubmedqa.score({"1": "yes", "5": "no"}, truth)
    with pytest.raises(ValueError, match="answers: expected yes or no or maybe, got 'perhaps'"):
        pubmedqa.score({**truth, "4": "perhaps"}, truth)


def test_a_prompt_leaves_out_the_beginning_of_what_does_not_fit():
    record = pubmedqa.Record("7", "Is it?", "First. Second.", "Yes.", "yes")
    assert pubmedqa.prompt(record) == "Context: First. Second.\nQuestion: Is it?\nAnswer: "
    assert pubmedqa.prompt(record, 40) == "Context: cond.\nQuestion: Is it?\nAnswer: "
    with pytest.raises(ValueError, match="longest: expected at least 35 for paper 7, got 34"):
        pubmedqa.prompt(record, 34)


@needs_data
def test_papers_are_divided_as_officially():
    data = pubmedqa.Config(batch=8, context=1200).open()
    assert {split: len(records) for split, records in data.records.items()} == {"train": 450, "valid": 50, "test": 500}
    assert len({record.id for records in data.records.values() for record in records}) == 1000
    assert list(data.truth)[:2] == ["12377809", "26163474"]
    answers = list(data.truth.values())
    assert [answers.count(answer) for answer in pubmedqa.ANSWERS] == [276, 169, 55]
    assert pubmedqa.score(dict.fromkeys(data.truth, "yes"), data.truth)["accuracy"] == 0.552
    for batch in islice(data.batches("valid", torch.Generator().manual_seed(0)), 3):
        stream = torch.cat((batch.tokens, batch.targets[:, -1:]), 1)
        answers, lengths = (batch.slices[name].tolist() for name in ("answer", "length"))
        for row, (answer, length) in enumerate(zip(answers, lengths, strict=True)):
            said = 1200 if batch.valid is None else int(batch.valid[row].sum())
            text = data.encoding.decode(stream[row, : said + 1].numpy()).rstrip("\n")
            word = pubmedqa.ANSWERS[answer]
            assert text.startswith("Context: ") and text.endswith(f"?\nAnswer: {word}")
            assert data.encoding.decode(batch.targets[row][batch.mask[row]].numpy()) == word
            assert len(text) == min(1201, length + len(word))
    check_draws(data)
    with pytest.raises(ValueError, match="batch: expected one with an oracle, got one without"):
        data.oracle_answers(batch)
