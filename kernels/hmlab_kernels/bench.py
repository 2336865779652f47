"""Side-by-side measurement: candidates of one case run in turn, medians, ratios, and the floor beside every figure.

    measure([Case("L 2048", {"native": run_a, "eager": run_b}, bytes=..., flops=...)]) -> xarray.Dataset

The floor of a case is the larger of its bytes over the copy bandwidth and its flops over the matrix-product rate,
both measured in the same run. No figure stands alone: machines are noisy, ratios within a run are less so. What tells
a candidate's even rounds from its odd ones is its noise floor (A/A): differences of that size mean nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from . import _machine


@dataclass(frozen=True)
class Case:
    """name: what is run, with its sizes. runs: candidate -> callable. bytes, flops: what any candidate must move
    and compute at least, for the floor. op, length, dtype: what is measured, on how long a sequence; tokens: that one
    call serves, for the energy of each."""

    name: str
    runs: Mapping[str, Callable[[], object]]
    bytes: float
    flops: float
    op: str = ""
    length: int = 0
    tokens: int = 0
    dtype: str = "float32"


def measure(cases: Iterable[Case], *, device: str = "cpu", seconds: float = 2.0, least: int = 6, most: int = 200,
            progress: Callable[[str], None] = lambda _: None):
    """Time every candidate of every case, interleaved within the case.

    cases: taken one at a time, so that a generator of them holds the inputs of one only. seconds: time to spend per
    case and candidate, as far as `least` and `most` repeats allow. Returns a Dataset with dims case, candidate, repeat:
    `seconds`, and `median`, `low`, `high` (quartiles), `peak_bytes`, `joules_per_token` (NaN without a readable meter),
    `noise` (by what share the medians of even and odd rounds differ), and of each case `floor`, `bytes`, `flops`.
    """
    bandwidth, read = _machine.copy_bandwidth(device), _machine.meter(device)
    rates: dict[str, float] = {}
    measured = []
    for case in cases:
        progress(case.name)
        if case.dtype not in rates:
            rates[case.dtype] = _machine.matmul_rate(device, case.dtype)
        peak = {}
        for name, run in case.runs.items():
            run()  # compile, allocate, fill caches
            peak[name] = _machine.peak_bytes(run, device)
        taken = _interleaved(case.runs, device, seconds, least, most)
        energy = {n: _machine.joules(run, device, read) / max(case.tokens, 1) for n, run in case.runs.items()}
        floor = max(case.bytes / bandwidth, case.flops / rates[case.dtype])
        measured.append(_dataset(case, taken, peak, energy, floor))
    if not measured:
        raise ValueError("cases: expected at least one, got none")
    return _together(measured).assign_attrs(
        copy_bandwidth_bytes_per_s=bandwidth,
        **{f"matmul_flop_per_s_{dtype}": rate for dtype, rate in rates.items()},
        **_machine.facts(device),
    )


def _interleaved(runs: Mapping[str, Callable[[], object]], device: str, seconds: float, least: int, most: int
                 ) -> np.ndarray:
    """Times `[candidate, repeat]`, the candidates taking turns."""
    taken: list[list[float]] = [[] for _ in runs]
    spent, repeat = 0.0, 0
    while repeat < most and (repeat < least or spent < seconds * len(runs)):
        for times, run in zip(taken, runs.values(), strict=True):
            times.append(_machine.seconds(run, device))
            spent += times[-1]
        repeat += 1
    return np.array(taken)


def _dataset(case: Case, taken: np.ndarray, peak: Mapping[str, float], energy: Mapping[str, float], floor: float):
    import xarray as xr

    low, median, high = np.percentile(taken, (25, 50, 75), axis=1)
    noise = abs(np.median(taken[:, ::2], axis=1) / np.median(taken[:, 1::2], axis=1) - 1)
    second = {"units": "s"}
    of_candidate = {
        "median": (median, {"long_name": "median time", **second}),
        "low": (low, {"long_name": "lower quartile", **second}),
        "high": (high, {"long_name": "upper quartile", **second}),
        "peak_bytes": (list(peak.values()), {"long_name": "peak memory", "units": "bytes"}),
        "joules_per_token": (list(energy.values()), {"long_name": "energy per token", "units": "J"}),
        "noise": (noise, {"long_name": "noise floor (A/A)"}),
    }
    of_case = {
        "floor": (floor, {"long_name": "floor", **second}),
        "bytes": (float(case.bytes), {"units": "bytes"}),
        "flops": (float(case.flops), {"units": "flop"}),
        "op": (case.op, {}),
        "length": (case.length, {"units": "tokens"}),
        "dtype": (case.dtype, {}),
    }
    return xr.Dataset(
        {
            "seconds": (("candidate", "repeat"), taken, {"long_name": "time", **second}),
            **{name: ("candidate", *value) for name, value in of_candidate.items()},
            **{name: ((), *value) for name, value in of_case.items()},
        },
        coords={"candidate": list(case.runs), "case": case.name},
    )


def _together(measured: Sequence):
    """One Dataset of all cases; what a case has not measured is missing."""
    import xarray as xr

    candidates = list(dict.fromkeys(str(name) for one in measured for name in one["candidate"].values))
    most = max(one.sizes["repeat"] for one in measured)
    padded = [one.pad(repeat=(0, most - one.sizes["repeat"])).reindex(candidate=candidates) for one in measured]
    return xr.concat(padded, "case", data_vars="all", coords="minimal", compat="equals", join="exact")


def crossovers(measured) -> list[dict[str, str | float]]:
    """From which length on the first candidate of a kind of case beats each other one, among the lengths measured.

    A kind is the cases whose names are the same but for their length. The length is
    interpolated between two measured ones on logarithmic axes; 0 if it wins from the shortest on, inf if it never
    does. A difference inside the noise floor is not a win.
    """
    found = []
    for kind, chosen in _kinds(measured).items():
        lengths = measured["length"].values[chosen]
        order = np.argsort(lengths)
        chosen, lengths = np.asarray(chosen)[order], lengths[order]
        medians = measured["median"].values[chosen]
        names = measured["candidate"].values
        ours = next((n for n in range(len(names)) if not np.isnan(medians[:, n]).any()), None)
        if ours is None:
            continue
        for rival in range(len(names)):
            both = ~np.isnan(medians[:, rival])
            if rival == ours or both.sum() < 2:
                continue
            advantage = np.log(medians[both, rival] / medians[both, ours])
            noise = np.log1p(measured["noise"].values[chosen][both][:, [ours, rival]].max(1))
            found.append({"kind": kind, "candidate": str(names[ours]), "against": str(names[rival]),
                          "length": _crossing(lengths[both], advantage - noise)})  # fmt: skip
    return found


def _kinds(measured) -> dict[str, list[int]]:
    kinds: dict[str, list[int]] = {}
    for number, (name, length) in enumerate(zip(measured["case"].values, measured["length"].values, strict=True)):
        kind = str(name).replace(f"{length:,}", "n").replace(str(length), "n")
        kinds.setdefault(kind, []).append(number)
    return kinds


def _crossing(lengths: np.ndarray, advantage: np.ndarray) -> float:
    losing = np.flatnonzero(advantage <= 0)
    if not len(losing):
        return 0.0
    last = losing[-1]
    if last == len(lengths) - 1:
        return float("inf")
    share = -advantage[last] / (advantage[last + 1] - advantage[last])
    return float(np.exp(np.log(lengths[last]) + share * np.log(lengths[last + 1] / lengths[last])))
