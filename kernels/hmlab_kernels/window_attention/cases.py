"""Inputs of window attention shared by parity, benchmarks and notebooks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .. import bench
from ..parity import Case, Draw
from . import IMPLEMENTATIONS, window_attention


def inputs(draw: Draw, batch: int, time: int, heads: int, dim: int, *, kv_heads: int = 0, keys: int | None = None,
           documents: Sequence[int] = (), documents_keys: Sequence[int] = (), start: Sequence[int] | None = None,
           window: int = 16, **options) -> dict:
    """A call on random numbers. documents, documents_keys: queries and keys of each packed sequence."""
    keys = time if keys is None else keys
    made = {
        "q": draw.normal(batch, time, heads, dim),
        "k": draw.normal(batch, keys, kv_heads or heads, dim),
        "v": draw.normal(batch, keys, kv_heads or heads, dim),
        "window": window,
        **options,
    }
    for name, lengths in (("cu_seqlens", documents), ("cu_keys", documents_keys)):
        if lengths:
            made[name] = draw.tensor([0, *accumulate(lengths)])
    if start is not None:
        made["start"] = draw.tensor(start)
    return made


def _strided(draw: Draw) -> dict:
    made = inputs(draw, 2, 45, 2, 16, window=9, sinks=2)
    made["q"] = draw.normal(2, 2, 45, 16).transpose(1, 2)
    made["k"] = draw.normal(2, 45, 2, 16, 2)[..., 1]
    made["v"] = draw.normal(2, 45, 3, 2, 16)[:, :, 2]
    return made


def _strided_bounds(draw: Draw) -> dict:
    made = inputs(draw, 1, 60, 1, 16, keys=100, documents=(20, 25, 15), documents_keys=(40, 40, 20), window=14)
    made |= {name: made[name].repeat_interleave(2)[::2] for name in ("cu_seqlens", "cu_keys")}
    return made | {"start": draw.tensor([2]).expand(3)}


_ALL = ("q", "k", "v")
CASES = [
    Case("one token", lambda d: inputs(d, 1, 1, 1, 16, sinks=1), _ALL),
    Case("no token", lambda d: inputs(d, 2, 0, 2, 16), _ALL),
    Case("no query", lambda d: inputs(d, 2, 0, 2, 16, keys=5), _ALL),
    Case("odd length, odd dim", lambda d: inputs(d, 2, 77, 2, 20, window=13), _ALL),
    Case("own token only", lambda d: inputs(d, 1, 19, 1, 16, window=1), _ALL),
    Case("window over everything", lambda d: inputs(d, 2, 35, 2, 16, window=100, sinks=4, segment=8), _ALL),
    Case("several blocks, sinks", lambda d: inputs(d, 1, 333, 1, 16, window=40, sinks=3), _ALL),
    Case("segments", lambda d: inputs(d, 1, 301, 1, 16, window=20, segment=24), _ALL),
    Case("segments, sinks, grouped heads", lambda d: inputs(
        d, 2, 90, 4, 80, kv_heads=2, window=17, segment=16, sinks=5, scale=0.2), _ALL),
    Case("many sinks", lambda d: inputs(d, 1, 150, 1, 16, window=8, sinks=70), _ALL),
    Case("more keys than queries", lambda d: inputs(d, 2, 33, 2, 16, keys=90, window=24, sinks=4), _ALL),
    Case("one query, many keys", lambda d: inputs(d, 3, 1, 4, 64, kv_heads=1, keys=70, window=50, sinks=2), _ALL),
    Case("packed documents", lambda d: inputs(
        d, 1, 174, 1, 16, documents=(0, 5, 1, 134, 0, 34), window=20, sinks=2, segment=4), _ALL),
    Case("no document", lambda d: inputs(d, 1, 0, 1, 16) | {"cu_seqlens": d.tensor([0])}, _ALL),
    Case("packed, more keys", lambda d: inputs(
        d, 1, 76, 2, 16, kv_heads=1, keys=170, documents=(3, 0, 70, 3), documents_keys=(50, 7, 110, 3), window=30,
        sinks=3), _ALL),
    Case("stream, ring partly filled", lambda d: inputs(
        d, 4, 10, 2, 16, keys=27 + 3, start=(40, -5, 2, -20), window=9, segment=8, sinks=3), _ALL),
    Case("stream, packed", lambda d: inputs(
        d, 1, 150, 1, 16, keys=190, documents=(130, 0, 20), documents_keys=(147, 0, 43), start=(500, 3, 5), window=16,
        sinks=2), _ALL),
    Case("wide head", lambda d: inputs(d, 1, 40, 1, 256, window=12, sinks=1), _ALL),
    Case("strided", _strided, _ALL),
    Case("strided bounds", _strided_bounds, _ALL),
]


def tiles(inputs: dict) -> dict[str, tuple[int, ...]]:
    """Shapes of the fused form's tiles: where sequences are packed, tiles begin with each and nothing can be said."""
    if find_spec("triton") is None or inputs.get("cu_seqlens") is not None:
        return {}
    from .fused import block_sizes

    q, k = inputs["q"], inputs["k"]
    sizes, back = (block_sizes(q, q.shape[1], k.shape[1], backward) for backward in (False, True))
    return {
        "out": (1, sizes.queries, 1, q.shape[3]),
        "lse": (1, sizes.queries, 1),
        "grad q": (1, back.queries, 1, q.shape[3]),
        "grad k": (1, back.keys, 1, q.shape[3]),
        "grad v": (1, back.keys, 1, q.shape[3]),
    }


def pairs(time: int, window: int, sinks: int = 0) -> int:
    """Query and key pairs that see one another in one document, without segments."""

    def rising(queries: int, most: int) -> int:  # 1 + 2 + .. up to most, and most from then on
        return min(queries, most) * (min(queries, most) + 1) // 2 + max(0, queries - most) * most

    return rising(time, window) + rising(max(0, time - window), sinks)


def benchmarks(device: str) -> list[bench.Case]:
    """The window beside attention to the whole past, and on CUDA beside FlexAttention with the same window."""
    if device == "cuda":
        heads, dim, dtype, quadratic = 16, 128, torch.bfloat16, 65536
        times = {"forward": (16384, 65536, 262144, 524288, 1048576), "forward and backward": (16384, 65536, 524288)}
    else:
        heads, dim, dtype, quadratic = 4, 64, torch.float32, 16384
        times = {"forward": (16384, 65536, 262144, 524288), "forward and backward": (16384, 65536)}
    impls = [impl for impl in IMPLEMENTATIONS if impl in ("eager", "fused" if device == "cuda" else "native")]

    @functools.lru_cache(maxsize=1)  # one length's tensors at a time, made when its first case runs
    def tensors(time: int) -> list[Tensor]:
        made = [torch.randn(1, time, heads, dim, dtype=dtype, device=device) for _ in range(4)]
        return [x.requires_grad_() for x in made[:3]] + made[3:]

    def timed(attend: Callable[..., Tensor], what: str, time: int) -> Callable[[], object]:
        def run():
            *inputs, grad = tensors(time)
            with torch.set_grad_enabled(what != "forward"):
                out = attend(*inputs)
            return out if what == "forward" else torch.autograd.grad(out, inputs, grad)

        return run

    def case(what: str, time: int, window: int) -> bench.Case:
        attends = {impl: lambda *x, i=impl: window_attention(*x, window=window, impl=i)[0] for impl in impls}
        if time <= quadratic and (device == "cuda" or what == "forward"):
            attends["sdpa, whole past"] = _sdpa
        if device == "cuda":
            attends["flex"] = _flex(time, window)
        both = what != "forward"
        size = 4 * heads * dim * pairs(time, window)
        numbers = heads * time * (4 * dim * dtype.itemsize + 4)  # q, k, v, out and the log-sum-exp
        return bench.Case(
            f"{what}, window {window}, {time} tokens", {name: timed(a, what, time) for name, a in attends.items()},
            bytes=numbers * (3 if both else 1), flops=size * 3.5 if both else size, op="window_attention",
            length=time, tokens=time, dtype=str(dtype).removeprefix("torch."),
        )  # fmt: skip

    return [case(what, time, window) for what in times for time in times[what] for window in (128, 256)]


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True).transpose(1, 2)


def _flex(time: int, window: int) -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def sees(batch, head, query, key):
        return (key <= query) & (key > query - window)

    @functools.cache  # neither compiling nor the mask is what is measured
    def compiled():
        mask = create_block_mask(sees, None, None, time, time, device="cuda", _compile=True)
        return torch.compile(functools.partial(flex_attention, block_mask=mask, return_lse=True))

    return lambda q, k, v: compiled()(*(x.transpose(1, 2) for x in (q, k, v)))[0].transpose(1, 2)
