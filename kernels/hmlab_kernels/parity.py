"""Every implementation against the reference: outputs and gradients of shared cases, and where two first part.

    python -m hmlab_kernels.parity [OP ...] [--device cuda] [--impl fused]

runs all cases in every dtype and ends with 1 if anything lies outside its tolerance. Each operator's `cases.py`
holds CASES, a list of `Case`; the reference runs in float64 on the very inputs, rounded to the dtype under test.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import OPS, implementations

# What rounding may cost, in units of the dtype's spacing at the size of what is compared (the value itself plus the
# typical value of its tensor). Wide types: sums over some hundred terms; half types: some operands rounded on the way.
_SLACK = {torch.float64: 256, torch.float32: 64, torch.bfloat16: 8, torch.float16: 8}


class Draw:
    """Random inputs of a case: drawn on the CPU from a seed, so that every device and dtype gets the same numbers."""

    def __init__(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", seed: int = 0) -> None:
        self.dtype, self.device = dtype, torch.device(device)
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        x = scale * torch.randn(*shape, generator=self._generator, dtype=torch.float64)
        return x.to(dtype=self.dtype, device=self.device)

    def uniform(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        x = torch.rand(*shape, generator=self._generator, dtype=torch.float64)
        return x.to(dtype=dtype or self.dtype, device=self.device)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """From low up to, not including, high."""
        return torch.randint(low, high, shape, generator=self._generator).to(self.device)

    def tensor(self, values: Sequence, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)


@dataclass(frozen=True)
class Case:
    """One call of an operator. make: its arguments by name. gradients: the arguments differentiated. equal: compares
    output `name` of (result, reference, arguments) where rounding is not the measure (codes, indices): the tensor of
    what differs, all False if nothing does; None leaves that output to the tolerance."""

    name: str
    make: Callable[[Draw], dict]
    gradients: tuple[str, ...] = ()
    equal: Callable[[str, Tensor, Tensor, dict], Tensor | None] = lambda *_: None


@dataclass(frozen=True)
class Difference:
    """An output or gradient beside the reference's: the largest error in units of its tolerance (1 is the limit), and
    the first place (row-major) outside it, None if none is."""

    name: str
    error: float
    first: tuple[int, ...] | None


def cases(op: str) -> dict[str, Case]:
    """The shared cases of an operator, by name."""
    implementations(op)  # refuses an unknown name
    return {case.name: case for case in importlib.import_module(f"hmlab_kernels.{op}.cases").CASES}


def evaluate(op: str, case: Case, inputs: dict, impl: str) -> dict[str, Tensor]:
    """Outputs by name, then a gradient `grad <argument>` for each of the case's."""
    inputs = {name: _leaf(value) if name in case.gradients else value for name, value in inputs.items()}
    with torch.set_grad_enabled(bool(case.gradients)):
        result = OPS[op](**inputs, impl=impl)
    outputs = _named(op, result)
    if case.gradients:
        draw = Draw(torch.float32, seed=1)  # the same cotangents whichever implementation
        loss = torch.zeros(())
        for output in outputs.values():
            if output.requires_grad:
                cotangent = draw.normal(*output.shape).to(output)
                # An empty set has a log-sum-exp of −inf, which carries no gradient.
                loss = loss + torch.where(output.isfinite(), output * cotangent, 0).sum()
        wanted = dict(_differentiated(case, inputs))
        found = [None] * len(wanted)
        if loss.requires_grad:
            found = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
        outputs |= {
            f"grad {name}": torch.zeros_like(x) if g is None else g
            for (name, x), g in zip(wanted.items(), found, strict=True)
        }
    return {name: output.detach() for name, output in outputs.items()}


def compare(op: str, case: Case, impl: str, dtype: torch.dtype = torch.float32, device: str = "cpu"
            ) -> list[Difference]:
    """Every output and gradient of `impl` beside the reference's."""
    inputs = case.make(Draw(dtype, device))
    expected = evaluate(op, case, _exact(inputs), "reference")
    got = evaluate(op, case, inputs, impl)
    return [_difference(name, got[name], expected[name], case, inputs, dtype) for name in expected]


def _difference(name: str, got: Tensor, expected: Tensor, case: Case, inputs: dict, dtype: torch.dtype) -> Difference:
    if got.shape != expected.shape:
        raise AssertionError(f"{case.name}, {name}: shape {list(got.shape)}, the reference has {list(expected.shape)}")
    if not got.numel():
        return Difference(name, 0.0, None)
    wrong = case.equal(name, got, expected, inputs)
    if wrong is None:
        error = relative_error(got, expected, dtype)
        wrong = ~(error <= 1)
        worst = float(error.max()) if not error.isnan().any() else float("inf")
    else:
        worst = float("inf") if wrong.any() else 0.0
    return Difference(name, worst, tuple(wrong.nonzero()[0].tolist()) if wrong.any() else None)


def relative_error(got: Tensor, expected: Tensor, dtype: torch.dtype) -> Tensor:
    """|got − expected| in units of what rounding in `dtype` allows; 0 where both are the same infinity, NaN never."""
    if not expected.is_floating_point():
        return torch.where(got == expected, 0.0, torch.inf)
    got, expected = got.double(), expected.double()
    finite = expected[expected.isfinite()]
    typical = finite.square().mean().sqrt() if finite.numel() else expected.new_zeros(())
    tiny = torch.finfo(torch.float32).tiny
    allowed = _SLACK[dtype] * torch.finfo(dtype).eps * (expected.abs() + typical) + tiny
    return torch.where(got == expected, 0, (got - expected).abs() / allowed)


@dataclass(frozen=True)
class Divergence:
    """Where two implementations first part: output, index, tile (index over the tile's shape; None where the operator
    names no tiles), and the two values beside the reference's. `index` None: they agree within tolerance."""

    op: str
    case: str
    impl_a: str
    impl_b: str
    output: str | None = None
    index: tuple[int, ...] | None = None
    tile: tuple[int, ...] | None = None
    a: float | None = None
    b: float | None = None
    reference: float | None = None
    differing: int = 0

    def __str__(self) -> str:
        head = f"{self.op}, case {self.case!r}: {self.impl_a} and {self.impl_b}"
        if self.index is None:
            return f"{head} agree within rounding"
        tile = "" if self.tile is None else f", tile {list(self.tile)}"
        return (
            f"{head} first part in {self.output!r} at {list(self.index)}{tile} ({self.differing} places in all):\n"
            f"  {self.impl_a} {self.a:.9g}, {self.impl_b} {self.b:.9g}, reference {self.reference:.9g}"
        )


def diverge(op: str, case: str | Case, impl_a: str, impl_b: str, *, dtype: torch.dtype = torch.float32,
            device: str = "cpu", seed: int = 0) -> Divergence:
    """The first place where two implementations differ by more than rounding, in the order outputs, gradients.

    An operator's `cases.tiles(inputs)` gives the tile shape of each output, by which the place's tile is named.
    Raises ValueError naming an unknown operator, case or implementation.
    """
    if isinstance(case, str):
        known = cases(op)
        if case not in known:
            raise ValueError(f"case: {op} has {list(known)}, got {case!r}")
        case = known[case]
    inputs = case.make(Draw(dtype, device, seed))
    a, b = (evaluate(op, case, inputs, impl) for impl in (impl_a, impl_b))
    expected = evaluate(op, case, _exact(inputs), "reference")
    result = Divergence(op, case.name, impl_a, impl_b)
    for name in expected:
        if not a[name].numel():
            continue
        wrong = case.equal(name, a[name], b[name], inputs)
        if wrong is None:
            wrong = ~(relative_error(a[name], b[name].double(), dtype) <= 1)
        if wrong.any():
            index = tuple(wrong.nonzero()[0].tolist())
            tiles = getattr(importlib.import_module(f"hmlab_kernels.{op}.cases"), "tiles", lambda _: {})
            shape = tiles(inputs).get(name)
            tile = None if shape is None else tuple(i // size for i, size in zip(index, shape, strict=True))
            values = (float(x[name][index]) for x in (a, b, expected))
            return replace(result, output=name, index=index, tile=tile, differing=int(wrong.sum()),
                           **dict(zip(("a", "b", "reference"), values, strict=True)))  # fmt: skip
    return result


def _named(op: str, result) -> dict[str, Tensor]:
    if isinstance(result, Tensor):
        return {"out": result}
    names = getattr(result, "_fields", None) or importlib.import_module(f"hmlab_kernels.{op}").OUTPUTS
    return dict(zip(names, result, strict=True))


def _differentiated(case: Case, inputs: dict) -> Iterator[tuple[str, Tensor]]:
    """The tensors to differentiate by, those of a tuple one by one."""
    for name in case.gradients:
        value = inputs[name]
        yield from ((f"{name}[{i}]", x) for i, x in enumerate(value)) if isinstance(value, tuple) else [(name, value)]


def _leaf(x: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
    # detach keeps the strides: a case may be about them
    return tuple(map(_leaf, x)) if isinstance(x, tuple) else x.detach().requires_grad_()


def _exact(inputs: dict) -> dict:
    def wide(x):
        if type(x) is tuple:
            return tuple(map(wide, x))
        return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x

    return {name: wide(x) for name, x in inputs.items()}


def _run(ops: Sequence[str], device: str, impls: Sequence[str]) -> Iterator[tuple[str, str, str, torch.dtype, list]]:
    for op in ops or OPS:
        for impl in impls or implementations(op):
            if impl == "reference" or (impl == "native" and device != "cpu"):
                continue
            if impl == "fused" and device == "cpu" and not impls and os.environ.get("TRITON_INTERPRET") != "1":
                print(f"{op:18} fused   left out: on a CPU it runs with TRITON_INTERPRET=1 only")
                continue
            for case in cases(op).values():
                for dtype in (torch.float32, torch.bfloat16, torch.float16):
                    yield op, impl, case.name, dtype, compare(op, case, impl, dtype, device)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m hmlab_kernels.parity", description="Implementations against the reference."
    )
    parser.add_argument("ops", nargs="*", metavar="OP")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--impl", action="append", default=[])
    arguments = parser.parse_args()
    failed = count = 0
    for op, impl, case, dtype, differences in _run(arguments.ops, arguments.device, arguments.impl):
        count += 1
        worst = max(differences, key=lambda d: d.error)
        bad = [d for d in differences if d.first is not None]
        failed += bool(bad)
        verdict = "; ".join(f"{d.name} differs first at {list(d.first)}" for d in bad) or "ok"
        name = str(dtype).removeprefix("torch.")
        print(f"{op:18} {impl:7} {name:9} {case:40} {worst.error:8.3f} of tolerance  {verdict}", flush=True)
    print(f"{count} comparisons on {arguments.device}, {failed} outside tolerance")
    return 1 if failed or not count else 0


if __name__ == "__main__":
    sys.exit(main())
