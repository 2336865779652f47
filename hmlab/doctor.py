"""Whether this machine has what hmlab needs: one row per thing looked at."""

import os
import platform
import shutil
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal

from hmlab.assets import assets_root

CHROMIUMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
GIGABYTE = 1_000_000_000


@dataclass(frozen=True, kw_only=True)
class Check:
    """One row. `note`: works, but something is missing or slower; `fail`: something does not work."""

    name: str
    status: Literal["ok", "note", "fail"]
    detail: str


def report(*, port: int = 8888, folder: str | Path = ".") -> list[Check]:
    """Look at this machine. `port`: the lab's; `folder`: where runs will be written."""
    return [
        _python(),
        *_packages(),
        *_torch(),
        _compiler(),
        _chromium(),
        _assets(),
        _corpora(),
        _disk(Path(folder)),
        _port(port),
    ]


def failed(checks: list[Check]) -> bool:
    """Whether any row is a `fail`: the command's exit status."""
    return any(check.status == "fail" for check in checks)


def find_chromium() -> str | None:
    """The Chromium for browser tests: `HMLAB_CHROMIUM`, or else the first on the path; None without one."""
    named = os.environ.get("HMLAB_CHROMIUM")
    return next(filter(None, map(shutil.which, [named] if named else CHROMIUMS)), None)


def _python() -> Check:
    supported = (3, 11) <= sys.version_info[:2] <= (3, 13)
    detail = f"{platform.python_version()} at {sys.executable}"
    return Check(
        name="python",
        status="ok" if supported else "fail",
        detail=detail if supported else f"{detail}; expected 3.11 to 3.13",
    )


def _packages() -> Iterator[Check]:
    """Required packages that are missing or out of range, and installed ones that are not at their pins."""
    from packaging.requirements import Requirement

    wrong = []
    for requirement in map(Requirement, requires("hmlab") or ()):
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        found = _version(requirement.name)
        if found is None or not requirement.specifier.contains(found, prereleases=True):
            wrong.append(f"{requirement}: {found or 'not installed'}")
    yield Check(
        name="packages",
        status="fail" if wrong else "ok",
        detail="; ".join(wrong) or f"hmlab {version('hmlab')} has all it requires",
    )

    differing = []
    for line in (assets_root() / "constraints.txt").read_text().splitlines():
        pin = Requirement(line)
        found = _version(pin.name)
        if found is not None and not pin.specifier.contains(found, prereleases=True):
            differing.append(f"{pin.name} {found} ({pin.specifier})")
    yield Check(
        name="pins",
        status="note" if differing else "ok",
        detail=f"other than tested: {', '.join(differing)}" if differing else "every package as tested",
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _torch() -> Iterator[Check]:
    try:
        import torch
    except ImportError as error:
        yield Check(name="torch", status="fail", detail=str(error))
        return
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
    detail = f"{torch.__version__}, {build} build"
    if torch.cuda.is_available():
        yield Check(name="torch", status="ok", detail=f"{detail}, {torch.cuda.get_device_name()}")
    elif _has_nvidia_gpu():
        yield Check(name="torch", status="note", detail=f"{detail}, which cannot use the NVIDIA GPU")
    else:
        yield Check(name="torch", status="ok", detail=f"{detail}, {torch.get_num_threads()} CPU threads")
    triton = _version("triton")
    yield Check(
        name="triton",
        status="ok" if triton else "note",
        detail=triton or "not installed: fused kernels can neither run nor be interpreted",
    )


def _has_nvidia_gpu() -> bool:
    if not shutil.which("nvidia-smi"):
        return False
    return subprocess.run(["nvidia-smi", "-L"], capture_output=True, timeout=30).returncode == 0


def _compiler() -> Check:
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if compiler and header.is_file():
        return Check(name="compiler", status="ok", detail=compiler)
    missing = f"{header} (apt-get install python3-dev)" if compiler else "C++ compiler (apt-get install g++)"
    return Check(name="compiler", status="note", detail=f"no {missing}: torch.compile does not work")


def _chromium() -> Check:
    path = find_chromium()
    named = os.environ.get("HMLAB_CHROMIUM")
    if named and not path:
        return Check(name="chromium", status="fail", detail=f"HMLAB_CHROMIUM: {named} is no program")
    return Check(
        name="chromium",
        status="ok" if path else "note",
        detail=path or "none found (apt-get install chromium): no browser tests, no figures as PNG",
    )


def _assets() -> Check:
    try:
        return Check(name="assets", status="ok", detail=str(assets_root()))
    except FileNotFoundError as error:
        return Check(name="assets", status="fail", detail=str(error))


def _corpora() -> Check:
    named = os.environ.get("HMLAB_DATA")
    if not named:
        return Check(name="corpora", status="ok", detail="embedded text; HMLAB_DATA can name more")
    there = Path(named).is_dir()
    return Check(
        name="corpora",
        status="ok" if there else "fail",
        detail=named if there else f"HMLAB_DATA names {named}, which is no folder",
    )


def _disk(folder: Path) -> Check:
    free = shutil.disk_usage(folder).free
    status = "ok" if free > 5 * GIGABYTE else "note" if free > GIGABYTE else "fail"
    return Check(name="disk", status=status, detail=f"{free / GIGABYTE:.1f} GB free in {folder.resolve()}")


def _port(port: int) -> Check:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            reason = error.strerror.lower()
            return Check(name="port", status="note", detail=f"{port}: {reason}; choose with hmlab lab --port")
    return Check(name="port", status="ok", detail=f"{port} is free")
