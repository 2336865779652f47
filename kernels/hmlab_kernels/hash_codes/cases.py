"""Inputs of hash codes shared by parity, benchmarks and notebooks."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import bench
from ..parity import Case, Draw


def inputs(draw: Draw, batch: int, time: int, heads: int, dim: int, *, tables: int, bits: int, shared: bool = False,
           threshold: bool = False, **options) -> dict:
    """A call on random numbers. shared: one set of tables for all heads; threshold: of the size of a projection."""
    sets = 1 if shared else heads
    made = {"x": draw.normal(batch, time, heads, dim), "weight": draw.normal(sets, tables, bits, dim)}
    if threshold:
        made["threshold"] = draw.normal(sets, tables, bits, scale=dim**0.5 if options.get("normalise") is False else 1)
    return made | options


def unexplained(_: str, got: Tensor, expected: Tensor, arguments: dict) -> Tensor:
    """Codes that differ by more than rounding can do.

    A sign may differ where the margin is within the rounding of its sum; what stands at a probe's place must have the
    margin that belongs there, to within that rounding.
    """
    if not got.numel():
        return got != expected
    signed, bound = _projections(**arguments)
    margin, slack = signed.abs(), 2 * bound.amax(-1, keepdim=True)
    bits, index = margin.shape[-1], torch.arange(margin.shape[-1], device=got.device)
    if arguments.get("family") == "cross_polytope":
        ranked = margin.sort(-1, descending=True).values[..., : got.shape[-1]]
        place = (got % bits).long()
        claimed = margin.gather(-1, place)
        sign_right = (got // bits == (signed.gather(-1, place) < 0)) | (claimed <= bound.gather(-1, place))
        explained = (got >= 0) & (got < 2 * bits) & sign_right & ((claimed - ranked).abs() <= slack)
        return (got != expected) & ~explained
    code = got[..., :1]
    differing = ((code ^ expected[..., :1])[..., None] >> index & 1).bool()
    explained = [(code >= 0) & ~(differing[..., 0, :] & (margin > bound)).any(-1, keepdim=True)]
    flipped = ((code ^ got[..., 1:])[..., None] >> index & 1).bool()  # [batch, time, heads, tables, probes - 1, bits]
    claimed = (flipped * margin[..., None, :]).sum(-1)
    ranked = margin.sort(-1).values[..., : got.shape[-1] - 1]
    explained.append((got[..., 1:] >= 0) & (flipped.sum(-1) == 1) & ((claimed - ranked).abs() <= slack))
    return (got != expected) & ~torch.cat(explained, -1)


def _projections(x: Tensor, weight: Tensor, threshold: Tensor | None = None, normalise: bool = True, **_
                 ) -> tuple[Tensor, Tensor]:
    """w · x̂ − threshold in float64, and what summing it in (at least) float32 may be off by."""
    eps = torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps
    x, weight = x.double(), weight.double().expand(x.shape[2], -1, -1, -1)
    cut = x.new_zeros(()) if threshold is None else threshold.double()
    if normalise:
        x = torch.nn.functional.normalize(x, dim=-1)
    signed = torch.einsum("bthd,hnid->bthni", x, weight) - cut
    size = torch.einsum("bthd,hnid->bthni", x.abs(), weight.abs()) + cut.abs()
    # dim products and sums, as many again for the norm, and the division and subtraction after them
    return signed, (2 * x.shape[-1] + 4) * eps * size


def _strided(draw: Draw) -> dict:
    return {
        "x": draw.normal(2, 3, 17, 20, 2)[..., 0].transpose(1, 2),
        "weight": draw.normal(20, 5, 3, 2).permute(2, 3, 1, 0),
        "threshold": draw.normal(5, 2, 3).permute(2, 1, 0),
        "probes": 6,
    }


def _ties(draw: Draw) -> dict:
    """Whole numbers, whose sums are exact: zero vectors, equal margins, thresholds that are met."""
    return {
        "x": draw.integers(-1, 2, 2, 9, 2, 16).to(draw.dtype) * draw.tensor([0, 1] * 9).view(2, 9, 1, 1).to(draw.dtype),
        "weight": draw.integers(-1, 2, 2, 3, 7, 16).to(draw.dtype),
        "threshold": draw.integers(-1, 2, 1, 3, 7).to(draw.dtype),
        "normalise": False,
        "probes": 8,
    }


_CROSS = {"family": "cross_polytope"}
CASES = [
    Case(name, make, equal=unexplained)
    for name, make in {
        "one token": lambda d: inputs(d, 1, 1, 1, 16, tables=1, bits=1),
        "no token": lambda d: inputs(d, 2, 0, 2, 16, tables=2, bits=4, probes=3),
        "odd length, shared tables": lambda d: inputs(d, 2, 77, 2, 20, tables=3, bits=12, shared=True),
        "thresholds": lambda d: inputs(d, 1, 33, 3, 80, tables=2, bits=8, threshold=True),
        "thresholds, not normalised": lambda d: inputs(
            d, 1, 33, 2, 16, tables=5, bits=5, threshold=True, normalise=False, probes=2
        ),
        "every probe": lambda d: inputs(d, 1, 21, 2, 32, tables=2, bits=6, threshold=True, probes=7),
        "31 bits, wide head": lambda d: inputs(d, 1, 40, 1, 256, tables=6, bits=31, probes=4),
        "cross-polytope": lambda d: inputs(d, 2, 39, 2, 20, tables=3, bits=12, shared=True, **_CROSS),
        "cross-polytope, every probe": lambda d: inputs(d, 1, 18, 2, 80, tables=2, bits=5, probes=5, **_CROSS),
        "cross-polytope, many coordinates": lambda d: inputs(d, 1, 30, 2, 256, tables=2, bits=130, probes=3, **_CROSS),
        "strided": _strided,
        "ties": _ties,
        "cross-polytope, ties": lambda d: _ties(d) | {"threshold": None, "probes": 7} | _CROSS,
    }.items()
]


def tiles(inputs: dict) -> dict[str, tuple[int, ...]]:
    """Shape of the tile that a program of the fused form writes."""
    from .fused import blocks

    _, tables, bits, dim = inputs["weight"].shape
    tokens, together, _, _ = blocks(tables, bits, dim)
    return {"out": (1, tokens, 1, together, inputs.get("probes", 1))}


def benchmarks(device: str) -> list[bench.Case]:
    """4 tables of 12 bits and cross-polytopes of 32 coordinates, beside plain PyTorch as one would write it."""
    from . import hash_codes

    cuda = device == "cuda"
    tokens, heads, dim, dtype = (1 << 19, 16, 128, torch.bfloat16) if cuda else (1 << 16, 4, 64, torch.float32)
    draw = Draw(dtype, device)
    x = torch.empty(1, tokens, heads, dim, dtype=dtype, device=device).normal_()
    impls = ("fused", "eager") if cuda else ("eager",)
    cases = []
    for name, bits, options in (
        ("hyperplane, 4 tables of 12 bits", 12, {}),
        ("hyperplane, 4 tables of 12 bits, 4 probes", 12, {"probes": 4}),
        ("cross-polytope, 4 tables of 32", 32, _CROSS),
    ):
        weight = draw.normal(heads, 4, bits, dim)
        runs = {i: lambda i=i, w=weight, o=options: hash_codes(x, w, impl=i, **o) for i in impls}
        if "probes" not in options:
            plain = _plain_cross_polytope if options else _plain_hyperplane
            runs["plain PyTorch"] = lambda plain=plain, w=weight: plain(x, w)
        cases.append(bench.Case(
            f"hash_codes, {name}, {tokens} tokens", runs, op="hash_codes", length=tokens, tokens=tokens,
            bytes=x.numel() * x.element_size() + tokens * heads * 4 * 4 * options.get("probes", 1),
            flops=2 * tokens * heads * dim * 4 * bits, dtype=str(dtype).removeprefix("torch."),
        ))  # fmt: skip
    return cases


def _plain_hyperplane(x: Tensor, weight: Tensor) -> Tensor:
    powers = 2 ** torch.arange(weight.shape[2], device=x.device, dtype=torch.int32)
    return ((torch.einsum("bthd,hnid->bthni", x, weight) > 0) * powers).sum(-1, dtype=torch.int32)


def _plain_cross_polytope(x: Tensor, weight: Tensor) -> Tensor:
    rotated = torch.einsum("bthd,hnid->bthni", x, weight)
    return torch.cat([rotated, -rotated], -1).argmax(-1)
