"""`hmlab bench`: how fast layers and operations are, beside what one would run instead and beside their floor."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from hmlab.commands.output import Json, print_json, print_table, say, size
from hmlab.commands.settings import Refusal


def bench(
    suite: Annotated[list[str] | None, typer.Argument(help="Operators or suites; all of them without it.")] = None,
    seconds: Annotated[float, typer.Option(help="Time for each case and candidate.")] = 2.0,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; cuda where there is one.")] = None,
    save: Annotated[Path | None, typer.Option(help="Keep the figures in NAME.csv, with their provenance.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw them into NAME.html.")] = None,
    json: Json = False,
) -> None:
    """Measure; every figure beside the others of the same run, and beside the least the machine would need."""
    import torch
    from hmlab_kernels.bench import crossovers

    from hmlab import bench as benchmark
    from hmlab import bench_harmony

    for option, path, suffix in (("--save", save, ".csv"), ("--plot", plot, ".html")):
        if path is not None and path.suffix != suffix:
            raise Refusal(f"{option}: expected a name that ends in {suffix}, got {path}")
    if device not in (None, "cpu", "cuda"):
        raise Refusal(f"--device: expected cpu or cuda, got {device}")
    if device == "cuda" and not torch.cuda.is_available():
        raise Refusal("--device: cuda was asked for, and torch finds none")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dataset = benchmark.run(suite or (), device=device, seconds=seconds, progress=say)
    if save is not None:
        say(f"wrote {_save(dataset, save, device)} and its .json")
    if plot is not None:
        from hmlab import plots

        plots.bench(dataset).write_html(plot)
        say(f"wrote {plot}")
    rows, crossings = _rows(dataset), crossovers(dataset)
    growth = bench_harmony.exponents(dataset) if "cpu_seconds" in dataset else []
    if json:
        growth = [one._asdict() for one in growth]
        print_json({"machine": dataset.attrs, "rows": rows, "crossovers": crossings, "exponents": growth})
        return
    columns = ["case", "candidate", "median ms", "quartiles ms", "x floor", "x first", "A/A noise", "peak memory",
               "of tensors", "J/token"]  # fmt: skip
    print_table(
        columns,
        [
            (
                row["case"],
                row["candidate"],
                1e3 * row["median"],
                f"{1e3 * row['low']:.4g} to {1e3 * row['high']:.4g}",
                row["times_floor"],
                row["times_first"],
                row["noise"],
                *(size(row[name]) if row[name] == row[name] else None for name in ("peak_bytes", "tensor_bytes")),
                row["joules_per_token"] if row["joules_per_token"] == row["joules_per_token"] else None,
            )
            for row in rows
        ],
    )
    if crossings:
        print_table(["candidate", "wins over", "from length", "in"],
                    [(c["candidate"], c["against"], c["length"], c["kind"]) for c in crossings])  # fmt: skip
    if growth:
        print_table(["op", "candidate", "exponent of processor time", "95 % from", "to"], growth)


_NUMBERS = ("median", "low", "high", "peak_bytes", "joules_per_token", "floor", "noise")


def _rows(dataset: Any) -> list[dict[str, Any]]:
    """A row for each case and candidate measured. times_first: its median over that of the case's first one."""
    rows = []
    for case in dataset["case"].values:
        measured = dataset.sel(case=case).dropna("candidate", subset=["median"])
        for candidate in measured["candidate"].values:
            numbers = measured.sel(candidate=candidate)
            row = {"case": str(case), "candidate": str(candidate)}
            row |= {name: float(numbers[name]) for name in _NUMBERS}
            row["tensor_bytes"] = float(numbers.get("tensor_bytes", math.nan))
            row["times_floor"] = row["median"] / row["floor"]
            row["times_first"] = row["median"] / float(measured["median"][0])
            rows.append(row)
    return rows


def _save(dataset: Any, path: Path, device: str) -> Path:
    import torch

    from hmlab import results
    from hmlab.provenance import provenance

    origin = {**dataset.attrs, **provenance(torch.device(device))}
    return results.save(path.stem, dataset.drop_vars("seconds"), origin, folder=path.parent)
