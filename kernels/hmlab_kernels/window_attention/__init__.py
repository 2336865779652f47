"""Window attention: exact causal attention over a short window of the past, and the document's first tokens.

    w(p) = floor(max(p − window + 1, 0) / segment) · segment
    out_p = Σ_j softmax_j(scale · q_p · k_j) v_j,   lse_p = log Σ_j exp(scale · q_p · k_j),
    over the tokens j of p's own document with w(p) ≤ j ≤ p, or j < min(sinks, w(p))

p is the 0-based position in the document. With segments of S tokens the window begins where a segment does, so it
holds window to window + S − 1 tokens; with S = 1 it is the plain sliding window. Sources: Longformer (arXiv
2004.05150), section 3.1, for the window; StreamingLLM (arXiv 2309.17453) for the sinks; the segments are ours.
"""

from __future__ import annotations

import importlib

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .. import _checks, _dispatch, _packing
from . import reference
from .layout import Layout

__all__ = ["IMPLEMENTATIONS", "window_attention"]

IMPLEMENTATIONS = ("native", "fused", "eager", "reference")
OUTPUTS = ("out", "lse")


def window_attention(
    q: Float[Tensor, "batch time heads dim"],
    k: Float[Tensor, "batch keys kv_heads dim"],
    v: Float[Tensor, "batch keys kv_heads dim"],
    *,
    window: int,
    sinks: int = 0,
    segment: int = 1,
    start: Int[Tensor, "sequences"] | None = None,
    cu_seqlens: Int[Tensor, "sequences_and_one"] | None = None,
    cu_keys: Int[Tensor, "sequences_and_one"] | None = None,
    scale: float | None = None,
    impl: str | None = None,
) -> tuple[Float[Tensor, "batch time heads dim"], Float[Tensor, "batch time heads"]]:
    """Each query over the window that ends at it, and over the sinks.

    The last query of a sequence belongs to its last key's token, so there may be more keys than queries.
    window, segment: in tokens. sinks: how many of a document's first tokens are always visible.
    start: None if each sequence's keys are a document from its first token on. Else, per sequence, whose keys are then
    `sinks` separate ones (the document's tokens 0 .. sinks − 1, those of this call too) and after them contiguous ones,
    of which the first has position `start`. Keys at negative positions, and sinks that no query reaches, are never
    read: a ring buffer not filled yet. A sink that also lies in the window is read once, from the contiguous keys.
    The caller promises that `start` is at most the window start of the first query; what lies before `start` would be
    missing from its window, unnoticed.
    cu_seqlens, cu_keys: sequences packed in a batch of one, possibly empty; cu_keys None takes cu_seqlens for both.
    scale: dim^-0.5 if None. impl: one of `IMPLEMENTATIONS`; None takes the device's default.
    Returns out in q's dtype, 0 where a query sees nothing, and the log-sum-exp (float32, float64 for float64), −inf
    there; differentiable in q, k and v through both. Deterministic, except for eager's backward on CUDA. Raises
    ValueError by argument.
    """
    _check_tensors(q, k, v)
    _checks.check_integers(window=window, sinks=sinks, segment=segment)
    _checks.check_same_device(q, k=k, v=v, start=start)
    for name, value, least in (("window", window, 1), ("sinks", sinks, 0), ("segment", segment, 1)):
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")
    layout = _layout(q, k, window, sinks, segment, start, cu_seqlens, cu_keys)
    _check_layout(layout)
    impl = _dispatch.choose("window_attention", impl, q.device.type, IMPLEMENTATIONS, q.dtype)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if impl == "reference":
        return reference.window_attention(q, k, v, layout, scale)
    return torch.ops.hmlab.window_attention(
        q, k, v, start, cu_seqlens, cu_keys, window, sinks, segment, scale, impl
    )


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.ndim != 4:
        raise ValueError(f"q: expected [batch, time, heads, dim], got {list(q.shape)}")
    batch, _, heads, dim = q.shape
    if not q.is_floating_point():
        raise ValueError(f"q: expected floating point, got {q.dtype}")
    if not 1 <= dim <= 256:
        raise ValueError(f"q: expected a head dim of 1 to 256, got {dim}")
    if k.ndim != 4 or k.shape[0] != batch or k.shape[3] != dim:
        raise ValueError(f"k: expected [{batch}, keys, kv_heads, {dim}], got {list(k.shape)}")
    if not k.shape[2] or heads % k.shape[2]:
        raise ValueError(f"k: expected a number of heads that divides q's {heads}, got {k.shape[2]}")
    if v.shape != k.shape:
        raise ValueError(f"v: expected k's shape {list(k.shape)}, got {list(v.shape)}")
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise ValueError(f"{name}: expected q's dtype {q.dtype}, got {x.dtype}")


def _check_layout(layout: Layout) -> None:
    _packing.check_cu_seqlens("cu_seqlens", layout.cu_seqlens, layout.batch)
    _packing.check_cu_seqlens("cu_keys", layout.cu_keys, layout.batch)
    if layout.cu_seqlens is None:
        sequences = layout.batch
        if layout.cu_keys is not None:
            raise ValueError("cu_keys: expected None without cu_seqlens, got a tensor")
        if layout.time and layout.keys - layout.lead < layout.time:
            raise ValueError(
                f"k: expected at least {layout.time} keys (as many as queries) after {layout.lead} separate sinks, "
                f"got {layout.keys - layout.lead}"
            )
    else:
        sequences = layout.cu_seqlens.shape[0] - 1
        if layout.cu_keys is None and layout.keys != layout.time:
            raise ValueError(f"k: expected {layout.time} keys (as many as queries) without cu_keys, got {layout.keys}")
        if layout.cu_keys is not None and layout.cu_keys.shape != layout.cu_seqlens.shape:
            raise ValueError(f"cu_keys: expected {sequences + 1} elements like cu_seqlens, got {len(layout.cu_keys)}")
    if layout.start is not None and (layout.start.is_floating_point() or layout.start.shape != (sequences,)):
        raise ValueError(
            f"start: expected integers of shape [{sequences}], one per sequence, "
            f"got {layout.start.dtype} of shape {list(layout.start.shape)}"
        )


def _form(impl: str):
    # fused imports triton, which is not on every machine.
    return importlib.import_module(f"{__name__}.{impl}")


def _layout(q: Tensor, k: Tensor, window: int, sinks: int, segment: int, start: Tensor | None,
            cu_seqlens: Tensor | None, cu_keys: Tensor | None) -> Layout:
    if start is None:
        sinks = min(sinks, k.shape[1])
    return Layout(q.shape[0], q.shape[1], k.shape[1], window, sinks, segment, start, cu_seqlens, cu_keys)


@torch.library.custom_op("hmlab::window_attention", mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor, start: Tensor | None, cu_seqlens: Tensor | None, cu_keys: Tensor | None,
             window: int, sinks: int, segment: int, scale: float, impl: str) -> tuple[Tensor, Tensor]:
    layout = _layout(q, k, window, sinks, segment, start, cu_seqlens, cu_keys)
    return _form(impl).forward(q, k, v, layout, scale)


@_forward.register_fake
def _(q, k, v, start, cu_seqlens, cu_keys, window, sinks, segment, scale, impl):
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))


@torch.library.custom_op("hmlab::window_attention_backward", mutates_args=())
def _backward(q: Tensor, k: Tensor, v: Tensor, start: Tensor | None, cu_seqlens: Tensor | None, cu_keys: Tensor | None,
              window: int, sinks: int, segment: int, scale: float, impl: str, out: Tensor, lse: Tensor,
              grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    layout = _layout(q, k, window, sinks, segment, start, cu_seqlens, cu_keys)
    return _form(impl).backward(q, k, v, layout, scale, out, lse, grad_out, grad_lse)


@_backward.register_fake
def _(q, k, v, start, cu_seqlens, cu_keys, window, sinks, segment, scale, impl, out, lse, grad_out, grad_lse):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx, inputs, output):
    q, k, v, start, cu_seqlens, cu_keys, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, start, cu_seqlens, cu_keys, *output)


def _gradient(ctx, grad_out, grad_lse):
    *inputs, out, lse = ctx.saved_tensors
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    grad_lse = torch.zeros_like(lse) if grad_lse is None else grad_lse
    grads = torch.ops.hmlab.window_attention_backward(*inputs, *ctx.options, out, lse, grad_out, grad_lse)
    return *grads, *[None] * 8


_forward.register_autograd(_gradient, setup_context=_save)


def _flops(q: tuple, k: tuple, v: tuple, start, cu_seqlens, cu_keys, window: int, sinks: int, segment: int, *_,
           **__) -> int:
    # A product with the key and one with the value, two flops each, as if every window and all sinks were there.
    batch, time, heads, dim = q
    return 4 * batch * time * heads * dim * min(k[1], window + (segment - 1) // 2 + sinks)


def _backward_flops(*shapes, **keywords) -> int:
    return _flops(*shapes, **keywords) * 5 // 2


def _register_flops() -> None:
    from torch.utils.flop_counter import register_flop_formula

    register_flop_formula(torch.ops.hmlab.window_attention)(_flops)
    register_flop_formula(torch.ops.hmlab.window_attention_backward)(_backward_flops)


_register_flops()
