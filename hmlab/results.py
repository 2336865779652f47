"""Small results that are part of the project: a table as CSV, and beside it where every number comes from.

`data/results/NAME.csv` with `NAME.json` (dims, units, provenance) was measured by hmlab; `data/published/NAME.csv`
is what a paper or its authors reported, with the place in `NAME.json`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hmlab import atomic
from hmlab.assets import assets_root
from hmlab.registry import UnknownName

if TYPE_CHECKING:
    import xarray as xr

    from hmlab.runs import Run

_ORIGIN = ("commit", "dirty", "versions", "platform", "device", "threads", "implementations", "command", "experiment",
           "corpus", "started", "duration")  # fmt: skip


def names() -> list[str]:
    """Results that hmlab measured and keeps."""
    return sorted(path.stem for path in (assets_root() / "data" / "results").glob("*.csv"))


def load(name: str, *, folder: str | Path | None = None) -> xr.Dataset:
    """A result by name; `attrs["provenance"]` says how it came to be."""
    return _read(Path(folder) if folder is not None else assets_root() / "data" / "results", name)


def published(name: str) -> xr.Dataset:
    """What others reported; `attrs["provenance"]` says where."""
    return _read(assets_root() / "data" / "published", name)


def of_runs(runs: Sequence[Run]) -> tuple[xr.Dataset, dict[str, Any]]:
    """The evaluations of finished runs, dims run and step, and their provenance.

    Raises ValueError naming a run that is not finished.
    """
    import xarray as xr

    origins = {}
    for run in runs:
        info = run.info
        if info["state"] != "finished":
            raise ValueError(f"runs: expected finished runs, {run.id} is {info['state']}")
        origins[run.id] = {key: info[key] for key in _ORIGIN}
    curves = [run.metrics()[["train_loss", "valid_loss"]].dropna("step", how="all") for run in runs]
    together = xr.concat(curves, xr.Variable("run", list(origins)), join="outer")
    # What all runs share is said once.
    first = next(iter(origins.values()))
    shared = {key: first[key] for key in _ORIGIN if all(origin[key] == first[key] for origin in origins.values())}
    each = {run: {k: v for k, v in origin.items() if k not in shared} for run, origin in origins.items()}
    return together, {**dict.fromkeys(("commit", "versions", "device", "command"), "see runs"), **shared, "runs": each}


def save(name: str, dataset: xr.Dataset, provenance: Mapping[str, Any], *, folder: str | Path | None = None) -> Path:
    """Write a Dataset as `NAME.csv` and `NAME.json`; rows in which everything is missing are left out.

    Raises ValueError without provenance: a number whose origin is unknown is not kept.
    """
    if not provenance:
        raise ValueError("provenance: expected where the numbers come from, got nothing")
    folder = Path(folder) if folder is not None else assets_root() / "data" / "results"
    about = {
        "dims": list(map(str, dataset.dims)),
        "variables": {str(v): dict(dataset[v].attrs) for v in [*dataset.dims, *dataset.data_vars] if v in dataset},
        "provenance": dict(provenance),
    }
    table = dataset.to_dataframe(dim_order=about["dims"]).dropna(how="all")
    target = folder / f"{name}.csv"
    atomic.write_bytes(target.with_suffix(".json"), (json.dumps(about, indent=1) + "\n").encode())
    atomic.write_bytes(target, table.to_csv().encode())
    return target


def _read(folder: Path, name: str) -> xr.Dataset:
    import pandas

    table = folder / f"{name}.csv"
    if not table.is_file():
        raise UnknownName("result", name, [path.stem for path in folder.glob("*.csv")])
    about = json.loads(table.with_suffix(".json").read_text())
    dataset = pandas.read_csv(table).set_index(about["dims"]).to_xarray()
    for variable, attributes in about["variables"].items():
        dataset[variable].attrs.update(attributes)
    return dataset.assign_attrs(provenance=about["provenance"])
