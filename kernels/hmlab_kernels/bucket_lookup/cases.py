"""Inputs of the bucket lookup shared by parity, benchmarks and notebooks."""

from __future__ import annotations

import functools
import itertools

import torch
from torch import Tensor

from .. import bench
from ..parity import Case, Draw
from ..topk_blocks import sets
from . import Buckets, bucket_lookup, buckets


def inputs(draw: Draw, batch: int, time: int, heads: int, dim: int, slots: int, *, kv_heads: int | None = None,
           tables: int = 2, probes: int = 2, bits: int = 3, picks: int = 4, candidates: int = 16, **options) -> dict:
    """A call on random numbers and codes; slots become available one by one, evenly over the sequence."""
    kv_heads = kv_heads or heads
    codes = draw.integers(0, 2**bits, batch, slots, kv_heads, tables).int()
    made = {
        "q": draw.normal(batch, time, heads, dim),
        "codes": draw.integers(0, 2**bits, batch, time, heads, tables, probes).int(),
        "k": draw.normal(batch, slots, kv_heads, dim),
        "buckets": buckets(codes),
        "available": draw.tensor([t * slots // max(time - 1, 1) for t in range(time)]).repeat(batch, 1),
        "picks": picks,
        "candidates": candidates,
    }
    return made | options


def _everything(draw: Draw) -> dict:
    made = inputs(draw, 2, 3, 4, 20, 41, kv_heads=2, tables=3, probes=2, bits=2, candidates=40, picks=5, scale=0.7)
    return made | {"bias": draw.normal(2, 41, 2)}


def _forgetful(draw: Draw, keep: int, **made) -> dict:
    """A call of which each query may read the newest `keep` of the slots that are there for it; none if 0."""
    slots = made["k"].shape[1]
    if made["available"] is None:
        return made | {"oldest": torch.full(made["q"].shape[:2], slots - keep, device=draw.device)}
    return made | {"oldest": made["available"] - keep}


def _most(draw: Draw) -> dict:
    return inputs(draw, 1, 1, 2, 16, 300, kv_heads=1, tables=4, probes=4, bits=2, candidates=256, picks=32)


def _packed(draw: Draw) -> dict:
    """Documents without tokens, without slots, and without either."""
    queries, slots = [0, 3, 3, 3, 9, 10, 14], [0, 6, 10, 10, 41, 41, 48]
    made = inputs(draw, 1, 14, 2, 16, 48, kv_heads=1, bits=2)
    cu_slots = draw.tensor(slots, dtype=torch.int32)
    made |= {"buckets": buckets(draw.integers(0, 4, 1, 48, 1, 2).int(), cu_slots=cu_slots), "cu_slots": cu_slots}
    return made | {"available": draw.integers(0, 20, 1, 14), "cu_seqlens": draw.tensor(queries)}


def _strided(draw: Draw) -> dict:
    made = inputs(draw, 2, 9, 2, 16, 21)
    made["q"] = draw.normal(2, 2, 16, 9).permute(0, 3, 1, 2)
    made["codes"] = draw.integers(0, 8, 2, 2, 2, 2, 9).int().permute(0, 4, 1, 2, 3)
    made["k"] = draw.normal(2, 2, 21, 32)[..., ::2].transpose(1, 2)
    made["bias"] = draw.normal(2, 2, 21).transpose(1, 2)
    made["available"] = draw.integers(0, 30, 9, 2).T
    return made


def _ties(draw: Draw) -> dict:
    """Scores that are all equal: the lower slots win."""
    made = inputs(draw, 1, 5, 1, 16, 40, bits=1, candidates=24)
    return made | {"q": torch.zeros_like(made["q"]), "available": None}


def _near(name: str, got: Tensor, expected: Tensor, given: dict) -> Tensor | None:
    """Where another slot was picked than the reference's, though its score differs by more than rounding."""
    if name != "index":
        return None
    different = got != expected
    if not different.any():
        return different
    q, k = given["q"].double(), given["k"].double()
    batch, time, heads, dim = q.shape
    shared = heads // k.shape[2]
    every = torch.einsum("bthd,bjhd->bthj", q, k.repeat_interleave(shared, 2)) * given.get("scale", dim**-0.5)
    if given.get("bias") is not None:
        every += given["bias"].double().repeat_interleave(shared, 2).transpose(1, 2)[:, None]
    begin = torch.zeros(batch, time, dtype=torch.int64, device=q.device)  # of the slots of each query's sequence
    for row, at, of in sets.sequences(batch, time, k.shape[1], given.get("cu_seqlens"), given.get("cu_slots")):
        begin[row, at] = of.start
    score = [
        torch.where(i < 0, -torch.inf, every.gather(3, (i.long().clamp(min=0) + begin[..., None, None])))
        for i in (got, expected)
    ]
    twice = (got[..., None] == got[..., None, :]).sum(-1) > 1
    return different & (twice | ~((score[0] - score[1]).abs() < 1e-4 * (1 + score[1].abs())))


CASES = [
    Case(name, make, equal=_near)
    for name, make in {
        "one token": lambda d: inputs(d, 1, 1, 1, 16, 1, available=None, bits=0),
        "no token": lambda d: inputs(d, 2, 0, 2, 16, 5),
        "no slot": lambda d: inputs(d, 2, 5, 2, 16, 0),
        "everything": _everything,
        "one bucket": lambda d: inputs(d, 1, 5, 2, 80, 60, kv_heads=1, tables=1, probes=1, bits=0, candidates=64),
        "most candidates": _most,
        "one candidate": lambda d: inputs(d, 1, 7, 1, 16, 9, tables=1, probes=1, bits=1, candidates=1, picks=1),
        "more picks than candidates": lambda d: inputs(d, 1, 7, 2, 16, 30, candidates=4, picks=9),
        "the same bucket probed twice": lambda d: inputs(d, 1, 7, 2, 16, 30, tables=3, probes=5, bits=1, candidates=33),
        "wide head": lambda d: inputs(d, 1, 3, 2, 256, 20, kv_heads=1),
        "packed": _packed,
        "strided": _strided,
        "slots forgotten": lambda d: _forgetful(d, 6, **_everything(d)),
        "slots forgotten, all available": lambda d: _forgetful(
            d, 9, **inputs(d, 1, 2, 2, 64, 300, kv_heads=1, tables=4, probes=4, bits=2, candidates=256, available=None)
        ),
        "slots forgotten, packed": lambda d: _packed(d) | {"oldest": d.integers(-2, 16, 1, 14).int()},
        "slots forgotten, strided": lambda d: _strided(d) | {"oldest": d.integers(0, 25, 9, 2).T},
        "all slots forgotten": lambda d: _forgetful(d, 0, **inputs(d, 1, 7, 2, 16, 30)),
        "ties": _ties,
    }.items()
]


def tiles(inputs: dict) -> dict[str, tuple[int, ...]]:
    """Tile shapes of the fused form's outputs."""
    from . import fused

    lanes = inputs["codes"].shape[3] * inputs["codes"].shape[4]
    picks = inputs["picks"]
    size = fused.sizes(lanes, inputs["candidates"] // lanes, inputs["q"].shape[3], picks)
    shape = (1, size["QUERIES"], 1)
    return {"index": (*shape, picks), "score": (*shape, picks), "found": shape}


def benchmarks(device: str) -> list[bench.Case]:
    """Queries against more and more slots: what a lookup costs hardly grows, what a product costs does.

    4 tables of 14 hyperplanes, 2 probes, 64 candidates, 16 picks.
    """
    if device == "cuda":
        impls, heads, dim, dtype = ("fused", "eager"), 16, 128, torch.bfloat16
        sizes = [(16384, slots) for slots in (65536, 262144, 1048576)] + [(524288, 65536)]
    else:
        impls, heads, dim, dtype = ("eager",), 1, 64, torch.float32
        sizes = [(16384, slots) for slots in (65536, 262144, 1048576)]

    @functools.lru_cache(maxsize=1)  # one size's tensors at a time, made when its first case runs
    def made(time: int, slots: int) -> dict:
        q, k = (torch.randn(1, n, heads, dim, dtype=dtype, device=device) for n in (time, slots))
        planes = torch.randn(4, 14, dim, dtype=dtype, device=device)
        codes = _hash(q, planes)
        return {"q": q, "codes": torch.stack([codes, codes ^ 1], -1), "k": k, "buckets": buckets(_hash(k, planes)),
                "picks": 16, "candidates": 64}  # fmt: skip

    def case(time: int, slots: int) -> bench.Case:
        runs = {impl: lambda impl=impl: bucket_lookup(**made(time, slots), impl=impl) for impl in impls}
        if time * slots <= 2**30:
            runs["product and topk"] = lambda: product_and_topk(**made(time, slots))
        if time <= 16384:
            runs["sorted chunks"] = lambda: sorted_chunks(**made(time, slots))
        return bench.Case(
            f"bucket_lookup, {time} queries, {slots} slots", runs, op="bucket_lookup", length=slots, tokens=time,
            dtype=str(dtype).removeprefix("torch."), bytes=time * heads * 65 * dim * dtype.itemsize,
            flops=2 * time * heads * 64 * dim,
        )  # fmt: skip

    return [case(*size) for size in sizes]


def _hash(x: Tensor, planes: Tensor) -> Tensor:
    bits = torch.einsum("bthd,nkd->bthnk", x, planes) > 0
    return (bits * 2 ** torch.arange(bits.shape[-1], device=x.device, dtype=torch.int32)).sum(-1, dtype=torch.int32)


def product_and_topk(q: Tensor, k: Tensor, picks: int, **_) -> Tensor:
    """The rival that looks at every slot."""
    keys = k.permute(0, 2, 3, 1)
    return torch.cat([(x.transpose(1, 2) @ keys).topk(picks, dim=-1).indices for x in q.split(256, dim=1)], 2)


def sorted_chunks(q: Tensor, codes: Tensor, k: Tensor, buckets: Buckets, picks: int, **_) -> list[Tensor]:
    """The rival after Reformer: queries and slots sorted by code and cut into as many chunks, of 64 queries; each
    ranks the slots of its chunk and of the one before. A list per table and head; candidates need not share a code."""
    found = []
    for table, head in itertools.product(range(codes.shape[3]), range(q.shape[2])):
        rows = q[0, codes[0, :, head, table, 0].argsort(), head].unflatten(0, (-1, 64))
        slots = (buckets.keys[0, head, table] & 0xFFFFFFFF).unflatten(0, (rows.shape[0], -1))
        slots = torch.cat([slots.roll(1, 0), slots], 1)
        read = k[0, :, head].index_select(0, slots.flatten()).unflatten(0, slots.shape)
        score = rows @ read.transpose(1, 2)
        found.append(slots[:, None].expand_as(score).gather(2, score.topk(picks, dim=-1).indices))
    return found
