"""The operators under the memories: each with a reference that is the specification and faster forms of it.

`OPS` names the public functions. Every one takes `impl=`; without it the device's default serves, and `used()`
says which implementations did. Nothing falls back silently. `diverge` finds where two implementations part.
"""

import importlib
from collections.abc import Callable

import torch

from . import _dispatch
from ._dispatch import reset_used, used
from .bucket_lookup import bucket_lookup, buckets
from .compress_segments import compress_segments
from .hash_codes import hash_codes
from .slot_attention import merge, slot_attention
from .topk_blocks import topk_blocks
from .tree_attention import tree_attention
from .tree_build import tree_build
from .window_attention import window_attention

OPS: dict[str, Callable] = {
    op.__name__: op
    for op in (tree_build, tree_attention, window_attention, hash_codes, slot_attention, compress_segments, topk_blocks,
               bucket_lookup)
}

def implementations(op: str) -> tuple[str, ...]:
    """The names that `impl=` of an operator takes."""
    if op not in OPS:
        raise ValueError(f"op: expected one of {list(OPS)}, got {op!r}")
    return importlib.import_module(f"{__name__}.{op}").IMPLEMENTATIONS


def default_impl(op: str, device_type: str, dtype: torch.dtype = torch.float32) -> str:
    """The implementation that `op` takes on a device when none is named."""
    return _dispatch.preferred(implementations(op), device_type, dtype)


def diverge(op: str, case: str, impl_a: str, impl_b: str, **settings):
    """Where two implementations of `op` first part on a case: see `parity.diverge`."""
    from . import parity

    return parity.diverge(op, case, impl_a, impl_b, **settings)


__all__ = [
    "OPS",
    "bucket_lookup",
    "buckets",
    "compress_segments",
    "default_impl",
    "diverge",
    "hash_codes",
    "implementations",
    "merge",
    "reset_used",
    "slot_attention",
    "topk_blocks",
    "tree_attention",
    "tree_build",
    "used",
    "window_attention",
]
