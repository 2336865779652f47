"""How far back can a planted key be and still be read back, from a memory that has stopped growing?

    python -m hmlab.experiments.far_recall --seeds 0 1 2 --output harmony_far_recall.csv

A small model with HARMONY as its memory learns to recall (`hmlab.tasks.recall`): on copies of random passages first,
then on pairs whose questions come ever later, up to 1,024 tokens. Slots carry no phase, so that a slot far back looks
like a near one. Then only the codes are taught to find the slots that queries want, and nothing more is learned.

Measured is the share of right answers at distances the model has never seen: all keys of a stream are planted in its
first `spread` tokens, and each is asked exactly `distance` tokens later. Each distance is a stream of its own, fed in
chunks. "512 slots", "8192 slots" and "65536 slots" are one model whose medium tier holds so many, which are 8 K, 128 K
and 1 M tokens: beyond them the key is forgotten, and answers must be wrong. "8192 slots, exact" ranks all slots in
place of those with equal codes; "window" is the same weights without slots; "full" is causal attention, trained alike.
Intervals are Wilson's for one proportion, at 95 %.

Finished trainings and measurements are kept in a folder; interrupted, the command goes on with what is missing.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save
from torch import nn

from hmlab import atomic, train
from hmlab import model as models
from hmlab.experiments.apparatus import conduct, fitting, parser, slug, teach_codes
from hmlab.memories import harmony
from hmlab.memory import state_bytes
from hmlab.provenance import checkout
from hmlab.tasks import recall

DISTANCES = (1024, 4096, 16384, 65536, 102400, 262144, 1048576)
Z = 1.959964  # of a normal variable: 95 % lie within as many standard deviations


class Measured(NamedTuple):
    """trained: whose weights. choices: what `replay` changes. farthest: distance up to which it is measured."""

    trained: str
    choices: dict[str, Any]
    farthest: int


# More work than codes are taught with: of 8,192 slots a bucket of 256 holds 32, and more where slots are alike.
READ = {"picks": 4, "probes": 4, "candidates": 2048}
MEMORIES = {
    "full": Measured("full", {}, 16384),
    "window": Measured("hierarchy", {"retrieval": "none"}, 16384),
    "512 slots": Measured("hierarchy", {"capacity": 512, **READ}, 65536),
    "8192 slots": Measured("hierarchy", {"capacity": 8192, **READ}, 1048576),
    "65536 slots": Measured("hierarchy", {"capacity": 65536, **READ, "candidates": 16384}, 262144),
    "8192 slots, exact": Measured("hierarchy", {"capacity": 8192, **READ, "retrieval": "exact"}, 16384),
}


def _pairs(context: int, batch: int, pairs: int, least: int) -> recall.Config:
    return recall.Config(context=context, batch=batch, pairs=pairs, distance=(least, context - 24))


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all trainings and measurements share. phases: streams and steps; in the first `shared` of them everything
    asked lies in the window, and all memories go on from the same weights. picks, tables, bits, probes, candidates:
    while codes are taught. pairs, spread: planted in the first tokens of a stream that is measured."""

    dim: int = 64
    layers: int = 2
    heads: int = 2
    window: int = 64
    segment: int = 64
    ratio: int = 16
    rotary_base: float = 1e6
    picks: int = 8
    tables: int = 8
    bits: int = 8
    probes: int = 2
    candidates: int = 512
    learning_rate: float = 5e-3
    shared: int = 2
    phases: tuple[tuple[recall.Config, int], ...] = (
        (recall.Config(form="copy", context=48, batch=24, distance=(6, 20)), 500),
        (recall.Config(context=64, batch=32, pairs=8, distance=(2, 50)), 150),
        (_pairs(256, 8, 8, 2), 150),
        (_pairs(512, 4, 12, 128), 250),
        (_pairs(1024, 2, 16, 128), 250),
    )
    codes: tuple[recall.Config, int] = field(default_factory=lambda: (_pairs(1024, 2, 32, 128), 80))
    codes_learning_rate: float = 1e-2
    pairs: int = 32
    spread: int = 8192
    distances: tuple[int, ...] = DISTANCES
    chunk: int = 4096

    def model(self, trained: str) -> models.LanguageModel:
        """The model to train: it reads all of its slots, or sees all of its context."""
        longest = max(config.context for config, _ in self.phases)
        fields: dict[str, Any] = {"retrieval": "all", "window": self.window}
        if trained == "full":
            fields = {"retrieval": "none", "window": longest}
        memory = harmony.Config(dim=self.dim, heads=self.heads, rotary_base=self.rotary_base, segment=self.segment,
                                ratios=(self.ratio,), densities=(), sinks=0, phase=False, picks=self.picks,
                                **fields)  # fmt: skip
        vocab = self.phases[0][0].open().vocab_size
        return models.Config(vocab=vocab, dim=self.dim, layers=self.layers, memory=memory).build()

    def measured(self, memory: str, model: nn.Module, distance: int) -> nn.Module:
        """The trained model as it is measured."""
        choices = dict(MEMORIES[memory].choices)
        if memory == "full":
            choices["window"] = distance + self.spread
        return harmony.replay(model, **choices)


def trained(setting: Setting, name: str, seed: int, folder: Path, say: Any) -> models.LanguageModel:
    """The model after all phases, with codes for its slots; from the folder if it is there."""
    torch.manual_seed(seed)
    model = setting.model(name)
    done, shared = folder / f"{name}-{seed}.safetensors", folder / f"shared-{seed}.safetensors"
    if done.exists():
        model = model if name == "full" else hashed(setting, model)
        model.load_state_dict(load_file(done))
        return model
    first = 0
    if shared.exists():
        # What is not there is what makes slots, and has not been used yet.
        model.load_state_dict(fitting(model, shared), strict=False)
        first = setting.shared
    for number, (config, steps) in list(enumerate(setting.phases))[first:]:
        last = number == len(setting.phases) - 1
        recipe = train.Config(
            steps=steps, learning_rate=setting.learning_rate, warmup=min(50, steps), clip=1.0, betas=(0.9, 0.99),
            schedule="cosine" if last else "constant", learning_rate_floor=0.05 if last else 0.0,
            evaluate_every=10**9, evaluate_batches=1, deterministic=False,
        )  # fmt: skip
        for metrics in train.train(model, config.open(), recipe, seed=1000 * seed + number):
            if metrics.step % 50 == 0 or metrics.step == steps:
                say(f"{name}, seed {seed}, context {config.context}: step {metrics.step} of {steps}, "
                    f"{metrics.loss:.3f} nats, {metrics.tokens_per_second:.0f} tokens/s")  # fmt: skip
        if number == setting.shared - 1:
            atomic.write_bytes(shared, save(model.state_dict()))
    if name != "full":
        model = with_codes(setting, model, seed, say)
    atomic.write_bytes(done, save(model.state_dict()))
    return model


def hashed(setting: Setting, model: nn.Module) -> nn.Module:
    """The model with codes that nobody taught yet."""
    return harmony.replay(model, retrieval="hash", tables=setting.tables, bits=setting.bits, probes=setting.probes,
                          candidates=setting.candidates)  # fmt: skip


def with_codes(setting: Setting, model: nn.Module, seed: int, say: Any) -> nn.Module:
    """The model with codes that were taught to find its slots; nothing else changes."""
    torch.manual_seed(seed)
    model = hashed(setting, model)
    config, steps = setting.codes
    batches = config.open().batches("train", torch.Generator().manual_seed(1000 * seed + 999))
    return teach_codes(model, (batch.tokens for batch in batches), steps, setting.codes_learning_rate, say)


def measure(setting: Setting, model: nn.Module, distance: int, seed: int) -> dict[str, int | float]:
    """Answers at one distance, and what the memory holds when the last of them was given."""
    config = recall.Config(context=distance + setting.spread, batch=1, pairs=setting.pairs,
                           distance=(distance, distance))  # fmt: skip
    last: dict[str, Any] = {}
    hook = model.register_forward_hook(lambda module, given, out: last.update(state=out[1]))
    begun = time.process_time()
    found = recall.answers(model, config.open().evaluation_batches("valid", 1, seed), chunk=setting.chunk)
    seconds = time.process_time() - begun
    hook.remove()
    layers = last["state"].layers
    return {"right": int(found["correct"].sum()), "answers": found.sizes["answer"],
            "state_bytes": sum(map(state_bytes, layers)), "slots": max(int(layer.slots.max()) for layer in layers),
            "cpu_seconds": seconds}  # fmt: skip


def wilson(right: int, answers: int) -> tuple[float, float]:
    """The interval of a proportion that holds 95 %, right out of so many answers (Wilson 1927)."""
    share, weight = right / answers, Z**2 / answers
    middle = (share + weight / 2) / (1 + weight)
    half = Z / (1 + weight) * (share * (1 - share) / answers + weight / (4 * answers)) ** 0.5
    return middle - half, middle + half


def run(setting: Setting, memories: list[str], seeds: list[int], folder: Path, say: Any = print) -> Any:
    """Train and measure what the folder does not hold yet; a Dataset (memory, seed, distance)."""
    import numpy as np
    import xarray as xr

    folder.mkdir(parents=True, exist_ok=True)
    columns = ("accuracy", "low", "high", "answers", "state_bytes", "slots", "cpu_seconds")
    shape = (len(memories), len(seeds), len(setting.distances))
    table, commits = {name: np.full(shape, np.nan) for name in columns}, set()
    # The near first, so that an interrupted table is whole as far as it goes.
    for n, distance in enumerate(setting.distances):
        for s, seed in enumerate(seeds):
            for m, memory in enumerate(memories):
                if distance > MEMORIES[memory].farthest:
                    continue
                kept = folder / f"{slug(memory)}-{seed}-{distance}.json"
                if not kept.exists():
                    model = trained(setting, MEMORIES[memory].trained, seed, folder, say)
                    found = measure(setting, setting.measured(memory, model, distance), distance, seed)
                    atomic.write_bytes(kept, json.dumps(found | {"commit": checkout()[0]}).encode())
                    say(f"{memory}, seed {seed}, distance {distance}: {found['right']} of {found['answers']} right, "
                        f"{found['state_bytes'] / 2**20:.1f} MiB, {found['cpu_seconds']:.0f} s")  # fmt: skip
                row = json.loads(kept.read_text())
                commits.add(str(row.get("commit")))
                low, high = wilson(row["right"], row["answers"])
                row |= {"accuracy": row["right"] / row["answers"], "low": low, "high": high}
                for name in columns:
                    table[name][m, s, n] = row[name]
    dims = ("memory", "seed", "distance")
    dataset = xr.Dataset({name: (dims, values) for name, values in table.items()},
                         {"memory": memories, "seed": seeds, "distance": list(setting.distances)})  # fmt: skip
    units = {"distance": "tokens", "state_bytes": "bytes", "cpu_seconds": "s", "slots": "slots of a layer"}
    for name, unit in units.items():
        dataset[name].attrs["units"] = unit
    data = setting.phases[-1][0].open()
    return dataset.assign_attrs(setting=asdict(setting), chance=1 / len(data.values), corpus=data.provenance(),
                                measured_at=sorted(commits))  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """`python -m hmlab.experiments.far_recall`; Ctrl-C ends it, and the same command goes on."""
    options = parser(__doc__, list(MEMORIES), "far_recall")
    options.add_argument("--distances", nargs="+", type=int, default=list(DISTANCES),
                         help="tokens from key to question")  # fmt: skip
    given = options.parse_args(arguments)
    setting = Setting(distances=tuple(sorted(given.distances)))
    return conduct(lambda say: run(setting, given.memories, given.seeds, given.folder, say), given.output)


if __name__ == "__main__":
    raise SystemExit(main())
