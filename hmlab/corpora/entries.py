"""What hmlab knows of each corpus: `data/catalogue.toml`, read into frozen entries."""

import difflib
import tomllib
from dataclasses import dataclass

from hmlab.assets import assets_root


class CorpusError(Exception):
    """A corpus cannot be had as it is described."""


@dataclass(frozen=True, kw_only=True)
class File:
    """One file of a corpus: its place below a data folder, its uncompressed size and hash, its address.

    `member`: the address is that of a zip archive, and the file is the first `bytes` bytes of this member.
    `body`: first byte of the book proper and first byte after it; notices around it are no part of the text.
    """

    path: str
    bytes: int
    sha256: str
    url: str
    split: str | None = None
    member: str | None = None
    body: tuple[int, int] | None = None


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What the catalogue says of one corpus. Either its files name their splits, or `shares` cuts the text.

    `shares`: percentages of the bytes, in the order train, valid, test. `embedded`: which text of the running
    Python it is, for a corpus without files.
    """

    name: str
    description: str
    licence: str
    homepage: str
    files: tuple[File, ...] = ()
    shares: tuple[int, ...] = ()
    embedded: str | None = None

    @property
    def bytes(self) -> int:
        """Size of all files, uncompressed; 0 for an embedded corpus, whose size depends on the Python."""
        return sum(file.bytes for file in self.files)


def catalogue() -> dict[str, Entry]:
    """Every corpus known by name, in the catalogue's order."""
    described = tomllib.loads((assets_root() / "data" / "catalogue.toml").read_text(encoding="utf-8"))
    return {name: _entry(name, fields) for name, fields in described.items()}


def entry(name: str) -> Entry:
    """The entry of that name. Raises `CorpusError` with the nearest names if there is none."""
    known = catalogue()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3)
        hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
        raise CorpusError(
            f"unknown corpus {name!r}: expected a name of the catalogue, or the path of a UTF-8 text file or "
            f"of a folder of .txt files; {hint}known are {', '.join(known)}"
        )
    return known[name]


def _entry(name: str, fields: dict) -> Entry:
    files = tuple(
        File(**{**file, "body": tuple(file["body"]) if "body" in file else None}) for file in fields.pop("files", ())
    )
    return Entry(name=name, files=files, shares=tuple(fields.pop("shares", ())), **fields)
