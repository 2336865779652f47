"""`hmlab bench`: how fast each operation is, in every implementation that runs here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hmlab.commands.output import Json, print_json, print_table, say
from hmlab.commands.settings import Refusal
from hmlab.registry import UnknownName


def bench(
    op: Annotated[list[str] | None, typer.Argument(help="Operations; all of them without it.")] = None,
    case: Annotated[list[str], typer.Option("--case", help="Only these cases; repeatable.")] = [],  # noqa: B006
    save: Annotated[Path | None, typer.Option(help="Keep the measurements: a .zarr folder or an .nc file.")] = None,
    json: Json = False,
) -> None:
    """Measure the operations under the memories, case by case and implementation by implementation."""
    import hmlab_kernels
    from hmlab_kernels import bench as benchmark

    if save is not None and save.suffix not in (".zarr", ".nc"):
        raise Refusal(f"--save: expected a name that ends in .zarr or .nc, got {save.name!r}")
    for name in op or ():
        if name not in hmlab_kernels.OPS:
            raise UnknownName("operation", name, hmlab_kernels.OPS)
    dataset = benchmark.run(ops=op or None, cases=case or None)
    if save is not None:
        _save(dataset, save)
        say(f"saved {save}")
    rows = _rows(dataset)
    if json:
        print_json(rows)
    elif rows:
        print_table(list(rows[0]), [row.values() for row in rows])


def _rows(dataset: Any) -> list[dict[str, Any]]:
    """One row for each op, case and implementation that was measured."""
    frame = dataset.to_dataframe().reset_index().dropna(subset=list(dataset.data_vars), how="all")
    return [{str(key): value for key, value in row.items()} for row in frame.to_dict("records")]


def _save(dataset: Any, path: Path) -> None:
    partial = path.with_name(f".partial-{path.name}")
    if path.suffix == ".nc":
        dataset.to_netcdf(partial, engine="h5netcdf")
        partial.replace(path)
        return
    if path.exists():
        raise Refusal(f"--save: {path} is there already")
    dataset.to_zarr(partial, mode="w")
    partial.rename(path)
