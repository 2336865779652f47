"""Do learned codes find the slots that a trained model's queries want?

    python -m hmlab.experiments.retrieval --seeds 0 1 2 --output harmony_retrieval.csv

The models are those that `hmlab.experiments.far_context` trained to read all slots. Their weights stay as they are;
only the codes are learned, from `hmlab.hashing.retrieval_loss` on the training text. Then recall, precision and work of
the codes are measured on the validation text (`hmlab.memories.harmony.quality` defines them), beside random
hyperplanes.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor, nn

from hmlab import auxiliary, hashing, results
from hmlab.experiments.far_context import Setting, slug
from hmlab.memories import harmony
from hmlab.provenance import provenance
from hmlab.tasks import language

TABLES, BITS, PROBES = (1, 2, 4, 8, 16), 6, (1, 2, 4, 7)
CONTEXT, TEXTS = 4096, 4  # tokens of a text that is measured, and how many
STEPS, RATE = 300, 1e-2


def learned(model: nn.Module, tokens: Tensor, context: int, seed: int, say: Any) -> nn.Module:
    """The model with codes that were trained for it; nothing else changes."""
    most = max(TABLES)
    model = harmony.replay(model, retrieval="hash", tables=most, bits=BITS, probes=1, candidates=1024).train()
    retrievers = [module for module in model.modules() if isinstance(module, harmony.LSHRetriever)]
    codes = [parameter for module in retrievers for parameter in module.parameters()]
    optimizer = torch.optim.Adam(codes, RATE)
    every, generator = tokens.unfold(0, context, 1), torch.Generator().manual_seed(seed)
    for step in range(1, STEPS + 1):
        window = every[torch.randint(len(every), (2,), generator=generator)].long()
        with auxiliary.collect() as losses:
            model(window)
        optimizer.zero_grad()
        losses["retrieval"].backward(inputs=codes)
        optimizer.step()
        if step % 100 == 0:
            say(f"codes: step {step} of {STEPS}, retrieval loss {losses['retrieval'].item():.3f}")
    return model.eval()


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


def run(memories: list[str], seeds: list[int], folder: Path, say: Any = print) -> Any:
    """A Dataset (memory, seed, layer, family, tables, probes)."""
    import xarray as xr

    setting = Setting()
    data = language.Config(corpus=setting.corpus, encoding="bpe", vocab_size=setting.vocab, batch=1, context=64).open()
    each = []
    for memory in memories:
        of_seeds = []
        for seed in seeds:
            weights = folder / f"{slug(memory)}-{seed}.safetensors"
            if not weights.exists():
                raise FileNotFoundError(f"folder: expected {weights.name}, which hmlab.experiments.far_context trains")
            model = setting.model(memory)
            model.load_state_dict(load_file(weights))
            model = learned(model, data.tokens["train"], setting.phases[-1].context, seed, say)
            of_seeds.append(quality(model, data.tokens["valid"], seed))
            say(f"{memory}, seed {seed}: recall up to {float(of_seeds[-1]['recall'].max()):.3f}")
        each.append(xr.concat(of_seeds, xr.Variable("seed", seeds)))
    dataset = xr.concat(each, xr.Variable("memory", memories))
    about = {"bits": BITS, "context": CONTEXT, "steps": STEPS, "share": 0.9, "corpus": data.provenance()}
    return dataset.assign_attrs(about)


def main(arguments: list[str] | None = None) -> int:
    """`python -m hmlab.experiments.retrieval`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--memories", nargs="+", default=["ratio 4", "budget 16"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=Path("runs/far_context"), help="where the models are")
    parser.add_argument("--output", type=Path, help="the table; its provenance is written beside it as JSON")
    given = parser.parse_args(arguments)
    began = time.time()
    dataset = run(given.memories, given.seeds, given.folder, Console(stderr=True).log)
    if given.output is not None:
        origin = provenance(torch.device("cpu")) | dataset.attrs | {"duration": time.time() - began}
        results.save(given.output.stem, dataset, origin, folder=given.output.parent)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
