"""How time and memory of HARMONY grow with the tokens read, beside attention to the whole past.

    exponent = slope of log time over log tokens, fitted by least squares to the medians of the lengths measured

Forward: a text of that many tokens, batch 1, one head of 64, without gradients, fed in calls of 4,096 tokens with the
state carried. Window 192, 64 slots picked by 4 tables of 8 learned hyperplanes with 2 probes and 256 candidates, policy
and codec as they are before training: 16 tokens a slot. The medium tier holds 8,192 slots and is full after 131,072
tokens. Decoding: 64 tokens one by one, so that just one segment is compressed, after that many were read.
Projections are counted on neither side; rotations are on ours, and rivals get queries and keys as if turned already.
Keys and queries are random directions, of which every bucket holds about as many: trained ones share buckets more, up
to the cap on candidates.

Units: seconds of the wall clock (`median`), of processor time (`cpu_seconds`), bytes. Source: Akbar 2025, HARMONY.
Errors: ValueError for a measure that the table does not have.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from hmlab_kernels.bench import Case
from hmlab_kernels.window_attention.cases import pairs
from torch import Tensor
from torch.utils import _pytree as pytree

from hmlab.layers import rotation
from hmlab.memories.harmony import Hierarchy, HierarchyConfig

if TYPE_CHECKING:
    import xarray as xr

CONFIG = HierarchyConfig(window=192, picks=64, tables=4, probes=2, candidates=256, capacity=8192)
HEADS, DIM = 1, 64
CALL = 4096  # tokens fed at a time
DECODED = CONFIG.segment  # tokens of one call of a decoding candidate
# Student's t that 2.5 % exceed, by degrees of freedom from 1 on.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


class Meter:
    """A candidate that tells processor seconds of each of its calls, all threads together, and what is held after it.

    run: returns the bytes that the candidate keeps for the tokens to come.
    """

    def __init__(self, run: Callable[[], int]) -> None:
        self.run, self.held, self.seconds = run, 0, []

    @torch.no_grad()
    def __call__(self) -> None:
        start = time.process_time()
        self.held = self.run()
        self.seconds.append(time.process_time() - start)


class Reading(NamedTuple):
    """What a meter shows: bytes held, and quartiles of the processor seconds of all calls but the first."""

    held_bytes: float
    cpu_low: float
    cpu_seconds: float
    cpu_high: float


Readings = dict[tuple[str, str], Reading]  # by case and candidate


class Exponent(NamedTuple):
    """Of one candidate's cases of one op; low, high: of a 95 % interval."""

    op: str
    candidate: str
    exponent: float
    low: float
    high: float


class Text(NamedTuple):
    """q, k: as the hierarchy wants them, k of unit norm, q as long as random keys need for scores of variance 1."""

    q: Tensor
    k: Tensor
    v: Tensor
    tokens: Tensor

    @classmethod
    def random(cls, length: int, device: str) -> Text:
        q, k, v = (torch.randn(1, length, HEADS, DIM, device=device) for _ in range(3))
        q = F.normalize(q, dim=-1).mul_(DIM**0.5)
        return cls(q, F.normalize(k, dim=-1), v, torch.randint(256, (1, length), device=device))

    def cut(self, begin: int, end: int) -> Text:
        return Text(*(x[:, begin:end] for x in self))


class Layer:
    """The hierarchy, its rotation and its state, which a call replaces."""

    def __init__(self, device: str) -> None:
        self.hierarchy = Hierarchy(CONFIG, heads=HEADS, kv_heads=HEADS, head_dim=DIM).to(device).eval()
        self.norm = torch.full((HEADS,), DIM**0.5, device=device)
        self.state: Any = None

    def read(self, text: Text, call: int = CALL) -> Layer:
        """Read on, `call` tokens at a time."""
        for begin in range(0, text.q.shape[1], call):
            q, k, v, tokens = text.cut(begin, begin + call)
            _, self.state = self.hierarchy(q, k, v, self.state, tokens=tokens, norm=self.norm,
                                           rotate=lambda x, position: rotation(x, position, 10000.0))  # fmt: skip
        return self

    @property
    def bytes(self) -> int:
        return sum(x.nbytes for x in pytree.tree_leaves(self.state))


def cases(device: str = "cpu", lengths: Sequence[int] = tuple(4**n for n in range(5, 11)), quadratic: int = 65536,
          read: Sequence[int] = (1024, 16384, 131072)) -> Iterator[Case]:
    """lengths: of a forward pass. quadratic: the longest that attention to the whole past is measured at. read: tokens
    before those decoded."""
    text = Text.random(max(*lengths, *read), device)
    for length in lengths:
        yield forward(device, text.cut(0, length), rival=length <= quadratic)
    next_tokens = Text.random(DECODED, device)
    for length in read:
        yield decoding(device, text.cut(0, length), next_tokens)


def forward(device: str, text: Text, *, rival: bool) -> Case:
    length = text.q.shape[1]
    runs = {"harmony": Meter(lambda: Layer(device).read(text).bytes)}
    if rival:
        q, k, v = (x.transpose(1, 2).contiguous() for x in text[:3])

        def attend() -> int:
            F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)
            return k.nbytes + v.nbytes

        runs["attention"] = Meter(attend)
    numbers, scores = 4 * length * HEADS * DIM, pairs(length, CONFIG.window) + length * CONFIG.picks
    return Case(f"harmony, {length} tokens", runs, 4 * numbers, 4 * HEADS * DIM * scores, op="harmony forward",
                length=length, tokens=length)  # fmt: skip


def decoding(device: str, text: Text, new: Text) -> Case:
    """Attention writes over its cache's last places in every call; the layer decodes on from where it was."""
    length = text.q.shape[1]
    with torch.no_grad():
        layer = Layer(device).read(text)
    q = new.q.transpose(1, 2)
    keys, values = (F.pad(x.transpose(1, 2), (0, 0, 0, DECODED)) for x in (text.k, text.v))
    added = [x.transpose(1, 2) for x in (new.k, new.v)]

    def attend() -> int:
        for n in range(DECODED):
            end = length + n + 1
            for cache, x in zip((keys, values), added, strict=True):
                cache[:, :, end - 1] = x[:, :, n]
            F.scaled_dot_product_attention(q[:, :, n : n + 1], keys[:, :, :end], values[:, :, :end], scale=1.0)
        return keys.nbytes + values.nbytes

    seen = min(length, CONFIG.window) + CONFIG.picks
    runs = {"harmony": Meter(lambda: layer.read(new, 1).bytes), "attention": Meter(attend)}
    return Case(f"harmony, {DECODED} decoded after {length} tokens", runs, 4 * DECODED * HEADS * DIM * 2 * seen,
                4 * DECODED * HEADS * DIM * seen, op="harmony decoding", length=length, tokens=DECODED)  # fmt: skip


def metered(cases: Iterable[Case], readings: Readings) -> Iterator[Case]:
    """The cases, one at a time; what the meters of each show goes into `readings` once it was measured."""
    for case in cases:
        yield case
        for name, run in case.runs.items():
            if isinstance(run, Meter):
                low, median, high = map(float, np.percentile(run.seconds[1:], (25, 50, 75)))
                readings[case.name, name] = Reading(float(run.held), low, median, high)


def with_readings(measured: xr.Dataset, readings: Readings) -> xr.Dataset:
    """With what meters showed, missing where a candidate has none."""
    none = Reading(*[np.nan] * 4)
    table = np.array([[readings.get((case, name), none) for name in measured["candidate"].values]
                      for case in measured["case"].values])  # fmt: skip
    about = {
        "held_bytes": {"long_name": "held for the tokens to come", "units": "bytes"},
        "cpu_low": {"long_name": "lower quartile of processor time", "units": "s"},
        "cpu_seconds": {"long_name": "median processor time, all threads", "units": "s"},
        "cpu_high": {"long_name": "upper quartile of processor time", "units": "s"},
    }
    return measured.assign({name: (("case", "candidate"), table[..., n], about[name])
                            for n, name in enumerate(Reading._fields)})  # fmt: skip


def exponents(measured: xr.Dataset, *, median: str = "cpu_seconds", low: str = "cpu_low", high: str = "cpu_high"
              ) -> list[Exponent]:
    """How time grows with length, for every op and candidate measured at three lengths or more.

    The interval adds in squares what the medians scatter about the line (Student's t) and what repeats scatter about
    their median, each median as uncertain as one repeat: on a machine with other users, repeats err together.
    Raises ValueError for a variable that is not there.
    """
    for name in (median, low, high):
        if name not in measured:
            raise ValueError(f"measured: expected the variable {name}, got {sorted(map(str, measured.data_vars))}")
    found = []
    if "candidate" in measured["op"].dims:  # a table that was kept says it of every candidate
        measured = measured.assign({name: measured[name].isel(candidate=0) for name in ("op", "length")})
    ops = measured["op"].values
    for op in dict.fromkeys(map(str, ops)):
        of_op = measured.isel(case=np.flatnonzero(ops == op))
        for candidate in map(str, of_op["candidate"].values):
            of = of_op.sel(candidate=candidate).dropna("case", subset=[median])
            if of.sizes["case"] < 3:
                continue
            middle, bottom, top = (np.log(of[name].values) for name in (median, low, high))
            slope, half = _slope(np.log(of["length"].values), middle, (top - bottom) / 1.349)
            found.append(Exponent(op, candidate, slope, slope - half, slope + half))
    return found


def _slope(x: np.ndarray, y: np.ndarray, deviation: np.ndarray) -> tuple[float, float]:
    """Of y over x, and half of its 95 % interval. deviation: standard, of each y."""
    x = x - x.mean()
    slope = float(x @ y / (x @ x))
    freedom = len(x) - 2
    residual = y - y.mean() - slope * x
    scatter = _T[min(freedom, len(_T)) - 1] * np.sqrt(residual @ residual / freedom / (x @ x))
    repeats = 1.96 * np.sqrt(x**2 @ deviation**2) / (x @ x)
    return slope, float(np.hypot(scatter, repeats))
