"""The cache of `generate()` for a model with hierarchies: their layers hold a state, the others keys and values.

A `transformers.DynamicCache` is a list of layers. An empty one, which `generate()`, the model or the user has made, is
given layers of ours where the model has hierarchies, so whoever holds it goes on holding the right thing.
Errors: `ValueError` for a cache that cannot be served, a past that is to be taken back, and a cache that is used
without the hierarchy that filled it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils import _pytree as pytree
from transformers import DynamicCache
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from hmlab import memory


class HierarchyLayer(CacheLayerMixin):
    """State of one layer's hierarchy between calls; None before the first. It does not grow with the tokens."""

    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.state: Any | None = None
        self._tokens, self._announced = 0, 0

    def announce(self, tokens: int) -> None:
        """A call of the hierarchy follows that reads as many tokens."""
        self._announced = tokens

    def update(self, key_states: Float[Tensor, "batch heads time dim"],
               value_states: Float[Tensor, "batch heads time dim"], *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Counts the new tokens and hands their keys and values back alone; the past is in the state."""
        self.read(key_states.shape[-2])
        return key_states, value_states

    def read(self, tokens: int) -> None:
        """Counts the new tokens."""
        if tokens != self._announced:
            # Plain attention would take the new tokens for all there are.
            raise ValueError("past_key_values: this cache was filled by a hierarchy and is of no use without one "
                             "(the model was detached, or is another)")  # fmt: skip
        self._announced = 0
        self._tokens += tokens
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the hierarchy makes its state in the first call."""

    def get_seq_length(self) -> int:
        """Tokens read so far, padding included."""
        return self._tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._tokens + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.state, self._tokens, self._announced, self.is_initialized = None, 0, 0, False

    def reorder_cache(self, beam_idx: Int[Tensor, "rows"]) -> None:
        if self.state is not None:
            self.state = memory.reorder(self.state, beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        # A mask of rows is allowed here as well.
        self.reorder_cache(indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.state is not None:
            batch = len(pytree.tree_leaves(self.state)[0])
            self.reorder_cache(torch.arange(batch).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise ValueError(f"tokens_to_remove: expected 0, a compressed past cannot be taken back, "
                             f"got {tokens_to_remove}")  # fmt: skip


def adopt(cache: Cache, ours: Sequence[bool]) -> Cache:
    """The same cache, its layers made ours where said if it is empty. Raises ValueError if it is of another kind."""
    expected = "past_key_values: expected a DynamicCache, empty or filled by the model with its hierarchies, got"
    if type(cache) is not DynamicCache:
        raise ValueError(f"{expected} {type(cache).__name__}")
    if any(isinstance(layer, HierarchyLayer) for layer in cache.layers):
        if len(cache) != len(ours):
            raise ValueError(f"past_key_values: expected {len(ours)} layers, as the model has, got {len(cache)}")
        if [type(layer) is HierarchyLayer for layer in cache.layers] != list(ours):
            raise ValueError(f"{expected} one with hierarchies in other layers")
        if len({layer.get_seq_length() for layer in cache.layers}) > 1:
            raise ValueError(f"{expected} one whose layers have read unlike numbers of tokens")
        return cache
    if cache.get_seq_length() or cache.offloading:
        raise ValueError(f"{expected} one with {'offloading' if cache.offloading else 'keys and values'}")
    cache.layers, cache.layer_class_to_replicate = [HierarchyLayer() if own else DynamicLayer() for own in ours], None
    return cache
