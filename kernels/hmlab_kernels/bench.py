"""Side-by-side measurement: candidates of one case run in turn, medians, ratios, and the floor beside every figure.

    measure([Case("L 2048", {"native": run_a, "eager": run_b}, bytes=..., flops=...)]) -> xarray.Dataset

The floor of a case is the larger of its bytes over the copy bandwidth and its flops over the matrix-product rate,
both measured in the same run. No figure stands alone: machines are noisy, ratios within a run are less so. What tells
a candidate's even rounds from its odd ones is its noise floor (A/A): differences of that size mean nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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


def measure(cases: Sequence[Case], *, device: str = "cpu", seconds: float = 2.0, least: int = 6, most: int = 200,
            progress: Callable[[str], None] = lambda _: None):
    """Time every candidate of every case, interleaved within the case.

    seconds: time to spend per case and candidate, as far as `least` and `most` repeats allow. Returns a Dataset with
    dims case, candidate, repeat: `seconds`, and `median`, `low`, `high` (quartiles), `peak_bytes`, `joules_per_token`
    (NaN without a readable meter), `noise` (by what share the medians of even and odd rounds differ), and of each case
    `floor`, `bytes`, `flops`.
    """
    import xarray as xr

    names = list(dict.fromkeys(name for case in cases for name in case.runs))
    bandwidth, read = _machine.copy_bandwidth(device), _machine.meter(device)
    rates = {dtype: _machine.matmul_rate(device, dtype) for dtype in sorted({case.dtype for case in cases})}
    taken = np.full((len(cases), len(names), most), np.nan)
    peak, energy, noise = np.full((3, len(cases), len(names)), np.nan)
    for c, case in enumerate(cases):
        progress(case.name)
        for name, run in case.runs.items():
            run()  # compile, allocate, fill caches
            peak[c, names.index(name)] = _machine.peak_bytes(run, device)
        spent, repeat = 0.0, 0
        while repeat < most and (repeat < least or spent < seconds * len(case.runs)):
            for name, run in case.runs.items():
                took = taken[c, names.index(name), repeat] = _machine.seconds(run, device)
                spent += took
            repeat += 1
        for name, run in case.runs.items():
            n = names.index(name)
            noise[c, n] = abs(np.median(taken[c, n, :repeat:2]) / np.median(taken[c, n, 1:repeat:2]) - 1)
            energy[c, n] = _machine.joules(run, device, read) / max(case.tokens, 1)
    used = int((~np.isnan(taken)).any((0, 1)).sum())
    taken = taken[:, :, :used]
    floor = [max(case.bytes / bandwidth, case.flops / rates[case.dtype]) for case in cases]
    quartiles = np.full((3, len(cases), len(names)), np.nan)
    present = ~np.isnan(taken).all(-1)
    quartiles[:, present] = np.nanpercentile(taken[present], (25, 50, 75), axis=-1)
    both = ("case", "candidate")
    second = {"units": "s"}
    return xr.Dataset(
        {
            "seconds": ((*both, "repeat"), taken, {"long_name": "time", **second}),
            "median": (both, quartiles[1], {"long_name": "median time", **second}),
            "low": (both, quartiles[0], {"long_name": "lower quartile", **second}),
            "high": (both, quartiles[2], {"long_name": "upper quartile", **second}),
            "peak_bytes": (both, peak, {"long_name": "peak memory", "units": "bytes"}),
            "joules_per_token": (both, energy, {"long_name": "energy per token", "units": "J"}),
            "noise": (both, noise, {"long_name": "noise floor (A/A)"}),
            "floor": ("case", floor, {"long_name": "floor", **second}),
            "bytes": ("case", [case.bytes for case in cases], {"units": "bytes"}),
            "flops": ("case", [case.flops for case in cases], {"units": "flop"}),
            "op": ("case", [case.op for case in cases]),
            "length": ("case", [case.length for case in cases], {"units": "tokens"}),
            "dtype": ("case", [case.dtype for case in cases]),
        },
        coords={"case": [case.name for case in cases], "candidate": names},
        attrs={
            "copy_bandwidth_bytes_per_s": bandwidth,
            **{f"matmul_flop_per_s_{dtype}": rate for dtype, rate in rates.items()},
            **_machine.facts(device),
        },
    )


def crossovers(measured) -> list[dict[str, str | float]]:
    """From which length on the first candidate of a kind of case beats each other one, among the lengths measured.

    A kind is the cases of one `op` that differ in length only (same name but for its figures after "L"). The length is
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
    import re

    kinds: dict[str, list[int]] = {}
    for number, name in enumerate(measured["case"].values):
        kinds.setdefault(re.sub(r"\bL [\d,]+", "L", str(name)), []).append(number)
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
