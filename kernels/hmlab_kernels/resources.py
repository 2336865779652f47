"""What the fused kernels need of a GPU, without one: compiled by Triton and its ptxas for a named architecture.

    python -m hmlab_kernels.resources [OP ...] [--case NAME] [--dtype bfloat16] [--arch 90]

runs the cases of an operator up to each launch, compiles what would be launched, and prints registers, spilled bytes
and shared memory. A kernel that the interpreter accepts and the compiler does not fails here, on any machine.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from . import OPS, _dispatch, implementations, parity


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel: per thread `registers` and `spilled` bytes, per program `shared` bytes and `warps`."""

    name: str
    registers: int
    spilled: int
    shared: int
    warps: int


@contextmanager
def _compiling_only(arch: int, found: dict[str, Kernel]) -> Iterator[None]:
    """Launches compile for `arch` and go no further."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class Absent:
        """Stands where the driver of a GPU would."""

        def get_current_target(self):
            return GPUTarget("cuda", arch, 32)

        def get_current_device(self):
            return 0

        def get_current_stream(self, device=0):
            return 0

    run, interpreted = JITFunction.run, _dispatch._INTERPRETED

    def compile_only(self, *arguments, grid, warmup, **keywords):
        compiled = run(self, *arguments, grid=grid, warmup=True, **keywords)
        if compiled.hash not in found:
            found[compiled.hash] = _measure(self.__name__, compiled, arch)
        return compiled

    held = driver._active
    driver.set_active(Absent())
    JITFunction.run, _dispatch._INTERPRETED = compile_only, True
    try:
        yield
    finally:
        JITFunction.run, _dispatch._INTERPRETED = run, interpreted
        driver._active = held  # reset_active would look for a GPU


def _measure(name: str, compiled, arch: int) -> Kernel:
    import triton.backends.nvidia

    ptxas = os.path.join(os.path.dirname(triton.backends.nvidia.__file__), "bin", "ptxas")
    with tempfile.NamedTemporaryFile(suffix=".ptx") as source:
        source.write(compiled.asm["ptx"].encode())
        source.flush()
        # Hopper's own instructions (wgmma) are in the architecture with an a.
        command = [ptxas, "-v", f"-arch=sm_{arch}{'a' if arch >= 90 else ''}", source.name, "-o", os.devnull]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = max(map(int, re.findall(r"Used (\d+) registers", told)))
    spilled = max(map(int, re.findall(r"(\d+) bytes spill stores", told)), default=0)
    return Kernel(name, registers, spilled, compiled.metadata.shared, compiled.metadata.num_warps)


def resources(op: str, case: str, *, dtype: torch.dtype = torch.bfloat16, arch: int = 90) -> list[Kernel]:
    """The kernels that a case of an operator launches, forward and backward, compiled for an architecture.

    Raises ValueError for an unknown name, RuntimeError where Triton interprets instead of compiling, and whatever
    Triton's compiler raises.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET: expected unset, since the interpreter compiles nothing; got 1")
    if "fused" not in implementations(op):
        raise ValueError(f"op: expected one with a fused form, got {op!r}")
    known = parity.cases(op)
    if case not in known:
        raise ValueError(f"case: {op} has {list(known)}, got {case!r}")
    found: dict[str, Kernel] = {}
    with _compiling_only(arch, found):
        parity.evaluate(op, known[case], known[case].make(parity.Draw(dtype)), "fused")
    return list(found.values())


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m hmlab_kernels.resources", description="What the fused kernels need, without a GPU."
    )
    parser.add_argument("ops", nargs="*", metavar="OP")
    parser.add_argument("--case", help="one case, by name; all of them without it")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--arch", type=int, default=90, help="compute capability, e.g. 80, 90")
    arguments = parser.parse_args()
    for op in arguments.ops or [op for op in OPS if "fused" in implementations(op)]:
        for case in [arguments.case] if arguments.case else parity.cases(op):
            for kernel in resources(op, case, dtype=getattr(torch, arguments.dtype), arch=arguments.arch):
                print(f"{op:18} {case:36} {kernel.name:24} {kernel.registers:4} registers {kernel.spilled:5} B spilled "
                      f"{kernel.shared:7} B shared {kernel.warps:2} warps", flush=True)  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
