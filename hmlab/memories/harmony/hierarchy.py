"""What stands where attention over all of the past stood: exact attention nearby, a few compressed slots beyond.

    out_t = Σ_j softmax_j(q_t · k_j + bias_j) v_j   over { sinks, window of t, slots picked for t }
    window of t: from floor(max(t - W + 1, 0) / S) · S to t;   slots of a segment: from when it lies before all that
    of a slot: k = k̂ / |k̂|^α,   bias = β log mass + γ |q|² (1 - |k̂|²) / (2 dim);   of a token: bias 0

With α = 0, β = γ = 1 this estimates the log of Σ exp(q · k_i) over the slot's tokens: where keys have unit norm, a mean
k̂ shorter than 1 tells how far they spread about it, and the sum exceeds mass · exp(q · k̂) by the last term, to second
order and for a spread alike in all directions. A query that wants one token of several needs another score: with α = 1
and β = 0 a slot is one token of the mean direction, with α = 2 and orthogonal keys q · k is what it was for the token
alone. α, β, γ are ours, learned for each key head from 1, 0, 1/2. At ratio 1 they have no effect: with ratio 1, phase
and all slots read the hierarchy equals causal attention, but for 1e-6 of α. Where keys have no unit norm, or without
`spread`, α = γ = 0 and β = 1.

`Hierarchy` takes queries, keys and values, and so also serves models whose projections are not ours.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from hmlab_kernels.bucket_lookup import Buckets
from hmlab_kernels.slot_attention import slot_attention
from hmlab_kernels.window_attention import window_attention
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from hmlab import auxiliary
from hmlab.memories.harmony import sight
from hmlab.memories.harmony.config import HierarchyConfig
from hmlab.memories.harmony.medium_term import MediumTerm, Written
from hmlab.memories.harmony.retriever import LSHRetriever
from hmlab.memories.harmony.rows import Rows
from hmlab.memories.harmony.sharing import Blocks
from hmlab.memories.harmony.state import Rotate, State, latest, rows_at, with_room

ASKED = 128  # queries of a row that a step's retrieval loss is of
BLOCK = 64  # slots and queries that are read together where nothing is chosen


class Reading(NamedTuple):
    """q: queries as windows are scored; slot_q: as slots are, rotated or not. out, lse: of all that
    was read; near: log-sum-exp of sinks and window. index: slots of each set, None if none are chosen; sets: of each
    query, the number of its set."""

    out: Float[Tensor, "rows time heads dim"]
    lse: Float[Tensor, "rows time heads"]
    near: Float[Tensor, "rows time heads"]
    q: Float[Tensor, "rows time heads dim"]
    slot_q: Float[Tensor, "rows time heads dim"]
    available: Int[Tensor, "rows time"] | None = None
    oldest: Int[Tensor, "rows time"] | None = None
    index: Int[Tensor, "rows sets groups picks"] | None = None
    block: Blocks | None = None
    voters: Tensor | None = None


class Hierarchy(nn.Module):
    """Three-tier attention without projections. unit_keys: whether all keys have norm 1, which `spread` needs."""

    def __init__(self, config: HierarchyConfig, *, heads: int, kv_heads: int, head_dim: int, unit_keys: bool = True
                 ) -> None:
        super().__init__()
        if kv_heads < 1 or heads % kv_heads:
            raise ValueError(f"kv_heads: expected a divisor of {heads} heads, got {kv_heads}")
        self.config, self.heads, self.kv_heads, self.head_dim = config, heads, kv_heads, head_dim
        self.retriever = LSHRetriever(config, heads=heads, kv_heads=kv_heads, head_dim=head_dim)
        self.medium_term = MediumTerm(config, kv_heads=kv_heads, head_dim=head_dim, unit_keys=unit_keys)

    def init_state(self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
                   ) -> State:
        """Before the first token."""
        c, r = self.config, self.retriever
        dtype = dtype or torch.get_default_dtype()
        wide = torch.promote_types(dtype, torch.float32)

        def zeros(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.zeros(batch, *shape, device=device, dtype=dtype)

        def integers(*shape: int) -> Tensor:
            return zeros(*shape, dtype=torch.int64)

        heads = (self.kv_heads, self.head_dim)
        tables = c.tables if r.family is not None else 0
        block = c.query_block if self._in_blocks else 0
        topic = (c.tables, c.probes) if tables and c.family == "minhash" else (0, 0)
        return State(
            keys=zeros(c.reach, *heads), values=zeros(c.reach, *heads),
            sink_keys=zeros(c.sinks, *heads), sink_values=zeros(c.sinks, *heads),
            segment_keys=zeros(c.segment - 1, *heads), segment_tokens=integers(c.segment - 1),
            slot_keys=zeros(0, *heads), slot_values=zeros(0, *heads), slot_mass=zeros(0, heads[0], dtype=wide),
            slot_bias=zeros(0, heads[0], dtype=wide), slot_place=zeros(0, heads[0], dtype=wide),
            slot_segment=integers(0), slots=integers(), dropped=integers(),
            codes=zeros(0, heads[0], tables, dtype=torch.int32), buckets=integers(heads[0], tables, 0),
            statistics=self.medium_term.compressor.init_statistics(batch, device), moments=zeros(2, dtype=wide),
            topic=zeros(*topic, dtype=torch.int32) - 1, voters=zeros(block, self.heads, self.head_dim),
            sets=integers(r.groups if block else 0, c.picks if block else 0) - 1, position=integers(),
        )  # fmt: skip

    def reserve(self, state: State, tokens: int) -> State:
        """Room for the slots of that many more tokens, for compiled calls."""
        if self.config.retrieval == "none":
            return state
        most = (tokens // self.config.segment + 1) * self.config.most
        return with_room(state, min(self.config.held, state.slot_segment.shape[1] + most))

    def forward(
        self,
        q: Float[Tensor, "batch time heads head_dim"],
        k: Float[Tensor, "batch time kv_heads head_dim"],
        v: Float[Tensor, "batch time kv_heads head_dim"],
        state: State | None = None,
        *,
        tokens: Int[Tensor, "batch time"] | None = None,
        reset: Bool[Tensor, "batch time"] | None = None,
        valid: Bool[Tensor, "batch time"] | None = None,
        rotate: Rotate | None = None,
        norm: Float[Tensor, "kv_heads"] | None = None,
    ) -> tuple[Float[Tensor, "batch time heads head_dim"], State]:
        """Read and write `time` tokens; the rest is as in `Memory.forward`.

        q: with the scale of the scores in it. q, k: unrotated. rotate: turns `[batch, n, heads, head_dim]` by float64
        positions `[batch, n, heads or 1]`, counted from 0 in the document; None: there are no positions. norm: of the
        queries of each key head, where keys have unit norm; None: slots make no allowance for their spread. tokens:
        ids, for densities that count them and MinHash. Raises ValueError by argument.
        """
        c = self.config
        if tokens is None and c.of_tokens:
            counting = [name for name in c.densities if name != "spectral"]
            counting += ["minhash"] if c.family == "minhash" else []
            raise ValueError(f"tokens: expected ids, which {', '.join(counting)} count, got None "
                             "(densities=('spectral',) needs none)")  # fmt: skip
        tokens = None if tokens is None else tokens.long()
        batch, time = q.shape[:2]
        fresh = state is None
        held = self.init_state(batch, device=q.device, dtype=q.dtype) if fresh else state
        if not time:
            return q, held
        rows = Rows(held.position, reset, valid, time)
        q, k, v, tokens = (x if x is None else rows.documents.pack(x) for x in (q, k, v, tokens))
        rotate = rotate or (lambda x, position: x)
        length = rows.going if rows.ragged else None
        out, after, seen = self._documents(q, k, v, tokens, held, length, rotate, norm, fresh=fresh)
        if rows.begin:
            new = [x if x is None else rows.beginning(x) for x in (q, k, v, tokens)]
            begins = self.init_state(rows.begin, device=q.device, dtype=q.dtype)
            begun, ends, more = self._documents(*new, begins, rows.length, rotate, norm, fresh=True)
            room = max(after.slot_segment.shape[1], ends.slot_segment.shape[1])
            after = rows.last(with_room(after, room), with_room(ends, room))
            out = rows.join(out, begun)
            seen = {name: rows.join(value, more[name]) for name, value in seen.items()}
        sight.show(seen, rows.documents)
        return rows.documents.unpack(out), after

    def _documents(
        self, q: Tensor, k: Tensor, v: Tensor, tokens: Tensor | None, held: State, length: Int[Tensor, "rows"] | None,
        rotate: Rotate, norm: Tensor | None, *, fresh: bool,
    ) -> tuple[Float[Tensor, "rows time heads dim"], State, dict[str, Tensor]]:
        """One document a row, of which the first `length` tokens count (None: all): what they read, the state after
        them, and what an observer wants to see. fresh: documents begin here."""
        c, time = self.config, q.shape[1]
        position = (held.position[:, None] + torch.arange(time, device=q.device)).double()[..., None]
        turned_q, turned_k = rotate(q, position), rotate(k, position)
        written = self.medium_term.write(k, v, tokens, held, length, rotate, norm, self.retriever, fresh=fresh)
        keys = turned_k if fresh else torch.cat((held.keys.to(k.dtype), turned_k), 1)
        values = v if fresh else torch.cat((held.values.to(v.dtype), v), 1)
        sinks = [self._sinks(*both, held.position) for both in ((held.sink_keys, turned_k), (held.sink_values, v))]
        options = {"window": c.window, "sinks": c.sinks, "segment": c.segment, "scale": 1.0}
        if fresh:
            out, lse = window_attention(turned_q, keys, values, **options)
        else:
            keys_and_sinks, values_and_sinks = (torch.cat(both, 1) for both in zip(sinks, (keys, values), strict=True))
            out, lse = window_attention(turned_q, keys_and_sinks, values_and_sinks, start=held.position - c.reach,
                                        **options)  # fmt: skip
        reading = Reading(out, lse, lse, turned_q, turned_q if c.phase else q)
        if written.slots.slot_segment.shape[1] and c.retrieval != "none":
            reading = self._slots(reading, written, held, fresh=fresh)
        recent = {"keys": keys, "values": values, "segment_keys": k, "segment_tokens": tokens}
        after = self._after(recent, held, length, written, sinks, reading, fresh=fresh)
        return reading.out, after, sight.look(self, reading, written, held, sinks[0])

    def _sinks(self, held: Tensor, new: Tensor, position: Int[Tensor, "rows"]) -> Tensor:
        """The first tokens of the documents: from the state, or from this call."""
        sinks = self.config.sinks
        place = torch.arange(sinks, device=new.device) - position[:, None]
        taken = rows_at(new, place.clamp(0, new.shape[1] - 1))
        return torch.where((place < 0)[..., None, None], held.to(new.dtype), taken)

    @property
    def _in_blocks(self) -> bool:
        return self.config.sharing == "block" and self.config.retrieval in ("hash", "exact")

    def _slots(self, reading: Reading, written: Written, held: State, *, fresh: bool) -> Reading:
        """The reading with slots in it."""
        c, slots, time, q = self.config, written.slots, reading.q.shape[1], reading.slot_q
        room = slots.slot_segment.shape[1]

        def visible() -> Tensor:
            """The first query, by its number, that may read each slot: a pass over all of them."""
            return (slots.slot_segment + 1) * c.segment + c.window - 1 - held.position[:, None]

        def readable(query: Tensor) -> tuple[Tensor, Tensor]:
            """Slots from the second number on and below the first may be read by queries of those numbers."""
            last = torch.div(held.position[:, None] + query - c.window + 1, c.segment, rounding_mode="floor") - 1
            available = torch.searchsorted(slots.slot_segment, last, right=True)
            return available, (available - c.capacity).clamp(min=0)

        number = torch.arange(time, device=q.device).expand(len(q), time)
        available, oldest = readable(number)
        keys, bias, options = slots.slot_keys.to(q.dtype), slots.slot_bias, {}
        block = voters = None
        if c.retrieval == "all" and room <= c.capacity:
            index = torch.arange(-(-room // BLOCK), device=q.device)
            index = index.expand(len(q), -(-time // BLOCK), self.kv_heads, -1)
            options = {"query_block": BLOCK, "slot_block": BLOCK, "visible": visible()}
        elif c.retrieval == "all":
            place = oldest[..., None] + torch.arange(c.capacity, device=q.device)
            place = torch.where(place < available[..., None], place, -1)
            index = place[:, :, None].expand(-1, -1, self.kv_heads, -1)
        elif c.sharing == "block":
            block = Blocks(held, time, c.query_block, fresh=fresh)
            voters = block.voters(q)
            limits = readable(block.first)
            if c.retrieval == "exact":
                # The votes are counted from the block before the first one, which is left out.
                before = torch.cat((limits[1][:, :1], limits[1]), 1).repeat_interleave(c.query_block, 1)
                later = visible() + c.query_block + block.under_way[:, None]
                index = self.retriever.nearest(voters, keys, bias, later, before, c.query_block)[:, 1:]
            else:
                own = slice(0, block.sets * c.query_block)
                limits = [t.repeat_interleave(c.query_block, 1) for t in limits]
                topic = _at(written.topics, block.first.repeat_interleave(c.query_block, 1), held, c.segment)
                index = self.retriever.hashed(voters[:, own], keys, bias, Buckets(written.buckets), *limits, topic,
                                              block.positions[:, own], c.query_block)  # fmt: skip
            index = block.complete(index)
            options = {"query_block": c.query_block, "start": held.position}
        elif c.retrieval == "exact":
            index = self.retriever.nearest(q, keys, bias, visible(), oldest, 1)
        else:
            topic = _at(written.topics, number, held, c.segment)
            index = self.retriever.hashed(q, keys, bias, Buckets(written.buckets), available, oldest, topic,
                                          held.position[:, None] + number, 1)  # fmt: skip
        out, lse = slot_attention(q, keys, slots.slot_values.to(q.dtype), index, bias=bias, scale=1.0,
                                  joined=(reading.out, reading.lse), **options)  # fmt: skip
        reading = reading._replace(out=out, lse=lse, available=available, oldest=oldest, index=index, block=block,
                                   voters=voters)  # fmt: skip
        if self.training and self.config.family == "learned" and c.retrieval == "hash":
            auxiliary.add("retrieval", lambda: self._retrieval_loss(reading, written, held))
        return reading

    def _retrieval_loss(self, reading: Reading, written: Written, held: State) -> Tensor:
        """Of some queries of the call and all slots made in it."""
        c, made, time = self.config, written.made, reading.q.shape[1]
        if made is None:
            return reading.lse.sum() * 0
        some = torch.randperm(time, device=reading.q.device)[:ASKED]
        visible = (made.slots.slot_segment + 1) * c.segment + c.window - 1 - held.position[:, None]
        kept = torch.arange(c.most, device=some.device) < made.compressed.count[..., None]
        visible = (visible[:, None] <= some[:, None]) & kept.flatten(1)[:, None]
        return c.retrieval_weight * self.retriever.loss(
            reading.slot_q[:, some].detach(), reading.lse[:, some].detach(), made.slots.slot_keys.detach(),
            made.slots.slot_bias.detach(), visible)  # fmt: skip

    def _after(
        self, recent: dict[str, Tensor | None], held: State, length: Int[Tensor, "rows"] | None, written: Written,
        sinks: list[Tensor], reading: Reading, *, fresh: bool,
    ) -> State:
        """The state after the call."""
        time = reading.q.shape[1]
        fields = {}
        for name, new in recent.items():
            old = getattr(held, name)
            if new is None:  # ids that nobody gave
                fields[name] = old
                continue
            reach = old.shape[1]
            if new.shape[1] == time:
                new = torch.cat((old.to(new.dtype), new), 1)
            fields[name] = latest(new, length, reach)
        count = time if length is None else length
        fields |= self.medium_term.kept(written, held, fresh=fresh)
        if self.config.family == "minhash" and written.topics.shape[-1]:
            whole = (held.position % self.config.segment + count) // self.config.segment
            fields["topic"] = rows_at(written.topics, whole.clamp(max=written.topics.shape[1] - 1)[:, None])[:, 0]
        if self._in_blocks:
            block = reading.block or Blocks(held, time, self.config.query_block, fresh=fresh)
            voters = block.voters(reading.slot_q) if reading.voters is None else reading.voters
            index = reading.index
            if index is None:
                index = held.sets[:, None].expand(-1, block.sets, -1, -1)
            dropped = fields.get("dropped", held.dropped) - held.dropped
            fields |= block.state(index, voters, length, dropped)
        return held._replace(**fields, sink_keys=sinks[0], sink_values=sinks[1], position=held.position + count)


def _at(topics: Tensor, number: Int[Tensor, "rows queries"], held: State, segment: int) -> Tensor:
    """Codes of the last whole segment before each query, by its number in the call."""
    place = (held.position[:, None] % segment + number).clamp(min=0) // segment
    return rows_at(topics, place.clamp(max=topics.shape[1] - 1))
