"""The loop over segments. `hmlab.wrappers.hmt` tells what is computed."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from hmlab import auxiliary, memory
from hmlab.tasks import Batch
from hmlab.wrappers.hmt import authors, generation, saving
from hmlab.wrappers.hmt.backbone import Reader, reader_of
from hmlab.wrappers.hmt.config import LEAST_SEGMENTS, QUERIES, Config, Output, State
from hmlab.wrappers.hmt.layout import Layout
from hmlab.wrappers.hmt.loss import cross_entropy
from hmlab.wrappers.hmt.recall import Recall, sources
from hmlab.wrappers.hmt.recompute import products_again
from hmlab.wrappers.hmt.texts import Summaries, Texts


class HMT(nn.Module):
    """Reads text of any length with a backbone that sees one segment at a time.

    backbone: a causal language model of transformers (adapters inside allowed) or a `LanguageModel`; it is used, not
    copied. Its own parameters are `memory` [memories, width], P of a text's first segment, and, with recall, `summary`
    [1, width] (T) and `recall` (W_q, W_k, temperature), all in float32.
    """

    Config = Config

    def __init__(self, backbone: nn.Module, config: Config | None = None) -> None:
        super().__init__()
        self.config = config = Config() if config is None else config
        if type(config) is not Config:
            raise ValueError(f"config: expected an HMT.Config, got {type(config).__name__}")
        self.reader: Reader = reader_of(backbone, config.places)
        self.backbone = backbone
        self.query = config.query
        weight, width = self.reader.weight, self.reader.width
        spread = weight.detach().float().std().item() if weight.device.type != "meta" else 1.0
        make = {"device": weight.device, "dtype": torch.float32}
        self.memory = nn.Parameter(torch.randn(config.memories, width, **make) * spread)
        if config.query != "none":
            self.summary = nn.Parameter(torch.randn(1, width, **make) * spread)
            self.recall = Recall(width, config.recall_dim or width, key_norm=config.key_norm,
                                 each=config.keys == "each").to(weight.device)  # fmt: skip
        self.train(backbone.training)

    def forward(
        self,
        input_ids: Int[Tensor, "batch time"],
        attention_mask: Int[Tensor, "batch time"] | Bool[Tensor, "batch time"] | None = None,
        labels: Int[Tensor, "batch time"] | None = None,
        state: State | None = None,
        loss_on: Literal["all", "last"] = "all",
        *,
        query: Literal["previous", "prefix", "none"] | None = None,
    ) -> Output:
        """Read on where `state` ends, from the beginning without one.

        attention_mask: 0 at padding, which may lie anywhere. labels: as in transformers, the token ids themselves, -100
        where none counts; with them the loss is computed and the logits are not kept. loss_on: labels of all segments,
        or of the segment only in which a row ends. query: another than the configured one; `"none"` reads the memory
        of the last segment instead of searching. Raises ValueError naming the argument.
        """
        if loss_on not in ("all", "last"):
            raise ValueError(f"loss_on: expected all or last, got {loss_on!r}")
        layout, state, call = self._call(input_ids, attention_mask, state, query)
        labels = labels if labels is None else labels.long()
        if labels is None:
            return Output(None, *call(None, None))
        if labels.shape != input_ids.shape:
            raise ValueError(f"labels: expected {list(input_ids.shape)}, as input_ids has, got {list(labels.shape)}")
        targets = layout.shifted(labels)
        if loss_on == "last":
            number = torch.arange(layout.segments, device=targets.device)
            targets = targets.masked_fill((number != layout.last[:, None])[..., None], -100)
        total, state = call(targets, None)
        return Output(total / (targets != -100).sum().clamp(min=1), None, state)

    def loss_sum(self, batch: Batch) -> Float[Tensor, ""]:
        """Sum of the cross-entropy over the targets that count, in nats, for `hmlab.train`.

        Where the task tells what each target depends on (`oracle`), the weight of the segment that holds it is
        rewarded, `retrieval_loss` times its negative logarithm (`hmlab.auxiliary`).
        """
        if batch.reset is not None and bool(batch.reset[:, 1:].any()):
            raise ValueError("batch: expected one document a row, got documents that begin inside a row")
        layout, _, call = self._call(batch.tokens, batch.valid, None, None)
        targets = layout.place(layout.pack(batch.targets.masked_fill(~batch.mask, -100)), -100)
        wanted = None
        if batch.oracle is not None and self.config.retrieval_loss and auxiliary.collecting():
            wanted = self._wanted(layout, batch, targets)
        total, _ = call(targets, wanted)
        return total

    def init_state(self, batch: int) -> State:
        """Before the first token. Its tensors lie where the backbone's do, the cache where the configuration says."""
        config, width, weight = self.config, self.reader.width, self.reader.weight
        at = {"device": weight.device, "dtype": weight.dtype}
        where = at if config.cache_device is None else at | {"device": config.cache_device}
        recalls = config.query != "none"
        keys = (config.memories if config.keys == "each" else 1, (config.recall_dim or width) if recalls else 0)
        zeros = torch.zeros(batch, dtype=torch.int64, device=weight.device)
        return State(
            cache=torch.zeros(batch, 0, config.memories, width, **where),
            keys=torch.zeros(batch, 0, *keys, device=where["device"]), count=zeros,
            prompt=torch.zeros(batch, config.memories, width, **at),
            ids=torch.zeros(batch, config.segment_length, dtype=torch.int64, device=weight.device),
            length=zeros.clone(), last=torch.zeros(batch, width, **at), past=self.reader.empty(batch),
        )  # fmt: skip

    def memory_parameters(self) -> list[nn.Parameter]:
        """The wrapper's own parameters."""
        inside = {id(p) for p in self.backbone.parameters()}
        return [p for p in self.parameters() if id(p) not in inside]

    state_bytes = staticmethod(memory.state_bytes)
    reorder = staticmethod(memory.reorder)
    prefill, generate, stream = generation.prefill, generation.generate, generation.stream
    save_pretrained, from_pretrained = saving.save_pretrained, classmethod(saving.from_pretrained)
    load_authors = authors.load_authors

    def _call(self, ids: Tensor, attention_mask: Tensor | None, state: State | None, query: str | None):
        """Check a call; the layout, the state before it and what reads it."""
        config, query = self.config, query or self.query
        if ids.ndim != 2 or ids.is_floating_point():
            raise ValueError(f"input_ids: expected integers [batch, time], got {ids.dtype} {list(ids.shape)}")
        if query not in QUERIES or (query != "none" and config.query == "none"):
            known = QUERIES if config.query != "none" else ("none",)
            raise ValueError(f"query: expected one of {', '.join(known)}, got {query!r}")
        valid = None
        if attention_mask is not None:
            if attention_mask.shape != ids.shape:
                raise ValueError(f"attention_mask: expected {list(ids.shape)}, the new tokens only, "
                                 f"got {list(attention_mask.shape)}")  # fmt: skip
            valid = None if attention_mask.all() else attention_mask.bool()
        ids = ids.long()
        state = self.init_state(len(ids)) if state is None else state
        if type(state) is not State:
            raise ValueError(f"state: expected an HMT's State, got {type(state).__name__}")
        if len(state.count) != len(ids):
            raise ValueError(f"state: expected {len(ids)} rows, as input_ids has, got {len(state.count)}")
        blank, slots = self.init_state(1), min(int(state.count.max()), config.cache_size) if len(ids) else 0
        expected = (*blank.cache.shape[2:], *blank.keys.shape[2:], config.segment_length, slots * (config.memories > 0))
        got = (*state.cache.shape[2:], *state.keys.shape[2:], state.ids.shape[1], state.cache.shape[1])
        if got != expected and len(ids):
            raise ValueError(f"state: expected one of this configuration (memories, width, keys, recall_dim, "
                             f"segment_length, slots {expected}), got {got}")  # fmt: skip
        layout = Layout(valid, state.length, *ids.shape, config.segment_length)
        if query == "prefix" and ((layout.filled > 0) & (layout.tokens > 0)).any():
            raise ValueError("input_ids: expected to begin with a segment for the query 'prefix' (it is made of the "
                             "segment's own tokens), got a row inside one; 'previous' reads on anywhere")  # fmt: skip
        learns = self.training and torch.is_grad_enabled() and query != "none"
        if learns and any(p.requires_grad for p in self.recall.parameters()):
            if config.cache_size < 2:
                raise ValueError("cache_size: expected 2 or more to train recall, which learns nothing from a choice "
                                 "among one memory, got 1")  # fmt: skip
            reached = int((state.count + layout.segments).max())
            if reached < LEAST_SEGMENTS:
                raise ValueError(f"input_ids: expected at least {LEAST_SEGMENTS} segments of {config.segment_length} "
                                 f"tokens to train recall, got {reached}: with fewer it chooses among one memory, and "
                                 "its weights get no gradient (query='none' trains without it)")  # fmt: skip
        return layout, state, lambda targets, wanted: self._read(ids, layout, state, query, targets, wanted)

    def _read(self, ids: Tensor, layout: Layout, state: State, query: str, targets: Tensor | None,
              wanted: Tensor | None) -> tuple[Tensor, State]:
        """The loss where there are targets, else the logits; and the state afterwards."""
        config, batch = self.config, len(ids)
        held = state.ids
        texts = Texts(self.reader, torch.cat((held[:, None], layout.place(layout.pack(ids), 0, held)), 1))
        fresh = layout.fresh
        opening, closing = fresh[..., 0], fresh[..., -1]
        number = state.count[:, None] + torch.arange(layout.segments, device=ids.device)  # of each segment
        if torch.is_grad_enabled() and query != "none":
            # Kept keys are of the weights they were made with; W_k is to learn from these memories too.
            state = state._replace(keys=self.recall.keys(state.cache.to(self.memory.device)).to(state.cache.device))
        # Of one memory alone nothing need be asked: it has all the weight.
        summaries = Summaries(self, texts, fresh, opening & (number > 1), query)
        cache, keys, count, prompt, last, past = (state.cache, state.keys, state.count, state.prompt, state.last,
                                                  state.past)  # fmt: skip
        total, seen, kept = self.memory.new_zeros(()), [], []
        for n in range(layout.segments):
            new, opens, closes = fresh[:, n], opening[:, n], closing[:, n]
            if torch.is_grad_enabled():
                cache, keys = self._cut(cache, keys, opens & (count > 0) & (count % config.bptt_segments == 0))
            if opens.any():
                found = self._prompt(query, summaries, n, cache, keys, count, opens, wanted)
                prompt = torch.where(opens[:, None, None], found.to(prompt.dtype), prompt)
            columns = new.any(0).nonzero()[:, 0]
            low, high = int(columns[0]), int(columns[-1]) + 1
            keep = bool((layout.ends_open & (layout.last <= n)).any())
            hidden, memories, past = self._segment(
                prompt, texts, n, slice(low, high), new[:, low:high], opens, closes, count > 0, past, keep
            )
            at = new[:, low:high].long().cumsum(1).argmax(1)
            ends = hidden.gather(1, at[:, None, None].expand(-1, 1, hidden.shape[2]))[:, 0]
            last = torch.where(new.any(1, keepdim=True), ends, last)
            if closes.any() and config.memories:
                cache, keys = self._push(cache, keys, count, memories, closes)
            count = count + closes
            if targets is None:
                seen.append(hidden)
                kept.append(torch.arange(low, high, device=ids.device) + n * config.segment_length)
                continue
            target = targets[:, n, low:high]
            counts = target != -100
            if torch.is_grad_enabled():
                seen.append(hidden[counts])
                kept.append(target[counts])
            elif counts.any():
                total = total + cross_entropy(hidden[counts], self.reader.head(), target[counts])
        if layout.segments:
            rows = torch.arange(batch, device=ids.device)
            held = texts.ids[rows, layout.last.clamp(min=0) + 1].where((layout.tokens > 0)[:, None], held)
        length = torch.where(layout.tokens > 0, (layout.end - 1) % config.segment_length + 1, state.length)
        past = self.reader.empty(batch) if past is None else past
        state = State(cache, keys, count, prompt, held, length, last, past)
        if targets is None:
            return self._logits(seen, kept, layout, ids), state
        if seen:
            # All at once, so that the head's gradient is there once and not for every segment.
            total = total + cross_entropy(torch.cat(seen), self.reader.head(), torch.cat(kept))
        return total, state

    def _segment(self, prompt: Tensor, texts: Texts, n: int, columns: slice, new: Tensor, opens: Tensor,
                 closes: Tensor, follows: Tensor, past: Any, keep: bool) -> tuple[Tensor, Tensor, Any]:
        """[P; last tokens of the segment before; tokens of the n-th; P], as far as each row has them: hidden states of
        the tokens, and of the trailing P."""
        m, k = self.config.memories, self.config.sensory
        parts, masks = [texts.embedded(n + 1, columns)], [new]
        repeats = opens & follows
        if k and repeats.any():
            parts.insert(0, texts.embedded(n, slice(self.config.segment_length - k, None)))
            masks.insert(0, repeats[:, None].expand(-1, k))
        if m and opens.any():
            parts.insert(0, prompt.to(parts[0].dtype))
            masks.insert(0, opens[:, None].expand(-1, m))
        first = sum(part.shape[1] for part in parts[:-1])
        if m and closes.any():
            parts.append(prompt.to(parts[0].dtype))
            masks.append(closes[:, None].expand(-1, m))
        valid = torch.cat(masks, 1)
        x = torch.cat(parts, 1)
        opening = None if opens.all() else opens
        hidden, past = self.through(x, None if valid.all() else valid, opening, closes, past, keep)
        last = first + new.shape[1]
        return hidden[:, first:last], hidden[:, last:], past

    def through(self, x: Tensor, valid: Tensor | None, opening: Tensor | None = None, closing: Tensor | None = None,
              past: Any = None, keep: bool = False) -> tuple[Tensor, Any]:
        """Through the backbone, as the configuration wants it for the backward pass."""
        if self.config.checkpoint == "segments" and not keep and torch.is_grad_enabled():
            return checkpoint(lambda x: self.reader.read(x, valid, opening, closing, past)[0], x,
                              use_reentrant=False), None  # fmt: skip
        with products_again() if self.config.checkpoint == "elementwise" else nullcontext():
            return self.reader.read(x, valid, opening, closing, past, keep)

    def _prompt(self, query: str, summaries: Summaries, n: int, cache: Tensor, keys: Tensor, count: Tensor,
                opens: Tensor, wanted: Tensor | None) -> Tensor:
        """P of the rows that open their n-th segment of the call."""
        width, slots = self.reader.width, cache.shape[1]
        first = self.memory.expand(len(count), -1, -1)
        if not self.config.memories:
            return first
        if query == "none":
            if not slots:
                return first
            slot = ((count - 1).clamp(min=0) % self.config.cache_size).to(cache.device)
            found = cache[torch.arange(len(slot), device=cache.device), slot].to(first.device)
        else:
            summary = summaries.of(n) if slots else first.new_zeros(len(count), 1, width)
            found, logs = self.recall(summary, cache, keys, count, opens)
            if wanted is not None and slots:
                self._reward(logs, sources(count, slots), wanted[:, n].where(opens, -1))
        return torch.where((count > 0)[:, None, None], found.to(first.dtype), first)

    def _push(self, cache: Tensor, keys: Tensor, count: Tensor, memories: Tensor, closes: Tensor
              ) -> tuple[Tensor, Tensor]:
        """Into the ring, in the place of the oldest once it is full."""
        slot = count % self.config.cache_size
        key = self.recall.keys(memories[:, None]) if self.config.query != "none" else None
        if int(slot.where(closes, -1).max()) >= cache.shape[1]:
            cache, keys = (torch.cat((x, x.new_zeros(len(x), 1, *x.shape[2:])), 1) for x in (cache, keys))
        hit = (torch.arange(cache.shape[1], device=count.device) == slot[:, None]) & closes[:, None]
        hit = hit.to(cache.device)[..., None, None]
        cache = torch.where(hit, memories[:, None].to(cache.device, cache.dtype), cache)
        return cache, keys if key is None else torch.where(hit, key.to(keys.device), keys)

    def _cut(self, cache: Tensor, keys: Tensor, rows: Bool[Tensor, "batch"]) -> tuple[Tensor, Tensor]:
        """Take the state of some rows off the graph: all of it, since old memories live on in newer ones."""
        if not rows.any() or not cache.requires_grad:
            return cache, keys
        rows = rows.to(cache.device)[:, None, None, None]
        cache = torch.where(rows, cache.detach(), cache)
        if self.config.query != "none":
            again = self.recall.keys(cache.detach().to(self.memory.device)).to(keys.device)
            keys = torch.where(rows, again, keys)
        return cache, keys

    def _logits(self, seen: list[Tensor], kept: list[Tensor], layout: Layout, ids: Tensor) -> Tensor:
        """At each token's place in the call; 0 at padding."""
        head = self.reader.head()
        if not seen:  # padding only
            return head(self.reader.embed(ids)) * 0
        hidden, columns = torch.cat(seen, 1), torch.cat(kept)
        where = columns.new_zeros(int(columns[-1]) + 1)
        where[columns] = torch.arange(len(columns), device=columns.device)
        if hidden.shape[1] != ids.shape[1] or layout.valid is not None:
            index = where[layout.places().clamp(max=int(columns[-1]))]
            hidden = hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[2]))
        logits = head(hidden)
        return logits if layout.valid is None else logits.masked_fill(~layout.valid[..., None], 0)

    def _wanted(self, layout: Layout, batch: Batch, targets: Tensor) -> Int[Tensor, "batch segments"]:
        """Of each segment the number of an earlier one that its first target depends on, -1 for none."""
        place = layout.places()
        source = place.gather(1, batch.oracle.clamp(min=0)) // self.config.segment_length
        source = layout.place(layout.pack(source.masked_fill(batch.oracle < 0, -1)), -1)
        own = torch.arange(layout.segments, device=source.device)[:, None]
        earlier = (targets != -100) & (source >= 0) & (source < own)
        first = earlier.int().argmax(2, keepdim=True)
        return source.gather(2, first)[..., 0].where(earlier.any(2), -1)

    def _reward(self, logs: Float[Tensor, "batch slots keys"], held: Int[Tensor, "batch slots"],
                wanted: Int[Tensor, "batch"]) -> None:
        hit = (held == wanted[:, None]) & (wanted >= 0)[:, None]
        if hit.any():
            found = logs.mean(2)[hit.to(logs.device)]
            auxiliary.add("recall", lambda: -self.config.retrieval_loss * found.mean().to(self.memory.device))


def move(state: State, device: torch.device | str) -> State:
    """The state on another device, its cache too."""
    return pytree.tree_map(lambda leaf: leaf.to(device), state)
