"""Inputs of tree attention shared by parity, benchmarks and notebooks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import bench
from ..parity import Case, Draw
from . import _WIDEST_FUSED, tree_attention
from .levels import Level, visible_rows


def whole_tree(batch: int, time: int, *, arity: int = 2, slots: int = 1, expansion: int = 0, carry: int = 0,
               start: int = 0) -> tuple[list[Level], int]:
    """Where the levels of a tree over `time` tokens lie, slot by slot, and how many rows there are.

    expansion: level i has slots · (1 + i · expansion) slots. carry: nodes of each level from before the call, when
    rows held up to `start` tokens.
    """
    levels, offset, span = [], 0, arity
    while span <= start + time:
        nodes, held = carry + -(-time // span), slots * (1 + (len(levels) + 1) * expansion)
        levels.append(Level(offset, nodes, 1, batch * nodes, held, carry))
        offset += held * batch * nodes
        span *= arity
    return levels, offset


def inputs(draw: Draw, batch: int, time: int, heads: int, dim: int, *, arity: int = 2, slots: int = 1,
           expansion: int = 0, documents: Sequence[int] = (), padding: int = 0, carry: int = 0,
           starts: Sequence[int] = ()) -> dict:
    """A call on random numbers. documents: lengths of the documents of each row (one of `time` if empty); padding:
    tokens at the end of each row that hold none; starts: tokens that each row's first document held before the call
    (0 if empty; needs carry where any is not)."""
    starts = list(starts) or [0] * batch
    levels, rows = whole_tree(
        batch, time, arity=arity, slots=slots, expansion=expansion, carry=carry, start=max(starts, default=0)
    )
    lengths = list(documents) or [time - padding]
    position = []
    for start in starts:
        position.append([t + 1 + (start if i == 0 else 0) for i, length in enumerate(lengths) for t in range(length)])
        position[-1] += [0] * padding
    return {
        "own": draw.normal(batch, time, 3, heads, dim),
        "nodes": draw.normal(rows, 2, heads, dim),
        "position": draw.tensor(position).reshape(batch, time),
        "levels": levels,
        "arity": arity,
    }


def _strided(draw: Draw) -> dict:
    made = inputs(draw, 2, 21, 2, 16)
    made["own"] = draw.normal(2, 3, 2, 21, 16).permute(0, 3, 1, 2, 4)
    made["nodes"] = draw.normal(*made["nodes"].shape, 2)[..., 0]
    return made


def _holes(draw: Draw) -> dict:
    """Padding in front and in between, over more than a tile."""
    made = inputs(draw, 2, 72, 1, 16, arity=4)
    position = made["position"]
    position[0, 7:20], position[0, 20:] = 0, position[0, 7:59].clone()
    position[1, :68], position[1, 68:] = 0, position[1, :4].clone()
    return made


_BOTH = ("own", "nodes")
CASES = [
    Case("one token", lambda d: inputs(d, 1, 1, 1, 16), _BOTH),
    Case("no token", lambda d: inputs(d, 2, 0, 2, 16), _BOTH),
    Case("odd length, odd dim", lambda d: inputs(d, 2, 77, 2, 20), _BOTH),
    Case("two banks", lambda d: inputs(d, 1, 40, 1, 32, slots=2), _BOTH),
    Case("slots that grow with the level", lambda d: inputs(d, 1, 20, 1, 16, slots=2, expansion=1), _BOTH),
    Case("four children", lambda d: inputs(d, 1, 70, 1, 16, arity=4), _BOTH),
    Case("packed documents, padding", lambda d: inputs(d, 2, 64, 1, 16, documents=(5, 1, 33, 16), padding=9), _BOTH),
    Case("padding in between", _holes, _BOTH),
    Case("documents across tiles", lambda d: inputs(d, 1, 135, 1, 16, documents=(50, 60, 3, 22)), _BOTH),
    Case("one below a tile", lambda d: inputs(d, 1, 63, 1, 16, arity=3), _BOTH),
    Case("a tile", lambda d: inputs(d, 1, 64, 1, 16), _BOTH),
    Case("one above a tile, narrow heads", lambda d: inputs(d, 1, 65, 2, 8), _BOTH),
    Case("nodes of earlier calls", lambda d: inputs(d, 1, 66, 1, 16, carry=1, starts=(37,)), _BOTH),
    Case("rows at different positions", lambda d: inputs(d, 2, 30, 1, 16, carry=2, starts=(90, 0)), _BOTH),
    Case("earlier calls, then documents",
         lambda d: inputs(d, 2, 66, 1, 16, carry=2, starts=(13, 300), documents=(20, 46)), _BOTH),
    Case("another scale", lambda d: inputs(d, 1, 20, 1, 16) | {"scale": 0.5}, _BOTH),
    Case("wide head", lambda d: inputs(d, 1, 9, 1, 256), _BOTH),
    Case("head of 80", lambda d: inputs(d, 1, 33, 1, 80), _BOTH),
    Case("strided", _strided, _BOTH),
]  # fmt: skip


def tiles(inputs: dict) -> dict[str, tuple[int, ...]]:
    """Tile shapes of the fused form; the nodes' gradient has none, its rows are written by the tiles that read them."""
    own = inputs["own"]
    *_, dim = own.shape
    if dim * own.element_size() > _WIDEST_FUSED:
        return {}
    from .fused import tile_of

    ahead, back = (tile_of(dim, own.element_size(), backward=b).positions for b in (False, True))
    return {"out": (1, ahead, 1, dim), "lse": (1, ahead, 1), "grad own": (1, back, 3, 1, dim)}


def benchmarks(device: str) -> list[bench.Case]:
    """Beside the published formulation, which holds a copy of every visible node for every position, and full
    attention of the same width, each as far as it fits."""
    if device == "cpu":
        sizes, heads, dim, dtype, impls = (2048, 8192, 32768, 131072), 1, 32, torch.float32, ("native", "eager")
        longest = {"published": 131072, "sdpa": 16384}
    else:
        sizes, heads, dim, dtype = (8192, 32768, 131072), 8, 128, torch.bfloat16
        impls, longest = ("fused", "eager"), {"published": 131072, "sdpa": 131072}
    rivals = {"published": _published, "sdpa": _attention}
    cases = []
    for length in sizes:
        made = inputs(Draw(dtype, device), 1, length, heads, dim)
        runs: dict[str, Callable[..., Tensor]] = {impl: partial(_tree, impl) for impl in impls}
        runs |= {name: run for name, run in rivals.items() if length <= longest[name]}
        bytes_ = (made["own"].numel() * 4 // 3 + made["nodes"].numel()) * made["own"].element_size()
        visible = 1 + sum(length - 2 ** (i + 1) + 1 for i in range(len(made["levels"]))) / length
        flops = 4 * length * heads * dim * visible
        about = {"op": "tree_attention", "length": length, "tokens": length, "dtype": str(dtype).removeprefix("torch.")}
        label = f"L {length}, {heads} x {dim}"
        cases.append(bench.Case(
            f"tree_attention forward, {label}", {name: partial(run, **made) for name, run in runs.items()},
            bytes=bytes_, flops=flops, **about,
        ))  # fmt: skip
        # The way back reads all that again, the output's gradient too, and writes as much; five products, not two.
        both = {n: partial(_both, run, made) for n, run in runs.items() if n != "published" or length <= 32768}
        cases.append(bench.Case(
            f"tree_attention forward and backward, {label}", both, bytes=3 * bytes_, flops=3.5 * flops, **about
        ))  # fmt: skip
    return cases


def _both(run: Callable[..., Tensor], made: dict) -> tuple:
    leaves = {name: made[name].detach().requires_grad_() for name in _BOTH}
    out = run(**made | leaves)
    # Any gradient will do; full attention reads no node.
    return torch.autograd.grad(out, list(leaves.values()), made["own"][:, :, 2], allow_unused=True)


def _tree(impl: str, **made) -> Tensor:
    return tree_attention(**made, impl=impl)[0]


def _attention(own: Tensor, **_) -> Tensor:
    query, key, value = own.transpose(1, 3).unbind(2)
    return F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2)


def _published(own: Tensor, nodes: Tensor, position: Tensor, levels: Sequence[Level], arity: int) -> Tensor:
    """The authors' dense attention: the memory repeated for every position, `[batch, time, 1 + levels, ...]`."""
    query, key, value = own.unbind(2)
    queries, values, masks = [query[:, :, None]], [value[:, :, None]], [(position > 0)[..., None]]
    for i, level in enumerate(levels):
        rows, sees = visible_rows(position, level, arity ** (i + 1))
        queries.append(nodes[rows, 0])
        values.append(nodes[rows, 1])
        masks.append(sees[..., None].expand(rows.shape))
    score = torch.einsum("bthd,btnhd->bthn", key, torch.cat(queries, 2)) * key.shape[-1] ** -0.5
    weight = score.masked_fill(~torch.cat(masks, 2)[:, :, None], -torch.inf).softmax(-1)
    return torch.einsum("bthn,btnhd->bthd", weight, torch.cat(values, 2))
