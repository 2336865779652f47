"""Do learned codes find the slots that a trained model's queries want?

    python -m hmlab.experiments.retrieval --seeds 0 1 2 --output harmony_retrieval.csv

The models are those that `hmlab.experiments.far_context` trained to read all slots. Their weights stay as they are;
only the codes are learned, from `hmlab.hashing.retrieval_loss` on the training text. Then recall, precision and work of
the codes are measured on the validation text (`hmlab.memories.harmony.quality` defines them), beside random
hyperplanes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from hmlab import hashing
from hmlab.experiments.apparatus import conduct, parser, slug, teach_codes
from hmlab.experiments.far_context import MEMORIES, Setting
from hmlab.memories import harmony
from hmlab.tasks import language

TABLES, BITS, PROBES = (1, 2, 4, 8, 16), 6, (1, 2, 4, 7)
CONTEXT, TEXTS = 4096, 4  # tokens of a text that is measured, and how many
STEPS, RATE = 300, 1e-2


def learned(model: nn.Module, tokens: Tensor, context: int, seed: int, say: Any) -> nn.Module:
    """The model with codes that were trained for it; nothing else changes."""
    model = harmony.replay(model, retrieval="hash", tables=max(TABLES), bits=BITS, probes=1, candidates=1024)
    every, generator = tokens.unfold(0, context, 1), torch.Generator().manual_seed(seed)
    windows = (every[torch.randint(len(every), (2,), generator=generator)].long() for _ in range(STEPS))
    return teach_codes(model, windows, STEPS, RATE, say)


@torch.no_grad()
def quality(model: nn.Module, tokens: Tensor, seed: int) -> Any:
    """Recall, precision and work of each layer (layer, family, tables, probes) on evenly spaced texts."""
    import xarray as xr

    starts = torch.linspace(0, len(tokens) - CONTEXT, TEXTS).long()
    window = torch.stack([tokens[start : start + CONTEXT].long() for start in starts.tolist()])
    memories = [module for module in model.modules() if isinstance(module, harmony.Harmony)]
    inputs: list[Tensor] = []
    hooks = [m.register_forward_pre_hook(lambda module, given: inputs.append(given[0])) for m in memories]
    model(window)
    for hook in hooks:
        hook.remove()
    found = []
    for memory, x in zip(memories, inputs, strict=True):
        h = memory.hierarchy
        torch.manual_seed(seed)
        random = hashing.hyperplane.Config(dim=h.head_dim, heads=h.kv_heads, tables=max(TABLES), bits=BITS).build()
        families = {"learned": h.retriever.family, "random hyperplanes": random}
        found.append(harmony.retrieval_quality(memory, x, families, tokens=window, tables=TABLES, probes=PROBES,
                                               queries=200, least=64, seed=seed))  # fmt: skip
    sizes = {name: ("layer", [one.attrs[name] for one in found]) for name in ("readable_slots", "relevant_slots")}
    return xr.concat(found, "layer", combine_attrs="drop").assign(sizes).assign_coords(layer=range(len(found)))


def run(memories: list[str], seeds: list[int], folder: Path, say: Any = print, setting: Setting | None = None) -> Any:
    """A Dataset (memory, seed, layer, family, tables, probes). setting: that the models were trained in."""
    import xarray as xr

    setting = setting or Setting()
    data = language.Config(corpus=setting.corpus, encoding="bpe", vocab_size=setting.vocab, batch=1, context=64).open()
    each, commits = [], set()
    for memory in memories:
        of_seeds = []
        for seed in seeds:
            weights = folder / f"{slug(memory)}-{seed}.safetensors"
            if not weights.exists():
                raise FileNotFoundError(f"folder: expected {weights.name}, which hmlab.experiments.far_context trains")
            commits.add(json.loads(weights.with_suffix(".json").read_text())["commit"])
            model = setting.model(memory)
            model.load_state_dict(load_file(weights))
            model = learned(model, data.tokens["train"], setting.phases[-1].context, seed, say)
            of_seeds.append(quality(model, data.tokens["valid"], seed))
            say(f"{memory}, seed {seed}: recall up to {float(of_seeds[-1]['recall'].max()):.3f}")
        each.append(xr.concat(of_seeds, xr.Variable("seed", seeds)))
    dataset = xr.concat(each, xr.Variable("memory", memories))
    about = {"bits": BITS, "context": CONTEXT, "steps": STEPS, "share": 0.9, "corpus": data.provenance(),
             "trained_at": sorted(map(str, commits))}  # fmt: skip
    return dataset.assign_attrs(about)


def main(arguments: list[str] | None = None) -> int:
    """`python -m hmlab.experiments.retrieval`."""
    given = parser(__doc__, list(MEMORIES), "far_context", ["ratio 4", "budget 16"]).parse_args(arguments)
    return conduct(lambda say: run(given.memories, given.seeds, given.folder, say), given.output)


if __name__ == "__main__":
    raise SystemExit(main())
