"""What does a memory embedding still know of its segment?

    python -m hmlab.experiments.hmt_probe --corpus gutenberg-books --seeds 0 1 2 --output data/results/hmt_probe.csv

The models are those that `hmlab.experiments.hmt_text` trained; their weights stay as they are. One linear map (ridge)
goes from M_n to which tokens a third of segment n holds; it is fitted on the training text. `auc` is the chance that of
two held-out segments, one with a token and one without, it ranks the former higher, mean over tokens (0.5: nothing);
`auc_other` the same for M of another segment of the same stream: what text and style give away.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hmlab import atomic
from hmlab.experiments import hmt_text
from hmlab.experiments.apparatus import conduct, slug
from hmlab.provenance import checkout
from hmlab.wrappers.hmt import HMT

MODELS = tuple(name for name, fields in hmt_text.VARIANTS.items() if fields.get("memories", 1))
THIRDS = ("early", "middle", "late")
RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # of the inputs' variance


@dataclass(frozen=True, kw_only=True)
class Setting:
    """text: what was trained. segments: of a stream. fitted: streams of the training text that the map is fitted on.
    streams: of each held-out text. seen: a token counts if as many held-out segments hold it, and as many do not."""

    text: hmt_text.Setting = field(default_factory=hmt_text.Setting)
    segments: int = 64
    fitted: int = 48
    streams: int = 24
    seen: int = 20


@torch.no_grad()
def embeddings(hmt: HMT, ids: Int[Tensor, "streams read"]) -> Float[Tensor, "streams segments numbers"]:
    """M of each whole segment, which the cache must have room for."""
    count = ids.shape[1] // hmt.config.segment_length
    if hmt.config.cache_size < count:
        raise ValueError(f"ids: expected at most {hmt.config.cache_size} segments, the cache's size, got {count}")
    return hmt.prefill(ids[:, : count * hmt.config.segment_length]).cache.flatten(2)


def bags(ids: Int[Tensor, "streams read"], length: int, vocab: int) -> Bool[Tensor, "thirds streams segments vocab"]:
    """Which tokens the early, the middle and the late third of each segment hold; thirds are of the same size."""
    segments, size = ids.unflatten(1, (-1, length)), length // 3
    begins = (0, (length - size) // 2, length - size)
    found = torch.zeros(len(THIRDS), *segments.shape[:2], vocab, dtype=torch.bool)
    for third, begin in zip(found, begins, strict=True):
        third.scatter_(2, segments[..., begin : begin + size], True)
    return found


def ridge(x: Float[Tensor, "rows numbers"], y: Bool[Tensor, "rows vocab"]) -> tuple[Tensor, Tensor]:
    """Weights and bias of the linear map from x to y, its penalty the best one for the last quarter of the rows."""

    def fitted(x: Tensor, y: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
        middle, target = x.mean(0), y.mean(0)
        inner = (x - middle).T @ (x - middle)
        eye = torch.eye(len(inner), dtype=x.dtype) * inner.diagonal().mean() * penalty
        weight = torch.linalg.solve(inner + eye, (x - middle).T @ (y - target))
        return weight, target - middle @ weight

    x, y, cut = x.double(), y.double(), len(x) * 3 // 4

    def error(penalty: float) -> float:
        weight, bias = fitted(x[:cut], y[:cut], penalty)
        return (x[cut:] @ weight + bias - y[cut:]).square().mean().item()

    return fitted(x, y, min(RIDGES, key=error))


def auc(scores: Float[Tensor, "rows vocab"], present: Bool[Tensor, "rows vocab"], seen: int) -> float:
    """Chance that a row with a token has the higher score than one without, mean over tokens `seen` both ways."""
    held = present.sum(0)
    chosen = (held >= seen) & (len(present) - held >= seen)
    ranks, held = scores[:, chosen].argsort(0).argsort(0).double(), held[chosen].double()
    above = (ranks * present[:, chosen]).sum(0) - held * (held - 1) / 2
    return (above / (held * (len(present) - held))).mean().item()


def probe(setting: Setting, hmt: HMT, fitted: Int[Tensor, "fitted read"], text: Int[Tensor, "streams read"]
          ) -> dict[str, list[float]]:
    """`auc` and `auc_other` of each third."""
    length, vocab = hmt.config.segment_length, setting.text.vocab
    x, held = embeddings(hmt, fitted), embeddings(hmt, text)
    other = held.roll(held.shape[1] // 2, 1)
    found: dict[str, list[float]] = {"auc": [], "auc_other": []}
    for taught, present in zip(bags(fitted, length, vocab), bags(text, length, vocab), strict=True):
        weight, bias = ridge(x.flatten(0, 1), taught.flatten(0, 1))
        for name, numbers in (("auc", held), ("auc_other", other)):
            scores = numbers.flatten(0, 1).double() @ weight + bias
            found[name].append(auc(scores, present.flatten(0, 1), setting.seen))
    return found


def run(setting: Setting, models: Sequence[str], seeds: Sequence[int], folder: Path, say: Any = print) -> Any:
    """Measure what the folder does not hold yet; a Dataset of (model, seed, third).

    folder: where `hmlab.experiments.hmt_text` keeps its trainings; a model that is not there is trained.
    """
    import xarray as xr

    data = hmt_text.opened(setting.text)
    folder.mkdir(parents=True, exist_ok=True)
    whole = setting.segments * setting.text.segment
    fitted = hmt_text.streams(data.tokens["train"], setting.fitted, whole)[:, :whole]
    text = hmt_text.held_out(data.tokens, setting.streams, whole)[:, :whole]
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for seed in seeds:
        for name in models:
            kept = folder / f"probe-{slug(name)}-{seed}.json"
            if not kept.exists():
                hmt = hmt_text.trained(setting.text, name, seed, data.tokens, folder, say)
                found = probe(setting, hmt, fitted, text) | {"commit": checkout()[0]}
                atomic.write_bytes(kept, json.dumps(found).encode())
            rows[name, seed] = row = json.loads(kept.read_text())
            thirds = ", ".join(f"{third} {auc:.3f} ({other:.3f} of another segment)" for third, auc, other in
                               zip(THIRDS, row["auc"], row["auc_other"], strict=True))  # fmt: skip
            say(f"{name}, seed {seed}: {thirds}")
    dataset = xr.Dataset(
        {name: (("model", "seed", "third"), [[rows[model, seed][name] for seed in seeds] for model in models])
         for name in ("auc", "auc_other")},
        {"model": list(models), "seed": list(seeds), "third": list(THIRDS)},
    )  # fmt: skip
    commits = sorted({str(row["commit"]) for row in rows.values()})
    return dataset.assign_attrs(setting=asdict(setting), corpus=data.provenance(), measured_at=commits)


def main(arguments: list[str] | None = None) -> int:
    """`python -m hmlab.experiments.hmt_probe`; Ctrl-C ends it, and the same command goes on."""
    given = hmt_text.command_line(__doc__, MODELS).parse_args(arguments)
    setting = Setting(text=hmt_text.chosen(given))
    return conduct(lambda say: run(setting, given.memories, given.seeds, given.folder, say), given.output)


if __name__ == "__main__":
    raise SystemExit(main())
