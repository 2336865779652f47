"""The files of a corpus on this machine: where they are looked for, how they are checked and downloaded."""

import gzip
import hashlib
import http.client
import os
import secrets
import tempfile
import time
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from hmlab import __version__
from hmlab.corpora.entries import CorpusError, Entry, File

BLOCK = 1 << 18
DAY = 86_400

Progress = Callable[[str, int, int | None], None]
"""Called as a file comes in: its path, the bytes received, the bytes announced (None if they are not)."""


def cache() -> Path:
    """The folder that downloads go to: `hmlab/corpora` below XDG_CACHE_HOME, or below ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hmlab" / "corpora"


def places(data: str | Path | None = None) -> list[Path]:
    """The folders that corpora are looked for in: `data`, HMLAB_DATA, `cache()`. A named one must exist."""
    named = {"data": data, "HMLAB_DATA": os.environ.get("HMLAB_DATA")}
    folders = {label: Path(folder).expanduser() for label, folder in named.items() if folder}
    for label, folder in folders.items():
        if not folder.is_dir():
            raise CorpusError(f"{label}: expected a folder of corpora, but {folder} is not a folder")
    return [*folders.values(), cache()]


def find(file: File, folders: list[Path]) -> Path | None:
    """The first place that holds the file, plain or as `.gz`."""
    candidates = (folder / f"{file.path}{suffix}" for folder in folders for suffix in ("", ".gz"))
    return next((path for path in candidates if path.is_file()), None)


def read(entry: Entry, file: File, path: Path) -> bytes:
    """The file's content, uncompressed and checked. Raises `CorpusError`."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as source:
            content = source.read(file.bytes + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise CorpusError(f"corpus {entry.name!r}: {path} cannot be read: {error}") from error
    advice = f"remove that file and get the right one with `hmlab corpora download {entry.name}`"
    _check(entry, file, str(path), len(content), hashlib.sha256(content).hexdigest(), advice)
    return content


def fetch(entry: Entry, file: File, folder: Path, progress: Progress | None = None) -> None:
    """Download the file to its place below `folder`, where it appears only when complete and checked.

    Raises `CorpusError`.
    """
    target = folder / file.path
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _complete(target) as out:
            size, digest = 0, hashlib.sha256()
            for block in _content(file, target.parent, progress):
                size += out.write(block)
                digest.update(block)
            advice = "nothing was kept; try again, or set HMLAB_DATA to a folder that has the file"
            _check(entry, file, file.url, size, digest.hexdigest(), advice)
    except (OSError, http.client.HTTPException, zipfile.BadZipFile, zlib.error) as error:
        raise CorpusError(
            f"corpus {entry.name!r}: {file.path} could not be downloaded from {file.url} to {folder}: "
            f"{str(error) or type(error).__name__}; try again, or set HMLAB_DATA to a folder that has it"
        ) from error


def _check(entry: Entry, file: File, place: str, size: int, sha256: str, advice: str) -> None:
    if (size, sha256) == (file.bytes, file.sha256):
        return
    found = f"more than {file.bytes} bytes" if size > file.bytes else f"{size} bytes with sha256 {sha256}"
    raise CorpusError(
        f"corpus {entry.name!r}: wrong content at {place}: expected {file.bytes} bytes with sha256 "
        f"{file.sha256}, found {found}; {advice}"
    )


@contextmanager
def _complete(target: Path) -> Iterator[BinaryIO]:
    """A file that appears at `target` when the block ends without an error, and not at all otherwise."""
    for leftover in target.parent.glob(f"{target.name}.*.partial"):  # of a download that was killed
        if time.time() - leftover.stat().st_mtime > DAY:
            leftover.unlink(missing_ok=True)
    partial = target.with_name(f"{target.name}.{secrets.token_hex(4)}.partial")
    try:
        with partial.open("xb") as out:
            yield out
            out.flush()
            os.fsync(out.fileno())
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def _content(file: File, folder: Path, progress: Progress | None) -> Iterator[bytes]:
    """The file's bytes from its address, unpacked if that ends in .gz; one too many of a file that is too long."""
    if file.member is None:
        blocks = _received(file, progress)
        packed = file.url.endswith(".gz") and not file.path.endswith(".gz")
        yield from _first(file.bytes + 1, _unpacked(blocks) if packed else blocks)
        return
    with tempfile.TemporaryFile(dir=folder) as archive:
        for block in _received(file, progress):
            archive.write(block)
        with zipfile.ZipFile(archive) as opened:
            if file.member not in opened.namelist():
                raise zipfile.BadZipFile(f"the archive has no member {file.member!r}")
            with opened.open(file.member) as member:
                yield from _first(file.bytes, iter(lambda: member.read(BLOCK), b""))


def _unpacked(blocks: Iterator[bytes]) -> Iterator[bytes]:
    gzip_format = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
    for block in blocks:
        while block:
            yield gzip_format.decompress(block, BLOCK)
            block = gzip_format.unconsumed_tail


def _first(count: int, blocks: Iterator[bytes]) -> Iterator[bytes]:
    for block in blocks:
        yield block[:count]
        count -= len(block)
        if count <= 0:
            return


def _received(file: File, progress: Progress | None) -> Iterator[bytes]:
    request = urllib.request.Request(file.url, headers={"User-Agent": f"hmlab/{__version__}"})
    with urllib.request.urlopen(request, timeout=30) as response:
        announced = int(response.headers["Content-Length"] or 0) or None
        received = 0
        while block := response.read(BLOCK):
            received += len(block)
            if progress:
                progress(file.path, received, announced)
            yield block
