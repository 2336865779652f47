"""What `hmlab bench` measures: operators and layers beside what their authors, or anybody else, would run instead.

`suites()` maps a name to a function that returns the cases for a device; `run` measures them into one Dataset.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import hmlab_kernels
import torch
from hmlab_kernels.bench import Case, measure
from torch import Tensor

from hmlab import bench_harmony, bench_hmt, model
from hmlab.memories import lmn
from hmlab.memories.lmn.authors import published_forward
from hmlab.registry import UnknownName, memory_config


def lmn_forward(device: str = "cpu", lengths: Sequence[int] = (2048, 8192, 32768, 131072), dim: int = 32
                ) -> Iterator[Case]:
    """One LMN layer with its feed-forward, batch 1, one head, one bank: ours, the authors' formulation, attention."""
    for length in lengths:
        block = _block(lmn.Config(dim=dim, heads=1, banks=1), device)
        rival = _block(memory_config("attention")(dim=dim, heads=1), device)
        x = torch.randn(1, length, dim, device=device)
        runs: dict[str, Callable] = {
            "hmlab": _no_grad(lambda b=block, x=x: b(x, None)),
            "authors": _no_grad(lambda b=block, x=x: _published(b, x)),
        }
        if length <= 32768:  # quadratic: 16 times longer per line
            runs["attention"] = _no_grad(lambda b=rival, x=x: b(x, None))
        yield Case(f"lmn forward, L {length}, E {dim}", runs, *_floor(length, length, dim, banks=1),
                   op="lmn", length=length, tokens=length)  # fmt: skip


def lmn_training(device: str = "cpu", dims: Sequence[int] = (32, 128), batch: int = 16, length: int = 512
                 ) -> Iterator[Case]:
    """Forward and backward of one LMN layer with its feed-forward, four heads, two banks."""
    for dim in dims:
        block = _block(lmn.Config(dim=dim), device)
        rival = _block(memory_config("attention")(dim=dim), device)
        x = torch.randn(batch, length, dim, device=device, requires_grad=True)
        runs = {
            "hmlab": lambda b=block, x=x: _train(b, b(x, None)[0]),
            "authors": lambda b=block, x=x: _train(b, _published(b, x)),
            "attention": lambda b=rival, x=x: _train(b, b(x, None)[0]),
        }
        bytes_, flops = _floor(batch * length, length, dim, banks=2)
        yield Case(f"lmn training step, batch {batch}, L {length}, E {dim}", runs, 3 * bytes_, 3 * flops,
                   op="lmn", length=length, tokens=batch * length)  # fmt: skip


def suites() -> dict[str, Callable[[str], Iterable[Case]]]:
    """Name -> the cases it measures on a device: whole layers, and every operator of `hmlab_kernels`."""

    def of(op: str) -> Callable[[str], Iterable[Case]]:
        return lambda device: importlib.import_module(f"hmlab_kernels.{op}.cases").benchmarks(device)

    layers = {"lmn-forward": lmn_forward, "lmn-training": lmn_training, "harmony": bench_harmony.cases,
              "hmt": bench_hmt.cases}  # fmt: skip
    return layers | {op: of(op) for op in hmlab_kernels.OPS}


def run(names: Sequence[str] = (), *, device: str = "cpu", seconds: float = 2.0,
        progress: Callable[[str], None] = lambda _: None):
    """Measure suites by name (all if none is named) into a Dataset of dims case, candidate, repeat."""
    known = suites()
    for name in names:
        if name not in known:
            raise UnknownName("benchmark", name, known)
    torch.manual_seed(0)
    cases = (case for name in names or known for case in known[name](device))
    readings: bench_harmony.Readings = {}
    allocated: bench_hmt.Allocated = {}
    cases = bench_hmt.metered(bench_harmony.metered(cases, readings), allocated)
    measured = measure(cases, device=device, seconds=seconds, progress=progress)
    measured = bench_harmony.with_readings(measured, readings) if readings else measured
    return bench_hmt.with_tensor_bytes(measured, allocated) if allocated else measured


def _block(memory, device: str) -> model.Block:
    return model.Block(model.Config(vocab=1, dim=memory.dim, memory=memory)).to(device)


def _published(block: model.Block, x: Tensor) -> Tensor:
    x = x + published_forward(block.memory, block.norm1(x))
    return x + block.feedforward(block.norm2(x))


def _train(block: model.Block, y: Tensor) -> None:
    block.zero_grad()
    y.square().mean().backward()


def _no_grad(call: Callable[[], object]) -> Callable[[], object]:
    def run() -> object:
        with torch.no_grad():
            return call()

    return run


def _floor(tokens: int, length: int, dim: int, *, banks: int) -> tuple[float, float]:
    """Bytes (input, output, weights once, queries and values of nodes once) and flops of a layer's forward pass."""
    nodes = banks * tokens  # a bank has one node fewer than there are tokens
    levels = length.bit_length() - 1
    summarise, project_nodes, project = nodes * 2 * dim * dim, nodes * 2 * dim * dim, tokens * 4 * dim * dim
    feedforward, read = tokens * 8 * dim * dim, tokens * 2 * dim * (1 + banks * levels)
    flops = 2 * (summarise + project_nodes + project + feedforward + read)
    moved = 4 * (2 * tokens * dim + 3 * tokens * dim + 2 * nodes * dim)
    return moved, flops
