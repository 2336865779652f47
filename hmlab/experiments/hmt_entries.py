"""Which entries of the cache does recall look at, and does it matter?

    python -m hmlab.experiments.hmt_entries --corpus gutenberg-books --seeds 0 1 2 --output data/results/hmt_entries.csv

The models are those that `hmlab.experiments.hmt_text` trained; their weights stay as they are.

Two held-out texts alternate in pieces of a few segments. `same` is the share of the recall weights, of those on earlier
pieces, that falls on the text that the query is made of; `same_uniform` that of equal weights; `same_plain` that of the
weights which the same places get in texts that do not alternate: what distance alone gives. `mass` and `mass_plain` are
the weights by distance in segments, `mass_uniform` equal ones. `first` is the weight on the memory of the very first
segment, mean over the second half of the segments, `first_uniform` that of equal weights.

One entry is taken out of the cache, the weights of the rest add up to one again, and the next segment is read.
`rank_correlation` is Spearman's, between an entry's weight and how much the loss rises without it, within a segment,
mean over segments; `rank_correlation_size` with the size of the change, whichever way it goes. `p_value` and
`p_value_size` are the chance of as large a mean, either way, if weights are shuffled within each segment.
`rise_heaviest` and `rise_mean` are the rise without the heaviest entry, whose weight is `heaviest_weight`, and without
any one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hmlab import atomic
from hmlab.experiments import hmt_text
from hmlab.experiments.apparatus import conduct, slug
from hmlab.memory import reorder
from hmlab.provenance import checkout
from hmlab.record import record
from hmlab.wrappers.hmt import HMT
from hmlab.wrappers.hmt.evaluation import losses

MODELS = ("hmt previous", "hmt prefix")
SHUFFLES = 2000


@dataclass(frozen=True, kw_only=True)
class Setting:
    """text: what was trained. piece: segments before the texts alternate. streams, segments: read of each kind of text.
    ablated: segments that lie in the cache then."""

    text: hmt_text.Setting = field(default_factory=hmt_text.Setting)
    piece: int = 4
    streams: int = 24
    segments: int = 64
    ablated: int = 24


def interleaved(first: Int[Tensor, "streams time"], second: Int[Tensor, "streams time"], piece: int
                ) -> Int[Tensor, "streams woven"]:
    """Pieces of two texts in turn, each going on where it stopped; as many as one of them has."""
    count = first.shape[1] // piece
    both = torch.stack([first[:, : count * piece].unflatten(1, (count, piece)),
                        second[:, : count * piece].unflatten(1, (count, piece))], 2)  # fmt: skip
    return both.flatten(1, 2)[:, :count].flatten(1, 2)


def recall_weights(hmt: HMT, ids: Int[Tensor, "streams read"]) -> Float[Tensor, "streams segments sources"]:
    """Of each segment's recall the weight on the memory of each earlier segment; 0 where there is none."""
    with record(hmt.recall, names=("recall_weight", "provenance")) as recording:
        losses(hmt, ids)
    seen = recording.dataset().isel(layer=0)
    weights = torch.from_numpy(seen["recall_weight"].sum("memories").values).double()
    source = torch.from_numpy(seen["provenance"].values).long()
    time = weights.shape[1]
    found = weights.new_zeros(*weights.shape[:2], time + 1)  # the last is of no segment
    return found.scatter_add(2, source.where(source >= 0, time), weights)[..., :time]


def sides(segments: int, piece: int, query: str) -> tuple[Bool[Tensor, "segments sources"], ...]:
    """Which earlier segments count (those of pieces before the query's own), and which are of the query's text."""
    number = torch.arange(segments)
    own = number if query == "prefix" else number - 1
    counts = number // piece < (own // piece)[:, None]
    same = (number // piece) % 2 == ((own // piece) % 2)[:, None]
    # Both texts are there from the third piece on.
    return counts & (own // piece >= 2)[:, None], same


def same_share(weights: Float[Tensor, "streams segments sources"], counts: Bool[Tensor, "segments sources"],
               same: Bool[Tensor, "segments sources"]) -> float:
    """Share of the weights that count which falls on the query's text, mean over segments and streams."""
    held = counts.any(1)
    total, hit = (weights * counts).sum(2)[:, held], (weights * (counts & same)).sum(2)[:, held]
    return (hit / total).mean().item()


def by_distance(weights: Float[Tensor, "streams segments sources"]) -> list[float]:
    """Mean weight at each distance from 1 on, over the second half of the segments; distances up to half of them."""
    half = weights.shape[1] // 2
    return [weights.diagonal(-distance, 1, 2)[:, -half:].mean().item() for distance in range(1, half + 1)]


def _first(weights: Float[Tensor, "streams segments sources"]) -> float:
    return weights[:, weights.shape[1] // 2 :, 0].mean().item()


@torch.no_grad()
def ablation(hmt: HMT, ids: Int[Tensor, "streams read"], at: int
             ) -> tuple[Float[Tensor, "streams sources"], Float[Tensor, "streams sources"]]:
    """Weights of the recall of segment `at`, and by how much the loss of that segment rises without each entry."""
    length = hmt.config.segment_length
    ids = ids[:, : (at + 1) * length + 1]
    weights, state = recall_weights(hmt, ids)[:, at, :at], hmt.prefill(ids[:, : at * length])
    entries = torch.arange(at)
    left = torch.stack([entries[entries != entry] for entry in entries])  # of each case the entries that stay
    rises = []
    for row in range(len(ids)):
        text = ids[row : row + 1, at * length :]
        without = reorder(state, torch.full((at,), row))
        without = without._replace(cache=without.cache[entries[:, None], left],
                                   keys=without.keys[entries[:, None], left], count=without.count - 1)  # fmt: skip
        rises.append(_nats(hmt, text.expand(at, -1), without) - _nats(hmt, text, reorder(state, torch.tensor([row]))))
    return weights, torch.stack(rises)


def _nats(hmt: HMT, text: Tensor, state: Any) -> Float[Tensor, "rows"]:
    logits = hmt(text[:, :-1], state=state).logits.double()
    return F.cross_entropy(logits.transpose(1, 2), text[:, 1:], reduction="none").mean(1)


def rank_correlation(first: Float[Tensor, "*rows n"], second: Float[Tensor, "*rows n"]) -> Float[Tensor, "*rows"]:
    """Spearman's, along the last axis, of numbers without ties."""
    ranks = [x.argsort(-1).argsort(-1).double() for x in (first, second)]
    first, second = (x - x.mean(-1, keepdim=True) for x in ranks)
    return (first * second).sum(-1) / (first.norm(dim=-1) * second.norm(dim=-1))


def shuffled(first: Float[Tensor, "rows n"], second: Float[Tensor, "rows n"], seed: int) -> tuple[float, float]:
    """Mean rank correlation, and the share of shuffles within the rows whose mean is as far from 0."""
    found, generator = rank_correlation(first, second).mean().item(), torch.Generator().manual_seed(seed)
    by_chance = torch.stack([rank_correlation(torch.rand(first.shape, generator=generator), second).mean()
                             for _ in range(SHUFFLES)])  # fmt: skip
    return found, (1 + int((by_chance.abs() >= abs(found)).sum())) / (1 + SHUFFLES)


def recalled(setting: Setting, hmt: HMT, tokens: dict[str, Tensor], text: Int[Tensor, "streams read"], seed: int
             ) -> dict[str, Any]:
    """What is measured of the recall."""
    length = setting.text.segment
    read, piece = setting.segments * length + 1, setting.piece * length
    one, other = (hmt_text.streams(tokens[split], setting.streams, read + piece) for split in ("valid", "test"))
    half = setting.streams // 2
    woven = recall_weights(hmt, torch.cat((interleaved(one, other, piece)[:half],
                                           interleaved(other, one, piece)[half:]))[:, :read])  # fmt: skip
    plain = recall_weights(hmt, torch.cat((one[:half], other[half:]))[:, :read])
    counts, same = sides(setting.segments, setting.piece, hmt.query)
    number = torch.arange(setting.segments)
    equal = (number < number[:, None]).double()
    equal = (equal / equal.sum(1, keepdim=True).clamp(min=1))[None]
    weights, rises = ablation(hmt, text, setting.ablated)
    correlation, chance = shuffled(weights, rises, seed)
    size, size_chance = shuffled(weights, rises.abs(), seed)
    heaviest = rises.gather(1, weights.argmax(1, keepdim=True))
    return {
        "same": same_share(woven, counts, same), "same_uniform": same_share(equal, counts, same),
        "same_plain": same_share(plain.mean(0, keepdim=True), counts, same),
        "mass": by_distance(woven), "mass_plain": by_distance(plain), "mass_uniform": by_distance(equal),
        "first": _first(woven), "first_uniform": _first(equal), "rank_correlation": correlation, "p_value": chance,
        "rank_correlation_size": size, "p_value_size": size_chance,
        "rise_heaviest": heaviest.mean().item(), "rise_mean": rises.mean().item(),
        "heaviest_weight": weights.amax(1).mean().item(),
    }  # fmt: skip


def run(setting: Setting, models: Sequence[str], seeds: Sequence[int], folder: Path, say: Any = print) -> Any:
    """Measure what the folder does not hold yet; a Dataset of (model, seed, distance).

    folder: where `hmlab.experiments.hmt_text` keeps its trainings; a model that is not there is trained.
    """
    import xarray as xr

    data = hmt_text.opened(setting.text)
    folder.mkdir(parents=True, exist_ok=True)
    text = hmt_text.held_out(data.tokens, setting.streams, setting.segments * setting.text.segment)
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for seed in seeds:
        for name in models:
            kept = folder / f"entries-{slug(name)}-{seed}.json"
            if not kept.exists():
                hmt = hmt_text.trained(setting.text, name, seed, data.tokens, folder, say)
                found = recalled(setting, hmt, data.tokens, text, seed) | {"commit": checkout()[0]}
                atomic.write_bytes(kept, json.dumps(found).encode())
            rows[name, seed] = row = json.loads(kept.read_text())
            say(f"{name}, seed {seed}: {row['same']:.3f} of the weights on the same text, {row['same_plain']:.3f} by "
                f"distance alone; weight against effect {row['rank_correlation']:+.3f} "
                f"(p {row['p_value']:.3f})")  # fmt: skip
    dims = ("model", "seed")
    values = {name: [[rows[model, seed][name] for seed in seeds] for model in models]
              for name in next(iter(rows.values())) if name != "commit"}  # fmt: skip
    dataset = xr.Dataset(
        {name: ((*dims, "distance") if name.startswith("mass") else dims, each) for name, each in values.items()},
        {"model": list(models), "seed": list(seeds), "distance": range(1, setting.segments // 2 + 1)},
    )  # fmt: skip
    dataset["distance"].attrs["units"] = "segments"
    for name in ("rise_heaviest", "rise_mean"):
        dataset[name].attrs["units"] = "nats per token"
    commits = sorted({str(row["commit"]) for row in rows.values()})
    return dataset.assign_attrs(setting=asdict(setting), corpus=data.provenance(), measured_at=commits)


def main(arguments: list[str] | None = None) -> int:
    """`python -m hmlab.experiments.hmt_entries`; Ctrl-C ends it, and the same command goes on."""
    given = hmt_text.command_line(__doc__, MODELS).parse_args(arguments)
    setting = Setting(text=hmt_text.chosen(given))
    return conduct(lambda say: run(setting, given.memories, given.seeds, given.folder, say), given.output)


if __name__ == "__main__":
    raise SystemExit(main())
