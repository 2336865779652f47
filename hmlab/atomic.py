"""Files and folders that appear on disk whole or not at all, whatever moment the process or machine dies."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_bytes(path: Path, content: bytes, *, durable: bool = True) -> None:
    """Replace the content of a file. Durable: it outlives the machine, not just the process."""
    partial = _partial(path)
    try:
        with partial.open("xb") as out:
            out.write(content)
            if durable:
                out.flush()
                os.fsync(out.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Replace the content of a file by JSON; NaN and infinities are refused, since JSON has none."""
    write_bytes(path, (json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n").encode())


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Fill the folder that is given; it takes the name `path`, which must be free, when all is on disk."""
    partial = _partial(path)
    partial.mkdir(parents=True)
    try:
        yield partial
        sync(partial)
        partial.rename(path)
        _sync(path.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def sync(folder: Path) -> None:
    """Wait until all that a folder holds is on disk."""
    for path in [*folder.rglob("*"), folder]:
        _sync(path)


def sweep(folder: Path) -> None:
    """Remove what killed writers left; nobody may be writing in the folder."""
    for leftover in [*folder.rglob("*.partial")]:
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink(missing_ok=True)


def _partial(path: Path) -> Path:
    return path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
