"""Real text: a catalogue with licences and hashes, checked files, checked downloads, a person's own text.

`load(name)` gives a `Corpus`, the text of each split. A name is one of `catalogue()` (`data/catalogue.toml`),
or else the path of a UTF-8 text file or of a folder of `.txt` files. `python` and `python-sources` are made
from the running Python and need neither files nor network.

Files are looked for in `data`, then in the folder that HMLAB_DATA names, then in `cache()`, plain or as
`.gz`. Every content is compared with the catalogue's sha256 before use, so it does not matter which place it
came from; a wrong file in an earlier place is an error and is not passed over. Nothing is downloaded unless
asked: `download(name)` or `load(name, download=True)`.

What cannot be had as described raises `CorpusError`, one line that says which corpus, where, what was
expected, what was found and what to do.
"""

import hashlib
import platform
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from hmlab.corpora.embedded import TEXTS
from hmlab.corpora.entries import CorpusError, Entry, File, catalogue, entry
from hmlab.corpora.files import Progress, cache, fetch, find, places, read

__all__ = [
    "SPLITS",
    "Corpus",
    "CorpusError",
    "Entry",
    "File",
    "Progress",
    "cache",
    "catalogue",
    "download",
    "load",
    "places",
    "present",
]

SPLITS = ("train", "valid", "test")
OWN_SHARES = (90, 5, 5)


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Text ready for use.

    `splits` holds the text of train, valid and test, or of those that there are. `sha256` is that of these
    texts one after the other, as UTF-8: for a corpus of one plain file it is what `sha256sum` prints for the
    file. `division` says how the splits were made, `source` where anyone gets the text, and `place` which
    folder or file on this machine it was read from (None if embedded).
    """

    name: str
    splits: dict[str, str]
    licence: str
    sha256: str
    division: str
    source: str
    place: Path | None = None


def load(
    name: str | Path,
    *,
    data: str | Path | None = None,
    download: bool = False,
    progress: Progress | None = None,
) -> Corpus:
    """The corpus of that name, or the text at that path (a name of the catalogue goes first).

    name: a file must be UTF-8; of a folder, its `.txt` files are taken in the order of their names. The text
        is cut by bytes into 90 % train, 5 % valid, 5 % test. A folder with a `train.txt` counts as split
        already: `train.txt`, `valid.txt`, `test.txt`. Text is used as it stands, without a byte-order mark.
    data: a folder that is looked into first.
    download: download to `cache()` what is in none of the places.

    Books in `gutenberg-books` go without the notices around them, with plain newlines, one blank line between
    two books of a split. Raises `CorpusError`.
    """
    path = Path(name).expanduser()
    if str(name) not in catalogue() and path.exists():
        return _own(path)
    described = entry(str(name))
    if described.embedded:
        return _cut(
            TEXTS[described.embedded](),
            described.shares,
            name=described.name,
            licence=described.licence,
            source=f"Python {platform.python_version()}, {described.homepage}",
        )
    found = [(file, _found(described, file, places(data), download, progress)) for file in described.files]
    texts = [(file.split, _text(file, read(described, file, path))) for file, path in found]
    facts = {
        "name": described.name,
        "licence": described.licence,
        "source": described.homepage,
        "place": found[0][1].parent,
    }
    if described.shares:
        return _cut("".join(text for _, text in texts), described.shares, **facts)
    by_split = {split: "\n".join(text for of, text in texts if of == split) for split in SPLITS}
    return _corpus(by_split, "by file", **facts)


def download(name: str, *, data: str | Path | None = None, progress: Progress | None = None) -> Path:
    """Download a corpus's files to the folder `data`, `cache()` by default, and return the folder.

    Files that are there and right stay, wrong ones are replaced. A file takes its place only when it is
    complete, checked and on disk. Raises `CorpusError`.
    """
    described = entry(name)
    folder = Path(data).expanduser() if data else cache()
    for file in described.files:
        path = find(file, [folder])
        with suppress(CorpusError):
            if path and read(described, file, path):
                continue
        fetch(described, file, folder, progress)
    return folder


def present(name: str, *, data: str | Path | None = None) -> bool:
    """Whether every file of the corpus lies in one of the places (not whether it is the right one)."""
    return all(find(file, places(data)) for file in entry(name).files)


def _found(described: Entry, file: File, folders: list[Path], download: bool, progress: Progress | None) -> Path:
    path = find(file, folders)
    if path is None and download:
        fetch(described, file, cache(), progress)
        path = find(file, folders)
    if path is None:
        raise CorpusError(
            f"corpus {described.name!r}: expected {file.path} or {file.path}.gz in one of "
            f"{', '.join(map(str, folders))}, found neither; `hmlab corpora download {described.name}` gets "
            f"it from {file.url}, or set HMLAB_DATA to a folder that has it"
        )
    return path


def _text(file: File, content: bytes) -> str:
    if file.body is None:
        return content.decode()
    start, end = file.body
    return content[start:end].decode().replace("\r\n", "\n").strip("\n") + "\n"


def _own(path: Path) -> Corpus:
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    texts = {file.name: _decoded(file) for file in files}
    if not any(texts.values()):
        found = "only empty files" if texts else "no .txt file"
        raise CorpusError(f"own text: expected text in {path}, found {found}")
    facts = {
        "name": path.name,
        "licence": "the user's own text",
        "source": f"own text, {path.name}",
        "place": path.resolve(),
    }
    if path.is_file() or "train.txt" not in texts:
        return _cut("".join(texts.values()), OWN_SHARES, **facts)
    strange = sorted(texts.keys() - {f"{split}.txt" for split in SPLITS})
    if strange:
        raise CorpusError(
            f"own text: expected only valid.txt and test.txt beside {path / 'train.txt'}, found {', '.join(strange)}"
        )
    by_split = {split: texts[f"{split}.txt"] for split in SPLITS if f"{split}.txt" in texts}
    return _corpus(by_split, "by file", **facts)


def _decoded(path: Path) -> str:
    try:
        content = path.read_bytes()
        return content.decode().removeprefix("\ufeff")
    except OSError as error:
        raise CorpusError(f"own text: {path} cannot be read: {error}") from error
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"own text: expected UTF-8 in {path}, found byte 0x{content[error.start]:02x} at byte offset "
            f"{error.start}; save the file as UTF-8"
        ) from error


def _cut(text: str, shares: tuple[int, ...], **facts) -> Corpus:
    """Cut by shares of the bytes; a cut that would fall inside a character moves back to its start."""
    content = text.encode()
    cuts = [0, *(len(content) * share // 100 for share in accumulate(shares))]
    for i, cut in enumerate(cuts):
        while cut < len(content) and content[cut] & 0xC0 == 0x80:
            cut -= 1
        cuts[i] = cut
    named = list(zip(SPLITS, shares, strict=False))
    splits = {split: content[cuts[i] : cuts[i + 1]].decode() for i, (split, _) in enumerate(named)}
    division = ", ".join(f"{split} {share} %" for split, share in named) + " of the bytes"
    return _corpus(splits, division, **facts)


def _corpus(splits: dict[str, str], division: str, **facts) -> Corpus:
    digest = hashlib.sha256("".join(splits.values()).encode()).hexdigest()
    return Corpus(splits=splits, sha256=digest, division=division, **facts)
