"""Which implementation serves a call: explicit by `impl=`, else by device; always on record, never changed silently.

reference: the specification, any device. eager: vectorised PyTorch, any device. native: C++, CPU. fused: Triton, CUDA,
or the CPU under Triton's interpreter (TRITON_INTERPRET=1), which is for checking, not for speed.
"""

from __future__ import annotations

import os
import warnings
from importlib.util import find_spec

import torch

from . import _native

# The order of preference per device; the first that the operator has and the machine can run is the default.
_PREFERENCE = {"cpu": ("native", "eager", "reference"), "meta": ("native", "eager", "reference"),
               "cuda": ("fused", "eager", "reference")}  # fmt: skip
_ELSEWHERE = ("eager", "reference")
_HALF = (torch.float32, torch.bfloat16, torch.float16)
_used: dict[str, str] = {}
# Looked up once, so that torch.compile sees constants.
_NO_COMPILER = _native.compiler() is None
_NO_TRITON = find_spec("triton") is None
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def used() -> dict[str, str]:
    """Operator -> implementation of its latest call, e.g. `{"tree_attention": "native"}`; part of a run's record."""
    return dict(_used)


def reset_used() -> None:
    """Forget which implementations were used so far."""
    _used.clear()


def preferred(available: tuple[str, ...], device_type: str, dtype: torch.dtype = torch.float32) -> str:
    """The implementation taken on a device, of those an operator has, when none is named."""
    for impl in _PREFERENCE.get(device_type, _ELSEWHERE):
        if impl not in available:
            continue
        if impl == "native" and _NO_COMPILER:
            _warn_once("no C++ compiler found, so CPU operators run as 'eager' PyTorch (slower); "
                       "install g++ for the native ones")  # fmt: skip
            continue
        if impl == "fused" and _NO_TRITON:
            _warn_once("no triton found, so CUDA operators run as 'eager' PyTorch (slower); install triton")
            continue
        if impl == "fused" and dtype not in _HALF:  # Triton's matrix units stop at float32
            continue
        return impl
    raise ValueError(f"impl: none of {list(available)} runs on {device_type}")


def choose(op: str, impl: str | None, device_type: str, available: tuple[str, ...],
           dtype: torch.dtype = torch.float32) -> str:
    """Resolve `impl` for a call on a device and put it on record.

    Raises ValueError when `impl` is not one of `available` or cannot run on that device or dtype.
    """
    if impl is None:
        impl = preferred(available, device_type, dtype)
    elif impl not in available:
        raise ValueError(f"impl: {op} expected one of {list(available)}, got {impl!r}")
    elif impl == "native" and device_type not in ("cpu", "meta"):
        raise ValueError(f"impl: {op} 'native' runs on cpu, got tensors on {device_type}")
    elif impl == "native" and _NO_COMPILER:
        raise RuntimeError(f"impl: {op} 'native' needs a C++ compiler (g++ or clang++ on PATH, or CXX), none was found")
    elif impl == "fused":
        if _NO_TRITON:
            raise RuntimeError(f"impl: {op} 'fused' needs triton, which is not installed")
        if device_type == "cpu" and not _INTERPRETED:
            raise ValueError(f"impl: {op} 'fused' runs on cuda (on cpu only with TRITON_INTERPRET=1), got cpu tensors")
        if dtype not in _HALF:
            raise ValueError(f"impl: {op} 'fused' expected float32, bfloat16 or float16, got {dtype}")
    _used[op] = impl
    return impl


_warned: set[str] = set()


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(f"hmlab: {message}", stacklevel=5)
