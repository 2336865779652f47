"""`hmlab bench`: how fast layers and operations are, beside what one would run instead and beside their floor."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hmlab.commands.output import Json, print_json, print_table, say, size
from hmlab.commands.settings import Refusal


def bench(
    suite: Annotated[list[str] | None, typer.Argument(help="Suites; all of them without it.")] = None,
    seconds: Annotated[float, typer.Option(help="Time for each case and candidate.")] = 2.0,
    save: Annotated[Path | None, typer.Option(help="Keep the figures in NAME.csv, with their provenance.")] = None,
    json: Json = False,
) -> None:
    """Measure; every figure beside the others of the same run, and beside the least the machine would need."""
    from hmlab import bench as benchmark

    if save is not None and save.suffix != ".csv":
        raise Refusal(f"--save: expected a name that ends in .csv, got {save}")
    dataset = benchmark.run(suite or (), seconds=seconds, progress=say)
    if save is not None:
        say(f"wrote {_save(dataset, save)} and its .json")
    rows = _rows(dataset)
    if json:
        print_json({"machine": dataset.attrs, "rows": rows})
        return
    print_table(
        ["case", "candidate", "median ms", "quartiles ms", "x floor", "x first", "peak memory"],
        [
            (
                row["case"],
                row["candidate"],
                1e3 * row["median"],
                f"{1e3 * row['low']:.4g} to {1e3 * row['high']:.4g}",
                row["times_floor"],
                row["times_first"],
                size(row["peak_bytes"]) if row["peak_bytes"] == row["peak_bytes"] else None,
            )
            for row in rows
        ],
    )


def _rows(dataset: Any) -> list[dict[str, Any]]:
    """A row for each case and candidate measured. times_first: its median over that of the case's first one."""
    rows = []
    for case in dataset["case"].values:
        measured = dataset.sel(case=case).dropna("candidate", subset=["median"])
        for candidate in measured["candidate"].values:
            numbers = measured.sel(candidate=candidate)
            row = {"case": str(case), "candidate": str(candidate)}
            row |= {name: float(numbers[name]) for name in ("median", "low", "high", "peak_bytes", "floor")}
            row["times_floor"] = row["median"] / row["floor"]
            row["times_first"] = row["median"] / float(measured["median"][0])
            rows.append(row)
    return rows


def _save(dataset: Any, path: Path) -> Path:
    import torch

    from hmlab import results
    from hmlab.provenance import provenance

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return results.save(
        path.stem, dataset.drop_vars("seconds"), {**dataset.attrs, **provenance(device)}, folder=path.parent
    )
