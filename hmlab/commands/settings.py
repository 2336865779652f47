"""What the user typed, read and checked."""

from __future__ import annotations

import typing
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from hmlab.registry import UnknownName, parse

Settings = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="Set any field of the configuration; repeatable.")
]


class Refusal(Exception):
    """A command that cannot be carried out: one line for the user. status: the exit status."""

    def __init__(self, message: str, status: int = 2) -> None:
        super().__init__(message)
        self.status = status


@contextmanager
def user_values() -> Iterator[None]:
    """For building configurations from what the user typed: what they refuse is the user's to correct."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise Refusal(str(error)) from error


def pairs(texts: Iterable[str], option: str) -> dict[str, str]:
    """`KEY=VALUE` texts as a dictionary."""
    found = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise Refusal(f"{option}: expected KEY=VALUE, got {text!r}")
        found[key.strip()] = value
    return found


def parse_fields(config: type, texts: Mapping[str, str], *, prefix: str = "") -> dict[str, Any]:
    """Fields of a configuration class from text, by their types; prefix: what messages put before the names."""
    types = typing.get_type_hints(config)
    values = {}
    for field, text in texts.items():
        if field not in types:
            raise UnknownName("field", prefix + field, [prefix + known for known in types])
        value = parse(prefix + field, text, types[field])
        values[field] = tuple(value) if isinstance(value, list) else value  # JSON has no tuples
    return values
