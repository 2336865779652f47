"""`check_memory` proves the whole contract of `hmlab.memory.Memory` for one memory, or says what breaks it.

    from hmlab.testing import check_memory
    print(check_memory(Config(dim=16)))

Each point of the contract is a function of this package; its docstring is its line in the report. All run at odd
sizes on random input, with every parameter moved away from special values. Two forms may differ by rounding only:
`tolerance` says how much that is, from the precision, the length and the width.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, runtime_checkable

import torch

from hmlab.memory import Memory
from hmlab.testing import entry, forms, isolation, slopes
from hmlab.testing.subject import ContractViolation, Deviation, Subject, tolerance

__all__ = ["POINTS", "ContractViolation", "Line", "Report", "check_memory", "tolerance"]

# Which the points are, and whether a point is looked at in every dtype or only in the first.
POINTS: dict[str, tuple[Callable[..., None], bool]] = {
    "shapes": (forms.shapes, True),
    "start": (forms.start, True),
    "empty": (forms.empty, True),
    "step": (forms.step, True),
    "split": (forms.split, True),
    "far": (forms.far, True),
    "precision": (forms.precision, True),
    "value": (forms.value, False),
    "file": (forms.file, True),
    "state_bytes": (forms.state_bytes, True),
    "reserve": (forms.reserve, False),
    "reorder": (forms.reorder, False),
    "recording": (forms.recording, False),
    "future": (isolation.future, False),
    "rows": (isolation.rows, False),
    "packed": (isolation.packed, True),
    "padding": (isolation.padding, True),
    "packed_and_padded": (isolation.packed_and_padded, False),
    "positions": (isolation.positions, False),
    "gradients": (slopes.gradients, False),
    "errors": (entry.errors, False),
    "compiled": (entry.compiled, False),
}


_GRAPH = "aot_eager_decomp_partition"  # the operators that "inductor" gets, run one by one


@dataclass(frozen=True)
class Line:
    """One point that holds: the largest deviation found and the one allowed (both 0 where bits are compared)."""

    point: str
    dtype: str
    deviation: float
    tolerance: float


@dataclass(frozen=True)
class Report:
    """All points that hold for a memory. Print it."""

    memory: str
    lines: tuple[Line, ...]

    def __str__(self) -> str:
        rows = [("point", "dtype", "deviation", "tolerance", "says")]
        for line in self.lines:
            numbers = [f"{n:.1e}" if line.tolerance else "-" for n in (line.deviation, line.tolerance)]
            rows.append((line.point, line.dtype, *numbers, " ".join((POINTS[line.point][0].__doc__ or "").split())))
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        table = ["  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[4]]) for row in rows]
        return "\n".join([f"{self.memory} keeps the contract of a memory", *table])


@runtime_checkable
class Buildable(Protocol):
    """A memory's Config."""

    def build(self) -> Memory: ...


def check_memory(
    build: Callable[[], Memory] | Buildable,
    *,
    lengths: Sequence[int] = (0, 1, 2, 3, 31, 32, 33),
    batch: int = 3,
    seed: int = 0,
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16),
    compile: bool | str = True,
    allow_rnn: bool = False,
    exact_gradients: bool = True,
    device: str = "cpu",
    only: Collection[str] | None = None,
) -> Report:
    """Prove that a memory keeps every point of the contract.

    build: makes a fresh memory when called, or a Config with `.build()`; make it small (dim 16). lengths: streams
    that are tried, in tokens. dtypes: the first is looked at in full, the others where precision matters. compile:
    True captures whole graphs, forward and backward, and runs them without generating code; a name is a backend,
    such as "inductor"; False leaves that point out. allow_rnn: let torch.compile take `nn.GRU` and its kind, without
    masks, which such layers cannot take in one graph. exact_gradients: False for a memory whose equation stops or
    estimates gradients; they must then agree between forms, but not with difference quotients. only: names of
    `POINTS`.

    Token ids are below 64. Raises `ContractViolation`, an AssertionError, that names the first point broken, the
    sizes, the first place where two forms differ, both values, and the other points that are broken too.
    """
    make = build.build if isinstance(build, Buildable) else build
    unknown = set(only or ()) - set(POINTS)
    if unknown:
        raise ValueError(f"only: expected names from {list(POINTS)}, got {sorted(unknown)}")
    if batch < 2 or max(lengths) < 12:
        raise ValueError(f"batch, lengths: expected at least 2 rows and 12 tokens, got {batch} and {list(lengths)}")
    chosen = [p for p in POINTS if (only is None or p in only) and (p != "compiled" or compile)]
    options = {
        "compiled": {"backend": compile if isinstance(compile, str) else _GRAPH, "allow_rnn": allow_rnn},
        "gradients": {"exact": exact_gradients},
    }
    lines: list[Line] = []
    broken: list[ContractViolation] = []
    name = ""
    for dtype in dtypes:
        subject = Subject(make, lengths=lengths, batch=batch, seed=seed, dtype=dtype, device=device)
        name = type(subject.memory).__name__
        for point in chosen:
            check, every_dtype = POINTS[point]
            if dtype != dtypes[0] and not every_dtype:
                continue
            if point in options:
                check = partial(check, **options[point])
            # In float64, where the memory runs in it, rounding does not hide a wrong gradient.
            used = subject.double() or subject if point == "gradients" else subject
            violation = _look(used, point, check)
            if violation is not None:
                broken.append(violation)
            else:
                lines.append(Line(point, str(used.dtype).removeprefix("torch."), used.deviation.found,
                                  used.deviation.allowed))
    if broken:
        others = sorted({other.point for other in broken} - {broken[0].point})
        first = broken[0]
        also = f" [broken too: {', '.join(others)}]" if others else ""
        raise ContractViolation(first.point, first.message + also) from first
    return Report(name, tuple(lines))


def _look(subject: Subject, point: str, check: Callable[[Subject], None]) -> ContractViolation | None:
    subject.point, subject.deviation = point, Deviation()
    try:
        with torch.no_grad():
            check(subject)
    except ContractViolation as violation:
        return violation
    except Exception as error:
        said = next(iter(str(error).strip().splitlines()), "")
        violation = ContractViolation(point, f"the memory raised {type(error).__name__}: {said}")
        violation.__cause__ = error
        return violation
    return None
