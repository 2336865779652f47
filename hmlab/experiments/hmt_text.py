"""What does a Hierarchical Memory Transformer gain on books, and how much of that does the published query leak?

    python -m hmlab.experiments.hmt_text --corpus gutenberg-books --seeds 0 1 2 --output data/results/hmt_text.csv

One small Llama is trained from scratch on single segments of a text. Each variant goes on from its weights over windows
of several segments, the same windows in the same order: the backbone alone ("segment"), with the last k tokens of the
segment before ("sensory"), the Recurrent Memory Transformer ("rmt"), both ("rmt + sensory", which is HMT without
recall), HMT with the honest query ("hmt previous") and HMT as published ("hmt prefix"). The last two learn the first
stage without recall. "segment again" is "segment" on other windows of the text: what differs there is noise.

Measured are nats per token of books that nobody was trained on, read from many places for 65 segments, by the number of
segments that were read before (history) and by the place inside a segment. "hmt prefix, read previous" are the weights
of "hmt prefix", read with the other query; "…, read none" with the memory of the last segment instead of recall. Of the
places "first" the published query has seen what they are to predict, of "rest" it has not (`hmlab.wrappers.hmt`).

Finished trainings are kept in a folder; interrupted, the command goes on with what is missing.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hmlab import atomic
from hmlab import model as models
from hmlab.experiments.apparatus import conduct, parser, slug
from hmlab.provenance import checkout, provenance
from hmlab.tasks import language
from hmlab.wrappers.hmt import HMT
from hmlab.wrappers.hmt.evaluation import losses
from hmlab.wrappers.hmt.training import Stage, train

VARIANTS: dict[str, dict[str, Any]] = {
    "segment": {"memories": 0, "sensory": 0, "query": "none"},
    "segment again": {"memories": 0, "sensory": 0, "query": "none"},
    "sensory": {"memories": 0, "query": "none"},
    "rmt": {"sensory": 0, "query": "none"},
    "rmt + sensory": {"query": "none"},
    "hmt previous": {"query": "previous"},
    "hmt prefix": {"query": "prefix"},
}


class Reading(NamedTuple):
    """trained: whose weights are read. query: what searches their memory."""

    trained: str
    query: str


READINGS: dict[str, Reading] = {name: Reading(name, fields["query"]) for name, fields in VARIANTS.items()} | {
    f"{name}, read {query}": Reading(name, query)
    for name, queries in {"hmt previous": ("prefix", "none"), "hmt prefix": ("previous", "none")}.items()
    for query in queries
}
HISTORY = (0, 1, 2, 4, 8, 16, 32, 64)  # segments read before: each from behind the last bound up to this one
PLACES = (0, 1, 2, 4, 8, 16, 32, 64)  # of a segment's tokens, as far as it has so many


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all trainings of the experiment share. alone: steps and rows on single segments; stages: steps without and
    with recall; segments: that a window has then. streams: read of each held-out split."""

    corpus: str = "python-sources"
    vocab: int = 1024
    width: int = 96
    layers: int = 3
    heads: int = 3
    segment: int = 64
    sensory: int = 16
    cache: int = 128
    segments: int = 6
    batch: int = 4
    alone: tuple[int, int] = (700, 32)
    stages: tuple[int, int] = (120, 220)
    learning_rate: float = 3e-3
    streams: int = 24

    def build(self, variant: str) -> HMT:
        """A variant with weights that nobody has trained."""
        from transformers import LlamaConfig, LlamaForCausalLM

        fields = {"memories": 1, "sensory": self.sensory, **VARIANTS[variant]}
        config = HMT.Config(segment_length=self.segment, cache_size=self.cache, bptt_segments=self.segments, **fields)
        backbone = LlamaForCausalLM(LlamaConfig(
            vocab_size=self.vocab, hidden_size=self.width, num_hidden_layers=self.layers,
            num_attention_heads=self.heads, num_key_value_heads=self.heads, intermediate_size=8 * self.width // 3,
            max_position_embeddings=4 * self.segment, tie_word_embeddings=True, bos_token_id=None, eos_token_id=None,
        ))  # fmt: skip
        return HMT(backbone, config)

    def schedule(self) -> list[Stage]:
        """The stages behind the single segments."""
        fields: dict[str, Any] = {"segments": self.segments, "batch": self.batch, "warmup": min(20, *self.stages),
                                  "learning_rate": self.learning_rate}  # fmt: skip
        return [Stage(steps=self.stages[0], query="none", **fields),
                Stage(steps=self.stages[1], schedule="cosine", **fields)]  # fmt: skip


def trained(setting: Setting, variant: str, seed: int, tokens: dict[str, Tensor], folder: Path, say: Any) -> HMT:
    """The variant after all stages; what the folder holds of that is not done again."""

    def fresh(name: str) -> HMT:
        torch.manual_seed(seed)
        return setting.build(name)

    hmt, alone = fresh(variant), fresh("segment")
    steps, rows = setting.alone
    single = Stage(segments=1, steps=steps, batch=rows, warmup=min(50, steps), learning_rate=setting.learning_rate)
    _teach(alone, tokens, [single], seed, folder / f"alone-{seed}", f"single segments, seed {seed}", say)
    hmt.backbone.load_state_dict(alone.backbone.state_dict())
    again = 500 if variant == "segment again" else 0
    _teach(hmt, tokens, setting.schedule(), 10_000 + seed + again, folder / f"{slug(variant)}-{seed}",
           f"{variant}, seed {seed}", say)  # fmt: skip
    return hmt.eval()


@cache
def begun_at() -> str | None:
    """The commit of the code that this process runs; the checkout may move on while it trains."""
    return checkout()[0]


def _teach(hmt: HMT, tokens: dict[str, Tensor], stages: list[Stage], seed: int, folder: Path, what: str, say: Any
           ) -> None:
    begun = time.process_time()
    for metrics in train(hmt, tokens, stages, seed=seed, folder=folder):
        if metrics.step % 50 == 0:
            say(f"{what}: step {metrics.step}, {metrics.loss:.3f} nats, {metrics.tokens_per_second:.0f} tokens/s")
    kept = folder / "cost.json"
    if not kept.exists():
        cost = {"cpu_seconds": time.process_time() - begun, "commit": begun_at()}
        atomic.write_bytes(kept, json.dumps(cost).encode())


def streams(tokens: Int[Tensor, "time"], count: int, length: int) -> Int[Tensor, "count read"]:
    """Evenly spaced windows of `length` tokens and their targets."""
    starts = torch.linspace(0, len(tokens) - length - 1, count).long()
    return torch.stack([tokens[start : start + length + 1] for start in starts.tolist()]).long()


def held_out(tokens: dict[str, Tensor], count: int, length: int) -> Int[Tensor, "streams read"]:
    """Of the validation and of the test text equally many streams."""
    return torch.cat([streams(tokens[split], count, length) for split in ("valid", "test")])


def places(hmt: HMT) -> dict[str, slice]:
    """Names of places of a segment, and where they are."""
    length, seen = hmt.config.segment_length, hmt.config.excerpt - 1
    bounds = [bound for bound in PLACES if bound < length] + [length]
    return {"all": slice(0, length), "first": slice(0, seen), "rest": slice(seen, length)} | {
        f"{low} to {high - 1}": slice(low, high) for low, high in pairwise(bounds)}  # fmt: skip


def by_history(each: Float[Tensor, "streams predicted"], hmt: HMT) -> dict[str, list[float]]:
    """Of each name of places, mean nats per token in each bin of HISTORY, and over all segments but the first."""
    each = each.double().unflatten(1, (-1, hmt.config.segment_length))
    bins = [slice(low + 1, high + 1) for low, high in pairwise((-1, *HISTORY))] + [slice(1, None)]
    return {name: [each[:, part, where].mean().item() for part in bins] for name, where in places(hmt).items()}


def measured(setting: Setting, hmt: HMT, query: str, text: Int[Tensor, "streams read"]) -> dict[str, Any]:
    """Losses of the held-out text under a query, and sizes."""
    backbone = models.parameters(hmt.backbone)
    return {"nats": by_history(losses(hmt, text, query=query), hmt), "parameters": models.parameters(hmt),
            "added": models.parameters(hmt) - backbone}  # fmt: skip


def run(setting: Setting, readings: Sequence[str], seeds: Sequence[int], folder: Path, say: Any = print) -> Any:
    """Train and measure what the folder does not hold yet; a Dataset of (reading, seed, places, history)."""
    import xarray as xr

    data = opened(setting)
    folder.mkdir(parents=True, exist_ok=True)
    begun_at()
    text = held_out(data.tokens, setting.streams, (HISTORY[-1] + 1) * setting.segment)
    rows, commits = {}, set()
    for seed in seeds:
        for name in readings:
            variant, query = READINGS[name]
            kept = folder / f"{slug(name)}-{seed}.json"
            if not kept.exists():
                hmt = trained(setting, variant, seed, data.tokens, folder, say)
                atomic.write_bytes(kept, json.dumps(measured(setting, hmt, query, text)).encode())
            rows[name, seed] = row = json.loads(kept.read_text())
            parts = (folder / f"{part}-{seed}" / "cost.json" for part in ("alone", slug(variant)))
            costs = [json.loads(part.read_text()) for part in parts]
            commits |= {str(cost["commit"]) for cost in costs}
            row["cpu_seconds"] = costs[1]["cpu_seconds"]
            say(f"{name}, seed {seed}: {row['nats']['all'][-1]:.4f} nats per token behind the first segment")
    named = list(rows[readings[0], seeds[0]]["nats"])
    nats = [[[rows[r, s]["nats"][p] for p in named] for s in seeds] for r in readings]
    scalars = {name: (("reading", "seed"), [[rows[r, s][name] for s in seeds] for r in readings])
               for name in ("parameters", "added", "cpu_seconds")}  # fmt: skip
    dims = ("reading", "seed", "places")
    dataset = xr.Dataset(
        {"nats": ((*dims, "history"), [[[row[:-1] for row in by] for by in some] for some in nats]),
         "mean": (dims, [[[row[-1] for row in by] for by in some] for some in nats]), **scalars},
        {"reading": list(readings), "seed": list(seeds), "places": named, "history": list(HISTORY)},
    )  # fmt: skip
    for name in ("nats", "mean"):
        dataset[name].attrs["units"] = "nats per token"
    dataset["history"].attrs["units"] = "segments"
    dataset["cpu_seconds"].attrs["units"] = "s"
    read = {"single segments": setting.alone[0] * setting.alone[1] * setting.segment,
            "windows": sum(setting.stages) * setting.batch * setting.segments * setting.segment}  # fmt: skip
    return dataset.assign_attrs(setting=asdict(setting), corpus=data.provenance(), trained_tokens=read,
                                measured_tokens=text.numel() - len(text), trained_at=sorted(commits))  # fmt: skip


def differences(dataset: Any, against: str = "segment") -> Any:
    """`gain` (reading, seed, places): nats per token below those of a reading, seed by seed, behind the first segment.

    noise (places): the largest gain or loss of "segment again" over "segment" of any seed. clear (reading, places):
    whether every seed gains, or every seed loses, more than that.
    """
    import xarray as xr

    mean = dataset["mean"]
    gain = mean.sel(reading=against, drop=True) - mean
    noise = abs(mean.sel(reading="segment again") - mean.sel(reading="segment")).max("seed").drop_vars(
        "reading", errors="ignore")  # fmt: skip
    clear = (gain > noise).all("seed") | (gain < -noise).all("seed")
    return xr.Dataset({"gain": gain, "noise": noise, "clear": clear})


def told(dataset: Any, say: Any) -> Any:
    """Say what was gained over the backbone alone and over sensory tokens; returns the dataset."""
    held = set(dataset["reading"].values.tolist())
    for against in ("segment", "sensory"):
        if not {against, "segment", "segment again"} <= held:
            continue
        found = differences(dataset, against)
        for name in dataset["reading"].values.tolist():
            parts = []
            for where in ("all", "first", "rest"):
                gain, noise = found["gain"].sel(reading=name, places=where), float(found["noise"].sel(places=where))
                clear = bool(found["clear"].sel(reading=name, places=where))
                parts.append(f"{where} {float(gain.mean()):+.4f}" + ("" if clear else f" (noise: {noise:.4f})"))
            say(f"gain over {against!r} in nats per token, {name}: {', '.join(parts)}")
    return dataset


def export(setting: Setting, seed: int, folder: Path, target: Path, say: Any = print) -> None:
    """Write both HMTs of a seed with `save_pretrained`, and beside them the encoding and where they come from.

    `HMT.from_pretrained(target / "previous")` reads one back, `hmlab.encodings.from_json` what is in `encoding.json`.
    """
    data = opened(setting)
    target.mkdir(parents=True, exist_ok=True)
    for query in ("previous", "prefix"):
        variant = f"hmt {query}"
        trained(setting, variant, seed, data.tokens, folder, say).save_pretrained(target / query, include_backbone=True)
    cost = json.loads((folder / f"hmt-previous-{seed}" / "cost.json").read_text())
    origin = provenance(torch.device("cpu")) | {"setting": asdict(setting), "seed": seed, "trained_at": cost["commit"],
                                                "corpus": data.provenance()}  # fmt: skip
    atomic.write_bytes(target / "encoding.json", data.encoding.to_json().encode())
    atomic.write_bytes(target / "provenance.json", (json.dumps(origin, indent=1) + "\n").encode())


def opened(setting: Setting) -> language.LanguageData:
    """The text, in byte pairs of its training part."""
    return language.Config(corpus=setting.corpus, encoding="bpe", vocab_size=setting.vocab, batch=1, context=64).open()


def command_line(question: str, names: Sequence[str]) -> argparse.ArgumentParser:
    """Options of the experiments on these trainings; `chosen` makes a setting of what is given."""
    options = parser(question, list(names), "hmt_text")
    options.add_argument("--corpus", default=Setting.corpus)
    options.add_argument("--steps", nargs=2, type=int, default=Setting.stages, metavar=("WITHOUT", "WITH"),
                         help="on windows of several segments, without and with recall")  # fmt: skip
    return options


def chosen(given: argparse.Namespace) -> Setting:
    return replace(Setting(), corpus=given.corpus, stages=tuple(given.steps))


def main(arguments: list[str] | None = None) -> int:
    """`python -m hmlab.experiments.hmt_text`; Ctrl-C ends it, and the same command goes on."""
    options = command_line(__doc__, list(READINGS))
    options.add_argument("--checkpoints", type=Path, help="both HMTs of the first seed are written there")
    given = options.parse_args(arguments)
    setting = chosen(given)

    def all_of_it(say: Any) -> Any:
        dataset = told(run(setting, given.memories, given.seeds, given.folder, say), say)
        if given.checkpoints is not None:
            export(setting, given.seeds[0], given.folder, given.checkpoints, say)
        return dataset

    return conduct(all_of_it, given.output)


if __name__ == "__main__":
    raise SystemExit(main())
