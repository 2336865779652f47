"""C++ sources beside an operator, compiled once for this machine and loaded through ctypes.

The library is cached under the user's cache folder by the hash of source, flags, compiler and processor, so a
changed machine or source is compiled again (a second or two) and nothing stale is ever loaded.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

# No -ffast-math: infinities and NaN must pass through, and exp() relies on the order of its operations.
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-fno-math-errno", "-shared", "-fPIC")

_HEADERS = Path(__file__).parent  # what several sources include


@functools.cache
def compiler() -> str | None:
    """Path of the C++ compiler: CXX if set, else g++ or clang++ on PATH; None without one."""
    for name in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        if name and (path := shutil.which(name)):
            return path
    return None


@functools.cache
def library(source: Path) -> ctypes.CDLL:
    """Compile `source` unless that was done before, and load it. Raises RuntimeError with the compiler's words."""
    cxx = compiler()
    if cxx is None:
        raise RuntimeError(f"{source.name}: a C++ compiler is needed (g++ or clang++ on PATH, or CXX), none was found")
    version = subprocess.run([cxx, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]
    shared = [header.read_text() for header in sorted(_HEADERS.glob("*.hpp"))]
    identity = "\0".join([source.read_text(), *shared, *_FLAGS, version, _processor()])
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hmlab" / "native"
    target = folder / f"{source.parent.name}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, suffix=".so", delete=False) as partial:
            pass
        command = [cxx, *_FLAGS, f"-I{_HEADERS}", str(source), "-o", partial.name]
        built = subprocess.run(command, capture_output=True, text=True)
        if built.returncode:
            os.unlink(partial.name)
            raise RuntimeError(f"{source.name}: {cxx} failed:\n{built.stderr.strip()}")
        os.replace(partial.name, target)
    return ctypes.CDLL(str(target))


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    except OSError:
        return platform.processor() + platform.machine()


def call(source: Path, name: str, *arguments: Tensor | Sequence[int] | float | None) -> None:
    """Call a function of a source: tensors (contiguous, or with their strides among the sizes) and None as pointers,
    integers as an array of int64, floats as doubles."""
    getattr(library(source), name)(*map(_argument, arguments))


def _argument(value: Tensor | Sequence[int] | float | None) -> object:
    if value is None:
        return ctypes.c_void_p(None)
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, float):
        return ctypes.c_double(value)
    return (ctypes.c_int64 * len(value))(*value)


def packed(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`[batch, time, ...]` as `[batch * time, ...]` in a dtype of the C++ forms, its last axis without gaps."""
    x = x.flatten(0, 1).to(dtype)
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that the C++ forms compute in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
