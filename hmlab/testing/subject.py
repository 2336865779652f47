"""The memory under test: inputs for it, the ways to run it, and the comparisons that may fail."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hmlab.memory import Memory

TOKEN_IDS = 64
_MOVE = 2.0**-12


class ContractViolation(AssertionError):
    """A point of the contract that a memory breaks. `point` is its name."""

    def __init__(self, point: str, message: str):
        super().__init__(f"{point}: {message}")
        self.point, self.message = point, message

    def __reduce__(self) -> tuple:  # between processes
        return type(self), (self.point, self.message)


def tolerance(dtype: torch.dtype, length: int, dim: int) -> float:
    """How far rounding alone may part two forms of one memory, relative to the largest value: eps·sqrt(n·length).

    A value is rounded at each operation, and the forms round in different orders. Independent roundings add up like
    a random walk: with the root of their number. At every token that a value passes, these are the terms of an inner
    product, n = dim (at least 16, for norm, softmax, gates and sums); 16 below float32, where products are summed
    in float32. What a memory amplifies comes on top (`Subject.amplification`).
    """
    eps = torch.finfo(dtype).eps
    return eps * math.sqrt((16 if eps > 2**-16 else max(dim, 16)) * max(length, 1))


@dataclass(frozen=True)
class Inputs:
    """What one call reads, beside the state."""

    x: Tensor
    tokens: Tensor
    reset: Tensor | None = None
    valid: Tensor | None = None

    def _each(self, choose: Callable[[Tensor], Tensor]) -> Inputs:
        masks = {k: choose(m) for k, m in (("reset", self.reset), ("valid", self.valid)) if m is not None}
        return Inputs(choose(self.x), choose(self.tokens), **masks)

    def time(self, start: int, stop: int) -> Inputs:
        return self._each(lambda t: t[:, start:stop])

    def rows(self, rows: Sequence[int]) -> Inputs:
        return self._each(lambda t: t[torch.tensor(rows, device=t.device)])

    def after(self, time: int, other: Inputs) -> Inputs:
        """These inputs up to `time`, the other ones from there."""
        return Inputs(torch.cat([self.x[:, :time], other.x[:, time:]], 1),
                      torch.cat([self.tokens[:, :time], other.tokens[:, time:]], 1), self.reset, self.valid)

    @property
    def length(self) -> int:
        return self.x.shape[1]


@dataclass
class Deviation:
    """The largest deviation seen, against what is allowed."""

    found: float = 0.0
    allowed: float = 0.0

    def take(self, found: float, allowed: float) -> None:
        if found * self.allowed >= self.found * allowed:
            self.found, self.allowed = found, allowed


class Subject:
    """One memory in one dtype. `point` is the point under way, `deviation` the largest one found at it."""

    def __init__(self, build: Callable[[], Memory], *, lengths: Sequence[int], batch: int, seed: int,
                 dtype: torch.dtype, device: str):
        self.build, self.lengths, self.batch, self.seed = build, tuple(lengths), batch, seed
        self.dtype, self.device = dtype, device
        self.memory = self.built(dtype)
        self.dim = self.memory.dim
        self.point, self.deviation = "", Deviation()

    def built(self, dtype: torch.dtype) -> Memory:
        """The memory anew, with the same parameters, all of them away from special values such as zero."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            memory = self.build()
            with torch.no_grad():
                for parameter in memory.parameters():
                    parameter.add_(torch.randn(parameter.shape), alpha=0.4 / math.sqrt(memory.dim))
        return memory.eval().to(self.device, dtype)

    def of(self, dtype: torch.dtype) -> Subject:
        """The same memory in another dtype."""
        return Subject(self.build, lengths=self.lengths, batch=self.batch, seed=self.seed, dtype=dtype,
                       device=self.device)

    def double(self) -> Subject | None:
        """The same memory in float64, None where it does not run in it."""
        double = self.of(torch.float64)
        try:
            y, _ = double.forward(double.inputs(1))
        except (RuntimeError, TypeError, ValueError, NotImplementedError):
            return None
        return double if y.dtype == torch.float64 else None

    @cached_property
    def amplification(self) -> float:
        """How much more the largest relative change of y is than that of x, at least 1; measured, on 64 rows.

        A memory that divides by what may be near zero, as the norm of a product does, amplifies its roundings too.
        """
        wide = self.double() or self.of(torch.float32)
        inputs = wide.inputs(max(self.lengths), key=5, batch=64)
        with torch.no_grad():
            y, _ = wide.forward(inputs)
            moved, _ = wide.forward(replace(inputs, x=inputs.x * (1 + _MOVE * wide.inputs(
                inputs.length, key=6, batch=64).x.sign())))
        return max(1.0, ((moved - y).abs().max() / (_MOVE * y.abs().max())).item())

    def tolerance(self, length: int, dtype: torch.dtype | None = None) -> float:
        """`tolerance` of this memory."""
        return self.amplification * tolerance(dtype or self.dtype, length, self.dim)

    def inputs(self, length: int, key: int = 0, *, batch: int | None = None) -> Inputs:
        """Random inputs; the same for the same length and key."""
        batch = self.batch if batch is None else batch
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + key * 1009 + length)
        x = torch.randn(batch, length, self.dim, generator=generator)
        tokens = torch.randint(TOKEN_IDS, (batch, length), generator=generator)
        return Inputs(x.to(self.device, self.dtype), tokens.to(self.device))

    def mask(self, rows: Iterable[str]) -> Tensor:
        """[batch, time] bool from one word per row: `mask(["..x", "x.."])` is True at x. Rows repeat."""
        rows = list(rows)
        marks = [[mark == "x" for mark in rows[row % len(rows)]] for row in range(self.batch)]
        return torch.tensor(marks, device=self.device)

    def random_mask(self, length: int, share: float, key: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed + key * 7919 + length)
        return (torch.rand(self.batch, length, generator=generator) < share).to(self.device)

    # The ways to run it.

    def forward(self, inputs: Inputs, state: Any = None) -> tuple[Tensor, Any]:
        return self.memory(inputs.x, state, tokens=inputs.tokens, reset=inputs.reset, valid=inputs.valid)

    def init_state(self, batch: int | None = None) -> Any:
        return self.memory.init_state(self.batch if batch is None else batch, device=self.device, dtype=self.dtype)

    def fold(self, inputs: Inputs, state: Any = None) -> tuple[Tensor, Any]:
        """Token by token."""
        state = self.init_state(len(inputs.x)) if state is None else state
        y = []
        for x, tokens in zip(inputs.x.unbind(1), inputs.tokens.unbind(1), strict=True):
            out, state = self.memory.step(x, state, tokens=tokens)
            y.append(out)
        return torch.stack(y, 1) if y else torch.zeros_like(inputs.x), state

    def chunks(self, inputs: Inputs, cuts: Sequence[int], state: Any = None) -> tuple[Tensor, Any]:
        """Chunk by chunk, cut before the tokens `cuts`."""
        y = []
        for start, stop in pairwise((0, *cuts, inputs.length)):
            out, state = self.forward(inputs.time(start, stop), state)
            y.append(out)
        return torch.cat(y, 1), state

    def alone(self, inputs: Inputs, state: Any = None) -> tuple[Tensor, list[Any]]:
        """Each document by itself: one row, no padding, no reset. Returns y, and per row the last state."""
        y, states = torch.zeros_like(inputs.x), []
        for row in range(len(inputs.x)):
            held = None if state is None else self.memory.reorder(state, torch.tensor([row], device=self.device))
            starts = [] if inputs.reset is None else inputs.reset[row].nonzero().flatten().tolist()
            for start, stop in pairwise(sorted({0, *starts, inputs.length})) if inputs.length else ():
                held = None if start in starts else held
                kept = torch.arange(start, stop, device=self.device)
                kept = kept if inputs.valid is None else kept[inputs.valid[row, start:stop]]
                out, held = self.memory(inputs.x[row : row + 1, kept], held, tokens=inputs.tokens[row : row + 1, kept])
                y = y.index_put((torch.tensor(row, device=self.device), kept), out[0])
            states.append(self.init_state(1) if held is None else held)
        return y, states

    # The comparisons.

    def refuse(self, message: str) -> None:
        raise ContractViolation(self.point, f"{message} (batch {self.batch}, dim {self.dim}, {_short(self.dtype)})")

    def expect(self, holds: bool, message: str) -> None:
        if not holds:
            self.refuse(message)

    def same(self, got: Tensor, want: Tensor, what: str, *, length: int, floor: float = 0.0,
             dtype: torch.dtype | None = None, exact: bool = False) -> None:
        """Refuse where `got` leaves `want` by more than rounding; `what` says which two they are."""
        self.expect(got.shape == want.shape, f"{what}: shape {list(got.shape)} instead of {list(want.shape)}")
        self.expect(got.dtype == want.dtype, f"{what}: {_short(got.dtype)} instead of {_short(want.dtype)}")
        if not want.numel():
            return
        got, want = got.detach().double(), want.detach().double()
        difference = torch.where(got == want, 0, (got - want).abs())  # infinities may be equal
        largest = torch.where(want.isfinite(), want, 0).abs().max().item()
        allowed = 0.0 if exact else self.tolerance(length, dtype) * largest + floor
        wrong = ~(difference <= allowed)  # NaN is wrong too
        if wrong.any():
            at = tuple(wrong.nonzero()[0].tolist())
            self.refuse(
                f"{what}, at {list(at)} of {list(got.shape)}, {length} tokens: {got[at].item():.6g} instead of "
                f"{want[at].item():.6g}; largest deviation {difference.max().item():.3g}, tolerance {allowed:.3g}"
            )
        if not exact:
            self.deviation.take(difference.max().item(), allowed)

    def same_future(self, got: Any, want: Any, what: str, *, length: int) -> None:
        """Two states are the same when whatever follows is the same: five more tokens are run from both."""
        more = self.inputs(5, key=99, batch=len(pytree.tree_leaves(want)[0]))
        self.same(self.forward(more, got)[0], self.forward(more, want)[0], f"the tokens after {what}",
                  length=length + more.length)

    def same_futures(self, got: Any, want: Sequence[Any], what: str, *, length: int) -> None:
        """The rows of a state against states of one row each."""
        more = self.inputs(5, key=99)
        rows = [self.forward(more.rows([row]), state)[0] for row, state in enumerate(want)]
        self.same(self.forward(more, got)[0], torch.cat(rows), f"the tokens after {what}", length=length + more.length)

    def with_masks(self, inputs: Inputs, *, reset: Tensor | None = None, valid: Tensor | None = None) -> Inputs:
        return replace(inputs, reset=reset, valid=valid)


def leaves(state: Any) -> list[tuple[str, Tensor]]:
    """The tensors of a state, by name."""
    return [(pytree.keystr(path), leaf) for path, leaf in pytree.tree_flatten_with_path(state)[0]]


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
