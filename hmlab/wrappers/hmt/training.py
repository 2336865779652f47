"""Training in stages: first without recall, then with it, over more and more segments.

    for metrics in train(model, {"train": ids, "valid": more}, two_stages(1000, segments=6), seed=0): ...

Recall's gradients are tiny while memories say nothing yet, so a first stage teaches the backbone and the memory that is
handed from segment to segment (`query="none"`), and a second one to search. A curriculum lets the number of segments
that the loss is unrolled over grow. The loop is `hmlab.train`'s, once a stage; the windows begin anywhere in the text.
Errors: ValueError naming the field.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from hmlab import atomic
from hmlab import train as training
from hmlab.layers import check_positive
from hmlab.tasks import Batch
from hmlab.wrappers.hmt.config import LEAST_SEGMENTS, QUERIES
from hmlab.wrappers.hmt.network import HMT

# Seconds between two states of the training on disk.
KEPT_EVERY = 30.0


@dataclass(frozen=True, kw_only=True)
class Stage:
    """segments: that a window has and the loss is unrolled over. query: as in `HMT.Config`, None for the model's own.
    trained: all parameters, or the wrapper's own (what is frozen beforehand stays so)."""

    segments: int
    steps: int
    query: Literal["previous", "prefix", "none"] | None = None
    batch: int = 2
    learning_rate: float = 1e-3
    trained: Literal["all", "own"] = "all"
    warmup: int = 0
    clip: float | None = 1.0
    schedule: Literal["constant", "cosine"] = "constant"

    def __post_init__(self) -> None:
        check_positive(self, "segments", "steps", "batch")
        if self.query not in (*QUERIES, None):
            raise ValueError(f"query: expected one of {', '.join(QUERIES)} or None, got {self.query!r}")
        if self.query in ("previous", "prefix") and self.segments < LEAST_SEGMENTS:
            raise ValueError(f"segments: expected at least {LEAST_SEGMENTS} with recall, got {self.segments}")
        if self.trained not in ("all", "own"):
            raise ValueError(f"trained: expected all or own, got {self.trained!r}")


def two_stages(steps: int, *, segments: int = 6, **fields: Any) -> list[Stage]:
    """Half of the steps without recall over 2 segments; the rest with it, over 3, then 4, … segments."""
    if "query" in fields:
        raise ValueError("query: expected the model's own (its stages are told apart by it), got one for all stages")
    lengths = range(LEAST_SEGMENTS, max(segments, LEAST_SEGMENTS) + 1)
    if steps < 2 * len(lengths):
        raise ValueError(f"steps: expected at least {2 * len(lengths)} for {segments} segments, got {steps}")
    each = (steps - steps // 2) // len(lengths)
    rest = [Stage(segments=n, steps=each, **fields) for n in lengths[:-1]]
    last = steps - steps // 2 - each * len(rest)
    return [Stage(segments=2, steps=steps // 2, query="none", **fields), *rest,
            Stage(segments=lengths[-1], steps=last, **fields)]  # fmt: skip


@dataclass(frozen=True)
class Windows:
    """Random windows of encoded text; what `hmlab.train` asks of a task's data."""

    tokens: Mapping[str, Int[Tensor, "time"]]
    batch: int
    context: int

    def batches(self, split: str, generator: torch.Generator) -> Iterator[Batch]:
        if split not in self.tokens or len(self.tokens[split]) <= self.context:
            held = {name: len(text) for name, text in self.tokens.items()}
            raise ValueError(f"tokens: expected more than {self.context} tokens called {split!r}, got {held}")
        every = self.tokens[split].unfold(0, self.context + 1, 1)
        while True:
            window = every[torch.randint(len(every), (self.batch,), generator=generator)].long()
            yield Batch(tokens=window[:, :-1].contiguous(), targets=window[:, 1:].contiguous(),
                        mask=torch.ones(self.batch, self.context, dtype=torch.bool))  # fmt: skip

    def evaluation_batches(self, split: str, count: int, seed: int) -> Iterator[Batch]:
        return islice(self.batches(split, torch.Generator().manual_seed(seed)), count)


def train(
    hmt: HMT,
    tokens: Mapping[str, Int[Tensor, "time"]],
    stages: Sequence[Stage],
    *,
    seed: int = 0,
    data: Callable[[Stage], training.Data] | None = None,
    folder: str | Path | None = None,
) -> Iterator[training.Metrics]:
    """Train `hmt` where it lies, stage after stage, yielding after every step (counted from 1 in each stage).

    tokens: of the splits train and valid; a stage's last step is evaluated on a batch of each. data: other batches for
    a stage than windows of `tokens`. folder: the training is kept there, and begun from what is kept; interrupted, the
    same call goes on to the same numbers.
    """
    kept = None if folder is None else Path(folder) / "training.safetensors"
    identity = None if kept is None else _identity(hmt, tokens, stages, seed)
    number, restored = _restore(hmt, identity, kept)
    own = hmt.query
    for n, stage in enumerate(stages):
        if n < number:
            continue
        recipe = training.Config(
            steps=stage.steps, learning_rate=stage.learning_rate, warmup=stage.warmup, clip=stage.clip,
            schedule=stage.schedule, learning_rate_floor=0.1, evaluate_every=10**9, evaluate_batches=1,
            deterministic=False,
        )  # fmt: skip
        context = stage.segments * hmt.config.segment_length
        source = Windows(tokens, stage.batch, context) if data is None else data(stage)
        if stage.trained == "own" and not any(p.requires_grad for p in hmt.memory_parameters()):
            raise ValueError("trained: expected all, the wrapper has no parameters of its own to train, got own")
        frozen = [p for p in hmt.backbone.parameters() if p.requires_grad] if stage.trained == "own" else []
        hmt.query = stage.query or own
        for parameter in frozen:
            parameter.requires_grad_(False)
        try:
            progress = training.begin(hmt, recipe, seed=seed + 1000 * n)
            if n == number and restored:
                progress.restore(*restored)
            last = time.monotonic()
            for metrics in training.train(hmt, source, recipe, progress=progress):
                yield metrics
                if kept is not None and time.monotonic() - last > KEPT_EVERY:
                    _keep(hmt, identity, n, progress, kept)
                    last = time.monotonic()
        finally:
            hmt.query = own
            for parameter in frozen:
                parameter.requires_grad_(True)
        if kept is not None:
            _keep(hmt, identity, n + 1, None, kept)


def _identity(hmt: HMT, tokens: Mapping[str, Tensor], stages: Sequence[Stage], seed: int) -> str:
    """What decides a training's numbers, as far as it can be told: other `data` cannot."""
    texts = {name: hashlib.sha256(text.cpu().numpy().tobytes()).hexdigest() for name, text in tokens.items()}
    return json.dumps([seed, [asdict(stage) for stage in stages], asdict(hmt.config), texts])


def _keep(hmt: HMT, identity: str, number: int, progress: Any, path: Path) -> None:
    from safetensors.torch import save

    tensors, facts = ({}, None) if progress is None else progress.state()
    tensors = {f"progress/{name}": value for name, value in tensors.items()}
    tensors |= {f"model/{name}": value for name, value in hmt.state_dict().items()}
    header = {"training": identity, "stage": str(number), "facts": json.dumps(facts)}
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_bytes(path, save({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}, header))


def _restore(hmt: HMT, identity: str | None, path: Path | None) -> tuple[int, Any]:
    """The stage to go on with, and the progress inside it."""
    from safetensors import safe_open

    if path is None or not path.exists():
        return 0, None
    with safe_open(path, "pt") as file:
        header = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    if header["training"] != identity:
        raise ValueError(f"folder: expected one without a training or with this one, got {path.parent} with another")
    hmt.load_state_dict({k.removeprefix("model/"): v for k, v in tensors.items() if k.startswith("model/")})
    facts = json.loads(header["facts"])
    inside = {k.removeprefix("progress/"): v for k, v in tensors.items() if k.startswith("progress/")}
    return int(header["stage"]), None if facts is None else (inside, facts)
