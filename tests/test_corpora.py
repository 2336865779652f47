"""Corpora: the catalogue, the places they are looked for in, the embedded texts, one's own text."""

import gzip
import hashlib
import os
import re
import subprocess
import sys

import pytest

from hmlab import corpora
from hmlab.corpora import CorpusError

pytest_plugins = ["made_corpus"]

needs_data = pytest.mark.skipif(
    not os.environ.get("HMLAB_DATA"), reason="HMLAB_DATA is not set: the real corpora are not here"
)


def test_the_catalogue_says_all_that_is_needed():
    known = corpora.catalogue()
    assert {"python", "tinyshakespeare", "wikitext-2", "gutenberg-books", "enwik8"} <= known.keys()
    for entry in known.values():
        assert entry.licence and entry.description and entry.homepage.startswith("http")
        assert bool(entry.embedded) != bool(entry.files)
        assert not entry.shares or sum(entry.shares) == 100
        for file in entry.files:
            assert re.fullmatch("[0-9a-f]{64}", file.sha256)
            assert file.url.startswith("http")
            assert (file.split in corpora.SPLITS) != bool(entry.shares)
    paths = [file.path for entry in known.values() for file in entry.files]
    assert len(paths) == len(set(paths))
    assert known["tinyshakespeare"].bytes == 1_115_394


@pytest.mark.parametrize("name", ["python", "python-sources"])
def test_embedded_text_is_the_same_in_every_process(name, no_data):
    corpus = corpora.load(name)
    text = "".join(corpus.splits.values())
    assert corpus.sha256 == hashlib.sha256(text.encode()).hexdigest()
    assert list(corpus.splits) == list(corpora.SPLITS)
    assert [round(100 * len(part) / len(text)) for part in corpus.splits.values()] == [90, 5, 5]
    assert ".".join(map(str, sys.version_info[:3])) in corpus.source
    command = f"from hmlab import corpora; print(corpora.load({name!r}).sha256)"
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(sys.path)}
    again = subprocess.run([sys.executable, "-c", command], env=environment, capture_output=True, text=True)
    assert again.stdout.strip() == corpus.sha256, again.stderr


def test_embedded_topics_hold_no_paragraph_twice(no_data):
    text = "".join(corpora.load("python").splits.values())
    paragraphs = [part.strip() for part in text.split("\n\n")]
    assert len(paragraphs) == len(set(paragraphs))
    assert len(text) > 200_000


def test_embedded_sources_are_the_library_without_its_tests(no_data):
    text = "".join(corpora.load("python-sources").splits.values())
    assert "class OrderedDict(dict)" in text
    assert "class TestCase(object)" in text
    assert "class ListTest(list_tests.CommonTest)" not in text


def test_an_unknown_name_is_answered_with_the_nearest(no_data):
    with pytest.raises(CorpusError, match=r"'tinyshakespear'.*did you mean 'tinyshakespeare'"):
        corpora.load("tinyshakespear")


def test_missing_files_name_the_corpus_the_places_and_the_remedy(made, tmp_path, monkeypatch):
    monkeypatch.setenv("HMLAB_DATA", str(tmp_path))
    assert not corpora.present("made")
    with pytest.raises(CorpusError) as caught:
        corpora.load("made")
    message = str(caught.value)
    for part in (
        "'made'",
        "made/text.gz",
        str(tmp_path),
        str(made.folder),
        "hmlab corpora download made",
        "HMLAB_DATA",
    ):
        assert part in message
    assert "\n" not in message


def test_places_are_looked_at_in_order(made, tmp_path, monkeypatch):
    made.put(made.folder, made.text)
    assert corpora.load("made").place == made.folder / "made"
    monkeypatch.setenv("HMLAB_DATA", str(made.put(tmp_path / "variable", made.text)))
    assert corpora.load("made").place == tmp_path / "variable" / "made"
    own = made.put(tmp_path / "own", made.text)
    assert corpora.load("made", data=own).place == own / "made"
    assert corpora.present("made")


def test_a_corpus_is_the_same_plain_and_compressed(made, tmp_path):
    plain = corpora.load("made", data=made.put(tmp_path / "plain", made.text))
    packed = corpora.load("made", data=made.put(tmp_path / "packed", gzip.compress(made.text), "text.gz"))
    assert plain.splits == packed.splits
    assert plain.sha256 == packed.sha256 == hashlib.sha256(made.text).hexdigest()
    assert plain.splits["train"].encode() == made.text[: len(made.text) * 90 // 100]


@pytest.mark.parametrize(
    ("spoil", "found"),
    [
        (lambda text: text[:-1] + b"?", lambda text: f"{len(text)} bytes with sha256"),
        (lambda text: text[:-1], lambda text: f"{len(text) - 1} bytes with sha256"),
        (lambda text: text + b"?", lambda text: f"more than {len(text)} bytes"),
        (lambda text: b"", lambda text: "0 bytes"),
    ],
)
def test_wrong_content_is_refused_even_if_a_later_place_is_right(made, tmp_path, spoil, found):
    made.put(made.folder, made.text)
    wrong = made.put(tmp_path / "wrong", spoil(made.text))
    with pytest.raises(CorpusError) as caught:
        corpora.load("made", data=wrong)
    expected = f"expected {len(made.text)} bytes with sha256 {hashlib.sha256(made.text).hexdigest()}"
    for part in ("'made'", str(wrong / "made" / "text"), expected, f"found {found(made.text)}"):
        assert part in str(caught.value)


def test_a_broken_gzip_file_is_refused(made, tmp_path):
    whole = gzip.compress(made.text)
    for content in (whole[:-100], b"not gzip", whole[:50] + b"\0" * 100):
        broken = made.put(tmp_path / "broken", content, "text.gz")
        with pytest.raises(CorpusError, match=r"'made'.*text\.gz cannot be read"):
            corpora.load("made", data=broken)


def test_a_named_place_must_be_a_folder(made, tmp_path, monkeypatch):
    with pytest.raises(CorpusError, match="data: expected a folder"):
        corpora.load("made", data=tmp_path / "nowhere")
    monkeypatch.setenv("HMLAB_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(CorpusError, match="HMLAB_DATA: expected a folder"):
        corpora.load("made")


def test_a_books_body_goes_without_notices(made, tmp_path):
    head, body = b"\xef\xbb\xbfnotice\r\n", "\r\n\r\nCafé\r\n\r\nEnd\r\n\r\n".encode()
    content = head + body + b"licence\r\n"
    made.describe(content=content, more=f"body = [{len(head)}, {len(head) + len(body)}]")
    corpus = corpora.load("made", data=made.put(tmp_path / "books", content))
    assert "".join(corpus.splits.values()) == "Café\n\nEnd\n"


def test_own_file_is_split_where_characters_begin(tmp_path, no_data):
    path = tmp_path / "own.txt"
    text = "".join(f"Zeile {i} ä€🐍\n" for i in range(200))
    path.write_text("\ufeff" + text, encoding="utf-8", newline="")
    corpus = corpora.load(str(path))
    assert "".join(corpus.splits.values()) == text
    assert corpus.division == "train 90 %, valid 5 %, test 5 % of the bytes"
    assert corpus.name == "own.txt" and str(tmp_path) not in corpus.source
    for share, part in zip((90, 5, 5), corpus.splits.values(), strict=True):
        assert abs(len(part.encode()) - len(text.encode()) * share / 100) <= 8
    # Of four bytes a character, nearly every cut falls inside one.
    for count in range(1, 30):
        path.write_text("🐍" * count, encoding="utf-8")
        assert "".join(corpora.load(path).splits.values()) == "🐍" * count


def test_own_files_that_are_not_utf8_are_named_with_the_byte(tmp_path, no_data):
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "old.txt").write_bytes("Straße".encode("latin-1"))
    with pytest.raises(CorpusError, match=r"old\.txt, found byte 0xdf at byte offset 4"):
        corpora.load(tmp_path)


def test_own_folder_is_read_in_the_order_of_names(tmp_path, no_data):
    for name, text in (("b.txt", "second"), ("a.txt", "first "), ("c.md", "not text")):
        (tmp_path / name).write_text(text)
    assert "".join(corpora.load(tmp_path).splits.values()) == "first second"


def test_own_folder_may_be_split_already(tmp_path, no_data):
    for split in ("train", "valid"):
        (tmp_path / f"{split}.txt").write_text(f"the {split} text")
    corpus = corpora.load(tmp_path)
    assert corpus.splits == {"train": "the train text", "valid": "the valid text"}
    assert corpus.division == "by file"
    (tmp_path / "notes.txt").write_text("of which split?")
    with pytest.raises(CorpusError, match=r"beside .*train\.txt, found notes\.txt"):
        corpora.load(tmp_path)


def test_own_places_without_text_are_refused(tmp_path, no_data):
    with pytest.raises(CorpusError, match=r"found no \.txt file"):
        corpora.load(tmp_path)
    (tmp_path / "empty.txt").touch()
    with pytest.raises(CorpusError, match="found only empty files"):
        corpora.load(tmp_path)
    with pytest.raises(CorpusError, match="unknown corpus"):
        corpora.load(tmp_path / "nowhere.txt")


@needs_data
@pytest.mark.parametrize(
    ("name", "characters"),
    [
        ("tinyshakespeare", {"train": 1_003_854, "valid": 111_540}),
        ("wikitext-2", {"train": 10_780_437, "valid": 1_120_192, "test": 1_255_018}),
        ("gutenberg-books", {"train": 9_255_131, "valid": 994_067, "test": 2_215_956}),
        ("enwik8-4m", {"train": 3_582_546, "valid": 199_490, "test": 198_988}),
        ("haystack-essays", {"train": 592_311, "valid": 74_039, "test": 74_039}),
    ],
)
def test_real_corpora_have_their_known_sizes(name, characters):
    corpus = corpora.load(name)
    assert {split: len(text) for split, text in corpus.splits.items()} == characters
    text = "".join(corpus.splits.values())
    if name == "gutenberg-books":
        assert "\r" not in text and "\ufeff" not in text and "*** START OF" not in text
    (file, *others) = corpora.catalogue()[name].files
    if not others:
        assert corpus.sha256 == file.sha256
