"""Inputs of the block votes shared by parity, benchmarks and notebooks."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .. import bench
from ..parity import Case, Draw
from . import reference, topk_blocks


def inputs(draw: Draw, batch: int, time: int, heads: int, dim: int, slots: int, *, kv_heads: int | None = None,
           picks: int = 4, **options) -> dict:
    """A call on random numbers: slots become visible one by one, evenly over the sequence."""
    made = {
        "q": draw.normal(batch, time, heads, dim),
        "k": draw.normal(batch, slots, kv_heads or heads, dim),
        "visible": (draw.tensor(range(slots)) + 1).mul(time).div(max(slots, 1), rounding_mode="floor").repeat(batch, 1),
        "picks": picks,
    }
    return made | options


def _everything(draw: Draw) -> dict:
    made = inputs(draw, 2, 61, 4, 20, 47, kv_heads=2, picks=3, groups=2, query_block=6, slot_block=3, scale=0.7)
    return made | {"bias": draw.normal(2, 47, 2)}


def _packed(draw: Draw, query_block: int, slot_block: int) -> dict:
    """Documents without tokens, without slots, and without either."""
    queries, slots = [0, 9, 9, 9, 26, 27, 40], [0, 6, 10, 10, 31, 31, 38]
    made = inputs(draw, 1, 40, 2, 16, 38, kv_heads=1, picks=2, query_block=query_block, slot_block=slot_block)
    made |= {"bias": draw.normal(1, 38, 1), "visible": draw.integers(0, 14, 1, 38)}
    return made | {"cu_seqlens": draw.tensor(queries), "cu_slots": draw.tensor(slots, dtype=torch.int32)}


def _forgetful(draw: Draw, keep: int, **made) -> dict:
    """A call of which each query may read the newest `keep` of the slots that lie before it; none if 0."""
    batch, time = made["q"].shape[:2]
    slots = made["k"].shape[1]
    oldest = draw.tensor([(t + 1) * slots // time - keep for t in range(time)])
    return made | {"oldest": oldest.repeat(batch, 1)}


def _strided(draw: Draw) -> dict:
    made = inputs(draw, 2, 7, 2, 16, 21, slot_block=4)
    made["q"] = draw.normal(2, 2, 16, 7).permute(0, 3, 1, 2)
    made["k"] = draw.normal(2, 2, 21, 32)[..., ::2].transpose(1, 2)
    made["bias"] = draw.normal(2, 2, 21).transpose(1, 2)
    made["visible"] = draw.integers(0, 7, 21, 2).T
    return made


def _ties(draw: Draw) -> dict:
    """Votes that are all equal: the lower blocks win."""
    made = inputs(draw, 1, 3, 1, 16, 70, picks=5)
    return made | {"q": torch.zeros_like(made["q"]), "visible": None}


def _near(name: str, got: Tensor, expected: Tensor, given: dict) -> Tensor | None:
    """Where another block was picked than the reference's, though its vote differs by more than rounding."""
    if name != "index":
        return None
    different = got != expected
    if not different.any():
        return different
    floats = {n: x.double() for n, x in given.items() if isinstance(x, Tensor) and x.is_floating_point()}
    heads, dim = given["q"].shape[2:]
    options = {"bias": None, "visible": None, "oldest": None, "cu_seqlens": None, "cu_slots": None, "groups": heads,
               "query_block": 1, "slot_block": 1, "scale": dim**-0.5} | given | floats  # fmt: skip
    options.pop("picks")
    every = reference.votes(**options)
    vote = [torch.where(i < 0, -torch.inf, every.gather(3, i.long().clamp(min=0))) for i in (got, expected)]
    twice = (got[..., None] == got[..., None, :]).sum(-1) > 1
    return different & (twice | ~((vote[0] - vote[1]).abs() < 1e-4 * (1 + vote[1].abs())))


CASES = [
    Case(name, make, equal=_near)
    for name, make in {
        "one token": lambda d: inputs(d, 1, 1, 1, 16, 1),
        "no token": lambda d: inputs(d, 2, 0, 2, 16, 5),
        "no slot": lambda d: inputs(d, 2, 5, 2, 16, 0),
        "every query, a block per slot": lambda d: inputs(d, 1, 5, 2, 16, 70, kv_heads=1, picks=5),
        "more picks than blocks": lambda d: inputs(d, 1, 9, 1, 80, 7, picks=6, slot_block=2),
        "everything": _everything,
        "all heads together": lambda d: inputs(d, 1, 20, 4, 16, 12, kv_heads=1, groups=1, slot_block=4),
        "few queries, many slots": lambda d: inputs(d, 1, 3, 1, 16, 260, picks=2) | {"visible": None},
        "wide head": lambda d: inputs(d, 1, 12, 1, 256, 40, query_block=4, slot_block=16),
        "blocks wider than a tile": lambda d: inputs(d, 1, 16, 1, 16, 150, query_block=8, slot_block=70),
        "voters beyond a tile": lambda d: inputs(d, 1, 60, 6, 16, 20, groups=1, kv_heads=1, query_block=30),
        "packed queries": lambda d: _packed(d, 1, 8),
        "packed query blocks": lambda d: _packed(d, 4, 3),
        "strided": _strided,
        "slots forgotten": lambda d: _forgetful(d, 7, **inputs(d, 2, 31, 2, 80, 150, picks=3)),
        "slots forgotten within blocks": lambda d: _forgetful(
            d, 10, **inputs(d, 1, 61, 4, 20, 47, kv_heads=2, picks=3, groups=2, query_block=6, slot_block=3)
        ),
        "slots forgotten, few queries": lambda d: _forgetful(
            d, 90, **inputs(d, 1, 3, 1, 16, 260, picks=2, visible=None)
        ),
        "slots forgotten, in no order": lambda d: inputs(
            d, 1, 40, 2, 16, 150, picks=3, query_block=2, oldest=d.integers(-5, 160, 40, 1).T
        ),
        "slots forgotten, packed": lambda d: _packed(d, 4, 3) | {"oldest": d.integers(-2, 12, 1, 40)},
        "slots forgotten, packed queries": lambda d: _packed(d, 1, 2) | {"oldest": d.integers(-2, 12, 1, 40).int()},
        "all slots forgotten": lambda d: _forgetful(d, 0, **inputs(d, 1, 12, 2, 16, 30, picks=2)),
        "ties": _ties,
    }.items()
]


def tiles(inputs: dict) -> dict[str, tuple[int, ...]]:
    """Tile shapes of the fused form's outputs."""
    from . import fused

    (_, time, heads, dim), picks = inputs["q"].shape, inputs["picks"]
    block, group_heads = inputs.get("query_block", 1), heads // (inputs.get("groups") or heads)
    sizes = fused.sizes(-(-time // block), block * group_heads, dim, inputs.get("slot_block", 1), picks)
    shape = (1, sizes["SETS"], 1, picks)
    return dict.fromkeys(("index", "score"), shape)


def benchmarks(device: str) -> list[bench.Case]:
    """Picks of 64-query blocks among slots of an eighth of the tokens, beside the whole matrix of scores."""
    if device == "cuda":
        impls, heads, dim, dtype, times = ("fused", "eager"), 16, 128, torch.bfloat16, (16384, 65536, 262144, 524288)
    else:
        impls, heads, dim, dtype, times = ("eager",), 4, 64, torch.float32, (4096, 16384)

    @functools.lru_cache(maxsize=1)  # one length's tensors at a time, made when its first case runs
    def made(time: int) -> dict:
        q, k = (torch.randn(1, n, heads, dim, dtype=dtype, device=device) for n in (time, time // 8))
        visible = 8 * torch.arange(1, time // 8 + 1, device=device, dtype=torch.int32)[None]
        return {"q": q, "k": k, "visible": visible, "picks": 8, "query_block": 64, "slot_block": 16}

    def case(time: int) -> bench.Case:
        # Eager holds all scores of a set's voters and takes minutes where the fused form is meant for.
        runs = {i: lambda i=i: topk_blocks(**made(time), impl=i) for i in impls if i == "fused" or time <= 65536}
        if time <= 16384:
            runs["whole matrix"] = lambda: whole_matrix(**made(time))
        return bench.Case(
            f"topk_blocks, {time} tokens", runs, op="topk_blocks", length=time, tokens=time,
            dtype=str(dtype).removeprefix("torch."), bytes=(time + time // 8) * heads * dim * dtype.itemsize,
            flops=time * (time // 8) * heads * dim,  # half of all pairs are visible
        )  # fmt: skip

    return [case(time) for time in times]


def whole_matrix(q: Tensor, k: Tensor, visible: Tensor, picks: int, query_block: int, slot_block: int
                 ) -> tuple[Tensor, Tensor]:
    """The rival: every score at once, then torch.topk. Whole blocks, a group per head."""
    voters = q[:, :-query_block].unflatten(1, (-1, query_block))
    score = torch.einsum("bcthd,bjhd->bchtj", voters * q.shape[-1] ** -0.5, k).float()
    first = query_block * torch.arange(1, voters.shape[1] + 1, device=q.device)
    hidden = visible[:, None] > first[:, None]
    score = score.masked_fill_(hidden[:, :, None, None], -torch.inf).unflatten(-1, (-1, slot_block))
    found = score.logsumexp((3, 5)).topk(picks, dim=-1)
    return found.indices, found.values
