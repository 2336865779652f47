"""The training loop: one generator that yields what happened at every step. It reads and writes no files.

    for metrics in train(model, data, Config(steps=1000), seed=0):
        print(metrics.step, metrics.loss)

The defaults are the recipe of the LMN paper (arXiv 2501.07905): AdamW at a constant 1e-3, evaluated every 500
steps on 200 random batches per split. Unlike the authors' evaluation ours draws the same batches every time,
from a generator of its own: how often one looks changes nothing about the training.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hmlab import auxiliary
from hmlab.diagnosis import Spike, diagnose
from hmlab.progress import Progress
from hmlab.tasks import Batch

CHOICES = {"schedule": ("constant", "cosine", "step"), "precision": ("float32", "bfloat16")}
SPIKE_BITS = {"loss": 1, "gradient_norm": 2}
# Weight of the newest step in the moving value of tokens per second.
RATE_WEIGHT = 0.1


@dataclass(frozen=True, kw_only=True)
class Config:
    """How to train.

    schedule: after `warmup` steps of linear rise the learning rate is constant; or falls as a cosine to
    `learning_rate_floor` (a share of learning_rate) at the last step; or is multiplied by `decay_factor`
    every `decay_every` steps. memory_betas, memory_learning_rate_factor: AdamW's betas (None: as the others)
    and a factor on the learning rate for the parameters inside memories. clip: largest gradient norm, None
    for no limit. accumulate: batches per step. evaluate_every: steps between evaluations on
    `evaluate_batches` batches of each split; the last step is always evaluated. precision: bfloat16 runs
    under autocast. deterministic: operations without a deterministic form raise.
    """

    steps: int = 5000
    learning_rate: float = 1e-3
    schedule: Literal["constant", "cosine", "step"] = "constant"
    warmup: int = 0
    learning_rate_floor: float = 0.0
    decay_every: int = 1000
    decay_factor: float = 0.1
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    memory_betas: tuple[float, float] | None = None
    memory_learning_rate_factor: float = 1.0
    clip: float | None = None
    accumulate: int = 1
    evaluate_every: int = 500
    evaluate_batches: int = 200
    precision: Literal["float32", "bfloat16"] = "float32"
    deterministic: bool = True

    def __post_init__(self) -> None:
        for name in ("steps", "decay_every", "accumulate", "evaluate_every", "evaluate_batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected 1 or more, got {getattr(self, name)}")
        for name in ("learning_rate", "decay_factor"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a number above 0, got {getattr(self, name)}")
        for name in ("warmup", "learning_rate_floor", "weight_decay", "memory_learning_rate_factor"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: expected 0 or more, got {getattr(self, name)}")
        for name in ("betas", "memory_betas"):
            betas = getattr(self, name)
            if betas is not None and not (len(betas) == 2 and all(0 <= beta < 1 for beta in betas)):
                raise ValueError(f"{name}: expected two numbers in [0, 1), got {betas}")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip: expected a number above 0 or None, got {self.clip}")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: expected {' or '.join(choices)}, got {getattr(self, name)!r}")


@runtime_checkable
class Data(Protocol):
    """What the loop asks of a task's data; see `hmlab.tasks`."""

    def batches(self, split: str, generator: torch.Generator) -> Iterator[Batch]: ...
    def evaluation_batches(self, split: str, count: int, seed: int) -> Iterator[Batch]: ...


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """One step, counted from 1. Losses are in nats per token.

    train_loss, valid_loss: means over the evaluation batches, NaN where the step was not evaluated. tokens:
    read since the beginning. elapsed: seconds spent in the loop since the beginning. memory_bytes: resident
    set, or the CUDA allocator's peak. spike: 0, or the sum of 1 (loss) and 2 (gradient norm); see `spikes`.
    """

    step: int
    loss: float
    train_loss: float
    valid_loss: float
    gradient_norm: float
    learning_rate: float
    tokens: int
    tokens_per_second: float
    memory_bytes: int
    elapsed: float
    spike: int
    spikes: tuple[Spike, ...]


def learning_rate(config: Config, step: int) -> float:
    """The learning rate of a step, counted from 1."""
    if step <= config.warmup:
        return config.learning_rate * step / config.warmup
    if config.schedule == "cosine":
        way = (step - config.warmup) / max(1, config.steps - config.warmup)
        floor = config.learning_rate_floor
        return config.learning_rate * (floor + (1 - floor) * (1 + math.cos(math.pi * way)) / 2)
    if config.schedule == "step":
        return config.learning_rate * config.decay_factor ** ((step - 1) // config.decay_every)
    return config.learning_rate


def begin(model: nn.Module, config: Config, *, seed: int = 0) -> Progress:
    """A training at step 0: AdamW, the parameters inside memories in a group of their own."""
    inside = model.memory_parameters()
    memory = {id(p) for p in inside}
    outside = [p for p in model.parameters() if id(p) not in memory]
    groups = [{"params": outside, "factor": 1.0, "betas": config.betas}]
    if inside:
        betas = config.memory_betas or config.betas
        groups.append({"params": inside, "factor": config.memory_learning_rate_factor, "betas": betas})
    optimizer = torch.optim.AdamW(
        groups, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
    )
    return Progress(model, optimizer, seed=seed)


def train(model: nn.Module, data: Data, config: Config, *, seed: int = 0, progress: Progress | None = None
          ) -> Iterator[Metrics]:
    """Train `model` where it lies, yielding after every step.

    progress: begin from it and advance it, so that the caller can make checkpoints between steps; without it,
    a new one from `seed`. Raises `Instability` before a step with a non-finite loss or gradient is taken.
    """
    if progress is None:
        progress = begin(model, config, seed=seed)
    device = next(model.parameters()).device
    batches = data.batches("train", progress.generator)
    while progress.step < config.steps:
        began = time.perf_counter()
        step = progress.step + 1
        rate = learning_rate(config, step)
        for group in progress.optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        with _determinism(config.deterministic, device):
            model.train()
            drawn = [next(batches) for _ in range(config.accumulate)]
            targets = sum(int(batch.mask.sum()) for batch in drawn)
            tokens = sum(b.tokens.numel() if b.valid is None else int(b.valid.sum()) for b in drawn)
            forwards = [partial(total_loss, model, batch.to(device), config.precision) for batch in drawn]
            loss = torch.zeros((), device=device)
            for forward in forwards:
                part = forward() / targets
                part.backward()
                loss += part.detach()

            named = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            norms = torch.stack(torch._foreach_norm(list(named.values())))
            norm = torch.linalg.vector_norm(norms)
            loss_value, norm_value = torch.stack([loss, norm]).tolist()  # the step's only wait for the device
            if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
                raise diagnose(model, step, loss_value, forwards)
            if config.clip is not None:
                torch.nn.utils.clip_grads_with_norm_(model.parameters(), config.clip, norm)
            progress.optimizer.step()
            progress.optimizer.zero_grad()
            spikes = progress.watch.spikes(step, loss_value, norm_value, list(named), norms)
            seconds = time.perf_counter() - began

            evaluated = {"train": math.nan, "valid": math.nan}
            if step % config.evaluate_every == 0 or step == config.steps:
                for split in evaluated:
                    chosen = data.evaluation_batches(split, config.evaluate_batches, 0)
                    evaluated[split] = evaluate(model, chosen, config.precision)
                    if not math.isfinite(evaluated[split]):
                        raise diagnose(model, step, evaluated[split], forwards)
        progress.step = step
        progress.tokens += tokens
        speed, before = tokens / seconds, progress.tokens_per_second
        progress.tokens_per_second = speed if math.isnan(before) else before + RATE_WEIGHT * (speed - before)
        progress.elapsed += time.perf_counter() - began
        yield Metrics(
            step=step, loss=loss_value, train_loss=evaluated["train"], valid_loss=evaluated["valid"],
            gradient_norm=norm_value, learning_rate=rate, tokens=progress.tokens,
            tokens_per_second=progress.tokens_per_second, memory_bytes=memory_bytes(device),
            elapsed=progress.elapsed, spike=sum(SPIKE_BITS[s.kind] for s in spikes), spikes=tuple(spikes),
        )  # fmt: skip


def total_loss(model: nn.Module, batch: Batch, precision: str = "float32") -> Tensor:
    """The sum over the targets that count of the cross-entropy in nats; a scalar.

    In training mode, plus what the memories ask for besides (`hmlab.auxiliary`), which counts for every target. A model
    that has a `loss_sum` computes the former itself: one whose logits of all tokens at once would be too many.
    """
    with (
        torch.autocast(batch.tokens.device.type, torch.bfloat16, enabled=precision == "bfloat16"),
        (auxiliary.collect() if model.training else nullcontext({})) as asked,
    ):
        if hasattr(model, "loss_sum"):
            loss = model.loss_sum(batch)
        else:
            logits, _ = model(batch.tokens, reset=batch.reset, valid=batch.valid)
            targets = batch.targets.masked_fill(~batch.mask, -100)  # what cross_entropy ignores
            loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum")
    return loss + sum(asked.values()) * batch.mask.sum() if asked else loss


def evaluate(model: nn.Module, batches: Iterable[Batch], precision: str = "float32") -> float:
    """Mean loss in nats per target over the batches; disturbs neither the model's mode nor any generator."""
    device = next(model.parameters()).device
    total, targets, training = torch.zeros((), dtype=torch.float64), 0, model.training
    model.eval()
    with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        for batch in batches:
            targets += int(batch.mask.sum())
            total = total + total_loss(model, batch.to(device), precision).double()
    model.train(training)
    return float(total) / targets


def memory_bytes(device: torch.device) -> int:
    """Bytes this process holds: its resident set, or on CUDA the most that tensors have taken."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import psutil

    return psutil.Process().memory_info().rss


@contextmanager
def _determinism(on: bool, device: torch.device) -> Iterator[None]:
    """Deterministic algorithms for what is inside, and the process as it was afterwards."""
    if not on:
        yield
        return
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
        torch.backends.cudnn.benchmark = benchmark
