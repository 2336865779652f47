"""What does HMT's memory give on near, far and global questions, at equal parameters and the same tokens?

    python -m hmlab.experiments.hmt_tasks --seeds 0 1 2 --output hmt_tasks.csv

Small models learn `hmlab.tasks.segments` on the same batches: facts that are asked for 0 to 7 segments later, and,
from scratch again, which of two marks most segments held so far. All read streams of at most 8 segments in training.
"HMT" searches its memory by the last segment's tail; "HMT, rewarded" is told in training which segment to recall; "HMT,
shuffled" is the latter with its memories exchanged for one another after the search, so that what is left is what needs
no memory. "RMT" hands one memory from segment to segment, "segments" nothing. "window 64" and "window 256" are causal
attention over so many tokens in each layer, in a model of its own (`hmlab.model`). Hidden widths are chosen so that all
have as many parameters as HMT, as nearly as they go.

Measured is the share of right answers in streams of up to 64 segments, so farther than any training, with Wilson's
intervals for one proportion at 95 %. Finished trainings and measurements are kept in a folder; interrupted, the command
goes on with what is missing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from hmlab import atomic, train
from hmlab import model as models
from hmlab.experiments.apparatus import conduct, parser, slug
from hmlab.experiments.far_recall import wilson
from hmlab.memories import window
from hmlab.memory import state_bytes
from hmlab.provenance import checkout
from hmlab.tasks import Batch, recall, segments
from hmlab.wrappers.hmt import HMT
from hmlab.wrappers.hmt import training as stages

Form = Literal["pairs", "majority"]
FORMS: tuple[Form, ...] = ("pairs", "majority")
REWARD = 1.0  # weight of the loss that names the segment to recall; each segment of a stream adds its own


class Phase(NamedTuple):
    """Of a training. segments: of a stream. streams: of a batch. recall: whether HMT searches already."""

    form: Literal["pairs", "copy", "majority"]
    segments: int
    streams: int
    steps: int
    recall: bool = True


class Trained(NamedTuple):
    """wrapper: fields of `HMT.Config` round a Llama, or None. window: tokens that each sees, without a wrapper.
    weights: the model whose training it shares, None for its own."""

    wrapper: dict[str, Any] | None
    window: int = 0
    weights: str | None = None


MODELS = {
    "HMT": Trained({}),
    "HMT, rewarded": Trained({"retrieval_loss": REWARD}),
    "HMT, shuffled": Trained({"retrieval_loss": REWARD}, weights="HMT, rewarded"),
    "RMT": Trained({"query": "none"}),
    "segments": Trained({"query": "none", "memories": 0, "sensory": 0}),
    "window 64": Trained(None, 64),
    "window 256": Trained(None, 256),
}
# Of each question: the form and the least and most distance, in segments; majority is asked in streams of so many.
QUESTIONS: dict[str, tuple[Form, int, int]] = {
    "same segment": ("pairs", 0, 0),
    "last segment": ("pairs", 1, 1),
    "2 to 7 segments": ("pairs", 2, 7),
    "8 to 48 segments": ("pairs", 8, 48),
    "majority of 8": ("majority", 8, 8),
    "majority of 64": ("majority", 64, 64),
}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all trainings and measurements share. width, layers, heads, mlp: of HMT's Llama. length, sensory, fraction:
    of its segments. keys, values: of the task. pairs, majority: phases of the form's training. measured: streams of
    `farthest` segments that are measured, `asked` facts in each."""

    width: int = 64
    layers: int = 2
    heads: int = 4
    mlp: int = 128
    length: int = 32
    sensory: int = 8
    fraction: float = 0.25
    keys: int = 32
    values: int = 16
    learning_rate: float = 3e-3
    warmup: int = 20
    # Copies before pairs: who asks for the last fact needs no key, and memories so taught held values without keys.
    pairs: tuple[Phase, ...] = (
        Phase("pairs", 1, 64, 120, recall=False), Phase("copy", 3, 32, 300, recall=False),
        Phase("pairs", 4, 32, 250), Phase("pairs", 8, 16, 200),
    )  # fmt: skip
    majority: tuple[Phase, ...] = (Phase("majority", 4, 32, 100, recall=False), Phase("majority", 8, 16, 150))
    measured: int = 32
    farthest: int = 64
    asked: int = 32

    def task(self, form: str, count: int, batch: int) -> segments.Config:
        """Streams of `count` segments to learn from."""
        return self.streams(form=form, batch=batch, segments=count, pairs=max(1, count * 5 // 8),
                            distance=(0, count - 1))  # fmt: skip

    def streams(self, **fields: Any) -> segments.Config:
        """Of segments as the models read them."""
        return segments.Config(length=self.length, keys=self.keys, values=self.values, **fields)

    def phases(self, form: Form) -> tuple[Phase, ...]:
        return self.pairs if form == "pairs" else self.majority

    def model(self, name: str, cache_size: int = 4096) -> nn.Module:
        """An untrained one, of HMT's size."""
        wanted = models.parameters(self._wrapped({}, self.mlp, cache_size))
        kind = MODELS[name]
        if kind.wrapper is None:
            # Of half as many heads, so that widths lie closer together.
            sizes = range(self.heads, 2 * self.width, self.heads)
            made: Callable[[int], nn.Module] = lambda size: self._windowed(kind.window, size)  # noqa: E731
        else:
            sizes = range(self.mlp, 2 * self.mlp)
            made = lambda size: self._wrapped(kind.wrapper, size, cache_size)  # noqa: E731
        with torch.device("meta"):
            size = min(sizes, key=lambda size: abs(models.parameters(made(size)) - wanted))
        return made(size)

    def _wrapped(self, fields: dict[str, Any], mlp: int, cache_size: int) -> HMT:
        from transformers import LlamaConfig, LlamaForCausalLM

        config = HMT.Config(**{
            "segment_length": self.length, "sensory": self.sensory, "fraction": self.fraction,
            "cache_size": cache_size, "bptt_segments": self.pairs[-1].segments, **fields,
        })  # fmt: skip
        vocab = self.task("pairs", 2, 1).vocab_size
        return HMT(LlamaForCausalLM(LlamaConfig(
            vocab_size=vocab, hidden_size=self.width, intermediate_size=mlp, num_hidden_layers=self.layers,
            num_attention_heads=self.heads, num_key_value_heads=self.heads, max_position_embeddings=config.places,
            # So that what a memory holds of a word is what the query holds of it.
            tie_word_embeddings=True,
        )), config)  # fmt: skip

    def _windowed(self, tokens: int, width: int) -> models.LanguageModel:
        memory = window.Config(dim=width, heads=self.heads // 2, window=tokens)
        return models.Config(vocab=self.task("pairs", 2, 1).vocab_size, dim=width, layers=self.layers, memory=memory,
                             ffn="gated", ffn_factor=2).build()  # fmt: skip


def trained(setting: Setting, name: str, form: Form, seed: int, folder: Path, say: Any) -> nn.Module:
    """The model after all phases; from the folder if it is there."""
    name = MODELS[name].weights or name
    torch.manual_seed(seed)
    model = setting.model(name)
    done = folder / f"{slug(name)}-{form}-{seed}.safetensors"
    if done.exists():
        model.load_state_dict(load_file(done))
        return model.eval()
    for number, metrics in _steps(setting, model, form, seed, folder / f"{slug(name)}-{form}-{seed}"):
        phase = setting.phases(form)[number]
        if metrics.step % 50 == 0 or metrics.step == phase.steps:
            say(f"{name}, {phase.form}, seed {seed}, {phase.segments} segments: step {metrics.step} of {phase.steps}, "
                f"{metrics.loss:.3f} nats, {metrics.tokens_per_second:.0f} tokens/s")  # fmt: skip
    # Cloned, since embedding and head may be one.
    atomic.write_bytes(done, save({name: value.clone() for name, value in model.state_dict().items()}))
    return model.eval()


def _steps(setting: Setting, model: nn.Module, form: Form, seed: int, unfinished: Path
           ) -> Iterator[tuple[int, train.Metrics]]:
    """The training, with the number of the phase; every model sees the same batches."""
    plan, data, phases = [], {}, setting.phases(form)
    for phase in phases:
        plan.append(stages.Stage(
            segments=phase.segments, steps=phase.steps, batch=phase.streams, learning_rate=setting.learning_rate,
            query=None if phase.recall else "none", warmup=setting.warmup,
            schedule="cosine" if phase is phases[-1] else "constant",
        ))  # fmt: skip
        data[plan[-1]] = setting.task(*phase[:3]).open()
    if isinstance(model, HMT):
        begun: list[stages.Stage] = []  # an interrupted training begins with a later one

        def of(stage: stages.Stage) -> segments.SegmentsData:
            begun.append(stage)
            return data[stage]

        for metrics in stages.train(model, {}, plan, seed=seed, folder=unfinished, data=of):
            yield plan.index(begun[-1]), metrics
        return
    for number, stage in enumerate(plan):
        recipe = train.Config(
            steps=stage.steps, learning_rate=stage.learning_rate, warmup=stage.warmup, clip=stage.clip,
            schedule=stage.schedule, learning_rate_floor=0.1, evaluate_every=10**9, evaluate_batches=1,
            deterministic=False,
        )  # fmt: skip
        for metrics in train.train(model, data[stage], recipe, seed=seed + 1000 * number):
            yield number, metrics


class Reading(nn.Module):
    """A model as `hmlab.tasks.recall.answers` calls one; keeps the state that it ends with."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.state = model, None

    def forward(self, tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        out = self.model(tokens, state=state)
        logits, self.state = (out.logits, out.state) if isinstance(self.model, HMT) else out
        return logits, self.state


def answers(model: nn.Module, batches: list[Batch], length: int, chunk: int = 16) -> tuple[Tensor, Tensor, int]:
    """Distance in segments (-1 without an oracle) and correctness of every answer; bytes of a row's state afterwards.

    length: tokens of a segment. chunk: segments that are fed at once.
    """
    reading, distances = Reading(model), []
    for batch in batches:
        place = torch.arange(batch.tokens.shape[1])
        apart = torch.where(batch.oracle < 0, -1, place // length - batch.oracle.clamp(min=0) // length)
        distances.append(apart[batch.mask])
    found = recall.answers(reading, batches, chunk=chunk * length)
    held = state_bytes(reading.state) // len(batches[-1].tokens)
    return torch.cat(distances), torch.from_numpy(found["correct"].values), held


@contextmanager
def shuffled(hmt: HMT, seed: int = 0) -> Iterator[None]:
    """Memories are found by their keys, and others of the same row are read in their place."""
    generator = torch.Generator().manual_seed(seed)

    def exchange(_: nn.Module, given: tuple) -> tuple:
        summary, cache, *rest = given
        return summary, cache[:, torch.randperm(cache.shape[1], generator=generator)], *rest

    hook = hmt.recall.register_forward_pre_hook(exchange)
    try:
        yield
    finally:
        hook.remove()


def measure(setting: Setting, name: str, model: nn.Module, form: Form, seed: int) -> dict[str, Any]:
    """Right answers and answers of each question of a form, what the model holds and how large it is."""
    rows: dict[str, Any] = {}
    for question, (asked, least, most) in QUESTIONS.items():
        if asked != form:
            continue
        count = setting.farthest if form == "pairs" else most
        config = setting.streams(form=form, batch=setting.measured, segments=count, pairs=setting.asked,
                                 distance=(0, min(48, count - 1)))  # fmt: skip
        batches = list(config.open().evaluation_batches("valid", 1, seed))
        with shuffled(model, seed) if name.endswith("shuffled") else nullcontext():
            distance, correct, held = answers(model, batches, setting.length)
        chosen = (distance >= least) & (distance <= most) if form == "pairs" else torch.ones_like(correct)
        rows[question] = {"right": int(correct[chosen].sum()), "answers": int(chosen.sum()), "state_bytes": held,
                          "chance": config.chance if form == "pairs" else segments.last_mark(count)}  # fmt: skip
    return rows


def run(setting: Setting, memories: list[str], seeds: list[int], folder: Path, say: Any = print,
        forms: Sequence[Form] = FORMS) -> Any:
    """Train and measure what the folder does not hold yet; a Dataset (model, seed, question)."""
    import numpy as np
    import xarray as xr

    folder.mkdir(parents=True, exist_ok=True)
    columns = ("accuracy", "low", "high", "answers", "chance", "state_bytes", "parameters")
    table = {c: np.full((len(memories), len(seeds), len(QUESTIONS)), np.nan) for c in columns}
    commits, order = set(), list(QUESTIONS)
    for form in forms:
        for s, seed in enumerate(seeds):
            for m, name in enumerate(memories):
                kept = folder / f"{slug(name)}-{form}-{seed}-answers.json"
                if not kept.exists():
                    model = trained(setting, name, form, seed, folder, say)
                    found = measure(setting, name, model, form, seed)
                    facts = {"commit": checkout()[0], "parameters": models.parameters(model), "questions": found}
                    atomic.write_bytes(kept, json.dumps(facts).encode())
                    say(f"{name}, seed {seed}: " + ", ".join(
                        f"{question} {row['right']} of {row['answers']}" for question, row in found.items()))
                facts = json.loads(kept.read_text())
                commits.add(str(facts["commit"]))
                for question, row in facts["questions"].items():
                    low, high = wilson(row["right"], row["answers"])
                    row |= {"accuracy": row["right"] / row["answers"], "low": low, "high": high,
                            "parameters": facts["parameters"]}  # fmt: skip
                    for column in columns:
                        table[column][m, s, order.index(question)] = row[column]
    dims = ("model", "seed", "question")
    dataset = xr.Dataset({name: (dims, values) for name, values in table.items()},
                         {"model": memories, "seed": seeds, "question": order})  # fmt: skip
    dataset["state_bytes"].attrs["units"], dataset["accuracy"].attrs["units"] = "bytes", "share of answers"
    dataset["chance"].attrs["long_name"] = "of who guesses, or names the last mark"
    data = setting.task(*setting.pairs[-1][:3]).open()
    return dataset.assign_attrs(setting=asdict(setting), corpus=data.provenance(), measured_at=sorted(commits),
                                experiment="hmlab.experiments.hmt_tasks")  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """`python -m hmlab.experiments.hmt_tasks`; Ctrl-C ends it, and the same command goes on."""
    options = parser(__doc__, list(MODELS), "hmt_tasks")
    options.add_argument("--forms", nargs="+", default=list(FORMS), choices=FORMS, help="of the questions")
    given = options.parse_args(arguments)
    return conduct(lambda say: run(Setting(), given.memories, given.seeds, given.folder, say, given.forms),
                   given.output)  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
