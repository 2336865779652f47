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
from pathlib import Path

# No -ffast-math: infinities and NaN must pass through, and exp() relies on the order of its operations.
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-fno-math-errno", "-shared", "-fPIC")


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
    identity = "\0".join([source.read_text(), *_FLAGS, version, _processor()])
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hmlab" / "native"
    target = folder / f"{source.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, suffix=".so", delete=False) as partial:
            pass
        built = subprocess.run([cxx, *_FLAGS, str(source), "-o", partial.name], capture_output=True, text=True)
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
