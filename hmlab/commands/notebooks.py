"""`hmlab run`: one notebook headless. `hmlab reproduce`: the tour and the reproductions, and a report."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from hmlab.commands.output import Json, print_json, say
from hmlab.commands.settings import pairs
from hmlab.registry import UnknownName

Timeout = Annotated[int, typer.Option(min=1, help="Seconds that one cell may take.")]
REPRODUCED = ("00_tour", "10_lmn")


class NotebookCommand(TyperCommand):
    """Takes `-p NAME VALUE`, as other notebook runners do, beside `-p NAME=VALUE`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        joined, rest = [], iter(args)
        for word in rest:
            joined.append(word)
            if word in ("-p", "--parameter"):
                name = next(rest, "")
                joined.append(name if "=" in name else f"{name}={next(rest, '')}")
        return super().parse_args(ctx, joined)


def run(
    notebook: Annotated[str, typer.Argument(help="A file, or a name from `hmlab list`.")],
    parameter: Annotated[
        list[str], typer.Option("-p", "--parameter", metavar="NAME VALUE", help="Set a parameter; repeatable.")
    ] = [],  # noqa: B006
    form: Annotated[str | None, typer.Option(help="smoke, quick or full, where the notebook has it.")] = None,
    out: Annotated[Path | None, typer.Option(help="Output folder.", show_default="reports/NAME")] = None,
    timeout: Timeout = 3600,
    json: Json = False,
) -> None:
    """Run a notebook headless; keep the executed copy, its page and its results."""
    from hmlab import notebooks

    chosen = notebooks.read(notebooks.find(notebook))
    values = chosen.form(form) if form else {}
    values |= chosen.check(pairs(parameter, "--parameter"), text=True)
    done = execute(chosen, values, out or Path("reports") / chosen.name, timeout)
    if json:
        print_json({"name": chosen.name, "seconds": done.seconds, "parameters": done.parameters,
                    "notebook": done.notebook, "html": done.html, "datasets": done.datasets})  # fmt: skip
        return
    for path in (done.notebook, done.html, *done.datasets):
        print(path)


def reproduce(
    form: Annotated[str, typer.Option(help="smoke, quick or full.")] = "quick",
    out: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("reports"),
    folder: Annotated[
        Path | None, typer.Option("--notebooks", help="A folder of notebooks instead of hmlab's own.")
    ] = None,
    timeout: Timeout = 3600,
    json: Json = False,
) -> None:
    """Run the tour and every reproduction headless and write OUT/index.html."""
    from hmlab import atomic, notebooks, report

    chosen = [n for n in notebooks.available(folder) if n.name in REPRODUCED or n.path.parent.name == "reproductions"]
    entries = []
    for notebook in chosen:
        begun, values, facts = time.monotonic(), dict(notebook.forms.get(form, {})), {}
        try:
            values = notebook.form(form)
            done = execute(notebook, values, out / notebook.name, timeout)
            facts = {"page": str(done.html.relative_to(out)),
                     "datasets": [str(path.relative_to(out)) for path in done.datasets]}  # fmt: skip
        except (UnknownName, notebooks.ParameterError, notebooks.NotebookError) as error:
            say(f"hmlab: {error}")
            failed = out / notebook.name / f"{notebook.name}.failed.html"
            facts = {"error": str(error), "page": str(failed.relative_to(out)) if failed.exists() else ""}
        entries.append(
            report.Entry(title=notebook.title, name=notebook.name, parameters=values,
                         seconds=time.monotonic() - begun, **facts)
        )  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    page = out / "index.html"
    atomic.write_bytes(page, report.index_html("Reproduction", entries, provenance(form)).encode())
    failed = [entry.name for entry in entries if entry.error]
    if json:
        print_json({"report": page, "failed": failed, "notebooks": [vars(entry) for entry in entries]})
    else:
        print(page)
    if failed or not entries:
        say(f"hmlab: {len(failed)} of {len(entries)} notebooks failed" if entries else "hmlab: no notebooks")
        raise typer.Exit(1)


def execute(notebook: Any, values: dict[str, Any], out: Path, timeout: int):
    """`run_notebook` with a progress bar."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from hmlab.notebooks import run_notebook

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bars:
        bar = bars.add_task(notebook.title, total=None)

        def on_cell(index: int, cells: int) -> None:
            bars.update(bar, completed=index, total=cells)

        done = run_notebook(notebook.path, values, out, timeout=timeout, on_cell=on_cell)
        bars.update(bar, completed=bars.tasks[bar].total)
        return done


def provenance(form: str) -> dict[str, Any]:
    """Under which conditions a report was made."""
    import torch

    from hmlab import provenance as origin

    facts = origin.provenance(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    versions = ", ".join(f"{name} {version}" for name, version in facts.pop("versions").items())
    finished = datetime.now(UTC).isoformat(timespec="seconds")
    return {"form": form, **facts, "versions": versions, "finished": finished}
