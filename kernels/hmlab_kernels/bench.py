"""Side-by-side measurement: candidates of one case run in turn, medians, ratios, and the floor beside every figure.

    measure([Case("L 2048", {"native": run_a, "eager": run_b}, bytes=..., flops=...)]) -> xarray.Dataset

The floor of a case is the larger of its bytes over the copy bandwidth and its flops over the matrix-product rate,
both measured in the same run. No figure stands alone: machines are noisy, ratios within a run are not.
"""

from __future__ import annotations

import gc
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch


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


def measure(cases: Sequence[Case], *, seconds: float = 2.0, least: int = 5, most: int = 200,
            progress: Callable[[str], None] = lambda _: None):
    """Time every candidate of every case, interleaved within the case.

    seconds: time to spend per case and candidate, as far as `least` and `most` repeats allow. Returns a Dataset with
    dims case, candidate, repeat: `seconds`, and `peak_bytes`, `floor_seconds`, `median`, `low`, `high` (quartiles).
    """
    import xarray as xr

    names = list(dict.fromkeys(name for case in cases for name in case.runs))
    bandwidth, rate = copy_bandwidth(), matmul_rate()
    seconds_taken = np.full((len(cases), len(names), most), np.nan)
    peak = np.full((len(cases), len(names)), np.nan)
    for c, case in enumerate(cases):
        progress(case.name)
        for name, run in case.runs.items():
            run()  # compile, allocate, fill caches
            peak[c, names.index(name)] = peak_bytes(run)
        spent, repeat = 0.0, 0
        while repeat < most and (repeat < least or spent < seconds * len(case.runs)):
            for name, run in case.runs.items():
                taken = _time(run)
                seconds_taken[c, names.index(name), repeat] = taken
                spent += taken
            repeat += 1
    used = int((~np.isnan(seconds_taken)).any((0, 1)).sum())
    seconds_taken = seconds_taken[:, :, :used]
    floor = [max(case.bytes / bandwidth, case.flops / rate) for case in cases]
    quartiles = np.full((3, len(cases), len(names)), np.nan)
    present = ~np.isnan(seconds_taken).all(-1)
    quartiles[:, present] = np.nanpercentile(seconds_taken[present], (25, 50, 75), axis=-1)
    time_attributes = {"units": "s"}
    return xr.Dataset(
        {
            "seconds": (("case", "candidate", "repeat"), seconds_taken, {"long_name": "time", **time_attributes}),
            "median": (("case", "candidate"), quartiles[1], {"long_name": "median time", **time_attributes}),
            "low": (("case", "candidate"), quartiles[0], {"long_name": "lower quartile", **time_attributes}),
            "high": (("case", "candidate"), quartiles[2], {"long_name": "upper quartile", **time_attributes}),
            "peak_bytes": (("case", "candidate"), peak, {"long_name": "peak memory", "units": "bytes"}),
            "floor": ("case", floor, {"long_name": "floor", **time_attributes}),
            "bytes": ("case", [case.bytes for case in cases], {"units": "bytes"}),
            "flops": ("case", [case.flops for case in cases], {"units": "flop"}),
        },
        coords={"case": [case.name for case in cases], "candidate": names},
        attrs={"copy_bandwidth_bytes_per_s": bandwidth, "matmul_flop_per_s": rate, **machine()},
    )


def machine() -> dict[str, str | int]:
    """What the figures were measured on."""
    cpu = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu
    return {"device": device, "threads": torch.get_num_threads(), "torch": torch.__version__,
            "python": platform.python_version(), "load_before": round(os.getloadavg()[0], 2)}  # fmt: skip


def copy_bandwidth(device: str | torch.device = "cpu") -> float:
    """Bytes per second read and written by a copy far larger than any cache."""
    source = torch.ones(1 << 25, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / min(_time(lambda: target.copy_(source)) for _ in range(7))


def matmul_rate(device: str | torch.device = "cpu") -> float:
    """Floating-point operations per second of a float32 matrix product of 2048."""
    a = torch.ones(2048, 2048, device=device)
    a @ a
    return 2 * 2048**3 / min(_time(lambda: a @ a) for _ in range(7))


def peak_bytes(run: Callable[[], object]) -> float:
    """Memory that a call needs beyond what was held before it; NaN where the system does not tell."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        _return_free_memory()
        Path("/proc/self/clear_refs").write_text("5")  # the kernel's high-water mark starts anew
        before = _status("VmRSS")
        run()
        return max(_status("VmHWM") - before, 0)
    except OSError:
        return float("nan")


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def _return_free_memory() -> None:
    import ctypes

    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError) as error:
        raise OSError("no malloc_trim on this system") from error


def _time(run: Callable[[], object]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start
