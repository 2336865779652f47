"""`hmlab corpora`: real text, and getting what is not here yet."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hmlab.commands.output import Json, print_json, print_table, say, size
from hmlab.registry import UnknownName

app = typer.Typer(no_args_is_help=True, help="List and download corpora.")


def known_corpus(name: str) -> str:
    """`name`, if the catalogue has it or it is a path that exists."""
    from hmlab import corpora

    if name not in corpora.catalogue() and not Path(name).expanduser().exists():
        raise UnknownName("corpus", name, corpora.catalogue())
    return name


def rows_of_corpora() -> list[dict]:
    """What the catalogue says of each corpus, and whether it is here; an embedded one has no fixed size."""
    from hmlab import corpora

    return [
        {
            "name": name,
            "licence": entry.licence,
            "bytes": entry.bytes or None,
            "here": corpora.present(name),
            "about": entry.description,
        }
        for name, entry in corpora.catalogue().items()
    ]


@app.command("list")
def list_corpora(json: Json = False) -> None:
    """Every corpus of the catalogue, and whether it is here."""
    rows = rows_of_corpora()
    if json:
        print_json(rows)
        return
    columns = ("name", "bytes", "here", "licence")
    print_table(columns, [[row[column] for column in columns] for row in rows])


@app.command()
def download(
    name: Annotated[str, typer.Argument(help="A corpus of the catalogue.")],
    folder: Annotated[Path | None, typer.Option(help="Where to.", show_default="the cache")] = None,
    json: Json = False,
) -> None:
    """Download a corpus; every file is checked before it takes its place."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    from hmlab import corpora

    if name not in corpora.catalogue():
        raise UnknownName("corpus", name, corpora.catalogue())
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, int] = {}

        def progress(file: str, done: int, total: int) -> None:
            if file not in tasks:
                tasks[file] = bars.add_task(file, total=total)
            bars.update(tasks[file], completed=done)

        where = corpora.download(name, data=folder, progress=progress)
    total = corpora.catalogue()[name].bytes
    if json:
        print_json({"name": name, "folder": where, "bytes": total})
    else:
        say(f"{name}: {size(total)} in {where}")
