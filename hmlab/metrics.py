"""The numbers of a run on disk: one Zarr group with the single dim `step`, written while others read it.

All arrays have their full length from the beginning, and a row is never written twice. The coordinate `step` is
written last and read first: a row is there when its step is.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hmlab import atomic

if TYPE_CHECKING:
    import xarray as xr

# Name -> dtype, long name, units. What is not there is NaN, or 0 for integers.
VARIABLES: dict[str, tuple[str, str, str]] = {
    "loss": ("float64", "training loss", "nats/token"),
    "train_loss": ("float64", "loss on the training split", "nats/token"),
    "valid_loss": ("float64", "loss on the validation split", "nats/token"),
    "gradient_norm": ("float64", "gradient norm", "1"),
    "learning_rate": ("float64", "learning rate", "1"),
    "tokens": ("int64", "tokens read", "tokens"),
    "tokens_per_second": ("float64", "speed", "tokens/s"),
    "memory_bytes": ("int64", "memory", "bytes"),
    "elapsed": ("float64", "time in training", "s"),
    "spike": ("int64", "spike (1: loss, 2: gradient norm, 3: both)", "1"),
}
CHUNK = 1024
# Looking on costs nobody more than this share of the time, and nothing is written more often than this.
SHARE = 0.015
INTERVAL = 0.25


class Pace:
    """Says when something that costs time is due again: after `interval` seconds, with at most `share` of them."""

    def __init__(self, interval: float, share: float) -> None:
        self._interval, self._share = interval, share
        self._cost, self._last = 0.0, time.monotonic()

    def due(self) -> bool:
        return time.monotonic() - self._last >= max(self._interval, self._cost / self._share)

    @contextmanager
    def spending(self) -> Iterator[None]:
        """Measure what is done inside, and count from its end."""
        began = time.monotonic()
        yield
        self._last = time.monotonic()
        self._cost = self._last - began


class Writer:
    """Adds rows to the metrics of one run. `steps` is how many there will be, `kept` how many rows stay.

    The chunks are plain bytes (`_encoding`), and new rows are written into them in place. Zarr would replace the
    whole chunk, which costs fifty times as much.
    """

    def __init__(self, path: Path, *, steps: int, kept: int = 0) -> None:
        import zarr

        if not path.exists():
            with atomic.new_folder(path) as partial:
                _empty(steps).to_zarr(partial, mode="w", zarr_format=3, consolidated=False, encoding=_encoding(steps))
        group = zarr.open_group(path, mode="r+", use_consolidated=False)
        recorded = rows(path)
        if group["step"].shape != (steps,):
            raise ValueError(f"steps: expected {group['step'].shape[0]} as in {path}, got {steps}")
        if recorded < kept:
            raise ValueError(f"kept: expected at most the {recorded} rows recorded in {path}, got {kept}")
        self._path, self._pace = path, Pace(INTERVAL, SHARE)
        self._size = min(CHUNK, steps)
        # A writer that died may have left rows without their step, in the chunk it was at.
        end = min((recorded // self._size + 1) * self._size, steps)
        for name in ["step", *VARIABLES]:
            group[name][kept:end] = _nothing(name)
        self._changed: set[str] = set()
        self._take(kept // self._size)
        first = self._chunk * self._size
        self._flushed = self._last = kept - first
        for name, column in self._rows.items():
            column[: self._last] = group[name][first:kept]

    def _take(self, chunk: int) -> None:
        """Go to a chunk that holds nothing yet."""
        self._chunk, self._flushed, self._last = chunk, 0, 0  # rows of this chunk: on disk, and added
        self._rows = {name: np.full(self._size, _nothing(name), _dtype(name)) for name in [*VARIABLES, "step"]}

    def add(self, row: Mapping[str, Any]) -> None:
        """Add the row of `row["step"]`; it is on disk after the next flush, which comes when it is due."""
        chunk, at = divmod(row["step"] - 1, self._size)
        if chunk != self._chunk:
            self.flush()
            self._take(chunk)
        for name, column in self._rows.items():
            column[at] = row[name]
            if row[name] != _nothing(name) and row[name] == row[name]:
                self._changed.add(name)
        self._last = at + 1
        if self._pace.due():
            self.flush()

    def flush(self, *, durable: bool = False) -> None:
        """Put all rows on disk, or, when durable, in such a way that they outlive the machine."""
        with self._pace.spending():
            for name in [*VARIABLES, "step"]:
                if name in self._changed:
                    self._write(self._path / name / "c" / str(self._chunk), self._rows[name])
            self._changed.clear()
            self._flushed = self._last
            if durable:
                atomic.sync(self._path)

    def _write(self, chunk: Path, rows: np.ndarray) -> None:
        if chunk.exists():
            with chunk.open("r+b") as file:
                file.seek(self._flushed * rows.itemsize)
                file.write(rows[self._flushed : self._last].tobytes())
        else:
            chunk.parent.mkdir(exist_ok=True)
            atomic.write_bytes(chunk, rows.tobytes(), durable=False)


def rows(path: Path) -> int:
    """How many rows there are."""
    import zarr

    if not path.exists():
        return 0
    return int(np.count_nonzero(zarr.open_array(path / "step", mode="r")[:]))


def read(path: Path) -> xr.Dataset:
    """All whole rows, also of a run that is being written; none if there is nothing yet."""
    import xarray as xr

    if not path.exists():
        return _empty(0)
    dataset = xr.open_zarr(path, consolidated=False, chunks=None)[list(VARIABLES)]
    return dataset.isel(step=slice(0, int(np.count_nonzero(dataset["step"].values)))).load()


def _empty(steps: int) -> xr.Dataset:
    import xarray as xr

    def column(name: str, dtype: str, long_name: str, units: str) -> tuple:
        # Broadcast: a million steps take no memory.
        nothing = np.broadcast_to(np.array(_nothing(name), dtype), steps)
        return "step", nothing, {"long_name": long_name, "units": units}

    columns = {name: column(name, *what) for name, what in VARIABLES.items()}
    return xr.Dataset(columns, coords={"step": column("step", "int64", "step", "1")})


def _encoding(steps: int) -> dict[str, dict[str, Any]]:
    from zarr.codecs import BytesCodec

    chunks = {"chunks": (min(CHUNK, steps),), "compressors": (), "serializer": BytesCodec(endian="little")}
    return dict.fromkeys([*VARIABLES, "step"], chunks)


def _dtype(name: str) -> np.dtype:
    return np.dtype(VARIABLES[name][0] if name in VARIABLES else "int64").newbyteorder("<")


def _nothing(name: str) -> float | int:
    return np.nan if name in VARIABLES and VARIABLES[name][0] == "float64" else 0
