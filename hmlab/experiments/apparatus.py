"""What experiments share: weights that go on in another model, codes that are taught alone, the command line."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor, nn

from hmlab import auxiliary, results
from hmlab.memories import harmony
from hmlab.provenance import provenance


def slug(memory: str) -> str:
    """A memory's name as part of a file's."""
    return memory.replace(",", "").replace("/", "_").replace(" ", "-")


def fitting(model: nn.Module, weights: Path) -> dict[str, Tensor]:
    """Of stored weights, those that the model has in the same shape."""
    own = model.state_dict()
    return {name: value for name, value in load_file(weights).items()
            if name in own and own[name].shape == value.shape}  # fmt: skip


def teach_codes(model: nn.Module, tokens: Iterator[Int[Tensor, "batch time"]], steps: int, learning_rate: float,
                say: Callable[[str], object]) -> nn.Module:
    """Teach a model's codes to find the slots that its queries want; nothing else changes. Returns it for reading."""
    model.train()
    codes = [parameter for module in model.modules() if isinstance(module, harmony.LSHRetriever)
             for parameter in module.parameters()]  # fmt: skip
    optimizer = torch.optim.Adam(codes, learning_rate)
    for step in range(1, steps + 1):
        with auxiliary.collect() as losses:
            model(next(tokens))
        optimizer.zero_grad()
        losses["retrieval"].backward(inputs=codes)
        optimizer.step()
        if step % 20 == 0 or step == steps:
            say(f"codes: step {step} of {steps}, retrieval loss {losses['retrieval'].item():.3f}")
    return model.eval()


def parser(question: str, memories: list[str], folder: str, chosen: list[str] | None = None) -> argparse.ArgumentParser:
    """Options of every experiment. question: the module's docstring. chosen: the memories if none are named."""
    made = argparse.ArgumentParser(description=question.splitlines()[0])
    made.add_argument("--memories", nargs="+", default=chosen or memories, choices=memories)
    made.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    made.add_argument("--folder", type=Path, default=Path("runs") / folder, help="what is finished is kept here")
    made.add_argument("--output", type=Path, help="the table; its provenance is written beside it as JSON")
    return made


def conduct(run: Callable[[Callable[[str], object]], Any], output: Path | None) -> int:
    """Run an experiment, which gets a `say` and returns a Dataset, and save that; 130 after Ctrl-C."""
    console, began = Console(stderr=True), time.time()
    try:
        dataset = run(console.log)
    except KeyboardInterrupt:
        console.log("interrupted; the same command goes on")
        return 130
    if output is not None:
        origin = provenance(torch.device("cpu")) | dataset.attrs | {"duration": time.time() - began}
        results.save(output.stem, dataset, origin, folder=output.parent)
    return 0
