"""The point about gradients: finite, right, and the same in every form."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hmlab.testing.subject import Inputs, Subject, leaves

_STEP = 2.0**-12  # of a difference quotient: far above float32's rounding, far below the curvature of a network


def gradients(s: Subject, exact: bool) -> None:
    """gradients are finite, right, and the same in every form, packed, padded and alone; to the state too"""
    length = 11
    inputs = s.inputs(length)
    held = s.forward(s.inputs(6, key=1))[1]
    with torch.enable_grad():
        forms = {"chunks": lambda i, state: s.chunks(i, (3, 4), state), "steps": s.fold}
        for state in (None, held):
            loss = _Loss(s, s.forward, inputs, state)
            want = loss.gradients()
            if exact:
                _check_quotients(s, loss, want)
            for form, run in forms.items():
                got = _Loss(s, run, inputs, state).gradients()
                _same(s, got, want, f"{form} against one call{'' if state is None else ' with a state'}")
        reset, valid = s.random_mask(length, 0.3, 1), s.random_mask(length, 0.7, 2)
        valid[0] = False  # a row of padding only
        masks = {"packed": (reset, None), "padded": (None, valid), "packed and padded": (reset, valid)}
        for what, (starts, kept) in masks.items():
            masked = s.with_masks(inputs, reset=starts, valid=kept)
            if kept is not None:
                masked = replace(masked, x=masked.x.masked_fill(~kept[..., None], torch.nan))
            got = _Loss(s, s.forward, masked, held, goes_on=False).gradients()
            want = _Loss(s, s.alone, masked, held, goes_on=False).gradients()
            _same(s, got, want, f"{what} documents against each alone")


class _Loss:
    """A random function of y, and of the tokens that follow, as a function of x, of the state and of each parameter."""

    def __init__(self, s: Subject, run: Callable, inputs: Inputs, state: Any, *, goes_on: bool = True):
        self.s, self.run, self.inputs, self.state, self.goes_on = s, run, inputs, state, goes_on
        self.wanted = {"x": inputs.x.detach().clone().requires_grad_(), **dict(s.memory.named_parameters())}
        if state is not None:
            self.state = pytree.tree_map(lambda t: t.detach().clone().requires_grad_(t.is_floating_point()), state)
            self.wanted |= {f"state{name}": leaf for name, leaf in leaves(self.state) if leaf.is_floating_point()}

    def __call__(self) -> Tensor:
        s, more = self.s, self.s.inputs(3, key=2)
        y, after = self.run(replace(self.inputs, x=self.wanted["x"]), self.state)
        loss = (y * s.inputs(y.shape[1], key=3).x).sum()
        return loss + (s.forward(more, after)[0] * s.inputs(3, key=4).x).sum() if self.goes_on else loss

    def gradients(self) -> dict[str, Tensor]:
        found = torch.autograd.grad(self(), list(self.wanted.values()), allow_unused=True)
        return {name: torch.zeros_like(leaf) if gradient is None else gradient
                for (name, leaf), gradient in zip(self.wanted.items(), found, strict=True)}


def _same(s: Subject, got: dict[str, Tensor], want: dict[str, Tensor], what: str) -> None:
    """Computed in float64 where the memory can, compared to float32's tolerance: tables may be float32."""
    largest = max(gradient.abs().max().item() for gradient in want.values() if gradient.numel())
    for name, gradient in want.items():
        # Where the true gradient is zero, rounding of the larger ones is left over.
        floor = s.tolerance(20) * largest
        s.same(got[name], gradient, f"gradient of {name}, {what}", length=20, dtype=torch.float32, floor=floor)


def _check_quotients(s: Subject, loss: _Loss, gradients: dict[str, Tensor]) -> None:
    """Each gradient against a difference quotient in a random direction, whose rounding is divided by its step."""
    largest = max(gradient.norm().item() for gradient in gradients.values())
    for key, (name, leaf) in enumerate(loss.wanted.items()):
        if not leaf.numel():
            continue
        generator = torch.Generator().manual_seed(s.seed + key)
        direction = torch.randn(leaf.shape, generator=generator).to(leaf) / math.sqrt(s.dim)
        with torch.no_grad():
            ends = []
            for step in (_STEP, -_STEP):
                leaf.add_(direction, alpha=step)
                ends.append(loss().double())
                leaf.add_(direction, alpha=-step)
        got = (gradients[name] * direction).sum().double()
        want = (ends[0] - ends[1]) / (2 * _STEP)
        allowed = s.tolerance(20, torch.float32) * gradients[name].norm().item() + s.tolerance(20) * largest
        s.expect(bool((got - want).abs() <= allowed / _STEP),
                 f"gradient of {name} in a random direction: {got:.6g}, difference quotient {want:.6g}; "
                 f"deviation {(got - want).abs():.3g}, tolerance {allowed / _STEP:.3g}")
