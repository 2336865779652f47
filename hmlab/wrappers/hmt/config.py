"""What an HMT is made with, and what it carries from call to call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from jaxtyping import Float, Int
from torch import Tensor

from hmlab.layers import check_positive

QUERIES = ("previous", "prefix", "none")
# With fewer, recall chooses among one memory at most, which teaches it nothing.
LEAST_SEGMENTS = 3


@dataclass(frozen=True, kw_only=True)
class Config:
    """The wrapper's fields; names of the paper in brackets.

    segment_length: tokens of the text in a segment. sensory: last tokens of the segment before that are read again [k].
    memories: embeddings that a segment leaves behind. cache_size: segments whose memories are held [N]. query: what
    searches them, see `hmlab.wrappers.hmt`. fraction: share of a segment that the query is made of [j]. recall_dim:
    width of queries and keys [h], None for the backbone's. key_norm: scores are cosines times a learned temperature
    instead of q·k / sqrt(h). keys: a segment has one key, of the mean of its memories, or each memory its own.
    bptt_segments: the state is cut off from the graph after every so many. cache_device: where the cache is kept and
    searched, None for where the text is. checkpoint: what the backward pass computes anew: nothing; products
    of two tensors and activations (`hmlab.wrappers.hmt.recompute`); whole segments. representations: summaries made in
    one pass of the backbone, 1 for one by one. retrieval_loss: weight of the loss that names the segment to recall,
    where the task knows it.
    """

    segment_length: int = 256
    sensory: int = 32
    memories: int = 1
    cache_size: int = 300
    query: Literal["previous", "prefix", "none"] = "previous"
    fraction: float = 0.5
    recall_dim: int | None = None
    key_norm: bool = True
    keys: Literal["mean", "each"] = "mean"
    bptt_segments: int = 6
    cache_device: str | None = None
    checkpoint: Literal["nothing", "elementwise", "segments"] = "nothing"
    representations: int = 32
    retrieval_loss: float = 0.0

    def __post_init__(self) -> None:
        check_positive(self, "segment_length", "cache_size", "bptt_segments", "representations")
        for name in ("sensory", "memories"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected 0 or more, got {getattr(self, name)}")
        if self.sensory > self.segment_length:
            raise ValueError(f"sensory: expected at most segment_length ({self.segment_length}), got {self.sensory}")
        choices = {"query": QUERIES, "keys": ("mean", "each"), "checkpoint": ("nothing", "elementwise", "segments")}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}, got {getattr(self, name)!r}")
        if not self.memories and self.query != "none":
            raise ValueError(f"memories: expected 1 or more for recall (query {self.query!r}), got 0")
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction: expected 0 < fraction <= 1, got {self.fraction}")
        if self.recall_dim is not None and self.recall_dim < 1:
            raise ValueError(f"recall_dim: expected at least 1 or None, got {self.recall_dim}")
        if not self.retrieval_loss >= 0:
            raise ValueError(f"retrieval_loss: expected 0 or more, got {self.retrieval_loss}")

    @property
    def excerpt(self) -> int:
        """Tokens that a query is made of."""
        return max(1, int(self.fraction * self.segment_length))

    @property
    def places(self) -> int:
        """Positions that a segment takes in the backbone."""
        return self.segment_length + self.sensory + 2 * self.memories


class State(NamedTuple):
    """A value, batch first; every row has its own place in its own segment.

    cache: memories of the last N closed segments, the n-th closed (from 0) in slot n mod N. keys: their keys. count:
    segments closed so far. prompt: P of the segment under way. ids: the segment under way, or the closed one before
    the next token; length: how many of them there are. last: hidden state of the last token, which the head turns into
    the next one's logits. past: the backbone's own state inside the segment under way.
    """

    cache: Float[Tensor, "batch slots memories dim"]
    keys: Float[Tensor, "batch slots keys recall_dim"]
    count: Int[Tensor, "batch"]
    prompt: Float[Tensor, "batch memories dim"]
    ids: Int[Tensor, "batch segment_length"]
    length: Int[Tensor, "batch"]
    last: Float[Tensor, "batch dim"]
    past: Any

    def tokens(self, segment_length: int) -> Int[Tensor, "batch"]:
        """Tokens read so far, per row."""
        return self.count * segment_length + self.length.where(self.length < segment_length, 0)


class Output(NamedTuple):
    """loss: mean cross-entropy in nats over the labels that count, None without labels. logits: None with labels.
    state: after the last token."""

    loss: Float[Tensor, ""] | None
    logits: Float[Tensor, "batch time vocab"] | None
    state: State
