"""Pieces that several memories are made of: documents in a call, heads, rotation, local attention, scans."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from hmlab.memory import document_positions
from hmlab.record import call_start, observe, recording_is_on

# Beyond this many keys a map of all attention weights is no longer recorded.
RECORDED_KEYS = 2048


class Documents:
    """Where the tokens of one call stand in their documents, once padding is moved to the end of every row.

    Between `pack` and `unpack` a memory sees rows without gaps, so that "the previous n tokens" are n neighbours.

    start: tokens consumed of the document that the state is in `[batch]`. reset, valid: as given to the call.
    number `[batch, time]`: 0 in the document of the state, 1, 2, … in those that begin here, -1 at padding.
    position `[batch, time]`: tokens before this one in its document, -1 at padding. count: tokens of the call that
    are not padding `[batch]`. last, end: number of the document the row ends in, and its tokens so far `[batch]`.
    """

    def __init__(self, start: Int[Tensor, "batch"], reset: Bool[Tensor, "batch time"] | None,
                 valid: Bool[Tensor, "batch time"] | None, time: int):
        self.start, self.valid, self.time = start, valid, time
        position, end = document_positions(start, reset, valid, time)
        number = torch.zeros_like(position) if reset is None else reset.long().cumsum(1)
        self.last, self.end = number[:, -1], end.clone()
        if valid is None:
            self.count = torch.full_like(start, time)
            self.number, self.position = number, position - 1
            return
        self.count = valid.sum(1)
        self._order = torch.argsort(~valid, dim=1, stable=True)
        self._place = torch.where(valid, valid.cumsum(1), self.count[:, None] + (~valid).cumsum(1)) - 1
        self.number = number.masked_fill(~valid, -1).gather(1, self._order)
        self.position = (position - 1).gather(1, self._order)

    def pack(self, x: Shaped[Tensor, "batch time *rest"]) -> Shaped[Tensor, "batch time *rest"]:
        """Padding goes to the end of its row; what it held, even NaN, is gone."""
        if self.valid is None:
            return x
        return _rows(torch.where(_like(self.valid, x), x, 0), self._order)

    def unpack(self, y: Shaped[Tensor, "batch time *rest"]) -> Shaped[Tensor, "batch time *rest"]:
        """Tokens go back to where they came from; zero at padding."""
        if self.valid is None:
            return y
        return torch.where(_like(self.valid, y), _rows(y, self._place), 0)

    def held(self, slots: int) -> Int[Tensor, "batch slots"]:
        """Document of each slot of a state whose last `start` slots are filled: 0, or -1 where nothing is."""
        age = torch.arange(slots, 0, -1, device=self.start.device)
        return torch.where(age <= self.start[:, None], 0, -1)

    def latest(self, sequence: Float[Tensor, "*batch_heads slots dim"], keep: int
               ) -> Float[Tensor, "*batch_heads kept dim"]:
        """The last `keep` slots of a state's slots and the call's tokens behind them, padding left out; a copy."""
        slots = sequence.shape[-2]
        if self.valid is None:
            return sequence[..., slots - keep :, :].clone()
        index = torch.arange(slots - keep, slots, device=sequence.device) - (self.time - self.count)[:, None]
        return slots_at(sequence, index.clamp(min=0))

    def times(self, slots: int = 0) -> Int[Tensor, "batch slots_and_time"]:
        """Time in the recorded stream of a state's slots and of the call's tokens."""
        held = torch.arange(-slots, 0, device=self.start.device).expand(len(self.start), slots)
        plain = torch.arange(self.time, device=self.start.device).expand(len(self.start), self.time)
        return call_start() + torch.cat((held, plain if self.valid is None else self._order), 1)


def _like(mask: Tensor, x: Tensor) -> Tensor:
    return mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim))


def _rows(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, _like(index, x).expand(x.shape))


def slots_at(sequence: Float[Tensor, "batch *heads slots dim"], index: Int[Tensor, "batch chosen"]
             ) -> Float[Tensor, "batch *heads chosen dim"]:
    """The slots that `index` names, row by row."""
    index = index.reshape(len(index), *(1,) * (sequence.ndim - 3), -1, 1)
    return sequence.gather(-2, index.expand(*sequence.shape[:-2], -1, sequence.shape[-1]))


def check_positive(config: object, *names: str) -> None:
    """Refuse a configuration whose named fields are not all at least 1."""
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"{name}: expected at least 1, got {getattr(config, name)}")


def check_heads(dim: int, heads: int, *, rotary: bool = False) -> None:
    """Refuse a dim that the heads do not divide, or into odd parts where pairs of channels are rotated."""
    if heads < 1 or dim < 1 or dim % heads:
        raise ValueError(f"dim: expected a positive multiple of heads ({heads}), got {dim}")
    if rotary and dim // heads % 2:
        raise ValueError(f"dim: expected an even number per head for rotary positions, got {dim} for {heads} heads")


def split_heads(x: Float[Tensor, "batch time dim"], heads: int) -> Float[Tensor, "batch {heads} time head_dim"]:
    return rearrange(x, "batch time (heads dim) -> batch heads time dim", heads=heads)


def merge_heads(x: Float[Tensor, "batch heads time head_dim"]) -> Float[Tensor, "batch time dim"]:
    return rearrange(x, "batch heads time dim -> batch time (heads dim)")


def rotate(x: Float[Tensor, "batch heads time head_dim"], position: Int[Tensor, "batch time"], base: float
           ) -> Float[Tensor, "batch heads time head_dim"]:
    """Rotary positions (Su et al. 2021): channel pair (i, i + D/2) turned by position · base^(-2i/D) radians."""
    return rotation(x, position[:, None], base)


def rotation(x: Float[Tensor, "*rows head_dim"], position: Shaped[Tensor, "*#rows"], base: float
             ) -> Float[Tensor, "*rows head_dim"]:
    """`rotate` in any layout: a position for each vector of x, or one that broadcasts; not always a whole number."""
    half = x.shape[-1] // 2
    # A position near a million has no digits left for its angle in float32.
    frequency = base ** (-torch.arange(half, device=x.device, dtype=torch.float64) / half)
    angle = position.double()[..., None] * frequency
    precise = torch.promote_types(x.dtype, torch.float32)
    left, right = x.to(precise).chunk(2, -1)
    cos, sin = angle.cos().to(precise), angle.sin().to(precise)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), -1).to(x.dtype)


def blocks(sequence: Tensor, size: int, step: int) -> Tensor:
    """Windows of `size` slots every `step`: `[..., slots, dim]` to `[..., windows, size, dim]`."""
    return sequence.unfold(-2, size, step).transpose(-1, -2)


class Far(NamedTuple):
    """Keys beyond the band that whole blocks of queries may see besides; mask `[batch, blocks, block, far]`."""

    keys: Float[Tensor, "batch heads blocks far dim"]
    values: Float[Tensor, "batch heads blocks far dim"]
    mask: Bool[Tensor, "batch blocks block far"]


def local_attention(
    q: Float[Tensor, "batch heads time dim"], keys: Float[Tensor, "batch heads slots dim"],
    values: Float[Tensor, "batch heads slots dim"], documents: Documents, far: Far | None = None,
) -> Float[Tensor, "batch heads time dim"]:
    """Each token attends to itself and to `slots - time` tokens before it, as far as its document reaches.

    In blocks of queries no longer than that reach: time · window scores, no square mask.
    """
    batch, _, time, _ = q.shape
    reach = keys.shape[2] - time
    block = min(reach + 1, time)
    size = block + reach
    fill = -time % block
    query_number = F.pad(documents.number, (0, fill), value=-1).unfold(1, block, block)
    key_number = F.pad(torch.cat((documents.held(reach), documents.number), 1), (0, fill), value=-1)
    key_number = key_number.unfold(1, size, block)
    offset = torch.arange(size, device=q.device) - torch.arange(block, device=q.device)[:, None]
    mask = (query_number[..., None] == key_number[..., None, :]) & (offset >= 0) & (offset <= reach)

    q = blocks(F.pad(q, (0, 0, 0, fill)), block, block)
    keys, values = (blocks(F.pad(t, (0, 0, 0, fill)), size, block) for t in (keys, values))
    if far is not None:
        keys, values = torch.cat((far.keys, keys), -2), torch.cat((far.values, values), -2)
        mask = torch.cat((far.mask, mask), -1)
    q, keys, values = (rearrange(t, "batch heads blocks size dim -> (batch blocks) heads size dim")
                       for t in (q, keys, values))  # fmt: skip
    y = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask.flatten(0, 1)[:, None])
    return rearrange(y, "(batch blocks) heads size dim -> batch heads (blocks size) dim", batch=batch)[:, :, :time]


def observe_attention(scores: Callable[[], Tensor], mask: Callable[[], Tensor], documents: Documents,
                      key_times: Callable[[], Tensor]) -> None:
    """Observe softmaxed scores as `attention` (batch, time, heads, key), key being a time of the stream.

    scores: `[batch, heads, time, slots]`. mask: what is visible `[batch, heads or 1, time, slots]`. key_times: time of
    each slot `[batch, slots]`.
    """

    def weights() -> Tensor:
        visible = mask()
        weight = torch.where(visible, scores().float(), -torch.inf).softmax(-1).nan_to_num()
        times = key_times()[:, None, None].expand(weight.shape)
        stream = weight.new_zeros(*weight.shape[:3], call_start() + documents.time)
        # What a state held from before the recording began has no place on its axis, nor has an empty slot.
        on_axis = (times >= 0) & (times < stream.shape[-1])
        stream = stream.scatter_add(-1, torch.where(on_axis, times, 0), weight * on_axis)
        return documents.unpack(stream.transpose(1, 2))

    if recording_is_on("attention") and call_start() + documents.time <= RECORDED_KEYS:
        observe("attention", weights, ("batch", "time", "heads", "key"))


class Chunks(NamedTuple):
    """Documents cut into chunks of equal length. number: as in `Documents`. before, after: the document that is
    remembered before and after each chunk."""

    number: Int[Tensor, "batch chunks chunk"]
    before: Int[Tensor, "batch chunks"]
    after: Int[Tensor, "batch chunks"]


def chunked(documents: Documents, chunk: int) -> Chunks:
    # Counted out, not left to the shapes: torch.compile gets lost in what follows from a length it does not know.
    chunks = (documents.time + chunk - 1) // chunk
    number = F.pad(documents.number, (0, chunks * chunk - documents.time), value=-1).unflatten(1, (chunks, chunk))
    after = number.amax(2).clamp(min=0).cummax(1).values
    return Chunks(number, F.pad(after[:, :-1], (1, 0)), after)


def in_chunks(x: Float[Tensor, "batch heads time dim"], chunks: int, chunk: int
              ) -> Float[Tensor, "batch {chunks} heads {chunk} dim"]:
    """The tokens of each chunk together, the last one filled with zeros."""
    return F.pad(x, (0, 0, 0, chunks * chunk - x.shape[2])).unflatten(2, (chunks, chunk)).transpose(1, 2)


def linear_scan(keep: Tensor, written: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """h_c = keep_c · h_{c-1} + written_c along axis 1, by doubling: log2(chunks) passes over all chunks at once.

    keep, written: `[batch, chunks, ...]`, broadcast against each other. start: h_{-1} `[batch, ...]`. Returns h before
    each chunk `[batch, chunks, ...]` and h after the last. Products of `keep` only ever multiply, so a keep of 0 ends
    everything before it and nothing overflows.
    """
    shift, chunks = 1, written.shape[1]
    while shift < chunks:
        # Entry c covers the `shift` chunks up to c; joined with entry c - shift it covers twice as many.
        written = torch.cat((written[:, :shift], written[:, shift:] + keep[:, shift:] * written[:, :-shift]), 1)
        keep = torch.cat((keep[:, :shift], keep[:, shift:] * keep[:, :-shift]), 1)
        shift *= 2
    h = written + keep * start[:, None]
    return torch.cat((start[:, None], h[:, :-1]), 1), h[:, -1]


def observe_state_norm(documents: Documents, start: Float[Tensor, "batch heads key value"],
                       k: Float[Tensor, "batch heads time key"], v: Float[Tensor, "batch heads time value"],
                       keep: Float[Tensor, "batch heads time key"] | None = None) -> None:
    """Observe the norm of h_t = keep_t · h_{t-1} + k_t v_t^T after each token, as `state_norm` (batch, time)."""

    def norms() -> Tensor:
        # Token by token, since all states at once would not fit; only when somebody looks.
        h, before, seen = start, torch.zeros_like(documents.number[:, 0]), []
        for t in range(documents.time):
            number = documents.number[:, t]
            same = (number == before)[:, None, None, None]
            h = torch.where(same, h if keep is None else h * keep[:, :, t, :, None], 0)
            h, before = h + k[:, :, t, :, None] * v[:, :, t, None], number
            seen.append(h.flatten(1).norm(dim=1))
        return documents.unpack(torch.stack(seen, 1))

    observe("state_norm", norms, ("batch", "time"))
