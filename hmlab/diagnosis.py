"""What is wrong with a training step, named: non-finite numbers and spikes.

`Watch` looks at two floats per step. Only when one of them is not finite does `diagnose` take the model apart
and re-run the failing batches to find where it began.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils import _pytree as pytree

# Steps that the median is taken over, and how many of them are needed before anything counts as a spike.
WINDOW = 64
SETTLED = 16
# A spike: a gradient norm this many times the median; a loss this many median deviations, and nats, above it.
NORM_FACTOR = 5.0
LOSS_DEVIATIONS = 8.0
LOSS_NATS = 0.2

Kind = Literal["loss", "gradient", "parameter", "activation"]


class Instability(ArithmeticError):
    """Training met a number that is not finite: `step`, `kind`, `module` (dotted path) and the `value`."""

    def __init__(self, *, step: int, kind: Kind, module: str, value: float, part: str = "") -> None:
        self.step, self.kind, self.module, self.value = step, kind, module, value
        where = f" of {module or 'the model'}" + (f" ({part})" if part else "") if kind != "loss" else ""
        super().__init__(f"step {step}: the {kind}{where} is {value}")


@dataclass(frozen=True, kw_only=True)
class Spike:
    """A value far above its recent median; `module` is where the gradient norm grew most, `growth`-fold."""

    step: int
    kind: Literal["loss", "gradient_norm"]
    value: float
    median: float
    module: str
    growth: float


class Watch:
    """The recent past of the loss and of every parameter's gradient norm, against which a step is judged."""

    def __init__(self) -> None:
        self.losses: deque[float] = deque(maxlen=WINDOW)
        self.norms: deque[float] = deque(maxlen=WINDOW)
        self._mean: Float[Tensor, "parameters"] | None = None
        self._names: list[str] = []

    def spikes(self, step: int, loss: float, norm: float, names: list[str],
               norms: Float[Tensor, "parameters"]) -> list[Spike]:
        """Judge one step, then count it as past. norms: gradient norm of each parameter in `names`."""
        found: list[tuple[str, float, float]] = []
        if len(self.losses) >= SETTLED:
            median = statistics.median(self.losses)
            deviation = statistics.median(abs(x - median) for x in self.losses)
            if loss - median > max(LOSS_DEVIATIONS * deviation, LOSS_NATS):
                found.append(("loss", loss, median))
            median = statistics.median(self.norms)
            if norm > NORM_FACTOR * median:
                found.append(("gradient_norm", norm, median))
        if self._mean is None or self._names != names:
            self._names, self._mean = list(names), norms.detach().clone()
        growth, module = 1.0, ""
        if found:
            ratios = norms / self._mean.clamp_min(torch.finfo(norms.dtype).tiny)
            at = int(ratios.argmax())
            growth, module = float(ratios[at]), names[at].rpartition(".")[0]
        else:
            self._mean.lerp_(norms, 1 / WINDOW)
        self.losses.append(loss)
        self.norms.append(norm)
        return [
            Spike(step=step, kind=kind, value=value, median=median, module=module, growth=growth)
            for kind, value, median in found
        ]

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON-able facts to go on from."""
        tensors = {} if self._mean is None else {"mean": self._mean}
        return tensors, {"losses": list(self.losses), "norms": list(self.norms), "names": self._names}

    def restore(self, tensors: dict[str, Tensor], facts: dict[str, Any], device: torch.device) -> None:
        self.losses.extend(facts["losses"])
        self.norms.extend(facts["norms"])
        self._names = list(facts["names"])
        self._mean = tensors["mean"].to(device) if "mean" in tensors else None


def diagnose(model: nn.Module, step: int, loss: float, forwards: Iterable[Callable[[], Any]]) -> Instability:
    """Find where the first non-finite number of a failed step is: parameters, activations, gradients, loss.

    forwards: calls that run the model on the step's batches again.
    """
    for name, parameter in model.named_parameters():
        if (value := _non_finite(parameter)) is not None:
            return _of_parameter(step, "parameter", name, value)
    if not math.isfinite(loss):
        for forward in forwards:
            if (found := _first_activation(model, forward)) is not None:
                return Instability(step=step, kind="activation", module=found[0], value=found[1])
        return Instability(step=step, kind="loss", module="", value=loss)
    gradients = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
    # Back-propagation carries a NaN towards the input: the last parameter that has it is nearest its origin.
    for name, gradient in reversed(gradients):
        if (value := _non_finite(gradient)) is not None:
            return _of_parameter(step, "gradient", name, value)
    # All finite, but the norm overflows.
    name, gradient = max(gradients, key=lambda pair: float(pair[1].abs().max()))
    return _of_parameter(step, "gradient", name, float(gradient.norm()))


def _of_parameter(step: int, kind: Kind, name: str, value: float) -> Instability:
    module, _, part = name.rpartition(".")
    return Instability(step=step, kind=kind, module=module, part=part, value=value)


def _first_activation(model: nn.Module, forward: Callable[[], Any]) -> tuple[str, float] | None:
    """The module whose output was the first to be non-finite, and the value."""
    found: list[tuple[str, float]] = []

    def look(name: str) -> Callable:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            # Of (y, state) only y counts: a state may hold the -inf of a running maximum and be sound.
            y = output[0] if isinstance(output, tuple) else output
            for tensor in pytree.tree_leaves(y):
                if not found and isinstance(tensor, Tensor) and (value := _non_finite(tensor)) is not None:
                    found.append((name, value))

        return hook

    handles = [module.register_forward_hook(look(name)) for name, module in model.named_modules()]
    try:
        with torch.no_grad():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _non_finite(tensor: Tensor) -> float | None:
    if not tensor.is_floating_point():
        return None
    wrong = tensor.detach()[~torch.isfinite(tensor.detach())]
    return float(wrong[0]) if wrong.numel() else None
