"""A measure's numbers: rows of a stored table or a function's result, seed by seed, and how far they can be trusted.

Interval of a mean over two seeds or more: percentiles 2.5 and 97.5 of means of seeds drawn with replacement, the same
draws each time. Slope of log y over log x, by least squares: half of its interval adds in squares the scatter about the
line (Student's t) and that of repeats about their median, from quartiles. Difference and ratio are seed by seed; where
both come from one run, the noise of both adds up. p is that of a sign-flip test over seeds, exact, two-sided.

Errors: Missing where the results do not hold what is asked for; ClaimError where the query cannot be right.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from hmlab import results
from hmlab.assets import assets_root
from hmlab.claims import computed, schema, texts
from hmlab.registry import UnknownName

FUNCTIONS = computed.FUNCTIONS | texts.FUNCTIONS
DRAWS = 10_000
MOST_SIGNS = 16  # seeds up to which all signs are tried
# Student's t, 97.5 %, from one degree of freedom on.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


class ClaimError(ValueError):
    """The ledger is not as it must be; one line."""


class Missing(Exception):
    """There is nothing to compute it from; one line that says what is missing. installed: no library is."""

    installed = True


class NotInstalled(Missing):
    installed = False


@dataclass(frozen=True, kw_only=True)
class Sample:
    """values: by seed, under "" what is not repeated. noise: half-width that A/A repeats show, in the same unit.
    half: of a fitted number's own interval. paired: a difference over seeds."""

    values: Mapping[str, float]
    noise: float = 0.0
    half: float = 0.0
    paired: bool = False

    @property
    def mean(self) -> float:
        return float(np.mean(list(self.values.values())))

    def interval(self, noise: float = 0.0) -> tuple[float, float]:
        """95 %, widened by the sample's noise and by `noise`."""
        values = np.array(list(self.values.values()))
        low, high = values.mean() - self.half, values.mean() + self.half
        if len(values) > 1:
            draws = np.random.default_rng(0).integers(0, len(values), (DRAWS, len(values)))
            low, high = np.percentile(values[draws].mean(1), (2.5, 97.5))
        return float(low) - self.noise - noise, float(high) + self.noise + noise

    @property
    def p_value(self) -> float | None:
        """Of a mean as far from zero, if signs were chance; None where that is not the question."""
        values = np.array(list(self.values.values()))
        if not self.paired or not 2 <= len(values) <= MOST_SIGNS:
            return None
        means = np.array(list(product((-1, 1), repeat=len(values)))) @ values
        return float((np.abs(means) >= abs(values.sum()) * (1 - 1e-12)).mean())


@dataclass
class Tables:
    """Stored tables as rows, read once. data: the folder that holds `results` and `published`."""

    data: Path = field(default_factory=lambda: assets_root() / "data")
    _kept: dict[tuple[str, str], pd.DataFrame] = field(default_factory=dict)

    def rows(self, name: str, kind: str = "results") -> pd.DataFrame:
        if (kind, name) not in self._kept:
            if not (self.data / kind / f"{name}.csv").is_file():
                raise Missing(f"no table {name} in data/{kind}")
            self._kept[kind, name] = results.load(name, folder=self.data / kind).to_dataframe().reset_index()
        return self._kept[kind, name]

    def digest(self, source: str) -> str:
        """Of `results/NAME`, `published/NAME` or `function/NAME`: sha256 of table and origin, or of the source."""
        kind, _, name = source.partition("/")
        if kind == "function":
            return hashlib.sha256(inspect.getsource(_function(name)).encode()).hexdigest()
        files = (self.data / kind / f"{name}{suffix}" for suffix in (".csv", ".json"))
        return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def sources(measure: Any) -> Iterator[str]:
    """What a measure is computed from, as `Tables.digest` takes it."""
    match measure:
        case schema.Rows(result=name):
            yield f"results/{name}"
        case schema.Published(published=name):
            yield f"published/{name}"
        case schema.Computed(function=name):
            yield f"function/{name}"
        case _:
            for part in _parts(measure):
                yield from sources(part)


def evaluate(measure: Any, tables: Tables) -> Sample:
    """The numbers of a measure."""
    match measure:
        case schema.Rows():
            return _rows(measure, tables)
        case schema.Published():
            found = _select(tables.rows(measure.published, "published"), measure)[measure.column].unique()
            if len(found) != 1:
                raise ClaimError(f"{measure.published}: expected one row where {measure.where}, got {len(found)}")
            return Sample(values={"": float(found[0])})
        case schema.Computed():
            return Sample(values={"": _call(measure.function, measure.arguments)})
        case schema.Number():
            return Sample(values={"": measure.number})
    parts = [evaluate(part, tables) for part in _parts(measure)]
    match measure:
        case schema.Difference():
            paired = all("" not in part.values for part in parts)
            return _together(parts, lambda a, b: a - b, sum(part.noise for part in parts), paired)
        case schema.Ratio():
            apart = _together(parts, lambda a, b: a / b, 0.0)
            shares = sum(part.noise / abs(part.mean) for part in parts if part.noise)
            return Sample(values=apart.values, noise=abs(apart.mean) * shares)
        case schema.Least():
            return _together(parts, min, max(part.noise for part in parts))
        case schema.Most():
            return _together(parts, max, max(part.noise for part in parts))
    raise ClaimError(f"measure: expected one of {sorted(schema._KINDS)}, got {type(measure).__name__}")


def _parts(measure: Any) -> list[Any]:
    for name in ("difference", "ratio", "least", "most"):
        if hasattr(measure, name):
            return getattr(measure, name)
    return []


def _together(parts: list[Sample], how: Callable[..., float], noise: float, paired: bool = False) -> Sample:
    """Seed by seed; what has no seeds goes with each."""
    if any(part.half for part in parts):
        raise ClaimError("exponent: expected by itself, got it inside another measure")
    seeded = [set(part.values) for part in parts if "" not in part.values]
    seeds = sorted(set.intersection(*seeded)) if seeded else [""]
    if not seeds:
        raise Missing("the tables have no seed in common")
    values = {seed: float(how(*(part.values.get(seed, part.values.get("")) for part in parts))) for seed in seeds}
    return Sample(values=values, noise=noise, paired=paired)


def _select(rows: pd.DataFrame, query: schema.Rows | schema.Published) -> pd.DataFrame:
    name = getattr(query, "result", None) or query.published
    wanted = [query.column, *query.where]
    if isinstance(query, schema.Rows):
        wanted += [*query.by, *query.quartiles, *(n for n in (query.seeds, query.along, query.noise) if n)]
    for column in wanted:
        if column not in rows:
            raise ClaimError(f"{name}: expected a column of {sorted(map(str, rows))}, got {column!r}")
    keep = rows[query.column].notna()
    for column, value in query.where.items():
        found = rows[column]
        if isinstance(value, schema.Between):
            keep &= found.between(-np.inf if value.least is None else value.least,
                                  np.inf if value.most is None else value.most)  # fmt: skip
        else:
            keep &= found.isin(value if isinstance(value, list) else [value])
    if not keep.any():
        raise Missing(f"no row of {name} where {_said(query.where)}")
    for column, value in query.where.items():
        absent = [one for one in value if one not in set(rows.loc[keep, column])] if isinstance(value, list) else []
        if absent:
            raise Missing(f"no row of {name} where {column} is {absent[0]}")
    return rows[keep]


def _rows(query: schema.Rows, tables: Tables) -> Sample:
    rows = _select(tables.rows(query.result), query)
    if query.reduce == "exponent":
        return _exponent(rows, query)
    values = {}
    for seed, of_seed in rows.groupby(query.seeds) if query.seeds else [("", rows)]:
        groups = [group for _, group in of_seed.groupby(query.by)] if query.by else [of_seed]
        values[str(seed)] = float(np.mean([float(_reduced(group, query)) for group in groups]))
    noise = 0.0
    if query.noise:
        noise = float((rows[query.noise] * rows[query.column].abs()).max())
    return Sample(values=values, noise=0.0 if np.isnan(noise) else noise)


def _reduced(rows: pd.DataFrame, query: schema.Rows) -> np.generic:
    column = rows[query.column]
    match query.reduce:
        case "only":
            if column.nunique() != 1:
                raise ClaimError(f"{query.result}: expected one {query.column} where {_said(query.where)}, "
                                 f"got {column.nunique()}")  # fmt: skip
            return column.iloc[0]
        case "mean":
            return column.mean()
        case "least":
            return column.min()
        case "most":
            return column.max()
        case "spread":
            return column.max() / column.min()
    ordered = rows.sort_values(query.along)
    if not ordered[query.along].min() <= query.at <= ordered[query.along].max():
        raise Missing(f"{query.result}: {query.along} does not reach {query.at}")
    return np.float64(np.interp(query.at, ordered[query.along], ordered[query.column]))


def _exponent(rows: pd.DataFrame, query: schema.Rows) -> Sample:
    if len(rows) < 3:
        raise Missing(f"{query.result} has {len(rows)} rows for an exponent, which takes three")
    if rows[query.along].nunique() != len(rows):
        raise ClaimError(f"{query.result}: expected each row at a {query.along} of its own where {_said(query.where)}")
    x, y = (np.log(rows[name].to_numpy(float)) for name in (query.along, query.column))
    x = x - x.mean()
    slope, freedom = float(x @ y / (x @ x)), len(x) - 2
    residual = y - y.mean() - slope * x
    half = _T[min(freedom, len(_T)) - 1] * np.sqrt(residual @ residual / freedom / (x @ x))
    if query.quartiles:
        low, high = (np.log(rows[name].to_numpy(float)) for name in query.quartiles)
        half = np.hypot(half, 1.96 * np.sqrt(x**2 @ ((high - low) / 1.349) ** 2) / (x @ x))
    return Sample(values={"": slope}, half=float(half))


def _function(name: str) -> Callable[..., float]:
    if name not in FUNCTIONS:
        raise UnknownName("function of the ledger", name, FUNCTIONS)
    return FUNCTIONS[name]


def _call(name: str, arguments: Mapping[str, Any]) -> float:
    function = _function(name)
    try:
        inspect.signature(function).bind(**arguments)
    except TypeError as error:
        raise ClaimError(f"{name}: {error}") from None
    try:
        return float(function(**arguments))
    except ModuleNotFoundError as error:
        raise NotInstalled(f"{name} needs {error.name}, which is not installed") from None


def _said(where: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} is {value}" for name, value in where.items()) or "anything"
