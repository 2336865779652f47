"""Conversion of a trained model, in one call: attach, fine-tune, compare before and after.

    done = convert(model, {2: window(128), 3: lmn.Config(dim=512, heads=8)},
                   batches=training, held_out=testing, steps=500, learning_rate=3e-4)
    done.dataset["loss"]            # before, attached, trained · near, far, all
    save(done.model, folder, include_model=True)

Loss: cross-entropy in nats per token on texts held out; the tokens of a text are told apart by how many precede them.
Training: AdamW without weight decay at a constant rate, gradients clipped to norm 1, by the model's loss and those that
the hierarchies ask for (`hmlab.auxiliary`).
Ctrl-C ends the training; what was reached until then is measured and returned. Errors: `ValueError` by argument,
`FloatingPointError` for a loss that is no number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from hmlab.auxiliary import collect
from hmlab.hf import logarithmic
from hmlab.hf.attachment import attach, attentions, detach, hierarchies, layers_of, shape
from hmlab.hf.cache import HierarchyLayer
from hmlab.memories import lmn
from hmlab.memories.harmony import HierarchyConfig
from hmlab.memory import state_bytes
from hmlab.model import parameters

if TYPE_CHECKING:
    import xarray

WHEN = ("before", "attached", "trained")
CHUNK = 1024  # tokens read at a time where only the state is wanted


class Conversion(NamedTuple):
    """The model, attached and trained, and what was measured.

    loss (when, place): near, far, all. position_loss (when, position): position counts the tokens that precede the one
    predicted. state_bytes (when, layer): held for one row after `attrs["length"]` tokens. kind (layer): attention,
    window, hierarchy or lmn. parameters_added, parameters_copied (of those added, in projections that started from the
    attention's), parameters_idle (the attention's own, no longer used) (layer). training_loss (step). attrs: the call's
    arguments, the steps that were taken, whether it was interrupted.
    """

    model: PreTrainedModel
    dataset: Any


def convert(
    model: PreTrainedModel,
    layers: HierarchyConfig | lmn.Config | Mapping[int, HierarchyConfig | lmn.Config],
    *,
    batches: Iterable[Int[Tensor, "_batch _time"]],
    held_out: Iterable[Int[Tensor, "_batch _time"]],
    steps: int,
    learning_rate: float = 1e-3,
    train: Literal["new", "all"] = "new",
    near: int | None = None,
    length: int | None = None,
    seed: int = 0,
    progress: Callable[[int, float], None] | None = None,
) -> Conversion:
    """Attach `layers` to a model, in place, train it and measure it.

    layers: as in `attach`. batches: token ids without padding, taken in order, from the beginning again when they end.
    held_out: the same, never trained on, all of one length. train: the parameters that came with the layers, or all.
    near: tokens before the one predicted up to which it counts as near, None for half of the held-out length. length:
    tokens after which the state is weighed, None for the held-out length. seed: of new parameters and of training; the
    caller's generators stay as they are. progress: is told the step, from 1, and its loss.
    """
    placed = layers_of(model, layers)
    texts = list(held_out)
    lengths = {text.shape[1] for text in texts}
    if len(lengths) != 1 or min(lengths) < 3:
        raise ValueError(f"held_out: expected texts of one length, 3 tokens or more, got lengths {sorted(lengths)}")
    time = lengths.pop()
    near, length = time // 2 if near is None else near, time if length is None else length
    if not 1 <= near < time - 1:
        raise ValueError(f"near: expected 1 to {time - 2}, held-out texts have {time} tokens, got {near}")
    for name, value, least in (("steps", steps, 0), ("length", length, 1)):
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")
    if not learning_rate > 0:
        raise ValueError(f"learning_rate: expected more than 0, got {learning_rate}")
    if train not in ("new", "all"):
        raise ValueError(f"train: expected new or all, got {train!r}")
    training, measured, losses, interrupted = model.training, [], [], False
    measured.append(_measure(model, texts, length))
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        attach(model, placed)
        wanted = model if train == "all" else hierarchies(model)
        if steps and not any(True for _ in wanted.parameters()):
            detach(model)
            raise ValueError("train: expected all, the new layers have no parameters of their own, got new")
        try:
            measured.append(_measure(model, texts, length))
            with closing(_trained(model.train(), list(wanted.parameters()), batches, steps, learning_rate)) as taken:
                for loss in taken:
                    losses.append(loss)
                    if progress is not None:
                        progress(len(losses), loss)
        except KeyboardInterrupt:
            if len(measured) < 2:  # nothing to compare yet
                detach(model)
                raise
            interrupted = True
        except BaseException:
            detach(model)
            raise
        finally:
            model.train(training)
    measured.append(_measure(model, texts, length))
    facts = {"length": length, "near": near, "steps": len(losses), "interrupted": int(interrupted), "seed": seed,
             "train": train, "learning_rate": learning_rate}  # fmt: skip
    return Conversion(model, _dataset(model, placed, measured, losses, near, facts))


def _trained(model: PreTrainedModel, parameters: list[Tensor], batches: Iterable[Tensor], steps: int,
             learning_rate: float) -> Iterator[float]:
    """The loss of each step, once it is taken. Only `parameters` are moved, and only while this runs."""
    required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)
        optimizer = torch.optim.AdamW(parameters, learning_rate, weight_decay=0.0)
        for _, ids in zip(range(steps), _endless(batches), strict=False):
            ids = ids.to(model.device).long()
            with collect() as asked:
                loss = model(ids, labels=ids, use_cache=False).loss
            if not loss.isfinite():
                raise FloatingPointError(f"loss: expected a number, got {loss.item()} (a smaller learning_rate?)")
            (loss + sum(asked.values())).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            yield loss.item()
    finally:
        for parameter, was in required:
            parameter.requires_grad_(was)
            parameter.grad = None


def _endless(batches: Iterable[Tensor]) -> Iterator[Tensor]:
    while True:
        some = False
        for ids in batches:
            some = True
            yield ids
        if not some:
            raise ValueError("batches: expected batches for every step (an iterable that can begin again), "
                             "got no more")  # fmt: skip


@torch.no_grad()
def _measure(model: PreTrainedModel, texts: list[Tensor], length: int) -> tuple[Float[Tensor, "position"], list[int]]:
    """Mean loss by position; bytes that each layer holds for one row after `length` tokens."""
    training = model.training
    model.eval()
    try:
        total = 0
        for text in texts:
            ids = text.to(model.device).long()
            logits = model(ids, use_cache=False).logits[:, :-1].float()
            total += F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").double().sum(0).cpu()
        ids = texts[0][:1].to(model.device)
        ids, cache = ids.repeat(1, -(-length // ids.shape[1]))[:, :length], DynamicCache()
        for chunk in ids.split(CHUNK, 1):
            model.base_model(chunk, past_key_values=cache, use_cache=True)
        return total / sum(map(len, texts)), [_held(layer) for layer in cache.layers]
    finally:
        model.train(training)


def _held(layer: Any) -> int:
    return state_bytes(layer.state if isinstance(layer, HierarchyLayer) else (layer.keys, layer.values))


def _dataset(model: PreTrainedModel, placed: dict[int, Any], measured: list[tuple[Tensor, list[int]]],
             losses: list[float], near: int, facts: dict[str, Any]) -> xarray.Dataset:
    import numpy as np
    import xarray as xr

    by_position = torch.stack([loss for loss, _ in measured])
    places = [by_position[:, part].mean(1) for part in (slice(near), slice(near, None), slice(None))]
    held = [held for _, held in measured]
    depth = len(held[0])
    kinds = [_kind(placed.get(number)) for number in range(depth)]
    counts = np.zeros((3, depth), dtype=np.int64)
    for number, hierarchy in zip(placed, hierarchies(model), strict=True):
        counts[0, number] = parameters(hierarchy)
        if kinds[number] == "lmn":
            counts[1, number] = logarithmic.copied(hierarchy, **shape(model))
            counts[2, number] = parameters(attentions(model)[number]) - counts[0, number]
    nats = {"units": "nats per token"}
    names = ("parameters_added", "parameters_copied", "parameters_idle")
    return xr.Dataset(
        {
            "loss": (("when", "place"), torch.stack(places, 1).numpy(), {"long_name": "loss", **nats}),
            "position_loss": (("when", "position"), by_position.numpy(), {"long_name": "loss", **nats}),
            "state_bytes": (("when", "layer"), np.array(held), {"long_name": "state", "units": "bytes"}),
            **{name: ("layer", count, {"long_name": name.replace("_", " "), "units": "1"})
               for name, count in zip(names, counts, strict=True)},
            "training_loss": ("step", np.array(losses, dtype=float), {"long_name": "training loss", **nats}),
        },
        {"when": list(WHEN), "place": ["near", "far", "all"], "layer": np.arange(depth), "kind": ("layer", kinds),
         "position": ("position", np.arange(1, by_position.shape[1] + 1), {"units": "tokens"}),
         "step": np.arange(1, len(losses) + 1)},
        facts,
    )  # fmt: skip


def _kind(config: Any) -> str:
    if config is None:
        return "attention"
    if isinstance(config, lmn.Config):
        return "lmn"
    return "window" if config.retrieval == "none" else "hierarchy"
