"""The operators under the memories: each with a reference that is the specification and faster forms of it.

`OPS` names the public functions. Every one takes `impl=`; without it the device's default serves, and `used()`
says which implementations did. Nothing falls back silently.
"""

from ._dispatch import default_impl, reset_used, used
from .tree_attention import tree_attention

OPS = {"tree_attention": tree_attention}

__all__ = ["OPS", "default_impl", "reset_used", "tree_attention", "used"]
