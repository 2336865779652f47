"""Downloads, from a server on this machine: checked, all or nothing, and clear about what went wrong."""

import gzip
import hashlib
import io
import os
import signal
import socket
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest

from hmlab import corpora
from hmlab.corpora import CorpusError
from hmlab.corpora.files import BLOCK

pytest_plugins = ["made_corpus"]


def packed(member: str, content: bytes) -> bytes:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as out:
        out.writestr(member, content)
    return archive.getvalue()


def test_a_download_is_checked_reported_and_used(made):
    seen = []
    assert corpora.download("made", progress=lambda *facts: seen.append(facts)) == made.folder
    assert made.files() == {"made/text": made.text}
    received = [count for _, count, _ in seen]
    assert received == [*range(BLOCK, len(made.text), BLOCK), len(made.text)]
    assert {(path, announced) for path, _, announced in seen} == {("made/text", len(made.text))}
    corpora.download("made")
    assert corpora.load("made", download=True).place == made.folder / "made"
    assert made.server.asked == 1


def test_a_file_that_is_served_packed_is_unpacked(made):
    made.describe(url=made.server.url + ".gz")
    made.server.body = gzip.compress(made.text)
    corpora.download("made")
    assert made.files() == {"made/text": made.text}
    made.put(made.folder, b"wrong")
    for body in (gzip.compress(made.text)[:-1000], gzip.compress(made.text + b"more"), made.text):
        made.server.body = body
        with pytest.raises(CorpusError):
            corpora.download("made")
        assert made.files() == {"made/text": b"wrong"}


def test_load_downloads_only_when_asked(made):
    with pytest.raises(CorpusError):
        corpora.load("made")
    assert made.server.asked == 0
    assert corpora.load("made", download=True).sha256 == hashlib.sha256(made.text).hexdigest()


def test_a_download_replaces_a_wrong_file(made):
    made.put(made.folder, b"wrong")
    corpora.download("made")
    assert made.files() == {"made/text": made.text}


def test_a_download_goes_to_the_folder_that_is_named(made, tmp_path):
    assert corpora.download("made", data=tmp_path / "mine") == tmp_path / "mine"
    assert made.files(tmp_path / "mine") == {"made/text": made.text}
    assert made.files() == {}


@pytest.mark.parametrize(
    ("spoil", "found"),
    [
        (lambda text: text[:BLOCK], f"{BLOCK} bytes with sha256"),
        (lambda text: text[:-1] + b"?", "bytes with sha256"),
        (lambda text: text * 2, "more than"),
        (lambda text: b"", "0 bytes"),
    ],
)
def test_nothing_stays_of_a_wrong_download(made, spoil, found):
    made.server.body = spoil(made.text)
    with pytest.raises(CorpusError) as caught:
        corpora.download("made")
    expected = f"expected {len(made.text)} bytes with sha256 {hashlib.sha256(made.text).hexdigest()}"
    for part in ("'made'", made.server.url, expected, f"found {found}" if found[0] != "b" else found):
        assert part in str(caught.value)
    assert made.files() == {}


def test_nothing_stays_of_a_truncated_download(made):
    made.server.body, made.server.announced = made.text[: BLOCK + 7], len(made.text)
    with pytest.raises(CorpusError, match=rf"'made'.*found {BLOCK + 7} bytes"):
        corpora.download("made")
    assert made.files() == {}


def test_an_old_file_survives_a_failed_download(made):
    made.put(made.folder, b"wrong, but the user's")
    made.server.body = b"wrong too"
    with pytest.raises(CorpusError):
        corpora.download("made")
    assert made.files() == {"made/text": b"wrong, but the user's"}


def test_a_missing_address_is_one_clear_line(made):
    made.server.body = None
    with pytest.raises(CorpusError, match=r"'made'.*could not be downloaded from .*/text.*404") as caught:
        corpora.download("made")
    assert "\n" not in str(caught.value)
    assert made.files() == {}


def test_a_refused_connection_is_one_clear_line(made):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    made.describe(url=f"http://127.0.0.1:{port}/text")
    with pytest.raises(CorpusError, match=r"'made'.*could not be downloaded.*refused.*HMLAB_DATA") as caught:
        corpora.download("made")
    assert "\n" not in str(caught.value)
    assert made.files() == {}


def test_a_place_that_cannot_be_written_is_one_clear_line(made, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CorpusError, match=r"'made'.*to .*/file"):
        corpora.download("made", data=tmp_path / "file")


def test_a_download_killed_halfway_leaves_no_corpus(made):
    made.server.stop = BLOCK + BLOCK // 2
    command = f"""
from pathlib import Path
from hmlab import corpora
from hmlab.corpora import entries
entries.assets_root = lambda: Path({str(made.assets)!r})
corpora.download("made")
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, "-c", command], env=environment)
    deadline = time.monotonic() + 60
    while not any(path.stat().st_size >= BLOCK for path in made.folder.rglob("*.partial")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (partial,) = made.folder.rglob("*.partial")
    assert not (made.folder / "made" / "text").exists()
    with pytest.raises(CorpusError, match="found neither"):
        corpora.load("made")
    made.server.release.set()
    os.utime(partial, (0, 0))
    corpora.download("made")
    assert made.files() == {"made/text": made.text}


def test_two_downloads_at_once_do_not_disturb_each_other(made):
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: corpora.download("made"), range(2)))
    assert made.files() == {"made/text": made.text}


def test_a_file_can_be_the_beginning_of_an_archives_member(made):
    made.server.body = packed("whole", made.text * 3)
    made.describe(more='member = "whole"')
    corpora.download("made")
    assert made.files() == {"made/text": made.text}


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: b"no archive",
        lambda text: packed("whole", text)[:-30],
        lambda text: packed("another", text),
        lambda text: packed("whole", text[:9]),
    ],
)
def test_nothing_stays_of_a_wrong_archive(made, spoil):
    made.server.body = spoil(made.text)
    made.describe(more='member = "whole"')
    with pytest.raises(CorpusError, match="'made'"):
        corpora.download("made")
    assert made.files() == {}
