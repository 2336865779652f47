"""Reading and writing on without end: `HMT.prefill`, `HMT.stream`, `HMT.generate`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hmlab.wrappers.hmt.config import State

if TYPE_CHECKING:
    from hmlab.wrappers.hmt.network import HMT

# Segments read between two reports of progress.
SEGMENTS_PER_CALL = 16


@torch.no_grad()
def prefill(self: HMT, ids: Int[Tensor, "batch time"], state: State | None = None, *,
            attention_mask: Tensor | None = None, progress: Callable[[int, int], object] | None = None) -> State:
    """Read a text without keeping logits, in memory that does not grow with it; the state behind it.

    progress: called with the tokens read and those to read, after every few segments.
    """
    state = self.init_state(len(ids)) if state is None else state
    at_once = SEGMENTS_PER_CALL * self.config.segment_length
    # The first call ends with a segment where all rows stand alike, so that later ones begin with one.
    begin, end = 0, at_once - int(state.length.max()) % self.config.segment_length if len(ids) else at_once
    while begin < ids.shape[1]:
        part = slice(begin, min(end, ids.shape[1]))
        layout, state, call = self._call(ids[:, part], None if attention_mask is None else attention_mask[:, part],
                                         state, None)  # fmt: skip
        _, state = call(torch.full(layout.fresh.shape, -100, device=ids.device), None)
        begin, end = part.stop, part.stop + at_once
        if progress is not None:
            progress(begin, ids.shape[1])
    return state


class Stream(Iterator):
    """Tokens as they are chosen, `[batch]` each; `state` has read all of them."""

    def __init__(self, hmt: HMT, state: State, choose: Callable[[Tensor], Tensor], most: int | None,
                 ends: Int[Tensor, "tokens"]) -> None:
        self.state = state
        self._hmt, self._choose, self._left, self._ends = hmt, choose, most, ends
        self._ended = torch.zeros(len(state.count), dtype=torch.bool, device=state.count.device)

    @torch.no_grad()
    def __next__(self) -> Int[Tensor, "batch"]:
        if self._left == 0 or (len(self._ended) and self._ended.all()):
            raise StopIteration
        chosen = self._choose(self._hmt.reader.head()(self.state.last).float())
        mask = None
        if len(self._ends):  # a row that has ended reads no more
            chosen, mask = torch.where(self._ended, self._ends[0], chosen), ~self._ended[:, None]
        layout, _, call = self._hmt._call(chosen[:, None], mask, self.state, None)
        _, self.state = call(torch.full(layout.fresh.shape, -100, device=chosen.device), None)
        self._ended = self._ended | torch.isin(chosen, self._ends)
        self._left = None if self._left is None else self._left - 1
        return chosen


def stream(
    self: HMT,
    ids: Int[Tensor, "batch time"] | None,
    state: State | None = None,
    *,
    attention_mask: Tensor | None = None,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    generator: torch.Generator | None = None,
) -> Stream:
    """Read `ids` (None for nothing more) behind `state`, then write on; what is written is read, and remembered.

    max_new_tokens: None for no end. temperature: divides the logits, 0 takes the likeliest token. top_k, top_p: keep
    only the k likeliest, or the fewest whose probabilities sum to p. eos_token_id: ends a row, which repeats it (of
    several, the first).
    """
    if self.query == "prefix":
        raise ValueError("query: expected 'previous' or 'none' to write, got 'prefix', which needs tokens not yet seen")
    if self.training:
        raise ValueError("model: expected evaluation mode to write (model.eval()), got training mode")
    for name, value, good in (
        ("max_new_tokens", max_new_tokens, max_new_tokens is None or max_new_tokens >= 0),
        ("temperature", temperature, temperature >= 0),
        ("top_k", top_k, top_k is None or top_k >= 1),
        ("top_p", top_p, top_p is None or 0 < top_p <= 1),
    ):
        if not good:
            raise ValueError(f"{name}: expected a number in its range (see HMT.stream), got {value}")
    if ids is not None:
        state = self.prefill(ids, state, attention_mask=attention_mask)
    if state is None or bool((state.tokens(self.config.segment_length) == 0).any()):
        raise ValueError("ids: expected at least one token in each row before writing, got none")

    def choose(logits: Float[Tensor, "batch vocab"]) -> Int[Tensor, "batch"]:
        if temperature == 0:
            return logits.argmax(-1)
        logits = logits / temperature
        if top_k is not None and top_k < logits.shape[-1]:
            logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
        if top_p is not None:
            ranked, order = logits.softmax(-1).sort(descending=True)
            beyond = ranked.cumsum(-1) - ranked >= top_p
            logits = logits.masked_fill(beyond.scatter(1, order, beyond), -torch.inf)
        return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]

    ends = [] if eos_token_id is None else [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
    return Stream(self, state, choose, max_new_tokens, torch.tensor(ends, dtype=torch.int64, device=state.count.device))


def generate(self: HMT, ids: Int[Tensor, "batch time"] | None, *, max_new_tokens: int, state: State | None = None,
             **options: object) -> tuple[Int[Tensor, "batch new"], State]:
    """As `stream`: the new tokens, padded with `eos_token_id` where a row has ended, and the state behind them."""
    written = self.stream(ids, state, max_new_tokens=max_new_tokens, **options)
    tokens = list(written)
    blank = torch.zeros(len(written.state.count), 0, dtype=torch.int64, device=written.state.count.device)
    return torch.stack(tokens, 1) if tokens else blank, written.state
