"""The operators under the memories: each with a reference that is the specification and faster forms of it.

`OPS` names the public functions. Every one takes `impl=`; without it the device's default serves, and `used()`
says which implementations did. Nothing falls back silently. `diverge` finds where two implementations part.
"""

import importlib
from collections.abc import Callable

import torch

from . import _dispatch
from ._dispatch import reset_used, used
from .tree_attention import tree_attention

OPS: dict[str, Callable] = {"tree_attention": tree_attention}
for _op in ("tree_build", "window_attention", "hash_codes", "slot_attention", "compress_segments", "topk_blocks", "bucket_lookup"):
    try:
        OPS[_op] = getattr(importlib.import_module(f"{__name__}.{_op}"), _op)
    except (ModuleNotFoundError, AttributeError):  # TEMPORARY: while folders are being written
        pass


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


__all__ = ["OPS", "default_impl", "diverge", "implementations", "reset_used", "tree_attention", "used"]
