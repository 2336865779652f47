"""`hmlab runs`: what was trained, compared and, if you say so, deleted."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hmlab.commands.output import Json, flat, print_json, print_table, say, size
from hmlab.commands.settings import Refusal

if TYPE_CHECKING:
    from hmlab.runs import Store

app = typer.Typer(no_args_is_help=True, help="List, show, compare, export and delete runs.")
Folder = Annotated[Path | None, typer.Option("--runs", help="Folder of the runs.", show_default="HMLAB_RUNS or ./runs")]
Id = Annotated[str, typer.Argument(help="A run; `hmlab runs list` names them.")]
LAST = ("loss", "train_loss", "valid_loss", "tokens_per_second", "memory_bytes", "elapsed")


def open_store(folder: Path | None) -> Store:
    """The store in that folder, or in the default one."""
    from hmlab.runs import Store

    return Store(folder)


@app.command("list")
def list_runs(runs: Folder = None, json: Json = False) -> None:
    """All runs, the newest first."""
    store = open_store(runs)
    rows = [asdict(info) for info in store.list()]
    if json:
        print_json(rows)
        return
    columns = ("id", "state", "step", "steps", "parameters", "updated")
    print_table(columns, [[row[column] for column in columns] for row in rows])
    say(f"{len(rows)} runs, {size(store.usage())} in {store.folder}")


@app.command()
def show(run: Id, runs: Folder = None, json: Json = False) -> None:
    """Everything that is known of a run, and its last numbers."""
    opened = open_store(runs).open(run)
    facts = {**opened.info, "last": last(opened.metrics())}
    if json:
        print_json(facts)
        return
    print_table([run, ""], flat(facts))


@app.command()
def compare(
    chosen: Annotated[list[str], typer.Argument(metavar="RUN...", help="Two runs or more.")],
    runs: Folder = None,
    json: Json = False,
) -> None:
    """Runs side by side: their last numbers, and the best loss on the validation split."""
    if len(chosen) < 2:
        raise Refusal(f"runs: expected two or more to compare, got {len(chosen)}")
    store = open_store(runs)
    together = store.compare(chosen)
    rows = []
    for run in chosen:
        info, numbers = store.open(run).info, together.sel(run=run)
        best = float(numbers["valid_loss"].min())
        rows.append(
            {"run": run, "step": info["step"], "parameters": info["parameters"],
             "best_valid_loss": best, **last(numbers)}
        )  # fmt: skip
    if json:
        print_json(rows)
        return
    # Runs are columns: there are more numbers than runs.
    names = [name for name in rows[0] if name != "run"]
    print_table(["", *chosen], [[name.replace("_", " "), *(row[name] for row in rows)] for name in names])


@app.command()
def export(
    chosen: Annotated[list[str], typer.Argument(metavar="RUN...", help="Finished runs.")],
    to: Annotated[Path, typer.Option(help="NAME.csv for the evaluations of all, NAME.safetensors for one model.")],
    runs: Folder = None,
) -> None:
    """Keep what runs found: their evaluations as a table, or a model as one file, each with its provenance."""
    store = open_store(runs)
    opened = [store.open(run) for run in chosen]
    if to.suffix == ".csv":
        from hmlab import results

        say(f"wrote {results.save(to.stem, *results.of_runs(opened), folder=to.parent)} and its .json")
    elif to.suffix == ".safetensors" and len(opened) == 1:
        from hmlab import pretrained

        model, encoding, _ = opened[0].pretrained()
        pretrained.save(to, model, encoding, opened[0].info)
        say(f"wrote {to}")
    else:
        raise Refusal(f"to: expected NAME.csv, or NAME.safetensors for a single run, got {to} for {len(chosen)} runs")


@app.command()
def delete(
    chosen: Annotated[list[str], typer.Argument(metavar="RUN...", help="The runs to delete.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    runs: Folder = None,
) -> None:
    """Delete runs with all their files."""
    store = open_store(runs)
    for run in chosen:
        store.open(run)
    if not yes and not typer.confirm(f"Delete {', '.join(chosen)}?", err=True):
        raise typer.Exit(1)
    for run in chosen:
        store.delete(run)
        say(f"deleted {run}")


def last(metrics: Any) -> dict[str, float]:
    """The last value of each number that has one."""
    values = {name: metrics[name].dropna("step") for name in LAST}
    return {name: float(series[-1]) for name, series in values.items() if series.size}
