"""The medium tier: whole segments become slots, the oldest slots are forgotten."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from hmlab_kernels.bucket_lookup import buckets
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from hmlab.hashing import NOWHERE
from hmlab.information import Statistics
from hmlab.memories.harmony.compression import Compressed, Compressor
from hmlab.memories.harmony.config import HierarchyConfig
from hmlab.memories.harmony.retriever import LSHRetriever
from hmlab.memories.harmony.state import EMPTY, Rotate, Slots, State, only_shapes, rows_at


class Made(NamedTuple):
    """Slots of the call's segments, `most` of each, before those that nobody keeps are left out. number: of the
    segments in their document."""

    compressed: Compressed
    complete: Bool[Tensor, "rows segments"]
    number: Int[Tensor, "rows segments"]
    slots: Slots


class Written(NamedTuple):
    """The tier with a call's segments in it. count: slots that are there, of the room. buckets: of their codes, if they
    are hashed. topics: codes of ids, MinHash's, of the last segment before the call and of those in it. made: what
    became of the call's segments, None if none was whole."""

    slots: Slots
    count: Int[Tensor, "rows"]
    buckets: Int[Tensor, "rows kv_heads tables room"]
    statistics: Statistics
    moments: Float[Tensor, "rows 2"]
    topics: Tensor
    made: Made | None


class MediumTerm(nn.Module):
    """Compresses and keeps; what is kept is in the state."""

    def __init__(self, config: HierarchyConfig, *, kv_heads: int, head_dim: int, unit_keys: bool) -> None:
        super().__init__()
        self.config = config
        self.compressor = Compressor(config, kv_heads=kv_heads, head_dim=head_dim)
        self.shaped = config.spread and unit_keys
        if self.shaped:
            # A slot begins as one token of its keys' direction: attention that was trained on tokens loses least so.
            self.sharpness = nn.Parameter(torch.ones(kv_heads))
            self.crowding = nn.Parameter(torch.zeros(kv_heads))
            self.variance = nn.Parameter(torch.full((kv_heads,), 0.5))

    def write(
        self, k: Float[Tensor, "rows time kv_heads dim"], v: Float[Tensor, "rows time kv_heads dim"],
        tokens: Int[Tensor, "rows time"] | None, held: State, length: Int[Tensor, "rows"] | None, rotate: Rotate,
        norm: Float[Tensor, "kv_heads"] | None, retriever: LSHRetriever, *, fresh: bool,
    ) -> Written:
        """The tier after the first `length` tokens (None: all). k: unrotated. fresh: rows begin their documents."""
        size, time = self.config.segment, k.shape[1]
        same = Written(Slots.of(held), held.slots, held.buckets, held.statistics, held.moments, held.topic[:, None],
                       None)  # fmt: skip
        filled = held.position % size
        if fresh:
            segments = time // size if length is None else -(-time // size)
            k, v, tokens = (x if x is None else _fit(x, segments * size) for x in (k, v, tokens))
        else:
            segments = (size - 1 + time) // size
            past = (held.segment_keys, held.values[:, held.values.shape[1] - (size - 1) :], held.segment_tokens)
            place = torch.arange(segments * size, device=k.device) + (size - 1 - filled)[:, None]
            place = place.clamp(max=size - 2 + time)
            k, v, tokens = (x if x is None else rows_at(torch.cat((old.to(x.dtype), x), 1), place)
                            for old, x in zip(past, (k, v, tokens), strict=True))  # fmt: skip
        ends = (torch.arange(segments, device=k.device) + 1) * size
        reached = filled + (time if length is None else length)
        complete = ends <= reached[:, None]
        if not segments or self.config.retrieval == "none":
            return same
        if not (only_shapes(complete) or bool(complete.any())):
            return same
        number = held.position[:, None] // size + torch.arange(segments, device=k.device)
        first = (self.config.sinks - number * size).clamp(0, size)
        compressed = self.compressor(k, v, tokens, complete, first, number, held.statistics, held.moments)
        made, topics = self._made(compressed, complete, number, tokens, held, rotate, norm, retriever)
        slots, count = self._appended(held, made)
        hashed = buckets(slots.codes).keys if slots.codes.shape[-1] else held.buckets
        return Written(slots, count, hashed, compressed.statistics, compressed.moments, topics, made)

    def _made(self, compressed, complete, number, tokens, held, rotate, norm, retriever) -> tuple[Made, Tensor]:
        made, size = compressed.slots, self.config.segment
        rows, segments, most = made.mass.shape[:3]
        segment = number[..., None].expand(rows, segments, most).flatten(1)
        keys, values, mass, place = (x.flatten(1, 2) for x in made)
        mass, place = mass.to(held.slot_mass.dtype), place.to(held.slot_place.dtype)
        bias, turned = torch.where(mass > 0, mass, 1).log(), keys
        if norm is not None and self.shaped:
            length = keys.to(bias.dtype).square().sum(-1).clamp(max=1)
            spread = norm.to(bias.dtype).square() * (1 - length) / (2 * keys.shape[-1])
            bias = self.crowding * bias + self.variance * spread
            turned = keys * ((length + 1e-6) ** (-self.sharpness / 2)).to(keys.dtype)[..., None]
        bias = bias.to(mass.dtype).masked_fill(mass <= 0, -torch.inf)
        if self.config.phase:
            turned = rotate(turned, segment[..., None] * size + place.double())
        topics = held.topic[:, None]
        if retriever.family is None:
            codes = held.codes.new_zeros(*mass.shape, 0)
        elif self.config.family == "minhash":
            found = retriever.family.codes(tokens.unflatten(1, (segments, size)), probes=self.config.probes)[:, :, 0]
            topics = torch.cat((topics, torch.where(complete[..., None, None], found, NOWHERE)), 1)
            codes = found[:, :, None, None, :, 0].expand(-1, -1, most, mass.shape[2], -1).flatten(1, 2)
        else:
            codes = retriever.slot_codes(turned)
        slots = Slots(turned, values, mass, bias, place, segment, codes)
        return Made(compressed, complete, number, slots), topics

    def _appended(self, held: State, made: Made) -> tuple[Slots, Int[Tensor, "rows"]]:
        """The slots of the state and, without gaps, those made; places beyond all are empty."""
        kept = torch.arange(self.config.most, device=held.slots.device) < made.compressed.count[..., None]
        added = made.compressed.count.sum(1)
        order = (~kept).flatten(1).to(torch.uint8).argsort(dim=1, stable=True)
        if not only_shapes(order):
            order = order[:, : int(added.max())]
        old, count = held.slot_segment.shape[1], held.slots + added
        room = old + order.shape[1]
        if old and not only_shapes(held.slots) and bool((held.slots == old).all()):
            slots = Slots(*(torch.cat((a.to(b.dtype), b), 1)
                            for a, b in zip(Slots.of(held), made.slots.gather(order), strict=True)))  # fmt: skip
        elif old:
            place = torch.arange(room, device=order.device).expand(len(order), room)
            behind = order.gather(1, (place - held.slots[:, None]).clamp(0, order.shape[1] - 1))
            place = torch.where(place < held.slots[:, None], place, old + behind)
            slots = Slots(*(torch.cat((a.to(b.dtype), b), 1) for a, b in zip(Slots.of(held), made.slots, strict=True)))
            slots = slots.gather(place)
        else:
            slots = made.slots.gather(order)
        empty = torch.arange(room, device=order.device) >= count[:, None]
        # Keys and values there may be anything: a score of -inf is never read.
        blank = {name: x.masked_fill(empty.reshape(*empty.shape, *(1,) * (x.ndim - 2)), EMPTY[name])
                 for name, x in slots._asdict().items() if name not in ("slot_keys", "slot_values")}  # fmt: skip
        return slots._replace(**blank), count

    def kept(self, written: Written, held: State, *, fresh: bool) -> dict[str, Tensor]:
        """The state's fields of this tier after the call: the newest slots."""
        if written.made is None:
            return {}
        room, most = written.slots.slot_segment.shape[1], self.config.held
        if not only_shapes(written.count):
            after = min(most, max(int(written.count.max()), held.slot_segment.shape[1]))
        else:
            after = min(most, room if fresh else held.slot_segment.shape[1])
        drop = (written.count - most).clamp(min=0)
        slots, hashed = written.slots, written.buckets
        if room > most:
            place = torch.arange(after, device=drop.device) + drop[:, None]
            slots = slots.gather(place.clamp(max=room - 1))
        elif after < room:
            slots = Slots(*(x[:, :after].clone() for x in slots))
        if hashed.shape[-2] and (room > most or after != room):
            hashed = _shifted(hashed, drop, after)
        return {**slots._asdict(), "slots": written.count - drop, "dropped": held.dropped + drop, "buckets": hashed,
                "statistics": written.statistics, "moments": written.moments}  # fmt: skip


def _shifted(keys: Int[Tensor, "rows kv_heads tables room"], drop: Int[Tensor, "rows"], keep: int
             ) -> Int[Tensor, "rows kv_heads tables {keep}"]:
    """Sorted keys of the slots from number `drop` on, `keep` of them, numbered anew: what is sorted stays so."""
    number, drop = keys & 0xFFFFFFFF, drop[:, None, None, None]
    there = (number >= drop) & (number < drop + keep)
    if only_shapes(keys):  # what is left out goes behind
        return torch.where(there, keys - drop, torch.iinfo(keys.dtype).max).sort(-1).values[..., :keep]
    return (keys - drop)[there].unflatten(0, (*keys.shape[:3], keep))


def _fit(x: Tensor, length: int) -> Tensor:
    """Cut, or filled with zeros, along axis 1."""
    if x.shape[1] >= length:
        return x[:, :length]
    return F.pad(x, (0, 0) * (x.ndim - 2) + (0, length - x.shape[1]))
