"""Inputs of slot attention shared by parity, benchmarks and notebooks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .. import bench
from ..parity import Case, Draw
from . import slot_attention


def inputs(
    draw: Draw, batch: int, time: int, slots: int, heads: int, dim: int, *, kv_heads: int = 0, groups: int = 0,
    picks: int = 3, query_block: int = 1, slot_block: int = 1, start: Sequence[int] | None = None, sets: int = 0,
    bias: bool = True, visible: bool = False, joined: bool = False, documents: Sequence[tuple[int, int]] = (),
    holes: bool = False,
) -> dict:  # fmt: skip
    """A call on random numbers. documents: queries and slots of each packed sequence; holes: some entries are −1 and
    one set (its joined part with it) is empty."""
    kv_heads, groups = kv_heads or heads, groups or heads
    lengths = [n for n, _ in documents] or [time] * batch
    phases = [s % query_block for s in start or [0] * len(lengths)]
    counts = [-(-(p + n) // query_block) if n else 0 for p, n in zip(phases, lengths, strict=True)]
    sets = sets or (sum(counts) if documents else max(counts, default=0))
    # Distinct blocks per set, some of them beyond the last slot.
    blocks = -(-max([n for _, n in documents] or [slots]) // slot_block) + 1
    order = draw.uniform(batch, sets, groups, max(blocks, picks), dtype=torch.float64).argsort(-1)
    index = order[..., :picks].int()
    if holes:
        index = torch.where(draw.uniform(*index.shape, dtype=torch.float64) < 0.3, -1, index)
        index[:, :1] = -1
    wide = torch.promote_types(draw.dtype, torch.float32)
    made = {
        "q": draw.normal(batch, time, heads, dim),
        "k": draw.normal(batch, slots, kv_heads, dim),
        "v": draw.normal(batch, slots, kv_heads, dim),
        "index": index,
        "query_block": query_block,
        "slot_block": slot_block,
    }
    if bias:
        made["bias"] = draw.normal(batch, slots, kv_heads).to(wide)
    if visible:
        made["visible"] = draw.integers(-2, max(lengths, default=0) + 1, batch, slots).int()
    if start is not None:
        made["start"] = draw.tensor(start)
    if documents:
        made["cu_seqlens"] = _bounds(draw, lengths)
        made["cu_slots"] = _bounds(draw, [n for _, n in documents])
    if joined:
        lse = draw.normal(batch, time, heads).to(wide)
        out = draw.normal(batch, time, heads, dim)
        if holes:
            lse[:, :1] = -torch.inf
            out[:, :1] = 0
        made["joined"] = (out, lse)
    return made


def _bounds(draw: Draw, lengths: Sequence[int]) -> Tensor:
    return draw.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()]).int()


def _strided(draw: Draw) -> dict:
    made = inputs(draw, 2, 9, 11, 2, 16, query_block=4, slot_block=2, visible=True, joined=True)
    made["q"] = draw.normal(2, 2, 9, 16).transpose(1, 2)
    made["k"] = draw.normal(2, 2, 11, 16).transpose(1, 2)
    made["v"] = draw.normal(2, 11, 2, 16, 2)[..., 0]
    made["bias"] = made["bias"].mT.contiguous().mT
    made["visible"] = made["visible"].mT.contiguous().mT
    out, lse = made["joined"]
    made["joined"] = (out.transpose(1, 2).contiguous().transpose(1, 2), lse.mT.contiguous().mT)
    return made


def _massless(draw: Draw) -> dict:
    """Slots of no mass, and a query that reads nothing else."""
    made = inputs(draw, 1, 6, 8, 2, 16, query_block=2, picks=4)
    made["bias"][:, ::2] = -torch.inf
    made["index"][:, :1] = 2 * torch.arange(4, dtype=torch.int32, device=draw.device)
    return made


_SLOTS = ("q", "k", "v")
_ALL = ("q", "k", "v", "bias")
_JOINED = (*_ALL, "joined")
_DOCUMENTS = ((5, 3), (0, 4), (1, 0), (9, 6), (0, 0), (4, 1))
CASES = [
    Case("one query", lambda d: inputs(d, 1, 1, 4, 1, 16), _ALL),
    Case("no query", lambda d: inputs(d, 2, 0, 4, 2, 16), _ALL),
    Case("no slots", lambda d: inputs(d, 2, 5, 0, 2, 16, query_block=2), _ALL),
    Case("no picks", lambda d: inputs(d, 1, 5, 6, 2, 16, picks=0), _ALL),
    Case("own sets", lambda d: inputs(d, 2, 5, 9, 2, 20, slot_block=2), _ALL),
    Case("sets of a kv head", lambda d: inputs(d, 1, 7, 12, 4, 16, kv_heads=2, groups=2, slot_block=4), _ALL),
    Case("groups within a kv head", lambda d: inputs(d, 1, 6, 12, 4, 16, kv_heads=1, groups=2, query_block=2), _ALL),
    Case("own sets, one kv head", lambda d: inputs(d, 1, 6, 9, 4, 16, kv_heads=1, slot_block=2), _ALL),
    Case("blocks of 4", lambda d: inputs(d, 2, 11, 10, 2, 16, query_block=4, sets=5, bias=False), _SLOTS),
    Case("blocks of 16", lambda d: inputs(d, 1, 37, 26, 2, 80, query_block=16, slot_block=4, kv_heads=1), _ALL),
    Case("whole blocks", lambda d: inputs(d, 2, 64, 40, 2, 16, query_block=32, slot_block=8, bias=False), _SLOTS),
    Case("wide blocks", lambda d: inputs(
        d, 1, 80, 50, 2, 16, query_block=75, slot_block=40, picks=2, kv_heads=1, groups=1, visible=True), _ALL),
    Case("started inside a block", lambda d: inputs(
        d, 2, 9, 10, 1, 16, query_block=4, slot_block=2, start=(3, 6)), _ALL),
    Case("visible from inside a block", lambda d: inputs(
        d, 2, 10, 12, 1, 16, query_block=4, slot_block=3, bias=False, visible=True, start=(5, 4)), _SLOTS),
    Case("holes, empty sets", lambda d: inputs(d, 2, 7, 12, 1, 16, query_block=2, slot_block=4, holes=True), _ALL),
    Case("no mass", _massless, _SLOTS),
    Case("joined", lambda d: inputs(d, 1, 9, 12, 4, 16, kv_heads=2, query_block=4, slot_block=2, joined=True), _JOINED),
    Case("joined, holes", lambda d: inputs(d, 1, 6, 8, 2, 20, holes=True, joined=True, visible=True), _JOINED),
    Case("joined to no slots", lambda d: inputs(d, 1, 5, 0, 2, 16, holes=True, joined=True), _JOINED),
    Case("packed", lambda d: inputs(
        d, 1, 19, 14, 2, 16, query_block=4, slot_block=2, documents=_DOCUMENTS, visible=True), _ALL),
    Case("packed, started, joined", lambda d: inputs(
        d, 1, 19, 14, 1, 16, query_block=4, documents=_DOCUMENTS, start=(1, 7, 2, 3, 0, 9), sets=12,
        joined=True), _JOINED),
    Case("packed, nothing", lambda d: inputs(d, 1, 0, 0, 2, 16, documents=((0, 0),)), _ALL),
    Case("wide head", lambda d: inputs(d, 1, 5, 18, 1, 256, query_block=3, slot_block=4), _ALL),
    Case("strided", _strided, _JOINED),
]


def tiles(inputs: dict) -> dict[str, tuple[int, ...]]:
    """What one program of the fused form writes: some queries of a set, the heads of a group. Where blocks do not
    begin with the axis nothing can be said."""
    if find_spec("triton") is None or "start" in inputs or "cu_seqlens" in inputs:
        return {}
    from .fused import rows_per_tile

    q, query_block = inputs["q"], inputs["query_block"]
    heads, dim = q.shape[2:]
    share = heads // inputs["index"].shape[2]
    rows = rows_per_tile(query_block * share, dim, q.element_size())
    queries = min(query_block, max(1, rows // share))
    return {"out": (1, queries, share, dim), "lse": (1, queries, share), "grad q": (1, queries, share, dim)}


def benchmarks(device: str) -> list[bench.Case]:
    """128 slots of 16 tokens each per 64 queries, alone and joined to a window of 128, beside causal attention; with
    the choice of slots counted, where it is exact and so quadratic; and one query, as in decoding."""
    if device == "cuda":
        impls, heads, dim, dtype = ("fused", "eager"), 16, 128, torch.bfloat16
        alone = {"forward": (16384, 65536, 524288, 1048576), "forward and backward": (16384, 65536, 524288)}
        joined = {"forward": (1024, 4096, 16384, 524288, 1048576), "forward and backward": (16384, 524288)}
    else:
        impls, heads, dim, dtype = ("native", "eager"), 4, 64, torch.float32
        alone = {"forward": (16384, 65536, 524288), "forward and backward": (16384,)}
        joined = {"forward": (1024, 4096, 16384, 524288)}

    @functools.lru_cache(maxsize=1)  # one length's tensors at a time, made when its first case runs
    def tensors(time: int) -> dict[str, Tensor]:
        shapes = {"q": time, "k": time // 16, "v": time // 16, "window k": time, "window v": time}
        made = {name: torch.randn(1, n, heads, dim, dtype=dtype, device=device) for name, n in shapes.items()}
        return {name: x.requires_grad_() for name, x in made.items()} | {"index": _past_blocks(time, heads, device)}

    def timed(read: Callable[[dict[str, Tensor]], Tensor], what: str, time: int) -> Callable[[], object]:
        def run():
            made = tensors(time)
            with torch.set_grad_enabled(what != "forward"):
                out = read(made)
            if what == "forward":
                return out
            leaves = [x for x in made.values() if x.requires_grad]
            return torch.autograd.grad(out, leaves, made["q"].detach()[:, : out.shape[1]], allow_unused=True)

        return run

    def case(op: str, what: str, time: int) -> bench.Case:
        window = op == "window + slots"
        runs = {impl: timed(functools.partial(_read, window=window, impl=impl), what, time) for impl in impls}
        if (window or time == _SHORT) and (device == "cuda" or what == "forward"):
            runs["sdpa" if time <= _SHORT else f"sdpa, {_SHORT} tokens"] = timed(_whole_past, what, time)
        if window and what == "forward" and time <= _SHORT:
            runs["slots chosen too"] = timed(functools.partial(_read, window=True, impl=None, choose=True), what, time)
        # q, out, and k and v of the slots; k and v of the window, and its out once.
        numbers = (2 + 2 / 16 + (3 if window else 0)) * time * heads * dim
        flops = 4 * time * heads * dim * (256 if window else 128)
        both = what != "forward"
        return bench.Case(
            f"{op}, {what}, {time} tokens", runs, bytes=numbers * dtype.itemsize * (3 if both else 1),
            flops=flops * (3.5 if both else 1), op="slot_attention" if not window else op, length=time, tokens=time,
            dtype=str(dtype).removeprefix("torch."),
        )  # fmt: skip

    def decoding(context: int) -> bench.Case:
        runs = {impl: timed(functools.partial(_decode, impl=impl), "forward", context) for impl in impls}
        runs[f"sdpa, cache of {_SHORT}"] = timed(_decode_with_cache, "forward", context)
        keys = 256 * heads * dim
        return bench.Case(f"decoding, a token after {context}", runs, bytes=2 * keys * dtype.itemsize, flops=4 * keys,
                          op="decoding", length=context, tokens=1, dtype=str(dtype).removeprefix("torch."))  # fmt: skip

    return [
        case(op, what, time)
        for op, times in (("slots", alone), ("window + slots", joined))
        for what in times
        for time in times[what]
    ] + [decoding(524288)]


_SHORT = 16384  # where causal attention over the whole past is what one would use


def _past_blocks(time: int, groups: int, device: str) -> Tensor:
    """Eight blocks of 16 slots for every 64 queries, spread at random over the past."""
    past = torch.arange(time // 64, device=device)[:, None, None] // 4
    pick = torch.arange(8, device=device)
    spread = (pick + torch.rand(time // 64, groups, 8, device=device)) * past / 8
    return torch.where(past >= 8, spread.int(), torch.where(pick < past, pick, -1)).int()[None]


def _read(made: dict[str, Tensor], *, window: bool, impl: str | None, choose: bool = False) -> Tensor:
    joined, index = None, made["index"]
    if choose:
        from ..topk_blocks import topk_blocks

        since = 16 * torch.arange(1, made["k"].shape[1] + 1, device=index.device)[None] + 128
        index, _ = topk_blocks(made["q"], made["k"], picks=8, visible=since, query_block=64, slot_block=16)
    if window:
        from ..window_attention import window_attention

        joined = window_attention(made["q"], made["window k"], made["window v"], window=128, impl=impl)
    return slot_attention(made["q"], made["k"], made["v"], index, query_block=64, slot_block=16,
                          joined=joined, impl=impl)[0]  # fmt: skip


def _decode(made: dict[str, Tensor], *, impl: str) -> Tensor:
    """The last token alone: its window of 128, and the slots of its set."""
    from ..window_attention import window_attention

    q = made["q"][:, -1:]
    near = window_attention(q, made["window k"][:, -128:], made["window v"][:, -128:], window=128, impl=impl)
    return slot_attention(q, made["k"], made["v"], made["index"][:, -1:], slot_block=16, joined=near, impl=impl)[0]


def _decode_with_cache(made: dict[str, Tensor]) -> Tensor:
    q, k, v = (made[name].transpose(1, 2) for name in ("q", "window k", "window v"))
    return scaled_dot_product_attention(q[:, :, -1:], k[:, :, -_SHORT:], v[:, :, -_SHORT:])


def _whole_past(made: dict[str, Tensor]) -> Tensor:
    q, k, v = (made[name][:, :_SHORT].transpose(1, 2) for name in ("q", "window k", "window v"))
    return scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
