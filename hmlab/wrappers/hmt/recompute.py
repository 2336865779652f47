"""What a backward pass makes again instead of keeping it: products of two tensors, and activations.

A norm, a rotation and a gated feed-forward leave many large tensors behind that are one multiplication away from others
that are kept anyway. Where such a tensor is to be saved, the node that made it is remembered, and its own inputs give
the tensor back, to the bit. It costs the multiplication; no layer is run twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

# Smaller tensors are not worth the work.
LEAST = 4096
_AGAIN: dict[str, Callable[[Any], Tensor]] = {
    "MulBackward0": lambda node: node._saved_self * node._saved_other,
    "SiluBackward0": lambda node: F.silu(node._saved_self),
    "GeluBackward0": lambda node: F.gelu(node._saved_self, approximate=node._saved_approximate),
}


class _Made(NamedTuple):
    """A view of what a node made."""

    node: Any
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


def _pack(x: Tensor) -> Tensor | _Made:
    base = x if x._base is None else x._base
    node = base.grad_fn
    if node is None or base.numel() < LEAST or not base.is_contiguous() or node.name() not in _AGAIN:
        return x
    # A product keeps both factors only if both need gradients.
    if node.name() == "MulBackward0" and any(source is None for source, _ in node.next_functions):
        return x
    return _Made(node, x.size(), x.stride(), x.storage_offset())


def _unpack(kept: Tensor | _Made) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    with torch.no_grad():
        return _AGAIN[kept.node.name()](kept.node).as_strided(kept.size, kept.stride, kept.offset)


def products_again() -> saved_tensors_hooks:
    """A context for a forward pass."""
    return saved_tensors_hooks(_pack, _unpack)
