"""The machine under a benchmark: its names, its measured ceilings, its memory and, where readable, its energy meter."""

from __future__ import annotations

import gc
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch


def facts(device: str) -> dict[str, str | int | float]:
    """What the figures were measured on."""
    cpu = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    name = torch.cuda.get_device_name() if device == "cuda" else cpu
    return {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__,
            "python": platform.python_version(), "load_before": round(os.getloadavg()[0], 2)}  # fmt: skip


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(run: Callable[[], object], device: str) -> float:
    """How long a call takes, with all that it set going on the device."""
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def copy_bandwidth(device: str) -> float:
    """Bytes per second read and written by a copy far larger than any cache."""
    source = torch.ones(1 << (28 if device == "cuda" else 25), device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / min(seconds(lambda: target.copy_(source), device) for _ in range(7))


def matmul_rate(device: str, dtype: str = "float32") -> float:
    """Floating-point operations per second of a square matrix product of random numbers."""
    side = 8192 if device == "cuda" else 2048
    a = torch.randn(side, side, device=device).to(getattr(torch, dtype))
    a @ a
    return 2 * side**3 / min(seconds(lambda: a @ a, device) for _ in range(7))


def peak_bytes(run: Callable[[], object], device: str) -> float:
    """Memory that a call needs beyond what was held before it; NaN where the system does not tell."""
    gc.collect()
    if device == "cuda":
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


def meter(device: str) -> Callable[[], float] | None:
    """Reads the joules used so far by the device (NVML) or the processor package (RAPL); None where neither tells."""
    if device == "cuda":
        try:
            import pynvml

            pynvml.nvmlInit()
            handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties().uuid}")
            pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        except (ImportError, AttributeError, pynvml.NVMLError):
            return None
        return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3
    packages = sorted(Path("/sys/class/powercap").glob("intel-rapl:?/energy_uj"))
    try:
        for package in packages:
            package.read_text()
    except OSError:
        return None
    return (lambda: sum(int(package.read_text()) for package in packages) / 1e6) if packages else None


def joules(run: Callable[[], object], device: str, read: Callable[[], float] | None, least: float = 0.5) -> float:
    """Joules of one call, by repeating it for at least `least` seconds; NaN without a meter or when that wrapped."""
    if read is None:
        return float("nan")
    synchronize(device)
    before, start, calls = read(), time.perf_counter(), 0
    while time.perf_counter() - start < least:
        run()
        synchronize(device)
        calls += 1
    used = read() - before
    return used / calls if used >= 0 else float("nan")


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def _return_free_memory() -> None:
    import ctypes

    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError) as error:
        raise OSError("no malloc_trim on this system") from error
