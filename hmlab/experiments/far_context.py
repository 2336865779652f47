"""How much of what attention gains from the far context does a hierarchy keep?

    python -m hmlab.experiments.far_context --seeds 0 1 2 --output harmony_far_context.csv

One small language model is trained with several memories that have the same projections and read the same tokens:
HARMONY whose window holds the whole context (causal attention: "full"), HARMONY without slots ("window"), and HARMONY
in between. What share of the gap is closed: (window - hierarchy) / (window - full), in nats per token, at positions
that lie beyond every window. "full again" is "full" on other windows of the text: what differs there is noise. "full,
1/16 read" is what is left of "full" when each query reads only its best 60 tokens beyond the window, "full, no slots"
when it reads none.

A model this small finds the far context useful only once it copies (induction heads, Olsson et al. 2022, arXiv
2209.11895), and on text alone it does not learn that in a few minutes. So training begins with short contexts in which
passages of the text are repeated, with full attention; all memories go on from the same weights into the last phase,
which is on whole windows of the text.

Finished trainings are kept in a folder; interrupted, the command goes on with what is missing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from torch import Tensor

from hmlab import atomic, train
from hmlab import model as models
from hmlab.experiments.apparatus import conduct, fitting, parser, slug
from hmlab.memories import harmony
from hmlab.provenance import checkout
from hmlab.tasks import Batch, language

FIXED = {"densities": (), "retrieval": "all"}
MEMORIES: dict[str, dict[str, Any]] = {
    "full": {"window": 1024, "retrieval": "none"},
    "full again": {"window": 1024, "retrieval": "none"},
    "window": {"retrieval": "none"},
    "ratio 4": {"ratios": (4,), **FIXED},
    "landmarks 4": {"ratios": (4,), "codec": "landmarks", "sinks": 0, **FIXED},
    "landmarks 16": {"ratios": (16,), "codec": "landmarks", "sinks": 0, **FIXED},
    "budget 16": {"ratios": (1, 2, 4, 8, 16, 32, 64), "budget": 16.0, "retrieval": "all"},
}  # fmt: skip
# What is not trained: the weights of "full", read otherwise.
REPLAYED: dict[str, dict[str, Any]] = {
    "full, 1/16 read": {"ratios": (1,), "densities": (), "retrieval": "exact", "picks": 60},
    "full, no slots": {},
}
BOUNDS = (0, 64, 128, 256, 512, 1024)
FAR = 256  # positions from here on lie beyond all windows and have seen some text
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Steps at one length of context. repeated: share of rows that repeat a passage of 8 to `passage` tokens."""

    context: int
    batch: int
    steps: int
    repeated: float = 0.0
    passage: int = 8
    cosine: bool = False


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all trainings of the experiment share."""

    corpus: str = "python-sources"
    vocab: int = 1024
    dim: int = 64
    layers: int = 2
    heads: int = 2
    window: int = 64
    segment: int = 64
    rotary_base: float = 1000.0
    learning_rate: float = 5e-3
    phases: tuple[Phase, ...] = (
        Phase(context=48, batch=16, steps=1200, repeated=1.0, passage=20),
        Phase(context=128, batch=8, steps=250, repeated=0.5, passage=60),
        Phase(context=256, batch=4, steps=250, repeated=0.25, passage=100),
        Phase(context=1024, batch=2, steps=500, cosine=True),
    )
    evaluated: int = 128  # windows of the validation text; one in sixteen of them at each length

    def model(self, memory: str) -> models.LanguageModel:
        fields = {"window": self.window, "segment": self.segment, **MEMORIES[memory]}
        config = harmony.Config(dim=self.dim, heads=self.heads, rotary_base=self.rotary_base, **fields)
        return models.Config(vocab=self.vocab, dim=self.dim, layers=self.layers, memory=config, head_bias=False).build()


@dataclass(frozen=True)
class Passages:
    """Windows of a text, some of which repeat a passage; the batches of one phase."""

    tokens: dict[str, Tensor]
    phase: Phase

    def batches(self, split: str, generator: torch.Generator) -> Iterator[Batch]:
        phase, every = self.phase, self.tokens[split].unfold(0, self.phase.context + 1, 1)
        while True:
            window = every[torch.randint(len(every), (phase.batch,), generator=generator)].long()
            number = round(phase.repeated * phase.batch)
            length = torch.randint(8, phase.passage + 1, (number, 1), generator=generator)
            window[:number] = window[:number].gather(1, torch.arange(phase.context + 1) % length)
            yield Batch(tokens=window[:, :-1].contiguous(), targets=window[:, 1:].contiguous(),
                        mask=torch.ones(phase.batch, phase.context, dtype=torch.bool))  # fmt: skip

    def evaluation_batches(self, split: str, count: int, seed: int) -> Iterator[Batch]:
        return islice(self.batches(split, torch.Generator().manual_seed(seed)), count)


def trained(setting: Setting, memory: str, seed: int, tokens: dict[str, Tensor], folder: Path, say: Any
            ) -> tuple[models.LanguageModel, dict[str, float]]:
    """The model after all phases, from the folder if it is there; and what the last one took."""
    if memory in REPLAYED:
        model, facts = trained(setting, "full", seed, tokens, folder, say)
        return harmony.replay(model, **{"window": setting.window, **REPLAYED[memory]}), facts
    torch.manual_seed(seed)
    model = setting.model(memory)
    done, shared = folder / f"{slug(memory)}-{seed}.safetensors", folder / f"copying-{seed}.safetensors"
    if done.exists():
        slots = MEMORIES[memory].get("retrieval") != "none"  # without them, what makes slots is of no use
        model.load_state_dict(load_file(done) if slots else fitting(model, done), strict=slots)
        return model, json.loads(done.with_suffix(".cost.json").read_text())
    phases = list(setting.phases)
    if shared.exists():  # "full" makes it, before all others
        # What is not there is what makes slots, and has not been used yet.
        model.load_state_dict(fitting(model, shared), strict=False)
        phases = phases[-1:]
    facts: dict[str, float] = {}
    for phase in phases:
        recipe = train.Config(
            steps=phase.steps, learning_rate=setting.learning_rate, warmup=50, clip=1.0, betas=(0.9, 0.99),
            schedule="cosine" if phase.cosine else "constant", learning_rate_floor=0.05 if phase.cosine else 0.0,
            evaluate_every=10**9, evaluate_batches=1, deterministic=False,
        )  # fmt: skip
        again = 500 if memory == "full again" else 0
        begun = time.process_time()
        for metrics in train.train(model, Passages(tokens, phase), recipe, seed=1000 + seed + again):
            if metrics.step % 50 == 0:
                say(f"{memory}, seed {seed}, context {phase.context}: step {metrics.step} of {phase.steps}, "
                    f"{metrics.loss:.3f} nats, {metrics.tokens_per_second:.0f} tokens/s")  # fmt: skip
        facts = {"cpu_seconds": time.process_time() - begun, "tokens": float(metrics.tokens)}
        if phase is setting.phases[-2]:
            atomic.write_bytes(shared, save(model.state_dict()))
    atomic.write_bytes(done.with_suffix(".cost.json"), json.dumps(facts).encode())
    atomic.write_bytes(done, save(model.state_dict()))
    return model, facts


@torch.no_grad()
def losses(model: models.LanguageModel, tokens: Tensor, context: int, windows: int) -> Tensor:
    """Nats per token of evenly spaced windows of a text `[windows, context]`."""
    model.eval()
    starts = torch.linspace(0, len(tokens) - context - 1, windows).long()
    found = []
    for start in starts.tolist():
        window = tokens[start : start + context + 1].long()[None]
        logits, _ = model(window[:, :-1])
        found.append(F.cross_entropy(logits[0], window[0, 1:], reduction="none"))
    return torch.stack(found)


def measured(setting: Setting, memory: str, model: models.LanguageModel, tokens: Tensor) -> dict[str, Any]:
    """Losses by position and by length of context, and the mean ratio of what was compressed."""
    context = setting.phases[-1].context
    each = losses(model, tokens, context, setting.evaluated)
    by_position = {low: each[:, low:high].mean().item() for low, high in pairwise(BOUNDS)}
    # The same last tokens of text, however much of it was read before them.
    by_length = {}
    longest = max(LENGTHS)
    ends = torch.linspace(longest, len(tokens) - 2, max(4, setting.evaluated // 16)).long().tolist()
    for length in LENGTHS:
        if memory in ("full", "full again"):
            model = harmony.replay(model, window=max(length, context))
        if memory in REPLAYED and length > 4 * context:
            by_length[length] = float("nan")  # all tokens are ranked for each query: not worth its minutes
            continue
        found = [_last(model, tokens, end, length) for end in ends]
        by_length[length] = sum(found) / len(found)
    with torch.no_grad():
        window = tokens[: 8 * context].long().view(8, context)
        _, state = model.eval()(window)
    slots = torch.stack([layer.slots for layer in state.layers]).float().mean().item()
    whole = (context // setting.segment) * setting.segment
    return {"far": each[:, FAR:].mean().item(), "by_position": by_position, "by_length": by_length,
            "ratio": whole / slots if slots else float("inf"), "parameters": models.parameters(model)}  # fmt: skip


@torch.no_grad()
def _last(model: models.LanguageModel, tokens: Tensor, end: int, length: int) -> float:
    """Nats per token of the 256 tokens before `end`, after `length` tokens in all."""
    window = tokens[end - length : end + 1].long()[None]
    logits, _ = model.eval()(window[:, :-1])
    return F.cross_entropy(logits[0, -FAR:], window[0, -FAR:]).item()


def run(setting: Setting, memories: list[str], seeds: list[int], folder: Path, say: Any = print) -> Any:
    """Train and measure what the folder does not hold yet; a Dataset of (memory, seed) and position or length."""
    import xarray as xr

    data = language.Config(corpus=setting.corpus, encoding="bpe", vocab_size=setting.vocab, batch=1, context=64).open()
    folder.mkdir(parents=True, exist_ok=True)
    rows = {}
    for seed in seeds:
        for memory in sorted(memories, key=lambda name: name != "full"):  # the others go on from its first phases
            kept = folder / f"{slug(memory)}-{seed}.json"
            if not kept.exists():
                model, facts = trained(setting, memory, seed, data.tokens, folder, say)
                found = measured(setting, memory, model, data.tokens["valid"]) | facts | {"commit": checkout()[0]}
                atomic.write_bytes(kept, json.dumps(found).encode())
            rows[memory, seed] = json.loads(kept.read_text())
            say(f"{memory}, seed {seed}: {rows[memory, seed]['far']:.4f} nats per token from position {FAR} on")
    scalars = {name: (("memory", "seed"), [[rows[m, s][name] for s in seeds] for m in memories])
               for name in ("far", "ratio", "parameters", "cpu_seconds", "tokens")}  # fmt: skip
    dataset = xr.Dataset(scalars, {"memory": memories, "seed": seeds})
    dataset["by_length"] = (("memory", "seed", "length"),
                            [[[rows[m, s]["by_length"][str(n)] for n in LENGTHS] for s in seeds] for m in memories])
    dataset["by_position"] = (("memory", "seed", "position"),
                              [[[rows[m, s]["by_position"][str(n)] for n in BOUNDS[:-1]] for s in seeds]
                               for m in memories])  # fmt: skip
    dataset = dataset.assign_coords(length=list(LENGTHS), position=list(BOUNDS[:-1]))
    for name in ("far", "by_length", "by_position"):
        dataset[name].attrs["units"] = "nats per token"
    commits = sorted({str(row["commit"]) for row in rows.values()})
    return dataset.assign_attrs(setting=asdict(setting), corpus=data.provenance(), trained_at=commits)


def main(arguments: list[str] | None = None) -> int:
    """`python -m hmlab.experiments.far_context`; Ctrl-C ends it, and the same command goes on."""
    options = parser(__doc__, [*MEMORIES, *REPLAYED], "far_context")
    options.add_argument("--corpus", default=Setting.corpus)
    given = options.parse_args(arguments)
    setting = replace(Setting(), corpus=given.corpus)
    return conduct(lambda say: run(setting, given.memories, given.seeds, given.folder, say), given.output)


if __name__ == "__main__":
    raise SystemExit(main())
