"""What commands print: results on stdout, as tables or JSON, and messages on stderr."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


def say(message: str) -> None:
    """A message for the person at the terminal."""
    print(message, file=sys.stderr, flush=True)


def print_json(value: Any, *, indent: int | None = 2) -> None:
    print(json.dumps(plain(value), indent=indent, allow_nan=False, ensure_ascii=False), flush=True)


def plain(value: Any) -> Any:
    """`value` in the terms of JSON; NaN and the infinities, which it has not, become null."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):  # numpy's arrays and numbers
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def print_table(columns: Sequence[str], rows: Iterable[Sequence[Any]], *, title: str | None = None) -> None:
    """Columns of nothing but numbers are aligned on the right."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    rows = [list(row) for row in rows]
    table = Table(box=None, pad_edge=False)
    for number, column in enumerate(columns):
        numeric = all(_is_number(row[number]) for row in rows)
        table.add_column(column, overflow="fold", header_style="dim", justify="right" if numeric else "left")
    for row in rows:
        table.add_row(*(Text(cell(value)) for value in row))
    # Into a file or a pipe a table would be folded to 80 columns, for nobody's benefit.
    console = Console(width=None if sys.stdout.isatty() else 160)
    if title is not None:
        console.print(title, style="bold")
    console.print(table)


def cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}".replace(",", " ")
    if isinstance(value, float):
        return f"{value:.5g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return str(value)


def flat(fields: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested fields as rows of a table: `{"a": {"b": 1}}` as `("a.b", 1)`."""
    rows = []
    for key, value in fields.items():
        nested = isinstance(value, Mapping) and value
        rows += flat(value, f"{prefix}{key}.") if nested else [(f"{prefix}{key}", value)]
    return rows


def size(count: int) -> str:
    """Bytes for people."""
    amount = float(count)
    for unit in ("B", "kB", "MB"):
        if amount < 1000:
            return f"{amount:.3g} {unit}"
        amount /= 1000
    return f"{amount:.3g} GB"


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))
