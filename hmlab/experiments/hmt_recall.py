"""Does HMT's recall find the right segment, and how many memories must be held for it?

    python -m hmlab.experiments.hmt_recall retrieval --seeds 0 1 2 --output hmt_recall.csv
    python -m hmlab.experiments.hmt_recall cache --seeds 0 1 2 --output hmt_cache.csv

The models are those of `hmlab.experiments.hmt_tasks`, which have learned from streams of 8 segments at most.

`retrieval`: streams of some hundred segments, each fact planted in three of them. When it is asked for, all earlier
segments but the last, which holds the question, are ranked; the relevant ones are those that say the fact. Precision at
k is the share of the first k that are relevant, recall at k the share of the relevant that are among them. What ranks:

    recall              W_q S · W_k M, one vector a segment
    kNN, memories       cos(S, M), the same vectors without W
    kNN, hidden states  cosine of the question's last token and a segment's nearest, as the last layer has them: every
                        token of the text is held, as Memorizing Transformers and Unlimiformer do
    kNN, embeddings     the same of the tokens' embeddings. The question's key is the planted key, so this is a search
                        for an equal word, and cannot fail here
    random              chance

`weight` is the share of recall's softmax that falls on relevant segments.

`cache`: accuracy against N with the same weights, in streams of 100,000 and 500,000 tokens with 32 facts each, asked
for after any distance up to the whole stream. What is older than N segments is forgotten. "shuffled": with the most
memories, exchanged for one another after the search. Intervals are Wilson's for one proportion, at 95 %.

Finished measurements are kept in a folder; interrupted, the command goes on with what is missing.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from hmlab import atomic
from hmlab.experiments import hmt_tasks
from hmlab.experiments.apparatus import conduct, parser, slug
from hmlab.experiments.far_recall import wilson
from hmlab.provenance import checkout
from hmlab.tasks import Batch, segments
from hmlab.wrappers.hmt import HMT, sources

MODELS = ("HMT, rewarded", "HMT")
RANKINGS = ("recall", "kNN, memories", "kNN, hidden states", "kNN, embeddings", "random")
RANKS = (1, 3, 10, 30)
SHUFFLED = "shuffled"
CHUNK = 16  # segments fed at once


@dataclass(frozen=True, kw_only=True)
class Setting:
    """models: how they were trained. ranked: streams that are ranked. tokens: of streams for accuracy against N, with
    the streams in a batch; N are `cache_sizes`."""

    models: hmt_tasks.Setting = field(default_factory=hmt_tasks.Setting)
    ranked: segments.Config = field(default_factory=lambda: hmt_tasks.Setting().streams(
        batch=8, segments=400, pairs=32, distance=(2, 380), copies=3))  # fmt: skip
    tokens: tuple[tuple[int, int], ...] = ((100_000, 8), (500_000, 4))
    asked: int = 32
    cache_sizes: tuple[int, ...] = (10, 30, 100, 300, 1000, 3000)

    def hmt(self, name: str, seed: int, folder: Path, cache_size: int, say: Any) -> HMT:
        """The trained model with a cache of another size."""
        trained = hmt_tasks.trained(self.models, name, "pairs", seed, folder, say)
        hmt = self.models.model(name, cache_size)
        hmt.load_state_dict(trained.state_dict())
        return hmt.eval()


class Ranker:
    """Ranks earlier segments for every question of a batch while an HMT reads it."""

    def __init__(self, hmt: HMT, batch: Batch, length: int, seed: int) -> None:
        self._hmt, self._batch, self._length = hmt, batch, length
        self._generator = torch.Generator().manual_seed(seed)
        self._hidden: list[Tensor] = []
        self.found: dict[str, list[Tensor]] = defaultdict(list)  # relevance of the ranked, [questions, most of RANKS]
        self.relevant: list[int] = []  # segments, of each question
        self.weight: list[float] = []
        self._waiting: list[tuple[int, int, dict[str, Tensor], Tensor]] = []

    @torch.no_grad()
    def read(self) -> None:
        state, tokens, step = None, self._batch.tokens, CHUNK * self._length
        hooks = [self._hmt.recall.register_forward_hook(self._searched),
                 self._hmt.reader.head().register_forward_pre_hook(lambda _, given: self._hidden.append(given[0]))]
        try:
            for begin in range(0, tokens.shape[1], step):
                state = self._hmt(tokens[:, begin : begin + step], state=state).state
                self._rank()
        finally:
            for hook in hooks:
                hook.remove()

    def says(self, row: int, n: int) -> Bool[Tensor, "segments"]:
        """Which of the first n - 1 segments say the fact that is asked for at the beginning of the n-th."""
        tokens, place = self._batch.tokens[row], n * self._length
        key, value = tokens[place - 1], self._batch.targets[row, place]
        at = ((tokens[:-1] == key) & (tokens[1:] == value)).nonzero()[:, 0] // self._length
        return torch.zeros(n - 1, dtype=torch.bool).index_fill(0, at[at < n - 1], True)

    def _searched(self, _: Any, given: tuple, out: tuple[Tensor, Tensor]) -> None:
        summary, cache, _, count, _ = given
        n = int(count[0])
        place = n * self._length
        if place >= self._batch.mask.shape[1]:
            return
        order = sources(count, cache.shape[1])[0].argsort()[: n - 1]
        for row in self._batch.mask[:, place].nonzero()[:, 0].tolist():
            memories = F.normalize(cache[row, order].mean(1).float(), dim=-1)
            scores = {"recall": out[1][row, order].mean(1),
                      "kNN, memories": memories @ F.normalize(summary[row, 0].float(), dim=0),
                      "random": torch.rand(n - 1, generator=self._generator)}  # fmt: skip
            self._waiting.append((row, n, scores, out[1][row, order].exp().sum(1)))

    def _rank(self) -> None:
        hidden = torch.cat(self._hidden, 1)
        self._hidden = [hidden]
        tokens = self._hmt.reader.embed(self._batch.tokens[:, : hidden.shape[1]])
        for row, n, scores, weight in self._waiting:
            relevant, place = self.says(row, n), n * self._length - 1
            for name, vectors in (("kNN, hidden states", hidden), ("kNN, embeddings", tokens)):
                held = vectors[row, : (n - 1) * self._length].unflatten(0, (n - 1, self._length))
                scores[name] = _nearest(held, vectors[row, place])
            for name in RANKINGS:
                best = scores[name].topk(min(RANKS[-1], n - 1)).indices
                self.found[name].append(F.pad(relevant[best], (0, RANKS[-1] - len(best))))
            self.relevant.append(int(relevant.sum()))
            self.weight.append(float(weight[relevant].sum()))
        self._waiting.clear()


def _nearest(held: Float[Tensor, "segments length width"], asked: Float[Tensor, "width"]) -> Float[Tensor, "segments"]:
    """Cosine of the vector that is asked for with the nearest of each segment."""
    return (F.normalize(held.float(), dim=-1) @ F.normalize(asked.float(), dim=0)).amax(1)


def rank(setting: Setting, hmt: HMT, seed: int) -> dict[str, Any]:
    """Precision and recall at each of `RANKS`, means over the questions."""
    [batch] = setting.ranked.open().evaluation_batches("valid", 1, seed)
    ranker = Ranker(hmt, batch, setting.ranked.length, seed)
    ranker.read()
    relevant = torch.tensor(ranker.relevant)
    rows: dict[str, Any] = {"questions": len(relevant), "weight": sum(ranker.weight) / len(ranker.weight)}
    for name in RANKINGS:
        hits = torch.stack(ranker.found[name]).cumsum(1)[:, [k - 1 for k in RANKS]]
        rows[name] = {"precision": (hits / torch.tensor(RANKS)).mean(0).tolist(),
                      "recall": (hits / relevant[:, None]).mean(0).tolist()}  # fmt: skip
    return rows


def recite(setting: Setting, hmt: HMT, tokens: int, batch: int, seed: int, shuffle: bool) -> dict[str, Any]:
    """Answers in streams of so many tokens, right and all by octave of distance."""
    length = setting.models.length
    count = tokens // length
    config = setting.models.streams(batch=batch, segments=count, pairs=setting.asked, distance=(1, count - 1))
    batches = list(config.open().evaluation_batches("valid", 1, seed))
    begun = time.process_time()
    with hmt_tasks.shuffled(hmt, seed) if shuffle else nullcontext():
        distance, correct, held = hmt_tasks.answers(hmt, batches, length, CHUNK)
    octave = torch.frexp(distance.double()).exponent.long() - 1
    rows = {str(2**n): [int(correct[octave == n].sum()), int((octave == n).sum())] for n in octave.unique().tolist()}
    return {"octaves": rows, "state_bytes": held, "cpu_seconds": time.process_time() - begun}


def retrieval(setting: Setting, names: list[str], seeds: list[int], folder: Path, say: Any = print) -> Any:
    """A Dataset (model, seed, ranking, k) of what the folder holds and what is measured now."""
    import numpy as np
    import xarray as xr

    shape = (len(names), len(seeds), len(RANKINGS), len(RANKS))
    table, commits = {name: np.full(shape, np.nan) for name in ("precision", "recall", "questions", "weight")}, set()
    for s, seed in enumerate(seeds):
        for m, name in enumerate(names):
            def found(name: str = name, seed: int = seed) -> dict[str, Any]:
                hmt = setting.hmt(name, seed, folder, setting.ranked.segments, say)
                return rank(setting, hmt, seed)

            row = _kept(folder / f"ranked-{slug(name)}-{seed}.json", found)
            commits.add(str(row["commit"]))
            say(f"{name}, seed {seed}: recall at 1 " +
                ", ".join(f"{r} {row[r]['recall'][0]:.3f}" for r in RANKINGS))
            for r, ranking in enumerate(RANKINGS):
                table["precision"][m, s, r] = row[ranking]["precision"]
                table["recall"][m, s, r] = row[ranking]["recall"]
                table["questions"][m, s, r] = row["questions"]
            table["weight"][m, s, 0] = row["weight"]
    dims = ("model", "seed", "ranking", "k")
    dataset = xr.Dataset({name: (dims, values) for name, values in table.items()},
                         {"model": names, "seed": seeds, "ranking": list(RANKINGS), "k": list(RANKS)})  # fmt: skip
    return dataset.assign_attrs(_about(setting, commits))


def cache(setting: Setting, names: list[str], seeds: list[int], folder: Path, say: Any = print) -> Any:
    """A Dataset (model, seed, tokens, cache, distance) of what the folder holds and what is measured now."""
    import numpy as np
    import xarray as xr

    sizes = [*map(str, setting.cache_sizes), f"{setting.cache_sizes[-1]}, {SHUFFLED}"]
    octaves = [2**n for n in range((max(t for t, _ in setting.tokens) // setting.models.length).bit_length())]
    columns = ("accuracy", "low", "high", "answers", "state_bytes", "cpu_seconds")
    shape = (len(names), len(seeds), len(setting.tokens), len(sizes), len(octaves))
    table, commits = {name: np.full(shape, np.nan) for name in columns}, set()
    # The short first, so that an interrupted table is whole as far as it goes.
    for t, (tokens, batch) in enumerate(setting.tokens):
        for s, seed in enumerate(seeds):
            for m, name in enumerate(names):
                for c, size in enumerate(sizes):
                    def found(name: str = name, seed: int = seed, size: str = size, tokens: int = tokens,
                              batch: int = batch) -> dict[str, Any]:
                        hmt = setting.hmt(name, seed, folder, int(size.split(",")[0]), say)
                        return recite(setting, hmt, tokens, batch, seed, SHUFFLED in size)

                    row = _kept(folder / f"cache-{slug(name)}-{seed}-{tokens}-{slug(size)}.json", found)
                    commits.add(str(row["commit"]))
                    right, every = (sum(counts) for counts in zip(*row["octaves"].values(), strict=True))
                    say(f"{name}, seed {seed}, {tokens} tokens, N {size}: {right} of {every} right, "
                        f"{row['cpu_seconds']:.0f} s")  # fmt: skip
                    for octave, (right, every) in row["octaves"].items():
                        low, high = wilson(right, every)
                        values = (right / every, low, high, every, row["state_bytes"], row["cpu_seconds"])
                        for column, value in zip(columns, values, strict=True):
                            table[column][m, s, t, c, octaves.index(int(octave))] = value
    dims = ("model", "seed", "tokens", "cache", "distance")
    dataset = xr.Dataset({name: (dims, values) for name, values in table.items()},
                         {"model": names, "seed": seeds, "tokens": [t for t, _ in setting.tokens], "cache": sizes,
                          "distance": octaves})  # fmt: skip
    for name, unit in {"distance": "segments, from", "state_bytes": "bytes", "cpu_seconds": "s"}.items():
        dataset[name].attrs["units"] = unit
    return dataset.assign_attrs(_about(setting, commits), chance=setting.ranked.chance)


def _kept(path: Path, found: Any) -> dict[str, Any]:
    """A measurement from its file, or made now."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic.write_bytes(path, json.dumps(found() | {"commit": checkout()[0]}).encode())
    return json.loads(path.read_text())


def _about(setting: Setting, commits: set[str]) -> dict[str, Any]:
    return {"setting": asdict(setting), "corpus": setting.ranked.open().provenance(), "measured_at": sorted(commits),
            "experiment": "hmlab.experiments.hmt_recall"}  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """`python -m hmlab.experiments.hmt_recall`; Ctrl-C ends it, and the same command goes on."""
    options = parser(__doc__, list(MODELS), "hmt_tasks", [MODELS[0]])
    options.add_argument("question", choices=("retrieval", "cache"))
    options.add_argument("--tokens", nargs="+", type=int, help="of the streams of `cache`; all if none are named")
    given = options.parse_args(arguments)
    setting = Setting()
    if given.tokens:
        setting = Setting(tokens=tuple(pair for pair in setting.tokens if pair[0] in given.tokens))
    measured = retrieval if given.question == "retrieval" else cache
    return conduct(lambda say: measured(setting, given.memories, given.seeds, given.folder, say), given.output)


if __name__ == "__main__":
    raise SystemExit(main())
