"""What an HMT adds to its backbone, by arithmetic.

    parameters = width                     T, the summary prompt
               + memories · width          `memory`, the prompt of an empty cache
               + 2 · recall_width · width  W_q and W_k, without bias
               + 1                         the temperature, where keys are normalised

Symbols: width d, of the input embeddings; recall_width h; memories m; cache_size N. Units: numbers, bytes.
Source: arXiv 2405.06067. Errors: ValueError by argument.
"""

from __future__ import annotations


def added_parameters(width: int, recall_width: int, memories: int = 1, key_norm: bool = True) -> int:
    """Parameters that are not the backbone's."""
    _positive(width=width, recall_width=recall_width, memories=memories)
    return width + memories * width + 2 * recall_width * width + key_norm


def cache_bytes(width: int, memories: int = 1, cache_size: int = 300, item: int = 4) -> int:
    """Of the long-term cache of one row when it is full. item: bytes of a number."""
    _positive(width=width, memories=memories, cache_size=cache_size, item=item)
    return cache_size * memories * width * item


def segment_tokens(segment_length: int = 256, sensory: int = 32, memories: int = 1) -> int:
    """Places of the main pass: both prompts, the sensory tokens and the segment's own."""
    _positive(segment_length=segment_length, memories=memories)
    if sensory < 0:
        raise ValueError(f"sensory: expected 0 or more, got {sensory}")
    return segment_length + sensory + 2 * memories


def _positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}: expected 1 or more, got {size}")
