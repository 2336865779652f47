"""HMT beside a plain form of its authors' loop, on one small Llama that both wrap, with the same weights.

Training: forward and backward of 2 rows of 6 segments. Evaluation: the loss of one row of 135 segments, without
gradients. Each with recall (`query="prefix"`, as published) and without (the memory of a segment goes to the next).

The floor counts the products of the equations and nothing else: the main pass of every segment, S of every segment but
the first two (one memory alone needs no search), attention at causal pairs only, the head at a segment's own tokens,
each memory's key once; a backward pass twice that. Peak memory stands over what is held before the call, weights and
gradients.

Units: tokens, flops, bytes. Source: arXiv 2405.06067. Errors: ValueError for labels of another shape than ids.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from hmlab_kernels.bench import Case
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from hmlab.wrappers.hmt import HMT

if TYPE_CHECKING:
    import xarray as xr

Allocated = dict[tuple[str, str], int]  # by case and candidate


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of the backbone (to `vocab`), the wrapper (to `recall_dim`) and the text. depth: segments of a training step.
    read: segments of an evaluation."""

    width: int = 256
    layers: int = 4
    heads: int = 4
    mlp: int = 688
    vocab: int = 4096
    segment_length: int = 222
    sensory: int = 32
    cache_size: int = 300
    fraction: float = 0.5
    recall_dim: int = 256
    depth: int = 6
    batch: int = 2
    read: int = 135


class Segment(NamedTuple):
    """What the authors' loop keeps of one until the end. hidden_states: of the embeddings and of every layer."""

    logits: Float[Tensor, "batch time vocab"]
    hidden_states: tuple[Float[Tensor, "batch places width"], ...]


class Output(NamedTuple):
    """loss: mean cross-entropy in nats, None without labels."""

    loss: Float[Tensor, ""] | None
    logits: Float[Tensor, "batch time vocab"]
    segments: list[Segment]


class _Cell(nn.Module):
    def __init__(self, model: nn.Module, memory: Tensor, mem: Tensor | None) -> None:
        super().__init__()
        self.model, self.memory, self.mem = model, _parameter(memory), None if mem is None else _parameter(mem)

    def forward(self, prompt: Float[Tensor, "batch 1 width"], ids: Int[Tensor, "batch time"],
                before: Int[Tensor, "batch sensory"] | None = None) -> Segment:
        """[prompt; before; ids; prompt] through the whole model; the logits are those of the ids."""
        embed = self.model.get_input_embeddings()
        texts = [embed(ids)] if before is None else [embed(before), embed(ids)]
        out = self.model(inputs_embeds=torch.cat((prompt, *texts, prompt), 1), output_hidden_states=True,
                         use_cache=False)  # fmt: skip
        return Segment(out.logits[:, -1 - ids.shape[1] : -1], out.hidden_states)


class AuthorsLoop(nn.Module):
    """The published loop in plain terms, float32: segment after segment, each S by itself just before its segment, all
    hidden states and logits kept to the end, W_k over the whole cache every time, no position_ids, gradients through
    everything.

    T: [1, width], the summary prompt. memory: [1, width], P of the first segment. wq, wk: [recall_dim, width]. Without
    T, wq and wk nothing is recalled: P is the memory of the segment before. Keys of its `state_dict`: the authors'.
    """

    def __init__(self, backbone: nn.Module, T: Tensor | None, memory: Tensor, wq: Tensor | None, wk: Tensor | None, *,
                 segment_length: int, sensory: int = 32, cache_size: int = 300, fraction: float = 0.5) -> None:
        super().__init__()
        self.segment_length, self.sensory = segment_length, sensory
        self.cache_size, self.fraction = cache_size, fraction
        self.memory_cell = _Cell(backbone, memory, T)
        self.cross_attn = None if wq is None else nn.ModuleDict({"wq": _linear(wq), "wk": _linear(wk)})

    def forward(self, input_ids: Int[Tensor, "batch time"], labels: Int[Tensor, "batch time"] | None = None) -> Output:
        """labels: the ids themselves, as in transformers."""
        if labels is not None and labels.shape != input_ids.shape:
            raise ValueError(f"labels: expected {list(input_ids.shape)}, got {list(labels.shape)}")
        prompt = self.memory_cell.memory.expand(len(input_ids), 1, -1)
        cache, before, segments = None, None, []
        for ids in input_ids.split(self.segment_length, dim=1):
            if cache is not None:
                prompt = cache[:, -1:] if self.cross_attn is None else self.recall(ids, cache)
            segments.append(self.memory_cell(prompt, ids, before))
            memory = segments[-1].hidden_states[-1][:, -1:]
            cache = memory if cache is None else torch.cat((cache, memory), 1)[:, -self.cache_size :]
            before = ids[:, max(ids.shape[1] - self.sensory, 0) :] if self.sensory else None
        logits = torch.cat([segment.logits for segment in segments], 1)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1))
        return Output(loss, logits, segments)

    def recall(self, ids: Int[Tensor, "batch time"], cache: Float[Tensor, "batch entries width"]
               ) -> Float[Tensor, "batch 1 width"]:
        """P: softmax(W_q S · W_k M / sqrt(recall_dim)) M."""
        excerpt = ids[:, : max(int(self.fraction * ids.shape[1]), 1)]
        summary = self.memory_cell(self.memory_cell.mem.expand(len(ids), 1, -1), excerpt).hidden_states[-1][:, -1:]
        query, keys = self.cross_attn["wq"](summary), self.cross_attn["wk"](cache)
        return torch.softmax(query @ keys.mT / math.sqrt(query.shape[-1]), -1) @ cache


def cases(device: str = "cpu", sizes: Sizes | None = None) -> Iterator[Case]:
    """Training, then evaluation, each with recall and without."""
    sizes = Sizes() if sizes is None else sizes
    for training in (True, False):
        for recall in (True, False):
            yield case(device, sizes, training=training, recall=recall)


def case(device: str, sizes: Sizes, *, training: bool, recall: bool) -> Case:
    segments, batch = (sizes.depth, sizes.batch) if training else (sizes.read, 1)
    model = hmt(device, sizes, recall=recall)
    ids = torch.randint(sizes.vocab, (batch, segments * sizes.segment_length), device=device)
    runs = {"hmlab": model, "authors": authors(model)}
    step = _training if training else _evaluation
    work = flops(sizes, segments, batch, recall=recall)
    weights = sum(parameter.nbytes for parameter in runs["authors"].parameters())
    what = f"hmt {'training' if training else 'evaluation'}{'' if recall else ' without recall'}"
    return Case(f"{what}, {ids.numel()} tokens", {name: step(run, ids) for name, run in runs.items()},
                weights * (3 if training else 1), work * (3 if training else 1), op=what, length=ids.shape[1],
                tokens=ids.numel())  # fmt: skip


def hmt(device: str, sizes: Sizes, *, recall: bool) -> HMT:
    from transformers import LlamaConfig, LlamaForCausalLM

    places = sizes.segment_length + sizes.sensory + 2
    llama = LlamaForCausalLM(LlamaConfig(
        hidden_size=sizes.width, num_hidden_layers=sizes.layers, num_attention_heads=sizes.heads,
        intermediate_size=sizes.mlp, vocab_size=sizes.vocab, max_position_embeddings=places,
    ))  # fmt: skip
    config = HMT.Config(
        segment_length=sizes.segment_length, sensory=sizes.sensory, cache_size=sizes.cache_size,
        query="prefix" if recall else "none", fraction=sizes.fraction, recall_dim=sizes.recall_dim, key_norm=False,
        bptt_segments=sizes.depth, checkpoint="elementwise",
    )  # fmt: skip
    return HMT(llama.to(device), config)


def authors(model: HMT) -> AuthorsLoop:
    """Their loop round the same backbone, with the same parameters (one memory, keys as they come)."""
    config, recalls = model.config, model.config.query != "none"
    T, wq, wk = (model.summary, model.recall.query.weight, model.recall.key.weight) if recalls else (None, None, None)
    return AuthorsLoop(model.backbone, T, model.memory, wq, wk, segment_length=config.segment_length,
                       sensory=config.sensory, cache_size=config.cache_size, fraction=config.fraction)  # fmt: skip


def flops(sizes: Sizes, segments: int, batch: int, *, recall: bool) -> int:
    """Of a forward pass: two for each multiplication."""
    width, own = sizes.width, sizes.segment_length

    def read(places: int) -> int:
        weights = 4 * width * width + 3 * width * sizes.mlp
        return sizes.layers * (places * weights + 2 * width * (places * (places + 1) // 2))

    products = read(own + 2) + (segments - 1) * read(own + sizes.sensory + 2) + segments * own * width * sizes.vocab
    if recall:
        excerpt = max(int(sizes.fraction * own), 1)
        seen = sum(min(n, sizes.cache_size) for n in range(1, segments))
        products += (segments - 2) * read(excerpt + 2) + (segments - 1) * 2 * width * sizes.recall_dim
        products += seen * (sizes.recall_dim + width)
    return 2 * batch * products


class Step:
    """A candidate of which `metered` also tells the bytes of its tensors."""

    def __init__(self, run: Callable[[], object]) -> None:
        self.run = run

    def __call__(self) -> None:
        self.run()


def _training(model: nn.Module, ids: Tensor) -> Step:
    def step() -> None:
        model.zero_grad()
        model(ids, labels=ids).loss.backward()

    return Step(step)


def _evaluation(model: nn.Module, ids: Tensor) -> Step:
    @torch.no_grad()
    def read() -> None:
        model(ids, labels=ids)

    return Step(read)


class _Ledger(TorchDispatchMode):
    """Bytes of tensors made while it is on: `now`, and at their `peak`; what an operator needs inside is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.peak, self._known = 0, 0, set()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self._see((args, kwargs), made=False)  # what was there before comes in as an argument first
        out = operator(*args, **(kwargs or {}))
        self._see(out, made=True)
        return out

    def _see(self, tree: Any, *, made: bool) -> None:
        for leaf in pytree.tree_leaves(tree):
            storage = leaf.untyped_storage() if isinstance(leaf, Tensor) else None
            if storage is None or id(storage) in self._known:
                continue
            size = storage.nbytes() if made else 0
            self._known.add(id(storage))
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, id(storage), size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def tensor_bytes(run: Callable[[], object]) -> int:
    """Of a call's tensors at their peak, beyond those that it leaves (gradients in the place of others)."""
    run()
    with _Ledger() as ledger:
        run()
    return ledger.peak - ledger.now


def metered(cases: Iterable[Case], allocated: Allocated) -> Iterator[Case]:
    """The cases, one at a time; bytes of the tensors of each step go into `allocated` once it was measured."""
    for case in cases:
        yield case
        for name, run in case.runs.items():
            if isinstance(run, Step):
                allocated[case.name, name] = tensor_bytes(run)


def with_tensor_bytes(measured: xr.Dataset, allocated: Allocated) -> xr.Dataset:
    """With what was counted, missing where nothing was."""
    table = [[float(allocated.get((case, name), np.nan)) for name in measured["candidate"].values]
             for case in measured["case"].values]  # fmt: skip
    about = {"long_name": "memory of tensors at the peak", "units": "bytes"}
    return measured.assign(tensor_bytes=(("case", "candidate"), table, about))


def _parameter(x: Tensor) -> nn.Parameter:
    return x if isinstance(x, nn.Parameter) else nn.Parameter(x)


def _linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = _parameter(weight)
    return linear
