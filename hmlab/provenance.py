"""Where a number comes from: code, libraries, machine, command. No folder of this machine is named."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

LIBRARIES = ("hmlab", "torch", "triton", "numpy", "xarray", "zarr", "safetensors", "tokenizers")


def provenance(device: torch.device) -> dict[str, Any]:
    """Commit (None outside a checkout) and whether it was changed, versions, device, threads, command."""
    commit, dirty = checkout()
    return {
        "commit": commit,
        "dirty": dirty,
        "versions": versions(),
        "platform": platform.platform(),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def checkout() -> tuple[str | None, bool | None]:
    """The commit of the checkout that this package lies in, and whether its files differ from that commit."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # An installed package may lie inside somebody else's checkout, which does not track it.
        git("ls-files", "--error-unmatch", "__init__.py")
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError):
        return None, None


def versions() -> dict[str, str]:
    """Of Python and of the libraries that results depend on, as far as they are installed."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def device_name(device: torch.device) -> str:
    """What the device calls itself, such as `NVIDIA H200`."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def peak_memory(device: torch.device) -> int:
    """The most bytes this process has held, or on CUDA the most that its tensors have taken."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def banner(device: torch.device | str = "cpu", corpus: Mapping[str, Any] | None = None) -> str:
    """What ran, in one line for the top of a notebook: version, device, threads, implementations, corpus."""
    import hmlab_kernels

    from hmlab import __version__

    commit, dirty = checkout()
    facts = [f"hmlab {__version__}" + (f" ({commit[:7]}{', changed' if dirty else ''})" if commit else "")]
    facts += [f"torch {torch.__version__}", device_name(torch.device(device)), f"threads: {torch.get_num_threads()}"]
    device_type = torch.device(device).type
    operators: dict[str, list[str]] = {}
    for op in hmlab_kernels.OPS:
        operators.setdefault(hmlab_kernels.default_impl(op, device_type), []).append(op)
    facts += [f"{impl}: {', '.join(ops)}" for impl, ops in operators.items()]
    if corpus is not None:
        facts.append(f"corpus {corpus['corpus']} (sha256 {corpus['sha256'][:12]})")
    return " · ".join(facts)
