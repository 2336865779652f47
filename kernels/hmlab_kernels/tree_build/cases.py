"""Inputs of tree building shared by parity, benchmarks and notebooks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from .. import bench
from ..parity import Case, Draw
from . import tree_build
from .plan import depth


def inputs(draw: Draw, batch: int, time: int, dim: int, *, banks: int = 1, expansion: int = 0, arity: int = 2,
           kernel: int | None = None, mixed: bool = False, start: int = 0, stages: int = 0, norm: bool = False,
           documents: Sequence[int] = (), padding: int = 0, held: int = -1) -> dict:
    """A call on random numbers. mixed: each bank reads all banks. documents: lengths of the documents of each row, the
    first of which goes on from position `start`; padding: leaves at the end of each row that are none. held: the last
    level of which nodes are carried, −1 for none."""
    kernel = kernel or arity
    width = kernel * dim * (banks if mixed else 1)
    made = {
        "leaves": draw.normal(batch, time, dim),
        "taps": draw.normal(1 + expansion, banks, width, dim, scale=((1 + expansion) * width) ** -0.5),
        "bias": draw.normal(banks, dim, scale=0.3),
        "arity": arity,
        "kernel": kernel,
    }
    if stages:
        made["deeper"] = draw.normal(stages, banks, dim, dim, scale=2 * dim**-0.5)
    if norm:
        made["norm"] = draw.normal(dim)
    if held >= 0:
        slots = sum(banks * (1 + i * expansion) if i else 1 for i in range(held + 1))
        made["carried"] = draw.normal(batch, (kernel - 1) * slots, dim)
    if documents or padding:
        lengths = list(documents) or [time - padding]
        position = [t + 1 for length in lengths for t in range(length)] + [0] * padding
        position[: lengths[0]] = [start + t for t in position[: lengths[0]]]
        made["position"] = draw.tensor([position] * batch).reshape(batch, time)
        made["levels"] = depth(start + max(lengths), arity)
    else:
        made["start"] = start
    return made


def _strided(draw: Draw) -> dict:
    made = inputs(draw, 2, 21, 16, banks=2)
    made["leaves"] = draw.normal(21, 16, 2).permute(2, 0, 1)
    made["taps"] = draw.normal(1, 2, 16, 32, scale=0.2).mT
    return made


_ALL = ("leaves", "taps", "bias")
_HELD = (*_ALL, "carried")
CASES = [
    Case("no leaf", lambda d: inputs(d, 2, 0, 16), _ALL),
    Case("one leaf", lambda d: inputs(d, 1, 1, 16), _ALL),
    Case("two leaves", lambda d: inputs(d, 1, 2, 8, banks=2), _ALL),
    Case("odd length, odd dim", lambda d: inputs(d, 2, 77, 20), _ALL),
    Case("two banks", lambda d: inputs(d, 2, 70, 32, banks=2), _ALL),
    Case("wide", lambda d: inputs(d, 1, 5, 256), _ALL),
    Case("not a power of two", lambda d: inputs(d, 1, 21, 80), _ALL),
    Case("four children", lambda d: inputs(d, 2, 70, 16, arity=4), _ALL),
    Case("overlapping", lambda d: inputs(d, 1, 45, 16, kernel=3, banks=2), _ALL),
    Case("far overlapping", lambda d: inputs(d, 1, 40, 16, arity=3, kernel=7), _ALL),
    Case("growing nodes", lambda d: inputs(d, 2, 9, 16, banks=2, expansion=2), _ALL),
    Case("banks mixed, growing", lambda d: inputs(d, 1, 5, 16, banks=3, expansion=1, mixed=True), _ALL),
    Case("continued", lambda d: inputs(d, 2, 29, 16, banks=2, start=13, held=3), _HELD),
    Case("continued by one", lambda d: inputs(d, 2, 1, 16, start=15, held=3), _HELD),
    Case("continued, overlapping, growing", lambda d: inputs(d, 1, 22, 16, expansion=1, arity=3, kernel=5, start=7,
                                                            held=1), _HELD),
    Case("documents, padding", lambda d: inputs(d, 2, 64, 16, banks=2, documents=(5, 1, 33, 16), padding=9), _ALL),
    Case("documents continued", lambda d: inputs(d, 2, 50, 16, banks=2, documents=(21, 29), start=11, held=3), _HELD),
    Case("documents, overlapping, mixed", lambda d: inputs(d, 1, 24, 16, banks=2, kernel=5, mixed=True,
                                                          documents=(5, 16), padding=3), _ALL),
    Case("strided", _strided, _ALL),
]  # fmt: skip
# Stages after the linear one, which not every implementation has.
STAGED = [
    Case("deeper", lambda d: inputs(d, 2, 37, 16, banks=2, stages=2), (*_ALL, "deeper")),
    Case("normalised", lambda d: inputs(d, 1, 37, 16, banks=2, norm=True, expansion=1), (*_ALL, "norm")),
    Case("deeper, normalised, documents", lambda d: inputs(
        d, 1, 50, 20, stages=1, norm=True, kernel=3, documents=(20, 26), padding=4, start=9, held=2,
    ), (*_HELD, "deeper", "norm")),
]  # fmt: skip


def tiles(inputs: dict) -> dict[str, tuple[int, ...]]:
    """The shape of the tiles in which the fused form writes its output."""
    from . import fused

    leaves = inputs["leaves"]
    tile = fused.tile_of(leaves.shape[2], leaves.element_size())
    return {"out": (tile.rows, tile.columns)}


def benchmarks(device: str) -> list[bench.Case]:
    """Beside the published formulation, one product of pairs per level, and its gradients."""
    if device == "cpu":
        dtype, impls = torch.float32, ("native", "eager")
        sizes = (1, 2048, 32, 1), (1, 32768, 32, 1), (16, 512, 128, 2)
    else:
        dtype, impls = torch.bfloat16, ("fused", "eager")
        sizes = (1, 8192, 512, 2), (1, 131072, 512, 2)
    found = []
    for batch, time, dim, banks in sizes:
        made = inputs(Draw(dtype, device), batch, time, dim, banks=banks)
        runs: dict[str, Callable[..., Tensor]] = {impl: partial(tree_build, impl=impl) for impl in impls}
        runs["published"] = _published
        nodes = batch * banks * sum(time // 2**i for i in range(1, time.bit_length()))
        flops = 4 * nodes * dim**2
        # Leaves and nodes once, the nodes again as children, the weights.
        bytes_ = (batch * time * dim + 2 * nodes * dim + made["taps"].numel()) * made["leaves"].element_size()
        about = {"op": "tree_build", "length": time, "tokens": batch * time, "dtype": str(dtype).removeprefix("torch.")}
        label = f"batch {batch}, L {time}, dim {dim}, {banks} banks"
        found.append(bench.Case(
            f"tree_build forward, {label}", {name: partial(run, **made) for name, run in runs.items()},
            bytes=bytes_, flops=flops, **about,
        ))  # fmt: skip
        both = {name: partial(_both, run, made) for name, run in runs.items()}
        found.append(bench.Case(
            f"tree_build forward and backward, {label}", both, bytes=3 * bytes_, flops=3 * flops, **about
        ))  # fmt: skip
    return found


def _both(run: Callable[..., Tensor], made: dict) -> tuple[Tensor, ...]:
    given = {name: made[name].detach().requires_grad_() for name in _ALL}
    nodes = run(**made | given)
    return torch.autograd.grad(nodes, list(given.values()), torch.ones_like(nodes))


def _published(leaves: Tensor, taps: Tensor, bias: Tensor, **_) -> Tensor:
    level, levels = leaves[:, None].expand(-1, taps.shape[1], -1, -1), []
    while level.shape[2] > 1:
        pairs = level[:, :, : level.shape[2] // 2 * 2].unflatten(2, (-1, 2)).flatten(3)
        level = pairs @ taps[0] + bias[:, None]
        levels.append(level.transpose(0, 1).flatten(0, 2))
    return torch.cat(levels)
