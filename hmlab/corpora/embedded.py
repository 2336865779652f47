"""Real text that every Python carries, so that hmlab works without network: the running Python is the source.

Both texts differ between versions of Python (and builds, where a distributor leaves modules out), so a
figure on them belongs to the corpus's sha256. They are put together in an order that is fixed but not the
alphabet's; otherwise the test split would be whatever begins with the last letters.
"""

import hashlib
import sys
import sysconfig
import tokenize
from collections.abc import Callable
from pathlib import Path

from hmlab.corpora.entries import CorpusError


def topics() -> str:
    """The documentation topics, each paragraph once: many stand in several topics and would cross splits."""
    try:
        from pydoc_data.topics import topics as texts
    except ImportError as error:
        raise CorpusError(
            "corpus 'python': expected the module pydoc_data.topics, found none in this Python; "
            "give a text file of your own or another corpus"
        ) from error
    seen = set()
    kept = []
    for name in sorted(texts, key=_order):
        for paragraph in texts[name].strip("\n").split("\n\n"):
            if paragraph.strip() not in seen:
                kept.append(paragraph)
            seen.add(paragraph.strip())
    return "\n\n".join(kept) + "\n"


def sources() -> str:
    """The standard library's Python files, without tests, character tables and the topics themselves."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"encodings", "pydoc_data", "test", "tests", "idle_test"}
    paths = {
        path.relative_to(root).as_posix(): path
        for module in sys.stdlib_module_names - left_out
        for path in (root / f"{module}.py", *(root / module).rglob("*.py"))
        if path.is_file() and not left_out.intersection(path.relative_to(root).parts)
    }
    if not paths:
        raise CorpusError(
            f"corpus 'python-sources': expected the standard library's .py files in {root}, found none; "
            "take the corpus 'python' instead"
        )
    texts = []
    for name in sorted(paths, key=_order):
        with tokenize.open(paths[name]) as source:
            texts.append(source.read())
    return "\n".join(texts)


TEXTS: dict[str, Callable[[], str]] = {"topics": topics, "sources": sources}


def _order(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()
