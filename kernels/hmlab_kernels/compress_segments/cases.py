"""Inputs of compressed segments shared by parity, benchmarks and notebooks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import bench
from ..parity import Case, Draw


def inputs(draw: Draw, batch: int, time: int, heads: int, dim: int, *, segment: int, most: int, one_count: bool = False,
           documents: Sequence[int] = (), sharpness: float = 1.0, **options) -> dict:
    """A call on random numbers. one_count: the same count for all heads; documents: lengths of the sequences packed
    into the time axis (one if empty); sharpness: size of the queries."""
    segments = sum(length // segment for length in documents or [time])
    made = {
        "k": draw.normal(batch, time, heads, dim),
        "v": draw.normal(batch, time, heads, dim),
        "queries": draw.normal(heads, most, dim, scale=sharpness),
        "count": draw.integers(0, most + 1, batch, segments, 1 if one_count else heads),
        "segment": segment,
    }
    if documents:
        made["cu_seqlens"] = draw.tensor([sum(documents[:i]) for i in range(len(documents) + 1)])
    return made | options


def _strided(draw: Draw) -> dict:
    made = inputs(draw, 2, 25, 3, 16, segment=12, most=5)
    made["k"] = draw.normal(3, 16, 25, 2).permute(3, 2, 0, 1)
    made["v"] = draw.normal(2, 25, 16, 3).transpose(2, 3)
    made["queries"] = draw.normal(5, 3, 16, 2)[..., 0].transpose(0, 1)
    made["count"] = made["count"].transpose(0, 2).contiguous().transpose(0, 2)
    return made


def _counts(draw: Draw, *counts: int, **sizes) -> dict:
    """One segment for each count."""
    segment = sizes["segment"]
    made = inputs(draw, 1, len(counts) * segment, 1, 16, **sizes)
    made["count"] = draw.tensor(counts).view(1, -1, 1)
    return made


def _first(draw: Draw, *first: int, **made) -> dict:
    """A call of which each segment leaves out its first tokens; every row does alike."""
    return made | {"first": draw.tensor(first).repeat(made["k"].shape[0], 1)}


_ALL = ("k", "v", "queries")
CASES = [
    Case(name, make, _ALL)
    for name, make in {
        "one token, one slot": lambda d: inputs(d, 1, 1, 1, 16, segment=1, most=1),
        "no token": lambda d: inputs(d, 2, 0, 2, 16, segment=4, most=2),
        "no whole segment": lambda d: inputs(d, 1, 7, 2, 16, segment=8, most=2),
        "odd length, odd dim": lambda d: inputs(d, 2, 41, 2, 20, segment=18, most=5),
        "one count for all heads": lambda d: inputs(d, 1, 33, 2, 80, segment=16, most=4, one_count=True),
        "none, some, all, too many": lambda d: _counts(d, 0, 1, 5, 11, 12, 13, -1, segment=12, most=12),
        "packed documents": lambda d: inputs(d, 1, 70, 1, 16, segment=8, most=3, documents=(19, 0, 8, 7, 36)),
        "packed, no remainder": lambda d: inputs(d, 1, 48, 1, 16, segment=8, most=8, documents=(16, 32)),
        "scale": lambda d: inputs(d, 1, 20, 2, 16, segment=10, most=4, scale=-0.7),
        "far apart logits": lambda d: inputs(d, 1, 32, 2, 16, segment=16, most=6, sharpness=3.0),
        "many slots": lambda d: inputs(d, 1, 140, 1, 16, segment=70, most=70),
        "wide head": lambda d: inputs(d, 1, 34, 2, 256, segment=33, most=9),
        "strided": _strided,
        "the first left out": lambda d: _first(d, 3, 0, 17, 18, **inputs(d, 2, 79, 2, 20, segment=18, most=5)),
        "the first left out, kept whole": lambda d: _first(
            d, 0, 3, 12, 11, 4, 20, -1, **_counts(d, 12, 12, 12, 13, 5, 2, 12, segment=12, most=12)
        ),
        "the first left out, packed": lambda d: _first(
            d, 2, 0, 5, 1, 8, 0, 0, **inputs(d, 1, 70, 1, 16, segment=8, most=3, documents=(19, 0, 8, 7, 36))
        ),
        "the first left out, wide head": lambda d: _first(
            d, 4, 30, **inputs(d, 1, 69, 2, 256, segment=33, most=33)
        ),
    }.items()
]


def tiles(inputs: dict) -> dict[str, tuple[int, ...]]:
    """Shapes of the tiles that the fused form computes, of the outputs."""
    from .fused import blocks

    slots, _, dim = blocks(inputs["segment"], inputs["queries"].shape[1], inputs["k"].shape[3], inputs["k"].dtype)
    return {"k": (1, 1, slots, 1, dim), "v": (1, 1, slots, 1, dim), "mass": (1, 1, slots, 1),
            "position": (1, 1, slots, 1)}  # fmt: skip


def benchmarks(device: str) -> list[bench.Case]:
    """Segments of 64 tokens into 16 slots, beside mean pooling (about the least there is to do) and SDPA over each."""
    from . import compress_segments

    cuda = device == "cuda"
    tokens, heads, dim, dtype = (1 << 19, 16, 128, torch.bfloat16) if cuda else (1 << 16, 4, 64, torch.float32)
    segment, most = 64, 16
    draw = Draw(dtype, device)
    k, v = (torch.empty(1, tokens, heads, dim, dtype=dtype, device=device).normal_() for _ in range(2))
    leaves = [x.requires_grad_() for x in (k, v, draw.normal(heads, most, dim))]
    count = torch.full((1, tokens // segment, 1), most, device=device)
    forms = {
        impl: lambda *leaves, impl=impl: compress_segments(*leaves, count, segment=segment, impl=impl)[:2]
        for impl in (("fused", "eager") if cuda else ("eager",))
    }
    forms |= {"mean pooling": _mean_pooling, "SDPA pooling": _sdpa_pooling}
    kept = [torch.empty(1, tokens // segment, most, heads, dim, dtype=dtype, device=device).normal_() for _ in range(2)]
    read, written = (sum(x.numel() * x.element_size() for x in some) for some in (leaves, kept))
    flops = 2 * tokens * heads * most * dim
    common = {"op": "compress_segments", "length": tokens, "tokens": tokens, "dtype": str(dtype).removeprefix("torch.")}
    name = f"compress_segments, 64 into 16, {tokens} tokens"
    return [
        bench.Case(f"{name}, forward", {n: lambda f=f: _without_graph(f, leaves) for n, f in forms.items()},
                   bytes=read + written, flops=3 * flops, **common),
        bench.Case(f"{name}, forward and backward", {n: lambda f=f: _with_gradients(f, leaves, kept)
                                                     for n, f in forms.items()},
                   bytes=3 * read + 2 * written, flops=10 * flops, **common),
    ]  # fmt: skip


def _without_graph(form, leaves: list[Tensor]):
    with torch.no_grad():
        return form(*leaves)


def _with_gradients(form, leaves: list[Tensor], cotangents: list[Tensor]):
    return torch.autograd.grad(form(*leaves), leaves, cotangents, allow_unused=True)


def _mean_pooling(k: Tensor, v: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
    """Means of runs of tokens, as many as there are queries."""
    batch, time, heads, dim = k.shape
    return tuple(x.view(batch, time // 64, queries.shape[1], -1, heads, dim).mean(3) for x in (k, v))


def _sdpa_pooling(k: Tensor, v: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
    """Each query attends over each segment (its shares sum to 1 over the tokens, not over the slots)."""
    keys, values = (x[0].unflatten(0, (-1, 64)).transpose(1, 2) for x in (k, v))
    wanted = queries.expand(len(keys), -1, -1, -1)
    pooled = (torch.nn.functional.scaled_dot_product_attention(wanted, keys, x) for x in (keys, values))
    return tuple(x.transpose(1, 2)[None] for x in pooled)
